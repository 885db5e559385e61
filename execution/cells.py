"""A cell's work, wherever it is done: what is sent to a worker, what comes back, and what is measured of it there.

A cell is a function of (config, cell, artifacts in the results folder): a worker opens the folder and the data itself
(decoded images are read from one file, of which all workers of a machine share the kernel's copy), writes predictions
and checkpoints, and gives back the row; the program that it works for writes the record, which marks the cell as ended.
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import threadpoolctl

from config import Config, ConfigError
from execution import memory, quiet
from execution.run_lock import record_of
from execution.run_log import peak_memory_mb, reset_peak_memory, worker_name
from image_cache import DataError
from plan import Cell
from store import CheckpointError, Store, StoreError, seed_for

FATAL = (StoreError, DataError, ConfigError, CheckpointError)  # what no cell can help
MEMORY_HINT = (
    "too little memory for this cell: lower run.jobs, training.batch_size or run.evaluation_batch_size, or free "
    "memory, and run the same command again"
)
# a dead CUDA context as PyTorch, its libraries and ONNX Runtime (CUDA failure 710: ...) tell of it
POISON = re.compile(
    r"CUDA error|cuDNN error|cuFFT error|cusolver error|CUDA failure 7\d\d"
    r"|(CUDNN|CUBLAS|CUSOLVER|CUSPARSE)_STATUS_(?!NOT_SUPPORTED)"
)
PROGRESS_SECONDS = 0.1  # between two messages of how far a cell is
GARBAGE_SHARE = 0.05  # of the time that looking for garbage may take
PATIENCE = 70.0  # seconds that a machine may take to see a file that another one has just written: NFS, at most 60


@dataclass
class CellResult:
    """What a cell gives: its row's columns beside the identity, its group rows, and what else is kept in its record."""

    columns: dict
    groups: list[dict]
    extra: dict = field(default_factory=dict)


Compute = Callable[[Cell, Any], CellResult]  # (cell, what it tells: CellReport)
Prepare = Callable[[Config, Store, str, Any], Compute]  # (config, store, device, opened data sets or None)
Tell = Callable[..., None]  # ("line" | "detail", text) or ("progress", text, share)


@dataclass(frozen=True)
class Job:
    """What all cells of a phase have in common. `prepare` is a function of a module: it is sent by its name."""

    prepare: Prepare
    config: Config
    results_dir: str
    device: str
    token: str  # another one for each phase of each run
    owner: bytes | None = None  # what .lock.json in the results folder holds: by this a worker knows it
    folder: str = field(default_factory=os.getcwd)  # which relative paths of the config are of


@dataclass
class Outcome:
    """What became of a cell: its record, and what the log says of it."""

    row: dict
    groups: list[dict]
    extra: dict
    log: dict  # cell, phase, status, start, end (seconds since 1970), seconds, peak_memory_mb, worker, error, traceback
    lost: Exception | None = None  # its worker was, with what it had computed


class PoisonedError(RuntimeError):
    """A CUDA error after which this process can compute nothing any more; `trace` is the traceback."""

    def __init__(self, message: str, trace: str):
        super().__init__(message)
        self.trace = trace


class CellReport:
    """The part of a Report that a cell sees: `line`, `detail` and `progress(text, share done)`."""

    def __init__(self, tell: Tell):
        self.tell = tell
        self.told = float("-inf")

    def line(self, text: str) -> None:
        self.tell("line", text)

    def detail(self, text: str) -> None:
        """A line within a cell, where no live bar shows the same."""
        self.tell("detail", text)

    def progress(self, text: str, share: float) -> None:
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS:
            self.told = now
            self.tell("progress", text, share)


def compute_cell(cell: Cell, compute: Compute, job: Job, tell: Tell) -> Outcome:
    """The cell's outcome, also where it fails; raises what is FATAL, and PoisonedError. Meanwhile a mark in the results
    folder says who computes it."""
    _check_folder(job)
    memory.keep_freed()
    with Store(job.results_dir).mark_running(cell.id), _forgetting_sources():
        outcome = _compute(cell, compute, job.config, tell)
        try:
            # a traced model is a cycle: it would stay until Python looks for these, on a GPU too
            _free_memory(at_once=outcome.row["status"] != "done")
        except RuntimeError as error:  # an error of a GPU may show only now
            if not is_poisoned(error):
                raise
            raise PoisonedError(one_line(error), "".join(traceback.format_exception(error))) from None
        return outcome


def _compute(cell: Cell, compute: Compute, config: Config, tell: Tell) -> Outcome:
    threads = config.run.threads_per_cell
    start, clock, paused = time.time(), time.perf_counter(), quiet.paused_seconds()
    is_own_peak, is_on_gpu, torch = reset_peak_memory(), _has_gpu(), _torch()
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    row, groups, extra = {**cell.identity(), "status": "failed", "error": None}, [], {}
    trace = None
    with threadpoolctl.threadpool_limits(threads):  # numpy's too, as OMP_NUM_THREADS has it in a worker
        if torch is not None:
            torch.set_num_threads(threads)
            torch.manual_seed(seed_for(cell.seed, cell.id, "global"))  # for what draws without a generator: dropout
        try:
            result = compute(cell, CellReport(tell))
        except FATAL:
            raise
        except Exception as error:  # the sweep goes on; the row and the exit status say what happened
            trace = "".join(traceback.format_exception(error))
            if is_poisoned(error):
                raise PoisonedError(one_line(error), trace) from None
            row["error"] = one_line(error)
            if is_out_of_memory(error):
                row["error"] += f" ({MEMORY_HINT})"
        else:
            row, groups, extra = as_record(cell, result)
    seconds, paused = time.perf_counter() - clock, quiet.paused_seconds() - paused
    peak = peak_memory_mb() if is_own_peak else None
    log = log_entry(cell, row, start, seconds, peak_memory_mb=peak, worker=worker_name(), trace=trace, paused=paused)
    if is_on_gpu or _has_gpu():  # the first cell of a process is the one that turns to it
        log["peak_gpu_memory_mb"] = round(_torch().cuda.max_memory_allocated() / 1e6, 1)
    return Outcome(row, groups, extra, log)


def as_record(cell: Cell, result: CellResult) -> tuple[dict, list[dict], dict]:
    """(row, group rows, what else is kept) of a cell that is done."""
    identity = cell.identity()
    groups = [{**{key: identity[key] for key in _GROUP_IDENTITY}, **group} for group in result.groups]
    return {**identity, "status": "done", "error": None, **result.columns}, groups, result.extra


def log_entry(
    cell: Cell,
    row: dict,
    start: float,
    seconds: float,
    *,
    peak_memory_mb: float | None,
    worker: str | None,
    trace: str | None,
    paused: float = 0.0,
) -> dict:
    """`paused` of the seconds were not the cell's own, see quiet.off_the_clock."""
    return {
        "cell": cell.id,
        "phase": cell.phase,
        "status": row["status"],
        "start": start,
        "end": start + seconds,
        "seconds": seconds - paused,
        "peak_memory_mb": peak_memory_mb,
        "worker": worker,
        "error": row["error"],
        "traceback": trace,
    }


def one_line(error: BaseException) -> str:
    """Its kind and message, without the colours that some libraries give theirs."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(error))
    return f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")


def is_out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError,) if (torch := _torch()) is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def is_poisoned(error: BaseException | None) -> bool:
    """Whether it is an error of the CUDA context, such as a device-side assert, after which every call fails; or was
    made of one, as the errors of engines and quantizers are."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        is_cuda = isinstance(error, getattr(_torch(), "AcceleratorError", ())) or POISON.search(str(error))
        if is_cuda and not is_out_of_memory(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def raise_poison(error: BaseException) -> None:
    """For whoever goes on after an error: not after one of the CUDA context, which takes the worker with it."""
    if is_poisoned(error):
        raise error


def unmark(job: Job, cell: Cell) -> None:
    """Of a lost worker, perhaps on another machine, which cannot be asked whether it is alive: until the cell is
    computed again it would seem to be running."""
    with contextlib.suppress(StoreError):  # the folder is gone: whoever writes to it says so
        Store(job.results_dir).unmark(cell.id)


# ----------------------------------------------------------------------------------------------------------- in workers


def prepared(job: Job) -> Compute:
    """The phase's computation in this process; data sets and checkpoints stay open from cell to cell."""
    global _prepared
    if _prepared is None or _prepared[0] != job.token:
        _prepared = None  # what the phase before held
        _check_folder(job, PATIENCE)
        os.chdir(job.folder)
        _prepared = (job.token, job.prepare(job.config, Store(job.results_dir), job.device, None))
    return _prepared[1]


_prepared: tuple[str, Compute] | None = None


def _check_folder(job: Job, patience: float = 0.0) -> None:
    """StoreError where the results folder is not the run's, such as one below a disk that is not mounted here: what is
    written there would be lost. `patience` (seconds) is for a network file system that has not heard of the run yet."""
    deadline = time.monotonic() + patience
    while job.owner is not None:
        try:
            if record_of(Path(job.results_dir)).read_bytes() == job.owner:
                return
        except OSError:
            if patience == 0.0:  # it was there once; somebody may have deleted it, which does not matter
                if not (Path(job.results_dir) / "environment.json").exists():
                    raise StoreError(Store(job.results_dir).gone()) from None
                return
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{job.results_dir} on {platform.node()} is not the results folder of this run: it must be one folder, "
                "on a file system that every machine shares, mounted there under the same path"
            )
        time.sleep(min(1.0, patience / 10))


@contextlib.contextmanager
def _forgetting_sources() -> Iterator[None]:
    """Forget the source code of the graphs that are traced meanwhile: torch.fx keeps that of every graph for its
    tracebacks as long as the process lives, some 100 kB a cell."""
    kept = getattr(getattr(sys.modules.get("torch.fx.graph_module"), "_loader", None), "eval_cache", {})
    before = set(kept)
    try:
        yield
    finally:
        for name in kept.keys() - before:
            kept.pop(name, None)
            linecache.cache.pop(name, None)


def _free_memory(at_once: bool) -> None:
    """Else not more often than takes a twentieth of the time: cells may be tiny, and Python's own look comes in the
    end. What is free is given back to the system too: glibc keeps it in pieces, more of them with each kind of cell."""
    global _look_again
    start = time.monotonic()
    if start < _look_again and not at_once:
        return
    gc.collect()
    memory.give_back()
    now = time.monotonic()
    _look_again = now + (now - start) / GARBAGE_SHARE
    if _has_gpu():
        _torch().cuda.empty_cache()


_look_again = 0.0  # when (monotonic) garbage is looked for again


def _has_gpu() -> bool:
    """Whether this process computes on one."""
    torch = _torch()
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def _torch() -> Any:
    """None where nothing has imported it, such as a phase's computation: it takes seconds, and 300 MB."""
    return sys.modules.get("torch")


_GROUP_IDENTITY = ("cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits")
