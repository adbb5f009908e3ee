# SPDX-License-Identifier: Apache-2.0
"""Stage 0, which a model needs whose vision tower nobody else has trained.

In the order of the data:

labels   a rendered record -> what lies under each patch of each view, and a caption
model    a SigLIP that also names what lies under each patch
train    the command
"""
