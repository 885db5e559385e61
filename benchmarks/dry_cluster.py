"""A dry cluster: a study on 64 Ray CPUs whose cells sleep for their predicted time, scaled down, instead of working.

    pip install ray
    python benchmarks/dry_cluster.py [--workers 64] [--minutes 1.5] [--config FILE] [--set KEY=VALUE …]

Checks the prediction of benchmarks/cost_model.py, which is arithmetic, against a real scheduler: the same cells in the
same order, phase after phase, handed to Ray, which places them as it likes. Durations are scaled so that the predicted
time is `--minutes`. Sleeping needs no processor, so a small machine can play a large cluster; what it cannot hide is
what starting 64 processes costs it, so they are started before the clock runs, and what Ray needs for each task is
measured with empty tasks and printed.

`OnRay` is all that knows of Ray: another executor takes its place with a function of the same form.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cost_model import OUTPUT, CostModel, speedups, tasks_of
from benchmarks.schedule import Task, critical_path, schedule
from config import load_config

Run = Callable[[Sequence[float]], None]  # runs sleeps of so many seconds in this order, as many at a time as there are
# workers; returns when all are over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1.5, help="what the predicted time is scaled to")
    parser.add_argument("--model", type=Path, default=OUTPUT)
    parser.add_argument("--config", type=Path, default=Path("configs/config.yaml"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gpu-speedup", nargs="+", default=[], metavar="[MODEL=]NUMBER")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    model = CostModel.read(arguments.model)
    costs = model.cells(config)
    tasks = tasks_of(costs, speedups(arguments.gpu_speedup), model.analysis(config, len(costs)))
    predicted = schedule(tasks, arguments.workers).makespan
    scale = 60 * arguments.minutes / predicted
    with OnRay(arguments.workers) as run:
        start = time.perf_counter()
        run([0.0] * 4 * arguments.workers)
        overhead = (time.perf_counter() - start) / 4
        print(f"{arguments.workers} workers; Ray needs {overhead:.2f} s for a round of empty tasks", flush=True)
        measured = dry_run(tasks, scale, run)
    path, _ = critical_path(tasks)
    print(
        f"{len(tasks)} tasks, {sum(task.seconds for task in tasks) / 3600:.1f} hours of work, one hour as "
        f"{3600 * scale:.2f} s\n"
        f"predicted {predicted * scale:.1f} s ({predicted / 3600:.2f} hours; critical path {path / 3600:.2f} hours), "
        f"measured {measured:.1f} s: {measured / predicted / scale - 1:+.1%}"
    )


def dry_run(tasks: Sequence[Task], scale: float, run: Run) -> float:
    """Seconds that the phases take one after the other."""
    start = time.perf_counter()
    for phase in sorted({task.phase for task in tasks}):
        run([task.seconds * scale for task in tasks if task.phase == phase])
    return time.perf_counter() - start


class OnRay:
    """A local Ray cluster with so many CPUs, whose worker processes all run; yields a Run."""

    def __init__(self, workers: int):
        self.workers = workers

    def __enter__(self) -> Run:
        import ray

        ray.init(num_cpus=self.workers, include_dashboard=False, log_to_driver=False, logging_level="error")

        @ray.remote(num_cpus=1)
        def sleep(seconds: float) -> int:
            import os

            time.sleep(seconds)
            return os.getpid()

        start = time.perf_counter()
        while True:  # until each CPU has a process: a free one would be used twice
            seen = set(ray.get([sleep.remote(3.0) for _ in range(self.workers)]))
            if len(seen) == self.workers:
                break
        print(f"{len(seen)} worker processes run after {time.perf_counter() - start:.0f} s", flush=True)
        return lambda durations: ray.get([sleep.remote(seconds) for seconds in durations])

    def __exit__(self, *error) -> None:
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main()
