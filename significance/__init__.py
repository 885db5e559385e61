"""Statistics of models measured on the same images; no phase, no file of a study but its predictions.

intervals           bootstrap intervals of every metric of a count table, and of paired differences
rate_limits         limits of rates and of their differences that hold for small groups, near 0 and near 1
statistical_tests   tests, corrections, effect sizes, detectable effects
batched_metrics     the metrics of very many tables at once
joint_bootstrap     the same resampled images for all cells of a data set
certification       "the gap is at most 0.05", said wrongly no more often than promised
"""
