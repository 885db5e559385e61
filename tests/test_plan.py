"""Which cells a configuration plans, and what their ids depend on."""

import json

import pytest

from config import load_config
from plan import plan
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
        "mitigation": 5 * 4 + 2 * 2,  # balanced calibration at every width; two repairs of two models
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
        "deployment.cells=[]",
        "deployment.export=['*']",
        "deployment.engines=[openvino, inductor]",
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


# ------------------------------------------------------------------------------------------------------------- backends

SMALL = (
    "models.architectures=resnet50",
    "quantization.bit_widths=[8, W4A8]",
    "quantization.methods=[ptq_static, {method: ptq_dynamic, bit_widths: 8}, QAT_INT4, mixed_precision]",
)


def of_backend(cells, backend: str):
    return [cell for cell in cells if cell.options.get("backend", "x86") == backend]


@pytest.mark.parametrize("phase", ["quantization", "mitigation"])
def test_a_swept_backend_gives_a_cell_a_backend(phase):
    """The cells of arm and tensorrt are those of x86 but for the option and the id; of x86 nothing says which it is."""
    x86 = planned(*SMALL)[phase]
    swept = planned(*SMALL, "quantization.backend=[x86, arm, tensorrt]")[phase]
    assert len(x86) == {"quantization": 2 + 1 + 1 + 2, "mitigation": 2}[phase]
    assert len(swept) == 3 * len(x86) == len(set(ids(swept)))
    assert all("backend" not in cell.options for cell in x86) and ids(of_backend(swept, "x86")) == ids(x86)
    for backend in ("arm", "tensorrt"):
        cells = of_backend(swept, backend)
        assert all(f"-{backend}-" in cell.id for cell in cells)
        assert ids(planned(*SMALL, f"quantization.backend={backend}")[phase]) == ids(cells)
        for plain, cell in zip(x86, cells, strict=True):
            assert cell.options == plain.options | {"backend": backend}
            assert (cell.method, cell.strategy, cell.weight_bits, cell.activation_bits, cell.baseline_cell) == (
                plain.method,
                plain.strategy,
                plain.weight_bits,
                plain.activation_bits,
                plain.baseline_cell,
            )


@pytest.mark.parametrize("phase", ["quantization", "mitigation"])
def test_only_x86_has_a_reduced_range(phase):
    plain = planned(*SMALL, "quantization.backend=[x86, arm]")[phase]
    reduced = planned(*SMALL, "quantization.backend=[x86, arm]", "quantization.reduce_range=true")[phase]
    assert ids(of_backend(reduced, "arm")) == ids(of_backend(plain, "arm"))
    assert not set(ids(of_backend(reduced, "x86"))) & set(ids(plain))
    for cell in reduced:
        assert cell.options.get("reduce_range", False) is ("backend" not in cell.options)
        assert ("reduce_range" in cell.id) is ("backend" not in cell.options)


def test_what_a_backend_does_anyway_is_not_part_of_a_cell():
    """tensorrt is symmetric whether it is said or not; of the others affine is what they are."""
    for backend, scheme in (("tensorrt", "symmetric"), ("arm", "affine"), ("x86", "affine")):
        sets = (*SMALL, f"quantization.backend={backend}")
        said = f"quantization.ptq_static.activation_scheme={scheme}"
        one, other = planned(*sets), planned(*sets, said)
        assert {phase: ids(cells) for phase, cells in one.items()} == {
            phase: ids(cells) for phase, cells in other.items()
        }
    swept = planned(
        *SMALL, "quantization.backend=[arm, tensorrt]", "quantization.ptq_static.activation_scheme=symmetric"
    )
    for cell in swept["quantization"] + swept["mitigation"]:
        is_said = cell.method == "ptq_static" and cell.options["backend"] == "arm"
        assert cell.options.get("activation_scheme") == ("symmetric" if is_said else None)


def repairs(*overrides: str) -> list:
    return planned("models.architectures=resnet50", "quantization.bit_widths=[8, 4]", *overrides)["mitigation"]


def test_what_a_repair_does_is_in_its_id_and_what_it_does_not_is_not():
    def of(entry: str, *overrides: str) -> set[str]:
        return set(ids(repairs(f"mitigation.strategies=[{entry}]", *overrides)))

    assert of("fair_reconstruction") == of("{strategy: fair_reconstruction, rounding: adaround}")
    assert not of("fair_reconstruction") & of("{strategy: fair_reconstruction, reconstruction_iterations: 5}")
    assert not of("fair_reconstruction") & of(
        "fair_reconstruction", "quantization.ptq_static.reconstruction_unit=layer"
    )
    assert of("fair_bias_correction") == of("{strategy: fair_bias_correction, bias_correction: true}")
    assert len(of("minimax_ranges", "quantization.ptq_static.observer=[mse, minmax, entropy]")) == 2
    assert len(of("bias_aware_calibration", "quantization.ptq_static.observer=[mse, minmax, entropy]")) == 6
    assert of("sensitive_layers") == of("sensitive_layers", "quantization.ptq_static.first_last_bits=8")
    assert of("distillation") == of("distillation", "quantization.qat.label_smoothing=0.1")
    learned = "{strategy: distillation, start: sensitive_layers, start_options: {rounding: adaround%s}}"
    assert not of(learned % "") & of(learned % ", reconstruction_iterations: 5")
    for cell in repairs(f"mitigation.strategies=[{learned % ', layer_share: 0.5'}]"):
        assert cell.options["rounding"] == "adaround" and cell.options["start_options"] == {"layer_share": 0.5}


def test_nothing_is_planned_that_has_nothing_to_widen():
    for entry in ("sensitive_layers", "sensitive_channels", "{strategy: group_dro, start: sensitive_layers}"):
        assert {cell.weight_bits for cell in repairs(f"mitigation.strategies=[{entry}]")} == {4}
    wide = "{strategy: distillation, start: sensitive_layers, start_options: {wide_bits: 4}}"
    assert not repairs(f"mitigation.strategies=[{wide}]")
    for widen, widths in (("inputs", {"W8A4"}), ("weights_and_inputs", {"W8A4", "W4A8"})):  # of W8A8, W8A4 and W4A8
        entry = f"{{strategy: sensitive_layers, widen: {widen}, bit_widths: [8, W8A4, W4A8]}}"
        found = repairs(f"mitigation.strategies=[{entry}]")
        assert {f"W{cell.weight_bits}A{cell.activation_bits}" for cell in found} == widths


def test_entries_are_merged_over_their_section():
    section = "mitigation.group_dro={start: sensitive_layers, start_options: {layer_share: 0.5}, epochs: 3}"
    (own,) = repairs("mitigation.strategies=[group_dro]", section)
    assert own.options["start_options"] == {"layer_share": 0.5} and own.options["epochs"] == 3
    others = repairs("mitigation.strategies=[{strategy: group_dro, start: minimax_ranges}]", section)
    assert all("start_options" not in cell.options and cell.options["epochs"] == 3 for cell in others)
    (merged,) = repairs(
        "mitigation.strategies=[{strategy: group_dro, start_options: {layer_share: 0.4}}]",
        "mitigation.group_dro.start=sensitive_layers",
    )
    assert merged.options["start_options"] == {"layer_share": 0.4}


def test_the_precision_of_a_training_is_part_of_its_cell_where_it_is_asked_for():
    (left,), (asked,) = (
        [
            cell
            for cell in planned(*SMALL, "quantization.methods=[{method: qat, bit_widths: [4]}]", *more)["quantization"]
        ]
        for more in ((), ("quantization.qat.precision=fp32",))
    )
    assert "precision" not in left.options and asked.options["precision"] == "fp32" and left.id != asked.id
