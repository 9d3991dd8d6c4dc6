"""Probes of frozen features: k-NN and a linear classifier on mean patch tokens, each naming the input it saw.

Letters: B batch, D width, H W pixels.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.cache import Cache
from cache_tools.console import progress
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import Record, encode_record, nearest, read_record
from cache_tools.storage import run_folder, write_atomic
from mcm.augment import eval_transform
from mcm.backbones import Backbone, load_encoder, patch_mean
from mcm.classify import Features, choice_rows, knn_accuracy, linear_probe
from mcm.masking import mask_picks, mask_pool
from mcm.model import folded_state
from mcm.order import EvalOrder
from mcm.stream import DatasetSource, Stream, batches

METHODS = ("knn", "linear")
BATCH_ROWS = 128
POOL_ROWS = 4096  # masks to pick from for masked:K

Encode = Callable[[Tensor, npt.NDArray[np.int64]], Tensor]  # pictures [B, 3, H, W] and their rows to features [B, D]


class ProbeResult(Record):
    """One input's accuracies as fractions of 1, and what they were measured with."""

    subject: str
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


@dataclass(frozen=True)
class Prober:
    """A backbone, the pictures to probe it with, and where it runs."""

    backbone: Backbone
    data: Dataset
    seed: int
    workers: int
    quiet: bool

    def features(self, split: str, encode: Encode, rows: npt.NDArray[np.int64] | None = None) -> Features:
        """Features of a split's centre crops, or of some of its rows, in order."""
        quiet = self.quiet or rows is not None  # the many short passes that choose s
        source = DatasetSource(self.data, split, eval_transform(self.backbone), self.seed, rows)
        order = EvalOrder(len(source.rows), 1, BATCH_ROWS)
        x, y = [], []
        with (
            torch.inference_mode(),
            batches(Stream(order, source), 0, len(order), self.workers) as items,
            progress(order.rows, f"features of {split}", "pictures", quiet=quiet) as bar,
        ):
            for batch in items:
                kept = int(batch["weight"].sum())
                x.append(encode(batch["pictures"].to(device()), batch["rows"].numpy()).float().cpu()[:kept])
                y.append(batch["labels"][:kept].clone())  # each tensor of a worker holds a file descriptor
                bar.update(kept)
        return Features(torch.cat(x), torch.cat(y))

    def full(self, model: Any = None) -> Encode:
        """Mean patch tokens of unmasked pictures."""
        module = (model or self.backbone.model).to(device()).eval()
        return lambda pictures, rows: patch_mean(module, pictures)

    def folded(self, s: float) -> Encode:
        """Mean patch tokens of the encoder with x~ = e + s (x - e)."""
        masked = _masked(self.backbone)
        model = copy.deepcopy(masked.encoder)
        model.load_state_dict(folded_state(masked.encoder, masked.encoder_fill, s))
        return self.full(model)

    def masked(self, passes: int) -> Encode:
        """Mean over `passes` fixed random masks a row, of the mean patch tokens."""
        model = _masked(self.backbone).to(device()).eval()
        patches = model.encoder.patch_embed.num_patches
        width, positions = (patches, 1) if model.mode == "patch" else (model.encoder.embed_dim, patches)
        pool = torch.from_numpy(mask_pool(self.seed, 0, POOL_ROWS, width, model.ratio)).to(device())

        def encode(pictures: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
            total = torch.zeros(())
            for epoch in range(passes):
                picks = torch.from_numpy(mask_picks(self.seed, epoch, rows, positions, len(pool)))
                total = total.to(device()) + model.encode(pictures, (pool, picks.to(device()))).mean(1)
            return total / passes

        return encode

    def choose_scale(self) -> float:
        """The s of {1, sqrt(1 - r), 1 - r} with the best k-NN on held-out training rows; the first wins ties."""
        ratio: float = _masked(self.backbone).ratio

        return max((1.0, float((1 - ratio) ** 0.5), 1 - ratio), key=lambda s: self.held_out_knn(self.folded(s)))

    def held_out_knn(self, encode: Encode) -> float:
        """k-NN accuracy on a fifth of some training rows; the rest is the bank. What choices are made by."""
        rows = choice_rows(self.data.rows("train"), self.seed)
        bank, held = (self.features("train", encode, part) for part in rows)
        return knn_accuracy(bank.x, bank.y, held.x, held.y)

    def encoder(self, kind: str) -> tuple[Encode, float | None]:
        """(encode, s) of an input called full, folded or masked:K."""
        if kind == "folded":
            s = self.choose_scale()
            return self.folded(s), s
        return (self.full() if kind == "full" else self.masked(int(kind.partition(":")[2]))), None


def device() -> torch.device:
    """The accelerator, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def probe(
    spec: str, data: Path | None, methods: Sequence[str] = (), inputs: Sequence[str] = (), weights: Path | None = None,
    untrained: bool = False, seed: int = 0, workers: int = 4, quiet: bool = False,
) -> list[ProbeResult]:  # fmt: skip
    """Probe a RUN, an exported folder, timm:NAME (features of `data`'s pictures) or a CACHE (its teacher's features).

    Results of a RUN are written to RUN/probe/, those of a CACHE to CACHE.run/probe.json.
    Raises: UsageError before any picture is read.
    """
    chosen = tuple(methods) or METHODS
    for method in chosen:
        if method not in METHODS:
            raise UsageError(f"--method: expected knn or linear; found {method!r}{nearest(method, METHODS)}")
    if (Path(spec) / "cache.json").is_file():
        return [_probe_teacher(Path(spec), chosen, seed, quiet)]
    if data is None:
        raise UsageError(f"{spec}: expected --data DATASET with the pictures to probe on; it is missing")
    dataset = labelled(Dataset(data))
    backbone = load_encoder(spec, weights, untrained=untrained)
    kinds = tuple(inputs) or (("full", "folded") if backbone.masked is not None else ("full",))
    for kind in kinds:
        _check_input(kind, backbone)
    prober = Prober(backbone, dataset, seed, workers, quiet)
    results = []
    for kind in dict.fromkeys(("full", *kinds)):  # full is always printed
        encode, s = prober.encoder(kind)
        train, val = prober.features("train", encode), prober.features("val", encode)
        results.append(_score(train, val, chosen, spec, backbone.weights, kind, s, seed, dataset.sha256))
        if (Path(spec) / "run.json").is_file():
            name = ("untrained-" if untrained else "") + kind.replace(":", "-")
            results[-1] = _store(Path(spec) / "probe" / f"{name}.json", results[-1])
    return results


def _probe_teacher(path: Path, methods: Sequence[str], seed: int, quiet: bool) -> ProbeResult:
    cache = Cache(path)
    split_features = []
    for split in ("train", "val"):
        units = cache.complete_units(split)
        if not units:
            raise UsageError(f"{path}: expected a complete unit of {split!r} to probe; finish `mcm-cache extract`")
        x, y = [], []
        with progress(units[0].num_chunks, f"teacher's features of {split}", "chunks", quiet=quiet) as bar:
            for number in range(units[0].num_chunks):
                chunk = units[0].chunk(number)
                x.append(torch.from_numpy(chunk.features().mean(1)))
                y.append(torch.from_numpy(chunk.labels.astype(np.int64)))
                bar.update(1)
        split_features.append(Features(torch.cat(x), torch.cat(y)))
    train, val = split_features
    teacher = cache.identity.teacher
    weights = f"sha256:{teacher.weights_sha256}"
    result = _score(train, val, methods, teacher.name, weights, "full", None, seed, cache.sha256)
    return _store(run_folder(path) / "probe.json", result)


def _score(
    train: Features, val: Features, methods: Sequence[str], subject: str, weights: str, kind: str, s: float | None,
    seed: int, data_sha256: str,
) -> ProbeResult:  # fmt: skip
    bank_x, bank_y, x, y = (part.to(device()) for part in (train.x, train.y, val.x, val.y))
    linear, c, converged = linear_probe(train, val, seed) if "linear" in methods else (None, None, None)
    return ProbeResult(
        subject=subject, weights=weights, input=kind, fold_scale=s, seed=seed, data_sha256=data_sha256,
        knn=knn_accuracy(bank_x, bank_y, x, y) if "knn" in methods else None,
        linear=linear, linear_c=c, linear_converged=converged,
        train_rows=len(train.y), val_rows=len(val.y),
        versions={name: version(name) for name in ("torch", "timm", "scikit-learn", "numpy")},
    )  # fmt: skip


def _store(path: Path, result: ProbeResult) -> ProbeResult:
    """Write the result; the other method's number stays where nothing else has changed."""
    fields = ("knn", "linear", "linear_c", "linear_converged")
    if path.is_file():
        old = read_record(ProbeResult, path)
        empty = dict.fromkeys(fields)
        if old.model_copy(update=empty) == result.model_copy(update=empty):
            kept = {name: getattr(old, name) for name in fields if getattr(result, name) is None}
            result = result.model_copy(update=kept)
    write_atomic(path, encode_record(result))
    return result


def labelled(dataset: Dataset) -> Dataset:
    """The dataset.

    Raises: UsageError unless every picture of its "train" and "val" has a label.
    """
    for split in ("train", "val"):
        if not dataset.rows(split) or (dataset.labels(split) < 0).any() or len(dataset.classes) < 2:
            raise UsageError(f"{dataset.path}: expected labels for every picture of {split!r}, of two classes or more")
    return dataset


def _masked(backbone: Backbone) -> Any:
    assert backbone.masked is not None, "checked by _check_input"
    return backbone.masked


def check_kind(kind: str) -> None:
    """Raises: UsageError for the name of no input."""
    name, _, passes = kind.partition(":")
    if name == "masked" and not re.fullmatch("[1-9][0-9]{0,3}", passes) or name not in ("full", "folded", "masked"):
        raise UsageError(f"--input: expected full, folded or masked:K with K > 0, such as masked:8; found {kind!r}")


def _check_input(kind: str, backbone: Backbone) -> None:
    check_kind(kind)
    if kind != "full" and backbone.masked is None:
        raise UsageError(f"--input {kind}: expected a RUN trained with masks; {backbone.source} is not; use full")
