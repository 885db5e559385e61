"""What the README tells a notebook to do, run word for word, and the example of one's own model."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from quantizers.modules import QuantizedModel

ROOT = Path(__file__).parent.parent


class Users(nn.Module):
    """A plain nn.Module for 12-pixel images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def batches(n: int, seed: int) -> list[tuple]:
    """Tuples of the three, as a DataLoader of one's own would give them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 12, 12, generator=generator)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    sensitive = {
        name: torch.randint(0, k, (n,), generator=generator) for name, k in (("gender", 2), ("race", 2), ("age", 3))
    }
    parts = [slice(start, start + 50) for start in range(0, n, 50)]
    return [(images[part], labels[part], {name: values[part] for name, values in sensitive.items()}) for part in parts]


def blocks_of(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", body, re.DOTALL)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory) -> dict:
    """The names that the examples take for granted, after they have run, one after the other."""
    torch.manual_seed(0)
    model = Users()
    loader = batches(900, 0)
    model(torch.cat([images for images, _, _ in loader]))
    given = {
        "model": model.eval(),
        "loader": loader,
        "train_loader": batches(200, 1),
        "test_loader": batches(400, 2),
        "x_NCHW": loader[0][0].numpy(),
        "folder": tmp_path_factory.mktemp("notebook"),
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["models"] = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.chdir(given["folder"])
        found = blocks_of("From a notebook")
        assert len(found) == 2
        for block in found:
            exec(
                compile(block.replace("size_budget_bytes=1_500_000", "size_budget_bytes=4_000"), "README.md", "exec"),
                given,
            )
            given["models"].append(given["qmodel"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return given


def test_the_examples_give_what_they_say(namespace):
    assert all(isinstance(model, QuantizedModel) for model in namespace["models"])
    metrics = namespace["metrics"]
    assert 0 <= metrics["demographic_parity"] <= 1 and metrics["model_size_mb"] > 0
    table = pd.read_csv(namespace["folder"] / "quantization_comparison.csv")
    assert list(table["method"].unique()) == ["FP32", "PTQ_INT8", "PTQ_INT4", "QAT_INT8", "bias_aware"]
    assert set(table["sensitive_attribute"]) == {"gender", "age"}
    assert (namespace["folder"] / "model.onnx").stat().st_size > 0


def test_the_quantizer_says_whether_the_bound_holds(namespace):
    """A gap of 1 point cannot be certified on 300 images: it says so, and gives the gap that it measured."""
    quantizer = namespace["quantizer"]
    assert quantizer.satisfied is False and 0 <= quantizer.final_dp_gap <= 1
    assert quantizer.certificate["smallest_certifiable"] > 0.01
    assert len(quantizer.report) > 5


def test_the_example_of_ones_own_model_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_model.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "is certified at" in lines[0] and not lines[0].startswith("ptq_static (rung 1")  # plain misses the bound
    assert lines[-1].startswith("2 bits: ")
