"""What a CACHE is and what vouches for it: the records of cache.json, the commits and the manifests."""

from typing import Literal, Self

import pydantic

from .dataset import CHUNK_ROWS, RowsPerShard
from .records import Amount, Checksum, Count, Record, SplitName
from .zarr_shards import ArraySpec

MAX_ROW = 1 << 24  # features, and pixels, of one row; CLIP L/14 at 336 px has 2^19.2
MAX_SHARDS = 1 << 20  # of a unit


class CropPolicy(Record):
    """How views of the training split are drawn; every other split is centre crops.

    `scale` is the crop's share of the source's area, `ratio` its width over height, `flip` the chance of a mirror.
    """

    kind: Literal["rrc", "center"] = "rrc"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


class TeacherIdentity(Record):
    """What computed the features; `weights_sha256` is over the loaded tensors, whatever file they came from."""

    name: str
    architecture_sha256: str
    weights_sha256: str
    activation: str
    layer: Literal["last"] = "last"
    norm: Literal["final", "none"] = "final"
    height: int
    width: int
    kernel: Literal["bicubic"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    projection_sha256: str | None = None
    weights_set: str | None = pydantic.Field(None, exclude_if=lambda value: value is None)


class CacheIdentity(Record):
    """cache.json: a pure function of the request. `grid` is (rows, columns) of patch tokens; sizes are pixels.

    What came after the first caches is None in them and then left out, so that their digests stay what they were:
    `compress`, and `pixels_sha256`, a fixed picture through this machine's decoders, resize and encoder.
    """

    format: Literal["mcm-cache"] = "mcm-cache"
    version: Literal[1] = 1
    teacher: TeacherIdentity
    crop: CropPolicy
    seed: int
    view_height: Count
    view_width: Count
    view_encoding: str
    picture_rules: int
    dtype: Literal["int8", "float16"]
    compress: Literal["zstd"] | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    pixels_sha256: str | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    grid: tuple[Count, Count]
    channels: Count
    has_cls: bool
    rows_per_shard: RowsPerShard
    rows: dict[SplitName, Count]
    classes: tuple[str, ...]
    dataset_sha256: str

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        """What a reader allocates for a chunk, and lists of a unit, stays in proportion whoever wrote cache.json."""
        shards = max((self.shards(split) for split in self.rows), default=0)
        if max(self.tokens * self.channels, self.view_height * self.view_width) > MAX_ROW or shards > MAX_SHARDS:
            raise ValueError(f"expected rows of at most {MAX_ROW} features and pixels, in at most {MAX_SHARDS} shards")
        return self

    @property
    def tokens(self) -> int:
        """Patch tokens N of a row."""
        return self.grid[0] * self.grid[1]

    def shards(self, split: str) -> int:
        """Shards of a unit of `split`."""
        return -(-self.rows[split] // self.rows_per_shard)

    def arrays(self, split: str) -> dict[str, ArraySpec]:
        """The arrays of a unit of `split`, by name."""
        rows, shards = self.rows[split], self.shards(split)
        layout = (CHUNK_ROWS, self.rows_per_shard)
        patch = ArraySpec("patch", (rows, self.tokens, self.channels), self.dtype, *layout, self.compress)
        specs = {"patch": patch}
        if self.dtype == "int8":
            specs["scale"] = ArraySpec("scale", (rows, self.tokens), "float32", *layout)
        if self.has_cls:
            specs["cls"] = ArraySpec("cls", (rows, self.channels), "float16", *layout)
        if self.dtype == "int8":
            per_shard = ("channel_mean", "channel_std")
            specs |= {n: ArraySpec(n, (shards, self.channels), "float32", 1, 1) for n in per_shard}
        return specs


class ProbeRecord(Record):
    """probe.json: the digest of probe.npy, the teacher's float32 features of the probe pictures."""

    format: Literal["mcm-probe"] = "mcm-probe"
    version: Literal[1] = 1
    features_sha256: str


class Fingerprint(Record):
    """What the bytes depend on besides the request: the same one gives the same bytes."""

    device: str
    precision: Literal["fp32", "fp16", "bf16"]
    batch: int
    versions: dict[str, str]


class Fidelity(Record):
    """Loss of the stored features: by quantisation (channel-standardised values) and by the forward's precision."""

    relative_mse: float
    cosine: float
    precision_mse: float


class FileEntry(Record):
    """Size and hash of a committed file."""

    bytes: Amount
    sha256: str


class Commit(Record):
    """Vouches for one shard of one unit. `chunk_crc32c` has a list an array, and "index" for 16 index records each."""

    format: Literal["mcm-commit"] = "mcm-commit"
    version: Literal[1] = 1
    identity_sha256: str
    split: str
    view: int
    shard: int
    rows: int
    files: dict[str, FileEntry]
    chunk_crc32c: dict[str, tuple[Checksum, ...]]
    channel_mean: tuple[float, ...]
    channel_var: tuple[float, ...]
    fidelity: Fidelity
    fingerprint: Fingerprint


class Manifest(Record):
    """Written when all commits of a unit are there: the sha256 of each, in order."""

    format: Literal["mcm-manifest"] = "mcm-manifest"
    version: Literal[1] = 1
    identity_sha256: str
    split: str
    view: int
    rows: int
    commits: tuple[str, ...]
