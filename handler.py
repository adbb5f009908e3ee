# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Inference Endpoints: the container imports this file from the repository and calls `EndpointHandler`.

It needs this folder alone, not an installation: the rest is in `blip3/serving`.
"""

from blip3.serving.endpoint import EndpointHandler

__all__ = ["EndpointHandler"]
