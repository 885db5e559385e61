"""Your own model and your own data: the cheapest 2-bit model that costs no group more than 6 points.

    python examples/own_model.py

Here the data are discs and squares, a third of them in dim light, and the model is a small network trained on the spot.
Replace both: all that is needed is an nn.Module, and batches of (images, labels, {attribute: codes}).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.nn import functional as F

from quantization import FairnessAwareQuantizer


def batches(n: int, seed: int, size: int = 100) -> list[tuple]:
    """Images (3, 16, 16) of a disc (0) or a square (1), in bright (0) or dim (1) light."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (n,), generator=generator)
    dim = (torch.rand(n, generator=generator) < 1 / 3).long()
    x, y, radius = (
        torch.rand(3, n, 1, 1, generator=generator) * torch.tensor([4.0, 4.0, 2.0])[:, None, None, None]
    ) + 4
    down, right = torch.arange(16.0).view(1, 16, 1) - y - 1.5, torch.arange(16.0).view(1, 1, 16) - x - 1.5
    is_disc, is_square = (down**2 + right**2).sqrt() < radius, torch.maximum(down.abs(), right.abs()) < 0.886 * radius
    shape = torch.where(label.view(-1, 1, 1) == 1, is_square, is_disc).float()
    image = shape * torch.where(dim.view(-1, 1, 1) == 1, 0.4, 1.5) + 0.15 * torch.randn(n, 16, 16, generator=generator)
    images = image[:, None].expand(n, 3, 16, 16).contiguous()
    parts = zip(images.split(size), label.split(size), dim.split(size), strict=True)
    return [(image, label, {"lighting": light}) for image, label, light in parts]


def main() -> None:
    torch.manual_seed(0)
    train, held_out, test = batches(6000, seed=0), batches(15000, seed=1), batches(6000, seed=2)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(800, 2))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(5):
        for x, y, _ in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    quantizer = FairnessAwareQuantizer(bit_width=2, max_worst_group_drop=0.06, sensitive_attributes=["lighting"])
    quantized = quantizer.quantize(model=model.eval(), calibration_data=held_out, train_data=train)
    print(quantizer.summary())
    for name, each in (("FP32", model), ("2 bits", quantized)):
        right = [torch.cat([each(x).argmax(1) == y for x, y, _ in test])[lights(test) == g] for g in (0, 1)]
        bright, dim = (100 * part.float().mean().item() for part in right)
        print(f"{name}: {bright:.1f} % right in bright light, {dim:.1f} % in dim light")


def lights(loader: list[tuple]) -> torch.Tensor:
    return torch.cat([sensitive["lighting"] for _, _, sensitive in loader])


if __name__ == "__main__":
    main()
