"""Runs a phase's cells on the config's executor, writes each one as it ends, and tells how far the run is.

Where a cell runs is known here and in executors.py alone: phases give a function that prepares a computation in
whatever process, and the cells. A cell that fails gets a row with its error and the sweep goes on. What no cell can
help (bad data, a folder that cannot be written, Ctrl-C) ends the program; what was finished before is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from config import Config
from execution.cells import (
    FATAL,
    CellReport,
    CellResult,
    Compute,
    Job,
    Outcome,
    Prepare,
    as_record,
    one_line,
    raise_poison,
)
from execution.executors import open_executor
from execution.order import longest_first
from execution.run_lock import record_of
from execution.run_log import RunLog
from execution.tracking import Tracker
from plan import Cell
from store import Store, StoreError

__all__ = ["FATAL", "CellResult", "Compute", "Report", "one_line", "raise_poison", "run_cells"]

# the tables on disk are at most so much older than the records they are made of; where there are so many records that
# writing the tables takes long, so that a run has no more than a share of its time for it
TABLE_SECONDS = 5.0
TABLE_SHARE = 0.02
_runs = itertools.count()


class _Output:
    """Standard output, which goes quiet once it cannot be written any more (its disk is full, its terminal or reader is
    gone): the results matter, what is told of them does not. In place of a stream, since a bar is drawn in a thread."""

    def __init__(self):
        self.is_lost = False

    def write(self, text: str) -> int:
        self._unless_lost("write", text)
        return len(text)

    def flush(self) -> None:
        self._unless_lost("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    @staticmethod
    def _stream() -> Any:
        """Rich puts itself in its place while there is a bar."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def _unless_lost(self, what: str, *values: Any) -> None:
        if self.is_lost or sys.stdout is None:  # None: it was closed when Python was started
            return
        try:
            getattr(self._stream(), what)(*values)
        except OSError:
            self.is_lost = True
            # what is left in its buffer goes there too: at its end Python would fail to write it, with exit status 120
            with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream().fileno())


class Report:
    """Tells the person at the keyboard how far the run is: a live bar in a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.tracker: Tracker | None = None  # gets each cell that ended
        self.log: RunLog | None = None  # likewise
        self.chosen: Callable[[list[Cell]], list[Cell]] | None = None  # of those to do; None: all
        self.executor: Any = None  # kept from phase to phase, see `on`; None: each phase has its own
        self.console = console or Console(file=_Output(), highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self.has_details = not quiet and not self.live
        self.bar: Progress | None = None
        self.task = None
        self.running: dict[str, float] = {}  # cell -> the share of it that is done
        self.ended = 0
        self.lines: set[str] = set()  # that cells told: what is wrong with the data, each worker finds out

    @contextlib.contextmanager
    def on(self, config: Config, device: str) -> Iterator[None]:
        """Have one executor for all phases within: its workers import torch once."""
        self.executor = open_executor(config, device)
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """End the workers, which the phases that follow have no use for."""
        if self.executor is not None:
            self.executor.close()
            self.executor = None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, phase: str, cells: int, done: int, todo: int) -> None:
        self.running, self.ended, self.lines = {}, 0, set()
        kept = f", {done} of them done before" if done else ""
        kept += f", {cells - done - todo} left as they are" if todo < cells - done else ""
        self.line(f"{phase}: {cells} cell{'s' if cells != 1 else ''}{kept}")
        if self.live and todo:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[cell]}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(phase, total=todo, cell=phase)

    def progress(self, text: str, share: float) -> None:
        """What is going on before the first cell; only a cell's own report shows it."""

    def begin(self, cell: str) -> None:
        self.update(cell)

    def told(self, cell: str, kind: str, *values: Any) -> None:
        """What a running cell says: see cells.Tell."""
        if kind == "progress":
            self.update(cell, *values)
        elif kind == "line" and values[0] not in self.lines:
            self.lines.add(values[0])
            self.line(values[0])
        elif kind == "detail" and self.has_details:
            self.line(f"    {cell}: {values[0]}")

    def lost(self, attempt: dict) -> None:
        """A cell that is tried again, since its worker was lost; `attempt` is what the log says of it."""
        cell, why = attempt["cell"], attempt["error"]
        self.line(f"  {cell}: {why}; it is tried again")
        self.running.pop(cell, None)
        if self.log is not None:
            self.log.record(attempt)

    def update(self, cell: str, text: str = "", share: float = 0.0) -> None:
        self.running[cell] = share
        if self.bar is not None:
            more = f" (and {len(self.running) - 1} more)" if len(self.running) > 1 else ""
            done = self.ended + sum(self.running.values())
            self.bar.update(self.task, completed=done, cell=f"{cell} {text}".rstrip() + more)

    def end(self, cell: str) -> None:
        self.running.pop(cell, None)
        self.ended += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.ended + sum(self.running.values()))

    def step(self, done: int, total: int, what: str) -> None:
        """A step of a phase that has no cells."""
        self.line(f"  [{done}/{total}] {what}")

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def run_cells(
    phase: str,
    cells: Sequence[Cell],
    prepare: Prepare,
    config: Config,
    store: Store,
    report: Report,
    is_complete: Callable[[Cell], bool] | None = None,
    *,
    device: str = "cpu",
    data: Any = None,
    keep: Callable[[Cell, BaseException, Any, Config, Store], CellResult] | None = None,
) -> None:
    """Compute the cells that are not complete yet (None: not done) and write each one as it ends.

    `prepare(config, store, device, data)` gives what computes a cell, a function of (cell, report); a worker calls it
    with data None, this process with the data sets that are open. `keep(cell, error, report, config, store)` is the
    result of a finished cell that lacked something, and whose worker was lost or timed out.
    """
    planned = [cell.id for cell in cells]
    todo = [cell for cell in cells if not (is_complete(cell) if is_complete else store.is_done(cell.id))]
    done = len(cells) - len(todo)
    # these are finished, and lack something; a record is read only where there are predictions
    finished = {cell.id for cell in todo if store.predictions_path(cell.id).exists() and store.is_done(cell.id)}
    if report.chosen is not None:
        todo = report.chosen(todo)
    report.start(phase, len(cells), done, len(todo))
    write_again = time.monotonic() + TABLE_SECONDS
    token = f"{phase}-{os.getpid()}-{next(_runs)}"
    record = record_of(store.root)
    owner = record.read_bytes() if record.exists() else None
    job = Job(prepare, config, str(store.root.absolute()), device, token, owner)
    executor = report.executor or open_executor(config, device)
    if not executor.is_here:
        todo = longest_first(todo, config)
    try:
        compute = prepare(config, store, device, data) if executor.is_here else None
        with contextlib.closing(executor.run(job, compute, todo, report)) as ended:
            for cell, outcome in ended:
                if cell.id in finished:
                    outcome.log["again"] = True
                _write(cell, outcome, config, store, report, keep)
                report.end(cell.id)
                seconds = outcome.log["seconds"]
                report.line(f"  [{report.ended}/{len(todo)}] {cell.id}: {_told(outcome.row)} ({seconds:.1f} s)")
                if (now := time.monotonic()) > write_again:
                    store.write_tables(phase, planned)
                    took = time.monotonic() - now
                    write_again = now + max(TABLE_SECONDS, took / TABLE_SHARE)
    finally:
        if executor is not report.executor:
            executor.close()
        report.stop()
        if not isinstance(sys.exc_info()[1], StoreError):
            store.write_tables(phase, planned)


def _told(row: dict) -> str:
    return f"accuracy {100 * row['accuracy']:.1f} %" if row["status"] == "done" else f"FAILED: {row['error']}"


def _write(cell: Cell, outcome: Outcome, config: Config, store: Store, report: Report, keep: Any) -> None:
    """The cell's record, and what is told of it elsewhere; a finished cell that was lost keeps its results."""
    if outcome.lost is not None and keep is not None and store.is_done(cell.id):
        view = CellReport(lambda kind, *values: report.told(cell.id, kind, *values))
        outcome.row, outcome.groups, outcome.extra = as_record(cell, keep(cell, outcome.lost, view, config, store))
    with _uninterrupted():
        if report.log is not None:
            report.log.record(outcome.log)  # before the record: see run_log.py
        store.write_cell(outcome.row, outcome.groups, outcome.extra)
        store.unmark(cell.id)  # of a worker that was killed, perhaps on another machine
    if report.tracker is not None:
        report.tracker.log(cell, outcome.row, outcome.extra)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A Ctrl-C or SIGTERM is heard when it is over; a second one at once, of somebody for whom it takes too long."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    heard: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}  # not the system's own

    def note(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if len(heard) == 1:
        handlers[heard[0]](heard[0], None)
