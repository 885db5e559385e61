"""What of one data set corresponds to what of another: classes and groups under common names (`evaluation.mappings`).

FairFace's East Asian and Southeast Asian are UTKFace's Asian: to compare what a model does to a group on both sets, the
groups of both get common names. Two attributes correspond that the mappings give under one common attribute, or that
have the same name and the same values. Nothing is guessed: what has no counterpart is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from config import Config, ConfigError
from dataset_sources import CELEBA_VALUE_NAMES, FAIRFACE_VALUE_NAMES, UTKFACE_VALUE_NAMES
from sections.base import suggest
from synthetic_faces import VALUE_NAMES

_VALUE_NAMES = {"utkface": UTKFACE_VALUE_NAMES, "fairface": FAIRFACE_VALUE_NAMES, "synthetic": VALUE_NAMES}


@dataclass(frozen=True)
class CommonAttribute:
    """An attribute of both data sets, its groups under common names."""

    name: str
    home: str  # what it is called in the data set that the model was trained on
    abroad: str
    groups: tuple[str, ...]  # in the order of home's values
    home_codes: np.ndarray  # (values of home,) the group of each
    abroad_codes: np.ndarray  # (values of abroad,)

    @property
    def tells_home_groups_apart(self) -> bool:
        return len(set(self.home_codes.tolist())) == len(self.home_codes)


@dataclass(frozen=True)
class Correspondence:
    """How models that are trained on one data set are measured on another one."""

    trained_on: str
    evaluated_on: str
    class_codes: np.ndarray  # (K,) for each class of evaluated_on, the class of trained_on
    primary: CommonAttribute  # of the attribute whose groups the metrics are over
    attributes: tuple[CommonAttribute, ...]  # the primary one and the other sensitive ones that both sets have


def correspondence(config: Config, trained_on: str, evaluated_on: str) -> Correspondence:
    """ConfigError, one line, where the targets differ, classes or groups have no counterpart, or an attribute is not
    among the other set's sensitive ones."""
    home, abroad = config.dataset(trained_on), config.dataset(evaluated_on)
    target = _common(config, trained_on, home.target, evaluated_on, [abroad.target])
    if target is None:
        raise ConfigError(
            f"evaluation.also_on: {evaluated_on} has target {abroad.target} and {trained_on} {home.target}, which do "
            f"not correspond; set data.{evaluated_on}.target, or say that they do under evaluation.mappings"
        )
    for dataset, codes in ((trained_on, target.home_codes), (evaluated_on, target.abroad_codes)):
        if len(set(codes.tolist())) < len(codes):
            attribute = target.home if dataset == trained_on else target.abroad
            raise ConfigError(
                f"evaluation.mappings.{target.name}: several classes of {dataset}'s {attribute} have one common name; "
                "of a target the classes must correspond one to one: give each its own name, or take another target"
            )
    attributes = {name: _common(config, trained_on, name, evaluated_on, abroad.sensitive) for name in home.sensitive}
    primary = attributes[config.group_attribute(trained_on)]
    if primary is None:
        wanted = config.group_attribute(trained_on)
        raise ConfigError(
            f"evaluation.also_on: none of {evaluated_on}'s sensitive attributes ({', '.join(abroad.sensitive)}) "
            f"corresponds to {trained_on}'s {wanted}; add it to data.{evaluated_on}.sensitive, or say under "
            "evaluation.mappings which does"
        )
    others = [found for found in attributes.values() if found is not None and found is not primary]
    class_of = {code: label for label, code in enumerate(target.home_codes.tolist())}
    return Correspondence(
        trained_on,
        evaluated_on,
        np.array([class_of[code] for code in target.abroad_codes.tolist()], dtype=np.int64),
        primary,
        (primary, *others),
    )


def value_names(dataset: str, attribute: str) -> tuple[str, ...]:
    """The values of a data set's attribute, in the order of their codes."""
    if dataset == "celeba":
        return CELEBA_VALUE_NAMES.get(attribute, (f"not {attribute}", attribute))
    return _VALUE_NAMES[dataset][attribute]


def _common(
    config: Config, trained_on: str, home: str, evaluated_on: str, candidates: list[str]
) -> CommonAttribute | None:
    """What `home` has in common with one of the candidates of the other data set; None where it has nothing."""
    for common, sets in reversed(config.evaluation.mappings.items()):  # the user's before the built-in ones
        mine, theirs = sets.get(trained_on), sets.get(evaluated_on)
        if mine is not None and theirs is not None and mine.attribute == home and theirs.attribute in candidates:
            return _joined(common, trained_on, home, mine.names, evaluated_on, theirs.attribute, theirs.names)
    same = value_names(trained_on, home) if home in candidates else ()
    if same and set(same) == set(value_names(evaluated_on, home)):
        names = {name: name for name in same}
        return _joined(home, trained_on, home, names, evaluated_on, home, names)
    return None


def _joined(
    common: str,
    trained_on: str,
    home: str,
    home_names: Mapping[str, str],
    evaluated_on: str,
    abroad: str,
    abroad_names: Mapping[str, str],
) -> CommonAttribute:
    codes = []
    sides = ((trained_on, home, home_names), (evaluated_on, abroad, abroad_names))
    for dataset, attribute, names in sides:
        values, where = value_names(dataset, attribute), f"evaluation.mappings.{common}.{dataset}.names"
        for value in values:
            if value not in names:
                raise ConfigError(f"{where}: {value!r} of {dataset}'s {attribute} is not mapped; give it a common name")
        for value in names:
            if value not in values:
                raise ConfigError(f"{where}: {dataset}'s {attribute} has no {value!r}{suggest(value, values)}")
    groups = tuple(dict.fromkeys(home_names[value] for value in value_names(trained_on, home)))
    for (dataset, attribute, names), (other, _, other_names) in (sides, sides[::-1]):
        for value in value_names(dataset, attribute):
            if names[value] not in other_names.values():
                raise ConfigError(
                    f"evaluation.mappings.{common}: {names[value]!r} (of {dataset}'s {attribute}) is no common name in "
                    f"{other}{suggest(names[value], dict.fromkeys(other_names.values()))}"
                )
        codes.append(
            np.array([groups.index(names[value]) for value in value_names(dataset, attribute)], dtype=np.int64)
        )
    return CommonAttribute(common, home, abroad, groups, codes[0], codes[1])
