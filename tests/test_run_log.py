"""log.jsonl: a line for each cell that ended, whole whatever happens to the writer."""

import json
import mmap
import os
import resource
import time
from datetime import UTC, datetime

import pytest
from cheap_run import cells_of, fork, run_here, write_config

from execution.run_log import KEYS, RunLog, measured
from store import Store, StoreError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


@pytest.fixture
def log(tmp_path) -> RunLog:
    store = Store(tmp_path / "results")
    store.prepare("")
    return RunLog(store)


def test_each_cell_of_a_run_has_a_line(tmp_path):
    config, results = write_config(tmp_path, seeds=1), tmp_path / "results"

    def breaks(cell, computed, store):
        if computed == 1:
            raise MemoryError("no 12 GB\nleft")

    before = datetime.now(UTC)
    assert run_here(config, results, event=breaks) == 1
    entries = RunLog(Store(results)).read()
    assert [entry["cell"] for entry in entries] == cells_of(config)
    assert [entry["status"] for entry in entries] == ["done", "failed", "failed"]  # the counter stays where it failed
    for entry in entries:
        assert tuple(entry) == KEYS and entry["phase"] == "baseline" and entry["worker"].endswith(f":{os.getpid()}")
        start, end = (datetime.fromisoformat(entry[key]) for key in ("start", "end"))
        assert before.timestamp() - 0.001 <= start.timestamp() <= end.timestamp()
        assert entry["start"].endswith("Z") and 0 <= entry["seconds"] < 60
    assert entries[0]["error"] is None and entries[0]["traceback"] is None
    assert entries[1]["error"].startswith("MemoryError: no 12 GB left (too little memory")
    trace = entries[1]["traceback"].splitlines()
    assert trace[0].startswith("Traceback") and trace[-2:] == ["MemoryError: no 12 GB", "left"]
    assert any("in breaks" in line for line in trace)


def test_what_is_missing_is_null_and_the_phase_is_the_cells(log):
    log.store.write_cell({"cell": "c", "phase": "mitigation", "status": "done"}, [])
    log.record({"cell": "c", "status": "done", "start": 0, "end": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)})
    log.record({"cell": "unknown", "status": "failed", "phase": "quantization", "worker": "é\n"})
    first, second = log.read()
    assert first == dict.fromkeys(KEYS) | {
        "cell": "c", "phase": "mitigation", "status": "done",
        "start": "1970-01-01T00:00:00.000Z", "end": "2026-01-02T03:04:05.000Z",
    }  # fmt: skip
    assert second["phase"] == "quantization" and second["worker"] == "é\n"
    assert log.path.read_bytes().count(b"\n") == 2


def test_a_torn_line_is_left_out_and_never_glued_to_the_next(log):
    for cell in ("a", "b"):
        log.record({"cell": cell, "phase": "baseline", "worker": "é"})
    whole = log.path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start + 1, len(whole)):  # wherever the power went, in the middle of a character too
        log.path.write_bytes(whole[:length])
        log.record({"cell": "c", "phase": "baseline"})
        cells = [entry["cell"] for entry in log.read()]
        # without its end-of-line alone the second is whole
        assert cells == (["a", "b", "c"] if length == len(whole) - 1 else ["a", "c"])
        assert log.read_with_damage()[1] == (length < len(whole) - 1)
    log.path.write_bytes(b"\0" * 4096 + b"\n" + whole)  # what some file systems leave
    assert [entry["cell"] for entry in log.read()] == ["a", "b"]


def test_a_line_that_the_disk_cuts_off(log, tmp_path):
    """A real partial write: the file may grow by 30 bytes more."""
    log.record({"cell": "a", "phase": "baseline"})
    size = log.path.stat().st_size

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, size + 30))
        with pytest.raises(StoreError, match=r"log\.jsonl: cannot be written \(File too large\)"):
            log.record({"cell": "b", "phase": "baseline"})
        return 5

    assert fork(tmp_path / "child", limited).wait() == 5
    assert log.path.stat().st_size == size + 30
    log.record({"cell": "c", "phase": "baseline"})
    assert [entry["cell"] for entry in log.read()] == ["a", "c"]


def test_lines_of_several_processes_never_mix(log, tmp_path):
    """Four writers of long lines at once, after a torn one that each of them would end."""
    log.path.write_text('{"cell"')
    go = tmp_path / "go"

    def writes(name: str) -> int:
        while not go.exists():
            time.sleep(0.0005)
        for number in range(25):
            log.record({"cell": f"{name}{number}", "phase": "baseline", "traceback": name * 30_000})
        return 0

    children = [fork(tmp_path / name, lambda name=name: writes(name)) for name in "pqrs"]
    go.touch()
    assert [child.wait() for child in children] == [0] * 4
    entries, damaged = log.read_with_damage()
    assert damaged == 1
    assert sorted(entry["cell"] for entry in entries) == sorted(f"{name}{i}" for name in "pqrs" for i in range(25))
    assert all(entry["traceback"] == entry["cell"][0] * 30_000 for entry in entries)
    for name in "pqrs":
        mine = [entry["cell"] for entry in entries if entry["cell"][0] == name]
        assert mine == [f"{name}{i}" for i in range(25)]


def test_no_log_and_one_that_is_something_else(log):
    assert log.read() == []
    log.path.mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        log.read()


def test_peak_memory_is_that_of_the_piece_of_work_alone(tmp_path):
    def work() -> int:
        with measured() as large, mmap.mmap(-1, 200_000_000) as block:  # not what another test has given back
            block[::4096] = bytes(range(256)) * (len(block[::4096]) // 256) + bytes(len(block[::4096]) % 256)
        with measured() as small:
            pass
        if large["peak_memory_mb"] is None:
            pytest.skip("the kernel does not count a piece of work's peak")
        print(json.dumps([large["peak_memory_mb"] - small["peak_memory_mb"], large["seconds"]]))
        return 0

    child = fork(tmp_path / "child", work)
    status = child.wait()
    if status == 77:
        pytest.skip(child.out)
    assert status == 0, child.err
    more, seconds = json.loads(child.out)
    assert 190 < more < 215 and seconds > 0
