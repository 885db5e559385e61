"""Which cell is given to a worker first: the longest, since one that begins when the others end is what all wait for.

Longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 1969) ends at
most a third later than the best order, any order up to twice as late. How long a cell takes is not known before; what
counts is which of two takes longer, for which a rough count of operations will do. No result depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from config import Config
from plan import Cell

DEPTHWISE = 5.0  # networks of depthwise convolutions wait for memory: their operations take so many times as long
# 10^9 multiply-accumulates of an image of 224 pixels, as torchvision and timm publish them
OPERATIONS = {
    "resnet50": 4.09,
    "mobilenet_v2": 0.30 * DEPTHWISE,
    "squeezenet1_1": 0.35,
    "efficientnet_b0": 0.39 * DEPTHWISE,
    "vit_small_patch16_224": 4.61,
}
UNKNOWN_OPERATIONS = 4.0  # of another model: rather too early than too late
TRAINING = 3.0  # a training step, in forward passes
LAYERS = 50  # of a network, which are measured one by one, in half a pass each
SIMULATION = 2.0  # a pass with rounded weights and activations, in float passes; so is a training step with them
# training, validation and test images, official splits (UTKFace has none: the config's shares), of all images
PUBLISHED = {"celeba": (162_770, 19_867, 19_962), "fairface": (86_744, 0, 10_954), "utkface": (23_705, 0, 0)}


def longest_first(cells: Sequence[Cell], config: Config) -> list[Cell]:
    """Cells that are taken to be equally long stay in their order."""
    return sorted(cells, key=lambda cell: -expected_operations(cell, config))


def expected_operations(cell: Cell, config: Config) -> float:
    """Multiply-accumulates, roughly, of everything that passes through the network, slow ones several times."""
    train, validation, test = split_sizes(config, cell.dataset)
    options = cell.options
    if cell.phase == "baseline":
        settings = config.training.for_model(cell.model)
        images = settings.epochs * (TRAINING * min(train, settings.max_train or train) + validation) + test
    else:
        images = SIMULATION * test + options.get("calibration_samples", 0)
        if options.get("rounding") == "adaround" or cell.strategy == "fair_reconstruction":  # 32 a step, block by block
            images += 32 * TRAINING * options.get("reconstruction_iterations", 300)
        if "sensitivity_samples" in options:
            widths = len(options.get("widths") or ()) or 2
            images += SIMULATION * options["sensitivity_samples"] * widths * LAYERS / 2
        if cell.method == "qat":
            seen = min(train, options.get("max_train") or train)
            images += SIMULATION * options["epochs"] * (TRAINING * seen + validation)
    pixels = config.dataset(cell.dataset).image_size ** 2 / 224**2
    return 1e9 * OPERATIONS.get(cell.model, UNKNOWN_OPERATIONS) * pixels * images


def split_sizes(config: Config, dataset: str) -> tuple[int, int, int]:
    """Training, validation and test images, with the limits of the config, of the set as it is published."""
    section = config.dataset(dataset)
    if dataset == "synthetic":
        train, validation, test = section.train_images, section.validation_images, section.test_images
    else:
        train, validation, test = PUBLISHED[dataset]
        if not test:
            test = round(train * section.test_share)
            train -= test
        if not validation:
            validation = round(train * section.validation_share)
            train -= validation
    if section.max_train is not None and section.max_train < train:
        train, validation = section.max_train, -(-validation * section.max_train // train)
    return train, validation, min(test, section.max_test or test)
