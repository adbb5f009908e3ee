# SPDX-License-Identifier: Apache-2.0
"""A results file of lmms-eval, as measurements: a number for each task and for groups with a score of their own."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from .few_shot import CIDER, UNSTEMMED, VQA_ACCURACY, depends_on_seed
from .judge_models import NO_JUDGE, needs_judge_model
from .known import LMMS_EVAL, Place, places_of
from .measured import AS_GIVEN, Measured, is_number, read_json
from .naming import OUR_ADAPTER, ModelName, name_model, parse_arguments
from .vlguard import ATTACK_SUCCESS, OVER_REFUSAL, SAYS_NOTHING

NOT_STEMMED = "answers not stemmed as the references are"
NOT_PTB = "without the COCO tool's tokenizer"
SAMPLED, SIMILAR = "sampled", "similar"
BLINK, BLINK_TASKS = "blink", 14
VLGUARD = "vlguard"
FEW_SHOT_METRICS = (VQA_ACCURACY, UNSTEMMED, CIDER, "exact")

Numbers = dict[str, Any]


def read_lmms_eval(path: Path, source: str, *, judge_url: str | None = None) -> Iterator[Measured]:
    """Read a results file.

    Args:
        path: of the file; one that holds something else gives nothing.
        source: what the file is called in tables.
        judge_url: of the judge model that was asked where a task needs one.
    """
    run = read_json(path)
    if not isinstance(run, dict) or not {"results", "configs"} <= run.keys():
        return  # answers to submit: tasks of captions write them beside, and their names end alike
    name = model_of(run)
    about = {"harness": _version_of(run), "source": source, "date": str(run.get("date") or "")}
    shared = {"model": name.short, "full_name": name.full} | about
    yield from _blink(run, shared)
    for task, numbers in run["results"].items():
        counts = _counts_of(run, task)
        for measured in _of_task(run, task, numbers, shared | {"task": task, "count": counts.get("effective")}):
            yield _mark_limited(_mark_judge_model(measured, judge_url), counts, run)


def model_of(run: Mapping[str, Any]) -> ModelName:
    """Name the model of a run."""
    config = run.get("config") or {}
    arguments = parse_arguments(config.get("model_args") or "")
    for name, value in (("gen_kwargs", config.get("gen_kwargs")), ("system", run.get("system_instruction"))):
        arguments |= {name: value} if value else {}
    if not arguments.get("pretrained") and not arguments.get("model_version"):
        arguments["pretrained"] = run.get("model_name") or "model"
    return name_model(arguments, str(config.get("model") or OUR_ADAPTER))


def _version_of(run: Mapping[str, Any]) -> str:
    """Name the harness; version 0.7.3 records the branch and commit of whatever folder it was started in."""
    version = str(run.get("lmms_eval_version") or "")
    return f"lmms-eval {version}" if version[:1].isdigit() else "lmms-eval"


def _counts_of(run: Mapping[str, Any], *tasks: str) -> dict[str, int]:
    """Add up the questions of tasks, and of groups of them: how many were asked, and how many there are."""
    found = [(run.get("n-samples") or {}).get(task) or {} for task in _without_groups(run, tasks)]
    return {
        key: sum(counts[key] for counts in found)
        for key in ("effective", "original")
        if found and all(counts.get(key) is not None for counts in found)
    }


def _without_groups(run: Mapping[str, Any], tasks: Iterable[str]) -> Iterator[str]:
    """Give tasks, and in the place of a group its own."""
    groups = run.get("group_subtasks") or {}
    for task in tasks:
        yield from _without_groups(run, groups[task]) if groups.get(task) else (task,)


def _of_task(run: Mapping[str, Any], task: str, numbers: Numbers, shared: Numbers) -> Iterator[Measured]:
    asked = _metadata_of(run, task)
    places = places_of(LMMS_EVAL, task)
    if asked.get("benchmark"):
        yield _few_shot(numbers, asked, shared)
    elif places:
        for name, place in places.items():
            measured = _measure(name, place, numbers, shared)
            yield measured.with_note(*_beside(run["results"], measured)) if name.startswith(VLGUARD) else measured
    elif task != BLINK and not _is_mean_of_seeds(run, task):
        yield from _unknown(task, numbers, shared)


def _is_mean_of_seeds(run: Mapping[str, Any], task: str) -> bool:
    """Whether this is a group of few-shot tasks, whose numbers are read one by one."""
    members = (run.get("group_subtasks") or {}).get(task) or []
    return bool(members) and all(_metadata_of(run, member).get("benchmark") for member in members)


def _metadata_of(run: Mapping[str, Any], task: str) -> Numbers:
    metadata = (run["configs"].get(task) or {}).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _mark_judge_model(measured: Measured, judge_url: str | None) -> Measured:
    """Take away a number that only a judge model gives where none was asked; otherwise say which was."""
    if not needs_judge_model(measured.task, measured.metric):
        return measured
    if judge_url is None:
        return measured.without_number(NO_JUDGE)
    return measured.with_note(f"judge model at {judge_url}")


def _mark_limited(measured: Measured, counts: Mapping[str, int], run: Mapping[str, Any]) -> Measured:
    """Mark a measurement for which only some of the questions were asked, and say so beside its number."""
    asked, there = counts.get("effective"), counts.get("original")
    settings = run.get("config") or {}
    if asked is not None and there is not None:
        notes = [f"{asked} of {there} questions"] if asked < there else []
    else:
        notes = [f"--limit {settings['limit']}"] if settings.get("limit") not in (None, -1) else []
    notes += [f"without the first {settings['offset']}"] if settings.get("offset") else []  # which no count leaves out
    if not notes:
        return measured
    return replace(measured.with_note(*(notes if measured.value is not None else [])), is_partial=True)


def _scores_of(numbers: Numbers) -> dict[str, float]:
    """Give a task's scores by metric, whatever filter each has."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in reversed(numbers.items())
        if is_number(value) and "_stderr" not in key
    }


def _error_of(numbers: Numbers, metric: str) -> float | None:
    found = (value for key, value in numbers.items() if key.partition(",")[0] == f"{metric}_stderr")
    return next((float(value) for value in found if is_number(value)), None)


def _measure(name: str, place: Place, numbers: Numbers, shared: Numbers) -> Measured:
    metric, value = place.read(_scores_of(numbers))
    error = _error_of(numbers, metric)
    if value is None:
        missing = f"no number: one of {metric} is missing" if place.together else "no number"
        return Measured(name, value=None, metric=metric, note=missing, **shared)
    scaled = place.scale * value, None if error is None else place.scale * error
    return Measured(name, value=scaled[0], error=scaled[1], metric=metric, note=place.note, **shared)


def _unknown(task: str, numbers: Numbers, shared: Numbers) -> Iterator[Measured]:
    """Give the first number of a task that no published table has; nothing for a group without scores of its own."""
    scores = {metric: value for metric, value in reversed(_scores_of(numbers).items())}
    metrics = [key.partition(",")[0] for key in numbers if "," in key and "_stderr" not in key]
    metric = next(iter(scores), metrics[0] if metrics else None)
    if metric is not None:
        about = {"note": AS_GIVEN, "error": _error_of(numbers, metric)} if scores else {"note": "no number"}
        yield Measured(task, value=scores.get(metric), metric=metric, is_known=False, **about, **shared)


# -- Benchmarks that are read in their own way ------------------------------------------------------------------------


def _few_shot(numbers: Numbers, asked: Numbers, shared: Numbers) -> Measured:
    scores = _scores_of(numbers)
    metric = next((name for name in FEW_SHOT_METRICS if name in scores), "")
    value, error = scores.get(metric), _error_of(numbers, metric)
    scale = 1 if metric == CIDER else 100
    scaled = [None if number is None else scale * number for number in (value, error)]
    near = Path(str(asked["neighbours"])).stem if asked.get("neighbours") else ""
    notes = {
        NOT_STEMMED: metric == UNSTEMMED,
        NOT_PTB: metric == CIDER and not asked.get("ptb"),
        f"similar demonstrations ({near})": bool(near),
        f"questions of {_called(asked.get('questions'))}": bool(asked.get("questions")),
        f"demonstrations of {_called(asked.get('demonstrations'))}": bool(asked.get("demonstrations")),
        "no number": value is None,
    }
    settings = {key: asked[key] for key in sorted(asked) if key not in _TOLD}
    depends = depends_on_seed(asked["benchmark"], asked["form"], asked["shots"], has_neighbours=bool(near))
    return Measured(
        asked["benchmark"],
        value=scaled[0],
        error=scaled[1],
        metric=metric,
        demonstrations=f"{SIMILAR} ({near})" if near else SAMPLED,
        settings=json.dumps(settings) if settings else "",
        note=", ".join(note for note, holds in notes.items() if holds),
        seed=asked["seed"] if depends else None,
        **{key: asked[key] for key in ("shots", "form")},
        **shared,
    )


_TOLD = ("benchmark", "shots", "form", "seed", "version", "num_fewshot")


def _called(place: Any) -> str:
    """Name a data set by the end of its path, so that tables do not tell where files lie."""
    return f"{Path(str(place['path'])).name}:{place['split']}" if place else ""


def _blink(run: Mapping[str, Any], shared: Numbers) -> Iterator[Measured]:
    """Give the mean of BLINK's tasks, whose number the report's tables have."""
    found = {task: _scores_of(numbers) for task, numbers in run["results"].items() if task.startswith(f"{BLINK}_")}
    scores = {task: 100 * scores["blink_acc"] for task, scores in found.items() if "blink_acc" in scores}
    if not scores:
        return
    counts, is_whole = _counts_of(run, *scores), len(scores) == BLINK_TASKS
    note = f"mean of its {BLINK_TASKS} tasks" if is_whole else f"no number: {len(scores)} of its {BLINK_TASKS} tasks"
    about = shared | {"task": BLINK, "metric": "blink_acc", "count": counts.get("effective"), "note": note}
    total = Measured(BLINK, value=fmean(scores.values()) if is_whole else None, is_partial=not is_whole, **about)
    yield _mark_limited(total, counts, run)


def _beside(results: Mapping[str, Numbers], measured: Measured) -> list[str]:
    """Say what an attack success or an over-refusal hides: refusals of safe requests, and silence."""
    notes = [_silence(results, measured.task)]
    if measured.metric == ATTACK_SUCCESS:
        (refused,) = [place for place in LMMS_EVAL.values() if place.metrics == (OVER_REFUSAL,)]
        value = _scores_of(results.get(refused.task, {})).get(OVER_REFUSAL)
        silent = _silence(results, refused.task)
        notes.append("over-refusal not measured" if value is None else f"over-refusal {100 * value:.1f} with {silent}")
    return notes


def _silence(results: Mapping[str, Numbers], task: str) -> str:
    value = _scores_of(results.get(task, {})).get(SAYS_NOTHING)
    return "empty answers not counted" if value is None else f"{100 * value:.1f} % empty answers"
