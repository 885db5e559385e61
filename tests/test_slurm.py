"""scripts/slurm.sh as Slurm would run it, with two Rays on this machine for two nodes: srun and scontrol are stand-ins
that leave out where a step runs; everything else is real."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pandas as pd
import pytest
from test_executors import TINY, processes_marked, until

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
        """As Slurm does with the steps of a job that has ended."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_marked(mark):
                with contextlib.suppress(ProcessLookupError):  # another one has taken it along
                    os.kill(pid, number)
            if number == signal.SIGTERM:
                try:
                    until(lambda: not processes_marked(mark), 30)
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
    assert 1 <= len(kept) < 8 and not (results / ".lock.json").exists()
    job.end()
    assert job(2).wait(240) == 0, (tmp_path / "out2").read_text()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    rows = pd.concat(pd.read_csv(results / f"{phase}_results.csv") for phase in ("baseline", "quantization"))
    assert len(rows) == 8 and set(rows["status"]) == {"done"}
    assert (results / "analysis" / "summary.md").exists()
    options = (tmp_path / "options").read_text().split()
    assert options.count("--nodes=1") == 4 and options.count("--exclude=127.0.0.1") == 2


def test_the_script_is_a_program_of_bash():
    assert subprocess.run(["bash", "-n", "scripts/slurm.sh"], cwd=ROOT).returncode == 0
    assert os.access(ROOT / "scripts" / "slurm.sh", os.X_OK)
