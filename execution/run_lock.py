"""One run at a time on a results folder.

A run holds `.lock` with flock: the kernel lets go of it when the process ends, however it ends, so that no leftover
ever blocks. Who holds it is written beside it, in `.lock.json`, for the message of whoever comes second.

Between machines, flock is as good as the shared folder's file system: NFS passes it on unless it is mounted with
`nolock` or `local_lock`, and some file systems have none at all. Therefore a `.lock.json` of another machine counts
even where its lock does not, until its run ends or somebody deletes it. Workers of the run itself take no lock; those
that outlive it are known by their marks in running/, and have to end first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from owners import Owner
from store import Store, StoreError, write_errors, write_json

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without flock
PATIENCE = 1.0  # seconds: the one who was first may have ended just now, or not yet written who he is
ORPHANS_PATIENCE = 10.0  # seconds that the workers of a run that died get to notice


@contextlib.contextmanager
def only_run(store: Store) -> Iterator[None]:
    """Hold the folder, made where it is not there; StoreError, one line, where another run holds it."""
    from filelock import FileLock, Timeout  # takes longer to import than --status to look

    root = store.root
    with write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise StoreError(_refusal(root)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            with write_errors(root):
                raise
        if (owner := owner_of(root)) is not None and owner.is_alive():
            raise StoreError(_refusal(root)) from None
    try:
        owner = owner_of(root)
        is_mine = owner is not None and owner.is_here and owner.pid == os.getpid()
        if owner is not None and not is_mine and owner.is_alive() is not False:  # None: on another machine
            raise StoreError(_refusal(root))
        _wait_for_orphans(store)
        write_json(_record(root), dataclasses.asdict(Owner.this_process()))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that is gone or read-only by now: the next run sees who died
                _record(root).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def owner_of(root: Path) -> Owner | None:
    """Who holds the folder, or held it when he died; None where nobody does, or where that cannot be read."""
    try:
        return Owner.of(json.loads(_record(root).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


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


def _record(root: Path) -> Path:
    return root / ".lock.json"


def _refusal(root: Path) -> str:
    owner = owner_of(root)
    if owner is None:
        return f"{root}: another run is using this folder; wait until it has ended, or use another results_dir"
    who = f"process {owner.pid} on {owner.host} since {owner.since} ({owner.command})"
    told = f"{root}: another run is using this folder: {who}; wait until it has ended, or use another results_dir"
    if owner.is_here:
        return told
    return f"{told}; if you know that it is no longer running, delete {_record(root)} and run again"
