"""log.jsonl in the results folder: a line of JSON for each cell that ended, and for each analysis. An attempt whose
worker was lost, and after which the cell was tried again, has one too, with status "lost".

It tells when, where, how long and with how much memory, and the whole traceback of a failure. No result depends on it.
A line is written before the cell's record, so that no cell that has ended is missing. An attempt whose record never
came (a kill -9 in between, a full disk) has its line too, since its time was spent, and the cell another one when it is
computed again: which cells are done is for the records to say.

Lines are appended under flock and synced, so that those of several processes never mix; a line that a power cut tore is
left out by the reader and ended by the next writer.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from owners import utc
from store import Store, StoreError, write_errors

KEYS = (
    "cell", "phase", "status", "start", "end", "seconds", "peak_memory_mb", "worker", "error", "traceback",
)  # fmt: skip


class RunLog:
    def __init__(self, store: Store):
        self.store = store

    @property
    def path(self) -> Path:
        return self.store.place("log.jsonl")

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append a record. What is missing of KEYS is null, but for the phase, which is that of the cell's row."""
        full = {key: entry.get(key) for key in KEYS} | dict(entry)
        if full["phase"] is None and full["cell"] is not None:
            record = self.store.record(full["cell"])
            full["phase"] = None if record is None else record["row"]["phase"]
        for key in ("start", "end"):
            if isinstance(full[key], (int, float)):
                full[key] = datetime.fromtimestamp(full[key], UTC)
            if isinstance(full[key], datetime):
                full[key] = utc(full[key])
        line = json.dumps(full, ensure_ascii=False) + "\n"
        assert line.count("\n") == 1
        with write_errors(self.path):
            _append(self.path, line.encode("utf-8"))

    def read(self) -> list[dict]:
        """The whole records, in the order in which they were written; none where there is no log."""
        return self.read_with_damage()[0]

    def read_with_damage(self) -> tuple[list[dict], int]:
        """(records, how many lines are torn or are something else)."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        records, damaged = [], 0
        for line in content.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # of which a torn UTF-8 character is one
                record = None
            if isinstance(record, dict) and record.keys() >= set(KEYS):
                records.append(record)
            elif line.strip():
                damaged += 1
        return records, damaged


def _append(path: Path, line: bytes) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        _lock(file)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # torn: never glued to
            line = b"\n" + line
        while line:  # a disk that fills up writes a part, and refuses the rest
            line = line[os.write(file, line) :]
        os.fsync(file)
    finally:
        os.close(file)  # and with it the lock


def _lock(file: int) -> None:
    """Wait for the others. O_APPEND alone keeps the whole writes of one machine apart; the lock also those of several
    machines, and a line that is written in parts. Where the system has no locks, O_APPEND has to do."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


# ------------------------------------------------------------------------------------------------------------ measuring


@contextlib.contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """What the log says of a piece of work: the dict has start, end, seconds, peak_memory_mb and worker at its end."""
    entry: dict[str, Any] = {"start": utc(datetime.now(UTC))}
    is_own_peak = reset_peak_memory()
    start = time.perf_counter()
    try:
        yield entry
    finally:
        entry["end"] = utc(datetime.now(UTC))
        entry["seconds"] = round(time.perf_counter() - start, 3)
        entry["peak_memory_mb"] = peak_memory_mb() if is_own_peak else None
        entry["worker"] = worker_name()


def worker_name(process: int | None = None) -> str:
    """A process of this host."""
    return f"{platform.node()}:{os.getpid() if process is None else process}"


def reset_peak_memory() -> bool:
    """Have the kernel count this process's peak from now on; False where it cannot, and an older peak would be told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mb() -> float | None:
    """The most resident memory since the reset, in 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    return None
