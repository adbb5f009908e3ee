# SPDX-License-Identifier: Apache-2.0
"""Every generation parameter has a range in which nothing fails; outside of it a sentence says so."""

import math
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blip3.serving.bodies import PARAMETERS, RequestLimits
from blip3.serving.endpoint import EndpointHandler

MOST_TOKENS = 4
LIMITS = RequestLimits(max_new_tokens=MOST_TOKENS, max_sequences=8)
NUMBERS = {name: allowed for name, allowed in PARAMETERS.items() if allowed.kind is not bool}
ENDS = {name: (allowed.low, allowed.high) for name, allowed in NUMBERS.items()}
ENDS |= {"max_new_tokens": (1, MOST_TOKENS), "min_new_tokens": (0, MOST_TOKENS)}
TINY, HUGE = sys.float_info.min, sys.float_info.max
WILD = [
    1e-38,
    TINY,
    5e-324,
    HUGE,
    -0.0,
    -1,
    -TINY,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    2**63,
    1 + 1e-16,
    True,
    "1",
]
RANDOM = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def inside(name):
    """A value at an end of its range, next to it, or between."""
    low, high = ENDS[name]
    if NUMBERS[name].kind is int:
        return st.sampled_from([low, high, min(low + 1, high), max(high - 1, low)]) | st.integers(low, high)
    near = [low, high, math.nextafter(low, high), math.nextafter(high, low)]
    return st.sampled_from(near) | st.floats(low, high)


VALUES = {name: inside(name) for name in NUMBERS} | {"do_sample": st.booleans(), "do_image_splitting": st.booleans()}
ANY = {name: values | st.sampled_from(WILD) | st.floats() | st.integers() for name, values in VALUES.items()}


@pytest.fixture(scope="module")
def handler(tiny_repo):
    return EndpointHandler(str(tiny_repo), request_limits=LIMITS)


def answered(handler, parameters):
    """Ask; True for an answer, False for a refusal in one line. Anything else fails."""
    refusal = None
    try:
        [answer] = handler({"inputs": "Hello", "parameters": parameters})
    except ValueError as error:
        refusal = error
    if refusal is None:
        assert 1 <= answer["generated_tokens"] <= MOST_TOKENS
        return True
    assert type(refusal) is ValueError
    assert "probably" in str(refusal), refusal
    assert str(refusal).isprintable(), refusal
    return False


@RANDOM
@given(st.fixed_dictionaries({}, optional=VALUES))
@example({"temperature": 0.01, "top_p": 0.01, "top_k": 1, "num_beams": 8, "repetition_penalty": 5.0, "seed": 1})
@example({"temperature": 5.0, "top_p": 0.01, "top_k": 1000, "num_beams": 8, "repetition_penalty": 0.5, "seed": 1})
@example(
    {"temperature": 0.01, "top_k": 1, "num_beams": 8, "min_new_tokens": 4, "max_new_tokens": 4, "seed": 2**32 - 1}
)
def test_inside_the_ranges_only_contradictions_are_refused(handler, parameters):
    switched_off = parameters.get("do_sample") is False
    contradicts = parameters.get("min_new_tokens", 0) > parameters.get("max_new_tokens", MOST_TOKENS)
    contradicts |= switched_off and not parameters.keys().isdisjoint(("temperature", "top_p", "top_k"))
    assert answered(handler, parameters) is not contradicts


@RANDOM
@given(st.fixed_dictionaries({}, optional=ANY))
def test_any_number_is_answered_or_refused(handler, parameters):
    answered(handler, parameters)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", WILD, ids=str)
def test_wild_numbers_one_by_one(handler, name, value):
    low, high = ENDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_kind = is_number and (NUMBERS[name].kind is float or isinstance(value, int))
    is_inside = is_kind and (low <= value <= high or (name == "temperature" and value == 0))
    assert answered(handler, {name: value}) is (bool(is_inside) or value == "1")


@pytest.mark.parametrize("name", NUMBERS)
def test_one_step_outside_is_refused(handler, name):
    low, high = ENDS[name]
    is_whole = NUMBERS[name].kind is int
    below, above = (low - 1, high + 1) if is_whole else (math.nextafter(low, -1), math.nextafter(high, 9))
    for value in (below, above):
        assert not answered(handler, {name: value})
