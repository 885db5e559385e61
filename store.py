"""Artifacts of a study: the row schema, atomic writes, and what is already done.

A results folder can be read while a run writes it and survives kill -9 at any moment, because every file is written
to a temporary name in the same folder, synced and renamed, and because a cell's record (`cells/<cell>.json`), which
marks the cell as done, is written last. The CSV and JSON tables are derived from the records. While a cell is being
computed `running/<cell>.json` says by whom; no result depends on that.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from group_counts import METRICS
from owners import Owner, is_alive

SCHEMA_VERSION = 2
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # .NAME.PROCESS.tmp, see atomic_path
UNNAMED = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what safetensors writes before it gives it the temporary name
FOLDERS = ("cells", "predictions", "checkpoints", "models", "running")
PHASES = ("baseline", "quantization", "mitigation", "analysis")

IDENTITY_COLUMNS = (
    "cell", "phase", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options",
    "baseline_cell", "status", "error", "n_test",
)  # fmt: skip
GROUP_METRIC_COLUMNS = (*METRICS[:3], "worst_group", *METRICS[3:], "groups_left_out")
COST_COLUMNS = (
    "size_mb", "compression", "engine", "latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b32", "throughput",
    "calibration_seconds", "training_seconds",
)  # fmt: skip
DEPLOYED_COLUMNS = ("agreement", *(f"deployed_{column}" for column in GROUP_METRIC_COLUMNS))  # what the engine predicts
ROW_COLUMNS = (
    *IDENTITY_COLUMNS,
    *GROUP_METRIC_COLUMNS,
    *(f"{metric}_ci_{end}" for metric in METRICS for end in ("low", "high")),
    *(f"delta_{metric}" for metric in METRICS),
    *COST_COLUMNS,
    *DEPLOYED_COLUMNS,
    *(f"intersectional_{column}" for column in GROUP_METRIC_COLUMNS if column not in ("accuracy", "balanced_accuracy")),
)
TIMING_COLUMNS = (
    "latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b32", "throughput", "calibration_seconds", "training_seconds",
)  # fmt: skip
GROUP_COLUMNS = (
    "cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "attribute", "group",
    "class", "n", "positives", "base_rate", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "selection_rate",
    "true_positive_rate", "false_positive_rate", "positive_predictive_value", "too_small",
)  # fmt: skip
# what numpy and zipfile raise for a truncated, damaged or foreign file
UNREADABLE_NPZ = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
INTERSECTION = "intersection"  # the attribute column of a group of the product of all attributes


class StoreError(OSError):
    """The results folder cannot be used; the message is one line for the person at the keyboard."""


class CheckpointError(ValueError):
    """A checkpoint that is truncated, of another program or of another model; nothing has been loaded."""


class MissingArtifactError(StoreError):
    """A phase needs a file that an earlier phase makes."""


@dataclass(frozen=True)
class SavedPredictions:
    """The test split of one cell: y_true (N,), logits (N, K), sensitive {name: (N,)}, index (N,)."""

    y_true: np.ndarray
    logits: np.ndarray
    sensitive: dict[str, np.ndarray]
    index: np.ndarray

    @property
    def y_pred(self) -> np.ndarray:
        return self.logits.argmax(axis=1)


class Store:
    """The folder `results_dir`. Opening it refuses a folder of another schema version and changes nothing."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        version = self._schema_version()
        if version not in (None, SCHEMA_VERSION):
            raise StoreError(
                f"{self.root}: written with results schema {version}, this program reads {SCHEMA_VERSION}; "
                "use another results_dir, or the version of the program that wrote it"
            )
        self._was_there = version is not None

    # ------------------------------------------------------------------------------------------------------ places

    def place(self, *parts: str) -> Path:
        """A path in the folder. StoreError where a folder that was there is not any more: what is written under its
        name would make it again, half empty, or fill the disk below an unmounted one."""
        if self._was_there:
            try:
                os.stat(self.root / "environment.json")
            except OSError:
                raise StoreError(self.gone()) from None
        return self.root.joinpath(*parts)

    def gone(self) -> str:
        """What is said of a folder that was there and is not any more."""
        return (
            f"{self.root}: the results folder is gone (deleted, moved or unmounted, or its environment.json is); put "
            "it back and run the same command again, which goes on with the cells finished in it"
        )

    def record_path(self, cell: str) -> Path:
        return self.place("cells", f"{cell}.json")

    def predictions_path(self, cell: str) -> Path:
        return self.place("predictions", f"{cell}.npz")

    def checkpoint_path(self, dataset: str, model: str, seed: int) -> Path:
        return self.place("checkpoints", f"{dataset}-{model}-s{seed}.safetensors")

    def model_path(self, cell: str) -> Path:
        return self.place("models", f"{cell}.onnx")

    def packed_path(self, cell: str) -> Path:
        """Where a model's tensors are written to be weighed; nothing stays there."""
        return self.place("models", f"{cell}.safetensors")

    def results_path(self, phase: str, suffix: str = "csv") -> Path:
        return self.place(f"{phase}_results.{suffix}")

    @property
    def analysis(self) -> Path:
        return self.place("analysis")

    # ---------------------------------------------------------------------------------------------------- a run's start

    def prepare(self, config_yaml: str) -> None:
        """Create the folder, remove what dead runs left half done, and save the resolved config and the environment.

        For the one run that holds the folder (run_lock): whatever another machine left is of a run that has ended.
        """
        with write_errors(self.root):
            for name in FOLDERS:
                folder = self.root / name
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):  # now, rather than after an hour's training
                    raise StoreError(f"{folder}: cannot be written; mend the permissions or use another results_dir")
            self.remove_leftovers()
            for cell, owner in self.marked():
                if owner is None or not owner.is_alive():
                    self._marker(cell).unlink(missing_ok=True)
            sync_folder(self.root)  # the names of the new folders survive a power cut too
            with contextlib.suppress(PermissionError):  # a folder of somebody else, in which ours is
                sync_folder(self.root.absolute().parent)
        write_text(self.root / "config.yaml", config_yaml)
        write_json(self.root / "environment.json", {"schema_version": SCHEMA_VERSION, **environment()})
        self._was_there = True

    def remove_leftovers(self) -> None:
        """Temporary files of processes that are dead. For the one run that holds the folder, like `prepare`."""
        with write_errors(self.root):
            for name in ("", *FOLDERS, "shared", "analysis", "analysis/tables"):
                for leftover in (self.root / name).glob(".*.tmp"):
                    process = TEMPORARY.fullmatch(leftover.name)  # None: a file of another program
                    # this process has written nothing yet: one before it had its number, as in a container
                    if process is not None and (int(process[1]) == os.getpid() or not is_alive(int(process[1]))):
                        leftover.unlink(missing_ok=True)
                for leftover in (self.root / name).glob(".tmp*") if name in ("checkpoints", "models") else ():
                    if UNNAMED.fullmatch(leftover.name):  # of no known process, and no other run is in progress
                        leftover.unlink(missing_ok=True)

    def clear(self, cells: Sequence[str]) -> None:
        """Forget these cells (--fresh): record first, so that a kill in between leaves nothing that looks done."""
        with write_errors(self.root):
            elsewhere: dict[str, list[Path]] = {}  # predictions of engines and on other data sets
            for path in self.place("predictions").glob("*@*.npz"):
                elsewhere.setdefault(path.name.partition("@")[0], []).append(path)
            for cell in cells:
                self.record_path(cell).unlink(missing_ok=True)
                for path in (self.predictions_path(cell), *elsewhere.get(cell, ())):
                    path.unlink(missing_ok=True)
                self.model_path(cell).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------- running cells

    @contextlib.contextmanager
    def mark_running(self, cell: str) -> Iterator[None]:
        """running/<cell>.json says who computes the cell, while he does. Not synced: a power cut may lose it."""
        path = self._marker(cell)
        temporary = _temporary_beside(path)
        try:  # from here on: a Ctrl-C may come as soon as it is written
            with write_errors(path):
                path.parent.mkdir(exist_ok=True)
                try:
                    temporary.write_text(json.dumps({"cell": cell, **asdict(Owner.this_process())}), encoding="utf-8")
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
            yield
        finally:
            self.unmark(cell)

    def unmark(self, cell: str) -> None:
        with contextlib.suppress(OSError):  # what the cell raises is the message; a dead one's marker is no harm
            (self.root / "running" / f"{cell}.json").unlink(missing_ok=True)

    def marked(self) -> list[tuple[str, Owner | None]]:
        """(cell, who says that he computes it): those who died too, and None for a file that is torn."""
        found = []
        for path in sorted((self.root / "running").glob("*.json")):
            try:
                found.append((path.stem, Owner.of(json.loads(path.read_text(encoding="utf-8")))))
            except FileNotFoundError:  # it has ended just now
                continue
            except (OSError, ValueError):
                found.append((path.stem, None))
        return found

    def _marker(self, cell: str) -> Path:
        return self.place("running", f"{cell}.json")

    # ------------------------------------------------------------------------------------------------------------ cells

    def record(self, cell: str) -> dict | None:
        """The record of a cell that ended (done or failed), or None."""
        path = self.record_path(cell)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not {"phase", "status"} <= record["row"].keys():
                raise ValueError("not a record")
            version = record["schema_version"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three: other JSON
            raise StoreError(f"{path}: cannot be read ({error}); delete it to have the cell computed again") from None
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: written with results schema {version}, this program reads {SCHEMA_VERSION}; use another "
                "results_dir, or delete it to have the cell computed again"
            )
        return record

    def is_done(self, cell: str) -> bool:
        record = self.record(cell)
        return record is not None and record["row"]["status"] == "done" and self.predictions_path(cell).exists()

    def write_cell(self, row: dict, groups: list[dict], extra: dict | None = None) -> None:
        """Mark a cell as ended. Its predictions and checkpoint must have been written before."""
        unknown = set(row) - set(ROW_COLUMNS)
        assert not unknown, f"row columns outside the schema: {sorted(unknown)}"
        row = {column: row[column] for column in ROW_COLUMNS if column in row}  # in whatever order they were found
        record = {"schema_version": SCHEMA_VERSION, "row": row, "groups": groups, "extra": extra or {}}
        write_json(self.record_path(row["cell"]), record)

    def write_predictions(self, cell: str, predictions) -> None:
        arrays = {f"sensitive_{name}": codes for name, codes in predictions.sensitive.items()}
        buffer = io.BytesIO()
        _savez_deterministic(
            buffer, y_true=predictions.y_true, logits=predictions.logits, index=predictions.index, **arrays
        )
        write_bytes(self.predictions_path(cell), buffer.getvalue())

    def predictions(self, cell: str) -> SavedPredictions:
        path = self.predictions_path(cell)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                sensitive = {
                    name.removeprefix("sensitive_"): arrays[name]
                    for name in arrays.files
                    if name.startswith("sensitive_")
                }
                saved = SavedPredictions(arrays["y_true"], arrays["logits"], sensitive, arrays["index"])
        except FileNotFoundError:
            raise MissingArtifactError(f"{path}: missing; run its phase again to compute it") from None
        except UNREADABLE_NPZ as error:
            raise StoreError(f"{path}: not a readable predictions file ({error}); delete it and run again") from None
        return saved

    # ----------------------------------------------------------------------------------------------------------- tables

    def records(self, phase: str | None = None) -> Iterator[tuple[str, dict]]:
        """(cell, record) of every record in the folder, by name; one is read at a time."""
        for path in sorted(self.place("cells").glob("*.json")):
            record = self.record(path.stem)
            if record is not None and (phase is None or record["row"]["phase"] == phase):
                yield path.stem, record

    def write(self, tables: Sequence[Table], planned: Sequence[str]) -> None:
        """All of them in one pass over the records, of which one is held at a time: planned cells first and in their
        order, then those that the current config does not plan, by name. A table that no record wants stays as it is.
        """
        found = {path.stem for path in self.place("cells").glob("*.json")}
        order = [cell for cell in dict.fromkeys(planned) if cell in found]
        with contextlib.ExitStack() as files:
            writers: dict[Path, _TableWriter] = {}
            for table in tables:
                if table.is_always:
                    writers[table.path] = _TableWriter(table, files)
            for cell in (*order, *sorted(found.difference(order))):
                record = self.record(cell)
                if record is None:  # it has been deleted just now
                    continue
                for table in tables:
                    if not table.is_wanted(record):
                        continue
                    if table.path not in writers:
                        writers[table.path] = _TableWriter(table, files)
                    writers[table.path].add(table.rows(record))
            for writer in writers.values():
                writer.end()

    def write_tables(self, phase: str, planned: Sequence[str]) -> None:
        """The table of a phase, empty where nothing of it has ended."""
        self.write([dataclasses.replace(self.phase_table(phase), is_always=True)], planned)

    def write_group_table(self, planned: Sequence[str]) -> None:
        self.write([dataclasses.replace(self.group_table(), is_always=True)], planned)

    def phase_table(self, phase: str) -> Table:
        """`<phase>_results.csv` (and .json)."""
        return Table(
            self.results_path(phase),
            ROW_COLUMNS,
            lambda record: [record["row"]],
            lambda record: record["row"]["phase"] == phase,
            json_path=None if phase == "baseline" else self.results_path(phase, "json"),
        )

    def group_table(self) -> Table:
        """`group_results.csv`."""
        return Table(self.place("group_results.csv"), GROUP_COLUMNS, lambda record: record["groups"])

    def extra_table(
        self,
        name: str,
        key: str,
        columns: Sequence[str],
        is_wanted: Callable[[dict], bool] = lambda record: True,
        prefix: str | None = None,
    ) -> Table:
        """`<name>.csv`, keyed by `cell`: the rows that cells of whatever phase hold under `key` of their extra."""

        def rows(record: dict) -> list[dict]:
            return [{"cell": record["row"]["cell"], **row} for row in record["extra"].get(key, [])]

        return Table(self.place(f"{name}.csv"), ["cell", *columns], rows, is_wanted, prefix)

    def read_extra_table(self, name: str) -> pd.DataFrame | None:
        path = self.place(f"{name}.csv")
        return pd.read_csv(path) if path.exists() else None

    def read_table(self, phase: str) -> pd.DataFrame:
        """The rows of a phase as written; MissingArtifactError says which phase makes them."""
        path = self.results_path(phase)
        if not path.exists():
            raise MissingArtifactError(f"{path}: missing; make it with python main.py --phase {phase}")
        return _read_csv(path, ROW_COLUMNS, phase)

    def read_group_table(self) -> pd.DataFrame:
        path = self.place("group_results.csv")
        if not path.exists():
            raise MissingArtifactError(f"{path}: missing; make it with python main.py --phase baseline")
        return _read_csv(path, GROUP_COLUMNS, "baseline")

    def _schema_version(self) -> Any:
        path = self.root / "environment.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("schema_version", "unknown")
        except (OSError, ValueError, AttributeError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); use another results_dir") from None


@dataclass(frozen=True)
class Table:
    """A CSV file that is made of cells' records."""

    path: Path
    columns: Sequence[str]
    rows: Callable[[dict], Sequence[Mapping[str, Any]]]  # of a record; what they lack of the columns is empty
    is_wanted: Callable[[dict], bool] = lambda record: True  # by a record; without one the table is not written
    prefix: str | None = None  # of more columns, which only the rows tell; they follow the others, by name
    json_path: Path | None = None  # of the same rows as JSON, without what is missing
    is_always: bool = False  # written whatever the records


class _TableWriter:
    """A table that is being written; `files` ends it, or removes it on a failure."""

    def __init__(self, table: Table, files: contextlib.ExitStack):
        self.table = table
        self.file = files.enter_context(
            files.enter_context(atomic_path(table.path)).open("w", encoding="utf-8", newline="")
        )
        self.csv = csv.writer(self.file, lineterminator="\n")
        self.json = files.enter_context(atomic_path(table.json_path)) if table.json_path is not None else None
        self.held: list[Mapping[str, Any]] = []
        if table.prefix is None:
            self.write(table.columns)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.table.prefix is not None or self.table.json_path is not None:
            self.held += rows
        if self.table.prefix is None:
            for row in rows:
                self.write([row.get(column) for column in self.table.columns])

    def end(self) -> None:
        if self.table.prefix is not None:
            more = sorted({key for row in self.held for key in row if key.startswith(self.table.prefix)})
            self.write([*self.table.columns, *more])
            for row in self.held:
                self.write([row.get(column) for column in (*self.table.columns, *more)])
        if self.json is not None:
            with write_errors(self.table.json_path):
                self.json.write_text(_json([_without_missing(row) for row in self.held]), encoding="utf-8")

    def write(self, values: Sequence[Any]) -> None:
        """None, and NaN, are empty; numbers have every digit."""
        with write_errors(self.table.path):
            self.csv.writerow(
                "" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in values
            )


def _read_csv(path: Path, columns: Sequence[str], phase: str) -> pd.DataFrame:
    """A table that a phase wrote and writes again from the cells' records; StoreError where it is not whole."""
    again = f"python main.py --phase {phase} writes it again from cells/"
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not a readable results file ({' '.join(str(error).split())}); {again}") from None
    absent = [column for column in columns if column not in table]
    if absent:
        raise StoreError(f"{path}: no column {absent[0]!r}; {again}")
    return table


# ----------------------------------------------------------------------------------------------------------- identities


def short_hash(value: Any) -> str:
    """Ten hex digits of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def seed_for(*names: Any) -> int:
    """A 63-bit seed from names, never from call order: seed_for(seed, dataset, model, "calibration")."""
    text = json.dumps([str(name) for name in names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# -------------------------------------------------------------------------------------------------------- atomic writes


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """An OSError while writing becomes one line that names the place and says that nothing is lost."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}); finished cells are safe: "
            "free the space or mend the permissions and run the same command again"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that is synced and renamed to it at the end, or removed on any failure."""
    temporary = _temporary_beside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """The names of a folder's files, which are not part of the files."""
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """JSON without NaN: a number that is not finite is null."""
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_missing(row: Mapping[str, Any]) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _savez_deterministic(file, **arrays: np.ndarray) -> None:
    """np.savez_compressed with fixed time stamps, so that the same predictions are the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------- environment


PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "scikit-learn", "fairlearn", "aif360", "onnx",
    "onnxruntime", "openvino", "torchao",
)  # fmt: skip


def environment() -> dict:
    """Versions, hardware and git commit of this run, for environment.json."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "cuda_device": _cuda_device(),
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the standard library's answer below
    return platform.processor()


def _cuda_device() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
