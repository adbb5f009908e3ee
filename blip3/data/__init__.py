# SPDX-License-Identifier: Apache-2.0
"""One record schema, readers of real data in the recipe's forms, and what drawings are made of."""
