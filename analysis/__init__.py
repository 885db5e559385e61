"""What a study says: from result rows and saved predictions to claims, rankings, tables. Loads no model, draws nothing.

result_rows, usable             names and order of settings, which row compares with which; usable predictions
contrasts, hypotheses, wording  what a claim compares, its verdict, the sentence about it
paired_tests, winners           every cell with its FP32 model; what is significantly the best
rankings, cost_benefit          resilience of the architectures; what a method buys
configurations, recommendation  settings over their seeds; what to ship
cross_dataset, literature       the same on another data set; what others found
group_calibration               whether probabilities are honest in each group
study_tables, tables            the tables of the report, in CSV, Markdown and LaTeX
"""
