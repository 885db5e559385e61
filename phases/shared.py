"""What several cells need and one of them measures: kept under results_dir/shared, whoever comes first.

The name of a file is a hash of everything that determines what is in it, the checkpoint's bytes included. Cells run in
any order and in any process; two that measure the same write the same. A file that is missing, damaged or cannot be
written costs the time to measure again and nothing else, so deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plan import QUANTIZATION_VERSION, Cell
from quantizers.sensitivity import Sensitivity
from store import Store, StoreError, short_hash, write_bytes

FORMAT = 1
SENSITIVITY_OPTIONS = (  # neither widths of the model nor its budgets nor its rounding
    "calibration_samples", "calibration_split", "weight_observer", "percentile", "weight_granularity", "equalize",
    "widths", "sensitivity_metric", "sensitivity_samples", "classifier_bits", "backend", "reduce_range", "balance",
)  # fmt: skip


class SharedSensitivity:
    """The layer sensitivities of mixed-precision cells; the latest is kept in memory too."""

    def __init__(self, store: Store, device: str, threads: int):
        self.store, self.device, self.threads = store, device, threads
        self.latest: tuple[Path, Sensitivity] | None = None
        self.digests: dict[tuple[Path, int, int], str] = {}

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
