# SPDX-License-Identifier: Apache-2.0
"""The rendered world in the files of public benchmarks, to try a harness without a download.

lmms_lab.py       data sets as lmms-eval's own tasks find them on the Hub
vlmevalkit.py     tables as VLMEvalKit keeps them
questions.py      what both are made of

Columns, splits and kinds of answers are those of the benchmarks; images and questions are ours. A score on them tells
whether a harness and a model work together, and says nothing about the benchmark.
"""
