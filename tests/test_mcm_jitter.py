"""Large-scale jitter: pictures, boxes and masks move together, and every draw is a function of the seed."""

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from cache_tools.labels import Boxes
from mcm.config import Detect
from mcm.jitter import fitted, jittered, targets

STAR = [50, 10, 62, 40, 95, 40, 68, 60, 80, 95, 50, 72, 20, 95, 32, 60, 5, 40, 38, 40]


def objects(*segmentation, crowd=(), boxes=None):
    count = len(segmentation)
    boxes_N4 = np.array(boxes or [[5.0, 10, 95, 95]] * count).reshape(-1, 4)
    iscrowd = np.isin(np.arange(count), crowd)
    return Boxes(1, (100, 120), np.arange(count), boxes_N4, np.ones(count), iscrowd, list(segmentation))


@pytest.mark.parametrize("seed", range(20))
def test_polygons_moved_then_drawn_equal_masks_drawn_then_moved(seed):
    source, detect = (400, 480), Detect(size=320, scale=(0.5, 2.0))
    polygons = [[4 * x for x in STAR], [400, 300, 470, 300, 470, 390, 400, 390]]
    place = jittered(source, detect, seed)
    moved = place.mask(polygons, 320).astype(bool)
    drawn = place.mask(coco_mask.segmToRle(polygons, 480, 400), 320).astype(bool)
    assert (moved & drawn).sum() / max(1, (moved | drawn).sum()) > 0.95
    assert not moved[place.extent[0] :].any() and not moved[:, place.extent[1] :].any()


@pytest.mark.parametrize("seed", range(20))
def test_the_picture_moves_as_its_mask_does(seed):
    polygons = [[2 * x for x in STAR]]
    rle = coco_mask.segmToRle(polygons, 240, 200)
    picture = np.repeat(coco_mask.decode(rle)[..., None] * np.uint8(255), 3, axis=2)
    place, canvas = jittered((200, 240), Detect(size=192, scale=(0.6, 1.8)), seed), np.zeros((192, 192, 3), np.uint8)
    place.draw(picture, canvas, (0.0, 0.0, 0.0))
    bright, mask = canvas[..., 0] > 127, place.mask(polygons, 192) > 0
    assert (bright & mask).sum() / max(1, (bright | mask).sum()) > 0.95


def test_a_placement_is_a_function_of_its_seed_and_flips_and_scales_as_asked():
    detect = Detect(size=256, scale=(0.1, 2.0))
    places = [jittered((300, 400), detect, seed) for seed in range(400)]
    assert places == [jittered((300, 400), detect, seed) for seed in range(400)]
    scales = np.array([place.size[1] / 256 for place in places])
    assert 0.1 <= scales.min() < 0.15 and 1.95 < scales.max() <= 2.0
    assert 0.4 < np.mean([place.flip for place in places]) < 0.6
    large = [place for place in places if place.size[1] > 300]
    assert {place.extent[1] for place in large} == {256} and len({place.corner[1] for place in large}) > 50


def test_a_fitted_picture_is_padded_with_the_mean_and_its_boxes_come_back():
    place, canvas = fitted((100, 200), 64), np.zeros((64, 64, 3), np.uint8)
    place.draw(np.full((100, 200, 3), 9, np.uint8), canvas, (0.5, 0.25, 1.0))
    assert (canvas[:32] == 9).all() and (canvas[32:] == (128, 64, 255)).all()
    boxes = np.array([[10.0, 20, 150, 90]])
    np.testing.assert_allclose(place.to_source(place.boxes(boxes)), boxes)


def test_crowds_and_objects_out_of_the_crop_are_no_targets_and_a_box_without_polygon_is_its_mask():
    rle = {"size": [100, 120], "counts": [0, 100 * 120]}
    outside, slim = [130, 10, 140, 10, 140, 20], [10, 10, 10.2, 10, 10.2, 40]
    there = objects(
        [STAR], rle, [outside], [], [slim], crowd=(1,), boxes=[[5.0, 10, 95, 95]] * 3 + [[20, 30, 60, 70]] * 2
    )
    found = targets(there, fitted((100, 120), 120), 120, masks=True)
    assert found["labels"].tolist() == [1, 4]
    masks = np.unpackbits(found["masks"], axis=-1)
    pixels = [np.argwhere(mask)[:, ::-1] for mask in masks]
    np.testing.assert_array_equal(found["boxes"], [[*xy.min(0), *xy.max(0) + 1] for xy in pixels])
    np.testing.assert_array_equal(found["boxes"][1], [20, 30, 60, 70])
    bare = targets(there, fitted((100, 120), 120), 120, masks=False)
    assert bare["labels"].tolist() == [1, 3, 4, 5] and "masks" not in bare
    empty = targets(objects(), fitted((100, 120), 120), 120, masks=True)
    assert empty["masks"].shape == (0, 120, 15) and empty["boxes"].shape == (0, 4)
