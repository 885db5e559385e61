"""A dry cluster: a study on 64 Ray CPUs whose cells sleep instead of working, scaled down.

    pip install -r requirements-ray.txt
    python benchmarks/dry_cluster.py [--workers 64] [--minutes 1.5] [--config FILE] [--set KEY=VALUE …]
    python benchmarks/dry_cluster.py --log RESULTS        a run that is over, with the durations in its log.jsonl

Cells sleep for what benchmarks/cost_model.py predicts, or for what they took in a run.
Checks the prediction of benchmarks/cost_model.py, which is arithmetic, against the program's own executor: the same
cells in the same order, phase after phase, handed to execution.ray_executor with another computation. Durations are
scaled so that the predicted time is `--minutes`. Sleeping needs no processor, so a small machine can play a large
cluster; what it cannot hide is what starting 64 processes that import PyTorch costs it, so they are started before the
clock runs, and what a cell costs beside its work is measured with empty ones and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cost_model import OUTPUT, CostModel, Seconds, recorded, speedups, tasks_of
from benchmarks.schedule import Task, critical_path, schedule
from config import Config, dump_config, load_config
from execution.cells import CellResult, Compute, Job, Outcome
from execution.order import longest_first
from execution.ray_executor import Ray
from execution.run_log import RunLog
from plan import Cell, plan
from store import Store, write_json

DURATIONS = "durations.json"  # in the results folder: seconds of each cell
WARM_UP = 3.0  # seconds


LARGEST_DEVIATION = 0.2  # of the measured from the predicted time; beyond it the exit status is 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.5, help="what the predicted time is scaled to")
    parser.add_argument("--model", type=Path, default=OUTPUT)
    parser.add_argument("--config", type=Path, default=Path("configs/config.yaml"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gpu-speedup", nargs="+", default=[], metavar="[MODEL=]NUMBER")
    parser.add_argument("--log", type=Path, metavar="RESULTS", help="durations of this run, instead of predicted ones")
    arguments = parser.parse_args()
    own = ["run.executor=ray", f"run.jobs={arguments.workers}", "run.threads_per_cell=1"]
    config = load_config(arguments.log / "config.yaml" if arguments.log else arguments.config, [*arguments.set, *own])
    if arguments.log:
        costs, tasks = as_recorded(arguments.log, config)
    else:
        model = CostModel.read(arguments.model)
        costs = model.cells(config)
        analysis = model.analysis([cell for cell, _ in costs], config)
        tasks = tasks_of(costs, speedups(arguments.gpu_speedup), analysis, model.start())
    predicted = schedule(tasks, arguments.workers).makespan
    scale = 60 * arguments.minutes / predicted
    with dry_cluster(config, arguments.workers) as cluster:
        empty = cluster.made_up(4 * arguments.workers, 0.0)
        overhead = (cluster.seconds_of(empty) - cluster.seconds_of(empty[:1])) / 4
        print(f"{arguments.workers} workers; a round of empty cells takes {overhead:.2f} s", flush=True)
        measured = dry_run([cell for cell, _ in costs], tasks, scale, cluster)
    path, _ = critical_path(tasks)
    print(
        f"{len(tasks)} tasks, {sum(task.seconds for task in tasks) / 3600:.1f} hours of work, one hour as "
        f"{3600 * scale:.2f} s\n"
        f"predicted {predicted * scale:.1f} s ({predicted / 3600:.2f} hours; critical path {path / 3600:.2f} hours), "
        f"measured {measured:.1f} s: {measured / predicted / scale - 1:+.1%}"
    )
    return int(abs(measured / predicted / scale - 1) > LARGEST_DEVIATION)


def as_recorded(results: Path, config: Config) -> tuple[list[tuple[Cell, Seconds]], list[Task]]:
    """Finished cells in the order in which workers get them, and when they and the analysis were done how long that
    took. SystemExit where nothing is done, or cells are whose baseline is not."""
    taken = {cell.id: seconds for cell, seconds in recorded(results, config)}
    ordered = [cell for cells in plan(config).values() for cell in longest_first(cells, config) if cell.id in taken]
    lacking = {cell.baseline_cell for cell in ordered} - {None, *taken}
    if not ordered or lacking:
        raise SystemExit(
            f"{results}: " + (f"{min(lacking)} is not done" if lacking else "no cell of its config is done")
        )
    costs = [(cell, Seconds(cpu=taken[cell.id])) for cell in ordered]
    records = [record for record in RunLog(Store(results)).read() if record["phase"] == "analysis"]
    analysis = [record["seconds"] for record in records if record["status"] == "done"]
    return costs, tasks_of(costs, lambda model: 1.0, analysis[-1] if analysis else 0.0)


def dry_run(cells: Sequence[Cell], tasks: Sequence[Task], scale: float, cluster: DryCluster) -> float:
    """Seconds that the phases take one after the other; what is no cell, the analysis, is done by this program."""
    by_name = {cell.id: cell for cell in cells}
    start = time.perf_counter()
    for phase in sorted({task.phase for task in tasks}):
        seconds = {task.name: task.seconds * scale for task in tasks if task.phase == phase}
        cluster.seconds_of([(by_name[name], value) for name, value in seconds.items() if name in by_name])
        time.sleep(sum(value for name, value in seconds.items() if name not in by_name))
    return time.perf_counter() - start


def prepare(config: Config, store: Store, device: str, data: object) -> Compute:
    """In a worker: a cell's computation is its sleep."""
    seconds: Mapping[str, float] = json.loads((store.root / DURATIONS).read_text())

    def compute(cell: Cell, report: object) -> CellResult:
        time.sleep(seconds[cell.id])
        return CellResult({}, [])

    return compute


class DryCluster:
    """The program's executor on a local Ray with so many CPUs."""

    def __init__(self, config: Config, store: Store):
        self.config, self.store = config, store
        self.executor = Ray(config, "cpu")
        self.runs = 0

    def run(self, cells: Sequence[tuple[Cell, float]]) -> list[Outcome]:
        """What becomes of cells that take so many seconds, in this order."""
        write_json(self.store.root / DURATIONS, {cell.id: seconds for cell, seconds in cells})
        self.runs += 1
        job = Job(prepare, self.config, str(self.store.root), "cpu", f"dry-{self.runs}")
        return [outcome for _, outcome in self.executor.run(job, None, [cell for cell, _ in cells], Silent())]

    def seconds_of(self, cells: Sequence[tuple[Cell, float]]) -> float:
        start = time.perf_counter()
        failed = [outcome.row["error"] for outcome in self.run(cells) if outcome.row["status"] != "done"]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(cells)} cells failed: {failed[0]}")
        return time.perf_counter() - start

    @staticmethod
    def made_up(count: int, seconds: float) -> list[tuple[Cell, float]]:
        return [(Cell(f"made-up-{n}", "baseline", "none", "none", 0, "fp32"), seconds) for n in range(count)]


class Silent:
    """A report that nobody reads; a lost worker ends the measurement."""

    def begin(self, cell: str) -> None:
        pass

    def told(self, cell: str, kind: str, *values: object) -> None:
        pass

    def lost(self, attempt: dict) -> None:
        raise SystemExit(f"{attempt['cell']}: {attempt['error']}")


@contextlib.contextmanager
def dry_cluster(config: Config, workers: int) -> Iterator[DryCluster]:
    """Once each CPU has a process: a free one would be used twice."""
    with tempfile.TemporaryDirectory(prefix="dry-cluster-") as folder:
        store = Store(Path(folder))
        store.prepare(dump_config(config))
        cluster = DryCluster(config, store)
        try:
            start = time.perf_counter()
            while True:
                outcomes = cluster.run(cluster.made_up(workers, WARM_UP))
                if len({outcome.log["worker"] for outcome in outcomes}) == workers:
                    break
            print(f"{workers} worker processes run after {time.perf_counter() - start:.0f} s", flush=True)
            yield cluster
        finally:
            cluster.executor.close()


if __name__ == "__main__":
    sys.exit(main())
