# SPDX-License-Identifier: Apache-2.0
"""Makes the checkpoints of a grid: what is there is kept, what a kill left unfinished goes on.

    OUTPUT/runs/STEP-DIGEST/final       the checkpoint after a step; DIGEST is of all that it depends on
    OUTPUT/runs/STEP-DIGEST/at-N        the same after N optimiser steps of it
    OUTPUT/runs/STEP-DIGEST/made.json   written last: without it the step is run again, and a training resumes

Rows that begin alike share their first steps. Training runs in processes of its own, by the commands that a person
would type.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import CODE_FILES, GOLDEN_FILE, code_folder, fingerprint, folder_of
from ..files import write_json
from ..hub import PACKAGE, ROOT
from .ablation_grid import NEW, SETTINGS, TOWER, TRAIN, Row, Step

MADE = "made.json"
FINAL = "final"
_MODULES = {
    NEW: "blip3.training.small.new_model",
    TOWER: "blip3.training.tower.train",
    TRAIN: "blip3.training.train",
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def places_of(row: Row, seed: int, output: Path) -> Iterator[tuple[Step, Path]]:
    """Give each step of a row with the folder of its run.

    Args:
        row: of a grid.
        seed: of its training.
        output: of the whole ablation.

    Raises:
        FileNotFoundError: if the checkpoint to start from is not there.
    """
    known = _fingerprint(row.start) if row.start and row.steps and row.steps[0].kind != NEW else ""
    for step in row.steps:
        depends: dict[str, Any] = {"kind": step.kind, "values": dict(step.values), "from": known}
        depends |= {} if step.kind == SETTINGS else {"seed": seed}
        depends |= {"around": _fingerprint(step.around)} if step.around else {}
        depends |= {"keep": list(step.keep)} if step.keep else {}
        known = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        yield step, output / "runs" / f"{step.name}-{known}"


def check_sources(row: Row, *, needs_template: bool) -> None:
    """Refuse a row whose checkpoints are not there.

    Args:
        row: of a grid.
        needs_template: whether it will be asked through a chat template.

    Raises:
        FileNotFoundError: if one is not there, or the chat template that the row will need.
    """
    is_new = bool(row.steps) and row.steps[0].kind == NEW
    for checkpoint in filter(None, (*(() if is_new else (row.start,)), *(step.around for step in row.steps))):
        _fingerprint(checkpoint)
    templates = [step.around for step in row.steps if step.kind == SETTINGS and step.around]
    if not needs_template or (is_new and not templates):  # a new model is written with a template
        return
    template = folder_of((templates or [row.start])[-1]) / "chat_template.jinja"
    if not template.is_file():
        raise FileNotFoundError(
            f"The row {row.name!r} is asked tasks of conversation, but {template} is not there. It is probably a base "
            "checkpoint, which has none: begin with a step {settings: {}, chat_template: CHECKPOINT}, or ask rule and "
            "caption."
        )


def _fingerprint(checkpoint: str) -> str:
    """Tell a grid's checkpoint apart, or say where it was looked for."""
    try:
        return fingerprint(checkpoint)
    except FileNotFoundError as error:
        if Path(checkpoint).is_absolute() or not (ROOT / checkpoint / "config.json").is_file():
            raise
        raise FileNotFoundError(
            f"The grid names the checkpoint {checkpoint!r}, which is expected in the current folder ({Path.cwd()}), "
            f"but is in {ROOT}. The command was probably given elsewhere than at the repository's root: give it there."
        ) from error


def is_made(run: Path) -> bool:
    """Tell whether a step was run to its end."""
    return (run / MADE).is_file()


def make_checkpoint(row: Row, seed: int, output: Path) -> Path:
    """Give the checkpoint of a row, after running the steps that were not.

    Args:
        row: of a grid.
        seed: of its training.
        output: of the whole ablation.

    Raises:
        FileNotFoundError: if the checkpoint to start from is not there.
        RuntimeError: if a command fails.
        ValueError: if a checkpoint was changed since it was made.
    """
    place, run = Path(row.start), None
    for step, run in places_of(row, seed, output):
        if is_made(run):
            _check_unchanged(run)
        else:
            _make(step, place, seed, run)
        place = run / FINAL
    return place if run is None or row.at is None else _take(run, row.at)


def _make(step: Step, source: Path, seed: int, run: Path) -> None:
    """Run one step, and note what came of it."""
    begun = time.monotonic()
    run.mkdir(parents=True, exist_ok=True)
    if step.kind == SETTINGS:
        _copy_with_settings(source, run / FINAL, step.changes, step.around)
        command: list[str] = []
    else:
        if step.kind == NEW:
            shutil.rmtree(run / FINAL, ignore_errors=True)
        command = command_of(step, source, seed, run)
        _run(command, step.name)
    made = {"step": step.name, "kind": step.kind, "values": dict(step.values), "seed": seed, "from": str(source)}
    seconds = round(time.monotonic() - begun, 1)
    write_json(run / MADE, made | {"command": command, "seconds": seconds, "fingerprint": fingerprint(run / FINAL)})


def command_of(step: Step, source: Path, seed: int, run: Path) -> list[str]:
    """Give the command of a step, without the interpreter.

    Args:
        step: of any kind but `settings`.
        source: checkpoint that it starts from.
        seed: of weights and samples.
        run: folder for all that it writes.
    """
    changes = [f"{key}={json.dumps(value)}" for key, value in step.changes.items()]
    if step.kind == NEW:
        around = ["--around", step.around] if step.around else []
        around += ["--keep", *step.keep] if step.keep else []
        return ["-m", _MODULES[NEW], str(step.file), str(run / FINAL), *changes, "--seed", str(seed), *around]
    return ["-m", _MODULES[step.kind], str(step.file), f"model={source}", f"output={run}", *changes, f"seed={seed}"]


def _run(command: list[str], name: str) -> None:
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]))
    status = subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    if status:
        raise RuntimeError(
            f"The step {name!r} ended with status {status}, but 0 was expected. Its message is above; the memory was "
            f"probably exceeded, or a file is missing. Correct that and give the same command again. The step was: "
            f"python {' '.join(command)}"
        )


def _check_unchanged(run: Path) -> None:
    known, found = json.loads((run / MADE).read_text(encoding="utf-8"))["fingerprint"], fingerprint(run / FINAL)
    if found != known:
        raise ValueError(
            f"{run / FINAL} has the fingerprint {found}, but {known} was noted when it was made. Its files were "
            f"probably edited since: remove {run} to make it again."
        )


def _copy_with_settings(source: Path, output: Path, settings: Mapping[str, Any], template: str) -> None:
    """Copy a checkpoint with its code, other tiles or sampling in every file that names them.

    Args:
        source: checkpoint.
        output: folder to make.
        settings: to change.
        template: checkpoint whose chat template is taken; empty to keep what there is.

    Raises:
        ValueError: for a setting that no file has.
    """
    folder, unfinished = folder_of(source), output.with_name(f".{output.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".jinja", ".json", ".safetensors") and path.name != GOLDEN_FILE:
            shutil.copyfile(path, unfinished / path.name)
    for name in CODE_FILES:
        shutil.copyfile(code_folder(folder) / name, unfinished / name)
    if template:
        shutil.copyfile(folder_of(template) / "chat_template.jinja", unfinished / "chat_template.jinja")
    left = set(settings)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        path = unfinished / name
        values = json.loads(path.read_text(encoding="utf-8"))
        for part in (values, values.get("resampler_config", {})):
            found = settings.keys() & part.keys()
            part.update({key: settings[key] for key in found})
            left -= found
        write_json(path, values)
    if left:
        raise ValueError(
            f"{folder} has no setting {', '.join(sorted(left))}, which the step is to change. The checkpoint was "
            "probably made by an earlier version: convert or train it again."
        )
    unfinished.replace(output)


def _take(run: Path, at: int) -> Path:
    """Give the checkpoint after some optimiser steps of a run, whole: its weights with the end's other files."""
    output, unfinished = run / f"at-{at}", run / f".at-{at}"
    if output.is_dir():
        return output
    weights = [path for pattern in _WEIGHTS for path in (run / f"checkpoint-{at}").glob(pattern)]
    if not weights:
        raise FileNotFoundError(
            f"{run / f'checkpoint-{at}'} has no weights, but the row is about that point of the run. It was probably "
            f"removed to save disk: remove {run} to train again."
        )
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run / FINAL, unfinished, ignore=shutil.ignore_patterns(*_WEIGHTS))
    for path in weights:
        shutil.copyfile(path, unfinished / path.name)
    unfinished.replace(output)
    return output
