"""Decision thresholds for each group, after quantization (Hardt, Price & Srebro, "Equality of opportunity in supervised
learning", 2016; fairlearn's ThresholdOptimizer).

A reference point, not a repair of the model: it reads the group of every image when it predicts, which many uses do not
know, or may not use. The thresholds are the most accurate ones under which the groups' rates are equal on the data they
are fitted to; between two thresholds the decision is drawn, for the same pixels always the same way, whatever batch or
device they are in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation import predict
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError

CONSTRAINTS = (
    "demographic_parity",
    "equalized_odds",
    "true_positive_rate_parity",
    "false_positive_rate_parity",
)
LEAST_MARGIN = 1e-6  # of an adjusted logit, so that its sign is the decision


class GroupThresholds(nn.Module):
    """A quantized model whose decision depends on the group too: (images (N, 3, H, W), sensitive {name: (N,)}) ->
    logits (N, 2) whose larger one is the decision. `evaluation.predict` gives it what it reads.

    The logits are 0 and the model's own margin, its sign changed where the group's threshold decides otherwise: they
    are no probabilities any more. `rules`, (G, 5) float64, has the columns p0, threshold0, p1, threshold1, offset of
    each group: class 1 with probability offset + sum_i p_i [margin > threshold_i].
    """

    reads_groups = True

    def __init__(self, model: QuantizedModel, attributes: Sequence[str], codes: Sequence[tuple[int, ...]], rules):
        super().__init__()
        self.model = model
        self.attributes = tuple(attributes)
        self.codes = {tuple(code): place for place, code in enumerate(codes)}
        self.register_buffer("rules", torch.as_tensor(np.asarray(rules, dtype=np.float64)))

    @property
    def description(self) -> dict[str, Any]:
        return self.model.description

    @property
    def reports(self) -> dict[str, Any]:
        return self.model.reports

    @property
    def placement(self) -> Any:
        return self.model.placement

    def forward(self, x: torch.Tensor, sensitive: Mapping[str, Any]) -> torch.Tensor:
        margin_N = margins(self.model(x).float().cpu())
        decision_N = self.decide(margin_N, sensitive, _uniform(x))
        size_N = margin_N.abs().clamp(min=LEAST_MARGIN)
        return torch.stack([torch.zeros_like(size_N), torch.where(decision_N, size_N, -size_N)], dim=1).to(x.device)

    def decide(self, margin_N: torch.Tensor, sensitive: Mapping[str, Any], drawn_N: np.ndarray) -> torch.Tensor:
        """(N,) bool: class 1, where its probability is above a number (N,) drawn from [0, 1). QuantizationError for a
        group that there is no threshold for."""
        missing = [name for name in self.attributes if name not in sensitive]
        if missing:
            raise QuantizationError(f"thresholds of groups need the sensitive attribute {missing[0]!r} of every image")
        columns = [torch.as_tensor(sensitive[name]).reshape(-1).tolist() for name in self.attributes]
        groups = list(zip(*columns, strict=True))
        unknown = next((code for code in groups if code not in self.codes), None)
        if unknown is not None:
            of = " x ".join(self.attributes)
            raise QuantizationError(
                f"group {' & '.join(map(str, unknown))} of {of} has no threshold: it was not fitted"
            )
        rules = self.rules.cpu().numpy()[[self.codes[code] for code in groups]]
        margin = margin_N.double().numpy()
        probability = rules[:, 4].copy()
        for p, threshold in ((rules[:, 0], rules[:, 1]), (rules[:, 2], rules[:, 3])):
            probability += p * (margin > threshold)
        return torch.from_numpy(probability > drawn_N)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        inner = {f"model.{name}": tensor for name, tensor in self.model.packed_tensors().items()}
        return {**inner, "rules": self.rules.cpu()}

    def packed_metadata(self) -> dict[str, str]:
        codes = ";".join(",".join(map(str, code)) for code in self.codes)
        return self.model.packed_metadata() | {"attributes": ",".join(self.attributes), "groups": codes}


def margins(logits_NK: torch.Tensor) -> torch.Tensor:
    """(N,): by how much class 1 is above class 0. QuantizationError for more than two classes."""
    logits_NK = logits_NK.reshape(len(logits_NK), -1)
    if logits_NK.shape[1] == 1:
        return logits_NK[:, 0]
    if logits_NK.shape[1] != 2:
        raise QuantizationError(
            f"threshold_adjustment decides between two classes; the model has {logits_NK.shape[1]}: use another one"
        )
    return logits_NK[:, 1] - logits_NK[:, 0]


def adjust_thresholds(
    model: QuantizedModel, loader: Iterable, *, attributes: Sequence[str] | None = None, constraint: str
) -> GroupThresholds:
    """The model with a threshold for each group, the most accurate ones on `loader` under `constraint`, one of
    CONSTRAINTS. The data should be neither what the model was trained on nor what it is tested on.

    QuantizationError where there are more than two classes, no sensitive attributes, one group only, or a group with
    one class only; the message names it with its counts.
    """
    if constraint not in CONSTRAINTS:
        raise QuantizationError(f"unknown constraint {constraint!r}; choose from {', '.join(CONSTRAINTS)}")
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.base import BaseEstimator

    class Scores(BaseEstimator):
        """What fairlearn takes for a fitted estimator: the features are the scores."""

        def fit(self, X, y=None):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def predict(self, X):
            return np.asarray(X)[:, 0]

    predictions = predict(model, loader)
    margin_N = margins(torch.from_numpy(predictions.logits)).double().numpy()
    names = list(predictions.sensitive) if attributes is None else list(attributes)
    missing = [name for name in names if name not in predictions.sensitive]
    if missing or not names:
        has = ", ".join(predictions.sensitive) or "none"
        raise QuantizationError(
            f"threshold_adjustment needs the sensitive attribute {missing[0] if missing else 'of any name'!r} "
            f"(the data has: {has})"
        )
    table_NA = np.stack([predictions.sensitive[name] for name in names], axis=1)
    codes_GA, group_N = np.unique(table_NA, axis=0, return_inverse=True)
    group_N = group_N.reshape(-1)
    _check_counts(names, codes_GA, group_N, predictions.y_true)
    optimizer = ThresholdOptimizer(
        estimator=Scores(), constraints=constraint, objective="accuracy_score", prefit=True, predict_method="predict",
        grid_size=1000,
    )  # fmt: skip
    optimizer.fit(margin_N[:, None], predictions.y_true, sensitive_features=group_N)
    interpolation = optimizer.interpolated_thresholder_.interpolation_dict
    rules = [_rule(interpolation[group]) for group in range(len(codes_GA))]
    return GroupThresholds(model, names, [tuple(int(value) for value in code) for code in codes_GA], rules)


def _rule(interpolation: Mapping[str, Any]) -> list[float]:
    """A group's entry of fairlearn's interpolation as a row of `GroupThresholds.rules`."""
    ignored = float(interpolation.get("p_ignore", 0.0))
    row: list[float] = []
    for key in ("0", "1"):
        operation = interpolation[f"operation{key}"]
        assert operation.operator == ">", "ThresholdOptimizer was not told to flip"
        row += [(1 - ignored) * float(interpolation[f"p{key}"]), float(operation.threshold)]
    return [*row, ignored * float(interpolation.get("prediction_constant", 0.0))]


def _check_counts(names: list[str], codes_GA: np.ndarray, group_N: np.ndarray, label_N: np.ndarray) -> None:
    of = " x ".join(names)
    if len(codes_GA) == 1:
        raise QuantizationError(
            f"threshold_adjustment: sensitive attribute {of} has one group ({len(group_N)} images); comparing groups "
            "needs two"
        )
    for group, code in enumerate(codes_GA):
        labels = label_N[group_N == group]
        positives = int((labels == 1).sum())
        if positives in (0, len(labels)):
            raise QuantizationError(
                f"threshold_adjustment: group {' & '.join(map(str, code))} of {of} has {positives} positives among "
                f"{len(labels)} images; each group needs images of both classes"
            )


def _uniform(images: torch.Tensor) -> np.ndarray:
    """(N,) numbers in [0, 1), as good as random, the same for the same pixels."""
    pixels = images.detach().cpu().contiguous()  # in this order, whatever the memory layout
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in pixels]
    return (np.array([int.from_bytes(digest) for digest in digests], dtype=np.uint64) >> np.uint64(11)) * 2.0**-53
