"""Probes of frozen features: the accuracy of k-NN and of a linear classifier."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.cache import Cache
from cache_tools.console import warn_if_not_saved
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import Absent, Record, Text, encode_record, nearest, read_record
from cache_tools.schema import installed_versions
from cache_tools.storage import file_sha256, work_dir, write_atomic
from mcm import checkpoint
from mcm.backbones import Backbone, load_encoder
from mcm.classifiers import (
    Features,
    LinearProbe,
    choice_rows,
    knn_accuracy,
    knn_hits,
    linear_probe,
    training_rows,
)
from mcm.corruptions import Corruption
from mcm.engine import device
from mcm.features import Featurizer, columns
from mcm.memory import activation_bytes, print_estimate, state_bytes
from mcm.metrics import Gram
from mcm.run_dir import recorded, software
from mcm.scorecard import TeacherScores, stored_features, teacher_facts

METHODS = ("knn", "linear")
FEATURES = ("mean", "cls", "both")  # mean patch token, class token, the two concatenated
LEAST_SHOTS = 5  # for the linear probe, which needs a fifth of the labels to choose C


class Measured(Record):
    """What a measurement of one input of an encoder depends on.

    Records add `val_in_train`, the number of pictures of "val" that are also in "train", and for a
    RUN `run_sha256`, the sha256 of its run.json.
    """

    subject: Text
    weights: str
    input: str
    fold_scale: float | None = None
    train_rows: int
    val_rows: int
    seed: int
    data_sha256: str
    versions: dict[str, str]


class ProbeResult(Measured):
    """The accuracies of one input as fractions of 1.

    For a RUN, `cache_sha256` is the sha256 of its cache. `knn_hits` and `linear_hits` tell which
    pictures of "val" are classified correctly, as `packed` writes them. `knn_train` is the accuracy
    on held-out rows of "train", which may choose a learning rate.
    """

    knn: float | None = None
    linear: float | None = None
    linear_c: float | None = None
    linear_converged: bool | None = None
    knn_hits: Absent[str] = None
    linear_hits: Absent[str] = None
    features: Absent[str] = None
    shots: Absent[int] = None
    val_in_train: Absent[int] = None
    software: Absent[str] = None
    run_sha256: Absent[str] = None
    cache_sha256: Absent[str] = None
    teacher: Absent[TeacherScores] = None
    corruption: Absent[str] = None
    knn_train: Absent[float] = None

    @property
    def label(self) -> str:
        """Return the input, features other than "mean", the shots if any, and the corruption."""
        features = "" if self.features in (None, "mean") else f"-{self.features}"
        shots = f"-shots-{self.shots}" if self.shots else ""
        return f"{self.input}{features}{shots}" + (f"-{self.corruption}" if self.corruption else "")

    def text(self) -> str:
        """Return the accuracies in percent as a line for a terminal."""
        scale = "" if self.fold_scale is None else f" (s = {self.fold_scale:.3g})"
        knn = "" if self.knn is None else f"  k-NN {100 * self.knn:.1f} %"
        linear = "" if self.linear is None else f"  linear (LBFGS) {100 * self.linear:.1f} %"
        return f"{self.subject} {self.weights}: {self.label}{scale}:{knn}{linear}"


def packed(hits_R: npt.NDArray[np.bool_]) -> str:
    """Return the values as bits, in hexadecimal digits."""
    return np.packbits(hits_R).tobytes().hex()


def unpacked(text: str, rows: int) -> npt.NDArray[np.uint8]:
    """Return the `rows` values that `packed` wrote, 0 or 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=rows)


def record_name(label: str, data_sha256: str, seed: int, untrained: bool = False) -> str:
    """Return the name of a result in RUN/probe, which depends on the DATASET and the seed."""
    name = f"{'untrained-' * untrained}{label.replace(':', '-')}-{data_sha256[:12]}"
    return f"{name}-seed-{seed}.json" if seed else f"{name}.json"


def probe(
    spec: str, data: Path | None, methods: Sequence[str] = (), inputs: Sequence[str] = (),
    weights: Path | None = None, untrained: bool = False, seed: int = 0, workers: int = 4,
    quiet: bool = False, features: Sequence[str] = (), shots: int = 0,
    corruptions: Sequence[str] = (),
) -> list[ProbeResult]:  # fmt: skip
    """Probe the encoder of a RUN, an exported folder or timm:NAME, or the teacher of a CACHE.

    Results of a RUN are written to RUN/probe/, those of a CACHE to CACHE/.run/teacher*.json. One
    that cannot be written, for example to a full disk, is returned with a warning.

    Raises: UsageError before any picture is read.
    """
    chosen = tuple(methods) or METHODS
    _check_options(chosen, features, shots)
    corrupted = list(map(Corruption.parse, dict.fromkeys(corruptions)))
    run = Path(spec)
    if (run / "cache.json").is_file():
        given: dict[str, Any] = {"--data": data, "--input": inputs, "--weights": weights}
        given |= {"--untrained": untrained, "--corrupt": corrupted}
        if unused := [option for option, value in given.items() if value]:
            found = f"found {spec}, a CACHE, which is probed on its own stored features"
            raise UsageError(f"{', '.join(unused)}: expected a RUN or EXPORT; {found}; omit them")
        return _probe_teacher(run, chosen, features, shots, seed, quiet)
    if data is None:
        advice = "add the DATASET to probe on"
        raise UsageError(f"{spec}: expected --data DATASET; found none; {advice}")
    dataset = Dataset(data).labeled()
    backbone = load_encoder(spec, weights, untrained=untrained)
    kinds = input_kinds(backbone, inputs, spec)
    wanted = dict.fromkeys(features or FEATURES[:1])
    _check_features(wanted, backbone.model.has_class_token, spec)
    tokens = "mean" if list(wanted) == ["mean"] else "both"
    featurizer = Featurizer(backbone, dataset, seed, workers, quiet, tokens, shots)
    facts = conditions(spec, featurizer) | {"cache_sha256": recorded(run).get("cache_sha256")}
    results = []
    for name, kind, s, train, vals in featurizer.inputs(kinds, wanted, corrupted):
        facts |= {"features": name, "shots": shots, "input": kind, "fold_scale": s}
        facts["knn_train"] = _held_out_training(train, seed) if kind == "folded" else None
        linear = _fitted(train, chosen, seed)
        for corruption, val in zip((None, *map(str, corrupted)), vals, strict=True):
            result = _score(train, val, chosen, linear, corruption=corruption, **facts)
            if facts["run_sha256"]:
                file = record_name(result.label, dataset.sha256, seed, untrained)
                result = _store(run / "probe" / file, result)
            results.append(result)
    return results


def conditions(spec: str, featurizer: Featurizer, other_bytes: int = 0) -> dict[str, Any]:
    """Return the fields of `Measured` and of its subclasses that all inputs share.

    Unless the featurizer is quiet, warn of copies between the splits, and print an estimate of the
    GPU memory.
    """
    if not featurizer.quiet:
        model = featurizer.backbone.model
        activations = activation_bytes(model, featurizer.batch, 4, train=False)
        print_estimate(state_bytes(model), activations, other_bytes)
    run = Path(spec) / "run.json"
    return _made_by() | {
        "subject": spec,
        "weights": featurizer.backbone.weights,
        "seed": featurizer.seed,
        "data_sha256": featurizer.data.sha256,
        "run_sha256": file_sha256(run) if run.is_file() else None,
        "val_in_train": warn_of_copies(featurizer.data, featurizer.quiet),
    }


def _made_by() -> dict[str, Any]:
    return {"software": software(), "versions": installed_versions("torch", "timm", "numpy")}


def _check_options(methods: Sequence[str], features: Sequence[str], shots: int) -> None:
    options = (("--method", methods, METHODS), ("--features", features, FEATURES))
    for option, names, allowed in options:
        for name in names:
            if name not in allowed:
                found = f"found {name!r}{nearest(name, allowed)}"
                raise UsageError(f"{option}: expected {' or '.join(allowed)}; {found}")
    if 0 < shots < LEAST_SHOTS and "linear" in methods:
        expected = f"expected {LEAST_SHOTS} or more for the linear probe"
        raise UsageError(f"--shots: {expected}; found {shots}; use more, or --method knn")


def _probe_teacher(
    path: Path, methods: Sequence[str], features: Sequence[str], shots: int, seed: int, quiet: bool
) -> list[ProbeResult]:
    cache = Cache(path)
    identity = cache.identity
    units = [cache.complete_units(split)[:1] for split in ("train", "val")]
    wanted = dict.fromkeys(features or (FEATURES if identity.has_cls else FEATURES[:1]))
    _check_features(wanted, identity.has_cls, str(path))
    for split, unit in zip(("train", "val"), units, strict=True):
        if not unit:
            found = "found none; finish `mcm-cache extract`"
            raise UsageError(f"{path}: expected a complete unit of {split!r}; {found}")
        if any((unit[0].index(shard)["label"] < 0).any() for shard in range(unit[0].num_shards)):
            found = "found pictures without a label; only a labeled CACHE can be probed"
            raise UsageError(f"{path}: expected a label for every picture of {split!r}; {found}")
    (train_unit,), (val_unit,), gram = *units, Gram(identity.channels, device())
    train, val = stored_features(train_unit, quiet), stored_features(val_unit, quiet, gram)
    if shots:
        train = train.rows(training_rows(train.y.numpy(), identity.classes, shots, seed))
    facts = _made_by() | {"data_sha256": cache.sha256, "seed": seed}
    facts |= {"teacher": teacher_facts(train_unit, gram), "subject": identity.teacher.name}
    facts |= {"weights": f"sha256:{identity.teacher.weights_sha256}"}
    results = []
    for tokens in wanted:
        bank, held = (columns(split, tokens, identity.channels) for split in (train, val))
        named = {"features": tokens, "shots": shots, "input": "full"}
        result = _score(bank, held, methods, _fitted(bank, methods, seed), **named, **facts)
        name = f"teacher{result.label.removeprefix('full')}" + (f"-seed-{seed}" if seed else "")
        results.append(_store(work_dir(path) / f"{name}.json", result))
    return results


def _held_out_training(train: Features, seed: int) -> float | None:
    bank, held = map(train.rows, choice_rows(train.y.numpy(), seed))
    return knn_accuracy(bank, held, device()) if len(held.y) else None


def _fitted(train: Features, methods: Sequence[str], seed: int) -> LinearProbe | None:
    """Return the linear probe, or None with a warning if the training rows do not allow one."""
    if "linear" not in methods:
        return None
    if (found := linear_probe(train, seed, device())) is None:
        expected = "expected two classes or more, one of them with two training rows"
        print(f"warning: no linear probe: {expected}", file=sys.stderr)
    return found


def _score(
    train: Features, val: Features, methods: Sequence[str], linear: LinearProbe | None, **facts: Any
) -> ProbeResult:
    is_knn = linear is None or "knn" in methods
    hits = {"knn": knn_hits(train, val, device())} if is_knn else {}
    hits |= {} if linear is None else {"linear": linear.hits(val)}
    facts |= {method: float(hits_R.double().mean()) for method, hits_R in hits.items()}
    facts |= {f"{method}_hits": packed(hits_R.numpy()) for method, hits_R in hits.items()}
    return ProbeResult(
        linear_c=linear and linear.c,
        linear_converged=linear and linear.fit.converged,
        train_rows=len(train.y),
        val_rows=len(val.y),
        **facts,
    )


def _store(path: Path, result: ProbeResult) -> ProbeResult:
    """Write the result, or warn if that fails.

    A file of the same measurement keeps its value of the method that was not run this time.
    """
    scores = ("knn", "linear", "linear_c", "linear_converged", "knn_hits", "linear_hits")
    empty: dict[str, Any] = dict.fromkeys(scores)
    with warn_if_not_saved():
        if path.is_file():
            old = read_record(ProbeResult, path)
            if old.model_copy(update=empty) == result.model_copy(update=empty):
                measured = result.model_dump(include=set(empty), exclude_none=True)
                result = old.model_copy(update=measured)
        write_atomic(path, encode_record(result))
    return result


def fold_scale(text: str, run: Path) -> float:
    """Return the S of `--folded S`; "probed" is the S that the probe of the newest weights chose.

    Raises: UsageError for another text, or unless the probes of the RUN agree on one S.
    """
    if text != "probed":
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"--folded: expected a number or probed; found {text!r}") from None
    newest = checkpoint.weights(checkpoint.complete(run)[-1]) if checkpoint.complete(run) else ""
    results = (read_record(ProbeResult, file) for file in run.glob("probe/folded*.json"))
    known = (one for one in results if one.weights == newest and one.features == "mean")
    found = {one.fold_scale for one in known if one.fold_scale and not one.shots}
    if len(found) == 1:
        return found.pop()
    advice = "run `mcm-train probe RUN --data DATASET`, or give S"
    raise UsageError(f"{run}: expected one S, chosen by its probe; found {sorted(found)}; {advice}")


def warn_of_copies(dataset: Dataset, quiet: bool) -> int:
    """Return the number of pictures of "val" that are also in "train"; warn unless `quiet`."""
    rows = dataset.copies("val", "train")
    if len(rows) and not quiet:
        found = f"{len(rows)} of {dataset.rows('val')} pictures of 'val' are also in 'train'"
        print(f"warning: {dataset.path}: {found}, byte for byte, such as row {rows[0]}", flush=True)
    return len(rows)


def input_kinds(backbone: Backbone, inputs: Sequence[str], spec: str) -> list[str]:
    """Return the inputs to probe, "full" first.

    Raises: UsageError for an unknown input, for "folded" without a pre-training RUN, or for
    "masked:K" without one trained with masks.
    """
    masked = backbone.masked
    kinds = tuple(inputs) or (("full", "folded") if masked is not None else ("full",))
    for kind in kinds:
        check_kind(kind)
        if kind == "folded" and masked is None:
            raise UsageError(f"--input folded: expected a pre-training RUN; found {spec}; use full")
        if kind.startswith("masked") and (masked is None or not masked.hides):
            found = f"found {spec}, which was not; use full"
            raise UsageError(f"--input {kind}: expected a RUN trained with masks; {found}")
    return list(dict.fromkeys(("full", *kinds)))


def check_kind(kind: str) -> None:
    """Check the name of an input.

    Raises: UsageError for an unknown one.
    """
    if not re.fullmatch("full|folded|masked:[1-9][0-9]{0,3}", kind):
        expected = "expected full, folded or masked:K with K > 0, such as masked:8"
        raise UsageError(f"--input: {expected}; found {kind!r}")


def _check_features(wanted: Iterable[str], has_cls: bool, where: str) -> None:
    if not has_cls and (needing := [name for name in wanted if name != "mean"]):
        found = f"found none in {where}; use mean"
        raise UsageError(f"--features {needing[0]}: expected a class token; {found}")
