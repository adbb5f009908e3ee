# SPDX-License-Identifier: Apache-2.0
"""The rendered world in the files of public benchmarks, to try a reader or a harness without a download.

lmms_lab.py       data sets as lmms-eval's own tasks find them on the Hub
vlmevalkit.py     tables as VLMEvalKit keeps them
questions.py      what both are made of
posttraining.py   POPE, HallusionBench and VLGuard's test, as their authors publish them

Columns, splits and kinds of answers are those of the benchmarks; images and questions are ours. A score on them tells
whether a program and a model work together, and says nothing about the benchmark.
"""
