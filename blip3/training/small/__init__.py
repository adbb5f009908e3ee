# SPDX-License-Identifier: Apache-2.0
"""What only the small model needs: its sizes with new weights, its tokenizer, its place at the repository's root."""
