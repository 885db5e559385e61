"""The study's configuration: typed, nested and closed.

Every key, its default and its range is declared in sections/ and nowhere else; `configs/config.yaml` lists them all
with a comment. Here the sections are put together, with the rules between them. `load_config` merges a YAML file and
`--set` overrides over the defaults and refuses what it does not know, with one line that names the file, the path of
the key and the nearest valid choice.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field

from sections.analysis import Analysis, Cells
from sections.base import MODELS, ConfigError, Section, distinct, shortened, suggest
from sections.data import Data, DatasetSection
from sections.mitigation import FairMixedPrecision, FairReconstruction, Mitigation, PTQRepair
from sections.quantization import METHOD_SECTIONS, RECONSTRUCTION_KEYS, Quantization
from sections.run import Deployment, Evaluation, Run
from sections.training import Models, Training


class Config(Section):
    data: Data = Data()
    models: Models = Models()
    training: Training = Training()
    quantization: Quantization = Field(default_factory=Quantization)
    mitigation: Mitigation = Field(default_factory=Mitigation)
    analysis: Analysis = Field(default_factory=Analysis)
    deployment: Deployment = Deployment()
    evaluation: Evaluation = Evaluation()
    tracking: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"  # where each cell is logged too
    run: Run = Run()
    results_dir: str = "results"

    @pydantic.model_validator(mode="after")
    def _entries(self):
        known = list(dict.fromkeys((*self.models.architectures, *MODELS)))
        for place, entry in enumerate(self.mitigation.entries()):
            try:
                section = self.mitigation.section(entry)
            except ValueError as error:
                raise ValueError(f"mitigation.strategies[{place}]: {error}") from None
            self._check_repair(f"mitigation.strategies[{place}]: {entry.strategy}", section)
            if entry.architectures:
                for name in entry.architectures:
                    if name not in known:
                        raise ValueError(
                            f"mitigation.strategies[{place}].architectures: {name!r} is none of the models"
                            f"{suggest(name, known)}"
                        )
        for place, entry in enumerate(self.quantization.methods):
            if isinstance(entry, str):
                continue
            where = f"quantization.methods[{place}]"
            for name in entry.architectures or []:
                if name not in known:
                    raise ValueError(f"{where}.architectures: {name!r} is none of the models{suggest(name, known)}")
            idle = [key for key in RECONSTRUCTION_KEYS if key in entry.options()]
            if idle and self.quantization.settings(entry)["rounding"] == "nearest":
                raise ValueError(f"{where}: {idle[0]} does nothing with rounding nearest; add rounding: adaround")
        return self

    def _check_repair(self, where: str, section: Section) -> None:
        """ValueError for settings of a repair that would do nothing."""
        rounding = getattr(section, "rounding", None) or self.quantization.ptq_static.rounding
        learns = isinstance(section, FairReconstruction) or rounding != "nearest"
        if isinstance(section, PTQRepair) and section.reconstruction_iterations is not None and not learns:
            raise ValueError(
                f"{where}: reconstruction_iterations does nothing with rounding nearest; add rounding: adaround"
            )
        if isinstance(section, FairMixedPrecision) and section.bit_operations_budget is not None:
            raise ValueError(f"{where}: its budget is one of bytes; leave out bit_operations_budget")

    @pydantic.model_validator(mode="after")
    def _models_of_hypotheses(self):
        known = list(dict.fromkeys((*self.models.architectures, *MODELS)))
        for place, hypothesis in enumerate(self.analysis.hypotheses):
            for claim in hypothesis.claims:
                for cells in (claim.cells, claim.against):
                    for name in (isinstance(cells, Cells) and cells.model) or ():
                        if name not in known:
                            raise ValueError(
                                f"analysis.hypotheses[{place}]: {hypothesis.id}: {name!r} is none of the models"
                                f"{suggest(name, known)}"
                            )
        return self

    @pydantic.model_validator(mode="after")
    def _schemes(self):
        quantization = self.quantization
        if quantization.reduce_range and "x86" not in quantization.backend:
            backends = ", ".join(quantization.backend)
            raise ValueError(f"quantization.reduce_range: for x86 CPUs; it does nothing with backend {backends}")
        if "tensorrt" in quantization.backend:
            places = {name: getattr(quantization, name) for name in METHOD_SECTIONS}
            places |= {f"methods[{place}]": entry for place, entry in enumerate(quantization.methods)}
            for place, section in places.items():
                if getattr(section, "activation_scheme", None) == "affine":
                    raise ValueError(
                        f"quantization.{place}.activation_scheme: affine needs zero points, which backend tensorrt has "
                        "not; leave it out"
                    )
        return self

    @pydantic.model_validator(mode="after")
    def _attributes(self):
        for name in self.evaluation.also_on:
            if self.data.dataset == [name]:
                raise ValueError(
                    f"evaluation.also_on: {name} is the data set that the models are trained on; name another one"
                )
        for name in dict.fromkeys((*self.data.dataset, *self.evaluation.also_on)):
            section = getattr(self.data, name)
            if section.target in section.sensitive:
                raise ValueError(
                    f"data.{name}.sensitive: the target {section.target!r} cannot be a sensitive attribute too"
                )
            try:
                distinct(section.sensitive)
            except ValueError as error:
                raise ValueError(f"data.{name}.sensitive: {error}") from None
            is_trained_on = name in self.data.dataset
            if is_trained_on and self.analysis.attribute not in (None, *section.sensitive):
                raise ValueError(
                    f"analysis.attribute: {self.analysis.attribute!r} is not a sensitive attribute of {name}"
                    f"{suggest(self.analysis.attribute, section.sensitive)}"
                )
        return self

    def dataset(self, name: str) -> DatasetSection:
        return getattr(self.data, name)

    def group_attribute(self, dataset: str) -> str:
        """The sensitive attribute whose groups the row's metrics are over."""
        return self.analysis.attribute or self.dataset(dataset).sensitive[0]


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file, then `KEY=VALUE` overrides (values are YAML). Raises ConfigError, one line."""
    values: dict[str, Any] = {}
    source = "defaults"
    if path is not None:
        source = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{source}: no such config file") from None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8
            raise ConfigError(f"{source}: cannot be read: {error}") from None
        values = _parse_yaml(text, f"{source}: not valid YAML")
        values = {} if values is None else values  # an empty file
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
        _validate(values, source)
    steps = [(copy.deepcopy(values), source)]
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as training.epochs=2")
        value = _parse_yaml(text, f"--set {override}: the value is not valid YAML")
        _assign(values, key.strip().split("."), value, f"--set {override}")
        steps.append((copy.deepcopy(values), f"--set {override}"))
    try:
        return _validate(*steps[-1])
    except ConfigError:
        for step in steps:  # the order of overrides does not matter; the first that breaks it is named
            _validate(*step)
        raise


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives the same configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key written twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.YAMLError(f"key {key!r} is there twice, line {key_node.start_mark.line + 1}")
            seen.add(key if isinstance(key, (str, int, float)) else str(key))
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings that _Loader would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
    )


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2001-13-45, which is no date
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from None


def _validate(values: dict, source: str) -> Config:
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_first_error(error, values)}") from None


def _first_error(error: pydantic.ValidationError, values: dict) -> str:
    errors = error.errors()
    # inside a union (a method's name or entry) pydantic reports each branch: the unknown key is the telling one
    detail = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    location = [part for part in detail["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggest(str(location[-1]), _keys_at(location[:-1]))}"
    if detail["type"] == "literal_error":
        choices = _literal_choices(detail)
        return f"{path}: unknown value {given!r}{suggest(given, choices)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower() + message[1:]}, got {shortened(given)}"


_UNION_TAGS = {"str", "int", "MethodEntry", "StrategyEntry", "Cells"}


def _literal_choices(detail: dict) -> list[str]:
    return re.findall(r"'([^']*)'", detail["ctx"]["expected"])


def _keys_at(location: list) -> list[str]:
    """The valid keys of the section at a path such as ['data', 'fairface'] or ['quantization', 'methods', 2]."""
    model: Any = Config
    for part in location:
        if isinstance(part, int) or not (isinstance(model, type) and issubclass(model, Section)):
            continue
        field = model.model_fields.get(part)
        if field is not None:  # else: a key of a mapping such as training.per_model
            model = _section_in(field.annotation)
    if isinstance(model, type) and issubclass(model, Section):
        return list(model.model_fields)
    return []


def _section_in(annotation) -> type | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in get_args(annotation):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _assign(values: dict, path: list[str], value: Any, source: str) -> None:
    node = values
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: {part} is a value, not a section")
    node[path[-1]] = value
