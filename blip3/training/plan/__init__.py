# SPDX-License-Identifier: Apache-2.0
"""What a run will need, computed before a GPU is rented: tokens, arithmetic, memory, hours, disk."""
