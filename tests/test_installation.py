"""The installation check, run as a person runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import test_setup as check

ROOT = Path(__file__).parent.parent


def run(*command: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else os.environ
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def required() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {line.partition(">=")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def test_a_complete_installation_is_ready():
    result = run("test_setup.py")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "Ready to run experiments!"
    said = {line[:18].strip(): line[18:].strip() for line in lines[:-2]}
    assert required() | {"python", "device", "forward pass", "quantized forward", "deployment", "metric"} == said.keys()
    assert said["python"] == sys.version.split()[0]
    assert said["torch"] == check.metadata.version("torch")
    assert "at most 16 weight levels" in said["quantized forward"]
    assert "ONNX Runtime agrees" in said["deployment"]
    assert "Traceback" not in result.stderr


def test_a_package_that_cannot_be_imported_is_named_with_what_to_install(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('libtimm is not there')")
    # these two are slow to import and stand-ins will do: nothing but the import is tried before the check ends
    for module in ("fairlearn", "aif360"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
        (tmp_path / module / "metrics.py").touch()
    (tmp_path / "rich.py").write_text("import no_such_module")
    result = run("test_setup.py", path=tmp_path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert "problem: timm: ImportError: libtimm is not there" in lines
    assert "problem: rich: ModuleNotFoundError: No module named 'no_such_module'" in lines
    assert sum(line.startswith("problem: ") for line in lines) == 2
    assert lines[-1] == "Not ready. Install what is missing with: python -m pip install -r requirements.txt"
    assert "Ready to run" not in result.stdout
    assert "Traceback" not in result.stderr


def test_pytest_finds_no_tests_in_it_and_imports_it_without_effects():
    result = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "test_setup.py")
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout + result.stderr
    assert "Ready" not in result.stdout
    assert "error" not in result.stdout.lower()


def test_every_requirement_is_checked_with_its_lower_bound():
    assert check.PACKAGES.keys() == required() == check.requirements().keys()


def test_versions_compare_as_numbers():
    assert check.numbers("2.15.0+cpu") == (2, 15, 0)
    assert check.numbers("2.9") < check.numbers("2.11") < check.numbers("2.11.1") < check.numbers("10.0")
    assert check.numbers("2.11.0rc1")[:2] == (2, 11)


def test_an_old_package_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(check, "PACKAGES", {"numpy": "numpy", "rich": "rich"})
    monkeypatch.setattr(check.metadata, "version", lambda name: "1.26.4" if name == "numpy" else "99")
    assert check.check_packages() == [f"numpy 1.26.4: {check.requirements()['numpy']} or newer is needed"]
    assert "TOO OLD" in capsys.readouterr().out


def test_an_old_python_is_a_problem(monkeypatch):
    assert check.check_python() == []
    monkeypatch.setattr(check, "MINIMUM_PYTHON", (99, 0))
    assert check.check_python() == [f"Python {sys.version.split()[0]}: 99.0 or newer is needed"]


def test_what_a_check_raises_is_told_in_one_line():
    def check_forward():
        raise RuntimeError("out of\n memory")

    assert check.attempt(check_forward) == ["forward: RuntimeError: out of memory"]
