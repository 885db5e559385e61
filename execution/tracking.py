"""Each cell in an experiment tracker as it ends (`tracking`): TensorBoard, Weights & Biases or MLflow.

What is logged: the cell's settings, the numbers of its row, and its training curve where it was trained. Everything
stays on this machine, below results_dir/tracking, unless the user's environment says otherwise (a Weights & Biases key,
MLFLOW_TRACKING_URI). The results never depend on it: a cell is logged after its record is written, and a tracker that
fails is told of once and switched off. Packages are imported where they are used.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import netrc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from config import Config, ConfigError
from plan import Cell

PROJECT = "beyond-naive-quantization"
PIP = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # tracker -> its package


@dataclass(frozen=True)
class Entry:
    """What is told of a cell."""

    cell: str
    phase: str
    status: str
    error: str | None
    settings: dict[str, str | int | float | bool]
    metrics: dict[str, float]  # finite
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (epoch, values)


def check_installed(name: str) -> None:
    """ConfigError where the tracker's package is not there."""
    if name != "none" and importlib.util.find_spec(PIP[name]) is None:
        raise ConfigError(f"tracking: {name} is not installed; pip install {PIP[name]}, or set tracking: none")


class Tracker:
    """Logs cells to the config's tracker; `tell` gets the one line that says that it failed."""

    def __init__(self, config: Config, root: Path, tell: Callable[[str], None]):
        self.config, self.folder, self.tell = config, root / "tracking", tell
        self.backend: Any = None
        self.is_on = config.tracking != "none"

    def log(self, cell: Cell, row: dict, extra: dict) -> None:
        """Never raises: the cell's results are written already."""
        if not self.is_on:
            return
        try:
            if self.backend is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.backend = BACKENDS[self.config.tracking](self.folder)
            self.backend.log(entry_of(cell, row, extra, self.config))
        except Exception as error:  # whatever it raises, a result is worth more than its copy
            self.is_on = False
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.tell(f"tracking with {self.config.tracking} failed and is off from here on: {message}")


def entry_of(cell: Cell, row: dict, extra: dict, config: Config) -> Entry:
    """The entry of a cell that ended with this row."""
    identity = cell.identity()
    settings = {key: identity[key] for key in identity if key not in ("cell", "options")}
    settings |= {f"options.{key}": value for key, value in cell.options.items()}
    data = config.dataset(cell.dataset)
    settings |= {"target": data.target, "sensitive": data.sensitive, "image_size": data.image_size}
    if cell.method == "none":
        settings |= {f"training.{key}": value for key, value in config.training.for_model(cell.model)}
        settings.pop("training.per_model")
    curve = [
        (int(epoch["epoch"]), {f"training/{key}": value for key, value in _numbers(epoch).items() if key != "epoch"})
        for epoch in extra.get("training_log", [])
    ]
    return Entry(
        cell.id,
        cell.phase,
        row["status"],
        row["error"],
        {key: _plain(value) for key, value in settings.items() if value is not None},
        {key: value for key, value in _numbers(row).items() if key not in identity},
        curve,
    )


def _numbers(values: dict) -> dict[str, float]:
    """The finite numbers among the values: one that is undefined is not logged, and is not 0."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


# ------------------------------------------------------------------------------------------------------------- trackers


class TensorBoard:
    """An event file in tensorboard/<cell>: curves, and an entry of the HParams page."""

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"

    def log(self, entry: Entry) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = self.folder / entry.cell
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier time: two event files would be mixed
        with SummaryWriter(folder) as writer:
            for epoch, values in entry.curve:
                for name, value in values.items():
                    writer.add_scalar(name, value, epoch)
            if entry.error is not None:
                writer.add_text("error", entry.error)
            for name, value in entry.metrics.items():
                writer.add_scalar(name, value)
            # writer.add_hparams would open a second event file
            for summary in hparams({**entry.settings, "cell": entry.cell, "status": entry.status}, entry.metrics):
                writer.file_writer.add_summary(summary)


class WeightsAndBiases:
    """A run for each cell. Without a key or without the network the run stays in wandb/ (wandb sync sends it later)."""

    def __init__(self, folder: Path):
        import wandb

        self.folder, self.wandb = folder, wandb
        self.mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")

    def log(self, entry: Entry) -> None:
        run = self._start(entry)
        for epoch, values in entry.curve:
            run.log(values, step=epoch)
        run.summary.update({**entry.metrics, "status": entry.status, "error": entry.error})
        run.finish(exit_code=0 if entry.status == "done" else 1)

    def _start(self, entry: Entry):
        options = {
            "project": PROJECT,
            "id": entry.cell[-128:],
            "name": entry.cell,
            "job_type": entry.phase,
            "config": entry.settings,
            "dir": str(self.folder),
            "settings": self.wandb.Settings(silent=True, console="off", init_timeout=30),
        }
        if self.mode == "online":
            try:
                return self.wandb.init(mode="online", resume="allow", **options)
            except self.wandb.errors.Error:  # no network, or a key that is not valid
                self.mode = "offline"
        return self.wandb.init(mode=self.mode, **options)


def _has_wandb_key() -> bool:
    """Whether the user has logged in: wandb login writes ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class MLflow:
    """A run for each cell in mlflow.db, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table that they make
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        is_local = uri is None
        self.client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').resolve()}" if is_local else uri)
        found = self.client.get_experiment_by_name(PROJECT)
        artifacts = (folder / "mlflow-artifacts").resolve().as_uri() if is_local else None
        self.experiment = (
            self.client.create_experiment(PROJECT, artifact_location=artifacts)
            if found is None
            else found.experiment_id
        )

    def log(self, entry: Entry) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run = self._run(entry)
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, 0) for name, value in entry.metrics.items()]
        metrics += [Metric(name, value, now, epoch) for epoch, values in entry.curve for name, value in values.items()]
        params = [Param(key, str(value)) for key, value in entry.settings.items()]
        tags = [RunTag("status", entry.status), RunTag("error", entry.error or "")]
        for start in range(0, len(metrics), 1000):  # the most of one batch
            self.client.log_batch(run, metrics=metrics[start : start + 1000])
        for start in range(0, len(params), 100):
            self.client.log_batch(run, params=params[start : start + 100])
        self.client.log_batch(run, tags=tags)
        self.client.set_terminated(run, "FINISHED" if entry.status == "done" else "FAILED")

    def _run(self, entry: Entry) -> str:
        """The id of the cell's run: a cell that is computed again, or gets something added, keeps its run."""
        found = self.client.search_runs([self.experiment], f"tags.cell = '{entry.cell}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"cell": entry.cell, "phase": entry.phase}
        return self.client.create_run(self.experiment, run_name=entry.cell, tags=tags).info.run_id


BACKENDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
