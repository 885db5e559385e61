"""Models measured on another data set: what corresponds, what is measured, adding it later, and every refusal."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import main
from config import ConfigError, load_config
from dataset_sources import FAIRFACE_AGES, FAIRFACE_VALUE_NAMES
from datasets import BatchLoader, load_dataset
from evaluation import predict
from group_mapping import correspondence
from models import build_model, load_checkpoint
from phases import cross_evaluate
from plan import Cell, plan
from store import Store

RACES = FAIRFACE_VALUE_NAMES["race"]
FACES = ["data.dataset=fairface", "evaluation.also_on=utkface"]


# ---------------------------------------------------------------------------------------------------- what corresponds


def test_races_ages_and_genders_of_fairface_and_utkface_correspond():
    mapping = correspondence(load_config(None, FACES), "fairface", "utkface")
    race, age = mapping.attributes
    assert mapping.primary is race and (race.home, race.abroad, age.name) == ("race", "race", "age_group")
    of_fairface = {name: race.groups[code] for name, code in zip(RACES, race.home_codes, strict=True)}
    assert of_fairface == {
        "White": "White", "Black": "Black", "Indian": "Indian", "East Asian": "Asian", "Southeast Asian": "Asian",
        "Latino_Hispanic": "Others", "Middle Eastern": "Others",
    }  # fmt: skip
    # UTKFace's codes are White, Black, Asian, Indian, Others
    assert [race.groups[code] for code in race.abroad_codes] == ["White", "Black", "Asian", "Indian", "Others"]
    assert mapping.class_codes.tolist() == [0, 1]  # male is first in both
    assert not race.tells_home_groups_apart and age.tells_home_groups_apart


def test_classes_are_matched_by_name_and_not_by_place():
    sets = ["data.dataset=synthetic", "evaluation.also_on=fairface", "data.synthetic.sensitive=[skin]"]
    sets += ["data.fairface.sensitive=[race]"]
    tones = {name: "dark" if name in ("Black", "Indian") else "light" for name in RACES}
    skin = {"synthetic": {"attribute": "skin", "names": {"light": "light", "dark": "dark"}}}
    skin["fairface"] = {"attribute": "race", "names": tones}
    mapping = correspondence(
        load_config(None, [*sets, f"evaluation.mappings.skin={json.dumps(skin)}"]), "synthetic", "fairface"
    )
    assert mapping.class_codes.tolist() == [1, 0]  # FairFace: Male, Female; synthetic: female, male
    assert mapping.primary.groups == ("light", "dark")
    assert mapping.primary.abroad_codes.tolist() == [int(name in ("Black", "Indian")) for name in RACES]


def test_an_entry_of_the_users_replaces_one_and_leaves_the_others():
    names = {name: "White" if name == "White" else "Others" for name in RACES}
    utkface = {"White": "White", "Black": "Others", "Asian": "Others", "Indian": "Others", "Others": "Others"}
    changed = {"fairface": {"attribute": "race", "names": names}, "utkface": {"attribute": "race", "names": utkface}}
    config = load_config(None, [*FACES, f"evaluation.mappings.race={json.dumps(changed)}"])
    assert correspondence(config, "fairface", "utkface").primary.groups == ("White", "Others")
    assert correspondence(config, "utkface", "fairface").attributes[1].name == "age_group"
    # one under a name of the user's comes before the built-in one
    config = load_config(None, [*FACES, f"evaluation.mappings.tone={json.dumps(changed)}"])
    assert correspondence(config, "fairface", "utkface").primary.name == "tone"


def utkface_races(**names: str) -> str:
    return "evaluation.mappings.race.utkface=" + json.dumps({"attribute": "race", "names": names})


EVERYONE = {name: name for name in ("White", "Black", "Asian", "Indian", "Others")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.utkface.target=age_group", "data.utkface.sensitive=[race]"],
            "utkface has target age_group and fairface gender, which do not correspond; set data.utkface.target",
        ),
        (
            ["data.utkface.sensitive=[age_group]"],
            "none of utkface's sensitive attributes (age_group) corresponds to fairface's race; add it to data.utkface",
        ),
        ([utkface_races(White="White")], "race.utkface.names: 'Black' of utkface's race is not mapped"),
        ([utkface_races(**EVERYONE, Wite="White")], "utkface's race has no 'Wite' (did you mean White?)"),
        (
            [utkface_races(**{**EVERYONE, "Asian": "Asians"})],
            "'Asian' (of fairface's race) is no common name in utkface (did you mean Asians?)",
        ),
        (
            ["evaluation.mappings.gender.utkface={attribute: gender, names: {male: man, female: female}}"],
            "evaluation.mappings.gender: 'male' (of fairface's gender) is no common name in utkface",
        ),
        (
            [
                "evaluation.mappings.gender.utkface={attribute: gender, names: {male: one, female: one}}",
                "evaluation.mappings.gender.fairface={attribute: gender, names: {Male: one, Female: one}}",
            ],
            "evaluation.mappings.gender: several classes of fairface's gender have one common name",
        ),
    ],
)
def test_what_does_not_correspond_is_refused_by_name(overrides, message, tmp_path, capsys):
    with pytest.raises(ConfigError) as refused:
        correspondence(load_config(None, [*FACES, *overrides]), "fairface", "utkface")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert main.main(["--phase", "baseline", "--results-dir", str(tmp_path / "r"), "--set", *FACES, *overrides]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r").exists()  # before anything is computed


def test_the_config_refuses_what_cannot_be_meant():
    with pytest.raises(ConfigError, match=r"also_on: fairface is the data set that the models are trained on"):
        load_config(None, ["data.dataset=fairface", "evaluation.also_on=fairface"])
    with pytest.raises(ConfigError, match=r"also_on\[0\]: unknown value 'utkfac' \(did you mean utkface\?\)"):
        load_config(None, ["evaluation.also_on=utkfac"])
    with pytest.raises(ConfigError, match=r"also_on: 'utkface' is there twice"):
        load_config(None, ["evaluation.also_on=[utkface, utkface]"])
    with pytest.raises(ConfigError, match=r"mappings.race.fairface.atribute: unknown key"):
        load_config(None, ["evaluation.mappings={race: {fairface: {atribute: race, names: {a: b}}}}"])
    with pytest.raises(ConfigError, match=r"data.utkface.sensitive: the target 'race' cannot"):
        load_config(None, [*FACES, "data.utkface.target=race"])
    both = load_config(None, ["data.dataset=[fairface, utkface]", "evaluation.also_on=[fairface, utkface]"])
    of = {name: cross_evaluate.wanted(Cell("c", "baseline", name, "m", 0, "none"), both) for name in both.data.dataset}
    assert of == {"fairface": ["utkface"], "utkface": ["fairface"]}


# ------------------------------------------------------------------------------------------------------- a small study


def make_faces(root):
    """FairFace's and UTKFace's layouts with noise that is redder for women; UTKFace's images are larger."""
    rng = np.random.default_rng(0)

    def save(path, is_woman: int, pixels: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 200, (pixels, pixels, 3))
        image[..., 0] += 14 * is_woman
        Image.fromarray(image.astype(np.uint8)).save(path)

    for part, n in (("train", 168), ("val", 112)):
        lines = ["file,age,gender,race,service_test"]
        for i in range(1, n + 1):
            woman = i // 7 % 2
            save(root / "fairface" / part / f"{i}.png", woman, 32)
            lines.append(f"{part}/{i}.png,{FAIRFACE_AGES[i % 9]},{('Male', 'Female')[woman]},{RACES[i % 7]},True")
        (root / "fairface" / f"fairface_label_{part}.csv").write_text("\n".join(lines) + "\n")
    for i in range(250):
        woman = i // 5 % 2
        save(root / "utkface" / f"{1 + 7 * i % 90}_{woman}_{i % 5}_{20170116000000000 + i}.png", woman, 48)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    make_faces(root)
    config = {
        "data": {
            "dataset": "fairface", "cache": str(root / "cache"), "min_group_size": 5,
            "fairface": {"root": str(root / "fairface"), "image_size": 32},
            "utkface": {"root": str(root / "utkface"), "image_size": 64, "test_share": 0.4},
        },
        "models": {"architectures": ["test_resnet"]},
        "training": {"epochs": 1, "learning_rate": 0.003},
        "quantization": {"bit_widths": [8, 2], "methods": ["ptq_static"], "ptq_static": {"calibration_samples": 32}},
        "mitigation": {"strategies": []},
        "analysis": {"bootstrap_replicates": 100},
        "deployment": {"cells": [], "export": [], "latency_repeats": 1},
        "evaluation": {"also_on": ["utkface"]},
        "run": {"threads_per_cell": 1},
    }  # fmt: skip
    (root / "study.yaml").write_text(json.dumps(config))
    return root


def study(data, results, *overrides, phase="all") -> int:
    sets = ["--set", *overrides] if overrides else []
    arguments = ["--config", str(data / "study.yaml"), "--results-dir", str(results), "--device", "cpu", "--quiet"]
    return main.main(["--phase", phase, *arguments, *sets])


def ask(data, results, capsys, *arguments, status=0) -> str:
    """What the command line tells."""
    capsys.readouterr()
    command = ["--config", str(data / "study.yaml"), "--results-dir", str(results), "--device", "cpu", "--quiet"]
    assert main.main([*command, *arguments]) == status
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(data):
    """A study that was not measured elsewhere at first, and then was: three cells."""
    results = data / "results"
    assert study(data, results, "evaluation.also_on=[]", phase="baseline") == 0
    assert study(data, results, "evaluation.also_on=[]", phase="quantization") == 0
    shutil.copytree(results, data / "before")
    assert study(data, results) == 0
    return results


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "results")


def cells_of(data):
    return [cell for block in plan(load_config(data / "study.yaml")).values() for cell in block]


def stamps(results, pattern):
    return {path.name: path.stat().st_mtime_ns for path in results.glob(pattern)}


def test_what_is_measured_abroad_is_what_the_model_predicts_there(data, finished):
    config, store = load_config(data / "study.yaml"), Store(finished)
    cell = cells_of(data)[0]
    model = build_model("test_resnet", 2, 32)
    load_checkpoint(store.checkpoint_path("fairface", "test_resnet", 0), model, {"cell": cell.id})
    section = config.data.utkface.model_copy(update={"image_size": 32})  # of the training data
    utkface = config.model_copy(update={"data": config.data.model_copy(update={"utkface": section})})
    split = load_dataset(utkface, "utkface").splits["test"]
    predicted = predict(model, BatchLoader(split, 50))
    saved = store.predictions(f"{cell.id}@utkface")
    np.testing.assert_allclose(saved.logits, predicted.logits, atol=1e-4)
    assert (saved.index == split.index).all() and (saved.y_true == split.labels).all()
    table = pd.read_csv(finished / "cross_dataset.csv").set_index("cell")
    assert list(table.index) == [each.id for each in cells_of(data)]
    for cell_id, row in table.iterrows():
        abroad, home = store.predictions(f"{cell_id}@utkface"), store.predictions(cell_id)
        assert (row["trained_on"], row["evaluated_on"], row["status"], row["attribute"]) == (
            "fairface", "utkface", "done", "race",
        )  # fmt: skip
        assert (row["n"], row["home_n"]) == (len(split), 112)
        correct = abroad.y_pred == abroad.y_true
        assert row["accuracy"] == pytest.approx(correct.mean())
        assert row["home_accuracy"] == pytest.approx((home.y_pred == home.y_true).mean())
        of_race = [correct[abroad.sensitive["race"] == code].mean() for code in range(5)]
        assert row["worst_group_accuracy"] == pytest.approx(min(of_race))
        assert row["accuracy_gap"] == pytest.approx(max(of_race) - min(of_race))
        asian = np.isin(home.sensitive["race"], [3, 4])  # East and Southeast Asian
        groups = pd.read_csv(finished / "cross_dataset_groups.csv", keep_default_na=False, na_values=[""])
        groups = groups[(groups["cell"] == cell_id) & (groups["attribute"] == "race")].set_index("group")
        assert groups["home_n"].to_dict() == {"White": 16, "Black": 16, "Asian": 32, "Indian": 16, "Others": 32}
        assert groups.loc["Asian", "home_accuracy"] == pytest.approx((home.y_pred == home.y_true)[asian].mean())
        assert groups.loc["Asian", "accuracy"] == pytest.approx(of_race[2])
        assert groups["n"].sum() == len(split)


def test_what_is_measured_later_leaves_the_results_at_home_as_they_were(data, finished):
    before = data / "before"
    assert not list((before / "predictions").glob("*@*")) and not (before / "cross_dataset.csv").exists()
    ids = {cell.id for cell in cells_of(data)}
    assert {path.stem for path in (finished / "cells").glob("*.json")} == ids  # nothing is another cell for it
    for cell in ids:
        old, new = (json.loads((root / "cells" / f"{cell}.json").read_text()) for root in (before, finished))
        assert old["row"] == new["row"] and old["groups"] == new["groups"]
        assert {**old["extra"], **{k: v for k, v in new["extra"].items() if k.startswith("cross_")}} == new["extra"]
        name = f"predictions/{cell}.npz"
        assert (before / name).read_bytes() == (finished / name).read_bytes()
        assert (before / name).stat().st_size and (finished / "predictions" / f"{cell}@utkface.npz").exists()
    checkpoint = next((before / "checkpoints").iterdir())
    assert (finished / "checkpoints" / checkpoint.name).read_bytes() == checkpoint.read_bytes()


def test_measured_at_once_or_later_is_the_same(data, finished, tmp_path):
    assert study(data, tmp_path / "r", phase="baseline") == 0
    assert study(data, tmp_path / "r", phase="quantization") == 0
    for cell in cells_of(data):
        name = f"predictions/{cell.id}@utkface.npz"
        assert (tmp_path / "r" / name).read_bytes() == (finished / name).read_bytes()
    for name in ("cross_dataset.csv", "cross_dataset_groups.csv"):
        assert (tmp_path / "r" / name).read_text() == (finished / name).read_text()


def test_nothing_is_computed_twice_and_what_is_lost_is_computed_again(data, copied, monkeypatch, capsys):
    monkeypatch.setattr("phases.cross_evaluate.predict", lambda *args: pytest.fail("predicted again"))
    assert study(data, copied, phase="baseline") == 0 and study(data, copied, phase="quantization") == 0
    monkeypatch.undo()
    quantized = cells_of(data)[1].id
    path = copied / "predictions" / f"{quantized}@utkface.npz"
    whole, cells = path.read_bytes(), stamps(copied, "cells/*.json")
    path.unlink()
    assert main.main(["--phase", "quantization", "--config", str(data / "study.yaml"), "--results-dir", str(copied),
                      "--dry-run"]) == 0  # fmt: skip
    assert f"measure {quantized}" in capsys.readouterr().out
    assert study(data, copied, phase="quantization") == 0
    assert path.read_bytes() == whole
    assert [name for name, at in stamps(copied, "cells/*.json").items() if at != cells[name]] == [f"{quantized}.json"]


def test_killed_between_the_predictions_and_the_record(data, copied, finished, monkeypatch):
    """What kill -9 leaves: predictions elsewhere that no record knows of. They are made again, the same."""
    cell = cells_of(data)[1].id
    record = copied / "cells" / f"{cell}.json"
    record.write_text((data / "before" / "cells" / f"{cell}.json").read_text())
    path = copied / "predictions" / f"{cell}@utkface.npz"
    path.write_bytes(b"half of a fi")
    assert study(data, copied, phase="quantization") == 0
    assert path.read_bytes() == (finished / "predictions" / path.name).read_bytes()
    assert (copied / "cross_dataset.csv").read_text() == (finished / "cross_dataset.csv").read_text()


def test_other_groups_need_no_model(data, copied, monkeypatch):
    monkeypatch.setattr("phases.cross_evaluate.predict", lambda *args: pytest.fail("predicted again"))
    races = {name: "White" if name == "White" else "Others" for name in RACES}
    ours = {"White": "White", "Black": "Others", "Asian": "Others", "Indian": "Others", "Others": "Others"}
    changed = {"fairface": {"attribute": "race", "names": races}, "utkface": {"attribute": "race", "names": ours}}
    assert study(data, copied, f"evaluation.mappings.race={json.dumps(changed)}", phase="quantization") == 0
    groups = pd.read_csv(copied / "cross_dataset_groups.csv")
    groups = groups[groups["attribute"] == "race"]
    assert list(dict.fromkeys(groups["group"])) == ["White", "Others"] and len(groups) == 2 * 3
    assert groups["home_n"].tolist() == [16, 96] * 3


def test_other_test_images_are_noticed(data, copied, capsys, tmp_path):
    cell = cells_of(data)[1].id
    (copied / "predictions" / f"{cell}@utkface.npz").unlink()
    moved = shutil.copytree(data / "utkface", tmp_path / "moved")
    assert study(data, copied, f"data.utkface.root={moved}", phase="baseline") == 0  # moved, not changed
    for path in sorted(moved.glob("*.png"))[::3]:
        path.unlink()
    assert study(data, copied, f"data.utkface.root={moved}", phase="quantization") == 2
    error = capsys.readouterr().err
    assert "@utkface.npz: of other test images than utkface has now" in error and error.count("\n") == 1


def test_a_failure_elsewhere_is_told_and_the_cell_is_kept(data, copied, finished, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("out of luck")

    cell = cells_of(data)[2].id
    path = copied / "predictions" / f"{cell}@utkface.npz"
    path.unlink()
    monkeypatch.setattr("phases.cross_evaluate.predict", broken)
    assert study(data, copied, phase="quantization") == 1
    out = capsys.readouterr().out
    assert f"evaluation failed: {cell}: utkface: RuntimeError: out of luck" in out
    assert "1 evaluations on other data sets failed" in out
    table = pd.read_csv(copied / "cross_dataset.csv").set_index("cell")
    assert table.loc[cell, "status"] == "failed" and np.isnan(table.loc[cell, "accuracy"])
    rows = pd.read_csv(copied / "quantization_results.csv").set_index("cell")
    assert rows.loc[cell, "status"] == "done" and rows.loc[cell, "accuracy"] > 0
    error = f"failed: {cell}: evaluation failed: utkface: RuntimeError: out of luck"
    assert error in ask(data, copied, capsys, "--status").splitlines()
    other = cells_of(data)[1].id  # which is to do
    (copied / "predictions" / f"{other}@utkface.npz").unlink()
    before = stamps(copied, "cells/*")
    again = ("--phase", "quantization", "--retry-failed")
    told = ask(data, copied, capsys, *again, status=1)
    assert f"evaluation failed: {cell}: utkface: RuntimeError: out of luck" in told and other not in told
    monkeypatch.undo()
    ask(data, copied, capsys, *again)
    assert {name for name, stamp in stamps(copied, "cells/*").items() if stamp != before[name]} == {f"{cell}.json"}
    assert "failed: " not in ask(data, copied, capsys, "--status")
    assert "no cell of these phases has failed" in ask(data, copied, capsys, *again)
    assert study(data, copied, phase="quantization") == 0
    assert (copied / "cross_dataset.csv").read_text() == (finished / "cross_dataset.csv").read_text()


def test_a_model_that_cannot_be_made_again_has_failed_elsewhere(data, copied, monkeypatch, capsys):
    """Before anything is measured there: its record has why, for the set that it lacks alone."""
    cell = cells_of(data)[2].id
    (copied / "predictions" / f"{cell}@utkface.npz").unlink()
    before = json.loads((copied / "cells" / f"{cell}.json").read_text())

    def broken(*args, **kwargs):
        raise RuntimeError("another machine")

    monkeypatch.setattr("phases.derived.apply_quantization", broken)
    told = ask(data, copied, capsys, "--phase", "quantization", status=1)
    assert f"evaluation failed: {cell}: utkface: RuntimeError: another machine" in told
    told = ask(data, copied, capsys, "--status")
    assert f"failed: {cell}: evaluation failed: utkface: RuntimeError: another machine" in told
    after = json.loads((copied / "cells" / f"{cell}.json").read_text())
    (row,) = after["extra"].pop("cross_dataset")
    assert (row["status"], row["error"]) == ("failed", "RuntimeError: another machine")
    assert after["extra"].pop("cross_dataset_groups") == []
    for key in ("cross_dataset", "cross_dataset_groups"):
        before["extra"].pop(key)
    assert after == before


def test_data_that_are_not_there_are_refused_before_anything_is_trained(data, tmp_path, capsys):
    assert study(data, tmp_path / "r", f"data.utkface.root={tmp_path / 'nowhere'}", phase="baseline") == 2
    assert f"{tmp_path / 'nowhere'}: no such folder: utkface is not here" in capsys.readouterr().err
    assert not list((tmp_path / "r" / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------- models that read groups


class ByGroup(torch.nn.Module):
    """Says class 1 for the groups of an attribute with a code of at least 1."""

    reads_groups = True

    def __init__(self, attribute: str):
        super().__init__()
        self.attributes = (attribute,)

    def forward(self, x, sensitive):
        chosen = torch.as_tensor(sensitive[self.attributes[0]]) >= 1
        return torch.stack([torch.zeros(len(x)), torch.where(chosen, 1.0, -1.0)], dim=1)


def test_a_model_that_reads_groups_gets_those_of_home_or_is_left_out(data, tmp_path):
    """UTKFace's age groups are called otherwise, so that names and not codes must be what is translated by."""
    bands = ("under 20", "20-39", "40 and over")
    shifted = dict(zip(bands, (*bands[1:], bands[0]), strict=True))  # utkface's "under 20" is called "20-39", …
    ages = {"fairface": {"attribute": "age_group", "names": {name: name for name in bands}}}
    ages["utkface"] = {"attribute": "age_group", "names": shifted}
    config = load_config(data / "study.yaml", [f"evaluation.mappings.age_group={json.dumps(ages)}"])
    dataset = load_dataset(config, "utkface", only=("test",))
    assert set(dataset.splits) == {"test"}
    home = load_dataset(config, "fairface").splits["test"]
    store = Store(tmp_path)
    store.prepare("")
    cell = Cell("cell", "mitigation", "fairface", "test_resnet", 0, "ptq_static", "threshold_adjustment", 8, 8)
    at_home = SimpleNamespace(y_true=home.labels, y_pred=home.labels, sensitive=home.sensitive, index=home.index)
    arguments = (cell, at_home, {"classes": ["Male", "Female"]}, config, store)
    tools = (SimpleNamespace(load_abroad=lambda *args: dataset), "cpu")
    report = SimpleNamespace(progress=lambda *args: None, line=lambda text: None)
    found = cross_evaluate.evaluate(ByGroup("age_group"), *arguments, *tools, report)["cross_dataset"][0]
    assert found["status"] == "done"
    saved = store.predictions("cell@utkface")
    assert (saved.sensitive["age_group"] == dataset.splits["test"].sensitive["age_group"]).all()  # its own
    assert (saved.y_pred == (saved.sensitive["age_group"] != 2)).all()  # utkface's last band is fairface's first
    skipped = cross_evaluate.evaluate(ByGroup("race"), *arguments, *tools, report)["cross_dataset"][0]
    assert skipped["status"] == "skipped" and "it decides by groups of race, which utkface does not" in skipped["error"]
    # which is complete: there is nothing to compute
    store.write_predictions(cell.id, SimpleNamespace(logits=np.zeros((len(home), 2)), **{
        key: getattr(at_home, key) for key in ("y_true", "sensitive", "index")}))  # fmt: skip
    store.write_cell({**cell.identity(), "status": "done"}, [], {"cross_dataset": [skipped]})
    assert cross_evaluate.is_complete(cell, config, store)
    other = dataclasses.replace(cell, id="other")
    assert not cross_evaluate.is_complete(other, config, store)
