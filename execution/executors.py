"""Where cells are computed: in this process, in worker processes, or on Ray (ray_executor.py).

An executor is given a phase's job and its cells, and yields each cell with its outcome as it ends, in whatever order;
`runner.run_cells` writes the records. Closing the generator stops what is running.

`processes` is multiprocessing with a pipe for each worker. Pools of a library were weighed: concurrent.futures breaks
with the first worker that dies; pebble has timeouts and fresh workers, but its workers share one queue and its lock,
so that a kill -9 at the wrong moment leaves the lock held or half a message in the queue, for all. With a pipe each, a
death is the end of one pipe. There is no scheduling beyond "a worker that is free gets a cell".

Workers are spawned, not forked, with OMP_NUM_THREADS and its like in their environment before torch is imported. Each
is the leader of a process group, so that it is ended with everything it started and a terminal's Ctrl-C reaches this
process alone; a worker whose parent has gone ends itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any

from config import Config, ConfigError
from execution import cells as cell_work
from execution import quiet
from execution.cells import FATAL, Compute, Job, Outcome, PoisonedError, log_entry, one_line
from execution.run_log import worker_name
from plan import Cell

Ended = tuple[Cell, Outcome]
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
END_SECONDS = 5.0  # that a worker which is free has for ending
FAILED_STARTS = 20  # workers in a row that ended before they were there
START_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until another one is started then; twice as many each time
START_SECONDS = 600.0  # that a worker has for importing torch


class CellTimeout(RuntimeError):
    """A cell past run.cell_timeout."""


class WorkerDied(RuntimeError):
    """A cell whose workers were killed, or ended, as often as run.retries allows."""


def open_executor(config: Config, device: str) -> Any:
    """The executor that the config names; ConfigError where it cannot be had here.

    `serial` computes in this process, unless something may have to be killed or thrown away: with run.cell_timeout, or
    on CUDA, where an error poisons the process, it is one worker process.
    """
    if config.run.executor == "ray":
        from execution.ray_executor import Ray

        return Ray(config, device)
    if config.run.executor == "processes" or config.run.cell_timeout is not None or device == "cuda":
        return Processes(config, device)
    return Serial()


# --------------------------------------------------------------------------------------------------------------- serial


class Serial:
    is_here = True  # cells are computed in this process

    def run(self, job: Job, compute: Compute | None, cells: Sequence[Cell], report: Any) -> Iterator[Ended]:
        """`compute` is the phase's computation where this process has it open already."""
        compute = compute or cell_work.prepared(job)
        for cell in cells:
            report.begin(cell.id)

            def tell(kind: str, *values: Any, cell: Cell = cell) -> None:
                report.told(cell.id, kind, *values)

            start, before = time.time(), quiet.paused_seconds()
            try:
                outcome = cell_work.compute_cell(cell, compute, job, tell)
            except PoisonedError as error:  # of an engine on a GPU: what this process computes itself is on the CPU
                paused = quiet.paused_seconds() - before
                outcome = lost_outcome(cell, error, start, paused=paused, worker=worker_name(), trace=error.trace)
            yield cell, outcome

    def close(self) -> None:
        pass


def lost_outcome(
    cell: Cell,
    error: Exception,
    start: float | None,
    *,
    paused: float = 0.0,
    worker: str | None = None,
    trace: str | None = None,
) -> Outcome:
    """The outcome of a cell that no worker could tell the end of."""
    row = {**cell.identity(), "status": "failed", "error": one_line(error)}
    return Outcome(row, [], {}, _lost_entry(cell, row, start, paused, worker, trace), error)


def lost_attempt(
    cell: Cell,
    why: str,
    start: float | None,
    *,
    paused: float = 0.0,
    worker: str | None = None,
    trace: str | None = None,
) -> dict:
    """What the log says of an attempt whose worker was lost, and after which the cell is tried again: its seconds are
    spent."""
    return _lost_entry(cell, {"status": "lost", "error": why}, start, paused, worker, trace)


def _lost_entry(
    cell: Cell, row: dict, start: float | None, paused: float, worker: str | None, trace: str | None
) -> dict:
    """`start` is None where it is not known to have begun: then no time is its own. For `paused` seconds it stood
    still; they may be a little more than the rest where it was heard late that it had begun."""
    now = time.time()
    start = now if start is None else start
    seconds = max(now - start, paused)
    return log_entry(cell, row, start, seconds, peak_memory_mb=None, worker=worker, trace=trace, paused=paused)


# ------------------------------------------------------------------------------------------------------------ processes


class Processes:
    """`run.jobs` worker processes, started as cells need them and kept from phase to phase."""

    is_here = False

    def __init__(self, config: Config, device: str):
        self.settings = config.run
        jobs = config.run.jobs if config.run.executor == "processes" else 1
        self.visible = gpus_of_jobs(jobs, config.run.gpus_per_cell) if device == "cuda" else [None] * jobs
        self.workers: list[_Worker | None] = [None] * jobs
        self.failed_starts = 0
        self.has_worked = False  # any of them: what keeps another one from starting may pass
        self.start_again = 0.0  # when (monotonic); not before

    def run(self, job: Job, compute: Compute | None, cells: Sequence[Cell], report: Any) -> Iterator[Ended]:
        todo, attempts, timeout = list(cells), Counter(), self.settings.cell_timeout
        try:
            while todo or self._busy():
                self._assign(job, todo)
                for worker in self._ready(is_waiting=bool(todo)):
                    ended = self._receive(worker, todo, attempts, report)
                    if ended is not None:
                        yield ended
                for worker in self._busy():
                    worker.clock.add_pause(worker.paused_seconds(), quiet.silence(worker.standstill))
                    # what has something to say may have ended, and not been heard
                    if is_overdue(worker.cell, worker.clock, timeout, report) and not worker.connection.poll():
                        if not worker.has_started:
                            todo.insert(0, worker.cell)
                            self._discard(worker)
                            self._not_started(f"it has said nothing for {START_SECONDS:.0f} s")
                            continue
                        cell, outcome = worker.cell, self._timed_out(worker)
                        self._discard(worker)
                        yield cell, outcome
        finally:
            for worker in self._busy():
                self._discard(worker)

    def close(self) -> None:
        workers = list(filter(None, self.workers))
        for worker in workers:
            worker.connection.close()  # one that is free then ends of itself, and tidies up
        until = time.monotonic() + END_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            self._discard(worker)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker is not None and worker.cell is not None]

    def _assign(self, job: Job, todo: list[Cell]) -> None:
        """Give each free worker a cell, starting workers as long as there are more cells."""
        for place, worker in enumerate(self.workers):
            if not todo:
                return
            if worker is not None and worker.cell is None and not worker.process.is_alive():
                self._discard(worker)  # it died while it had nothing to do
                worker = None
            if worker is None:
                worker = self.workers[place] = self._started(place)
            if worker is not None and worker.cell is None:
                others = {other.model for other in self._busy()}
                worker.give(job, todo.pop(chosen(todo, worker.model, others)))

    def _started(self, place: int) -> _Worker | None:
        """None where none can be started now."""
        if time.monotonic() < self.start_again:
            return None
        try:
            return _Worker(self.settings.threads_per_cell, self.visible[place])
        except OSError as error:  # no processes, no memory, no room for temporary files
            self._not_started(one_line(error))
            return None

    def _ready(self, is_waiting: bool) -> list[_Worker]:
        """Those that say something, or have ended. `is_waiting`: there are cells for another worker."""
        busy = self._busy()
        if not busy:  # none could be started
            time.sleep(max(0.0, self.start_again - time.monotonic()))
            return []
        deadlines = [worker.clock.deadline for worker in busy if worker.clock.deadline is not None]
        if is_waiting and None in self.workers:
            deadlines.append(self.start_again)
        deadlines.append(time.monotonic() + quiet.STILL_SECONDS)  # one that is off the clock may have fallen silent
        wait = max(0.0, min(deadlines) - time.monotonic())
        waited = {handle: worker for worker in busy for handle in (worker.connection, worker.process.sentinel)}
        found = connection.wait(list(waited), wait)
        return list({id(waited[handle]): waited[handle] for handle in found}.values())

    def _receive(self, worker: _Worker, todo: list[Cell], attempts: Counter, report: Any) -> Ended | None:
        """Handle one message of a worker, or its death."""
        try:
            if not worker.connection.poll():  # only its sentinel spoke: it is dead, and there is nothing left to read
                raise EOFError
            kind, *values = worker.connection.recv()
        except (EOFError, OSError):
            return self._lost(worker, todo, attempts, report)
        cell = worker.cell
        if kind == "started":
            self.failed_starts, self.has_worked = 0, True
            worker.is_there = worker.has_started = True
            worker.clock.begin(self.settings.cell_timeout)
            report.begin(cell.id)
        elif kind == "ended":
            worker.free()
            return cell, values[0]
        elif kind == "fatal":
            raise values[0]
        elif kind == "poisoned":  # it ends itself; this is why
            worker.reason, worker.trace = values
        else:
            report.told(cell.id, kind, *values)
        return None

    def _lost(self, worker: _Worker, todo: list[Cell], attempts: Counter, report: Any) -> Ended | None:
        """A worker died: its cell is tried again on another one, or has failed."""
        cell, job, how = worker.cell, worker.job, worker.how_it_ended()
        has_started, reason = worker.has_started, worker.reason
        worker.clock.add_pause(worker.paused_seconds())
        start, known = worker.clock.start, {"paused": worker.clock.pause, "trace": worker.trace}
        known["worker"] = worker_name(worker.process.pid)
        self._discard(worker)
        if not has_started:
            todo.insert(0, cell)
            self._not_started(f"{how}, see above", is_killed=how.startswith("killed"))
            return None
        attempts[cell.id] += 1
        why = reason or f"its worker was {how}"
        if attempts[cell.id] <= self.settings.retries:
            cell_work.unmark(job, cell)
            report.lost(lost_attempt(cell, why, start, **known))
            todo.insert(0, cell)
            return None
        error = died(why, attempts[cell.id])
        return cell, lost_outcome(cell, error, start, **known)

    def _not_started(self, why: str, is_killed: bool = False) -> None:
        """It is tried again later; ConfigError where no other worker is at work and it is no use: the first ones end by
        themselves, or too many do."""
        self.failed_starts += 1
        is_useless = self.failed_starts >= FAILED_STARTS or not (is_killed or self.has_worked)
        if is_useless and not any(worker.is_there for worker in self._busy()):
            raise ConfigError(f"run.executor: a worker process cannot be started: {why}")
        pause = min(START_PAUSE * 2.0 ** min(self.failed_starts - 1, 10), LONGEST_PAUSE)
        self.start_again = time.monotonic() + pause

    def _timed_out(self, worker: _Worker) -> Outcome:
        name, clock = worker_name(worker.process.pid), worker.clock
        why = timed_out(self.settings.cell_timeout, clock)
        return lost_outcome(worker.cell, why, clock.start, paused=clock.pause, worker=name)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self.workers[self.workers.index(worker)] = None


def died(reason: str, attempts: int) -> WorkerDied:
    return WorkerDied(f"{reason}, the last of {attempts} attempts" if attempts > 1 else reason)


def timed_out(timeout: float, clock: Clock) -> CellTimeout:
    if clock.is_silent(timeout):
        return CellTimeout(f"timed out: {_silent(timeout)} (run.cell_timeout)")
    return CellTimeout(f"timed out after {timeout:g} s (run.cell_timeout)")


def is_overdue(cell: Cell, clock: Clock, timeout: float | None, report: Any, by: float = 0.0) -> bool:
    """Whether a cell is to be ended: it is late by so much, or off the clock and does not get on. The latter is told,
    once, where there is no timeout."""
    if timeout is None and clock.is_silent(timeout):
        report.told(cell.id, "line", f"  {cell.id}: {_silent(timeout)}; with run.cell_timeout it would be ended")
        return False
    return clock.is_late(by) or clock.is_silent(timeout)


def _silent(timeout: float | None) -> str:
    return f"it opens data, waits or stands still, and has not got on for {silent_seconds(timeout):g} s"


def silent_seconds(timeout: float | None) -> float:
    """That a cell has for getting on while it is off the clock."""
    return max(quiet.STILL_SECONDS, timeout or 0.0)


def chosen(todo: Sequence[Cell], last: str | None, others: Iterable[str | None]) -> int:
    """Which of the cells a free worker gets: one of the model that it has loaded, else of a model that no other one
    has, else the first."""
    models = [_model(cell) for cell in todo]
    if last in models:
        return models.index(last)
    taken = set(others)
    return next((place for place, model in enumerate(models) if model not in taken), 0)


def _model(cell: Cell) -> str:
    return cell.baseline_cell or cell.id


def gpus_of_jobs(jobs: int, gpus_per_cell: float) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each job; None: as it is. ConfigError where there are not so many GPUs."""
    if gpus_per_cell == 0:
        return [None] * jobs
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        gpus = [name.strip() for name in given.split(",") if name.strip()]
    else:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    check_gpus(gpus_per_cell)
    at_once = int(1 / gpus_per_cell + 1e-9) * len(gpus) if gpus_per_cell <= 1 else len(gpus) // int(gpus_per_cell)
    if jobs > at_once:
        raise ConfigError(
            f"run.jobs: {jobs} cells of {gpus_per_cell:g} GPUs each, and here {'is' if len(gpus) == 1 else 'are'} "
            f"{len(gpus)}: at most {at_once} at once; lower run.jobs, or let cells share with run.gpus_per_cell=0.5"
        )
    if gpus_per_cell > 1:
        each = int(gpus_per_cell)
        return [",".join(gpus[job * each : (job + 1) * each]) for job in range(jobs)]
    return [gpus[job % len(gpus)] for job in range(jobs)]


def check_gpus(gpus_per_cell: float) -> None:
    if gpus_per_cell > 1 and not float(gpus_per_cell).is_integer():
        raise ConfigError(f"run.gpus_per_cell: {gpus_per_cell:g} is neither a share of a GPU nor a number of GPUs")


@dataclass
class Clock:
    """Since when a cell has been computed, and until when it may."""

    start: float = field(default_factory=time.time)  # seconds since 1970
    deadline: float | None = None
    pause: float = 0.0  # how much of it was added to the deadline
    silence: float = 0.0  # since it has got on, off the clock

    def begin(self, timeout: float | None, elapsed: float = 0.0) -> None:
        """`elapsed` seconds ago."""
        self.start, self.pause = time.time() - elapsed, 0.0
        self.deadline = None if timeout is None else time.monotonic() + timeout - elapsed

    def add_pause(self, pause: float, silence: float = 0.0) -> None:
        """The time for which it stood still is not its own. It never becomes less: where it seems to, its two parts
        were read while they were written."""
        pause = max(pause, self.pause)
        if self.deadline is not None:
            self.deadline += pause - self.pause
        self.pause, self.silence = pause, silence

    def is_late(self, by: float = 0.0) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline + by

    def is_silent(self, timeout: float | None) -> bool:
        return self.silence >= silent_seconds(timeout)


@dataclass(eq=False)
class _Worker:
    """A worker process, seen from the one that started it."""

    threads: int
    visible: str | None
    process: Any = field(init=False)
    connection: connection.Connection = field(init=False)
    standstill: Any = field(init=False)  # see quiet.computing; in memory that it shares
    clock: Clock = field(default_factory=Clock)
    job: Job | None = None
    cell: Cell | None = None
    model: str | None = None  # which it has loaded
    is_there: bool = False  # it has started a cell, this one or another
    has_started: bool = False  # the cell
    reason: str | None = None  # why it ends itself
    trace: str | None = None

    def __post_init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.standstill = context.RawArray("d", quiet.ON_THE_CLOCK)
        arguments = (theirs, self.standstill)
        self.process = context.Process(target=_work, args=arguments, name="cell worker", daemon=True)
        with _environment(self.threads, self.visible), _interrupts_blocked():
            _start_tracker()
            self.process.start()
        theirs.close()  # so that its death is the end of the pipe

    def give(self, job: Job, cell: Cell) -> None:
        self.cell, self.model, self.has_started = cell, _model(cell), False
        self.clock = Clock(deadline=time.monotonic() + START_SECONDS)
        with contextlib.suppress(OSError):  # it died just now: its sentinel says so
            if job is not self.job:
                self.connection.send(job)
                self.job = job
            self.connection.send(cell)

    def free(self) -> None:
        self.cell = None

    def paused_seconds(self) -> float:
        """For how long its cell has stood still, up to now."""
        return quiet.standing(self.standstill)

    def how_it_ended(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is None:
            return "lost: it closed its pipe"
        if code < 0:
            hint = ", by hand or for want of memory" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code} ({signal.Signals(-code).name}{hint})"
        return f"ended with exit status {code}"

    def kill(self) -> None:
        """End it and whatever it started."""
        for end in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            with contextlib.suppress(OSError):  # no group yet, or nobody left
                end()
        self.connection.close()
        self.process.join(END_SECONDS)
        try:
            self.process.close()
        except ValueError:  # the kernel cannot end it yet, in a disk or a GPU that does not answer
            multiprocessing.process._children.discard(self.process)  # Python would wait for it in the end


def _start_tracker() -> None:
    """The process in which multiprocessing tidies up after workers; it need not say so of those that were killed."""
    before = list(sys.warnoptions)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = before


@contextlib.contextmanager
def _environment(threads: int, visible: str | None) -> Iterator[None]:
    """What a process that is started now finds in its environment."""
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads))
    if visible is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = visible
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started now does not hear a Ctrl-C while it is importing; this one hears it a little later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection, standstill: Any) -> None:
    """The life of a worker process: cells come in, messages and outcomes go out."""
    if os.name == "posix":
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = None
    while True:
        try:
            received = pipe.recv()
        except EOFError:
            return
        if isinstance(received, Job):
            job = received
            continue
        standstill[:] = quiet.ON_THE_CLOCK  # before it is asked for; that of the cell before is read until now
        pipe.send(("started",))

        def tell(kind: str, *values: Any) -> None:
            _send(pipe, (kind, *values))

        try:
            with quiet.computing(standstill=standstill):
                outcome = cell_work.compute_cell(received, cell_work.prepared(job), job, tell)
        except FATAL as error:
            pipe.send(("fatal", error))
        except PoisonedError as error:
            pipe.send(("poisoned", f"{error} (its worker was thrown away)", error.trace))
            os._exit(1)
        else:
            pipe.send(("ended", outcome))


def _send(pipe: connection.Connection, message: tuple) -> None:
    """Send what a cell tells. A program that was stopped reads nothing; a worker that waits for it in a write to a full
    pipe would hear no signal, and not stand still while another one measures (quiet.py)."""
    if hasattr(select, "poll"):
        room = select.poll()
        room.register(pipe, select.POLLOUT)
        room.poll()
    pipe.send(message)


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
