"""Figures of the study: a DataFrame in, a `matplotlib.figure.Figure` out. The caller saves it.

The functions are in figures/, by idea; here are their names. No pyplot state is used. Colours are those of Okabe and
Ito, which people with any colour vision tell apart, and shapes repeat what colours say. Sizes are inches in print: 3.4
is one column, 7 is two. Intervals are drawn where rows have them. A missing value is hatched or left out, never drawn
as 0; a figure with nothing to show says so.

What does not fit a page 9 inches high goes on: such functions take `page` and give a figure with `page` and `n_pages`,
of which there are six at most; `all_pages` gives them all. What has to be averaged or left out is said in the title.
"""

from figures.comparisons import cost_benefit, fairness_vs_bits, method_comparison, mitigation_comparison
from figures.cross_dataset import cross_dataset
from figures.diagnosis import group_diagnostics
from figures.forest import hypothesis_validation
from figures.groups import group_flip_rates, per_group_performance
from figures.heatmaps import accuracy_heatmap, fairness_heatmap, layer_sensitivity
from figures.pareto import pareto_frontier, pareto_mask, pareto_points
from figures.reliability import probability_calibration
from figures.style import all_pages

__all__ = [
    "accuracy_heatmap",
    "all_pages",
    "cost_benefit",
    "cross_dataset",
    "fairness_heatmap",
    "fairness_vs_bits",
    "group_diagnostics",
    "group_flip_rates",
    "hypothesis_validation",
    "layer_sensitivity",
    "method_comparison",
    "mitigation_comparison",
    "pareto_frontier",
    "pareto_mask",
    "pareto_points",
    "per_group_performance",
    "probability_calibration",
]
