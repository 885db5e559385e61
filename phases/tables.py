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
    everything = [cell.id for cells in planned.values() for cell in cells]
    begun = {record["row"]["phase"] for _, record in store.records()}
    if not begun:
        return
    for phase, cells in planned.items():
        if phase in begun:
            store.write_tables(phase, [cell.id for cell in cells])
    store.write_group_table(everything)
    store.write_extra_table("training_log", "training_log", TRAINING_COLUMNS, everything)
    if begun & {"quantization", "mitigation"}:
        store.write_extra_table("layer_sensitivity", "sensitivity", SENSITIVITY_COLUMNS, everything)
    deploy.write_tables(store, everything)
    diagnose.write_tables(store, everything)
    cross_evaluate.write_tables(store, everything)
