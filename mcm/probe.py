"""Probes of frozen features: k-NN and a linear classifier, each naming the input and the tokens it saw."""

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pydantic

from cache_tools.cache import Cache
from cache_tools.console import warn_if_not_saved
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import Record, Text, encode_record, nearest, read_record
from cache_tools.storage import file_sha256, work_dir, write_atomic
from mcm.backbones import Backbone, load_encoder
from mcm.classifiers import Features, knn_accuracy, linear_probe, training_rows
from mcm.features import Prober, device
from mcm.metrics import Gram
from mcm.run_dir import recorded, software
from mcm.scorecard import Teacher, stored_features, teacher_facts

METHODS = ("knn", "linear")
FEATURES = ("mean", "cls", "both")  # of the patch tokens, the class token, one beside the other
LEAST_SHOTS = 5  # of the linear probe: a fifth of the labels chooses C
LATER = pydantic.Field(exclude_if=lambda value: value is None)  # left out, as in the probes of before


class ProbeResult(Record):
    """One input's accuracies as fractions of 1, and what they were measured with.

    `val_in_train`: pictures of "val" that are also in "train". A RUN has the sha256 of its run.json, and of its cache.
    """

    subject: Text
    weights: str
    input: str
    fold_scale: float | None = None
    knn: float | None = None
    linear: float | None = None
    linear_c: float | None = None
    linear_converged: bool | None = None
    train_rows: int
    val_rows: int
    seed: int
    data_sha256: str
    versions: dict[str, str]
    features: Annotated[str | None, LATER] = None
    shots: Annotated[int | None, LATER] = None
    val_in_train: Annotated[int | None, LATER] = None
    software: Annotated[str | None, LATER] = None
    run_sha256: Annotated[str | None, LATER] = None
    cache_sha256: Annotated[str | None, LATER] = None
    teacher: Annotated[Teacher | None, LATER] = None

    @property
    def label(self) -> str:
        """The input, and what is not as usual: other features than the mean patch token, few labels."""
        features = "" if self.features in (None, "mean") else f"-{self.features}"
        return f"{self.input}{features}" + (f"-shots-{self.shots}" if self.shots else "")


def record_name(label: str, data_sha256: str, seed: int, untrained: bool = False) -> str:
    """The file in RUN/probe: another DATASET or seed does not take its place."""
    name = f"{'untrained-' * untrained}{label.replace(':', '-')}-{data_sha256[:12]}"
    return f"{name}-seed-{seed}.json" if seed else f"{name}.json"


def probe(
    spec: str, data: Path | None, methods: Sequence[str] = (), inputs: Sequence[str] = (), weights: Path | None = None,
    untrained: bool = False, seed: int = 0, workers: int = 4, quiet: bool = False, features: Sequence[str] = (),
    shots: int = 0,
) -> list[ProbeResult]:  # fmt: skip
    """Probe a RUN, an exported folder, timm:NAME (features of `data`'s pictures) or a CACHE (its teacher's features).

    Results of a RUN are written to RUN/probe/, those of a CACHE to CACHE/.run/probe*.json. A result that cannot be
    written, as the folder is another user's or the disk is full, is returned with a warning.
    Raises: UsageError before any picture is read.
    """
    chosen = tuple(methods) or METHODS
    for option, names, allowed in (("--method", chosen, METHODS), ("--features", features, FEATURES)):
        for name in names:
            if name not in allowed:
                raise UsageError(f"{option}: expected {' or '.join(allowed)}; found {name!r}{nearest(name, allowed)}")
    if 0 < shots < LEAST_SHOTS and "linear" in chosen:
        raise UsageError(f"--shots {shots}: expected {LEAST_SHOTS} or more for the linear probe; use --method knn")
    if (Path(spec) / "cache.json").is_file():
        return _probe_teacher(Path(spec), chosen, features, shots, seed, quiet)
    if data is None:
        raise UsageError(f"{spec}: expected --data DATASET with the pictures to probe on; it is missing")
    dataset = labelled(Dataset(data))
    backbone = load_encoder(spec, weights, untrained=untrained)
    kinds = input_kinds(backbone, inputs, spec)
    wanted = dict.fromkeys(features or FEATURES[:1])
    _check_features(wanted, backbone.model.has_class_token, spec)
    run, is_run = Path(spec), (Path(spec) / "run.json").is_file()
    copies = warn_of_copies(dataset, quiet)
    facts: dict[str, Any] = {"val_in_train": copies, "data_sha256": dataset.sha256, "seed": seed}
    if is_run:
        facts |= {"run_sha256": file_sha256(run / "run.json"), "cache_sha256": recorded(run).get("cache_sha256")}
    results = []
    for tokens in wanted:
        prober = Prober(backbone, dataset, seed, workers, quiet, tokens, shots)
        rows = prober.rows() if shots else None
        for kind in kinds:
            encode, s = prober.encoder(kind)
            train, val = prober.features("train", encode, rows), prober.features("val", encode)
            named = {"subject": spec, "weights": backbone.weights, "input": kind, "fold_scale": s}
            result = _score(train, val, chosen, features=tokens, shots=shots, **named, **facts)
            name = record_name(result.label, dataset.sha256, seed, untrained)
            results.append(_store(run / "probe" / name, result) if is_run else result)
    return results


def _probe_teacher(
    path: Path, methods: Sequence[str], features: Sequence[str], shots: int, seed: int, quiet: bool
) -> list[ProbeResult]:
    cache = Cache(path)
    identity, units = cache.identity, [cache.complete_units(split)[:1] for split in ("train", "val")]
    wanted = dict.fromkeys(features or (FEATURES if identity.has_cls else FEATURES[:1]))
    _check_features(wanted, identity.has_cls, str(path))
    for split, unit in zip(("train", "val"), units, strict=True):
        if not unit:
            raise UsageError(f"{path}: expected a complete unit of {split!r} to probe; finish `mcm-cache extract`")
        if any((unit[0].index(shard)["label"] < 0).any() for shard in range(unit[0].num_shards)):
            raise UsageError(f"{path}: expected a label for every picture of {split!r}; found pictures without one")
    (train_unit,), (val_unit,), gram = *units, Gram(identity.channels, device())
    train, val = stored_features(train_unit, quiet), stored_features(val_unit, quiet, gram)
    train = train.rows(training_rows(train.y.numpy(), identity.classes, shots, seed)) if shots else train
    facts: dict[str, Any] = {"teacher": teacher_facts(train_unit, gram), "data_sha256": cache.sha256, "seed": seed}
    facts |= {"subject": identity.teacher.name, "weights": f"sha256:{identity.teacher.weights_sha256}"}
    results = []
    for tokens in wanted:
        columns = {"mean": slice(identity.channels), "cls": slice(identity.channels, None)}.get(tokens, slice(None))
        bank, held = (Features(split.x[:, columns], split.y) for split in (train, val))
        result = _score(bank, held, methods, features=tokens, shots=shots, input="full", **facts)
        name = f"probe{result.label.removeprefix('full')}" + (f"-seed-{seed}" if seed else "")
        results.append(_store(work_dir(path) / f"{name}.json", result))
    return results


def _score(train: Features, val: Features, methods: Sequence[str], **facts: Any) -> ProbeResult:
    found = linear_probe(train, val, facts["seed"]) if "linear" in methods else None
    linear, c, converged = found or (None, None, None)
    if "linear" in methods and found is None:
        print("warning: no linear probe: expected two classes, and a class of two training rows", file=sys.stderr)
    return ProbeResult(
        knn=knn_accuracy(train, val, device()) if found is None or "knn" in methods else None,
        linear=linear, linear_c=c, linear_converged=converged,
        train_rows=len(train.y), val_rows=len(val.y), software=software(),
        versions={name: version(name) for name in ("torch", "timm", "scikit-learn", "numpy")},
        **facts,
    )  # fmt: skip


def _store(path: Path, result: ProbeResult) -> ProbeResult:
    """Write the result, or warn that it is not kept; the other method's number stays where nothing else has changed."""
    empty: dict[str, Any] = dict.fromkeys(("knn", "linear", "linear_c", "linear_converged"))
    with warn_if_not_saved():
        if path.is_file():
            old = read_record(ProbeResult, path)
            if old.model_copy(update=empty) == result.model_copy(update=empty):
                result = old.model_copy(update=result.model_dump(include=set(empty), exclude_none=True))
        write_atomic(path, encode_record(result))
    return result


def labelled(dataset: Dataset) -> Dataset:
    """The dataset.

    Raises: UsageError unless every picture of its "train" and "val" has a label.
    """
    for split in ("train", "val"):
        if not dataset.rows(split) or (dataset.labels(split) < 0).any() or len(dataset.classes) < 2:
            hint = "; it has masks: use `mcm-train probe`" if dataset.record.task else ""
            wanted = f"expected labels for every picture of {split!r}, of two classes or more"
            raise UsageError(f"{dataset.path}: {wanted}{hint}")
    return dataset


def warn_of_copies(dataset: Dataset, quiet: bool) -> int:
    """How many pictures of "val" are also in "train"; says so unless `quiet`."""
    rows = dataset.copies("val", "train")
    if len(rows) and not quiet:
        found = f"{len(rows)} of {dataset.rows('val')} pictures of 'val' are also in 'train', byte for byte"
        print(f"warning: {dataset.path}: {found}, such as row {rows[0]}", flush=True)
    return len(rows)


def input_kinds(backbone: Backbone, inputs: Sequence[str], spec: str) -> list[str]:
    """The inputs to probe, "full" first.

    Raises: UsageError for the name of no input, and for one that needs a model trained with masks.
    """
    kinds = tuple(inputs) or (("full", "folded") if backbone.masked is not None else ("full",))
    for kind in kinds:
        check_kind(kind)
        if kind != "full" and backbone.masked is None:
            raise UsageError(f"--input {kind}: expected a RUN trained with masks; {spec} is not; use full")
    return list(dict.fromkeys(("full", *kinds)))


def check_kind(kind: str) -> None:
    """Raises: UsageError for the name of no input."""
    if not re.fullmatch("full|folded|masked:[1-9][0-9]{0,3}", kind):
        raise UsageError(f"--input: expected full, folded or masked:K with K > 0, such as masked:8; found {kind!r}")


def _check_features(wanted: Iterable[str], has_cls: bool, where: str) -> None:
    if not has_cls and (needing := [name for name in wanted if name != "mean"]):
        raise UsageError(f"--features {needing[0]}: expected a class token; {where} has none; use mean")
