"""The sensitivity table that mixed-precision cells share: measured once, and no bit of a cell depends on who did it."""

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import main
from config import load_config
from phases.shared import SharedSensitivity
from plan import plan
from quantizers import mixed_precision
from quantizers.sensitivity import Sensitivity
from store import TIMING_COLUMNS, Store

CONFIG = {
    "data": {
        "dataset": "synthetic",
        "min_group_size": 5,
        "synthetic": {
            "target": "smile",
            "sensitive": ["gender", "skin"],
            "train_images": 96,
            "validation_images": 32,
            "test_images": 64,
        },
    },
    "models": {"architectures": ["test_resnet"]},
    "training": {"epochs": 1, "learning_rate": 0.003},
    "quantization": {
        "bit_widths": [8, 3],
        "ptq_static": {"calibration_samples": 32},
        "methods": [
            {"method": "mixed_precision", "sensitivity_samples": 8, "calibration_samples": 16},
            {"method": "mixed_precision", "sensitivity_samples": 8, "calibration_samples": 16, "rounding": "adaround",
             "reconstruction_iterations": 2, "bit_widths": [3]},
        ],
    },
    "mitigation": {"strategies": [{"strategy": "fair_mixed_precision", "sensitivity_samples": 16,
                                   "calibration_samples": 16}]},
    "analysis": {"bootstrap_replicates": 100},
    "deployment": {"cells": [], "export": []},
    "run": {"threads_per_cell": 1},
}  # fmt: skip


class Counted:
    """measure_sensitivity, counting."""

    def __init__(self):
        self.calls, self.real = 0, mixed_precision.measure_sensitivity

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.real(*arguments, **options)


@pytest.fixture
def counted(monkeypatch) -> Counted:
    counter = Counted()
    monkeypatch.setattr(mixed_precision, "measure_sensitivity", counter)
    return counter


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(config file, results) with the baseline alone; each test works on a copy of the results."""
    folder = tmp_path_factory.mktemp("shared")
    config = json.loads(json.dumps(CONFIG))
    config["data"]["cache"] = str(folder / "cache")
    (folder / "config.yaml").write_text(json.dumps(config))
    assert run("baseline", folder / "config.yaml", folder / "results") == 0
    return folder / "config.yaml", folder / "results"


@pytest.fixture
def copy_of(trained, tmp_path):
    return lambda name: shutil.copytree(trained[1], tmp_path / name)


def run(phase: str, config: Path, results: Path, *overrides: str) -> int:
    arguments = ["--phase", phase, "--config", str(config), "--results-dir", str(results), "--device", "cpu", "--quiet"]
    return main.main([*arguments, *(["--set", *overrides] if overrides else [])])


def what_was_found(results: Path, cell: str) -> tuple:
    """Of a cell: the bytes of its predictions, its row but for times, its sensitivities and widths."""
    store = Store(results)
    record = store.record(cell)
    row = {key: value for key, value in record["row"].items() if key not in TIMING_COLUMNS}
    tables = json.dumps([row, record["extra"]["sensitivity"], record["extra"]["widths"]], sort_keys=True)
    return store.predictions_path(cell).read_bytes(), tables


def test_one_measurement_serves_all_cells_and_a_cell_alone_gives_the_same(trained, copy_of, counted):
    config, together, alone = trained[0], copy_of("together"), copy_of("alone")
    assert run("quantization", config, together) == 0
    assert counted.calls == 1  # of three cells
    assert run("mitigation", config, together) == 0
    assert counted.calls == 2  # of two cells on another draw of images
    for phase in ("quantization", "mitigation"):
        assert run(phase, config, alone, "quantization.bit_widths=[3]") == 0
    assert counted.calls == 4
    cells = plan(load_config(str(config), []))
    assert [len(cells[phase]) for phase in ("quantization", "mitigation")] == [3, 2]
    for cell in (*cells["quantization"], *cells["mitigation"]):
        if cell.weight_bits == 3:
            assert what_was_found(alone, cell.id) == what_was_found(together, cell.id)
    # cells that are added later begin with nothing in memory, and read the file
    assert run("quantization", config, alone) == 0
    assert counted.calls == 4
    for cell in cells["quantization"]:
        assert what_was_found(alone, cell.id) == what_was_found(together, cell.id)


@pytest.fixture
def shared(trained, copy_of):
    """make() -> a SharedSensitivity with nothing in memory, of one results folder; the cell; a table."""
    config, results = load_config(str(trained[0]), []), copy_of("results")
    values = np.random.default_rng(0).random((3, 2, 5), dtype=np.float32)
    table = Sensitivity(("a", "b.c", "d"), (2, 16), values, np.arange(6).reshape(3, 2), "kl", 1.5)
    return lambda: SharedSensitivity(Store(results), "cpu", 1), plan(config)["quantization"][0], table


def test_of_cells_at_the_same_time_one_measures_and_the_others_wait(shared):
    make, cell, table = shared
    begun, calls = threading.Event(), []

    def measure() -> Sensitivity:
        calls.append(threading.current_thread().name)
        begun.set()
        time.sleep(0.5)
        return table

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(make().once, cell, "f", measure)
        assert begun.wait(10)
        others = [make() for _ in range(3)]
        found = [pool.submit(other.once, cell, "f", measure) for other in others]
        assert first.result().layers == table.layers
        assert all(np.array_equal(each.result().values_LWN, table.values_LWN) for each in found)
    assert len(calls) == 1 and all(other.spent > 0.2 for other in others)
    assert [path.suffix for path in make().path(cell, "f").parent.iterdir()] == [".npz"]


def test_a_measurement_that_fails_blocks_nobody(shared):
    make, cell, table = shared
    with pytest.raises(MemoryError):
        make().once(cell, "f", lambda: (_ for _ in ()).throw(MemoryError()))
    assert make().once(cell, "f", lambda: table) is table


def test_a_results_folder_that_is_gone_is_not_made_again(shared):
    make, cell, table = shared
    one = make()
    path = one.path(cell, "f")
    shutil.rmtree(one.store.root)
    one.path = lambda *_: path
    assert one.once(cell, "f", lambda: table) is table and not one.store.root.exists()


def test_a_table_comes_back_as_it_was(shared):
    make, cell, table = shared
    assert make().load(cell, "f") is None
    make().keep(cell, "f", table)
    found = make().load(cell, "f")
    assert (found.layers, found.widths, found.metric, found.seconds) == (table.layers, table.widths, "kl", 1.5)
    for name in ("values_LWN", "bytes_LW"):
        assert np.array_equal(getattr(found, name), getattr(table, name))
        assert getattr(found, name).dtype == getattr(table, name).dtype
    for one in (make(), make()):
        assert one.load(cell, "of other data") is None
        assert one.load(cell, "f") is not None and one.load(cell, "of other data") is None  # whatever is in memory
    content = make().path(cell, "f").read_bytes()
    make().path(cell, "f").unlink()
    make().keep(cell, "f", table)
    assert make().path(cell, "f").read_bytes() == content  # whoever writes it


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "one byte", "of other layers"])
def test_a_damaged_file_is_as_none_and_is_written_again(shared, damage):
    make, cell, table = shared
    make().keep(cell, "f", table)
    path = make().path(cell, "f")
    whole = path.read_bytes()
    at = whole.index(table.values_LWN.tobytes())
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "foreign": b"PK\x03\x04" + bytes(100),
            "one byte": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "of other layers": b"",
        }[damage]
    )
    if damage == "of other layers":
        make().keep(cell, "f", dataclasses.replace(table, layers=("a",)))
    assert make().load(cell, "f") is None
    make().keep(cell, "f", table)
    assert path.read_bytes() == whole


def test_a_file_in_the_way_costs_nothing_but_time(shared):
    make, cell, table = shared
    one = make()
    (one.store.root / "shared").write_text("a file in the way")
    one.keep(cell, "f", table)
    assert one.load(cell, "f") is table and make().load(cell, "f") is None
    assert (one.store.root / "shared").read_text() == "a file in the way"


def test_the_name_holds_what_determines_the_table(trained, copy_of):
    """Neither the width nor the rounding; but the checkpoint, the data, the draw, the settings and the threads."""
    config, results = load_config(str(trained[0]), []), copy_of("results")
    cells = plan(config)
    first, *rest = cells["quantization"]

    def name(cell=first, fingerprint="f", device="cpu", threads=1) -> str:
        return SharedSensitivity(Store(results), device, threads).path(cell, fingerprint).name

    assert {name(cell) for cell in rest} == {name()}
    metric = plan(load_config(str(trained[0]), ["quantization.mixed_precision.sensitivity_metric=loss"]))
    names = [name(), name(cells["mitigation"][0]), name(fingerprint="g"), name(device="cuda"), name(threads=2)]
    names.append(name(metric["quantization"][0]))
    checkpoint = Store(results).checkpoint_path(first.dataset, first.model, first.seed)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\x01")
    names.append(name())
    assert len(set(names)) == len(names)
