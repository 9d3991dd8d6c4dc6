"""Masks: exact counts, True = hidden, fresh everywhere, and the same however a batch is cut."""

import numpy as np
import pytest
import torch

from mcm.masking import apply_fill, mask_from_pool, mask_picks, mask_pool


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(768, 0.75, 576), (192, 0.9, 173), (16, 0.05, 1), (10, 0.94, 9)]
)
def test_every_mask_hides_exactly_the_count(width, ratio, hidden):
    pool_KD = mask_pool(0, 3, 100, width, ratio)
    assert pool_KD.dtype == np.bool_ and pool_KD.shape == (100, width)
    assert (pool_KD.sum(axis=1) == hidden).all()


def test_every_channel_is_hidden_equally_often():
    share_D = mask_pool(0, 0, 4096, 64, 0.75).mean(axis=0)
    assert np.abs(share_D - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 4096)


def test_pool_is_a_function_of_seed_and_epoch():
    pool_KD = mask_pool(7, 2, 50, 64, 0.5)
    assert (pool_KD == mask_pool(7, 2, 50, 64, 0.5)).all()
    for other_KD in (mask_pool(7, 3, 50, 64, 0.5), mask_pool(8, 2, 50, 64, 0.5)):
        assert (pool_KD != other_KD).any(axis=1).all()
    assert len(np.unique(pool_KD, axis=0)) == 50


def test_picks_differ_between_patches_pictures_and_epochs():
    rows = np.arange(64)
    picks = mask_picks(0, 0, rows, 196, 4096)
    assert picks.dtype == np.int32 and picks.shape == (64, 196)
    assert picks.min() >= 0 and picks.max() < 4096
    repeats = [len(np.unique(line)) for line in picks]
    assert min(repeats) > 180  # 196 draws of 4096: about 4.6 collisions
    assert (picks[0] == picks[1]).mean() < 0.05
    for other in (mask_picks(0, 1, rows, 196, 4096), mask_picks(1, 0, rows, 196, 4096)):
        assert (picks == other).mean() < 0.01


def test_picks_do_not_depend_on_the_batch_a_row_falls_to():
    rows = np.arange(1000, 1096)
    whole = mask_picks(5, 9, rows, 16, 64)
    assert (np.concatenate([mask_picks(5, 9, part, 16, 64) for part in np.split(rows, 6)]) == whole).all()
    ranks = [mask_picks(5, 9, rows[rank::2], 16, 64) for rank in (0, 1)]
    assert (ranks[0] == whole[0::2]).all() and (ranks[1] == whole[1::2]).all()


def test_mask_of_pool_and_picks():
    pool_KD = torch.from_numpy(mask_pool(0, 0, 32, 12, 0.75))
    picks_BN = torch.from_numpy(mask_picks(0, 0, np.arange(2), 5, 32))
    mask_BND = mask_from_pool(pool_KD, picks_BN, patchwise=False)
    assert mask_BND.shape == (2, 5, 12)
    assert (mask_BND[1, 3] == pool_KD[picks_BN[1, 3]]).all()
    pool_KN = torch.from_numpy(mask_pool(0, 0, 32, 5, 0.6))
    picks_B1 = torch.from_numpy(mask_picks(0, 0, np.arange(2), 1, 32))
    mask_BN1 = mask_from_pool(pool_KN, picks_B1, patchwise=True)
    assert mask_BN1.shape == (2, 5, 1) and (mask_BN1.sum(dim=(1, 2)) == 3).all()


def test_true_is_hidden_and_passes_nothing_either_way():
    x_BND = torch.arange(6.0).view(1, 2, 3).requires_grad_()
    mask_BND = torch.tensor([[[True, False, False], [False, True, True]]])
    fill_D = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    out_BND = apply_fill(x_BND, mask_BND, fill_D)
    assert out_BND.tolist() == [[[-1.0, 1.0, 2.0], [3.0, -2.0, -3.0]]]
    out_BND.sum().backward()
    assert x_BND.grad.tolist() == [[[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]]
    assert fill_D.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_ratio_of_zero_hides_nothing_and_unmasked_rows_pick_the_mask_behind_the_pool():
    assert not mask_pool(0, 0, 10, 64, 0.0).any()
    rows = np.arange(10_000)
    picks = mask_picks(0, 3, rows, 4, 64, unmasked_fraction=0.25)
    whole_B = (picks == 64).all(1)
    assert abs(whole_B.mean() - 0.25) < 0.02 and (picks[~whole_B] < 64).all()
    assert (picks[~whole_B] == mask_picks(0, 3, rows, 4, 64)[~whole_B]).all()  # the others are what they were
    assert (whole_B != (mask_picks(0, 4, rows, 4, 64, 0.25) == 64).all(1)).any()  # other rows in another epoch
