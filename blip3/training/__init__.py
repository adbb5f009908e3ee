# SPDX-License-Identifier: Apache-2.0
"""The recipe: a small model from nothing, its tower, pre-training, fine-tuning with one image and with several."""
