"""The demo's data: scikit-learn's 1,797 real digits as an ImageFolder, and a small real CLIP trained on them.

The teacher is open_clip's own CLIP class under open_clip's own file layout: the demo runs the very code of ViT-B/16.
It is trained on the training split alone. Of ten digits, many pictures of a batch share one caption, which the usual
one-positive loss would push apart: each picture is a positive of every caption of its digit (soft targets, as UniCL).
The tower pools by the mean of its patch tokens, which are what a student learns from: in a trial (batch 96, 400 steps)
pooling by CLS, as ViT-B/16 does, gave 98.3 % zero-shot but k-NN on patch means of 81.7 %; by the mean 97.5 and 99.2 %.

Letters: B batch, N pictures, E embedding; H W pixels.
"""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Interrupted, check_output
from cache_tools.rng import permutation
from cache_tools.storage import atomic_folder, make_dir, write_atomic

if TYPE_CHECKING:
    import torch

SEED = 0
SIZE = 32
VAL_SHARE = 0.2
STEPS, BATCH, PEAK_LR, WARMUP_STEPS = 400, 64, 1e-3, 40
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a photo of the digit {}", "a blurry photo of the digit {}", "the handwritten number {}", "a scan of a {}")
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "pool_type": "avg"
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}  # fmt: skip
PREPROCESS_CFG: dict[str, Any] = {
    "size": SIZE, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest",
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def demo_data(out: str | Path) -> dict[str, Any]:
    """Make OUT/pictures (ImageFolder) and OUT/clip (open_clip `local-dir:`); each appears whole or not at all.

    Returns what OUT/clip/training.json says. Raises: UsageError when OUT is a file; Interrupted on Ctrl-C.
    """
    out = Path(out)
    check_output(out, "pictures")
    done = out / "clip" / "training.json"
    if done.is_file():
        print(f"{out}: complete; delete the folder to make it anew")
    else:
        make_dir(out)
        pictures_NHW, labels_N = load_digits()
        val_N = split_rows(len(labels_N))
        if not (out / "pictures").exists():
            write_pictures(out / "pictures", pictures_NHW, labels_N, val_N)
        train_clip(out / "clip", pictures_NHW, labels_N, val_N)
    result: dict[str, Any] = json.loads(done.read_bytes())
    print(f"{out / 'pictures'}: an ImageFolder of {result['train']} + {result['val']} real digits, {SIZE} px")
    print(f"{out / 'clip'}: a CLIP trained on the train split, {100 * result['zero_shot_val']:.1f} % zero-shot on val")
    return result


def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The digits of scikit-learn (UCI, 8x8, 17 levels) as grey uint8 [N, 32, 32] (Pillow's bicubic), and labels [N]."""
    from PIL import Image
    from sklearn.datasets import load_digits as load

    digits = load()
    small_NHW = (digits.images * (255 / 16)).round().astype(np.uint8)
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE), bicubic)) for x in small_NHW]), digits.target


def split_rows(rows: int) -> npt.NDArray[np.bool_]:
    """True for the rows of the validation split."""
    val_N = np.zeros(rows, dtype=bool)
    val_N[permutation(rows, SEED, "demo/split")[: int(rows * VAL_SHARE)]] = True
    return val_N


def write_pictures(
    final: Path, pictures_NHW: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], val_N: npt.NDArray[np.bool_]
) -> None:
    """RGB PNGs final/{train,val}/<digit>/NNNN.png, NNNN the row in scikit-learn's set."""
    from PIL import Image

    with atomic_folder(final) as temp, progress(len(labels_N), "pictures", "pictures") as bar:
        for row, (picture_HW, label) in enumerate(zip(pictures_NHW, labels_N, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(picture_HW).convert("RGB").save(buffer, "PNG")
            path = temp / ("val" if val_N[row] else "train") / DIGITS[label] / f"{row:04d}.png"
            write_atomic(path, buffer.getvalue())
            bar.update(1)


def train_clip(
    final: Path, pictures_NHW: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], val_N: npt.NDArray[np.bool_]
) -> None:
    """Train the CLIP and write open_clip_config.json, open_clip_model.safetensors and training.json."""
    import open_clip
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import save

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = open_clip.CLIP(**MODEL_CFG)
        model.token_embedding.weight.requires_grad = (
            False  # a dozen words of 49,408: random vectors tell them apart, free
        )
        tokenizer = SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
        tokens = [tokenizer([caption.format(digit) for digit in DIGITS]) for caption in CAPTIONS]
        pictures, labels = torch.from_numpy(pictures_NHW).float() / 255, torch.from_numpy(labels_N)
        val = torch.from_numpy(val_N)
        _train(model, tokens, pictures[~val], labels[~val])
    result = {
        "zero_shot_val": _zero_shot(model, tokens, pictures[val], labels[val]),
        "train": int((~val).sum()), "val": int(val.sum()), "steps": STEPS, "batch": BATCH, "seed": SEED,
        "captions": CAPTIONS, "classes": DIGITS, "loss": "contrastive; every caption of its digit is a positive",
    }  # fmt: skip
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_folder(final) as temp:
        write_atomic(temp / "open_clip_config.json", (json.dumps(config, indent=2) + "\n").encode())
        write_atomic(temp / "open_clip_model.safetensors", save(weights))
        write_atomic(temp / "training.json", (json.dumps(result, indent=2) + "\n").encode())


def _train(model: Any, tokens: list["torch.Tensor"], pictures_NHW: "torch.Tensor", labels_N: "torch.Tensor") -> None:
    import torch

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    rows, epoch_steps = len(labels_N), len(labels_N) // BATCH
    model.train()
    with StopFlag("the training of the CLIP is discarded") as stop, progress(STEPS, "CLIP", "steps") as bar:
        for step in range(STEPS):
            epoch, at = divmod(step, epoch_steps)
            ids = torch.from_numpy(permutation(rows, SEED, "demo/order", epoch)[at * BATCH : (at + 1) * BATCH])
            rate = min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * rate
            image_BE = model.encode_image(_normalised(_augmented(pictures_NHW[ids])), normalize=True)
            text_BE = model.encode_text(tokens[step % len(tokens)], normalize=True)[labels_N[ids]]
            loss = _contrastive_loss(model.logit_scale.exp().clamp(max=100) * image_BE @ text_BE.T, labels_N[ids])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update(1, f"loss {loss.item():.3f}")
            if stop.requested:
                raise Interrupted(f"stopped after step {step + 1} of {STEPS}; the same command trains the CLIP again")


def _contrastive_loss(logits_BB: "torch.Tensor", labels_B: "torch.Tensor") -> "torch.Tensor":
    """Cross-entropy both ways; the positives of a row are all columns of its label, with equal weight."""
    from torch.nn import functional as F

    same_BB = (labels_B[:, None] == labels_B[None]).float()
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2


def _augmented(pictures_BHW: "torch.Tensor") -> "torch.Tensor":
    """Shifted by up to 4 px, scaled by 0.87-1.67 (a student's crops are magnified), turned by up to 11 degrees."""
    import torch
    from torch.nn import functional as F

    size = len(pictures_BHW)
    scale_B, angle_B = torch.empty(size).uniform_(0.6, 1.15), torch.empty(size).uniform_(-0.2, 0.2)
    affine_B23 = torch.zeros(size, 2, 3)
    affine_B23[:, 0, 0] = affine_B23[:, 1, 1] = scale_B * angle_B.cos()
    affine_B23[:, 0, 1] = scale_B * angle_B.sin()
    affine_B23[:, 1, 0] = -affine_B23[:, 0, 1]
    affine_B23[:, :, 2] = torch.empty(size, 2).uniform_(-0.25, 0.25)
    grid = F.affine_grid(affine_B23, [size, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(pictures_BHW[:, None], grid, align_corners=False)[:, 0]


def _normalised(pictures_BHW: "torch.Tensor") -> "torch.Tensor":
    """Grey [0, 1] to CLIP's normalised RGB [B, 3, H, W]."""
    import torch

    mean, std = (torch.tensor(PREPROCESS_CFG[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (pictures_BHW[:, None] - mean) / std


def _zero_shot(
    model: Any, tokens: list["torch.Tensor"], pictures_NHW: "torch.Tensor", labels_N: "torch.Tensor"
) -> float:
    """Share of pictures whose nearest caption (mean over the templates) names their digit."""
    import torch

    model.eval()
    with torch.no_grad():
        text_KE = torch.stack([model.encode_text(ids, normalize=True) for ids in tokens]).sum(0)
        logits_NK = model.encode_image(_normalised(pictures_NHW), normalize=True) @ text_KE.T
    return round(float((logits_NK.argmax(1) == labels_N).float().mean()), 4)
