"""What every section of the configuration is made of, and the names and widths that several of them use."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

import pydantic
from pydantic import ConfigDict, Field

DATASETS = ("celeba", "utkface", "fairface", "synthetic")
MODELS = ("resnet50", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "vit_small_patch16_224")
Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
WIDTH = re.compile(r"W([2-8])A([2-8])")


class ConfigError(ValueError):
    """Bad configuration; the message is one line for the person at the keyboard."""


class Section(pydantic.BaseModel):
    """A closed, immutable group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def suggest(name: str, choices) -> str:
    """' (did you mean X?)' where one choice is near, else '; choose from …'."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else f"; choose from {', '.join(choices)}"


def parse_width(width: int | str) -> tuple[int, int]:
    """8 -> (8, 8); 'W4A8' -> (4, 8): bits of weights and activations."""
    if isinstance(width, bool) or not isinstance(width, (int, str)):
        raise ValueError(f"bit width {width!r}: expected 2 to 8 or a string such as W4A8")
    if isinstance(width, int):
        if not 2 <= width <= 8:
            raise ValueError(f"bit width {width}: expected 2 to 8 or a string such as W4A8")
        return width, width
    match = WIDTH.fullmatch(width)
    if match is None:
        raise ValueError(f"bit width {width!r}: expected 2 to 8 or a string such as W4A8")
    return int(match[1]), int(match[2])


def distinct(values: list) -> list:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is there twice")
    return values


def checked_patterns(values: list[str]) -> list[str]:
    for pattern in values:
        parts = pattern.split(":")
        if len(parts) > 3 or not all(parts):
            raise ValueError(f"pattern {pattern!r}: expected MODEL:METHOD:BITS, such as *:ptq_static:W8A8")
    return values


def checked_widths(values: list) -> list:
    for value in values:
        parse_width(value)
    return distinct(values)


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
