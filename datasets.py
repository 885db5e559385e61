"""CelebA, UTKFace, FairFace and synthetic faces in one form: image, label, sensitive attributes, split, stable index.

    dataset = load_dataset(config, "fairface")
    loader = BatchLoader(dataset.splits["train"], 64, shuffle=True, generator=generator, flip=True)

and from a shell

    python datasets.py --download fairface          # into data/datasets/fairface
    python datasets.py --check fairface             # counts, base rates and every problem found

How each set lies on disk is in dataset_sources.py, the decoded images in image_cache.py, batches in batches.py.
This module has the name of a Hugging Face package: nothing here may import what imports that one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import synthetic_faces
from batches import MEAN, STD, BatchLoader
from config import Config, ConfigError, load_config
from dataset_sources import READERS, Samples, listed, name_hashes, stratified_order
from image_cache import Block, CachedImages, DataError, ImageFile, Progress, cached_images, decoded_images, files_digest
from sections.base import DATASETS, suggest
from sections.data import DatasetSection

__all__ = [
    "MEAN",
    "SPLITS",
    "STD",
    "BatchLoader",
    "CalibrationGroup",
    "DataError",
    "FaceDataset",
    "ImageRows",
    "Split",
    "calibration_counts",
    "calibration_subset",
    "intersections",
    "load_dataset",
]

SPLITS = ("train", "validation", "test")
SYNTHETIC_START = {"train": 0, "validation": 10**9, "test": 2 * 10**9}  # first face of each split; they never meet
SYNTHETIC_KNOBS = ("minority_share", "label_correlation", "group_noise", "group_contrast")


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of a cache or an array of images, in any order."""

    images: ImageFile | np.ndarray  # (M, H, W, 3) uint8
    rows: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, positions: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n, H, W, 3) uint8, a copy, in `out` where that is given."""
        rows = self.rows[positions]
        if isinstance(self.images, ImageFile):
            return self.images.read(rows, out)
        if out is None:
            return self.images[rows]
        out[...] = self.images[rows]
        return out


@dataclass(frozen=True, eq=False)
class Split:
    name: str
    labels: np.ndarray  # (N,) int64, positions in the data set's class_names
    sensitive: dict[str, np.ndarray]  # name -> (N,) int64, positions in sensitive_names[name]
    index: np.ndarray  # (N,) int64: which sample of the whole data set; the same whatever else was selected
    images: ImageRows

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, positions: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n, H, W, 3) uint8 images at these positions of the split, in `out` where that is given."""
        return self.images.gather(np.asarray(positions), out)

    def subset(self, positions: np.ndarray) -> Split:
        """The samples at these positions, in this order; one may be there twice. It keeps the split's name."""
        positions = np.asarray(positions)
        sensitive = {name: values[positions] for name, values in self.sensitive.items()}
        images = ImageRows(self.images.images, self.images.rows[positions])
        return Split(self.name, self.labels[positions], sensitive, self.index[positions], images)


@dataclass(frozen=True, eq=False)
class FaceDataset:
    name: str
    image_size: int
    target: str
    class_names: tuple[str, ...]
    sensitive_names: dict[str, tuple[str, ...]]  # attribute -> names of its values
    splits: dict[str, Split]
    fingerprint: str  # hex digest of labels, splits and the images' names and sizes; where they lie does not matter
    problems: list[str]  # one line each: what was found wrong and left out


def load_dataset(
    config: Config, name: str, progress: Progress | None = None, only: Sequence[str] = SPLITS
) -> FaceDataset:
    """The data set as `config.data` describes it, its images cached under `config.data.cache`.

    `max_train` and `max_test` take stratified subsets (label and sensitive attributes) that are nested: a larger
    maximum adds samples to a smaller one's. Validation shrinks with train, in proportion. Only what was selected is
    decoded; an image that cannot be is left out and named in `problems`, and no other takes its place. `progress(what,
    done, total)` is called while images are decoded. `only` these splits are decoded and there, with the same images
    as among all. Raises DataError, one line, for anything that cannot be used.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}{suggest(name, DATASETS)}")
    section = config.dataset(name)
    if section.target in section.sensitive:
        raise DataError(f"data.{name}.sensitive: the target {section.target!r} cannot be a sensitive attribute too")
    if name == "synthetic":
        return _load_synthetic(config, progress, only)
    root = Path(section.root) if section.root is not None else Path("data/datasets") / name
    samples = READERS[name](root.expanduser(), section)
    problems = list(samples.problems)
    splits, contents = {}, {}
    for split, chosen in _select(samples, section).items():
        if split not in only:
            continue
        if not len(chosen):
            raise DataError(f"{samples.root}: the {split} split of {name} is empty: no image of it is there")
        files = samples.files[chosen].tolist()
        sizes = np.array([os.stat(f"{samples.root}/{file}").st_size for file in files])
        contents[split] = files_digest(files, sizes)
        cached = decoded_images(
            config.data.cache,
            f"{name}-{split}-{section.image_size}px",
            samples.root,
            files,
            sizes,
            section.image_size,
            workers=config.data.workers,
            progress=progress,
        )
        if cached.broken:
            reasons = (f"{files[row]} ({why})" for row, why in cached.broken.items())
            problems.append(f"{split}: {listed('images cannot be decoded, left out', reasons)}")
        rows = np.setdiff1d(np.arange(len(files)), list(cached.broken))
        kept = chosen[rows]
        values = {attribute: samples.values[attribute][kept] for attribute in (section.target, *section.sensitive)}
        splits[split] = _split(split, values, section, samples.index[kept], cached, rows)
    return _assemble(name, section, samples.value_names, splits, contents, problems)


@dataclass(frozen=True)
class CalibrationGroup:
    """What a calibration subset took from one group."""

    group: tuple[int, ...]  # value codes, in the order of the attributes
    available: int  # samples of the group in the split
    drawn: int  # positions of the subset in it
    distinct: int  # of these, different samples: fewer than drawn where the group is smaller than its part


def calibration_subset(
    split: Split, n: int, generator: np.random.Generator, *, balance: Sequence[str] | None = None
) -> np.ndarray:
    """Positions of n samples for calibration, in random order.

    Without `balance`: uniform, without replacement; the whole split where it has no more than n. With `balance`,
    attribute names: every group of their intersection that has a sample gets n / groups positions, to within one
    (chance decides which groups get the odd ones); a group smaller than that is repeated as evenly as can be, as
    calibration_counts shows. Raises ValueError for the test split: calibration must not see it.
    """
    if split.name == "test":
        raise ValueError("calibration data must not come from the test split; take train or validation")
    if n < 1:
        raise ValueError(f"a calibration subset needs at least one sample, got {n}")
    if balance is None:
        return generator.permutation(len(split))[:n]
    groups, _ = intersections(split, balance)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    parts = np.full(len(members), n // len(members))
    parts[generator.permutation(len(members))[: n % len(members)]] += 1
    positions = []
    for part, member in zip(parts, members, strict=True):
        whole, rest = divmod(int(part), len(member))
        positions += [np.tile(member, whole), generator.permutation(member)[:rest]]
    return generator.permutation(np.concatenate(positions))


def calibration_counts(split: Split, positions: np.ndarray, balance: Sequence[str]) -> list[CalibrationGroup]:
    """What a subset took from each group that the split has, in the order of the groups."""
    groups, codes = intersections(split, balance)
    drawn = groups[positions]
    return [
        CalibrationGroup(
            group=tuple(codes[group].tolist()),
            available=int((groups == group).sum()),
            drawn=int((drawn == group).sum()),
            distinct=len(np.unique(positions[drawn == group])),
        )
        for group in range(len(codes))
    ]


def intersections(split: Split, attributes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """((N,) group of each sample, (groups, attributes) value codes of each group); only groups that have a sample."""
    if not attributes:
        raise ValueError("no attributes: name at least one")
    for attribute in attributes:
        if attribute not in split.sensitive:
            raise ValueError(f"unknown sensitive attribute {attribute!r}{suggest(attribute, split.sensitive)}")
    codes_NA = np.stack([split.sensitive[attribute] for attribute in attributes], axis=1)
    codes, groups = np.unique(codes_NA, axis=0, return_inverse=True)
    return groups.reshape(-1), codes


# -------------------------------------------------------------------------------------------------------------- helpers


def _select(samples: Samples, section: DatasetSection) -> dict[str, np.ndarray]:
    """split -> positions in samples, ascending by index."""
    strata = _strata([samples.values[attribute] for attribute in (section.target, *section.sensitive)])
    members = {split: np.flatnonzero(samples.split == split) for split in SPLITS}
    limits = {"train": section.max_train, "validation": None, "test": section.max_test}
    if section.max_train is not None and len(members["train"]) > section.max_train:
        limits["validation"] = -(-len(members["validation"]) * section.max_train // len(members["train"]))
    chosen = {}
    for split, member in members.items():
        if limits[split] is not None and len(member) > limits[split]:
            member = member[stratified_order(strata[member], samples.hashes[member])[: limits[split]]]
        chosen[split] = member[np.argsort(samples.index[member])]
    return chosen


def _strata(values: list[np.ndarray]) -> np.ndarray:
    """(N,) one code for each combination of values that occurs."""
    return np.unique(np.stack(values, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _load_synthetic(config: Config, progress: Progress | None, only: Sequence[str]) -> FaceDataset:
    section = config.data.synthetic
    knobs = {name: getattr(section, name) for name in SYNTHETIC_KNOBS}
    counts = {"train": section.train_images, "validation": section.validation_images, "test": section.test_images}
    limits = {"train": section.max_train, "validation": None, "test": section.max_test}
    try:
        # A few faces stand for the renderer in the cache's key: when it draws otherwise, so does the cache.
        probe = synthetic_faces.draw_faces(16, section.image_size, section.seed, **knobs).image
    except ValueError as error:
        raise DataError(f"data.synthetic: {error}") from None
    key = {**knobs, "seed": section.seed, "renderer": hashlib.sha256(probe.tobytes()).hexdigest()}
    splits, contents = {}, {}
    for split, count in counts.items():
        if split not in only:
            continue
        start = SYNTHETIC_START[split]

        def blocks(count=count, start=start):
            for sample in synthetic_faces.iterate_faces(count, section.image_size, section.seed, start=start, **knobs):
                columns = {name: getattr(sample, name) for name in synthetic_faces.VALUE_NAMES}
                yield Block(sample.image, columns=columns)

        label = f"synthetic-{split}-{section.image_size}px"
        contents[split] = json.dumps({**key, "start": start, "count": count}, sort_keys=True)
        cached = cached_images(
            config.data.cache, label, {**key, "start": start}, count, section.image_size, blocks, progress=progress
        )
        rows = np.arange(count)
        if limits[split] is not None and count > limits[split]:
            strata = _strata([cached.columns[attribute] for attribute in (section.target, *section.sensitive)])
            hashes = name_hashes(f"face {start + row}" for row in rows.tolist())
            rows = np.sort(stratified_order(strata, hashes)[: limits[split]])
        values = {name: cached.columns[name][rows] for name in (section.target, *section.sensitive)}
        splits[split] = _split(split, values, section, start + rows, cached, rows)
    return _assemble("synthetic", section, synthetic_faces.VALUE_NAMES, splits, contents, [])


def _split(
    name: str,
    values: dict[str, np.ndarray],
    section: DatasetSection,
    index: np.ndarray,
    cached: CachedImages,
    rows: np.ndarray,
) -> Split:
    arrays = {attribute: np.ascontiguousarray(value, dtype=np.int64) for attribute, value in values.items()}
    sensitive = {attribute: arrays[attribute] for attribute in section.sensitive}
    return Split(name, arrays[section.target], sensitive, index.astype(np.int64), ImageRows(cached.images, rows))


def _assemble(
    name: str,
    section: DatasetSection,
    value_names: dict[str, tuple[str, ...]],
    splits: dict[str, Split],
    contents: dict[str, str],
    problems: list[str],
) -> FaceDataset:
    class_names = tuple(value_names[section.target])
    sensitive_names = {attribute: tuple(value_names[attribute]) for attribute in section.sensitive}
    for split in splits.values():
        problems += _absences(split, section.target, class_names, sensitive_names)
    classes = np.unique(splits["train"].labels) if "train" in splits else range(len(class_names))
    if len(classes) < 2:
        raise DataError(
            f"data.{name}.target: every training image has {section.target} = {class_names[classes[0]]}; "
            "there is nothing to learn: choose another target or get the whole set"
        )
    digest = hashlib.sha256()
    described = [name, section.image_size, section.target, class_names, sensitive_names, contents]
    digest.update(json.dumps(described, sort_keys=True).encode())
    for split in splits.values():
        for values in (split.index, split.labels, *(split.sensitive[attribute] for attribute in sensitive_names)):
            digest.update(values.astype("<i8").tobytes())
            digest.update(b"|")
    return FaceDataset(
        name=name,
        image_size=section.image_size,
        target=section.target,
        class_names=class_names,
        sensitive_names=sensitive_names,
        splits=splits,
        fingerprint=digest.hexdigest(),
        problems=problems,
    )


def _absences(split: Split, target: str, class_names: tuple[str, ...], sensitive_names: dict) -> list[str]:
    """Classes, groups and intersections without a sample: no error, but no metric either."""
    found = []
    for attribute, names, values in (
        (target, class_names, split.labels),
        *((name, names, split.sensitive[name]) for name, names in sensitive_names.items()),
    ):
        absent = sorted(set(range(len(names))) - set(np.unique(values).tolist()))
        found += [f"{split.name}: no image with {attribute} = {names[code]}" for code in absent]
    if len(sensitive_names) > 1:
        present = {tuple(codes) for codes in intersections(split, list(sensitive_names))[1].tolist()}
        sizes = [len(names) for names in sensitive_names.values()]
        absent = [codes for codes in np.ndindex(*sizes) if codes not in present]
        if absent:
            shown = (_group_name(sensitive_names, codes) for codes in absent)
            found.append(f"{split.name}: of {np.prod(sizes)} intersections, {listed('have no image', shown)}")
    return found


def _group_name(sensitive_names: dict[str, tuple[str, ...]], codes: Sequence[int]) -> str:
    return " & ".join(names[code] for names, code in zip(sensitive_names.values(), codes, strict=True))


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line where data or config cannot be used."""
    parser = argparse.ArgumentParser(prog="datasets.py", description="Fetch a data set, or look at what is there.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--download", metavar="NAME", choices=sorted(READERS), help=f"fetch {', '.join(READERS)}")
    action.add_argument("--check", metavar="NAME", choices=DATASETS, help="print its counts and every problem found")
    parser.add_argument("--root", metavar="DIR", help="folder for --download (default: data/datasets/NAME)")
    parser.add_argument("--config", metavar="FILE", help="config for --check (default: configs/config.yaml)")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override a key")
    options = parser.parse_args(arguments)
    try:
        if options.download:
            from dataset_download import download  # the only user of what it needs

            root = Path(options.root or f"data/datasets/{options.download}")
            download(options.download, root)
            print(f"{options.download} is in {root}; python datasets.py --check {options.download} looks at it")
        else:
            if options.root:
                parser.error(f"--root goes with --download; use --set data.{options.check}.root={options.root}")
            default = Path("configs/config.yaml")
            path = options.config or (default if default.is_file() else None)
            _print_check(load_config(path, options.set), options.check)
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_check(config: Config, name: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        dataset = load_dataset(config, name, progress)

    sizes = ", ".join(f"{split.name} {len(split)}" for split in dataset.splits.values())
    console.print(f"{name}: {sizes}; {dataset.image_size} px; fingerprint {dataset.fingerprint[:16]}", highlight=False)
    console.print(_class_table(dataset))
    for attribute in dataset.sensitive_names:
        console.print(_group_table(dataset, [attribute], config.data.min_group_size))
    if len(dataset.sensitive_names) > 1:
        console.print(_group_table(dataset, list(dataset.sensitive_names), config.data.min_group_size))
    for problem in dataset.problems:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(dataset.problems)} problem{'s' * (len(dataset.problems) != 1)} found", highlight=False)


def _class_table(dataset: FaceDataset):
    from rich.table import Table

    table = Table("class", title=f"{dataset.target} (target)", title_justify="left")
    for split in dataset.splits:
        table.add_column(split, justify="right")
        table.add_column("base rate", justify="right")
    for code, name in enumerate(dataset.class_names):
        cells = []
        for split in dataset.splits.values():
            count = int((split.labels == code).sum())
            cells += [str(count), f"{count / len(split):.1%}"]
        table.add_row(name, *cells)
    return table


def _group_table(dataset: FaceDataset, attributes: list[str], min_group_size: int):
    """For each group and split n and, with two classes, the share of the second; else the commonest class."""
    from rich.table import Table

    names = {attribute: dataset.sensitive_names[attribute] for attribute in attributes}
    is_binary = len(dataset.class_names) == 2
    title = " & ".join(attributes) + f" (* fewer than {min_group_size}: left out of the gaps)"
    table = Table("group", title=title, title_justify="left")
    for split in dataset.splits:
        table.add_column(split, justify="right")
        table.add_column(dataset.class_names[1] if is_binary else "commonest class", justify="right")
    for codes in np.ndindex(*(len(values) for values in names.values())):
        cells = []
        for split in dataset.splits.values():
            matches = [split.sensitive[a] == code for a, code in zip(attributes, codes, strict=True)]
            is_in = np.logical_and.reduce(matches)
            count = int(is_in.sum())
            cells.append(f"{count}*" if count < min_group_size else str(count))
            if not count:
                cells.append("–")
                continue
            counts = np.bincount(split.labels[is_in], minlength=len(dataset.class_names))
            shown = 1 if is_binary else int(counts.argmax())
            share = f"{counts[shown] / count:.1%}"
            cells.append(share if is_binary else f"{dataset.class_names[shown]} {share}")
        table.add_row(_group_name(names, codes), *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
