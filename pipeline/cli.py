"""The program `mcm-cache` (stage one): it turns pictures into a cache."""

from cache_tools.program import begin

begin()

import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from cache_tools.application import application
from cache_tools.console import print_json
from cache_tools.errors import CorruptionError, UsageError

if TYPE_CHECKING:  # commands import what they use: torch is slow to import
    from cache_tools.verify import Report

    from .extract import Request
    from .recompute import Recomputed

app = application(
    "mcm-cache",
    "Masked channel modeling, stage one: shard pictures, extract features, verify them.",
)


@app.command("demo-data", no_args_is_help=True)
def demo_data_command(
    out: Annotated[Path, Argument(metavar="OUT", help="New folder: OUT/pictures and OUT/clip.")],
) -> None:
    """Make a small real dataset (scikit-learn's digits) and train a small real CLIP on it, offline.

    Example: mcm-cache demo-data demo
    """
    from .demo_data import demo_data

    demo_data(out)


_PLACES = (
    "SOURCE: an ImageFolder (train/ and val/, or flat), tars or parquet files (a folder, a file, a "
    "glob, a quoted {a..b}), masks (ADE20K's folders, {train,val}/{images,masks}) or boxes (COCO's "
    "annotations/ and {train,val}2017/). DATASET: a new folder, or an unfinished one."
)


@app.command("shard", no_args_is_help=True)
def shard_command(
    places: Annotated[list[str], Argument(metavar="[SOURCE] DATASET", help=_PLACES)],
    train: Annotated[str | None, Option(metavar="SOURCE", help="Source of split train.")] = None,
    val: Annotated[
        str, Option(metavar="SOURCE|SHARE", help="Source of split val, or its share of train.")
    ] = "0",
    rows_per_shard: Annotated[int, Option(help="Pictures per tar; a multiple of 16.")] = 1024,
    seed: Annotated[int, Option(help="Decides the order of the rows.")] = 0,
    max_refused: Annotated[
        float, Option(help="Largest share of a split's pictures that may be refused.")
    ] = 0.01,
    workers: Annotated[int | None, Option(min=1, help="Processes; default: one per core.")] = None,
    ignore: Annotated[
        list[int] | None,
        Option(help="Masks: a value that means unlabeled; may be repeated. ADE20K uses 0."),
    ] = None,
    classes: Annotated[
        Path | None,
        Option(metavar="FILE", help="Masks: class names, one per line, in the order of values."),
    ] = None,
    column: Annotated[
        list[str] | None, Option(help="Parquet: a column to use, if several fit; may be repeated.")
    ] = None,
) -> None:
    """Check every picture and write it into WebDataset tars with an index.

    Run the same command again to resume.

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
        found = " ".join(places)
        expected = "SOURCE and DATASET, or DATASET with --train and --val"
        raise UsageError(f"expected {expected}; found {found}")
    source, ignored = by_split or rest[0], ignore or ()
    options = rows_per_shard, seed, max_refused, workers, share, ignored, classes, column or ()
    record = shard(source, dataset, *options)
    for name, split in record.splits.items():
        objects = f", {split.objects} objects" if record.coco else ""
        rows = f"{split.rows} rows in {len(split.shards)} shards"
        print(f"{name}: {rows}{objects}, {split.refused} refused")
    if coco := record.coco:
        print(
            f"{coco.boxes_dropped} boxes without area dropped, {coco.boxes_clipped} boxes clipped "
            f"at the border, {coco.polygons_dropped} invalid polygons dropped"
        )
    following = f"mcm-cache extract {dataset} CACHE --teacher ..."
    if record.task:
        example = {"segment": "finetune/pets_demo", "detect": "finetune/bccd_demo"}[record.task]
        following = f"mcm-train finetune {example} --data {dataset} --init RUN --out TUNED"
    print(f"{dataset}: {len(record.classes)} classes; next: {following}")


_Config = Annotated[
    str | None,
    Option(metavar="FILE|NAME", help="A TOML file, or a shipped one: extract/clip_vitb16."),
]
_Teacher = Annotated[str | None, Option(help="open_clip:ARCH|FOLDER, or timm:NAME.")]
_Weights = Annotated[
    str | None, Option(help="A tag (openai), FILE, FILE#SET, 'pretrained' (timm) or 'random'.")
]
_Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Set any key of the file; may be repeated."),
]
_Device = Annotated[
    str | None, Option(help="cpu, cuda or cuda:1; by default the worker's own GPU.")
]
_Json = Annotated[bool, Option("--json", help="Print JSON.")]


@app.command("extract", no_args_is_help=True)
def extract_command(
    source: Annotated[
        str,
        Argument(
            metavar="DATASET", help="Or pictures, which are sharded into CACHE/dataset first."
        ),
    ],
    cache: Annotated[Path, Argument(metavar="CACHE", help="A new folder, or one to continue.")],
    config: _Config = None,
    teacher: _Teacher = None,
    weights: _Weights = None,
    teacher_size: Annotated[
        int | None, Option(help="Side of the teacher's input; a multiple of its patch.")
    ] = None,
    teacher_mean: Annotated[
        str | None, Option(metavar="R,G,B", help="Of pixels in [0, 1]; one number for all three.")
    ] = None,
    teacher_std: Annotated[str | None, Option(metavar="R,G,B", help="As --teacher-mean.")] = None,
    views: Annotated[int | None, Option(help="Views per training picture; can grow later.")] = None,
    size: Annotated[int | None, Option(help="Side of the student's view, in pixels.")] = None,
    dtype: Annotated[str | None, Option(help="int8 or float16.")] = None,
    split: Annotated[
        list[str] | None, Option(help="A split to extract; may be repeated. By default all.")
    ] = None,
    batch: Annotated[int | None, Option(help="Pictures per forward; a multiple of 16.")] = None,
    set_: _Set = None,
    device: _Device = None,
    threads: Annotated[
        int | None,
        Option(min=1, help="Rendering threads; by default this worker's share of cores."),
    ] = None,
    processes: Annotated[
        int | None,
        Option(
            min=1,
            help="Processes that share this worker's device; by default 1 on a CPU, and on a GPU "
            "one per core except for two, at most 14.",
        ),
    ] = None,
    worker: Annotated[int | None, Option(help="This worker; default: the launcher's rank.")] = None,
    workers: Annotated[int | None, Option(help="Number of workers; given with --worker.")] = None,
    ray: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Run on N actors of a Ray cluster; on GPUs, one per GPU."),
    ] = None,
    ray_address: Annotated[
        str | None,
        Option(help="auto, HOST:PORT or local; by default as RAY_ADDRESS, else a local cluster."),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what `mcm-cache plan` prints; write nothing.")
    ] = False,
) -> None:
    """Write views and teacher features, shard by shard.

    Run the same command again to resume. Several workers share the shards.

    Example: mcm-cache extract dataset cache --config extract/clip_vitb16
    """
    from .config import load_config
    from .extract import Request, extract
    from .worker import worker_info

    flags: dict[str, object] = dict(teacher=teacher, weights=weights, views=views, size=size)
    flags |= dict(dtype=dtype, batch=batch, splits=split, teacher_size=teacher_size)
    flags |= dict(teacher_mean=teacher_mean, teacher_std=teacher_std)
    request = load_config(config, flags, set_ or ())
    info = worker_info(worker, workers, device, threads, processes)
    if dry_run:
        _plan(Request(source, cache, request, info))
        return
    if ray is None:
        extract(Request(source, cache, request, info))
        return
    from .ray_pool import extract_on_ray

    if worker is not None or processes or info.workers > 1:
        alternatives = "--processes, --worker or a launcher such as torchrun"
        raise UsageError(f"--ray {ray}: expected no {alternatives}; Ray starts the workers")
    info = info._replace(device=device, threads=threads or 0)
    extract_on_ray(Request(source, cache, request, info), ray, ray_address)


def _plan(
    request: "Request", rows: int | None = None, rate: float = 1000.0, json: bool = False
) -> None:
    from .plan import plan

    with redirect_stdout(sys.stderr):  # for the notes of the teacher
        found = plan(request, rows, rate)
    if json:
        print_json(found)
    else:
        print("\n".join(f"{key.replace('_', ' '):26}{value}" for key, value in found.items()))


@app.command("plan", no_args_is_help=True)
def plan_command(
    source: Annotated[
        str, Argument(metavar="[SOURCE]", help="A DATASET, or pictures as in `mcm-cache shard`.")
    ] = "",
    rows: Annotated[
        int | None, Option(min=1, help="Number of pictures, instead of a SOURCE.")
    ] = None,
    cache: Annotated[
        Path, Option(metavar="CACHE", help="Where the cache will be; its disk is measured.")
    ] = Path("cache"),
    samples_per_second: Annotated[
        float, Option(min=1, help="Speed of the training step, in pictures per second.")
    ] = 1000.0,
    config: _Config = None,
    teacher: _Teacher = None,
    weights: _Weights = None,
    set_: _Set = None,
    device: _Device = None,
    json: _Json = False,
) -> None:
    """Print the bytes, files and hours of a cache, and whether this disk feeds the training.

    It measures for about 30 s at most, and writes only a file of 256 MB, which vanishes.

    Example: mcm-cache plan --rows 1281167 --config extract/clip_vitb16
    """
    from .config import load_config
    from .extract import Request
    from .worker import worker_info

    if bool(source) == bool(rows):
        raise UsageError("expected a SOURCE or --rows N; found " + ("both" if source else "none"))
    request = load_config(config, dict(teacher=teacher, weights=weights), set_ or ())
    info = worker_info(device=device)
    _plan(Request(source, cache, request, info), rows, samples_per_second, json)


_Path = Annotated[Path, Argument(metavar="CACHE|DATASET")]


@app.command("info", no_args_is_help=True)
def info_command(path: _Path, json: _Json = False) -> None:
    """Describe a CACHE or DATASET: its content, finished shards, and the workers on the others.

    Example: mcm-cache info cache
    """
    from cache_tools.info import info, summary

    known = info(path)
    if json:
        print_json(known)
    else:
        print(summary(known))


@app.command("preview", no_args_is_help=True)
def preview_command(
    cache: Annotated[
        Path, Argument(metavar="CACHE", help="A cache with a complete view of the split.")
    ],
    data: Annotated[
        Path | None, Option(help="Its DATASET, for the originals; by default CACHE/dataset.")
    ] = None,
    rows: Annotated[
        int, Option(min=1, max=50, help="Number of pictures, spread evenly over the split.")
    ] = 8,
    out: Annotated[Path, Option(help="PNG file; an existing one is replaced.")] = Path(
        "preview.png"
    ),
    split: Annotated[str, Option(help="The split to show.")] = "train",
) -> None:
    """Draw a contact sheet: crops on the originals, views as stored, features in PCA colors.

    Example: mcm-cache preview cache --data dataset --out preview.png
    """
    from cache_tools.preview import preview

    print(preview(cache, out, data, rows, split))


_REMOTE = (
    "A folder, s3://BUCKET/PREFIX, gs:// or az:// (extra s3), or hf://datasets/OWNER/NAME or "
    "hf://buckets/OWNER/NAME (extra hf). docs/share.md says where credentials come from."
)
_Remote = Annotated[str, Argument(metavar="REMOTE", help=_REMOTE)]


@app.command("push", no_args_is_help=True)
def push_command(
    path: Annotated[Path, Argument(metavar="CACHE|DATASET|EXPORT")], remote: _Remote
) -> None:
    """Copy a folder to a remote, shard by shard; what is there already is compared and left.

    Run the same command again to resume.

    Example: mcm-cache push cache s3://bucket/cache
    """
    from cache_tools.transfer import push

    print(push(path, remote))


@app.command("pull", no_args_is_help=True)
def pull_command(
    remote: _Remote,
    folder: Annotated[Path, Argument(metavar="FOLDER", help="New, or one to continue.")],
    first: Annotated[
        str, Option(metavar="SHARE", help="Of a CACHE: the first shards of each split, as 10%.")
    ] = "100%",
    split: Annotated[
        list[str] | None, Option(help="Of a CACHE: a split; may be repeated. By default all.")
    ] = None,
    views: Annotated[int, Option(min=0, help="Of a CACHE: the first views; 0 takes all.")] = 0,
    features_only: Annotated[
        bool, Option("--features-only", help="Of a CACHE: no pictures, so it does not train.")
    ] = False,
) -> None:
    """Copy a CACHE, DATASET or EXPORT from a remote to a folder, and check every digest.

    Run the same command again to resume.

    Example: mcm-cache pull s3://bucket/cache tenth --first 10%
    """
    from cache_tools.transfer import Part, pull

    print(pull(remote, folder, Part(_share("--first", first), split or (), views, features_only)))


def _share(option: str, text: str) -> float:
    """Return a share such as "5%" as a number in (0, 1]."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*)%", text)
    if not found or not 0 < float(found[1]) <= 100:
        raise UsageError(f"{option}: expected a share such as 5%, at most 100%; found {text!r}")
    return float(found[1]) / 100


_AS_IN_EXTRACT = "As in `mcm-cache extract`; for --recompute."


@app.command("verify", no_args_is_help=True)
def verify_command(
    path: _Path,
    quick: Annotated[
        bool, Option("--quick", help="Check records and sizes; read no data.")
    ] = False,
    subset: Annotated[
        str, Option(help="Share of the shards, such as 5%; at least one shard per unit.")
    ] = "100%",
    seed: Annotated[int, Option(help="Draws the subset and the rows of --recompute.")] = 0,
    recompute: Annotated[
        int, Option(min=0, help="Rows to compute again with --teacher and --weights.")
    ] = 0,
    teacher: Annotated[str, Option(help=_AS_IN_EXTRACT)] = "",
    weights: Annotated[str, Option(help=_AS_IN_EXTRACT)] = "",
    device: Annotated[str | None, Option(help=_AS_IN_EXTRACT)] = None,
    repair: Annotated[
        bool, Option("--repair", help="Move damaged files to PATH/.run/quarantine.")
    ] = False,
    json: _Json = False,
) -> None:
    """Check the sha256 of every committed file.

    If something is damaged, print the names of the files and exit with code 4.

    Example: mcm-cache verify cache
    """
    from cache_tools.verify import verify

    share = _share("--subset", subset)
    if recompute and not (teacher and weights and (path / "cache.json").is_file()):
        expected = "a CACHE, and --teacher and --weights as in its `mcm-cache extract`"
        raise UsageError(f"--recompute: expected {expected}")
    report = verify(path, quick, share, seed, quiet=json)
    again = None
    if recompute and report.problems:
        print("--recompute: skipped until the damaged files below are made again", file=sys.stderr)
    elif recompute:
        from .recompute import recompute as compute_again

        again = compute_again(path, recompute, teacher, weights, device, seed)
        report.problems += again.problems
    _conclude(report, again, repair, json)


def _conclude(report: "Report", again: "Recomputed | None", move: bool, json: bool) -> None:
    """Print the problems that `verify` found and, with `move`, move the damaged files.

    Raises: CorruptionError when there is a problem.
    """
    from dataclasses import asdict

    from cache_tools.repair import repair

    lines = [problem.text for problem in report.problems]
    if again:
        cosine = f"lowest cosine {again.lowest_cosine:.6f}"
        lines.insert(0, f"{again.rows} rows computed again, {cosine}")
    if lines and not json:  # print before the repair, which may fail
        print("\n".join(lines), flush=True)
    done = repair(report) if move and report.problems else None
    if json:
        cosines = {"rows": again.rows, "lowest_cosine": again.lowest_cosine} if again else None
        parts = {"recomputed": cosines, "repair": done and asdict(done)}
        parts = {name: part for name, part in parts.items() if part is not None}
        print_json(asdict(report) | parts)
    else:
        share = f", {report.shards} of {report.of} shards" if report.shards < report.of else ""
        whole = f"{report.files} files and {report.rows} rows match their commits"
        what = f"{report.files} files exist with their sizes" if report.quick else whole
        print("\n".join([*(done.lines() if done else []), f"{report.path}: {what}{share}"]))
    if report.problems:
        hint = "" if done else "; add `--repair` to move the damaged files away"
        raise CorruptionError(f"{report.path}: {len(report.problems)} problems, named above{hint}")


if __name__ == "__main__":
    app()
