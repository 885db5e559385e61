"""Cells as tasks of Ray, which places them on the nodes and GPUs of a cluster, and starts workers anew.

The project's folder, data and results must have the same paths on all nodes (a shared file system): workers import the
project from there, by PYTHONPATH, and work in the folder that the program was started in. What cells tell on their way
comes back through an actor, which Ray starts again where it dies: what it held is not told then. A cell of a lost
worker or node is submitted again here, not by Ray's max_retries: nobody is told of those, and the clock of
run.cell_timeout would run on while the cell waits for another place. An attempt that was lost before its cell began
(the worker was killed, or could not import torch) tells nothing of the cell, and is not one of run.retries.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config, ConfigError
from execution import cells as cell_work
from execution import executors, quiet
from execution.cells import FATAL, Compute, Job, Outcome, PoisonedError, one_line
from execution.executors import (
    THREAD_VARIABLES,
    Clock,
    Ended,
    check_gpus,
    died,
    is_overdue,
    lost_attempt,
    lost_outcome,
    timed_out,
)
from execution.run_log import worker_name
from plan import Cell

ROOT = Path(__file__).parent.parent
ADDRESS_SECONDS = 30.0  # that a Ray which is just being started has until it listens
RAY_SECONDS = 0.25  # between two looks at what cells tell
PROGRESS_SECONDS = 1.0  # between two messages of how far a cell is, each of which is a call of three processes
ACTOR_SECONDS = 10.0  # that the actor has for an answer, until cells go on being looked at without
STANDSTILL_SECONDS = 1.0  # between two messages of a cell that stands still
HEARD_SECONDS = 5.0  # past its limit, after which a cell that stood still would have been heard
CANCEL_SECONDS = 60.0  # after that, until a worker that does not end is given up
NO_ROOM_SECONDS = 600.0  # that cells wait for places, where such workers hold some
LOOK_SECONDS = 60.0  # that nothing is at work and cells wait, until the nodes are looked at; and between two looks
NO_NODE_SECONDS = 1800.0  # that cells wait for another node, where those that could compute them are lost
STARTED_SECONDS = 5.0  # between two messages that a cell has started: one may be lost with the actor
RAISED_STARTS = 8  # times in a row, with pauses two minutes: a worker that imports from a slow disk is there by then


class Ray:
    """Without `run.address` a local cluster of `run.jobs` cells, which is ended again; where this program is connected
    to a Ray already, that one is used and stays."""

    is_here = False

    def __init__(self, config: Config, device: str):
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("run.executor: ray is not installed; pip install -r requirements-ray.txt")
        self.settings = config.run
        self.gpus = config.run.gpus_per_cell if device == "cuda" else 0.0
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        variables = dict.fromkeys(THREAD_VARIABLES, str(config.run.threads_per_cell))
        self.environment = {"env_vars": variables | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
        self.events: Any = None  # the actor; None: not connected yet
        self.asked: Any = None  # the answer of it that is waited for
        self.is_mine = False  # the connection
        self.given_up = 0  # workers that did not end, and hold their places
        self.failed_starts = 0  # in a row
        self.has_worked = False  # any cell has begun: what keeps another one from it may pass
        self.start_again = 0.0  # when (monotonic) cells that did not begin are submitted again
        self.at_work = 0.0  # when (monotonic) a cell was last being computed
        self.looked = 0.0  # when the nodes were last looked at
        self.no_node: float | None = None  # since when no node could compute a cell; None: one can

    def run(self, job: Job, compute: Compute | None, cells: Sequence[Cell], report: Any) -> Iterator[Ended]:
        if not cells:
            return
        import ray

        try:
            yield from self._run(job, cells, report)
        except ray.exceptions.RayError as error:
            why = f"{_shortened(one_line(error))}; finished cells are kept: run the same command again to go on"
            raise ConfigError(f"run.executor: Ray failed: {why}") from None

    def _run(self, job: Job, cells: Sequence[Cell], report: Any) -> Iterator[Ended]:
        import ray

        self._connect()
        task = ray.remote(
            num_cpus=self.settings.threads_per_cell,
            num_gpus=self.gpus,
            max_retries=0,
            # a process has the GPU that it first used for good, and memory on it; the next cell may be given another
            max_calls=1 if self.gpus else 0,
            **self._imports(),
        )(_ray_cell)
        # as bytes, so that what it imports is imported in the task: see _opened
        shared = ray.put(ray.cloudpickle.dumps(job))

        def submit(cells: Sequence[_RayCell]) -> None:
            running.update({task.remote(shared, of.cell, self.events, of.submitted): of for of in cells})

        running: dict[Any, _RayCell] = {}
        waiting: list[_RayCell] = []  # until a worker may begin again
        by_id = {cell.id: _RayCell(cell) for cell in cells}
        submit(list(by_id.values()))
        timeout = self.settings.cell_timeout
        self.at_work, self.no_node = time.monotonic(), None
        try:
            while running or waiting:
                if waiting and time.monotonic() >= self.start_again:
                    submit(waiting)
                    waiting = []
                ended = self._ended(running)
                self._drain(by_id, report)
                for ref in ended:
                    of = running.pop(ref)
                    outcome = self._outcome(ref, of)
                    if outcome is not None:
                        del by_id[of.cell.id]  # what it still tells is late
                        yield of.cell, outcome
                    elif self._is_again_at_once(job, of, running.values(), report):
                        submit([of])
                    else:
                        waiting.append(of)
                for ref, of in list(running.items()):
                    if not of.is_late and is_overdue(of.cell, of.clock, timeout, report, HEARD_SECONDS):
                        of.is_late, of.cancelled = True, time.monotonic()
                        ray.cancel(ref, force=True)
                    if of.is_late and time.monotonic() > of.cancelled + CANCEL_SECONDS:  # it cannot even be killed
                        del running[ref], by_id[of.cell.id]
                        self.given_up, self.at_work = self.given_up + 1, time.monotonic()
                        yield of.cell, self._timed_out(of)
                if ended or any(of.has_started for of in running.values()):
                    self.at_work, self.no_node = time.monotonic(), None
                elif running:
                    self._check_places(next(iter(running.values())).cell, report)
        finally:
            for ref in running:
                with contextlib.suppress(ray.exceptions.RayError):  # it would hide why the run ends
                    ray.cancel(ref, force=True)

    @staticmethod
    def _ended(running: Mapping[Any, _RayCell]) -> list[Any]:
        """All that have ended within a moment: what is left has not."""
        import ray

        if not running:  # cells wait until they may begin
            time.sleep(RAY_SECONDS)
            return []
        return ray.wait(list(running), num_returns=len(running), timeout=RAY_SECONDS)[0]

    def close(self) -> None:
        if self.events is None:
            return
        import ray

        if self.is_mine:
            ray.shutdown()
        else:
            ray.kill(self.events)
        self.events = self.asked = None

    def _connect(self) -> None:
        if self.events is not None:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.is_mine = not ray.is_initialized()
        if self.is_mine:
            options: dict[str, Any] = {"address": self.settings.address}
            if self.settings.address is None:
                cpus = self.settings.jobs * self.settings.threads_per_cell
                options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
                os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: behind all that Ray itself does
            try:
                _check_address(self.settings.address or "")
                with _same_termination():
                    ray.init(**options, log_to_driver=False, logging_level="ERROR", runtime_env=self.environment)
            except Exception as error:  # whatever Ray raises: of a node that does not start, a bare Exception
                raise ConfigError(self._not_there(error)) from None
        self._check_room()
        # on this node: it is lost with this program, and not with a worker's node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
        self.events = ray.remote(_Events).options(**options, **self._imports()).remote()

    def _imports(self) -> dict[str, Any]:
        """Options of what Ray starts, which finds this project thereby. A connection of ours has given them to all; one
        that was there may have been made from any folder."""
        return {} if self.is_mine else {"runtime_env": self.environment}

    def _not_there(self, error: Exception) -> str:
        """Why there is no Ray, which itself says so at length, and what to do."""
        why = textwrap.shorten(one_line(error), 300, placeholder=" …").removesuffix(".")
        address = self.settings.address
        if address is None:
            return (
                f"run.executor: Ray cannot be started: {why}; free memory and room in /tmp, and run the same command "
                "again (Ray's logs: /tmp/ray/session_latest/logs), or do without it: run.executor=processes"
            )
        return (
            f"run.address: Ray cannot be reached ({address}): {why}; look there with ray status, start it with ray "
            "start --head where it does not run, and run the same command again"
        )

    def _check_room(self) -> None:
        """ConfigError where no node could ever compute a cell, which would wait for one for ever."""
        check_gpus(self.gpus)
        if lack := self._lack():
            raise ConfigError(f"run.threads_per_cell, run.gpus_per_cell: {lack}; lower them, or start such a node")

    def _lack(self) -> str | None:
        """What is wrong where no living node could compute a cell, were it free."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": float(self.settings.threads_per_cell), "GPU": self.gpus}
        if any(all(node.get(kind, 0.0) >= number for kind, number in wanted.items()) for node in nodes):
            return None
        most = dict.fromkeys(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        return (
            f"a cell takes {wanted['CPU']:g} CPUs and {self.gpus:g} GPUs, and no node of Ray has them "
            f"(there are: {', '.join(most)})"
        )

    def _check_places(self, cell: Cell, report: Any) -> None:
        """Cells wait, such as this one, and none is being computed. ConfigError where it has been so for long, and they
        would wait for ever: workers that were given up hold the places, or the nodes that had them are lost, of which a
        line tells before: an autoscaler may start others, or whoever reads it."""
        now = time.monotonic()
        if self.given_up and now > self.at_work + NO_ROOM_SECONDS:
            raise ConfigError(
                f"run.executor: {self.given_up} workers that cannot be ended hold places of Ray, and nothing "
                "has started for a while; finished cells are kept: start Ray anew and run the same command "
                "again"
            )
        if now < max(self.at_work, self.looked) + LOOK_SECONDS:
            return
        self.looked, lack = now, self._lack()
        if lack is None:  # it is taken, or a worker starts there
            self.no_node = None
        elif self.no_node is None:
            self.no_node = now
            until = f"cells wait for such a node, for {NO_NODE_SECONDS / 60:g} minutes at most"
            report.told(cell.id, "line", f"Ray, at {time.strftime('%H:%M')}: {lack}; {until}")
        elif now > self.no_node + NO_NODE_SECONDS:
            raise ConfigError(
                f"run.executor: Ray has lost its nodes for cells: {lack}; finished cells are kept: start such a node "
                "and run the same command again"
            )

    def _drain(self, by_id: dict[str, _RayCell], report: Any) -> None:
        """Pass on what cells have told."""
        for cell, attempt, kind, *values in self._told():
            of = by_id.get(cell)
            if of is None or attempt != of.submitted:  # it has ended, or was lost
                continue
            if kind == "started":
                worker, elapsed = values
                if of.has_started:  # it says so again and again
                    continue
                of.worker, of.has_started = worker, True
                self.failed_starts, self.has_worked = 0, True
                of.clock.begin(self.settings.cell_timeout, elapsed)
                report.begin(cell)
            elif kind in ("poisoned", "unable"):
                of.reason, of.trace = values
            elif kind == "standstill":
                of.clock.add_pause(*values)
            else:
                of.clock.add_pause(values.pop())
                report.told(cell, kind, *values)

    def _told(self) -> list[tuple]:
        """What cells have told; nothing where the actor is lost, or does not answer yet since it is started again. One
        that can never be started is an error: of no cell would be known that it began, nor that it is late."""
        import ray

        if self.asked is None:
            self.asked = self.events.drain.remote()
        answered, _ = ray.wait([self.asked], timeout=ACTOR_SECONDS)
        if not answered:
            return []
        answer, self.asked = self.asked, None
        try:
            return ray.get(answer)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise
            return []

    def _outcome(self, ref: Any, of: _RayCell) -> Outcome | None:
        """What became of a task; None: it was lost, and is to be tried again.

        One that raised is one whose worker died, as it does under `processes`: what a cell raises is in its outcome, so
        that it is of our own code or of what this worker could not import, and the others may compute cells well.
        """
        import ray

        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:
            of.how = type(error).__name__
            if isinstance(error, ray.exceptions.RayTaskError):
                of.how, of.has_raised = _shortened(one_line(error.cause or error)), True
            if of.is_late:
                return self._timed_out(of)
            if not of.has_started:
                return None
            of.attempts += 1
            if of.attempts <= self.settings.retries:
                return None
            return of.lost_outcome(died(of.why_lost(), of.attempts))
        if isinstance(result, Exception):
            raise result
        self.failed_starts, self.has_worked = 0, True  # though it was not heard that it began
        return result

    def _is_again_at_once(self, job: Job, of: _RayCell, others: Iterable[_RayCell], report: Any) -> bool:
        """Whether a cell that was lost is submitted again now, or after a pause."""
        cell_work.unmark(job, of.cell)
        has_started = of.has_started
        if has_started:
            report.lost(of.lost_attempt())
        else:
            self._not_started(of, any(other.has_started for other in others), report)
        of.submitted_again()
        return has_started

    def _not_started(self, of: _RayCell, is_any_at_work: bool, report: Any) -> None:
        """It is submitted again after a pause, twice as long each time; what fails until then counts once, since Ray
        starts many at once. ConfigError where no cell is being computed and it is no use: nothing has begun yet and
        workers raise, as where a package is missing, or too many fail."""
        if time.monotonic() < self.start_again:
            return
        self.failed_starts += 1
        has_raised = of.has_raised or of.reason is not None
        most = RAISED_STARTS if has_raised and not self.has_worked else executors.FAILED_STARTS
        if self.failed_starts >= most and not is_any_at_work:
            raise ConfigError(
                f"run.executor: ray: no cell can be begun: {of.why_lost()}; finished cells are kept: run the same "
                "command again to go on"
            )
        pause = min(executors.START_PAUSE * 2.0 ** min(self.failed_starts - 1, 10), executors.LONGEST_PAUSE)
        self.start_again = time.monotonic() + pause
        report.told(of.cell.id, "line", f"Ray: a cell was not begun: {of.why_lost()}; tried again in {pause:g} s")

    def _timed_out(self, of: _RayCell) -> Outcome:
        return of.lost_outcome(timed_out(self.settings.cell_timeout, of.clock))


def _shortened(text: str, most: int = 500) -> str:
    """Without its middle: an import that failed is told of at the end."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _check_address(address: str) -> None:
    """OSError where nobody listens at host:port: Ray itself would try for many minutes, and say much meanwhile."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    until = time.monotonic() + ADDRESS_SECONDS
    while port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), ADDRESS_SECONDS).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(RAY_SECONDS)


@contextlib.contextmanager
def _same_termination() -> Iterator[None]:
    """ray.init makes SIGTERM an exit of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@dataclass(eq=False)
class _RayCell:
    """A cell that was submitted."""

    cell: Cell
    clock: Clock = field(default_factory=Clock)
    worker: str | None = None  # not known before it has started
    has_started: bool = False
    submitted: int = 0  # times before this one
    attempts: int = 0  # that began, and were lost
    how: str = ""  # what Ray calls it
    has_raised: bool = False
    is_late: bool = False
    cancelled: float = 0.0  # when (monotonic), where it is late
    reason: str | None = None  # why its worker ended itself
    trace: str | None = None

    def why_lost(self) -> str:
        return self.reason or f"its worker{f' {self.worker}' if self.worker else ''} died ({self.how})"

    def lost_attempt(self) -> dict:
        return lost_attempt(self.cell, self.why_lost(), **self._known())

    def lost_outcome(self, error: Exception) -> Outcome:
        return lost_outcome(self.cell, error, **self._known())

    def _known(self) -> dict:
        """What the log says of it; while a cell waits for a place no time is spent on it."""
        if not self.has_started:
            return {"start": None}
        return {"start": self.clock.start, "paused": self.clock.pause, "worker": self.worker, "trace": self.trace}

    def submitted_again(self) -> None:
        self.clock, self.worker, self.has_started = Clock(), None, False
        self.reason = self.trace = None
        self.has_raised, self.submitted = False, self.submitted + 1


class _Events:
    """What cells tell, in a process of its own, until it is asked for."""

    def __init__(self):
        self.held: list[tuple] = []

    def put(self, event: tuple) -> None:
        self.held.append(event)

    def drain(self) -> list[tuple]:
        held, self.held = self.held, []
        return held


@contextlib.contextmanager
def _told_standstill(send: Any) -> Iterator[Any]:
    """The memory for quiet.computing; meanwhile a thread tells for how long the cell stands still, which tells nothing
    itself then, so that this time is not taken for its own. Not from the handler of the signal that makes it stand
    still: it comes at any moment, also in the midst of another message. It also tells now and then that the cell has
    started, and when, without which its time would have no limit."""
    standstill = list(quiet.ON_THE_CLOCK)
    ended = threading.Event()
    start = said = time.monotonic()

    def watch() -> None:
        nonlocal said
        told = 0.0
        while not ended.wait(STANDSTILL_SECONDS):
            if (now := time.monotonic()) - said >= STARTED_SECONDS:
                send("started", worker_name(), now - start)
                said = now
            if (seconds := quiet.standing(standstill)) > told:
                send("standstill", seconds, quiet.silence(standstill))
                told = seconds

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield standstill
    finally:
        ended.set()
        watching.join()


def _ray_cell(job: bytes, cell: Cell, events: Any, attempt: int) -> Outcome | Exception:
    """A task: the outcome, or what ends the program."""
    import ray

    def send(*event: Any) -> Any:
        return events.put.remote((cell.id, attempt, *event))

    progress = 0.0  # when (monotonic) it was last told

    def tell(kind: str, *values: Any) -> None:
        nonlocal progress
        if kind == "progress":
            if (now := time.monotonic()) < progress + PROGRESS_SECONDS:
                return
            progress = now
        send(kind, *values, quiet.paused_seconds())

    def tell_now(*event: Any) -> None:
        """Wait until it is told; not by ray.get, which gives the cell's CPUs to another one meanwhile."""
        with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):  # a cell is worth more than what it tells
            send(*event).future().result(ACTOR_SECONDS)

    opened = _opened(job, tell_now)
    tell_now("started", worker_name(), 0.0)
    try:
        with _told_standstill(send) as standstill, quiet.computing(standstill=standstill):
            return cell_work.compute_cell(cell, cell_work.prepared(opened), opened, tell)
    except FATAL as error:
        return error
    except PoisonedError as error:
        tell_now("poisoned", f"{error} (its worker was thrown away)", error.trace)
        os._exit(1)


def _opened(job: bytes, tell: Any) -> Job:
    """The job, with what computes its cells imported, torch among it. A process in which that fails is thrown away:
    torch cannot be imported a second time, and a worker that fails at once would be given one cell after another."""
    try:
        return pickle.loads(job)
    except Exception as error:
        tell("unable", _shortened(f"its worker {worker_name()} could not begin: {one_line(error)}"), None)
        os._exit(1)
