"""Load frozen teachers, the vision transformers of open_clip and timm, and compute their features.

B batch, N patch tokens, C channels, H W pixels.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cache_tools.errors import McmError, UsageError
from cache_tools.images import RGB, resize_rgb
from cache_tools.records import sha256_hex
from cache_tools.rng import uniform
from cache_tools.schema import TeacherIdentity
from cache_tools.weights import RANDOM, Triple

from .open_clip_teachers import load_open_clip_tower
from .timm_teachers import Forward, Tower, check_multiple, load_timm_tower

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass
class Teacher:
    """A frozen tower with its identity, device and precision.

    `forward` maps normalized pictures [B, 3, H, W] to (patch [B, N, C], CLS [B, C] or None).
    """

    identity: TeacherIdentity
    tower: nn.Module
    forward: Forward
    grid: tuple[int, int]
    channels: int
    has_cls: bool
    projection: npt.NDArray[np.float32] | None
    device: torch.device
    precision: Precision
    notes: tuple[str, ...]  # for the user: the preprocessing and its source

    def __post_init__(self) -> None:
        # Copied once, because a copy from the host per batch would wait for the GPU.
        self._mean, self._std = (
            torch.tensor(value, device=self.device) * 255
            for value in (self.identity.mean, self.identity.std)
        )

    @torch.inference_mode()
    def features(
        self, pictures_BHW3: Tensor, precision: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return float32 features (patch [B, N, C], CLS [B, C] or None) on the teacher's device.

        The pictures are uint8 and have the teacher's size.
        """
        dtype = PRECISIONS[precision or self.precision]
        x_BHW3 = (pictures_BHW3.to(self.device, non_blocking=True) - self._mean) / self._std
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            patch_BNC, cls_BC = self.forward(x_BHW3.permute(0, 3, 1, 2))
        return patch_BNC.float(), None if cls_BC is None else cls_BC.float()


def load_teacher(
    name: str,
    weights: str,
    size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    normalization: tuple[Triple, Triple] | None = None,
) -> Teacher:
    """Load the teacher `open_clip:ARCH`, `open_clip:FOLDER` (open_clip_config.json) or `timm:NAME`.

    `weights` is a tag ("openai", or "pretrained" for timm), FILE, FILE#SET, or "random". `size` in
    pixels replaces the teacher's own size. `normalization` is the mean and std of pixels in [0, 1],
    for weights that do not state them.

    Raises: UsageError for an unknown name, tag, size or normalization; IdentityError for missing or
    extra tensors or the wrong GELU; ResourceError if a tag cannot be fetched.
    """
    kind, _, architecture = name.partition(":")
    if kind not in ("open_clip", "timm") or not architecture:
        raise UsageError(
            f"--teacher {name!r}: expected open_clip:ARCH, open_clip:FOLDER or timm:NAME"
        )
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if size is not None and size < 1:
        raise UsageError(f"--teacher-size {size}: expected a side in pixels, above 0")
    torch_device = _device(device)
    # bf16 is never the default, because bf16 autocast loses more precision than int8 codes do.
    precision = precision or ("fp32" if torch_device.type == "cpu" else "fp16")
    # By default, cuDNN convolutions in fp32 use TF32.
    torch.backends.cudnn.allow_tf32 = False
    load = load_open_clip_tower if kind == "open_clip" else load_timm_tower
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the weights of "random"
            tower = load(architecture, weights, size, normalization)
        teacher = _teacher(tower, weights, torch_device, cast(Precision, precision))
    except (McmError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # open_clip and timm raise many kinds of errors on other models
        raise UsageError(f"--teacher {name}: expected a vision transformer; {error!r}") from error
    teacher.tower.to(torch_device)
    return teacher


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not supported")
    except (RuntimeError, AssertionError, ImportError) as error:
        found = str(error).splitlines()[0]
        expected = "expected a device of this machine"
        raise UsageError(f"--device {name}: {expected}: {found}") from error
    return device


def _teacher(tower: Tower, weights: str, device: torch.device, precision: Precision) -> Teacher:
    # In training mode, patch dropout would drop tokens.
    model = tower.model.eval().requires_grad_(False)
    for side in tower.size:
        check_multiple("--teacher-size", side, tower.patch)
    with torch.inference_mode():
        patch_BNC, cls_BC = tower.forward(torch.zeros(1, 3, *tower.size))
    rows, columns = (side // tower.patch for side in tower.size)
    if rows * columns != patch_BNC.shape[1]:
        found = f"{patch_BNC.shape[1]} tokens of {tower.size}"
        raise UsageError(f"{tower.name}: expected {rows}x{columns} square patches; found {found}")
    matrix = None if tower.projection is None else tower.projection.detach().numpy()
    projection = None if matrix is None else np.ascontiguousarray(matrix, np.float32)
    stated = tower.preprocessing
    identity = TeacherIdentity(
        name=f"{tower.name} (random weights)" if weights == RANDOM else tower.name,
        architecture_sha256=sha256_hex(json.dumps(tower.architecture, sort_keys=True).encode()),
        weights_sha256=state_sha256(model.state_dict()),
        height=tower.size[0],
        width=tower.size[1],
        mean=stated.mean,
        std=stated.std,
        projection_sha256=None if projection is None else sha256_hex(projection.tobytes()),
        **tower.facts,
    )
    bicubic = stated.interpolation == "bicubic"
    resize = "" if bicubic else "; this project resizes by bicubic interpolation"
    return Teacher(
        identity=identity,
        tower=model,
        forward=tower.forward,
        grid=(rows, columns),
        channels=patch_BNC.shape[2],
        has_cls=cls_BC is not None,
        projection=projection,
        device=device,
        precision=precision,
        notes=(f"teacher {identity.name}: {stated}, from {stated.source}{resize}", *tower.notes),
    )


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return the digest of the names, dtypes, shapes and values; no file format affects it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def probe_pictures(height: int, width: int, count: int = 4) -> RGB:
    """Return fixed synthetic pictures, uint8 [count, H, W, 3]: smooth colors with grain.

    They are the same on every machine.
    """
    shape = (count, height, width, 3)
    coarse = uniform(0, "probe", np.arange(count * 8 * 8 * 3)).reshape(count, 8, 8, 3)
    grain = uniform(0, "probe-grain", np.arange(count * height * width * 3)).reshape(shape)
    pictures = (coarse * 255).astype(np.uint8)
    smooth = np.stack([resize_rgb(picture_HW3, height, width) for picture_HW3 in pictures])
    return np.clip(smooth + 32 * (grain - 0.5), 0, 255).astype(np.uint8)
