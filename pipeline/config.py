"""The configuration of `mcm-cache extract`: the contents of a CACHE, from a TOML file or flags."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

import pydantic

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import UsageError
from cache_tools.images import check_encoding
from cache_tools.records import Count, Record, SplitName, config_file, load_toml
from cache_tools.schema import CropPolicy

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]


def _colors(value: Any) -> Any:
    """Return three numbers, from "R,G,B" or from one number for all three."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    with suppress(ValueError, TypeError):
        return tuple(float(part) for part in parts) * (3 if len(parts) == 1 else 1)
    return value  # pydantic refuses it and names the key


Color = Annotated[float, pydantic.Field(ge=0, le=1)]
Colors = Annotated[tuple[Color, Color, Color] | None, pydantic.BeforeValidator(_colors)]


class ExtractConfig(Record):
    """The settings of an extraction; sizes are in pixels, `batch` is in pictures.

    `size` is the side of a view, which the student sees. `patch` is the student's patch size; the
    student's grid must equal the teacher's. `teacher_size` is the side of the teacher's input; None
    takes the teacher's own size. `teacher_mean` and `teacher_std` normalize pixels in [0, 1]; None
    takes the values in the configuration of the weights or in the tags of the architecture. `crop`
    applies to split train; other splits get center crops.
    """

    teacher: str
    weights: str
    splits: tuple[SplitName, ...] = ()  # empty: every split of the DATASET
    views: Count = 4
    size: Side = 224
    patch: Side | None = None
    teacher_size: Side | None = None
    teacher_mean: Colors = None
    teacher_std: Colors = None
    crop: CropPolicy = CropPolicy(kind="rrc")
    encoding: str = "jpeg:95:444"  # token cosine to the unrecompressed view 0.983; 0.949 at 92:420
    dtype: Literal["int8", "float16"] = "int8"
    compress: Literal["zstd"] | None = None
    max_error: Annotated[float, pydantic.Field(gt=0)] | None = None  # relative MSE of a shard
    precision: Literal["fp32", "fp16", "bf16"] | None = None  # None: fp16 on CUDA, fp32 on a CPU
    batch: Annotated[int, pydantic.Field(ge=CHUNK_ROWS, le=4096, multiple_of=CHUNK_ROWS)] = 64
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        check_encoding(self.encoding)
        mean, std = self.teacher_mean, self.teacher_std
        if (mean is None) != (std is None) or 0 in (std or ()):
            raise ValueError("expected both teacher_mean and teacher_std, and teacher_std above 0")
        (low, high), (narrow, wide) = self.crop.scale, self.crop.ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide or not 0 <= self.crop.flip <= 1:
            found = f"{self.crop.scale}, {self.crop.ratio} and {self.crop.flip}"
            raise ValueError(
                "expected crop.scale = [LOW, HIGH] in (0, 1], crop.ratio = [LOW, HIGH] above 0 and "
                f"crop.flip in [0, 1]; found {found}"
            )
        return self

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """Return the teacher's mean and std, or None when they are not given."""
        mean, std = self.teacher_mean, self.teacher_std
        return (mean, std) if mean and std else None


def load_config(
    name: str | None, flags: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ExtractConfig:
    """Return the configuration of a TOML file, changed by `flags` and then by `overrides`.

    `name` is a path or the name of a shipped file; None starts from the defaults.

    Raises: UsageError naming the key.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if name is None and not given.keys() >= {"teacher", "weights"}:
        alternative = "--config with a TOML file or a shipped name"
        raise UsageError(f"expected --teacher and --weights, or {alternative}")
    return load_toml(ExtractConfig, config_file(name) if name else None, overrides, given)
