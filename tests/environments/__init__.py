# SPDX-License-Identifier: Apache-2.0
"""Tests that start servers or need an environment of their own; `python tests/run.py` runs each of them."""
