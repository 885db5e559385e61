"""The layouts of CelebA, UTKFace and FairFace on disk -> one table of samples. Labels only; no image is opened here.

Whatever is decided about a sample here (its index, its split) follows from its name and the label files alone, never
from the order of rows, the images that happen to be there, or what the study takes as target. To add a data set, write
a reader `(root, section) -> Samples` and name it in READERS.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from image_cache import DataError
from sections.base import suggest
from sections.data import CelebA, DatasetSection, FairFace, UTKFace

AGE_GROUPS = ("under 20", "20-39", "40 and over")
EXTRACT_TEST_SHARE = 0.2  # of an extract of CelebA that holds no official test image


@dataclass(frozen=True, eq=False)
class Samples:
    """Every sample that the label files name; those without an image have split "missing"."""

    root: Path  # the files are below it
    files: np.ndarray  # (N,) str, relative, with "/"
    split: np.ndarray  # (N,) str: train, validation, test or missing
    index: np.ndarray  # (N,) int64: rank of the sample's name in the whole set
    hashes: np.ndarray  # (N,) uint64 of the sample's name: the source of everything random
    values: dict[str, np.ndarray]  # attribute -> (N,) int64, positions in value_names
    value_names: dict[str, tuple[str, ...]]
    problems: list[str]


# --------------------------------------------------------------------------------------------------------------- CelebA

CELEBA_VALUE_NAMES = {"Male": ("female", "male"), "Young": ("old", "young")}
CELEBA_IMAGES = tuple(
    f"{parent}{folder}"
    for parent in ("", "Img/")
    for folder in ("img_align_celeba", "img_align_celeba/img_align_celeba")
)


def read_celeba(root: Path, section: CelebA) -> Samples:
    """The official layout (list_attr_celeba.txt, list_eval_partition.txt) or Kaggle's (the same names as .csv).

    An extract may lack rows and images. Where it holds no image of the official validation or test split (the first so
    many images are all training images), that split is cut from train, by name, and `problems` says so.
    """
    attributes = [section.target, *section.sensitive]
    table, claimed, path = _celeba_table(_celeba_file(root, "list_attr_celeba", ("", "Anno/")), attributes, section)
    partition_path = _celeba_file(root, "list_eval_partition", ("", "Eval/"))
    partition = _celeba_partition(partition_path)
    problems = []
    if claimed is not None and claimed != len(table):
        problems.append(f"{path.name}: the header says {claimed} rows, the file has {len(table)}")
    table = _without_twins(table, path, problems)
    values = {}
    for name in attributes:
        values[name], table = _codes(table, name, {"-1": 0, "0": 0, "1": 1}, path, problems, values)
    split = table["file"].map(partition)
    _report(problems, f"{path.name}: rows that {partition_path.name} does not have", table["file"][split.isna()])
    split = split.fillna("missing").to_numpy(dtype=object)
    index, hashes = _rank(table["file"]), name_hashes(table["file"])

    folder, listing = _celeba_images(root)
    is_there = table["file"].isin(listing).to_numpy()
    _report_missing(problems, folder, table["file"], is_there)
    split[~is_there] = "missing"
    for wanted, share in (("test", EXTRACT_TEST_SHARE), ("validation", section.validation_share)):
        if not (split == wanted).any() and (split == "train").any():
            candidates = np.flatnonzero(split == "train")
            split[candidates] = carve(np.zeros(len(candidates), np.int64), hashes[candidates], {wanted: share})
            problems.append(
                f"no image of the official {wanted} split is here: {(split == wanted).sum()} images "
                f"({share:.0%} of train, chosen by name) take its place"
            )
    names = {name: CELEBA_VALUE_NAMES.get(name, (f"not {name}", name)) for name in attributes}
    return Samples(folder, table["file"].to_numpy(dtype=object), split, index, hashes, values, names, problems)


def _celeba_file(root: Path, stem: str, parents: tuple[str, ...]) -> Path:
    _require_folder(root, "celeba")
    for suffix in (".txt", ".csv"):
        for parent in parents:
            path = root / f"{parent}{stem}{suffix}"
            if path.is_file():
                return path
    raise DataError(f"{root}: neither {stem}.txt nor {stem}.csv is there; {_get_it('celeba')}")


def _celeba_table(path: Path, attributes: list[str], section: CelebA) -> tuple[pd.DataFrame, int | None, Path]:
    """(file and the wanted attributes as text, the count that the header claims, path)."""
    _require_text(path, "celeba")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    is_csv = path.suffix == ".csv"
    claimed = int(first) if first.isdecimal() and not is_csv else None
    header = first if claimed is None else second
    columns = [name.strip() for name in header.split(",")][1:] if is_csv else header.split()
    if "image_id" in columns[:1]:  # an official file given a complete header
        columns = columns[1:]
    for position, name in enumerate(attributes):
        if name not in columns:
            key = "target" if position == 0 else "sensitive"
            raise DataError(f"data.celeba.{key}: {path} has no attribute {name!r}{suggest(name, columns)}")
    table = _read_table(
        path,
        "celeba",
        sep="," if is_csv else r"\s+",
        skiprows=1 if claimed is None else 2,
        header=None,
        names=["file", *columns],
        usecols=["file", *attributes],
    )
    return table, claimed, path


def _celeba_partition(path: Path) -> dict[str, str]:
    _require_text(path, "celeba")
    is_csv = path.suffix == ".csv"
    table = _read_table(
        path, "celeba", sep="," if is_csv else r"\s+", skiprows=int(is_csv), header=None, names=["file", "part"]
    )
    split = table["part"].map({"0": "train", "1": "validation", "2": "test"})
    if split.isna().any():
        row = int(split.isna().argmax())
        raise DataError(
            f"{path}: line {row + 1 + is_csv}: unknown partition {table['part'].iloc[row]!r}; "
            "0 is train, 1 validation, 2 test"
        )
    return dict(zip(table["file"], split, strict=True))


def _celeba_images(root: Path) -> tuple[Path, list[str]]:
    for candidate in CELEBA_IMAGES:
        listing = _listing(root / candidate)
        if listing:
            return root / candidate, listing
    raise DataError(f"{root}: no images in img_align_celeba/; {_get_it('celeba')}")


# -------------------------------------------------------------------------------------------------------------- UTKFace

UTKFACE_NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d+)(\.jpg\.chip)?\.(?:jpg|jpeg|png)", re.IGNORECASE)
UTKFACE_VALUE_NAMES = {
    "gender": ("male", "female"),
    "race": ("White", "Black", "Asian", "Indian", "Others"),
    "age_group": AGE_GROUPS,
}


def read_utkface(root: Path, section: UTKFace) -> Samples:
    """`[age]_[gender]_[race]_[date&time].jpg` or `.jpg.chip.jpg`, in any folder below root.

    The same sample may be there several times (the whole photograph and its aligned crop, or copies in several
    folders, as in Kaggle's archive); one is taken, the crop first, since a copy could sit on both sides of the split.
    The split is stratified by gender, race and age group, and decided by a hash of each name within its stratum: a
    file that comes or goes moves at most a sample or two of its own stratum.
    """
    _require_folder(root, "utkface")
    found, malformed = [], []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            match = UTKFACE_NAME.fullmatch(name)
            if match is not None:
                age, gender, race, date, chip = match.groups()
                sample = f"{age}_{gender}_{race}_{date}"
                found.append((sample, chip is None, prefix + name, int(age), int(gender), int(race)))
            elif name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith("."):
                malformed.append(prefix + name)
    if not found:
        example = f" ({len(malformed)} images have other names, such as {malformed[0]})" if malformed else ""
        raise DataError(f"{root}: no image named [age]_[gender]_[race]_[date].jpg{example}; {_get_it('utkface')}")
    problems: list[str] = []
    _report(problems, "malformed names, left out", sorted(malformed))
    table = pd.DataFrame(sorted(found), columns=["name", "is_whole", "file", "age", "gender", "race"])
    twins = table.duplicated("name")
    _report(problems, "further copies of a sample, left out", table["file"][twins])
    table = table[~twins]
    values = {name: table[name].to_numpy(np.int64) for name in ("gender", "race")}
    values["age_group"] = np.digitize(table["age"].to_numpy(), [20, 40]).astype(np.int64)
    hashes = name_hashes(table["name"])
    strata = (values["gender"] * 5 + values["race"]) * 3 + values["age_group"]
    shares = {"test": section.test_share, "validation": (1 - section.test_share) * section.validation_share}
    split = carve(strata, hashes, shares)
    files = table["file"].to_numpy(dtype=object)
    return Samples(root, files, split, _rank(table["name"]), hashes, values, UTKFACE_VALUE_NAMES, problems)


# ------------------------------------------------------------------------------------------------------------- FairFace

FAIRFACE_AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
FAIRFACE_AGE_GROUP = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])  # of each age, in AGE_GROUPS
FAIRFACE_VALUE_NAMES = {
    "gender": ("Male", "Female"),
    "race": ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"),
    "age": FAIRFACE_AGES,
    "age_group": AGE_GROUPS,
}
FAIRFACE_COLUMNS = ("file", "age", "gender", "race")


def read_fairface(root: Path, section: FairFace) -> Samples:
    """The official CSVs with the images where they say (train/1.jpg), below root or root/fairface-img-*.

    The official val is the test split. Validation is cut from train, stratified by gender, race and age; with a hash of
    each name within its stratum it is always the same.
    """
    _require_folder(root, "fairface")
    problems: list[str] = []
    tables = []
    for part in ("train", "val"):
        path = root / f"fairface_label_{part}.csv"
        _require_text(path, "fairface")
        table = _read_table(path, "fairface", skipinitialspace=True)
        table.columns = table.columns.str.strip()
        for column in FAIRFACE_COLUMNS:
            if column not in table.columns:
                has = ", ".join(map(str, table.columns[:8]))
                raise DataError(f"{path}: no column {column!r} (it has {has}); {_get_it('fairface')}")
        table = _without_twins(table[list(FAIRFACE_COLUMNS)], path, problems)
        codes: dict[str, np.ndarray] = {}
        for name in ("gender", "race", "age"):
            known = {value: code for code, value in enumerate(FAIRFACE_VALUE_NAMES[name])}
            codes[name], table = _codes(table, name, known, path, problems, codes)
        tables.append(table[["file"]].assign(part=part, **codes))
    table = pd.concat(tables, ignore_index=True)
    table = _without_twins(table, root / "fairface_label_val.csv", problems)

    values = {name: table[name].to_numpy(np.int64) for name in ("gender", "race", "age")}
    values["age_group"] = FAIRFACE_AGE_GROUP[values["age"]].astype(np.int64)
    hashes = name_hashes(table["file"])
    is_train = (table["part"] == "train").to_numpy()
    split = np.full(len(table), "test", dtype=object)
    strata = (values["gender"] * 7 + values["race"]) * 9 + values["age"]
    split[is_train] = carve(strata[is_train], hashes[is_train], {"validation": section.validation_share})

    folder = next((f for f in (root, *sorted(root.glob("fairface-img-*"))) if (f / "train").is_dir()), root)
    parents = table["file"].str.rpartition("/")[0]
    outside = parents.str.startswith("/") | parents.str.contains(r"(?:^|/)\.\.(?:/|$)")
    listing: list[str] = []
    for parent in sorted(parents[~outside].unique()):
        listing += [f"{parent}/{name}" if parent else name for name in _listing(folder / parent)]
    is_there = table["file"].isin(listing).to_numpy()
    _report_missing(problems, folder, table["file"], is_there)
    split[~is_there] = "missing"
    index = _rank(table["file"], table["part"])
    files = table["file"].to_numpy(dtype=object)
    return Samples(folder, files, split, index, hashes, values, FAIRFACE_VALUE_NAMES, problems)


READERS: dict[str, Callable[[Path, DatasetSection], Samples]] = {
    "celeba": read_celeba,
    "utkface": read_utkface,
    "fairface": read_fairface,
}


# ----------------------------------------------------------------------------------- choices that follow from the names


def name_hashes(names: Iterable[str]) -> np.ndarray:
    """(N,) uint64: the same for a name on every machine and in every release."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def carve(strata: np.ndarray, hashes: np.ndarray, shares: dict[str, float]) -> np.ndarray:
    """(N,) str: each share's name for the samples of lowest hash in each stratum, "train" for the others.

    A stratum of n gives n * share samples, rounded up or down by a fixed draw of its own, so that many small strata
    lose nothing on the whole and no stratum knows of another.
    """
    split = np.full(len(strata), "train", dtype=object)
    rank, size = _rank_in_stratum(strata, hashes)
    values, stratum = np.unique(strata, return_inverse=True)
    rounding = (name_hashes(f"stratum {value}" for value in values.tolist()) / 2.0**64)[stratum]
    start, total = np.zeros(len(strata)), 0.0
    for name, share in shares.items():
        total += share
        end = np.floor(size * total + rounding)
        split[(rank >= start) & (rank < end)] = name
        start = end
    return split


def stratified_order(strata: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """(N,) positions in an order of which every beginning holds the same share of each stratum, to within one sample.

    Where in the order a stratum has its first sample is left to that sample's hash: small strata come in one by one.
    """
    rank, size = _rank_in_stratum(strata, hashes)
    _, stratum = np.unique(strata, return_inverse=True)
    start = np.empty(stratum.max() + 1)
    is_first = rank == 0
    start[stratum[is_first]] = (
        hashes[is_first] % 2**32
    ) / 2.0**32  # the low bits: rank 0 is where the high ones are low
    return np.lexsort((hashes, (rank + start[stratum]) / size))


def _rank_in_stratum(strata: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rank by hash within the sample's stratum, size of the stratum)."""
    _, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.lexsort((hashes, stratum))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - first[stratum[order]]
    return rank, sizes[stratum]


def _rank(names: pd.Series, parts: pd.Series | None = None) -> np.ndarray:
    """(N,) int64 rank in natural order (2.jpg before 10.jpg), part by part."""
    keys = [names.to_numpy(dtype=str), names.str.len().to_numpy()]
    if parts is not None:
        keys.append(parts.to_numpy(dtype=str))
    rank = np.empty(len(names), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(names))
    return rank


# --------------------------------------------------------------------------------------------------- reading and saying


def listed(what: str, names: Iterable[str], limit: int = 20) -> str:
    """'3 <what>: a, b, c', cut after `limit` names."""
    names = list(names)
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {what}: {', '.join(names[:limit])}{more}"


def _report(problems: list[str], what: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        problems.append(listed(what, names))


def _report_missing(problems: list[str], folder: Path, files: pd.Series, is_there: np.ndarray) -> None:
    if not len(files):
        raise DataError(f"{folder}: the label file has no row that can be used")
    if not is_there.any():
        raise DataError(
            f"{folder}: none of the {len(files)} images that the label file names is there, such as {files.iloc[0]}"
        )
    _report(problems, "images missing, left out", files[~is_there])


def _get_it(name: str) -> str:
    return f"get it with `python datasets.py --download {name}`, or point to yours with --set data.{name}.root=DIR"


def _require_folder(root: Path, name: str) -> None:
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {what}: {name} is not here; {_get_it(name)}")


def _require_text(path: Path, name: str) -> None:
    """Refuses a label file that is missing, empty or a web page."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise DataError(f"{path}: no such label file; {_get_it(name)}") from None
    except OSError as error:
        raise DataError(f"{path}: the label file cannot be read: {error.strerror}") from error
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise DataError(f"{path}: the label file is empty; {_get_it(name)}")
    if head.startswith(b"<"):
        raise DataError(f"{path}: a web page, not a label file (a download that failed); {_get_it(name)}")


def _read_table(path: Path, name: str, **options) -> pd.DataFrame:
    """All columns as text; an absent value is ''."""
    try:
        table = pd.read_csv(path, dtype=object, keep_default_na=False, encoding="utf-8-sig", **options).fillna("")
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: no rows; {_get_it(name)}") from None
    except (pd.errors.ParserError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: not a table of labels: {' '.join(str(error).split())}") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the surplus for an index
        raise DataError(f"{path}: not a table of labels: its first row has more columns than the header")
    if table.empty:
        raise DataError(f"{path}: no rows; {_get_it(name)}")
    return table


def _without_twins(table: pd.DataFrame, path: Path, problems: list[str]) -> pd.DataFrame:
    twins = table.duplicated("file")
    _report(problems, f"rows of {path.name} repeat a file, left out", table["file"][twins])
    return table[~twins]


def _codes(
    table: pd.DataFrame,
    column: str,
    known: dict[str, int],
    path: Path,
    problems: list[str],
    earlier: dict[str, np.ndarray],
) -> tuple[np.ndarray, pd.DataFrame]:
    """The column as codes. Rows without a value (a line cut off) leave the table and the `earlier` codes; a value that
    is not known is an error."""
    codes = table[column].map(known)
    unknown = table[column][codes.isna() & (table[column] != "")]
    if len(unknown):
        value, file = unknown.iloc[0], table["file"].loc[unknown.index[0]]
        raise DataError(f"{path}: {file}: unknown {column} {value!r}{suggest(value, known)}")
    is_absent = codes.isna().to_numpy()
    _report(problems, f"rows of {path.name} without {column}, left out", table["file"][is_absent])
    for name in earlier:
        earlier[name] = earlier[name][~is_absent]
    return codes[~is_absent].to_numpy(np.int64), table[~is_absent]


def _listing(folder: Path) -> list[str]:
    """Names of the files in a folder; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
