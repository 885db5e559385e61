"""--status: counts, times and estimates against those worked out by hand; and what a plain run, --retry-failed and
--keep-failed do with cells that failed."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cheap_run import command, fork, run_here, write_config
from fake_study import small_config, write_study

import main
from execution.executors import lost_attempt
from execution.run_log import KEYS, RunLog
from owners import Owner, utc
from phases import complete
from phases.status import OUT_OF_DATE, TO_DO, UNKNOWN, UP_TO_DATE, analysis_inputs, duration, study_status
from plan import plan
from store import Store

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
CONFIG = small_config("deployment.cells=[]", "deployment.export=[]", seeds=(0, 1))


def counts(status: dict, phase: str) -> list[int]:
    return [status["phases"][phase][key] for key in ("cells", "done", "failed", "running", "to_do")]


def logged(store: Store, **seconds: float) -> None:
    for cell, value in seconds.items():
        RunLog(store).record({"cell": cell, "status": "done", "seconds": value})


@pytest.fixture
def half(tmp_path) -> tuple[Store, dict]:
    """Two models, two seeds: 4 baselines, 8 quantized (W8A8 and W4A4 of each), 8 repaired. Seed 1 of MobileNetV2 is not
    trained, the W4A4 cell of seed 0 of ResNet-50 has failed, nothing of seed 1 is quantized, and nothing repaired."""
    cells = plan(CONFIG)
    quantized = {(c.model, c.seed, c.weight_bits): c.id for c in cells["quantization"]}
    skip = [c.id for c in cells["baseline"] if (c.model, c.seed) == ("mobilenet_v2", 1)]
    skip += [cell for (_, seed, _), cell in quantized.items() if seed == 1]
    skip += [c.id for c in cells["mitigation"]]
    store, _ = write_study(tmp_path / "results", CONFIG, n=40, skip=skip, fail=[quantized["resnet50", 0, 4]])
    return store, {**quantized, **{(c.model, c.seed): c.id for c in cells["baseline"]}}


def test_counts_times_and_the_error(half):
    store, cell = half
    logged(store, **{cell["resnet50", 0]: 100.0, cell["resnet50", 1]: 110.0, cell["mobilenet_v2", 0]: 40.0})
    logged(store, **{cell["resnet50", 0, 8]: 6.0, cell["mobilenet_v2", 0, 8]: 3.0, cell["mobilenet_v2", 0, 4]: 5.0})
    failed = cell["resnet50", 0, 4]
    RunLog(store).record({"cell": failed, "status": "failed", "seconds": 50.0, "error": "RuntimeError: broke"})
    status = study_status(CONFIG, store, NOW)
    assert counts(status, "baseline") == [4, 3, 0, 0, 1]
    assert counts(status, "quantization") == [8, 3, 1, 0, 4]
    assert counts(status, "mitigation")[1:] == [0, 0, 0, len(plan(CONFIG)["mitigation"])]
    baseline, quantization, mitigation = (status["phases"][phase] for phase in plan(CONFIG))
    assert baseline["seconds_spent"] == 250.0 and baseline["seconds_left"] == 40.0  # as the other MobileNetV2
    # a failed cell's seconds are spent, but tell nothing of how long cells take: 2 of 6 s, 2 of (3 + 5) / 2
    assert quantization["seconds_spent"] == 64.0 and quantization["seconds_left"] == 2 * 6.0 + 2 * 4.0
    assert mitigation["seconds_spent"] is None and mitigation["seconds_left"] is None  # not known, and not 0
    assert mitigation["cells_of_unknown_length"] == len(plan(CONFIG)["mitigation"])
    (told,) = status["failed"]
    error = "RuntimeError: <script>alert(1)</script> broke"
    assert told == {"cell": failed, "phase": "quantization", "error": error, "because_of": None}
    assert status["run"] is None and status["at_a_time"] == 1


def test_an_attempt_that_was_lost_is_time_spent_and_tells_nothing_of_how_long_cells_take(half):
    """Also of a cell that has no record yet, since it is being tried again."""
    store, cell = half
    logged(store, **{cell["resnet50", 0]: 100.0, cell["mobilenet_v2", 0]: 40.0})
    for name in (cell["resnet50", 0], cell["mobilenet_v2", 1]):
        attempt = next(c for c in plan(CONFIG)["baseline"] if c.id == name)
        RunLog(store).record(lost_attempt(attempt, "its worker was killed", time.time() - 18_000, worker="vm:1"))
    entries = RunLog(store).read()
    assert [entry["status"] for entry in entries] == ["done", "done", "lost", "lost"]
    assert tuple(entries[2]) == KEYS and entries[2]["phase"] == entries[3]["phase"] == "baseline"
    spent = sum(entry["seconds"] for entry in entries[2:])
    status = study_status(CONFIG, store, NOW)
    assert counts(status, "baseline") == [4, 3, 0, 0, 1]
    assert status["phases"]["baseline"]["seconds_spent"] == pytest.approx(140.0 + spent)
    assert status["phases"]["baseline"]["seconds_left"] == 40.0  # as the other MobileNetV2
    assert status["log"] == {"records": 4, "damaged_lines": 0}


def test_without_a_log_nothing_is_invented(half):
    status = study_status(CONFIG, half[0], NOW)
    for phase in plan(CONFIG):
        assert status["phases"][phase]["seconds_spent"] is None and status["phases"][phase]["seconds_left"] is None


def test_the_closest_kin_is_asked(half):
    """The same data set, model and method; else the same model and method; else the model; else the phase."""
    from phases.status import _Durations

    store = half[0]
    cells = plan(CONFIG)["quantization"]
    one = cells[0]
    kin = {
        "other": dataclasses.replace(one, id="other", model="vit", method="qat"),
        "model": dataclasses.replace(one, id="model", method="qat"),
        "method": dataclasses.replace(one, id="method", dataset="celeba"),
        "same": dataclasses.replace(one, id="same", seed=7),
    }
    entries = []
    for seconds, name in zip((1000.0, 100.0, 10.0, 1.0), kin, strict=True):
        entries.append({"cell": name, "phase": "quantization", "status": "done", "seconds": seconds})
        known = _Durations(entries, {"quantization": list(kin.values())}, store)
        assert known.of(one) == seconds  # of the closest alone, though each of them is also of the phase
    assert known.of(dataclasses.replace(one, model="resnet18", dataset="utkface")) == (1000 + 100 + 10 + 1) / 4
    assert known.of(dataclasses.replace(one, phase="mitigation")) is None
    # what a finished cell got that it lacked tells nothing of whole cells, and the other way round
    assert known.of(one, again=True) is None
    again = _Durations(
        [*entries, {**entries[-1], "seconds": 0.1, "again": True}], {"quantization": [*kin.values()]}, store
    )
    assert again.of(one) == 1.0 and again.of(one, again=True) == 0.1


def test_a_running_cell_and_two_at_a_time(half):
    store, cell = half
    logged(store, **{cell["mobilenet_v2", 0]: 40.0, cell["mobilenet_v2", 0, 8]: 30.0, cell["resnet50", 0, 8]: 9.0})
    me = dataclasses.replace(Owner.this_process(), since=utc(NOW - timedelta(seconds=10)))
    for name in (cell["mobilenet_v2", 1, 8], cell["mobilenet_v2", 1, 4]):
        (store.root / "running" / f"{name}.json").write_text(json.dumps(dataclasses.asdict(me)))
    (store.root / ".lock.json").write_text(json.dumps(dataclasses.asdict(me)))
    gone = dataclasses.replace(me, birth="another-boot:1")
    (store.root / "running" / f"{cell['resnet50', 1, 8]}.json").write_text(json.dumps(dataclasses.asdict(gone)))
    status = study_status(CONFIG, store, NOW)
    assert counts(status, "quantization") == [8, 3, 1, 2, 2]
    assert status["at_a_time"] == 2 and status["run"]["pid"] == os.getpid()
    assert [entry["seconds"] for entry in status["running"]] == [10.0, 10.0]
    assert status["phases"]["quantization"]["seconds_left"] == (2 * (30 - 10) + 2 * 9) / 2
    late = study_status(CONFIG, store, NOW + timedelta(hours=1))
    assert late["phases"]["quantization"]["seconds_left"] == 2 * 9 / 2  # later than usual is not less than nothing


def test_the_last_cells_of_a_phase_do_not_make_the_run_a_slow_one(half):
    """Four at a time, of which one long one is left: the next phase will have four at a time again."""
    store, cell = half
    run = dataclasses.replace(Owner.this_process(), since=utc(NOW - timedelta(seconds=100)))
    (store.root / ".lock.json").write_text(json.dumps(dataclasses.asdict(run)))
    logged(store, **{cell["mobilenet_v2", 0]: 40.0, cell["mobilenet_v2", 0, 8]: 30.0, cell["resnet50", 0, 8]: 9.0})
    log = RunLog(store)
    for name, seconds in ((cell["mobilenet_v2", 0, 8], 30.0), (cell["resnet50", 0, 8], 9.0)):
        for _ in range(2):  # before this run too, which does not count; and one after the other, which counts as one
            log.record({"cell": name, "status": "done", "start": 100.0, "end": 400.0, "seconds": seconds})
    start = (NOW - timedelta(seconds=90)).timestamp()
    for name in (cell["mobilenet_v2", 0, 8], cell["resnet50", 0, 8], cell["mobilenet_v2", 0]):
        log.record({"cell": name, "status": "failed", "start": start, "end": start + 10, "seconds": 10.0})
        log.record({"cell": name, "status": "failed", "start": start + 10, "end": start + 20, "seconds": 10.0})
    last = dataclasses.replace(run, since=utc(NOW - timedelta(seconds=89)))
    (store.root / "running" / f"{cell['mobilenet_v2', 1, 8]}.json").write_text(json.dumps(dataclasses.asdict(last)))
    status = study_status(CONFIG, store, NOW)
    assert len(status["running"]) == 1 and status["at_a_time"] == 4
    left = (0 + 30 + 3 * 9) / 4
    assert status["phases"]["quantization"]["seconds_left"] == max(left, 30)  # the longest takes as long as it takes


def test_between_two_runs_on_a_cluster_its_places_are_those_of_the_runs_before(half):
    store, cell = half
    cluster = ("deployment.cells=[]", "deployment.export=[]", "run.executor=ray")
    for overrides, expected in ((("run.address=10.0.0.1:6379",), 1), (("run.jobs=2",), 2)):
        assert study_status(small_config(*cluster, *overrides, seeds=(0, 1)), store, NOW)["at_a_time"] == expected
    for name in (cell["mobilenet_v2", 0], cell["mobilenet_v2", 0, 8], cell["resnet50", 0, 8]):
        RunLog(store).record({"cell": name, "status": "done", "start": 100.0, "end": 130.0, "seconds": 30.0})
    for overrides, expected in ((("run.address=10.0.0.1:6379",), 3), (("run.jobs=2",), 2)):
        status = study_status(small_config(*cluster, *overrides, seeds=(0, 1)), store, NOW)
        assert status["run"] is None and status["at_a_time"] == expected
        assert status["phases"]["quantization"]["seconds_left"] == 4 * 30 / expected


def test_a_cell_of_another_machine_runs_as_long_as_its_run_does(half):
    store, cell = half
    afar = dataclasses.replace(Owner.this_process(), host="node17")
    (store.root / "running" / f"{cell['resnet50', 1, 8]}.json").write_text(json.dumps(dataclasses.asdict(afar)))
    assert counts(study_status(CONFIG, store, NOW), "quantization")[3] == 0
    (store.root / ".lock.json").write_text(json.dumps(dataclasses.asdict(Owner.this_process())))
    assert counts(study_status(CONFIG, store, NOW), "quantization")[3] == 1


def test_a_run_that_was_killed_is_told_of(half, tmp_path, capsys):
    dead = dataclasses.replace(Owner.this_process(), birth="another-boot:1", command="python main.py --phase all")
    (half[0].root / ".lock.json").write_text(json.dumps(dataclasses.asdict(dead)))
    status = study_status(CONFIG, half[0], NOW)
    assert status["run"] is None and status["died"]["pid"] == os.getpid()
    assert main.main(["--status", "--results-dir", str(half[0].root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{half[0].root}: no run in progress"
    assert lines[1].startswith(f"the last one was killed: process {os.getpid()} on ")
    assert lines[1].endswith("(python main.py --phase all); the same command goes on")


@pytest.mark.parametrize("spelt", ["--fresh", "--fre"])
def test_a_fresh_run_that_was_killed_goes_on_without_clearing_again(spelt, tmp_path, capsys):
    """Killed in its third cell; the command that is told keeps the two finished ones."""
    config, results = write_config(tmp_path, seeds=1), tmp_path / "a folder"
    assert run_here(config, results) == 0
    names = [cell.id for cell in plan(main.load_config(config))["baseline"]]

    def run() -> int:
        sys.argv = ["main.py", *command(config, results, spelt)]  # what the lock tells of the command
        return run_here(config, results, spelt, event=lambda cell, computed, store: stops(computed))

    def stops(computed: int) -> None:
        if computed == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = fork(tmp_path / "killed", run)
    assert child.wait() == -signal.SIGKILL
    finished = {name: Store(results).record_path(name).stat().st_mtime_ns for name in names[:2]}
    capsys.readouterr()
    assert main.main(["--status", "--config", str(config), "--results-dir", str(results)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    told, _, again = line.partition("; to go on, without --fresh: ")
    assert told.endswith(f"{spelt})") and "the same command" not in line
    words = shlex.split(again)
    assert words == ["python", "main.py", *command(config, results)]
    assert main.main(["--status", "--json", "--config", str(config), "--results-dir", str(results)]) == 0
    assert json.loads(capsys.readouterr().out)["died"]["goes_on_with"] == again
    assert run_here(config, results) == 0
    assert {name: Store(results).record_path(name).stat().st_mtime_ns for name in names[:2]} == finished
    assert Store(results).is_done(names[2])


@pytest.mark.parametrize("command", [None, "python main.py 'torn", "python main.py --set results_dir=--fresh"])
def test_another_command_goes_on_as_it_is(command, half, capsys):
    dead = dataclasses.replace(Owner.this_process(), birth="another-boot:1", command=command)
    (half[0].root / ".lock.json").write_text(json.dumps(dataclasses.asdict(dead)))
    assert study_status(CONFIG, half[0], NOW)["died"]["goes_on_with"] == command
    assert main.main(["--status", "--results-dir", str(half[0].root)]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("; the same command goes on")


def test_what_failed_with_its_baseline_is_counted_and_not_listed(tmp_path, capsys):
    cells = plan(CONFIG)
    (baseline,) = (c.id for c in cells["baseline"] if (c.model, c.seed) == ("resnet50", 0))
    made = [c.id for c in (*cells["quantization"], *cells["mitigation"]) if c.baseline_cell == baseline]
    store, _ = write_study(tmp_path / "results", CONFIG, n=40, fail=[baseline, *made])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    capsys.readouterr()
    main.main(["--status", "--config", str(tmp_path / "config.json"), "--results-dir", str(store.root)])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert len(made) > 2 and len(told) == 1
    assert told[0].startswith(f"failed: {baseline} (and {len(made)} cells made from it): RuntimeError: ")


def failing(store: Store, cell: str, **extra) -> None:
    record = store.record(cell)
    store.write_cell(record["row"], record["groups"], {**record["extra"], **extra})


def test_what_a_finished_cell_lacks_because_it_failed_is_a_failure(half):
    """By engine; with other settings, or not asked for, it has not failed."""
    store, cell = half
    name, baseline = cell["mobilenet_v2", 0, 8], cell["mobilenet_v2", 0]
    asked = ("deployment.cells=['*:*:8', '*:none']", "mitigation.diagnostics.cells='*:*:8'")
    config = small_config(*asked, "deployment.export=[]", seeds=(0, 1))
    (quantized,) = (c for c in plan(config)["quantization"] if c.id == name)
    lacking = study_status(config, store, NOW)
    assert len(lacking["failed"]) == 1 and name not in str(lacking["failed"])  # nobody has tried
    rows = [{"engine": engine, "status": "failed", "error": f"no {engine}"} for engine in ("onnxruntime", "openvino")]
    settings = complete.deployment_settings(config)
    failing(
        store, name, deployment=rows, deployment_settings=settings,
        diagnostics_failure={"settings": complete.diagnosis_settings(quantized, config), "error": "no slopes"},
    )  # fmt: skip
    failing(store, baseline, deployment=rows[:1], deployment_settings=settings)
    status = study_status(config, store, NOW)
    told = {each["cell"]: each for each in status["failed"]}
    error = "deployment failed: onnxruntime: no onnxruntime; diagnostics failed: no slopes"
    assert told[name] == {"cell": name, "phase": "quantization", "error": error, "because_of": None}
    assert told[baseline]["error"] == "deployment failed: onnxruntime: no onnxruntime" and len(told) == 3
    before, after = (each["phases"]["quantization"] for each in (lacking, status))
    assert (after["failed"], after["to_do"]) == (before["failed"] + 1, before["to_do"] - 1)
    assert sum(after[key] for key in ("done", "failed", "running", "to_do")) == after["cells"]

    def errors(*overrides: str) -> list[str]:
        other = small_config(*asked, "deployment.export=[]", *overrides, seeds=(0, 1))
        return [each["error"] for each in study_status(other, store, NOW)["failed"] if each["cell"] == name]

    assert errors("deployment.provider=cuda") == ["diagnostics failed: no slopes"]
    assert errors("mitigation.diagnostics.samples=7") == ["deployment failed: onnxruntime: no onnxruntime"]
    assert errors("deployment.provider=cuda", "mitigation.diagnostics.samples=7") == []
    assert errors("deployment.cells=[]", "mitigation.diagnostics.cells=[]") == []


def test_a_cell_does_not_fail_because_its_baseline_could_not_be_deployed(half):
    store, cell = half
    config = small_config("deployment.cells='*:none'", "deployment.export=[]", seeds=(0, 1))
    rows = [{"engine": "onnxruntime", "status": "failed", "error": "no kernel"}]
    failing(store, cell["resnet50", 0], deployment=rows, deployment_settings=complete.deployment_settings(config))
    told = {each["cell"]: each for each in study_status(config, store, NOW)["failed"]}
    assert told.keys() == {cell["resnet50", 0], cell["resnet50", 0, 4]}
    assert [each["because_of"] for each in told.values()] == [None, None]


def test_a_damaged_record_is_named_with_what_to_do(half):
    store, cell = half
    store.record_path(cell["resnet50", 0, 8]).write_bytes(b'{"row": ')
    status = study_status(CONFIG, store, NOW)
    assert counts(status, "quantization") == [8, 2, 2, 0, 4]
    assert any("delete it" in told["error"] for told in status["failed"])


def test_the_analysis_is_up_to_date_only_with_what_it_was_made_of(half):
    store, cell = half
    state = lambda config=CONFIG: study_status(config, store, NOW)["analysis"]["state"]  # noqa: E731
    assert state() == TO_DO
    store.analysis.mkdir()
    (store.analysis / "summary.md").write_text("")
    assert state() == UNKNOWN
    entry = {"phase": "analysis", "status": "done", "seconds": 12.0, "inputs": analysis_inputs(CONFIG, store)}
    RunLog(store).record(entry)
    assert state() == UP_TO_DATE
    assert study_status(CONFIG, store, NOW)["analysis"]["seconds_spent"] == 12.0
    busy = {"executor": CONFIG.run.executor, "jobs": 3}
    assert state(CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update=busy)})) == UP_TO_DATE
    other = CONFIG.model_copy(update={"analysis": CONFIG.analysis.model_copy(update={"confidence": 0.9})})
    assert state(other) == OUT_OF_DATE
    assert state(small_config("deployment.cells=[]", "deployment.export=[]", seeds=(0,))) == OUT_OF_DATE
    record = store.record(cell["resnet50", 0])
    changed = {**record["row"], "accuracy": 0.5}
    store.write_cell(changed, record["groups"], record["extra"])
    assert state() == OUT_OF_DATE
    store.write_cell(record["row"], record["groups"], record["extra"])
    assert state() == UP_TO_DATE  # the same bytes
    store.predictions_path(cell["resnet50", 0]).unlink()
    assert state() == OUT_OF_DATE
    with store.mark_running("analysis"):
        assert state() == "running" and study_status(CONFIG, store, NOW)["running"] == []


def test_a_cut_off_model_file_is_something_to_do(half):
    store, cell = half
    config = small_config("deployment.cells=[]", "deployment.export=['*:*:8']", seeds=(0, 1))
    name = cell["resnet50", 0, 8]
    (found,) = (c for c in plan(config)["quantization"] if c.id == name)
    record = store.record(name)
    store.write_cell(record["row"], record["groups"], {**record["extra"], "model_bytes": 5})
    for content, what in ((None, "deploy"), (b"12345", None), (b"1234", "deploy"), (b"", "deploy")):
        if content is not None:
            store.model_path(name).write_bytes(content)
        assert complete.missing(found, config, store) == what


def test_what_another_run_clears_meanwhile_is_not_there(tmp_path, monkeypatch):
    """--fresh comes before each look at a file in turn: also between the one that finds it and that which reads it."""
    config = small_config("deployment.cells=[]", "deployment.export=['*:*:8']", models=("resnet50",))
    whole, planned = write_study(tmp_path / "whole", config, n=40)
    names = [cell.id for cells in planned.values() for cell in cells]
    for name in names:
        failing(whole, name, model_bytes=5)
        whole.model_path(name).write_bytes(b"12345")
    whole.analysis.mkdir()
    (whole.analysis / "summary.md").write_text("")
    entry = {"phase": "analysis", "status": "done", "seconds": 12.0, "inputs": analysis_inputs(config, whole)}
    RunLog(whole).record(entry)
    to_go = math.inf  # looks until --fresh comes
    store = whole

    def looking(look):
        def looks(path, *arguments, **options):
            nonlocal to_go
            to_go -= 1
            if to_go == 0:
                store.clear(names)
            return look(path, *arguments, **options)

        return looks

    def asks(store: Store) -> None:
        """What --status and --dry-run do."""
        status = study_status(config, store, NOW)
        states.add(status["analysis"]["state"])
        for numbers in status["phases"].values():
            assert sum(numbers[key] for key in ("done", "failed", "running", "to_do")) == numbers["cells"]
        assert status["failed"] == []
        for cells in planned.values():
            for cell in cells:
                complete.missing(cell, config, store)

    states: set[str] = set()
    monkeypatch.setattr(Path, "stat", looking(Path.stat))
    monkeypatch.setattr(Path, "open", looking(Path.open))
    to_go = looks = 10_000
    asks(whole)
    looks -= to_go
    assert looks > 10 * len(names) and states == {UP_TO_DATE}
    for moment in range(1, looks + 1):
        to_go = math.inf
        store = Store(shutil.copytree(whole.root, tmp_path / str(moment)))
        to_go = moment
        asks(store)
        assert to_go <= 0 and not list(store.root.glob("cells/*"))
    assert states == {UP_TO_DATE, OUT_OF_DATE}


def test_a_finished_cell_that_lacks_its_file_is_expected_to_take_what_such_cells_took(half):
    store, cell = half
    config = small_config("deployment.cells=[]", "deployment.export=['*:*:8']", seeds=(0, 1))
    finished, to_do = cell["resnet50", 0, 8], cell["resnet50", 1, 8]
    assert store.is_done(finished) and store.record(to_do) is None
    logged(store, **{cell["mobilenet_v2", 0, 8]: 100.0})
    RunLog(store).record({"cell": cell["mobilenet_v2", 0, 8], "status": "done", "seconds": 7.0, "again": True})
    left = study_status(config, store, NOW)["phases"]["quantization"]
    first = study_status(CONFIG, store, NOW)["phases"]["quantization"]
    lacking = left["to_do"] - first["to_do"]
    assert lacking == 2 and left["seconds_left"] == first["seconds_left"] + lacking * 7.0
    assert first["seconds_left"] == first["to_do"] * 100.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "not known"), (0.0, "-"), (7.25, "7.2 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"), (90_000, "1 d 01 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


# ----------------------------------------------------------------------------------------------------- the command line


def test_it_imports_no_torch_writes_nothing_and_needs_no_results(tmp_path):
    config = write_config(tmp_path, seeds=1)
    code = (
        f"import sys, main; status = main.main(['--status', '--config', {str(config)!r}, '--results-dir', "
        f"{str(tmp_path / 'none')!r}]); sys.exit(status or 3 * ('torch' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no run in progress" in result.stdout and "not known" in result.stdout
    assert not (tmp_path / "none").exists()


def test_what_is_done_with_cells_that_failed(tmp_path, capsys):
    """Six cells of which the second and the third fail and the last two are not tried: by default a run computes the
    four; --retry-failed the two that failed; --keep-failed the two others."""
    config, results = write_config(tmp_path, seeds=2), tmp_path / "results"
    names = [cell.id for cell in plan(main.load_config(config))["baseline"]]
    tried = []

    def tries(*broken: int, stop: int = 99):
        def event(cell, computed, store):
            tried.append(names.index(cell))
            if tried[-1] == stop:
                raise KeyboardInterrupt
            if tried[-1] in broken:
                raise RuntimeError("no luck")

        return event

    def run(*arguments, event=None) -> list[int]:
        tried.clear()
        run.status = run_here(config, results, *arguments, event=event or tries())
        return list(tried)

    assert run(event=tries(1, 2, stop=4)) == [0, 1, 2, 3, 4] and run.status == 130
    assert run("--keep-failed", event=tries(stop=5)) == [4, 5] and run.status == 130
    assert "2 left as they are" in capsys.readouterr().out
    assert run("--retry-failed", event=tries(2)) == [1, 2] and run.status == 1
    told = capsys.readouterr()
    assert f"failed: {names[2]}: RuntimeError: no luck" in told.out and "1 left as they are" in told.out
    assert run("--retry-failed") == [2] and run.status == 0
    assert run("--retry-failed") == [] and run.status == 0
    assert "no cell of these phases has failed" in capsys.readouterr().out
    assert run() == [5] and run.status == 0
    assert run("--fresh", event=tries(0)) == [0, 1, 2, 3, 4, 5] and run.status == 1
    assert run() == [0] and run.status == 0


def test_a_failed_baseline_that_is_kept_keeps_its_record(tmp_path, monkeypatch, capsys):
    """In the phase itself, which makes baselines without a checkpoint anew."""
    config, results = write_config(tmp_path, seeds=1), tmp_path / "results"

    def fails(cell, report, **context):
        raise RuntimeError("diverged")

    monkeypatch.setattr("phases.baseline.compute", fails)
    command = ["--phase", "baseline", "--config", str(config), "--results-dir", str(results), "--device", "cpu"]
    assert main.main(command) == 1
    before = {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    assert len(before) == 3
    assert main.main([*command, "--keep-failed"]) == 1  # they still are failed
    assert {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()} == before
    assert "3 cells failed" in capsys.readouterr().out.splitlines()[-1]


def test_status_on_the_screen(half, tmp_path, capsys):
    store, cell = half
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.model_dump(mode="json")))
    logged(store, **{cell["resnet50", 0]: 4000.0, cell["resnet50", 1]: 4000.0, cell["mobilenet_v2", 0]: 100.0})
    with (store.root / "log.jsonl").open("a") as file:
        file.write('{"cell": "to')
    assert main.main(["--status", "--config", str(config), "--results-dir", str(store.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (baseline,) = (line for line in lines if line.startswith("baseline"))
    assert baseline.split() == ["baseline", "4", "3", "0", "0", "1", "2", "h", "15", "min", "1", "min", "40", "s"]
    assert f"failed: {cell['resnet50', 0, 4]}: RuntimeError: <script>alert(1)</script> broke" in lines
    assert "log.jsonl: 1 damaged lines are left out" in lines and "analysis: to do" in lines
    with pytest.raises(SystemExit) as stop:
        main.main(["--config", str(config)])
    assert stop.value.code == 2
