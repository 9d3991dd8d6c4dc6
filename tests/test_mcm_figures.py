"""The robustness card: one line per row, in the order of severity, and nothing without corruptions."""

import pytest
from matplotlib.axes import Axes

from mcm.figures import robustness


def test_a_line_leads_from_clean_pictures_to_the_strongest_corruption(monkeypatch):
    lines, bands = [], []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda *args, **named: lines.append((args[2], named)) or plot(*args, **named))
    monkeypatch.setattr(Axes, "fill_between", lambda *args, **named: bands.append(args[2:4]) or fill(*args, **named))
    column = "k-NN folded-jpeg:"
    rows = {
        "ours": {"k-NN folded": [0.9, 0.7], f"{column}50": [0.5], f"{column}10": [0.25, 0.35], "fine-tuned": [1.0]},
        "<theirs>": {"k-NN folded": [0.9], f"{column}10": [0.1]},
        "untouched": {"k-NN folded": [0.9]},
    }
    page = robustness(rows)
    assert [(y, named["label"]) for y, named in lines] == [
        (pytest.approx([80, 50, 30]), "ours"),
        (pytest.approx([90, 10]), "<theirs>"),
    ]
    assert bands[0] == (pytest.approx([70, 50, 25]), pytest.approx([90, 50, 35]))
    assert page.count("<img ") == 1 and "<theirs>" not in page and page == robustness(rows)
    assert 'alt="k-NN folded, jpeg: ours 80.0 to 30.0; &lt;theirs&gt; 90.0 to 10.0"' in page
    assert robustness({"untouched": rows["untouched"]}) == robustness({}) == ""
