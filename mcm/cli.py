"""The commands of `mcm-train`; each command imports only the modules it needs, when it runs."""

from cache_tools.program import begin

begin()

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_tools.application import application
from cache_tools.console import print_json
from cache_tools.errors import UsageError

app = application(
    "mcm-train",
    "Masked channel modeling, stage two: pre-train on a cache, fine-tune, probe, export.",
)

TOML_HELP = "A TOML file, or the name of a shipped one, such as"
SET_HELP = "Override a key of the configuration; may be repeated."
OUT_HELP = "The folder of the run; the same command resumes it."
WEIGHTS_HELP = "The weights of timm:NAME; by default, timm downloads them."
INPUT_HELP = "Inputs to probe in addition to full; may be repeated."
FEATURES_HELP = "Mean patch token, class token or both; default: mean, or all for a CACHE."
FORMAT_HELP = "The library that loads OUT; onnx needs the extra [onnx], hf needs transformers."
CORRUPT_HELP = "Corrupt val: noise, blur, contrast, jpeg or patches; may be repeated."
FOLDED_HELP = "Fold x~ = e + S (x - e) into the weights; probed: the S that `probe` chose."

Config = Annotated[str, typer.Argument(metavar="CONFIG|NAME", help=f"{TOML_HELP} pretrain/demo.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)]
Out = Annotated[Path, typer.Option(metavar="RUN", help=OUT_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove an existing RUN first.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE[#SET]", help=WEIGHTS_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
Workers = Annotated[int, typer.Option(min=0, help="The number of processes that read pictures.")]


@app.command(no_args_is_help=True)
def pretrain(
    config: Config,
    cache: Annotated[
        str, typer.Option(metavar="CACHE", help="Made by `mcm-cache extract`; or its remote.")
    ],
    out: Out,
    data: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="Pictures for k-NN during training.")
    ] = None,
    local_cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where shards of a remote CACHE are kept.")
    ] = None,
    local_bytes: Annotated[str, typer.Option(help="Most bytes of this folder: 200GB.")] = "200GB",
    set_: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a student on the complete units of a cache.

    For several GPUs, start it with `accelerate launch --no_python mcm-train pretrain ...`.

    Example: mcm-train pretrain pretrain/demo --cache cache --out run
    """
    from cache_tools.cache import Cache
    from cache_tools.dataset import Dataset
    from cache_tools.local_part import attached, parse_bytes
    from cache_tools.records import config_file, load_toml
    from mcm.config import PretrainConfig
    from mcm.pretrain import pretrain as run
    from mcm.run_dir import prepare

    settings = load_toml(PretrainConfig, config_file(config), set_ or ())
    if "://" in cache and local_cache is None:
        raise UsageError(f"{cache}: expected --local-cache FOLDER beside a remote; found none")
    local = attached(cache, local_cache, parse_bytes(local_bytes)) if local_cache else None
    with local or nullcontext(Path(cache)) as path:
        Cache(path)  # before --overwrite removes a run, in case CACHE or DATASET is mistyped
        if data is not None:
            Dataset(data)
        prepare(out, overwrite)
        run(settings, path, out, data)


@app.command(no_args_is_help=True)
def doctor(
    config: Config,
    cache: Annotated[Path, typer.Option(metavar="CACHE", help="Made by `mcm-cache extract`.")],
    processes: Annotated[int, typer.Option(min=1, help="The processes of the training.")] = 1,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Check the set-up of a pre-training before its first step; exit code 2 if a check fails.

    Start it with the launcher of the training. Without one, all processes are on this machine.

    Example: mcm-train doctor pretrain/demo --cache cache
    """
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(processes))  # for the default of train.workers
    from cache_tools.records import config_file, load_toml
    from mcm.config import PretrainConfig
    from mcm.doctor import doctor as check

    found = check(load_toml(PretrainConfig, config_file(config), set_ or ()), cache, processes)
    if json:
        print_json({name: {"status": status, "text": text} for name, status, text in found})
    elif os.environ.get("RANK", "0") == "0":
        print("\n".join(f"{status:<6}{name:<11}{text}" for name, status, text in found))
    sys.stdout.flush()
    raise typer.Exit(2 * any(status == "fail" for _, status, _ in found))


@app.command(no_args_is_help=True)
def finetune(
    config: Config,
    data: Annotated[Path, typer.Option(metavar="DATASET", help="Made by `mcm-cache shard`.")],
    init: Annotated[
        str, typer.Option(metavar="RUN|EXPORT|timm:NAME|random", help="The initial weights.")
    ],
    out: Out,
    weights: Weights = None,
    set_: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Train an encoder with a new head to classify, to segment or to detect.

    The `task` of the configuration and of the DATASET agree. All layers are trained; with
    `frozen = true`, only the head is.

    Example: mcm-train finetune finetune/demo --data dataset --init run --out tuned
    """
    from cache_tools.dataset import Dataset
    from cache_tools.records import config_file, load_toml
    from mcm.config import FinetuneConfig
    from mcm.finetune import finetune as run
    from mcm.run_dir import prepare

    settings = load_toml(FinetuneConfig, config_file(config), set_ or ())
    Dataset(data)
    prepare(out, overwrite)
    run(settings, data, init, weights, out)


@app.command(no_args_is_help=True)
def probe(
    subject: Annotated[str, typer.Argument(metavar="RUN|EXPORT|timm:NAME|CACHE")],
    data: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="Labeled pictures; not for a CACHE.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="knn|linear", help="Default: both.")
    ] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", metavar="full|folded|masked:K", help=INPUT_HELP)
    ] = None,
    features: Annotated[
        list[str] | None, typer.Option(metavar="mean|cls|both", help=FEATURES_HELP)
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Labels per class; 0 for all.")] = 0,
    corrupt: Annotated[
        list[str] | None, typer.Option(metavar="KIND[:STRENGTH]", help=CORRUPT_HELP)
    ] = None,
    weights: Weights = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Probe the initial weights of RUN.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of all random draws.")] = 0,
    workers: Workers = 4,
    json: Json = False,
) -> None:
    """Measure the accuracy of k-NN and of a linear classifier (LBFGS) on frozen features.

    On a DATASET with masks, measure the mIoU of a linear classifier on patch tokens.

    Example: mcm-train probe run --data dataset
    """
    from cache_tools.dataset import Dataset
    from mcm.dense_probe import dense_probe
    from mcm.probe import probe as run

    found: Any
    common = input_ or (), weights, untrained, seed, workers, json
    if data is not None and Dataset(data).record.task == "segment":
        if method or features or shots or corrupt:
            options = "--method, --features, --shots, --corrupt"
            raise UsageError(f"{options}: expected labels; {data} has masks; omit these options")
        found = dense_probe(subject, data, *common)
    else:
        found = run(subject, data, method or (), *common, features or (), shots, corrupt or ())
    if json:
        return print_json([result.model_dump(mode="json") for result in found])
    print("\n".join(result.text() for result in found))
    if teacher := getattr(found[-1], "teacher", None):
        print(f"{subject}, patch features of the teacher:\n{teacher.text()}")


@app.command()
def ablate(
    plan: Annotated[str, typer.Argument(metavar="PLAN|NAME", help=f"{TOML_HELP} ablate/demo.")],
    cache: Annotated[
        Path, typer.Option(metavar="CACHE", help="The cache of each row that names no other.")
    ],
    data: Annotated[
        Path, typer.Option(metavar="DATASET", help="Labeled pictures to probe and fine-tune on.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Of all runs; a repeat resumes.")],
    weights: Weights = None,
    workers: Workers = 4,
) -> None:
    """Compare the rows of a plan over seeds.

    For several GPUs, start the same command once per GPU.

    Example: mcm-train ablate ablate/demo --cache cache --data dataset --out ablations
    """
    from cache_tools.records import config_file, load_toml
    from mcm import ablate as ablation

    rows = load_toml(ablation.Plan, config_file(plan))
    failed = ablation.ablate(rows, cache, data, out, weights, workers)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    print(f"{out / 'table.md'}, {out / 'report.html'}")
    if failed:
        names = ", ".join(f"{step.args[0]} of {step.run}" for step in failed)
        print(f"error: {len(failed)} commands failed: {names}", file=sys.stderr)
        sys.exit(max(1, *failed.values()))


@app.command(no_args_is_help=True)
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A fine-tuned RUN.")],
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", help="A picture, or a folder with subfolders.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    batch: Annotated[int, typer.Option(min=1, help="Pictures per forward.")] = 16,
    max_refused: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of pictures that may be refused.")
    ] = 0.01,
    json: Json = False,
) -> None:
    """Write what a fine-tuned RUN finds in pictures: predictions.jsonl, one line per picture.

    A classifier gives the five most probable classes. A segmenter gives masks/ and drawn/, and a
    detector drawn/ and results.json, which is in COCO's format.

    Example: mcm-train predict tuned photos --out predictions
    """
    from mcm.predict import predict as run_on

    found = run_on(run, pictures, out, batch, max_refused, json)
    if json:
        return print_json(found)
    print(f"{out}: predictions.jsonl has {found['pictures']} pictures; {found['refused']} refused")


@app.command(no_args_is_help=True)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    folded: Annotated[str | None, typer.Option(metavar="S|probed", help=FOLDED_HELP)] = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="timm|hf|mae|onnx", help=FORMAT_HELP)
    ] = "timm",
    json: Json = False,
) -> None:
    """Write RUN's encoder as a folder that timm and transformers' AutoModel load.

    A fine-tuned RUN is written with its classifier, a segmentation RUN without its head. Other
    formats: hf, the ViT of transformers, which needs no timm; mae, a file {"model": tensors}; onnx,
    for any batch size.

    Example: mcm-train export run encoder
    """
    from mcm.export import FORMATS
    from mcm.export import export as write
    from mcm.probe import fold_scale

    config = write(run, out, fold_scale(folded, run) if folded else None, format_)
    if json:
        return print_json(config)
    usage, part = FORMATS[format_].usage.replace("FOLDER", str(out)), config["mcm"].get("part")
    print(f"{out}: {config['mcm']['weights']}{f', {part}' if part else ''}\n    {usage}")


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|CACHE|ABLATIONS...")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file.")] = Path("report.html"),
    note: Annotated[str, typer.Option(metavar="TEXT", help="A text above the tables.")] = "",
    json: Json = False,
) -> None:
    """Write one static HTML file, and print one table per DATASET.

    A CACHE adds the row of its teacher; ABLATIONS, the folder of `mcm-train ablate`, a section.

    Example: mcm-train report run tuned cache --out report.html
    """
    from mcm.page import markdown
    from mcm.report import caption
    from mcm.report import report as write
    from mcm.tables import table_lines

    tables = write(runs, out, note)
    if json:
        return print_json(tables)
    for data, table in tables.items():
        print(f"{caption(data)}\n\n{markdown(table_lines('model', table.cells()))}")
    print(f"report: {out}")


@app.command(no_args_is_help=True)
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="RUNs at any depth below it.")],
    json: Json = False,
) -> None:
    """List the RUNs below a folder: state, step, pictures per second and best metrics.

    A run is running, done, stopped (the same command resumes it), failed, killed or damaged.

    Example: mcm-train runs runs
    """
    from mcm.page import markdown
    from mcm.runs import lines
    from mcm.runs import runs as find

    found = find(folder)
    print_json(found) if json else print(markdown(lines(found)), end="")


@app.command(no_args_is_help=True)
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A RUN with a step that diverged.")],
) -> None:
    """Repeat the step at which RUN diverged, and print what was not finite. RUN does not change.

    Start it without a launcher: one process takes the micro-batches of all ranks.

    Example: mcm-train replay run
    """
    from mcm.replay import replay as repeat

    for stage, names in repeat(run).items():
        print(f"{stage + ':':<11}{', '.join(names[:4])}{' ...' * (len(names) > 4)}")


if __name__ == "__main__":
    app()
