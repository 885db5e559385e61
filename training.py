"""One training loop, shared by the baselines and by every method that trains.

AdamW (Loshchilov & Hutter 2019; no decay on biases and norms), linear warm-up, cosine to zero, bf16 autocast where the
device has it, best epoch by validation accuracy or another score. What differs between uses is the loss and the
loaders.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from evaluation import EvaluationError, Predictions, as_batch, class_logits, device_of, predict
from models import has_depthwise_convolution
from sections.training import Training

Loss = Callable[[torch.Tensor, Any], torch.Tensor]  # (logits (N, K), batch) -> scalar
Score = Callable[[Predictions], float]  # of the validation predictions; larger is better


class TrainingError(RuntimeError):
    """A training that cannot go on, such as a loss that is not finite."""


@dataclass
class TrainingResult:
    """The model holds the weights of `best_epoch` (1-based; 0: of before the training) afterwards, whose validation
    accuracy and score are `best_accuracy` and `best_score`; `log` has a dict an epoch, and `start`, where the start
    competed, is what was measured then."""

    best_epoch: int = 0
    best_accuracy: float = -math.inf
    best_score: float = -math.inf  # the accuracy, where no score is given
    seconds: float = 0.0
    precision: str = "fp32"
    log: list[dict] = field(default_factory=list)
    start: dict | None = None


def train(
    model: nn.Module,
    train_loader: Iterable,
    validation_loader: Iterable | None,
    settings: Training,
    *,
    loss: Loss | None = None,
    score: Score | None = None,
    keep_start: bool = False,
    progress: Callable[[str, float], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> TrainingResult:
    """Train `model` in place, where it is, and leave it with the weights of its best epoch, in eval mode.

    `train_loader` is iterated once an epoch and must have a length; `loss` defaults to cross entropy with
    `settings.label_smoothing`. The best epoch is the first of the largest `score` of the validation predictions, by
    default their accuracy; with `keep_start` the weights of before the training compete as epoch 0. Without a
    validation loader the last epoch counts as the best. `progress` gets a line and the share done, `on_epoch` each
    epoch's line of the log.
    Raises TrainingError where the loss or the validation logits are not finite or the score is NaN, ValueError for an
    empty loader, or for `score` or `keep_start` without a validation loader.
    """
    steps_per_epoch = len(train_loader)
    if steps_per_epoch == 0:
        raise ValueError("the training loader is empty")
    if validation_loader is None and (score is not None or keep_start):
        raise ValueError("score and keep_start compare epochs on validation data: give a validation loader")
    device = device_of(model)
    loss = loss or cross_entropy(settings.label_smoothing)
    optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(settings, steps_per_epoch))
    result = TrainingResult(precision=choose_precision(settings.precision, model, device))
    best_state: dict[str, torch.Tensor] = {}
    start = time.perf_counter()
    if keep_start:
        result.start = _validated(model, validation_loader, device, score, "before the training")
        result.best_accuracy, result.best_score = result.start["validation_accuracy"], _score_of(result.start)
        best_state = _copy_of_state(model)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total, seen = torch.zeros((), device=device), 0
        for step, batch in enumerate(map(as_batch, train_loader)):
            with _autocast(result.precision, device):
                value = loss(model(batch["image"].to(device)), batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if settings.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            schedule.step()
            total += value.detach() * len(batch["label"])
            seen += len(batch["label"])
            if progress is not None and step % 10 == 0:
                progress(f"epoch {epoch}/{settings.epochs}", (epoch - 1 + step / steps_per_epoch) / settings.epochs)
        mean_loss = float(total) / seen
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"the training loss is {mean_loss} in epoch {epoch}: lower training.learning_rate "
                f"(it is {settings.learning_rate:g}) or set training.gradient_clip"
            )
        validated = _validated(model, validation_loader, device, score, f"in epoch {epoch}")
        result.log.append(
            {
                "epoch": epoch,
                "learning_rate": schedule.get_last_lr()[0],
                "train_loss": mean_loss,
                **validated,
                "seconds": time.perf_counter() - start,
            }
        )
        if on_epoch is not None:
            on_epoch(result.log[-1])
        if _score_of(validated) > result.best_score or validation_loader is None:
            result.best_accuracy, result.best_score = validated["validation_accuracy"], _score_of(validated)
            result.best_epoch, best_state = epoch, _copy_of_state(model)
        if settings.patience is not None and epoch - result.best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    result.seconds = time.perf_counter() - start
    return result


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The mean cross entropy of a batch of integer labels, in float32 whatever the autocast."""

    def loss(logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        labels_N = torch.as_tensor(batch["label"]).to(logits_NK.device).reshape(-1).long()
        logits_NK = class_logits(logits_NK.float().reshape(len(logits_NK), -1))
        return F.cross_entropy(logits_NK, labels_N, label_smoothing=label_smoothing)

    return loss


def choose_precision(precision: str, model: nn.Module, device: torch.device) -> str:
    """'fp32' or 'bf16'. `auto` is bf16 on CUDA, and on a CPU with native bf16 for models without depthwise
    convolutions, whose speed bf16 halves there."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if native and not has_depthwise_convolution(model) else "fp32"


def _validated(
    model: nn.Module, loader: Iterable | None, device: torch.device, score: Score | None, when: str
) -> dict[str, float]:
    """`validation_accuracy`, and `validation_score` where there is a score."""
    if loader is None:
        return {"validation_accuracy": math.nan}
    try:
        predictions = predict(model, loader, device)
    except EvaluationError as error:
        raise TrainingError(f"validation {when}: {error}") from None
    validated = {"validation_accuracy": predictions.accuracy}
    if score is not None:
        validated["validation_score"] = float(score(predictions))
        if math.isnan(validated["validation_score"]):
            raise TrainingError(f"validation {when}: the score is NaN, which cannot be compared with other epochs")
    return validated


def _score_of(validated: dict[str, float]) -> float:
    return validated.get("validation_score", validated["validation_accuracy"])


def _copy_of_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def _autocast(precision: str, device: torch.device):
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _warmup_cosine(settings: Training, steps_per_epoch: int) -> Callable[[int], float]:
    total = settings.epochs * steps_per_epoch
    warmup = min(settings.warmup_epochs * steps_per_epoch, total / 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

    return factor
