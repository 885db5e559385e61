"""Fetch CelebA, UTKFace and FairFace into the layouts that dataset_sources.py reads.

CelebA comes through torchvision from its authors' drive; UTKFace and FairFace are copies on the Hugging Face hub,
fetched with huggingface_hub. Archives are unpacked member by member, and no member may leave the folder.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset_sources import FAIRFACE_AGES, FAIRFACE_COLUMNS
from image_cache import DataError

FAIRFACE_REPOSITORY = "HuggingFaceM4/FairFace"
FAIRFACE_FOLDER = "0.25"  # the margin round the faces: the tight crops, 224 px
FAIRFACE_PARTS = {"train": "train", "validation": "val"}  # of the repository -> of the official layout
FAIRFACE_CODES = {  # the order of the codes in the repository's files
    "age": FAIRFACE_AGES,
    "gender": ("Male", "Female"),
    "race": ("East Asian", "Indian", "Black", "White", "Middle Eastern", "Latino_Hispanic", "Southeast Asian"),
}
UTKFACE_REPOSITORY = "py97/UTKFace-Cropped"
UTKFACE_ARCHIVE = "UTKFace.tar.gz"
PAGES = {
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "utkface": "https://susanqq.github.io/UTKFace/",
    "fairface": "https://github.com/joojs/fairface",
}


def download(name: str, root: Path) -> None:
    """Fetch one data set into `root`. Raises DataError, one line, where that cannot be done."""
    fetch = {"celeba": _fetch_celeba, "utkface": _fetch_utkface, "fairface": _fetch_fairface}[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch(root)
    except DataError:
        _remove_if_empty(root)
        raise
    except Exception as error:  # every library of the way down has errors of its own; all mean the same here
        _remove_if_empty(root)
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{name} cannot be downloaded into {root}: {why[:200]}; check the network and the disk, or get it from "
            f"{PAGES[name]} and point to it with --set data.{name}.root=DIR"
        ) from error


def extract(archive: Path, folder: Path) -> int:
    """Unpack the files of a .zip or .tar.* into `folder` and count them.

    Raises DataError, before anything is written, where a member would land outside (an absolute name, "..") or is a
    link or a device, and where the archive is damaged.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                members = [member for member in file.infolist() if not member.is_dir()]
                targets = [_inside(folder, member.filename, archive) for member in members]
                for member, target in zip(members, targets, strict=True):
                    with file.open(member) as source:
                        _copy(source, target)
        else:
            with tarfile.open(archive) as file:
                members = [member for member in file.getmembers() if not member.isdir()]
                for member in members:
                    if not member.isfile():
                        raise DataError(
                            f"{archive}: member {member.name!r} is not a plain file; the archive is refused"
                        )
                targets = [_inside(folder, member.name, archive) for member in members]
                for member, target in zip(members, targets, strict=True):
                    _copy(file.extractfile(member), target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive}: damaged archive ({error}); delete it and download again") from error
    return len(members)


def write_fairface(rows: Iterable[dict], root: Path, part: str) -> int:
    """Write rows of the hub's form (image: {bytes}, age, gender, race: code or name, service_test) in official form.

    Images become <part>/1.jpg, <part>/2.jpg, … in the order of the rows, which is the official one; names inside the
    rows are not used. fairface_label_<part>.csv comes last, so that it never names an image that is not there yet.
    """
    folder = root / part
    folder.mkdir(parents=True, exist_ok=True)
    table = root / f"fairface_label_{part}.csv"
    unfinished = table.with_name(table.name + ".part")
    count = 0
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*FAIRFACE_COLUMNS, "service_test"])
        for count, row in enumerate(rows, start=1):
            (folder / f"{count}.jpg").write_bytes(row["image"]["bytes"])
            values = {name: _decoded(name, row[name], names) for name, names in FAIRFACE_CODES.items()}
            labels = [values[name] for name in FAIRFACE_COLUMNS[1:]]
            writer.writerow([f"{part}/{count}.jpg", *labels, bool(row["service_test"])])
    if not count:
        unfinished.unlink()
        raise DataError(f"{root}: the files of FairFace's {part} have no rows; delete them and download again")
    unfinished.replace(table)
    return count


# -------------------------------------------------------------------------------------------------------------- helpers


def _fetch_celeba(root: Path) -> None:
    from torchvision.datasets import CelebA

    # torchvision insists on a sub-folder: it is named so that the files land in root itself
    root = root.resolve()
    here = type("CelebA", (CelebA,), {"base_folder": root.name})
    here(str(root.parent), download=True)


def _fetch_utkface(root: Path) -> None:
    folder = _snapshot(UTKFACE_REPOSITORY, UTKFACE_ARCHIVE, root)
    extract(folder / UTKFACE_ARCHIVE, root)
    shutil.rmtree(folder)


def _fetch_fairface(root: Path) -> None:
    _require_pyarrow()
    folder = _snapshot(FAIRFACE_REPOSITORY, f"{FAIRFACE_FOLDER}/*.parquet", root)
    for source, part in FAIRFACE_PARTS.items():
        files = sorted((folder / FAIRFACE_FOLDER).glob(f"{source}-*.parquet"))
        write_fairface(_parquet_rows(files), root, part)
    shutil.rmtree(folder)


def _snapshot(repository: str, pattern: str, root: Path) -> Path:
    """The files of a repository on the hub that match, below root/download: a second try goes on where one stopped."""
    from huggingface_hub import snapshot_download

    folder = root / "download"
    snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=pattern)
    if not any(folder.glob(pattern)):
        raise DataError(f"{repository} on the hub has no file {pattern} any more; get the set from its own page")
    return folder


def _parquet_rows(files: list[Path]) -> Iterator[dict]:
    _require_pyarrow()
    import pyarrow.parquet

    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DataError(
            "FairFace on the hub is in parquet files; install the reader first: pip install pyarrow"
        ) from None


def _decoded(name: str, value: int | str, names: tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    if not 0 <= value < len(names):
        raise DataError(f"FairFace: unknown code {value} for {name}; the files on the hub have changed")
    return names[value]


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _inside(folder: Path, name: str, archive: Path) -> Path:
    """Where a member goes. An absolute name, "..", a drive, a link that is already there: one check for all."""
    target = folder / name.replace("\\", "/")
    if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{archive}: member {name!r} would leave {folder}; the archive is refused")
    return target


def _copy(source, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)
