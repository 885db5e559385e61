"""Which cells a configuration plans, and what their ids depend on."""

import json

import pytest

from config import load_config
from phases.plan import plan
from store import ROW_COLUMNS


def planned(*overrides: str):
    return plan(load_config(None, overrides))


def ids(cells) -> list[str]:
    return [cell.id for cell in cells]


def test_the_default_sweep():
    cells = planned()
    assert {phase: len(block) for phase, block in cells.items()} == {
        "baseline": 5,
        # static at 8, 4, 2, W4A8; dynamic at 8, 4; three observers at 4; adaround, mixed precision, QAT of two models
        "quantization": 5 * (4 + 2 + 3) + 2 * 3,
        "mitigation": 5 * 4,
    }
    everything = [cell for block in cells.values() for cell in block]
    assert len(set(ids(everything))) == len(everything)
    assert {cell.options.get("observer") for cell in cells["quantization"] if cell.method == "ptq_static"} == {
        "mse",
        "minmax",
        "percentile",
        "entropy",
    }
    for cell in everything:
        assert set(cell.identity()) <= set(ROW_COLUMNS)
        assert cell.id.startswith(f"{cell.dataset}-{cell.model}-s{cell.seed}-")
        assert json.loads(cell.options_text or "{}") == cell.options
    baselines = set(ids(cells["baseline"]))
    assert all(cell.baseline_cell in baselines for cell in cells["quantization"] + cells["mitigation"])


def test_shorthands_and_entries():
    methods = (
        "quantization.methods=[PTQ_INT8, PTQ_W4A8, dynamic, {method: ptq_static, bit_widths: 3, first_last_bits: 8}]"
    )
    cells = planned("models.architectures=resnet50", "quantization.bit_widths=[6]", methods)["quantization"]
    assert [(c.method, c.weight_bits, c.activation_bits) for c in cells] == [
        ("ptq_static", 8, 8),
        ("ptq_static", 4, 8),
        ("ptq_dynamic", 6, 6),
        ("ptq_static", 3, 3),
    ]
    assert [cell.options.get("first_last_bits") for cell in cells] == [None, None, None, 8]


def test_a_cell_planned_twice_is_there_once():
    cells = planned("models.architectures=resnet50", "quantization.methods=[PTQ_INT8, ptq_static]")["quantization"]
    assert [cell.weight_bits for cell in cells] == [8, 4, 2, 4] and cells[3].activation_bits == 8


@pytest.mark.parametrize(
    "change",
    [
        "training.epochs=7",
        "training.per_model.resnet50.epochs=9",
        "training.brightness=0.1",
        "data.synthetic.group_noise=0.2",
        "data.synthetic.sensitive=[skin]",
        "data.synthetic.image_size=64",
        "run.threads_per_cell=1",
        "run.seeds=[1]",
        "models.weights={resnet50: mine.pt}",
        "models.options={resnet50: {zero_init_residual: true}}",
    ],
)
def test_what_changes_the_training_changes_every_id(change):
    one, other = planned("models.architectures=resnet50"), planned("models.architectures=resnet50", change)
    for phase in one:
        assert not set(ids(one[phase])) & set(ids(other[phase])), phase


@pytest.mark.parametrize(
    "same",
    [
        "training.per_model.mobilenet_v2.epochs=9",
        "data.fairface.image_size=96",
        "data.synthetic.root=elsewhere",
        "data.cache=elsewhere",
        "data.min_group_size=7",
        "analysis.attribute=skin",
        "analysis.bootstrap_replicates=500",
        "deployment.latency=false",
        "results_dir=elsewhere",
        "run.evaluation_batch_size=7",
    ],
)
def test_what_does_not_determine_predictions_keeps_every_id(same):
    one, other = planned("models.architectures=resnet50"), planned("models.architectures=resnet50", same)
    assert {phase: ids(cells) for phase, cells in one.items()} == {phase: ids(cells) for phase, cells in other.items()}


def test_a_method_setting_changes_only_its_cells():
    one = planned("models.architectures=resnet50")
    other = planned("models.architectures=resnet50", "quantization.ptq_dynamic.weight_observer=minmax")
    changed = set(ids(one["quantization"])) ^ set(ids(other["quantization"]))
    assert changed and all("ptq_dynamic" in cell for cell in changed)
    assert ids(one["baseline"]) == ids(other["baseline"]) and ids(one["mitigation"]) == ids(other["mitigation"])


def test_a_percentile_counts_only_where_it_is_read():
    one = planned("models.architectures=resnet50")["quantization"]
    other = planned("models.architectures=resnet50", "quantization.ptq_static.percentile=99.5")["quantization"]
    changed = set(ids(one)) ^ set(ids(other))
    assert len(changed) == 2 and all("percentile" in cell for cell in changed)


def test_options_that_are_off_are_not_part_of_a_cell():
    """So that a later option does not change the identity of the cells that do without it."""
    (cell,) = planned("models.architectures=resnet50", "quantization.methods=[PTQ_INT8]")["quantization"]
    assert set(cell.options) == {"observer", "weight_observer", "calibration_samples", "calibration_split"}
    on = "{method: ptq_static, bit_widths: 8, equalize: true, weight_granularity: per_tensor, rounding: adaround}"
    (other,) = planned("models.architectures=resnet50", f"quantization.methods=[{on}]")["quantization"]
    assert other.options["equalize"] is True and other.options["reconstruction_iterations"] == 300
    assert "bias_correction" not in other.options and "activation_scheme" not in other.options
    assert "-mse-adaround-per_tensor-equalize-" in other.id and other.id != cell.id


def test_the_classifier_may_be_chosen_like_the_others():
    sets = ("models.architectures=resnet50", "quantization.methods=[mixed_precision]", "quantization.bit_widths=[4]")
    (kept,) = planned(*sets)["quantization"]
    (free,) = planned(*sets, "quantization.mixed_precision.classifier_bits=null")["quantization"]
    assert kept.options["classifier_bits"] == 32 and free.options["classifier_bits"] is None and kept.id != free.id


def test_an_entry_may_be_for_some_architectures_only():
    entry = "{method: qat, bit_widths: 4, architectures: mobilenet_v2}"
    cells = planned("models.architectures=[resnet50, mobilenet_v2]", f"quantization.methods=[PTQ_INT8, {entry}]")
    assert [(c.model, c.method) for c in cells["quantization"]] == [
        ("resnet50", "ptq_static"),
        ("mobilenet_v2", "ptq_static"),
        ("mobilenet_v2", "qat"),
    ]
    assert "architectures" not in cells["quantization"][-1].options
