"""The demo's data: real digits, and a CLIP that open_clip itself loads."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools.errors import UsageError
from pipeline import demo_data as module
from pipeline.demo_data import demo_data
from pipeline.listing import list_sources


def tree(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two trainings of eight steps: enough for everything but accuracy, which the demo prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 8)
        patch.setattr(module, "BATCH", 16)
        outs = [tmp_path_factory.mktemp("demo") / "out" for _ in range(2)]
        for out in outs:
            demo_data(out)
    return outs


@pytest.mark.slow
def test_same_bytes_each_time(made):
    assert tree(made[0]) == tree(made[1])


def test_pictures_are_an_image_folder_of_all_digits(made):
    sources = list_sources(made[0] / "pictures")
    assert {split: len(candidates) for split, candidates in sources.splits.items()} == {"train": 1438, "val": 359}
    assert sorted(sources.classes) == sorted(module.DIGITS)
    item = sources.splits["val"][0]
    assert np.asarray(Image.open(item.path)).shape == (32, 32, 3)
    pictures, labels = module.load_digits()
    row = int(item.path.stem)
    assert module.split_rows(1797)[row] and module.DIGITS[labels[row]] == item.path.parent.name
    assert np.array_equal(np.asarray(Image.open(item.path))[..., 0], pictures[row])


@pytest.mark.filterwarnings("ignore")
def test_open_clip_loads_the_folder(made):
    import open_clip
    import torch

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{made[0] / 'clip'}")
    picture = transform(Image.new("RGB", (32, 32)))[None]
    assert picture.shape == (1, 3, 32, 32)
    assert torch.allclose(picture, module._normalized(torch.zeros(1, 32, 32)))
    tokens = open_clip.get_tokenizer(f"local-dir:{made[0] / 'clip'}")(["a photo of the digit seven"])
    assert model(picture, tokens)[0].shape == (1, 64)
    out = model.visual.forward_intermediates(picture, indices=[-1], output_fmt="NLC", intermediates_only=True)
    assert out["image_intermediates"][0].shape == (1, 16, 128)


def test_a_complete_folder_is_kept_and_a_file_is_refused(made, tmp_path, capsys):
    before = tree(made[0])
    result = demo_data(made[0])
    assert "complete" in capsys.readouterr().out
    assert tree(made[0]) == before
    assert result == json.loads((made[0] / "clip" / "training.json").read_text())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="found a file"):
        demo_data(tmp_path / "file")
