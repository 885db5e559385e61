"""What is quantized where, counted on the traced graph of each architecture: python benchmarks/placement.py.

Prints the README's table (Markdown). Nothing is timed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import build_model, count_parameters
from quantizers.graph import prepare
from sections.base import MODELS

# shapes and views move values without changing them: an integer engine does them on integers
MOVES = {
    "flatten",
    "Flatten",
    "reshape",
    "transpose",
    "permute",
    "unbind",
    "getitem",
    "_assert",
    "eq",
    "cat",
    "MaxPool2d",
}


def main() -> None:
    columns = (
        "model",
        "parameters",
        "integer weights",
        "quantized activations",
        "products",
        "residual additions",
        "BatchNorms folded",
        "in float",
    )
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")
    for name in MODELS:
        model = build_model(name, 1000, 224).eval()
        network, placement = prepare(model, 8, lambda name, is_edge: nn.Identity())
        kinds = Counter(type(network.get_submodule(path).layer).__name__ for path in placement.layers)
        layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        floats = ", ".join(f"{n} {op}" for op, n in sorted(placement.float_operations.items()) if op not in MOVES)
        print(
            f"| {name} | {count_parameters(model) / 1e6:.3f}M | {layers} | {len(placement.activation_quantizers)} | "
            f"{len(placement.matmuls)} | {len(placement.additions)} | {len(placement.folded_norms)} | {floats} |"
        )


if __name__ == "__main__":
    main()
