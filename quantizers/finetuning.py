"""Fine-tuning of a model that is quantized already: repaired in whatever way, it is trained a little further.

Training starts exactly at the function that the model computes. Each weight starts at the value nearest to the float
one that rounds to the integer the model has, so that learned rounding (AdaRound) is not thrown away; scales, zero
points and biases, corrected or not, start where they are. From there on it is quantization-aware training
(quantizers.qat). What the training is for, such as the fairness of the model's errors, is in the loss: see
fairness_losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quantizers.modules import QuantizedModel
from quantizers.qat import learnable
from sections.training import Training
from training import Loss, Score, TrainingResult, train


def fine_tune(
    quantized: QuantizedModel,
    train_loader: Iterable,
    validation_loader: Iterable | None,
    settings: Training,
    *,
    loss: Loss,
    score: Score | None = None,
    keep_start: bool = False,
    progress: Callable[[str, float], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> TrainingResult:
    """Train the weights, biases and scales of `quantized` in place; it is an ordinary quantized model afterwards.

    It has the weights of the epoch of the best `score` of the validation predictions, by default their accuracy; with
    `keep_start` the model as it was competes as epoch 0, so that the score never falls. Layers of 16 bits train through
    the rounding to float16, of 32 bits freely. A model that has forgotten its float weights, such as one that was
    loaded, starts from what its integers mean. `description` gets epochs and best_epoch, `reports["training"]` the log.
    Float parameters that it keeps stay those of the original model. If the training fails the model is as it was.
    """
    quantized.round_biases()  # as they will ship; they are rounded already after post-training quantization
    before = {name: tensor.detach().clone() for name, tensor in quantized.state_dict().items()}
    try:
        with learnable(quantized, keep_rounding=True):
            result = train(
                quantized,
                train_loader,
                validation_loader,
                settings,
                loss=loss,
                score=score,
                keep_start=keep_start,
                progress=progress,
                on_epoch=on_epoch,
            )
    except BaseException:
        quantized.load_state_dict(before)
        quantized.eval()
        raise
    quantized.round_biases()
    quantized.eval()
    quantized.description |= {"epochs": len(result.log), "best_epoch": result.best_epoch}
    quantized.reports["training"] = {
        "seconds": result.seconds,
        "log": [{"precision": result.precision, **epoch} for epoch in result.log],
    }
    return result
