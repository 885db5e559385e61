"""What cells share, sensitivities and what calibration images show: measured once, and no bit of a cell depends on who
did it."""

import dataclasses
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from config import load_config
from execution import quiet
from execution.run_log import RunLog
from models import build_model
from phases.shared import SharedSensitivity, SharedStatistics
from plan import plan
from quantizers import calibration, mixed_precision, ptq
from quantizers.observers import ActivationStatistics
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


def test_waiting_for_another_cell_is_not_a_cells_own_time(shared):
    make, cell, table = shared
    begun, goes_on = threading.Event(), threading.Event()

    def measure() -> Sensitivity:
        begun.set()
        assert goes_on.wait(60)
        return table

    measuring = threading.Thread(target=make().once, args=(cell, "f", measure))
    measuring.start()
    assert begun.wait(10)
    before = quiet.paused_seconds()
    silent = []

    def go_on() -> None:
        silent.append(quiet.silence(quiet._standstill))
        goes_on.set()

    threading.Timer(1.0, go_on).start()  # this thread waits by then, or a little later
    assert np.array_equal(make().once(cell, "f", lambda: pytest.fail("twice")).values_LWN, table.values_LWN)
    assert 0 < quiet.paused_seconds() - before < 60
    assert silent == [0.0]  # it ends by itself, and need not say that it gets on
    measuring.join()
    before = quiet.paused_seconds()
    make().once(cell, "another", lambda: time.sleep(0.3) or table)  # what it measures itself is
    assert quiet.paused_seconds() - before < 0.2


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


# ------------------------------------------------------------------------------------------------------ what was seen

OBSERVERS = ["minmax", "moving_average", "percentile", "mse", "entropy"]
SWEEP = (
    f"quantization.ptq_static.observer=[{', '.join(OBSERVERS)}]", "quantization.bit_widths=[8, 3]",
    "quantization.ptq_static.calibration_samples=16",
    "quantization.methods=[ptq_static, {method: ptq_static, equalize: true, observer: minmax}, mixed_precision]",
    "quantization.mixed_precision.sensitivity_samples=8", "quantization.mixed_precision.calibration_samples=16",
)  # fmt: skip


@pytest.fixture
def passes(monkeypatch) -> list[bool]:
    """Of each pass of the calibration images through the float network, whether it filled histograms."""
    seen, real = [], calibration._pass

    def counted(model, images, with_histogram):
        seen.append(with_histogram)
        return real(model, images, with_histogram)

    monkeypatch.setattr(calibration, "_pass", counted)
    return seen


def predictions_of(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((results / "predictions").iterdir())}


def test_one_pass_serves_all_observers_and_widths_and_changes_no_bit(trained, copy_of, passes, monkeypatch):
    config, together, alone = trained[0], copy_of("together"), copy_of("alone")
    assert run("quantization", config, together, *SWEEP) == 0
    assert passes == [True, True]  # of fourteen cells: as trained, and equalized
    assert len(list((together / "shared").glob("statistics-*.npz"))) == 2
    with monkeypatch.context() as patch:  # every cell for itself, as apply_quantization does it in a notebook
        patch.setattr(SharedStatistics, "of", lambda self, cell: None)
        assert run("quantization", config, alone, *SWEEP) == 0
    cells = plan(load_config(str(config), list(SWEEP)))["quantization"]
    assert len(cells) == 14 and len(passes) == 2 + 14 and not all(passes)
    assert predictions_of(together) == predictions_of(alone) and len(predictions_of(alone)) == 15
    # cells that are added later begin with nothing in memory, and read the file
    wider = [*SWEEP, "quantization.bit_widths=[8, 4, 3]"]
    assert run("quantization", config, together, *wider) == 0
    assert len(passes) == 2 + 14
    assert len(predictions_of(together)) == 15 + 7


def test_the_seconds_of_a_pass_count_for_every_cell_that_needs_it(trained, copy_of, monkeypatch):
    config, results = trained[0], copy_of("results")
    real = calibration._pass

    def slow(*arguments, **options):
        time.sleep(5.0)
        return real(*arguments, **options)

    monkeypatch.setattr(calibration, "_pass", slow)
    assert run("quantization", config, results, "quantization.methods=[ptq_static]") == 0
    cells = plan(load_config(str(config), ["quantization.methods=[ptq_static]"]))["quantization"]
    seconds = [Store(results).record(cell.id)["row"]["calibration_seconds"] for cell in cells]
    took = {entry["cell"]: entry["seconds"] for entry in RunLog(Store(results)).read()}
    assert len(seconds) == 2 and all(value > 5.0 for value in seconds)
    assert took[cells[0].id] > 5.0 and took[cells[1].id] < seconds[1]  # who did not make it


@pytest.mark.parametrize("with_histogram", [False, True])
@pytest.mark.parametrize("is_silent", [False, True])
def test_what_was_seen_comes_back_to_the_last_bit(with_histogram, is_silent):
    generator = torch.Generator().manual_seed(0)
    seen = ActivationStatistics("x", with_histogram)
    for n in (16, 16, 5):
        x = torch.randn(n, 3, 7, generator=generator).relu_() * 37
        seen.observe(torch.zeros_like(x) if is_silent else x)
    kept = {name: array.copy() for name, array in seen.arrays().items()}
    again = ActivationStatistics.from_arrays("x", kept)
    assert again.bounds() == seen.bounds() and again.images == 37 and again.is_silent() == is_silent
    for observer in OBSERVERS if with_histogram else ["minmax", "moving_average"]:
        for bits in (2, 4, 8):
            for is_symmetric in (False, True):
                arguments = (observer, bits, 99.0, is_symmetric)
                assert again.range(*arguments) == seen.range(*arguments)
    assert {name: array.tolist() for name, array in again.arrays().items()} == {
        name: array.tolist() for name, array in kept.items()
    }


def test_a_damaged_pass_is_made_again(trained, copy_of, passes):
    config, results = trained[0], copy_of("results")
    assert run("quantization", config, results, "quantization.methods=[ptq_static]") == 0
    (path,) = (results / "shared").glob("statistics-*.npz")
    with np.load(path) as arrays:
        kept = dict(arrays)
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", _without(kept, "0.lows"), _without(kept, "names")):
        path.write_bytes(damaged)
        del passes[:]
        for cell in (results / "cells").glob("*ptq_static*"):
            cell.unlink()
        assert run("quantization", config, results, "quantization.methods=[ptq_static]") == 0
        assert len(passes) == 1
        with np.load(path) as arrays:
            assert all(np.array_equal(arrays[name], kept[name]) for name in kept if name != "seconds")


def _without(arrays: dict[str, np.ndarray], name: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in arrays.items() if key != name})
    return buffer.getvalue()


def test_the_name_holds_the_parameters_and_the_images(trained, copy_of):
    config, results = load_config(str(trained[0]), []), copy_of("results")
    cell, images = plan(config)["quantization"][0], torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def name(bits=8, recipe=None, change=None, images=images) -> str:
        model = ptq.attach(
            build_model("test_resnet", 2, 32, seed=0), images, "ptq_static", bits, bits, recipe or ptq.Recipe()
        )
        if change is not None:
            change(model)
        return SharedStatistics(Store(results), "cpu", 1).path(cell, model, images).name

    def nudge(model) -> None:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-6

    assert name() == name(bits=3) == name(recipe=ptq.Recipe(observer="minmax", rounding="adaround"))
    names = [
        name(),
        name(recipe=ptq.Recipe(equalize=True)),
        name(change=nudge),
        name(images=images[:3]),
        name(images=images + 1e-6),
    ]
    assert len(set(names)) == len(names)
