"""The configuration of an extraction: the shipped files, and what overrides what."""

from pathlib import Path

import open_clip
import pytest

from cache_tools.errors import UsageError
from cache_tools.records import write_toml
from pipeline.config import load_config

SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "extract").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_grids_of_a_shipped_file_are_equal_and_its_header_says_how_to_run_it(path: Path, tmp_path: Path) -> None:
    config = load_config(f"extract/{path.stem}", {})
    assert f"--config extract/{path.stem}\n" in path.read_text(encoding="ascii")
    if path.stem != "demo":  # whose teacher the demo makes
        vision = open_clip.get_model_config(config.teacher.removeprefix("open_clip:"))["vision_cfg"]
        side = (config.teacher_size or vision["image_size"]) / vision["patch_size"]
        assert config.patch and config.size / config.patch == side
    (tmp_path / "extract.toml").write_text(write_toml(config))
    assert load_config(str(tmp_path / "extract.toml"), {}) == config


def test_flags_override_the_file_and_set_overrides_both() -> None:
    flags = {"views": 8, "splits": ["val"], "dtype": "float16", "weights": None}
    config = load_config("extract/clip_vitb16", flags, ["crop.flip=0", "dtype=int8"])
    assert (config.views, config.splits, config.dtype, config.weights) == (8, ("val",), "int8", "openai")
    assert config.crop.flip == 0 and config.crop.scale == (0.2, 1.0)


def test_a_mistyped_key_is_named() -> None:
    with pytest.raises(UsageError, match="unknown key 'crop.size'; did you mean 'size'"):
        load_config("extract/demo", {}, ["crop.size=1"])
    with pytest.raises(UsageError, match="unknown key 'crop.jitter'; expected one of kind, scale, ratio, flip$"):
        load_config("extract/demo", {}, ["crop.jitter=1"])
    with pytest.raises(UsageError, match="unknown key 'crop.flop'; did you mean 'crop.flip'"):
        load_config("extract/demo", {}, ["crop.flop=1"])
    with pytest.raises(UsageError, match="the command line: views: Input should be greater than or equal to 1"):
        load_config(None, {"teacher": "timm:x", "weights": "random", "views": 0})
