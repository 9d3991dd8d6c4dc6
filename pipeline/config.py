"""The record of an extraction: one TOML file, or the flags of `mcm-cache extract`, says what a CACHE is to hold."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import UsageError
from cache_tools.identity import CropPolicy
from cache_tools.images import check_encoding
from cache_tools.records import Count, Record, SplitName, config_file, load_toml

Side = Annotated[int, pydantic.Field(ge=1, le=4096)]


class ExtractConfig(Record):
    """What an extraction computes; sizes are in pixels, `batch` in pictures.

    `size` is the side of a view, which the student sees; `patch` is the student's, checked against the teacher's grid.
    `teacher_size` is the side of the teacher's input, None for its own. `crop` is that of split train; the others get
    centre crops.
    """

    teacher: str
    weights: str
    splits: tuple[SplitName, ...] = ()  # every split of the DATASET where it is empty
    views: Count = 4
    size: Side = 224
    patch: Side | None = None
    teacher_size: Side | None = None
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
        (low, high), (narrow, wide) = self.crop.scale, self.crop.ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide or not 0 <= self.crop.flip <= 1:
            raise ValueError(
                f"expected crop.scale = [LOW, HIGH] in (0, 1], crop.ratio = [LOW, HIGH] above 0 and crop.flip in "
                f"[0, 1]; found {self.crop.scale}, {self.crop.ratio} and {self.crop.flip}"
            )
        return self


def load_config(name: str | None, flags: Mapping[str, Any], overrides: Sequence[str] = ()) -> ExtractConfig:
    """The configuration of the file or shipped name `name` (None: the defaults), then flags, then overrides.

    Raises: UsageError naming the key.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if name is None and not given.keys() >= {"teacher", "weights"}:
        raise UsageError("expected --teacher and --weights, or --config with a TOML file or a shipped name")
    return load_toml(ExtractConfig, config_file(name) if name else None, overrides, given)
