"""The report: one file that needs no other, and a table whose every number comes from the runs."""

import json
import re

import numpy as np
import pytest
from make_cache import make_cache, make_identity
from make_run import make_run
from safetensors.numpy import save_file
from test_mcm_checkpoint import save

from cache_tools.errors import CorruptionError, UsageError
from cache_tools.records import encode_record
from cache_tools.storage import write_atomic
from mcm import checkpoint, figures
from mcm.page import markdown
from mcm.probe import ProbeResult
from mcm.report import ablation_html, ablation_lines, confusion_tables, report
from mcm.scorecard import TeacherScores
from mcm.tables import Table, table_lines

DATA = make_identity({}).dataset_sha256
FACTS = TeacherScores(channels=8, dead=(), outliers=(3,), effective_rank=6.5, relative_mse=1e-5, cosine=0.9999)


def result(**facts):
    known = {"subject": "x", "weights": "w", "train_rows": 1, "val_rows": 1, "seed": 0, "data_sha256": DATA}
    return ProbeResult(**{**known, "versions": {}, "input": "full"} | facts)


def put(run, kind, knn, linear=None, name=None, **facts):
    facts = {"weights": checkpoint.weights(checkpoint.complete(run)[-1])} | facts
    record = result(input=kind, knn=knn, linear=linear, **facts)
    write_atomic(run / "probe" / (name or f"{kind.replace(':', '-')}.json"), encode_record(record))


def tuned_run(path, init, top1, frozen=False, data=DATA, seed=0, shots=0):
    """A fine-tuning of the newest weights of the RUN `init`, or of random weights; its log has a torn line."""
    weights = init if init == "random" else checkpoint.weights(checkpoint.complete(init)[-1])
    facts = {"kind": "finetune", "init": "moved", "init_weights": weights, "dataset_sha256": data}
    facts["config"] = {"frozen": frozen, "data": {"shots": shots}, "train": {"seed": seed}}
    write_atomic(path / "run.json", json.dumps(facts).encode())
    lines = [{"step": 5, "epoch": 1, "loss": 1.0}, {"step": 5, "epoch": 1, "eval": {"top1": top1, "loss": 0.3}}]
    torn = b'{"step": 6, "lo'
    write_atomic(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode() + torn)
    return path


def channels(count):
    """The first one is constant; full inputs are far out of the distribution."""
    r2 = np.linspace(0.0, 0.9, count, dtype=np.float32)
    return {"r2_masked": r2, "r2_full": -5 * r2, "target_std": np.sign(r2)}


ABLATION = {
    "note": "3 <hours>", "columns": ["k-NN full", "linear full", "R^2 masked", "minutes"],
    "rows": [
        {
            "name": "channel|75", "lr": 1e-3, "seeds": [0, 1], "mark": "",
            "values": {
                "k-NN full": [0.41, 0.43], "linear full": [0.5, 0.5], "R^2 masked": [0.1, 0.2], "minutes": [4, 5],
            },
        },
        {
            "name": "none", "lr": 1e-3, "seeds": [0], "mark": "underfitted",
            "values": {"k-NN full": [0.5], "minutes": [4.25]},
        },
    ],
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """The figures themselves, as they are drawn."""
    found = []
    for name in ("_svg", "png"):
        monkeypatch.setattr(figures, name, lambda figure: found.append(figure) or b"<svg/>")
    return found


def titles(figure):
    return [axis.get_title("left") for axis in figure.axes]


@pytest.fixture
def runs(tmp_path):
    run, cache = make_run(tmp_path / "mcm"), make_cache(tmp_path / "cache", 20, 16, 1).path
    put(run, "full", 0.72, 0.78)
    put(run, "folded", 0.76)
    put(run, "masked:8", 0.7)
    put(run, "full", 0.41, 0.59, "untrained-full.json", weights="untrained")
    teacher = result(knn=0.96, linear=0.97, teacher=FACTS)
    write_atomic(cache / ".run" / "teacher.json", encode_record(teacher))
    tokens = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float16)
    samples = {"views": np.zeros((2, 32, 32, 3), np.uint8), "target": tokens, "prediction": tokens + 1}
    save_file(samples, run / "samples.safetensors")
    save_file(channels(8), run / "channels.safetensors")
    lines = [{"step": s, "epoch": s / 5, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3)]
    lines += [{"step": 3, "epoch": 0.6, "eval": {"r2_masked": 0.668, "r2_full": -0.25}}]
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return [run, tuned_run(tmp_path / "ft-random", "random", 0.775), tuned_run(tmp_path / "ft-mcm", run, 0.819), cache]


def test_the_table_has_a_row_per_model_and_a_column_per_measurement(runs, drawn, tmp_path):
    rows = report(runs, tmp_path / "r.html")[DATA]
    assert list(rows) == ["random init", "mcm", "teacher cache"]
    assert rows["random init"] == {"k-NN full": 0.41, "linear full": 0.59, "fine-tuned": 0.775}
    assert rows["mcm"] == {
        "k-NN full": 0.72, "k-NN folded": 0.76, "linear full": 0.78,
        "fine-tuned": 0.819, "k-NN masked:8": 0.7, "R^2 masked": 0.668, "R^2 full": -0.25,
    }  # fmt: skip
    assert rows["teacher cache"]["linear full"] == 0.97
    frozen = tuned_run(tmp_path / "linear", runs[0], 0.7, frozen=True)
    assert report([runs[0], frozen], tmp_path / "r.html")[DATA]["mcm"]["linear (LARS)"] == 0.7


def test_figures_of_other_data_seeds_labels_and_weights_are_kept_apart(runs, drawn, tmp_path):
    run, other = runs[0], "1" * 64
    put(run, "full", 0.5, name="full-1.json", data_sha256=other)
    put(run, "full", 0.6, name="full-2.json", seed=7)
    put(run, "full", 0.1, name="full-3.json", weights="step_000000001 sha256:0123456789ab")
    runs.append(tuned_run(tmp_path / "ft-other", run, 0.9, data=other))
    runs.append(tuned_run(tmp_path / "ft-seed", run, 0.8, seed=7))
    runs.append(tuned_run(tmp_path / "ft-shots", run, 0.3, shots=10))
    tables = report(runs, tmp_path / "r.html")
    assert tables[other] == {"mcm": {"k-NN full": 0.5, "fine-tuned": 0.9}}
    row = tables[DATA]["mcm"]
    assert (row["k-NN full"], row["k-NN full, seed 7"]) == (0.72, 0.6)
    assert [row[f"fine-tuned{name}"] for name in ("", ", seed 7", ", 10 shots")] == [0.819, 0.8, 0.3]
    assert tables[DATA]["mcm at step_000000001 sha256:0123456789ab"] == {"k-NN full": 0.1}
    page = (tmp_path / "r.html").read_text()
    assert (
        page.count("<h2>Results on DATASET") == 2
        and f"DATASET {other[:12]}: " in page
        and f"DATASET {DATA[:12]}: " in page
    )


def test_a_fine_tuned_run_finds_the_row_of_its_weights_wherever_they_are(runs, drawn, tmp_path):
    """The path in `init` is of no use once a run was moved, and may name other weights by now."""
    run = runs[0].rename(tmp_path / "elsewhere")
    make_run(tmp_path / "moved", step=9)
    save(run, 4)
    rows = report([tmp_path / "moved", run, runs[2]], tmp_path / "r.html")[DATA]
    assert rows["elsewhere at step_000000003"]["fine-tuned"] == 0.819
    alone = report([runs[2]], tmp_path / "r.html")[DATA]
    assert [name.startswith("moved (step_000000003 sha256:") for name in alone] == [True]


def shown(table: Table) -> list[list[str]]:
    return table_lines("model", table.cells())[1:]


def test_the_file_stands_alone_and_holds_everything(runs, tmp_path):
    tables = report(runs, tmp_path / "r.html", note="the teacher <saw> the labels")
    page = (tmp_path / "r.html").read_text()
    assert "the teacher &lt;saw&gt; the labels" in page and FACTS.text() in page
    # k-NN, linear, R^2 and fine-tuned; two curves of mcm (loss, lr); two charts of its channels
    assert page.count("data:image/svg+xml;base64,") == 8
    assert page.count("data:image/png;base64,") == 7  # two samples of three pictures, and the maps
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    report(runs, tmp_path / "again.html", note="the teacher <saw> the labels")
    assert (tmp_path / "again.html").read_text() == page
    assert "global_batch" in page and "cache_sha256" in page
    assert all(f"<td>{cell}</td>" in page for table in tables.values() for line in shown(table) for cell in line)


def test_runs_of_one_name_keep_their_own_rows(drawn, tmp_path):
    runs = [make_run(tmp_path / parent / "run", step=step) for step, parent in enumerate("abc")]
    for run, knn in zip(runs, (0.5, 0.6, 0.7), strict=True):
        put(run, "full", knn)
    tuned = [tuned_run(tmp_path / f"{n}" / "tuned", runs[0], n / 10) for n in (7, 8, 9)]
    table = report([*runs, *tuned], tmp_path / "r.html")[DATA]
    assert [table[str(run)]["k-NN full"] for run in runs] == [0.5, 0.6, 0.7]
    assert [cells["fine-tuned"] for cells in table.values() if "fine-tuned" in cells] == [0.7, 0.8, 0.9]
    assert list(table)[-1] == f"{runs[0]} ({tuned[2]})"


def test_a_classification_shows_its_confusion_and_its_examples(drawn, tmp_path):
    run, data = tuned_run(tmp_path / "run", "random", 0.8), np.random.default_rng(0)
    facts = json.loads((run / "run.json").read_bytes()) | {"classes": ["cat", "dog", "<owl>"]}
    write_atomic(run / "run.json", json.dumps(facts).encode())
    shown = {"confusion": np.array([[0, 0, 6], [0, 1, 2], [1, 1, 4], [1, 2, 1]])}
    shown |= {
        "wrong": data.integers(0, 255, (2, 80, 80, 3), np.uint8),
        "wrong_facts": np.array([[0, 1, 0.9], [1, 2, 0.4]]),
    }
    save_file(shown, run / "shown.safetensors")
    report([run], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "cat, predicted dog, 90%</figcaption>" in page and "dog, predicted &lt;owl&gt;, 40%</figcaption>" in page
    assert page.count("data:image/jpeg;base64") == 2 and "most confused: 25 % of cat as dog" in page
    assert {text.get_text() for text in drawn[-1].axes[0].texts} == {"75", "25", "80", "20"}
    rows = (("cat", "8", "75.0"), ("dog", "5", "80.0"), ("&lt;owl&gt;", "0", "-"))
    assert all("".join(f"<td>{cell}</td>" for cell in row) in page for row in rows)


def test_of_many_classes_the_most_confused_pairs_are_listed(drawn):
    counts = np.array([[k, k, 90] for k in range(30)] + [[k, (k + 1) % 30, k + 1] for k in range(30)])
    page = confusion_tables(counts, [f"class {k}" for k in range(30)], accuracy=False)
    assert not drawn and page.count("<tr>") == 21 and "<td>class 29</td><td>class 0</td><td>25.0</td>" in page
    assert page.index("<td>class 29</td>") < page.index("<td>class 28</td><td>class 29</td><td>24.4</td>")
    assert "class 9<" not in page and confusion_tables(counts[:30], ["x"] * 30, accuracy=False) == ""


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected a RUN"):
        report([tmp_path], tmp_path / "r.html")
    write_atomic(tmp_path / "results.json", b'{"mine": 1}')
    with pytest.raises(UsageError, match="expected a RUN"):
        report([tmp_path], tmp_path / "r.html")


def test_damaged_files_of_a_run_are_named(runs, drawn, tmp_path):
    for name, damage, words in (
        ("metrics.jsonl", b'{"step": 1\n', r"metrics\.jsonl: line 1: expected a JSON object with a step"),
        ("metrics.jsonl", b'{"ste0": 1}\n', r"metrics\.jsonl: line 1: expected a JSON object with a step"),
        ("run.json", b"{", r"run\.json: expected a JSON object"),
        ("samples.safetensors", b"{", r"samples\.safetensors: expected safetensors"),
        ("channels.safetensors", b"{", r"channels\.safetensors: expected safetensors"),
    ):
        good = (runs[0] / name).read_bytes()
        (runs[0] / name).write_bytes(damage + good)
        with pytest.raises(CorruptionError, match=words):
            report(runs, tmp_path / "r.html")
        (runs[0] / name).write_bytes(good)


def test_every_metric_has_one_chart_that_compares_the_runs(runs, drawn, tmp_path):
    report(runs, tmp_path / "r.html")
    charts = {titles(figure)[0]: figure for figure in drawn}
    knn, fit = charts["k-NN accuracy, %"], charts["R^2, held-out"]
    assert [text.get_text() for text in knn.axes[0].get_yticklabels()] == ["random init", "mcm", "teacher cache"]
    assert [text.get_text() for text in knn.legends[0].get_texts()] == ["k-NN full", "k-NN masked:8", "k-NN folded"]
    points = {float(x) for line in knn.axes[0].lines for x in line.get_xdata()}
    assert points == {100 * x for x in (0.41, 0.72, 0.96, 0.76, 0.7)}
    assert {float(x) for line in fit.axes[0].lines for x in line.get_xdata()} == {0.668, -0.25}
    page = (tmp_path / "r.html").read_text()
    assert page.count("R^2 of full input is negative, because") == 1
    assert 'alt="k-NN accuracy of random init, mcm, teacher cache; the best is teacher cache with 0.960"' in page


def test_curves_that_belong_together_share_an_axis(drawn):
    names = ["lr", "loss", "eval loss_masked", "eval r2_full", "eval r2_masked", "new_one"]
    html = figures.curves({name: [(1, 0.5), (9, -7.0 if name == "eval r2_full" else 1.0)] for name in names})
    axes = {axis.get_title("left"): axis for figure in drawn for axis in figure.axes}
    assert list(axes) == ["loss", "R^2, not below -1", "lr", "new_one"] and "eval r2_full -7 at step 9" in html
    loss, r2, *_ = drawn
    assert [text.get_text() for text in loss.legends[0].get_texts()] == ["loss", "eval loss_masked"]
    low, high = r2.axes[0].get_ylim()
    assert low == -1 and high > 1 and not axes["lr"].figure.legends
    assert figures.curves({"eval top1": [(9, 0.5)]}) == ""


def test_channels_show_every_channel_that_varies(drawn):
    html = figures.channel_figures(channels(30))
    counts, against = (figure.axes[0] for figure in drawn)
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["masked", "full"]
    assert "1 constant channels of 30" in html and counts.get_xlim()[0] > -1.2
    points = np.concatenate([part.get_offsets() for part in against.collections])
    assert len(points) == 58 and points[:, 0].min() > 0 and points[:, 1].min() == -1


@pytest.mark.parametrize("kind", ["masked", "full"])
def test_maps_are_of_the_best_and_the_worst_channels_that_vary(drawn, kind):
    known = channels(30)
    known = known if kind == "masked" else {"r2_full": known["r2_masked"], "target_std": known["target_std"]}
    tokens = np.random.default_rng(0).standard_normal((2, 16, 30))
    shown = {"views": np.zeros((2, 32, 32, 3), np.uint8), "target": tokens, "prediction": -tokens}
    html = figures.channel_maps(shown, known, (4, 4))
    (figure,) = drawn
    assert [int(axis.get_title().split()[1][:-1]) for axis in figure.axes if axis.get_title()] == [
        29,
        28,
        27,
        26,
        4,
        3,
        2,
        1,
    ]
    assert f"R^2 of {kind} input" in html
    axes = np.array(figure.axes).reshape(4, 9)
    target, prediction = (axes[line, 1].images[0].get_array() for line in (0, 1))
    low, high = np.percentile(tokens[:, :, 29], [1, 99])
    assert np.allclose(target * (high - low) + low, tokens[0, :, 29].reshape(4, 4))
    assert np.allclose(prediction * (high - low) + low, -tokens[0, :, 29].reshape(4, 4))


def test_few_channels_and_constant_ones_are_drawn_too(drawn):
    constant = {"r2_full": np.zeros(3, np.float32), "target_std": np.zeros(3, np.float32)}
    tokens = np.ones((1, 16, 3))
    shown = {"views": np.zeros((1, 32, 32, 3), np.uint8), "target": tokens, "prediction": tokens}
    for known in (channels(3), constant):
        figures.channel_maps(shown, known, (4, 4))
    figures.channel_figures(constant)
    assert [len(figure.axes) for figure in drawn] == [6, 2, 1, 1]


def test_ablations_as_text_and_as_markdown():
    assert ablation_lines(ABLATION) == [
        ["variant", "k-NN full", "linear full", "R^2 masked", "minutes"],
        ["channel|75", "42.0 ± 1.4", "50.0 ± 0.0", "0.150 ± 0.071", "4.5 ± 0.7"],
        ["none (underfitted)", "50.0", "-", "-", "4.2"],
    ]
    assert markdown(ablation_lines(ABLATION)).splitlines() == [
        "| variant            |  k-NN full | linear full |    R^2 masked |   minutes |",
        "| ------------------ | ---------: | ----------: | ------------: | --------: |",
        "| channel\\|75        | 42.0 ± 1.4 |  50.0 ± 0.0 | 0.150 ± 0.071 | 4.5 ± 0.7 |",
        "| none (underfitted) |       50.0 |           - |             - |       4.2 |",
    ]


def test_ablations_are_a_section_with_a_dot_a_seed(drawn, tmp_path):
    write_atomic(tmp_path / "a" / "results.json", json.dumps(ABLATION).encode())
    assert report([tmp_path / "a"], tmp_path / "r.html") == {}
    page = (tmp_path / "r.html").read_text()
    assert ablation_html(ABLATION) in page and "3 &lt;hours&gt;" in page and page.count("<table>") == 1
    assert [titles(figure) for figure in drawn[:3]] == [
        ["k-NN accuracy, %"],
        ["linear probe, top-1, %"],
        ["R^2, held-out"],
    ]
    _, dots, mean, *_ = drawn[0].axes[0].lines
    assert np.allclose(dots.get_xdata(), [41, 43]) and np.allclose(mean.get_xdata(), 42)
    assert ablation_html({"columns": [], "rows": []}).startswith("<p></p><figure class=table>")
