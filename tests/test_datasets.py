"""Data sets: layouts, splits, cache, batches, calibration subsets, and every bad input."""

import errno
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset_download
import dataset_sources
import datasets
import image_cache
import synthetic_faces
from batches import move_images
from config import load_config
from dataset_sources import carve, name_hashes, stratified_order
from datasets import MEAN, STD, BatchLoader, DataError, ImageRows, Split, calibration_counts, calibration_subset

PROJECT = Path(datasets.__file__).parent
RACES = dataset_sources.FAIRFACE_VALUE_NAMES["race"]


def save_image(path: Path, colour=(128, 128, 128), size=(40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(int(c) for c in colour)).save(path)


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that a JPEG keeps to within a few steps, different for each number below 216."""
    return 40 * (number % 6) + 20, 40 * (number // 6 % 6) + 20, 40 * (number // 36 % 6) + 20


@pytest.fixture
def load(tmp_path):
    """load(name, *overrides): the data set below tmp_path / name, cached below tmp_path / cache."""

    def load_it(name, *overrides, root=None, **options):
        overrides = [f"data.{name}.image_size=32", f"data.cache={tmp_path / 'cache'}", *overrides]
        if name != "synthetic":
            overrides.insert(0, f"data.{name}.root={root or tmp_path / name}")
        return datasets.load_dataset(load_config(None, overrides), name, **options)

    return load_it


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(path, image_size):
        raise AssertionError(f"decoded {path}")

    return lambda: monkeypatch.setattr(image_cache, "decode_image", refuse)


def message_of(call, *arguments, error=DataError) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------- data on disk


def make_fairface(root: Path, train: int = 120, test: int = 40) -> dict[str, list[dict]]:
    """Official layout; image i of a part is colour_of(i); every label varies. -> part -> rows."""
    written = {}
    for part, count in (("train", train), ("val", test)):
        rows = [
            {
                "file": f"{part}/{i + 1}.jpg",
                "age": dataset_sources.FAIRFACE_AGES[i % 9],
                "gender": ("Male", "Female")[i % 2],
                "race": RACES[i % 7],
                "service_test": "True",
            }
            for i in range(count)
        ]
        for i, row in enumerate(rows):
            save_image(root / row["file"], colour_of(i))
        write_csv(root / f"fairface_label_{part}.csv", rows)
        written[part] = rows
    return written


def write_csv(path: Path, rows: list[dict]) -> None:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


CELEBA_ATTRIBUTES = [*(f"Attribute_{i}" for i in range(37)), "Male", "Smiling", "Young"]


def make_celeba(root: Path, count: int = 60, *, kaggle=False, claimed=None, images=None, partition=None) -> np.ndarray:
    """-> (count, 40) of -1 and 1. Rows 60 %, 25 %, 15 % train, validation, test; the first `images` have one."""
    values = np.where(np.random.default_rng(0).random((count, 40)) < 0.5, -1, 1)
    files = [f"{i + 1:06d}.jpg" for i in range(count)]
    if partition is None:
        partition = [0 if i < 0.6 * count else 1 if i < 0.85 * count else 2 for i in range(count)]
    root.mkdir(parents=True, exist_ok=True)
    rows = [[file, *map(str, row)] for file, row in zip(files, values.tolist(), strict=True)]
    parts = [[file, str(part)] for file, part in zip(files, partition, strict=True)]
    if kaggle:
        tables = {"list_attr_celeba.csv": (["image_id", *CELEBA_ATTRIBUTES], rows)}
        tables["list_eval_partition.csv"] = (["image_id", "partition"], parts)
        for name, (header, body) in tables.items():
            (root / name).write_text("\n".join(",".join(line) for line in [header, *body]) + "\n", encoding="utf-8")
    else:
        body = "\n".join(f"{row[0]} {' '.join(f'{value:>2}' for value in row[1:])}" for row in rows)
        header = f"{claimed or count}\n{' '.join(CELEBA_ATTRIBUTES)} \n"
        (root / "list_attr_celeba.txt").write_text(header + body + "\n", encoding="utf-8")
        (root / "list_eval_partition.txt").write_text("\n".join(" ".join(p) for p in parts) + "\n", encoding="utf-8")
    folder = root / "img_align_celeba" / ("img_align_celeba" if kaggle else "")
    for i, file in enumerate(files[:images]):
        save_image(folder / file, colour_of(i), size=(36, 44))
    return values


def make_utkface(root: Path, count: int = 200, *, suffix=".jpg.chip.jpg", folder="") -> list[str]:
    """-> names without suffix; ages 1 to 90, both genders, five races."""
    names = [f"{1 + 7 * i % 90}_{i % 2}_{i // 2 % 5}_{20170116000000000 + i}" for i in range(count)]
    for i, name in enumerate(names):
        save_image(root / folder / f"{name}{suffix}", colour_of(i))
    return names


# ----------------------------------------------------------------------------------------------------------- FairFace


def test_fairface_has_the_official_labels_in_order_of_the_files(tmp_path, load):
    rows = make_fairface(tmp_path / "fairface")
    dataset = load("fairface", "data.fairface.target=race", "data.fairface.sensitive=[gender,age,age_group]")
    assert dataset.class_names == RACES
    assert dataset.sensitive_names["age"] == dataset_sources.FAIRFACE_AGES
    assert dataset.sensitive_names["age_group"] == ("under 20", "20-39", "40 and over")
    assert {name: len(split) for name, split in dataset.splits.items()}["test"] == 40
    bands = {"0-2": 0, "3-9": 0, "10-19": 0, "20-29": 1, "30-39": 1}
    for name, part, offset in (("train", "train", 0), ("validation", "train", 0), ("test", "val", 120)):
        split = dataset.splits[name]
        assert split.labels.dtype == split.index.dtype == np.int64
        for position in range(len(split)):
            i = split.index[position] - offset
            row = rows[part][i]
            assert dataset.class_names[split.labels[position]] == row["race"]
            assert dataset.sensitive_names["gender"][split.sensitive["gender"][position]] == row["gender"]
            assert dataset.sensitive_names["age"][split.sensitive["age"][position]] == row["age"]
            assert split.sensitive["age_group"][position] == bands.get(row["age"], 2)
            assert np.abs(split.gather([position])[0].astype(int) - colour_of(i)).max() <= 3


def test_fairface_splits_are_disjoint_and_cover_everything(tmp_path, load):
    make_fairface(tmp_path / "fairface", 300)
    dataset = load("fairface")
    index = np.concatenate([split.index for split in dataset.splits.values()])
    assert sorted(index) == list(range(340))
    assert abs(len(dataset.splits["validation"]) - 30) <= 12
    assert [p for p in dataset.problems if "have no image" not in p] == []


def test_fairface_split_ignores_row_order_and_the_choice_of_target(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root, 200)
    first = load("fairface")
    write_csv(root / "fairface_label_train.csv", rows["train"][::-1])
    again = load("fairface")
    other = load("fairface", "data.fairface.target=age", "data.fairface.sensitive=[gender]")
    for name in datasets.SPLITS:
        assert first.splits[name].index.tolist() == again.splits[name].index.tolist()
        assert first.splits[name].labels.tolist() == again.splits[name].labels.tolist()
        assert first.splits[name].index.tolist() == other.splits[name].index.tolist()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_rows_without_image_or_value_and_repeated_rows_are_listed_and_left_out(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root)
    before = load("fairface")
    (root / "train/7.jpg").unlink()
    write_csv(root / "fairface_label_train.csv", [*rows["train"], rows["train"][3]])
    with (root / "fairface_label_train.csv").open("a", encoding="utf-8") as file:
        file.write("train/999.jpg,20-29\n")
    after = load("fairface")
    text = "\n".join(after.problems)
    assert "1 images missing, left out: train/7.jpg" in text
    assert "repeat a file, left out: train/4.jpg" in text
    assert "without gender, left out: train/999.jpg" in text
    old, new = ({i for s in d.splits.values() for i in s.index.tolist()} for d in (before, after))
    assert old - new == {6} and not new - old


def test_a_row_cannot_reach_outside_the_folder(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root)
    save_image(tmp_path / "secret.jpg")
    twisted = [{**rows["train"][0], "file": "../secret.jpg"}, {**rows["train"][0], "file": f"{tmp_path}/secret.jpg"}]
    write_csv(root / "fairface_label_train.csv", [*rows["train"], *twisted])
    dataset = load("fairface")
    assert any("2 images missing, left out" in problem and "secret" in problem for problem in dataset.problems)


# ------------------------------------------------------------------------------------------------------------- CelebA


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba_reads_both_layouts(tmp_path, load, kaggle):
    values = make_celeba(tmp_path / "celeba", kaggle=kaggle)
    dataset = load("celeba")
    assert dataset.class_names == ("not Smiling", "Smiling")
    assert dataset.sensitive_names == {"Male": ("female", "male"), "Young": ("old", "young")}
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 36, "validation": 15, "test": 9}
    columns = {name: CELEBA_ATTRIBUTES.index(name) for name in ("Smiling", "Male", "Young")}
    for split in dataset.splits.values():
        assert np.array_equal(split.labels, values[split.index, columns["Smiling"]] > 0)
        assert np.array_equal(split.sensitive["Male"], values[split.index, columns["Male"]] > 0)
        assert np.array_equal(split.sensitive["Young"], values[split.index, columns["Young"]] > 0)
        centre = split.gather(np.arange(len(split)))[:, 16, 16].astype(int)
        assert np.abs(centre - [colour_of(i) for i in split.index]).max() <= 3


def test_celeba_official_subfolders_and_any_attribute(tmp_path, load):
    root = tmp_path / "celeba"
    make_celeba(root)
    for folder, names in (("Anno", ["list_attr_celeba.txt"]), ("Eval", ["list_eval_partition.txt"])):
        (root / folder).mkdir()
        for name in names:
            (root / name).rename(root / folder / name)
    (root / "Img").mkdir()
    (root / "img_align_celeba").rename(root / "Img/img_align_celeba")
    dataset = load("celeba", "data.celeba.target=Young", "data.celeba.sensitive=[Attribute_3]")
    assert dataset.class_names == ("old", "young")
    assert dataset.sensitive_names == {"Attribute_3": ("not Attribute_3", "Attribute_3")}


def test_celeba_extract_with_fewer_rows_and_images_than_claimed(tmp_path, load):
    root = tmp_path / "celeba"
    make_celeba(root, claimed=202599)
    for number in (2, 60):
        (root / f"img_align_celeba/{number:06d}.jpg").unlink()
    with (root / "list_attr_celeba.txt").open("a", encoding="utf-8") as file:
        file.write("000061.jpg  1 -1  1")  # cut off in the middle
    dataset = load("celeba")
    assert sum(len(split) for split in dataset.splits.values()) == 58
    text = "\n".join(dataset.problems)
    assert "the header says 202599 rows, the file has 61" in text
    assert "2 images missing, left out: 000002.jpg, 000060.jpg" in text
    assert "left out: 000061.jpg" in text


def test_celeba_extract_of_the_first_images_gets_splits_of_its_own(tmp_path, load):
    """The official order begins with 162,770 training images: a short extract has no others."""
    make_celeba(tmp_path / "celeba", 200, partition=[0] * 200)
    dataset = load("celeba")
    sizes = {name: len(split) for name, split in dataset.splits.items()}
    assert sizes["test"] in (40, 41) and sizes["validation"] in (15, 16, 17) and sum(sizes.values()) == 200
    assert len({i for split in dataset.splits.values() for i in split.index.tolist()}) == 200
    assert sum("no image of the official" in problem for problem in dataset.problems) == 2
    again = load("celeba", "data.celeba.target=Young", "data.celeba.sensitive=[Male]")
    assert np.array_equal(again.splits["test"].index, dataset.splits["test"].index)


# ------------------------------------------------------------------------------------------------------------ UTKFace


def test_utkface_reads_labels_from_names_wherever_they_lie(tmp_path, load):
    names = make_utkface(tmp_path / "utkface", folder="part1/deeper")
    dataset = load("utkface", "data.utkface.test_share=0.3")
    order = {name: rank for rank, name in enumerate(sorted(names, key=lambda name: (len(name), name)))}
    by_index = {rank: name for name, rank in order.items()}
    assert dataset.class_names == ("male", "female")
    assert dataset.sensitive_names["race"] == ("White", "Black", "Asian", "Indian", "Others")
    for split in dataset.splits.values():
        for position, index in enumerate(split.index):
            age, gender, race, _ = map(int, by_index[index].split("_"))
            assert split.labels[position] == gender
            assert split.sensitive["race"][position] == race
            assert split.sensitive["age_group"][position] == (age >= 20) + (age >= 40)


def test_utkface_malformed_names_are_counted_listed_and_left_out(tmp_path, load):
    root = tmp_path / "utkface"
    make_utkface(root)
    before = load("utkface")
    malformed = [
        "61_1_20170109142408075.jpg.chip.jpg",  # no race: in the real set
        "53__0_20170116184028385.jpg",
        "24_0_7_20170116220224657.jpg",
        "face.png",
    ]
    for name in malformed:
        save_image(root / name)
    (root / "readme.txt").write_text("not an image")
    save_image(root / "__MACOSX/10_0_0_20170116220224657.jpg")
    after = load("utkface")
    [problem] = [problem for problem in after.problems if "malformed" in problem]
    assert problem.startswith("4 malformed names") and all(name in problem for name in malformed)
    for name in datasets.SPLITS:
        assert np.array_equal(before.splits[name].index, after.splits[name].index)


def test_utkface_copies_of_a_sample_never_sit_in_two_splits(tmp_path, load):
    root = tmp_path / "utkface"
    names = make_utkface(root, 60, folder="UTKFace")
    make_utkface(root, 60, suffix=".jpg", folder="whole")
    make_utkface(root, 20, folder="crop_part1")
    dataset = load("utkface")
    assert sum(len(split) for split in dataset.splits.values()) == len(names)
    assert any(problem.startswith("80 further copies") for problem in dataset.problems)


def test_utkface_split_stays_when_other_files_come(tmp_path):
    root = tmp_path / "utkface"
    section = load_config(None).data.utkface
    make_utkface(root)
    before = dataset_sources.read_utkface(root, section)
    for i in range(30):
        save_image(root / f"25_1_4_{30170116000000000 + i}.jpg")
    after = dataset_sources.read_utkface(root, section)
    then, now = (dict(zip(s.files, s.split, strict=True)) for s in (before, after))
    moved = [file for file in then if then[file] != now[file]]
    assert all(file.split("_")[1:3] == ["1", "4"] and 20 <= int(file.split("_")[0]) < 40 for file in moved)


# -------------------------------------------------------------------------------------------------- choices from names


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    test_share=st.floats(0.05, 0.5),
    validation_share=st.floats(0.05, 0.4),
)
@settings(max_examples=60, deadline=None)
def test_carve_gives_each_stratum_its_share_to_within_one(sizes, test_share, validation_share):
    strata = np.repeat(np.arange(len(sizes)), sizes)
    hashes = name_hashes(f"{i}" for i in range(len(strata)))
    split = carve(strata, hashes, {"test": test_share, "validation": validation_share})
    assert set(split) <= set(datasets.SPLITS)
    for stratum, size in enumerate(sizes):
        counts = Counter(split[strata == stratum])
        assert abs(counts["test"] - size * test_share) < 1
        assert abs(counts["test"] + counts["validation"] - size * (test_share + validation_share)) < 1


def test_carve_does_not_see_the_order_or_the_other_strata():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 5, 500)
    hashes = name_hashes(f"{i}.jpg" for i in range(500))
    split = carve(strata, hashes, {"validation": 0.1})
    order = rng.permutation(500)
    assert np.array_equal(carve(strata[order], hashes[order], {"validation": 0.1}), split[order])
    keep = strata != 2
    assert np.array_equal(carve(strata[keep], hashes[keep], {"validation": 0.1}), split[keep])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_every_beginning_of_the_stratified_order_is_stratified(sizes, n):
    """There is one share of which every stratum has its part to within one sample."""
    strata = np.repeat(np.arange(len(sizes)), sizes)
    order = stratified_order(strata, name_hashes(f"{i}" for i in range(len(strata))))
    assert sorted(order) == list(range(len(strata)))
    counts = np.bincount(strata[order[:n]], minlength=len(sizes))
    assert ((counts - 1) / sizes).max() < ((counts + 1) / sizes).min()


def test_strata_of_one_sample_do_not_come_all_at_once():
    strata = np.concatenate([np.arange(200), np.full(200, 200)])
    order = stratified_order(strata, name_hashes(f"{i}" for i in range(400)))
    for n in (100, 200, 300):
        assert abs((strata[order[:n]] == 200).sum() - n / 2) < 20


def test_fairface_validation_is_stratified(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root, 400)["train"]
    for i, row in enumerate(rows):
        row.update(
            gender=("Male", "Female")[i // 200], race=("White", "Black")[i // 100 % 2], age=("0-2", "3-9")[i // 50 % 2]
        )
    write_csv(root / "fairface_label_train.csv", rows)
    index = load("fairface").splits["validation"].index
    assert np.bincount(index // 50, minlength=8).tolist() == [5] * 8


def test_a_changed_label_changes_the_fingerprint(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root)["val"]
    first = load("fairface").fingerprint
    for name, value in (("gender", "Female"), ("race", "Indian")):
        assert rows[0][name] != value
        write_csv(root / "fairface_label_val.csv", [{**rows[0], name: value}, *rows[1:]])
        assert load("fairface").fingerprint != first


def test_name_hashes_are_the_same_on_every_machine():
    # blake2b of "train/1.jpg", 8 bytes, little-endian: `printf train/1.jpg | b2sum -l 64`
    expected = "c7dd7a028f330111"
    assert int(name_hashes(["train/1.jpg"])[0]) == int.from_bytes(bytes.fromhex(expected), "little")


def test_subsets_are_nested_stratified_and_keep_index_and_split(tmp_path, load):
    make_fairface(tmp_path / "fairface", 300, 90)
    chosen = {None: load("fairface")}
    for limit in (50, 100):
        chosen[limit] = load("fairface", f"data.fairface.max_train={limit}", f"data.fairface.max_test={limit // 2}")
        assert len(chosen[limit].splits["train"]) == limit and len(chosen[limit].splits["test"]) == limit // 2
    everything = chosen[None].splits["train"]
    label = dict(zip(everything.index.tolist(), everything.labels.tolist(), strict=True))
    for name in ("train", "validation", "test"):
        small, large, whole = (set(chosen[limit].splits[name].index.tolist()) for limit in (50, 100, None))
        assert small < large < whole
    for limit in (50, 100):
        split = chosen[limit].splits["train"]
        assert [label[i] for i in split.index.tolist()] == split.labels.tolist()
        assert abs(split.labels.mean() - everything.labels.mean()) < 0.06
        share = len(chosen[None].splits["validation"]) / len(everything)
        assert abs(len(chosen[limit].splits["validation"]) - share * limit) <= 1
    assert len({dataset.fingerprint for dataset in chosen.values()}) == 3


# ---------------------------------------------------------------------------------------------------------- synthetic


SMALL = ["data.synthetic.train_images=60", "data.synthetic.validation_images=20", "data.synthetic.test_images=30"]


def test_synthetic_is_what_the_renderer_draws(load):
    knobs = {"minority_share": 0.2, "label_correlation": 0.4, "group_noise": 0.1, "group_contrast": 0.3}
    smile = ("data.synthetic.target=smile", "data.synthetic.sensitive=[gender, skin]", "data.synthetic.seed=3")
    dataset = load("synthetic", *SMALL, *smile, *(f"data.synthetic.{k}={v}" for k, v in knobs.items()))
    assert dataset.class_names == ("neutral", "smiling") and list(dataset.sensitive_names) == ["gender", "skin"]
    for name, start in datasets.SYNTHETIC_START.items():
        split = dataset.splits[name]
        drawn = synthetic_faces.draw_faces(len(split), 32, 3, start=start, **knobs)
        assert np.array_equal(split.gather(np.arange(len(split))), drawn.image)
        assert np.array_equal(split.labels, drawn.smile)
        assert np.array_equal(split.sensitive["gender"], drawn.gender)
        assert np.array_equal(split.sensitive["skin"], drawn.skin)
        assert np.array_equal(split.index, drawn.index)
    assert len({index for split in dataset.splits.values() for index in split.index.tolist()}) == 110


def test_synthetic_test_images_stay_when_the_training_set_grows(load):
    small, large = load("synthetic", *SMALL), load("synthetic", *SMALL, "data.synthetic.train_images=90")
    for name in ("validation", "test"):
        everything = np.arange(len(small.splits[name]))
        assert np.array_equal(small.splits[name].gather(everything), large.splits[name].gather(everything))
    assert np.array_equal(small.splits["train"].index, large.splits["train"].index[:60])
    assert small.fingerprint != large.fingerprint


def test_synthetic_is_drawn_once_for_each_setting(load, monkeypatch):
    first = load("synthetic", *SMALL)
    monkeypatch.setattr(synthetic_faces, "iterate_faces", synthetic_faces.iterate_faces)
    original, calls = synthetic_faces.iterate_faces, []

    def counting(n, *arguments, **options):
        calls.append(n)
        return original(n, *arguments, **options)

    monkeypatch.setattr(synthetic_faces, "iterate_faces", counting)
    again = load("synthetic", *SMALL)
    limited = load("synthetic", *SMALL, "data.synthetic.max_train=25", "data.synthetic.target=smile")
    assert set(calls) == {16}, "only the probe of the renderer"
    assert again.fingerprint == first.fingerprint != limited.fingerprint
    assert len(limited.splits["train"]) == 25 and set(limited.splits["train"].index) < set(first.splits["train"].index)
    calls.clear()
    load("synthetic", *SMALL, "data.synthetic.group_noise=0.11")
    assert sorted(calls) == [16, 20, 30, 60]


def test_a_knob_that_the_renderer_refuses_is_one_line(load, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("group_noise must lie in [0, 1], got 7")

    monkeypatch.setattr(synthetic_faces, "draw_faces", refuse)
    assert message_of(load, "synthetic", *SMALL).startswith("data.synthetic: group_noise must lie")


# -------------------------------------------------------------------------------------------------------------- cache


def test_second_load_decodes_nothing_and_moved_data_are_recognised(tmp_path, load, no_decoding):
    make_fairface(tmp_path / "fairface")
    (tmp_path / "fairface/train/9.jpg").write_bytes(b"")
    first = load("fairface")
    no_decoding()
    again = load("fairface")
    (tmp_path / "fairface").rename(tmp_path / "elsewhere")
    moved = load("fairface", root=tmp_path / "elsewhere")
    for dataset in (again, moved):
        assert dataset.fingerprint == first.fingerprint
        assert dataset.problems == first.problems and any("train/9.jpg (zero bytes)" in p for p in dataset.problems)
        for name, split in first.splits.items():
            everything = np.arange(len(split))
            assert np.array_equal(split.gather(everything), dataset.splits[name].gather(everything))


def test_changed_image_size_or_file_is_decoded_again(tmp_path, load):
    make_fairface(tmp_path / "fairface")
    first = load("fairface")
    assert load("fairface", "data.fairface.image_size=48").splits["test"].gather([0]).shape == (1, 48, 48, 3)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "fairface/val/1.jpg")
    changed = load("fairface")
    assert changed.fingerprint != first.fingerprint
    assert changed.splits["test"].gather([0]).std() > 20


def test_truncated_empty_and_foreign_images_are_left_out_by_name(tmp_path, load):
    root = tmp_path / "fairface"
    make_fairface(root)
    before = load("fairface")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (root / "train/1.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (root / "train/20.jpg").write_bytes(b"")
    (root / "val/3.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    png = bytearray(buffer.getvalue())
    png[60:90] = b"\0" * 30
    (root / "val/4.jpg").write_bytes(png)
    after = load("fairface")
    text = "\n".join(after.problems)
    for expected in ("train/1.jpg (image file is truncated", "train/20.jpg (zero bytes)", "val/3.jpg (not an image)"):
        assert expected in text
    assert "val/4.jpg" in text
    old, new = (sorted(i for s in d.splits.values() for i in s.index.tolist()) for d in (before, after))
    assert sorted(set(old) - set(new)) == [0, 19, 122, 123]
    for split in after.splits.values():
        centre = split.gather(np.arange(len(split)))[:, 16, 16].astype(int)
        assert np.abs(centre - [colour_of(i % 120) for i in split.index]).max() <= 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_and_shapes_become_square_rgb(tmp_path, mode):
    """A wide image with a white centre square between black sides: only the centre is kept."""
    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    path = tmp_path / ("a.jpg" if mode in ("L", "CMYK") else "a.png")
    image.convert(mode).save(path)
    decoded = image_cache.decode_image(path, 32)
    assert decoded.shape == (32, 32, 3) and decoded.dtype == np.uint8
    assert decoded[:, 2:-2].min() >= 250


def test_decoding_is_close_to_exact_resampling(tmp_path):
    """JPEG scaling in the decoder, against full decoding and box filtering of a smooth image."""
    y, x = np.mgrid[0:256, 0:256] / 256
    smooth = np.stack([255 * x, 255 * y, 127 + 120 * np.sin(6 * x) * np.cos(5 * y)], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    exact = smooth.reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
    assert np.abs(image_cache.decode_image(tmp_path / "a.jpg", 32) - exact).max() < 6


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 24, 40])
def test_every_image_is_in_its_row_whatever_the_blocks(tmp_path, monkeypatch, workers, count):
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 12 * 3 * 4**2)

    def decode(path, size):
        number = int(path.stem)
        if number % 5 == 3:
            raise ValueError(f"it is {number}")
        return np.full((size, size, 3), number, np.uint8)

    monkeypatch.setattr(image_cache, "decode_image", decode)
    files = [f"{number}.jpg" for number in range(count)]
    sizes = np.zeros(count, np.int64)
    blocks: list[int] = []

    def progress(what, done, total):
        blocks.append(done)

    options = {"workers": workers, "progress": progress}
    if not count:
        with pytest.raises(image_cache.DataError):
            image_cache.decoded_images(tmp_path / "cache", "x", tmp_path, files, sizes, 4, **options)
        return
    cached = image_cache.decoded_images(tmp_path / "cache", "x", tmp_path, files, sizes, 4, **options)
    assert blocks == [*range(12, count, 12), count]
    numbers = np.arange(count)
    expected = np.where(numbers % 5 == 3, 0, numbers)
    assert np.array_equal(np.asarray(cached.images), np.broadcast_to(expected[:, None, None, None], (count, 4, 4, 3)))
    assert cached.broken == {number: f"damaged: it is {number}" for number in range(3, count, 5)}


def test_decoders_go_on_while_a_block_is_written_and_stop_with_the_writer(tmp_path, monkeypatch):
    """One block ahead, no further; who stops writing leaves no decoder at work."""
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 32 * 3 * 4**2)
    decoded: list[int] = []
    told_to_stop = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            told_to_stop.set()
            super().shutdown(wait)

    def decode(path, size):
        number = int(path.stem)
        decoded.append(number)
        if number >= 96:  # of the block after which the writer stops: however slow it is, they are not done
            told_to_stop.wait(30)
        time.sleep(0.001)
        return np.zeros((size, size, 3), np.uint8)

    class Stopped(Exception):
        pass

    def progress(what, done, total):
        if done == 96:
            raise Stopped
        deadline = time.monotonic() + 30
        while len(decoded) < done + 32 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(decoded) == done + 32

    monkeypatch.setattr(image_cache, "decode_image", decode)
    monkeypatch.setattr(image_cache, "ThreadPoolExecutor", Pool)
    files, sizes = [f"{number}.jpg" for number in range(320)], np.zeros(320, np.int64)
    with pytest.raises(Stopped):
        image_cache.decoded_images(tmp_path / "cache", "x", tmp_path, files, sizes, 4, workers=2, progress=progress)
    count = len(decoded)
    time.sleep(0.05)
    assert count == len(decoded) < 120
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_more_than_half_undecodable_is_an_error_and_leaves_nothing(tmp_path, load):
    root = tmp_path / "fairface"
    make_fairface(root)
    for number in range(1, 120):
        (root / f"train/{number}.jpg").write_bytes(b"x" * number)
    message = message_of(load, "fairface")
    assert "cannot be decoded" in message and "not an image" in message and str(root) in message
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


FACES = [f"train/{number}.jpg" for number in range(1, 101)]
SLOW_WRITER = """
import sys, time
sys.path.insert(0, {project!r})
from pathlib import Path
import numpy as np
import image_cache
decode = image_cache.decode_image
def slowly(path, image_size):
    time.sleep({seconds})
    return decode(path, image_size)
image_cache.decode_image = slowly
image_cache.CHUNK_BYTES = 0
def progress(what, done, total):
    print(what, done, total, flush=True)
files = {files}
image_cache.decoded_images(
    {cache!r}, "faces", Path({root!r}), files, np.ones(len(files), int), 32, workers=2, progress=progress
)
"""


def slow_writer(tmp_path, seconds: float) -> subprocess.Popen:
    """A process that writes the cache of faces(tmp_path), eight images at a time; it has begun."""
    names = {"project": str(PROJECT), "cache": str(tmp_path / "cache"), "root": str(tmp_path / "fairface")}
    code = SLOW_WRITER.format(**names, files=FACES, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "faces: images 8 100\n"
    return process


def faces(tmp_path) -> image_cache.CachedImages:
    sizes = np.ones(len(FACES), np.int64)
    return image_cache.decoded_images(tmp_path / "cache", "faces", tmp_path / "fairface", FACES, sizes, 32)


def test_a_kill_in_the_middle_leaves_no_cache_that_is_believed(tmp_path):
    make_fairface(tmp_path / "fairface")
    process = slow_writer(tmp_path, seconds=0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    [part] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert part.suffix == ".part" and (part / "images.npy").is_file()
    centre = np.asarray(faces(tmp_path).images)[:, 16, 16].astype(int)
    assert np.abs(centre - [colour_of(i) for i in range(100)]).max() <= 3
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert folder.suffix != ".part"


def test_two_writers_share_one_cache(tmp_path, no_decoding):
    """The second waits for the first and reads what it wrote; a living writer's part is left alone."""
    make_fairface(tmp_path / "fairface")
    process = slow_writer(tmp_path, seconds=0.02)
    image_cache._remove_leftovers(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.part"))) == 1
    no_decoding()
    images = np.asarray(faces(tmp_path).images)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and printed.endswith("faces: images 100 100\n")
    assert np.abs(images[:, 16, 16].astype(int) - [colour_of(i) for i in range(100)]).max() <= 3


def test_who_waits_for_images_says_so_as_long_as_their_writer_gets_on(tmp_path, monkeypatch):
    """Whoever that is: where it was killed, another one begins anew."""
    now, told = [1000.0], []
    monkeypatch.setattr(image_cache, "time", SimpleNamespace(monotonic=lambda: now[0]))
    wait = image_cache._while_it_grows(tmp_path / "faces-01", lambda: told.append(now[0]))

    def is_told_after(seconds: float) -> bool:
        now[0] += seconds
        before = len(told)
        wait()
        return len(told) > before

    def write(part: str, count: int) -> None:
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "images.npy").write_bytes(bytes(count))

    assert is_told_after(0) and is_told_after(599) and not is_told_after(1)
    for count in (10, 20):
        write("faces-01.7-ab.part", count)
        assert is_told_after(700) and is_told_after(599) and not is_told_after(1)
    write("faces-02.8-cd.part", 10)  # of other images
    assert not is_told_after(1)
    write("faces-01.9-ef.part", 20)
    assert is_told_after(1) and is_told_after(599) and not is_told_after(1)


def test_blocks_are_joined_in_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    blocks = [
        image_cache.Block(images[part], {0: f"bad {part.start}"}, {"number": np.arange(7)[part]}) for part in parts
    ]
    seen = []
    options = {"progress": lambda *call: seen.append(call)}
    for _ in range(2):
        cached = image_cache.cached_images(tmp_path, "joined", {}, 7, 4, lambda: iter(blocks), **options)
        assert np.array_equal(cached.images, images)
        assert cached.broken == {0: "bad 0", 3: "bad 3", 6: "bad 6"}
        assert cached.columns["number"].tolist() == list(range(7))
    assert seen == [("joined: images", done, 7) for done in (3, 6, 7)]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_images_are_decoded_all_the_same(tmp_path, monkeypatch, error):
    """And a part that a writer on another machine may still be writing is left alone."""
    if image_cache.fcntl is None:
        pytest.skip("no locks at all here")

    def no_flock(*arguments):
        raise OSError(error, os.strerror(error))

    make_fairface(tmp_path / "fairface")
    theirs = tmp_path / "cache" / "faces-0123456789abcdef.4711-01234567.part"
    theirs.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache.fcntl, "flock", no_flock)
        centre = np.asarray(faces(tmp_path).images)[:, 16, 16].astype(int)
    assert np.abs(centre - [colour_of(i) for i in range(100)]).max() <= 3
    assert theirs.exists()
    image_cache._remove_leftovers(tmp_path / "cache")
    assert not theirs.exists()


@pytest.mark.parametrize(
    ("folder_age", "file_age", "goes"), [(9e5, 3000, False), (3000, 9e5, False), (3700, 3700, True)]
)
def test_where_nothing_can_be_locked_a_killed_writers_part_goes_after_an_hour(
    tmp_path, monkeypatch, folder_age, file_age, goes
):
    """Since anything was written to it: a living writer's grows."""
    make_fairface(tmp_path / "fairface")
    process = slow_writer(tmp_path, seconds=0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    [part] = (tmp_path / "cache").glob("*.part")
    now = time.time()
    for path, age in ((part / "images.npy", file_age), (part, folder_age)):
        os.utime(path, (now - age, now - age))
    if image_cache.fcntl is not None:

        def no_flock(*arguments):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(image_cache.fcntl, "flock", no_flock)
    assert len(faces(tmp_path).images) == 100
    assert part.exists() is not goes and len(list((tmp_path / "cache").glob("*.part"))) == (not goes)


def written_file(tmp_path, count=9) -> tuple[image_cache.ImageFile, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return image_cache.ImageFile(tmp_path / "images.npy"), images


@pytest.mark.parametrize("is_windows", [False, True])
@given(rows=st.lists(st.integers(0, 8), max_size=20))
def test_rows_are_read_in_any_order_and_more_than_once(tmp_path_factory, is_windows, rows):
    file, images = written_file(tmp_path_factory.mktemp("rows"))
    assert file.shape == images.shape and len(file) == 9 and file.nbytes == images.nbytes
    rows = np.array(rows, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        if is_windows:
            patch.delattr(os, "preadv")
        assert np.array_equal(file.read(rows), images[rows])
        memory = np.zeros((25, 4, 5, 3), np.uint8)
        assert file.read(rows, memory[: len(rows)]).base is memory
        assert np.array_equal(memory[: len(rows)], images[rows]) and not memory[len(rows) :].any()
        assert np.array_equal(np.asarray(file), images)


def test_reads_that_stop_halfway_go_on(tmp_path, monkeypatch):
    file, images = written_file(tmp_path)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, parts, offset: whole(number, [parts[0][:7]], offset))
    assert np.array_equal(np.asarray(file), images)


def test_an_image_file_outlives_its_name_and_travels_by_it(tmp_path):
    file, images = written_file(tmp_path)
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(file))), images)
    (tmp_path / "images.npy").unlink()  # deleting a cache is always safe
    assert np.array_equal(np.asarray(file), images)


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_of_the_system(tmp_path):
    """Through a memory map it would be a signal, and the end of the worker."""
    file, images = written_file(tmp_path)
    os.truncate(tmp_path / "images.npy", (tmp_path / "images.npy").stat().st_size - 1)
    assert np.array_equal(file.read(np.arange(8)), images[:8])
    with pytest.raises(OSError, match="shorter"):
        file.read(np.array([8]))
    with pytest.raises(ValueError, match="too short"):
        image_cache.ImageFile(tmp_path / "images.npy")
    for rows in ([9], [-1]):
        with pytest.raises(IndexError, match="9 images"):
            file.read(np.array(rows))


@pytest.mark.parametrize("damage", ["shorter", "of another shape", "without its list"])
def test_a_damaged_cache_is_made_again(tmp_path, load, damage):
    make_fairface(tmp_path / "fairface")
    first = load("fairface")
    pixels = first.splits["test"].gather([5])
    for folder in (tmp_path / "cache").glob("fairface-*"):
        data = (folder / "images.npy").read_bytes()
        (folder / "images.npy").unlink()
        if damage == "shorter":
            (folder / "images.npy").write_bytes(data[:500])
        elif damage == "of another shape":
            np.save(folder / "images.npy", np.zeros((3, 32, 32, 3), np.uint8))
        else:
            (folder / "images.npy").write_bytes(data)
            (folder / "contents.json").unlink()
    again = load("fairface")
    assert again.fingerprint == first.fingerprint and np.array_equal(again.splits["test"].gather([5]), pixels)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, load):
    make_fairface(tmp_path / "fairface")
    (tmp_path / "cache").write_text("a file in the way")
    message = message_of(load, "fairface")
    assert str(tmp_path / "cache") in message and "data.cache" in message


def test_a_disk_without_room_is_refused_before_it_is_filled(tmp_path, load, monkeypatch, no_decoding):
    make_fairface(tmp_path / "fairface")
    no_decoding()
    usage = image_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = message_of(load, "fairface")
    assert os.strerror(errno.ENOSPC) in message and "make room" in message
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_write_error_in_the_middle_is_one_line_and_leaves_nothing(tmp_path):
    """A real one: the kernel refuses a file of more than 100 kB."""
    make_fairface(tmp_path / "fairface")
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.path.insert(0, {str(PROJECT)!r})
import datasets
overrides = ["data.fairface.root={tmp_path / "fairface"}", "data.cache={tmp_path / "c"}"]
sys.exit(datasets.main(["--check", "fairface", "--set", *overrides]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr and os.strerror(errno.EFBIG) in done.stderr
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]


def test_memory_stays_flat(tmp_path, monkeypatch):
    """48 MB of images: neither writing, opening nor one pass over them holds more than a few chunks."""
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 1 << 20)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = [f"{i}.jpg" for i in range(4000)]
    monkeypatch.setattr(image_cache, "decode_image", lambda path, size: pixels)
    tracemalloc.start()
    try:
        cached = image_cache.decoded_images(tmp_path, "x", tmp_path, files, np.zeros(4000, np.int64), 64, workers=2)
        count = np.arange(4000)
        split = Split("train", count % 2, {}, count, ImageRows(cached.images, count))
        for batch in BatchLoader(split, 64, shuffle=True, generator=torch.Generator().manual_seed(0), shift=2):
            del batch
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cached.images.nbytes == 4000 * 64 * 64 * 3
    assert peak < 12e6


# ---------------------------------------------------------------------------------------------------------- bad input


def test_missing_folder_says_how_to_get_it(tmp_path, load):
    for name in dataset_sources.READERS:
        message = message_of(load, name)
        assert str(tmp_path / name) in message
        assert f"--download {name}" in message and f"--set data.{name}.root=" in message


def test_unknown_name_gets_a_suggestion():
    assert "did you mean fairface?" in message_of(datasets.load_dataset, load_config(None), "fairfaces")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such label file"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"file,age,gender,race,service_test\n", "no rows"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"file,age,sex,race\ntrain/1.jpg,0-2,Male,White\n", "no column 'gender'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no column 'file'"),
        (b"file,age,gender,race\ntrain/1.jpg,0-2,Male,Blak\n", "unknown race 'Blak' (did you mean Black?)"),
        (b"file,age,gender,race\ntrain/1.jpg,0-2,Male,White,1,2\ntrain/2.jpg,0-2\n", "not a table"),
        (b"file,age,gender,race\n\xff\xfe\x00", "not a table"),
        (b"file,age,gender,race\nnowhere/1.jpg,0-2,Male,White\n", "train split of fairface is empty"),
    ],
)
def test_bad_fairface_label_file(tmp_path, load, content, expected):
    root = tmp_path / "fairface"
    make_fairface(root)
    path = root / "fairface_label_train.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = message_of(load, "fairface")
    assert expected in message
    assert path.name in message or "empty" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("list_attr_celeba.txt", b"", "empty"),
        ("list_attr_celeba.txt", b"<html></html>", "web page"),
        ("list_attr_celeba.txt", b"202599\nMale Smiling Young\n", "no rows"),
        ("list_attr_celeba.txt", b"1\nMale Smiling Young\n000001.jpg 1 maybe 1\n", "unknown Smiling 'maybe'"),
        ("list_eval_partition.txt", b"000001.jpg 7\n", "unknown partition '7'"),
        ("list_eval_partition.txt", b"<html></html>", "web page"),
        ("list_eval_partition.txt", None, "list_eval_partition"),
        ("list_attr_celeba.txt", None, "list_attr_celeba"),
    ],
)
def test_bad_celeba_label_file(tmp_path, load, name, content, expected):
    make_celeba(tmp_path / "celeba")
    path = tmp_path / "celeba" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = message_of(load, "celeba")
    assert expected in message and path.stem in message


def test_celeba_unknown_attribute_names_the_nearest(tmp_path, load):
    make_celeba(tmp_path / "celeba")
    message = message_of(load, "celeba", "data.celeba.target=Smilling")
    assert "data.celeba.target" in message and "'Smilling' (did you mean Smiling?)" in message
    assert "data.celeba.sensitive" in message_of(load, "celeba", "data.celeba.sensitive=[Mal]")


def test_no_image_at_all(tmp_path, load):
    make_celeba(tmp_path / "celeba", images=0)
    assert "no images in img_align_celeba" in message_of(load, "celeba")
    save_image(tmp_path / "celeba/img_align_celeba/other.jpg")
    assert "none of the 60 images" in message_of(load, "celeba")
    (tmp_path / "utkface").mkdir()
    assert "no image named" in message_of(load, "utkface")
    save_image(tmp_path / "utkface/face.jpg")
    assert "face.jpg" in message_of(load, "utkface")


def test_an_empty_split_and_a_single_class_are_errors(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root)
    for row in rows["val"]:
        (root / row["file"]).unlink()
    assert "the test split of fairface is empty" in message_of(load, "fairface")
    make_fairface(root)
    write_csv(root / "fairface_label_train.csv", [{**row, "gender": "Male"} for row in rows["train"]])
    message = message_of(load, "fairface")
    assert "data.fairface.target" in message and "gender = Male" in message


def test_an_absent_group_is_a_problem_and_no_error(tmp_path, load):
    root = tmp_path / "fairface"
    rows = make_fairface(root)
    write_csv(root / "fairface_label_val.csv", [row for row in rows["val"] if row["race"] != "Black"])
    dataset = load("fairface")
    assert "test: no image with race = Black" in dataset.problems
    [problem] = [line for line in dataset.problems if line.startswith("test: of 21 intersections")]
    assert "Black & under 20" in problem
    assert not any("train: no image" in problem for problem in dataset.problems)


# ------------------------------------------------------------------------------------------------------------- batches


def random_split(count=37, size=8, name="train", seed=0) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count + 5, size, size, 3), dtype=np.uint8)
    rows = rng.permutation(count + 5)[:count]
    sensitive = {"gender": rng.integers(0, 2, count), "race": rng.integers(0, 3, count)}
    return Split(name, rng.integers(0, 2, count), sensitive, rng.permutation(1000)[:count], ImageRows(images, rows))


def one_epoch(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    assert len(batches) == len(loader)
    epoch = {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "index")}
    for name in batches[0]["sensitive"]:
        epoch[name] = torch.cat([batch["sensitive"][name] for batch in batches])
    return epoch


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 37, 100])
def test_batches_are_the_split_normalised_in_order(batch_size, channels_last):
    split = random_split()
    loader = BatchLoader(split, batch_size, channels_last=channels_last)
    epoch = one_epoch(loader)
    pixels = split.images.images[split.images.rows]
    expected = ((pixels / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)
    assert epoch["image"].dtype == torch.float32
    assert epoch["label"].dtype == epoch["index"].dtype == epoch["race"].dtype == torch.int64
    np.testing.assert_allclose(epoch["image"].numpy(), expected, atol=2e-6)
    assert np.array_equal(epoch["label"], split.labels) and np.array_equal(epoch["index"], split.index)
    assert np.array_equal(epoch["race"], split.sensitive["race"])
    first = next(iter(loader))["image"]
    assert first.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_a_batch_does_not_depend_on_the_others_in_it():
    split = random_split()
    assert torch.equal(one_epoch(BatchLoader(split, 5))["image"], one_epoch(BatchLoader(split, 37))["image"])


AUGMENTED = {"shuffle": True, "flip": True, "shift": 2, "brightness": 0.3}


def test_augmentation_follows_the_generator_and_not_the_batch_size():
    split = random_split()

    def epoch(seed, batch_size, **options):
        return one_epoch(BatchLoader(split, batch_size, generator=torch.Generator().manual_seed(seed), **options))

    first, again, other = epoch(0, 8, **AUGMENTED), epoch(0, 37, **AUGMENTED), epoch(1, 8, **AUGMENTED)
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["index"], again["index"])
    assert not torch.equal(first["index"], other["index"])
    assert sorted(first["index"].tolist()) == sorted(split.index.tolist())
    last = epoch(0, 8, **AUGMENTED, channels_last=True)
    torch.testing.assert_close(last["image"], first["image"], atol=1e-6, rtol=0)


def test_each_epoch_is_another_and_labels_stay_with_their_images():
    split = random_split()
    loader = BatchLoader(split, 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    plain = one_epoch(BatchLoader(split, 37))
    where = {index: position for position, index in enumerate(plain["index"].tolist())}
    first, second = one_epoch(loader), one_epoch(loader)
    assert first["index"].tolist() != second["index"].tolist()
    for epoch in (first, second):
        positions = [where[index] for index in epoch["index"].tolist()]
        for key in ("image", "label", "gender", "race"):
            assert torch.equal(epoch[key], plain[key][positions])


@given(seed=st.integers(0, 10**6), shift=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_images_are_mirrored_and_moved_as_numpy_would(seed, shift):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    flip = rng.random(4) < 0.5
    down, right = rng.integers(-shift, shift + 1, (2, 4))
    moved = move_images(*(torch.from_numpy(array) for array in (images, flip, down, right))).numpy()
    for i in range(4):
        image = images[i, :, ::-1] if flip[i] else images[i]
        # mirroring comes first, then the move
        padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        top, left = shift - down[i], shift - right[i]
        assert np.array_equal(moved[i], padded[top : top + 5, left : left + 7])


def test_augmentation_stays_within_its_options():
    split = random_split(400, 4)
    split.images.images[:] = 100
    generator = torch.Generator().manual_seed(0)
    plain = one_epoch(BatchLoader(split, 50, shuffle=True, generator=generator, flip=True, shift=3))["image"]
    pixels = (plain * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    assert (pixels - 100).abs().max() < 1e-3
    bright = one_epoch(BatchLoader(split, 50, generator=generator, brightness=0.3))["image"]
    pixels = (bright * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    factor = pixels[:, 0, 0, 0] / 100
    assert 0.7 <= factor.min() < 0.71 and 1.29 < factor.max() <= 1.3001
    assert (pixels - pixels[:, :1, :1, :1]).abs().max() < 1e-3
    split.images.images[:] = 250
    assert one_epoch(BatchLoader(split, 50, generator=generator, brightness=0.3))["image"].max() <= (1 - 0.406) / 0.225


def test_flip_mirrors_about_half():
    split = random_split(400, 4)
    mirrored = one_epoch(BatchLoader(split, 64, flip=True, generator=torch.Generator().manual_seed(0)))["image"]
    plain = one_epoch(BatchLoader(split, 64))["image"]
    same = (mirrored == plain).flatten(1).all(dim=1)
    flipped = (mirrored == plain.flip(3)).flatten(1).all(dim=1)
    assert (same | flipped).all() and 150 < int(flipped.sum()) < 250


def test_loader_options_are_checked():
    split = random_split()
    assert len(BatchLoader(split, 10)) == 4 and len(BatchLoader(split, 10, drop_last=True)) == 3
    assert [len(batch["label"]) for batch in BatchLoader(split, 10, drop_last=True)] == [10, 10, 10]
    for options in ({"shuffle": True}, {"flip": True}, {"shift": 1}, {"brightness": 0.1}):
        assert "generator" in message_of(lambda options=options: BatchLoader(split, 8, **options), error=ValueError)
    assert "batch_size" in message_of(lambda: BatchLoader(split, 0), error=ValueError)
    assert "brightness" in message_of(lambda: BatchLoader(split, 8, brightness=1.0), error=ValueError)


def test_subset_keeps_everything_together():
    split = random_split()
    part = split.subset([5, 3, 3, 30])
    assert part.name == "train" and len(part) == 4
    assert np.array_equal(part.index, split.index[[5, 3, 3, 30]])
    assert np.array_equal(part.gather([0, 2]), split.gather([5, 3]))
    assert np.array_equal(part.sensitive["race"], split.sensitive["race"][[5, 3, 3, 30]])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_the_same_on_cuda():
    split = random_split()
    options = {**AUGMENTED, "channels_last": True}
    cpu = one_epoch(BatchLoader(split, 8, generator=torch.Generator().manual_seed(0), **options))
    cuda = one_epoch(BatchLoader(split, 8, generator=torch.Generator().manual_seed(0), device="cuda", **options))
    assert all(value.is_cuda for value in cuda.values())
    torch.testing.assert_close(cuda["image"].cpu(), cpu["image"], atol=1e-5, rtol=0)
    assert torch.equal(cuda["index"].cpu(), cpu["index"])


# --------------------------------------------------------------------------------------------------------- calibration


def grouped_split(sizes: list[int], name="train") -> Split:
    """Group g of `sizes` is (gender g % 2, race g // 2)."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    sensitive = {"gender": groups % 2, "race": groups // 2}
    count = len(groups)
    images = ImageRows(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(count, np.int64))
    return Split(name, groups % 2, sensitive, np.arange(count), images)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=10).filter(any),
    n=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_balanced_subset_has_as_many_of_each_group(sizes, n, seed):
    split = grouped_split(sizes)
    positions = calibration_subset(split, n, np.random.default_rng(seed), balance=["gender", "race"])
    assert len(positions) == n
    counts = calibration_counts(split, positions, ["gender", "race"])
    present = {(g % 2, g // 2): size for g, size in enumerate(sizes) if size}
    assert {count.group: count.available for count in counts} == present
    drawn = [count.drawn for count in counts]
    assert sum(drawn) == n and max(drawn) - min(drawn) <= 1
    repeats = Counter(positions.tolist())
    for count in counts:
        assert count.distinct == min(count.drawn, count.available)  # repeated only where there is no other way
        members = np.flatnonzero(
            (split.sensitive["gender"] == count.group[0]) & (split.sensitive["race"] == count.group[1])
        )
        times = [repeats[m] for m in members.tolist()]
        assert max(times) - min(times) <= 1


def test_one_attribute_balances_that_attribute():
    split = grouped_split([90, 10, 90, 10])
    positions = calibration_subset(split, 40, np.random.default_rng(0), balance=["gender"])
    assert np.bincount(split.sensitive["gender"][positions]).tolist() == [20, 20]


def test_uniform_subset_has_no_repeats_and_takes_all_of_a_small_split():
    split = grouped_split([90, 10])
    positions = calibration_subset(split, 40, np.random.default_rng(0))
    assert len(set(positions.tolist())) == 40
    assert sorted(calibration_subset(split, 500, np.random.default_rng(0)).tolist()) == list(range(100))
    shares = [
        (split.sensitive["gender"][calibration_subset(split, 40, np.random.default_rng(seed))] == 1).mean()
        for seed in range(200)
    ]
    assert abs(np.mean(shares) - 0.1) < 0.01


def test_calibration_follows_its_generator():
    split = grouped_split([30, 20, 5])
    for balance in (None, ["gender", "race"]):
        one, same, other = (calibration_subset(split, 12, np.random.default_rng(s), balance=balance) for s in (0, 0, 1))
        assert one.tolist() == same.tolist() != other.tolist()


@pytest.mark.parametrize("balance", [None, ["gender"]])
def test_calibration_never_sees_the_test_split(balance):
    split = grouped_split([20, 20], name="test")
    for part in (split, split.subset(np.arange(5))):
        with pytest.raises(ValueError, match="must not come from the test split"):
            calibration_subset(part, 4, np.random.default_rng(0), balance=balance)


def test_unknown_balance_attribute_is_named():
    call = lambda balance: calibration_subset(grouped_split([9, 9]), 4, np.random.default_rng(0), balance=balance)  # noqa: E731
    assert "did you mean gender?" in message_of(call, ["gendr"], error=ValueError)
    assert "at least one" in message_of(call, [], error=ValueError)


# ------------------------------------------------------------------------------------------------------------ download


def encoded(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def hub_rows(count: int, *, as_names: bool = False) -> list[dict]:
    codes = dataset_download.FAIRFACE_CODES
    rows = []
    for i in range(count):
        row = {"image": {"bytes": encoded(colour_of(i)), "path": "../../evil.jpg"}, "service_test": i % 2 == 0}
        for name, names in codes.items():
            code = (i // (2 if name == "race" else 1)) % len(names)
            row[name] = names[code] if as_names else code
        rows.append(row)
    return rows


@pytest.mark.parametrize("as_names", [False, True])
def test_hub_rows_become_the_official_layout(tmp_path, load, as_names):
    root = tmp_path / "fairface"
    rows = hub_rows(126, as_names=as_names)
    assert dataset_download.write_fairface(iter(rows), root, "train") == 126
    dataset_download.write_fairface(iter(rows[:40]), root, "val")
    header, first, second = (root / "fairface_label_train.csv").read_text().splitlines()[:3]
    assert header == "file,age,gender,race,service_test"
    assert (first, second) == ("train/1.jpg,0-2,Male,East Asian,True", "train/2.jpg,3-9,Female,East Asian,False")
    dataset = load("fairface")
    assert sum(len(split) for split in dataset.splits.values()) == 166
    assert not (tmp_path / "evil.jpg").exists()


def test_hub_conversion_that_stops_leaves_no_label_file(tmp_path):
    def rows():
        yield from hub_rows(3)
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        dataset_download.write_fairface(rows(), tmp_path, "train")
    assert not (tmp_path / "fairface_label_train.csv").exists()
    assert "no rows" in message_of(dataset_download.write_fairface, [], tmp_path, "train")
    assert not list(tmp_path.glob("*.csv*"))


def test_hub_parquet_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: it is only for --download fairface")
    import pyarrow.parquet as parquet

    rows = hub_rows(5)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(dataset_download._parquet_rows([tmp_path / "a.parquet"])) == rows


def archive_with(path: Path, names: list[str]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"content")
    else:
        with tarfile.open(path, "w:gz") as file:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 7
                file.addfile(member, io.BytesIO(b"content"))
    return path


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_archives_unpack_inside_their_folder_only(tmp_path, kind):
    good = archive_with(tmp_path / kind, ["UTKFace/1.jpg", "UTKFace/deeper/2.jpg"])
    folder = tmp_path / "out"
    assert dataset_download.extract(good, folder) == 2
    assert (folder / "UTKFace/deeper/2.jpg").read_bytes() == b"content"
    for evil in ("../evil.jpg", "/tmp/bnq-evil.jpg", "a/../../evil.jpg", "..\\evil.jpg"):
        bad = archive_with(tmp_path / f"bad{kind}", ["fine.jpg", evil])
        message = message_of(dataset_download.extract, bad, tmp_path / "refused")
        assert "refused" in message and "archive" in message
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "refused").exists()


def test_archive_links_and_damage_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as file:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        file.addfile(member)
    assert "not a plain file" in message_of(dataset_download.extract, tmp_path / "link.tar", tmp_path / "out")
    (tmp_path / "torn.tar.gz").write_bytes(archive_with(tmp_path / "a.tar.gz", ["a.jpg"]).read_bytes()[:40])
    assert "damaged archive" in message_of(dataset_download.extract, tmp_path / "torn.tar.gz", tmp_path / "out")
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2/inner").symlink_to(tmp_path)
    archive = archive_with(tmp_path / "b.zip", ["inner/evil.jpg"])
    assert "would leave" in message_of(dataset_download.extract, archive, tmp_path / "out2")
    assert not (tmp_path / "evil.jpg").exists()


@pytest.mark.parametrize("name", list(dataset_sources.READERS))
def test_download_without_network_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name):
    def offline(*arguments, **options):
        raise ConnectionError("Name or service not known\nsecond line")

    import huggingface_hub
    import torchvision.datasets

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(torchvision.datasets.CelebA, "download", offline)
    monkeypatch.setattr(dataset_download, "_require_pyarrow", lambda: None)
    assert datasets.main(["--download", name, "--root", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith(f"error: {name} cannot be downloaded")
    assert not (tmp_path / name).exists()
    assert "Name or service not known" in captured.err and dataset_download.PAGES[name] in captured.err


def test_celeba_is_downloaded_into_the_folder_itself(tmp_path, monkeypatch):
    import torchvision.datasets

    seen = []
    monkeypatch.setattr(
        torchvision.datasets.CelebA, "__init__", lambda self, root, download: seen.append((root, self.base_folder))
    )
    dataset_download.download("celeba", tmp_path / "my-celeba")
    assert seen == [(str(tmp_path), "my-celeba")]


def test_utkface_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    import huggingface_hub

    def fetch(repository, *, repo_type, local_dir, allow_patterns):
        local_dir.mkdir(parents=True)
        archive_with(local_dir / allow_patterns, ["UTKFace/25_0_1_20170116174525125.jpg.chip.jpg"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    dataset_download.download("utkface", tmp_path / "utk")
    assert [p.name for p in (tmp_path / "utk").rglob("*.jpg")] == ["25_0_1_20170116174525125.jpg.chip.jpg"]
    assert not (tmp_path / "utk/download").exists()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: None)
    assert "no file UTKFace.tar.gz any more" in message_of(dataset_download.download, "utkface", tmp_path / "again")


# --------------------------------------------------------------------------------------------------------- command line


def test_check_prints_counts_base_rates_and_problems(tmp_path, capsys):
    root = tmp_path / "fairface"
    rows = make_fairface(root)
    (root / "train/7.jpg").unlink()
    overrides = [f"data.fairface.root={root}", f"data.cache={tmp_path / 'cache'}", "data.fairface.image_size=32"]
    assert datasets.main(["--check", "fairface", "--set", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "test 40" in printed and "base rate" in printed
    assert "problem: 1 images missing, left out: train/7.jpg" in printed
    assert "Middle Eastern & 40 and over" in printed
    females = [row["gender"] for row in rows["val"]].count("Female")
    assert f"{females / 40:.1%}" in printed
    assert datasets.main(["--check", "fairface", "--set", *overrides, "--set", "data.fairface.target=age"]) == 0
    assert "commonest class" in capsys.readouterr().out


def test_check_of_bad_data_or_config_is_one_line_and_status_2(tmp_path, capsys):
    for override in (f"data.utkface.root={tmp_path / 'none'}", "data.utkface.rot=x"):
        assert datasets.main(["--check", "utkface", "--set", override]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out


# ----------------------------------------------------------------------------------------------------------- real faces


@pytest.mark.fairface
def test_real_fairface_loads_and_the_cache_is_fast(fairface_root, tmp_path):
    overrides = [f"data.fairface.root={fairface_root}", f"data.cache={tmp_path}", "data.fairface.max_train=1500"]
    config = load_config(None, [*overrides, "data.fairface.max_test=1000"])
    dataset = datasets.load_dataset(config, "fairface")
    assert dataset.problems == []
    assert len(dataset.splits["train"]) == 1500 and len(dataset.splits["test"]) == 1000
    started = time.perf_counter()
    again = datasets.load_dataset(config, "fairface")
    assert time.perf_counter() - started < 10  # half a second where nothing else runs
    assert again.fingerprint == dataset.fingerprint
    whole = dataset_sources.read_fairface(fairface_root, config.data.fairface)
    names = ("gender", "race", "age")
    _, stratum = np.unique(np.stack([whole.values[name] for name in names], 1), axis=0, return_inverse=True)
    is_train, is_validation = (
        np.bincount(stratum.ravel()[whole.split == name], minlength=126) for name in datasets.SPLITS[:2]
    )
    assert (np.abs(is_validation - 0.1 * (is_train + is_validation)) < 1).all()
    for split in dataset.splits.values():
        assert abs(split.labels.mean() - 0.47) < 0.03
        pixels = split.gather(np.arange(0, len(split), 7))
        assert 60 < pixels.mean() < 160 and pixels.std() > 40
    train = dataset.splits["train"]
    positions = calibration_subset(train, 210, np.random.default_rng(0), balance=["race", "age_group"])
    counts = calibration_counts(train, positions, ["race", "age_group"])
    assert [count.drawn for count in counts] == [10] * 21 and all(count.distinct == 10 for count in counts)


@pytest.mark.fairface
def test_real_fairface_pixels_are_the_files_pixels(fairface_root, tmp_path):
    overrides = [f"data.fairface.root={fairface_root}", f"data.cache={tmp_path}", "data.fairface.max_train=300"]
    dataset = datasets.load_dataset(load_config(None, [*overrides, "data.fairface.max_test=50"]), "fairface")
    split = dataset.splits["test"]
    first_test_index = 24000 if (fairface_root / "train/24000.jpg").exists() else None
    if first_test_index is None:
        pytest.skip("not the subset of 24,000 training images")
    for position in (0, 17, 49):
        with Image.open(fairface_root / f"val/{split.index[position] - first_test_index + 1}.jpg") as image:
            assert np.array_equal(split.gather([position])[0], np.asarray(image.convert("RGB")))
