"""What may happen to the disk while several processes write to it, each really done to a run of main.py: it is full,
turns read-only, goes away. One clear line, exit status 2, nobody left behind, nothing finished lost; the same command
again ends with the files of a run that nothing happened to."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from cheap_run import fork_and_wait, mount, own_mounts
from test_executors import TINY, contents, processes_marked, until

from store import Store

ROOT = Path(__file__).parent.parent
CELLS = 4  # each with a checkpoint of 2.9 MB, and for a moment a second file of that size
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts of a process's own are Linux's")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    sections = {
        "data": {**TINY["data"], "cache": str(folder / "cache")},
        "run": {**TINY["run"], "seeds": list(range(CELLS))},
    }
    (folder / "tiny.yaml").write_text(json.dumps({**TINY, **sections}))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def undisturbed(config) -> dict[str, bytes]:
    results = config.parent / "undisturbed"
    assert started(config, results, "serial", config.parent).wait() == 0
    return contents(results)


def started(config: Path, results: Path, executor: str, folder: Path, mark: str = "BNQ_NOBODY") -> subprocess.Popen:
    command = [sys.executable, "main.py", "--phase", "baseline", "--config", str(config), "--device", "cpu", "--quiet"]
    command += ["--results-dir", str(results), "--set", f"run.executor={executor}"]
    command += ["run.jobs=2"] if executor != "serial" else []
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env={**os.environ, mark: "1"})


def done(results: Path) -> dict[Path, int]:
    """The files of the cells that are done, with when they were written."""
    store, stamps = Store(results), {}
    for cell, record in store.records():
        assert store.is_done(cell)
        row = record["row"]
        checkpoint = store.checkpoint_path(row["dataset"], row["model"], row["seed"])
        for path in (store.record_path(cell), store.predictions_path(cell), checkpoint):
            stamps[path] = path.stat().st_mtime_ns
    return stamps


def fill(results: Path) -> None:
    pass  # there is room for two cells at once, and not for two more


def make_read_only(results: Path) -> None:
    mount("--bind", str(results), str(results))  # over itself: one with open files cannot be made read-only
    mount("-o", "remount,bind,ro", str(results))


def take_away(results: Path) -> None:
    """Lazily, as of a server that does not answer: who has it open keeps it."""
    subprocess.run(["umount", "--lazy", str(results)], check=True)


FAULTS = {  # what is done to the disk once the first cell has ended, what is said then, and what mends it
    "full": (fill, "No space left on device", lambda results, kept: mount("-o", "remount,size=60m", str(results))),
    "read-only": (
        make_read_only, "Read-only file system",
        lambda results, kept: subprocess.run(["umount", str(results)], check=True),
    ),
    "gone": (take_away, "the results folder is gone", lambda results, kept: mount("--bind", str(kept), str(results))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("executor", "fault"),
    [*(("processes", fault) for fault in FAULTS), ("ray", "full"), ("ray", "gone")],  # read-only is told as full is
)
def test_a_disk_that_fails_under_workers(fault, executor, config, undisturbed, tmp_path):
    if executor == "ray":
        pytest.importorskip("ray")
    happens, told, mend = FAULTS[fault]
    results, kept = tmp_path / "results", tmp_path / "kept"
    results.mkdir()
    kept.mkdir()
    mark = f"BNQ_ENDURANCE_{uuid.uuid4().hex}"

    def scenario():
        own_mounts()
        mount("-t", "tmpfs", "-o", f"size={13 if fault == 'full' else 60}m", "tmpfs", str(kept))
        mount("--bind", str(kept), str(results))
        program = started(config, results, executor, tmp_path, mark)
        until(lambda: program.poll() is not None or list((results / "cells").glob("*.json")))
        happens(results)
        status = program.wait(timeout=120)
        lines = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and told in lines[0], (status, (tmp_path / "err").read_text())
        assert str(results) in lines[0] and "run the same command again" in lines[0]
        until(lambda: not processes_marked(mark))
        if fault == "gone":
            assert not list(results.iterdir())  # nobody has made another one in its place
        mend(results, kept)
        finished = done(results)
        assert (6 if fault == "full" else 3) <= len(finished) < 3 * CELLS
        assert started(config, results, executor, tmp_path).wait() == 0, (tmp_path / "err").read_text()
        assert finished == {path: path.stat().st_mtime_ns for path in finished}
        assert contents(results) == undisturbed
        assert not list((results / "running").iterdir()) and not list(results.rglob("*.tmp"))

    fork_and_wait(tmp_path / "child", scenario)
