"""A results folder with predictions whose truth is known, written through Store's own API; no model is run."""

from types import SimpleNamespace

import numpy as np

from config import load_config
from group_counts import METRICS, count_table, group_metrics, group_table, groups_left_out, intersect, worst_group
from plan import plan
from store import Store, seed_for

NAMES = {"gender": ["female", "male"], "skin": ["light", "dark"]}
SIZES = {"resnet50": 94.0, "mobilenet_v2": 9.0, "squeezenet1_1": 3.0, "efficientnet_b0": 16.0, "vit_small": 86.0}


def small_config(*overrides: str, models=("resnet50", "mobilenet_v2"), seeds=(0,)):
    return load_config(
        None,
        [
            f"models.architectures=[{', '.join(models)}]",
            f"run.seeds=[{', '.join(map(str, seeds))}]",
            "data.synthetic.target=smile",
            "data.synthetic.sensitive=[gender, skin]",
            "quantization.methods=[ptq_static]",
            "quantization.bit_widths=[8, 4]",
            "analysis.bootstrap_replicates=300",
            "analysis.vector_format=svg",  # PDFs take half as long again
            *overrides,
        ],
    )


def images(n=1200, shares=(0.35, 0.3, 0.25, 0.1)):
    """label, gender and skin of n images; `shares` are those of the four (gender, skin) groups."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(4), np.round(np.array(shares) * n).astype(int))
    label = rng.integers(0, 2, size=len(group))
    return label, {"gender": group // 2, "skin": group % 2}


def default_loss(cell, code):
    """Share of the FP32-correct images of (gender, skin) group `code` that a cell loses."""
    return {8: 0.0, 4: 0.05}.get(cell.weight_bits, 0.3)


def write_study(
    root,
    config,
    *,
    loss=default_loss,
    fp32_error=0.1,
    names=NAMES,
    n=1200,
    shares=(0.35, 0.3, 0.25, 0.1),
    skip=(),
    fail=(),
):
    """Every planned cell of `config` but those in `skip`; those in `fail` get a row with an error.

    The FP32 models err on the same share `fp32_error` (or function of group codes) of the images; a quantized cell
    changes exactly the share `loss(cell, group)` of each group's FP32-correct images to wrong, and nothing else.
    """
    store = Store(root)
    store.prepare("results_dir: results\n")
    label, sensitive = images(n, shares)
    code = sensitive["gender"] * 2 + sensitive["skin"]
    planned = plan(config)
    rows = {}
    for phase, cells in planned.items():
        for cell in cells:
            if cell.id in skip:
                continue
            if cell.id in fail:
                row = {**cell.identity(), "status": "failed", "error": "RuntimeError: <script>alert(1)</script> broke"}
                store.write_cell(row, [])
                continue
            rng = np.random.default_rng(seed_for("fake", cell.model, cell.seed))
            rank = rng.random(len(label))  # the same for all cells of a model: losses are nested
            wrong = np.zeros(len(label), dtype=bool)
            for g in range(4):
                member = np.flatnonzero(code == g)
                member = member[np.argsort(rank[member])]
                error = fp32_error(g) if callable(fp32_error) else fp32_error
                wrong[member[: round(error * len(member))]] = True
                if cell.method != "none":
                    right = member[~wrong[member]]
                    wrong[right[: round(loss(cell, g) * len(right))]] = True
            predicted = np.where(wrong, 1 - label, label)
            logits = np.eye(2, dtype=np.float32)[predicted]
            predictions = SimpleNamespace(y_true=label, logits=logits, sensitive=sensitive, index=np.arange(len(label)))
            store.write_predictions(cell.id, predictions)
            row, groups = summarise(cell, label, predicted, sensitive, names, rows)
            rows[cell.id] = row
            store.write_cell(row, groups)
        if any(cell.id not in skip for cell in cells):
            store.write_tables(phase, [cell.id for cell in cells])
    store.write_group_table([cell.id for cells in planned.values() for cell in cells])
    return store, planned


def summarise(cell, label, predicted, sensitive, names, rows):
    crossed, crossed_names = intersect(sensitive, names)
    attributes = {
        **{name: (sensitive[name], names[name]) for name in sensitive},
        "intersection": (crossed, crossed_names),
    }
    groups = []
    for attribute, (codes, group_names) in attributes.items():
        counts = count_table(codes, label, predicted, len(group_names), 2)
        identity = {
            key: value for key, value in cell.identity().items() if key not in ("phase", "options", "baseline_cell")
        }
        groups += [
            {**identity, "attribute": attribute, **entry}
            for entry in group_table(counts, group_names, ["neutral", "smile"], 20)
        ]
        if attribute == "gender":
            values = {name: float(value) for name, value in group_metrics(counts, 20).items()}
            worst = worst_group(counts, 20)
            left_out = groups_left_out(counts, 20)
    size = SIZES[cell.model] * (1 if cell.weight_bits is None else cell.weight_bits / 32)
    row = {**cell.identity(), "status": "done", "n_test": len(label), **values, "size_mb": size, "compression": 1.0}
    row |= {"worst_group": names["gender"][worst] if worst is not None else None, "groups_left_out": left_out}
    row |= {"accuracy_ci_low": values["accuracy"] - 0.01, "accuracy_ci_high": values["accuracy"] + 0.01}
    if cell.baseline_cell in rows:
        row |= {f"delta_{name}": values[name] - rows[cell.baseline_cell][name] for name in METRICS}
    return row, groups
