"""What several cells need and one of them measures: kept under results_dir/shared, whoever comes first.

The name of a file is a hash of everything that determines what is in it, the checkpoint's bytes included. Cells run in
any order and in any process; of those that need the same at the same time one measures and the others wait, and where
nothing can be locked all of them measure, and write the same. A file that is missing, damaged or cannot be written
costs the time to measure again and nothing else, so deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from plan import QUANTIZATION_VERSION, Cell
from quantizers.sensitivity import Sensitivity
from store import Store, StoreError, short_hash, write_bytes

FORMAT = 1
POLL = 0.2  # seconds between two questions whether another cell has measured
SENSITIVITY_OPTIONS = (  # neither widths of the model nor its budgets nor its rounding
    "calibration_samples", "calibration_split", "weight_observer", "percentile", "weight_granularity", "equalize",
    "widths", "sensitivity_metric", "sensitivity_samples", "classifier_bits", "backend", "reduce_range", "balance",
)  # fmt: skip


class SharedSensitivity:
    """The layer sensitivities of mixed-precision cells; the latest is kept in memory too. `spent` are the seconds that
    the latest took here, whether it was measured, waited for or read."""

    def __init__(self, store: Store, device: str, threads: int):
        self.store, self.device, self.threads = store, device, threads
        self.latest: tuple[Path, Sensitivity] | None = None
        self.digests: dict[tuple[Path, int, int], str] = {}
        self.spent = 0.0

    def once(self, cell: Cell, fingerprint: str, measure: Callable[[], Sensitivity]) -> Sensitivity:
        """What another cell measured, or is just measuring; else what `measure` gives, kept for the others."""
        start = time.perf_counter()
        found = self.load(cell, fingerprint)
        if found is None:
            with _one_at_a_time(self.path(cell, fingerprint)):
                found = self.load(cell, fingerprint)
                if found is None:
                    found = measure()
                    self.keep(cell, fingerprint, found)
        self.spent = time.perf_counter() - start
        return found

    def load(self, cell: Cell, fingerprint: str) -> Sensitivity | None:
        """What an earlier cell measured, where this one would measure the same."""
        path = self.path(cell, fingerprint)
        if self.latest is None or self.latest[0] != path:
            found = _read(path)
            self.latest = None if found is None else (path, found)
        return None if self.latest is None else self.latest[1]

    def keep(self, cell: Cell, fingerprint: str, sensitivity: Sensitivity) -> None:
        path = self.path(cell, fingerprint)
        if self.latest is not None and self.latest[0] == path:
            return
        self.latest = (path, sensitivity)
        if not self.store.root.is_dir():
            return
        buffer = io.BytesIO()
        np.savez(
            buffer,
            layers=np.array(sensitivity.layers),
            widths=np.array(sensitivity.widths),
            values=sensitivity.values_LWN,
            bytes=sensitivity.bytes_LW,
            metric=np.array(sensitivity.metric),
            seconds=np.array(sensitivity.seconds),
        )
        with contextlib.suppress(StoreError):  # what the cell itself writes will say so
            write_bytes(path, buffer.getvalue())

    def path(self, cell: Cell, fingerprint: str) -> Path:
        identity: dict[str, Any] = {
            "format": FORMAT,
            "checkpoint": self._checkpoint(cell),
            "data": fingerprint,
            "names": [cell.dataset, cell.model, cell.seed, cell.strategy],  # which draw of calibration images
            "options": {key: cell.options.get(key) for key in SENSITIVITY_OPTIONS},
            "version": QUANTIZATION_VERSION,
            "computed": [torch.__version__, self.device, self.threads],
        }
        return self.store.root / "shared" / f"sensitivity-{short_hash(identity)}.npz"

    def _checkpoint(self, cell: Cell) -> str:
        path = self.store.checkpoint_path(cell.dataset, cell.model, cell.seed)
        known = (path, path.stat().st_mtime_ns, path.stat().st_size)
        if known not in self.digests:
            with path.open("rb") as file:
                self.digests = {known: hashlib.file_digest(file, "sha256").hexdigest()}
        return self.digests[known]


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Meanwhile no other process on this file system is in here for the same file. It is asked again and again, since a
    process that waits for good would not hear that another one measures latencies (execution.quiet)."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")).acquire(poll_interval=POLL))
        except (OSError, NotImplementedError):  # a folder that cannot be written to, a file system without locks
            pass
        yield
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink(missing_ok=True)  # who still waits for it finds the file


def _read(path: Path) -> Sensitivity | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Sensitivity(
                tuple(arrays["layers"].tolist()),
                tuple(arrays["widths"].tolist()),
                arrays["values"],
                arrays["bytes"],
                str(arrays["metric"]),
                float(arrays["seconds"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shape = (len(found.layers), len(found.widths))
    is_whole = found.values_LWN.ndim == 3 and found.values_LWN.shape[:2] == shape == found.bytes_LW.shape
    return found if is_whole and np.isfinite(found.values_LWN).all() else None
