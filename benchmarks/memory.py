"""What it is worth that freed memory is kept (execution/memory.py): images/s of training and evaluation, and the peak.

    python benchmarks/memory.py                                   # three networks at 64 and 224 pixels, one thread
    python benchmarks/memory.py --models resnet50 --sizes 32 --batch 128 --rounds 5

Each measurement is a process of its own, with glibc's memory as it is and as cells have it in turn; medians of the
rounds. Exit status 1 where the two train to other losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 6.0  # that each measurement takes at least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50", "vit_small_patch16_224"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224], help="width and height in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "SIZE", "KEPT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        model, size, kept = options.measure
        print(json.dumps(measure(model, int(size), options.batch, kept == "kept")))
        return 0
    is_same = True
    for model in options.models:
        for size in options.sizes:
            found: dict[str, list[dict]] = {"given back": [], "kept": []}
            for _ in range(options.rounds):
                for kept in found:
                    command = [sys.executable, __file__, "--batch", str(options.batch), "--measure", model, str(size)]
                    output = subprocess.run([*command, kept], check=True, stdout=subprocess.PIPE).stdout
                    found[kept].append(json.loads(output))
            is_same &= len({one["loss"] for ones in found.values() for one in ones}) == 1
            print(
                f"{model}, {size} pixels: {', '.join(compared(found, what) for what in found['kept'][0])}", flush=True
            )
    if not is_same:
        print("DIFFERENT losses")
    return int(not is_same)


def compared(found: dict[str, list[dict]], what: str) -> str:
    before, after = (statistics.median(one[what] for one in ones) for ones in found.values())
    if what == "loss":
        return f"loss {before:.6f} and {after:.6f}"
    unit = "MB" if what == "peak" else "images/s"
    return f"{what} {before:.0f} -> {after:.0f} {unit} ({after / before:.2f} x)"


def measure(name: str, size: int, batch: int, is_kept: bool) -> dict[str, float]:
    import torch

    from evaluation import predict
    from execution import memory
    from execution.run_log import peak_memory_mb
    from models import build_model
    from sections.training import Training
    from training import train

    if is_kept and not memory.keep_freed():
        raise SystemExit("nothing to compare: not glibc, or the environment says how memory is to be had")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(name, 2, image_size=size, pretrained=False)
    batches = [
        {"image": torch.randn(batch, 3, size, size), "label": torch.randint(0, 2, (batch,)), "sensitive": {}}
        for _ in range(2)
    ]
    settings = Training(epochs=1, warmup_epochs=0)
    loss = train(model, batches, None, settings).log[-1]["train_loss"]

    def images_per_second(work) -> float:
        start, passes = time.perf_counter(), 0
        while passes == 0 or time.perf_counter() - start < SECONDS:
            work()
            passes += 1
        return passes * batch * len(batches) / (time.perf_counter() - start)

    return {
        "training": images_per_second(lambda: train(model, batches, None, settings)),
        "evaluation": images_per_second(lambda: predict(model, batches, torch.device("cpu"))),
        "peak": peak_memory_mb(),
        "loss": loss,
    }


if __name__ == "__main__":
    sys.exit(main())
