"""Metrics of many tables at once are those of group_counts, undefined rates, empty groups and float32 included."""

import numpy as np
import pytest

from group_counts import METRICS, group_metrics
from significance.batched_metrics import binary_metrics, table_metrics


@pytest.mark.parametrize(("n_groups", "n_classes"), [(1, 2), (2, 2), (5, 2), (4, 3)])
@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float32])
def test_metrics_are_those_of_the_definition(n_groups, n_classes, dtype):
    rng = np.random.default_rng(n_groups)
    tables = rng.poisson(rng.choice([0.2, 1, 30], size=(400, 1, 1, 1)), (400, n_groups, n_classes, n_classes))
    tables = tables[tables.sum(axis=(1, 2, 3)) > 0]
    for eligible_G in (np.ones(n_groups, bool), np.arange(n_groups) > 0, np.arange(n_groups) == 0):
        expected = group_metrics(tables, eligible=eligible_G)
        found = table_metrics(np.moveaxis(tables, 0, -1).astype(dtype), eligible_G)
        for name, values in zip(METRICS, found, strict=True):
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-6 if dtype == np.float32 else 1e-15)
        assert np.isnan(expected["predictive_parity_difference"]).any()  # the undefined ones are among them


def test_group_sizes_may_be_shared_by_the_cells_of_a_replicate():
    rng = np.random.default_rng(0)
    n_GLB = rng.integers(0, 4, (3, 2, 50, 1)).astype(np.float32)
    selected_GLBC = np.floor(rng.random((3, 2, 50, 7)) * (n_GLB + 1)).astype(np.float32)
    eligible_G = np.array([True, True, False])
    whole = np.broadcast_to(n_GLB, selected_GLBC.shape)
    tables = np.stack([whole - selected_GLBC, selected_GLBC], axis=2)
    np.testing.assert_array_equal(binary_metrics(n_GLB, selected_GLBC, eligible_G), table_metrics(tables, eligible_G))
