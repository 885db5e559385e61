"""Diagnostics of a cell's model: why a group suffers (diagnostics.py), for the cells that the config selects.

Which those are is no part of a cell's identity: a finished cell that a later config selects is made again from its
checkpoint, diagnosed, and keeps its results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from config import Config
from datasets import BatchLoader, FaceDataset
from diagnostics import diagnose
from phases.complete import DIAGNOSTICS_FAILURE, diagnosis_settings, is_diagnosed, wants_diagnosis
from plan import Cell
from runner import FATAL, one_line, raise_poison
from store import Store, Table, seed_for

TABLES = {
    "diagnostics": (
        "model", "group", "n", "logit_variance", "margin", "margin_p10", "n_sampled", "gradient_norm",
        "gradient_noise", "weight_gradient_norm", "hessian_eigenvalue", "hessian_residual", "hessian_converged",
        "reason",
    ),
    "diagnostics_clipping": ("layer", "group", "n", "clipping_rate", "clipped_low", "clipped_high"),
    "diagnostics_exemplars": (
        "group", "n", "disagreements", "share", "share_ci_low", "share_ci_high", "over_representation",
        "fp32_accuracy_exemplars", "fp32_accuracy_others",
    ),
}  # fmt: skip

is_complete, is_wanted = is_diagnosed, wants_diagnosis


def measure_diagnostics(
    fp32: nn.Module, quantized: nn.Module, cell: Cell, dataset: FaceDataset, config: Config, device: str, report: Any
) -> dict[str, Any]:
    """What goes into the cell's record: the three tables, of validation images, and what they were measured with.
    Where that fails, which is told, the error and what they were to be measured with: an earlier diagnosis stays."""
    try:
        return _measured(fp32, quantized, cell, dataset, config, device, report)
    except FATAL:
        raise
    except Exception as error:  # the cell's results stand without it; the next run tries again
        raise_poison(error)
        report.line(f"  {cell.id}: its diagnostics failed: {one_line(error)}")
        return failed(cell, error, config)


def failed(cell: Cell, error: Exception, config: Config) -> dict[str, Any]:
    """What goes into the record of a cell that could not be diagnosed, for this reason."""
    return {DIAGNOSTICS_FAILURE: {"settings": diagnosis_settings(cell, config), "error": one_line(error)}}


def _measured(fp32, quantized, cell: Cell, dataset: FaceDataset, config: Config, device: str, report) -> dict[str, Any]:
    settings = config.mitigation.diagnostics
    split = dataset.splits["validation"]
    if settings.samples < len(split):
        order = np.random.default_rng(seed_for(cell.seed, cell.dataset, cell.model, "diagnostics"))
        split = split.subset(np.sort(order.permutation(len(split))[: settings.samples]))
    found = diagnose(
        fp32,
        quantized.model if getattr(quantized, "reads_groups", False) else quantized,
        BatchLoader(split, config.run.evaluation_batch_size, device=device, channels_last=True),
        config.group_attribute(cell.dataset),
        names=dataset.sensitive_names,
        hessian_samples=settings.hessian_samples,
        seed=seed_for(cell.seed, cell.dataset, cell.model, "hessian"),
        progress=lambda what, share: report.progress(what, share),
    )
    tables = zip(TABLES, (found.groups, found.clipping, found.exemplars), strict=True)
    return {
        DIAGNOSTICS_FAILURE: None,
        **{name: table.to_dict("records") for name, table in tables},
        "diagnostics_settings": diagnosis_settings(cell, config),
    }


def tables(store: Store) -> list[Table]:
    """diagnostics.csv, diagnostics_clipping.csv, diagnostics_exemplars.csv, where a cell was diagnosed."""
    is_diagnosed = lambda record: "diagnostics_settings" in record["extra"]  # noqa: E731
    return [store.extra_table(name, name, columns, is_diagnosed) for name, columns in TABLES.items()]
