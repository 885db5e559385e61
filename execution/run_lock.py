"""One run at a time on a results folder.

A run holds `.lock` with flock: the kernel lets go of it when the process ends, however it ends, so that no leftover
ever blocks. Who holds it is written beside it, in `.lock.json`, for the message of whoever comes second.

Between machines, flock is as good as the shared folder's file system: NFS passes it on unless it is mounted with
`nolock` or `local_lock`, and some file systems have none at all. Therefore a `.lock.json` of another machine counts
even where its lock does not, until its run ends or somebody deletes it. A run touches it as long as it lives: where the
lock is free and the record of another machine has not been touched for SILENCE seconds, its run has died with the
machine, or with a container that had a name of its own. Workers of the run itself take no lock; those that outlive it
are known by their marks in running/, and have to end first.

For the same reason the record itself lets one run in and no more, also of two that start at the same moment. It is made
whole or not at all, and only where there is none (`_make`). That of a dead run is never deleted first: its place goes
to the one that makes the file named after its content, `.lock.json.<hash>.heir`, and renames it to `.lock.json`. An
heir that dies between the two has an heir of its own, and whoever was slow finds another record than the one that it
wanted to replace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from owners import NO_LOCKS, Owner
from store import Store, StoreError, sync_folder, write_errors

NO_LINKS = (
    errno.EPERM,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
)  # what link raises where there are none
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = 1.0  # seconds: the one who was first may have ended just now, or not yet written who he is
POLL = 2.0  # seconds between two attempts of a run that waits for another one
ORPHANS_PATIENCE = 10.0  # seconds that the workers of a run that died get to notice
BEAT = 15.0  # seconds between two touches of .lock.json
SILENCE = 180.0  # seconds without one, after which a run on another machine is taken for dead


class InUseError(StoreError):
    """Another run, or a worker that has outlived its run, holds the folder; nothing in it has been touched."""


@contextlib.contextmanager
def only_run(store: Store, wait: float = 0.0, tell: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the folder, made where it is not there; InUseError, one line, where another run still holds it after `wait`
    seconds. `tell` gets a line where there is something to wait for."""
    with write_errors(store.root):
        store.root.mkdir(parents=True, exist_ok=True)
    with _held_within(wait, store, tell):
        yield


def _held_within(wait: float, store: Store, tell: Callable[[str], None]) -> contextlib.ExitStack:
    """Between two attempts the lock is free: whoever else waits is not kept by this run."""
    deadline, is_told = time.monotonic() + wait, False
    while True:
        try:
            return _held(store)
        except InUseError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            if not is_told:
                tell(f"waiting for {wait:.0f} seconds at most: {error}")
                is_told = True
        time.sleep(min(POLL, left))


def _held(store: Store) -> contextlib.ExitStack:
    """What lets go of the folder when it is closed."""
    with contextlib.ExitStack() as held:
        has_locks, record = _lock(store.root, held), record_of(store.root)
        with write_errors(record):
            _check_free(record, has_locks)
        _wait_for_orphans(store)  # whoever is refused leaves the record of a dead run, which --status tells of
        held.enter_context(_record(store, has_locks))
        _wait_for_orphans(store)
        store.remove_leftovers()
        return held.pop_all()


def _lock(root: Path, held: contextlib.ExitStack) -> bool:
    """Hold `.lock`; False where the file system has no locks."""
    from filelock import FileLock, Timeout  # takes longer to import than --status to look

    lock = FileLock(root / ".lock", fallback_to_soft=False)
    held.callback(_release, lock)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise InUseError(_refusal(record_of(root), owner_of(root))) from None
    except (OSError, NotImplementedError) as error:  # the latter is how filelock tells of some of the former
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            with write_errors(root):
                raise
        return False
    return True


def _release(lock: Any) -> None:
    with contextlib.suppress(OSError):
        lock.release()


def owner_of(root: Path) -> Owner | None:
    """Who holds the folder, or held it when he died; None where nobody does, or where that cannot be read."""
    try:
        return _owner(_content(record_of(root)))
    except OSError:
        return None


def seconds_silent(root: Path, now: float) -> float:
    """Since the run that holds the folder last said that it lives; 0 where that cannot be told."""
    return _seconds_still(record_of(root), now)


def record_of(root: Path) -> Path:
    """The file that says who holds the folder."""
    return root / ".lock.json"


# ----------------------------------------------------------------------------------------------------------- the record


@contextlib.contextmanager
def _record(store: Store, has_locks: bool) -> Iterator[None]:
    """This run's, touched as long as it is held."""
    record = record_of(store.root)
    # other bytes than those of any other attempt: by them this run knows its own record
    mine = {**dataclasses.asdict(Owner.this_process()), "token": secrets.token_hex(8)}
    content, ended = (json.dumps(mine, indent=1, ensure_ascii=False) + "\n").encode(), threading.Event()
    with write_errors(record):
        try:
            _take(record, content, has_locks)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            _check_free(record, has_locks)
            store.remove_leftovers()  # on a full disk they are the room for the record
            _take(record, content, has_locks)
    threading.Thread(target=_beat, args=(record, content, ended), name="beat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):  # a folder that is gone or read-only by now: the next run sees who died
            if _content(record) == content:
                record.unlink(missing_ok=True)


def _take(record: Path, mine: bytes, has_locks: bool) -> None:
    """Make `mine` the record; InUseError where another run is faster."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = _content(record)
        is_taken = _make(record, mine) if found is None else _succeed(record, found, mine, has_locks)
        if is_taken and _content(record) == mine:
            break
        if time.monotonic() > deadline:  # it is another run's again and again
            raise InUseError(_refusal(record, owner_of(record.parent), has_locks))
        time.sleep(0.01)
    for heir in record.parent.glob(f"{record.name}.*.heir"):  # of records that are not there any more
        heir.unlink(missing_ok=True)


def _succeed(record: Path, found: bytes, mine: bytes, has_locks: bool) -> bool:
    """Put `mine` in the place of `found`, the record of a run that has ended, or died before it was the first's heir;
    False where it is not there any more."""
    path, last = record, found
    while True:
        _check_over(path, last, has_locks)
        path = record.with_name(f"{record.name}.{hashlib.sha256(last).hexdigest()[:16]}.heir")
        if _make(path, mine):
            break
        last = _content(path)
        if last is None:  # it has just become the record, or gave up
            return False
    # Nobody else may replace `found` now. Where that has been done before, the heir's file went with it: this is new.
    try:
        if _content(record) != found:
            return False
        os.replace(path, record)
    except FileNotFoundError:  # the new holder has tidied up
        return False
    finally:
        path.unlink(missing_ok=True)
    sync_folder(record.parent)
    return True


def _check_free(record: Path, has_locks: bool) -> None:
    """InUseError where there is a record, of a run that lives."""
    if (found := _content(record)) is not None:
        _check_over(record, found, has_locks)


def _check_over(path: Path, content: bytes, has_locks: bool) -> None:
    """InUseError where the run lives whose record this is."""
    owner = _owner(content)
    deadline = time.monotonic() + PATIENCE
    while owner is None and time.monotonic() < deadline and _content(path) is not None:
        time.sleep(0.01)  # where there are no hard links, it may be half written
        owner = _owner(_content(path))
    if owner is None or owner.is_alive() is False:
        return
    if owner.is_here:
        is_over = has_locks and owner.pid == os.getpid()  # one before this process had its number, as in a container
    else:
        try:
            is_over = has_locks and _seconds_still(path, _clock_of(path.parent)) > SILENCE
        except OSError:  # no room to ask for the time
            is_over = False
    if not is_over:
        raise InUseError(_refusal(path, owner, has_locks))


def _make(path: Path, content: bytes) -> bool:
    """Whether the file was made, whole; it is not where there is one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        _write_new(temporary, content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in NO_LINKS:
                with contextlib.suppress(FileExistsError):
                    _write_new(path, content)
            # not found: another machine has taken the folder, and taken the temporary file for one of a dead process
            elif not isinstance(error, (FileExistsError, FileNotFoundError)):
                raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return _content(path) == content  # whatever was answered: NFS may repeat what has been done already


def _write_new(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _beat(record: Path, mine: bytes, ended: threading.Event) -> None:
    """Not that of another run, which took over while this machine was silent."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError), record.open("rb") as file:
            if file.read() == mine:
                os.utime(file.fileno() if os.utime in os.supports_fd else record)


def _content(path: Path) -> bytes | None:
    """None where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _owner(content: bytes | None) -> Owner | None:
    """None where it is no record, or not a whole one."""
    try:
        return None if content is None else Owner.of(json.loads(content))
    except ValueError:
        return None


def _seconds_still(path: Path, now: float) -> float:
    try:
        return max(now - path.stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def _clock_of(folder: Path) -> float:
    """Now, by the clock of the folder's file system, whose machine may be another one."""
    probe = folder / f".clock.{secrets.token_hex(4)}.{os.getpid()}.tmp"
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- helpers


def _wait_for_orphans(store: Store) -> None:
    """InUseError where a worker of a run that died goes on computing: two of them would write the same files."""
    deadline = time.monotonic() + ORPHANS_PATIENCE
    while orphans := [(cell, owner) for cell, owner in store.marked() if owner is not None and owner.is_alive()]:
        if time.monotonic() > deadline:
            cell, owner = orphans[0]
            raise InUseError(
                f"{store.root}: process {owner.pid}, a worker of a run that has died, is still computing {cell}; "
                "end it (kill) or wait for it, and run again"
            )
        time.sleep(0.05)


def _refusal(record: Path, owner: Owner | None, has_locks: bool = True) -> str:
    root = record.parent
    if owner is None:
        return f"{root}: another run is using this folder; wait until it has ended, or use another results_dir"
    who = f"process {owner.pid} on {owner.host} since {owner.since} ({owner.command})"
    told = f"{root}: another run is using this folder: {who}; wait until it has ended, or use another results_dir"
    if owner.is_here:
        return told
    wait = f"run again in {SILENCE / 60:.0f} minutes, or " if has_locks else ""
    return f"{told}; if it is no longer running, {wait}delete {record} now"
