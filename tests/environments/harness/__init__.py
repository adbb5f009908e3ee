# SPDX-License-Identifier: Apache-2.0
"""Harnesses of public benchmarks on look-alikes."""
