"""Every table of a results folder, from its records. A phase writes them as it ends; before an analysis they are
written again, since a run that was stopped, or killed, has left them behind its records."""

from __future__ import annotations

from config import Config
from phases import cross_evaluate, deploy, diagnose
from plan import plan
from store import Store

TRAINING_COLUMNS = (
    "epoch", "learning_rate", "train_loss", "validation_accuracy", "validation_score", "precision", "seconds",
)  # fmt: skip
SENSITIVITY_COLUMNS = ("layer", "bits", "sensitivity", "sensitivity_low", "sensitivity_high", "bytes", "chosen_bits")


def write_tables(config: Config, store: Store) -> None:
    """Planned cells come first in each, in their order; a phase of which nothing has ended has none."""
    planned = plan(config)
    is_quantized = lambda record: record["row"]["phase"] != "baseline"  # noqa: E731
    tables = [
        *(store.phase_table(phase) for phase in planned),
        store.group_table(),
        store.extra_table("training_log", "training_log", TRAINING_COLUMNS),
        store.extra_table("layer_sensitivity", "sensitivity", SENSITIVITY_COLUMNS, is_quantized),
        *deploy.tables(store),
        *diagnose.tables(store),
        *cross_evaluate.tables(store),
    ]
    store.write(tables, [cell.id for cells in planned.values() for cell in cells])
