# SPDX-License-Identifier: Apache-2.0
"""Scores of a checkpoint: on the held-out rendered world, and on what post-training is meant to change.

metrics.py    answers and references to numbers and intervals
tasks.py      records to questions, and answers to scores, by task
answer.py     a checkpoint that answers questions in batches
asking.py     what the commands share: series of seeds, models, answers that are kept
report.py     scores to results.json, table.md, plot.png and samples.md
tables_and_plots.py   what every report is written with
score.py      the command
ablation_grid.py, ablation_runs.py, ablation_report.py, ablate.py    rows that are trained and compared; the command
golden.py     what a shipped checkpoint gives, to tell a damaged or changed one

Post-training:
ratios.py     sums over sums, their intervals, and paired differences
yes_no.py     POPE and HallusionBench
naming.py     what a description names: CHAIR and coverage
safety.py     attack success, over-refusal, helpfulness
grader.py     who says whether an answer to HallusionBench is right
posttraining_tasks.py, posttraining_report.py, posttraining.py    questions and scores, the report, the command
"""
