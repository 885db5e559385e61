"""When each cell of a study starts and ends on so many workers; the critical path; lower and upper bounds.

What the runner does is modelled: the cells of a phase in the order given, a free worker takes the first one that is
left, and a phase begins when the one before it is over (`barriers`). Without barriers a cell begins when the baseline
that it reads is there: what the same machines could do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    name: str
    phase: int  # the phases are 0, 1, 2, …
    seconds: float
    after: tuple[str, ...] = ()  # names of tasks of earlier phases whose results it reads


@dataclass(frozen=True)
class Schedule:
    makespan: float
    begin: dict[str, float]
    end: dict[str, float]
    worker: dict[str, int]


def schedule(tasks: Sequence[Task], workers: int, *, barriers: bool = True) -> Schedule:
    """List scheduling in the order of `tasks`, whose phases must not go down; what a task reads is before it.

    ValueError for no worker, a negative duration, or a task that reads what is not before it.
    """
    if workers < 1:
        raise ValueError(f"a schedule needs at least one worker, got {workers}")
    _check(tasks)
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    place: dict[str, int] = {}
    free = [(0.0, worker) for worker in range(workers)]  # when each worker is free
    heapq.heapify(free)
    floor, phase = 0.0, tasks[0].phase if tasks else 0
    waiting = list(tasks)
    while waiting:
        if barriers and waiting[0].phase != phase:
            floor, phase = max(end.values(), default=0.0), waiting[0].phase
        now, worker = heapq.heappop(free)
        now = max(now, floor)
        candidates = [task for task in waiting if task.phase == phase] if barriers else waiting
        ready = next((task for task in candidates if all(end.get(name, now + 1) <= now for name in task.after)), None)
        if ready is None:  # nothing can begin before another task ends
            heapq.heappush(free, (min(t for t in end.values() if t > now), worker))
            continue
        waiting.remove(ready)
        begin[ready.name], end[ready.name], place[ready.name] = now, now + ready.seconds, worker
        heapq.heappush(free, (end[ready.name], worker))
    return Schedule(max(end.values(), default=0.0), begin, end, place)


def critical_path(tasks: Sequence[Task], *, barriers: bool = True) -> tuple[float, list[str]]:
    """The longest time that no number of workers shortens, and the tasks that it is made of, in order."""
    _check(tasks)
    longest: dict[str, tuple[float, list[str]]] = {}
    phases: dict[int, tuple[float, list[str]]] = {}
    before: tuple[float, list[str]] = (0.0, [])
    for task in tasks:
        if barriers:
            earlier = [path for phase, path in phases.items() if phase < task.phase]
            before = max(earlier, key=lambda path: path[0], default=(0.0, []))
        else:
            before = max((longest[name] for name in task.after), key=lambda path: path[0], default=(0.0, []))
        longest[task.name] = (before[0] + task.seconds, [*before[1], task.name])
        if longest[task.name][0] > phases.get(task.phase, (-1.0, []))[0]:
            phases[task.phase] = longest[task.name]
    return max(longest.values(), key=lambda path: path[0], default=(0.0, []))


def _check(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    phase = tasks[0].phase if tasks else 0
    for task in tasks:
        if task.seconds < 0 or task.phase < phase or not set(task.after) <= seen or task.name in seen:
            raise ValueError(
                f"{task.name}: a negative duration, a phase out of order, or it reads what is not before it"
            )
        phase = task.phase
        seen.add(task.name)
