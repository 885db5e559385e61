"""The data pipeline against a plain torchvision ImageFolder with a DataLoader, in images/s; decoders; peak memory.

    python benchmarks/data_pipeline.py                       # JPEG files that it makes, of the real sets' sizes
    python benchmarks/data_pipeline.py --root DIR            # any folder of images in subfolders
    python benchmarks/data_pipeline.py --only decoders
    python benchmarks/data_pipeline.py --only memory --memory-images 200000   # writes a cache of 30 GB

Both sides give batches of normalised float32 images and labels, with as many workers. *First epoch*: decoding into the
cache, writing it to the disk, and one pass over it. *Later epochs*: a pass over the cache, as for predictions.
*Training*: one in random order that mirrors half of the images, as a study trains by default, and into new memory
(against the same ImageFolder, which does neither). They take turns, round by round; what is printed are medians over
rounds of images a second and of ratios within a round. Where other programs run on the machine, the processor time that
an image costs (of all processes and threads) says more than the wall clock: both are there. *bytes* is a pass that only
gathers uint8 images, all that the CPU does where batches are normalised on a GPU.

ImageFolder's workers are forked before the clock starts to matter (milliseconds); files are in the page cache for both.

Memory is that of a process of its own, which reads a set in FairFace's layout (hard links to a few files), writes the
cache, and runs an epoch in random order. Anonymous memory (RssAnon) is what it needs; the rest of the resident memory
is that of its libraries.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import synthetic_faces
from batches import MEAN, STD, BatchLoader
from datasets import ImageRows, Split
from image_cache import decode_image, decoded_images

SOURCES = {"FairFace": (448, 448), "CelebA": (178, 218), "UTKFace": (200, 200)}  # width, height of their files
SIZES = (224, 64)
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="a folder of images in subfolders, instead of files that it makes")
    parser.add_argument("--only", choices=("speed", "decoders", "memory"))
    parser.add_argument("--images", type=int, default=2000, help="that are made, or taken from --root")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-images", type=int, nargs="+", default=[5000, 10000])
    parser.add_argument("--folder", type=Path, help="for files that it makes (default: the system's)")
    parser.add_argument("--measure-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.workers)
    if arguments.measure_memory:
        print(json.dumps(peak_memory(arguments.measure_memory, arguments.workers)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        if arguments.only != "memory":
            roots = {"files": arguments.root} if arguments.root else made_sets(folder, arguments.images)
            if arguments.only != "decoders":
                speeds(roots, folder, arguments)
            if arguments.only != "speed":
                decoders(roots, arguments)
        if arguments.only == "memory":
            memory(folder, arguments)


def made_sets(folder: Path, count: int) -> dict[str, Path]:
    """Synthetic faces as JPEG files of quality 90, in two folders, one set for each size of the real files."""
    roots = {}
    for name, (width, height) in SOURCES.items():
        root = folder / name
        for number, pixels in enumerate(faces(count, max(width, height))):
            path = root / str(number % 2) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[:height, :width]).save(path, quality=90)
        roots[f"{name} ({width}x{height})"] = root
    return roots


def faces(count: int, size: int):
    for sample in synthetic_faces.iterate_faces(count, size, 0, start=0):
        yield from sample.image


# ---------------------------------------------------------------------------------------------------------------- speed


def speeds(roots: dict[str, Path], folder: Path, arguments: argparse.Namespace) -> None:
    ours = itertools.chain.from_iterable((way, "ratio") for way in ("first epoch", "later epochs", "training", "bytes"))
    columns = ("files", "pixels", "ImageFolder", *ours)
    print(f"images/s, {arguments.workers} workers, median of {arguments.rounds} rounds; in brackets by processor time")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for name, root in roots.items():
        for size in arguments.sizes:
            rounds = [one_round(root, size, folder / "cache", arguments) for _ in range(arguments.rounds)]
            print(f"| {name} | {size} | {' | '.join(summary(rounds))} |", flush=True)


def one_round(root: Path, size: int, cache: Path, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """What -> (wall, processor) seconds an image."""
    steps = [
        transforms.Resize(size),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = ImageFolder(str(root), transforms.Compose(steps))
    folder.samples = folder.samples[:: max(1, len(folder.samples) // arguments.images)][: arguments.images]
    files = [os.path.relpath(path, root) for path, _ in folder.samples]
    labels = np.array([label for _, label in folder.samples])
    sizes = np.array([os.stat(root / file).st_size for file in files])
    shutil.rmtree(cache, ignore_errors=True)

    def plain() -> None:
        loader = DataLoader(
            folder, BATCH, num_workers=arguments.workers, multiprocessing_context="fork" if arguments.workers else None
        )
        consume((images, labels) for images, labels in loader)

    def cached(**options) -> BatchLoader:
        found = decoded_images(cache, "benchmark", root, files, sizes, size, workers=arguments.workers)
        assert not found.broken, found.broken
        rows = np.arange(len(files))
        split = Split("train", labels, {}, rows, ImageRows(found.images, rows))
        return BatchLoader(split, BATCH, channels_last=True, **options)

    def consume(batches) -> None:
        seen = sum(len(images) for images, _ in batches)
        assert seen == len(files), (seen, len(files))

    def passed(**options) -> None:
        consume((batch["image"], batch["label"]) for batch in cached(**options))

    def predicted() -> None:
        passed(recycle=True)

    def trained() -> None:
        passed(shuffle=True, flip=True, generator=torch.Generator().manual_seed(0))

    def gathered() -> None:
        split = cached().split
        consume((split.gather(np.arange(i, min(i + BATCH, len(split)))), None) for i in range(0, len(split), BATCH))

    ways = {
        "ImageFolder": plain,
        "first epoch": predicted,  # there is no cache yet
        "later epochs": predicted,
        "training": trained,
        "bytes": gathered,
    }
    return {way: timed(run, len(files)) for way, run in ways.items()}


def timed(run: Callable[[], None], count: int) -> tuple[float, float]:
    wall, before = time.perf_counter(), os.times()
    run()
    after = os.times()  # children that have ended included
    return (time.perf_counter() - wall) / count, sum(after[:4]) / count - sum(before[:4]) / count


def summary(rounds: list[dict[str, tuple[float, float]]]) -> list[str]:
    cells = []
    for way in rounds[0]:
        # a pass may be shorter than the clock of processor time: its mean over rounds, in the end, is not
        wall, processor = zip(*(each[way] for each in rounds), strict=True)
        cells.append(f"{1 / statistics.median(wall):.0f}")
        if way != "ImageFolder":
            plain_wall, plain_processor = zip(*(each["ImageFolder"] for each in rounds), strict=True)
            ratio = statistics.median(a / b for a, b in zip(plain_wall, wall, strict=True))
            spent = sum(processor)
            by_processor = f"{sum(plain_processor) / spent:.1f}" if spent else "–"
            cells.append(f"{ratio:.1f} ({by_processor})")
    return cells


# ------------------------------------------------------------------------------------------------------------- decoders


def decoders(roots: dict[str, Path], arguments: argparse.Namespace, count: int = 100) -> None:
    """Milliseconds of one thread for a square image from a file, and grey levels away from exact decoding and the same
    antialiased resize of its centre square."""
    torch.set_num_threads(1)
    ways = {
        "Pillow, no scaling": exactly,
        "Pillow, DCT scaling (used)": decode_image,
        "torchvision.io": with_torchvision,
    }
    try:
        import simplejpeg  # noqa: F401

        ways["simplejpeg, DCT scaling"] = with_simplejpeg
    except ImportError:
        print("simplejpeg is not installed: left out")
    print("\n| files | pixels | decoder | ms of processor time | mean difference | 99 % | largest |")
    print("|---|---|---|---|---|---|---|")
    for name, root in roots.items():
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
        for size in arguments.sizes:
            exact = [exactly(path, size).astype(int) for path in files]
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way, decode in ways.items():
                    start = time.process_time()
                    for path in files:
                        decode(path, size)
                    seconds[way].append((time.process_time() - start) / len(files))
            for way, decode in ways.items():
                off = np.concatenate(
                    [
                        np.abs(decode(path, size).astype(int) - pixels).ravel()
                        for path, pixels in zip(files, exact, strict=True)
                    ]
                )
                print(
                    f"| {name} | {size} | {way} | {1000 * statistics.median(seconds[way]):.2f} | {off.mean():.2f} | "
                    f"{np.percentile(off, 99):.0f} | {off.max()} |",
                    flush=True,
                )


def exactly(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        image = image.convert("RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        if (width, height) != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        return np.asarray(image)


def with_torchvision(path: Path, size: int) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return resized(decode_jpeg(read_file(str(path)), ImageReadMode.RGB), size)


def with_simplejpeg(path: Path, size: int) -> np.ndarray:
    import simplejpeg

    data = path.read_bytes()
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": min(size, height), "min_width": min(size, width), "min_factor": 1}
    pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", **least)
    return resized(torch.from_numpy(pixels_HWC).permute(2, 0, 1), size)


def resized(pixels_CHW: torch.Tensor, size: int) -> np.ndarray:
    """The centre square in `size`, by torch's antialiased bilinear filter for bytes."""
    _, height, width = pixels_CHW.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2  # whole pixels: half a one off where the rest is odd
    square = pixels_CHW[None, :, top : top + side, left : left + side]
    if side != size:
        square = torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return square[0].permute(1, 2, 0).numpy()


# --------------------------------------------------------------------------------------------------------------- memory


def memory(folder: Path, arguments: argparse.Namespace) -> None:
    print("\n| images | pixels | cache (GB) | peak anonymous (MB) | peak resident (MB) | loading (s) | an epoch (s) |")
    print("|---|---|---|---|---|---|---|")
    for count in arguments.memory_images:
        root = folder / f"fairface-{count}"
        make_fairface(root, count)
        command = [sys.executable, __file__, "--measure-memory", str(root), "--workers", str(arguments.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {found['images']} | {SIZES[0]} | {found['cache_bytes'] / 1e9:.1f} | {found['RssAnon'] / 1e6:.0f} | "
            f"{found['VmRSS'] / 1e6:.0f} | {found['load']:.0f} | {found['epoch']:.0f} |",
            flush=True,
        )
        shutil.rmtree(root)


def make_fairface(root: Path, count: int) -> None:
    """FairFace's layout with `count` images, nine tenths of them for training, which are 100 real files."""
    pixels = list(faces(100, SIZES[0]))
    for folder in ("originals", "train", "val"):
        (root / folder).mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(root / "originals" / f"{number}.jpg", quality=90)
    numbers = {"train": range(count - count // 10), "val": range(count // 10)}
    ages, races = ("20-29", "3-9", "60-69"), ("White", "Black", "Indian")
    for split, members in numbers.items():
        with (root / f"fairface_label_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "age", "gender", "race", "service_test"))
            for number in members:
                os.link(root / "originals" / f"{number % len(pixels)}.jpg", root / split / f"{number + 1}.jpg")
                gender = ("Male", "Female")[number % 2]
                row = (f"{split}/{number + 1}.jpg", ages[number // 2 % 3], gender, races[number // 6 % 3], True)
                writer.writerow(row)


def peak_memory(root: Path, workers: int) -> dict[str, float]:
    """Of this process, sampled every 20 ms, in bytes."""
    from config import load_config
    from datasets import load_dataset

    peak = {"RssAnon": 0, "VmRSS": 0}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], 1024 * int(value.split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        overrides = [f"data.fairface.root={root}", f"data.cache={root / 'cache'}", f"data.workers={workers}"]
        start = time.perf_counter()
        dataset = load_dataset(load_config(None, [*overrides, f"data.fairface.image_size={SIZES[0]}"]), "fairface")
        loaded = time.perf_counter()
        seen = 0
        for split in dataset.splits.values():
            generator = torch.Generator().manual_seed(0)
            for batch in BatchLoader(split, BATCH, shuffle=True, generator=generator, channels_last=True, recycle=True):
                seen += len(batch["image"])
        over = time.perf_counter()
    finally:
        is_over.set()
        watcher.join()
    cache_bytes = sum(path.stat().st_size for path in (root / "cache").rglob("images.npy"))
    return {**peak, "images": seen, "cache_bytes": cache_bytes, "load": loaded - start, "epoch": over - loaded}


if __name__ == "__main__":
    main()
