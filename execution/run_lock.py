"""One run at a time on a results folder.

A run holds `.lock` with flock: the kernel lets go of it when the process ends, however it ends, so that no leftover
ever blocks. Who holds it is written beside it, in `.lock.json`, for the message of whoever comes second.

Between machines, flock is as good as the shared folder's file system: NFS passes it on unless it is mounted with
`nolock` or `local_lock`, and some file systems have none at all. Therefore a `.lock.json` of another machine counts
even where its lock does not, until its run ends or somebody deletes it. A run touches it as long as it lives: where the
lock is free and the record of another machine has not been touched for SILENCE seconds, its run has died with the
machine, or with a container that had a name of its own. Workers of the run itself take no lock; those that outlive it
are known by their marks in running/, and have to end first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from owners import NO_LOCKS, Owner
from store import Store, StoreError, write_errors, write_json

PATIENCE = 1.0  # seconds: the one who was first may have ended just now, or not yet written who he is
ORPHANS_PATIENCE = 10.0  # seconds that the workers of a run that died get to notice
BEAT = 15.0  # seconds between two touches of .lock.json
SILENCE = 180.0  # seconds without one, after which a run on another machine is taken for dead


@contextlib.contextmanager
def only_run(store: Store) -> Iterator[None]:
    """Hold the folder, made where it is not there; StoreError, one line, where another run holds it."""
    from filelock import FileLock, Timeout  # takes longer to import than --status to look

    root = store.root
    with write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    lock, has_locks = FileLock(root / ".lock", fallback_to_soft=False), True
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise StoreError(_refusal(root)) from None
    except (OSError, NotImplementedError) as error:  # the latter is how filelock tells of some of the former
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            with write_errors(root):
                raise
        has_locks = False
        if (owner := owner_of(root)) is not None and owner.is_alive():
            raise StoreError(_refusal(root, has_locks)) from None
    try:
        owner = owner_of(root)
        is_mine = owner is not None and owner.is_here and owner.pid == os.getpid()
        if owner is not None and not is_mine and owner.is_alive() is not False:  # None: on another machine
            is_silent = not owner.is_here and seconds_silent(root, _clock_of(root)) > SILENCE
            if not (has_locks and is_silent):
                raise StoreError(_refusal(root, has_locks))
        _wait_for_orphans(store)
        store.remove_leftovers()  # on a full disk they are the room for the record
        write_json(record_of(root), dataclasses.asdict(Owner.this_process()))
        with write_errors(record_of(root)):
            mine, ended = record_of(root).read_bytes(), threading.Event()
        threading.Thread(target=_beat, args=(record_of(root), mine, ended), name="beat", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with contextlib.suppress(OSError):  # a folder that is gone or read-only by now: the next run sees who died
                if record_of(root).read_bytes() == mine:
                    record_of(root).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def owner_of(root: Path) -> Owner | None:
    """Who holds the folder, or held it when he died; None where nobody does, or where that cannot be read."""
    try:
        return Owner.of(json.loads(record_of(root).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def seconds_silent(root: Path, now: float) -> float:
    """Since the run that holds the folder last said that it lives; 0 where that cannot be told."""
    try:
        return max(now - record_of(root).stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def _beat(record: Path, mine: bytes, ended: threading.Event) -> None:
    """Not that of another run, which took over while this machine was silent."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            if record.read_bytes() == mine:
                os.utime(record)


def _clock_of(root: Path) -> float:
    """Now, by the clock of the folder's file system, whose machine may be another one."""
    probe = root / f".clock.{os.getpid()}.tmp"
    with write_errors(probe):
        probe.touch()
        os.utime(probe)
        now = probe.stat().st_mtime
        probe.unlink()
    return now


def _wait_for_orphans(store: Store) -> None:
    """StoreError where a worker of a run that died goes on computing: two of them would write the same files."""
    deadline = time.monotonic() + ORPHANS_PATIENCE
    while orphans := [(cell, owner) for cell, owner in store.marked() if owner is not None and owner.is_alive()]:
        if time.monotonic() > deadline:
            cell, owner = orphans[0]
            raise StoreError(
                f"{store.root}: process {owner.pid}, a worker of a run that has died, is still computing {cell}; "
                "end it (kill) or wait for it, and run again"
            )
        time.sleep(0.05)


def record_of(root: Path) -> Path:
    """The file that says who holds the folder."""
    return root / ".lock.json"


def _refusal(root: Path, has_locks: bool = True) -> str:
    owner = owner_of(root)
    if owner is None:
        return f"{root}: another run is using this folder; wait until it has ended, or use another results_dir"
    who = f"process {owner.pid} on {owner.host} since {owner.since} ({owner.command})"
    told = f"{root}: another run is using this folder: {who}; wait until it has ended, or use another results_dir"
    if owner.is_here:
        return told
    wait = f"run again in {SILENCE / 60:.0f} minutes, or " if has_locks else ""
    return f"{told}; if it is no longer running, {wait}delete {record_of(root)} now"
