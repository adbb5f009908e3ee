# SPDX-License-Identifier: Apache-2.0
r"""Write tasks for `lmms-eval --include_path FOLDER`: few-shot questions, rules of the rendered world, VLGuard.

    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark textvqa coco --shots 0 4 8 --seed 42 43 44
    python -m blip3.evaluation.harness.write_tasks FOLDER --form openflamingo --demonstrations vqav2=data/vqav2:train
    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark okvqa --stems OPENFLAMINGO/.../ok_vqa_utils.py
    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark rule --questions rule=rendered/rule:test
    python -m blip3.evaluation.harness.write_tasks FOLDER --vlguard VLGUARD --phrases VLGUARD/utils/utils.py

    FOLDER/few_shot_textvqa_4_seed42.yaml    a task; the seeds' tasks are a group, few_shot_textvqa_4, with their mean
    FOLDER/vlguard_unsafes.yaml              and safe_unsafes, safe_safes; a group, vlguard

The names printed at the end are what `--tasks` takes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import write_text
from ..safety import SUBSETS, read_refusal_phrases
from .few_shot import BENCHMARKS, FORMS, parse_place
from .stemming import read_exceptions
from .vlguard import check_data

RULE = "rule"
PACK = "few_shot"
SEED = 42  # OpenFlamingo's
_CLASSES = f"{__package__}.few_shot_task"


def few_shot_tasks(
    benchmark: str,
    form: str,
    shots: Sequence[int],
    seeds: Sequence[int],
    options: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Give the tasks of a benchmark by name, and for several seeds a group for each number of shots.

    Args:
        benchmark: a key of `BENCHMARKS`, or `rule`.
        form: a key of `FORMS`.
        shots: numbers of demonstrations.
        seeds: of the demonstrations.
        options: further keys of the tasks' `metadata`.
    """
    head = f"{PACK}_{benchmark}" if form == "plain" else f"{PACK}_{form}_{benchmark}"
    has_stems = "stems" in (options or {})
    metric = BENCHMARKS[benchmark].metric(has_stems=has_stems) if benchmark in BENCHMARKS else "exact"
    written: dict[str, dict[str, Any]] = {}
    for count in shots:
        names = []
        for seed in seeds:
            name = f"{head}_{count}" + (f"_seed{seed}" if len(seeds) > 1 else "")
            asked = {"benchmark": benchmark, "form": form, "shots": count, "seed": seed, "num_fewshot": count}
            kind = "RuleTask" if benchmark == RULE else "FewShotTask"
            written[name] = {"task": name, "class": kind, "metadata": {"version": 1.0} | asked | (options or {})}
            names.append(name)
        if len(seeds) > 1:
            mean = {"metric": metric, "aggregation": "mean", "weight_by_size": False}
            written[f"{head}_{count}"] = {"group": f"{head}_{count}", "task": names, "aggregate_metric_list": [mean]}
    return written


def vlguard_tasks(data: Path, phrases: Path) -> dict[str, dict[str, Any]]:
    """Give the tasks of VLGuard by name, and their group.

    Args:
        data: folder with `test.json` and the folder `test` of images.
        phrases: `utils/utils.py` of its repository, as `safety.read_refusal_phrases` takes it.

    Raises:
        FileNotFoundError: if either is not there.
        ValueError: if the file has no list of phrases.
    """
    check_data(data)
    read_refusal_phrases(phrases)
    asked = {"data": str(data.resolve()), "phrases": str(phrases.resolve())}
    names = {f"vlguard_{subset}": subset for subset in SUBSETS}
    tasks = {
        name: {"task": name, "class": "VlguardTask", "metadata": {"version": 1.0, "subset": subset} | asked}
        for name, subset in names.items()
    }
    return tasks | {"vlguard": {"group": "vlguard", "task": list(names)}}


def write(folder: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Write a YAML file for each task; JSON is YAML, but for the name of the class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in tasks.items():
        lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if key != "class"]
        if "class" in values:
            module = f"{__package__}.vlguard_task" if values["class"] == "VlguardTask" else _CLASSES
            lines.append(f"class: !function {module}.{values['class']}")
        write_text(folder / f"{name}.yaml", "\n".join(lines) + "\n")


def _by_name(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """Read `NAME=VALUE`, several times.

    Raises:
        ValueError: for another form or an unknown benchmark.
    """
    found = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or name not in (*BENCHMARKS, RULE):
            raise ValueError(
                f"{option} is {text!r} but NAME=VALUE is expected, the name one of {', '.join(BENCHMARKS)} and "
                f"{RULE}. The name was probably left out or misspelt: write it before the sign."
            )
        found[name] = value
    return found


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.harness.write_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument(
        "--benchmark", nargs="+", choices=[*BENCHMARKS, RULE], help="(default: the six published ones)"
    )
    parser.add_argument("--form", choices=FORMS, default="plain", help="of prompts (default: plain)")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 8], help="(default: 0 4 8)")
    parser.add_argument("--seed", type=int, nargs="+", default=[SEED], help=f"of demonstrations (default: {SEED})")
    parser.add_argument("--questions", nargs="+", metavar="NAME=PATH:SPLIT", help="instead of those on the Hub")
    parser.add_argument("--demonstrations", nargs="+", metavar="NAME=PATH:SPLIT", help="rows with images and answers")
    parser.add_argument(
        "--neighbours", nargs="+", metavar="NAME=FILE", help="show the most similar, see neighbours.py"
    )
    parser.add_argument(
        "--stems", type=Path, metavar="FILE", help="of OpenFlamingo: open_flamingo/eval/ok_vqa_utils.py, read, not run"
    )
    parser.add_argument("--ptb", action="store_true", help="CIDEr with the COCO tool's own words, which needs Java")
    parser.add_argument("--vlguard", type=Path, metavar="FOLDER", help="of VLGuard: test.json and the folder test")
    parser.add_argument("--phrases", type=Path, metavar="FILE", help="of VLGuard: utils/utils.py, read, not run")
    return parser.parse_args(arguments)


def _asked(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Give every task that a command line asks for."""
    tasks: dict[str, dict[str, Any]] = {}
    if given.vlguard:
        if given.phrases is None:
            raise ValueError(
                "--vlguard was given without --phrases, but its score counts answers with none of certain phrases. "
                "They are not part of this repository, as theirs has no licence: name your copy of their "
                "utils/utils.py."
            )
        tasks |= vlguard_tasks(given.vlguard, given.phrases)
    if given.vlguard and not given.benchmark:
        return tasks
    questions, demonstrations = (
        _by_name(given.questions, "--questions"),
        _by_name(given.demonstrations, "--demonstrations"),
    )
    neighbours = _by_name(given.neighbours, "--neighbours")
    if given.stems:
        read_exceptions(given.stems)
    for benchmark in given.benchmark or BENCHMARKS:
        options: dict[str, Any] = {"ptb": True} if given.ptb else {}
        if benchmark in questions:
            options["questions"] = asdict(parse_place(questions[benchmark], "test"))
        if benchmark in demonstrations:
            options["demonstrations"] = asdict(parse_place(demonstrations[benchmark], "train"))
        if benchmark in neighbours:
            options["neighbours"] = str(Path(neighbours[benchmark]).resolve())
        if given.stems and benchmark in BENCHMARKS and BENCHMARKS[benchmark].is_stemmed:
            options["stems"] = str(given.stems.resolve())
        tasks |= few_shot_tasks(benchmark, given.form, given.shots, given.seed, options)
    return tasks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = _parse(arguments)
    try:
        tasks = _asked(given)
        write(given.folder, tasks)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    grouped = set(itertools.chain.from_iterable(task["task"] for task in tasks.values() if "group" in task))
    sys.stdout.write(",".join(name for name in tasks if name not in grouped) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
