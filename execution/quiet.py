"""Quiet for the clock: while one process measures a latency, no other cell on this machine computes.

Cells that run beside one another share caches, memory bandwidth and the CPU's clock, so that a latency measured among
them would be one of the neighbours. Measuring later, with nothing else running, would need every model a second time (a
QAT model is a training); measuring only between cells would leave cores idle for as long as the longest cell takes. So
the others are paused for as long as the measurement takes: a turnstile of two flock locks, which every worker of this
machine shares, whatever the executor and the run. A cell that computes holds `room` (shared) and looks at `gate` every
TICK seconds, from a signal handler, that is: between two operations; where the gate is closed it gives up the room
until it opens. Who measures closes the gate, waits until the room is empty, and has it alone.

Locks of a dead process are released by the kernel, so that nobody waits for a worker that was killed. What is waited
for is at most the longest single operation of the others. Without flock (Windows) nothing is paused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None

TICK = 0.05  # seconds between two looks at the gate


@contextlib.contextmanager
def computing(folder: Path | None = None, standstill: Any = None) -> Iterator[Room | None]:
    """Around a cell of a worker, in its main thread: it pauses whenever another one measures.

    `standstill`, two doubles in memory that another process may read, say for how long it has stood still: see
    `standing`. Where locks cannot be had (no flock, no folder for temporary files), nothing is paused.
    """
    global _room
    standstill = [0.0, 0.0] if standstill is None else standstill
    standstill[:] = [0.0, 0.0]
    try:
        _room = None if fcntl is None else Room(folder or _default_folder(), standstill)
    except OSError:
        _room = None
    if _room is None:
        yield None
        return
    try:
        _room.enter()
        with _room.ticking():
            yield _room
    finally:
        _room.close()
        _room = None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Around a measurement of time: no other cell computes. Where no cell runs beside (serial), it does nothing."""
    if _room is None:
        yield
        return
    with _room.alone():
        yield


def paused_seconds() -> float:
    """For how long the cell that is computed has stood still so far."""
    return 0.0 if _room is None else standing(_room.standstill)


def standing(standstill: Sequence[float]) -> float:
    """Seconds that a cell has stood still: those that are over, and those since it began to, if it does now."""
    over, since = standstill
    return over + (time.monotonic() - since if since else 0.0)


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"bnq-quiet-{os.getuid()}"


class Room:
    def __init__(self, folder: Path, standstill: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.gate, self.room = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("gate", "room")
        )
        self.standstill = standstill  # seconds that are over; since when (monotonic), 0 where it computes

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        self.standstill[1] = start = time.monotonic()
        try:
            yield
        finally:
            self.standstill[:] = [self.standstill[0] + time.monotonic() - start, 0.0]

    def enter(self) -> None:
        """Wait for the gate, and have the room with others."""
        with self._standing():
            fcntl.flock(self.gate, fcntl.LOCK_SH)
            fcntl.flock(self.room, fcntl.LOCK_SH)
            fcntl.flock(self.gate, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._look)
        signal.siginterrupt(signal.SIGALRM, False)  # system calls of libraries go on
        self._arm(TICK)
        try:
            yield
        finally:
            self._arm(0)
            signal.signal(signal.SIGALRM, before)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        self._arm(0)
        fcntl.flock(self.room, fcntl.LOCK_UN)  # or two that want to measure would wait for one another
        with self._standing():
            fcntl.flock(self.gate, fcntl.LOCK_EX)
            fcntl.flock(self.room, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.room, fcntl.LOCK_UN)
            fcntl.flock(self.gate, fcntl.LOCK_UN)
            self.enter()
            self._arm(TICK)

    def close(self) -> None:
        os.close(self.gate)
        os.close(self.room)

    def _look(self, *_) -> None:
        try:
            fcntl.flock(self.gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self.gate, fcntl.LOCK_UN)
        except BlockingIOError:
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what is queued on the GPU runs on without this process
            fcntl.flock(self.room, fcntl.LOCK_UN)
            self.enter()
        self._arm(TICK)  # one look at a time: a timer that repeats would interrupt the waiting

    @staticmethod
    def _arm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


_room: Room | None = None
