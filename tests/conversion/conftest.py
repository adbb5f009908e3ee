# SPDX-License-Identifier: Apache-2.0
"""Fixtures the converter's test files share, as a plugin: the reference's tiny release, and it converted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import convert
from support.conversion import TINY, TINY_VISION, tensors_of


@pytest.fixture(scope="session")
def tiny() -> dict[str, torch.Tensor]:
    return load_file(TINY / "model.safetensors")


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ours") / "tiny"
    convert(TINY, output, "--vision-config", TINY_VISION)
    return output


@pytest.fixture(scope="session")
def ours_tensors(ours) -> dict[str, torch.Tensor]:
    return tensors_of(ours)
