# SPDX-License-Identifier: Apache-2.0
r"""Write tasks for `lmms-eval --include_path FOLDER`: few-shot questions, rules of the rendered world, VLGuard.

    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark textvqa coco --shots 0 4 8 --seed 42 43 44
    python -m blip3.evaluation.harness.write_tasks FOLDER --form openflamingo --demonstrations vqav2=data/vqav2:train \
        okvqa=data/okvqa:train
    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark okvqa --stems OPENFLAMINGO/.../ok_vqa_utils.py
    python -m blip3.evaluation.harness.write_tasks FOLDER --benchmark rule --questions rule=rendered/rule:test
    python -m blip3.evaluation.harness.write_tasks FOLDER --vlguard VLGUARD --phrases VLGUARD/utils/utils.py

    FOLDER/few_shot_textvqa_4_seed42.yaml    a task; the seeds' tasks are a group, few_shot_textvqa_4, with their mean
    FOLDER/few_shot_coco_4_similar_ptb.yaml  with --neighbours and --ptb
    FOLDER/vlguard_unsafes.yaml              and safe_unsafes, safe_safes; a group, vlguard

The names printed at the end are what `--tasks` takes.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import write_text
from ..safety import SUBSETS, read_refusal_phrases
from .few_shot import (
    BENCHMARKS,
    FORMS,
    MOST_SHOTS,
    Place,
    depends_on_seed,
    load_place,
    num_demonstrations,
    parse_place,
    resolve_place,
)
from .neighbours import read_origin
from .stemming import read_exceptions
from .vlguard import check_data

RULE = "rule"
PACK = "few_shot"
PLAIN = "plain"
SHOTS = (0, 4, 8)
SEED = 42  # OpenFlamingo's
VERSION = 1.1  # of few-shot tasks, another one wherever prompts change; lmms-eval shows it beside the score
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CLASSES = f"{__package__}.few_shot_task"


def few_shot_tasks(
    benchmark: str,
    form: str,
    shots: Sequence[int],
    seeds: Sequence[int],
    options: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Give the tasks of a benchmark by name, and for several seeds a group for each number of shots.

    Where nothing is sampled, as in most forms without shots, there is one task whatever the seeds.

    Args:
        benchmark: a key of `BENCHMARKS`, or `rule`.
        form: a key of `FORMS`.
        shots: numbers of demonstrations.
        seeds: of the demonstrations.
        options: further keys of the tasks' `metadata`; `neighbours` and `ptb` stand in the names too, since they
            change the numbers.
    """
    options = options or {}
    head = f"{PACK}_{benchmark}" if form == PLAIN else f"{PACK}_{form}_{benchmark}"
    end = ("_similar" if options.get("neighbours") else "") + ("_ptb" if options.get("ptb") else "")
    has_stems = "stems" in options
    metric = BENCHMARKS[benchmark].metric(has_stems=has_stems) if benchmark in BENCHMARKS else "exact"
    written: dict[str, dict[str, Any]] = {}
    for count in shots:
        names = []
        is_sampled = depends_on_seed(benchmark, form, count, has_neighbours=bool(options.get("neighbours")))
        of_count = seeds if is_sampled else seeds[:1]
        for seed in of_count:
            name = f"{head}_{count}{end}" + (f"_seed{seed}" if len(of_count) > 1 else "")
            asked = {"benchmark": benchmark, "form": form, "shots": count, "seed": seed, "num_fewshot": count}
            kind = "RuleTask" if benchmark == RULE else "FewShotTask"
            written[name] = {"task": name, "class": kind, "metadata": {"version": VERSION} | asked | options}
            names.append(name)
        if len(names) > 1:
            mean = {"metric": metric, "aggregation": "mean", "weight_by_size": False}
            group = f"{head}_{count}{end}"
            written[group] = {"group": group, "task": names, "aggregate_metric_list": [mean]}
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
    add = parser.add_argument
    add("folder", type=Path, help="to write to")
    add("--benchmark", nargs="+", choices=[*BENCHMARKS, RULE], help="(default: the six published ones)")
    add("--form", choices=FORMS, help=f"of prompts (default: {PLAIN})")
    add("--shots", type=int, nargs="+", help="(default: 0 4 8)")
    add("--seed", type=int, nargs="+", help=f"of sampled demonstrations (default: {SEED})")
    add("--questions", nargs="+", metavar="NAME=PATH:SPLIT", help="instead of those on the Hub")
    add("--demonstrations", nargs="+", metavar="NAME=PATH:SPLIT", help="rows with images and answers")
    add("--neighbours", nargs="+", metavar="NAME=FILE", help="show the most similar, see neighbours.py")
    add(
        "--stems", type=Path, metavar="FILE", help="of OpenFlamingo: open_flamingo/eval/ok_vqa_utils.py, read, not run"
    )
    add("--ptb", action="store_true", help="CIDEr with the COCO tool's own words, which needs Java")
    add("--vlguard", type=Path, metavar="FOLDER", help="of VLGuard: test.json and the folder test")
    add("--phrases", type=Path, metavar="FILE", help="of VLGuard: utils/utils.py, read, not run")
    return parser.parse_args(arguments)


def _asked(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Give every task that a command line asks for."""
    tasks: dict[str, dict[str, Any]] = {}
    if (given.vlguard is None) != (given.phrases is None):
        there, missing = ("--vlguard", "--phrases") if given.vlguard else ("--phrases", "--vlguard")
        raise ValueError(
            f"{there} was given without {missing}, but VLGuard's score counts answers with none of certain phrases. "
            "They are not part of this repository, as theirs has no licence: name their data and your copy of their "
            "utils/utils.py."
        )
    if given.vlguard:
        tasks |= vlguard_tasks(given.vlguard, given.phrases)
        if not given.benchmark:
            _check_none_left(given)
            return tasks
    return tasks | _few_shot(given)


_FEW_SHOT_OPTIONS = ("form", "shots", "seed", "questions", "demonstrations", "neighbours", "stems", "ptb")


def _check_none_left(given: argparse.Namespace) -> None:
    """Refuse options of few-shot tasks where none is written."""
    left = [f"--{name}" for name in _FEW_SHOT_OPTIONS if getattr(given, name)]
    if left:
        raise ValueError(
            f"{', '.join(left)} was given with --vlguard alone, which has no demonstrations. --benchmark was probably "
            "left out: name the benchmarks that are to be written too, or leave the options out."
        )


def _few_shot(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    benchmarks = given.benchmark or list(BENCHMARKS)
    shots, seeds = given.shots or list(SHOTS), given.seed or [SEED]
    form = given.form or PLAIN
    _check_numbers(shots, seeds)
    named = {
        name: _by_name(getattr(given, name), f"--{name}") for name in ("questions", "demonstrations", "neighbours")
    }
    _check_named(named, benchmarks)
    _check_for_some(given, benchmarks)
    tasks: dict[str, dict[str, Any]] = {}
    for benchmark in dict.fromkeys(benchmarks):
        own = {name: values[benchmark] for name, values in named.items() if benchmark in values}
        most = max(num_demonstrations(FORMS[form], count) for count in shots)
        _check_seeds(benchmark, seeds, own)
        options = _options(benchmark, own, most) if benchmark in BENCHMARKS else _rule_options(own, max(shots))
        if benchmark in BENCHMARKS and given.ptb and BENCHMARKS[benchmark].is_caption:
            options["ptb"] = True
        if benchmark in BENCHMARKS and given.stems and BENCHMARKS[benchmark].is_stemmed:
            options["stems"] = str(given.stems.resolve())
        tasks |= few_shot_tasks(benchmark, form, shots, seeds, options)
    return tasks


def _options(benchmark: str, own: dict[str, str], most: int) -> dict[str, Any]:
    """Give what is said of one benchmark, after comparing it with what `most` demonstrations need."""
    known = BENCHMARKS[benchmark]
    options: dict[str, Any] = {}
    questions, demonstrations = known.questions, known.demonstrations
    if "questions" in own:
        questions = _place(own["questions"], "test")
        options["questions"] = asdict(questions)
    if "demonstrations" in own:
        demonstrations = _place(own["demonstrations"], "train")
        options["demonstrations"] = asdict(demonstrations)
    if most and demonstrations is None:
        raise ValueError(
            f"{benchmark} is asked with {most} demonstrations, but its data set on the Hub ({questions.path}) has no "
            f"training split. None was named: give --demonstrations {benchmark}=PATH:SPLIT, a data set with the "
            f"columns image, question and {known.answers}, or name other benchmarks with --benchmark."
        )
    if "neighbours" in own and demonstrations is not None:
        path = Path(own["neighbours"]).resolve()
        origin = read_origin(path)
        origin.check(path, questions, demonstrations, most)
        if Path(demonstrations.path).exists():
            origin.check_count(path, len(load_place(demonstrations)))
        options["neighbours"] = str(path)
    return options


def _rule_options(own: dict[str, str], most: int) -> dict[str, Any]:
    """Give where the rules are, after counting the demonstrations in the first row if it is here."""
    if "questions" not in own:
        return {}
    place = _place(own["questions"], "test")
    there = len(load_place(place)[0]["answers"]) if Path(place.path).exists() else MOST_SHOTS
    if most > there:
        raise ValueError(
            f"{most} shots of {RULE} were asked for, but the rows of {place.path} have {there}. They were probably "
            "rendered with a smaller num_shots: ask for fewer, or render them again."
        )
    return {"questions": asdict(place)}


# -- Checks: what would only be found out inside lmms-eval, or never --------------------------------------------------


def _place(text: str, default_split: str) -> Place:
    """Read a place; a folder that is there is named by its whole path, as lmms-eval may start in another folder."""
    place = resolve_place(parse_place(text, default_split))
    if not Path(place.path).exists() and not _HUB_ID.fullmatch(place.path):
        raise ValueError(
            f"The data set {place.path!r} was named, but no such folder is in {Path.cwd()}, and a name on the Hub is "
            "owner/name. It is probably misspelt, or starts in another folder: name the whole path."
        )
    return place


def _check_numbers(shots: Sequence[int], seeds: Sequence[int]) -> None:
    wrong = [count for count in shots if not 0 <= count <= MOST_SHOTS]
    if wrong:
        raise ValueError(
            f"--shots has {wrong[0]}, but 0 to {MOST_SHOTS} demonstrations can be chosen for a question. The number "
            "was probably mistyped: correct it."
        )
    for option, numbers in (("--shots", shots), ("--seed", seeds)):
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{option} has {' '.join(map(str, numbers))}, but each number is expected once: a mean over equal "
                "runs would show no spread. One was probably copied: change it."
            )


def _check_named(named: dict[str, dict[str, str]], benchmarks: Sequence[str]) -> None:
    """Refuse what is said of a benchmark that is not written, or of rules, whose demonstrations are in their rows."""
    for option, values in named.items():
        known = [name for name in benchmarks if name != RULE or option == "questions"]
        left = [name for name in values if name not in known]
        if left:
            raise ValueError(
                f"--{option} names {left[0]}, but it is only for what is written: {', '.join(known) or 'nothing'}. "
                f"--benchmark was probably given without it, or needs none: add it there, or leave --{option} out."
            )


def _check_for_some(given: argparse.Namespace, benchmarks: Sequence[str]) -> None:
    """Refuse `--stems` and `--ptb` where no benchmark uses them; and read the stems."""
    asked = [BENCHMARKS[name] for name in benchmarks if name in BENCHMARKS]
    used = {
        "stems": (any(benchmark.is_stemmed for benchmark in asked), "okvqa"),
        "ptb": (any(benchmark.is_caption for benchmark in asked), "one of captions (coco, nocaps, textcaps)"),
    }
    for option, (is_used, whom) in used.items():
        if getattr(given, option) and not is_used:
            raise ValueError(
                f"--{option} was given for {', '.join(benchmarks)}, but it only changes the score of {whom}. The "
                f"benchmark was probably left out: add it to --benchmark, or leave --{option} out."
            )
    if given.stems:
        read_exceptions(given.stems)


def _check_seeds(benchmark: str, seeds: Sequence[int], own: dict[str, str]) -> None:
    """Refuse several seeds where nothing is sampled: the runs would be equal."""
    if len(seeds) > 1 and (benchmark == RULE or "neighbours" in own):
        what = "stand in its rows" if benchmark == RULE else "are the most similar ones"
        raise ValueError(
            f"--seed has {' '.join(map(str, seeds))} for {benchmark}, whose demonstrations {what}: the runs would be "
            "equal. Seeds were probably meant for other benchmarks: write those by a command of their own."
        )


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
