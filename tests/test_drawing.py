"""The files of figures: formats, pages, the same bytes, nothing stale."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_study import small_config, write_study
from fake_tables import tables

import phases.drawing
from phases.analysis import run
from phases.drawing import CAPTIONS, probability_table, rendered, save_figures, study_figures
from store import Store
from visualizations import accuracy_heatmap, per_group_performance

ROOT = Path(__file__).parent.parent
SMALL = {"n_models": 2, "seeds": (0,), "widths": (8, 4), "observers": ("mse",), "strategies": ("group_dro",)}


@pytest.fixture(autouse=True)
def low_resolution(monkeypatch):
    monkeypatch.setattr("phases.drawing.FIGURE_DPI", 40)


def drawn_files(seed: str) -> str:
    """Digests of figures made by another process, with another order of sets and hashes."""
    code = (
        "import sys, hashlib; sys.path[:0] = ['.', 'tests']\n"
        "from fake_tables import tables; from phases.drawing import rendered\n"
        "from visualizations import accuracy_heatmap, pareto_frontier, per_group_performance\n"
        f"found = tables(**{SMALL!r})\n"
        "draws = (accuracy_heatmap, 'rows'), (pareto_frontier, 'rows'), (per_group_performance, 'groups')\n"
        "for draw, name in draws:\n"
        "    for suffix, data in rendered(draw(found[name]), ('png', 'pdf', 'svg'), 40).items():\n"
        "        print(draw.__name__, suffix, hashlib.sha256(data).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": ""}
    environment.pop("SOURCE_DATE_EPOCH")
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_same_tables_give_the_same_bytes_in_every_process():
    first, second = drawn_files("1"), drawn_files("2")
    assert len(first.splitlines()) == 9
    assert first == second


def test_files_hold_no_date_and_fonts_that_printers_take():
    files = rendered(accuracy_heatmap(tables(**SMALL)["rows"]), ("png", "pdf", "svg"))
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF") and b"<svg" in files["svg"]
    for suffix, data in files.items():
        assert not re.search(rb"CreationDate|<dc:date>|tIME", data), suffix
    assert b"/TrueType" in files["pdf"] or b"/Type0" in files["pdf"]
    assert b"/Type3" not in files["pdf"]
    assert b">ResNet-50<" in files["svg"]  # text stays text


def empty_study():
    """The tables of a study in which nothing finished."""
    rows = tables(**SMALL)["rows"].assign(status="failed")
    nothing = pd.DataFrame()
    return {"rows": rows, "groups": nothing, "verdicts": nothing, "significance": nothing, "costs": nothing,
            "probabilities": nothing, "dimensions": ("accuracy", "size_mb"), "level": 0.95}  # fmt: skip


def test_a_figure_without_anything_to_show_is_written_and_says_so():
    said = {
        name: page.texts[0].get_text() for name, page in study_figures(**empty_study()) if name != "accuracy_heatmap"
    }
    assert set(said) == set(CAPTIONS) - {"accuracy_heatmap", "cross_dataset", "group_flip_rates", "layer_sensitivity"}
    assert all(text.startswith("Nothing to show: ") for text in said.values())


def test_flip_rates_are_drawn_where_they_are_given():
    flips = tables(**SMALL)["flips"]
    names = [name for name, _ in study_figures(**empty_study(), flips=flips)]
    assert "group_flip_rates" in names and [name for name in CAPTIONS if name in names] == names


def test_pages_are_numbered_told_and_removed_when_there_are_fewer(tmp_path):
    store = Store(tmp_path)
    store.analysis.mkdir()
    kept = store.analysis / "accuracy_heatmap_of_mine.png"
    kept.write_bytes(b"")
    groups = tables(n_models=10, seeds=(0,), widths=(8, 4), observers=("mse",), strategies=())["groups"]
    pages = lambda groups: (  # noqa: E731
        ("per_group_performance", figure) for figure in phases.drawing.all_pages(per_group_performance, groups)
    )
    captions, images = save_figures(store, pages(groups), "svg")
    names = [name for name, _ in captions]
    assert names[:2] == ["per_group_performance.png", "per_group_performance-2.png"] and len(names) > 2
    assert captions[1][1].endswith(f" Page 2 of {len(names)}.")
    assert {path.name for path in store.analysis.iterdir()} == {*names, *(n[:-3] + "svg" for n in names), kept.name}
    assert all((store.analysis / name).read_bytes() == data for name, data in images.items())
    save_figures(store, pages(groups[groups["model"] == "resnet50"]), "pdf")
    left = {path.name for path in store.analysis.iterdir()}
    assert left == {"per_group_performance.png", "per_group_performance.pdf", kept.name}


def test_a_study_writes_every_figure_twice_and_its_tables(tmp_path):
    config = small_config("analysis.vector_format=svg", "analysis.pareto=[accuracy, size_mb]", models=("resnet50",))
    store, _ = write_study(tmp_path, config)
    run(config, store)
    written = {path.name for path in store.analysis.iterdir()}
    for name in set(CAPTIONS) - {"cross_dataset", "layer_sensitivity"}:
        assert {f"{name}.png", f"{name}.svg"} <= written
    assert not [name for name in written if name.endswith(".pdf")]
    assert "cost_benefit.png" in (store.analysis / "summary.md").read_text()
    costs = pd.read_csv(store.analysis / "cost_benefit.csv")
    # balanced calibration at 8 bits loses nothing, and nor does plain; at 4 bits both lose the same images
    assert costs["gain"].tolist() == [0.0, 0.0] and costs["strategy"].tolist() == ["bias_aware_calibration"] * 2
    calibration = pd.read_csv(store.analysis / "calibration.csv")
    # one-hot logits 1, 0: every confidence is e / (e + 1) = 0.731, in the fifth of ten bins from 0.5; FP32: 90 % right
    filled = calibration[(calibration["n"] > 0) & (calibration["group"] == "all")]
    assert set(filled["bin"]) == {4} and filled["n"].tolist() == [1200] * 3
    np.testing.assert_allclose(filled["confidence"], np.e / (np.e + 1), rtol=1e-6)
    assert filled["accuracy"].iloc[0] == 0.9
    errors = pd.read_csv(store.analysis / "calibration_error.csv")
    assert errors["expected_calibration_error"].iloc[0] == pytest.approx(0.9 - np.e / (np.e + 1))


def test_a_model_without_finite_logits_has_no_probabilities(tmp_path):
    from phases.analysis import load_test_set

    config = small_config(models=("resnet50",))
    store, planned = write_study(tmp_path, config)
    rows = pd.concat([store.read_table(phase) for phase in ("baseline", "quantization")], ignore_index=True)
    test_sets = {"synthetic": load_test_set(config, store, "synthetic", rows, store.read_group_table())}
    broken = planned["quantization"][0].id
    saved = store.predictions(broken)
    store.write_predictions(
        broken, type(saved)(saved.y_true, np.full_like(saved.logits, np.nan), saved.sensitive, saved.index)
    )
    table = probability_table(store, rows, test_sets, 0.95)
    assert broken not in set(table["cell"]) and planned["baseline"][0].id in set(table["cell"])


def test_two_processes_write_the_same_bytes_in_the_same_order_and_say_what_failed(tmp_path, monkeypatch):
    found = tables(**SMALL)
    arguments = {**empty_study(), "rows": found["rows"], "groups": found["groups"], "flips": found["flips"]}
    monkeypatch.setattr("phases.drawing.LARGE", 1)
    written = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        started = []
        popen = subprocess.Popen
        monkeypatch.setattr(
            subprocess, "Popen", lambda *a, popen=popen, s=started, **k: (s.append(1), popen(*a, **k))[1]
        )
        store = Store(tmp_path / threads)
        store.analysis.mkdir(parents=True)
        captions, _ = save_figures(store, study_figures(**arguments), "pdf")
        monkeypatch.setattr(subprocess, "Popen", popen)
        assert len(started) == int(threads) - 1
        written.append((captions, {path.name: path.read_bytes() for path in store.analysis.iterdir()}))
    assert written[0] == written[1] and len(written[0][1]) == 20
    arguments["flips"] = found["flips"].drop(columns="flip_rate")  # drawn by the other process
    with pytest.raises(RuntimeError, match=r"(?s)group_flip_rates.*KeyError.*flip_rate"):
        save_figures(Store(tmp_path / "1"), study_figures(**arguments), "pdf")
