"""Fine-tuning: train an encoder with a new head, or only the head, with `loop.train`.

B batch, K classes, H W pixels.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.errors import UsageError
from cache_tools.images import RGB
from cache_tools.storage import write_atomic
from mcm import checkpoint
from mcm.augment import Mixer, erase, eval_transform, train_transform
from mcm.backbones import (
    BATCHNORM_EPS,
    Backbone,
    FinetuneRun,
    advise_fold,
    freeze,
    load_encoder,
    model_args,
    recorded_backbone,
    set_drop_path,
)
from mcm.classifiers import training_rows
from mcm.config import FinetuneConfig
from mcm.dense import confused
from mcm.detect import Detection
from mcm.downstream import Classes, Downstream, Metrics, Prediction, Predictor
from mcm.engine import device, engine, to_device
from mcm.loop import Job, evaluation_due, train
from mcm.optim import build_optimizer
from mcm.probe import warn_of_copies
from mcm.run_dir import claim, identity_config, recorded, recorded_exit, write_environment
from mcm.sampler import EvalOrder, Order
from mcm.segment import Segmentation
from mcm.stream import Batch, DatasetSource, Stream, batches

# The std of a new head, as in MAE: fine-tuning starts from uniform predictions, a probe does not.
HEAD_STD, PROBE_STD = 2e-5, 0.01
TOP, SHOWN = 5, 8  # classes per predicted picture; right and wrong pictures in the report, each


def finetune(
    config: FinetuneConfig, data: Path, init: str, weights: Path | None, out: Path,
    train: Callable[..., dict[str, float]] = train,
) -> float:  # fmt: skip
    """Train, or resume, the run in `out`; return the headline metric on the val split.

    Raises: UsageError or IdentityError before the first step; the errors of `loop.train`.
    """
    dataset, settings = Dataset(data), config.train
    if (found := dataset.record.task or "classify") != config.task:
        expected = f"expected a DATASET for task = {config.task!r}, as the configuration says"
        raise UsageError(f"{data}: {expected}; found a DATASET for {found!r}")
    with engine(settings.precision, settings.track) as accelerator:
        main = accelerator.is_main_process
        ranks = accelerator.num_processes, accelerator.process_index
        backbone = starting_point(out, config, init, weights)
        if main:
            advise_fold(backbone, init)
        task = TASKS[config.task](config, dataset, backbone)
        rows, split = len(task.train.rows), (settings.global_batch, settings.micro_batch)
        order = Order(rows, 1, *split, *ranks, settings.seed, task.group)
        claim(out, run_record(config, dataset, init, backbone, order, task.model), FinetuneConfig)
        evaluate = partial(_evaluate, out, config, task, dataset.classes, order, accelerator)
        with recorded_exit(out, main) as stop:
            if main:
                warn_of_copies(dataset, quiet=False)
                facts = {"dataset": str(data), "init": init, "processes": order.world, "rows": rows}
                write_environment(out, config, **facts)
            optimizer, stream = build_optimizer(task.model, config.optim), Stream(order, task.train)
            job = Job(out, task.model, optimizer, stream, task.loss, evaluate, config)
            score = train(job, accelerator, stop)[task.headline]
        if main:
            pictures = f"{len(task.val.rows)} pictures of 'val'"
            print(f"{out}: {task.headline} {100 * score:.2f} % on {pictures}", flush=True)
    return score


def _evaluate(
    out: Path, config: FinetuneConfig, task: Downstream, classes: Sequence[str], order: Order,
    accelerator: Accelerator, epochs_done: int,
) -> dict[str, float]:  # fmt: skip
    """Return the metrics of "val" if they are due; the main rank keeps the tables in `out`."""
    workers = config.train.workers
    if not evaluation_due(config, config.train.eval_epochs, epochs_done):
        return {}
    # BatchNorm has its own buffers on each rank; those of the main rank are saved.
    for buffer in task.model.buffers():
        broadcast(buffer)
    val_order = EvalOrder(len(task.val.rows), 1, order.batch, order.world, order.rank)
    with batches(Stream(val_order, task.val), 0, len(val_order), workers) as items:
        metrics, by_class = task.evaluate(items, accelerator)
    if by_class and accelerator.is_main_process:
        write_atomic(out / "classes.json", json.dumps({"class": classes} | by_class).encode())
    if task.shown and accelerator.is_main_process:
        write_atomic(out / "shown.safetensors", safetensors_bytes(task.shown))
    return metrics


class Classification:
    """The task "classify": a ViT with a new linear head, on labeled pictures.

    Raises: UsageError unless every picture has a label and every class has enough of them.
    """

    headline, group = "top1", CHUNK_ROWS  # mixup works on 16 rows

    def __init__(self, config: FinetuneConfig, dataset: Dataset, backbone: Backbone) -> None:
        seed, num_classes = config.train.seed, len(dataset.labeled().classes)
        rows = training_rows(dataset.labels("train"), dataset.classes, config.data.shots, seed)
        self.model = make_classifier(
            backbone.model, num_classes, config.pool, config.drop_path, seed, config.frozen
        )
        self.shown: dict[str, Tensor] = {}
        self.backbone, self.erasing, self.seed = backbone, config.augment.erasing, seed
        self.mixer = Mixer(config.augment, num_classes, seed)
        transform = train_transform(config.augment, backbone)
        self.train = DatasetSource(dataset, "train", transform, seed, rows)
        self.val = DatasetSource(dataset, "val", eval_transform(backbone), seed)

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of erased and mixed pictures."""
        pictures_B3HW = self.backbone.normalized(batch["pictures"])
        draws = batch["rows"], batch["epoch"]
        erase(pictures_B3HW, *draws, self.erasing, self.seed)
        pictures_B3HW, targets_BK = self.mixer(pictures_B3HW, batch["labels"], *draws)
        return functional.cross_entropy(wrapped(pictures_B3HW).float(), targets_BK)

    def evaluate(self, items: Iterable[Batch], accelerator: Accelerator) -> tuple[Metrics, Classes]:
        """Return top-1, top-5 (fractions) and cross-entropy.

        The confusion and the most probable wrong and right predictions are kept in `shown`.
        """
        found = judged(self.backbone, items, accelerator)
        labels_R, predicted_R = pairs_2R = found[:, 1:3].long().T
        ones_R, right_R = torch.ones_like(labels_R), labels_R == predicted_R
        pairs = torch.sparse_coo_tensor(pairs_2R, ones_R, check_invariants=True)
        self.shown = {"confusion": confused(pairs)}
        order = found[:, 3].argsort(descending=True, stable=True)
        for name, kept_R in (("wrong", ~right_R), ("right", right_R)):
            if len(chosen := found[order][kept_R[order]][:SHOWN]):
                views = self.val(0, chosen[:, 0].long().numpy(), len(chosen))["pictures"]
                self.shown[name] = views.permute(0, 2, 3, 1).contiguous()
                self.shown[f"{name}_facts"] = chosen[:, 1:4].contiguous()
        names = ("top1", "top5", "loss")
        values = (right_R.double(), found[:, 4], found[:, 5])
        return {name: float(x.mean()) for name, x in zip(names, values, strict=True)}, {}

    @staticmethod
    def predictor(run: Path) -> Predictor:
        """Return a function that gives the TOP classes of upright pictures."""
        classes = recorded(run)["classes"]
        backbone = load_encoder(str(run), head=True)
        model = backbone.model.to(device()).eval()
        transform = eval_transform(backbone).transform

        @torch.inference_mode()
        def classify(pictures: Sequence[RGB]) -> list[Prediction]:
            views_B3HW = torch.stack([transform(Image.fromarray(rgb)) for rgb in pictures])
            x_B3HW = backbone.normalized(views_B3HW.to(device()))
            probabilities_BK = model(x_B3HW).softmax(1).cpu()
            top = zip(*probabilities_BK.topk(min(TOP, len(classes))), strict=True)
            found = ([*zip(k.tolist(), p.tolist(), strict=True)] for p, k in top)
            return [
                Prediction(
                    {"top5": [{"class": classes[k], "probability": p} for k, p in pairs]}, {}
                )
                for pairs in found
            ]

        return classify


TASKS: dict[str, type[Downstream]] = {
    "classify": Classification,
    "segment": Segmentation,
    "detect": Detection,
}


def starting_point(out: Path, config: FinetuneConfig, init: str, weights: Path | None) -> Backbone:
    """Return the encoder of `init`, or the run's without weights if `init` no longer exists.

    A run that has a checkpoint does not use the weights of `init`.

    Raises: the errors of `load_encoder`.
    """
    built = init == "random" or init.startswith("timm:")
    source = weights or (None if built else Path(init))
    if source is None or source.exists() or not checkpoint.complete(out):
        return load_encoder(init, weights, config.student, config.train.seed)
    print(f"{source}: it does not exist; {out} resumes from its own checkpoint", flush=True)
    run, backbone = recorded_backbone(out)
    return replace(backbone, weights=run.init_weights)


def run_record(
    config: FinetuneConfig, dataset: Dataset, init: str, backbone: Backbone, order: Order,
    model: nn.Module,
) -> FinetuneRun:  # fmt: skip
    """Return the identity of the run; the backbone's model already has its new head and size."""
    normalized = any(isinstance(module, _BatchNorm) for module in model.modules())
    architecture, arguments = model_args(backbone.model)
    return FinetuneRun(
        config=identity_config(config),
        dataset_sha256=dataset.sha256,
        classes=dataset.classes,
        category_ids=coco.category_ids if (coco := dataset.record.coco) else None,
        init=init,
        init_weights=backbone.weights,
        architecture=architecture,
        model_args=arguments,
        size=backbone.model.patch_embed.img_size,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        crop_pct=backbone.crop_pct,
        micro_batch=order.batch if normalized else None,
        ranks=order.world if normalized else None,
    )


def make_classifier(
    model: VisionTransformer, num_classes: int, pool: str, drop_path: float, seed: int,
    frozen: bool = False,
) -> VisionTransformer:  # fmt: skip
    """Return the encoder with a new linear head.

    With pool "avg", the final norm moves behind the pooling and keeps its weights. A `frozen`
    encoder stays in eval mode, and its head follows a BatchNorm without parameters.
    """
    model.reset_classifier(num_classes, pool)
    draw = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(model.head.weight, std=PROBE_STD if frozen else HEAD_STD, generator=draw)
    nn.init.zeros_(model.head.bias)
    if frozen:
        model.requires_grad_(False).eval()
        for child in model.children():
            freeze(child)
        head = model.head.requires_grad_(True)
        bn = nn.BatchNorm1d(head.in_features, eps=BATCHNORM_EPS, affine=False)
        model.head = nn.Sequential(bn, head)
        return model
    norm = model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm
    model.norm, model.fc_norm = (nn.Identity(), norm) if pool == "avg" else (norm, nn.Identity())
    set_drop_path(model, drop_path)
    return model.requires_grad_(True)


@torch.inference_mode()
def judged(backbone: Backbone, items: Iterable[Batch], accelerator: Accelerator) -> Tensor:
    """Return a line per row of all ranks, in order, without padded rows, float64 [R, 6].

    Its columns: row, label, predicted class, probability, whether the top 5 have the label, loss.
    """
    parts = []
    for batch in items:
        batch = to_device(batch, accelerator.device)
        logits_BK = backbone.model(backbone.normalized(batch["pictures"])).float()
        labels_B, rows_B = batch["labels"], batch["rows"].to(accelerator.device)
        probability_B, predicted_B = logits_BK.softmax(1).max(1)
        top_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
        hits_B = (top_B5 == labels_B[:, None]).any(1)
        losses_B = functional.cross_entropy(logits_BK, labels_B, reduction="none")
        columns = (rows_B, labels_B, predicted_B, probability_B, hits_B, losses_B, batch["weight"])
        parts.append(torch.stack([column.double() for column in columns], 1))
    found = cast(Tensor, accelerator.gather(torch.cat(parts))).cpu()
    found = found[found[:, -1] > 0, :-1]
    return found[found[:, 0].argsort()]
