"""What may happen to a run at three in the morning, each really done to one: full and read-only disks, a folder that
goes away, kill -9, Ctrl-C, writes cut in half. One clear line, the documented exit status, nothing finished lost."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from cheap_run import (
    captured,
    cells_of,
    contents,
    fork,
    fork_and_wait,
    fork_run,
    mount,
    own_mounts,
    run_here,
    write_config,
)

import store as store_module
from config import load_config
from execution.run_log import RunLog
from models import checkpoint_matches
from phases.status import study_status
from store import Store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> dict[str, bytes]:
    results = tmp_path_factory.mktemp("uninterrupted") / "results"
    assert run_here(config, results) == 0
    return contents(results)


def only_line(text: str) -> str:
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def finished(results: Path) -> dict[Path, int]:
    """The files of the cells that are done, with when they were written."""
    store = Store(results)
    stamps = {}
    for cell, record in store.records():
        assert store.is_done(cell)
        row = record["row"]
        checkpoint = store.checkpoint_path(row["dataset"], row["model"], row["seed"])
        assert checkpoint_matches(checkpoint, cell)
        store.predictions(cell)
        for path in (store.record_path(cell), store.predictions_path(cell), checkpoint):
            stamps[path] = path.stat().st_mtime_ns
    return stamps


def unchanged(stamps: dict[Path, int]) -> bool:
    return stamps == {path: path.stat().st_mtime_ns for path in stamps}


def goes_on(config: Path, results: Path, uninterrupted: dict[str, bytes], n: int | None = None) -> None:
    """The same command again keeps what was finished (n cells) and ends with the bytes of an uninterrupted run."""
    kept = finished(results)
    assert n is None or len(kept) == 3 * n
    assert run_here(config, results) == 0
    assert unchanged(kept)
    assert contents(results) == uninterrupted
    assert not list((results / "running").iterdir()) and not (results / ".lock.json").exists()


# ------------------------------------------------------------------------------------------------------------ the disk


def test_a_disk_that_is_full(config, uninterrupted, tmp_path):
    """A file system of 100 kB, which holds some of the twelve cells; then it grows."""
    results = tmp_path / "results"
    results.mkdir()

    def scenario():
        own_mounts()
        mount("-t", "tmpfs", "-o", "size=100k", "tmpfs", str(results))
        status, error = captured(tmp_path / "full", lambda: run_here(config, results))
        assert status == 2
        assert "No space left on device" in only_line(error) and "finished cells are safe" in error
        assert not list(results.rglob("*.tmp")) and not list((results / "running").iterdir())
        assert 0 < len(finished(results)) < 3 * 12
        mount("-o", "remount,size=4m", str(results))
        goes_on(config, results, uninterrupted)
        logged = {entry["cell"] for entry in RunLog(Store(results)).read()}
        assert logged == set(cells_of(config))

    fork_and_wait(tmp_path / "child", scenario)


def test_a_disk_that_turns_read_only_and_one_that_is_from_the_start(config, uninterrupted, tmp_path):
    results = tmp_path / "results"
    results.mkdir()

    def break_it(cell, computed, store):
        if computed == 5:  # over itself: a file system with open files cannot be made read-only
            mount("--bind", str(results), str(results))
            mount("-o", "remount,bind,ro", str(results))

    def scenario():
        own_mounts()
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(results))
        status, error = captured(tmp_path / "turns", lambda: run_here(config, results, event=break_it))
        assert status == 2 and "Read-only file system" in only_line(error) and "finished cells are safe" in error
        kept = finished(results)
        assert len(kept) == 3 * 5
        before = contents(results)
        status, error = captured(tmp_path / "is", lambda: run_here(config, results))
        assert status == 2 and "Read-only file system" in only_line(error)
        assert contents(results) == before
        subprocess.run(["umount", str(results)], check=True)
        goes_on(config, results, uninterrupted, 5)

    fork_and_wait(tmp_path / "child", scenario)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else(uninterrupted, tmp_path):
    """As an ordinary user, in a folder that only its owner may write."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own may not be entered by others
        folder = Path(name)
        folder.chmod(0o755)
        config, results = write_config(folder), folder / "results"
        assert run_here(config, results) == 0

        def as_nobody() -> int:
            os.setgid(65534)
            os.setuid(65534)
            return run_here(config, results)

        status, error = captured(tmp_path / "out", as_nobody)
        assert status == 2 and "cannot be written (Permission denied)" in only_line(error) and str(results) in error
        assert contents(results) == uninterrupted


@pytest.mark.parametrize("how", ["deleted", "moved", "unmounted"])
def test_a_folder_that_goes_away_is_not_made_again(how, config, uninterrupted, tmp_path):
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"

    def break_it(cell, computed, store):
        if computed != 4:
            return
        if how == "deleted":
            shutil.rmtree(results)
        elif how == "moved":
            results.rename(elsewhere)
        else:
            subprocess.run(["umount", "--lazy", str(results)], check=True)

    def scenario():
        if how == "unmounted":
            own_mounts()
            results.mkdir()
            elsewhere.mkdir()
            mount("--bind", str(elsewhere), str(results))
        status, error = captured(tmp_path / "run", lambda: run_here(config, results, event=break_it))
        assert status == 2 and f"{results}: the results folder is gone" in only_line(error)
        assert "run the same command again" in error
        assert not results.exists() or (how == "unmounted" and not list(results.iterdir()))
        if how == "deleted":
            return
        if how == "moved":
            elsewhere.rename(results)
        else:
            mount("--bind", str(elsewhere), str(results))
        goes_on(config, results, uninterrupted, 4)

    fork_and_wait(tmp_path / "child", scenario)


# ------------------------------------------------------------------------------------------------- the end of a process


def test_kill_9_at_any_moment_and_the_same_command_again(config, uninterrupted, tmp_path):
    """Ten times, each before another operation on a file of the results folder, drawn from the first hundred."""
    results, kept = tmp_path / "results", {}
    for kill, operation in enumerate(np.random.default_rng(3).integers(1, 100, 10)):

        def killed(last: int = operation) -> int:
            left = itertools.count(last, -1)

            def count(event, arguments):
                is_ours = event in ("open", "os.rename", "os.remove", "os.mkdir") and str(results) in str(arguments[0])
                if is_ours and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            return run_here(config, results)

        assert fork(tmp_path / f"run{kill}", killed).wait() == -signal.SIGKILL
        assert unchanged(kept)
        kept = finished(results) if results.exists() else {}
        if len(kept) == 3 * 12:
            break
    assert kill > 2 and kept
    goes_on(config, results, uninterrupted)


@pytest.mark.parametrize("write", range(8))
def test_killed_between_a_write_and_its_rename(write, config, uninterrupted, tmp_path, monkeypatch):
    """A power cut as far as a process can have one. Of a run's first new names, those of the lock's (a link), the
    config's, the environment's file and the running mark come before the checkpoint, the predictions and the record."""
    results, calls = tmp_path / "results", iter(range(100))

    def cut(rename):
        def cut_or_rename(source, target):
            if next(calls) == write:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return cut_or_rename

    with monkeypatch.context() as patch:
        for name in ("replace", "link"):
            patch.setattr(os, name, cut(getattr(os, name)))
        assert fork_run(tmp_path / "run", config, results).wait() == -signal.SIGKILL
    (torn,) = results.rglob("*.tmp")
    assert store_module.TEMPORARY.fullmatch(torn.name)
    assert len(finished(results)) == (3 if write > 6 else 0)
    goes_on(config, results, uninterrupted)
    assert not list(results.rglob("*.tmp"))


def test_nothing_reads_as_done_before_all_of_it_is_on_the_disk(config, tmp_path, monkeypatch):
    """The order of a cell's syncs and renames: each file is whole when it is synced, which is before its rename, and
    its folder is synced after; all of that has happened to the checkpoint and the predictions before the record's."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def record_sync(file):
        fsync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        seen.append(("sync", path.name, path.stat().st_size if path.is_file() else None))

    def record_rename(source, target):
        seen.append(("rename", Path(target).name, Path(source).stat().st_size))
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("the name of an open file is Linux's to tell")
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    results = tmp_path / "results"
    assert run_here(config, results, "--set", "run.seeds=[0]", "models.architectures=[resnet50]") == 0
    (cell,) = (path.stem for path in (results / "cells").iterdir())
    order = []
    for folder, name in (
        ("checkpoints", "synthetic-resnet50-s0.safetensors"),
        ("predictions", f"{cell}.npz"),
        ("cells", f"{cell}.json"),
    ):
        size = (results / folder / name).stat().st_size
        temporary = f".{name}.{os.getpid()}.tmp"
        order += [("sync", temporary, size), ("rename", name, size), ("sync", folder, None)]
    assert [step for step in seen if step in order and step[1] != "running"][: len(order)] == order
    assert all(("sync", name, None) in seen for name in ("results", tmp_path.name))  # the names of the folders


@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm_stop_cleanly_and_say_how_to_go_on(number, status, what, config, uninterrupted, tmp_path):
    results = tmp_path / "results"

    def slowly(cell, computed, store):
        time.sleep(30 if computed == 4 else 0)

    child = fork_run(tmp_path / "run", config, results, event=slowly)
    child.wait_for(lambda: len(list((results / "cells").glob("*.json"))) == 4 and list((results / "running").iterdir()))
    assert child.kill(number) == status
    assert child.err.strip() == f"{what}; finished cells are kept: run the same command again to go on"
    assert (results / "baseline_results.csv").read_text().count("\n") == 1 + 4  # the table has what is finished
    assert not list((results / "running").iterdir()) and not (results / ".lock.json").exists()
    goes_on(config, results, uninterrupted, 4)


def test_who_started_afresh_is_told_to_go_on_without(config, uninterrupted, tmp_path):
    """With --fresh again, what is finished would be computed once more."""
    results = tmp_path / "results"
    assert run_here(config, results) == 0

    def slowly(cell, computed, store):
        time.sleep(30 if computed == 4 else 0)

    child = fork_run(tmp_path / "run", config, results, "--fresh", event=slowly)
    child.wait_for(lambda: len(list((results / "cells").glob("*.json"))) == 4 and list((results / "running").iterdir()))
    assert child.kill(signal.SIGINT) == 130
    told = "interrupted; finished cells are kept: run the same command again, without --fresh, to go on"
    assert child.err.strip() == told
    goes_on(config, results, uninterrupted, 4)


def at_a_record(results: Path, act, is_after: bool) -> None:
    """Call `act` in this process before the third record gets its name; or after, before whatever comes next."""
    renamed = itertools.count(1)
    is_due = False

    def watch(event, arguments):
        nonlocal is_due
        if event not in ("open", "os.rename", "os.remove") or str(results) not in str(arguments[0]):
            return
        if is_due:
            is_due = False
            act()
        if event == "os.rename" and Path(arguments[1]).parent.name == "cells" and next(renamed) == 3:
            is_due = is_after
            if not is_after:
                act()

    sys.addaudithook(watch)


@pytest.mark.parametrize("is_after", [False, True])
def test_a_cell_that_is_done_is_in_the_log_though_the_program_was_killed_there(
    is_after, config, uninterrupted, tmp_path
):
    """Before its record has its name, or right after; and its time counts each time that it was spent."""
    results = tmp_path / "results"

    def killed() -> int:
        at_a_record(results, lambda: os.kill(os.getpid(), signal.SIGKILL), is_after)
        return run_here(config, results)

    assert fork(tmp_path / "run", killed).wait() == -signal.SIGKILL
    store, planned = Store(results), cells_of(config)
    assert [cell for cell in planned if store.is_done(cell)] == planned[: 3 if is_after else 2]
    assert [entry["cell"] for entry in RunLog(store).read()] == planned[:3]
    counted = study_status(load_config(config), store)["phases"]["baseline"]
    assert (counted["done"], counted["to_do"]) == ((3, 9) if is_after else (2, 10))
    goes_on(config, results, uninterrupted, 3 if is_after else 2)
    entries = RunLog(store).read()
    again = planned[3:] if is_after else planned[2:]
    assert [entry["cell"] for entry in entries] == planned[:3] + again
    counted = study_status(load_config(config), store)["phases"]["baseline"]
    assert counted["done"] == 12
    assert counted["seconds_spent"] == pytest.approx(sum(entry["seconds"] for entry in entries))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_a_record_is_written_is_heard_when_it_is_there(number, status, config, uninterrupted, tmp_path):
    results = tmp_path / "results"

    def interrupted() -> int:
        at_a_record(results, lambda: os.kill(os.getpid(), number), is_after=False)
        return run_here(config, results)

    assert fork(tmp_path / "run", interrupted).wait() == status
    store, planned = Store(results), cells_of(config)
    assert [cell for cell in planned if store.record(cell)] == planned[:3]  # and no other one was begun
    assert [entry["cell"] for entry in RunLog(store).read()] == planned[:3] and not store.marked()
    goes_on(config, results, uninterrupted, 3)


def test_a_second_ctrl_c_does_not_wait_for_a_record(config, tmp_path):
    """Which a disk that does not answer never lets be written."""
    results = tmp_path / "results"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted() -> int:
        at_a_record(results, twice, is_after=False)
        return run_here(config, results)

    assert fork(tmp_path / "run", interrupted).wait() == 130
    assert len(list((results / "cells").iterdir())) == 2


def test_a_log_without_room_leaves_no_cell_done_that_is_in_no_log(config, uninterrupted, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    results = tmp_path / "results"

    def fills(cell, computed, store):
        if computed == 3:
            (results / "log.jsonl").rename(tmp_path / "log.jsonl")
            (results / "log.jsonl").symlink_to("/dev/full")

    status, error = captured(tmp_path / "run", lambda: run_here(config, results, event=fills))
    assert status == 2 and "log.jsonl: cannot be written (No space left on device)" in only_line(error)
    (tmp_path / "log.jsonl").replace(results / "log.jsonl")
    assert [entry["cell"] for entry in RunLog(Store(results)).read()] == cells_of(config)[:3]
    goes_on(config, results, uninterrupted, 3)
    assert [entry["cell"] for entry in RunLog(Store(results)).read()] == cells_of(config)


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema_version": 2, "row": {"phase": "baseline", "sta', b"\0" * 300]
)
def test_a_truncated_record_is_named_and_never_reads_as_done(content, config, uninterrupted, tmp_path, capsys):
    results = tmp_path / "results"
    assert run_here(config, results) == 0
    path = Store(results).record_path(cells_of(config)[3])
    path.write_bytes(content)
    capsys.readouterr()
    assert run_here(config, results) == 2
    error = only_line(capsys.readouterr().err)
    assert f"{path}: cannot be read" in error and "delete it" in error
    path.unlink()
    goes_on(config, results, uninterrupted, 11)


def test_a_full_log_is_an_error_of_one_line(tmp_path):
    """/dev/full: it opens, and has no room."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    store = Store(tmp_path / "results")
    store.prepare("")
    (store.root / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(store_module.StoreError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        RunLog(store).record({"cell": None, "phase": "baseline", "status": "done"})
    assert errno.ENOSPC == 28 and json.loads((store.root / "environment.json").read_text())
