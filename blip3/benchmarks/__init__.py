# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of BLIP-3 beside its peers and the machine's limits; docs/speed.md says what is measured."""

from .optional_torchvision import load_torchvision

HAS_TORCHVISION = load_torchvision()
