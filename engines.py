"""Inference engines behind one small interface: what runs a deployed model.

    engine.predict(x_NCHW) -> logits_NK        numpy float32, any batch size
    engine.latency(x_NCHW, repeats)            milliseconds of a pass over exactly this batch

torch         the simulation itself: a QuantizedModel, or any module
onnxruntime   an ONNX file, on the CPU, CUDA or TensorRT
openvino      the same file, on Intel's and ARM's CPUs
inductor      a QuantizedModel compiled by torch.compile with torchao's integer kernels, on x86 CPUs

Packages of an engine are imported where it is made.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import nn

from evaluation import Latency, device_of, eval_mode, latency, model_size_mb, timed
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationWarning

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
PAIR = ("QuantizeLinear", "DequantizeLinear")
REQUIREMENTS = {  # engine -> (module, what to install)
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "inductor": ("torchao", "torchao"),
}


class EngineError(ValueError):
    """An engine that cannot be made or run; the message is one line."""


class Engine(Protocol):
    name: str
    provider: str  # what it runs on
    size_mb: float  # 10^6 bytes of its file; NaN where it was not made from one

    def predict(self, x_NCHW: np.ndarray) -> np.ndarray:
        """Logits (N, K) float32 of normalised images (N, 3, H, W) float32."""

    def latency(self, x_NCHW: np.ndarray, repeats: int = 20) -> Latency:
        """Of `repeats` passes over these images, after a warm-up."""


def check_installed(engine: str) -> None:
    """EngineError that says what to install."""
    module, distribution = REQUIREMENTS[engine]
    if importlib.util.find_spec(module) is None:
        raise EngineError(f"engine {engine} is not installed: python -m pip install {distribution}")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise EngineError(
            f"engine {engine} cannot be imported ({_line(error)}): "
            f"python -m pip install --force-reinstall {distribution}"
        ) from error


# --------------------------------------------------------------------------------------------------------------- torch


class TorchEngine:
    """The simulation: a module run where it is."""

    name = "torch"

    def __init__(self, model: nn.Module):
        self.model = model
        self.provider = str(device_of(model)).upper()
        self.size_mb = model_size_mb(model)

    def predict(self, x_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), eval_mode(self.model):
            images = torch.from_numpy(_as_images(x_NCHW)).to(device_of(self.model))
            return self.model(images).float().cpu().numpy()

    def latency(self, x_NCHW: np.ndarray, repeats: int = 20) -> Latency:
        return latency(self.model, torch.from_numpy(_as_images(x_NCHW)), repeats)


# --------------------------------------------------------------------------------------------------------- ONNX Runtime


class OnnxRuntimeEngine:
    """ONNX Runtime."""

    name = "onnxruntime"

    def __init__(self, model: bytes, threads: int | None = None, provider: str = "cpu"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = PROVIDERS[provider]
        available = onnxruntime.get_available_providers()
        if wanted not in available:
            warnings.warn(
                f"this ONNX Runtime has no {wanted} (it has {', '.join(available)}): running on the CPU instead; "
                "install onnxruntime-gpu for it",
                QuantizationWarning,
                stacklevel=3,
            )
            wanted = PROVIDERS["cpu"]
        behind = [PROVIDERS["cuda"]] if provider == "tensorrt" else []  # for what TensorRT does not take
        providers = [wanted, *(name for name in (*behind, PROVIDERS["cpu"]) if name in available and name != wanted)]
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:  # its errors have no common base class
            raise EngineError(f"ONNX Runtime cannot load the model: {_line(error)}") from error
        self.provider = self.session.get_providers()[0]
        if self.provider != wanted:  # it falls back by itself where a driver or library is missing
            warnings.warn(
                f"{wanted} could not be started: ONNX Runtime runs the model on {self.provider} instead",
                QuantizationWarning,
                stacklevel=3,
            )
        self.size_mb = len(model) / 1e6
        self.input = self.session.get_inputs()[0].name

    def predict(self, x_NCHW: np.ndarray) -> np.ndarray:
        return self._run({self.input: _as_images(x_NCHW)})[0]

    def latency(self, x_NCHW: np.ndarray, repeats: int = 20) -> Latency:
        feed = {self.input: _as_images(x_NCHW)}
        return timed(lambda: self._run(feed), len(x_NCHW), repeats)

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self.session.run(None, feed)
        except Exception as error:  # its errors have no common base class
            raise EngineError(f"ONNX Runtime cannot run the model: {_line(error)}") from error


# ------------------------------------------------------------------------------------------------------------ OpenVINO


class OpenVinoEngine:
    """OpenVINO on the CPU. `float_precision` is that of what it computes between the integers: f32, as the simulation
    does, or bf16, faster where the CPU has it."""

    name = "openvino"
    provider = "CPU"

    def __init__(self, model: bytes, threads: int | None = None, float_precision: str = "f32"):
        import openvino

        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": float_precision}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            self.compiled = core.compile_model(core.read_model(for_openvino(model)), "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load the model: {_line(error)}") from error
        self.size_mb = len(model) / 1e6
        self.image_shape = tuple(dim.get_length() for dim in list(self.compiled.input(0).get_partial_shape())[1:])
        self.request = self.compiled.create_infer_request()

    def predict(self, x_NCHW: np.ndarray) -> np.ndarray:
        return np.array(self._infer(_as_images(x_NCHW))[0])

    def latency(self, x_NCHW: np.ndarray, repeats: int = 20) -> Latency:
        x_NCHW = _as_images(x_NCHW)
        return timed(lambda: self._infer(x_NCHW), len(x_NCHW), repeats)

    def _infer(self, x_NCHW: np.ndarray):
        if x_NCHW.shape[1:] != self.image_shape:  # of some models OpenVINO would give an empty result
            raise EngineError(
                f"OpenVINO cannot run the model: its images are (n, {', '.join(map(str, self.image_shape))}), "
                f"got {x_NCHW.shape}"
            )
        try:
            return self.request.infer([x_NCHW])
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot run the model: {_line(error)}") from error


def for_openvino(model: bytes) -> bytes:
    """The same ONNX model as OpenVINO reads it best: INT2 weights as INT8, which are the same values; the clipping of
    integers before their quantization, in float, where it is fused; activations of 16 bits, for which it has no kernels
    and forgets even the clipping, in float, clipped."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load_from_string(model)
    tensors = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.INT2:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), tensor.name))
        tensors[tensor.name] = tensor
    clips = {node.input[0]: node for node in proto.graph.node if node.op_type == "Clip"}
    nodes, unchanged = [], {}

    def clip(source: str, result: str, quantizer, ends) -> None:
        """A Clip in float at the values that the integers `ends` stand for."""
        scale, zero_point = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in quantizer.input[1:])
        names = [f"{result}_low", f"{result}_high"]
        for name, end in zip(names, ends, strict=True):
            proto.graph.initializer.append(numpy_helper.from_array(np.float32((end - zero_point) * scale), name))
        nodes.append(helper.make_node("Clip", [source, *names], [result]))

    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = unchanged.get(name, name)
        if node.op_type in PAIR and node.input[1] not in tensors:
            raise EngineError(
                "OpenVINO cannot quantize with a scale for each image: run dynamically quantized models with "
                "onnxruntime"
            )
        zero_point = tensors.get(node.input[2]) if node.op_type in PAIR and len(node.input) == 3 else None
        is_wide = zero_point is not None and zero_point.data_type in (TensorProto.UINT16, TensorProto.INT16)
        clipped = clips.get(node.output[0]) if node.op_type == "QuantizeLinear" else None
        if is_wide and node.op_type == "QuantizeLinear":
            limits = np.iinfo(helper.tensor_dtype_to_np_dtype(zero_point.data_type))
            clip(node.input[0], node.output[0], node, (limits.min, limits.max))
        elif is_wide:
            unchanged[node.output[0]] = node.input[0]
        elif clipped is not None:
            clip(
                node.input[0], f"{node.output[0]}_clipped", node, (_value(tensors, name) for name in clipped.input[1:])
            )
            node.input[0] = f"{node.output[0]}_clipped"
            unchanged[clipped.output[0]] = node.output[0]
            nodes.append(node)
        elif node.output[0] not in unchanged:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto.SerializeToString()


def _value(tensors: dict, name: str) -> float:
    from onnx import numpy_helper

    return float(numpy_helper.to_array(tensors[name]))


# ------------------------------------------------------------------------------------------------------------- Inductor


class InductorEngine:
    """torch.compile on the CPU, weights frozen, so that quantize / dequantize pairs become oneDNN's integer kernels.

    Compiled for each batch size that `latency` is asked for; `predict` compiles for the first one it meets and fills
    up smaller batches, since compiling takes half a minute.
    """

    name = "inductor"
    provider = "CPU"
    size_mb = math.nan

    def __init__(self, model: nn.Module, threads: int | None = None):
        from quantizers.deployable import DecomposedWriter, deployable

        writer = DecomposedWriter()
        is_quantized = isinstance(model, QuantizedModel)
        self.network = deployable(model, writer) if is_quantized else copy.deepcopy(model).cpu().eval()
        self.threads = threads
        self.compiled = torch.compile(self.network, dynamic=False)
        self.batch = 0  # the largest batch that predict has compiled for

    def predict(self, x_NCHW: np.ndarray) -> np.ndarray:
        count = len(x_NCHW)
        self.batch = max(self.batch, count)
        padded = np.zeros((self.batch, *x_NCHW.shape[1:]), np.float32)
        padded[:count] = x_NCHW
        with self._running():
            return self.compiled(torch.from_numpy(padded)).float().numpy()[:count]

    def latency(self, x_NCHW: np.ndarray, repeats: int = 20) -> Latency:
        images = torch.from_numpy(_as_images(x_NCHW))
        with self._running():
            return timed(lambda: self.compiled(images), len(images), repeats)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        import torch._inductor.config as inductor

        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads or threads)
            with torch.no_grad(), inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):
                yield
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            raise EngineError(f"Inductor cannot run the model: {_line(error)}") from error
        finally:
            torch.set_num_threads(threads)


def _as_images(x_NCHW: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x_NCHW, dtype=np.float32)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
