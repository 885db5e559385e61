"""How far a study is: python main.py --status. Reads the results folder, writes nothing, and imports no torch.

Done and failed are what the cells' records say (a finished cell whose deployment, diagnostics or evaluation on another
data set failed is a failed one, as for the exit status of a run), running what running/ says of processes that are
alive, and times are those of the log. What is left is an estimate from cells that ended: those of the same data set,
model and method, else of the same model and method, else of the model, else of the phase. Where no cell of a phase has
ended, it is not known.
Finished cells that lack something, such as another engine, are estimated by those that lacked something.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from config import Config
from execution.run_lock import SILENCE, owner_of, seconds_silent
from execution.run_log import RunLog
from owners import Owner
from phases import complete
from plan import Cell, plan
from store import Store, StoreError

ANALYSIS = "analysis"  # the phase, and the name under which it is marked as running
UP_TO_DATE, OUT_OF_DATE, TO_DO, UNKNOWN = "up to date", "out of date", "to do", "made, not known from what"


class _Snapshot(Store):
    """Each record is read once."""

    def __init__(self, store: Store):
        super().__init__(store.root)
        self.known: dict[str, dict | None] = {}

    def record(self, cell: str) -> dict | None:
        if cell not in self.known:
            self.known[cell] = super().record(cell)
        return self.known[cell]


def study_status(config: Config, store: Store, now: datetime | None = None) -> dict[str, Any]:
    """Everything that --status tells, as JSON has it; seconds that are not known are None."""
    now = now or datetime.now(UTC)
    store, log = _Snapshot(store), RunLog(store)
    entries, damaged = log.read_with_damage()
    planned = plan(config)
    owner = owner_of(store.root)
    is_run = owner is not None and owner.is_alive() is not False
    if is_run and not owner.is_here:
        is_run = seconds_silent(store.root, now.timestamp()) <= SILENCE
    running = dict(_running(store, is_run))
    is_analysing = running.pop(ANALYSIS, None) is not None
    at_a_time = _at_a_time(config, entries, running, owner if is_run else None)
    durations = _Durations(entries, planned, store)
    status: dict[str, Any] = {
        "results_dir": str(store.root),
        "run": _told(owner, now) if is_run else None,
        "died": _died(owner, now) if owner is not None and not is_run else None,
        "at_a_time": at_a_time,
        "phases": {},
        "running": [],
        "failed": [],
    }
    broken: set[str] = set()
    for phase, cells in planned.items():
        counts = {"cells": len(cells), "done": 0, "failed": 0, "running": 0, "to_do": 0}
        left, longest, unknown = 0.0, 0.0, 0
        for cell in cells:
            state, error = _state(cell, config, store, running)
            counts[state] += 1
            if state == "failed":
                because_of = None
                if not _is_done(cell, store):  # a finished one fails by itself, and nothing made from it fails with it
                    broken.add(cell.id)
                    because_of = cell.baseline_cell if cell.baseline_cell in broken else None
                status["failed"].append({"cell": cell.id, "phase": phase, "error": error, "because_of": because_of})
            if state in ("done", "failed"):
                continue
            expected, elapsed = durations.of(cell, again=_is_done(cell, store)), 0.0
            if state == "running":
                told = _told(running[cell.id], now)
                elapsed = told["seconds"] or 0.0
                status["running"].append({"cell": cell.id, "phase": phase, **told, "expected_seconds": expected})
            if expected is None:
                unknown += 1
            else:
                left += max(expected - elapsed, 0.0)
                longest = max(longest, expected - elapsed)
        is_known = unknown < counts["running"] + counts["to_do"] or counts["running"] + counts["to_do"] == 0
        status["phases"][phase] = counts | {
            "seconds_spent": durations.spent(phase, {cell.id for cell in cells}),
            "seconds_left": max(left / at_a_time, longest) if is_known else None,
            "cells_of_unknown_length": unknown,
        }
    status["analysis"] = _analysis(entries, config, store)
    if is_analysing:
        status["analysis"]["state"] = "running"
    status["log"] = {"records": len(entries), "damaged_lines": damaged}
    everything = {cell.id for cells in planned.values() for cell in cells}
    found = {path.stem for path in (store.root / "cells").glob("*.json")}
    status["cells_of_other_configs"] = len(found - everything)
    return status


def analysis_inputs(config: Config, store: Store) -> str:
    """Of everything that the analysis is made of: what the config says of it, every record, every predictions file."""
    settings = {
        "cells": [cell.id for cells in plan(config).values() for cell in cells],
        "analysis": config.analysis.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "min_group_size": config.data.min_group_size,
        "data": {name: config.dataset(name).model_dump(mode="json", exclude={"root"}) for name in config.data.dataset},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted((store.root / "cells").glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # another run's --fresh has deleted it just now: not there
            digest.update(f"\n{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted((store.root / "predictions").glob("[!.]*.npz")):
        with contextlib.suppress(FileNotFoundError):
            digest.update(f"\n{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- states


def _state(cell: Cell, config: Config, store: Store, running: Mapping[str, Owner]) -> tuple[str, str | None]:
    """('done' | 'failed' | 'running' | 'to_do', the error)."""
    if cell.id in running:
        return "running", None
    try:
        record = store.record(cell.id)
        if record is not None and record["row"]["status"] == "failed":
            return "failed", record["row"]["error"]
        if failures := complete.failures(cell, config, store):
            return "failed", "; ".join(failure.told() for failure in failures)
        return ("to_do" if complete.missing(cell, config, store) else "done"), None
    except StoreError as error:  # a damaged record
        return "failed", str(error)


def _is_done(cell: Cell, store: Store) -> bool:
    """Whether it only lacks something that is made of its results."""
    try:
        return store.is_done(cell.id)
    except StoreError:
        return False


def _running(store: Store, is_run: bool) -> Iterator[tuple[str, Owner]]:
    """Cells whose worker is alive; on another machine, which cannot be asked, as long as the run is."""
    for cell, owner in store.marked():
        if owner is not None and (is_run if (alive := owner.is_alive()) is None else alive):
            yield cell, owner


def _at_a_time(config: Config, entries: list[dict], running: Mapping[str, Owner], run: Owner | None) -> int:
    """How many cells the run computes at once: the most that it was seen to, since at the end of a phase there are
    fewer, and Ray's places are the cluster's. Without a run, or before its first cells, what the config says, and of a
    cluster what any run was seen to."""
    since = run.since if run is not None and running else None
    if since is None and not (config.run.executor == "ray" and config.run.address):
        return config.run.jobs if config.run.executor != "serial" else 1
    moments = [(owner.since, 1) for owner in running.values()]
    for entry in entries:
        if entry["cell"] is not None and entry["start"] and entry["end"] and entry["start"] >= (since or ""):
            moments += [(entry["start"], 1), (entry["end"], -1)]
    most = now = 0
    for _, step in sorted(moments):  # times of one form, which sort as text; of equal ones the end comes first
        now += step
        most = max(most, now)
    return max(most, 1)


def _told(owner: Owner, now: datetime) -> dict[str, Any]:
    try:
        seconds = max((now - datetime.fromisoformat(owner.since)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        seconds = None
    told = {"host": owner.host, "pid": owner.pid, "since": owner.since, "command": owner.command, "seconds": seconds}
    return told


def _died(owner: Owner, now: datetime) -> dict[str, Any]:
    return {**_told(owner, now), "goes_on_with": _going_on(owner.command)}


def _going_on(command: str | None) -> str | None:
    """The command that goes on where this one was killed: without --fresh, which would clear what it has finished."""
    try:
        words = shlex.split(command or "")
    except ValueError:  # not one that Owner wrote
        return command
    kept = [word for word in words if not (word.startswith("--f") and "--fresh".startswith(word))]  # as argparse does
    return command if kept == words else shlex.join(kept)


def _analysis(entries: list[dict], config: Config, store: Store) -> dict[str, Any]:
    made = [entry for entry in entries if entry["phase"] == ANALYSIS and entry["status"] == "done"]
    if not (store.analysis / "summary.md").exists():
        state = TO_DO
    elif not made:
        state = UNKNOWN
    else:
        state = UP_TO_DATE if made[-1].get("inputs") == analysis_inputs(config, store) else OUT_OF_DATE
    return {
        "state": state,
        "seconds_spent": sum(entry["seconds"] or 0.0 for entry in made) if made else None,
        "seconds_usual": made[-1]["seconds"] if made else None,
    }


class _Durations:
    """Seconds of cells that ended, found by what they were."""

    def __init__(self, entries: list[dict], planned: Mapping[str, list[Cell]], store: Store):
        self.entries = [entry for entry in entries if isinstance(entry["seconds"], (int, float))]
        cells = {cell.id: cell for cells in planned.values() for cell in cells}
        seconds: dict[tuple, list[float]] = {}
        for entry in self.entries:
            if entry["status"] != "done" or entry["cell"] is None:
                continue
            what = cells[entry["cell"]].identity() if entry["cell"] in cells else _row(entry["cell"], store)
            for key in _likeness(what) if what else ():
                seconds.setdefault((*key, bool(entry.get("again"))), []).append(entry["seconds"])
        self.means = {key: sum(values) / len(values) for key, values in seconds.items()}

    def of(self, cell: Cell, again: bool = False) -> float | None:
        """Of the whole cell; or of what a finished one lacks."""
        keys = [(*key, again) for key in _likeness(cell.identity())]
        return next((self.means[key] for key in keys if key in self.means), None)

    def spent(self, phase: str, cells: set[str]) -> float | None:
        """On these cells, all attempts, those lost too; None where the log has nothing of the phase."""
        spent = [entry["seconds"] for entry in self.entries if entry["phase"] == phase and entry["cell"] in cells]
        return sum(spent) if spent else None


def _row(cell: str, store: Store) -> dict | None:
    """Of a cell of another config."""
    try:
        record = store.record(cell)
    except StoreError:
        return None
    return None if record is None else record["row"]


def _likeness(what: Mapping[str, Any]) -> list[tuple]:
    """From the closest kin to the phase's mean."""
    method = what.get("strategy") or what.get("method")
    phase, dataset, model = what["phase"], what["dataset"], what["model"]
    return [(phase, dataset, model, method), (phase, model, method), (phase, model), (phase,)]


# ---------------------------------------------------------------------------------------------------------- the screen


@dataclass
class Screen:
    """What a person reads."""

    status: dict[str, Any]

    def __rich_console__(self, console: Console, options: Any) -> Iterator[Any]:
        yield Group(*self._parts())

    def _parts(self) -> Iterator[Any]:
        status = self.status
        if status["run"] is not None:
            yield Text(f"{status['results_dir']}: a run is in progress, {_of(status['run'])}")
        else:
            yield Text(f"{status['results_dir']}: no run in progress")
        if status["died"] is not None:
            yield Text(f"the last one was killed: {_of(status['died'])}; {_how_to_go_on(status['died'])}")
        table = Table("phase", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("cells", "done", "failed", "running", "to do", "time spent", "time left"):
            table.add_column(column, justify="right")
        for phase, numbers in status["phases"].items():
            counts = [str(numbers[key]) for key in ("cells", "done", "failed", "running", "to_do")]
            table.add_row(phase, *counts, duration(numbers["seconds_spent"]), _left(numbers))
        yield table
        analysis = status["analysis"]
        took = "" if analysis["seconds_usual"] is None else f" (takes {duration(analysis['seconds_usual'])})"
        yield Text(f"analysis: {analysis['state']}{took}")
        if status["at_a_time"] > 1:
            yield Text(f"time left: with {status['at_a_time']} cells at a time")
        for cell in status["running"]:
            usual = "" if cell["expected_seconds"] is None else f", usually {duration(cell['expected_seconds'])}"
            who = f"process {cell['pid']} on {cell['host']}"
            yield Text(f"running: {cell['cell']}: {duration(cell['seconds'])}{usual} ({who})")
        followers = Counter(cell["because_of"] for cell in status["failed"])
        for cell in status["failed"]:
            if cell["because_of"] is None:
                more = f" (and {followers[cell['cell']]} cells made from it)" if followers[cell["cell"]] else ""
                yield Text(f"failed: {cell['cell']}{more}: {cell['error']}")
        if status["failed"]:
            yield Text("the next run computes failed cells again; --retry-failed only those, --keep-failed all others")
        if status["log"]["damaged_lines"]:
            yield Text(f"log.jsonl: {status['log']['damaged_lines']} damaged lines are left out")
        if status["cells_of_other_configs"]:
            yield Text(f"{status['cells_of_other_configs']} cells in the folder are not of this config")


def _of(run: Mapping[str, Any]) -> str:
    return f"process {run['pid']} on {run['host']} since {run['since']} ({run['command']})"


def _how_to_go_on(died: Mapping[str, Any]) -> str:
    again = died["goes_on_with"]
    return "the same command goes on" if again == died["command"] else f"to go on, without --fresh: {again}"


def _left(numbers: Mapping[str, Any]) -> str:
    left, unknown = numbers["seconds_left"], numbers["cells_of_unknown_length"]
    told = duration(left)
    return told if not unknown or left is None else f"{told} + {unknown} cells not known"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else "-"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"
