"""Runs a phase's cells; the only place that knows where a cell runs.

A cell that fails gets a row with its error and the sweep goes on. What no cell can help (bad data, a folder that cannot
be written, Ctrl-C) ends the program; what was finished before is kept.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from config import Config, ConfigError
from datasets import DataError
from models import CheckpointError
from phases.plan import Cell
from run_log import RunLog, measured
from store import Store, StoreError, seed_for
from tracking import Tracker

FATAL = (StoreError, DataError, ConfigError, CheckpointError)  # what no cell can help
TABLE_SECONDS = 5.0  # the tables on disk are at most so much older than the records they are made of


@dataclass
class CellResult:
    """What a cell gives: its row's columns beside the identity, its group rows, and what else is kept in its record."""

    columns: dict
    groups: list[dict]
    extra: dict = field(default_factory=dict)


Compute = Callable[[Cell, "Report"], CellResult]


class Report:
    """Tells the person at the keyboard how far the run is: a live bar in a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self.tracker: Tracker | None = None  # gets each cell that ended
        self.log: RunLog | None = None  # likewise
        self.chosen: Callable[[list[Cell]], list[Cell]] | None = None  # of those to do; None: all
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self.has_details = not quiet and not self.live
        self.bar: Progress | None = None
        self.task = None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, phase: str, cells: int, done: int, todo: int) -> None:
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

    def update(self, cell: str, position: int, text: str = "", share: float = 0.0) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=position + share, cell=f"{cell} {text}".rstrip())

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
    compute: Compute,
    config: Config,
    store: Store,
    report: Report,
    is_complete: Callable[[Cell], bool] | None = None,
) -> None:
    """Compute the cells that are not complete yet (None: not done), in order, and write each one as it ends."""
    planned = [cell.id for cell in cells]
    todo = [cell for cell in cells if not (is_complete(cell) if is_complete else store.is_done(cell.id))]
    done = len(cells) - len(todo)
    if report.chosen is not None:
        todo = report.chosen(todo)
    report.start(phase, len(cells), done, len(todo))
    written = time.monotonic()
    try:
        for position, cell in enumerate(todo):
            report.update(cell.id, position)
            with store.mark_running(cell.id), measured() as entry:
                row, groups, extra, trace = _run_cell(cell, compute, config, report, position)
                store.write_cell(row, groups, extra)
            if report.log is not None:
                told = {"cell": cell.id, "phase": phase, "status": row["status"], "error": row["error"]}
                report.log.record({**told, **entry, "traceback": trace})
            if report.tracker is not None:
                report.tracker.log(cell, row, extra)
            outcome = (
                f"accuracy {100 * row['accuracy']:.1f} %" if row["status"] == "done" else f"FAILED: {row['error']}"
            )
            report.line(f"  [{position + 1}/{len(todo)}] {cell.id}: {outcome} ({entry['seconds']:.1f} s)")
            if time.monotonic() - written > TABLE_SECONDS:
                store.write_tables(phase, planned)
                written = time.monotonic()
    finally:
        report.stop()
        if not isinstance(sys.exc_info()[1], StoreError):
            store.write_tables(phase, planned)


def _run_cell(
    cell: Cell, compute: Compute, config: Config, report: Report, position: int
) -> tuple[dict, list[dict], dict, str | None]:
    """(row, groups, extra, the traceback of a failure)."""
    torch.set_num_threads(config.run.threads_per_cell)
    torch.manual_seed(seed_for(cell.seed, cell.id, "global"))  # for what draws without a generator, such as dropout
    view = _CellReport(report, cell.id, position)
    try:
        result = compute(cell, view)
    except FATAL:
        raise
    except Exception as error:  # the sweep goes on; the row and the exit status say what happened
        return {**cell.identity(), "status": "failed", "error": one_line(error)}, [], {}, traceback.format_exc()
    identity = cell.identity()
    groups = [{**{key: identity[key] for key in _GROUP_IDENTITY}, **group} for group in result.groups]
    return {**identity, "status": "done", "error": None, **result.columns}, groups, result.extra, None


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_GROUP_IDENTITY = ("cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits")


class _CellReport:
    """The part of a Report that a cell sees: `line`, `detail` and `progress(text, share done)`."""

    def __init__(self, report: Report, cell: str, position: int):
        self.report, self.cell, self.position = report, cell, position

    def line(self, text: str) -> None:
        self.report.line(text)

    def detail(self, text: str) -> None:
        """A line within a cell, where no live bar shows the same."""
        if self.report.has_details:
            self.report.line(f"    {self.cell}: {text}")

    def progress(self, text: str, share: float) -> None:
        self.report.update(self.cell, self.position, text, share)
