# SPDX-License-Identifier: Apache-2.0
"""What harnesses wrote, as measurements: one number with its model, benchmark, shots, harness and file.

lmms-eval     FOLDER/.../*_results.json      the newest of each model and task
VLMEvalKit    FOLDER/.../status.json         its summary of a run, beside the tables it was made from
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .few_shot import CIDER, UNSTEMMED, VQA_ACCURACY

NO_JUDGE = "not scored: needs a judge"
NOT_STEMMED = "answers not stemmed as the references are"
NEEDS_JUDGE = ("mmvet", "mathvista", "mmbench", "hallusion_bench", "MMVet", "MathVista", "LLaVABench")
"""Beginnings of tasks whose numbers mean nothing unless a judge model was asked."""

# Benchmark as `published.yaml` calls it -> task, metric and what makes it a number on the scale of published tables.
LMMS_EVAL = {
    "vqav2": ("vqav2_val", "exact_match", 100),
    "textvqa": ("textvqa_val", "exact_match", 100),
    "okvqa": ("ok_vqa_val2014", "exact_match", 100),
    "coco": ("coco_karpathy_test", "coco_CIDEr", 100),
    "nocaps": ("nocaps_val", "nocaps_CIDEr", 100),
    "textcaps": ("textcaps_val", "textcaps_CIDEr", 100),
    "seed-img": ("seedbench", "seed_image", 100),
    "mmbench": ("mmbench_en_dev", "gpt_eval_score", 1),
    "mmstar": ("mmstar", "average", 100),
    "realworldqa": ("realworldqa", "exact_match", 100),
    "mm-vet": ("mmvet", "gpt_eval_score", 1),
    "mmmu": ("mmmu_val", "mmmu_acc", 100),
    "mathvista": ("mathvista_testmini", "gpt_eval_score", 1),
    "ocrbench": ("ocrbench", "ocrbench_accuracy", 100),
    "pope": ("pope", "pope_f1_score", 100),
    "hallusionbench": ("hallusion_bench_image", "aAcc", 1),
    "qbench2": ("qbench2_dev", "qbench_acc", 100),
    "muirbench": ("muirbench", "muirbench_score_overall", 100),
    "mantis": ("mantis", "mantis_score", 100),
    "vlguard": ("vlguard_unsafes", "attack_success", 100),
}
KIT = {
    "textvqa": "TextVQA_VAL",
    "seed-img": "SEEDBench_IMG",
    "mmbench": "MMBench_DEV_EN",
    "mmstar": "MMStar",
    "realworldqa": "RealWorldQA",
    "mm-vet": "MMVet",
    "mmmu": "MMMU_DEV_VAL",
    "mathvista": "MathVista_MINI",
    "ocrbench": "OCRBench",
    "pope": "POPE",
    "hallusionbench": "HallusionBench",
    "blink": "BLINK",
    "muirbench": "MUIRBench",
}
BLINK_TASKS = 14
MME_MAXIMUM = 2800  # of perception and cognition together; published tables give the share of it


@dataclass(frozen=True)
class Measured:
    """One number of one model."""

    benchmark: str
    """As published.yaml calls it; the harness's own name for others."""
    model: str
    """As the harness names it."""
    value: float | None
    """On the scale of published tables; None where there is no number to show."""
    harness: str
    """With its version."""
    task: str
    """Name in the harness."""
    metric: str
    source: str
    """File that it was read from."""
    shots: int | None = None
    """Of a few-shot task."""
    form: str = ""
    """Of a few-shot task's prompts."""
    seed: int | None = None
    """Of a few-shot task's demonstrations."""
    count: int | None = None
    """Questions."""
    error: float | None = None
    """Standard error over questions, on the scale of the value."""
    spread: float | None = None
    """Standard deviation over seeds."""
    num_seeds: int = 1
    note: str = ""
    """What a reader must know."""


def read_folder(folder: str | Path, *, has_judge: bool = False) -> list[Measured]:
    """Read everything below a folder; of several results of one model and task the newest counts.

    Args:
        folder: output of lmms-eval, of VLMEvalKit, or a folder above several.
        has_judge: whether a judge model of the user's own was asked where a benchmark needs one.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    folder = Path(folder)
    found: dict[tuple[Any, ...], Measured] = {}
    for path in sorted(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime):
        for each in read_lmms_eval(path, has_judge=has_judge):
            found[each.harness, each.model, each.task, each.metric] = each
    for path in sorted(folder.rglob("status.json"), key=lambda path: path.stat().st_mtime):
        for each in read_kit(path, has_judge=has_judge):
            found[each.harness, each.model, each.task, each.metric] = each
    if not found:
        raise FileNotFoundError(
            f"{folder} holds neither *_results.json of lmms-eval nor status.json of VLMEvalKit. Another folder was "
            "probably named, or --output_path was left out: name the folder of a run that has ended."
        )
    return list(found.values())


def read_lmms_eval(path: Path, *, has_judge: bool = False) -> Iterator[Measured]:
    """Read a results file of lmms-eval: a number for each task, and for groups that have a score of their own."""
    run = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(run, dict) or not {"results", "configs"} <= run.keys():
        return  # answers to submit: tasks of captions write them beside, and their names end alike
    by_task = {task: (name, metric, scale) for name, (task, metric, scale) in LMMS_EVAL.items()}
    shared = {
        "model": model_of(run),
        "harness": _version_of(run),
        "source": path.name,
    }
    yield from _blink(run["results"], shared)
    for task, numbers in run["results"].items():
        settings = run["configs"].get(task, {})
        metadata = settings.get("metadata")
        asked = metadata if isinstance(metadata, dict) else {}
        counts = run.get("n-samples", {}).get(task) or {}
        count = counts.get("effective")
        if asked.get("benchmark"):
            found = _few_shot(task, numbers, asked, count, shared)
        elif task == "mme":
            found = _mme(numbers, count, shared)
        elif task in by_task:
            name, metric, scale = by_task[task]
            found = _measure(name, task, metric, scale, numbers, count, shared, has_judge)
        else:
            continue
        yield _mark_limited(found, counts)


def _version_of(run: dict[str, Any]) -> str:
    """Name the harness; version 0.7.3 records `unknown` where it was installed from the index."""
    version = str(run.get("lmms_eval_version") or "unknown")
    return "lmms-eval" if version.startswith("unknown") else f"lmms-eval {version}"


def _mark_limited(measured: Measured, counts: dict[str, int]) -> Measured:
    """Say beside a number that only some of the questions were asked."""
    asked, there = counts.get("effective"), counts.get("original")
    if asked is None or there is None or asked >= there or measured.value is None:
        return measured
    return replace(measured, note=", ".join(filter(None, [measured.note, f"{asked} of {there} questions"])))


def _find(numbers: dict[str, Any], metric: str) -> tuple[float | None, float | None]:
    """Give a score and its standard error, whatever filter the task has."""
    for key, value in numbers.items():
        name, _, filtered = key.partition(",")
        if name == metric and isinstance(value, int | float):
            error = numbers.get(f"{metric}_stderr,{filtered}")
            return float(value), float(error) if isinstance(error, int | float) else None
    return None, None


def _measure(
    name: str, task: str, metric: str, scale: float, numbers: Any, count: Any, shared: Any, has_judge: bool
) -> Measured:
    value, error = _find(numbers, metric)
    if task.startswith(NEEDS_JUDGE) and not has_judge:
        return Measured(name, value=None, task=task, metric=metric, count=count, note=NO_JUDGE, **shared)
    scaled = [None if number is None else scale * number for number in (value, error)]
    return Measured(name, value=scaled[0], error=scaled[1], task=task, metric=metric, count=count, **shared)


def _few_shot(task: str, numbers: Any, asked: dict[str, Any], count: Any, shared: Any) -> Measured:
    metrics = (VQA_ACCURACY, UNSTEMMED, CIDER, "exact")
    metric = next((name for name in metrics if _find(numbers, name)[0] is not None), "")
    value, error = _find(numbers, metric)
    scale = 1 if metric == CIDER else 100
    scaled = [None if number is None else scale * number for number in (value, error)]
    about = {key: asked[key] for key in ("shots", "form", "seed")}
    about |= {"note": NOT_STEMMED} if metric == UNSTEMMED else {}
    return Measured(
        asked["benchmark"], value=scaled[0], error=scaled[1], task=task, metric=metric, count=count, **about, **shared
    )


def _mme(numbers: Any, count: Any, shared: Any) -> Measured:
    """Give MME's two scores together as a share of the most there is."""
    scores = [_find(numbers, f"mme_{half}_score")[0] for half in ("perception", "cognition")]
    if None in scores:
        note = "one of MME's two halves has no questions here"
        return Measured("mme-norm", value=None, task="mme", metric="both", count=count, note=note, **shared)
    value = 100 * sum(score or 0.0 for score in scores) / MME_MAXIMUM
    return Measured("mme-norm", value=value, task="mme", metric="both", count=count, **shared)


def _blink(results: dict[str, Any], shared: Any) -> Iterator[Measured]:
    """Give the mean of BLINK's tasks, whose number the report's tables have."""
    found = [_find(numbers, "blink_acc")[0] for task, numbers in results.items() if task.startswith("blink_")]
    scores = [100 * score for score in found if score is not None]
    if scores:
        note = f"mean of {len(scores)} of BLINK's {BLINK_TASKS} tasks"
        yield Measured("blink", value=fmean(scores), task="blink", metric="blink_acc", note=note, **shared)


def model_of(run: dict[str, Any]) -> str:
    """Give the name of a run's model: the last part of its folder or of its name on the Hub, and its subfolder."""
    arguments = (run.get("config") or {}).get("model_args") or ""
    pairs = (
        dict(pair.partition("=")[::2] for pair in arguments.split(",")) if isinstance(arguments, str) else arguments
    )
    named = str(pairs.get("pretrained") or pairs.get("model_version") or run.get("model_name") or "model")
    parts = [named.rstrip("/").split("/")[-1], str(pairs.get("subfolder") or "")]
    return "/".join(part for part in parts if part)


def read_kit(path: Path, *, has_judge: bool = False) -> Iterator[Measured]:
    """Read VLMEvalKit's summary of a run; its numbers as it gives them, mostly percents."""
    run = json.loads(path.read_text(encoding="utf-8"))
    if "datasets" not in run:
        return
    by_table = {table: name for name, table in KIT.items()}
    shared = {"model": run["model_name"], "harness": f"VLMEvalKit {run.get('commit', '')}".strip()}
    for table, numbers in run["datasets"].items():
        metric, metrics = numbers.get("primary_metric"), numbers.get("metrics") or {}
        name = by_table.get(table)
        if name is None or not isinstance(metric, str) or metric not in metrics:
            continue
        asked = numbers.get("judge_model") or ""
        needs = table.startswith(NEEDS_JUDGE) and not table.startswith("MMBench")
        common = {"task": table, "metric": metric, "source": f"{path.parent.name}/{path.name}", **shared}
        if needs and not (has_judge and asked != "exact_matching"):
            yield Measured(name, value=None, note=NO_JUDGE, **common)
        else:
            fallback = "letters compared, no judge asked" if asked == "exact_matching" and name == "mmbench" else ""
            yield Measured(name, value=float(metrics[metric]), note=fallback, **common)


def average_seeds(measured: Iterable[Measured]) -> list[Measured]:
    """Make one number of the seeds of a few-shot task: their mean, and the standard deviation between them."""
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for each in measured:
        key = (each.benchmark, each.model, each.harness, each.metric, each.shots, each.form)
        groups.setdefault(key if each.shots is not None else (*key, each.task), []).append(each)
    averaged = []
    for group in groups.values():
        values = [each.value for each in group if each.value is not None]
        if len(values) < 2:
            averaged.append(group[0])
            continue
        first = group[0]
        seeds = f"seeds {', '.join(str(each.seed) for each in group)}"
        note = ", ".join(filter(None, [first.note, seeds]))
        mean = replace(first, value=fmean(values), error=None, seed=None, spread=stdev(values), note=note)
        averaged.append(replace(mean, num_seeds=len(values)))
    return averaged
