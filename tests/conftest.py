"""What every test shares: two threads (or OMP_NUM_THREADS), a folder for temporary files that no other process of tests
has, and the folder of real images."""

import os
import shutil
import tempfile

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy and torch are imported
    os.environ.setdefault(_name, str(THREADS))

if _worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # its locks are the whole machine's (execution/quiet.py): cells of one test would stand still for another's
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())  # its sockets' names must be short
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"bnq-{_worker}-")
    os.chmod(tempfile.tempdir, 0o711)  # a test that becomes another user enters it

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)


def pytest_sessionfinish():
    if _worker:
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


FAIRFACE_VARIABLE = "BNQ_FAIRFACE_ROOT"


@pytest.fixture(scope="session")
def fairface_root() -> Path:
    """The folder of FairFace's official layout in BNQ_FAIRFACE_ROOT; skips where unset, fails where it is not there."""
    value = os.environ.get(FAIRFACE_VARIABLE)
    if not value:
        pytest.skip(f"{FAIRFACE_VARIABLE} is not set: no real images")
    root = Path(value)
    if not (root / "fairface_label_train.csv").is_file():
        pytest.fail(f"{FAIRFACE_VARIABLE}={value}, but {root / 'fairface_label_train.csv'} is not there", pytrace=False)
    return root.resolve()


@pytest.fixture(autouse=True)
def same_folder():
    """A test that leaves this process in another folder changes what those after it do, in whatever order they come."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before, f"the test has left this process in {after}: monkeypatch.chdir"
