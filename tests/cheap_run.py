"""Whole runs of main.py whose cells cost nothing, in processes of their own that can be killed.

The command line, the lock, the runner and every file that is written are the program's own; only what a baseline cell
computes is replaced: noise from its name, in a checkpoint and predictions. The process is forked, which spares it the
seconds of importing torch.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import main
import phases.baseline
from config import load_config
from evaluation import Predictions
from models import save_checkpoint
from plan import plan
from runner import CellResult, run_cells
from store import Store, seed_for

SKIPPED = 77
CLONE_NEWNS, CLONE_NEWUSER, PR_SET_PDEATHSIG = 0x20000, 0x10000000, 1


def write_config(folder: Path, seeds: int = 4) -> Path:
    """Three cells a seed."""
    path = folder / "cheap.yaml"
    config = {
        "models": {"architectures": ["resnet50", "mobilenet_v2", "squeezenet1_1"]},
        "run": {"seeds": list(range(seeds)), "threads_per_cell": 1},
        "deployment": {"cells": [], "export": []},
    }
    path.write_text(json.dumps(config))
    return path


def cells_of(config: Path) -> list[str]:
    return [cell.id for cell in plan(load_config(config))["baseline"]]


Event = Callable[[str, int, Store], None]  # (cell, how many were computed before it, store)


def noise(event: Event | None = None):
    """A stand-in for phases.baseline.run; `event` is called in the middle of each cell."""

    def run(config, store, report, device="cpu"):
        computed = 0

        def compute(cell, report):
            nonlocal computed
            if event is not None:
                event(cell.id, computed, store)
            computed += 1
            rng = np.random.default_rng(seed_for(cell.id))
            layer = nn.Linear(32, 32)
            layer.load_state_dict({"weight": tensor(rng, 32, 32), "bias": tensor(rng, 32)})
            save_checkpoint(store.checkpoint_path(cell.dataset, cell.model, cell.seed), layer, {"cell": cell.id})
            y_true = rng.integers(0, 2, 400)
            logits = rng.normal(size=(400, 2)).astype(np.float32)
            store.write_predictions(cell.id, Predictions(logits, y_true, {"gender": y_true}, np.arange(400)))
            return CellResult({"accuracy": float((logits.argmax(1) == y_true).mean())}, [{"n": 400}])

        run_cells("baseline", plan(config)["baseline"], lambda *_: compute, config, store, report)

    return run


def tensor(rng, *shape):
    import torch

    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def command(config: Path, results: Path, *more: str) -> list[str]:
    return ["--phase", "baseline", "--config", str(config), "--results-dir", str(results), "--quiet", *more]


def run_here(config: Path, results: Path, *more: str, event: Event | None = None) -> int:
    """The exit status of main.py with cheap cells, in this process."""
    original = phases.baseline.run
    phases.baseline.run = noise(event)
    try:
        return main.main(command(config, results, *more))
    finally:
        phases.baseline.run = original


def contents(results: Path) -> dict[str, bytes]:
    """Every file of the results, beside those that say when and where."""
    own = {"config.yaml", "environment.json", "log.jsonl", ".lock", ".lock.json"}
    found = {}
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        if path.name in own or path.parent.name == "running":
            continue
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # its two metadata are in any order, the tensors are not
            size = 8 + int.from_bytes(content[:8], "little")
            content = json.dumps(json.loads(content[8:size]), sort_keys=True).encode() + content[size:]
        found[path.relative_to(results).as_posix()] = content
    return found


# ------------------------------------------------------------------------------------------------------------ processes


@dataclass
class Child:
    pid: int
    folder: Path
    status: int | None = None

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status, or minus the signal that ended it."""
        deadline = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"still running after {seconds} s: {self.out}{self.err}")
            else:
                time.sleep(0.002)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait_for(self, is_there: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_there():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            assert self.status is None, f"ended too soon, with {self.status}: {self.out}{self.err}"
            assert time.monotonic() < deadline, "never happened"
            time.sleep(0.001)


def fork(folder: Path, work: Callable[[], int | None], outlives: bool = False) -> Child:
    """Call `work` in a child; what it returns is the exit status, 1 with a traceback where it raises. It dies with this
    process, unless it `outlives` it."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        return Child(pid, folder)
    status = 1
    try:
        if sys.platform.startswith("linux") and not outlives:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the test's end, whatever it is, is its end
        # as from a terminal, also where these tests run in the background of a script, which ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, number in (("out", 1), ("err", 2)):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        status = work() or 0
    except pytest.skip.Exception as reason:
        print(reason.msg)
        status = SKIPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_run(folder: Path, config: Path, results: Path, *more: str, event: Event | None = None) -> Child:
    return fork(folder, lambda: run_here(config, results, *more, event=event))


def fork_and_wait(folder: Path, work: Callable[[], int | None]) -> None:
    """A test in a child, which may do to itself what cannot be undone; skips where it does."""
    child = fork(folder, work)
    status = child.wait()
    if status == SKIPPED:
        pytest.skip(child.out.strip())
    assert status == 0, child.out + child.err


def captured(folder: Path, work: Callable[[], int]) -> tuple[int, str]:
    """(exit status, what it wrote to stderr)."""
    child = fork(folder, work)
    return child.wait(), child.err


# --------------------------------------------------------------------------------------------------------------- mounts


def own_mounts() -> None:
    """Mounts of this process alone from here on: root may, and others where the system lets them be root in a name
    space of their own. Skips elsewhere."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts of a process's own are Linux's")
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER):
        pytest.skip(f"no mounts of its own are allowed: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
