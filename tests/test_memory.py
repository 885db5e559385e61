"""Memory that cells free, in processes of their own: what is set of the C library cannot be unset."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from execution import memory

ROOT = Path(__file__).parent.parent
BLOCK = 96_000_000  # bytes, above what glibc may keep by itself
PAGES = BLOCK // os.sysconf("SC_PAGESIZE")
SCRIPT = """
import json, resource, sys
from pathlib import Path
from config import load_config
from execution import memory
from execution.cells import CellResult, Job, compute_cell
from plan import Cell
from store import Store

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def compute(cell, report):
    for _ in range(3):
        before = faults()
        block = bytes([1]) * BLOCK
        found["faults"].append(faults() - before)
        del block
    found["kept"] = resident()
    return CellResult({}, [])

found = {"faults": []}
store = Store(sys.argv[1])
store.prepare("")
job = Job(compute, load_config(None, []), sys.argv[1], "cpu", "token")
compute_cell(Cell("c", "baseline", "synthetic", "squeezenet1_1", 0, "fp32"), compute, job, lambda *_: None)
print(json.dumps(found | {"after": resident()}))
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(), reason="it is glibc's memory, by /proc"
)


def in_a_cell(results: Path, **environment: str) -> dict:
    kept = {name: value for name, value in os.environ.items() if name not in (*memory.VARIABLES, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", SCRIPT.replace("BLOCK", str(BLOCK)), str(results)]
    run = subprocess.run(command, cwd=ROOT, env=kept | environment, check=True, stdout=subprocess.PIPE, timeout=120)
    return json.loads(run.stdout)


@needs_glibc
def test_a_cell_gets_what_it_freed_without_page_faults_and_gives_it_back_at_its_end(tmp_path):
    found = in_a_cell(tmp_path)
    first, *later = found["faults"]
    assert first > 0.9 * PAGES
    assert max(later) < 0.1 * PAGES
    assert found["after"] < found["kept"] - 0.9 * BLOCK


@needs_glibc
@pytest.mark.parametrize(
    "environment", [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}]
)
def test_what_the_environment_says_of_memory_holds(tmp_path, environment):
    assert min(in_a_cell(tmp_path, **environment)["faults"]) > 0.9 * PAGES


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_of_glibc", lambda *_: None)
    for name in (*memory.VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert memory.keep_freed.__wrapped__() is False
    memory.give_back()
