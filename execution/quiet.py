"""Quiet for the clock: while one process measures a latency, no other cell on this machine computes.

Cells that run beside one another share caches, memory bandwidth and the CPU's clock, so that a latency measured among
them would be one of the neighbours. Measuring later, with nothing else running, would need every model a second time (a
QAT model is a training); measuring only between cells would leave cores idle for as long as the longest cell takes. So
the others are paused for as long as the measurement takes: a turnstile of two flock locks, which every worker of this
machine shares, whatever the executor and the run. A cell that computes holds `room` (shared) and looks at `gate` every
TICK seconds, from a signal handler, that is: between two operations; where the gate is closed it gives up the room
until it opens, and its threads decode no other image. Who measures closes the gate, waits until the room is empty, and
has it alone.

Locks of a dead process are released by the kernel, so that nobody waits for a worker that was killed. What is waited
for is the longest single operation of the others. A worker that hangs, or was stopped, is waited for PAUSE_SECONDS, or
MEASURE_SECONDS where it was measuring itself, and no longer: then the others measure, or compute, beside it, and a
measurement that was perhaps not alone says so. Without flock (Windows) nothing is paused.

A cell is off the clock of run.cell_timeout while it stands still, and while it makes what all cells share. Meanwhile it
gives signs of life; one that gives none for too long hangs, or was stopped, and is ended (executors.is_overdue).

A system call that a signal interrupts is started again by the kernel, before Python sees the signal: a worker must not
wait for another process in such a call (flock, or a write to a full pipe), but look again and again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_cache

try:
    import fcntl
except ImportError:
    fcntl = None

TICK = 0.05  # seconds between two looks at the gate
PAUSE_SECONDS = 180.0  # that a cell has for pausing, before a measurement begins all the same
MEASURE_SECONDS = 600.0  # that a measurement has, before cells compute all the same; more than the above
# that a cell may be off the clock without a sign of life, or run.cell_timeout where that is more; listing the files of
# a large data set on a slow network disk gives none
STILL_SECONDS = 1800.0
ON_THE_CLOCK = (0.0, 0.0, 0.0)  # what is in the memory of `computing` then


@dataclass
class Measurement:
    """What `alone` gives; once it is over, it is known whether it was alone."""

    disturbed: str | None = None  # why it perhaps was not


@contextlib.contextmanager
def computing(folder: Path | None = None, standstill: Any = None) -> Iterator[Room | None]:
    """Around a cell of a worker, in its main thread: it pauses whenever another one measures.

    `standstill`, three doubles in memory that another process may read, say for how long it was off the clock: see
    `standing` and `silence`. Where locks cannot be had (no flock, no folder for temporary files), nothing is paused.
    """
    global _room, _standstill
    _standstill = list(ON_THE_CLOCK) if standstill is None else standstill
    _standstill[:] = ON_THE_CLOCK
    try:
        _room = None if fcntl is None else Room(folder or _default_folder())
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
def alone() -> Iterator[Measurement]:
    """Around a measurement of time: no other cell computes. Where no cell runs beside (serial), it does nothing."""
    measurement = Measurement()
    if _room is None:
        yield measurement
        return
    with _room.alone(measurement):
        yield measurement


@contextlib.contextmanager
def off_the_clock(patience: float = 0.0) -> Iterator[None]:
    """Around what is not the cell's own time: standing still, and making what cells share. Whoever gives no
    `sign_of_life` meanwhile is taken to hang, but not within `patience` seconds, for what has such a limit itself."""
    standstill = _standstill
    if standstill[1]:  # within another one: it stands still while it makes something, which does not get on meanwhile
        silent = time.monotonic() - standstill[2]
        try:
            yield
        finally:
            standstill[2] = time.monotonic() - silent
        return
    standstill[2] = time.monotonic() + patience
    standstill[1] = start = time.monotonic()
    try:
        yield
    finally:
        standstill[:2] = [standstill[0] + time.monotonic() - start, 0.0]


def sign_of_life() -> None:
    _standstill[2] = time.monotonic()


def paused_seconds() -> float:
    """For how long the cell that is computed has been off the clock so far; in a process that computes many without
    `computing`, all of them."""
    return standing(_standstill)


def standing(standstill: Sequence[float]) -> float:
    """Seconds that a cell was off the clock: those that are over, and those since it went, if it is now."""
    over, since, _ = standstill
    return over + (time.monotonic() - since if since else 0.0)


def silence(standstill: Sequence[float]) -> float:
    """Seconds since a cell that is off the clock has given a sign of life."""
    _, since, sign = standstill
    return max(0.0, time.monotonic() - max(since, sign)) if since else 0.0


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"bnq-quiet-{os.getuid()}"


class Room:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.gate, self.room = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("gate", "room")
        )

    def enter(self) -> None:
        """Wait for the gate, and have the room with others; where the gate does not open, compute all the same."""
        with off_the_clock():
            if self._pass_gate(fcntl.LOCK_SH):
                fcntl.flock(self.room, fcntl.LOCK_SH)  # at once: who has it alone has closed the gate
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
            # One that the kernel has begun to deliver, to another thread, may come yet: by default it would be the end.
            signal.signal(signal.SIGALRM, signal.SIG_IGN if before is signal.SIG_DFL else before)

    @contextlib.contextmanager
    def alone(self, measurement: Measurement) -> Iterator[None]:
        self._arm(0)
        fcntl.flock(self.room, fcntl.LOCK_UN)  # or two that want to measure would wait for one another
        with off_the_clock():
            if not self._pass_gate(fcntl.LOCK_EX):
                measurement.disturbed = f"another measurement did not end within {MEASURE_SECONDS:g} s"
            else:
                os.utime(self.gate)
                if not _is_got(self.room, fcntl.LOCK_EX, PAUSE_SECONDS):
                    measurement.disturbed = f"a cell did not pause within {PAUSE_SECONDS:g} s"
        start = time.monotonic()
        if measurement.disturbed is None:
            os.utime(self.gate)  # the others have waited for the room to be empty; from now on for the measurement
        try:
            yield
        finally:
            if measurement.disturbed is None and time.monotonic() - start > MEASURE_SECONDS:
                measurement.disturbed = f"it took more than {MEASURE_SECONDS:g} s, and no cell waits longer"
            fcntl.flock(self.room, fcntl.LOCK_UN)
            fcntl.flock(self.gate, fcntl.LOCK_UN)
            self.enter()
            self._arm(TICK)

    def close(self) -> None:
        os.close(self.gate)
        os.close(self.room)

    def _pass_gate(self, kind: int) -> bool:
        """Wait for the gate; False where the same measurement has kept it closed for too long."""
        global _given_up
        closed, start = self._closed(), time.monotonic()
        while not _is_got(self.gate, kind):
            if self._closed() != closed:  # by another one
                closed, start = self._closed(), time.monotonic()
            if closed == _given_up or time.monotonic() - start > MEASURE_SECONDS:
                _given_up = closed
                return False
            _wait()
        return True

    def _closed(self) -> int:
        """When the gate was closed for the last time, which is the name of a measurement."""
        return os.fstat(self.gate).st_mtime_ns

    def _look(self, *_) -> None:
        if _is_got(self.gate, fcntl.LOCK_SH):
            fcntl.flock(self.room, fcntl.LOCK_SH)  # for who had not waited for the gate
            fcntl.flock(self.gate, fcntl.LOCK_UN)
        elif self._closed() != _given_up:
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what is queued on the GPU runs on without this process
            image_cache.may_decode.clear()  # its threads do not hear the signal
            try:
                fcntl.flock(self.room, fcntl.LOCK_UN)
                self.enter()
            finally:
                image_cache.may_decode.set()
        self._arm(TICK)  # one look at a time: a timer that repeats would interrupt the waiting

    @staticmethod
    def _arm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _wait() -> None:
    sign_of_life()
    time.sleep(TICK)


def _is_got(file: int, kind: int, seconds: float = 0.0) -> bool:
    """Whether the lock can be had, at once or within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            _wait()
        else:
            return True


_room: Room | None = None
# seconds off the clock that are over; since when (monotonic), 0 where it computes; when it gave the last sign of life
_standstill: Any = list(ON_THE_CLOCK)
_given_up: int | None = None  # the measurement that this process no longer waits for
