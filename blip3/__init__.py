# SPDX-License-Identifier: Apache-2.0
"""The workshop around the model: conversion, data, the rendered world, training, evaluation, serving, benchmarks.

The model itself is the `*_blip3.py` files at the root of the repository, which the Hub loads; `hub.py` reaches them.
"""
