"""The order in which workers get cells: the longest first."""

import pytest

import runner
from benchmarks.schedule import Task, schedule
from config import load_config
from execution.cells import CellResult
from execution.order import expected_operations, longest_first, split_sizes
from plan import Cell, plan
from runner import Report, run_cells
from store import Store

STUDY = ["data.dataset=[fairface, utkface]", "run.seeds=[0, 1]", "quantization.methods=[ptq_static, qat]"]


def test_long_trainings_come_first_and_equals_stay_in_their_order():
    cells = plan(load_config(None, STUDY))["baseline"]
    names = [(cell.dataset, cell.model, cell.seed) for cell in longest_first(cells, load_config(None, STUDY))]
    assert names[:4] == [
        ("fairface", "vit_small_patch16_224", 0), ("fairface", "vit_small_patch16_224", 1),
        ("fairface", "resnet50", 0), ("fairface", "resnet50", 1),
    ]  # fmt: skip
    assert sorted(names) == sorted((cell.dataset, cell.model, cell.seed) for cell in cells)


@pytest.mark.parametrize("more", ["training.epochs=9", "data.fairface.image_size=96", "data.fairface.max_train=80000"])
def test_what_takes_longer_counts_more(more):
    def expected(*settings: str) -> float:
        config = load_config(None, ["data.dataset=[fairface]", "training.epochs=5", "data.fairface.max_train=70000",
                                    *settings])  # fmt: skip
        return expected_operations(plan(config)["baseline"][0], config)

    assert expected(more) > expected()


def test_training_is_longer_than_calibration():
    config = load_config(None, ["quantization.methods=[ptq_static, {method: qat, bit_widths: [4]}]"])
    ordered = longest_first(plan(config)["quantization"], config)
    of_one_model = [cell.method for cell in ordered if cell.model == "resnet50"]
    assert of_one_model[0] == "qat" and "qat" not in of_one_model[1:]


def test_measuring_sensitivities_is_longer_than_calibration():
    config = load_config("configs/study.yaml", ["data.dataset=[fairface]"])
    cells = plan(config)
    for phase, name in (("quantization", "mixed_precision"), ("mitigation", "sensitive_layers")):
        kin = [cell for cell in cells[phase] if cell.model == "resnet50" and cell.options.get("rounding") != "adaround"]
        longer = [expected_operations(cell, config) for cell in kin if name in (cell.method, cell.strategy)]
        plain = [expected_operations(cell, config) for cell in kin if cell.method == "ptq_static" and not cell.strategy]
        plain = plain or [expected_operations(cell, config) for cell in kin if cell.strategy == "minimax_ranges"]
        assert longer and plain and min(longer) > max(plain)


def test_a_model_that_nobody_knows_is_not_left_for_the_end():
    config = load_config(None, [])
    known = plan(config)["baseline"]
    other = Cell("other", "baseline", "synthetic", "convnext_tiny", 0, "none")
    assert longest_first([*known, other], config).index(other) <= 2


def test_sizes_are_those_of_the_config():
    config = load_config(None, ["data.fairface.max_train=1000", "data.fairface.max_test=50"])
    assert split_sizes(config, "fairface") == (1000, 112, 50)
    train, validation, test = split_sizes(load_config(None, []), "utkface")
    assert train + validation + test == 23_705 and test == round(0.2 * 23_705)


def test_the_order_shortens_the_wait_for_the_last():
    """Of the default run's trainings on two workers, with the seconds that they took."""
    config = load_config(None, [])
    seconds = dict(zip(config.models.architectures, (161.2, 37.1, 9.3, 56.9, 127.0), strict=True))
    cells = plan(config)["baseline"]
    makespan = lambda cells: schedule([Task(c.id, 0, seconds[c.model]) for c in cells], 2).makespan  # noqa: E731
    assert makespan(cells) == pytest.approx(230.3) and makespan(longest_first(cells, config)) < 200


@pytest.mark.parametrize("is_here", [True, False])
def test_workers_get_them_so_and_one_process_in_the_planned_order(tmp_path, monkeypatch, is_here):
    config, given = load_config(None, []), []

    class Executor:
        def run(self, job, compute, cells, report):
            given.extend(cells)
            yield from ()

        def close(self):
            pass

    executor = Executor()
    executor.is_here = is_here
    monkeypatch.setattr(runner, "open_executor", lambda *_: executor)
    store = Store(tmp_path)
    store.prepare("")
    cells = plan(config)["baseline"]
    run_cells("baseline", cells, lambda *_: lambda cell, report: CellResult({}, []), config, store, Report(quiet=True))
    assert given == (cells if is_here else longest_first(cells, config)) and longest_first(cells, config) != cells
