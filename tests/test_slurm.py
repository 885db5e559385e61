"""scripts/slurm.sh as Slurm would run it, with two Rays on this machine for two nodes: srun and scontrol are stand-ins
that leave out where a step runs; everything else is real. Where Ray does not matter,
Ray and python are stand-ins too."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
from cheap_run import cells_of, run_here, write_config
from test_executors import TINY, processes_marked, until

from execution.run_lock import SILENCE
from owners import Owner
from store import PHASES, Store

ROOT = Path(__file__).parent.parent
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
    echo "$1" >> "$BNQ_TEST_OPTIONS"
    [[ $1 == -w ]] && shift
    shift
done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames nodes-of-the-job" ]] && echo 127.0.0.1 && echo other
"""


# notes each run of the study; what main.py does is a program of the test's
PYTHON = """#!/bin/bash
case $1 in
    -c) [[ $2 == *ray* ]] && echo 1 || echo secret ;;
    *) printf '%s\\n' "${@:2}" > "$(mktemp "$BNQ_TEST_RUNS/XXXXXX")"; exec bash "$BNQ_TEST_STUDY" "${@:2}" ;;
esac
"""
# main.py with cells that cost nothing; the disk is full at the third one
FULL_DISK = """
import sys
import main, phases.baseline
from cheap_run import noise
from store import StoreError

def event(cell, computed, store):
    if computed == 2:
        raise StoreError("no space left on device")

phases.baseline.run = noise(event)
own = [each for each in sys.argv[1:] if not each.startswith(("run.executor=", "run.address="))]
sys.exit(main.main(own[:-1]))  # without the last --set, which is empty now
"""


@pytest.fixture
def script(tmp_path):
    """script(study, *arguments, **environment) -> (exit status, output, the arguments of each run of the study), of the
    whole script; `study` is what a shell does in place of main.py."""
    if shutil.which("bash") is None:
        pytest.skip("the script needs bash")
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", "exit 0"), ("scontrol", SCONTROL), ("python", PYTHON), ("activate", "")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "runs").mkdir()

    def run(study: str, *arguments: str, **more: str) -> tuple[int, str, list[list[str]]]:
        (tmp_path / "study").write_text(study)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN", "RAY"))},
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "nodes-of-the-job",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1", "HEAD_IP": "127.0.0.1",
            "BNQ_TEST_RUNS": str(tmp_path / "runs"), "BNQ_TEST_STUDY": str(tmp_path / "study"), **more,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "scripts/slurm.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=240,
        )  # fmt: skip
        runs = [path.read_text().splitlines() for path in (tmp_path / "runs").iterdir()]
        return done.returncode, done.stdout + done.stderr, runs

    return run


@pytest.fixture
def job(tmp_path):
    """start() -> the job's process; whatever is left of it is ended."""
    if not (Path(sys.prefix) / "bin" / "activate").exists() or shutil.which("bash") is None:
        pytest.skip("the script needs bash and a virtual environment")
    mark = f"BNQ_SLURM_{uuid.uuid4().hex}"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    config = {**TINY, "data": {**TINY["data"], "cache": str(tmp_path / "cache")}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN", "RAY"))},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "nodes-of-the-job", "SLURM_JOB_NUM_NODES": "2",
        "BNQ_TEST_OPTIONS": str(tmp_path / "options"), "TMPDIR": "/tmp", mark: "1",
    }  # fmt: skip
    jobs = []

    def end() -> None:
        """As Slurm does with the steps of a job that has ended, but that those which go on have less time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_marked(mark):
                with contextlib.suppress(ProcessLookupError):  # another one has taken it along
                    os.kill(pid, number)
            if number == signal.SIGTERM:
                try:
                    until(lambda: not processes_marked(mark), 5)
                except AssertionError:
                    continue
                return

    def start(number: int) -> subprocess.Popen:
        command = ["bash", "scripts/slurm.sh", "--config", str(tmp_path / "tiny.yaml"), "--device", "cpu", "--quiet"]
        with (tmp_path / f"out{number}").open("w") as out:
            jobs.append(
                subprocess.Popen(
                    [*command, "--results-dir", str(tmp_path / "results")],
                    cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
                    env={**environment, "SLURM_JOB_ID": str(uuid.uuid4().int % 20000)},
                )
            )  # fmt: skip
        return jobs[-1]

    start.end = end
    yield start
    end()
    for each in jobs:
        each.wait(30)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two Rays on one machine")
def test_a_job_that_ends_too_soon_and_the_same_one_again(job, tmp_path):
    pytest.importorskip("ray")
    results = tmp_path / "results"
    first = job(1)
    until(lambda: first.poll() is not None or len(list((results / "cells").glob("*.json"))) >= 1, 180)
    first.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
    status, told = first.wait(60), (tmp_path / "out1").read_text()
    assert status == 143 and "terminated; finished cells are kept: run the same command again to go on" in told
    kept = {path: path.stat().st_mtime_ns for path in (results / "cells").glob("*.json")}
    assert 1 <= len(kept) < 20 and not (results / ".lock.json").exists()
    job.end()
    assert job(2).wait(240) == 0, (tmp_path / "out2").read_text()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    rows = pd.concat(pd.read_csv(results / f"{phase}_results.csv") for phase in PHASES[:3])
    assert len(rows) == 20 and set(rows["status"]) == {"done"}
    assert (results / "analysis" / "summary.md").exists()
    options = (tmp_path / "options").read_text().split()
    assert options.count("--nodes=1") == 4 and options.count("--exclude=127.0.0.1") == 2


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_a_study_is_run_once_however_it_ends(status, script):
    """The status 2 of a run that has worked for hours, on a disk that is full by then, is no reason to begin again."""
    told, output, runs = script(f"exit {status}", "--fresh", "--config", "a file.yaml")
    assert told == status, output
    (run,) = runs
    assert run[:7] == ["--phase", "all", "--wait", "200", "--fresh", "--config", "a file.yaml"]
    assert run[7:9] == ["--set", "run.executor=ray"] and len(run) == 10


def test_fresh_clears_once_and_what_was_computed_since_is_kept(script, tmp_path):
    """A real run, behind a job that was killed and whose folder is free soon, to a disk that fills up."""
    config, results = write_config(tmp_path, seeds=2), tmp_path / "results"
    assert run_here(config, results) == 0
    store, names = Store(results), cells_of(config)
    before = {name: store.record_path(name).stat().st_mtime_ns for name in names}
    killed = dataclasses.replace(Owner.this_process(), host="node17", pid=4711)
    (results / ".lock.json").write_text(json.dumps(dataclasses.asdict(killed)))
    last = time.time() - SILENCE + 15
    os.utime(results / ".lock.json", (last, last))
    (tmp_path / "full.py").write_text(FULL_DISK)
    paths = f"{ROOT}:{ROOT / 'tests'}"
    study = f'PYTHONPATH={paths} exec {sys.executable} {tmp_path / "full.py"} "$@"'
    arguments = ("--phase", "baseline", "--config", str(config), "--results-dir", str(results), "--quiet", "--fresh")
    status, output, runs = script(study, *arguments)
    assert status == 2 and "error: no space left on device; leave --fresh out then" in output, output
    assert len(runs) == 1
    assert "waiting for 200 seconds at most: " in output and "process 4711 on node17" in output
    assert [store.is_done(name) for name in names] == [True, True, False, False, False, False]
    assert all(store.record_path(name).stat().st_mtime_ns > before[name] for name in names[:2])


@pytest.mark.parametrize("spelt", ["--fresh", "--fres", "--f"])
def test_a_job_that_slurm_requeues_does_not_clear_again(spelt, script):
    """Slurm starts the script again with the same arguments where a node dies."""
    arguments = ("--config", "a file.yaml", spelt, "--set", "training.epochs=2", "--device", "cpu")
    status, output, (run,) = script("exit 0", *arguments, SLURM_RESTART_COUNT="1")
    assert status == 0 and f"without {spelt}" in output
    assert run[4:-3] == [each for each in arguments if each != spelt]


def test_a_first_start_does_clear(script):
    assert "--fresh" in script("exit 0", "--fresh", SLURM_RESTART_COUNT="0")[2][0]


def test_the_script_is_a_program_of_bash():
    assert subprocess.run(["bash", "-n", "scripts/slurm.sh"], cwd=ROOT).returncode == 0
    assert os.access(ROOT / "scripts" / "slurm.sh", os.X_OK)
