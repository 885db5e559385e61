"""`models` and `training`: which networks, and how the float ones are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sections.base import MODELS, Section, distinct


class Models(Section):
    architectures: list[str] = Field(default=list(MODELS), min_length=1)
    pretrained: bool = False  # ImageNet weights (torchvision, timm); needs the network once
    weights: dict[str, str] = {}  # architecture -> a checkpoint of yours; a file alone is that of the only architecture
    options: dict[str, dict[str, pydantic.JsonValue]] = {}  # architecture -> arguments for its constructor (patch_size)

    @pydantic.field_validator("architectures", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("architectures")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)

    @pydantic.field_validator("weights", mode="before")
    @classmethod
    def _of_the_only_architecture(cls, value, info: pydantic.ValidationInfo):
        architectures = info.data.get("architectures", [])
        if not isinstance(value, str):
            return value
        if len(architectures) != 1:
            raise ValueError("with several architectures give {architecture: file}, not one file")
        return {architectures[0]: value}


class TrainingOverrides(Section):
    """Keys of `training` that one architecture has otherwise."""

    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    warmup_epochs: NonNegativeFloat | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    patience: PositiveInt | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    gradient_clip: PositiveFloat | None = None
    max_train: PositiveInt | None = None


PER_MODEL: dict[str, dict[str, Any]] = {
    "squeezenet1_1": {"learning_rate": 5e-4},  # from scratch it dies at ordinary learning rates
    "vit_small_patch16_224": {"learning_rate": 5e-4},
}


class Training(Section):
    epochs: PositiveInt = 4
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3  # AdamW's peak, after warm-up; then cosine to zero
    weight_decay: NonNegativeFloat = 0.01
    warmup_epochs: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    patience: PositiveInt | None = None  # stop after so many epochs without a better validation accuracy; None: never
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, and on a CPU that has it where it pays
    gradient_clip: PositiveFloat | None = 1.0  # largest gradient norm
    max_train: PositiveInt | None = None  # train on at most so many images
    flip: bool = True  # augmentation: mirror half of the images
    shift: NonNegativeInt = 0  # augmentation: shift by up to so many pixels
    brightness: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # augmentation: scale the pixels by 1 ± so much
    per_model: dict[str, TrainingOverrides] = {  # merged, key by key, with what a file or --set gives
        name: TrainingOverrides(**keys) for name, keys in PER_MODEL.items()
    }

    @pydantic.field_validator("per_model", mode="before")
    @classmethod
    def _merged(cls, value):
        if not isinstance(value, dict) or not all(isinstance(keys, dict) for keys in value.values()):
            return value
        return {name: {**PER_MODEL.get(name, {}), **value.get(name, {})} for name in {**PER_MODEL, **value}}

    def for_model(self, architecture: str) -> Training:
        """The settings of one architecture: its entry in `per_model` over the common ones."""
        overrides = self.per_model.get(architecture)
        update = {} if overrides is None else overrides.model_dump(exclude_none=True)
        return self.model_copy(update={**update, "per_model": {}})
