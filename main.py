"""Command line of the study: python main.py --phase {baseline,quantization,mitigation,analysis,all}.

python main.py --status tells how far it is. Exit status: 0 all done, 1 some cells failed, 2 bad config, data or
arguments, or a results folder that cannot be used or is in use, 130 interrupted, 143 terminated (SIGTERM, which cluster
schedulers send before a job's time is over).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from config import Config, ConfigError, dump_config, load_config

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "config.yaml"
PHASES = ("baseline", "quantization", "mitigation", "analysis")
FAILURES = {  # of finished cells, see phases.complete.Failure: what is said of how many there are
    "deployment": "deployments failed",
    "diagnostics": "diagnostics failed",
    "evaluation": "evaluations on other data sets failed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.phase is None and not options.status:
        parser.error("the following arguments are required: --phase (or --status)")
    if options.json and not options.status:
        parser.error("--json is for --status")
    terminated: list[int] = []
    try:
        with _termination_interrupts(terminated):
            return _main(options)
    except KeyboardInterrupt:
        what, status = ("terminated", 143) if terminated else ("interrupted", 130)
        again = f"run the same command again{_left_out(options)} to go on"
        print(f"\n{what}; finished cells are kept: {again}", file=sys.stderr)
        return status


@contextlib.contextmanager
def _termination_interrupts(terminated: list[int]) -> Iterator[None]:
    """SIGTERM stops the run as Ctrl-C does, and is noted: Ray raises an interrupt of its own in place of another."""

    def stop(number, frame):
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(options: argparse.Namespace) -> int:
    try:
        config = load_config(options.config, options.set)
        if options.results_dir is not None:
            config = config.model_copy(update={"results_dir": options.results_dir})
    except ConfigError as error:
        return _refuse(error)
    if options.status:
        return _status(config, options.json)

    # after the arguments are known to be good: these import torch, which takes seconds
    from datasets import DataError
    from execution.run_lock import only_run
    from execution.tracking import check_installed
    from models import CheckpointError
    from store import Store, StoreError

    try:
        _check_models(config)
        _check_engines(config, _phases(options.phase))
        _check_evaluation(config)
        check_installed(config.tracking)
        device = _device(options.device)
        store = Store(config.results_dir)
        if options.dry_run:
            return _dry_run(config, store, _phases(options.phase))
        with only_run(store, options.wait, lambda line: print(line, file=sys.stderr, flush=True)):
            return _run(config, store, _phases(options.phase), device, options)
    except (ConfigError, DataError, StoreError, CheckpointError) as error:
        return _refuse(f"{error}{'; leave --fresh out then' if options.is_cleared else ''}")


def _left_out(options: argparse.Namespace) -> str:
    """What a command that goes on must not say again."""
    return ", without --fresh," if options.is_cleared else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Measure what quantizing a vision model does to each demographic group, and what repairs it.",
    )
    parser.add_argument("--phase", choices=(*PHASES, "all"))
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: configs/config.yaml")
    parser.add_argument("--results-dir", metavar="DIR", help="overrides results_dir")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override any key: training.epochs=2"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="compute the cells of these phases again")
    again.add_argument(
        "--retry-failed", action="store_true", help="compute again the cells that failed, and no others (default: both)"
    )
    again.add_argument("--keep-failed", action="store_true", help="leave the cells that failed as they are")
    parser.add_argument(
        "--wait", type=_seconds, default=0.0, metavar="SECONDS", help="for another run on the same results (default: 0)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cells, done or to do, and stop")
    parser.add_argument("--status", action="store_true", help="how far the study is, in time too; also during a run")
    parser.add_argument("--json", action="store_true", help="with --status: for programs")
    parser.add_argument("--quiet", action="store_true", help="plain lines instead of a progress bar")
    parser.set_defaults(is_cleared=False)  # whether --fresh has been done
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _run(config: Config, store, phases: Sequence[str], device: str, options: argparse.Namespace) -> int:
    from execution.run_log import RunLog
    from execution.tracking import Tracker
    from plan import plan
    from runner import Report

    planned = plan(config)
    broken = {cell.id for phase in phases for cell in planned.get(phase, []) if _has_failed(cell, config, store)}
    if options.retry_failed and not broken:
        print(f"{config.results_dir}: no cell of these phases has failed")
        return 0
    store.prepare(dump_config(config))
    if options.fresh:
        store.clear([cell.id for phase in phases for cell in planned.get(phase, [])])
        options.is_cleared = True
    report = Report(options.quiet)
    report.tracker = Tracker(config, store.root, report.line)
    report.log = RunLog(store)
    if options.retry_failed or options.keep_failed:
        report.chosen = lambda todo: [cell for cell in todo if (cell.id in broken) == options.retry_failed]
    if options.retry_failed:
        phases = [phase for phase in phases if phase == "analysis" or broken & {cell.id for cell in planned[phase]}]
    needs_executor = any(phase != "analysis" for phase in phases)
    with report.on(config, device) if needs_executor else contextlib.nullcontext():
        return _run_phases(config, store, phases, device, planned, report)


def _run_phases(config: Config, store, phases: Sequence[str], device: str, planned: dict, report) -> int:
    import importlib

    from phases.complete import failures
    from phases.deploy import unmatched_patterns
    from phases.tables import write_tables

    for line in unmatched_patterns(config, [cell for cells in planned.values() for cell in cells]):
        report.line(line)
    unusable: list[str] = []
    for phase in phases:
        if phase != "baseline":
            _refresh(config, store, planned, report)
        module = importlib.import_module(f"phases.{phase}")
        if phase == "analysis":
            report.close()
            write_tables(config, store)  # a run that was stopped has left them behind its records
            _analyse(module, config, store, report)
            report.line((store.analysis / "groups.md").read_text(encoding="utf-8"))
            unusable = _unusable(store)
        else:
            module.run(config, store, report, device)
    failed = [
        (cell.id, record["row"]["error"])
        for phase in phases
        for cell in planned.get(phase, [])
        if (record := store.record(cell.id)) is not None and record["row"]["status"] == "failed"
    ]
    for cell, error in failed:
        report.line(f"failed: {cell}: {error}")
    computed = [cell for phase in phases for cell in planned.get(phase, [])]
    of_finished = [(cell.id, failure) for cell in computed for failure in failures(cell, config, store)]
    of_finished.sort(key=lambda failure: list(FAILURES).index(failure[1].what))
    for line in (*(failure.told(cell) for cell, failure in of_finished), *unusable):
        report.line(line)
    numbers = Counter(failure.what for _, failure in of_finished)
    counts = [
        (len(failed), "cells failed"),
        *((numbers[what], told) for what, told in FAILURES.items()),
        (len(unusable), "finished cells left out of the analysis"),
    ]
    told = "".join(f"; {count} {what}" for count, what in counts if count)
    report.line(f"results are in {config.results_dir}{told}")
    return 1 if any(count for count, _ in counts) else 0


def _analyse(module, config: Config, store, report) -> None:
    """Run the analysis, and log what it is made of, by which --status knows whether it still is up to date."""
    from execution.run_log import measured
    from phases.status import ANALYSIS, analysis_inputs

    inputs = analysis_inputs(config, store)
    with store.mark_running(ANALYSIS), measured() as entry:
        module.run(config, store, report.step)
    report.log.record({"phase": ANALYSIS, "status": "done", **entry, "inputs": inputs})


def _has_failed(cell, config: Config, store) -> bool:
    """Whether the cell has, or something that the config wants of a finished one: what a run's exit status counts."""
    from phases.complete import failures

    record = store.record(cell.id)
    return record is not None and (record["row"]["status"] == "failed" or bool(failures(cell, config, store)))


def _status(config: Config, as_json: bool) -> int:
    """No torch is imported here: it is asked often, and while a run needs the machine."""
    import json

    from rich.console import Console

    from phases.status import Screen, study_status
    from store import Store, StoreError

    try:
        status = study_status(config, Store(config.results_dir))
    except StoreError as error:
        return _refuse(error)
    if as_json:
        print(json.dumps(status, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.width = max(console.width, 100)
        console.print(Screen(status))
    return 0


def _unusable(store) -> list[str]:
    """A line for each finished cell whose predictions the analysis could not use."""
    import pandas as pd

    absent = pd.read_csv(store.analysis / "missing.csv")
    absent = absent[absent["status"].isin(["unusable", "unusable elsewhere"])]
    return [f"left out of the analysis: {row.cell}: {row.why}" for row in absent.itertuples()]


def _refresh(config: Config, store, planned: dict, report) -> None:
    """Derive the rows again whose metric settings the config has changed since, so that no table mixes the two."""
    from phases import cross_evaluate
    from phases.measure import refresh_metrics
    from phases.tables import write_tables

    cells = [cell for block in planned.values() for cell in block]
    is_changed = cross_evaluate.refresh(cells, config, store)
    refreshed = refresh_metrics(cells, config, store)
    if refreshed:
        report.line(f"{refreshed} rows derived again from saved predictions, as this config wants them")
    if refreshed or is_changed:
        write_tables(config, store)


def _check_models(config: Config) -> None:
    """ConfigError for an architecture that does not exist, wherever it is named, or that cannot have the image size."""
    from models import check_architecture, patch_size_for

    for section, names in (
        ("models.architectures", config.models.architectures),
        ("models.weights", config.models.weights),
        ("models.options", config.models.options),
        ("training.per_model", config.training.per_model),
    ):
        for name in names:
            check_architecture(name, section)
    for name in config.models.architectures:
        if name.startswith("vit_") and "patch_size" not in config.models.options.get(name, {}):
            for dataset in config.data.dataset:
                patch_size_for(config.dataset(dataset).image_size)


def _check_engines(config: Config, phases: Sequence[str]) -> None:
    """ConfigError for an engine that is wanted and not installed."""
    from engines import EngineError, check_installed

    is_run = config.deployment.cells and set(phases) != {"analysis"}
    for engine in config.deployment.engines if is_run else ():
        try:
            check_installed(engine)
        except EngineError as error:
            raise ConfigError(f"deployment.engines: {error}, or leave it out") from None


def _check_evaluation(config: Config) -> None:
    """ConfigError for a data set of evaluation.also_on that the models cannot be measured on."""
    from group_mapping import correspondence

    for trained_on in config.data.dataset:
        for name in config.evaluation.also_on:
            if name != trained_on:
                correspondence(config, trained_on, name)


def _dry_run(config: Config, store, phases: Sequence[str]) -> int:
    from phases.complete import missing as what_is_missing
    from plan import plan

    for phase, cells in plan(config).items():
        if phase not in phases:
            continue
        missing = {cell.id: what for cell in cells if (what := what_is_missing(cell, config, store))}
        done = len(cells) - len(missing)
        print(f"{phase}: {len(cells)} cells, {done} done, {len(cells) - done} to do")
        for cell in cells:
            record = store.record(cell.id)
            status = "to do" if record is None else record["row"]["status"]
            if status == "done":
                status = missing.get(cell.id, status)
            print(f"  {status:<7} {cell.id}")
    return 0


def _phases(phase: str) -> Sequence[str]:
    return PHASES if phase == "all" else (phase,)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return name


def _refuse(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
