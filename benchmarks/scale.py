"""Many cells at once: how much faster, whether the results are the same, and what kill -9 and 2,000 cells do.

    python benchmarks/scale.py            the default run: one process, two threads, two workers, two of a local Ray
    python benchmarks/scale.py --kill     30 random kill -9 of workers and of the program, on workers and on Ray
    python benchmarks/scale.py --soak     2,000 cells: memory and open files of the program and its workers
    --config FILE --set KEY=VALUE ...     another study than configs/config.yaml, for the first
    --executors NAME ... --kills N --cells N    less than all of it
    --rounds N            the ways of the first in turn, N times: of a machine whose speed changes

Everything is run from the command line as a user does. Before and after each run of the first, one program trains alone
and two beside one another in turn: how fast the machine is then, and what two of its cores give without any executor.
Exit status 1 where results differ, two workers, or two cells of Ray, are less than 1.7 times as fast as one process, a
finished file was touched, or memory or open files grow. Reads /proc: Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from store import TIMING_COLUMNS  # noqa: E402

WAYS = {  # of the default run
    "1 process x 1 thread": ("run.threads_per_cell=1",),
    "1 process x 2 threads": ("run.threads_per_cell=2",),
    "2 workers x 1 thread": ("run.threads_per_cell=1", "run.executor=processes", "run.jobs=2"),
    "Ray, 2 cells x 1 thread": ("run.threads_per_cell=1", "run.executor=ray", "run.jobs=2"),
}
REFERENCE = "1 process x 1 thread"
TARGET = 1.7  # times as fast
LEFT = 5  # parts of a run that is killed which are computed after the last kill: cells go on ending until it comes
SLICES, SLICE_SECONDS = 8, 1.5  # of training alone, and beside another program
TINY = {
    "data": {
        "dataset": "synthetic",
        "min_group_size": 2,
        "synthetic": {"train_images": 64, "validation_images": 16, "test_images": 64, "target": "smile"},
    },
    "models": {"architectures": ["squeezenet1_1"]},
    "training": {"epochs": 1},
    "mitigation": {"strategies": []},
    "analysis": {"bootstrap_replicates": 100},
    "deployment": {"cells": [], "export": [], "latency": False},
}
WIDTHS = [f"W{weights}A{activations}" for weights in range(2, 9) for activations in range(2, 9)]
GROWTH = 20.0  # MB each 1,000 cells that are no leak: the tables of a run have a row for each cell
OBSERVERS = ["minmax", "percentile", "mse", "entropy", "moving_average"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--config", default=ROOT / "configs" / "config.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    parser.add_argument("--executors", nargs="+", default=["processes", "ray"], choices=["processes", "ray"])
    parser.add_argument("--rounds", type=int, default=1, help="of the first; speed-ups are medians")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--cells", type=int, help="of --kill (120) and --soak (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty one, for the runs' results")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train_when_told()
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-"))
        else:
            options.keep.mkdir(parents=True, exist_ok=True)
            if any(options.keep.iterdir()):
                parser.error(f"--keep {options.keep}: has files of something else in it; name an empty or a new folder")
            folder = options.keep.absolute()
        if options.kill:
            return kill(Path(folder), options)
        if options.soak:
            return soak(Path(folder), options)
        return speed(Path(folder), options)


# ----------------------------------------------------------------------------------------------------------------- runs


class Run:
    """main.py in a process of its own, and everything that it has started, which is known by its environment."""

    def __init__(self, config: Path, results: Path, settings: tuple[str, ...], phase: str = "all"):
        self.mark = f"BNQ_SCALE_{uuid.uuid4().hex}"
        command = [sys.executable, "main.py", "--phase", phase, "--config", str(config), "--results-dir", str(results),
                   "--device", "cpu", "--quiet", "--set", *settings]  # fmt: skip
        results.mkdir(parents=True, exist_ok=True)
        self.output = results.parent / f"{results.name}.log"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, self.mark: "1"},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
            )  # fmt: skip

    def everything(self) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # somebody else's, or gone
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def workers(self) -> list[int]:
        """The processes that compute cells."""
        found = []
        for pid in self.everything():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"spawn_main" in line or line.startswith(b"ray::_ray_cell"):
                    found.append(pid)
        return found

    def end(self) -> int:
        """Its exit status; what outlived it by more than 30 seconds is an error (Ray's own agents: 2 minutes)."""
        status = self.process.wait()
        start = time.monotonic()
        while left := self.everything():
            names = [command_of(pid) for pid in left]
            is_ours = any("Agent" not in name for name in names if name != "gone")
            if time.monotonic() > start + (30 if is_ours else 120):
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"{len(left)} processes outlived the program: {'; '.join(names)}")
            time.sleep(0.2)
        return status


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return "gone"


def contents(results: Path) -> dict[str, str]:
    """Digests of every table, prediction and checkpoint, without what is measured in seconds."""
    found = {}
    for path in sorted([*results.glob("*.csv"), *(results / "predictions").iterdir(), *results.glob("checkpoints/*")]):
        data = path.read_bytes()
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            timed = [column for column in table if column in (*TIMING_COLUMNS, "seconds")]
            data = table.drop(columns=timed).to_csv(index=False).encode()
        found[str(path.relative_to(results))] = hashlib.sha256(data).hexdigest()
    return found


def compared(results: Path, reference: Path) -> tuple[bool, str]:
    ours, theirs = contents(results), contents(reference)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    text = f"{len(theirs)} files of results the same" if not differing else f"DIFFERENT: {', '.join(differing[:5])}"
    return not differing, text


def write_config(folder: Path, **sections) -> Path:
    config = json.loads(json.dumps(TINY))
    config["data"]["cache"] = str(folder / "cache")
    for section, keys in sections.items():
        config.setdefault(section, {}).update(keys)
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


# ------------------------------------------------------------------------------------------------------ the default run


def speed(folder: Path, options: argparse.Namespace) -> int:
    """Wall times to the last cell (the analysis, which follows, is the same for all), and of the whole run; and for how
    long the cells computed, beside those of one process: what differs there is not of the executor's schedule, but of
    the machine, whose speed others may share, or of what computes beside the cells."""
    shared = (*options.set, f"data.cache={folder / 'cache'}")
    ways = {name: (*settings, *shared) for name, settings in WAYS.items()}
    if "processes" not in options.executors:
        ways = {name: settings for name, settings in ways.items() if name == REFERENCE or name.startswith("Ray")}
    if "ray" not in options.executors:
        ways = {name: settings for name, settings in ways.items() if "run.executor=ray" not in settings}
    elif importlib.util.find_spec("ray") is None:
        raise SystemExit("ray is not installed: pip install -r requirements-ray.txt, or --executors processes")
    # faces are drawn once, before the clock runs
    if Run(
        options.config, folder / "warm", (*ways[REFERENCE], "training.epochs=1", "deployment.cells=[]"), "baseline"
    ).end():
        raise SystemExit((folder / "warm.log").read_text()[-2000:])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    machine = [two_at_once()]
    is_good = True
    for number in range(options.rounds):
        computed: dict[str, float] = {}
        for place, (name, settings) in enumerate(ways.items()):
            results = folder / f"way{place}{f'-{number}' if number else ''}"
            began, start = time.time(), time.monotonic()
            status = Run(options.config, results, settings).end()
            whole = time.monotonic() - start
            ended = [path.stat().st_mtime for path in (results / "cells").glob("*.json")]
            if status != 0 or not ended:
                raise SystemExit(results.with_suffix(".log").read_text()[-2000:])
            seconds[name].append(max(ended) - began)
            computed[name] = computed_seconds(results)
            text = "other results: another number of threads"
            if "run.threads_per_cell=1" in settings:
                is_same, text = compared(results, folder / "way0")
                is_good &= is_same
            print(
                f"{name:24} {len(ended)} cells in {seconds[name][-1]:6.0f} s, "
                f"{seconds[REFERENCE][-1] / seconds[name][-1]:.2f} x; with the analysis {whole:.0f} s; cells computed "
                f"for {computed[name]:.0f} s, {computed[name] / computed[REFERENCE]:.2f} x; {text}",
                flush=True,
            )
            machine.append(two_at_once())
    speeds, limits = zip(*machine, strict=True)
    limit = statistics.median(limits)
    print(f"the machine: two programs at once train {limit:.2f} x as many images as one ({listed(limits, '.2f')});")
    print(f"             one trains {listed(speeds, '.0f')} images/s before, between and after these runs")
    for name in seconds:
        if (times := faster(seconds, name, "1 process x 2 threads")) and name.startswith(("2 workers", "Ray")):
            print(f"{name}: {times:.2f} x of 1 process x 2 threads")
    for name in seconds:
        if name.startswith(("2 workers", "Ray")):
            is_reached = (times := faster(seconds, name, REFERENCE)) >= TARGET
            is_good &= is_reached
            print(
                f"{name}: {times:.2f} x, {times / limit:.0%} of what the machine gives; "
                f"at least {TARGET} x: {'reached' if is_reached else 'MISSED'}"
            )
    return 0 if is_good else 1


def listed(values: Sequence[float], spec: str) -> str:
    return ", ".join(format(value, spec) for value in values)


def two_at_once() -> tuple[float, float]:
    """Images/s of one program that trains alone, and times as many that two train, one thread each, without any
    executor: what two cores can give at most, as they may share caches, memory, power, or a core with somebody else. At
    the end of a slice one of the two may train alone for a moment, which makes it a little too high."""
    command = [sys.executable, __file__, "--train"]
    with contextlib.ExitStack() as stack:
        pair = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        for program in pair:
            program.stdout.readline()  # it is ready
        alone, together = [], []
        for turn in range(SLICES):  # one, both, the other, both: what the machine's speed does meets both alike
            alone.append(trained([pair[turn % 2]]))
            together.append(trained(pair))
    return statistics.median(alone), statistics.median(together) / statistics.median(alone)


def trained(programs: list[subprocess.Popen]) -> float:
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    return sum(float(program.stdout.readline()) for program in programs)


def train_when_told() -> int:
    """For each line on stdin images/s of training, of two networks of the default run in turn."""
    import torch

    from execution import memory
    from models import build_model
    from sections.training import Training
    from training import train

    memory.keep_freed()
    torch.set_num_threads(1)
    batches = [{"image": torch.randn(32, 3, 64, 64), "label": torch.randint(0, 2, (32,)), "sensitive": {}}]
    models = [build_model(name, 2, image_size=64, pretrained=False) for name in ("mobilenet_v2", "resnet50")]
    settings = Training(epochs=1, warmup_epochs=0)

    def once() -> None:
        for model in models:
            train(model, batches, None, settings)

    once()
    print("ready", flush=True)
    for _ in sys.stdin:
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < SLICE_SECONDS:
            once()
            passes += 1
        print(passes * len(models) * len(batches[0]["label"]) / (time.perf_counter() - start), flush=True)
    return 0


def computed_seconds(results: Path) -> float:
    lines = map(json.loads, (results / "log.jsonl").read_text().splitlines())
    return sum(line["seconds"] for line in lines if line["phase"] != "analysis")


def faster(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """The median of the rounds; 0.0: there is nothing to compare with."""
    pairs = zip(seconds.get(reference, []), seconds[name], strict=False)
    return statistics.median([before / after for before, after in pairs] or [0.0])


# ------------------------------------------------------------------------------------------------------------- kill -9


def kill(folder: Path, options: argparse.Namespace) -> int:
    """Each run is killed 30 times, once as many cells are there as a 35th part each; then it is left to finish."""
    wanted = options.cells or 120
    seeds = list(range(-(-wanted // 6)))
    config = write_config(
        folder,
        quantization={
            "methods": ["ptq_static"],
            "bit_widths": [8, 6, 4, 3, 2],
            "ptq_static": {"calibration_samples": 16},
        },
        run={"seeds": seeds, "threads_per_cell": 1},
    )
    if Run(config, folder / "serial", ("run.executor=serial",)).end() != 0:
        raise SystemExit((folder / "serial.log").read_text()[-2000:])
    total = len(list((folder / "serial" / "cells").glob("*.json")))
    print(f"{total} cells in one process, not interrupted", flush=True)
    is_good = True
    for executor in options.executors:
        is_good &= killed(folder, config, executor, total, options)
    return 0 if is_good else 1


def killed(folder: Path, config: Path, executor: str, total: int, options: argparse.Namespace) -> bool:
    rng = random.Random(options.seed)
    results, settings = folder / executor, (f"run.executor={executor}", "run.jobs=2")
    victims = {"worker": 0, "program": 0, "missed": 0}
    finished: dict[Path, tuple[int, str]] = {}
    touched: set[Path] = set()
    start = time.monotonic()
    run, starts = Run(config, results, settings), 1
    statuses = []
    while (number := victims["worker"] + victims["program"]) < options.kills:
        if len(list((results / "cells").glob("*.json"))) >= total:  # nothing is left to interrupt: too few kills
            break
        until_cells = number * total // (options.kills + LEFT)
        while len(list((results / "cells").glob("*.json"))) <= until_cells and run.process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.5))
        if run.process.poll() is not None:  # it ended, with cells that failed as they were killed twice
            statuses.append(run.end())
            run, starts = Run(config, results, settings), starts + 1
        while not run.workers() and run.process.poll() is None:
            time.sleep(0.05)
        touched |= look(results, finished)
        victim = "program" if rng.random() < 1 / 3 else "worker"
        workers = run.workers()
        pid = run.process.pid if victim == "program" or not workers else rng.choice(workers)
        try:
            if pid == run.process.pid and run.process.poll() is not None:
                raise ProcessLookupError
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended just now: no kill, and another one is tried
            victims["missed"] += 1
            continue
        victims["program" if pid == run.process.pid else "worker"] += 1
        if pid == run.process.pid:
            run.end()
            run, starts = Run(config, results, settings), starts + 1
    while (status := run.end()) == 1 and starts < options.kills + 10:  # cells that failed are computed again
        touched |= look(results, finished)
        run, starts = Run(config, results, settings), starts + 1
    touched |= look(results, finished)
    is_same, text = compared(results, folder / "serial")
    left = len(list(results.rglob(".*.tmp")))
    print(
        f"{executor}: {victims['worker']} workers and {victims['program']} programs killed ({victims['missed']} ended "
        f"before), {starts} starts, "
        f"{time.monotonic() - start:.0f} s; {text}; {len(touched)} of {len(finished)} finished files touched; "
        f"{left} temporary files left; exit status {status}",
        flush=True,
    )
    if not (is_enough := victims["worker"] + victims["program"] >= options.kills):
        print(f"{executor}: TOO FEW KILLS: its cells ended before the {options.kills}th; --cells {2 * total} has more")
    return is_same and not touched and not left and status == 0 and is_enough


def look(results: Path, finished: dict[Path, tuple[int, str]]) -> set[Path]:
    """Note the files of cells that are done; those that have changed since they were noted."""
    touched = set()
    for record in (results / "cells").glob("*.json"):
        row = json.loads(record.read_text())["row"]
        if row["status"] != "done":
            continue
        files = [record, results / "predictions" / f"{record.stem}.npz"]
        if row["baseline_cell"] is None:
            name = f"{row['dataset']}-{row['model']}-s{row['seed']}.safetensors"
            files.append(results / "checkpoints" / name)
        for path in files:
            state = (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            if finished.setdefault(path, state) != state:
                touched.add(path)
    return touched


# ----------------------------------------------------------------------------------------------------------------- soak


def soak(folder: Path, options: argparse.Namespace) -> int:
    wanted = options.cells or 2000
    seeds = list(range(-(-wanted // (len(WIDTHS) * len(OBSERVERS) + 1))))
    config = write_config(
        folder,
        quantization={
            "methods": ["ptq_static"],
            "bit_widths": WIDTHS,
            "ptq_static": {"calibration_samples": 16, "observer": OBSERVERS},
        },
        deployment={"cells": ["*:ptq_static:W8A8"], "export": ["*:ptq_static:W8A8"]},
        run={"seeds": seeds, "threads_per_cell": 1, "executor": "processes"},
    )
    is_good = True
    for executor in options.executors:
        is_good &= soaked(folder, config, executor, wanted)
    return 0 if is_good else 1


def soaked(folder: Path, config: Path, executor: str, wanted: int) -> bool:
    """All cells to the end of their phase, where the tables are written."""
    results = folder / executor
    settings = (f"run.executor={executor}", "run.jobs=2")
    if Run(config, results, settings, "baseline").end() != 0:
        raise SystemExit((folder / f"{executor}.log").read_text()[-2000:])
    run = Run(config, results, settings, "quantization")
    samples: list[dict] = []
    start, peak = time.monotonic(), 0.0
    print(f"{executor}:\n{'cells':>6} {'s':>6}   resident MB (open files) of the program; of its workers", flush=True)
    while run.process.poll() is None:
        done = len(list((results / "cells").glob("*.json")))
        peak = max(peak, peak_of(run.process.pid))
        if not samples or done >= samples[-1]["cells"] + wanted / 20:
            workers = [usage(pid) for pid in run.workers()]
            program = usage(run.process.pid)
            if program and workers and all(workers):
                samples.append({"cells": done, "program": program, "workers": workers})
                told = ", ".join(f"{memory:.0f} ({files})" for memory, files in workers)
                print(
                    f"{done:6d} {time.monotonic() - start:6.0f}   {program[0]:.0f} ({program[1]}); {told}", flush=True
                )
        time.sleep(0.5)
    status = run.end()
    rows = [json.loads(path.read_text())["row"] for path in (results / "cells").glob("*.json")]
    failed = [row for row in rows if row["status"] != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} cells failed: {failed[0]['error']}")
    print(f"{len(rows)} cells in {time.monotonic() - start:.0f} s; the program's peak, tables included: {peak:.0f} MB")
    if len(samples) < 8 or status != 0:
        print((folder / f"{executor}.log").read_text()[-2000:])
        raise SystemExit(f"exit status {status} after {len(samples)} samples: it ended early")
    return is_flat(samples)


def usage(pid: int) -> tuple[float, int] | None:
    """(resident MB, open files) of a process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def peak_of(pid: int) -> float:
    """The most resident MB of a process so far; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def is_flat(samples: list[dict]) -> bool:
    """Whether the last quarter uses no more than the second one: 10 % of memory, GROWTH, two open files."""
    quarter = len(samples) // 4
    is_good = True
    for name in ("program", "workers"):
        parts = []
        for part in (samples[quarter : 2 * quarter], samples[-quarter:]):
            values = [value for sample in part for value in ([sample[name]] if name == "program" else sample[name])]
            parts.append((statistics.median(memory for memory, _ in values), max(files for _, files in values)))
        (before, files_before), (after, files_after) = parts
        kept = samples[quarter:]  # the first quarter fills what is kept on purpose
        memory = [
            statistics.median(value for value, _ in ([each[name]] if name == "program" else each[name]))
            for each in kept
        ]
        slope = 1000 * statistics.linear_regression([each["cells"] for each in kept], memory).slope
        good = after <= 1.1 * before and slope <= GROWTH and files_after <= files_before + 2
        is_good &= good
        print(
            f"{name}: {before:.0f} MB in the second quarter, {after:.0f} MB in the last ({slope:+.0f} MB each 1,000 "
            f"cells); at most {files_before} and {files_after} open files: {'flat' if good else 'GROWS'}"
        )
    return is_good


if __name__ == "__main__":
    sys.exit(main())
