"""Saved predictions that an analysis can use: readable, finite, of the same images; and why the others cannot be used.

One damaged file is no reason to analyse nothing: its cell is left out and named. Which images are the right ones is
decided by the majority, so that one foreign file does not disqualify all others by coming first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from store import SavedPredictions, Store, StoreError


class NoUsablePredictions(StoreError):
    """Not one of the predictions can be used; `why` says of each what is wrong."""

    def __init__(self, why: dict[str, str]):
        self.why = why
        super().__init__(next(iter(why.values())) + (f" (and {len(why) - 1} more like it)" if len(why) > 1 else ""))


@dataclass(frozen=True)
class UsablePredictions:
    """Predicted classes for the images that most of the files are of."""

    first: str  # the first of those that can be used
    y_true: np.ndarray  # (N,)
    sensitive: dict[str, np.ndarray]  # name -> (N,)
    index: np.ndarray  # (N,)
    n_classes: int
    predictions: dict[str, np.ndarray]  # name -> (N,) int16
    unusable: dict[str, str]  # name -> one line: the file, what is wrong, what to do


def usable_predictions(store: Store, names: Sequence[str]) -> UsablePredictions:
    """Read the predictions saved under these names. NoUsablePredictions where there is none to be used."""
    unusable: dict[str, str] = {}
    predicted: dict[str, np.ndarray] = {}
    kinds: dict[str, list[str]] = {}  # what a file's images are -> the names of those files
    images: dict[str, SavedPredictions] = {}
    for name in names:
        try:
            saved = store.predictions(name)
        except StoreError as error:
            unusable[name] = str(error)
            continue
        problem = _problem(saved)
        if problem is not None:
            unusable[name] = f"{store.predictions_path(name)}: {problem}; delete it and run its phase again"
            continue
        kind = _images(saved)
        kinds.setdefault(kind, []).append(name)
        images.setdefault(kind, saved)
        predicted[name] = saved.y_pred.astype(np.int16)
    if not kinds:
        raise NoUsablePredictions(unusable)
    most = max(kinds, key=lambda kind: len(kinds[kind]))  # the first of equals
    kept = set(kinds[most])
    for name in predicted.keys() - kept:
        unusable[name] = (
            f"{store.predictions_path(name)}: not of the same test images, labels or groups as {kinds[most][0]}; "
            "run its phase again with --fresh, or delete that file and run again"
        )
    reference = images[most]
    return UsablePredictions(
        kinds[most][0],
        reference.y_true.astype(np.int64),
        {name: codes.astype(np.int64) for name, codes in reference.sensitive.items()},
        reference.index,
        reference.logits.shape[1],
        {name: classes for name, classes in predicted.items() if name in kept},
        {name: unusable[name] for name in names if name in unusable},
    )


def _problem(saved: SavedPredictions) -> str | None:
    columns = {"y_true": saved.y_true, "index": saved.index, **saved.sensitive}
    n = len(saved.logits) if saved.logits.ndim == 2 else 0
    if n == 0 or any(column.shape != (n,) for column in columns.values()):
        return "its arrays are not of one length"
    for name, column in columns.items():
        if column.dtype.kind not in "iu" or column.min() < 0:
            return f"{name} does not hold codes"
    if saved.y_true.max() >= saved.logits.shape[1]:
        return f"a label is {saved.y_true.max()}, and the logits are of {saved.logits.shape[1]} classes"
    broken = int((~np.isfinite(saved.logits)).any(axis=1).sum())
    return f"the logits of {broken} of {n} images are not finite" if broken else None


def _images(saved: SavedPredictions) -> str:
    digest = hashlib.sha256(str(saved.logits.shape[1]).encode())
    for name, column in (("y_true", saved.y_true), ("index", saved.index), *sorted(saved.sensitive.items())):
        digest.update(name.encode() + b"|" + np.ascontiguousarray(column, dtype="<i8").tobytes())
    return digest.hexdigest()
