"""The dense probe: softmax regression from frozen patch tokens to masks, scored on every pixel.

B batch, N patches, D width, K classes, R training patches, h w the grid, H W pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cache_tools.console import warn_if_not_saved
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.labels import IGNORED, Mask
from cache_tools.records import encode_record
from cache_tools.rng import hash_u64, permutation
from cache_tools.storage import write_atomic
from mcm.backbones import load_encoder
from mcm.classifiers import fit_softmax
from mcm.dense import confusion, most_probable, scores
from mcm.engine import device
from mcm.features import FOLDS, Encode, Featurizer
from mcm.probe import Measured, conditions, input_kinds, record_name

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # weights of the L2 penalty, added to the cross-entropy
CHOICE_PICTURES = 6000  # training pictures that choose L2 and s; a fifth is held out
MAX_VALUES = 1 << 30  # the most float32 values of training patches in memory: 4 GiB
RANDOM_PATCHES = 64  # patches per picture if all patches would exceed MAX_VALUES

Scene = tuple[int, Tensor, Mask]  # row, patch tokens [N, D], mask [H, W]


class Patches(NamedTuple):
    """Patch tokens x [R, D], the class shares of each patch y [R, K], and its picture's row [R]."""

    x: Tensor
    y: Tensor
    rows: Tensor


class DenseResult(Measured):
    """The scores of one input as fractions of 1.

    Means are over the classes that occur; the IoU of an absent class is None.
    `patches` is the number of training patches.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]
    classes: tuple[str, ...]
    l2: float
    converged: bool
    patches: int
    val_in_train: int
    run_sha256: str | None
    software: str

    def text(self) -> str:
        """Return the scores in percent as lines for a terminal, with "-" for an absent class."""
        shown = ["-" if iou is None else f"{100 * iou:.1f}" for iou in self.iou]
        scale = "" if self.fold_scale is None else f" (s = {self.fold_scale:.3g})"
        means = (100 * self.miou, 100 * self.mean_accuracy, 100 * self.pixel_accuracy)
        figures = "mIoU {:.1f} %  mean accuracy {:.1f} %  pixels {:.1f} %".format(*means)
        each = "  ".join(f"{name} {iou}" for name, iou in zip(self.classes, shown, strict=True))
        subject = f"{self.subject} {self.weights}: {self.input}{scale}"
        return f"{subject}: dense linear (LBFGS) {figures}\n  IoU: {each}"


def label_shares(mask_HW: Mask, grid: tuple[int, int], num_classes: int) -> npt.NDArray[np.float32]:
    """Return the share of each patch's pixels that have each class, [N, K].

    An ignored pixel has no class. Patch borders are rounded to whole pixels, so a picture of any
    size has N patches.
    """
    (height, width), (h, w) = mask_HW.shape, grid
    patch_HW = (np.arange(height) * h // height)[:, None] * w + np.arange(width) * w // width
    labels = np.where(mask_HW == IGNORED, num_classes, mask_HW) + patch_HW * (num_classes + 1)
    counts = np.bincount(labels.ravel(), minlength=h * w * (num_classes + 1))
    counts = counts.reshape(h * w, num_classes + 1)
    shares: npt.NDArray[np.float64] = counts[:, :-1] / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares.astype(np.float32)


def patches_kept(pictures: int, N: int, D: int) -> int:
    """Return the number of patches per picture: all, or RANDOM_PATCHES to fit MAX_VALUES."""
    most = MAX_VALUES // (pictures * D)
    return N if N <= most else max(1, min(RANDOM_PATCHES, most))


def collect(
    scenes: Iterable[Scene], pictures: int, grid: tuple[int, int], num_classes: int, seed: int
) -> Patches:
    """Return the labeled patches of `pictures` scenes.

    If all patches would exceed MAX_VALUES, draw at most RANDOM_PATCHES per picture by (seed, row).

    Raises: UsageError if fewer than two pictures have labeled pixels.
    """
    filled, x, y, rows = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for row, tokens_ND, mask_HW in scenes:
        N, D = tokens_ND.shape
        kept = patches_kept(pictures, N, D)
        if not filled:
            x, y = (tokens_ND.new_empty(pictures * kept, width) for width in (D, num_classes))
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
        raise UsageError("expected two training pictures or more with labeled pixels; found fewer")
    return Patches(x[:filled], y[:filled], rows[:filled])


def choose_l2(patches: Patches, seed: int) -> tuple[float, float]:
    """Return (L2, mIoU on held-out training pictures); the strongest penalty wins ties.

    The most probable class of each patch is compared with the classes of all its pixels.
    """
    rows = torch.unique(patches.rows).cpu().numpy()
    order = rows[permutation(len(rows), seed, "dense_choice")[:CHOICE_PICTURES]]
    num_held = max(1, len(order) // 5)
    order = torch.from_numpy(order).to(patches.rows.device)
    chosen = [torch.isin(patches.rows, part) for part in (order[:num_held], order[num_held:])]
    held, bank = (Patches(*(x[is_chosen] for x in patches)) for is_chosen in chosen)

    def held_out_miou(l2: float) -> float:
        weight_KD, bias_K, _ = fit_softmax(bank.x, bank.y, l2)
        logits_RK = functional.linear(held.x, weight_KD, bias_K)
        predicted_RK = functional.one_hot(logits_RK.argmax(1), len(bias_K))
        return float(scores(held.y.T.double() @ predicted_RK.double())["miou"])

    miou, l2 = max((held_out_miou(l2), l2) for l2 in L2_GRID)
    return l2, miou


def dense_probe(
    spec: str,
    data: Path,
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    untrained: bool = False,
    seed: int = 0,
    workers: int = 4,
    quiet: bool = False,
) -> list[DenseResult]:
    """Probe a RUN, an exported folder or timm:NAME on a DATASET with masks.

    The results of a RUN are written to RUN/dense/.

    Raises: UsageError before any picture is read, or if pictures have no labeled pixels.
    """
    dataset, run = Dataset(data), Path(spec)
    backbone = load_encoder(spec, weights, untrained=untrained)
    kinds = input_kinds(backbone, inputs, spec)
    featurizer = Featurizer(backbone, dataset, seed, workers, quiet, "patch")
    model, pictures = backbone.model, dataset.rows("train")
    kept = patches_kept(max(pictures, 1), model.patch_embed.num_patches, model.embed_dim)
    patch_bytes = 4 * pictures * kept * (model.embed_dim + len(dataset.classes))
    facts = conditions(spec, featurizer, 2 * patch_bytes)  # all, and a copy in two parts
    facts["classes"] = dataset.classes
    facts |= {f"{split}_rows": dataset.rows(split) for split in ("train", "val")}
    results = list[DenseResult]()

    def held_out_miou(s: float) -> float:
        return _fit(featurizer, featurizer.folded(s), CHOICE_PICTURES)[-1]

    for kind in kinds:
        s = max(FOLDS, key=held_out_miou) if kind == "folded" else None
        encode = featurizer.encoder(kind, s)
        weight_KD, bias_K, fit_facts, _ = _fit(featurizer, encode)
        accuracies = scores(_confusion(featurizer, encode, weight_KD, bias_K))
        results.append(DenseResult(**accuracies, **fit_facts, input=kind, fold_scale=s, **facts))
        if (run / "run.json").is_file():
            with warn_if_not_saved():
                name = record_name(kind, dataset.sha256, seed, untrained)
                write_atomic(run / "dense" / name, encode_record(results[-1]))
    return results


def _fit(
    featurizer: Featurizer, encode: Encode, pictures: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Any], float]:
    """Fit the classifier to all training pictures, or to `pictures` of them.

    Returns: weight, bias, the facts of the fit, and the held-out mIoU.
    """
    data, seed = featurizer.data, featurizer.seed
    grid = featurizer.backbone.model.patch_embed.grid_size
    rows = permutation(data.rows("train"), seed, "dense_choice")[:pictures]
    scenes = _scenes(featurizer, "train", encode, np.sort(rows))
    patches = collect(scenes, len(rows), grid, len(data.classes), seed)
    mean_D, std_D = patches.x.mean(0), patches.x.std(0).clamp_min(1e-6)
    patches.x.sub_(mean_D).div_(std_D)
    l2, miou = choose_l2(patches, seed)
    weight_KD, bias_K, converged = fit_softmax(patches.x, patches.y, l2)
    weight_KD = weight_KD / std_D  # weights for tokens that are not standardized
    facts = {"l2": l2, "converged": converged, "patches": len(patches.x)}
    return weight_KD, bias_K - weight_KD @ mean_D, facts, miou


def _confusion(featurizer: Featurizer, encode: Encode, weight_KD: Tensor, bias_K: Tensor) -> Tensor:
    """Return the confusion matrix [K, K] of every pixel of the val split."""
    classes, grid = len(bias_K), featurizer.backbone.model.patch_embed.grid_size
    total = torch.zeros(classes, classes, dtype=torch.int64, device=device())
    for _, tokens_ND, mask_HW in _scenes(featurizer, "val", encode):
        logits_KHW = functional.linear(tokens_ND, weight_KD, bias_K).T.reshape(classes, *grid)
        total += confusion(mask_HW, most_probable(logits_KHW, mask_HW.shape), classes)
    return total


def _scenes(
    featurizer: Featurizer, split: str, encode: Encode, rows: npt.NDArray[np.int64] | None = None
) -> Iterator[Scene]:
    """Yield the row, patch tokens and mask of each picture, resized without a crop."""
    for rows_B, _, (tokens_BND,) in featurizer.encoded(split, [encode], rows):
        for row, tokens_ND in zip(rows_B.tolist(), tokens_BND, strict=True):
            yield row, tokens_ND, featurizer.data.mask(split, row)
