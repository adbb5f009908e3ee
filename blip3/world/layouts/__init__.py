# SPDX-License-Identifier: Apache-2.0
"""The rendered world in the files of public benchmarks, to try a reader or a harness without a download.

posttraining.py   POPE, HallusionBench and VLGuard's test, as their authors publish them

Names, fields and kinds of answers are those of the benchmarks; images and questions are ours. A score on them tells
whether a program and a model work together, and says nothing about the benchmark.
"""
