# SPDX-License-Identifier: Apache-2.0
"""The soak itself, for a few seconds, and that each of its checks can fail."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import IS_TRANSFORMERS_5, ROOT
from support.serving import silence_bytes

from .backends import Reply
from .cases import Case
from .report import MIB, Sample, describe_latency, failures, growth_percent
from .run import check

RUN = ROOT / "tests" / "run.py"


@pytest.fixture(scope="module")
def legible(tiny_repo, tmp_path_factory):
    """The tiny random model: in 20 seconds a trained one answers too few requests to say much."""
    return silence_bytes(Path(shutil.copytree(tiny_repo, tmp_path_factory.mktemp("soak") / "tiny")))


def soak(folder, model, *arguments):
    """Run the command for 20 seconds. Memory is still settling then, so only its doubling is a failure."""
    output = folder / "report.json"
    command = [sys.executable, str(RUN), "soak", "--minutes", "0.33", "--clients", "8", "--max-growth", "100"]
    run = subprocess.run(
        [*command, "--model", str(model), "--output", str(output), *map(str, arguments)],
        capture_output=True, text=True, timeout=540, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(output.read_text(encoding="utf-8"))


def expect_no_fault(report):
    assert report["failures"] == report["faults"] == report["before_and_after"] == []
    assert set(report["outcomes"]) == {"right", "refused"}
    assert report["requests"] == sum(report["outcomes"].values()) > 60
    assert report["memory"]["samples"] > 10


@pytest.mark.slow  # as `make soak` does, for longer
def test_the_handler_stays_right_under_eight_clients(tmp_path, legible):
    report = soak(tmp_path, legible, "--backend", "handler")
    expect_no_fault(report)
    assert len(report["requests_by_case"]) > 30
    assert report["private_connections"] == 0


@pytest.mark.slow  # as `make soak` does, for longer
def test_the_handler_stays_right_among_hostile_files(tmp_path, legible):
    report = soak(tmp_path, legible, "--hostile")
    expect_no_fault(report)
    assert report["bad_requests"] == "hostile files"
    assert sum("JPEG, padding" in name for name in report["requests_by_case"]) >= 2


needs_serve = pytest.mark.skipif(
    not IS_TRANSFORMERS_5 or find_spec("openai") is None or find_spec("fastapi") is None,
    reason="`transformers serve` of 5.x: pip install 'transformers[serving]'",
)


@pytest.mark.slow  # as `make soak` does, for longer
@needs_serve
def test_transformers_serve_stays_right_under_eight_clients(tmp_path, legible):
    expect_no_fault(soak(tmp_path, legible, "--backend", "http"))


# -- Checks that must be able to fail ---------------------------------------------------------------------------------


def series(mib_at, seconds=600):
    return [Sample(second, round(mib_at(second) * MIB), 4, 9) for second in range(seconds)]


def test_growth_is_the_last_minute_over_the_minute_after_warm_up():
    assert growth_percent(series(lambda second: 500), 600) == 0
    assert growth_percent(series(lambda second: 100 if second < 120 else 500), 600) == 0, "loading is no growth"
    assert growth_percent(series(lambda second: 500 if second < 540 else 530), 600) == pytest.approx(6)
    leak = series(lambda second: 500 + second / 10)  # 6 MiB a minute: the medians are 7 minutes apart
    assert growth_percent(leak, 600) == pytest.approx(100 * 42 / 515, abs=0.05)
    assert growth_percent(series(lambda second: 900 if second == 570 else 500), 600) == 0, "a peak is no growth"


def test_a_server_that_died_early_is_no_level_memory():
    with pytest.raises(ValueError, match="100 samples in 600 s"):
        growth_percent(series(lambda second: 500, seconds=100), 600)


GOOD = {
    "outcomes": {"right": 90, "refused": 30},
    "before_and_after": [],
    "requests_by_case": {"text": 90, "bomb": 30},
    "private_connections": 0,
    "memory": {"growth_percent": 4.9},
    "server_died": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcomes": {"right": 90, "refused": 30, "wrong": 1}}, "1 requests ended wrong"),
        ({"outcomes": {"right": 90, "refused": 30, "errors": 2}}, "2 requests ended errors"),
        ({"outcomes": {"refused": 30}}, "no request ended right"),
        ({"outcomes": {"right": 90}}, "no request ended refused"),
        ({"before_and_after": ["text: 'a' but generate writes 'b'"]}, "generate writes"),
        ({"requests_by_case": {"text": 90, "bomb": 0}}, "never asked: bomb"),
        ({"private_connections": 1}, "1 connections to a private address"),
        ({"memory": {"growth_percent": 5.1}}, "grew by 5.1 %"),
        ({"server_died": True}, "died"),
    ],
)
def test_each_check_can_fail(change, message):
    assert failures(GOOD, 5) == []
    (failure,) = failures(GOOD | change, 5)
    assert message in failure


@pytest.mark.parametrize(
    ("case", "reply", "outcome"),
    [
        (Case("good", {}), Reply(200, "a"), "right"),
        (Case("good", {}), Reply(200, "b"), "wrong"),
        (Case("good", {}), Reply(400, "busy"), "errors"),
        (Case("bad", {}, refusal="too large"), Reply(400, "It is too large."), "refused"),
        (Case("bad", {}, refusal="too large"), Reply(400, "Something else."), "errors"),
        (Case("bad", {}, refusal="too large"), Reply(500, "It is too large."), "errors"),
        (Case("bad", {}, refusal="too large"), Reply(200, "a"), "wrong"),
    ],
)
def test_replies_are_scored_by_status_and_answer(case, reply, outcome):
    found, fault = check(case, reply, "a")
    assert found == outcome
    assert bool(fault) == (outcome in ("wrong", "errors"))


def test_latency_is_described_by_percentiles():
    described = describe_latency([second / 100 for second in range(1, 102)])
    assert described == {"p50": 0.51, "p90": 0.91, "p99": 1.0, "max": 1.01}
