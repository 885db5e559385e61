"""An analysis of what there is: damaged, foreign, missing and failed results are named, and the rest is analysed."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from fake_study import NAMES, small_config, write_study

import main
from analysis.usable import NoUsablePredictions, usable_predictions
from config import dump_config
from phases.analysis import planned_rows, run
from phases.measure import metric_settings, refresh_metrics
from store import SCHEMA_VERSION, StoreError, short_hash

CONFIG = small_config("deployment.cells=[]", "deployment.export=[]", models=("mobilenet_v2",))


@pytest.fixture(autouse=True)
def low_resolution(monkeypatch):
    monkeypatch.setattr("phases.drawing.FIGURE_DPI", 30)


@pytest.fixture
def study(tmp_path):
    """(store, cells by phase) of one model whose every cell is done."""
    return write_study(tmp_path / "results", CONFIG)


def missing(store) -> dict[str, tuple[str, str]]:
    table = pd.read_csv(store.analysis / "missing.csv", keep_default_na=False)
    return {row.cell: (row.status, row.why) for row in table.itertuples()}


def as_measured(store, planned, key: str) -> None:
    """Give the records what a phase that ran would have left for deriving rows again."""
    names = {"classes": ["neutral", "smiling"], "sensitive": NAMES}
    for cell in (cell for block in planned.values() for cell in block):
        record = store.record(cell.id)
        store.write_cell(record["row"], record["groups"], {"names": names, "metrics_key": key})


def truncate(store, cell):
    path = store.predictions_path(cell)
    path.write_bytes(path.read_bytes()[:900])


def change(store, cell, **arrays):
    store.write_predictions(cell, dataclasses.replace(store.predictions(cell), **arrays))


def no_numbers(store, cell):
    logits = store.predictions(cell).logits.copy()
    logits[[3, 5]] = np.nan
    change(store, cell, logits=logits)


DAMAGE = {
    "truncated": (truncate, "not a readable predictions file"),
    "empty": (lambda store, cell: store.predictions_path(cell).write_bytes(b""), "not a readable predictions file"),
    "a web page": (lambda store, cell: store.predictions_path(cell).write_bytes(b"<html>"), "not a readable"),
    "gone": (lambda store, cell: store.predictions_path(cell).unlink(), "missing; run its phase again"),
    "other images": (
        lambda store, cell: change(store, cell, index=store.predictions(cell).index + 1),
        "not of the same test images, labels or groups",
    ),
    "other labels": (
        lambda store, cell: change(store, cell, y_true=1 - store.predictions(cell).y_true),
        "not of the same test images, labels or groups",
    ),
    "other groups": (
        lambda store, cell: change(
            store, cell, sensitive={name: 1 - codes for name, codes in store.predictions(cell).sensitive.items()}
        ),
        "not of the same test images, labels or groups",
    ),
    "no numbers": (no_numbers, "the logits of 2 of 1200 images are not finite"),
    "cut in one array": (
        lambda store, cell: change(store, cell, y_true=store.predictions(cell).y_true[:7]),
        "its arrays are not of one length",
    ),
    "a third label": (
        lambda store, cell: change(store, cell, y_true=store.predictions(cell).y_true + 1),
        "a label is 2, and the logits are of 2 classes",
    ),
}


# the FP32 cell comes first: were the first file the reference, its damage would disqualify all others
@pytest.mark.parametrize("place", ["baseline", "quantization"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_only_the_damaged_file_is_unusable(study, damage, place):
    store, planned = study
    names = [cell.id for cells in planned.values() for cell in cells]
    cell, (damaged, why) = planned[place][0].id, DAMAGE[damage]
    damaged(store, cell)
    found = usable_predictions(store, names)
    assert list(found.predictions) == [name for name in names if name != cell]
    assert list(found.unusable) == [cell]
    reason = found.unusable[cell]
    assert reason.startswith(f"{store.predictions_path(cell)}: ") and why in reason and "\n" not in reason
    assert "run" in reason and "again" in reason  # what to do


def test_one_damaged_file_is_named_and_the_rest_is_analysed(study, tmp_path, capsys):
    store, planned = study
    cell = planned["quantization"][0].id
    as_measured(store, planned, short_hash(metric_settings(CONFIG, "synthetic")))
    truncate(store, cell)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(CONFIG))
    arguments = ["--phase", "analysis", "--config", str(path), "--results-dir", str(store.root), "--quiet"]
    for more in ([], ["--set", "data.min_group_size=30"]):  # with other metric settings rows are derived again
        assert main.main([*arguments, "--device", "cpu", *more]) == 1
        out = capsys.readouterr().out
        assert f"left out of the analysis: {cell}: {store.predictions_path(cell)}: not a readable" in out
        assert "1 finished cells left out of the analysis" in out
    assert missing(store) == {cell: ("unusable", missing(store)[cell][1])}
    for name in ("summary.md", "report.html"):
        text = (store.analysis / name).read_text()
        assert "0 without a result, 1 with predictions that cannot be used" in text
        assert "Finished cells whose predictions cannot be used, left out" in text and cell in text
    significance = (store.analysis / "significance.csv").read_text()
    assert cell not in significance and planned["quantization"][1].id in significance
    assert cell not in (store.analysis / "pareto.csv").read_text()


def test_without_the_predictions_of_fp32_nothing_is_compared_with_it(study):
    store, planned = study
    truncate(store, planned["baseline"][0].id)
    found = run(CONFIG, store).set_index("id")
    assert found.loc["H5-int8", "verdict"] == "not tested"
    table = pd.read_csv(store.analysis / "significance.csv")
    assert set(table["comparison"]) <= {"plain"}


def test_nothing_usable_is_an_error_that_names_a_file(study):
    store, planned = study
    cells = [cell.id for block in planned.values() for cell in block]
    for cell in cells:
        truncate(store, cell)
    with pytest.raises(NoUsablePredictions) as refused:
        run(CONFIG, store)
    message = str(refused.value)
    assert message.startswith(str(store.predictions_path(cells[0]))) and f"(and {len(cells) - 1} more" in message


def test_failed_missing_and_unusable_cells_are_told_apart_in_planned_order(tmp_path):
    config = small_config(models=("mobilenet_v2", "resnet50"))
    cells = [cell.id for block in write_study(tmp_path / "all", config)[1].values() for cell in block]
    store, _ = write_study(tmp_path / "some", config, fail=[cells[2]], skip=[cells[3]])
    truncate(store, cells[4])
    run(config, store)
    assert [(cell, status) for cell, (status, _) in missing(store).items()] == [
        (cells[2], "failed"), (cells[3], "missing"), (cells[4], "unusable"),
    ]  # fmt: skip
    assert missing(store)[cells[2]][1].startswith("RuntimeError")
    assert missing(store)[cells[3]][1] == "no result; python main.py --phase quantization"


def test_metrics_that_are_not_there_are_dashes_and_never_zero(study):
    """A rate without a denominator is empty in the table."""
    store, planned = study
    for phase in planned:
        table = pd.read_csv(store.results_path(phase), keep_default_na=False, na_values=[""])
        kept = ("cell", "phase", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits",
                "options", "baseline_cell", "status", "error", "n_test")  # fmt: skip
        table = table.reindex(columns=kept).reindex(columns=table.columns)
        table.to_csv(store.results_path(phase), index=False)
    run(CONFIG, store)
    results = pd.read_csv(store.analysis / "tables" / "results.csv", dtype=str)
    for column in ("accuracy %", "worst group %", "accuracy gap", "equalized odds diff.", "MB"):
        assert set(results[column]) == {"–"}, column
    assert pd.read_csv(store.analysis / "pareto.csv").empty
    # predictions are there: what is made of them is not empty
    assert pd.read_csv(store.analysis / "significance.csv")["effect"].notna().any()
    assert "nan" not in (store.analysis / "summary.md").read_text().lower().split()


# -------------------------------------------------------------------------------------------------- damaged tables


def test_a_table_that_is_cut_off_is_refused_or_its_cells_are_missing(study):
    store, planned = study
    path = store.results_path("quantization")
    whole = path.read_text()
    ids = {phase: [cell.id for cell in cells] for phase, cells in planned.items()}
    second = whole.index(ids["quantization"][1])
    path.write_text(whole[: second + 100])  # within the second row, before its status
    rows, absent, _ = planned_rows(store, ids)
    assert ids["quantization"][0] in set(rows["cell"])
    assert absent == [("quantization", ids["quantization"][1])]
    for text, problem in ((whole[:300], "no column"), ("", "not a readable results file"), ("\x00a,b\n", "")):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"quantization_results\.csv") as refused:
            planned_rows(store, ids)
        assert problem in str(refused.value) and "python main.py --phase quantization" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_group_table_that_is_cut_off_is_refused(study):
    store, _ = study
    path = store.root / "group_results.csv"
    for text in (path.read_text()[:40], ""):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"group_results\.csv: .*python main\.py --phase baseline"):
            run(CONFIG, store)


def test_a_record_of_another_schema_is_refused_and_both_versions_are_named(study):
    store, planned = study
    cell = planned["quantization"][0].id
    record = json.loads(store.record_path(cell).read_text())
    store.record_path(cell).write_text(json.dumps({**record, "schema_version": 1}))
    with pytest.raises(StoreError, match=rf"{cell}\.json: written with results schema 1, this program reads ") as error:
        store.is_done(cell)
    assert f"reads {SCHEMA_VERSION};" in str(error.value)


# ---------------------------------------------------------------------------------------- rows that are derived again


def test_rows_without_readable_predictions_stay_and_the_others_are_derived_again(study):
    store, planned = study
    cells = [cell for block in planned.values() for cell in block]
    as_measured(store, planned, "another")
    damaged = planned["quantization"][0]
    truncate(store, damaged.id)
    assert refresh_metrics(cells, CONFIG, store) == len(cells) - 1
    now = short_hash(metric_settings(CONFIG, "synthetic"))
    keys = {cell.id: store.record(cell.id)["extra"]["metrics_key"] for cell in cells}
    assert keys == {cell.id: "another" if cell is damaged else now for cell in cells}
