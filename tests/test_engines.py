"""Engines run the file on integers and predict what the simulation does."""

import copy
import functools
import importlib.util
import itertools
import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_deployable import CLASSES, MINMAX, SIZE, pictures, trained, with_widths
from torch import nn
from torch.nn import functional as F

import engines
from deployment import DeploymentError, load_engine
from engines import EngineError, InductorEngine, OnnxRuntimeEngine, OpenVinoEngine, TorchEngine, for_openvino
from evaluation import as_batch, predict
from models import build_model
from onnx_export import to_onnx
from quantization import apply_quantization
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationWarning
from quantizers.ptq import ptq_static

THREADS = 1
FLOAT_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv")


@functools.cache
def study_model(name: str, weight_bits: int, activation_bits: int) -> tuple[QuantizedModel, bytes]:
    """A network of the study at 32 pixels, and its file; shared: not to be changed."""
    model = build_model(name, 3, 32, seed=3, options={"depth": 2} if name.startswith("vit_") else None)
    images = noise(8)
    with torch.no_grad():
        for _ in range(2):
            model(images)
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    quantized = ptq_static(model.eval(), images, **widths, **MINMAX)
    return quantized, to_onnx(quantized, images, {}).SerializeToString()


def noise(n: int, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def simulated(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x.clone()).numpy()


def run_literally(content: bytes, x: torch.Tensor) -> np.ndarray:
    """ONNX Runtime, operator by operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x.numpy()})[0]


def assert_same(found: np.ndarray, expected: np.ndarray, share: float = 0.25) -> None:
    """Of this share of images to the last digits. In others a value at a tie was rounded the other way, which networks
    that learned nothing amplify."""
    assert found.shape == expected.shape and expected.std() > 1e-3
    assert np.isclose(found, expected, rtol=1e-3, atol=1e-4).all(axis=1).mean() >= share
    assert np.abs(found - expected).max() < 0.5 * expected.std()


# ------------------------------------------------------------------------------------------- ONNX Runtime, on integers


def operators(content: bytes, tmp_path) -> Counter:
    """How often each operator stands in the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(
    ("name", "widths", "convolutions", "fused"),
    [
        ("resnet50", (4, 8), 53, {"QLinearAdd": 16}),
        ("mobilenet_v2", (8, 8), 52, {"QLinearAdd": 10}),
        ("mobilenet_v2", (4, 4), 52, {"QLinearAdd": 10}),
        ("squeezenet1_1", (8, 8), 26, {"QLinearConcat": 8}),
        ("squeezenet1_1", (2, 4), 26, {"QLinearConcat": 8}),
    ],
    ids=str,
)
def test_every_convolution_addition_and_concatenation_is_on_integers(name, widths, convolutions, fused, tmp_path):
    quantized, content = study_model(name, *widths)
    found = operators(content, tmp_path)
    assert found["QLinearConv"] == convolutions
    assert sum(found[kind] for kind in FLOAT_CONVOLUTIONS) == 0
    assert {kind: found[kind] for kind in ("QLinearAdd", "QLinearConcat") if found[kind]} == fused
    assert found["Add"] == found["Concat"] == found["Relu"] == 0
    # a pair at the image and at the end; nothing is turned into floats between
    assert found["QuantizeLinear"] <= 2 and found["DequantizeLinear"] <= 3
    x = noise(8)
    literal = run_literally(content, x)
    assert_same(literal, simulated(quantized, x))
    assert_same(OnnxRuntimeEngine(content, THREADS).predict(x.numpy()), literal, share=0)


@pytest.mark.parametrize(
    ("name", "widths"),
    [pytest.param("efficientnet_b0", (4, 4), marks=pytest.mark.slow), ("vit_small_patch16_224", (4, 8))],
    ids=str,
)
def test_the_other_networks_of_the_study(name, widths):
    """The file says what the simulation computes."""
    quantized, content = study_model(name, *widths)
    x = noise(4)
    assert_same(run_literally(content, x), simulated(quantized, x))
    assert np.isfinite(OnnxRuntimeEngine(content, THREADS).predict(x.numpy())).all()


# ----------------------------------------------------------------------------------------------------------- agreement


@functools.cache
def loader() -> list[dict]:
    batches = []
    for seed in range(3):
        x, labels = pictures(32, 100 + seed)
        batches.append({"image": x, "label": labels, "sensitive": {"gender": labels % 2}})
    return batches


CASES = {
    "W8A8": {"bit_width": 8},
    "W4A8": {"bit_width": 4, "activation_bits": 8},
    "W4A4": {"bit_width": 4},
    "W2A8": {"bit_width": 2, "activation_bits": 8},
    "W3A6": {"bit_width": 3, "activation_bits": 6},
    "dynamic": {"method": "dynamic"},
    "mixed": {"method": "mixed_precision", "bit_width": 4, "widths": [2, 4, 8, 16], "sensitivity_samples": 16},
    "qat": {"method": "QAT_INT8", "epochs": 1, "learning_rate": 1e-3},
    "bias_aware": {"method": "bias_aware", "observer": "percentile"},
    "corrected": {"bit_width": 4, "activation_bits": 8, "bias_correction": True, "equalize": True},
    "arm": {"bit_width": 8, "backend": "arm"},
    "arm W4A4": {"bit_width": 4, "backend": "arm"},
    "tensorrt": {"bit_width": 8, "backend": "tensorrt"},
}


@functools.cache
def quantized_by(case: str) -> tuple[QuantizedModel, bytes]:
    options = {"method": "ptq_static", "calibration_data": loader(), **CASES[case]}
    if options["method"] != "dynamic":
        options["calibration_samples"] = 64
    if options["method"] == "QAT_INT8":
        options["train_data"] = loader()
    quantized = apply_quantization(trained(), **options)
    return quantized, to_onnx(quantized, loader()[0]["image"], {}).SerializeToString()


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_predicts_what_the_simulation_does(case):
    """The same class, and the same logits but where a value at a tie was rounded the other way."""
    quantized, content = quantized_by(case)
    x, _ = pictures(128, 7)
    engine = OnnxRuntimeEngine(content, THREADS)
    expected, found = simulated(quantized, x), engine.predict(x.numpy())
    assert found.shape == (128, CLASSES) and found.dtype == np.float32
    assert len(np.unique(expected.argmax(1))) == CLASSES
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
    assert_same(found, expected, share=0.9)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dynamic"])
def test_openvino_predicts_what_the_simulation_does(case):
    """It adds residuals before it rounds them: 4-bit activations differ by half a level."""
    pytest.importorskip("openvino")
    quantized, content = quantized_by(case)
    x, _ = pictures(128, 7)
    engine = OpenVinoEngine(content, THREADS)
    expected, found = simulated(quantized, x), engine.predict(x.numpy())
    assert found.shape == (128, CLASSES) and found.dtype == np.float32
    has_few_levels = min(q.bits for q in quantized.activation_quantizers().values()) < 8
    assert (found.argmax(1) == expected.argmax(1)).mean() >= (0.9 if has_few_levels else 0.98)
    assert np.sqrt(np.mean((found - expected) ** 2)) < (0.2 if has_few_levels else 0.02) * expected.std()


# --------------------------------------------------------------------------------------------------------- for OpenVINO


@pytest.mark.parametrize("backend", ["x86", "arm", "tensorrt"])
def test_openvinos_reading_of_a_file_means_the_same(backend):
    """Without 2-bit weights and clipping of integers, for which it has no kernels."""
    x, _ = pictures(64)
    quantized = with_widths(trained(), x, [2, 4, 8], [8, 2, 4, 6], backend=backend)
    content = to_onnx(quantized, x, {}).SerializeToString()
    proto = onnx.load_from_string(for_openvino(content))
    onnx.checker.check_model(proto, full_check=True)
    before, tensors = (
        {tensor.name: tensor for tensor in model.graph.initializer} for model in (onnx.load_from_string(content), proto)
    )
    for name, tensor in before.items():  # the same integers, at the width that it knows
        assert np.array_equal(*(numpy_helper.to_array(t).astype(np.float32) for t in (tensor, tensors[name])))
    types = {tensor.data_type for tensor in tensors.values()}
    assert TensorProto.INT2 not in types and TensorProto.INT4 in types
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    assert clips and all(tensors[name].data_type == TensorProto.FLOAT for node in clips for name in node.input[1:])
    assert_same(run_literally(proto.SerializeToString(), x), simulated(quantized, x), share=0.95)


def test_openvino_reads_16_bit_activations_as_floats():
    """Which for it they are: it has no kernels for 16-bit integers."""
    x, _ = pictures(64)
    quantized = with_widths(trained(), x, [8], [8, 16, 4, 16])
    proto = onnx.load_from_string(for_openvino(to_onnx(quantized, x, {}).SerializeToString()))
    onnx.checker.check_model(proto, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    used = {types.get(name) for node in proto.graph.node for name in node.input}
    assert not {TensorProto.UINT16, TensorProto.INT16} & used
    assert_same(run_literally(proto.SerializeToString(), x), simulated(quantized, x), share=0)


def test_openvino_clips_16_bit_activations():
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 2))
    x, _ = pictures(16)
    quantized = with_widths(model, x, [8], [16])
    content = to_onnx(quantized, x, {}).SerializeToString()
    far = 100 * x  # beyond the range that was calibrated
    for images in (x, far):
        expected = simulated(quantized, images)
        assert np.allclose(OpenVinoEngine(content, THREADS).predict(images.numpy()), expected, rtol=1e-2, atol=1e-2)
    assert not np.allclose(simulated(model, far), expected, rtol=0.1)


def test_openvino_refuses_dynamic_quantization():
    pytest.importorskip("openvino")
    with pytest.raises(EngineError, match=r"^OpenVINO cannot quantize with a scale for each image: .* onnxruntime$"):
        OpenVinoEngine(quantized_by("dynamic")[1])


# ------------------------------------------------------------------------------------------------------------- Inductor


class Compact(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.head(F.relu(x + self.two(x)).mean((2, 3)))


@pytest.mark.slow
def test_inductor_predicts_what_the_simulation_does():
    """Smaller batches are filled up to the one that was compiled."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    x, _ = pictures(32)
    quantized = with_widths(Compact().eval(), x, [8, 4], [8])
    threads = torch.get_num_threads()
    engine = load_engine(quantized, "inductor", threads=1)
    assert isinstance(engine, InductorEngine) and (engine.name, engine.provider) == ("inductor", "CPU")
    expected, whole = simulated(quantized, x), engine.predict(x.numpy())
    assert whole.shape == (32, 3) and whole.dtype == np.float32
    assert np.sqrt(np.mean((whole - expected) ** 2)) < 0.05 * expected.std()
    for count in (1, 5, 31):
        assert np.array_equal(engine.predict(x[:count].numpy()), whole[:count])
    assert engine.batch == 32
    measured = engine.latency(x.numpy(), repeats=3)
    assert measured.batch == 32 and 0 < measured.median_ms <= measured.p95_ms
    assert torch.get_num_threads() == threads


def test_inductor_is_not_needed_for_the_rest():
    """It is loaded where it is made, and neither are the others."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, engines, deployment\n"
        "print([name for name in ('torchao', 'onnxruntime', 'openvino', 'onnx', 'onnxscript') if name in sys.modules])"
    )
    root = Path(engines.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- the common interface


@functools.cache
def content() -> bytes:
    return quantized_by("W8A8")[1]


@pytest.fixture(params=["torch", "onnxruntime", "openvino"])
def engine(request) -> engines.Engine:
    if request.param == "torch":
        return TorchEngine(quantized_by("W8A8")[0])
    pytest.importorskip(request.param)
    return (OnnxRuntimeEngine if request.param == "onnxruntime" else OpenVinoEngine)(content(), THREADS)


def test_latency_is_of_passes_over_the_batch_that_is_given(engine, monkeypatch):
    x, _ = pictures(6)
    measured = engine.latency(x.numpy(), repeats=5)
    assert measured.batch == 6
    assert 0 < measured.median_ms <= measured.p95_ms
    assert measured.throughput == pytest.approx(6000 / measured.median_ms)
    clock = itertools.count()  # a second later each time it is looked at
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    measured = engine.latency(x[:2].double().numpy(), repeats=3)
    assert (measured.batch, measured.median_ms, measured.p95_ms, measured.throughput) == (2, 1000.0, 1000.0, 2.0)
    assert next(clock) == 2 + 2 * 3  # two passes to warm up


def test_any_batch_and_any_memory_layout(engine):
    x = pictures(9)[0].numpy()
    whole = engine.predict(x)
    assert whole.dtype == np.float32 and whole.shape == (9, CLASSES)
    assert np.allclose(engine.predict(x[4:5]), whole[4:5], rtol=1e-4, atol=1e-4)
    assert np.array_equal(engine.predict(np.asfortranarray(x)), whole)
    again = engine.predict(x[::-1])
    assert np.allclose(again[::-1], whole, rtol=1e-4, atol=1e-4)
    assert np.array_equal(engine.predict(x), whole)  # earlier results are no views of later ones


def test_evaluation_takes_an_engine_for_a_model(engine):
    found = predict(engine, loader(), "cpu")
    labels = torch.cat([as_batch(batch)["label"] for batch in loader()]).numpy()
    assert np.array_equal(found.y_true, labels) and list(found.sensitive) == ["gender"]
    expected = np.concatenate([engine.predict(batch["image"].numpy()) for batch in loader()])
    assert np.array_equal(found.logits, expected)


def test_sizes(engine):
    if engine.name == "torch":
        from evaluation import model_size_mb

        assert engine.size_mb == model_size_mb(quantized_by("W8A8")[0])
    else:
        assert engine.size_mb == len(content()) / 1e6


def test_the_torch_engine_is_the_model():
    x, _ = pictures(5)
    model = copy.deepcopy(trained()).train()
    engine = load_engine(model, "torch")
    assert isinstance(engine, TorchEngine) and (engine.name, engine.provider) == ("torch", "CPU")
    assert np.array_equal(engine.predict(x.numpy()), simulated(trained(), x))
    engine.latency(x.numpy(), 1)
    assert model.training and all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), trained().state_dict().values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_a_model_in_memory(name):
    if name != "torch":
        pytest.importorskip(name)
    x, _ = pictures(16)
    found = load_engine(quantized_by("W8A8")[0], name, threads=THREADS, example=x.numpy()).predict(x.numpy())
    expected = simulated(quantized_by("W8A8")[0], x)
    assert (found.argmax(1) == expected.argmax(1)).all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_the_build_has_not(provider):
    wanted = engines.PROVIDERS[provider]
    if wanted in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {wanted}")
    x, _ = pictures(4)
    with pytest.warns(QuantizationWarning, match=f"no {wanted} .*CPU.*onnxruntime-gpu") as caught:
        engine = OnnxRuntimeEngine(content(), THREADS, provider)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert engine.provider == "CPUExecutionProvider"
    assert np.array_equal(engine.predict(x.numpy()), OnnxRuntimeEngine(content(), THREADS).predict(x.numpy()))


def test_a_provider_that_does_not_start(monkeypatch):
    """ONNX Runtime then falls back by itself."""
    import onnxruntime

    wanted = engines.PROVIDERS["cuda"]
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [wanted, "CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda model, options, providers: session(model, options, providers[1:])
    )
    with pytest.warns(QuantizationWarning, match=f"^{wanted} could not be started: .* on CPUExecutionProvider"):
        assert OnnxRuntimeEngine(content(), THREADS, "cuda").provider == "CPUExecutionProvider"


def test_the_cpu_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OnnxRuntimeEngine(content(), THREADS).provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("name", "distribution"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("inductor", "torchao")]
)
def test_an_engine_that_is_not_installed_says_what_to_install(name, distribution, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == distribution else find(module))
    message = f"^engine {name} is not installed: python -m pip install {distribution}$"
    with pytest.raises(DeploymentError, match=message):
        load_engine(quantized_by("W8A8")[0], name, example=pictures(1)[0])


@pytest.mark.parametrize("kind", [OnnxRuntimeEngine, OpenVinoEngine])
def test_what_an_engine_cannot_load_or_run_is_one_line(kind):
    unknown = helper.make_model(
        helper.make_graph(
            [helper.make_node("NoSuchOperator", ["image"], ["logits"], domain="nowhere")],
            "graph",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("nowhere", 1)],
        ir_version=10,
    )
    with pytest.raises(EngineError, match="cannot load the model") as refused:
        kind(unknown.SerializeToString(), THREADS)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    engine = kind(content(), THREADS)
    for shape in ((1, 3, SIZE, SIZE + 1), (1, 2, SIZE, SIZE), (3, SIZE, SIZE)):
        for call in (engine.predict, engine.latency):
            with pytest.raises(EngineError, match="cannot run the model") as refused:
                call(np.zeros(shape, np.float32))
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    x, _ = pictures(2)
    assert np.isfinite(engine.predict(x.numpy())).all()  # and it runs on


def test_names_that_there_are_not():
    model = quantized_by("W8A8")[0]
    for options, message in (
        ({"engine": "onnxruntim"}, r"unknown engine 'onnxruntim' \(did you mean onnxruntime\?\)"),
        ({"engine": "onnxruntime", "provider": "cuda12"}, "unknown provider 'cuda12'"),
        ({"engine": "openvino", "float_precision": "f16"}, "unknown float_precision 'f16'"),
    ):
        with pytest.raises(DeploymentError, match=message):
            load_engine(model, example=pictures(1)[0], **options)
    with pytest.raises(DeploymentError, match="engine onnxruntime runs a file: give its path, or example="):
        load_engine(model, "onnxruntime")
    for engine in ("torch", "inductor"):
        if engine == "inductor" and importlib.util.find_spec("torchao") is None:
            continue
        with pytest.raises(DeploymentError, match=f"engine {engine} runs a model in memory, not a file: .*onnxruntime"):
            load_engine("model.onnx", engine)


def test_bfloat16_between_the_integers():
    """Where the CPU has none, OpenVINO computes in float32."""
    pytest.importorskip("openvino")
    x, _ = pictures(64)
    quantized, file = quantized_by("W8A8")
    found = OpenVinoEngine(file, THREADS, "bf16").predict(x.numpy())
    assert np.sqrt(np.mean((found - simulated(quantized, x)) ** 2)) < 0.1 * found.std()
