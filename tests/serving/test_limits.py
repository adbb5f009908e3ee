# SPDX-License-Identifier: Apache-2.0
"""Limits: frozen, documented, read from the environment, and refused where they cannot be kept."""

import dataclasses
import doctest

import pytest

from blip3.serving import limits as limits_module
from blip3.serving.limits import ImageLimits, read_limits, variable_of
from support.site import LIMITS


def test_limits_are_frozen_documented_and_read_from_the_environment():
    for field in dataclasses.fields(ImageLimits):
        assert f"        {field.name}: " in ImageLimits.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        LIMITS.max_bytes = 1
    environment = {"MAX_BYTES": "1000", "TOTAL_SECONDS": "2.5", "ALLOWED_PORTS": "80, 8080", "ALLOW_REMOTE": "0"}
    limits = read_limits(ImageLimits, "P_", {f"P_{name}": value for name, value in environment.items()})
    expected = {"max_bytes": 1000, "total_seconds": 2.5, "allowed_ports": (80, 8080), "allow_remote": False}
    assert limits == dataclasses.replace(ImageLimits(), **expected)


@pytest.mark.parametrize("value", ["10MB", "-1", "0", "nan", "1.5", "1e400", "true", "1,2"])
def test_limits_that_cannot_be_kept(value):
    with pytest.raises(ValueError, match=r"(?i)max_bytes.*probably"):
        read_limits(ImageLimits, "P_", {"P_MAX_BYTES": value})


@pytest.mark.parametrize(
    "values", [{"connect_seconds": float("inf")}, {"connect_seconds": True}, {"allow_remote": 1}, {"max_side": 0}]
)
def test_limits_of_a_wrong_type(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ImageLimits(**values)


def test_variables_keep_their_published_names():
    variables = {field.name: variable_of(field, "BLIP3_PICTURE_") for field in dataclasses.fields(ImageLimits)}
    assert variables["max_images"] == "BLIP3_PICTURE_MAX_PICTURES"
    assert variables["max_bytes"] == "BLIP3_PICTURE_MAX_BYTES"
    assert read_limits(ImageLimits, "P_", {"P_MAX_PICTURES": "3"}).max_images == 3


def test_doctests():
    found = doctest.testmod(limits_module)
    assert found.attempted
    assert not found.failed
