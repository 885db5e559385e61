"""One run at a time: two runs on one folder, leftovers of dead ones, other machines, workers that outlive their run."""

import dataclasses
import errno
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cheap_run import cells_of, contents, fork, fork_run, run_here, write_config

import main
import owners
from execution import run_lock
from execution.run_lock import only_run, owner_of
from owners import Owner
from store import Store, StoreError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), seeds=2)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.05)
    monkeypatch.setattr(run_lock, "ORPHANS_PATIENCE", 0.05)


def refused(capsys, config: Path, results: Path, *more: str) -> str:
    """The one line of a run that is refused with exit status 2."""
    capsys.readouterr()
    assert run_here(config, results, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def ask(capsys, config: Path, results: Path, *more: str) -> str:
    capsys.readouterr()
    assert main.main(["--config", str(config), "--results-dir", str(results), *more]) == 0
    return capsys.readouterr().out


def run_that_waits(config: Path, tmp_path: Path):
    """(results, the file for which it waits, the run), in its fourth cell."""
    results, go = tmp_path / "results", tmp_path / "go"

    def waits(cell, computed, store):
        while computed == 3 and not go.exists():
            time.sleep(0.005)

    first = fork_run(tmp_path / "first", config, results, event=waits)
    first.wait_for((results / "running" / f"{cells_of(config)[3]}.json").exists)
    return results, go, first


def test_a_second_run_is_refused_and_disturbs_nothing(config, tmp_path, capsys, hurried):
    results, go, first = run_that_waits(config, tmp_path)
    before = contents(results)
    for more in ((), ("--fresh",), ("--retry-failed",)):
        error = refused(capsys, config, results, *more)
        assert f"process {first.pid} on {platform.node()} since 2" in error and "(python " in error
    assert contents(results) == before
    told = json.loads(ask(capsys, config, results, "--status", "--json"))
    assert told["run"]["pid"] == first.pid
    assert [(cell["cell"], cell["pid"]) for cell in told["running"]] == [(cells_of(config)[3], first.pid)]
    numbers = told["phases"]["baseline"]
    assert [numbers[key] for key in ("done", "failed", "running", "to_do")] == [3, 0, 1, 2]
    assert "3 done, 3 to do" in ask(capsys, config, results, "--phase", "baseline", "--dry-run", "--device", "cpu")
    assert contents(results) == before
    go.touch()
    assert first.wait() == 0, first.err
    assert run_here(config, results) == 0  # now that it has ended


def test_the_analysis_writes_and_is_refused_too(config, tmp_path, capsys, hurried):
    with only_run(Store(tmp_path / "results")):
        capsys.readouterr()
        assert (
            main.main(["--phase", "analysis", "--config", str(config), "--results-dir", str(tmp_path / "results")]) == 2
        )
    assert "another run is using this folder" in capsys.readouterr().err


def test_a_run_that_was_killed_blocks_nobody(config, tmp_path):
    results = tmp_path / "results"
    first = fork_run(tmp_path / "first", config, results, event=lambda *_: time.sleep(30))
    first.wait_for(lambda: (results / "running").is_dir() and bool(list((results / "running").glob("*.json"))))
    os.kill(first.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while owner_of(results).is_alive():  # a zombie, which nobody has waited for yet
        assert time.monotonic() < deadline
    assert owners.is_alive(first.pid) is False
    assert run_here(config, results) == 0
    assert first.wait() == -signal.SIGKILL
    assert not (results / ".lock.json").exists() and not list((results / "running").iterdir())


def test_a_worker_that_outlives_its_run_has_to_end_first(config, tmp_path, capsys, hurried):
    results = tmp_path / "results"

    def work() -> None:
        with Store(results).mark_running(cells_of(config)[0]):
            time.sleep(60)

    def forks(cell, computed, store):
        fork(tmp_path / "worker", work, outlives=True)
        time.sleep(60)

    first = fork_run(tmp_path / "first", config, results, event=forks)
    mark = results / "running" / f"{cells_of(config)[0]}.json"
    first.wait_for(lambda: mark.exists() and f'"pid": {first.pid},' not in mark.read_text())
    worker = json.loads(mark.read_text())["pid"]
    try:
        assert first.kill() == -signal.SIGKILL
        record = (results / ".lock.json").read_bytes()
        error = refused(capsys, config, results)
        assert (results / ".lock.json").read_bytes() == record  # by which --status tells of the run that died
        assert f"process {worker}, a worker of a run that has died, is still computing {cells_of(config)[0]}" in error
    finally:
        os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while owners.is_alive(worker):  # it takes the kernel a moment
        assert time.monotonic() < deadline
    assert run_here(config, results) == 0


def test_a_full_disk_is_no_reason_to_remove_what_a_living_run_writes(config, tmp_path, capsys, monkeypatch):
    """On a machine whose locks are its own, with no room to ask how long the other one's record has been still."""
    results = tmp_path / "results"
    assert run_here(config, results) == 0
    other = dataclasses.replace(owners.Owner.this_process(), host="node17", pid=4711)
    record = results / ".lock.json"
    record.write_text(json.dumps(dataclasses.asdict(other)))
    theirs = results / "cells" / ".one.json.4711.tmp"  # process 4711 is not alive here
    theirs.write_text("half")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock, "_write_new", full)
    monkeypatch.setattr(run_lock, "_clock_of", full)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.05)
    before = record.read_bytes()
    assert "another run is using this folder: process 4711 on node17" in refused(capsys, config, results)
    assert theirs.exists() and record.read_bytes() == before
    record.unlink()  # a run that starts there just then, after this one has looked
    makes = run_lock._make

    def late(path, content):
        record.write_bytes(before)
        return makes(path, content)

    monkeypatch.setattr(run_lock, "_make", late)
    assert "another run is using this folder: process 4711 on node17" in refused(capsys, config, results)
    assert theirs.exists() and record.read_bytes() == before


def test_a_run_may_wait_for_another_one(config, tmp_path, capsys, hurried, monkeypatch):
    """Once it is let in it does all that it was to do, --fresh too; nothing before."""
    monkeypatch.setattr(run_lock, "POLL", 0.01)
    results, go, first = run_that_waits(config, tmp_path)
    second = fork_run(tmp_path / "second", config, results, "--fresh", "--wait", "60")
    err = tmp_path / "second" / "err"
    second.wait_for(lambda: err.exists() and "waiting for 60 seconds at most: " in err.read_text())
    before = contents(results)
    time.sleep(0.3)
    assert contents(results) == before and f"process {first.pid} on" in second.err
    go.touch()
    assert first.wait() == 0 and second.wait() == 0, second.err
    assert second.err.count("\n") == 1 and second.out.count("accuracy") == len(cells_of(config))


def test_a_run_waits_no_longer_than_it_is_told(config, tmp_path, capsys, hurried, monkeypatch):
    monkeypatch.setattr(run_lock, "POLL", 0.01)
    with only_run(Store(tmp_path / "results")):
        start = time.monotonic()
        capsys.readouterr()
        assert run_here(config, tmp_path / "results", "--wait", "0.4") == 2
        lines = capsys.readouterr().err.splitlines()
        assert 0.4 <= time.monotonic() - start < 5
        assert lines[0].startswith("waiting for 0 seconds at most: ") and lines[1].startswith("error: ")
        assert len(lines) == 2


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon"])
def test_a_time_to_wait_is_seconds(text, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(config, tmp_path / "results", f"--wait={text}")
    assert stop.value.code == 2 and f"--wait: '{text}' is not a number of seconds" in capsys.readouterr().err


def test_a_worker_that_ends_leaves_the_lock_to_its_run(tmp_path, hurried):
    with only_run(Store(tmp_path)):
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join()
        assert is_refused(tmp_path)
    assert not is_refused(tmp_path)


def is_refused(root: Path) -> bool:
    """In a program of its own, that shares nothing with this one."""
    script = """
import sys
from execution import run_lock
from store import Store, StoreError
run_lock.PATIENCE = 0.05
try:
    with run_lock.only_run(Store(sys.argv[1])):
        pass
except StoreError:
    sys.exit(2)
"""
    result = subprocess.run([sys.executable, "-c", script, str(root)], cwd=Path(__file__).parent.parent)
    assert result.returncode in (0, 2)
    return result.returncode == 2


def test_another_machines_run_counts_even_where_its_lock_does_not(tmp_path):
    store = Store(tmp_path / "results")
    store.prepare("")
    theirs = dataclasses.replace(Owner.this_process(), host="node17", pid=4711, since="2026-01-02T03:04:05.000Z")
    record = store.root / ".lock.json"
    record.write_text(json.dumps(dataclasses.asdict(theirs)))
    with pytest.raises(StoreError) as caught, only_run(store):
        pytest.fail("both would run")
    message = str(caught.value)
    assert "process 4711 on node17 since 2026-01-02T03:04:05.000Z" in message and "\n" not in message
    assert f"if it is no longer running, run again in 3 minutes, or delete {record} now" in message
    assert record.exists()
    record.unlink()
    with only_run(store):
        assert owner_of(store.root) == dataclasses.replace(Owner.this_process(), since=owner_of(store.root).since)
    assert not record.exists()


@pytest.mark.parametrize("seconds, dies", [(run_lock.SILENCE - 30, False), (run_lock.SILENCE + 30, True)])
def test_a_machine_that_died_blocks_nobody_for_long(seconds, dies, tmp_path, capsys, config, monkeypatch):
    """A container that starts again has another name; its lock is free, and nobody touches its record any more."""
    store = Store(tmp_path / "results")
    store.prepare("")
    theirs = dataclasses.replace(Owner.this_process(), host="container-1", pid=1)
    record = store.root / ".lock.json"
    record.write_text(json.dumps(dataclasses.asdict(theirs)))
    last = time.time() - seconds
    os.utime(record, (last, last))
    told = json.loads(ask(capsys, config, store.root, "--status", "--json"))
    assert (told["run"] is None) is dies and (told["died"] is not None) is dies
    if dies:
        with only_run(store):
            assert owner_of(store.root).pid == os.getpid()
    else:
        with pytest.raises(StoreError, match="container-1"), only_run(store):
            pytest.fail("both would run")
    assert not list(store.root.glob(".clock*"))


def test_a_run_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    store = Store(tmp_path / "results")
    with only_run(store):
        record = store.root / ".lock.json"
        os.utime(record, (0, 0))
        deadline = time.monotonic() + 10
        while record.stat().st_mtime < 1e9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - record.stat().st_mtime < 60
    time.sleep(0.1)
    assert not record.exists()  # a beat does not make it again


def test_silence_says_nothing_where_there_are_no_locks(tmp_path, monkeypatch):
    import filelock

    def no_locks(*args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    store = Store(tmp_path / "results")
    store.prepare("")
    theirs = dataclasses.replace(Owner.this_process(), host="node17", pid=1)
    (store.root / ".lock.json").write_text(json.dumps(dataclasses.asdict(theirs)))
    os.utime(store.root / ".lock.json", (0, 0))
    with pytest.raises(StoreError, match="node17"), only_run(store):
        pytest.fail("both would run")


def test_a_run_that_is_alive_counts_though_its_lock_was_deleted(tmp_path):
    child = fork(tmp_path / "o", lambda: time.sleep(600))
    try:
        alive = dataclasses.replace(Owner.this_process(), pid=child.pid, birth=owners.birth_of(child.pid))
        (tmp_path / ".lock.json").write_text(json.dumps(dataclasses.asdict(alive)))
        with pytest.raises(StoreError, match=f"process {child.pid} on"), only_run(Store(tmp_path)):
            pytest.fail("both would run")
    finally:
        child.kill()
    with only_run(Store(tmp_path)):
        assert owner_of(tmp_path).pid == os.getpid()


def test_a_run_leaves_the_record_of_another_one_alone(tmp_path, monkeypatch):
    """Which took over while this machine stood still."""
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    theirs = json.dumps(dataclasses.asdict(dataclasses.replace(Owner.this_process(), host="node17")))
    with only_run(Store(tmp_path)):
        (tmp_path / ".lock.json").write_text(theirs)
        os.utime(tmp_path / ".lock.json", (0, 0))
        time.sleep(0.2)
    assert (tmp_path / ".lock.json").read_text() == theirs and (tmp_path / ".lock.json").stat().st_mtime == 0


def test_what_a_dead_run_left_makes_room_for_the_next_ones_record(tmp_path, monkeypatch):
    """On a full disk there is none before."""
    Store(tmp_path).prepare("")
    dead = fork(tmp_path / "o", lambda: 0)
    dead.wait()
    torn = tmp_path / "checkpoints" / f".m.safetensors.{dead.pid}.tmp"
    torn.write_bytes(bytes(100))
    sync, refused_syncs = os.fsync, []

    def no_room(file):
        if torn.exists():
            refused_syncs.append(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", no_room)
    with only_run(Store(tmp_path)):
        assert len(refused_syncs) == 1 and not torn.exists()


def test_who_is_refused_removes_nothing(tmp_path, hurried):
    """The temporary files may be the other run's, on a machine whose processes cannot be seen from here."""
    Store(tmp_path).prepare("")
    theirs = dataclasses.replace(Owner.this_process(), host="node17")
    (tmp_path / ".lock.json").write_text(json.dumps(dataclasses.asdict(theirs)))
    temporary = tmp_path / "checkpoints" / ".m.safetensors.4194305.tmp"  # a number that no process has
    temporary.touch()
    with pytest.raises(StoreError, match="node17"), only_run(Store(tmp_path)):
        pytest.fail("both would run")
    assert temporary.exists()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_flock(error, tmp_path, monkeypatch):
    """No file stands for the lock, which a machine that died would leave for ever: the record alone decides."""
    import fcntl

    def no_flock(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    store = Store(tmp_path)
    with only_run(store):
        assert not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text()  # which says who has it
    theirs = dataclasses.replace(Owner.this_process(), host="node17", pid=1)
    (tmp_path / ".lock.json").write_text(json.dumps(dataclasses.asdict(theirs)))
    os.utime(tmp_path / ".lock.json", (0, 0))
    with pytest.raises(StoreError, match=r"no longer running, delete \S+\.lock\.json now"), only_run(store):
        pytest.fail("both would run")
    (tmp_path / ".lock.json").unlink()
    with only_run(store):
        assert owner_of(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_torn_record_of_a_dead_run_blocks_nobody(content, tmp_path, hurried):
    (tmp_path / ".lock.json").write_text(content)
    with only_run(Store(tmp_path)):
        assert owner_of(tmp_path).pid == os.getpid()


def test_without_locks_in_the_file_system_the_record_decides(tmp_path, monkeypatch):
    import filelock

    def no_locks(*args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    with (
        only_run(Store(tmp_path)),
        pytest.raises(StoreError, match=f"process {os.getpid()} on"),
        only_run(Store(tmp_path)),
    ):
        pytest.fail("both would run")
    dead = dataclasses.replace(Owner.this_process(), pid=fork(tmp_path / "o", lambda: 0).pid)
    os.waitpid(dead.pid, 0)
    (tmp_path / ".lock.json").write_text(json.dumps(dataclasses.asdict(dead)))
    with only_run(Store(tmp_path)):
        assert owner_of(tmp_path).pid == os.getpid()


def test_a_record_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    """Where there are no hard links, it is there before it is whole."""
    monkeypatch.setattr(run_lock, "PATIENCE", 30.0)
    child, record = fork(tmp_path / "o", lambda: time.sleep(600)), tmp_path / ".lock.json"
    owner = dataclasses.replace(Owner.this_process(), pid=child.pid, birth=owners.birth_of(child.pid))
    whole = json.dumps(dataclasses.asdict(owner))
    record.write_text(whole[:20])
    writing = threading.Timer(0.3, lambda: record.write_text(whole))
    writing.start()
    try:
        with pytest.raises(StoreError, match=f"process {child.pid} on"), only_run(Store(tmp_path)):
            pytest.fail("both would run")
    finally:
        writing.join()
        child.kill()


# -------------------------------------------------------------------------------------- runs that start at one moment

STARTERS, ROUNDS = 4, 20


def without_flock(*arguments):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def without_links(*arguments):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def jittered(function, rng):
    """Now and then another process comes between, before and after."""

    def pause():
        time.sleep(rng.choice((0.0, 0.0, 0.002, 0.015)))

    def call(*arguments):
        pause()
        try:
            return function(*arguments)
        finally:
            pause()

    return call


def leave_the_dead(root: Path, dead: str) -> None:
    """What runs that have ended left there: nothing, a record, or the record of one who had begun to replace it too."""
    root.mkdir()
    gone = dataclasses.replace(Owner.this_process(), birth="another-boot:1")
    if dead == "on another machine":
        gone = dataclasses.replace(gone, host="node17")
    record = json.dumps(dataclasses.asdict(gone)).encode()
    if dead != "nobody":
        (root / ".lock.json").write_bytes(record)
        os.utime(root / ".lock.json", (0, 0))
    if dead == "and the heir":
        heir = dataclasses.replace(gone, pid=1, birth="another-boot:2")
        name = f".lock.json.{hashlib.sha256(record).hexdigest()[:16]}.heir"
        (root / name).write_text(json.dumps(dataclasses.asdict(heir)))


def start_again_and_again(folder: Path, number: int, barrier, has_flock: bool, has_links: bool, dead: str) -> None:
    """One of STARTERS processes; it writes down what becomes of it in each round."""
    import fcntl

    rng = random.Random(number)
    fcntl.flock = (lambda *arguments: None) if has_flock else without_flock
    if has_flock:  # which each machine has for itself
        platform.node = lambda: f"node{number}"
    if not has_links:
        os.link = without_links
    for module, name in ((run_lock, "_content"), (run_lock, "_check_over"), (os, "link"), (os, "replace")):
        setattr(module, name, jittered(getattr(module, name), rng))
    for round_ in range(ROUNDS):
        root, told = folder / f"round{round_}", folder / f"told-{round_}-{number}"
        if number == 0:
            leave_the_dead(root, dead)
        barrier.wait(60)
        try:
            with only_run(Store(root)):
                told.write_text("in")
                barrier.wait(60)  # all have been answered
                assert json.loads((root / ".lock.json").read_text())["pid"] == os.getpid()
        except StoreError as error:
            told.write_text(str(error))
            barrier.wait(60)
        barrier.wait(60)
        if number == 0:
            (folder / f"left-{round_}").write_text(" ".join(sorted(path.name for path in root.glob(".*"))))


@pytest.mark.parametrize(
    ("has_flock", "has_links", "dead"),
    [
        (False, True, "nobody"), (False, True, "a run"), (False, True, "and the heir"), (False, False, "nobody"),
        (False, False, "a run"), (True, True, "nobody"), (True, True, "on another machine"),
    ],
)  # fmt: skip
def test_of_runs_that_start_at_one_moment_one_gets_in(has_flock, has_links, dead, tmp_path):
    """Where there is no flock, or each machine has one of its own."""
    barrier = multiprocessing.get_context("fork").Barrier(STARTERS)

    def work(number: int) -> None:
        try:
            start_again_and_again(tmp_path, number, barrier, has_flock, has_links, dead)
        except BaseException:
            barrier.abort()  # for the others, who wait
            raise

    starters = [fork(tmp_path / f"out{number}", lambda number=number: work(number)) for number in range(STARTERS)]
    try:
        assert [starter.wait() for starter in starters] == [0] * STARTERS, "".join(starter.err for starter in starters)
    finally:
        for starter in starters:
            if starter.status is None:
                starter.kill()
    for round_ in range(ROUNDS):
        told = [(tmp_path / f"told-{round_}-{number}").read_text() for number in range(STARTERS)]
        assert told.count("in") == 1, told
        refusals = [text for text in told if text != "in"]
        assert all("another run is using this folder" in text and "\n" not in text for text in refusals)
        assert set((tmp_path / f"left-{round_}").read_text().split()) <= {".lock"}


def test_a_number_that_is_used_again_is_another_process():
    me = Owner.this_process()
    assert me.is_alive() is True
    if me.birth is None:
        pytest.skip("when a process began is Linux's to tell")
    boot, _, ticks = me.birth.partition(":")
    assert dataclasses.replace(me, birth=f"{boot}:{int(ticks) - 1}").is_alive() is False
    assert dataclasses.replace(me, birth=f"another-boot:{ticks}").is_alive() is False
    assert dataclasses.replace(me, host="elsewhere").is_alive() is None


def test_running_marks(tmp_path):
    """There while the cell is computed and gone after, whatever happens; the dead's are removed by the next run."""
    store = Store(tmp_path / "results")
    store.prepare("")
    with store.mark_running("a"):
        ((cell, owner),) = store.marked()
        assert (cell, owner.pid, owner.is_alive()) == ("a", os.getpid(), True)
        with pytest.raises(ZeroDivisionError), store.mark_running("b"):
            assert [cell for cell, _ in store.marked()] == ["a", "b"]
            raise ZeroDivisionError
        assert [cell for cell, _ in store.marked()] == ["a"]
        dead = dataclasses.replace(owner, birth="another-boot:1")
        for name, content in (("dead", dataclasses.asdict(dead)), ("afar", {**dataclasses.asdict(owner), "host": "x"})):
            (store.root / "running" / f"{name}.json").write_text(json.dumps(content))
        (store.root / "running" / "torn.json").write_text('{"pid"')
        assert dict(store.marked())["torn"] is None
        store.prepare("")
        assert [cell for cell, _ in store.marked()] == ["a"]
    assert store.marked() == []


def test_ctrl_c_as_soon_as_a_mark_is_written_leaves_none(tmp_path, monkeypatch):
    store, replace = Store(tmp_path / "results"), os.replace
    store.prepare("")

    def replace_and_interrupt(*paths):
        replace(*paths)
        assert [cell for cell, _ in store.marked()] == ["a"]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt), store.mark_running("a"):
        pytest.fail("it was interrupted before")
    assert store.marked() == [] and not list((store.root / "running").iterdir())


def test_a_temporary_of_a_process_that_had_this_ones_number_is_removed(tmp_path):
    store = Store(tmp_path / "results")
    store.prepare("")
    leftover = store.root / "checkpoints" / f".x.safetensors.{os.getpid()}.tmp"
    leftover.touch()
    store.prepare("")
    assert not leftover.exists()


@pytest.mark.parametrize("folder", ["checkpoints", "models"])
def test_what_safetensors_leaves_when_it_is_killed_is_removed(folder, tmp_path):
    store = Store(tmp_path / "results")
    store.prepare("")
    leftover, other = (store.root / folder / name for name in (".tmpxVuo3T", ".tmp-of-mine"))
    leftover.touch()
    other.touch()
    store.prepare("")
    assert (leftover.exists(), other.exists()) == (False, True)
