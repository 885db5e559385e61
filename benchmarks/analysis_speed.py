"""What the analysis phase costs on a large study: seconds of each step, and the memory at its peak.

    python benchmarks/analysis_speed.py [--cells 500] [--images 20000] [--replicates 10000]

A study of 500 finished cells is written into a temporary folder through Store's own API, with generated predictions:
images differ in difficulty, models share it, and a quantized cell redraws the answer to some images, more at fewer
bits. Two attributes, of 2 and 7 values, make 14 intersectional groups; the metrics are over the one with 7. Then
`phases.analysis.analyse` runs in a process of its own. Times are of each step until the next one begins, on the clock
and of the processors (all threads and processes; what the step would take alone on one processor, whatever else the
machine does).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from config import Config, load_config
from group_counts import METRICS, count_table, group_metrics, group_table, groups_left_out, intersect, worst_group
from plan import plan
from store import INTERSECTION, Store, seed_for

NAMES = {
    "race": ["White", "Black", "Latino", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"],
    "gender": ["female", "male"],
}
SHARES = (0.25, 0.15, 0.15, 0.15, 0.12, 0.1, 0.08)
MODELS = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small_patch16_224")
CELLS = (  # 525 cells: 5 models, 3 seeds, FP32, 15 plain settings and 19 repaired ones
    "models.architectures=[" + ", ".join(MODELS) + "]",
    "run.seeds=[0, 1, 2]",
    "data.dataset=fairface",
    "data.fairface.target=age",
    "data.fairface.sensitive=[race, gender]",
    "quantization.methods=[ptq_static, ptq_dynamic, qat]",
    "quantization.bit_widths=[8, 6, 5, 4, 3]",
    "mitigation.strategies=[bias_aware_calibration, sensitive_layers, threshold_adjustment, minimax_ranges]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--analyse", type=Path, help=argparse.SUPPRESS)  # what the subprocess does
    arguments = parser.parse_args()
    config = load_config(None, [*CELLS, f"analysis.bootstrap_replicates={arguments.replicates}"])
    if arguments.analyse is not None:
        analyse(config, arguments.analyse)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        planned = write_study(Path(folder), config, arguments.cells, arguments.images)
        (Path(folder) / "planned.json").write_text(json.dumps(planned))
        n_cells = sum(map(len, planned.values()))
        print(
            f"{n_cells} cells x {arguments.images} images written in {time.perf_counter() - started:.0f} s", flush=True
        )
        command = [sys.executable, __file__, "--replicates", str(arguments.replicates), "--analyse", folder]
        subprocess.run(command, check=True)


def analyse(config: Config, folder: Path) -> None:
    from phases import analysis

    planned = json.loads((folder / "planned.json").read_text())
    watcher = MemoryWatcher()
    started, steps = clocks(), []
    analysis.analyse(config, Store(folder), planned, lambda *told: steps.append((told[2], *clocks())))
    print("| step | seconds | processor seconds |\n|---|---|---|")
    for (what, *begun), (_, *until) in itertools.pairwise(steps):
        print(f"| {what} | {until[0] - begun[0]:.1f} | {until[1] - begun[1]:.1f} |")
    print(f"| all | {steps[-1][1] - started[0]:.1f} | {steps[-1][2] - started[1]:.1f} |")
    watcher.stop()
    peak = watcher.peak / 2**30
    cores = len(os.sched_getaffinity(0))
    print(f"peak memory {peak:.2f} GiB; {cores} cores, load {os.getloadavg()[0]:.1f} (1 would be one busy core)")


class MemoryWatcher:
    """The largest sum of the memory of this process and its children, looked at ten times a second. Shared pages count
    in proportion (PSS). Linux alone tells that; elsewhere it is 0."""

    def __init__(self):
        self.peak, self._is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.1):
            children = [each.read_text().split() for each in Path("/proc/self/task").glob("*/children")]
            total = sum(_memory(process) for process in ("self", *itertools.chain(*children)))
            self.peak = max(self.peak, total)


def _memory(process: str) -> int:
    """Bytes; 0 of a process that has just ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def clocks() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])  # of this process and of those that it has waited for


def write_study(root: Path, config: Config, n_cells: int, n: int) -> dict[str, list[str]]:
    """The first `n_cells` planned cells: {phase: [cell, …]}."""
    store = Store(root)
    store.prepare("generated: true\n")
    rng = np.random.default_rng(0)
    race = rng.choice(7, n, p=SHARES)
    sensitive = {"race": race, "gender": rng.integers(0, 2, n)}
    label, index, difficulty = rng.integers(0, 2, n), np.arange(n), rng.normal(size=n)
    crossed, crossed_names = intersect(sensitive, NAMES)
    groupings = {name: (sensitive[name], NAMES[name]) for name in NAMES} | {INTERSECTION: (crossed, crossed_names)}
    planned, rows, left = {}, {}, n_cells
    for phase, cells in plan(config).items():
        cells = cells[:left]
        left -= len(cells)
        planned[phase] = [cell.id for cell in cells]
        for cell in cells:
            margin = 1.2 - difficulty - 0.08 * race + 0.3 * _normal(n, "model", cell.model, cell.seed)
            if cell.weight_bits is not None:
                noise = 1.5 * 2.0 ** (-(min(cell.weight_bits, cell.activation_bits or 8) - 2) / 1.5)
                margin = margin + noise * _normal(n, "cell", cell.id)
            sign = np.where(label == 1, 1, -1) * margin
            logits = np.stack([-sign, sign], axis=1).astype(np.float32) / 2
            store.write_predictions(
                cell.id, SimpleNamespace(y_true=label, logits=logits, sensitive=sensitive, index=index)
            )
            row, groups = summarise(cell, label, logits.argmax(axis=1), groupings, rows)
            rows[cell.id] = row
            store.write_cell(row, groups)
        store.write_tables(phase, planned[phase])
    store.write_group_table([cell for cells in planned.values() for cell in cells])
    return planned


def _normal(n: int, *names) -> np.ndarray:
    return np.random.default_rng(seed_for("benchmark", *names)).normal(size=n)


def summarise(cell, label, predicted, groupings, rows) -> tuple[dict, list[dict]]:
    identity = cell.identity()
    of_group = {key: value for key, value in identity.items() if key not in ("phase", "options", "baseline_cell")}
    row = {**identity, "status": "done", "n_test": len(label), "compression": 1.0}
    row["size_mb"] = 20.0 * (1 if cell.weight_bits is None else cell.weight_bits / 32)
    groups = []
    for attribute, (codes, names) in groupings.items():
        counts = count_table(codes, label, predicted, len(names), 2)
        groups += [
            {**of_group, "attribute": attribute, **entry} for entry in group_table(counts, names, ["0", "1"], 20)
        ]
        if attribute == "race":
            row |= {name: float(value) for name, value in group_metrics(counts, 20).items()}
            row |= {"worst_group": names[worst_group(counts, 20)], "groups_left_out": groups_left_out(counts, 20)}
    for name in METRICS:
        row |= {f"{name}_ci_low": row[name] - 0.005, f"{name}_ci_high": row[name] + 0.005}
        if cell.baseline_cell in rows:
            row[f"delta_{name}"] = row[name] - rows[cell.baseline_cell][name]
    return row, groups


if __name__ == "__main__":
    main()
