"""Images as one uint8 file: decoded or drawn once, read by every epoch, every process and every later run.

A cache is a folder `<label>-<hash>/` whose hash covers everything that determines its content. It is written beside
its place and renamed when complete, so that whatever stops the program leaves no cache that would be believed; a lock
makes a second writer of the same cache wait and then read. The file is written through ordinary writes, in chunks:
memory stays flat, and a full disk is an error (through a memory map it would be a bus error). It is read in the same
way: what processes share is the kernel's page cache. Deleting the folder is always safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from owners import NO_LOCKS

try:
    import fcntl
except ImportError:  # Windows: two writers then both do the work, and the first to finish wins
    fcntl = None

DECODER = f"draft-centre-bilinear-1, pillow {PIL.__version__}"  # change it when decode_image changes
CHUNK_BYTES = 4 << 20  # decoded images in a block; two are held at a time
DECODED_TOGETHER = 4  # images that a thread decodes before it looks for more
LOCK_TICK = 0.05  # seconds between two looks at a lock that another process holds
GROWTH_SECONDS = 600.0  # without growth of a part, after which whoever waits for it no longer says that it gets on
LEFT_SECONDS = 3600.0  # since anything was written, after which a part is a leftover where no lock tells
may_decode = threading.Event()  # cleared while this process stands still for another one (execution/quiet.py)
may_decode.set()

Progress = Callable[[str, int, int], None]  # (what, done, total), as long as it gets on


class DataError(ValueError):
    """Data that cannot be used; the message is one line: what is wrong, where, and what to do."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows of a cache that is being written."""

    images: np.ndarray  # (n, H, W, 3) uint8
    broken: dict[int, str] = field(default_factory=dict)  # row within the block -> why it has no image
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (n,) int64


@dataclass(frozen=True, eq=False)
class CachedImages:
    """A complete cache, open for reading."""

    images: ImageFile  # (N, H, W, 3) uint8
    broken: dict[int, str]  # row -> why it has no image (its pixels are black)
    columns: dict[str, np.ndarray]  # name -> (N,) int64, what the blocks carried


class ImageFile:
    """The images of a complete cache, (N, H, W, 3) uint8, read row by row into the caller's memory.

    By ordinary reads, not through a memory map: every first look at a mapped page is a page fault, pages that were
    looked at count as this process's memory, and a disk that goes away is a signal that kills it instead of an OSError.
    Raises ValueError where the file is no such array, or too short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self.path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{path}: not a version that is written here")
            self.shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if is_fortran or dtype != np.uint8 or len(self.shape) != 4 or not self.nbytes:
                raise ValueError(f"{path}: not images of bytes")
            self._start = file.tell()
            if os.fstat(file.fileno()).st_size < self._start + self.nbytes:
                raise ValueError(f"{path}: the file is too short")
            self._descriptor = os.dup(file.fileno())  # it stays readable when the cache is deleted
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n, H, W, 3) uint8, in `out` where that is given (C-contiguous, of this shape); the file is read in ascending
        order whatever the order of rows. Raises OSError where it cannot be."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} images")
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        assert out.dtype == np.uint8 and out.shape == (len(rows), *self.shape[1:]) and out.flags.c_contiguous
        order = np.argsort(rows, kind="stable")
        # What is consecutive in the file and in memory is one read.
        ends = np.flatnonzero((np.diff(rows[order]) != 1) | (np.diff(order) != 1)) + 1
        size, memory = self.nbytes // len(self), memoryview(out.reshape(-1))
        for first, last in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
            if last > first:
                place = int(order[first])
                part = memory[place * size : (place + last - first) * size]
                self._read_into(part, self._start + int(rows[order[first]]) * size)
        return out

    def _read_into(self, memory: memoryview, offset: int) -> None:
        while len(memory):
            if hasattr(os, "preadv"):
                count = os.preadv(self._descriptor, [memory], offset)
            else:  # Windows
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    data = os.read(self._descriptor, len(memory))
                count = len(data)
                memory[:count] = data
            if not count:
                raise OSError(errno.EIO, "the image cache became shorter while it was read", str(self.path))
            memory, offset = memory[count:], offset + count

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.read(np.arange(len(self)))

    def __reduce__(self) -> tuple:
        return ImageFile, (self.path,)


def decoded_images(
    cache: str | Path,
    label: str,
    root: Path,
    files: list[str],
    sizes: np.ndarray,
    image_size: int,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> CachedImages:
    """The images of `files` (paths below `root`, with their sizes in bytes), decoded by `workers` threads.

    The hash covers names, sizes, image size and decoder, not `root`: data that moved are not decoded again. Files that
    are not whole images are in `.broken`; DataError where that is more than half of them.
    """
    key = {"files": files_digest(files, sizes), "decoder": DECODER}

    def decode(images: np.ndarray, first: int, rows: range) -> dict[int, str]:
        """Into these rows of a block that begins at `first` -> row within it: why it has no image."""
        broken = {}
        for row in rows:
            may_decode.wait()
            image = _decode_or_reason(root / files[first + row], image_size)
            if isinstance(image, str):
                broken[row] = image
            else:
                images[row] = image
        return broken

    def blocks() -> Iterator[Block]:
        chunk = max(4 * workers, CHUNK_BYTES // (3 * image_size**2))
        broken, example = 0, ""
        with ThreadPoolExecutor(workers) as pool:

            def begun(first: int) -> tuple[int, np.ndarray, list[Future]]:
                rows = range(min(chunk, len(files) - first))
                images = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
                parts = [rows[at : at + DECODED_TOGETHER] for at in range(0, len(rows), DECODED_TOGETHER)]
                return first, images, [pool.submit(decode, images, first, part) for part in parts]

            def finished(first: int, images: np.ndarray, futures: list[Future]) -> Block:
                nonlocal broken, example
                block = Block(images, {row: why for future in futures for row, why in future.result().items()})
                broken += len(block.broken)
                for row in sorted(block.broken)[: not example]:
                    example = f"{files[first + row]}: {block.broken[row]}"
                return block

            try:
                ahead = None  # the decoders do not wait for whoever writes the block before
                for first in range(0, len(files), chunk):
                    ahead, ready = begun(first), ahead
                    if ready is not None:
                        yield finished(*ready)
                if ahead is not None:
                    yield finished(*ahead)
            finally:
                pool.shutdown(cancel_futures=True)
        if 2 * broken > len(files):
            raise DataError(
                f"{root}: {broken} of {len(files)} images of {label} cannot be decoded ({example}); "
                "get the data again, the download is damaged"
            )

    return cached_images(cache, label, key, len(files), image_size, blocks, progress=progress)


def cached_images(
    cache: str | Path,
    label: str,
    key: dict,
    count: int,
    image_size: int,
    blocks: Callable[[], Iterable[Block]],
    *,
    progress: Progress | None = None,
) -> CachedImages:
    """The cache of (label, key); where there is none, what `blocks()` yields is written first.

    `key` is JSON data that determines the content. Raises DataError where the folder cannot be written or the disk is
    full.
    """
    cache = Path(cache)
    digest = hashlib.sha256(json.dumps([label, count, image_size, key], sort_keys=True).encode()).hexdigest()
    folder = cache / f"{label}-{digest[:16]}"
    shape = (count, image_size, image_size, 3)
    found = _open(folder, shape)
    if found is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        waiting = None
        if progress is not None:
            waiting = _while_it_grows(folder, lambda: progress(f"{label}: waiting for another process", 0, count))
        with _lock(folder, wait=True, waiting=waiting):
            found = _open(folder, shape)  # another process may have written it meanwhile
            if found is None:
                _write(folder, shape, blocks(), label, progress)
    except OSError as error:
        size = np.prod(shape) / 1e9
        raise DataError(
            f"{cache}: the image cache cannot be written: {error.strerror or error} (it needs {size:.2f} GB); "
            "make room, or set data.cache to another folder"
        ) from error
    found = found or _open(folder, shape)
    if found is None:
        raise DataError(f"{folder}: the image cache cannot be read back; delete this folder and run again")
    return found


def decode_image(path: Path, image_size: int) -> np.ndarray:
    """(image_size, image_size, 3) uint8 RGB: the centre square, scaled down by the JPEG decoder as far as it goes (by
    powers of two), then bilinear with antialiasing."""
    with Image.open(path) as image:
        image.draft("RGB", (image_size, image_size))
        image.load()
        image = image if image.mode == "RGB" else image.convert("RGB")
        width, height = image.size
        side = min(width, height)
        if (width, height) != (image_size, image_size):
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)


def files_digest(files: list[str], sizes: np.ndarray) -> str:
    """Digest of names and sizes in bytes."""
    lines = "\n".join(f"{file}\t{size}" for file, size in zip(files, sizes.tolist(), strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


# -------------------------------------------------------------------------------------------------------------- helpers


def _decode_or_reason(path: Path, image_size: int) -> np.ndarray | str:
    """The image, or why the file is not one. A file that cannot be read at all is an error: its content is unknown."""
    try:
        return decode_image(path, image_size)
    except UnidentifiedImageError:
        return "zero bytes" if path.stat().st_size == 0 else "not an image"
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return str(error) or "damaged"  # Pillow's own: truncated or corrupt data
    except (ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError) as error:
        return f"damaged: {' '.join(str(error).split())}"


def _open(folder: Path, shape: tuple[int, ...]) -> CachedImages | None:
    """The cache, or None where there is none or it is damaged."""
    try:
        images = ImageFile(folder / "images.npy")
        contents = json.loads((folder / "contents.json").read_text(encoding="utf-8"))
        with np.load(folder / "columns.npz") as columns:
            columns = dict(columns)
        broken = {int(row): why for row, why in contents["broken"].items()}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError):
        return None
    if images.shape != shape:
        return None
    return CachedImages(images, broken, columns)


def _write(
    folder: Path, shape: tuple[int, ...], blocks: Iterable[Block], label: str, progress: Progress | None
) -> None:
    """Write the cache beside its place, then rename it. The caller holds the lock."""
    count = shape[0]
    needed = int(np.prod(shape)) + (1 << 20)
    if shutil.disk_usage(folder.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        broken: dict[int, str] = {}
        columns: dict[str, list[np.ndarray]] = {}
        done = 0
        with (part / "images.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block.images).data)
                broken.update({done + row: why for row, why in block.broken.items()})
                for name, values in block.columns.items():
                    columns.setdefault(name, []).append(values)
                done += len(block.images)
                if progress is not None:
                    progress(f"{label}: images", done, count)
            assert done == count, (done, count)
            _sync(file)
        with (part / "columns.npz").open("wb") as file:
            np.savez(file, **{name: np.concatenate(values) for name, values in columns.items()})
            _sync(file)
        with (part / "contents.json").open("w", encoding="utf-8") as file:
            json.dump({"images": count, "broken": {str(row): broken[row] for row in sorted(broken)}}, file, indent=1)
            _sync(file)
        if _open(folder, shape) is not None:  # where there are no locks, another one was faster
            shutil.rmtree(part, ignore_errors=True)
            return
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or it would have been opened
        try:
            part.replace(folder)
        except OSError:
            if _open(folder, shape) is None:
                raise
            shutil.rmtree(part, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool, waiting: Callable[[], None] | None = None) -> Iterator[bool | None]:
    """Holds the writer's lock of one cache (the kernel drops it when a process dies); yields whether it was got, None
    where there are no locks: two writers then both do the work. `waiting()` is called again and again meanwhile.

    It is waited for by looking again and again: a worker that waits in flock itself would hear no signal, and could not
    stand still where another one measures a latency (execution/quiet.py). The writer then stands still too, so that
    the three of them would wait for one another.
    """
    if fcntl is None:
        yield None
        return
    with folder.with_name(f".{folder.name}.lock").open("ab") as file:
        while (is_got := _is_got(file)) is False:
            if not wait:
                yield False
                return
            if waiting is not None:
                waiting()
            time.sleep(LOCK_TICK)
        yield is_got


def _while_it_grows(folder: Path, waiting: Callable[[], None]) -> Callable[[], None]:
    """`waiting`, until nothing has been written to this cache for GROWTH_SECONDS: its writer hangs, or was stopped."""
    seen: list[tuple[str, int]] | None = None
    since = 0.0

    def wait() -> None:
        nonlocal seen, since
        if (written := _written(folder)) != seen:
            seen, since = written, time.monotonic()
        if time.monotonic() - since < GROWTH_SECONDS:
            waiting()

    return wait


def _written(folder: Path) -> list[tuple[str, int]]:
    """The parts of this cache, and how many bytes of images each has."""
    found = []
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        with contextlib.suppress(OSError):  # it has just begun, or is being renamed
            found.append((part.name, (part / "images.npy").stat().st_size))
    return sorted(found)


def _is_got(file: IO) -> bool | None:
    """None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _remove_leftovers(cache: Path) -> None:
    """Delete what killed writers left; a part whose lock is held belongs to a living one. Without locks nobody knows
    whether a writer lives: its part stays until nothing has been written to it for LEFT_SECONDS."""
    for part in cache.glob("*.part"):
        with _lock(part.with_name(part.name.rsplit(".", 2)[0]), wait=False) as is_got:
            if is_got or (is_got is None and _seconds_unwritten(part) >= LEFT_SECONDS):
                shutil.rmtree(part, ignore_errors=True)


def _seconds_unwritten(part: Path) -> float:
    """By the clock of the file system, whose machine may be another one; 0 where the part is just being renamed."""
    os.utime(part.parent)
    try:
        return part.parent.stat().st_mtime - max(path.stat().st_mtime for path in (part, *part.iterdir()))
    except FileNotFoundError:
        return 0.0
