# SPDX-License-Identifier: Apache-2.0
"""Keep a server busy with good and bad requests, and see whether it stays right and its memory stays level.

    python tests/run.py soak --backend handler --minutes 10  Inference Endpoints' handler
    python tests/run.py soak --hostile --minutes 10          the same; bad requests are files built to take long
    python tests/run.py soak --backend http --minutes 10     `transformers serve`, by OpenAI's client
    python tests/run.py soak --backend vllm --minutes 10     vLLM, after `make test-vllm` made .venv-vllm

1. Every request is asked alone; answers must equal `generate`, bad requests must get their own error.
2. For the minutes given, each client asks one random request after the other, a quarter of them bad. Answers must
   equal those of step 1. The resident memory of the server's processes is sampled once a second.
3. Every request is asked alone again.

Memory has grown by the median of the last minute over the median of the minute after two minutes of warm-up (a run of
under ten minutes compares fifths of itself). The report is JSON; the exit status is 1 when any check fails.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before transformers is imported

import psutil
import torch
import transformers
from transformers.utils import logging as transformers_logging

from support import ROOT
from support.serving import SMALL_MODEL, Server, complete_folder

from .backends import BACKENDS, HandlerBackend, OpenAIBackend, Reply, generate_texts, running
from .cases import Case, hostile_cases, image_server
from .report import (
    MAX_GROWTH_PERCENT,
    Sample,
    Tally,
    describe_latency,
    describe_memory,
    failures,
)

SHARE_OF_BAD = 0.25
Backend = HandlerBackend | OpenAIBackend


def check(case: Case, reply: Reply, expected: object) -> tuple[str, str]:
    """Compare a reply with what it must be; returns the outcome and, for a bad one, what happened in words."""
    if case.refusal is not None:
        is_right = reply.status == case.status and case.refusal in str(reply.answer)
        outcome = "refused" if is_right else "errors" if reply.status != 200 else "wrong"
    elif reply.status != 200:
        outcome = "errors"
    else:
        outcome = "right" if reply.answer == expected else "wrong"
    if outcome in ("right", "refused"):
        return outcome, ""
    wanted = f"{case.status} with {case.refusal!r}" if case.refusal is not None else f"{str(expected)[:200]!r}"
    return outcome, f"{case.name}: {reply.status} {str(reply.answer)[:300]!r} but {wanted} was expected"


def ask_each(backend: Backend, server: Server, expected: dict[str, object]) -> list[str]:
    """Ask every request alone; returns what went wrong. Fills `expected` with the answers it lacks."""
    faults = []
    for case in backend.cases:
        reply = backend.ask(server, case)
        if case.refusal is None and reply.status == 200:
            expected.setdefault(case.name, reply.answer)
        faults.append(check(case, reply, expected.get(case.name))[1])
    return [fault for fault in faults if fault]


def differences(backend: Backend, expected: dict[str, object], texts: dict[str, str]) -> list[str]:
    """Where a server's answers are not those of `generate`."""
    found = {name: backend.text_of(expected[name]) for name in texts if name in expected}
    different = [
        f"{name}: {text!r} but generate writes {texts[name]!r}" for name, text in found.items() if text != texts[name]
    ]
    silent = [f"{name}: nothing was answered" for name, text in found.items() if not text]
    return different + silent + ([] if len(set(found.values())) > len(found) // 2 else ["the answers are all alike"])


def client(
    backend: Backend,
    server: Server,
    expected: dict[str, object],
    end: float,
    first: list[Case],
    tally: Tally,
    asked: Counter,
) -> None:
    """Ask the `first` requests, then random ones until the time is over."""
    chance, remaining = random.Random(first[0].name), list(first)
    good, bad = ([c for c in backend.cases if (c.refusal is None) == is_good] for is_good in (True, False))
    while time.monotonic() < end:
        case = remaining.pop() if remaining else chance.choice(bad if chance.random() < SHARE_OF_BAD else good)
        start = time.monotonic()
        try:
            reply = backend.ask(server, case)
            outcome, fault = check(case, reply, expected.get(case.name))
        except Exception as error:  # a connection that breaks is a result, not the end of the soak
            outcome, fault = "errors", f"{case.name}: {type(error).__name__}: {str(error)[:200]}"
        tally.add(outcome, time.monotonic() - start, fault)
        with tally.lock:
            asked[case.name] += 1


def sample(server: Server, seconds: float) -> Sample | None:
    """Measure the server and its children; None when it is gone."""
    try:
        parent = psutil.Process(server.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        return Sample(
            seconds,
            sum(process.memory_info().rss for process in processes),
            sum(process.num_threads() for process in processes),
            sum(process.num_fds() for process in processes),
        )
    except psutil.Error:
        return None


def keep_busy(
    backend: Backend, server: Server, expected: dict[str, object], seconds: float, num_clients: int
) -> tuple[Tally, list[Sample], Counter]:
    """Run the clients and sample the server meanwhile."""
    tally, samples, asked = Tally(), [], Counter({case.name: 0 for case in backend.cases})
    start = time.monotonic()
    shared = (backend, server, expected, start + seconds)
    threads = [  # together they ask everything once, whatever chance brings later
        threading.Thread(target=client, args=(*shared, backend.cases[number::num_clients], tally, asked), daemon=True)
        for number in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    while (now := time.monotonic() - start) < seconds:
        if measured := sample(server, now):
            samples.append(measured)
        if round(now) % 60 == 0 and samples:
            print(f"{now:4.0f} s: {dict(tally.outcomes)}, {samples[-1].resident_bytes / 2**20:.0f} MiB", flush=True)
        time.sleep(1)
    for thread in threads:
        thread.join(timeout=300)
    return tally, samples, asked


def soak(options: argparse.Namespace, scratch: Path) -> dict:
    """Run the whole soak and describe it."""
    seconds = options.minutes * 60
    folder = complete_folder(options.model, scratch)
    with image_server() as site:
        backend = BACKENDS[options.backend](folder, site)
        if options.hostile:
            backend.cases = [case for case in backend.cases if case.refusal is None] + hostile_cases()
        with running(backend) as server:
            expected: dict[str, object] = {}
            alone = ask_each(backend, server, expected)
            alone += differences(backend, expected, generate_texts(folder, backend.cases, backend.dtype))
            tally, samples, asked = keep_busy(backend, server, expected, seconds, options.clients)
            has_died = server.process.poll() is not None
            alone += [] if has_died else ask_each(backend, server, expected)
    return {
        "backend": options.backend,
        "bad_requests": "hostile files" if options.hostile else "of every kind",
        "model": options.model.resolve().name,
        "minutes": options.minutes,
        "clients": options.clients,
        "transformers": transformers.__version__ if options.backend != "vllm" else "of .venv-vllm",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {os.environ.get('OMP_NUM_THREADS', '1')} for torch",
        "requests": sum(tally.outcomes.values()),
        "outcomes": dict(tally.outcomes),
        "requests_by_case": dict(asked),
        "latency_seconds": describe_latency(tally.seconds),
        "memory": describe_memory(samples, seconds),
        "private_connections": site.trapped if options.backend == "handler" else 0,
        "server_died": has_died,
        "before_and_after": alone,
        "faults": tally.faults,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="handler", help="default: %(default)s")
    parser.add_argument(
        "--hostile", action="store_true", help="bad requests are files built to take long to decode (handler only)"
    )
    parser.add_argument("--minutes", type=float, default=10, help="of load (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument(
        "--model", type=Path, default=SMALL_MODEL, help="instruct checkpoint (default: the small model)"
    )
    parser.add_argument(
        "--max-growth", type=float, default=MAX_GROWTH_PERCENT, help="of memory, in %% (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the report (default: outputs/soak_BACKEND.json, or outputs/soak_handler_hostile.json)",
    )
    options = parser.parse_args()
    if options.hostile and options.backend != "handler":
        parser.error(f"--hostile is for the handler: {options.backend} decodes images by itself, without these checks")
    return options


def main() -> int:
    """Soak, write the report, say what failed."""
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    output = options.output or ROOT / "outputs" / f"soak_{options.backend}{'_hostile' if options.hostile else ''}.json"
    with tempfile.TemporaryDirectory(prefix="blip3-soak-") as scratch:
        os.environ.setdefault("HF_MODULES_CACHE", str(Path(scratch) / "modules"))
        report = soak(options, Path(scratch))
    report["failures"] = failures(report, options.max_growth)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("requests", "outcomes", "latency_seconds")}, indent=2))
    print(json.dumps({key: value for key, value in report["memory"].items() if key != "series"}, indent=2))
    for line in (*report["failures"], *report["faults"]):
        print(f"FAILED: {line}", file=sys.stderr)
    print(f"Report: {output}")
    return 1 if report["failures"] else 0
