"""Deployment: a model as one ONNX file of packed integers, and the engines that run it.

    from deployment import export_onnx, load_engine
    export_onnx(qmodel, "model.onnx", example=x_NCHW)
    load_engine("model.onnx", engine="onnxruntime").predict(x_NCHW)      # -> logits_NK, numpy

From the command line a picture is classified:

    python deployment.py model.onnx --image face.jpg

How the file is written is in onnx_export.py, what runs it in engines.py. Exit status: 0, or 2 for a model, picture or
engine that cannot be used (one line says why).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engines import Engine

__all__ = ["DeploymentError", "Export", "ModelFile", "export_onnx", "load_engine", "read_onnx"]

FILE_FORMAT = "beyond-naive-quantization/onnx/1"
ENGINES = ("torch", "onnxruntime", "openvino", "inductor")
FILE_ENGINES = ("onnxruntime", "openvino")
TIMED_PASSES = 20  # of one picture on the command line


class DeploymentError(ValueError):
    """A model file, picture or engine that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written: its size (10^6 bytes), and a row for each layer with weights: `layer, bits, type,
    parameters`, the width they were quantized to and the ONNX type that holds them."""

    path: Path
    size_mb: float
    weights: list[dict[str, Any]]

    def weight_types(self) -> str:
        """Such as '53 x 4 bits in INT4, 1 x 32 bits in FLOAT'."""
        counts = Counter((row["bits"], row["type"]) for row in self.weights)
        return ", ".join(f"{count} x {bits} bits in {name}" for (bits, name), count in sorted(counts.items()))


@dataclass(frozen=True)
class ModelFile:
    """A model file of this program: its bytes, and what its metadata say."""

    path: Path
    content: bytes
    cell: str | None
    classes: list[str] | None
    input: dict[str, Any]  # image_size [H, W]; mean, std: of RGB in [0, 1], None where it was exported without
    config: dict[str, Any]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: torch.Tensor | np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cell: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Export:
    """Write a quantized model, or a float one, as ONNX: input `image` (batch, 3, H, W), output `logits` (batch, K).

    Weights are stored in the narrowest of INT2, INT4 and INT8 that holds their width, with a scale for each output
    channel (a model with 2-bit weights needs opset 25, others 21); activations are QuantizeLinear / DequantizeLinear
    pairs. `example` (n, 3, H, W) gives the size of the images. The rest goes into the file's metadata: names of the
    classes, `mean` and `std` that images in [0, 1] were normalised with, the study's cell and its settings (JSON data).

    The file appears whole or not at all. Raises DeploymentError, one line, for a model that cannot be exported, or a
    place that cannot be written. The model is not changed.
    """
    import torch

    from onnx_export import ExportError, to_onnx, weight_table
    from quantizers.numerics import QuantizationError
    from store import StoreError, write_bytes

    path = Path(path)
    images = torch.as_tensor(example)
    if images.ndim != 4 or not len(images):
        raise DeploymentError(f"example: expected images (n, 3, H, W), got {tuple(images.shape)}")
    if (mean is None) != (std is None):
        raise DeploymentError("give both mean and std, or neither")
    if mean is not None and not len(mean) == len(std) == images.shape[1]:
        raise DeploymentError(f"mean and std: expected {images.shape[1]} numbers each, one for each channel")
    if mean is not None and not _is_normalisation(mean, std):
        raise DeploymentError(f"mean and std must be finite and std above 0, got {list(mean)} and {list(std)}")
    if isinstance(class_names, str):
        raise DeploymentError(f"class_names: expected a list of names, got {class_names!r}")
    description = {**getattr(model, "description", {}), **(config or {})}
    metadata = {
        "input": json.dumps(
            {
                "image_size": list(images.shape[2:]),
                "mean": None if mean is None else [float(value) for value in mean],
                "std": None if std is None else [float(value) for value in std],
            }
        ),
        "config": json.dumps(description, sort_keys=True, default=str),
    }
    if cell is not None:
        metadata["cell"] = str(cell)
    if class_names is not None:
        metadata["classes"] = json.dumps([str(name) for name in class_names], ensure_ascii=False)
    metadata["format"] = FILE_FORMAT  # last: a file that is cut off before it is not taken for a whole one
    try:
        proto = to_onnx(model, images, metadata)
    except (ExportError, QuantizationError) as error:
        raise DeploymentError(str(error)) from error
    logits = proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    if class_names is not None and len(class_names) != max(2, logits):
        raise DeploymentError(f"class_names: {len(class_names)} names for {max(2, logits)} classes")
    try:
        write_bytes(path, proto.SerializeToString())
    except StoreError as error:
        reason = error.__cause__
        raise DeploymentError(f"{path}: cannot be written ({getattr(reason, 'strerror', None) or reason})") from error
    return Export(path, path.stat().st_size / 1e6, weight_table(model))


def read_onnx(path: str | Path) -> ModelFile:
    """A file that `export_onnx` wrote. DeploymentError for any other: missing, truncated, of another program."""
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DeploymentError(f"{path}: no such file") from None
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        proto = onnx.load_from_string(content)
    except (DecodeError, ValueError, TypeError):
        raise DeploymentError(f"{path}: truncated or not an ONNX file") from None
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if metadata.get("format") != FILE_FORMAT:
        kind = "an ONNX file without this program's metadata" if proto.graph.node else "truncated or not an ONNX file"
        raise DeploymentError(f"{path}: {kind}; export it with deployment.export_onnx or python main.py")
    if proto.functions or _has_external_data(proto.graph):
        raise DeploymentError(f"{path}: its weights lie in other files; files of this program hold their own")
    try:
        onnx.checker.check_model(proto)
        file = ModelFile(
            path,
            content,
            metadata.get("cell"),
            json.loads(metadata["classes"]) if "classes" in metadata else None,
            json.loads(metadata.get("input", "null")),
            json.loads(metadata.get("config", "null")),
        )
        _check_metadata(file, [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim])
    except (onnx.checker.ValidationError, ValueError, IndexError, RecursionError) as error:
        raise DeploymentError(f"{path}: damaged ({' '.join(str(error).split())[:120]})") from None
    return file


def _is_normalisation(mean: Sequence[float], std: Sequence[float]) -> bool:
    return bool(np.isfinite([*mean, *std]).all()) and min(std) > 0


def _has_external_data(graph) -> bool:
    """Whether any tensor of the graph, or of a graph inside, lies in another file."""
    import onnx

    tensors = [*graph.initializer, *(tensor.values for tensor in graph.sparse_initializer)]
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors, attribute.sparse_tensor.values]
            tensors += [tensor.values for tensor in attribute.sparse_tensors]
            if any(map(_has_external_data, [attribute.g] if attribute.HasField("g") else attribute.graphs)):
                return True
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)


def _check_metadata(file: ModelFile, shape_NCHW: list[int]) -> None:
    """ValueError for metadata that `export_onnx` does not write for a model of these images."""
    if not isinstance(file.input, dict) or file.input.get("image_size") != shape_NCHW[2:]:
        raise ValueError("its metadata do not say the size of its images")
    normalisation = [file.input.get(key, ()) for key in ("mean", "std")]
    if normalisation != [None, None] and not all(
        isinstance(numbers, list) and [type(number) for number in numbers] == [float] * shape_NCHW[1]
        for numbers in normalisation
    ):
        raise ValueError("its metadata do not say how its images are normalised")
    if normalisation != [None, None] and not _is_normalisation(*normalisation):
        raise ValueError("its metadata normalise by numbers that are not finite, or by 0")
    if not isinstance(file.config, dict):
        raise ValueError("its metadata give no config")
    if file.classes is not None and not (
        isinstance(file.classes, list) and all(isinstance(name, str) for name in file.classes)
    ):
        raise ValueError("its metadata give no names of classes")


def load_engine(
    model: str | Path | nn.Module,
    engine: str = "onnxruntime",
    *,
    threads: int | None = None,
    provider: str = "cpu",
    float_precision: str = "f32",
    example: torch.Tensor | np.ndarray | None = None,
) -> Engine:
    """What runs a model: `predict(x_NCHW) -> logits_NK`, numpy, and `latency(x_NCHW, repeats)`.

    `model` is a file of `export_onnx` for onnxruntime and openvino; a model in memory for torch (the simulation) and
    inductor, and with an `example` batch for the others too. `threads`: of one pass; None: the engine's default.
    `provider` is ONNX Runtime's: cpu, cuda or tensorrt; where the installed build has it not, the CPU, with a warning
    that names both. `float_precision` is what OpenVINO computes in between the integers: f32, or bf16, faster where
    the processor has it. Raises DeploymentError, one line: an engine that is not installed (and what to install), a
    file that is not one of this program's, a model that the engine cannot run.
    """
    from sections.base import suggest

    if engine not in ENGINES:
        raise DeploymentError(f"unknown engine {engine!r}{suggest(engine, ENGINES)}")
    for name, value, choices in (
        ("provider", provider, ("cpu", "cuda", "tensorrt")),
        ("float_precision", float_precision, ("f32", "bf16")),
    ):
        if value not in choices:
            raise DeploymentError(f"unknown {name} {value!r}{suggest(value, choices)}")
    if provider != "cpu" and engine != "onnxruntime":
        raise DeploymentError(f"provider {provider} is ONNX Runtime's; engine {engine} has none")
    if float_precision != "f32" and engine != "openvino":
        raise DeploymentError(f"float_precision {float_precision} is OpenVINO's; engine {engine} has none")
    if threads is not None and threads < 1:
        raise DeploymentError(f"threads: expected at least 1, got {threads}")
    import engines

    is_file = isinstance(model, (str, Path))
    try:
        if engine != "torch":
            engines.check_installed(engine)
        if engine in FILE_ENGINES:
            content = read_onnx(model).content if is_file else _content(model, example, engine)
            if engine == "onnxruntime":
                return engines.OnnxRuntimeEngine(content, threads, provider)
            return engines.OpenVinoEngine(content, threads, float_precision)
        if is_file:
            raise DeploymentError(
                f"engine {engine} runs a model in memory, not a file: pass the quantized model, or use "
                f"{' or '.join(FILE_ENGINES)}"
            )
        return engines.TorchEngine(model) if engine == "torch" else engines.InductorEngine(model, threads)
    except engines.EngineError as error:
        raise DeploymentError(f"{model}: {error}" if is_file else str(error)) from error


def _content(model: nn.Module, example: torch.Tensor | np.ndarray | None, engine: str) -> bytes:
    import tempfile

    if example is None:
        raise DeploymentError(f"engine {engine} runs a file: give its path, or example=x_NCHW to have one made")
    with tempfile.TemporaryDirectory(prefix="deployment-") as folder:
        return export_onnx(model, Path(folder) / "model.onnx", example).path.read_bytes()


# -------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        for line in classify(
            options.model, options.image, options.engine, options.threads, options.provider, options.top
        ):
            print(line)
    except DeploymentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def classify(
    model: str | Path,
    image: str | Path,
    engine: str = "onnxruntime",
    threads: int | None = None,
    provider: str = "cpu",
    top: int = 1,
) -> list[str]:
    """Lines that say what the model sees in a picture: labels with probabilities, the time of a pass, who ran it."""
    from engines import EngineError

    file = read_onnx(model)
    x_NCHW = load_image(image, file)
    runner = load_engine(model, engine, threads=threads, provider=provider)
    try:
        logits_K = runner.predict(x_NCHW)[0]
        if not np.isfinite(logits_K).all():
            raise DeploymentError(f"{file.path}: its logits are not finite")
        probabilities = _probabilities(logits_K)
        latency = runner.latency(x_NCHW, TIMED_PASSES)
    except EngineError as error:
        raise DeploymentError(f"{file.path}: {error}") from error
    names = [_printable(name) for name in file.classes or map(str, range(len(probabilities)))]
    if len(names) != len(probabilities):
        raise DeploymentError(f"{file.path}: damaged ({len(names)} class names, {len(probabilities)} logits)")
    order = np.argsort(-probabilities, kind="stable")[:top]
    width = max(len(names[k]) for k in order)
    lines = [f"{names[k]:<{width}}  {100 * probabilities[k]:5.1f} %" for k in order]
    where = f"{runner.name} on {runner.provider}" + (f", {threads} threads" if threads else "")
    lines.append(f"{latency.median_ms:.2f} ms ({where}; {file.path.name}, {runner.size_mb:.2f} MB)")
    return lines


def load_image(image: str | Path, file: ModelFile) -> np.ndarray:
    """(1, 3, H, W) float32: the picture as the model was trained to see it. DeploymentError for what is not one."""
    import struct

    from PIL import Image, UnidentifiedImageError

    from image_cache import decode_image

    height, width = file.input["image_size"]
    mean, std = file.input["mean"], file.input["std"]
    if mean is None:
        raise DeploymentError(
            f"{file.path}: does not say how its images are normalised; export it with mean= and std= for that"
        )
    if height != width:
        raise DeploymentError(
            f"{file.path}: its images are {height} x {width}; only square ones are read from pictures"
        )
    try:
        pixels_HWC = decode_image(Path(image), height)
    except FileNotFoundError:
        raise DeploymentError(f"{image}: no such file") from None
    except UnidentifiedImageError:
        raise DeploymentError(f"{image}: not a picture that can be read (JPEG, PNG, …)") from None
    except OSError as error:
        raise DeploymentError(f"{image}: cannot be read ({error.strerror or error})") from None
    except (ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise DeploymentError(f"{image}: damaged ({' '.join(str(error).split())[:120]})") from None
    x_HWC = (pixels_HWC.astype(np.float32) - 255 * np.float32(mean)) / (255 * np.float32(std))
    return np.ascontiguousarray(x_HWC.transpose(2, 0, 1)[None], dtype=np.float32)


def _printable(name: str) -> str:
    """A name from a file, without what would steer a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)


def _probabilities(logits_K: np.ndarray) -> np.ndarray:
    """Softmax; of a single logit the sigmoid and its complement: class 0, class 1."""
    if len(logits_K) == 1:
        logits_K = np.array([0.0, logits_K[0]])
    weights = np.exp(logits_K - logits_K.max())
    return weights / weights.sum()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deployment.py", description="Classify a picture with an exported model.")
    parser.add_argument("model", metavar="MODEL.onnx", help="a file of export_onnx, or of results/models/")
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture: its centre square is classified")
    parser.add_argument("--engine", choices=FILE_ENGINES, default="onnxruntime")
    parser.add_argument("--provider", choices=("cpu", "cuda", "tensorrt"), default="cpu", help="of onnxruntime")
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: the engine's")
    parser.add_argument("--top", type=_positive, default=1, metavar="K", help="print the K most probable classes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
