"""`mcm-train`: stage two, a cache in and weights out. Only what a command needs is imported, when it runs."""

from cache_tools.program import begin

begin()

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cache_tools.console import guarded, print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[str, typer.Argument(metavar="CONFIG|NAME", help="A TOML file, or a shipped one: pretrain/demo.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")]
Out = Annotated[Path, typer.Option(metavar="RUN", help="The run's folder; the same command again resumes it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove what is in RUN first.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE[#SET]", help="Of timm:NAME; by default the hub's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"mcm-train {version('masked-channel-modeling')}")
        raise typer.Exit


@app.callback()
def mcm_train(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Masked channel modelling, stage two: pretrain on a cache, fine-tune, probe, export, report."""


@app.command(no_args_is_help=True)
@guarded
def pretrain(
    config: Config,
    cache: Annotated[Path, typer.Option(metavar="CACHE", help="Made by `mcm-cache extract`.")],
    out: Out,
    data: Annotated[Path | None, typer.Option(metavar="DATASET", help="Pictures for k-NN while training.")] = None,
    set_: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a student on the complete units of a cache. Under `accelerate launch --no_python` on many GPUs.

    Example: mcm-train pretrain pretrain/demo --cache cache --out run
    """
    from cache_tools.cache import Cache
    from cache_tools.dataset import Dataset
    from cache_tools.records import config_file, load_toml
    from mcm.config import PretrainConfig
    from mcm.pretrain import pretrain as run

    settings = load_toml(PretrainConfig, config_file(config), set_ or ())
    Cache(cache)  # a mistyped CACHE or DATASET must not cost the run that --overwrite removes
    if data is not None:
        Dataset(data)
    _prepare(out, overwrite)
    run(settings, cache, out, data)


@app.command(no_args_is_help=True)
@guarded
def finetune(
    config: Config,
    data: Annotated[Path, typer.Option(metavar="DATASET", help="Made by `mcm-cache shard`.")],
    init: Annotated[str, typer.Option(metavar="RUN|EXPORT|timm:NAME|random", help="Weights to start from.")],
    out: Out,
    weights: Weights = None,
    set_: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a classifier on top of an encoder, all layers.

    Example: mcm-train finetune finetune/demo --data dataset --init run --out tuned
    """
    from cache_tools.dataset import Dataset
    from cache_tools.records import config_file, load_toml
    from mcm.config import FinetuneConfig
    from mcm.finetune import finetune as run

    settings = load_toml(FinetuneConfig, config_file(config), set_ or ())
    Dataset(data)
    _prepare(out, overwrite)
    run(settings, data, init, weights, out)


@app.command(no_args_is_help=True)
@guarded
def probe(
    subject: Annotated[str, typer.Argument(metavar="RUN|EXPORT|timm:NAME|CACHE")],
    data: Annotated[Path | None, typer.Option(metavar="DATASET", help="Labelled pictures; not for a CACHE.")] = None,
    method: Annotated[list[str] | None, typer.Option(metavar="knn|linear", help="Both by default.")] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="full|folded|masked:K", help="full is always printed; may be repeated."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(metavar="mean|cls|both", help="Of the patch tokens, the class token; all of a CACHE by default."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Labels a class; 0 for all.")] = 0,
    weights: Weights = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="RUN's model with the weights it began with.")] = False,
    seed: Seed = 0,
    workers: Workers = 4,
    json: Json = False,
) -> None:
    """Measure frozen features by k-NN and by a linear classifier (LBFGS); with masks, patch tokens by a linear one.

    Example: mcm-train probe run --data dataset
    """
    from cache_tools.dataset import Dataset
    from cache_tools.errors import UsageError
    from mcm.dense_probe import dense_probe, text
    from mcm.probe import probe as run

    if data is not None and Dataset(data).record.task == "segment":
        if method or features or shots:
            raise UsageError(f"--method, --features, --shots: expected none of them; {data} has masks, not labels")
        dense = dense_probe(subject, data, input_ or (), weights, untrained, seed, workers, json)
        if json:
            return print_json([result.model_dump(mode="json") for result in dense])
        return print("\n".join(map(text, dense)))
    results = run(
        subject, data, method or (), input_ or (), weights, untrained, seed, workers, json, features or (), shots
    )
    if json:
        return print_json([result.model_dump(mode="json") for result in results])
    for result in results:
        scale = "" if result.fold_scale is None else f" (s = {result.fold_scale:.3g})"
        knn = "" if result.knn is None else f"  k-NN {100 * result.knn:.1f} %"
        linear = "" if result.linear is None else f"  linear (LBFGS) {100 * result.linear:.1f} %"
        print(f"{result.subject} {result.weights}: {result.label}{scale}:{knn}{linear}")
    if results[-1].teacher is not None:
        print(f"{subject}, patch features of the teacher:\n{results[-1].teacher.text()}")


@app.command()
@guarded
def ablate(
    plan: Annotated[str, typer.Argument(metavar="PLAN|NAME", help="A TOML file, or a shipped one: ablate/demo.")],
    cache: Annotated[Path, typer.Option(metavar="CACHE", help="Of every row that names no other beside it.")],
    data: Annotated[Path, typer.Option(metavar="DATASET", help="Labelled pictures to probe and fine-tune on.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of all runs; the same command resumes.")],
    weights: Weights = None,
    workers: Workers = 4,
) -> None:
    """Compare the rows of a plan over seeds. With several GPUs, start the command once per GPU."""
    from cache_tools.errors import UsageError
    from cache_tools.records import config_file, load_toml
    from mcm.ablate import Plan
    from mcm.ablate import ablate as run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("mcm-train ablate: expected one process; found a launcher's; start it once per GPU")
    failed = run(load_toml(Plan, config_file(plan)), cache, data, out, weights, workers)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    print(f"{out / 'table.md'}, {out / 'report.html'}")
    if failed:
        names = ", ".join(f"{step.args[0]} of {step.run}" for step in failed)
        print(f"error: {len(failed)} commands failed: {names}", file=sys.stderr)
        sys.exit(max(1, *failed.values()))


@app.command(no_args_is_help=True)
@guarded
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    folded: Annotated[float | None, typer.Option(metavar="S", help="Fold x~ = e + S (x - e) into the weights.")] = None,
    json: Json = False,
) -> None:
    """Write RUN's encoder (a fine-tuned RUN's with its head) as a folder that timm and transformers' AutoModel load.

    Example: mcm-train export run encoder
    """
    from mcm.export import export as write

    config = write(run, out, folded)
    if json:
        return print_json(config)
    print(f'{out}: {config["mcm"]["weights"]}; timm.create_model("local-dir:{out}", pretrained=True)')


@app.command(no_args_is_help=True)
@guarded
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN|CACHE|ABLATIONS...")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file.")] = Path("report.html"),
    note: Annotated[str, typer.Option(metavar="TEXT", help="Shown above the table.")] = "",
    json: Json = False,
) -> None:
    """Write one static HTML file and print a table per DATASET; a CACHE adds its teacher, ABLATIONS a section.

    Example: mcm-train report run tuned cache --out report.html
    """
    from mcm.report import caption, markdown
    from mcm.report import report as write

    tables = write(runs, out, note)
    if json:
        return print_json(tables)
    for data, table in tables.items():
        print(f"{caption(data)}\n\n{markdown(table.lines())}")
    print(f"report: {out}")


def _prepare(out: Path, overwrite: bool) -> None:
    """Check that `out` may hold a RUN, and remove the RUN in it with `overwrite`."""
    from cache_tools.errors import UsageError, check_output
    from cache_tools.storage import remove_tree
    from mcm.run_dir import held

    check_output(out, "a RUN")
    if overwrite and out.exists():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(f"--overwrite: expected one process, found several; remove {out} before launching them")
        if not (out / "run.json").is_file():
            raise UsageError(f"--overwrite: expected a RUN (run.json) in {out}; found none; remove it yourself")
        with held(out):
            remove_tree(out)


if __name__ == "__main__":
    app()
