# SPDX-License-Identifier: Apache-2.0
"""transformers' own tests of models, processors and image processors, run against BLIP-3's classes."""
