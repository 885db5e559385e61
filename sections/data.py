"""`data`: the data sets, their targets and sensitive attributes, and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

from sections.base import Section, Share, distinct


class DatasetSection(Section):
    """What all data sets share."""

    root: str | None = None  # folder of the data set; None: data/datasets/<name>
    target: str
    sensitive: list[str] = Field(min_length=1)
    image_size: Annotated[int, Field(ge=32, le=512)] = 64  # pixels a side, after decoding
    max_train: PositiveInt | None = None  # at most so many training images (a seeded stratified subset); None: all
    max_test: PositiveInt | None = None  # likewise for the test split
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = (
        0.1  # of train, where the set has no official validation
    )


class CelebA(DatasetSection):
    target: str = "Smiling"
    sensitive: list[str] = ["Male", "Young"]


class UTKFace(DatasetSection):
    target: Literal["gender", "race", "age_group"] = "gender"
    sensitive: list[Literal["gender", "race", "age_group"]] = Field(default=["race", "age_group"], min_length=1)
    test_share: Annotated[float, Field(gt=0.0, lt=0.9)] = 0.2  # the set has no official split


class FairFace(DatasetSection):
    target: Literal["gender", "race", "age", "age_group"] = "gender"
    sensitive: list[Literal["gender", "race", "age", "age_group"]] = Field(default=["race", "age_group"], min_length=1)


class Synthetic(DatasetSection):
    target: Literal["smile", "gender", "age", "skin"] = "gender"
    sensitive: list[Literal["smile", "gender", "age", "skin"]] = Field(default=["skin", "age"], min_length=1)
    image_size: Annotated[int, Field(ge=32, le=512)] = 32
    train_images: PositiveInt = 2500
    validation_images: PositiveInt = 1000
    test_images: PositiveInt = 2000
    seed: NonNegativeInt = 0
    minority_share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.3  # share of dark-skin faces; 0.5 is neutral
    label_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0  # of smile with gender; 0 is neutral
    group_noise: Share = 0.08  # SD of the extra sensor noise of dark-skin women (intensities: 0 to 1); 0 is neutral
    group_contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.35  # share of contrast that they lose; 0 is neutral


class Data(Section):
    dataset: list[Literal["celeba", "utkface", "fairface", "synthetic"]] = Field(default=["synthetic"], min_length=1)
    cache: str = "data/cache"  # decoded images, uint8
    workers: PositiveInt = 2  # threads that decode
    min_group_size: PositiveInt = 20  # smaller groups are reported, flagged and left out of the gaps
    celeba: CelebA = CelebA()
    utkface: UTKFace = UTKFace()
    fairface: FairFace = FairFace()
    synthetic: Synthetic = Synthetic()

    @pydantic.field_validator("dataset", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("dataset")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)
