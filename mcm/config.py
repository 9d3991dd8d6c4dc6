"""Configuration of a run: one strict record per TOML file, with one field per section."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from cache_tools.processes import default_workers
from cache_tools.records import Absent, Count, Record

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Student(Record):
    """The encoder, a plain ViT. The cache gives the picture size, patch size and token grid."""

    width: Count
    depth: Count
    heads: Count
    mlp_ratio: PositiveFloat = 4.0
    drop_path: BelowOne = 0.0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"student.heads = {self.heads} must divide student.width = {self.width}"
            )
        if self.width % 4:
            raise ValueError(f"student.width = {self.width} must be a multiple of 4")
        return self


class SizedStudent(Student):
    """The encoder of `--init random`, with the picture size and the patch size in pixels."""

    size: Count
    patch: Count

    @model_validator(mode="after")
    def _tiles(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"student.patch = {self.patch} must divide student.size = {self.size}")
        return self


class Decoder(Record):
    """The blocks between the second fill and the linear layer; depth 0 is only the linear layer.

    `width` is the width of the blocks. The default is the student's width, but at most 768. The
    paper's decoder has a width of 768 for every student.
    """

    depth: NonNegativeInt = 2
    width: Annotated[int, Field(gt=0, lt=1 << 31, multiple_of=4)] | None = None


class Mask(Record):
    """The masks: `ratio` of the channels of every patch, or of the patches, is hidden.

    Two modes are controls without a mask or a second fill. "gaussian" multiplies the embedding by
    1 + noise with the variance of dropout, ratio / (1 - ratio). "pixels" adds noise of the standard
    deviation `ratio`, for pixels in [0, 1], to the student's view.
    Each epoch draws `pool` masks. Options beyond the paper: the second fill uses another,
    independent mask (`second` = "untied") or is left out ("none"); the ratio changes linearly over
    the epochs to `final_ratio`; a share `unmasked_fraction` of the rows has no mask.
    """

    mode: Literal["channel", "dropout", "patch", "none", "gaussian", "pixels"] = "channel"
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    final_ratio: BelowOne | None = None
    unmasked_fraction: BelowOne = 0.0
    second: Literal["tied", "untied", "none"] = "tied"
    pool: Count = 4096

    @property
    def hides(self) -> bool:
        """Whether the mode hides channels or patches."""
        return self.mode in ("channel", "dropout", "patch")

    def problem(self, count: int, values: str) -> str | None:
        """Return an error message if a ratio does not fit masks over `count` values, or None.

        A schedule may end at a mask that hides nothing; no mask may hide every value.
        """
        for name, ratio, least in ("ratio", self.ratio, 1), ("final_ratio", self.final_ratio, 0):
            hidden = round((ratio or 0.0) * count)
            if ratio is not None and not least <= hidden < count:
                expected = f"expected {least} to {count - 1}; choose another ratio"
                return f"mask.{name} = {ratio} hides {hidden} of {count} {values}; {expected}"
        return None


class Target(Record):
    """The target: its features, its normalization, and its projection.

    `features`: the teacher's patch tokens, these tokens in the joint space of picture and text, or
    the pixels of the view. `projection`: the decoder predicts the target's channels ("prediction"),
    or the target is projected to the student's width.
    """

    features: Literal["patch", "joint", "pixels"] = "patch"
    projection: Literal["prediction", "orthogonal", "learned"] = "prediction"
    norm: Literal["layer_norm", "channel", "none"] = "layer_norm"


class Loss(Record):
    """The loss; `cls` adds the mean squared error of the teacher's CLS token to that of patches."""

    cls: bool = False


class Optim(Record):
    """AdamW. `lr` is the peak learning rate; `blr` is that rate for a global batch of 256.

    `clip_norm` = 0 disables gradient clipping.
    """

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
            found = f"found lr = {self.lr}, blr = {self.blr}"
            raise ValueError(f"give exactly one of optim.lr and optim.blr; {found}")
        return self


class FinetuneOptim(Optim):
    """AdamW or LARS with layer decay and EMA. LARS uses beta1 as its momentum.

    The learning rate of block i is scaled by layer_decay ** (blocks above it + 1); 1 disables it.
    `ema` is the decay of an EMA of the weights, which is evaluated and exported; 0 disables it.
    """

    name: Literal["adamw", "lars"] = "adamw"
    beta2: BelowOne = 0.999
    clip_norm: NonNegativeFloat = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    ema: BelowOne = 0.0


class Schedule(Record):
    """Learning rate schedule: linear warm-up from zero, then decay to `min_lr`.

    The warm-up lasts `warmup_epochs` plus `warmup_steps`. `shape` is a cosine, a line, or two steps
    to a tenth of the rate, after 8/9 and 26/27 of the run.
    """

    epochs: Count
    warmup_epochs: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 0
    shape: Literal["cosine", "linear", "step"] = "cosine"
    min_lr: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _warms_up_first(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            warmup = f"schedule.warmup_epochs = {self.warmup_epochs}"
            raise ValueError(f"{warmup} must be below epochs = {self.epochs}")
        return self


class Train(Record):
    """The training loop. `micro_batch` is the largest number of rows per device at once.

    A checkpoint is saved every `checkpoint_minutes`. With `checkpoint_steps`, it is saved every so
    many steps instead, and with `checkpoint_steps` = 0 at the end of each epoch.
    `precision` is the dtype of matrix products; fp16 scales the loss. `residual` is the dtype of
    the residual stream if `precision` is bf16; norms, loss and weights stay float32.
    `track` logs to wandb, MLflow or trackio too.
    """

    seed: NonNegativeInt = 0
    global_batch: Count
    micro_batch: Count
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    residual: Literal["bf16", "fp32"] = "fp32"
    compile: bool = False
    workers: NonNegativeInt = Field(default_factory=default_workers)
    log_steps: Count = 50
    checkpoint_minutes: PositiveFloat = 10.0
    checkpoint_steps: NonNegativeInt | None = None
    keep_last: Count = 3
    track: Literal["wandb", "mlflow", "trackio"] | None = None
    eval_epochs: NonNegativeInt = 1
    knn_epochs: NonNegativeInt = 0


class PretrainData(Record):
    """The units of the cache: the first `views` complete ones; 0 takes all."""

    views: NonNegativeInt = 0


class PretrainConfig(Record):
    """The configuration of one pre-training run."""

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
        channelwise = self.mask.mode in ("channel", "dropout")
        if channelwise and (problem := self.mask.problem(self.student.width, "channels")):
            raise ValueError(problem)
        target = self.target
        if target.norm == "channel" and target.features != "patch":
            raise ValueError('target.norm = "channel" needs target.features = "patch"')
        no_cls_target = ("features", "pixels"), ("projection", "learned"), ("norm", "channel")
        for key, value in no_cls_target if self.loss.cls else ():
            if getattr(target, key) == value:
                raise ValueError(f'loss.cls = true has no CLS target for target.{key} = "{value}"')
        return self


class Augment(Record):
    """timm's training transform.

    `recipe`: the RandAugment string. `mixup`, `cutmix`: alphas. `smoothing`: label smoothing.
    `erasing`, `flip`: probabilities. `scale_min`: the smallest share of the area in a crop.
    """

    recipe: str = ""
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    smoothing: BelowOne = 0.0
    erasing: Fraction = 0.0
    scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    flip: Fraction = 0.5


class Data(Record):
    """The rows of "train" of the DATASET: `shots` rows per class; 0 takes all."""

    shots: NonNegativeInt = 0


class Segment(Record):
    """Semantic segmentation on square crops of `crop` pixels.

    The head "upernet" has `channels` and reads `blocks`, counted from 1. The head "linear" reads
    the last block. Training resizes the shorter side of a picture to the crop times a factor from
    `scale`. It then crops the picture, so that no class covers more than `max_share` if possible,
    and flips it with probability `flip`. `photometric` also changes its colors. Evaluation resizes
    the shorter side to the crop and slides windows by `stride`.
    """

    head: Literal["linear", "upernet"] = "upernet"
    channels: Count = 512
    blocks: tuple[Count, Count, Count, Count] = (4, 6, 8, 12)
    crop: Annotated[int, Field(gt=0, le=4096)] = 512
    stride: Count = 341
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    max_share: Fraction = 0.75
    flip: Fraction = 0.5
    photometric: bool = True

    @model_validator(mode="after")
    def _slides(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"segment.scale = {list(self.scale)} must rise")
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"segment.blocks = {list(self.blocks)} must be four, and rise")
        if self.stride > self.crop:
            raise ValueError(f"segment.stride = {self.stride} must not exceed crop = {self.crop}")
        return self


class Detect(Record):
    """Object detection with ViTDet on a square canvas of `size` pixels.

    `masks` = false leaves the mask head out. `channels` is the width of the pyramid and its heads.
    `window` is in patches, and 0 disables it; `global_blocks` count from 1 and have no windows.
    Training resizes a picture to the canvas times a factor from `scale`, crops it, and flips it
    with probability `flip`. `anchors` are the anchor sizes of the five maps in pixels. The heads
    train on `regions` regions per picture. `empty` = false trains on pictures with objects only.
    """

    size: Count = 1024
    masks: bool = True
    channels: Count = 256
    window: NonNegativeInt = 14
    global_blocks: tuple[Count, ...] = (3, 6, 9, 12)
    rel_pos: bool = True
    scale: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    flip: Fraction = 0.5
    anchors: tuple[Count, Count, Count, Count, Count] = (32, 64, 128, 256, 512)
    regions: Count = 512
    empty: bool = True

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"detect.scale = {list(self.scale)} must rise")
        return self


class FinetuneConfig(Record):
    """The configuration of one fine-tuning run.

    `student` is the architecture of `--init random`; any other init brings its own. With `frozen`,
    only the head trains, after a BatchNorm over each micro-batch, as in MAE's linear probe.
    `pool`, `augment` and `data` belong to the task "classify"; `frozen` also to "segment".
    """

    task: Literal["classify", "segment", "detect"] = "classify"
    segment: Absent[Segment] = None
    detect: Absent[Detect] = None
    frozen: bool = False
    pool: Literal["avg", "token"] = "avg"
    drop_path: BelowOne = 0.0
    student: SizedStudent | None = None
    augment: Augment = Augment()
    data: Data = Data()
    optim: FinetuneOptim
    schedule: Schedule
    train: Train

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        classify_only = ("pool", "augment", "data")
        of_other_tasks = {
            "classify": ("segment", "detect"),
            "segment": ("detect", *classify_only),
            "detect": ("segment", "frozen", *classify_only),
        }
        for name in of_other_tasks[self.task]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} does not belong to task = "{self.task}"; remove it')
        if self.task != "classify" and getattr(self, self.task) is None:
            raise ValueError(f'task = "{self.task}" needs a [{self.task}] section')
        return self
