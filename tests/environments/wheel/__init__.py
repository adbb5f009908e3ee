# SPDX-License-Identifier: Apache-2.0
"""The package as a wheel, without the repository around it."""
