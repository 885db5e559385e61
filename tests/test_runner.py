"""What a run writes as it goes."""

from types import SimpleNamespace

import pytest

import runner
from config import Config
from execution.cells import CellResult
from plan import plan
from runner import TABLE_SECONDS, TABLE_SHARE, Report, run_cells
from store import Store


def no_compute(config, store, device, data):
    return lambda cell, report: CellResult({"accuracy": 0.5}, [])


@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_tables_take_a_small_share_of_a_run(seconds, tmp_path, monkeypatch):
    """However long it takes to write them; and they are no older than that allows."""
    config = Config.model_validate({"run": {"seeds": list(range(150))}, "models": {"architectures": ["resnet50"]}})
    store = Store(tmp_path)
    store.prepare("")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock.now))
    written = []

    def write_tables(phase, planned):
        clock.now += seconds
        written.append(clock.now)

    monkeypatch.setattr(store, "write_tables", write_tables)
    write_cell = store.write_cell

    def one_second_later(*arguments):
        clock.now += 1.0
        write_cell(*arguments)

    monkeypatch.setattr(store, "write_cell", one_second_later)
    cells = plan(config)["baseline"]
    assert len(cells) == 150
    run_cells("baseline", cells, no_compute, config, store, Report(quiet=True))
    between = [after - before for before, after in zip([0.0, *written[:-2]], written[:-1], strict=True)]
    pause = max(TABLE_SECONDS, seconds / TABLE_SHARE)
    assert between and all(gap >= pause for gap in between[1:])  # the first one's cost is not known before
    assert max(between) <= pause + 1.0 + 2 * seconds
    assert written[-1] == clock.now  # the end of the run has them whole
