"""Figures of the study, by idea; `visualizations` gathers their names. What they share is in figures/style.py."""
