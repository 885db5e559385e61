"""`deployment`, `evaluation` and `run`: engines, other data sets, and where cells are computed."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sections.base import Section, checked_patterns, distinct

Engine = Literal["onnxruntime", "openvino", "inductor"]


class Deployment(Section):
    """Which cells become ONNX files, which of them are run and measured, and by what. A pattern is MODEL:METHOD:BITS
    with shell wildcards; METHOD is the cell's, or its strategy where it has one; BITS such as W8A8, or FP32; parts left
    out are any."""

    cells: list[str] = ["*:none:FP32", "*:ptq_static:W8A8"]  # run by each engine: its predictions, size and latency
    export: list[str] = ["*:ptq_static:W8A8"]  # kept in models/<cell>.onnx
    engines: list[Engine] = Field(default=["onnxruntime"], min_length=1)  # the first one is the row's
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"  # of ONNX Runtime
    float_precision: Literal["f32", "bf16"] = "f32"  # of what OpenVINO computes between the integers
    latency: bool = True  # measure latencies
    latency_repeats: PositiveInt = 5  # timed passes of batch 32 (after warm-up); of batch 1 four times as many

    @pydantic.field_validator("cells", "export", "engines", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if value is None or isinstance(value, list) else [value]

    @pydantic.field_validator("engines")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)

    @pydantic.model_validator(mode="after")
    def _of_their_engines(self):
        for key, default, engine in (("provider", "cpu", "onnxruntime"), ("float_precision", "f32", "openvino")):
            if getattr(self, key) != default and engine not in self.engines:
                raise ValueError(f"{key} = {getattr(self, key)} is of engine {engine}, which is not among the engines")
        return self

    @pydantic.field_validator("cells", "export")
    @classmethod
    def _are_patterns(cls, value):
        return checked_patterns(value)


class AttributeNames(Section):
    """How a data set calls a common attribute, and the common names of its values; several values may share one."""

    attribute: str
    names: dict[str, str] = Field(min_length=1)  # value of the data set -> common name


AGE_BANDS = {name: name for name in ("under 20", "20-39", "40 and over")}
RACES = {name: name for name in ("White", "Black", "Asian", "Indian", "Others")}

# common attribute -> data set -> its names for it
COMMON_ATTRIBUTES: dict[str, dict[str, dict[str, Any]]] = {
    "gender": {
        "celeba": {"attribute": "Male", "names": {"female": "female", "male": "male"}},
        "utkface": {"attribute": "gender", "names": {"male": "male", "female": "female"}},
        "fairface": {"attribute": "gender", "names": {"Male": "male", "Female": "female"}},
        "synthetic": {"attribute": "gender", "names": {"female": "female", "male": "male"}},
    },
    "race": {
        "utkface": {"attribute": "race", "names": RACES},
        "fairface": {
            "attribute": "race",
            "names": {
                "White": "White",
                "Black": "Black",
                "East Asian": "Asian",
                "Southeast Asian": "Asian",
                "Indian": "Indian",
                "Latino_Hispanic": "Others",
                "Middle Eastern": "Others",
            },
        },
    },
    "age_group": {
        "utkface": {"attribute": "age_group", "names": AGE_BANDS},
        "fairface": {"attribute": "age_group", "names": AGE_BANDS},
    },
}


class Evaluation(Section):
    """Other data sets whose test images every model of the study predicts too."""

    also_on: list[Literal["celeba", "utkface", "fairface", "synthetic"]] = []
    # what corresponds to what; an entry of yours is beside these or, for the same attribute and data set, instead
    mappings: dict[str, dict[Literal["celeba", "utkface", "fairface", "synthetic"], AttributeNames]] = {
        common: {dataset: AttributeNames(**names) for dataset, names in sets.items()}
        for common, sets in COMMON_ATTRIBUTES.items()
    }

    @pydantic.field_validator("also_on", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("also_on")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)

    @pydantic.field_validator("mappings", mode="before")
    @classmethod
    def _merged(cls, value):
        if not isinstance(value, dict) or not all(isinstance(sets, dict) for sets in value.values()):
            return value
        return {
            common: {**COMMON_ATTRIBUTES.get(common, {}), **value.get(common, {})}
            for common in {**COMMON_ATTRIBUTES, **value}
        }


class Run(Section):
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    executor: Literal["serial", "processes", "ray"] = "serial"  # see executors.py
    jobs: PositiveInt = 1  # cells at once: worker processes, or the size of a local Ray
    gpus_per_cell: NonNegativeFloat = 1.0  # on CUDA; 0.5: two cells share one
    address: str | None = None  # of a Ray cluster; None: a local one
    cell_timeout: PositiveFloat | None = None  # seconds after which a cell is stopped and has failed
    retries: NonNegativeInt = 1  # of a cell whose worker died
    threads_per_cell: PositiveInt = 2  # part of the result: sums in another order train another model
    evaluation_batch_size: PositiveInt = 128

    @pydantic.field_validator("seeds", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    @pydantic.field_validator("seeds")
    @classmethod
    def _no_twins(cls, value):
        return distinct(value)

    @pydantic.model_validator(mode="after")
    def _something_runs_them(self):
        if self.jobs > 1 and self.executor == "serial":
            raise ValueError(f"jobs: {self.jobs} at once need executor: processes or ray")
        if self.address is not None and self.executor != "ray":
            raise ValueError("address: is that of a Ray cluster; add executor: ray")
        return self
