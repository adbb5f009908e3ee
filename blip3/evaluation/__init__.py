# SPDX-License-Identifier: Apache-2.0
"""Scores of a checkpoint on the held-out rendered world, and the metrics of published benchmarks as functions.

metrics.py    answers and references to numbers and intervals
tasks.py      records to questions, and answers to scores, by task
answer.py     a checkpoint that answers questions in batches
report.py     scores to results.json, table.md, plot.png and samples.md
tables_and_plots.py   what every report is written with
score.py      the command
golden.py     what a shipped checkpoint gives, to tell a damaged or changed one
"""
