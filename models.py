"""The networks of the study, at any image size from 32 px, and their checkpoints.

Five architectures are part of the study; any other timm name works too. ResNet-50, MobileNetV2 and SqueezeNet are
torchvision's, the others timm's. Checkpoints are safetensors files (no pickle) with their configuration as metadata.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from config import ConfigError
from sections.base import MODELS, suggest
from store import CheckpointError, StoreError, atomic_path

CHECKPOINT_FORMAT = "beyond-naive-quantization/checkpoint/1"
CLASSIFIERS = {"resnet50": "fc", "mobilenet_v2": "classifier.1", "squeezenet1_1": "classifier.1"}
TORCHVISION = tuple(CLASSIFIERS)
PATCH_SIZES = (16, 8, 4)  # of a ViT: the largest that gives at least 2 x 2 patches


def check_architecture(name: str, where: str = "models.architectures") -> None:
    """ConfigError with the nearest name unless `build_model` can build it."""
    if name in MODELS:
        return
    import timm

    if not timm.is_model(name):
        near = suggest(name, (*MODELS, *timm.list_models()))
        known = ", ".join(MODELS)
        near = near if near.startswith(" (") else f"; choose from {known}, or any name of timm.list_models()"
        raise ConfigError(f"{where}: unknown model {name!r}{near}")


def build_model(
    name: str,
    n_classes: int,
    image_size: int,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A model in training mode that maps images (N, 3, image_size, image_size) to logits (N, n_classes).

    `pretrained` takes ImageNet weights for everything but the classifier; `weights` a checkpoint file of the same
    architecture, whose classifier is left out where its number of classes differs. `options` go to the constructor.
    Weights that are not loaded are drawn from `seed`. Raises ConfigError (unknown name or option, weights that cannot
    be had) and CheckpointError.
    """
    check_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if name in TORCHVISION:
                model = _torchvision_model(name, n_classes, pretrained and weights is None, dict(options or {}))
            else:
                model = _timm_model(name, n_classes, image_size, pretrained and weights is None, dict(options or {}))
        except TypeError as error:
            raise ConfigError(f"models.options.{name}: {error}") from None
    if weights is not None:
        _load_weights(model, name, Path(weights))
    return model.train()


def _torchvision_model(name: str, n_classes: int, pretrained: bool, options: dict) -> nn.Module:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=n_classes, **options)
    if pretrained:
        enum = torchvision.models.get_model_weights(name).DEFAULT
        try:
            state = enum.get_state_dict(check_hash=True)
        except OSError as error:  # URLError is one
            raise ConfigError(_no_network(name, error)) from None
        _load_backbone(model, classifier_name(model, name), state)
    return model


def _timm_model(name: str, n_classes: int, image_size: int, pretrained: bool, options: dict) -> nn.Module:
    import timm

    arguments: dict[str, Any] = {"num_classes": n_classes}
    if name.startswith("vit_"):
        arguments["img_size"] = image_size
        if "patch_size" not in options:
            arguments["patch_size"] = patch_size_for(image_size)
    elif timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        arguments["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=pretrained, **{**arguments, **options})
    except TypeError:
        raise
    except Exception as error:  # the hub's errors have no common base class; without pretrained nothing is caught
        if not pretrained:
            raise
        raise ConfigError(_no_network(name, error)) from None


def patch_size_for(image_size: int) -> int:
    """Pixels a side of a ViT patch: the largest of 16, 8 and 4 that divides the image into at least 2 x 2 patches."""
    for size in PATCH_SIZES:
        if image_size % size == 0 and image_size // size >= 2:
            return size
    raise ConfigError(f"image_size {image_size}: a vision transformer needs a multiple of {PATCH_SIZES[-1]}")


def _no_network(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return (
        f"models.pretrained: the ImageNet weights of {name} cannot be downloaded ({reason}); connect once, or set "
        f"models.pretrained=false, or models.weights.{name}=FILE to a checkpoint of yours"
    )


def classifier_name(model: nn.Module, name: str) -> str:
    """The module path of the last layer, which depends on the number of classes."""
    if name in CLASSIFIERS:
        return CLASSIFIERS[name]
    head = model.get_classifier()  # timm's models all have it
    return next(path for path, module in model.named_modules() if module is head)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def has_depthwise_convolution(model: nn.Module) -> bool:
    """Also one that quantization wraps: the `layer` of a module."""
    layers = (getattr(module, "layer", module) for module in model.modules())
    return any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers)


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Write the state dict with `description` (model, n_classes, image_size, cell …) as metadata, atomically."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    # under one key: safetensors writes several in another order each time, and the same model is to be the same bytes
    meta = {"checkpoint": json.dumps({"format": CHECKPOINT_FORMAT, "description": description}, sort_keys=True)}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=meta)
        except SafetensorError as error:  # its write errors, such as a full disk, are not OSErrors
            raise OSError(str(error)) from None


def checkpoint_description(path: Path) -> dict[str, Any]:
    """The metadata of one of our checkpoints; CheckpointError for any other file."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; make it with python main.py --phase baseline")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    description = _description(meta)
    if description is None:
        raise CheckpointError(f"{path}: not a checkpoint of this program (format {meta.get('format')!r})")
    return description


def _description(meta: Mapping[str, str]) -> dict[str, Any] | None:
    """What our metadata say; None for another program's."""
    found = meta.get("checkpoint")
    try:
        known = json.loads(found) if found is not None else {}
        if meta.get("format") == CHECKPOINT_FORMAT:  # as it was written before: two keys
            known = {"format": CHECKPOINT_FORMAT, "description": json.loads(meta["description"])}
    except ValueError:
        return None
    return known["description"] if isinstance(known, dict) and known.get("format") == CHECKPOINT_FORMAT else None


def load_checkpoint(path: Path, model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Load one of our checkpoints into `model`; refuse it where its description differs from `expected` in any key."""
    description = checkpoint_description(path)
    for key, value in expected.items():
        if description.get(key) != value:
            raise CheckpointError(f"{path}: its {key} is {description.get(key)!r}, expected {value!r}")
    _load_exactly(model, _read_safetensors(path), path)


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"models.weights.{name}: {path}: no such file")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
        description = _description(meta) or {}
        if description.get("model", name) != name:
            raise CheckpointError(f"{path}: a checkpoint of {description['model']}, not of {name}")
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's own text is a page that tells how to run the file's code
            raise CheckpointError(
                f"{path}: not a weights-only checkpoint: it holds Python objects, which could run code, or is not a "
                "PyTorch file; save the state dict alone"
            ) from None
        except Exception as error:  # torch.load raises RuntimeError, EOFError, zipfile's …
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise CheckpointError(f"{path}: truncated or not a weights-only checkpoint ({reason})") from None
        if isinstance(state, Mapping):
            state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: does not hold a state dict of tensors")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    head = classifier_name(model, name)
    own = model.state_dict()
    if any(key in state and state[key].shape != own[key].shape for key in (f"{head}.weight", f"{head}.bias")):
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
        state |= {key: value for key, value in own.items() if key.startswith(f"{head}.")}
    _load_exactly(model, state, path)


def _load_backbone(model: nn.Module, head: str, state: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    kept = {key: own[key] if key.startswith(f"{head}.") else value for key, value in state.items()}
    model.load_state_dict(kept)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def _load_exactly(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """All or nothing: names and shapes are compared before the first tensor is copied."""
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = sorted(key for key in set(own) & set(state) if own[key].shape != state[key].shape)
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for what, keys in (("missing tensors", missing), ("foreign tensors", unexpected), ("other shapes", shapes))
            if keys
        ]
        raise CheckpointError(f"{path}: a checkpoint of another architecture: {', '.join(parts)}")
    model.load_state_dict(state)


def checkpoint_matches(path: Path, cell: str) -> bool:
    """Whether the file is the finished checkpoint of this baseline cell."""
    try:
        return checkpoint_description(path).get("cell") == cell
    except (CheckpointError, StoreError):
        return False
