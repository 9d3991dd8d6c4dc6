"""The dense probe: softmax regression of frozen patch tokens on masks, scored over every pixel.

Letters: B batch, N patches, D width, K classes, R patches of the training split, h w the grid, H W pixels.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cache_tools.console import progress, warn_if_not_saved
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.labels import IGNORED, Mask
from cache_tools.records import Record, encode_record
from cache_tools.rng import hash_u64, permutation
from cache_tools.storage import file_sha256, write_atomic
from mcm.augment import eval_transform
from mcm.backbones import load_encoder
from mcm.features import Encode, Prober, device
from mcm.probe import input_kinds, record_name, warn_of_copies
from mcm.run_dir import software, versions
from mcm.sampler import EvalOrder
from mcm.stream import DatasetSource, Stream, batches

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the mean cross-entropy
MAX_ITERATIONS, GRADIENT_TOLERANCE = 500, 1e-5
CHOICE_PICTURES = 6000  # training pictures that choose L2 and s; a fifth of them is held out
MAX_VALUES = 1 << 30  # float32 values of the training patches in memory: 4 GiB
RANDOM_PATCHES = 64  # per picture, where all patches are more than MAX_VALUES
BATCH_PICTURES, PIXEL_LOGITS = 32, 1 << 26  # computed at once

Scene = tuple[int, Tensor, Mask]  # row, patch tokens [N, D], mask [H, W]


class Patches(NamedTuple):
    """Patch tokens x [R, D], the share of each class in each patch y [R, K], and the rows of their pictures [R]."""

    x: Tensor
    y: Tensor
    rows: Tensor


class DenseResult(Record):
    """Fractions of 1 and what they were measured with.

    Means are over the classes that occur; the IoU of an absent class is None. `patches` are those that trained.
    """

    subject: str
    weights: str
    input: str
    fold_scale: float | None
    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]
    classes: tuple[str, ...]
    l2: float
    converged: bool
    patches: int
    train_rows: int
    val_rows: int
    val_in_train: int
    seed: int
    data_sha256: str
    run_sha256: str | None
    versions: dict[str, str]
    software: str


def label_shares(mask_HW: Mask, grid: tuple[int, int], num_classes: int) -> npt.NDArray[np.float32]:
    """Return [N, K]: the share of each patch's pixels that each class labels; an ignored pixel counts for no class.

    The borders of patches are rounded to whole pixels, so that a picture of any size has N patches.
    """
    (height, width), (h, w) = mask_HW.shape, grid
    patch_HW = (np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width
    labels = np.where(mask_HW == IGNORED, num_classes, mask_HW) + patch_HW * (num_classes + 1)
    counts = np.bincount(labels.ravel(), minlength=h * w * (num_classes + 1)).reshape(h * w, num_classes + 1)
    shares: npt.NDArray[np.float64] = counts[:, :-1] / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares.astype(np.float32)


def collect(scenes: Iterable[Scene], pictures: int, grid: tuple[int, int], num_classes: int, seed: int) -> Patches:
    """Return the labelled patches of `pictures` scenes.

    Where all patches are more than MAX_VALUES, at most RANDOM_PATCHES of each picture are drawn by (seed, row).
    Raises: UsageError where fewer than two pictures have labelled pixels.
    """
    filled, x, y, rows = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for row, tokens_ND, mask_HW in scenes:
        N, D = tokens_ND.shape
        most = MAX_VALUES // (pictures * D)
        kept = N if N <= most else max(1, min(RANDOM_PATCHES, most))
        if not filled:
            x, y = (tokens_ND.new_empty(pictures * kept, wide) for wide in (D, num_classes))
            rows = torch.empty(pictures * kept, dtype=torch.int64, device=x.device)
        shares_NK = label_shares(mask_HW, grid, num_classes)
        order = np.argsort(hash_u64(seed, "dense_patches", row, np.arange(N)), kind="stable")
        drawn = np.sort(order[:kept])
        drawn = drawn[shares_NK[drawn].any(1)]
        span = slice(filled, filled := filled + len(drawn))
        x[span] = tokens_ND[torch.from_numpy(drawn).to(x.device)]
        y[span] = torch.from_numpy(shares_NK[drawn]).to(y.device)
        rows[span] = row
    if not filled or rows[0] == rows[filled - 1]:
        raise UsageError("expected two training pictures or more with labelled pixels; found fewer")
    return Patches(x[:filled], y[:filled], rows[:filled])


def fit(patches: Patches, l2: float) -> tuple[Tensor, Tensor, bool]:
    """Fit by full-batch L-BFGS with a strong Wolfe line search; the loss is the mean cross-entropy of the pixels.

    Returns: weight [K, D], bias [K], and whether it ended by its tolerance.
    """
    weight_KD = patches.x.new_zeros(patches.y.shape[1], patches.x.shape[1]).requires_grad_()
    bias_K, pixels = patches.x.new_zeros(patches.y.shape[1]).requires_grad_(), patches.y.sum()
    optimizer = torch.optim.LBFGS(
        [weight_KD, bias_K], max_iter=MAX_ITERATIONS, max_eval=10 * MAX_ITERATIONS, tolerance_grad=GRADIENT_TOLERANCE,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        hits = (patches.y * functional.linear(patches.x, weight_KD, bias_K).log_softmax(1)).sum()
        loss = l2 / 2 * weight_KD.square().sum() - hits / pixels
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight_KD.detach(), bias_K.detach(), optimizer.state[weight_KD]["n_iter"] < MAX_ITERATIONS


def choose_l2(patches: Patches, seed: int) -> tuple[float, float]:
    """Return (L2, mIoU on held-out training pictures); the strongest penalty wins ties.

    Each patch counts as its most probable class, against the labels of all its pixels.
    """
    rows = torch.unique(patches.rows).cpu().numpy()
    order = rows[permutation(len(rows), seed, "dense_choice")[:CHOICE_PICTURES]]
    split = max(1, len(order) // 5)
    held, bank = (
        Patches(*(part[torch.isin(patches.rows, torch.from_numpy(chosen).to(part.device))] for part in patches))
        for chosen in (order[:split], order[split:])
    )

    def held_out_miou(l2: float) -> float:
        weight_KD, bias_K, _ = fit(bank, l2)
        predicted_RK = functional.one_hot(functional.linear(held.x, weight_KD, bias_K).argmax(1), len(bias_K))
        return float(scores(held.y.T.double() @ predicted_RK.double())["miou"])

    miou, l2 = max((held_out_miou(l2), l2) for l2 in L2_GRID)
    return l2, miou


def predict(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the most probable class [H, W] of logits [K, h, w], bilinear to `size`, in strips of bounded memory."""
    down, across = (
        functional.interpolate(torch.eye(cells, device=logits_KHW.device)[None], pixels, mode="linear")[0].T
        for cells, pixels in zip(logits_KHW.shape[1:], size, strict=True)
    )
    wide_KhW = logits_KHW @ across.T
    strips = torch.split(down, max(1, PIXEL_LOGITS // wide_KhW[:, 0].numel()))
    return torch.cat([torch.einsum("Hh,KhW->KHW", strip, wide_KhW).argmax(0) for strip in strips])


def confusion(mask_HW: Mask, predicted_HW: Tensor, num_classes: int) -> Tensor:
    """Return the pixels of each (true, predicted) class, int64 [K, K]; ignored pixels count nowhere."""
    truth_HW = torch.tensor(mask_HW, dtype=torch.int64, device=predicted_HW.device)
    pairs = (truth_HW * num_classes + predicted_HW)[truth_HW != IGNORED]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion_KK: Tensor) -> dict[str, Any]:
    """Return miou, mean_accuracy, pixel_accuracy and iou; a class in neither truth nor prediction is left out."""
    hits, truth, found = confusion_KK.diagonal().double(), confusion_KK.sum(1).double(), confusion_KK.sum(0).double()
    iou, accuracy = hits / (truth + found - hits), hits / truth
    means = {"miou": iou.nanmean(), "mean_accuracy": accuracy.nanmean(), "pixel_accuracy": hits.sum() / truth.sum()}
    each = tuple(None if math.isnan(value) else value for value in iou.tolist())
    return {name: float(value) for name, value in means.items()} | {"iou": each}


def dense_probe(
    spec: str, data: Path, inputs: Sequence[str] = (), weights: Path | None = None, untrained: bool = False,
    seed: int = 0, workers: int = 4, quiet: bool = False,
) -> list[DenseResult]:  # fmt: skip
    """Probe a RUN, an exported folder or timm:NAME on a DATASET with masks; a RUN's results are kept in RUN/dense/.

    Raises: UsageError before any picture is read.
    """
    dataset, run = Dataset(data), Path(spec) / "run.json"
    backbone = load_encoder(spec, weights, untrained=untrained)
    kinds, copies = input_kinds(backbone, inputs, spec), warn_of_copies(dataset, quiet)
    prober, results = Prober(backbone, dataset, seed, workers, quiet, "patch"), list[DenseResult]()
    facts: dict[str, Any] = {"subject": spec, "weights": backbone.weights, "classes": dataset.classes, "seed": seed}
    facts |= {f"{split}_rows": dataset.rows(split) for split in ("train", "val")} | {"val_in_train": copies}
    facts |= {"data_sha256": dataset.sha256, "run_sha256": file_sha256(run) if run.is_file() else None}
    facts |= {"software": software(), "versions": versions("torch", "timm", "numpy")}
    for kind in kinds:
        encode, s = prober.encoder(kind, lambda encode: _train(prober, encode, CHOICE_PICTURES)[-1])
        weight_KD, bias_K, fitted, _ = _train(prober, encode)
        found = scores(_confusion(prober, encode, weight_KD, bias_K))
        results.append(DenseResult(**found, **fitted, input=kind, fold_scale=s, **facts))
        if run.is_file():
            with warn_if_not_saved():
                name = record_name(kind, dataset.sha256, seed, untrained)
                write_atomic(run.parent / "dense" / name, encode_record(results[-1]))
    return results


def text(result: DenseResult) -> str:
    """Return the scores in percent as lines for a terminal, "-" for a class that does not occur."""
    shown = ["-" if iou is None else f"{100 * iou:.1f}" for iou in result.iou]
    scale = "" if result.fold_scale is None else f" (s = {result.fold_scale:.3g})"
    means = (100 * result.miou, 100 * result.mean_accuracy, 100 * result.pixel_accuracy)
    figures = "mIoU {:.1f} %  mean accuracy {:.1f} %  pixels {:.1f} %".format(*means)
    each = "  ".join(f"{name} {iou}" for name, iou in zip(result.classes, shown, strict=True))
    return f"{result.subject} {result.weights}: {result.input}{scale}: dense linear (LBFGS) {figures}\n  IoU: {each}"


def _train(prober: Prober, encode: Encode, pictures: int | None = None) -> tuple[Tensor, Tensor, dict[str, Any], float]:
    """(weight, bias, how they were fitted, held-out mIoU) of all training pictures, or of some."""
    rows = permutation(prober.data.rows("train"), prober.seed, "dense_choice")[:pictures]
    scenes, grid = _scenes(prober, "train", encode, np.sort(rows)), prober.backbone.model.patch_embed.grid_size
    patches = collect(scenes, len(rows), grid, len(prober.data.classes), prober.seed)
    mean_D, std_D = patches.x.mean(0), patches.x.std(0).clamp_min(1e-6)
    patches.x.sub_(mean_D).div_(std_D)
    l2, miou = choose_l2(patches, prober.seed)
    weight_KD, bias_K, converged = fit(patches, l2)
    weight_KD = weight_KD / std_D  # of raw tokens
    return weight_KD, bias_K - weight_KD @ mean_D, {"l2": l2, "converged": converged, "patches": len(patches.x)}, miou


def _confusion(prober: Prober, encode: Encode, weight_KD: Tensor, bias_K: Tensor) -> Tensor:
    """The confusion of every pixel of the val split."""
    classes, grid = len(bias_K), prober.backbone.model.patch_embed.grid_size
    total = torch.zeros(classes, classes, dtype=torch.int64, device=device())
    for _, tokens_ND, mask_HW in _scenes(prober, "val", encode):
        logits_KHW = functional.linear(tokens_ND, weight_KD, bias_K).T.reshape(classes, *grid)
        total += confusion(mask_HW, predict(logits_KHW, mask_HW.shape), classes)
    if not total.any():
        raise UsageError(f"{prober.data.path}: expected labelled pixels in split 'val'; every one is ignored")
    return total


def _scenes(prober: Prober, split: str, encode: Encode, rows: npt.NDArray[np.int64] | None = None) -> Iterator[Scene]:
    """The patch tokens and the mask of every picture, squashed to the model's size."""
    source = DatasetSource(prober.data, split, eval_transform(prober.backbone, whole=True), prober.seed, rows)
    order = EvalOrder(len(source.rows), 1, BATCH_PICTURES)
    with (
        batches(Stream(order, source), 0, len(order), prober.workers) as items,
        progress(order.rows, f"patch tokens of {split}", "pictures", quiet=prober.quiet) as bar,
    ):
        for batch in items:
            with torch.no_grad():
                tokens_BND = encode(batch["pictures"].to(device()), batch["rows"].numpy()).float()
            kept_rows = batch["rows"][: int(batch["weight"].sum())].tolist()
            for row, tokens_ND in zip(kept_rows, tokens_BND, strict=False):  # the last batch is padded
                yield row, tokens_ND, prober.data.mask(split, row)
            bar.update(len(kept_rows))
