"""Views: crops inside the picture, drawn by counters alone; mirrored exactly; whole when centered."""

import numpy as np

from cache_tools.schema import CropPolicy
from pipeline.views import Geometry, draw_crop, render

RRC = CropPolicy(kind="rrc")


def test_crops_lie_inside_and_follow_the_policy() -> None:
    shares, flips = [], []
    for row in range(2000):
        height, width = 100 + row % 300, 80 + (7 * row) % 400
        crop = draw_crop(RRC, 0, "train", row, 1, height, width)
        assert 0 <= crop.top and crop.top + crop.height <= height and 0 <= crop.left and crop.left + crop.width <= width
        shares.append(crop.height * crop.width / (height * width))
        flips.append(crop.flip)
    assert min(shares) > 0.19 and max(shares) > 0.9 and 0.35 < np.mean(shares) < 0.65 and 0.46 < np.mean(flips) < 0.54


def test_draws_depend_on_row_view_seed_and_nothing_else() -> None:
    first = draw_crop(RRC, 0, "train", 5, 0, 300, 400)
    assert first == draw_crop(RRC, 0, "train", 5, 0, 300, 400)
    others = [draw_crop(RRC, *args, 300, 400) for args in ((1, "train", 5, 0), (0, "train", 6, 0), (0, "train", 5, 1))]
    assert first not in others and len(set(others)) == 3


def test_held_out_splits_and_center_are_the_whole_center() -> None:
    center = Geometry(0, 50, 300, 300, 0, 300, 400)
    assert draw_crop(RRC, 0, "val", 5, 0, 300, 400) == center
    assert draw_crop(CropPolicy(kind="center"), 0, "train", 5, 0, 300, 400) == center


def test_a_very_long_picture_has_a_crop() -> None:
    crop = draw_crop(RRC, 0, "train", 0, 0, 4, 4000)
    assert crop.height == 4 and 1 <= crop.width <= 6


def test_render_crops_resizes_and_mirrors() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    same = render(picture, Geometry(10, 20, 32, 32, 0, 60, 80), 32, 32)
    assert (same == picture[10:42, 20:52]).all()
    assert (render(picture, Geometry(10, 20, 32, 32, 1, 60, 80), 32, 32) == same[:, ::-1]).all()
    assert render(picture, Geometry(0, 0, 60, 80, 0, 60, 80), 32, 32).shape == (32, 32, 3)
