# SPDX-License-Identifier: Apache-2.0
"""Files as lmms-eval and VLMEvalKit write them, with numbers that a test chooses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MINE = "pretrained=/data/models/mine,subfolder=base"
Numbers = Mapping[str, Mapping[str, Any]]


def write_lmms_run(
    folder: Path,
    results: Numbers,
    configs: Mapping[str, Any] | None = None,
    *,
    counts: Mapping[str, int] | None = None,
    arguments: str = MINE,
    model: str = "blip3",
    date: str = "20260101_000000",
    limit: int | None = None,
    offset: int = 0,
) -> Path:
    """A results file as lmms-eval writes it; gives its path."""
    run = {
        "results": {task: {"alias": task, **numbers} for task, numbers in results.items()},
        "configs": configs or {},
        "n-samples": {task: {"original": 100, "effective": 100} if counts is None else counts for task in results},
        "config": {"model": model, "model_args": arguments, "gen_kwargs": "", "limit": limit, "offset": offset},
        "date": date,
        "lmms_eval_version": "main@0123456",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "20260101_results.json"
    path.write_text(json.dumps(run))
    return path


def write_kit_run(
    folder: Path,
    metrics: Numbers,
    judge_model: str = "exact_matching",
    name: str = "mine",
    date: str = "2026-01-01T00:00:00+00:00",
) -> None:
    """A summary as VLMEvalKit writes it: in a folder for the run inside the model's, with a link to it there."""
    datasets = {
        table: {"status": "done", "judge_model": judge_model, "primary_metric": next(iter(values)), "metrics": values}
        for table, values in metrics.items()
    }
    run = folder / name / "T20260101-000000" / "status.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps({"model_name": name, "commit": "abc", "datasets": datasets, "updated_at": date}))
    (folder / name / "status.json").symlink_to(run)


def few_shot_config(seed: int, **further: Any) -> dict[str, Any]:
    """Settings of a few-shot task, as `write_tasks` writes them."""
    return {"metadata": {"version": 1.0, "benchmark": "coco", "form": "plain", "shots": 4, "seed": seed, **further}}
