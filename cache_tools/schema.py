"""The records of a CACHE: cache.json, probe.json, commits and manifests."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, Self

import pydantic

from .dataset import CHUNK_ROWS, RowsPerShard
from .records import Absent, Checksum, Count, FileEntry, Record, SplitName
from .zarr_shards import ArraySpec

MAX_ROW = 1 << 24  # features, or pixels, per row; CLIP L/14 at 336 px has 2^19.2
MAX_SHARDS = 1 << 20  # per unit


class CropPolicy(Record):
    """How the views of the training split are drawn. Every other split has center crops.

    `scale` is the range of the crop's area relative to the source picture. `ratio` is the range of
    its width divided by its height. `flip` is the probability of a horizontal flip.
    """

    kind: Literal["rrc", "center"] = "rrc"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


class TeacherIdentity(Record):
    """The teacher that computed the features.

    `weights_sha256` is the digest of the loaded tensors, not of the file they were loaded from.
    """

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
    weights_set: Absent[str] = None


class CacheIdentity(Record):
    """cache.json: determined by the request, except for `pixels_sha256`.

    `grid` is (rows, columns) of patch tokens. Sizes are in pixels. `pixels_sha256` is the digest of
    a fixed picture after the decoders, resize and encoder of the first worker's machine. Early
    caches have neither `compress` nor `pixels_sha256`. None is not written, so the digests of these
    caches stay valid. `pictures` is False if only the features were pulled.
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
    compress: Absent[Literal["zstd"]] = None
    pixels_sha256: Absent[str] = None
    pictures: Absent[Literal[False]] = None
    grid: tuple[Count, Count]
    channels: Count
    has_cls: bool
    rows_per_shard: RowsPerShard
    rows: dict[SplitName, Count]
    classes: tuple[str, ...]
    dataset_sha256: str

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        """Limit the memory that an untrusted cache.json can make a reader allocate."""
        shards = max((self.shards(split) for split in self.rows), default=0)
        if (
            max(self.tokens * self.channels, self.view_height * self.view_width) > MAX_ROW
            or shards > MAX_SHARDS
        ):
            expected = f"expected rows of at most {MAX_ROW} features and pixels"
            raise ValueError(f"{expected}, in at most {MAX_SHARDS} shards")
        return self

    @property
    def tokens(self) -> int:
        """Number of patch tokens N per row."""
        return self.grid[0] * self.grid[1]

    def shards(self, split: str) -> int:
        """Return the number of shards of a unit of `split`."""
        return -(-self.rows[split] // self.rows_per_shard)

    def arrays(self, split: str) -> dict[str, ArraySpec]:
        """Return the arrays of a unit of `split`, by name."""
        rows, shards = self.rows[split], self.shards(split)
        layout = (CHUNK_ROWS, self.rows_per_shard)
        shape = (rows, self.tokens, self.channels)
        specs = {"patch": ArraySpec("patch", shape, self.dtype, *layout, self.compress)}
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
    """What a machine adds to the identity: the stored bytes depend on it.

    `versions` also holds the name of the GPU, or the number of CPU threads.
    """

    device: str
    precision: Literal["fp32", "fp16", "bf16"]
    batch: int
    versions: dict[str, str]


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the version of each package that is installed.

    A checkout of this project has no metadata, and a GPU machine may lack some packages.
    """
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class Fidelity(Record):
    """The error of the stored features.

    `relative_mse` and `cosine` measure the quantization of channel-standardized values.
    `precision_mse` measures the precision of the teacher's forward pass.
    """

    relative_mse: float
    cosine: float
    precision_mse: float


class Commit(Record):
    """The sizes, digests and statistics of one shard of one unit. It is written last.

    `chunk_crc32c` has one list per array, with one value per chunk. Its list "index" has one value
    per 16 index records.
    """

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
    """The sha256 of every commit of a unit, in order. It is written when all commits exist."""

    format: Literal["mcm-manifest"] = "mcm-manifest"
    version: Literal[1] = 1
    identity_sha256: str
    split: str
    view: int
    rows: int
    commits: tuple[str, ...]
