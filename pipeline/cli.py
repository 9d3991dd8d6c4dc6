"""The program `mcm-cache`: stage one, pictures in, cache out."""

from cache_tools.program import begin

begin()

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools.console import guarded, print_json
from cache_tools.errors import CorruptionError, UsageError

if TYPE_CHECKING:  # imported where they are used: torch is slow to come
    from cache_tools.verify import Report

    from .recompute import Recomputed

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        print(f"mcm-cache {version('masked-channel-modeling')}")
        raise typer.Exit


@app.callback()
def mcm_cache(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Masked channel modeling, stage one: shard pictures, extract a teacher's features once, verify them."""


@app.command("demo-data", no_args_is_help=True)
@guarded
def demo_data_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder: OUT/pictures and OUT/clip.")],
) -> None:
    """Make a small real dataset (scikit-learn's digits) and a small real CLIP trained on it, offline.

    Example: mcm-cache demo-data demo
    """
    from .demo_data import demo_data

    demo_data(out)


@app.command("shard", no_args_is_help=True)
@guarded
def shard_command(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] DATASET",
            help="SOURCE: an ImageFolder (train/ and val/, or flat), tars (a folder, a file, a glob, a quoted {a..b}), "
            "or masks: ADE20K's folders, {train,val}/{images,masks}. DATASET: a new folder, or an unfinished one.",
        ),
    ],
    train: Annotated[str | None, typer.Option(metavar="SOURCE", help="The source of split train by itself.")] = None,
    val: Annotated[
        str, typer.Option(metavar="SOURCE|SHARE", help="The source of split val, or its share of train, by name.")
    ] = "0",
    rows_per_shard: Annotated[int, typer.Option(help="Pictures a tar; a multiple of 16.")] = 1024,
    seed: Annotated[int, typer.Option(help="Decides the order of the rows.")] = 0,
    max_refused: Annotated[float, typer.Option(help="Largest share of a split's pictures that may be refused.")] = 0.01,
    workers: Annotated[int | None, typer.Option(help="Decoding processes; one per core where left out.", min=1)] = None,
    ignore: Annotated[
        list[int] | None, typer.Option(help="Masks: a value that means unlabelled; may be repeated. ADE20K's is 0.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Masks: a class name per line, in the order of their values.")
    ] = None,
) -> None:
    """Check every picture and put it into WebDataset tars with an index; the same command resumes.

    Example: mcm-cache shard ~/imagenet imagenet-dataset
    """
    from .shard import shard

    *rest, dataset = places
    try:
        share, named = float(val), {"train": train}
    except ValueError:
        share, named = 0.0, {"train": train, "val": val}
    by_split = {split: source for split, source in named.items() if source}
    if len(rest) != (not by_split):
        raise UsageError(f"expected SOURCE and DATASET, or DATASET with --train and --val; found {' '.join(places)}")
    record = shard(
        by_split or rest[0], dataset, rows_per_shard, seed, max_refused, workers, share, ignore or (), classes
    )
    for name, split in record.splits.items():
        print(f"{name}: {split.rows} rows in {len(split.shards)} shards, {split.refused} refused")
    print(f"{dataset}: {len(record.classes)} classes; next: mcm-cache extract {dataset} CACHE --teacher ...")


@app.command("extract", no_args_is_help=True)
@guarded
def extract_command(
    source: Annotated[
        str, typer.Argument(metavar="DATASET", help="Or pictures, which are sharded into CACHE/dataset first.")
    ],
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="New folder, or one to continue.")],
    config: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="A TOML file, or a shipped one: extract/clip_vitb16.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="open_clip:ARCH, open_clip:FOLDER or timm:NAME.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="A tag (openai), FILE or FILE#SET, 'pretrained' (timm), or 'random'.")
    ] = None,
    teacher_size: Annotated[
        int | None, typer.Option(help="Side of the teacher's input; a multiple of its patch.")
    ] = None,
    teacher_mean: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Of pixels in [0, 1]; one number for all.")
    ] = None,
    teacher_std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Beside --teacher-mean.")] = None,
    views: Annotated[int | None, typer.Option(help="Views per training picture; more can be added later.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of a view in pixels: what the student sees.")] = None,
    dtype: Annotated[str | None, typer.Option(help="int8 or float16.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="All splits where left out; may be repeated.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures per forward, a multiple of 16.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the file; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default the worker's own GPU.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Rendering threads; by default its share.")] = None,
    worker: Annotated[int | None, typer.Option(help="Number of this worker; by default from the launcher.")] = None,
    workers: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print bytes, shards and hours; write nothing.")] = False,
) -> None:
    """Write views and teacher features, shard by shard; the same command resumes, several at once share the work.

    Example: mcm-cache extract dataset cache --config extract/clip_vitb16
    """
    from .config import load_config
    from .extract import Request, extract
    from .worker import launched

    flags = dict(teacher=teacher, weights=weights, views=views, size=size, dtype=dtype, batch=batch, splits=split)
    flags |= dict(teacher_size=teacher_size, teacher_mean=teacher_mean, teacher_std=teacher_std)
    request = load_config(config, flags, set_ or ())
    extract(Request(source, cache, request, launched(worker, workers, device, threads), dry_run))


@app.command("info", no_args_is_help=True)
@guarded
def info_command(
    path: Annotated[Path, typer.Argument(metavar="CACHE|DATASET")],
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a CACHE or DATASET is, which shards are done and which workers hold the others.

    Example: mcm-cache info cache
    """
    from cache_tools.info import info, summary

    known = info(path)
    if json:
        print_json(known)
    else:
        print(summary(known))


@app.command("preview", no_args_is_help=True)
@guarded
def preview_command(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="With a complete view of the split.")],
    data: Annotated[Path | None, typer.Option(help="Its DATASET, for the originals; CACHE/dataset if there.")] = None,
    rows: Annotated[int, typer.Option(help="Pictures, spread evenly over the split.", min=1, max=50)] = 8,
    out: Annotated[Path, typer.Option(help="The PNG file; one of that name is replaced.")] = Path("preview.png"),
    split: Annotated[str, typer.Option(help="The split that is shown.")] = "train",
) -> None:
    """Draw a contact sheet: crops on the originals, views as stored, features in PCA colours.

    Example: mcm-cache preview cache --data dataset --out preview.png
    """
    from cache_tools.preview import preview

    print(preview(cache, out, data, rows, split))


@app.command("verify", no_args_is_help=True)
@guarded
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="CACHE|DATASET")],
    quick: Annotated[bool, typer.Option("--quick", help="Records and sizes alone; no data is read.")] = False,
    subset: Annotated[str, typer.Option(help="Share of the shards, such as 5%, at least one of each unit.")] = "100%",
    seed: Annotated[int, typer.Option(help="Draws the subset and the rows of --recompute.")] = 0,
    recompute: Annotated[int, typer.Option(help="Rows to compute again with --teacher and --weights.", min=0)] = 0,
    teacher: Annotated[str, typer.Option(help="As in extract, for --recompute.")] = "",
    weights: Annotated[str, typer.Option(help="As in extract, for --recompute.")] = "",
    device: Annotated[str | None, typer.Option(help="As in extract, for --recompute.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged to PATH/.run/quarantine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check the sha256 of every committed file; exit 4 and the files by name when something is damaged.

    Example: mcm-cache verify cache
    """
    from cache_tools.info import guessed
    from cache_tools.verify import verify

    share = re.fullmatch(r"([0-9]+\.?[0-9]*)%", subset)
    if not share:
        raise UsageError(f"--subset {subset!r}: expected a share such as 5%")
    if recompute and not (teacher and weights and (path / "cache.json").is_file()):
        raise UsageError("--recompute: expected a CACHE, and --teacher and --weights as in its `mcm-cache extract`")
    if warning := guessed(path):
        print(f"warning: {warning}", file=sys.stderr)
    report = verify(path, quick, float(share[1]) / 100, seed, quiet=json)
    again = None
    if recompute and report.problems:
        print("--recompute: left out until what is damaged below is made again", file=sys.stderr)
    elif recompute:
        from .recompute import recompute as compute_again

        again = compute_again(path, recompute, teacher, weights, device, seed)
        report.problems += again.problems
    _conclude(report, again, repair, json)


def _conclude(report: "Report", again: "Recomputed | None", move: bool, json: bool) -> None:
    """Print what `verify` found and, with `move`, move it; CorruptionError when it found something."""
    from dataclasses import asdict

    from cache_tools.repair import repair

    lines = [f"{again.rows} rows computed again, lowest cosine {again.lowest_cosine:.6f}"] if again else []
    lines += [problem.text for problem in report.problems]
    if lines and not json:  # before a repair, which may fail
        print("\n".join(lines), flush=True)
    done = repair(report) if move and report.problems else None
    if json:
        cosines = {"rows": again.rows, "lowest_cosine": again.lowest_cosine} if again else None
        parts = {"recomputed": cosines, "repair": done and asdict(done)}
        print_json(asdict(report) | {name: part for name, part in parts.items() if part is not None})
    else:
        share = f", {report.shards} of {report.of} shards" if report.shards < report.of else ""
        whole = f"{report.files} files and {report.rows} rows are as committed"
        what = f"{report.files} files are there with their sizes" if report.quick else whole
        print("\n".join([*(done.lines() if done else []), f"{report.path}: {what}{share}"]))
    if report.problems:
        hint = "" if done else "; `--repair` moves them away, so that they can be made again"
        raise CorruptionError(f"{report.path}: {len(report.problems)} problems, each named above{hint}")


if __name__ == "__main__":
    app()
