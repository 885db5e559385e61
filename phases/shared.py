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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from filelock import FileLock

from execution import quiet
from plan import QUANTIZATION_VERSION, Cell
from quantizers.calibration import Source, Statistics
from quantizers.modules import QuantizedModel
from quantizers.observers import ActivationStatistics
from quantizers.sensitivity import Sensitivity
from store import UNREADABLE_NPZ, Store, StoreError, short_hash, write_bytes

T = TypeVar("T")
FORMAT = 2
PATIENCE = 3600.0  # seconds that another cell has for measuring, before this one does it too
POLL = 0.2  # seconds between two questions whether another cell has measured
SENSITIVITY_OPTIONS = (  # neither widths of the model nor its budgets nor its rounding
    "calibration_samples", "calibration_split", "weight_observer", "percentile", "weight_granularity", "equalize",
    "widths", "sensitivity_metric", "sensitivity_samples", "classifier_bits", "backend", "reduce_range", "balance",
)  # fmt: skip


class _Shared(Generic[T]):
    """One kind of what is shared; the latest is kept in memory too. `spent` are the seconds that the latest took here,
    whether it was made, waited for or read."""

    def __init__(self, store: Store, device: str, threads: int):
        self.store, self.device, self.threads = store, device, threads
        self.latest: tuple[Path, T] | None = None
        self.digests: dict[tuple[Path, int, int], str] = {}
        self.spent = 0.0

    def once_at(self, path: Path, make: Callable[[], T]) -> T:
        """What another cell has made, or is just making; else what `make` gives, kept for the others."""
        start = time.perf_counter()
        found = self.load_from(path)
        if found is None:
            with _one_at_a_time(path):
                found = self.load_from(path)
                if found is None:
                    found = make()
                    self.keep_at(path, found)
        self.spent = time.perf_counter() - start
        return found

    def load_from(self, path: Path) -> T | None:
        if self.latest is None or self.latest[0] != path:
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    self.latest = (path, self.decoded(arrays))
            except (*UNREADABLE_NPZ, IndexError):
                self.latest = None
        return None if self.latest is None else self.latest[1]

    def keep_at(self, path: Path, found: T) -> None:
        if self.latest is not None and self.latest[0] == path:
            return
        self.latest = (path, found)
        if not self.store.root.is_dir():
            return
        buffer = io.BytesIO()
        np.savez(buffer, **self.encoded(found))
        with contextlib.suppress(StoreError):  # what the cell itself writes will say so
            write_bytes(path, buffer.getvalue())

    def place(self, kind: str, cell: Cell, **determines: Any) -> Path:
        """Of a file whose content is determined by the cell's checkpoint, the program, the machine and this."""
        identity: dict[str, Any] = {
            "format": FORMAT,
            "checkpoint": self._checkpoint(cell),
            "version": QUANTIZATION_VERSION,
            "computed": [torch.__version__, self.device, self.threads],
            **determines,
        }
        return self.store.root / "shared" / f"{kind}-{short_hash(identity)}.npz"

    def encoded(self, found: T) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def decoded(self, arrays: Mapping[str, np.ndarray]) -> T:
        """ValueError, KeyError or IndexError where they are not whole."""
        raise NotImplementedError

    def _checkpoint(self, cell: Cell) -> str:
        path = self.store.checkpoint_path(cell.dataset, cell.model, cell.seed)
        known = (path, path.stat().st_mtime_ns, path.stat().st_size)
        if known not in self.digests:
            with path.open("rb") as file:
                self.digests = {known: hashlib.file_digest(file, "sha256").hexdigest()}
        return self.digests[known]


class SharedSensitivity(_Shared[Sensitivity]):
    """The layer sensitivities of mixed-precision cells."""

    def once(self, cell: Cell, fingerprint: str, measure: Callable[[], Sensitivity]) -> Sensitivity:
        return self.once_at(self.path(cell, fingerprint), measure)

    def load(self, cell: Cell, fingerprint: str) -> Sensitivity | None:
        """What an earlier cell measured, where this one would measure the same."""
        return self.load_from(self.path(cell, fingerprint))

    def keep(self, cell: Cell, fingerprint: str, sensitivity: Sensitivity) -> None:
        self.keep_at(self.path(cell, fingerprint), sensitivity)

    def path(self, cell: Cell, fingerprint: str) -> Path:
        return self.place(
            "sensitivity",
            cell,
            data=fingerprint,
            names=[cell.dataset, cell.model, cell.seed, cell.strategy],  # which draw of calibration images
            options={key: cell.options.get(key) for key in SENSITIVITY_OPTIONS},
        )

    def encoded(self, found: Sensitivity) -> dict[str, np.ndarray]:
        return {
            "layers": np.array(found.layers),
            "widths": np.array(found.widths),
            "values": found.values_LWN,
            "bytes": found.bytes_LW,
            "metric": np.array(found.metric),
            "seconds": np.array(found.seconds),
        }

    def decoded(self, arrays: Mapping[str, np.ndarray]) -> Sensitivity:
        found = Sensitivity(
            tuple(arrays["layers"].tolist()),
            tuple(arrays["widths"].tolist()),
            arrays["values"],
            arrays["bytes"],
            str(arrays["metric"]),
            float(arrays["seconds"]),
        )
        shape = (len(found.layers), len(found.widths))
        if found.values_LWN.ndim != 3 or not found.values_LWN.shape[:2] == shape == found.bytes_LW.shape:
            raise ValueError("not a value for each layer and width")
        if not np.isfinite(found.values_LWN).all():
            raise ValueError("values that are not finite")
        return found


@dataclass(frozen=True)
class Observed:
    """What the activation quantizers saw of the calibration images, and the seconds that the pass took."""

    statistics: Statistics
    seconds: float


class SharedStatistics(_Shared[Observed]):
    """The pass of the calibration images through the float network: the same for all observers and widths."""

    def __init__(self, store: Store, device: str, threads: int):
        super().__init__(store, device, threads)
        self.correction = 0.0  # seconds of the passes of the latest cell, less what it spent for having them

    def of(self, cell: Cell) -> Source:
        """For calibration.observing_through, while this cell is computed."""
        self.correction = 0.0

        def observed(model: QuantizedModel, images: torch.Tensor, look: Callable[[], Statistics]) -> Statistics:
            def make() -> Observed:
                start = time.perf_counter()
                statistics = look()
                return Observed(statistics, time.perf_counter() - start)

            start = time.perf_counter()
            found = self.once_at(self.path(cell, model, images), make)
            self.correction += found.seconds - (time.perf_counter() - start)
            return found.statistics

        return observed

    def path(self, cell: Cell, model: QuantizedModel, images: torch.Tensor) -> Path:
        """By content: the parameters as they were folded and equalized, which quantizers there are, and the images."""
        return self.place(
            "statistics",
            cell,
            names=[cell.dataset, cell.model],
            quantizers=list(model.activation_quantizers()),
            parameters=_digest(dict(model.named_parameters())),
            images=_digest({"images": images}),
        )

    def encoded(self, found: Observed) -> dict[str, np.ndarray]:
        kept = {"seconds": np.array(found.seconds), "names": np.array(list(found.statistics))}
        for place, seen in enumerate(found.statistics.values()):
            kept |= {f"{place}.{key}": array for key, array in seen.arrays().items()}
        return kept

    def decoded(self, arrays: Mapping[str, np.ndarray]) -> Observed:
        parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for key in arrays:
            place, _, name = key.partition(".")
            if name:
                parts[place][name] = arrays[key]
        names = arrays["names"].tolist()
        statistics = {
            name: ActivationStatistics.from_arrays(name, parts[str(place)]) for place, name in enumerate(names)
        }
        return Observed(statistics, float(arrays["seconds"]))


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu()
        if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # as it lies in memory
        values = values.contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Meanwhile no other process on this file system is in here for the same file. It is asked again and again, since a
    process that waits for good would not hear that another one measures latencies (execution.quiet)."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False)
            with quiet.off_the_clock(PATIENCE):  # what the other one does is not this cell's own
                stack.enter_context(lock.acquire(timeout=PATIENCE, poll_interval=POLL))
        except (OSError, NotImplementedError):  # nothing can be written, there are no locks, the other one never ends
            pass
        yield
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink(missing_ok=True)  # who still waits for it finds the file
