"""One training loop, shared by the baselines and by every method that trains.

AdamW (Loshchilov & Hutter 2019; no decay on biases and norms), linear warm-up, cosine to zero, bf16 autocast where the
device has it, best epoch by validation accuracy. What differs between uses is the loss and the loaders.
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

from config import Training
from evaluation import EvaluationError, as_batch, device_of, predict
from models import has_depthwise_convolution

Loss = Callable[[torch.Tensor, Any], torch.Tensor]  # (logits (N, K), batch) -> scalar


class TrainingError(RuntimeError):
    """A training that cannot go on, such as a loss that is not finite."""


@dataclass
class TrainingResult:
    """The model holds the weights of `best_epoch` (1-based) afterwards; `log` has a dict an epoch."""

    best_epoch: int = 0
    best_accuracy: float = -math.inf
    seconds: float = 0.0
    precision: str = "fp32"
    log: list[dict] = field(default_factory=list)


def train(
    model: nn.Module,
    train_loader: Iterable,
    validation_loader: Iterable | None,
    settings: Training,
    *,
    loss: Loss | None = None,
    progress: Callable[[str, float], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> TrainingResult:
    """Train `model` in place, where it is, and leave it with the weights of its best epoch, in eval mode.

    `train_loader` is iterated once an epoch and must have a length; `loss` defaults to cross entropy with
    `settings.label_smoothing`. Without a validation loader the last epoch counts as the best. `progress` gets a line
    and the share done, `on_epoch` each epoch's line of the log.
    Raises TrainingError where the loss or the validation logits are not finite, ValueError for an empty loader.
    """
    steps_per_epoch = len(train_loader)
    if steps_per_epoch == 0:
        raise ValueError("the training loader is empty")
    device = device_of(model)
    loss = loss or cross_entropy(settings.label_smoothing)
    optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(settings, steps_per_epoch))
    result = TrainingResult(precision=choose_precision(settings.precision, model, device))
    best_state: dict[str, torch.Tensor] = {}
    start = time.perf_counter()
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
        try:
            accuracy = math.nan if validation_loader is None else predict(model, validation_loader, device).accuracy
        except EvaluationError as error:
            raise TrainingError(f"validation in epoch {epoch}: {error}") from None
        result.log.append(
            {
                "epoch": epoch,
                "learning_rate": schedule.get_last_lr()[0],
                "train_loss": mean_loss,
                "validation_accuracy": accuracy,
                "seconds": time.perf_counter() - start,
            }
        )
        if on_epoch is not None:
            on_epoch(result.log[-1])
        if accuracy > result.best_accuracy or validation_loader is None:
            result.best_accuracy, result.best_epoch = accuracy, epoch
            best_state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
        if settings.patience is not None and epoch - result.best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    result.seconds = time.perf_counter() - start
    return result


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """The mean cross entropy of a batch, in float32 whatever the autocast."""

    def loss(logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        labels_N = torch.as_tensor(batch["label"]).to(logits_NK.device)
        return F.cross_entropy(logits_NK.float(), labels_N, label_smoothing=label_smoothing)

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
