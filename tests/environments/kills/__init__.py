# SPDX-License-Identifier: Apache-2.0
"""A server under load for minutes: are its answers right, does its memory stay level?"""
