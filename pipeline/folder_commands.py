"""The commands of `mcm-cache` on a CACHE or DATASET: info, preview, push, pull and verify."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from cache_tools.console import print_json
from cache_tools.errors import CorruptionError, UsageError

if TYPE_CHECKING:
    from cache_tools.verify import Report

    from .recompute import Recomputed

app = Typer()
_Path = Annotated[Path, Argument(metavar="CACHE|DATASET")]
_Json = Annotated[bool, Option("--json", help="Print JSON.")]


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
