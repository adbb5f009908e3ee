# SPDX-License-Identifier: Apache-2.0
"""Kill conversions, training runs and batches often, and see that nothing is lost, doubled or half there.

    python tests/run.py kills                         50 conversions, 20 kills of a training run, 20 batches
    python tests/run.py kills conversions --count 5   one of the three, fewer times

Conversions and training die at random moments and at random changes of files (tests/support/killed.py); training also
while it writes `final`, and its newest checkpoint is damaged in between. Of a batch a worker is killed: the batch must
end by itself, with the answers of an undisturbed one. Batches need the extra `batch`. The exit status is 1 when
something was not as it should be. Each kind prints a line of what happened.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before transformers is imported

from blip3.conversion.random_checkpoint import write_release_layout
from support import ROOT, convert, render_image
from support.processes import expect_success, start
from support.training import make_small_model, write_recipe

COUNTS = {"conversions": 50, "runs": 20, "batches": 20}
IMAGES, SECONDS = 24, 1200


def kill_conversions(scratch: Path, count: int) -> dict:
    """Kill a conversion that replaces another."""
    source = write_release_layout(scratch / "source")
    (scratch / "outputs").mkdir()
    return killed("convert", source, scratch / "outputs" / "out", count, scratch)


def kill_runs(scratch: Path, count: int) -> dict:
    """Kill a training run."""
    model = make_small_model(scratch)
    recipe = write_recipe(scratch / "run.yaml", model, mixture=[{"rendered": "name"}], max_steps=8, save_every=2)
    return killed("train", recipe, scratch / "run", count, scratch)


def killed(what: str, source: Path, output: Path, count: int, scratch: Path) -> dict:
    """Run tests/support/killed.py; gives what it counted."""
    process = start(
        ROOT / "tests" / "support" / "killed.py",
        *(what, source, output, "--kills", count),
        modules=scratch / "modules",
        PYTHONPATH=str(ROOT),
    )
    lines = expect_success(process, seconds=3600).splitlines()
    return json.loads(lines[-1])


def kill_batches(scratch: Path, count: int) -> dict:
    """Kill a worker of each batch, after a random number of answers."""
    source, model, images = write_release_layout(scratch / "source"), scratch / "model", scratch / "images"
    convert(source, model, "--vision-config", source / "siglip_vision_config.json")
    images.mkdir()
    for index in range(IMAGES):
        render_image(40 + 10 * index, 300 - 8 * index, seed=index).save(images / f"{index:02}.png")
    command = [sys.executable, "-m", "blip3.serving.batch", "--model", str(model), "--input", str(images)]
    command += ["--question", "What is in the image?", "--max-new-tokens", "24", "--batch-size", "1"]
    expected = answers_of([*command, "--output", str(scratch / "undisturbed")], scratch / "undisturbed")
    found = {"kills": 0, "rows": 0}
    for number in range(count):
        output = scratch / str(number)
        answers = answers_of([*command, "--output", str(output)], output, random.randint(1, IMAGES // 2))
        if answers != expected:
            raise RuntimeError(f"Batch {number} gave {answers} but {expected} was expected, as undisturbed.")
        found = {"kills": found["kills"] + 1, "rows": found["rows"] + len(answers)}
        print(f"batch {number + 1} of {count}", file=sys.stderr, flush=True)
    return found


def answers_of(command: list[str], output: Path, kill_after: int = 0) -> list[tuple[str, str, str]]:
    """Run a batch, kill a worker when it has so many answers; gives id, answer and error of each line, sorted."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    log = output.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            if kill_after:
                kill_worker(process, output / "answers.jsonl", kill_after)
            status = process.wait(SECONDS)
        finally:
            process.kill()
    if status:
        raise RuntimeError(f"The batch ended with {status}: {log.read_text(errors='replace')[-3000:]}")
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted((line["id"], line["answer"], line["error"]) for line in lines)


def kill_worker(process: subprocess.Popen, answers: Path, count: int) -> None:
    """Kill one of the workers of a batch as soon as there are so many answers."""
    import psutil

    end = time.monotonic() + SECONDS
    while not answers.is_file() or answers.read_bytes().count(b"\n") < count:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"The batch gave no {count} answers to wait for; it ended or hangs.")
        time.sleep(0.01)
    workers = [each for each in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in each.name()]
    if not workers:
        raise RuntimeError("The batch has no worker to kill. It was probably done already: ask for more images.")
    random.choice(workers).kill()


KINDS: dict[str, Callable[[Path, int], dict]] = {
    "conversions": kill_conversions,
    "runs": kill_runs,
    "batches": kill_batches,
}


def main() -> int:
    """Kill what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*COUNTS, []], metavar="KIND", help=f"{', '.join(COUNTS)}; or all")
    parser.add_argument("--count", type=int, help="kills of each kind (default: 50, 20, 20)")
    args = parser.parse_args()
    kinds = args.kinds or list(COUNTS)
    if "batches" in kinds and not (find_spec("ray") and find_spec("psutil")):
        print("Batches run on Ray, which is not installed: pip install -e '.[batch]' psutil", file=sys.stderr)
        return 1
    for kind in kinds:
        start_time = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="blip3-kills-") as scratch:
            try:
                found = KINDS[kind](Path(scratch), args.count or COUNTS[kind])
            except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
                print(f"FAILED: {kind}: {error}", file=sys.stderr)
                return 1
        print(f"{kind}: {json.dumps(found)}, {time.monotonic() - start_time:.0f} s", flush=True)
    return 0
