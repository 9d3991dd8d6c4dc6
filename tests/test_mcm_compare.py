"""Paired differences: hand-made hits, their interval, and the control that they are compared with."""

import numpy as np
import pytest

from mcm.compare import difference_lines, differences, hits, interval
from mcm.probe import ProbeResult, packed


def result(knn, corruption=None, input_="folded"):
    return ProbeResult(
        subject="x", weights="x", input=input_, knn=float(np.mean(knn)), knn_hits=packed(np.array(knn, bool)),
        train_rows=1, val_rows=len(knn), seed=0, data_sha256="0", versions={}, corruption=corruption,
    )  # fmt: skip


def test_an_interval_is_that_of_a_plain_bootstrap():
    difference = np.repeat([1.0, 0.0, -1.0], [30, 60, 10])  # 20 points, std of the mean 0.06
    mean, low, high = interval(difference)
    assert mean == pytest.approx(0.2) and interval(difference) == (mean, low, high)
    draw = np.random.default_rng(1)
    plain = [draw.choice(difference, 100).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.011)
    assert interval(np.ones(5)) == (1, 1, 1)  # every picture gained: there is nothing to draw


def test_rows_are_compared_with_the_best_control_of_each_column_on_common_seeds():
    clean, noisy = [1, 1, 0, 0], [[1, 0, 0, 0], [1, 1, 1, 0]]
    ours = hits([result(clean), *(result(x, f"noise:{i}") for i, x in enumerate(noisy))])
    assert ours["k-NN folded, corrupted"].tolist() == [1, 0.5, 0.5, 0]
    names = ["k-NN folded", "k-NN folded-noise:0", "k-NN folded-noise:1", "k-NN folded, corrupted"]
    assert list(ours) == names
    full, none = {"k-NN folded": np.ones(4)}, {"k-NN folded": np.zeros(4)}
    rows = {"ours": {0: ours, 1: ours}, "a": {0: full, 1: none}, "b": {0: none}}
    table = differences(rows, ["a", "b"])  # means of the controls: a 0.5, b 0
    assert [(e["row"], e["control"], e["seeds"], e["difference"]) for e in table] == [
        ("ours", "a", [0, 1], 0.0),
        ("b", "a", [0], -1.0),
    ]
    assert difference_lines(table) == [
        ["points above the best control", "ours", "b", "a"],
        ["k-NN folded", "+0.0 [-50.0, +50.0]", "-100.0 [-100.0, -100.0]", "best control"],
    ]
    assert differences({"ours": {0: ours}}, []) == []
