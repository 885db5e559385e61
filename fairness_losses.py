"""Losses that train a model for its groups, and what they are built on: the groups themselves, batches in which every
group has an equal share, and gaps that have a gradient.

All of these take any number of groups. A gap of probabilities equals that of group_counts where every probability is 0
or 1. The losses are for `training.train(..., loss=...)`: `(logits (N, K), batch) -> scalar`. One that has a state (the
weights of the groups) is for one training.

Shapes: N images, K classes, G groups. A model with a single logit has two classes, class 1 of probability sigmoid.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evaluation import Predictions, as_batch, class_logits, device_of, eval_mode
from training import Score

BUFFER_BATCHES = 8  # what GroupBalancedLoader holds of the stream, and how far it reads ahead


class GroupError(ValueError):
    """Groups that cannot be trained for as asked; the message is one line."""


# -------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a data set: the combinations that occur of the values of its sensitive attributes, in the order of
    these values. `label_counts` (G, K) is how many images each has of each class."""

    attributes: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]  # a group's value of each attribute
    label_counts: np.ndarray

    @classmethod
    def of(cls, loader: Iterable, attributes: Sequence[str] | str | None = None) -> Groups:
        """By one pass over `loader`; the intersection of `attributes` (None: all that the first batch has).

        GroupError: an empty loader, an attribute that it does not have, or only one group.
        """
        names = [attributes] if isinstance(attributes, str) else attributes
        counts: collections.Counter[tuple[tuple[int, ...], int]] = collections.Counter()
        for batch in map(as_batch, loader):
            names = list(batch["sensitive"]) if names is None else list(names)
            values_NA = _attribute_values(batch["sensitive"], names)
            labels_N = torch.as_tensor(batch["label"]).reshape(-1).tolist()
            counts.update(zip(map(tuple, values_NA.tolist()), map(int, labels_N), strict=True))
        if not counts:
            raise GroupError("the loader is empty: there are no groups to train for")
        values = tuple(sorted({group for group, _ in counts}))
        if len(values) == 1:
            raise GroupError(
                f"only one group: all {sum(counts.values())} images have {_spelled(names, values[0])}; "
                "fairness needs at least two"
            )
        label_counts = np.zeros((len(values), max(2, 1 + max(label for _, label in counts))), dtype=np.int64)
        for (group, label), count in counts.items():
            label_counts[values.index(group), label] = count
        return cls(tuple(names), values, label_counts)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def counts(self) -> np.ndarray:
        """(G,) images."""
        return self.label_counts.sum(axis=1)

    @property
    def names(self) -> list[str]:
        """As in `fairness_metrics`: the values, such as "0 & 3"."""
        return [" & ".join(map(str, group)) for group in self.values]

    def codes(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(N,) int64, the group of each image of a batch. GroupError for a group that is not one of these."""
        values_NA = _attribute_values(as_batch(batch)["sensitive"], self.attributes)
        known_GA = torch.tensor(self.values, device=values_NA.device)
        is_it_NG = (values_NA[:, None] == known_GA).all(dim=2)
        is_known_N = is_it_NG.any(dim=1)
        if not bool(is_known_N.all()):
            stranger = values_NA[~is_known_N][0].tolist()
            raise GroupError(
                f"the batch has an image of the group {_spelled(self.attributes, stranger)}, of which there was none "
                "where the groups were counted; count them on the data that is trained on"
            )
        return is_it_NG.int().argmax(dim=1)


def _attribute_values(sensitive: Mapping[str, Any], attributes: Sequence[str]) -> torch.Tensor:
    """(N, A) int64."""
    missing = [name for name in attributes if name not in sensitive]
    if missing or not attributes:
        wanted = repr(missing[0]) if missing else "at all"
        raise GroupError(
            f"the loader has no sensitive attribute {wanted} (it has: {', '.join(sensitive) or 'none'}): "
            'give batches {"image", "label", "sensitive": {name: codes}}'
        )
    return torch.stack([torch.as_tensor(sensitive[name]).reshape(-1).long() for name in attributes], dim=1)


def _spelled(attributes: Sequence[str], values: Sequence[int]) -> str:
    return ", ".join(f"{attribute}={value}" for attribute, value in zip(attributes, values, strict=True))


def worst_group_accuracy_score(groups: Groups, min_size: int = 1) -> Score:
    """A score for `training.train`: the lowest accuracy of a group of at least `min_size` images.

    The groups are those of the predictions, by the same attributes: one that was not trained on counts too. GroupError
    where none is large enough.
    """

    def score(predictions: Predictions) -> float:
        values_NA = _attribute_values(predictions.sensitive, groups.attributes).numpy()
        _, codes_N, n_G = np.unique(values_NA, axis=0, return_inverse=True, return_counts=True)
        is_right_N = predictions.y_pred == predictions.y_true
        accuracy_G = np.bincount(codes_N.reshape(-1), weights=is_right_N, minlength=len(n_G)) / n_G
        if not (n_G >= min_size).any():
            raise GroupError(f"no group of the validation data has {min_size} images; the largest has {n_G.max()}")
        return float(accuracy_G[n_G >= min_size].min())

    return score


# ---------------------------------------------------------------------------------------------------------------- gaps


def soft_demographic_parity(logits_NK: torch.Tensor, groups_N: torch.Tensor, n_groups: int) -> torch.Tensor:
    """The demographic parity difference, with probabilities in place of decisions: a scalar in [0, 1].

    With two classes of class 1, with more of the worst class against the rest. Where fewer than two groups are in the
    batch there is nothing to compare: it is 0, still part of the graph, and its gradient is 0; it is never NaN.
    """
    chance_NK = _probabilities(logits_NK)
    member_GN = _members(groups_N, n_groups, chance_NK)
    n_GK = member_GN.sum(dim=1, keepdim=True).expand(-1, chance_NK.shape[1])
    range_K, _ = _range(_sums(member_GN, chance_NK), n_GK)
    return _favourable(range_K).amax()


def soft_equalized_odds(
    logits_NK: torch.Tensor, labels_N: torch.Tensor, groups_N: torch.Tensor, n_groups: int
) -> torch.Tensor:
    """The equalized odds difference, with probabilities in place of decisions: a scalar in [0, 1].

    The larger of the range of the true positive rates, over the groups that have positives in the batch, and of that of
    the false positive rates, over those that have negatives. With two classes of class 1, with more of the worst class
    against the rest, among the classes that have both ranges, as in group_counts. It is defined more often than the
    metric, since every batch should teach something: where no class has both ranges it is the largest one that there
    is, and where there is none it is 0, still part of the graph, and its gradient is 0; it is never NaN.
    """
    chance_NK = _probabilities(logits_NK)
    member_GN = _members(groups_N, n_groups, chance_NK)
    labels_N = labels_N.to(chance_NK.device).reshape(-1).long()
    positive_NK = F.one_hot(labels_N, chance_NK.shape[1]).to(chance_NK.dtype)
    negative_NK = 1 - positive_NK
    tpr_range_K, has_tpr_K = _range(_sums(member_GN, chance_NK * positive_NK), _sums(member_GN, positive_NK))
    fpr_range_K, has_fpr_K = _range(_sums(member_GN, chance_NK * negative_NK), _sums(member_GN, negative_NK))
    has_both_K = _favourable(has_tpr_K & has_fpr_K)
    range_K = _favourable(torch.maximum(tpr_range_K, fpr_range_K))
    return torch.where(has_both_K | ~has_both_K.any(), range_K, torch.zeros_like(range_K)).amax()


def _probabilities(logits_NK: torch.Tensor) -> torch.Tensor:
    return _two_or_more(logits_NK).softmax(dim=1)


def _two_or_more(logits_NK: torch.Tensor) -> torch.Tensor:
    """Logits of at least two classes, in float32 at least."""
    logits_NK = logits_NK.reshape(len(logits_NK), -1)
    return class_logits(logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float())


def _members(groups_N: torch.Tensor, n_groups: int, like: torch.Tensor) -> torch.Tensor:
    """(G, N) of 0 and 1."""
    return F.one_hot(groups_N.to(like.device).long(), n_groups).T.to(like.dtype)


def _sums(member_GN: torch.Tensor, values_NK: torch.Tensor) -> torch.Tensor:
    """(G, K) sums over the images of each group. Not a product of matrices: autocast would do that in bfloat16."""
    return (member_GN[:, :, None] * values_NK).sum(dim=1)


def _favourable(values_K: torch.Tensor) -> torch.Tensor:
    """Of the classes that are looked at: with two, class 1."""
    return values_K[1:] if len(values_K) == 2 else values_K


def _range(sum_GK: torch.Tensor, n_GK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) max - min of sum / n over the groups with n > 0, 0 with fewer than two of them; (K,) are there two?"""
    enters_GK = n_GK > 0
    rate_GK = sum_GK / n_GK.clamp(min=1)
    highest_K = rate_GK.masked_fill(~enters_GK, -torch.inf).amax(dim=0)
    lowest_K = rate_GK.masked_fill(~enters_GK, torch.inf).amin(dim=0)
    is_comparison_K = enters_GK.sum(dim=0) >= 2
    return torch.where(is_comparison_K, highest_K - lowest_K, torch.zeros_like(highest_K)), is_comparison_K


# -------------------------------------------------------------------------------------------------------------- losses

CONSTRAINTS = ("equalized_odds", "demographic_parity")


class FairnessWarning(UserWarning):
    """Something that a training goes on with, though it may not do what was meant."""


LEAST_IN_BATCH = 4  # images of a group, and class, on average, whose soft rate says something


class FairnessPenalty:
    """Cross entropy + `weight` x the soft gap of the batch: `constraint` is one of CONSTRAINTS.

    A FairnessWarning, once, where batches are so small that the gap between the groups of one is mostly chance."""

    def __init__(self, groups: Groups, constraint: str, weight: float, label_smoothing: float = 0.0):
        if constraint not in CONSTRAINTS:
            raise ValueError(f"unknown constraint {constraint!r}; choose from {', '.join(CONSTRAINTS)}")
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, it is {weight}")
        self.groups, self.constraint, self.weight = groups, constraint, weight
        self.label_smoothing = label_smoothing
        self._is_checked = False

    def __call__(self, logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        groups_N, n_groups = self.groups.codes(batch), len(self.groups)
        if not self._is_checked:
            self._check(len(logits_NK), max(2, logits_NK[0].numel()))
        if self.constraint == "demographic_parity":
            gap = soft_demographic_parity(logits_NK, groups_N, n_groups)
        else:
            gap = soft_equalized_odds(logits_NK, torch.as_tensor(batch["label"]), groups_N, n_groups)
        return _cross_entropy(logits_NK, batch, self.label_smoothing).mean() + self.weight * gap

    def _check(self, images: int, classes: int) -> None:
        self._is_checked = True
        is_by_class = self.constraint != "demographic_parity"
        share = images / len(self.groups) / (classes if is_by_class else 1)
        if share < LEAST_IN_BATCH:
            warnings.warn(
                f"fairness_finetuning: of the {len(self.groups)} groups a batch of {images} images has about "
                f"{share:.1f} images each{' and class' if is_by_class else ''}: the {self.constraint} gap of so few is "
                "mostly chance; raise batch_size, or give fewer attributes",
                FairnessWarning,
                stacklevel=3,
            )


class _WorstGroup:
    """A loss of each group under weights that go after the worst one: exponentiated gradient ascent, Algorithm 1 of
    Sagawa et al. 2020. Groups that are not in a batch keep their weight and add nothing to its loss."""

    def __init__(self, groups: Groups, step_size: float):
        if not step_size > 0:
            raise ValueError(f"step_size must be positive, it is {step_size}")
        self.groups, self.step_size = groups, step_size
        self._log_weights = torch.zeros(len(groups))  # logarithms, so that no weight becomes 0 for good

    @property
    def weights(self) -> torch.Tensor:
        """(G,), of sum 1."""
        return self._log_weights.softmax(dim=0)

    def combine(self, loss_N: torch.Tensor, batch: Any) -> torch.Tensor:
        member_GN = _members(self.groups.codes(batch), len(self.groups), loss_N)
        n_G = member_GN.sum(dim=1)
        loss_G = (member_GN * loss_N).sum(dim=1) / n_G.clamp(min=1)
        self._follow(loss_G.detach(), n_G > 0)
        return (self.weights.to(loss_G) * loss_G).sum()

    def _follow(self, loss_G: torch.Tensor, is_present_G: torch.Tensor) -> None:
        log_weights_G = self._log_weights.to(loss_G.device).log_softmax(dim=0)
        moved_G = log_weights_G + self.step_size * loss_G.float()
        # present groups share among them what they had together
        before, after = (values_G[is_present_G].logsumexp(dim=0) for values_G in (log_weights_G, moved_G))
        self._log_weights = torch.where(is_present_G, moved_G - after + before, log_weights_G)


class GroupDRO(_WorstGroup):
    """The cross entropy of the worst group (Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts",
    ICLR 2020, Algorithm 1): q_g <- q_g exp(`step_size` x loss_g), normalised; the loss is sum_g q_g loss_g.

    `weights` (G,) are the q_g now; groups that a batch does not have keep theirs."""

    def __init__(self, groups: Groups, step_size: float, label_smoothing: float = 0.0):
        super().__init__(groups, step_size)
        self.label_smoothing = label_smoothing

    def __call__(self, logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        return self.combine(_cross_entropy(logits_NK, batch, self.label_smoothing), batch)


class GroupDistillation(_WorstGroup):
    """Lose nobody: the divergence from the teacher's predictions of the group that drifts from them most.

    A group's loss is the mean KL(teacher || student) of its images, both softened by `temperature` T, times T^2
    (Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015); labels are not used. The groups'
    weights follow the largest loss as in GroupDRO. The teacher, in float32 whatever the autocast, sees batch["image"]
    in eval mode where it is; nothing of it is changed."""

    def __init__(self, groups: Groups, teacher: nn.Module, temperature: float, step_size: float):
        super().__init__(groups, step_size)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, it is {temperature}")
        self.teacher, self.temperature = teacher, temperature

    def __call__(self, logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        device = device_of(self.teacher)
        with torch.no_grad(), eval_mode(self.teacher), torch.autocast(device.type, enabled=False):
            wanted_NK = self.teacher(torch.as_tensor(batch["image"]).to(device)).to(logits_NK.device)
        student_NK, teacher_NK = (
            (_two_or_more(logits) / self.temperature).log_softmax(dim=1) for logits in (logits_NK, wanted_NK)
        )
        divergence_N = F.kl_div(student_NK, teacher_NK, reduction="none", log_target=True).sum(dim=1)
        return self.combine(self.temperature**2 * divergence_N, batch)


class Reweighed:
    """Cross entropy with a weight for each (group, label): the mean over the batch of w(g, y) x loss.

    `table` (G, K) is by default that of Kamiran & Calders for the groups' own counts (`reweighing_weights`), under
    which group and label are independent. GroupError for an image whose cell of the table is NaN."""

    def __init__(self, groups: Groups, table: np.ndarray | None = None, label_smoothing: float = 0.0):
        table_GK = _reweighing(groups.label_counts) if table is None else np.asarray(table, dtype=np.float64)
        if table_GK.ndim != 2 or len(table_GK) != len(groups):
            raise ValueError(f"the table of weights must be ({len(groups)}, classes), it is {table_GK.shape}")
        self.groups, self.table, self.label_smoothing = groups, table_GK, label_smoothing

    def __call__(self, logits_NK: torch.Tensor, batch: Any) -> torch.Tensor:
        groups_N = self.groups.codes(batch).cpu().numpy()
        labels_N = torch.as_tensor(batch["label"]).cpu().numpy().reshape(-1).astype(np.int64)
        weight_N = self.table[groups_N, labels_N]
        if np.isnan(weight_N).any():
            first = int(np.isnan(weight_N).argmax())
            group = _spelled(self.groups.attributes, self.groups.values[groups_N[first]])
            raise GroupError(
                f"the batch has an image of {group} with label {labels_N[first]}, which has no weight: "
                "there was none where the weights were computed"
            )
        loss_N = _cross_entropy(logits_NK, batch, self.label_smoothing)
        return (torch.from_numpy(weight_N).to(loss_N) * loss_N).mean()


def reweighing_weights(labels: Any, groups: Any, n_groups: int, n_classes: int) -> np.ndarray:
    """w(g, y) = P(g) P(y) / P(g, y), (G, K), NaN where there is no image of group g and label y (Kamiran & Calders,
    "Data preprocessing techniques for classification without discrimination", 2012)."""
    labels, groups = (np.asarray(values).reshape(-1).astype(np.int64) for values in (labels, groups))
    counts_GK = np.zeros((n_groups, n_classes), dtype=np.int64)
    np.add.at(counts_GK, (groups, labels), 1)
    return _reweighing(counts_GK)


def _reweighing(counts_GK: np.ndarray) -> np.ndarray:
    expected_GK = counts_GK.sum(axis=1, keepdims=True) * counts_GK.sum(axis=0, keepdims=True) / counts_GK.sum()
    return np.divide(expected_GK, counts_GK, out=np.full(counts_GK.shape, np.nan), where=counts_GK > 0)


def _cross_entropy(logits_NK: torch.Tensor, batch: Any, label_smoothing: float) -> torch.Tensor:
    """(N,), in float32 at least."""
    labels_N = torch.as_tensor(batch["label"]).to(logits_NK.device).reshape(-1).long()
    return F.cross_entropy(_two_or_more(logits_NK), labels_N, reduction="none", label_smoothing=label_smoothing)


# ------------------------------------------------------------------------------------------------------------- batches


class GroupBalancedLoader:
    """The stream of a loader, rearranged so that in every batch the groups have equal shares, ±1: which of them have
    one more is by chance. As many batches as `loader` has, each as large, as mappings of image, label, sensitive and,
    where there is one, index.

    It keeps a few images of each group from the batches that pass, BUFFER_BATCHES batches in all, and reads ahead by as
    many at most before the first batch, so that groups are there from the start; until a group has been seen, the
    others share its place. An image that has not been given yet is preferred. Where there is none, images of the group
    are given again, drawn at random from those kept (with replacement, from batch to batch); images of large groups are
    left out as often. `drawn` and `distinct` (G,) say of the latest iteration how many images of each group were given
    and how many different ones, `repeats` is their ratio.

    The same seed gives the same batches; each further iteration draws anew.
    """

    def __init__(self, loader: Iterable, groups: Groups, seed: int):
        if not hasattr(loader, "__len__"):
            raise GroupError("balanced batches need a loader that has a length: a DataLoader or a list of batches")
        self.loader, self.groups, self.seed = loader, groups, seed
        self.drawn = self.distinct = np.zeros(len(groups), dtype=np.int64)
        self._iterations = 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def repeats(self) -> np.ndarray:
        """(G,) how often an image was given, on average; NaN for a group of which there was none."""
        return np.divide(self.drawn, self.distinct, out=np.full(len(self.groups), np.nan), where=self.distinct > 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = np.random.default_rng([self.seed, self._iterations])
        self._iterations += 1
        return self._batches(generator)

    def _batches(self, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
        self.drawn, self.distinct = (np.zeros(len(self.groups), dtype=np.int64) for _ in range(2))
        pools = [_Pool() for _ in range(len(self.groups))]
        sizes: collections.deque[int] = collections.deque()  # of the batches that were read and not yet given
        is_ready = False
        for batch in map(as_batch, self.loader):
            size = len(batch["label"])
            sizes.append(size)
            share = -(-size // len(pools))
            for position, group in enumerate(self.groups.codes(batch).tolist()):
                pools[group].put(_image_of(batch, position), BUFFER_BATCHES * share)
            is_ready = is_ready or len(sizes) == BUFFER_BATCHES or all(len(pool.images) >= share for pool in pools)
            if is_ready:
                yield self._draw(pools, sizes.popleft(), generator)
        while sizes:
            yield self._draw(pools, sizes.popleft(), generator)

    def _draw(self, pools: list[_Pool], size: int, generator: np.random.Generator) -> dict[str, Any]:
        seen = [group for group, pool in enumerate(pools) if pool.images]
        whole, rest = divmod(size, len(seen))
        has_one_more = generator.permutation(len(seen)) < rest
        images = []
        for group, extra in zip(seen, has_one_more.tolist(), strict=True):
            drawn, new = pools[group].draw(whole + extra, generator)
            images += drawn
            self.drawn[group] += len(drawn)
            self.distinct[group] += new
        return _stacked([images[position] for position in generator.permutation(size)])


class _Pool:
    """The images of one group that are kept, oldest first."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.is_used: list[bool] = []

    def put(self, image: dict[str, Any], capacity: int) -> None:
        if len(self.images) >= capacity:  # the oldest that was given makes room, or else the oldest
            oldest = self.is_used.index(True) if True in self.is_used else 0
            del self.images[oldest], self.is_used[oldest]
        self.images.append(image)
        self.is_used.append(False)

    def draw(self, count: int, generator: np.random.Generator) -> tuple[list[dict[str, Any]], int]:
        """`count` images, none twice before all were drawn; and how many of them are given for the first time."""
        drawn: list[dict[str, Any]] = []
        unused = self.is_used.count(False)
        while len(drawn) < count:
            order = np.lexsort((generator.random(len(self.images)), self.is_used))[: count - len(drawn)]
            for position in order.tolist():
                drawn.append(self.images[position])
                self.is_used[position] = True
        return drawn, unused - self.is_used.count(False)


def _image_of(batch: Mapping[str, Any], position: int) -> dict[str, Any]:
    """One image with what belongs to it, copied: a view would keep its whole batch."""
    kept = {
        name: torch.as_tensor(batch[name])[position].clone() for name in ("image", "label", "index") if name in batch
    }
    sensitive = {name: torch.as_tensor(values)[position].clone() for name, values in batch["sensitive"].items()}
    return {**kept, "sensitive": sensitive}


def _stacked(images: list[dict[str, Any]]) -> dict[str, Any]:
    first = images[0]
    batch = {name: torch.stack([image[name] for image in images]) for name in first if name != "sensitive"}
    sensitive = {name: torch.stack([image["sensitive"][name] for image in images]) for name in first["sensitive"]}
    return {**batch, "sensitive": sensitive}
