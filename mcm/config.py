"""What a run is: one strict record per TOML file, its sections named as the user types them."""

import os
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from cache_tools.records import Record

Count = Annotated[int, Field(gt=0, lt=1 << 31)]  # bounded, so that every product with a float is finite
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Student(Record):
    """The encoder, a plain ViT; the picture size, patch size and token grid come from the cache."""

    width: Count
    depth: Count
    heads: Count
    mlp_ratio: PositiveFloat = 4.0
    drop_path: BelowOne = 0.0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"student.heads = {self.heads} must divide student.width = {self.width}")
        if self.width % 4:
            raise ValueError(f"student.width = {self.width} must be a multiple of 4 for the 2-D sin-cos positions")
        return self


class SizedStudent(Student):
    """An encoder for `--init random`, where nothing else gives the picture's size and the patch (pixels)."""

    size: Count
    patch: Count

    @model_validator(mode="after")
    def _tiles(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"student.patch = {self.patch} must divide student.size = {self.size}")
        return self


class Decoder(Record):
    """Blocks between the second fill and the linear layer; 0 is the linear layer alone."""

    depth: NonNegativeInt = 2


class Mask(Record):
    """What is hidden: `ratio` of the channels of every patch, or of the patches; `pool` masks are made an epoch.

    Departures from the paper: from epoch to epoch the ratio moves linearly to `final_ratio`, and `unmasked_fraction` of
    the rows is shown whole. `fill` "scalar" ties each of the two fills to one number.
    """

    mode: Literal["channel", "dropout", "patch", "none"] = "channel"
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    final_ratio: BelowOne | None = None
    unmasked_fraction: BelowOne = 0.0
    fill: Literal["vector", "scalar"] = "vector"
    second_fill: bool = True
    pool: Count = 4096


class Target(Record):
    """What is predicted, how it is normalised, and which side carries the linear layer.

    `features`: the teacher's patch tokens, the same in its joint space with text, or the view's own pixels.
    """

    features: Literal["patch", "joint", "pixels"] = "patch"
    projection: Literal["prediction", "orthogonal", "learned"] = "prediction"
    norm: Literal["layer_norm", "channel", "none"] = "layer_norm"


class Loss(Record):
    """What is added to the mean squared error of the patches: with `cls` that of the teacher's CLS token."""

    cls: bool = False


class Optim(Record):
    """AdamW; `lr` is the peak learning rate, `blr` the same for a global batch of 256; clip_norm 0 is off."""

    exclusive: ClassVar[tuple[str, ...]] = ("lr", "blr")
    lr: PositiveFloat | None = None
    blr: PositiveFloat | None = None
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: NonNegativeFloat = 3.0

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if (self.lr is None) == (self.blr is None):
            raise ValueError(f"give exactly one of optim.lr and optim.blr; found lr = {self.lr}, blr = {self.blr}")
        return self


class FinetuneOptim(Optim):
    """The learning rate of block i is scaled by layer_decay ** (blocks above it + 1); 1 is off.

    LARS has beta1 for its momentum. With `ema`, an average of the weights that keeps this share of itself per step is
    what is evaluated and exported; 0 is off.
    """

    name: Literal["adamw", "lars"] = "adamw"

    beta2: BelowOne = 0.999
    clip_norm: NonNegativeFloat = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    ema: BelowOne = 0.0


class Schedule(Record):
    """Linear warm-up from zero, then a cosine down to min_lr at the last step."""

    epochs: Count
    warmup_epochs: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _warms_up_first(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs = {self.warmup_epochs} must be below epochs = {self.epochs}")
        return self


def default_workers() -> int:
    """Return the number of the stream's workers per rank: the cores of the rank but one, and at most 8.

    On 16 cores, 12 workers made the step of ViT-S slower than 8 (docs/performance.md).
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, len(os.sched_getaffinity(0)) // ranks - 1))


class Train(Record):
    """The engine. micro_batch: the most rows per device at once.

    A checkpoint is saved every `checkpoint_minutes`; with `checkpoint_steps`, every so many steps instead, or with 0 at
    the ends of epochs.
    `residual` is the dtype of the residual stream where `precision` is bf16; norms, loss and weights stay float32.
    """

    seed: NonNegativeInt = 0
    global_batch: Count
    micro_batch: Count
    precision: Literal["bf16", "fp32"] = "bf16"
    residual: Literal["bf16", "fp32"] = "fp32"
    compile: bool = False
    workers: NonNegativeInt = Field(default_factory=default_workers)
    log_steps: Count = 50
    checkpoint_minutes: PositiveFloat = 10.0
    checkpoint_steps: NonNegativeInt | None = None
    keep_last: Count = 3
    eval_epochs: NonNegativeInt = 1
    knn_epochs: NonNegativeInt = 0


class PretrainData(Record):
    """Which units of the cache: the first `views` of the complete ones, 0 for all."""

    views: NonNegativeInt = 0


class PretrainConfig(Record):
    """One pre-training run."""

    student: Student
    decoder: Decoder = Decoder()
    mask: Mask = Mask()
    target: Target = Target()
    loss: Loss = Loss()
    data: PretrainData = PretrainData()
    optim: Optim
    schedule: Schedule
    train: Train

    @model_validator(mode="after")
    def _fits(self) -> Self:
        hidden, width = round(self.mask.ratio * self.student.width), self.student.width
        if self.mask.mode in ("channel", "dropout") and not 0 < hidden < width:
            raise ValueError(f"mask.ratio = {self.mask.ratio} hides {hidden} of student.width = {width} channels")
        target = self.target
        if target.norm == "channel" and target.features != "patch":
            raise ValueError(f'target.norm = "channel" needs target.features = "patch"; found {target.features!r}')
        without = ("features", "pixels"), ("projection", "learned"), ("norm", "channel")
        for key, value in without if self.loss.cls else ():
            if getattr(target, key) == value:
                raise ValueError(f'loss.cls = true has no CLS target for target.{key} = "{value}"')
        return self


class Augment(Record):
    """timm's training transform: RandAugment string, mixup and cutmix alphas, smoothing, erasing, least crop area."""

    recipe: str = ""
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    smoothing: BelowOne = 0.0
    erasing: Fraction = 0.0
    scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    flip: Fraction = 0.5


class Data(Record):
    """Which rows of the DATASET's "train"; shots: labels per class, 0 for all."""

    shots: NonNegativeInt = 0


class FinetuneConfig(Record):
    """One fine-tuning run; `student` is for `--init random` only, any other init brings its architecture.

    `frozen`: only the head trains, behind a BatchNorm of each micro-batch, as in MAE's linear probe.
    """

    frozen: bool = False
    pool: Literal["avg", "token"] = "avg"
    drop_path: BelowOne = 0.0
    student: SizedStudent | None = None
    augment: Augment = Augment()
    data: Data = Data()
    optim: FinetuneOptim
    schedule: Schedule
    train: Train
