# SPDX-License-Identifier: Apache-2.0
"""A pHash for each image: the first of two passes that find duplicates across shards."""
