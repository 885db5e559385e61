"""Nodes of Ray that are lost while a study runs, and a Ray that is not there. The nodes are processes of this machine.

Workers import this module, and no torch: they are there within a second or two.
"""

import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from config import ConfigError, load_config
from execution import ray_executor
from execution.cells import CellResult
from plan import Cell
from runner import Report, run_cells
from store import Store


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def made_up(name: str) -> Cell:
    return Cell(name, "quantization", "synthetic", "m", 0, "ptq_static")


def staying(config, store, device, data=None):
    """A computation that notes the node it is on, and stays there until it may end."""
    import ray

    def compute(cell: Cell, report) -> CellResult:
        with (store.root / f"{cell.id}.nodes").open("a") as file:
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        until((store.root / f"{cell.id}.end").exists)
        return CellResult({"accuracy": 0.5, "n_test": 4}, [])

    return compute


@pytest.fixture(scope="module")
def cluster():
    """A head with room for one thread; a node that dies without a word is missed within a second or two."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find this module
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: behind the tests that another process runs
        patch.setenv("RAY_health_check_initial_delay_ms", "100")
        patch.setenv("RAY_health_check_period_ms", "100")
        for name in ("ray._private.utils.write_ray_address", "ray._common.utils.reset_ray_address"):
            patch.setattr(name, lambda *_: None, raising=False)  # that of a Ray which is no test's
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield found
        ray.shutdown()  # of a run that a test has left
        found.shutdown()


def lose(cluster, node) -> None:
    """As where it is preempted: with kill -9."""
    cluster.remove_node(node, allow_graceful=False)


class Run(Report):
    """Cells on the cluster, computed in the background."""

    def __init__(self, cluster, folder: Path, *settings: str):
        super().__init__(quiet=True)
        self.store, self.result = Store(folder), Future()
        self.warned: list[str] = []  # what was told of nodes
        self.store.prepare("")
        self.config = load_config(None, ["run.executor=ray", f"run.address={cluster.address}", *settings])
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        try:
            with self.on(self.config, "cpu"):
                run_cells("quantization", [made_up("one"), made_up("two")], staying, self.config, self.store, self)
            self.result.set_result(None)
        except BaseException as error:
            self.result.set_exception(error)

    def told(self, cell: str, kind: str, *values) -> None:
        super().told(cell, kind, *values)
        if "no node of Ray" in values[0]:
            self.warned.append(values[0])

    def nodes(self, name: str) -> list[str]:
        """Where each attempt of a cell began."""
        path = self.store.root / f"{name}.nodes"
        return path.read_text().split() if path.exists() else []

    def let_end(self, name: str) -> None:
        (self.store.root / f"{name}.end").touch()

    def done(self) -> set[str]:
        records = {name: self.store.record(name) for name in ("one", "two")}
        return {name for name, record in records.items() if record is not None and record["row"]["status"] == "done"}


def test_a_cell_of_a_lost_node_is_computed_on_another_one(cluster, tmp_path, capsys):
    lost = cluster.add_node(num_cpus=1)
    run = Run(cluster, tmp_path, "run.threads_per_cell=1")
    until(lambda: run.nodes("one") and run.nodes("two"))
    moved, stayed = sorted(("one", "two"), key=lambda name: run.nodes(name) != [lost.node_id])
    lose(cluster, lost)
    run.let_end(moved)
    run.let_end(stayed)
    run.result.result(60)
    head = cluster.head_node.node_id
    assert run.nodes(moved) == [lost.node_id, head] and run.nodes(stayed) == [head]
    assert run.done() == {"one", "two"} and run.warned == []
    out = capsys.readouterr().out
    assert out.count("; it is tried again") == 1 and f"  {moved}: its worker " in out


def test_cells_wait_for_another_node_and_not_for_ever(cluster, tmp_path, monkeypatch):
    """The last node that has room for one is lost: a line says so, and the run goes on when another one comes. Where
    none does it ends in one line, with what is finished."""
    monkeypatch.setattr(ray_executor, "LOOK_SECONDS", 0.2)
    large = cluster.add_node(num_cpus=2)
    run = Run(cluster, tmp_path, "run.threads_per_cell=2", "run.retries=2")
    until(lambda: run.nodes("one") or run.nodes("two"))
    second, first = sorted(("one", "two"), key=run.nodes)
    run.let_end(first)
    until(lambda: run.nodes(second))
    lose(cluster, large)
    until(lambda: run.warned)
    time.sleep(0.5)  # it is not told at each look
    monkeypatch.setattr(ray_executor, "LOOK_SECONDS", 60.0)
    another = cluster.add_node(num_cpus=2)
    until(lambda: len(run.nodes(second)) == 2)
    assert len(run.warned) == 1
    monkeypatch.setattr(ray_executor, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(ray_executor, "NO_NODE_SECONDS", 1.0)
    lose(cluster, another)
    lack = r"a cell takes 2 CPUs and 0 GPUs, and no node of Ray has them \(there are: 1 CPUs and 0 GPUs\)"
    with pytest.raises(ConfigError, match=f"^run.executor: .*: {lack}; .* run the same command again$") as ended:
        run.result.result(60)
    assert "\n" not in str(ended.value)
    assert len(run.warned) == 2 and "for 30 minutes at most" in run.warned[0]
    assert run.nodes(second) == [large.node_id, another.node_id]
    assert run.done() == {first} and not run.store.record_path(second).exists()


LATE = "The current node timed out during startup. This could happen because\nsome of the raylet failed to startup."
FULL = OSError(28, "No space left on device", "/tmp/ray")
TOKEN = RuntimeError("Token authentication is enabled,\nand there is no token.")


def not_there(folder: Path, *settings: str) -> str:
    """The one line that a run ends with which gets no Ray."""
    store = Store(folder)
    store.prepare("")
    config = load_config(None, ["run.executor=ray", *settings])
    with pytest.raises(ConfigError) as ended:
        run_cells("quantization", [made_up("one")], staying, config, store, Report(quiet=True))
    assert "\n" not in str(ended.value) and "run the same command again" in str(ended.value)
    return str(ended.value)


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        ([], Exception(LATE), "run.executor: Ray cannot be started: Exception: The current node timed out during "),
        ([], FULL, "run.executor: Ray cannot be started: OSError: [Errno 28] No space left on device: '/tmp/"),
        (["run.address=auto"], TOKEN, "run.address: Ray cannot be reached (auto): RuntimeError: Token authentication "),
    ],
    ids=["late", "full", "token"],
)
def test_a_ray_that_cannot_be_had_is_one_line(settings, error, line, tmp_path, monkeypatch):
    """Whatever ray.init raises."""

    def fail(**options):
        raise error

    monkeypatch.setattr(pytest.importorskip("ray"), "init", fail)
    assert not_there(tmp_path, *settings).startswith(line)


def test_an_address_at_which_nobody_listens_is_one_line(tmp_path, monkeypatch):
    """Ray itself would try for ten minutes."""
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_executor, "ADDRESS_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    start = time.monotonic()
    line = not_there(tmp_path, f"run.address={address}")
    assert line.startswith(f"run.address: Ray cannot be reached ({address}): ConnectionRefusedError: ")
    assert 0.5 <= time.monotonic() - start < 10
