# SPDX-License-Identifier: Apache-2.0
"""Tests of what lies beyond one machine and beyond torch, in an environment of their own."""
