"""What a run writes as it goes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_executors import TINY

import runner
from config import Config
from execution.cells import CellResult
from plan import plan
from runner import TABLE_SECONDS, TABLE_SHARE, Report, run_cells
from store import Store

ROOT = Path(__file__).parent.parent


def no_compute(config, store, device, data):
    return lambda cell, report: CellResult({"accuracy": 0.5}, [])


@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_tables_take_a_small_share_of_a_run(seconds, tmp_path, monkeypatch):
    """However long it takes to write them; and they are no older than that allows."""
    config = Config.model_validate({"run": {"seeds": list(range(150))}, "models": {"architectures": ["resnet50"]}})
    store = Store(tmp_path)
    store.prepare("")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock.now))
    written = []

    def write_tables(phase, planned):
        clock.now += seconds
        written.append(clock.now)

    monkeypatch.setattr(store, "write_tables", write_tables)
    write_cell = store.write_cell

    def one_second_later(*arguments):
        clock.now += 1.0
        write_cell(*arguments)

    monkeypatch.setattr(store, "write_cell", one_second_later)
    cells = plan(config)["baseline"]
    assert len(cells) == 150
    run_cells("baseline", cells, no_compute, config, store, Report(quiet=True))
    between = [after - before for before, after in zip([0.0, *written[:-2]], written[:-1], strict=True)]
    pause = max(TABLE_SECONDS, seconds / TABLE_SHARE)
    assert between and all(gap >= pause for gap in between[1:])  # the first one's cost is not known before
    assert max(between) <= pause + 1.0 + 2 * seconds
    assert written[-1] == clock.now  # the end of the run has them whole


def output(kind: str) -> tuple[int | None, int]:
    """(where it is read, where it is written); the reader is to close."""
    if kind == "a full disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        return None, os.open("/dev/full", os.O_WRONLY)
    return os.pipe() if kind == "a pipe that nobody reads" else os.openpty()


@pytest.mark.skipif(os.name != "posix", reason="pipes and terminals are POSIX's")
@pytest.mark.parametrize("kind", ["a full disk", "a pipe that nobody reads", "a terminal that is gone"])
@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_a_run_goes_on_though_nobody_can_be_told(executor, kind, tmp_path):
    """Neither is it ended nor does a cell fail of it, in which a training tells how far it is. On a terminal there is a
    bar, drawn in a thread."""
    run = {"threads_per_cell": 1, "seeds": [0], "executor": executor}
    config = {**TINY, "data": {**TINY["data"], "cache": str(tmp_path / "cache")}, "run": run}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    command = [sys.executable, "main.py", "--phase", "baseline", "--config", str(tmp_path / "tiny.yaml"),
               "--results-dir", str(tmp_path / "results"), "--device", "cpu"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"TERM": "xterm"}
    reader, writer = output(kind)
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=writer, stderr=err, env=environment, start_new_session=True
        )
    os.close(writer)
    try:
        if reader is not None:
            told = b""
            while b"baseline: 1 cell" not in told:
                told += os.read(reader, 1000)
            if kind == "a terminal that is gone":
                while "━".encode() not in told:
                    told += os.read(reader, 1000)
            os.close(reader)
        assert process.wait(300) == 0, (tmp_path / "err").read_text()
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "err").read_text() == ""
    (record,) = (record for _, record in Store(tmp_path / "results").records())
    assert record["row"]["status"] == "done"
