# SPDX-License-Identifier: Apache-2.0
"""The pHashes of each image: the first of two passes that find duplicates across shards."""
