"""Cells on one process, on workers and on Ray: the same files, and what becomes of a worker that is killed or late.

The computations that fail on purpose are functions of this module, which the workers import.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import mmap
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

try:
    import fcntl
except ImportError:
    fcntl = None

import image_cache
import main
from benchmarks import dry_cluster
from benchmarks.schedule import schedule
from config import ConfigError, dump_config, load_config
from execution import cells, executors, memory, quiet, ray_executor
from execution.cells import (
    CellResult,
    Job,
    compute_cell,
    is_out_of_memory,
    is_poisoned,
    peak_memory_mb,
    reset_peak_memory,
)
from execution.executors import Clock, Processes, Serial, chosen, gpus_of_jobs, open_executor
from execution.run_lock import only_run, owner_of, record_of
from execution.run_log import RunLog
from phases.baseline import DatasetCache
from plan import Cell, plan
from runner import Report, run_cells
from store import TIMING_COLUMNS, Store, StoreError

ROOT = Path(__file__).parent.parent
TINY = {
    "data": {
        "dataset": "synthetic",
        "min_group_size": 5,
        "synthetic": {
            "target": "smile",
            "sensitive": ["gender", "skin"],
            "train_images": 96,
            "validation_images": 32,
            "test_images": 64,
        },
    },
    "models": {"architectures": ["squeezenet1_1"]},
    "training": {"epochs": 1},
    "quantization": {
        "bit_widths": [8, 4],
        "methods": [
            "ptq_static",
            {"method": "qat", "bit_widths": [4], "epochs": 1, "max_train": 32},
            {"method": "mixed_precision", "sensitivity_samples": 8, "calibration_samples": 16},
        ],
        "ptq_static": {"calibration_samples": 32},
        "qat": {"calibration_samples": 32},
    },
    "mitigation": {
        "bias_aware_calibration": {"calibration_samples": 32},
        "strategies": [
            "bias_aware_calibration",
            {"strategy": "fair_mixed_precision", "sensitivity_samples": 16, "calibration_samples": 16},
        ],
    },
    "analysis": {"bootstrap_replicates": 100},
    "deployment": {"cells": [], "export": [], "latency_repeats": 1},
    "run": {"threads_per_cell": 1, "seeds": [0, 1]},
}
ENTRY = {"cell", "phase", "status", "start", "end", "seconds", "peak_memory_mb", "worker", "error", "traceback"}


# -------------------------------------------------------------------------------------------------- the same everywhere


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = {**TINY, "data": {**TINY["data"], "cache": str(folder / "cache")}}
    (folder / "tiny.yaml").write_text(json.dumps(config))
    return folder / "tiny.yaml"


def study(config: Path, results: Path, *overrides: str) -> None:
    for phase in ("baseline", "quantization", "mitigation"):
        arguments = ["--phase", phase, "--config", str(config), "--results-dir", str(results), "--device", "cpu"]
        assert main.main([*arguments, *(("--set", *overrides) if overrides else ())]) == 0


@pytest.fixture(scope="module")
def serial(tiny) -> Path:
    study(tiny, tiny.parent / "serial")
    return tiny.parent / "serial"


def contents(results: Path) -> dict[str, bytes]:
    """Every file that holds a result, without measured times; and what the records say but for those."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.parent.name == "shared":  # has the seconds that it took
            continue
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            timed = [column for column in (*TIMING_COLUMNS, "seconds") if column in table]
            found[name] = table.drop(columns=timed).to_csv(index=False).encode()
        elif path.suffix in (".npz", ".safetensors", ".onnx"):
            found[name] = path.read_bytes()
        elif path.parent.name == "cells":
            record = without_times(json.loads(path.read_text()))
            found[name] = json.dumps(record).encode()
    return found


def shared_by_cells(results: Path) -> set[str]:
    """The measurements that cells have of one another."""
    return {path.name for path in (results / "shared").iterdir() if path.suffix != ".lock"}


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in (*TIMING_COLUMNS, "seconds")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_two_workers_write_the_files_of_one_process(tiny, serial, capsys):
    capsys.readouterr()
    study(tiny, tiny.parent / "processes", "run.executor=processes", "run.jobs=2")
    ours, theirs = contents(tiny.parent / "processes"), contents(serial)
    kinds = pd.Series([Path(name).suffix for name in theirs]).value_counts()
    assert (kinds[".json"], kinds[".npz"], kinds[".safetensors"]) == (20, 20, 2) and kinds[".csv"] >= 4
    assert shared_by_cells(serial) and shared_by_cells(tiny.parent / "processes") == shared_by_cells(serial)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []
    out = capsys.readouterr().out
    assert "quantization: 10 cells" in out and out.count("/10] synthetic-squeezenet1_1-s") == 10
    assert "epoch 1/1" in out  # what a worker says of its cell


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """One cluster for all tests: starting it takes seconds. This program connects from a folder in which workers would
    not find the project, like a notebook's."""
    ray = pytest.importorskip("ray")
    quietly = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find this module
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: behind the tests that another process runs
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
            ray.init(address="local", num_cpus=2, num_gpus=1, **quietly)  # a GPU on paper
        yield
        ray.shutdown()


def test_ray_writes_the_files_of_one_process(tiny, serial, local_ray):
    study(tiny, tiny.parent / "ray", "run.executor=ray", "run.jobs=2")
    ours, theirs = contents(tiny.parent / "ray"), contents(serial)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


TWO_THREADS = (
    "run.threads_per_cell=2", "run.seeds=[0]", "quantization.methods=[ptq_static]", "mitigation.strategies=[]",
    "deployment.latency=false",
    "deployment.cells=['*:ptq_static:W8A8']", "deployment.export=['*:ptq_static:W8A8']",
    "deployment.engines=[onnxruntime, openvino]",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_threads(tiny) -> Path:
    study(tiny, tiny.parent / "two-threads", *TWO_THREADS)
    return tiny.parent / "two-threads"


@pytest.mark.parametrize(("executor", "jobs"), [("processes", 2), ("ray", 1)])
def test_engines_predict_the_same_with_two_threads_everywhere(tiny, two_threads, request, executor, jobs):
    """In this process OMP_NUM_THREADS is whatever it is; a worker's is its own."""
    if executor == "ray":
        request.getfixturevalue("local_ray")
    results = tiny.parent / f"two-threads-{executor}"
    study(tiny, results, *TWO_THREADS, f"run.executor={executor}", f"run.jobs={jobs}")
    ours, theirs = contents(results), contents(two_threads)
    engines = [name for name in theirs if "@" in name]
    assert len(engines) == 2 and sum(name.endswith(".onnx") for name in theirs) == 1
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


def test_the_order_of_the_cells_does_not_matter(tiny, serial):
    """Nor which of them measures what several share."""
    results = tiny.parent / "reversed"
    for widths in ("[4]", "[4, 8]"):  # the second time nothing is in memory: cells read what the first ones measured
        study(tiny, results, "run.seeds=[1, 0]", f"quantization.bit_widths={widths}")
    ours, theirs = contents(results), contents(serial)
    assert shared_by_cells(results) == shared_by_cells(serial)
    tables = [name for name in theirs if name.endswith(".csv")]
    assert len(tables) == 8
    for phase in ("baseline", "quantization", "mitigation"):
        assert ours[f"{phase}_results.csv"] != theirs[f"{phase}_results.csv"]
    for name in tables:  # their rows are in the order of the cells
        ours[name], theirs[name] = sorted(ours[name].splitlines()), sorted(theirs[name].splitlines())
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []


# ----------------------------------------------------------------------------------------------------- cells that fail


def made_up(name: str, **options) -> Cell:
    return Cell(name, "quantization", "synthetic", "m", 0, "ptq_static", options=options, baseline_cell=name)


def predictions() -> SimpleNamespace:
    zeros = np.zeros(4, np.int64)
    return SimpleNamespace(y_true=zeros, logits=np.zeros((4, 2), np.float32), sensitive={}, index=np.arange(4))


def faulty(config, store, device, data=None):
    """A computation that does what the cell's options say; each attempt leaves a line in a file of the cell's name."""

    def compute(cell: Cell, report) -> CellResult:
        attempts = store.root / f"{cell.id}.attempts"
        with attempts.open("a") as file:
            file.write(f"{os.getpid()}\n")
        number = len(attempts.read_text().split())
        if number <= cell.options.get("times", 1000):
            DEEDS[cell.options["do"]](report)
        store.write_predictions(cell.id, predictions())
        return CellResult({"accuracy": 0.5, "n_test": 4}, [])

    return compute


def fail(error: BaseException):
    def deed(report):
        raise error

    return deed


def compute_for_a_second(report):
    for _ in range(50):
        time.sleep(0.02)


def use_all_memory(report):
    """Up to a limit of the kernel's, beyond which it gives no more."""
    if not Path("/proc/self/statm").exists():
        np.ones(10**15)
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, hard))
    held = []
    try:
        while True:
            held.append(np.ones(10_000_000, np.uint8))
    finally:
        held.clear()
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def stand_still(report):
    """As a cell does that waits for another one's data or measurement; and then long enough to be heard on Ray."""
    with quiet.off_the_clock():
        time.sleep(4)
    time.sleep(2)


def stand_still_and_die(report):
    stand_still(report)
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still_and_sleep(report):
    stand_still(report)
    time.sleep(600)


DEEDS = {
    "still-dies": stand_still_and_die,
    "still-late": stand_still_and_sleep,
    "nothing": lambda report: report.line("the data are odd"),
    "die": lambda report: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda report: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda report: os._exit(3),
    "compute": compute_for_a_second,
    "sleep": lambda report: time.sleep(600),
    "memory": use_all_memory,
    "error": fail(ValueError("bad\n  luck")),
    "poison": fail(RuntimeError("CUDA error: device-side assert triggered")),
    "full": fail(StoreError("results: cannot be written (No space left on device)")),
}


class Log:
    def __init__(self):
        self.entries = {}
        self.lost = {}  # cell -> attempts that another one followed

    def record(self, entry: dict) -> None:
        if entry["status"] == "lost":
            assert set(entry) == ENTRY and entry["phase"] == "quantization"
            json.dumps(entry)
            self.lost.setdefault(entry["cell"], []).append(entry)
            return
        assert set(entry) == ENTRY | ({"again"} if entry["cell"] == "finished" else set())  # it only lacked something
        assert entry.get("again", True) is True
        json.dumps(entry)
        self.entries[entry["cell"]] = entry


def kept_result(cell, error, report, config, store) -> CellResult:
    report.line(f"kept {cell.id}: {error}")
    return CellResult({"accuracy": 0.25}, [])


FAULTS = [  # each worker that is lost costs seconds
    made_up("fine", do="nothing", times=1),
    made_up("dies-once", do="die", times=1),
    made_up("exits", do="exit"),
    made_up("late", do="sleep"),
    made_up("greedy", do="memory"),
    made_up("wrong", do="error"),
    made_up("poisoned", do="poison"),
    made_up("finished", do="die"),
    made_up("fine-too", do="nothing", times=1),
]
ONCE = {"fine", "fine-too", "late", "greedy", "wrong"}  # what is not tried again


def run_faults(folder: Path, executor: str, timeout: float) -> tuple[Store, Log]:
    settings = (f"run.executor={executor}", "run.jobs=2", "run.threads_per_cell=1", f"run.cell_timeout={timeout}")
    config = load_config(None, list(settings))
    store, report = Store(folder / "results"), Report(quiet=True)
    store.prepare("")
    store.write_predictions("finished", predictions())
    finished = next(cell for cell in FAULTS if cell.id == "finished")
    store.write_cell({**finished.identity(), "status": "done", "error": None, "accuracy": 0.25}, [])
    report.log = Log()
    run_cells("quantization", FAULTS, faulty, config, store, report, lambda cell: False, keep=kept_result)
    return store, report.log


def check_faults(store: Store, log: Log, capsys) -> str:
    """What is the same on every executor; returns what was printed."""
    table = pd.read_csv(store.results_path("quantization"), keep_default_na=False)
    assert table["cell"].tolist() == [cell.id for cell in FAULTS]  # in the planned order, whatever ended first
    rows = table.set_index("cell")
    attempts = {cell.id: len((store.root / f"{cell.id}.attempts").read_text().split()) for cell in FAULTS}
    pids = {cell.id: set((store.root / f"{cell.id}.attempts").read_text().split()) for cell in FAULTS}
    done = {"fine", "fine-too", "dies-once", "finished"}
    assert set(rows.index[rows["status"] == "done"]) == done and (rows.loc[list(done), "error"] == "").all()
    assert {name: count for name, count in attempts.items() if count != 2} == dict.fromkeys(ONCE, 1)
    assert all(len(pids[name]) == attempts[name] for name in attempts)  # each attempt in a process of its own
    errors = rows["error"]
    assert errors["late"] == "CellTimeout: timed out after 4 s (run.cell_timeout)"
    assert errors["greedy"].startswith("MemoryError: Unable to allocate") and "lower run.jobs" in errors["greedy"]
    assert errors["wrong"] == "ValueError: bad luck"
    assert "device-side assert" in errors["poisoned"] and "2 attempts" in errors["poisoned"]
    assert errors["exits"].startswith("WorkerDied: ") and "2 attempts" in errors["exits"]
    assert rows["accuracy"]["finished"] == "0.25"
    assert log.entries.keys() == attempts.keys()
    assert "in use_all_memory" in log.entries["greedy"]["traceback"]
    assert "in deed" in log.entries["poisoned"]["traceback"] and log.entries["fine"]["traceback"] is None
    for name, entry in log.entries.items():
        assert (entry["status"] == "failed") == (entry["error"] is not None)
        assert entry["worker"].rpartition(":")[2] in pids[name]
    assert 10 < log.entries["fine"]["peak_memory_mb"] < 10_000
    assert {name: len(lost) for name, lost in log.lost.items()} == {
        name: 1 for name, count in attempts.items() if count == 2
    }
    for name, (entry,) in log.lost.items():
        first, second = (store.root / f"{name}.attempts").read_text().split()
        assert entry["worker"].rpartition(":")[2] == first
        assert log.entries[name]["worker"].rpartition(":")[2] == second
        assert 0 < entry["seconds"] < 60 and entry["end"] <= log.entries[name]["start"] + 0.001
        assert entry["end"] == pytest.approx(entry["start"] + entry["seconds"])
    assert "device-side assert" in log.lost["poisoned"][0]["error"]
    assert "in deed" in log.lost["poisoned"][0]["traceback"] and log.lost["exits"][0]["traceback"] is None
    out = capsys.readouterr().out
    assert out.count("the data are odd") == 1  # though two workers found out
    assert "kept finished: " in out
    return out


def test_a_worker_that_dies_or_is_late_costs_its_cell(tmp_path, capsys):
    store, log = run_faults(tmp_path, "processes", 4)
    out = check_faults(store, log, capsys)
    assert "kept finished: its worker was killed by signal 9 (SIGKILL" in out
    rows = pd.read_csv(store.results_path("quantization")).set_index("cell")
    assert "ended with exit status 3" in rows["error"]["exits"]
    assert 4 <= log.entries["late"]["seconds"] < 60


def test_ray_tries_again_and_stops_what_is_late(tmp_path, capsys, local_ray):
    store, log = run_faults(tmp_path, "ray", 4)
    assert "kept finished: its worker " in check_faults(store, log, capsys)


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
@pytest.mark.parametrize(("executor", "seconds"), [("processes", 4), ("ray", 12)])
def test_a_cell_that_stands_still_while_another_measures_is_not_late(tmp_path, monkeypatch, request, executor, seconds):
    """For longer than its limit, without a word."""
    config, report = load_config(None, [f"run.executor={executor}", "run.cell_timeout=3"]), Report(quiet=True)
    if executor == "ray":  # whose workers do not inherit it
        request.getfixturevalue("local_ray")
        report.executor = open_executor(config, "cpu")
        report.executor.environment["env_vars"]["TMPDIR"] = str(tmp_path)
    else:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = Store(tmp_path / "results")
    store.prepare("")
    folder = tmp_path / f"bnq-quiet-{os.getuid()}"
    stood = []

    def measure():
        until((store.root / "still.attempts").exists)
        with (folder / "gate").open("w") as gate, (folder / "room").open("w") as room:
            fcntl.flock(gate, fcntl.LOCK_EX)
            start = time.monotonic()
            fcntl.flock(room, fcntl.LOCK_EX)  # the cell has gone out
            time.sleep(seconds)
            stood.append(time.monotonic() - start)

    measuring = threading.Thread(target=measure)
    measuring.start()
    run_cells("quantization", [made_up("still", do="compute")], faulty, config, store, report)
    report.close()
    measuring.join()
    assert stood[0] >= seconds and store.record("still")["row"]["status"] == "done"


def opening_data(config, store, device, data=None):
    """A computation that opens the data set, which takes six seconds to decode, and then does what it is told."""
    data = DatasetCache(config)
    write = image_cache._write

    def slowly(folder, shape, blocks, label, progress):
        if "train" in label:
            for _ in range(30):
                time.sleep(0.2)
                progress(label, 0, 1)
        write(folder, shape, blocks, label, progress)

    def compute(cell: Cell, report) -> CellResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_cache, "_write", slowly)
            data.load("synthetic", report)
        return faulty(config, store, device)(cell, report)

    return compute


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_data_that_take_longer_to_decode_than_a_cell_may_take_make_no_cell_late(tiny, tmp_path, request, executor):
    """Neither the one that decodes nor the one that waits for it; what a cell does then is its own time."""
    if executor == "ray":
        request.getfixturevalue("local_ray")
    settings = [f"run.executor={executor}", "run.jobs=2", "run.cell_timeout=4", f"data.cache={tmp_path / 'cache'}"]
    config, store, report = load_config(tiny, settings), Store(tmp_path / "results"), Report(quiet=True)
    store.prepare("")
    report.log = Log()
    cells = [made_up("one", do="nothing"), made_up("late", do="sleep")]
    run_cells("quantization", cells, opening_data, config, store, report)
    assert store.record("one")["row"]["error"] is None
    assert store.record("late")["row"]["error"] == "CellTimeout: timed out after 4 s (run.cell_timeout)"
    one, late = report.log.entries["one"], report.log.entries["late"]
    assert one["end"] - one["start"] >= 5 and one["seconds"] < 4  # by which the time that is left is reckoned
    assert late["end"] - late["start"] >= 9


def hanging_while_it_decodes(config, store, device, data=None):
    """A computation that opens the data set. Whoever decodes it first gets on for longer than a cell may take, until
    another one waits for it, and then hangs: its process is stopped, or, on Ray, one call of it never returns."""
    data = DatasetCache(config)
    write = image_cache._write

    def hanging(blocks):
        block, row = next(blocks), 0
        while row < 7 or len(list(store.root.glob("*.begun"))) < 2:
            time.sleep(0.5)
            columns = {name: values[row : row + 1] for name, values in block.columns.items()}
            yield image_cache.Block(block.images[row : row + 1], columns=columns)
            row += 1
        (store.root / "hangs").touch()
        if config.run.executor == "processes":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    def write_or_hang(folder, shape, blocks, label, progress):
        with contextlib.suppress(FileExistsError):
            (store.root / "decodes").open("x").close()
            blocks = hanging(blocks)
        write(folder, shape, blocks, label, progress)

    def compute(cell: Cell, report) -> CellResult:
        (store.root / f"{cell.id}.begun").touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_cache, "_write", write_or_hang)
            data.load("synthetic", report)
        return faulty(config, store, device)(cell, report)

    return compute


@pytest.mark.skipif(fcntl is None, reason="who waits for images waits by flock")
@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_a_cell_that_hangs_while_it_decodes_is_ended_and_another_one_decodes(
    tiny, tmp_path, monkeypatch, request, executor
):
    """Though it is off the clock of run.cell_timeout; not before, nor is the one that waits for it."""
    settings = [f"run.executor={executor}", "run.jobs=2", "run.cell_timeout=2", f"data.cache={tmp_path / 'cache'}"]
    config, store, report = load_config(tiny, settings), Store(tmp_path / "results"), Report(quiet=True)
    monkeypatch.setattr(quiet, "STILL_SECONDS", 0.5)
    if executor == "ray":
        request.getfixturevalue("local_ray")
    else:
        monkeypatch.setenv("TMPDIR", str(tmp_path))  # a stopped one keeps no other test's cells from measuring
    store.prepare("")
    report.log = Log()
    cells = [made_up("one", do="nothing"), made_up("other", do="nothing")]
    run_cells("quantization", cells, hanging_while_it_decodes, config, store, report)
    done, ended = sorted((store.record(cell.id)["row"] for cell in cells), key=lambda row: row["status"])
    assert (done["status"], done["error"], ended["status"]) == ("done", None, "failed")
    why = "it opens data, waits or stands still, and has not got on for 2 s"
    assert ended["error"] == f"CellTimeout: timed out: {why} (run.cell_timeout)"
    assert (store.root / "hangs").exists()
    entry = report.log.entries[done["cell"]]
    assert entry["seconds"] < 2 <= entry["end"] - entry["start"]


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_the_seconds_of_a_cell_that_was_lost_or_late_are_its_own(tmp_path, monkeypatch, request, executor):
    """Not those for which it stood still: by them the time that is spent is reckoned."""
    report = Report(quiet=True)
    if executor == "ray":
        request.getfixturevalue("local_ray")
        report.executor = open_executor(load_config(None, ["run.executor=ray", "run.cell_timeout=4"]), "cpu")
        report.executor.environment["env_vars"]["TMPDIR"] = str(tmp_path)  # no other test's cells stop these
    else:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
    settings = [f"run.executor={executor}", "run.jobs=2", "run.threads_per_cell=1", "run.cell_timeout=4"]
    store = Store(tmp_path / "results")
    store.prepare("")
    report.log = Log()
    todo = [made_up("dies", do="still-dies"), made_up("late", do="still-late")]
    run_cells("quantization", todo, faulty, load_config(None, settings), store, report)
    entries = [*report.log.lost["dies"], report.log.entries["dies"], report.log.entries["late"]]
    assert [entry["status"] for entry in entries] == ["lost", "failed", "failed"]
    for entry in entries:
        assert 3.5 < entry["end"] - entry["start"] - entry["seconds"] < 6
        assert 1 < entry["seconds"] < 4 + ray_executor.HEARD_SECONDS + 6


def test_no_time_is_spent_on_an_attempt_that_never_began():
    """However long it had waited in a queue; nor is a worker known."""
    of = ray_executor._RayCell(made_up("a"))
    of.clock.start -= 7200
    for entry in (of.lost_attempt(), of.lost_outcome(executors.WorkerDied("it died")).log):
        assert entry["seconds"] == 0 and entry["worker"] is None
        assert entry["start"] == entry["end"] == pytest.approx(time.time(), abs=60)


def waiting(config, store, device, data=None):
    """A computation that waits for a file, and then says so."""

    def compute(cell: Cell, report) -> CellResult:
        (store.root / f"{cell.id}.begun").touch()
        until((store.root / "go").exists)
        report.line(f"{cell.id} goes on")
        store.write_predictions(cell.id, predictions())
        return CellResult({"accuracy": len(cell.id) / 10, "n_test": 4}, [])

    return compute


def run_waiting(results: Path, meanwhile=None) -> dict[str, bytes]:
    """Four cells on Ray, two at a time, which wait until `meanwhile(executor)` has been done."""
    config = load_config(None, ["run.executor=ray", "run.threads_per_cell=1"])
    store, report = Store(results), Report(quiet=True)
    store.prepare("")
    report.executor = open_executor(config, "cpu")
    cells = [made_up("a" * number) for number in (1, 2, 3, 4)]

    def act():
        try:
            until(lambda: len(list(results.glob("*.begun"))) >= 2)
            if meanwhile is not None:
                meanwhile(report.executor)
            begun.append(len(list(results.glob("*.begun"))))
        finally:
            (results / "go").touch()

    begun = []
    acting = threading.Thread(target=act)
    acting.start()
    try:
        run_cells("quantization", cells, waiting, config, store, report)
    finally:
        acting.join()
        report.close()
    assert begun == [2]
    return contents(results)


def kill_the_actor(executor) -> None:
    """Its process, with kill -9; it is back before the cells go on."""
    ray = pytest.importorskip("ray")
    process = lambda: ray.get(executor.events.__ray_call__.remote(lambda actor: os.getpid()), timeout=60)  # noqa: E731
    before = process()
    assert b"_Events" in Path(f"/proc/{before}/cmdline").read_bytes()
    os.kill(before, signal.SIGKILL)
    assert process() != before


def take_the_actor_away(executor) -> None:
    """For good."""
    pytest.importorskip("ray").kill(executor.events)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_ray_survives_the_process_through_which_cells_tell(tmp_path, local_ray, capsys):
    undisturbed = run_waiting(tmp_path / "undisturbed")
    assert len([name for name in undisturbed if name.endswith((".json", ".npz"))]) == 8
    capsys.readouterr()
    assert run_waiting(tmp_path / "killed", kill_the_actor) == undisturbed
    out = capsys.readouterr().out
    assert "aaa goes on" in out or "aaaa goes on" in out  # begun after: they are heard again
    assert run_waiting(tmp_path / "away", take_the_actor_away) == undisturbed


def on_ray(folder: Path, cells: list[Cell], *settings: str, device: str = "cpu") -> tuple[Store, Log]:
    config = load_config(None, ["run.executor=ray", "run.threads_per_cell=1", *settings])
    store, report = Store(folder), Report(quiet=True)
    store.prepare("")
    report.executor, report.log = open_executor(config, device), Log()
    try:
        run_cells("quantization", cells, faulty, config, store, report, device=device)
    finally:
        report.close()
    return store, report.log


def test_on_a_gpu_of_ray_each_cell_has_a_process_of_its_own(tmp_path, local_ray):
    """One that has computed keeps the GPU that it was given first, and memory on it."""
    cells = [made_up(name, do="nothing", times=1) for name in ("a", "b", "c")]
    for device, number in (("cpu", 3), ("cuda", 3)):
        store, log = on_ray(tmp_path / device, cells, device=device)
        workers = {log.entries[cell.id]["worker"] for cell in cells}
        assert len(workers) == number if device == "cuda" else len(workers) < number  # two at a time
        assert all(store.record(cell.id)["row"]["status"] == "done" for cell in cells)


def test_a_dry_cluster_sleeps_as_long_as_the_cells_of_a_run_took(tmp_path, local_ray, monkeypatch):
    """Of the plan what the log has, in the order of the phases, by this program's executor."""
    monkeypatch.setattr(dry_cluster, "WARM_UP", 0.5)
    overrides = ("models.architectures=[squeezenet1_1]", "quantization.methods=[ptq_static]", "run.threads_per_cell=1")
    config = load_config(None, [*overrides, "run.executor=ray", "run.jobs=2"])
    Store(tmp_path).prepare(dump_config(config))
    log, planned = RunLog(Store(tmp_path)), plan(config)
    seconds = {cells[0].id: 0.4 for cells in planned.values()} | {planned["quantization"][1].id: 0.3, "analysis": 0.2}
    with pytest.raises(SystemExit, match="no cell of its config is done"):
        dry_cluster.as_recorded(tmp_path, config)
    phases = {cell.id: phase for phase, cells in planned.items() for cell in cells}
    for cell, value in reversed(seconds.items()):
        name = None if cell == "analysis" else cell
        entry = {"cell": name, "phase": phases.get(cell, "analysis"), "start": value, "end": value}
        log.record({**entry, "status": "done", "seconds": value})
        if phases.get(cell) == "quantization" and value == 0.4:
            with pytest.raises(SystemExit, match=f"{planned['baseline'][0].id} is not done"):
                dry_cluster.as_recorded(tmp_path, config)
    costs, tasks = dry_cluster.as_recorded(tmp_path, config)
    assert {task.name: task.seconds for task in tasks} == seconds
    assert [task.phase for task in tasks] == [0, 1, 1, 2, 3]
    assert schedule(tasks, 2).makespan == pytest.approx(0.4 + 0.4 + 0.4 + 0.2)
    with dry_cluster.dry_cluster(config, 2) as cluster:
        assert dry_cluster.dry_run([cell for cell, _ in costs], tasks, 1.0, cluster) >= 1.4


def test_ray_gives_up_a_worker_that_cannot_be_killed(tmp_path, local_ray, monkeypatch):
    """A stopped one does not hear that it is to end; the run goes on without it."""
    import ray

    asked = []
    monkeypatch.setattr(ray, "cancel", lambda ref, force: asked.append(ref))
    monkeypatch.setattr(ray_executor, "CANCEL_SECONDS", 2.0)
    monkeypatch.setattr(ray_executor, "HEARD_SECONDS", 1.0)
    cells = [made_up("stopped", do="stop"), made_up("fine", do="nothing", times=1)]
    try:
        store, _ = on_ray(tmp_path, cells, "run.cell_timeout=2")
    finally:
        for pid in (tmp_path / "stopped.attempts").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    assert len(asked) == 1
    assert store.record("stopped")["row"]["error"] == "CellTimeout: timed out after 2 s (run.cell_timeout)"
    assert store.record("fine")["row"]["status"] == "done"


def test_a_ray_whose_workers_were_given_up_does_not_keep_the_run_waiting(tmp_path, local_ray, monkeypatch):
    """Their places are taken as long as they live."""
    import ray

    monkeypatch.setattr(ray, "cancel", lambda ref, force: None)
    monkeypatch.setattr(ray_executor, "CANCEL_SECONDS", 1.0)
    monkeypatch.setattr(ray_executor, "HEARD_SECONDS", 0.0)
    monkeypatch.setattr(ray_executor, "NO_ROOM_SECONDS", 5.0)
    cells = [made_up("stopped", do="stop"), made_up("too", do="stop"), made_up("fine", do="nothing", times=1)]
    try:
        with pytest.raises(ConfigError, match="2 workers that cannot be ended hold places of Ray"):
            on_ray(tmp_path, cells, "run.cell_timeout=2")
    finally:
        for name in ("stopped", "too"):
            for pid in (tmp_path / f"{name}.attempts").read_text().split():
                os.kill(int(pid), signal.SIGKILL)


def test_a_cell_on_ray_whose_beginning_was_not_heard_is_late_all_the_same(tmp_path, local_ray, monkeypatch):
    """The actor died with what the cell had told it."""
    told = ray_executor.Ray._told
    deaf = lambda self: [event for event in told(self) if event[2] != "started" or event[4] > 0]  # noqa: E731
    monkeypatch.setattr(ray_executor.Ray, "_told", deaf)
    store, log = on_ray(tmp_path, [made_up("late", do="sleep")], "run.cell_timeout=2")
    assert store.record("late")["row"]["error"] == "CellTimeout: timed out after 2 s (run.cell_timeout)"
    assert log.entries["late"]["seconds"] > ray_executor.STARTED_SECONDS  # all of them


def begin_badly() -> None:
    """This module is imported by a worker of Ray that is given a cell of it: as many of them as the environment says do
    not get further; the first after another cell has begun."""
    folder, how, times, is_first_fine = json.loads(os.environ["BNQ_TEST_BEGIN"])
    number = 1
    while True:
        try:
            with (Path(folder) / f"worker{number}").open("x") as file:
                file.write(str(os.getpid()))
            break
        except FileExistsError:
            number += 1
    if is_first_fine:
        number -= 1
        if number:
            while not list(Path(folder).glob("*.attempts")):
                time.sleep(0.05)
    if 0 < number <= times and how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if 0 < number <= times:
        raise MemoryError("no room for torch")


if "BNQ_TEST_BEGIN" in os.environ:
    begin_badly()


def on_ray_badly(folder: Path, how: str, times: int, is_first_fine: bool = False) -> tuple[Store, Log, list[Cell]]:
    """Two cells on Ray, whose first workers do not get as far as a cell."""
    config = load_config(None, ["run.executor=ray", "run.threads_per_cell=1", "run.retries=0"])
    store, report = Store(folder), Report(quiet=True)
    store.prepare("")
    report.executor, report.log = open_executor(config, "cpu"), Log()
    environment = json.dumps([str(folder), how, times, is_first_fine])
    report.executor.environment["env_vars"]["BNQ_TEST_BEGIN"] = environment
    todo = [made_up("one", do="compute"), made_up("two", do="compute")]
    try:
        run_cells("quantization", todo, faulty, config, store, report)
    finally:
        report.close()
    return store, report.log, todo


@pytest.mark.parametrize("how", ["is killed", "raises"])
def test_what_ends_before_its_cell_began_on_ray_is_no_attempt(how, tmp_path, local_ray, monkeypatch, capsys):
    """Such as for want of memory, while it imported torch. Without retries; the other cell goes on meanwhile."""
    monkeypatch.setattr(executors, "START_PAUSE", 4.0)
    store, log, todo = on_ray_badly(tmp_path, how, 1, is_first_fine=True)
    assert [store.record(cell.id)["row"]["status"] for cell in todo] == ["done", "done"] and log.lost == {}
    assert len(list(tmp_path.glob("worker*"))) >= 2
    last = max(path.stat().st_mtime for path in tmp_path.glob("*.attempts"))
    assert min(store.record_path(cell.id).stat().st_mtime for cell in todo) < last - 1  # written within the pause
    out = capsys.readouterr().out
    assert out.count("Ray: a cell was not begun: its worker") == 1 and "; tried again in 4 s" in out
    assert ("MemoryError: no room for torch" in out) == (how == "raises")


@pytest.mark.parametrize("how", ["is killed", "raises"])
def test_workers_of_ray_that_fail_at_first_are_not_the_end_of_the_run(how, tmp_path, local_ray, monkeypatch):
    monkeypatch.setattr(executors, "START_PAUSE", 0.1)
    store, log, todo = on_ray_badly(tmp_path, how, 3)
    assert [store.record(cell.id)["row"]["status"] for cell in todo] == ["done", "done"] and log.lost == {}
    pids = [path.read_text() for path in tmp_path.glob("worker*")]
    assert len(pids) > 3 and len(set(pids)) == len(pids)  # none of them tried to import it a second time


@pytest.mark.parametrize("how", ["is killed", "raises"])
def test_workers_of_ray_that_never_begin_end_the_run(how, tmp_path, local_ray, monkeypatch):
    monkeypatch.setattr(executors, "START_PAUSE", 0.01)
    monkeypatch.setattr(executors, "FAILED_STARTS", 3 if how == "is killed" else 1000)
    monkeypatch.setattr(ray_executor, "RAISED_STARTS", 3 if how == "raises" else 1000)
    why = "died" if how == "is killed" else "could not begin: MemoryError: no room for torch"
    with pytest.raises(ConfigError, match=rf"no cell can be begun: its worker.* {why}.* again to go on$"):
        on_ray_badly(tmp_path, how, 1000)
    assert not list((tmp_path / "cells").iterdir()) and len(list(tmp_path.glob("worker*"))) >= 3


def cannot_be_opened(config, store, device, data=None):
    """Our own mistake: a worker reaches the cell, and not its computation."""
    with (store.root / "opened").open("a") as file:
        file.write("x\n")
    raise ValueError("not made for this")


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_a_worker_that_raises_is_one_that_died(executor, tmp_path, request):
    if executor == "ray":
        request.getfixturevalue("local_ray")
    config = load_config(None, [f"run.executor={executor}", "run.threads_per_cell=1"])
    store = Store(tmp_path)
    store.prepare("")
    run_cells("quantization", [made_up("a")], cannot_be_opened, config, store, Report(quiet=True))
    row = store.record("a")["row"]
    assert row["status"] == "failed" and "the last of 2 attempts" in row["error"]
    assert ("ValueError: not made for this" in row["error"]) == (executor == "ray")
    assert (tmp_path / "opened").read_text().count("x") == 2


def test_a_worker_of_ray_that_cannot_import_its_task_is_one_line(tmp_path, local_ray, monkeypatch):
    """A node on which a package is missing. Ray itself raises then, in the task's place."""
    monkeypatch.setattr(executors, "START_PAUSE", 0.01)
    monkeypatch.setattr(ray_executor, "RAISED_STARTS", 3)
    monkeypatch.setattr(ray_executor, "_ray_cell", faulty)  # of this module, which is not found there
    config, report = load_config(None, ["run.executor=ray"]), Report(quiet=True)
    store = Store(tmp_path)
    store.prepare("")
    report.executor = open_executor(config, "cpu")
    report.executor.environment["env_vars"]["PYTHONPATH"] = str(ROOT)
    try:
        with pytest.raises(
            ConfigError, match=r"no cell can be begun: .*named 'test_executors'.* again to go on$"
        ) as told:
            run_cells("quantization", [made_up("a", do="nothing")], faulty, config, store, report)
    finally:
        report.close()
    assert "\n" not in str(told.value) and report.executor is None


def test_a_project_that_is_not_on_the_node_is_one_line(tmp_path, local_ray):
    """The process through which cells tell cannot be started either: no cell would be heard."""
    config, report, store = load_config(None, ["run.executor=ray"]), Report(quiet=True), Store(tmp_path)
    store.prepare("")
    report.executor = open_executor(config, "cpu")
    report.executor.environment["env_vars"]["PYTHONPATH"] = str(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"Ray failed: .*No module named 'execution'.* again to go on$") as told:
            run_cells("quantization", [made_up("a")], waiting, config, store, report)
    finally:
        report.close()
    assert "\n" not in str(told.value) and "\x1b" not in str(told.value)  # Ray's own text is in colours


def test_what_else_ray_may_raise_is_one_line(tmp_path, local_ray, monkeypatch):
    import ray

    def fails(*args, **kwargs):
        raise ray.exceptions.RaySystemError("the cluster\nis gone")

    store = Store(tmp_path)
    store.prepare("")
    monkeypatch.setattr(ray, "wait", fails)
    with pytest.raises(ConfigError, match=r"Ray failed: RaySystemError: .*the cluster is gone; .* again to go on"):
        run_cells("quantization", [made_up("a")], waiting, load_config(None, ["run.executor=ray"]), store, Report(True))


@pytest.mark.parametrize("why", ["it raises", "it ends"])
def test_a_worker_that_cannot_be_started_for_a_moment_is_tried_again(tmp_path, monkeypatch, why):
    """There is no memory, say, to import torch, or no room for temporary files."""
    monkeypatch.setattr(executors, "START_PAUSE", 0.01)
    started, real = [], executors._Worker

    def start(threads, visible):
        started.append(visible)
        if len(started) in (2, 3):
            if why == "it raises":
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            monkeypatch.setenv("BNQ_TEST_WORKER", "ends")
        worker = real(threads, visible)
        monkeypatch.delenv("BNQ_TEST_WORKER", raising=False)
        return worker

    monkeypatch.setattr(executors, "_Worker", start)
    config = load_config(None, ["run.executor=processes", "run.jobs=1"])
    store = Store(tmp_path)
    store.prepare("")
    cells = [made_up("dies-once", do="die", times=1), made_up("fine", do="nothing", times=1)]
    run_cells("quantization", cells, faulty, config, store, Report(quiet=True))
    assert [store.record(cell.id)["row"]["status"] for cell in cells] == ["done", "done"]
    assert len(started) == 4


if os.environ.get("BNQ_TEST_WORKER") == "ends":  # this module is imported by a worker that is given a cell of it
    os._exit(1)


def test_workers_that_never_begin_end_the_run_though_they_take_turns(tmp_path, monkeypatch):
    """One always hangs in its imports while another one has just been given up."""
    monkeypatch.setattr(executors, "START_SECONDS", 0.5)
    monkeypatch.setattr(executors, "START_PAUSE", 0.3)
    monkeypatch.setattr(executors, "FAILED_STARTS", 4)
    config = load_config(None, ["run.executor=processes", "run.jobs=2"])
    store = Store(tmp_path)
    store.prepare("")
    cells = [made_up(name, do="nothing") for name in ("a", "b", "c")]
    with pytest.raises(ConfigError, match="cannot be started: it has said nothing for"):
        run_cells("quantization", cells, faulty, config, store, Report(quiet=True))


def test_the_first_worker_that_cannot_be_started_ends_the_run(tmp_path, monkeypatch):
    def start(threads, visible):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(executors, "_Worker", start)
    store = Store(tmp_path)
    store.prepare("")
    with pytest.raises(ConfigError, match=r"cannot be started: BlockingIOError: .*unavailable"):
        run_cells("quantization", [made_up("a", do="nothing")], faulty, load_config(None, ["run.executor=processes"]),
                  store, Report(quiet=True))  # fmt: skip


def test_a_pause_that_was_read_while_it_was_written_makes_no_cell_late():
    clock = Clock()
    clock.begin(100.0)
    clock.add_pause(50.0)
    deadline = clock.deadline
    clock.add_pause(0.0)
    assert clock.deadline == deadline
    clock.add_pause(60.0)
    assert clock.deadline == pytest.approx(deadline + 10)


def test_who_is_off_the_clock_gives_signs_of_life(monkeypatch):
    """Its silence is not what it stands still for another one's measurement, nor what it has patience for."""
    now, standstill = [1000.0], list(quiet.ON_THE_CLOCK)
    monkeypatch.setattr(quiet, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(quiet, "_standstill", standstill)

    def silent_after(seconds: float) -> float:
        now[0] += seconds
        return quiet.silence(standstill)

    assert silent_after(5) == 0
    with quiet.off_the_clock():
        assert silent_after(5) == 5
        quiet.sign_of_life()
        assert silent_after(2) == 2
        with quiet.off_the_clock():
            quiet.sign_of_life()
            assert silent_after(50) == 50  # stopped in the midst of it, say
        assert silent_after(1) == 3
    assert silent_after(5) == 0 and quiet.standing(standstill) == 58
    with quiet.off_the_clock(10):
        assert silent_after(9) == 0
        assert silent_after(4) == 3
    with quiet.off_the_clock(100):
        pass
    with quiet.off_the_clock():
        assert silent_after(7) == 7


def test_a_cell_that_does_not_get_on_is_ended_or_told_of_once(capsys):
    """Off its clock for half an hour, or for as long as a cell may take; where no limit is set nobody may end it."""
    cell, clock, report = made_up("hangs"), Clock(), Report(quiet=True)
    why = "it opens data, waits or stands still, and has not got on for"
    for timeout, seconds in ((4.0, 1800.0), (3600.0, 3600.0), (None, 1800.0)):
        clock.begin(timeout)
        clock.add_pause(5000.0, seconds - 1)
        assert not executors.is_overdue(cell, clock, timeout, report)
        for _ in range(2):
            clock.add_pause(5001.0, seconds)
            assert executors.is_overdue(cell, clock, timeout, report) == (timeout is not None)
        if timeout is not None:
            assert str(executors.timed_out(timeout, clock)) == f"timed out: {why} {seconds:g} s (run.cell_timeout)"
        clock.add_pause(5002.0)  # it gets on
        assert not executors.is_overdue(cell, clock, timeout, report)
    assert capsys.readouterr().out == f"  hangs: {why} 1800 s; with run.cell_timeout it would be ended\n"


def test_a_cell_that_has_ended_is_not_late_though_it_was_not_heard(tmp_path):
    """While the program is busy with another one."""
    config = load_config(None, ["run.executor=processes", "run.jobs=2", "run.cell_timeout=2"])
    store, report = Store(tmp_path), Report(quiet=True)
    store.prepare("")
    report.log = SimpleNamespace(record=lambda entry: time.sleep(4))
    cells = [made_up("one", do="compute"), made_up("other", do="compute")]
    run_cells("quantization", cells, faulty, config, store, report)
    assert [store.record(cell.id)["row"]["status"] for cell in cells] == ["done", "done"]


def test_the_mark_of_a_lost_worker_goes_with_its_cell(tmp_path):
    """Also of one on another machine, which cannot be asked whether it is alive."""
    config = load_config(None, ["run.executor=processes", "run.retries=0"])
    store = Store(tmp_path)
    store.prepare("")
    run_cells("quantization", [made_up("dies", do="die")], faulty, config, store, Report(quiet=True))
    assert store.record("dies")["row"]["status"] == "failed" and store.marked() == []


def test_a_cell_whose_worker_was_killed_is_not_marked_while_another_one_is_started(tmp_path, monkeypatch):
    marked, real = [], executors._Worker

    def start(threads, visible):
        marked.append([cell for cell, _ in store.marked()])
        return real(threads, visible)

    monkeypatch.setattr(executors, "_Worker", start)
    store = Store(tmp_path)
    store.prepare("")
    config = load_config(None, ["run.executor=processes"])
    run_cells("quantization", [made_up("a", do="die", times=1)], faulty, config, store, Report(quiet=True))
    assert marked == [[], []] and store.record("a")["row"]["status"] == "done"


def dying_and_looking(config, store, device, data=None):
    """The first attempt of `dies` is killed; another cell notes for whom there is a mark while it is computed."""
    again = faulty(config, store, device)

    def compute(cell: Cell, report) -> CellResult:
        if cell.id == "looks":
            time.sleep(3)
            (store.root / "seen").write_text(" ".join(name for name, _ in store.marked()))
        return again(cell, report)

    return compute


def test_a_cell_that_waits_on_ray_again_is_not_marked(tmp_path, local_ray):
    """It may wait for hours, and --status would call it running where its worker was on another machine."""
    config = load_config(None, ["run.executor=ray", "run.threads_per_cell=2"])  # one at a time
    store = Store(tmp_path)
    store.prepare("")
    todo = [made_up("dies", do="die", times=1), made_up("looks", do="nothing")]
    run_cells("quantization", todo, dying_and_looking, config, store, Report(quiet=True))
    assert (tmp_path / "seen").read_text() == "looks"
    assert len((tmp_path / "dies.attempts").read_text().split()) == 2


def test_what_no_cell_can_help_ends_the_run_and_not_in_a_thousand_rows(tmp_path):
    config = load_config(None, ["run.executor=processes", "run.jobs=1"])
    store = Store(tmp_path)
    store.prepare("")
    cells = [made_up("full", do="full"), made_up("next", do="nothing")]
    with pytest.raises(StoreError, match="No space left"):
        run_cells("quantization", cells, faulty, config, store, Report(quiet=True))
    assert not list((tmp_path / "cells").iterdir()) and not (tmp_path / "next.attempts").exists()


# ------------------------------------------------------------------------------------------------- the end of a program


def processes_marked(mark: str) -> list[int]:
    """Living processes that have inherited this text in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # somebody else's, or gone
    return found


def until(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def hears_interrupts() -> None:
    """As from a terminal, also where these tests run in the background of a script, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def niceness(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpriority(os.PRIO_PROCESS, pid)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("executor", "number", "jobs"),
    [("processes", signal.SIGINT, 2), ("processes", signal.SIGKILL, 1), ("ray", signal.SIGTERM, 1)],
)
def test_no_worker_outlives_the_program(tiny, serial, tmp_path, executor, number, jobs):
    """Ctrl-C, which a terminal sends to the whole process group, kill -9 and SIGTERM, in the middle of a training."""
    if executor == "ray":
        pytest.importorskip("ray")
    mark = f"BNQ_TEST_{uuid.uuid4().hex}"
    settings = [f"run.executor={executor}", f"run.jobs={jobs}", "training.epochs=100000"]
    command = [sys.executable, "main.py", "--phase", "baseline", "--config", str(tiny), "--results-dir", str(tmp_path),
               "--device", "cpu", "--set", *settings]  # fmt: skip
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=err, env={**os.environ, mark: "1"}, start_new_session=True,
            preexec_fn=hears_interrupts,
        )  # fmt: skip
    try:
        seeds = [f"-s{seed}-fp32" for seed in range(jobs)]
        until(lambda: all(seed in (tmp_path / "out").read_text() for seed in seeds))
        assert len(processes_marked(mark)) >= 1 + jobs
        assert {niceness(pid) for pid in processes_marked(mark)} <= {niceness(os.getpid()), None}  # Ray's own were 15
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        status = process.wait(60)
        until(lambda: not processes_marked(mark), 30)
    finally:
        for pid in processes_marked(mark):
            os.kill(pid, signal.SIGKILL)
    errors = (tmp_path / "err").read_text()
    if number != signal.SIGKILL:
        what, expected = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
        assert status == expected and not list((tmp_path / "cells").iterdir())
        assert errors == f"\n{what}; finished cells are kept: run the same command again to go on\n"
        assert (tmp_path / "baseline_results.csv").read_text().count("\n") == 1  # written: no cell has ended
    else:
        assert status == -signal.SIGKILL and errors == ""


LONGER = "training.epochs=20"  # than it takes to look whether the second training has begun


@pytest.fixture(scope="module")
def undisturbed(tiny) -> dict[str, bytes]:
    """The results of two longer trainings."""
    results = tiny.parent / "undisturbed"
    arguments = ["--phase", "baseline", "--config", str(tiny), "--results-dir", str(results), "--device", "cpu"]
    assert main.main([*arguments, "--set", LONGER]) == 0
    return contents(results)


def agents_of_ray(number: int) -> set[int]:
    """After a kill -9, Ray's: they look once a minute whether the Ray that they belong to is there, and end then."""
    found = set()
    for folder in Path("/proc").iterdir() if number == signal.SIGKILL else ():
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")):
                found.add(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_with_what_ended_on_ray(tiny, undisturbed, tmp_path, number):
    """After Ctrl-C, which a terminal sends to the whole process group, Ray's own processes too, and after kill -9 of
    the program alone. Nothing of it is left, but for the agents of a killed Ray."""
    pytest.importorskip("ray")
    mark, results, out = f"BNQ_TEST_{uuid.uuid4().hex}", tmp_path / "results", tmp_path / "out"
    command = [sys.executable, "main.py", "--phase", "baseline", "--config", str(tiny), "--results-dir", str(results),
               "--device", "cpu", "--set", "run.executor=ray", "run.jobs=1", LONGER]  # fmt: skip

    # no cell of another test keeps it from measuring a latency; Ray's sockets need a short name
    alone = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": tempfile.gettempdir()}

    def start() -> subprocess.Popen:
        with out.open("wb") as told:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, env={**os.environ, **alone, mark: "1"},
                start_new_session=True, preexec_fn=hears_interrupts,
            )  # fmt: skip

    def second_trains() -> bool:  # and the record of the first one is written, perhaps a moment later
        return "-s1-fp32" in out.read_text() and any((results / "cells").glob("*.json"))

    try:
        process = start()
        until(lambda: second_trains() or process.poll() is not None)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -signal.SIGKILL), out.read_text()
        until(lambda: {*processes_marked(mark)} <= agents_of_ray(number), 30)
        left = {*processes_marked(mark)}
        (ended,) = (results / "cells").iterdir()  # the first of two
        before = ended.stat()
        again = start()
        assert again.wait(120) == 0, out.read_text()
        until(lambda: {*processes_marked(mark)} <= left, 30)
    finally:
        for pid in processes_marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert ended.stat() == before
    assert contents(results) == undisturbed
    assert not list((results / "running").iterdir()) and not list(results.rglob("*.tmp"))
    assert not (results / ".lock.json").exists()


# --------------------------------------------------------------------------------------------------------------- quiet

COMPUTES = """
import sys
from pathlib import Path
import numpy as np
from execution import quiet
folder, counter = map(Path, sys.argv[1:])
numbers = np.random.default_rng(0).random(4_000_000)
with quiet.computing(folder):
    number = 0
    while True:
        number += 1
        np.sort(numbers)  # one operation, which nothing interrupts
        counter.write_text(f"{number} {quiet.paused_seconds()}")
"""
MEASURES = """
import sys, time
from pathlib import Path
from execution import quiet
folder, counter = map(Path, sys.argv[1:])
with quiet.computing(folder):
    with quiet.alone():
        before = counter.read_text()
        time.sleep(0.5)
        print(counter.read_text() == before, flush=True)
        if sys.stdin.readline().strip() == "stay":
            time.sleep(600)
"""


def test_no_cell_computes_while_another_measures(tmp_path):
    counter = tmp_path / "counter"

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path / "locks"), str(counter)]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def counted() -> int:
        return int((counter.read_text() if counter.exists() else "").partition(" ")[0] or 0)

    others = [start(COMPUTES)]
    try:
        until(lambda: counted() > 2)
        for answer in ("go\n", "stay\n"):
            measuring = start(MEASURES)
            others.append(measuring)
            assert measuring.stdout.readline() == "True\n"
            if answer == "stay\n":  # killed while it measures: nobody waits for it
                measuring.stdin.write(answer)
                measuring.stdin.flush()
                measuring.kill()
            else:
                measuring.communicate(answer)
            reached = counted()
            until(lambda reached=reached: counted() > reached + 1)
        until(lambda: float(counter.read_text().partition(" ")[2] or 0) > 1.0)  # it knows that it stood still, twice
    finally:
        for process in others:
            process.kill()
            process.communicate()


DECODES = """
import sys, time
from pathlib import Path
import numpy as np
import image_cache
from execution import quiet
folder, cache, at, measuring = map(Path, sys.argv[1:])
def blocks():
    at.touch()
    while not measuring.exists():
        time.sleep(0.01)
    time.sleep(1)  # within which the gate is closed and this process stands still
    yield image_cache.Block(np.zeros((1, 2, 2, 3), np.uint8))
with quiet.computing(folder):
    at.touch()
    image_cache.cached_images(cache, "shared", {}, 1, 2, blocks)
"""
MEASURES_ONCE = """
import sys
from pathlib import Path
from execution import quiet
with quiet.computing(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    with quiet.alone():
        pass
"""


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
def test_a_tick_that_comes_after_its_cell_ends_nobody(tmp_path):
    """On a machine with more workers than cores some do."""
    code = f"""
import os, pathlib, signal
from execution import quiet
with quiet.computing(pathlib.Path({str(tmp_path)!r})) as room:
    assert room is not None
os.kill(os.getpid(), signal.SIGALRM)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
def test_who_waits_for_decoded_images_stands_still_too(tmp_path):
    """One decodes, another one waits for its images, and a third measures: none of them waits for ever."""
    measuring = tmp_path / "measuring"
    others = []

    def start(code: str, *names: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in names)]
        others.append(subprocess.Popen(command, cwd=ROOT))
        return others[-1]

    try:
        for name in ("decodes", "waits"):
            start(DECODES, "locks", "cache", name, "measuring")
            until((tmp_path / name).exists)
        time.sleep(0.5)  # by then the second one is at the lock
        start(MEASURES_ONCE, "locks", "measuring")
        until(measuring.exists)
        until(lambda: all(process.poll() is not None for process in others), 30)
        assert [process.returncode for process in others] == [0, 0, 0]
    finally:
        for process in others:
            process.kill()
            process.wait()


DECODES_MANY = """
import sys, time
from pathlib import Path
import numpy as np
import image_cache
from execution import quiet
folder, cache, begun = map(Path, sys.argv[1:])
begun = begun.open("ab", buffering=0)
def decode(path, size):
    begun.write(b".")
    time.sleep(0.002)
    return np.zeros((size, size, 3), np.uint8)
image_cache.decode_image = decode
files = [str(number) for number in range(20_000)]
with quiet.computing(folder):
    image_cache.decoded_images(cache, "many", Path(), files, np.zeros(len(files), int), 2, workers=2)
"""


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
def test_the_threads_that_decode_stand_still_with_their_process(tmp_path):
    """But for the image that each of them has in hand; though the signal is heard by the main thread alone."""
    names = ("locks", "cache", "begun")
    command = [sys.executable, "-c", DECODES_MANY, *(str(tmp_path / name) for name in names)]

    def begun() -> int:
        return (tmp_path / "begun").stat().st_size if (tmp_path / "begun").exists() else 0

    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            until(lambda: begun() > 10)
            with (tmp_path / "locks" / "gate").open("w") as gate, (tmp_path / "locks" / "room").open("w") as room:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(room, fcntl.LOCK_EX)  # it has gone out
                reached = begun()
                time.sleep(0.5)
                assert begun() <= reached + 2
            until(lambda: begun() > reached + 20)
            assert process.poll() is None
        finally:
            process.kill()


HURRIED = "from execution import quiet\nquiet.PAUSE_SECONDS, quiet.MEASURE_SECONDS = 2.0, 4.0\n"
SAYS_WHETHER_ALONE = """
import sys
from pathlib import Path
folder, began = map(Path, sys.argv[1:])
with quiet.computing(folder):
    with quiet.alone() as measurement:
        began.touch()
        sys.stdin.readline()
    print(measurement.disturbed)
"""


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
def test_a_worker_that_was_stopped_does_not_stop_the_others(tmp_path):
    """Neither while it computes nor while it measures; a measurement that was perhaps not alone says so."""
    counter, began, others = tmp_path / "counter", tmp_path / "began", []

    def start(code: str, path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HURRIED + code, str(tmp_path / "locks"), str(path)]
        others.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return others[-1]

    def said(process: subprocess.Popen) -> str:
        return process.communicate("\n", timeout=60)[0]

    def counted() -> int:
        return int((counter.read_text() if counter.exists() else "").partition(" ")[0] or 0)

    def goes_on() -> None:
        reached = counted()
        until(lambda: counted() > reached + 1, 60)

    try:
        computing = start(COMPUTES.replace("4_000_000", "400_000"), counter)
        until(lambda: counted() > 2)
        computing.send_signal(signal.SIGSTOP)
        assert said(start(SAYS_WHETHER_ALONE, began)) == "a cell did not pause within 2 s\n"
        computing.send_signal(signal.SIGCONT)
        goes_on()
        assert said(start(SAYS_WHETHER_ALONE, began)) == "None\n"
        began.unlink()
        measuring = start(SAYS_WHETHER_ALONE, began)
        until(began.exists, 60)
        measuring.send_signal(signal.SIGSTOP)
        goes_on()
        assert said(start(SAYS_WHETHER_ALONE, began)) == "another measurement did not end within 4 s\n"
        measuring.send_signal(signal.SIGCONT)
        assert said(measuring) == "it took more than 4 s, and no cell waits longer\n"
        goes_on()
        with (tmp_path / "locks" / "room").open() as room, pytest.raises(BlockingIOError):
            fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the next one waits for it again
        assert start(MEASURES, counter).communicate("go\n", timeout=60)[0] == "True\n"
    finally:
        for process in others:
            process.kill()
            process.communicate()


TELLS_NOBODY = """
import multiprocessing, sys
from pathlib import Path
from execution import executors
here, there = multiprocessing.Pipe()
folder, began = map(Path, sys.argv[1:])
with quiet.computing(folder):
    began.touch()
    while True:
        executors._send(there, ("progress", "epoch 1/1", 0.5))
"""


@pytest.mark.skipif(fcntl is None, reason="cells pause by flock")
def test_a_worker_whose_program_does_not_listen_stands_still_too(tmp_path):
    """Such as one that was stopped with Ctrl-Z."""
    telling, measuring = (
        [sys.executable, "-c", HURRIED + code, str(tmp_path / "locks"), str(tmp_path / name)]
        for code, name in ((TELLS_NOBODY, "tells"), (SAYS_WHETHER_ALONE, "measures"))
    )
    with subprocess.Popen(telling, cwd=ROOT) as process:
        try:
            until((tmp_path / "tells").exists)
            time.sleep(2)  # the pipe is full
            said = subprocess.run(measuring, cwd=ROOT, input="\n", capture_output=True, text=True, timeout=60)
            assert said.stdout == "None\n" and process.poll() is None
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------------------------ in detail


def test_a_free_worker_gets_a_cell_of_the_model_that_it_has():
    cells = [made_up(f"{name}{number}") for name in "aab" for number in (1,)]
    todo = [dataclasses.replace(cell, baseline_cell=cell.id[0]) for cell in cells]
    assert chosen(todo, "b", []) == 2
    assert chosen(todo, None, ["a"]) == 2
    assert chosen(todo, "c", ["a", "b"]) == 0


def test_which_gpus_a_job_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,9")
    assert gpus_of_jobs(2, 1.0) == ["4", "6"]
    assert gpus_of_jobs(2, 2.0) == ["4,6", "7,9"]
    assert gpus_of_jobs(6, 0.5) == ["4", "6", "7", "9", "4", "6"]
    assert gpus_of_jobs(3, 0.0) == [None] * 3
    for jobs, each in ((5, 1.0), (3, 2.0), (9, 0.5)):
        with pytest.raises(ConfigError, match="at most"):
            gpus_of_jobs(jobs, each)
    with pytest.raises(ConfigError, match="neither"):
        gpus_of_jobs(1, 1.5)


def test_serial_is_a_worker_where_something_may_have_to_be_killed():
    assert isinstance(open_executor(load_config(None), "cpu"), Serial)
    limited = open_executor(load_config(None, ["run.cell_timeout=60"]), "cpu")
    assert isinstance(limited, Processes) and len(limited.workers) == 1


def test_ray_refuses_cells_that_no_node_could_hold(local_ray):
    """They would wait for ever."""
    for setting in ("run.threads_per_cell=3", "run.gpus_per_cell=2"):
        executor = open_executor(load_config(None, ["run.executor=ray", setting]), "cuda")
        with pytest.raises(ConfigError, match="no node of Ray has them"):
            list(executor.run(None, None, [made_up("large")], Report(quiet=True)))
    executor = open_executor(load_config(None, ["run.executor=ray", "run.gpus_per_cell=1.5"]), "cuda")
    with pytest.raises(ConfigError, match="neither a share"):
        list(executor.run(None, None, [made_up("large")], Report(quiet=True)))


def test_an_analysis_needs_no_executor(tmp_path, monkeypatch, capsys):
    """Of a study that was run on a cluster, on a machine without Ray."""
    monkeypatch.setattr("runner.open_executor", lambda *_: pytest.fail("it was opened"))
    assert main.main(["--phase", "analysis", "--results-dir", str(tmp_path)]) == 2
    assert "make it with python main.py --phase baseline" in capsys.readouterr().err


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-ray\.txt"):
        open_executor(load_config(None, ["run.executor=ray"]), "cpu")


def test_settings_that_nothing_would_read_are_refused():
    with pytest.raises(ConfigError, match="need executor: processes or ray"):
        load_config(None, ["run.jobs=2"])
    with pytest.raises(ConfigError, match="Ray cluster"):
        load_config(None, ["run.executor=processes", "run.address=auto"])


def test_a_worker_needs_no_torch_before_its_cells_do():
    """Sixty-four of them on one machine, whose cells compute nothing, would need 20 GB (benchmarks/dry_cluster.py)."""
    code = "import sys; from execution import cells, executors, ray_executor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_cells_import_is_without_what_takes_half_a_second_and_they_do_not_need():
    code = "import sys; from phases import baseline, mitigation, quantization; print('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_is_out_of_memory_and_what_has_poisoned_the_process():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value) and not is_poisoned(caught.value)
    assert is_poisoned(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_poisoned(torch.OutOfMemoryError("CUDA out of memory")) and not is_poisoned(ValueError("no"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a cell's own peak is known on Linux only")
def test_the_peak_is_that_of_the_cell():
    reset_peak_memory()
    before = peak_memory_mb()
    with mmap.mmap(-1, 50_000_000) as block:  # malloc keeps what it has freed
        np.frombuffer(block, np.uint8)[:] = 1
        assert 45 < peak_memory_mb() - before < 60
    reset_peak_memory()
    assert abs(peak_memory_mb() - before) < 10


def test_an_error_of_the_gpu_that_shows_at_a_cells_end_throws_its_worker_away(tmp_path, monkeypatch):
    cell = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32")
    store = Store(tmp_path)
    store.prepare("")

    def ends(compute, error):
        def empty_cache():
            raise RuntimeError(error)

        monkeypatch.setattr(cells, "_has_gpu", lambda: True)
        monkeypatch.setattr(cells, "_look_again", 0.0)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
        compute_cell(cell, compute, Job(compute, load_config(None, []), str(tmp_path), "cpu", "t"), lambda *_: None)

    def fine(cell, report):
        return CellResult({}, [])

    def asserts(cell, report):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(cells.PoisonedError, match="an illegal memory access"):
        ends(fine, "CUDA error: an illegal memory access was encountered")
    with pytest.raises(cells.PoisonedError, match="device-side assert"):  # and not what freeing says of it
        ends(asserts, "CUDA error: something else")
    with pytest.raises(RuntimeError, match="no memory"):
        ends(fine, "no memory of the GPU")


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_on_a_gpu_the_log_has_its_memory_too(tmp_path, monkeypatch, is_on_gpu):
    cell, asked = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32"), []
    monkeypatch.setattr(cells, "GARBAGE_SHARE", 1e9)
    monkeypatch.setattr(cells, "_look_again", 0.0)
    monkeypatch.setattr(cells, "_has_gpu", lambda: is_on_gpu and bool(asked))
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123_456_789)

    def compute(cell, report):
        asked.append("computed")
        return CellResult({}, [])

    store = Store(tmp_path)
    store.prepare("")
    job = Job(compute, load_config(None, []), str(tmp_path), "cpu", "token")
    for _ in range(2):
        log = compute_cell(cell, compute, job, lambda *_: None).log
        assert log.get("peak_gpu_memory_mb") == (123.5 if is_on_gpu else None)
    once = ["computed", "empty_cache", "reset_peak_memory_stats", "computed", "empty_cache"]
    assert asked == (once if is_on_gpu else ["computed"] * 2)


@pytest.mark.parametrize("there", ["another run", "a clone", "nothing"])
def test_a_worker_takes_no_other_folder_for_the_results_folder(there, tmp_path, monkeypatch):
    """Such as the one below a disk that is not mounted on its machine: what it trained would be lost."""
    monkeypatch.chdir(ROOT)  # and back, though the cell goes to its run's folder
    monkeypatch.setattr(cells, "PATIENCE", 0.05)
    monkeypatch.setattr(cells, "_prepared", None)
    cell = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32")
    mounted, below = tmp_path / "mounted", tmp_path / "below"
    prepared = []

    def prepare(config, store, device, data):
        prepared.append(store.root)
        return lambda cell, report: CellResult({}, [])

    for root in (mounted, below):
        if root is mounted or there == "another run":
            Store(root).prepare("")
    (below / "logs").mkdir(parents=True)
    with contextlib.ExitStack() as both:
        both.enter_context(only_run(Store(mounted)))
        owner = record_of(mounted).read_bytes()
        if there == "another run":
            other = dataclasses.replace(owner_of(mounted), pid=1)
            record_of(below).write_text(json.dumps(dataclasses.asdict(other)))
        job = cells.Job(prepare, load_config(None, []), str(below), "cpu", "token", owner, str(tmp_path))
        before = sorted(below.rglob("*"))
        with pytest.raises(StoreError, match=r"below on \S+ is not the results folder of this run"):
            cells.prepared(job)
        assert prepared == []
        # a worker that had begun, and whose disk is unmounted since
        compute = cells.prepared(dataclasses.replace(job, results_dir=str(mounted)))
        with pytest.raises(StoreError, match="not the results folder" if there == "another run" else "folder is gone"):
            compute_cell(cell, compute, job, lambda *_: None)
        assert sorted(below.rglob("*")) == before
        assert compute_cell(cell, compute, dataclasses.replace(job, results_dir=str(mounted)), lambda *_: None).row


@pytest.mark.parametrize("error", [None, ValueError("bad luck")])
def test_a_cell_leaves_no_model_behind(tmp_path, monkeypatch, error):
    """A traced one is a cycle, which goes only when Python looks for cycles."""
    cell = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32")
    traced = []

    def compute(cell, report):
        traced.append(weakref.ref(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)).weight))
        if error is not None:
            raise error
        return CellResult({}, [])

    store = Store(tmp_path)
    store.prepare("")
    job = Job(compute, load_config(None, []), str(tmp_path), "cpu", "token")
    monkeypatch.setattr(cells, "_look_again", 0.0)
    gc.disable()
    try:
        outcome = compute_cell(cell, compute, job, lambda *_: None)
        assert outcome.row["status"] == ("done" if error is None else "failed")
        assert traced[0]() is None
        compute_cell(cell, compute, job, lambda *_: None)  # at once: it would take too large a share of the time,
        assert (traced[1]() is None) == (error is not None)  # but for what failed, perhaps for want of memory
        monkeypatch.setattr(cells, "_look_again", time.monotonic())
        compute_cell(cell, compute, job, lambda *_: None)
        assert traced[1]() is traced[2]() is None
    finally:
        gc.enable()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back itself, or cannot")
def test_memory_that_a_cell_freed_in_pieces_is_given_back(tmp_path, monkeypatch):
    """glibc keeps what lies below a piece that is still in use."""
    cell, pins = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32"), []

    def resident_mb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    def compute(cell, report):
        pieces = [bytes([1]) * 60_000 for _ in range(2_000)]
        pins.append(pieces[-1])
        return CellResult({}, [])

    store = Store(tmp_path)
    store.prepare("")
    job = Job(compute, load_config(None, []), str(tmp_path), "cpu", "token")
    memory.give_back()  # what another test has freed, which would be used again
    before = resident_mb()
    monkeypatch.setattr(cells, "_look_again", float("inf"))
    compute_cell(cell, compute, job, lambda *_: None)
    assert resident_mb() > before + 90
    monkeypatch.setattr(cells, "_look_again", 0.0)
    compute_cell(cell, compute, job, lambda *_: None)
    assert resident_mb() < before + 30


def test_a_cell_leaves_no_source_code_behind(tmp_path):
    """torch.fx keeps that of every graph that it traces."""
    cell = Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32")
    kept = torch.fx.graph_module._loader.eval_cache
    traced = []

    def compute(cell, report):
        traced.append(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)))
        assert len(kept) > before
        return CellResult({}, [])

    store = Store(tmp_path)
    store.prepare("")
    job = Job(compute, load_config(None, []), str(tmp_path), "cpu", "token")
    before = len(kept)
    outcome = compute_cell(cell, compute, job, lambda *_: None)
    assert outcome.row["status"] == "done", outcome.row["error"]
    assert len(kept) == before
    assert traced[0](torch.ones(1, 2)).shape == (1, 2)
