"""Images with groups: balanced sets that are balanced, weights that give each group its share, drifts by hand."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.groups import GroupedImages, drift, gather_groups, group_shares
from quantizers.numerics import QuantizationError, QuantizationWarning


def loader_of(groups: dict[int, int], batch: int = 16):
    """Batches of 1x2x2 images whose pixels are their own number; attribute group as counted, label its parity."""
    codes = torch.repeat_interleave(torch.tensor(list(groups)), torch.tensor(list(groups.values())))
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    numbers = torch.arange(len(codes))
    values = numbers.float()[:, None, None, None].expand(-1, 1, 2, 2)
    parts = [slice(start, start + batch) for start in range(0, len(codes), batch)]
    return codes, [
        {"image": values[part], "label": numbers[part] % 2, "sensitive": {"group": codes[part]}} for part in parts
    ]


def gathered(loader, samples: int, seed: int = 0, **options) -> GroupedImages:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)
        return gather_groups(loader, samples, np.random.default_rng(seed), **options)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 90), min_size=2, max_size=5), samples=st.integers(5, 60), seed=st.integers(0, 99))
def test_balanced_images_are_balanced(counts, samples, seed):
    codes, loader = loader_of(dict(enumerate(counts)))
    grouped = gathered(loader, samples, seed)
    numbers = grouped.images[:, 0, 0, 0].long()
    drawn = np.bincount(grouped.groups, minlength=len(counts))
    assert len(numbers) == samples and drawn.max() - drawn.min() <= 1
    assert torch.equal(grouped.groups, codes[numbers]) and torch.equal(grouped.labels, numbers % 2)
    for group, count in enumerate(counts):
        distinct = len(set(numbers[grouped.groups == group].tolist()))
        assert grouped.distinct[str(group)] == distinct == min(count, drawn[group])


def test_balanced_images_are_a_fair_sample_of_their_group():
    """Every image of a group is as likely as another, wherever it stands in the loader."""
    codes, loader = loader_of({0: 60, 1: 20})
    hits = np.zeros(80)
    for seed in range(600):
        hits[gathered(loader, 20, seed).images[:, 0, 0, 0].long().numpy()] += 1
    for group, share in ((0, 10 / 60), (1, 10 / 20)):
        rate = hits[codes.numpy() == group] / 600
        # +-4.5 standard errors of a binomial share
        assert np.abs(rate - share).max() < 4.5 * np.sqrt(share * (1 - share) / 600)


def test_a_group_that_comes_late_leaves_the_sample_of_the_others_fair():
    """A group alone at first fills all places; what stays of it when others come is no favourite of its beginning."""
    numbers = torch.arange(200)
    codes = torch.where(numbers < 120, 0, numbers % 2)
    batch = {"image": numbers.float().view(-1, 1, 1, 1), "label": codes, "sensitive": {"group": codes}}
    early = []
    for seed in range(300):
        grouped = gathered([batch], 40, seed)
        early.append((grouped.images[grouped.groups == 0].flatten() < 20).float().mean().item())
    share = 20 / int((codes == 0).sum())
    assert np.mean(early) == pytest.approx(share, abs=4.5 * np.sqrt(share * (1 - share) / (300 * 20)))


def test_the_first_images_are_of_all_groups():
    """What has memory for a part of them only (a reconstruction) sees no group alone."""
    _, loader = loader_of({0: 50, 1: 50, 2: 50})
    for seed in range(5):
        assert len(set(gathered(loader, 90, seed).groups[:20].tolist())) == 3


def test_a_small_group_is_repeated_and_that_is_said():
    _, loader = loader_of({0: 50, 1: 3})
    with pytest.warns(QuantizationWarning, match=r"1 of 2 groups of group .* \(group 1: 3 images for 10 places\)"):
        grouped = gather_groups(loader, 20, np.random.default_rng(0))
    of_it = grouped.images[grouped.groups == 1][:, 0, 0, 0].tolist()
    assert len(of_it) == 10 and len(set(of_it)) == 3


def test_unbalanced_images_are_the_first_ones():
    codes, loader = loader_of({0: 50, 1: 10})
    grouped = gathered(loader, 37, is_balanced=False)
    numbers = grouped.images[:, 0, 0, 0].long()
    assert sorted(numbers.tolist()) == list(range(37)) and torch.equal(grouped.groups, codes[numbers])


def test_groups_are_combinations_of_the_attributes_that_are_named():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 2, (60,), generator=generator) for _ in range(2))
    batch = {"image": torch.randn(60, 3, 2, 2), "label": torch.zeros(60), "sensitive": {"one": one, "other": 3 * other}}
    assert gathered([batch], 40).names == ("0 & 0", "0 & 3", "1 & 0", "1 & 3")
    assert gathered([batch], 40, attributes=["other"]).names == ("0", "3")


def test_images_without_groups_are_refused():
    generator = np.random.default_rng(0)
    plain = [(torch.zeros(2, 3, 4, 4), torch.zeros(2))]
    with pytest.raises(QuantizationError, match="no sensitive attribute"):
        gather_groups(plain, 4, generator)
    _, loader = loader_of({0: 3, 1: 3})
    with pytest.raises(QuantizationError, match=r"'race' \(it has: group\)"):
        gather_groups(loader, 4, generator, ["race"])
    with pytest.raises(QuantizationError, match="1 calibration images cannot hold the 2 groups of group"):
        gather_groups(loader, 1, generator)
    with pytest.raises(QuantizationError, match="empty"):
        gather_groups([], 8, generator)
    _, loader = loader_of({4: 7})
    with pytest.raises(QuantizationError, match=r"attribute group has one group \(4: 7 images\)"):
        gather_groups(loader, 4, generator)


def of_groups(groups: list[int]) -> GroupedImages:
    codes = torch.tensor(groups)
    return GroupedImages(torch.zeros(len(codes), 1, 1, 1), codes, codes, tuple(map(str, range(max(groups) + 1))))


@given(groups=st.lists(st.integers(0, 3), min_size=8, max_size=30).map(lambda g: [*g, 0, 1, 2, 3]), data=st.data())
def test_image_weights_give_each_group_its_share(groups, data):
    shares = np.array(data.draw(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4)))
    grouped = of_groups(groups)
    weights = grouped.image_weights(torch.tensor(shares)).double().numpy()
    assert weights.mean() == pytest.approx(1.0, abs=1e-6)
    totals = np.bincount(groups, weights=weights) / weights.sum()
    assert totals == pytest.approx(shares / shares.sum(), rel=1e-5)
    for group in range(4):
        assert len(set(weights[np.array(groups) == group])) == 1


def test_half_of_the_weight_goes_to_the_worst_group():
    drifts = torch.tensor([0.1, 0.9, 0.2, 0.3])
    assert group_shares(drifts, "balanced").tolist() == [0.25] * 4
    assert group_shares(drifts, "worst_group").tolist() == pytest.approx([0.125, 0.625, 0.125, 0.125])


def test_group_means_by_hand():
    assert of_groups([0, 1, 1, 0]).means(torch.tensor([1.0, 2.0, 4.0, 5.0])).tolist() == [3.0, 3.0]


def test_drifts_by_hand():
    """Softmax (1/2, 1/2) against (3/4, 1/4): KL = ln(1/2) - (ln 3/4 + ln 1/4) / 2; losses ln 2 and ln 4/3 or ln 4."""
    exact, moved = torch.zeros(2, 2), torch.log(torch.tensor([[3.0, 1.0], [3.0, 1.0]]))
    labels = torch.tensor([0, 1])
    kl = np.log(0.5) - (np.log(0.75) + np.log(0.25)) / 2
    assert drift(exact, moved, labels).numpy() == pytest.approx([kl, kl])
    rise = [np.log(4 / 3) - np.log(2), np.log(4) - np.log(2)]
    assert drift(exact, moved, labels, "loss").numpy() == pytest.approx(rise)
    single = drift(torch.zeros(2, 1), -torch.log(torch.tensor([[3.0], [3.0]])), labels)  # a single logit
    assert single.numpy() == pytest.approx([kl, kl])
