"""Artifacts: atomic writes that survive errors and kills, records before tables, missing is empty and never 0."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import store as store_module
from evaluation import Predictions
from store import (
    DEPLOYED_COLUMNS,
    GROUP_COLUMNS,
    ROW_COLUMNS,
    SCHEMA_VERSION,
    MissingArtifactError,
    Store,
    StoreError,
    Table,
    atomic_path,
    seed_for,
    short_hash,
    write_bytes,
    write_errors,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent

DESIGN_METRICS = [
    "accuracy",
    "balanced_accuracy",
    "worst_group_accuracy",
    "accuracy_gap",
    "demographic_parity_difference",
    "disparate_impact",
    "equalized_odds_difference",
    "equalized_odds_mean",
    "equal_opportunity_difference",
    "predictive_equality_difference",
    "predictive_parity_difference",
]
DESIGN_COLUMNS = [
    *["cell", "phase", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options"],
    *["baseline_cell", "status", "error", "n_test"],
    *DESIGN_METRICS,
    *("worst_group", "groups_left_out"),
    *(f"{metric}_ci_{end}" for metric in DESIGN_METRICS for end in ("low", "high")),
    *(f"delta_{metric}" for metric in DESIGN_METRICS),
    *["size_mb", "compression", "engine", "latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b32", "throughput"],
    *["calibration_seconds", "training_seconds", "agreement"],
]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    store.prepare("results_dir: results\n")
    return store


def row(cell: str, phase: str = "quantization", **columns) -> dict:
    return {"cell": cell, "phase": phase, "dataset": "synthetic", "seed": 0, "status": "done", **columns}


def predictions(n: int = 40) -> Predictions:
    rng = np.random.default_rng(5)
    return Predictions(
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.integers(0, 3, n),
        {"gender": rng.integers(0, 2, n), "age group": rng.integers(0, 4, n)},
        rng.permutation(n) + 7,
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def dead_process() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


# -------------------------------------------------------------------------------------------------------- atomic writes


def test_a_failure_in_the_middle_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # os.replace is atomic only inside one file system
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["table.csv"]


def test_a_write_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "table.csv"
    write_bytes(path, b"a long first version")
    write_bytes(path, b"short")
    assert path.read_bytes() == b"short"
    assert files_in(tmp_path) == ["a/b/table.csv"]


def test_the_data_is_synced_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "x", "data")
    assert calls == ["fsync", "replace", "fsync"]  # the file, the new name, the folder that holds the name


def test_an_error_says_where_and_what_to_do_in_one_line(tmp_path):
    path = tmp_path / "x.csv"
    with pytest.raises(StoreError) as caught, write_errors(path):
        raise OSError(28, "No space left on device")
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be written (No space left on device); ")
    assert "run the same command again" in message
    assert "\n" not in message


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from store import StoreError, write_bytes
folder = Path({folder!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # the next bytes cannot be written
write_bytes(folder / "small", b"s" * 4096)
try:
    write_bytes(folder / "file", b"n" * 4097)
except StoreError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_real_write_error_is_a_store_error_and_the_old_file_stays(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    script = LIMITED.format(root=str(ROOT), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 7, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"{tmp_path / 'file'}: cannot be written (File too large); ")
    assert files_in(tmp_path) == ["file", "small"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "small").stat().st_size == 4096


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            write_text(tmp_path / "x", "data")
        with pytest.raises(StoreError, match="cannot be written"):
            Store(tmp_path / "results").prepare("")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "results").prepare("")
    assert (tmp_path / "results").read_text() == "a file"


def test_json_has_null_for_what_is_not_finite_and_plain_numbers(tmp_path):
    value = {
        "nan": math.nan,
        "inf": [np.inf, -math.inf],
        "np": np.float32(0.5),
        "int": np.int64(3),
        4: (None, "é", True),
    }
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None, "inf": [None, None], "np": 0.5, "int": 3, "4": [None, "é", True],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ opening and preparing


def test_opening_changes_nothing(tmp_path):
    Store(tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_prepare_saves_the_config_and_the_environment_and_keeps_results(store):
    store.write_cell(row("c"), [])
    store.prepare("results_dir: other\n")
    assert (store.root / "config.yaml").read_text() == "results_dir: other\n"
    environment = json.loads((store.root / "environment.json").read_text())
    assert environment["schema_version"] == SCHEMA_VERSION
    assert environment["packages"]["numpy"] == np.__version__
    assert environment["cpu_count"] == os.cpu_count()
    assert store.is_done("c") is False  # its predictions are not there
    assert store.record("c")["row"]["cell"] == "c"


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "unknown"])
def test_a_folder_of_another_schema_is_refused_and_both_versions_named(store, version):
    write_json(store.root / "environment.json", {"schema_version": version} if version != "unknown" else {})
    with pytest.raises(StoreError) as caught:
        Store(store.root)
    assert f"schema {version}" in str(caught.value)
    assert f"reads {SCHEMA_VERSION}" in str(caught.value)
    assert str(store.root) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"<html></html>"])
def test_an_unreadable_environment_is_refused(store, content):
    (store.root / "environment.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"environment.json: cannot be read"):
        Store(store.root)


@pytest.mark.parametrize("folder", ["", "cells", "predictions", "checkpoints", "models", "analysis", "analysis/tables"])
def test_temporaries_of_dead_runs_are_removed_and_those_of_live_ones_stay(store, folder):
    place = store.root / folder
    place.mkdir(parents=True, exist_ok=True)
    dead = place / f".c.json.{dead_process()}.tmp"
    live = place / f".c.json.{os.getppid()}.tmp"
    foreign = place / ".editor.tmp"
    for path in (dead, live, foreign):
        path.write_text("half")
    store.prepare("")
    assert [path.exists() for path in (dead, live, foreign)] == [False, True, True]


def test_a_temporary_is_named_after_its_process(tmp_path):
    with atomic_path(tmp_path / "c.json") as temporary:
        temporary.write_text("")
        assert store_module.TEMPORARY.fullmatch(temporary.name)[1] == str(os.getpid())


# ----------------------------------------------------------------------------------------------------- cells and tables


def test_columns_are_those_of_the_design():
    assert set(DESIGN_COLUMNS) <= set(ROW_COLUMNS)
    assert len(ROW_COLUMNS) == len(set(ROW_COLUMNS))
    metrics = {*DESIGN_METRICS, "worst_group", "groups_left_out"}
    deployed = {f"deployed_{name}" for name in metrics}
    intersectional = {f"intersectional_{name}" for name in metrics - {"accuracy", "balanced_accuracy"}}
    assert set(ROW_COLUMNS) - set(DESIGN_COLUMNS) == deployed | intersectional
    assert {"agreement", *deployed} == set(DEPLOYED_COLUMNS)
    assert {"cell", "attribute", "group", "n", "positives", "accuracy", "selection_rate"} <= set(GROUP_COLUMNS)


def test_a_cell_is_done_with_record_and_predictions(store):
    assert not store.is_done("c")
    assert store.record("c") is None
    store.write_predictions("c", predictions())
    assert not store.is_done("c")  # the record is the marker
    store.write_cell(row("c"), [])
    assert store.is_done("c")
    store.write_cell(row("c", status="failed", error="no"), [])
    assert not store.is_done("c")


def test_a_row_outside_the_schema_is_a_bug(store):
    with pytest.raises(AssertionError, match="acuracy"):
        store.write_cell(row("c", acuracy=1.0), [])
    assert store.record("c") is None


def test_clear_forgets_the_record_first(store, monkeypatch):
    store.write_predictions("c", predictions())
    store.write_cell(row("c"), [])
    store.write_cell(row("other"), [])
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **kw: (removed.append(path.parent.name), unlink(path, **kw)))
    store.clear(["c", "never there"])
    assert removed[0] == "cells"
    assert not store.predictions_path("c").exists()
    assert [cell for cell, _ in store.records()] == ["other"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", b"{}", b"[1, 2]", b'{"row": {}}', b"<html>"])
def test_an_unreadable_record_is_refused_by_name(store, content):
    store.record_path("c").write_bytes(content)
    for use in (store.record, store.is_done, lambda cell: list(store.records())):
        with pytest.raises(StoreError, match=r"c\.json: cannot be read .*delete it"):
            use("c")


def test_tables_hold_one_record_at_a_time(store):
    """What they take is that of their rows, not of all that the records hold."""
    for number in range(100):
        store.write_cell(row(f"c{number}"), [], {"notes": ["x" * 100_000]})
    tracemalloc.start()
    try:
        store.write_tables("quantization", [])
        store.write_group_table([])
        store.write([store.extra_table("few", "absent", ["x"])], [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000  # the notes alone are 10 MB


def test_all_tables_are_written_in_one_pass_over_the_records(store, monkeypatch):
    extra = {"few": [{"x": 1, "deployed_b": 0.1 + 0.2, "deployed_a": None}, {"x": None, "deployed_a": "a, b"}]}
    for cell in ("a", "b", "c"):
        store.write_cell(row(cell, accuracy=0.5), [{"cell": cell, "n": 3}], extra if cell == "b" else {})
    read, record = [], store.record
    monkeypatch.setattr(store, "record", lambda cell: read.append(cell) or record(cell))
    is_few = lambda record: "few" in record["extra"]  # noqa: E731
    tables = [
        store.phase_table("quantization"), store.phase_table("mitigation"), store.group_table(),
        store.extra_table("few", "few", ["x"], is_few, prefix="deployed_"),
        store.extra_table("nobody", "nobody", ["x"], lambda record: False), store.extra_table("empty", "empty", ["x"]),
    ]  # fmt: skip
    store.write(tables, ["c", "b", "c"])
    assert read == ["c", "b", "a"]
    assert (store.root / "few.csv").read_text() == (f'cell,x,deployed_a,deployed_b\nb,1,,{0.1 + 0.2!r}\nb,,"a, b",\n')
    assert (store.root / "empty.csv").read_text() == "cell,x\n"
    assert not (store.root / "nobody.csv").exists() and not store.results_path("mitigation").exists()
    assert not store.results_path("mitigation", "json").exists()
    assert store.read_group_table()["cell"].tolist() == store.read_table("quantization")["cell"].tolist() == list("cba")


def ends_well_but_for(path: Path):
    end = store_module._TableWriter.end

    def ends(writer):
        end(writer)
        if writer.table.path == path:
            with write_errors(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return ends


def test_a_table_that_cannot_be_written_leaves_all_as_they_were(store, monkeypatch):
    store.write_cell(row("a"), [{"cell": "a", "n": 3}])
    store.write_group_table([])
    store.write_tables("quantization", [])
    before = {path: path.read_bytes() for path in store.root.iterdir() if path.is_file()}
    store.write_cell(row("b"), [{"cell": "b", "n": 3}])

    def fails(record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    broken = Table(store.root / "broken.csv", ["x"], fails)
    with pytest.raises(StoreError, match=r"broken\.csv: cannot be written"):
        store.write([store.phase_table("quantization"), store.group_table(), broken], [])
    monkeypatch.setattr(store_module._TableWriter, "end", ends_well_but_for(store.root / "group_results.csv"))
    with pytest.raises(StoreError, match=r"group_results\.csv: cannot be written"):
        store.write([store.phase_table("quantization"), store.group_table()], [])
    assert {path: path.read_bytes() for path in store.root.iterdir() if path.is_file()} == before


def test_tables_have_planned_cells_first_and_in_their_order(store):
    for cell in ("a", "b", "z", "m"):
        store.write_cell(row(cell), [])
    store.write_cell(row("base", "baseline"), [])
    store.write_tables("quantization", ["z", "not computed yet", "a"])
    assert list(store.read_table("quantization")["cell"]) == ["z", "a", "b", "m"]
    assert [entry["cell"] for entry in json.loads(store.results_path("quantization", "json").read_text())] == list(
        "zabm"
    )
    assert [cell for cell, _ in store.records("baseline")] == ["base"]


def test_missing_is_empty_and_null_and_never_zero(store):
    store.write_cell(row("c", accuracy=0.0, disparate_impact=math.nan, strategy=None, worst_group="None"), [])
    store.write_cell(row("d", accuracy=0.25, disparate_impact=0.5), [])
    assert store.record("c")["row"]["disparate_impact"] is None
    store.write_tables("quantization", ["c", "d"])
    line = store.results_path("quantization").read_text().splitlines()[1].split(",")
    written = dict(zip(ROW_COLUMNS, line, strict=True))
    assert (written["accuracy"], written["disparate_impact"], written["strategy"], written["size_mb"]) == (
        "0.0",
        "",
        "",
        "",
    )
    frame = store.read_table("quantization")
    assert list(frame.columns) == list(ROW_COLUMNS)
    assert math.isnan(frame["disparate_impact"][0]) and frame["disparate_impact"][1] == 0.5
    assert frame["accuracy"][0] == 0.0
    assert frame["worst_group"][0] == "None"  # a group of that name is not a missing value
    entry = json.loads(store.results_path("quantization", "json").read_text())[0]
    assert entry["accuracy"] == 0.0
    assert not {"disparate_impact", "strategy", "size_mb"} & entry.keys()


def test_tables_are_the_same_bytes_whatever_the_order_of_computing(store, tmp_path):
    other = Store(tmp_path / "other")
    other.prepare("")
    group = {"cell": "a", "attribute": "race", "group": "NA", "n": 3}
    for place, order in ((store, "ab"), (other, "ba")):
        for cell in order:
            place.write_cell(row(cell, accuracy=1 / 3), [group | {"cell": cell}])
        place.write_tables("quantization", ["a", "b"])
        place.write_group_table(["a", "b"])
    for name in ("quantization_results.csv", "quantization_results.json", "group_results.csv"):
        assert (store.root / name).read_bytes() == (other.root / name).read_bytes()
    assert store.read_table("quantization")["accuracy"][0] == 1 / 3  # every digit is kept
    groups = store.read_group_table()
    assert list(groups.columns) == list(GROUP_COLUMNS)
    assert list(groups["group"]) == ["NA", "NA"]  # a name, not a missing value


def test_a_missing_or_damaged_table_says_which_phase_makes_it(store):
    with pytest.raises(MissingArtifactError, match=r"python main\.py --phase mitigation"):
        store.read_table("mitigation")
    with pytest.raises(MissingArtifactError, match=r"python main\.py --phase baseline"):
        store.read_group_table()
    store.results_path("mitigation").write_bytes(b"")
    with pytest.raises(StoreError, match="not a readable results file"):
        store.read_table("mitigation")


# ---------------------------------------------------------------------------------------------------------- predictions


def test_predictions_survive_and_are_the_same_bytes(store):
    given = predictions()
    store.write_predictions("c", given)
    first = store.predictions_path("c").read_bytes()
    saved = store.predictions("c")
    for name in ("y_true", "logits", "index"):
        np.testing.assert_array_equal(getattr(saved, name), getattr(given, name))
        assert getattr(saved, name).dtype == getattr(given, name).dtype
    assert saved.sensitive.keys() == given.sensitive.keys()
    for name, codes in given.sensitive.items():
        np.testing.assert_array_equal(saved.sensitive[name], codes)
    np.testing.assert_array_equal(saved.y_pred, given.logits.argmax(axis=1))
    store.write_predictions("c", saved)
    assert store.predictions_path("c").read_bytes() == first
    with zipfile.ZipFile(store.predictions_path("c")) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_truncated_predictions_are_refused_at_every_length(store):
    store.write_predictions("c", predictions(12))
    path = store.predictions_path("c")
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match=r"c\.npz: not a readable predictions file"):
            store.predictions("c")


def test_damaged_predictions_are_refused_or_read_right(store):
    given = predictions(12)
    store.write_predictions("c", given)
    path = store.predictions_path("c")
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            saved = store.predictions("c")
        except StoreError:
            refused += 1
            continue
        np.testing.assert_array_equal(saved.logits, given.logits)  # else the byte was not part of the data
        np.testing.assert_array_equal(saved.y_true, given.y_true)
        np.testing.assert_array_equal(saved.index, given.index)
    assert refused > len(content) / 3 / 2


def test_foreign_and_missing_predictions(store):
    with pytest.raises(MissingArtifactError, match="missing"):
        store.predictions("c")
    path = store.predictions_path("c")
    path.write_text("<html></html>")
    with pytest.raises(StoreError, match="not a readable"):
        store.predictions("c")
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(StoreError, match="not a readable"):
        store.predictions("c")
    with path.open("wb") as file:
        np.savez(file, y_true=np.arange(3), index=np.arange(3), logits=np.array([{"code": 1}], dtype=object))
    with pytest.raises(StoreError, match="not a readable"):  # a pickle is not loaded
        store.predictions("c")
    with path.open("wb") as file:
        np.savez(file, y_true=np.arange(3), index=np.arange(3))
    with pytest.raises(StoreError, match="logits"):
        store.predictions("c")


# ----------------------------------------------------------------------------------------------------------- identities


def test_short_hash_is_of_the_canonical_json():
    value = {"b": [1, 2.5, None, True], "a": "é"}
    assert short_hash(value) == hashlib.sha256(rb'{"a":"\u00e9","b":[1,2.5,null,true]}').hexdigest()[:10]
    # echo -n '{"a":1}' | sha256sum
    assert short_hash({"a": 1}) == "015abd7f5c"
    assert short_hash({"b": 1, "a": 2}) == short_hash({"a": 2, "b": 1}) != short_hash({"a": 2, "b": "1"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        short_hash({"a": math.nan})


def test_seed_for_is_a_hash_of_the_names():
    digest = hashlib.sha256(b'["0", "synthetic", "resnet50", "batches"]').digest()
    expected = int.from_bytes(digest[:8], "big") // 2
    assert seed_for(0, "synthetic", "resnet50", "batches") == expected
    # echo -n '["a"]' | sha256sum | cut -c1-16, as a number, halved
    assert seed_for("a") == 0x0EB5B8D6F81BC677 // 2
    assert seed_for("ab", "c") != seed_for("a", "bc")  # names are kept apart
    assert all(0 <= seed_for(number) < 2**63 for number in range(50))
    assert len({seed_for(number, "x") for number in range(200)}) == 200


def test_hashes_are_the_same_in_another_process():
    script = "from store import *; print(short_hash({'x': [1, 'y']}), seed_for(3, 'x'))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert result.stdout.split() == [short_hash({"x": [1, "y"]}), str(seed_for(3, "x"))]


def test_the_group_table_keeps_whole_numbers(store):
    store.write_cell(row("c"), [{"cell": "c", "attribute": "race", "group": "Black", "n": 12, "positives": 0}])
    store.write_group_table(["c"])
    frame = pd.read_csv(store.root / "group_results.csv", dtype=str)
    assert (frame["n"][0], frame["positives"][0]) == ("12", "0")
