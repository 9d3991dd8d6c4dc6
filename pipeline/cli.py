"""The program `mcm-cache` (stage one): it turns pictures into a cache.

Commands import what they use, because torch is slow to import.
"""

from cache_tools.program import begin

begin()

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from cache_tools.application import application
from cache_tools.console import print_json
from cache_tools.errors import UsageError

from . import folder_commands

if TYPE_CHECKING:
    from .extract import Request

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


_VAL = "Source of split val, or its share of train."
_REFUSED = "Largest share of a split's pictures that may be refused."
_IGNORE = "Masks: a value that means unlabeled; may be repeated. ADE20K uses 0."
_CLASSES = "Masks: class names, one per line, in the order of values."
_COLUMN = "Parquet: a column to use, if several fit; may be repeated."


@app.command("shard", no_args_is_help=True)
def shard_command(
    places: Annotated[list[str], Argument(metavar="[SOURCE] DATASET", help=_PLACES)],
    train: Annotated[str | None, Option(metavar="SOURCE", help="Source of split train.")] = None,
    val: Annotated[str, Option(metavar="SOURCE|SHARE", help=_VAL)] = "0",
    rows_per_shard: Annotated[int, Option(help="Pictures per tar; a multiple of 16.")] = 1024,
    seed: Annotated[int, Option(help="Decides the order of the rows.")] = 0,
    max_refused: Annotated[float, Option(help=_REFUSED)] = 0.01,
    workers: Annotated[int | None, Option(min=1, help="Processes; default: one per core.")] = None,
    ignore: Annotated[list[int] | None, Option(help=_IGNORE)] = None,
    classes: Annotated[Path | None, Option(metavar="FILE", help=_CLASSES)] = None,
    column: Annotated[list[str] | None, Option(help=_COLUMN)] = None,
) -> None:
    """Check every picture and write it into WebDataset tars with an index.

    Run the same command again to resume.

    Example: mcm-cache shard ~/imagenet imagenet-dataset
    """
    from cache_tools.info import info, summary

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
    print(summary(info(Path(dataset))))
    if coco := record.coco:
        print(
            f"{coco.boxes_dropped} boxes without area dropped, {coco.boxes_clipped} boxes clipped "
            f"at the border, {coco.polygons_dropped} invalid polygons dropped"
        )
    following = f"mcm-cache extract {dataset} CACHE --teacher ..."
    if record.task:
        example = {"segment": "finetune/pets_demo", "detect": "finetune/bccd_demo"}[record.task]
        following = f"mcm-train finetune {example} --data {dataset} --init RUN --out TUNED"
    print(f"next: {following}")


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


_TeacherSize = Annotated[
    int | None, Option(help="Side of the teacher's input; a multiple of its patch.")
]
_Mean = Annotated[
    str | None, Option(metavar="R,G,B", help="Of pixels in [0, 1]; one number for all three.")
]
_Split = Annotated[
    list[str] | None, Option(help="A split to extract; may be repeated. By default all.")
]
_Threads = Annotated[
    int | None, Option(min=1, help="Rendering threads; by default this worker's share of cores.")
]
_PROCESSES = (
    "Processes that share this worker's device; by default 1 on a CPU, and on a GPU one per core "
    "except for two, at most 14."
)
_RAY = "Run N workers on a Ray cluster, one per GPU; each is --processes actors."
_ADDRESS = "auto, HOST:PORT or local; by default as RAY_ADDRESS, else a local cluster."
_DATASET = "Or pictures, which are sharded into CACHE/dataset first."


@app.command("extract", no_args_is_help=True)
def extract_command(
    source: Annotated[str, Argument(metavar="DATASET", help=_DATASET)],
    cache: Annotated[Path, Argument(metavar="CACHE", help="A new folder, or one to continue.")],
    config: _Config = None,
    teacher: _Teacher = None,
    weights: _Weights = None,
    teacher_size: _TeacherSize = None,
    teacher_mean: _Mean = None,
    teacher_std: Annotated[str | None, Option(metavar="R,G,B", help="As --teacher-mean.")] = None,
    views: Annotated[int | None, Option(help="Views per training picture; can grow later.")] = None,
    size: Annotated[int | None, Option(help="Side of the student's view, in pixels.")] = None,
    dtype: Annotated[str | None, Option(help="int8 or float16.")] = None,
    split: _Split = None,
    batch: Annotated[int | None, Option(help="Pictures per forward; a multiple of 16.")] = None,
    set_: _Set = None,
    device: _Device = None,
    threads: _Threads = None,
    processes: Annotated[int | None, Option(min=1, help=_PROCESSES)] = None,
    worker: Annotated[int | None, Option(help="This worker; default: the launcher's rank.")] = None,
    workers: Annotated[int | None, Option(help="Number of workers; given with --worker.")] = None,
    ray: Annotated[int | None, Option(min=1, metavar="N", help=_RAY)] = None,
    ray_address: Annotated[str | None, Option(help=_ADDRESS)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print what `plan` prints.")] = False,
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
        _print_plan(Request(source, cache, request, info))
        return
    if ray is None:
        extract(Request(source, cache, request, info))
        return
    from .ray_pool import extract_on_ray

    if worker is not None or info.workers > 1:
        alternatives = "--worker or launcher such as torchrun"
        raise UsageError(f"--ray {ray}: expected no {alternatives}; Ray starts the workers")
    info = info._replace(device=device, threads=threads or 0, processes=processes or 0)
    extract_on_ray(Request(source, cache, request, info), ray, ray_address)


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
    price_per_hour: Annotated[
        float, Option(min=0, help="Price of an hour of this machine, in any currency.")
    ] = 0.0,
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
    asked = Request(source, cache, request, worker_info(device=device))
    _print_plan(asked, rows, samples_per_second, price_per_hour, json)


def _print_plan(
    request: "Request", rows: int | None = None, rate: float = 1000.0, price: float = 0.0,
    json: bool = False,
) -> None:  # fmt: skip
    from .plan import plan

    with redirect_stdout(sys.stderr):  # for the notes of the teacher
        found = plan(request, rows, rate, price)
    if json:
        print_json(found)
    else:
        print("\n".join(f"{key.replace('_', ' '):26}{value}" for key, value in found.items()))


app.add_typer(folder_commands.app)

if __name__ == "__main__":
    app()
