"""The record of an extraction: one TOML file, or the flags of `mcm-cache extract`, says what a CACHE is to hold."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import UsageError
from cache_tools.images import check_encoding
from cache_tools.records import Count, Record, SplitName, config_file, load_toml
from cache_tools.schema import CropPolicy

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]


def _colours(value: Any) -> Any:
    """Three numbers from "R,G,B", or from one number for all three."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(float(part) for part in parts) * (3 if len(parts) == 1 else 1)


Colour = Annotated[float, pydantic.Field(ge=0, le=1)]
Colours = Annotated[tuple[Colour, Colour, Colour] | None, pydantic.BeforeValidator(_colours)]


class ExtractConfig(Record):
    """What an extraction computes; sizes are in pixels, `batch` in pictures.

    `size` is the side of a view, which the student sees; `patch` is the student's, checked against the teacher's grid.
    `teacher_size` is the side of the teacher's input, None for its own. `teacher_mean` and `teacher_std`, of pixels in
    [0, 1], normalise it; None for what the weights' own configuration or the tags of the architecture state.
    `crop` is that of split train; the others get centre crops.
    """

    teacher: str
    weights: str
    splits: tuple[SplitName, ...] = ()  # every split of the DATASET where it is empty
    views: Count = 4
    size: Side = 224
    patch: Side | None = None
    teacher_size: Side | None = None
    teacher_mean: Colours = None
    teacher_std: Colours = None
    crop: CropPolicy = CropPolicy(kind="rrc")
    encoding: str = "jpeg:95:444"  # token cosine to the unrecompressed view 0.983; 0.949 at 92:420
    dtype: Literal["int8", "float16"] = "int8"
    compress: Literal["zstd"] | None = None
    max_error: Annotated[float, pydantic.Field(gt=0)] | None = None  # largest relative MSE of a shard's features
    precision: Literal["fp32", "fp16", "bf16"] | None = None  # of the forward; fp16 on CUDA, fp32 elsewhere
    batch: Annotated[int, pydantic.Field(ge=CHUNK_ROWS, multiple_of=CHUNK_ROWS)] = 64
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        check_encoding(self.encoding)
        if (self.teacher_mean is None) != (self.teacher_std is None) or 0 in (self.teacher_std or ()):
            raise ValueError("expected teacher_mean and teacher_std together, and a teacher_std above 0")
        (low, high), (narrow, wide) = self.crop.scale, self.crop.ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide or not 0 <= self.crop.flip <= 1:
            raise ValueError(
                f"expected crop.scale = [LOW, HIGH] in (0, 1], crop.ratio = [LOW, HIGH] above 0 and crop.flip in "
                f"[0, 1]; found {self.crop.scale}, {self.crop.ratio} and {self.crop.flip}"
            )
        return self

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """The teacher's mean and std, where they are given."""
        return (self.teacher_mean, self.teacher_std) if self.teacher_mean and self.teacher_std else None


def load_config(name: str | None, flags: Mapping[str, Any], overrides: Sequence[str] = ()) -> ExtractConfig:
    """The configuration of the file or shipped name `name` (None: the defaults), then flags, then overrides.

    Raises: UsageError naming the key.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if name is None and not given.keys() >= {"teacher", "weights"}:
        raise UsageError("expected --teacher and --weights, or --config with a TOML file or a shipped name")
    return load_toml(ExtractConfig, config_file(name) if name else None, overrides, given)
