"""The table of docs/teachers.md: teachers, each loaded with random weights.

    python bench/teachers.py docs/teachers.md

Each teacher is loaded at its own size, and at the size that gives 14x14 tokens.
"""

import sys
from pathlib import Path
from typing import Any

from timm.models import get_arch_pretrained_cfgs

from cache_tools.errors import UsageError
from pipeline.teachers import Teacher, load_teacher

NAMES = """
open_clip:ViT-B-32-quickgelu open_clip:ViT-B-16-quickgelu open_clip:ViT-L-14-quickgelu
open_clip:ViT-B-16 open_clip:coca_ViT-B-32 open_clip:ViT-B-16-SigLIP open_clip:ViT-B-16-SigLIP2
open_clip:EVA02-B-16 open_clip:PE-Core-B-16 open_clip:PE-Core-T-16-384 open_clip:MobileCLIP-B
timm:vit_tiny_patch16_dinov3_qkvb timm:vit_small_patch16_dinov3 timm:vit_base_patch16_dinov3
timm:vit_base_patch16_dinov3_qkvb timm:vit_small_patch14_dinov2 timm:vit_base_patch14_dinov2
timm:vit_base_patch14_reg4_dinov2
timm:vit_pe_core_tiny_patch16_384 timm:vit_pe_core_base_patch16_224
timm:vit_pe_spatial_tiny_patch16_512 timm:vit_pe_spatial_small_patch16_512
timm:vit_pe_spatial_base_patch16_512
timm:naflexvit_base_patch16_radio_v3 timm:vit_base_patch16_radio_v3
timm:naflexvit_base_patch16_siglip timm:vit_base_patch16_siglip_224
timm:vit_base_patch14_reg1_tipsv2 timm:vit_base_patch16_clip_224
timm:vit_base_patch16_224 timm:deit3_base_patch16_224 timm:deit_tiny_patch16_224
timm:deit_tiny_distilled_patch16_224
""".split()
HEADER = """
| teacher | pixels | grid | channels | prefix tokens | norm | student with patch 16 | 14x14 tokens | license of the weights |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""  # noqa: E501


def prefix(teacher: Teacher) -> str:
    """The tokens before the patch tokens."""
    tower: Any = getattr(teacher.tower, "trunk", teacher.tower)
    count = getattr(tower, "num_prefix_tokens", 1)  # open_clip's own have CLS alone
    others = count - teacher.has_cls
    return " + ".join(["CLS"] * teacher.has_cls + [str(others)] * (others > 0)) or "none"


def at_14(name: str, teacher: Teacher) -> str:
    """The option that gives the grid of a student of 224 pixels with patch 16."""
    if teacher.grid == (14, 14):
        return "by default"
    size = 14 * teacher.identity.height // teacher.grid[0]
    try:
        found = load_teacher(name, "random", size, "cpu").grid
    except UsageError as error:
        return str(error)
    return f"`--teacher-size {size}`" if found == (14, 14) else f"{found}"


def licenses(name: str) -> str:
    """The licenses that timm states, with their tags if there are several."""
    tags: dict[str, list[str]] = {}
    if name.startswith("timm:"):
        for full, config in get_arch_pretrained_cfgs(name.removeprefix("timm:")).items():
            if config.has_weights:
                stated = config.license or "see the publisher"
                tags.setdefault(stated, []).append(full.partition(".")[2])
    if len(tags) < 2:
        return next(iter(tags), "see the publisher")
    return "; ".join(f"{text}: {', '.join(named)}" for text, named in tags.items())


def row(name: str) -> str:
    """One line of the table."""
    teacher = load_teacher(name, "random", device="cpu")
    rows, columns = teacher.grid
    cells = [f"`{name}`", teacher.identity.height, f"{rows}x{columns}", teacher.channels]
    cells += [prefix(teacher), teacher.identity.norm, f"{16 * rows} pixels"]
    return " | ".join(["", *map(str, cells), at_14(name, teacher), licenses(name), ""]).strip()


if __name__ == "__main__":
    page = Path(sys.argv[1])
    lines = []
    for name in NAMES:
        lines.append(row(name))
        print(lines[-1], flush=True)
    above, _, _ = page.read_text().partition(HEADER.strip())
    page.write_text(above + HEADER.lstrip() + "\n".join(lines) + "\n")
