"""Fine-tuning: an encoder with a new linear head, all layers trained or the head alone, on the loop of pre-training.

Letters: B batch, K classes, H W pixels.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from cache_tools.dataset import Dataset
from mcm import checkpoint
from mcm.augment import Mixer, eval_transform, train_transform
from mcm.backbones import BATCHNORM_EPS, Backbone, FinetuneRun, load_encoder, model_args
from mcm.classifiers import training_rows
from mcm.config import FinetuneConfig
from mcm.loop import Job, engine, evaluation_due, to_device, train
from mcm.optim import build_optimizer
from mcm.probe import labelled, warn_of_copies
from mcm.run_dir import claim, identity_config, recorded, recorded_exit, write_environment
from mcm.sampler import EvalOrder, Order
from mcm.stream import Batch, DatasetSource, Stream, batches

HEAD_STD, PROBE_STD = 2e-5, 0.01  # as MAE: fine-tuning starts from predictions that are uniform, a linear probe not


def finetune(config: FinetuneConfig, data: Path, init: str, weights: Path | None, out: Path) -> float:
    """Train, or resume, the run in `out`; returns the top-1 accuracy on the val split.

    Raises: UsageError or IdentityError before the first step; what `loop.train` raises.
    """
    dataset, seed = labelled(Dataset(data)), config.train.seed
    rows = training_rows(dataset.labels("train"), dataset.classes, config.data.shots, seed)
    with engine(config.train.precision) as accelerator:
        world, rank = accelerator.num_processes, accelerator.process_index
        order = Order(len(rows), 1, config.train.global_batch, config.train.micro_batch, world, rank, seed)
        backbone = starting_point(out, config, init, weights)
        model = make_classifier(
            backbone.model, len(dataset.classes), config.pool, config.drop_path, seed, config.frozen
        )
        claim(out, run_record(config, dataset, init, backbone, order), FinetuneConfig)
        mixer = Mixer(config.augment, len(dataset.classes), seed)
        source = DatasetSource(dataset, "train", train_transform(config.augment, backbone), seed, rows)
        held = DatasetSource(dataset, "val", eval_transform(backbone), seed)
        held_order = EvalOrder(len(held.rows), 1, order.batch, world, rank)

        def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
            pictures_B3HW, targets_BK = mixer(batch["pictures"], batch["labels"], batch["rows"], batch["epoch"])
            return functional.cross_entropy(wrapped(pictures_B3HW).float(), targets_BK)

        def evaluate(epochs_done: int) -> dict[str, float]:
            if not evaluation_due(config, config.train.eval_epochs, epochs_done):
                return {}
            for buffer in model.buffers():  # of BatchNorm: each process has its own; the main one's are saved
                broadcast(buffer)
            return accuracy(model, held, held_order, config.train.workers, accelerator)

        with recorded_exit(out, accelerator.is_main_process) as stop:
            if accelerator.is_main_process:
                warn_of_copies(dataset, quiet=False)
                write_environment(out, config, dataset=str(data), init=init, processes=world, rows=len(rows))
            optimizer = build_optimizer(model, config.optim)
            job = Job(out, model, optimizer, Stream(order, source), loss, evaluate, config)
            top1 = train(job, accelerator, stop)["top1"]
        if accelerator.is_main_process:
            print(f"{out}: top-1 {100 * top1:.2f} % on {len(held.rows)} pictures of 'val'", flush=True)
    return top1


def starting_point(out: Path, config: FinetuneConfig, init: str, weights: Path | None) -> Backbone:
    """Return the encoder of `init`, or the run's own where `init` is gone: after a checkpoint, its weights are unused.

    Raises: what `load_encoder` raises.
    """
    built = init == "random" or init.startswith("timm:")
    source = weights or (None if built else Path(init))
    if source is None or source.exists() or not checkpoint.complete(out):
        return load_encoder(init, weights, config.student, config.train.seed)
    print(f"{source}: it does not exist; {out} resumes from its own checkpoint", flush=True)
    return replace(load_encoder(str(out)), weights=recorded(out)["init_weights"])


def run_record(config: FinetuneConfig, dataset: Dataset, init: str, backbone: Backbone, order: Order) -> FinetuneRun:
    """The run's identity; the backbone's model has its new head already."""
    architecture, arguments = model_args(backbone.model)
    return FinetuneRun(
        config=identity_config(config),
        dataset_sha256=dataset.sha256,
        classes=dataset.classes,
        init=init,
        init_weights=backbone.weights,
        architecture=architecture,
        model_args=arguments,
        size=backbone.size,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        crop_pct=backbone.crop_pct,
        micro_batch=order.batch if config.frozen else None,
        ranks=order.world if config.frozen else None,
    )


def make_classifier(
    model: VisionTransformer, num_classes: int, pool: str, drop_path: float, seed: int, frozen: bool = False
) -> VisionTransformer:
    """The encoder with a new linear head; with pool "avg" its final norm moves behind the pool, weights kept.

    A `frozen` encoder stays as it is, also in training; before its head stands a BatchNorm without parameters.
    """
    model.reset_classifier(num_classes, pool)
    draw = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(model.head.weight, std=PROBE_STD if frozen else HEAD_STD, generator=draw)
    nn.init.zeros_(model.head.bias)
    if frozen:
        return _freeze(model)
    norm = model.norm if isinstance(model.fc_norm, nn.Identity) else model.fc_norm
    model.norm, model.fc_norm = (nn.Identity(), norm) if pool == "avg" else (norm, nn.Identity())
    for block, rate in zip(model.blocks, torch.linspace(0, drop_path, len(model.blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
    return model.requires_grad_(True)


def _freeze(model: VisionTransformer) -> VisionTransformer:
    model.requires_grad_(False).eval()
    for child in model.children():
        child.train = lambda mode=True, child=child: child  # the loop's model.train() must not wake its drop paths
    head = model.head.requires_grad_(True)
    model.head = nn.Sequential(nn.BatchNorm1d(head.in_features, eps=BATCHNORM_EPS, affine=False), head)
    return model


@torch.inference_mode()
def accuracy(
    model: nn.Module, source: DatasetSource, order: EvalOrder, workers: int, accelerator: Accelerator
) -> dict[str, float]:
    """Top-1, top-5 (fractions) and cross-entropy over all processes; padded rows count nothing."""
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    with batches(Stream(order, source), 0, len(order), workers) as items:
        for batch in items:
            batch = to_device(batch, accelerator.device)
            logits_BK = model(batch["pictures"]).float()
            labels_B, weight_B = batch["labels"], batch["weight"].double()
            ranked_BK = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]
            losses_B = functional.cross_entropy(logits_BK, labels_B, reduction="none")
            terms = (ranked_BK[:, 0], ranked_BK.any(1), losses_B, torch.ones_like(losses_B))
            sums += torch.stack([(term.double() * weight_B).sum() for term in terms])
    top1, top5, loss, count = accelerator.reduce(sums, "sum").tolist()
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count}
