"""Installation check: python test_setup.py. A line for each thing; ends with 'Ready to run experiments!' or exits 1.

Not a test module: the project's tests are in tests/ and run with `make test`.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = {  # distribution -> module
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "safetensors": "safetensors",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "ml_dtypes": "ml_dtypes",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
    "scikit-learn": "sklearn",
    "fairlearn": "fairlearn.metrics",
    "aif360": "aif360.metrics",
    "matplotlib": "matplotlib",
    "seaborn": "seaborn",
    "jinja2": "jinja2",
    "plotly": "plotly",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "pyarrow": "pyarrow",
    "huggingface_hub": "huggingface_hub",
    "rich": "rich",
    "filelock": "filelock",
}
MINIMUM_PYTHON = (3, 11)


def main() -> int:
    # not the whole set of optional extras: AIF360 logs a warning for each one that is missing
    import logging

    logging.disable(logging.WARNING)
    problems = check_python() + check_packages()
    if not problems:
        for check in (check_device, check_forward, check_quantized_forward, check_deployment, check_metric):
            problems += attempt(check)
    print()
    if problems:
        for problem in problems:
            print(f"problem: {problem}")
        print("Not ready. Install what is missing with: python -m pip install -r requirements.txt")
        return 1
    print("Ready to run experiments!")
    return 0


def attempt(check) -> list[str]:
    """Run one check; whatever it raises is a problem of the installation, told in a line."""
    try:
        check()
    except Exception as error:
        return [f"{check.__name__.removeprefix('check_')}: {type(error).__name__}: {' '.join(str(error).split())}"]
    return []


def say(name: str, text: str) -> None:
    print(f"{name:<18} {text}", flush=True)


def check_python() -> list[str]:
    version = ".".join(map(str, sys.version_info[:3]))
    say("python", version)
    if sys.version_info < MINIMUM_PYTHON:
        return [f"Python {version}: {'.'.join(map(str, MINIMUM_PYTHON))} or newer is needed"]
    return []


def check_packages() -> list[str]:
    minimum = requirements()
    problems = []
    for distribution, module in PACKAGES.items():
        try:
            importlib.import_module(module)
            version = distribution_version(distribution)
        except Exception as error:  # a broken package raises anything
            say(distribution, "MISSING" if isinstance(error, ModuleNotFoundError) else "BROKEN")
            problems.append(f"{distribution}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        needed = minimum[distribution]
        is_old = numbers(version) < numbers(needed)
        say(distribution, f"{version}{f'  TOO OLD: {needed} or newer is needed' if is_old else ''}")
        if is_old:
            problems.append(f"{distribution} {version}: {needed} or newer is needed")
    return problems


def distribution_version(name: str) -> str:
    """The installed version; ONNX Runtime has another distribution for GPUs."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return metadata.version(f"{name}-gpu")


def requirements() -> dict[str, str]:
    """distribution -> lower bound, from requirements.txt."""
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("#")[0].strip().partition(">=") for line in lines)
    return {name: bound for name, separator, bound in pairs if separator}


def numbers(version: str) -> tuple[int, ...]:
    """'2.15.0+cpu' -> (2, 15, 0)"""
    parts = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def check_device() -> None:
    import torch

    if torch.cuda.is_available():
        say("device", f"cuda: {torch.cuda.get_device_name(0)}")
    else:
        say("device", f"cpu: {torch.get_num_threads()} threads (no CUDA device)")


def check_forward() -> None:
    import torch

    from models import build_model

    model = build_model("mobilenet_v2", n_classes=2, image_size=32).eval()
    with torch.inference_mode():
        logits = model(torch.randn(4, 3, 32, 32))
    if logits.shape != (4, 2) or not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"MobileNetV2 gave logits of shape {tuple(logits.shape)}, not all finite")
    say("forward pass", f"MobileNetV2, 4 images -> logits {tuple(logits.shape)}")


def check_quantized_forward() -> None:
    import torch

    from models import build_model
    from quantization import apply_quantization

    model = build_model("mobilenet_v2", n_classes=2, image_size=32).eval()
    images = torch.randn(16, 3, 32, 32)
    batches = [{"image": images, "label": torch.zeros(16, dtype=torch.long), "sensitive": {}}]
    quantized = apply_quantization(model, "ptq_static", 4, batches)
    layer = next(iter(quantized.layers().values()))
    levels = max(len(channel.unique()) for channel in layer.layer.weight.detach())
    if levels > 16:
        raise RuntimeError(f"a 4-bit channel has {levels} distinct weights")
    with torch.inference_mode():
        logits = quantized(images)
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the quantized model's logits are not finite")
    say("quantized forward", f"MobileNetV2 at 4 bits: {len(quantized.layers())} layers, at most {levels} weight levels")


def check_deployment() -> None:
    import tempfile

    import numpy as np
    import torch

    from deployment import export_onnx, load_engine
    from models import build_model
    from quantization import apply_quantization

    model = build_model("squeezenet1_1", n_classes=2, image_size=32).eval()
    images = torch.randn(16, 3, 32, 32)
    quantized = apply_quantization(model, "ptq_static", 4, [(images, torch.zeros(16, dtype=torch.long))])
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(quantized, Path(folder) / "model.onnx", images)
        logits = load_engine(file.path).predict(images.numpy())
    with torch.inference_mode():
        expected = quantized(images).numpy()
    if not np.allclose(logits, expected, atol=0.05 * max(1e-6, float(np.abs(expected).max()))):
        raise RuntimeError("ONNX Runtime gives other logits than the simulation")
    say("deployment", f"SqueezeNet at 4 bits: {file.size_mb:.2f} MB of ONNX, ONNX Runtime agrees")


def check_metric() -> None:
    import numpy as np
    from fairlearn.metrics import equalized_odds_difference as reference

    from fairness_metrics import equalized_odds_difference

    rng = np.random.default_rng(0)
    y_true, y_pred, group = rng.integers(0, 2, (3, 500))
    ours = equalized_odds_difference(y_true, y_pred, group)
    theirs = reference(y_true, y_pred, sensitive_features=group)
    if abs(ours - theirs) > 1e-12:
        raise RuntimeError(f"equalized odds difference is {ours}, fairlearn says {theirs}")
    say("metric", f"equalized odds difference {ours:.4f}, as fairlearn's")


if __name__ == "__main__":
    sys.exit(main())
