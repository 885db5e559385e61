"""Diagnostics by group against exact derivatives of small networks and against counts done by hand."""

import copy

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn import functional as F

import diagnostics
from diagnostics import diagnose, exemplar_table, identified_exemplars, largest_eigenvalue, straight_through
from quantizers.graph import fold_batch_norms, trace
from quantizers.modules import ActivationQuantizer, QuantizedModel
from quantizers.ptq import ptq_dynamic, ptq_static


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Small(nn.Module):
    """Convolution, BatchNorm, activation, pooling, two linear layers: 4 x 4 images of 3 channels, 3 classes."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.activation = activation()
        self.hidden = nn.Linear(16, 5)
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.05, 4)
            self.norm.weight.copy_(torch.tensor([0.7, -1.3, 2.0, 0.4]))  # a negative factor too
            self.norm.bias.normal_()

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.activation(self.norm(self.conv(x))), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


def faces(n: int = 24, groups: int = 2, seed: int = 3, batch: int = 5):
    """Images, labels, codes, and a loader of them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    codes = torch.arange(n) % groups
    return x, y, codes, loader_of(x, y, {"race": codes}, batch)


def loader_of(x, y, sensitive, batch=5):
    starts = range(0, len(x), batch)
    return [
        {
            "image": x[i : i + batch],
            "label": y[i : i + batch],
            "sensitive": {name: codes[i : i + batch] for name, codes in sensitive.items()},
        }
        for i in starts
    ]


def exact_slopes(model, paths, axes, x, y):
    """Gradient and Hessian of the mean cross entropy with respect to relative changes u of all output channels."""
    model = model.eval()
    weights = {path: model.get_parameter(path).detach() for path in paths}
    shapes = [weight.shape for weight in weights.values()]

    def loss(u_P):
        moved = {}
        for u, (path, weight), axis in zip(
            u_P.split([shape.numel() for shape in shapes]), weights.items(), axes, strict=True
        ):
            norms = weight.movedim(axis, 0).flatten(1).norm(dim=1)
            shape = [1] * weight.ndim
            shape[axis] = -1
            moved[path] = weight + norms.reshape(shape) * u.view_as(weight)
        return F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)

    at = torch.zeros(sum(shape.numel() for shape in shapes))
    return torch.func.grad(loss)(at), torch.autograd.functional.hessian(loss, at)


def row_of(table, model, group):
    (row,) = table[(table["model"] == model) & (table["group"] == group)].to_dict("records")
    return row


PATHS = ("conv.weight", "hidden.weight", "head.weight")

# ------------------------------------------------------------------------------------------------------- the gradient


def test_gradient_norms_are_those_of_autograd_for_each_group():
    model = Small().eval()
    x, y, codes, loader = faces()
    table = diagnose(model, None, loader, hessian_iterations=0).groups
    for group in (0, 1):
        member = codes == group
        g_P, _ = exact_slopes(model, PATHS, (0, 0, 0), x[member], y[member])
        row = row_of(table, "fp32", str(group))
        assert row["gradient_norm"] == pytest.approx(float(g_P.detach().norm()), rel=1e-4)
        weights = [model.get_parameter(path) for path in PATHS]
        raw = torch.autograd.grad(F.cross_entropy(model(x[member]), y[member]), weights)
        expected = torch.cat([part.flatten() for part in raw]).norm()
        assert row["weight_gradient_norm"] == pytest.approx(float(expected), rel=1e-4)
        assert row["n"] == row["n_sampled"] == 12
        assert np.isnan(row["hessian_eigenvalue"]) and "no Hessian" in row["reason"]


def test_gradient_noise_is_the_norm_that_chance_alone_gives():
    """Labels drawn at random, logits all zero: the expected gradient of the head's bias-free weights is zero."""
    model = Small()
    nn.init.zeros_(model.conv.weight)  # every image looks the same to the layers behind
    nn.init.zeros_(model.head.bias)
    nn.init.normal_(model.head.weight, std=1e-3)
    norms, noises = [], []
    for seed in range(40):
        x, y, _, _ = faces(60, seed=seed)
        y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1000 + seed))
        row = row_of(
            diagnose(model, None, loader_of(x, y, {"a": 0 * y}), hessian_iterations=0, hessian_samples=60).groups,
            "fp32",
            "0",
        )
        norms.append(row["gradient_norm"])
        noises.append(row["gradient_noise"])
    assert np.square(noises).mean() == pytest.approx(np.square(norms).mean(), rel=0.4)


# -------------------------------------------------------------------------------------------------------- the Hessian


@pytest.mark.parametrize("memory", [2 << 30, 1])  # the graph of all images kept; one image at a time
def test_the_eigenvalue_is_the_largest_of_the_full_hessian(monkeypatch, memory):
    monkeypatch.setattr(diagnostics, "GRAPH_MEMORY", memory)
    model = Small().eval()
    x, y, codes, loader = faces()
    table = diagnose(model, None, loader, hessian_iterations=40).groups
    for group in (0, 1):
        member = codes == group
        _, hessian = exact_slopes(model, PATHS, (0, 0, 0), x[member], y[member])
        row = row_of(table, "fp32", str(group))
        assert row["hessian_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-3)
        assert row["hessian_residual"] <= diagnostics.CONVERGED and row["hessian_converged"]
        assert row["reason"] == ""


def test_lanczos_finds_the_largest_eigenvalue_not_the_largest_magnitude_and_agrees_with_arpack():
    matrix = torch.randn(300, 300, dtype=torch.float64)
    matrix = (matrix + matrix.T) / 40 - 2 * torch.eye(300)  # most of it negative
    matrix[0, 0] += 6
    value, residual = largest_eigenvalue(lambda v: matrix @ v, torch.randn(300, dtype=torch.float64), 60)
    assert value == pytest.approx(float(eigsh(matrix.numpy(), 1, which="LA")[0][0]), rel=1e-3)
    assert residual <= diagnostics.CONVERGED
    assert value > 0 > torch.linalg.eigvalsh(matrix).mean()


def test_the_residual_is_that_of_the_ritz_vector():
    matrix = torch.diag(torch.linspace(1, 2, 200, dtype=torch.float64))  # no gap: slow
    vectors = []

    def product(v):
        vectors.append(v)
        return matrix @ v

    value, residual = largest_eigenvalue(product, torch.randn(200, dtype=torch.float64), 4)
    basis = torch.stack(vectors, dim=1)
    ritz, mixed = torch.linalg.eigh(basis.T @ matrix @ basis)
    x = basis @ mixed[:, -1]
    assert value == pytest.approx(float(ritz[-1]))
    assert residual == pytest.approx(float((matrix @ x - value * x).norm()) / value, rel=1e-6)
    assert residual > diagnostics.CONVERGED


def test_an_exhausted_space_and_a_matrix_of_zeros_end_lanczos():
    value, residual = largest_eigenvalue(lambda v: 3 * v, torch.ones(5), 20)
    assert (value, residual) == (pytest.approx(3), pytest.approx(0, abs=1e-6))
    assert largest_eigenvalue(torch.zeros_like, torch.ones(5), 20) == (0, 0)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert largest_eigenvalue(lambda v: swap @ v, torch.tensor([1.0, 0.0]), 1) == (0, np.inf)
    assert largest_eigenvalue(lambda v: swap @ v, torch.tensor([1.0, 0.0]), 2)[0] == pytest.approx(1)


def test_an_eigenvalue_that_has_not_converged_says_so():
    _, _, _, loader = faces()
    row = row_of(diagnose(Small(), None, loader, hessian_iterations=1).groups, "fp32", "0")
    assert row["hessian_residual"] > diagnostics.CONVERGED and not row["hessian_converged"]
    assert "not converged in 1 steps" in row["reason"]


# ------------------------------------------------------------------------------- folding and quantization in comparison


def folded(model: nn.Module) -> nn.Module:
    network, placement = trace(copy.deepcopy(model).eval())
    fold_batch_norms(network, placement)
    assert placement.folded_norms == ["norm"] and not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    return network


def test_folding_batch_norm_changes_none_of_the_numbers_but_the_norm_of_the_plain_gradient():
    model = Small().eval()
    with torch.no_grad():  # a factor that the norm takes away again, as after training with weight decay
        model.conv.weight.mul_(0.02)
        model.norm.running_mean.mul_(0.02)
        model.norm.running_var.mul_(0.0004)
        model.norm.eps = 1e-9
    _, _, _, loader = faces()
    plain, other = (diagnose(m, None, loader, hessian_iterations=40).groups for m in (model, folded(model)))
    for column in ("logit_variance", "margin", "margin_p10", "gradient_norm", "gradient_noise", "hessian_eigenvalue"):
        np.testing.assert_allclose(other[column], plain[column], rtol=1e-3, err_msg=column)
    assert not np.allclose(other["weight_gradient_norm"], plain["weight_gradient_norm"], rtol=0.05)


def test_a_model_of_32_bits_has_the_numbers_of_fp32():
    """Folded, cut into layers and differentiated as a quantized model: that of another width than the others."""
    model = Small().eval()
    x, _, _, loader = faces()
    quantized = ptq_static(model, x, weight_bits=32, activation_bits=32)
    found = diagnose(model, quantized, loader, hessian_iterations=40)
    fp32, same = (found.groups[found.groups["model"] == name] for name in ("fp32", "quantized"))
    for column in ("logit_variance", "margin", "gradient_norm", "hessian_eigenvalue"):
        np.testing.assert_allclose(same[column], fp32[column], rtol=1e-3, err_msg=column)
    assert found.clipping.empty and list(found.clipping.columns) == list(diagnostics.CLIPPING_COLUMNS)
    assert found.exemplars["disagreements"].sum() == 0


def test_the_hessian_through_fine_quantizers_is_nearly_that_of_the_float_model_and_coarse_ones_move_it():
    model = Small(nn.Tanh).eval()
    x, _, _, loader = faces()
    values = {}
    for bits in (8, 2):
        quantized = ptq_static(model, x, weight_bits=bits, activation_bits=bits, observer="minmax")
        table = diagnose(model, quantized, loader, hessian_iterations=40).groups
        values[bits] = table.pivot(index="group", columns="model", values="hessian_eigenvalue")
    np.testing.assert_allclose(values[8]["quantized"], values[8]["fp32"], rtol=0.03)
    assert not np.allclose(values[2]["quantized"], values[2]["fp32"], rtol=0.1)


def test_derivatives_of_the_quantized_model_are_those_of_its_local_surrogate():
    """Each quantizer replaced by the line through its value, of slope 1 in its range and 0 outside it."""
    model = Small().eval()
    x, y, codes, loader = faces()
    quantized = ptq_static(model, x, weight_bits=4, activation_bits=3, observer="percentile", percentile=90.0)
    found = diagnose(model, quantized, loader, hessian_iterations=60)
    assert found.clipping["clipping_rate"].max() > 0.02  # else there is no outside
    paths = [f"network.{name}.layer.weight" for name in ("conv", "hidden", "head")]
    for group in (0, 1):
        member = codes == group
        seen = {}

        def note(module, inputs, output, seen=seen):
            seen[module.name] = inputs[0].clone(), output.clone()

        handles = [m.register_forward_hook(note) for m in quantized.activation_quantizers().values()]
        with torch.no_grad():
            quantized(x[member])
        for handle in handles:
            handle.remove()

        def line(module, inputs, output, seen=seen):
            at, value = seen[module.name]
            steps = at / module.scale + module.zero_point
            slope = ((steps >= -0.5) & (steps <= 2**3 - 0.5)).float()
            return value + slope * (inputs[0] - at)

        handles = [m.register_forward_hook(line) for m in quantized.activation_quantizers().values()]
        g_P, hessian = exact_slopes(quantized, paths, (0, 0, 0), x[member], y[member])
        for handle in handles:
            handle.remove()
        row = row_of(found.groups, "quantized", str(group))
        assert row["gradient_norm"] == pytest.approx(float(g_P.detach().norm()), rel=1e-4)
        assert row["hessian_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-3)


def test_a_quantizer_gives_what_it_gives_and_its_gradient_is_one_where_it_rounds_and_zero_where_it_clips():
    quantizer = ActivationQuantizer("x", 2)
    quantizer.set_range(0.0, 3.0)  # levels 0 1 2 3
    x = torch.tensor([-0.7, -0.4, 0.0, 1.4, 3.4, 3.7], requires_grad=True)
    with straight_through(quantizer):
        y = quantizer(x)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert y.tolist() == quantizer(x).tolist() == [0, 0, 0, 1, 3, 3]
    assert first.tolist() == [0, 0, 0, 3, 27, 0]  # 3 q^2
    assert second.tolist() == [0, 0, 0, 6, 18, 0]  # 6 q
    assert not quantizer._forward_hooks


# ------------------------------------------------------------------------------------------------------------ clipping


class Passing(nn.Module):
    """The image's first pixel of each of 3 channels as 3 logits, through the identity."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))

    def forward(self, x):
        return self.head(x.flatten(1))


def passing(logits: torch.Tensor, bits=2, low=-1.0, high=2.0) -> tuple[nn.Module, QuantizedModel]:
    model = Passing()
    quantized = ptq_static(model, logits[:, :, None, None], weight_bits=8, activation_bits=bits)
    (quantizer,) = quantized.activation_quantizers().values()
    quantizer.set_range(low, high)
    return model, quantized


def test_clipping_by_hand():
    # 2 bits over [-1, 2]: levels -1 0 1 2; below -1.5 and above 2.5 values are clipped
    logits = torch.tensor(
        [
            [-1.6, 0.0, 2.6],
            [-1.4, 0.0, 2.4],
            [9.0, 9.0, 9.0],
            [-9.0, -9.0, 1.0],
        ]
    )
    model, quantized = passing(logits)
    loader = loader_of(logits[:, :, None, None], torch.zeros(4).long(), {"g": torch.tensor([0, 0, 1, 1])}, batch=3)
    table = diagnose(model, quantized, loader, hessian_iterations=0).clipping
    (layer,) = quantized.activation_quantizers()
    assert list(table["layer"]) == [layer, layer] and list(table["group"]) == ["0", "1"] and list(table["n"]) == [2, 2]
    assert table["clipped_low"].tolist() == pytest.approx([1 / 6, 1 / 3])
    assert table["clipped_high"].tolist() == pytest.approx([1 / 6, 1 / 2])
    assert table["clipping_rate"].tolist() == pytest.approx([2 / 6, 5 / 6])


@pytest.mark.parametrize("backend", ["x86", "arm", "tensorrt"])
def test_the_range_of_all_calibration_images_clips_none_of_their_values_and_a_dynamic_one_never_any(backend):
    model = Small().eval()
    x, y, _, loader = faces(40)
    static = ptq_static(model, x, weight_bits=8, activation_bits=4, observer="minmax", backend=backend)
    quantizer = next(iter(static.activation_quantizers().values()))  # of the image: what calibration saw is what comes
    table = diagnose(model, static, loader, hessian_iterations=0).clipping
    assert table[table["layer"] == quantizer.name]["clipping_rate"].tolist() == [0, 0]
    dynamic = ptq_dynamic(model, weight_bits=8, activation_bits=4, backend=backend)
    larger = loader_of(100 * x, y, {"race": 0 * y})
    table = diagnose(model, dynamic, larger, hessian_iterations=0).clipping
    assert len(table) == len(dynamic.activation_quantizers()) and (table["clipping_rate"] == 0).all()


def test_values_are_counted_while_the_network_quantizes():
    """The second of two quantizers gets what the first one has left of the values, nothing beyond 2."""
    logits = torch.tensor([[9.0, 0.0, 1.0], [-9.0, 0.0, 1.0]])
    model = nn.Sequential(Passing(), nn.Linear(3, 3, bias=False))
    quantized = ptq_static(model, logits[:, :, None, None], weight_bits=8, activation_bits=2)
    first, second = quantized.activation_quantizers().values()
    first.set_range(-1.0, 2.0)
    second.set_range(-3.0, 3.0)
    loader = loader_of(logits[:, :, None, None], torch.zeros(2).long(), {"g": torch.zeros(2).long()})
    table = diagnose(model, quantized, loader, hessian_iterations=0).clipping.set_index("layer")
    assert table.loc[first.name, ["clipped_low", "clipped_high"]].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert table.loc[second.name, "clipping_rate"] == 0


# -------------------------------------------------------------------------------------------------------------- logits


def test_logit_variance_and_margin_by_hand():
    logits = torch.tensor([[2.0, 0.0, -2.0], [4.0, 0.0, -4.0], [1.0, 5.0, 3.0], [0.0, 0.0, 9.0]])
    labels = torch.tensor([0, 1, 1, 2])
    model, _ = passing(logits)
    loader = loader_of(logits[:, :, None, None], labels, {"g": torch.tensor([0, 0, 1, 2])})
    table = diagnose(model, None, loader, hessian_iterations=0).groups.set_index("group")
    # group 0: logits less their mean are (2, 0, -2) and (4, 0, -4): variances 2, 0, 2
    assert table.loc["0", "logit_variance"] == pytest.approx(4 / 3)
    # margins 2 - 0 and 0 - 4; their 10th percentile -4 + 0.1 * 6
    assert table.loc["0", "margin"] == pytest.approx(-1) and table.loc["0", "margin_p10"] == pytest.approx(-3.4)
    # a single image: 5 - 3, and no variance
    assert table.loc["1", "margin"] == pytest.approx(2) and np.isnan(table.loc["1", "logit_variance"])
    assert np.isnan(table.loc["1", "gradient_noise"]) and "a single image" in table.loc["1", "reason"]
    shifted = loader_of(logits[:, :, None, None] + torch.arange(4.0)[:, None, None, None], labels, {"g": labels * 0})
    plain = loader_of(logits[:, :, None, None], labels, {"g": labels * 0})
    a, b = (diagnose(model, None, loader, hessian_iterations=0).groups for loader in (shifted, plain))
    assert a.loc[0, "logit_variance"] == pytest.approx(b.loc[0, "logit_variance"])  # softmax does not see it


def test_a_single_logit_is_the_second_of_two():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 1)

        def forward(self, x):
            return self.head(x.flatten(1))

    class Two(nn.Module):
        def __init__(self, one):
            super().__init__()
            self.one = one

        def forward(self, x):
            z = self.one(x)
            return torch.cat([torch.zeros_like(z), z], dim=1)

    x, y, codes, _ = faces()
    loader = loader_of(x, y.clamp(max=1), {"g": codes})
    one = One()
    a, b = (diagnose(model, None, loader, hessian_iterations=30).groups for model in (one, Two(one)))
    np.testing.assert_allclose(a.select_dtypes("number").to_numpy(), b.select_dtypes("number").to_numpy(), rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- exemplars


def test_exemplars_of_one_model_are_its_disagreements_and_of_several_those_of_the_modes():
    assert identified_exemplars([0, 1, 2], [0, 2, 2]).tolist() == [False, True, False]
    fp32 = np.array([[0, 1, 2, 0], [0, 1, 0, 1], [1, 2, 1, 1]])  # modes 0, 1, 0 (all tied), 1
    quantized = np.array([[0, 2, 0, 0], [1, 2, 0, 0]])  # modes 0 (tied), 2, 0, 0
    assert identified_exemplars(fp32, quantized).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("fp32", "quantized", "message"),
    [
        ([0, 1], [0, 1, 2], "2 images by FP32 and of 3"),
        ([0.5, 1.0], [0, 1], "integers"),
        ([0, -1], [0, 1], "integers from 0"),
        (np.zeros((0, 4), int), np.zeros(4, int), "seeds"),
        (np.zeros((1, 1, 4), int), np.zeros(4, int), "shape"),
    ],
)
def test_predictions_that_are_none_are_refused(fp32, quantized, message):
    with pytest.raises(ValueError, match=message):
        identified_exemplars(fp32, quantized)


def test_exemplar_table_by_hand():
    y_true = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    fp32 = np.array([0, 0, 0, 1, 1, 1, 0, 0])
    quantized = np.array([0, 0, 1, 1, 0, 0, 1, 0])  # exemplars: 2; 4, 5, 6
    table = exemplar_table(y_true, fp32, quantized, np.array([0] * 4 + [1] * 4), ["A", "B", "empty"])
    assert table["n"].tolist() == [4, 4, 0] and table["disagreements"].tolist() == [1, 3, 0]
    np.testing.assert_allclose(table["share"], [1 / 4, 3 / 4, np.nan])
    np.testing.assert_allclose(table["over_representation"], [0.5, 1.5, np.nan])  # (1/4) / (1/2), (3/4) / (1/2)
    np.testing.assert_allclose(table["fp32_accuracy_exemplars"], [1, 2 / 3, np.nan])
    np.testing.assert_allclose(table["fp32_accuracy_others"], [2 / 3, 0, np.nan])
    # Wilson, 1 of 4: z = 1.959964
    z2 = 1.959964**2
    centre, half = (1 + z2 / 2) / (4 + z2), np.sqrt(z2 * (3 / 4 + z2 / 4)) / (4 + z2)
    np.testing.assert_allclose(
        table.loc[0, ["share_ci_low", "share_ci_high"]].astype(float), [centre - half, centre + half], 1e-6
    )
    none = exemplar_table(y_true, fp32, fp32, np.zeros(8, int), ["A"])
    assert none.loc[0, "share"] == 0 and np.isnan(none.loc[0, "over_representation"])
    with pytest.raises(ValueError, match="unequal lengths"):
        exemplar_table(y_true[:5], fp32, quantized, np.zeros(8, int), ["A"])
    with pytest.raises(ValueError, match="group codes"):
        exemplar_table(y_true, fp32, quantized, np.full(8, 3), ["A"])


# ------------------------------------------------------------------------------------------------ groups and the loader


def test_groups_are_the_intersections_by_value_or_by_name_and_empty_ones_have_a_reason():
    x, y, _, _ = faces(8)
    sensitive = {"gender": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), "age": torch.tensor([0, 2, 0, 2, 0, 0, 0, 0])}
    loader, model = loader_of(x, y, sensitive, 3), Small().eval()
    table = diagnose(model, None, loader).groups
    assert list(table["group"]) == ["0 & 0", "0 & 2", "1 & 0", "1 & 2"] and list(table["n"]) == [2, 2, 4, 0]
    empty = row_of(table, "fp32", "1 & 2")
    assert empty["reason"] == "no image of this group" and empty["n_sampled"] == 0
    numbers = {
        name
        for name in diagnostics.GROUP_COLUMNS
        if name not in ("model", "group", "n", "n_sampled", "reason", "hessian_converged")
    }
    assert all(np.isnan(empty[name]) for name in numbers) and not empty["hessian_converged"]
    named = diagnose(model, None, loader, "gender", names={"gender": ["women", "men"]}, hessian_iterations=0).groups
    assert list(named["group"]) == ["women", "men"] and list(named["n"]) == [4, 4]
    by_age = diagnose(model, None, loader, ["age"], hessian_iterations=0).groups
    assert list(by_age["group"]) == ["0", "2"] and list(by_age["n"]) == [6, 2]


def test_the_sample_is_the_same_whatever_the_batch_size_and_another_with_another_seed():
    x, y, codes, _ = faces(60)
    model = Small().eval()

    def norms(batch, seed):
        loader = loader_of(x, y, {"race": codes}, batch)
        table = diagnose(model, None, loader, hessian_samples=7, hessian_iterations=0, seed=seed).groups
        assert list(table["n"]) == [30, 30] and list(table["n_sampled"]) == [7, 7]
        return table["gradient_norm"].to_numpy()

    np.testing.assert_allclose(norms(4, 0), norms(60, 0), rtol=1e-5)
    assert (abs(norms(4, 0) - norms(4, 1)) > 1e-3).all()


def test_what_cannot_be_diagnosed_is_refused_in_one_line():
    x, y, codes, loader = faces()
    model = Small().eval()
    for arguments, message in [
        ((loader_of(x, y, {}),), "no sensitive attributes"),
        ((loader, "gender"), "unknown sensitive attribute 'gender'; the loader has 'race'"),
        ((loader, []), "no attribute is named; the loader has 'race'"),
        (([],), "empty"),
        ((loader_of(x, y + 1, {"race": codes}),), "labels 1 to 3 do not fit a model of 3 classes"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            diagnose(model, None, *arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="hessian_samples 0"):
        diagnose(model, None, loader, hessian_samples=0)
    with pytest.raises(ValueError, match="not made from this one: its layer conv"):
        diagnose(Passing(), ptq_static(model, x, weight_bits=8, activation_bits=8), loader)


# ------------------------------------------------------------------------------------------------ the models afterwards


def everything(model):
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "mode": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "identity": [id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def check_same(before, model):
    after = everything(model)
    for name, tensor in before.pop("state").items():
        assert torch.equal(tensor.nan_to_num(7e7), after["state"][name].nan_to_num(7e7)), name
    after.pop("state")
    assert before == after


def test_both_models_are_left_as_they_were_also_after_an_error(monkeypatch):
    x, y, codes, loader = faces()
    model = Small().train()
    model.hidden.eval()
    model.head.weight.requires_grad_(False)
    quantized = ptq_static(model, x, weight_bits=4, activation_bits=4)
    images = x.clone()
    before = everything(model), everything(quantized)
    with torch.no_grad():
        diagnose(model, quantized, loader)  # also where gradients are off
    check_same(before[0], model)
    check_same(before[1], quantized)
    assert torch.equal(x, images)
    before = everything(model), everything(quantized)

    def fail(*arguments):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(diagnostics, "largest_eigenvalue", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        diagnose(model, quantized, loader)
    check_same(before[0], model)
    check_same(before[1], quantized)
    with pytest.raises(ValueError, match="do not fit"):
        diagnose(model, quantized, loader_of(x, y + 9, {"race": codes}))
    before[0]["state"], before[1]["state"] = model.state_dict(), quantized.state_dict()
    check_same(before[0], model)
    check_same(before[1], quantized)


def test_fused_attention_is_differentiated_twice():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(3, 12), nn.Linear(4, 3)

        def forward(self, x, attend=F.scaled_dot_product_attention):
            q, k, v = self.mix(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
            return self.head(attend(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))

    class WrittenOut(Attending):
        def forward(self, x):
            return super().forward(x, lambda q, k, v: (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v)

    fused, written_out = Attending(), WrittenOut()
    written_out.load_state_dict(fused.state_dict())
    x, y, codes, loader = faces()
    found = diagnose(fused, None, loader).groups
    for group in (0, 1):
        member = codes == group
        g_P, hessian = exact_slopes(written_out, ("mix.weight", "head.weight"), (0, 0), x[member], y[member])
        row = row_of(found, "fp32", str(group))
        assert row["gradient_norm"] == pytest.approx(float(g_P.detach().norm()), rel=1e-3)
        assert row["hessian_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-3)


def test_images_that_a_model_changes_in_place_are_changed_once():
    class Doubling(Small):
        def forward(self, x):
            return super().forward(x.mul_(2))

    x, y, codes, loader = faces()
    model = Doubling().eval()
    plain = Small().eval()
    plain.load_state_dict(model.state_dict())
    doubled = loader_of(2 * x, y, {"race": codes})
    quantized = ptq_static(model, x.clone(), weight_bits=32, activation_bits=32)
    before = x.clone()
    found = diagnose(model, quantized, loader).groups
    assert torch.equal(x, before)
    expected = diagnose(plain, None, doubled).groups
    for name in ("fp32", "quantized"):
        for column in ("margin", "gradient_norm", "hessian_eigenvalue"):
            np.testing.assert_allclose(found[found["model"] == name][column], expected[column], rtol=1e-3)


def test_it_is_reproducible_and_tells_its_progress():
    x, _, _, loader = faces()
    model = Small().eval()
    quantized = ptq_static(model, x, weight_bits=4, activation_bits=4)
    told = []
    first = diagnose(model, quantized, loader, progress=lambda what, share: told.append((what, share)))
    second = diagnose(model, quantized, loader)
    for name in ("groups", "clipping", "exemplars"):
        assert getattr(first, name).equals(getattr(second, name))
    assert told[0] == ("fp32, group 0", 0.0) and told[-1][1] == 1.0
    assert [share for _, share in told] == sorted(share for _, share in told)


def test_tied_weights_in_place_activations_and_transposed_convolutions_are_differentiated_as_they_are_used():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2)
            self.norm = nn.BatchNorm2d(4)
            self.first, self.second = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
            self.second.weight = self.first.weight
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.relu(self.norm(self.up(x)))
            return self.head((self.second(self.relu(self.first(x))) + x).mean((2, 3)))

    model = Odd().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.1, 3)
    x, y, _, _ = faces()
    loader = loader_of(x, y, {"g": 0 * y})
    quantized = ptq_static(model, x, weight_bits=32, activation_bits=32)
    fp32, same = (
        row_of(diagnose(model, quantized, loader, hessian_iterations=40).groups, name, "0")
        for name in ("fp32", "quantized")
    )
    for column in ("gradient_norm", "hessian_eigenvalue"):
        assert same[column] == pytest.approx(fp32[column], rel=1e-3)
