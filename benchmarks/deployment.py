"""Size, agreement and latency of deployed models, beside FP32 and beside other quantizers, in one run.

    python main.py --phase baseline --config benchmarks/deployment.yaml --results-dir results/deployment \\
        --set data.fairface.root=FOLDER
    pip install torchao nncf    # the engine inductor, and a peer: without them their rows are left out
    python benchmarks/deployment.py --results-dir results/deployment --set data.fairface.root=FOLDER

The first command trains float models on 64-pixel faces, for the agreement of engines with the simulation. Sizes and
latencies are of the five architectures at 224 pixels with 1000 classes, quantized on random images (a latency does not
depend on what is seen). Every contender is a process of its own that is loaded once and then takes turns with the
others, so that all of them meet the same machine: medians over the passes of a turn, then over the turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

CONFIG = Path(__file__).with_suffix(".yaml")
PIXELS, CLASSES, BATCHES = 224, 1000, (1, 16)
CALIBRATION_IMAGES = 16
WIDTHS = {"INT8": (8, 8), "INT4": (4, 8), "INT2": (2, 8)}  # of the sizes
SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}  # of the agreement
TURN_SECONDS, TURN_PASSES = 0.5, 3  # a turn takes at least so long and so many passes

FLOAT = {
    "FP32 PyTorch": "torch",
    "FP32 torch.compile": "compile",
    "FP32 ONNX Runtime": "onnxruntime:fp32.onnx",
}
OURS = {
    "ONNX Runtime": "onnxruntime:int8.onnx",
    "OpenVINO": "openvino:int8.onnx:f32",
    "OpenVINO, bf16 between": "openvino:int8.onnx:bf16",
    "Inductor": "inductor",
}
PEERS = {
    "ONNX Runtime quantize_static": "onnxruntime:static.onnx",
    "OpenVINO NNCF": "openvino:nncf.xml:f32",
    "OpenVINO NNCF, bf16 between": "openvino:nncf.xml:bf16",
}
NEEDS = {"inductor": "torchao", "nncf.xml": "nncf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results-dir", type=Path, default=Path("results/deployment"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--parts", nargs="+", choices=("size", "agreement", "latency"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", nargs=3, metavar=("MODEL", "CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.worker:
        work(*options.worker, options.threads)
        return
    from sections.base import MODELS

    names = options.models or list(MODELS)
    parts = options.parts or ("size", "agreement", "latency")
    import torch

    torch.set_num_threads(options.threads)
    if "agreement" in parts:
        print_agreement(names, options)
    with tempfile.TemporaryDirectory(prefix="deployment-") as folder:
        if "size" in parts:
            print_sizes(names, Path(folder))
        if "latency" in parts:
            print_latencies(names, Path(folder), options)


# ----------------------------------------------------------------------------------------------------------- the models


def float_model(name: str, pixels: int = PIXELS):
    """Untrained, with norms that have seen a batch."""
    import torch

    from models import build_model

    model = build_model(name, CLASSES, pixels, seed=0)
    with torch.no_grad():
        model(images(4))
    return model.eval()


def images(count: int):
    import torch

    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def quantized_model(name: str, weight_bits: int = 8, activation_bits: int = 8):
    import torch

    from quantization import apply_quantization

    batches = [(images(CALIBRATION_IMAGES), torch.zeros(CALIBRATION_IMAGES, dtype=torch.long))]
    return apply_quantization(
        float_model(name),
        "ptq_static",
        weight_bits,
        batches,
        activation_bits=activation_bits,
        calibration_samples=CALIBRATION_IMAGES,
    )


# ----------------------------------------------------------------------------------------------------------------- size


def print_sizes(names: list[str], folder: Path) -> None:
    from analysis.result_rows import model_label
    from deployment import export_onnx

    print(f"\nSize of the ONNX file, {PIXELS} px, {CLASSES} classes (times smaller than FP32's); integer operators\n")
    columns = [*(f"{label} (MB)" for label in WIDTHS), "what the INT4 file holds", "INT8 in ONNX Runtime"]
    print(f"| model | FP32 (MB) | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 2) + "|")
    for name in names:
        place = folder / "size.onnx"
        fp32 = export_onnx(float_model(name), place, images(1)).size_mb
        cells, content, operators = [], "", ""
        for label, widths in WIDTHS.items():
            size = export_onnx(quantized_model(name, *widths), place, images(1)).size_mb
            cells.append(f"{size:.2f} ({fp32 / size:.1f}x)")
            content = content_of(place) if label == "INT4" else content
            operators = operators_of(place) if label == "INT8" else operators
        print(f"| {model_label(name)} | {fp32:.2f} | {' | '.join(cells)} | {content} | {operators} |", flush=True)


def content_of(path: Path) -> str:
    """Where the bytes of a file are."""
    import onnx

    proto = onnx.load(path)
    sizes: Counter = Counter()
    for tensor in proto.graph.initializer:
        kind = "weights" if tensor.name.endswith("weight_integer") else "other numbers"
        if tensor.name.endswith(("weight_scale", "bias")):
            kind = "scales and biases"
        sizes[kind] += len(tensor.raw_data)
    sizes["graph"] = path.stat().st_size - sum(sizes.values())
    return ", ".join(f"{kind} {100 * size / path.stat().st_size:.1f} %" for kind, size in sizes.most_common())


def operators_of(path: Path) -> str:
    """Convolutions and additions in the graph that ONNX Runtime runs: integer of all."""
    import onnx
    import onnxruntime

    optimised = path.with_suffix(".optimised.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(optimised).graph.node)
    groups = {
        "convolutions": (("QLinearConv",), ("Conv", "FusedConv")),
        "products": (("MatMulIntegerToFloat", "QLinearMatMul"), ("MatMul", "FusedMatMul")),
        "concatenations": (("QLinearConcat",), ("Concat",)),
    }
    told = [f"{counts['QLinearAdd']} additions"] if counts["QLinearAdd"] else []
    for label, (integer, other) in groups.items():
        mine, all_of_them = sum(counts[op] for op in integer), sum(counts[op] for op in (*integer, *other))
        if mine:
            told.insert(0, f"{mine} of {all_of_them} {label}")
    return ", ".join(told)


# ------------------------------------------------------------------------------------------------------------ agreement


def print_agreement(names: list[str], options: argparse.Namespace) -> None:
    import numpy as np

    from analysis.result_rows import model_label
    from batches import BatchLoader
    from config import load_config
    from datasets import calibration_subset, load_dataset
    from deployment import load_engine
    from evaluation import predict
    from models import build_model, load_checkpoint
    from plan import plan
    from quantization import apply_quantization
    from store import Store, seed_for

    config = load_config(CONFIG, options.set)
    dataset, store = load_dataset(config, "fairface"), Store(options.results_dir)
    split = dataset.splits["test"]
    loader = BatchLoader(split, 128)
    engines = {"ONNX Runtime": {"engine": "onnxruntime"}, "OpenVINO": {"engine": "openvino"},
               "OpenVINO, bf16 between": {"engine": "openvino", "float_precision": "bf16"}}  # fmt: skip
    print(f"\nShare of {len(split)} test images (FairFace, {dataset.image_size} px) of the simulation's class\n")
    columns = ["accuracy of FP32, of the simulation (%)", *engines, "least of a group, ONNX Runtime"]
    print(f"| model | setting | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 2) + "|")
    for cell in plan(config)["baseline"]:
        if cell.model not in names:
            continue
        model = build_model(cell.model, 2, dataset.image_size, options=config.models.options.get(cell.model))
        load_checkpoint(store.checkpoint_path("fairface", cell.model, 0), model, {"cell": cell.id})
        model.eval()
        fp32 = predict(model, loader)
        generator = np.random.default_rng(seed_for("calibration", cell.model))
        chosen = calibration_subset(dataset.splits["train"], 256, generator)
        calibration = BatchLoader(dataset.splits["train"].subset(chosen), 128)
        for label, (weight_bits, activation_bits) in SETTINGS.items():
            quantized = apply_quantization(
                model, "ptq_static", weight_bits, calibration, activation_bits=activation_bits
            )
            simulated = predict(quantized, loader)
            told = []
            for settings in engines.values():
                engine = load_engine(quantized, threads=options.threads, example=fp32_example(loader), **settings)
                same = predict(engine, loader).y_pred == simulated.y_pred
                told.append(f"{100 * same.mean():.2f} %")
                if settings == {"engine": "onnxruntime"}:
                    groups = [
                        same[codes == code].mean() for codes in split.sensitive.values() for code in np.unique(codes)
                    ]
            print(
                f"| {model_label(cell.model)} | {label} | {100 * fp32.accuracy:.1f}, {100 * simulated.accuracy:.1f} | "
                f"{' | '.join(told)} | {100 * min(groups):.2f} % |",
                flush=True,
            )  # fmt: skip


def fp32_example(loader):
    return next(iter(loader))["image"][:1]


# -------------------------------------------------------------------------------------------------------------- latency


def print_latencies(names: list[str], folder: Path, options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    from analysis.result_rows import model_label

    contenders = FLOAT | {f"ours, {label}": how for label, how in OURS.items()} | {
        f"peer, {label}": how for label, how in PEERS.items()
    }  # fmt: skip
    for part, package in NEEDS.items():
        if find_spec(package) is None:
            contenders = {label: how for label, how in contenders.items() if part not in how.split(":")}
            print(f"\n{package} is not installed: its rows are left out")
    found: dict[tuple[str, str, int], float] = {}
    for name in names:
        start = time.perf_counter()
        place = folder / name
        prepare(name, place, "peer, OpenVINO NNCF" in contenders)
        found |= take_turns(name, contenders, place, options)
        print(f"\n{model_label(name)}: measured in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for batch in BATCHES:
        print(f"\nMilliseconds of a batch of {batch} at {PIXELS} px, {options.threads} threads, medians\n")
        print("| | " + " | ".join(model_label(name) for name in names) + " |")
        print("| --- " * (len(names) + 1) + "|")
        for label in contenders:
            print(f"| {label} | " + " | ".join(number(found.get((name, label, batch))) for name in names) + " |")
        rows = {"ours, best": [], "of the best peer": [], "faster than FP32 ONNX Runtime": []}
        for name in names:
            ours, peers = (
                [found[name, label, batch] for label in contenders
                 if label.startswith(kind) and (name, label, batch) in found] for kind in ("ours", "peer")
            )  # fmt: skip
            rows["ours, best"].append(number(min(ours)))
            rows["of the best peer"].append(f"{100 * min(ours) / min(peers):.0f} %")
            rows["faster than FP32 ONNX Runtime"].append(f"{found[name, 'FP32 ONNX Runtime', batch] / min(ours):.2f}x")
        for label, cells in rows.items():
            print(f"| **{label}** | {' | '.join(cells)} |")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def prepare(name: str, folder: Path, with_nncf: bool) -> None:
    """The files of the contenders."""
    import onnxruntime.quantization as peer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from deployment import export_onnx

    folder.mkdir()
    export_onnx(float_model(name), folder / "fp32.onnx", images(1))
    export_onnx(quantized_model(name), folder / "int8.onnx", images(1))

    class Reader(peer.CalibrationDataReader):
        def __init__(self):
            self.left = [{"image": image[None].numpy()} for image in images(CALIBRATION_IMAGES)]

        def get_next(self):
            return self.left.pop() if self.left else None

    quant_pre_process(folder / "fp32.onnx", folder / "pre.onnx")
    peer.quantize_static(
        folder / "pre.onnx",
        folder / "static.onnx",
        Reader(),
        quant_format=peer.QuantFormat.QDQ,
        activation_type=peer.QuantType.QUInt8,
        weight_type=peer.QuantType.QInt8,
        per_channel=True,
    )
    if with_nncf:
        import nncf
        import openvino

        data = nncf.Dataset([image[None].numpy() for image in images(CALIBRATION_IMAGES)])
        arguments = {"model_type": nncf.ModelType.TRANSFORMER} if name.startswith("vit") else {}
        model = openvino.Core().read_model(folder / "fp32.onnx")
        openvino.save_model(
            nncf.quantize(model, data, subset_size=CALIBRATION_IMAGES, **arguments), folder / "nncf.xml"
        )


def take_turns(name: str, contenders: dict[str, str], folder: Path, options: argparse.Namespace) -> dict:
    """{(model, contender, batch): median milliseconds}."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, "--threads", str(options.threads), "--worker", name]
    workers = {
        label: subprocess.Popen(
            [*command, how, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )
        for label, how in contenders.items()
    }  # fmt: skip

    def ask(label: str, request: str) -> float | None:
        worker = workers[label]
        try:
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else None

    found = {}
    try:
        for batch in BATCHES:
            ready = [label for label in workers if ask(label, f"batch {batch}") is not None]
            turns: dict[str, list[float]] = {label: [] for label in ready}
            for _ in range(options.turns):
                for label in ready:
                    turns[label].append(ask(label, "turn"))
            for label in workers:
                if None in turns.get(label, [None]):
                    print(f"{name}, batch of {batch}: {label} failed", file=sys.stderr, flush=True)
                else:
                    found[name, label, batch] = statistics.median(turns[label])
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return found


def work(name: str, how: str, folder: str, threads: int) -> None:
    """A contender: `batch N` makes it ready for N images, `turn` answers with the median ms of some passes."""
    answers, sys.stdout = sys.stdout, sys.stderr
    runner = runner_of(name, how, Path(folder), threads)
    once = None
    for line in sys.stdin:
        request, *rest = line.split()
        if request == "batch":
            once = runner(images(int(rest[0])))
            for _ in range(3):
                once()
            answer = 0.0
        else:
            times = []
            while len(times) < TURN_PASSES or sum(times) < 1000 * TURN_SECONDS:
                start = time.perf_counter()
                once()
                times.append(1000 * (time.perf_counter() - start))
            answer = statistics.median(times)
        print(json.dumps(answer), file=answers, flush=True)


def runner_of(name: str, how: str, folder: Path, threads: int):
    """images -> a function of one pass over them."""
    kind, *rest = how.split(":")
    if kind in ("torch", "compile", "inductor"):
        import torch

        from quantizers.deployable import DecomposedWriter, deployable

        torch.set_num_threads(threads)
        torch._inductor.config.freezing = kind != "torch"
        model = deployable(quantized_model(name), DecomposedWriter()) if kind == "inductor" else float_model(name)
        compiled = model if kind == "torch" else torch.compile(model, dynamic=False)

        def passes(x):
            def once():
                with torch.no_grad():
                    compiled(x)

            return once

        return passes
    if kind == "onnxruntime":
        from engines import OnnxRuntimeEngine

        engine = OnnxRuntimeEngine((folder / rest[0]).read_bytes(), threads)
        return lambda x: functools.partial(engine.predict, x.numpy())
    if rest[0].endswith(".onnx"):
        from engines import OpenVinoEngine

        engine = OpenVinoEngine((folder / rest[0]).read_bytes(), threads, rest[1])
        return lambda x: functools.partial(engine.predict, x.numpy())
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": rest[1]}
    request = openvino.Core().compile_model(folder / rest[0], "CPU", settings).create_infer_request()
    return lambda x: functools.partial(request.infer, [x.numpy()])


if __name__ == "__main__":
    main()
