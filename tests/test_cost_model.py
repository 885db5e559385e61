"""The cost model and its schedules: hand-computed ones, bounds that hold for every list, and monotone predictions."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cost_model
from benchmarks.cost_model import FEATURES, CostModel, Measurement, check, fit, split_sizes, standing_still, tasks_of
from benchmarks.schedule import Task, critical_path, schedule
from config import dump_config, load_config
from execution.run_log import RunLog
from phases.complete import is_selected
from store import Store

TWO = [  # two checkpoints: one is there after 2, one after 4
    Task("b1", 0, 2.0),
    Task("b2", 0, 4.0),
    Task("q1", 1, 3.0, ("b1",)),
    Task("q2", 1, 1.0, ("b2",)),
    Task("m1", 2, 2.0, ("b1",)),
]


def test_a_schedule_by_hand():
    """Two workers: b1 0-2, b2 0-4; the barrier; q1 4-7, q2 4-5; the barrier; m1 7-9."""
    found = schedule(TWO, 2)
    assert found.begin == {"b1": 0, "b2": 0, "q1": 4, "q2": 4, "m1": 7} and found.makespan == 9
    assert found.worker["b1"] != found.worker["b2"]
    # without barriers: q1 begins at 2 on the worker of b1, b2's at 4 does q2 (4-5) and m1 follows on it (5-7)
    free = schedule(TWO, 2, barriers=False)
    assert free.begin == {"b1": 0, "b2": 0, "q1": 2, "q2": 4, "m1": 5} and free.makespan == 7
    assert schedule(TWO, 1).makespan == schedule(TWO, 1, barriers=False).makespan == 12


def test_the_critical_path_by_hand():
    assert critical_path(TWO) == (9.0, ["b2", "q1", "m1"])
    assert critical_path(TWO, barriers=False) == (5.0, ["b1", "q1"])


@pytest.mark.parametrize(
    "tasks",
    [
        [Task("a", 0, -1.0)],
        [Task("a", 1, 1.0), Task("b", 0, 1.0)],
        [Task("a", 0, 1.0, ("b",)), Task("b", 0, 1.0)],
        [Task("a", 0, 1.0), Task("a", 0, 1.0)],
    ],
)
def test_impossible_tasks_are_refused(tasks):
    with pytest.raises(ValueError):
        schedule(tasks, 2)
    with pytest.raises(ValueError):
        critical_path(tasks)


@st.composite
def studies(draw):
    durations = st.floats(0, 10, allow_nan=False)
    tasks = [Task(f"b{i}", 0, draw(durations)) for i in range(draw(st.integers(1, 4)))]
    names = [task.name for task in tasks]
    for phase, count in ((1, draw(st.integers(0, 8))), (2, draw(st.integers(0, 8)))):
        tasks += [Task(f"{phase}-{i}", phase, draw(durations), (draw(st.sampled_from(names)),)) for i in range(count)]
    return tasks


@settings(max_examples=150, deadline=None)
@given(studies(), st.integers(1, 5), st.booleans())
def test_schedules_keep_every_rule_and_bound(tasks, workers, barriers):
    found = schedule(tasks, workers, barriers=barriers)
    work, (path, names) = sum(task.seconds for task in tasks), critical_path(tasks, barriers=barriers)
    by_name = {task.name: task for task in tasks}
    assert set(found.begin) == set(by_name)
    for task in tasks:
        assert found.end[task.name] == pytest.approx(found.begin[task.name] + task.seconds)
        assert all(found.end[name] <= found.begin[task.name] for name in task.after)
        if barriers:
            earlier = [found.end[other.name] for other in tasks if other.phase < task.phase]
            assert found.begin[task.name] >= max(earlier, default=0.0)
    for one, other in itertools.combinations(tasks, 2):
        if found.worker[one.name] == found.worker[other.name]:
            apart = found.end[one.name] <= found.begin[other.name] or found.end[other.name] <= found.begin[one.name]
            assert apart
    assert set(found.worker.values()) <= set(range(workers))
    assert path == pytest.approx(sum(by_name[name].seconds for name in names))
    assert path >= max(task.seconds for task in tasks)
    chains = [task.seconds + sum(by_name[name].seconds for name in task.after) for task in tasks]
    assert path >= max(chains) - 1e-9
    assert found.makespan >= max(path, work / workers) - 1e-9
    # Graham's bound of list scheduling, phase by phase where there are barriers
    assert found.makespan <= work / workers + (1 - 1 / workers) * path + 1e-9


def measurements(kind="ptq_static", model="net", one=0.5, image=0.01, pixel=2.0, noise=None):
    """Of a machine whose costs are known: one + image n + pixel n s² / 10^6."""
    sizes = ((64, 8), (64, 24), (160, 8), (cost_model.HELD_OUT_SIZE, 12))
    return [
        Measurement(kind, model, size, n, 2, one + image * n + pixel * n * size**2 / 1e6 + (noise or {}).get(size, 0))
        for size, n in sizes
    ]


def test_known_costs_are_found_again():
    found = fit(measurements())["ptq_static"]["net"]
    assert found["coefficients"] == pytest.approx({"one": 0.5, "images": 0.01, "image pixels": 2.0}, rel=1e-6)
    assert found["r2"] == pytest.approx(1) and found["held_out"] == pytest.approx([0], abs=1e-9)
    assert CostModel(fit(measurements())).step("ptq_static", "net", 100, 10).on() == pytest.approx(0.5 + 0.1 + 0.2)


def test_a_machine_that_is_not_linear_is_called_so():
    """The held-out size takes twice what its neighbours say: the model is wrong by half, and the table says bad."""
    size = cost_model.HELD_OUT_SIZE
    true = 0.5 + 0.01 * 12 + 2.0 * 12 * size**2 / 1e6
    fitted = fit(measurements(noise={size: true}))
    assert fitted["ptq_static"]["net"]["held_out"] == pytest.approx([-0.5])
    assert "| ptq_static | 1 of 1 | 50% | 50% | bad |" in cost_model.table_of_errors(fitted)
    assert "bad" not in cost_model.table_of_errors(fit(measurements()))


def test_too_few_measurements_are_named():
    """Two of them cannot tell three costs apart, however well they are met."""
    few = measurements()[:1] + measurements()[2:]
    assert fit(few)["ptq_static"]["net"]["is_determined"] is False
    assert "too few measurements of net" in cost_model.table_of_errors(fit(few))
    assert "too few" not in cost_model.table_of_errors(fit(measurements()))


def test_a_difference_that_came_out_as_nothing_is_left_out():
    nothing = Measurement("ptq_static", "net", 64, 16, 2, 0.0)
    found, whole = (fit(each)["ptq_static"]["net"] for each in ([*measurements(), nothing], measurements()))
    assert found["coefficients"] == pytest.approx(whole["coefficients"])


def test_no_coefficient_is_negative():
    falling = [Measurement("ptq_static", "net", 64, n, 2, 2.0 - 0.05 * n) for n in (8, 16, 24)]
    assert min(fit(falling)["ptq_static"]["net"]["coefficients"].values()) >= 0


MODELS = ("mobilenet_v2", "resnet50")


@pytest.fixture
def model() -> CostModel:
    """Every coefficient another number: a second for the fixed part, less for the rest."""
    fitted = {
        kind: {
            name: {
                "coefficients": {
                    feature: (1.0 if feature == "one" else 0.01) * (k + 1) * (j + 1)
                    for k, feature in enumerate(FEATURES[kind])
                }
            }
            for name in (MODELS if kind in cost_model.POINTS else ("",))
        }
        for j, kind in enumerate(FEATURES)
    }
    return CostModel(json.loads(json.dumps(fitted)))


def study(*overrides: str):
    models = f"models.architectures=[{', '.join(MODELS)}]"
    return load_config("configs/study.yaml", [models, "data.dataset=[fairface]", *overrides])


def coefficients(kind: str) -> tuple[float, ...]:
    """Of the model above, in the order of the kind's features."""
    place = list(FEATURES).index(kind) + 1
    return tuple((1.0 if name == "one" else 0.01) * (k + 1) * place for k, name in enumerate(FEATURES[kind]))


def of_batches(kind: str, *sizes: int) -> float:
    """Seconds of batches of so many images of 64 x 64 pixels."""
    one, image, image_pixels = coefficients(kind)
    return sum(one + image * size + image_pixels * size * 64**2 / 1e6 for size in sizes)


def only(costs, config, **identity):
    """The seconds of the one planned cell that is such."""
    (found,) = (
        seconds for cell, seconds in costs.cells(config) if all(getattr(cell, key) == identity[key] for key in identity)
    )
    return found


def test_a_baseline_by_hand(model):
    """FairFace, 64 px: 86,744 images, of which 10 % are for validation; 2 epochs in batches of 32, others of 128."""
    config = study("training.epochs=2", "deployment.latency=false", "deployment.cells=[]", "deployment.export=[]")
    assert split_sizes(config, "fairface") == (78_070, 8_674, 10_954)
    seconds = only(model, config, phase="baseline", model="mobilenet_v2")
    training = of_batches("training step", *[32] * 2439, 22)
    validation = of_batches("prediction, float", *[128] * 67, 98)
    test = of_batches("prediction, float", *[128] * 85, 74)
    (packing,) = coefficients("packing")
    assert seconds.on() == pytest.approx(2 * (training + validation) + test + packing)
    assert seconds.cpu == pytest.approx(packing)  # a GPU does the rest; of a calibration it leaves the fixed part
    assert model.step("ptq_static", "mobilenet_v2", 64, 10).cpu == pytest.approx(coefficients("ptq_static")[0])


def test_what_is_deployed_is_exported_and_run(model):
    none = study("deployment.latency=false", "deployment.cells=[]", "deployment.export=[]")
    exported = study("deployment.latency=false", "deployment.cells=[]", "deployment.export=['*:none:FP32']")
    run = study("deployment.latency=false", "deployment.cells=['*:none:FP32']", "deployment.export=[]")
    other = study("deployment.latency=false", "deployment.cells=['*:none:FP32']", "deployment.engines=[openvino]")
    plain, with_file, with_engine, with_other = (
        only(model, config, phase="baseline", model="resnet50") for config in (none, exported, run, other)
    )
    (export,) = coefficients("export, float")
    engine = of_batches("prediction, engine float", *[128] * 85, 74)
    assert with_file.on() - plain.on() == pytest.approx(export)
    assert with_engine.on() - plain.on() == pytest.approx(export + engine)
    assert with_engine.cpu - plain.cpu == pytest.approx(export + engine)  # ONNX Runtime runs on the CPU
    assert with_other.on() == pytest.approx(with_file.on())  # what other engines take was not measured


def test_latencies_are_measured_one_after_the_other_on_a_machine(model):
    """22 passes of an image and 7 of 32, two of each for warming up; also of the engine where one runs the cell."""
    quietly, measuring = study("deployment.latency=false"), study("deployment.latency_repeats=5")
    cells, kinds = dict(model.cells(measuring)), set()
    for cell, seconds in model.cells(quietly):
        way = {"none": "float", "ptq_dynamic": "dynamic"}.get(cell.method, "quantized")
        is_run = is_selected(cell, measuring.deployment.cells)
        ways = [way, f"engine {way}"] if is_run else [way]
        kinds.add((way, is_run))
        passes = sum(of_batches(f"prediction, {way}", *[1] * 22, *[32] * 7) for way in ways)
        assert cells[cell].on() == pytest.approx(seconds.on() + passes)
        assert model.alone(cell, quietly).on() == 0
    assert kinds == {("float", True), ("dynamic", False), ("quantized", True), ("quantized", False)}
    assert standing_still([1.0, 2.0, 3.0], 1, 8) == 0  # nobody else is there
    assert standing_still([1.0, 2.0, 3.0], 3, 8) == pytest.approx(4)  # each waits for the others' two thirds
    assert standing_still([1.0, 2.0, 3.0], 2, 1) == 0
    assert standing_still([1.0] * 64, 64, 8) == pytest.approx(8 - 1)


def test_predictions_grow_with_everything_and_shrink_with_speed(model):
    def total(*overrides: str, speedup: float = 1.0) -> float:
        return sum(seconds.on(speedup) for _, seconds in model.cells(study(*overrides)))

    base = total()
    assert total("data.fairface.image_size=128") > base
    assert total("data.fairface.max_train=1000") < base and total("data.fairface.max_test=100") < base
    assert total("run.seeds=[0, 1]") == pytest.approx(2 * base)
    assert total("training.epochs=9") > base and total("quantization.qat.epochs=5") > base
    assert total("quantization.ptq_static.reconstruction_iterations=900") > base
    assert total("quantization.ptq_static.calibration_samples=2000") > base
    assert base > total(speedup=10) > total(speedup=1000) > 0
    cpu = sum(seconds.cpu for _, seconds in model.cells(study()))
    assert total(speedup=1e12) == pytest.approx(cpu)


def test_every_cell_of_the_study_has_a_cost_and_a_task(model):
    costs = model.cells(study())
    assert {cell.strategy for cell, _ in costs} > {"group_dro", "sensitive_layers", "threshold_adjustment"}
    assert all(seconds.on() > 0 for _, seconds in costs)
    tasks = tasks_of(costs, lambda name: 1.0, 10.0)
    assert len(tasks) == len(costs) + 1 and tasks[-1].seconds == 10.0
    makespans = [schedule(tasks, workers).makespan for workers in (1, 4, 64)]
    assert makespans[0] == pytest.approx(sum(task.seconds for task in tasks))
    assert makespans[0] > makespans[1] > makespans[2] >= critical_path(tasks)[0] - 1e-6


def test_what_cells_share_is_paid_once(model):
    """A table of sensitivities, and the pass of the calibration images, in batches of 64."""
    plain = ("mitigation.strategies=[]", "deployment.cells=[]", "deployment.export=[]", "deployment.latency=false")
    config = study("quantization.methods=[mixed_precision]", "quantization.bit_widths=[4, 8]", *plain)
    first, second = (seconds for cell, seconds in model.cells(config) if cell.model == MODELS[0] and cell.baseline_cell)
    samples = config.quantization.mixed_precision
    table = model.step("sensitivity", MODELS[0], 64, samples.sensitivity_samples).on()
    passed = of_batches("observation", *[64] * (samples.calibration_samples // 64))
    assert samples.calibration_samples % 64 == 0 and first.on() - second.on() == pytest.approx(table + passed)

    def passes(*settings: str) -> int:
        config = study("quantization.methods=[ptq_static]", "quantization.bit_widths=[4, 8]", *settings, *plain[1:])
        cells = [cell for cell, _ in model.cells(config) if cell.baseline_cell]
        paid: set = set()
        alone = sum(model.cell(cell, config).on() for cell in cells)
        return round((alone - sum(model.cell(cell, config, paid).on() for cell in cells)) / passed)

    assert passes("mitigation.strategies=[]") == len(MODELS)  # one of two
    # a balanced draw is another one, a plain draw is not
    assert passes("mitigation.strategies=[bias_aware_calibration]") == 2 * len(MODELS)
    assert passes("mitigation.strategies=[group_weighted_observers]") == 3 * len(MODELS)


def test_a_gpus_cells_have_processes_of_their_own(model):
    costs = model.cells(study())
    tasks = [tasks_of(costs, lambda name: 2.0, 10.0, start) for start in (0.0, 3.0)]
    for (_, seconds), plain, started in zip(costs, *tasks, strict=False):
        assert plain.seconds == pytest.approx(seconds.on(2.0)) and started.seconds == pytest.approx(3 + plain.seconds)
    assert model.start() == coefficients("start")[0] and tasks[1][-1].seconds == 10.0


def test_every_kind_is_really_measured(monkeypatch):
    """One point each, of the smallest network."""
    monkeypatch.setattr(cost_model, "POINTS", {kind: ((32, 8),) for kind in cost_model.POINTS})
    monkeypatch.setattr(cost_model, "REPEATS", 1)
    found = {each.kind: each for each in cost_model.measured("squeezenet1_1", list(FEATURES))}
    assert found.keys() == FEATURES.keys() - {"start", "analysis"}
    assert all((each.image_size, each.images) == (32, 8) for each in found.values())
    differences = {"training step", "qat step", "reconstruction iteration"}  # of times, which may come out the same
    assert all(each.seconds > 0 for kind, each in found.items() if kind not in differences)


def test_every_kind_can_be_told_from_its_points():
    """As many measurements that are fitted as costs at least, and one that is held out."""
    for kind, points in cost_model.POINTS.items():
        seconds = iter(range(1, 99))
        taken = [Measurement(kind, "net", *(*point, 2)[:3], next(seconds)) for point in points]
        assert fit(taken)[kind]["net"]["is_determined"], kind
        assert len(fit(taken)[kind]["net"]["held_out"]) == 1, kind


def test_a_run_is_compared_with_what_was_predicted_of_it(model, tmp_path, capsys):
    config = study("run.threads_per_cell=1", "run.seeds=[0]")
    Store(tmp_path).prepare(dump_config(config))
    log, costs = RunLog(Store(tmp_path)), model.cells(config)
    baselines = [(cell, seconds.on()) for cell, seconds in costs if cell.phase == "baseline"]
    for place, (cell, seconds) in enumerate(baselines):
        entry = {"cell": cell.id, "phase": "baseline", "start": float(place), "status": "done"}
        log.record({**entry, "status": "failed", "seconds": 1e9})
        log.record({**entry, "seconds": seconds / (1 + place)})
        log.record({**entry, "seconds": 1e9, "again": True})  # only its deployment was made again
    assert check(tmp_path, model) == 0
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    first, second = (seconds for _, seconds in baselines)
    said, took = first + second, first + second / 2
    assert lines["| all"] == f"| all | 2 | {took:.0f} | {said:.0f} | {said / took:.2f} | 50% | 1.00 |"
    assert lines["| baseline"] == lines["| all"].replace("all", "baseline")
    assert lines[f"| {baselines[1][0].model}"].endswith(f"| 2.00 | 100% | {2 * took / said:.2f} |")
    assert check_of_an_empty_folder(tmp_path / "empty", model, config) == 2


def check_of_an_empty_folder(folder, model, config) -> int:
    folder.mkdir()
    Store(folder).prepare(dump_config(config))
    return check(folder, model)


@pytest.mark.parametrize("name", ["config", "study"])
def test_the_costs_that_come_with_the_program_price_its_studies(name):
    model, config = CostModel.read(cost_model.ROOT / cost_model.OUTPUT), load_config(f"configs/{name}.yaml", [])
    costs = model.cells(config)
    assert all(seconds.on() > seconds.on(40.0) > 0 for _, seconds in costs) and model.start() > 0
    assert 0 < model.analysis([cell for cell, _ in costs], config) < sum(seconds.on() for _, seconds in costs)
