"""What a simulated quantized forward pass costs, and a sensitivity sweep: before and after.

    python benchmarks/simulation_speed.py [--only forward|sweep]

forward: FP32, the plain fake-quantized graph (what was run before), and the fast one that QuantizedModel runs where
only its output is wanted, taking turns in one process; medians, and ratios to FP32. The outputs are compared first:
every bit must agree. sweep: all layers of ResNet-50 at six widths, the whole network run again for each, and only what
comes after the layer. Random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from models import build_model
from quantizers import ptq
from quantizers.sensitivity import measure_sensitivity

MODELS = ("mobilenet_v2", "resnet50")
SIZES = (64, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("forward", "sweep"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep-images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only != "sweep":
        print("| model | pixels | FP32 (ms) | plain (ms) | fast (ms) | plain / FP32 | fast / FP32 |")
        print("|---|---|---|---|---|---|---|")
        for name in MODELS:
            for size in SIZES:
                forward(name, size, arguments.batch, arguments.rounds)
    if arguments.only != "forward":
        sweep(arguments.sweep_images)


def forward(name: str, size: int, batch: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, 2, size, seed=0).to(memory_format=torch.channels_last).eval()
    x = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    quantized = ptq.ptq_static(model, x[:8], weight_bits=8, activation_bits=8)
    ways = {"fp32": model, "plain": quantized.network, "fast": quantized}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        if not torch.equal(ways["plain"](x), ways["fast"](x)):
            raise SystemExit(f"{name}, {size} px: the fast pass gives another output than the plain one")
        model(x)
        for _ in range(rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                run(x)
                seconds[way].append(time.perf_counter() - start)
    fp32, plain, fast = (1000 * statistics.median(seconds[way]) for way in ways)
    print(
        f"| {name} | {size} | {fp32:.0f} | {plain:.0f} | {fast:.0f} | {plain / fp32:.2f} | {fast / fp32:.2f} |",
        flush=True,
    )


def sweep(count: int) -> None:
    model = build_model("resnet50", 2, 64, seed=0)
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(images)
    recipe = ptq.Recipe(weight_observer="minmax")
    model = model.to(memory_format=torch.channels_last).eval()
    quantized = ptq.attach(model, images, "mixed_precision", 8, 8, recipe)
    images = images.to(memory_format=torch.channels_last)
    options = {"weight_observer": recipe.weight_scales()}
    fast = measure_sensitivity(quantized, images, **options)
    slow = measure_sensitivity(quantized, images, reuse_prefix=False, **options)
    off = float(np.abs(fast.values_LW - slow.values_LW).max() / np.abs(slow.values_LW).max())
    print(
        f"\nsensitivity of {len(fast.layers)} layers of resnet50 to {len(fast.widths)} widths, {count} images, 64 px: "
        f"{slow.seconds:.1f} s with the whole network each time, {fast.seconds:.1f} s from the layer on, "
        f"{slow.seconds / fast.seconds:.1f} times faster (largest difference {off:.1e} of the largest sensitivity)"
    )


if __name__ == "__main__":
    main()
