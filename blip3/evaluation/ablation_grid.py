# SPDX-License-Identifier: Apache-2.0
"""Grids of ablations: rows are checkpoints, or how they are trained; columns are tasks.

    title: Latents per view
    world: ../world.yaml                    files start at the grid's folder, checkpoints at the current one
    tasks: [read, count]                    of `blip3.evaluation.score`; rule has a column for each of `shots`
    start: base                             checkpoint that the first step starts from
    steps:                                  the same for each row, one after another
      resized: {new: ../model.yaml, around: base}
      reader: {tower: ../0_tower.yaml, set: {max_steps: 300}}
      tuning: {train: ../ablation.yaml}
    rows:                                   the first is what the others are compared with
      - {name: 16 latents}
      - {name: 8 latents, set: {resized.resampler_config.num_latents: 8}}
      - {name: as shipped, checkpoint: .}   no steps

Checkpoints start at the current folder, so the shipped grids run at the repository's root.

A step is of one kind: `new` (a model with newly initialised weights), `settings` (the same weights with other tiles or
sampling), `tower` (stage 0) or `train` (any other stage). Beside `around`, `keep: [language_model]` takes that part
alone. A base checkpoint has no chat template: `chat_template: CHECKPOINT` in a step of the kind `settings` takes
another's. Rows that are trained see as many samples and have the same seeds, or the grid is refused; `budget: varies`
allows other numbers of samples where that is what is compared.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..answering import DTYPES
from ..data.yaml_files import read_yaml
from ..refusals import check_choice, check_keys, is_of, show
from ..world.settings import WorldSettings, load_settings
from .tasks import TASKS

NEW, SETTINGS, TOWER, TRAIN = "new", "settings", "tower", "train"
KINDS = (NEW, SETTINGS, TOWER, TRAIN)
TRAINED = (TOWER, TRAIN)
CHANGEABLE = ("tile_grids", "token_sampling")
"""Settings of a trained checkpoint that none of its weights depends on in shape."""
OF_THE_MACHINE = ("log_every", "save_every", "keep_checkpoints", "num_workers", "notes")
"""Keys of a recipe that its result does not depend on."""
SAME, VARIES = "same", "varies"
TRIAL_BATCH = 2
"""Samples of an optimiser step in a trial."""
TRIAL_TITLE = " (a trial: its scores mean nothing)"

_GRID_KEYS = ("title", "world", "tasks", "shots", "start", "steps", "rows", "seeds", "budget", "score")
_ROW_KEYS = ("name", "set", "checkpoint", "start", "at", "base_resolution")
_SCORE_KEYS = ("batch_size", "dtype", "max_new_tokens")


@dataclass(frozen=True)
class Step:
    """One command that makes a checkpoint of another."""

    name: str
    """In the grid."""
    kind: str
    """One of `KINDS`."""
    file: Path | None
    """Recipe, or sizes of a new model; None for `settings`."""
    changes: Mapping[str, Any]
    """Values in place of the file's."""
    values: Mapping[str, Any]
    """What the result depends on: the file's values with the changes, without those of the machine."""
    around: str = ""
    """For `new`: checkpoint whose tower and language model are taken; for `settings`: whose chat template is."""
    keep: tuple[str, ...] = ()
    """For `new` with `around`: the parts that are taken; empty for both."""

    @property
    def batch(self) -> int:
        """Samples of one optimiser step; 0 where nothing is trained."""
        return self.values["batch_size"] * self.values.get("accumulation", 1) if self.kind in TRAINED else 0


@dataclass(frozen=True)
class Row:
    """One row: a checkpoint that is there, or the steps that make one."""

    name: str
    start: str
    """Checkpoint that the first step starts from, or that is scored where there are no steps; may be empty if the
    first step is `new`."""
    steps: tuple[Step, ...] = ()
    at: int | None = None
    """Optimiser step of the last one's run whose checkpoint is scored; None for its end."""
    base_resolution: bool = False
    """Show images as their global view alone, whatever the checkpoint does by default."""

    @property
    def file_name(self) -> str:
        """The name as a file has it."""
        return self.name.replace(" ", "-")

    @property
    def samples(self) -> int | None:
        """Samples that training shows, all steps together; None for a checkpoint that is there."""
        trained = [step for step in self.steps if step.batch]
        if not trained:
            return None
        whole = sum(step.batch * step.values["max_steps"] for step in trained)
        last = self.steps[-1]
        return whole if self.at is None else whole - last.batch * (last.values["max_steps"] - self.at)


@dataclass(frozen=True)
class Grid:
    """An ablation."""

    title: str
    world: WorldSettings
    """What questions are rendered from."""
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    shots: tuple[int, ...] = (0, 4, 8)
    seeds: tuple[int, ...] = (0,)
    """Of training: each row is trained once with each."""
    score: Mapping[str, Any] | None = None
    """`batch_size`, `dtype` and `max_new_tokens` of the scoring command, where they are not its own."""
    is_trial: bool = False
    """Whether trainings are as short as they can be."""


def load_grid(path: str | Path, every: Mapping[str, Any] | None = None, *, is_trial: bool = False) -> Grid:
    """Read a grid.

    Args:
        path: YAML file.
        every: values in place of those of every recipe in it.
        is_trial: with trainings as short as they can be and the first seed alone, to see that every row starts, trains
            and is scored. Points within a run keep their order, one optimiser step apart.

    Raises:
        ValueError: for unknown keys, a row that cannot be, or rows that are not comparable.
        FileNotFoundError: if a recipe is not there.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__} but a grid is a mapping of keys to values. It is probably "
            "another file: pass one of recipes/small/ablations."
        )
    check_keys(str(path), values, _GRID_KEYS)
    missing = [name for name in ("tasks", "rows") if not values.get(name)]
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)}, without which there is no table. The file is probably "
            f"unfinished: add {missing[0]}: with a list."
        )
    _check_lists(path, values)
    for task in values["tasks"]:
        check_choice(f"{path}: the task is", task, TASKS)
    _check_score(path, values.get("score") or {})
    if is_trial:
        values, shortest = _shortened(values)
        every = {**shortest, **(every or {})}
    rows = tuple(_row(path, values, row, every or {}) for row in values["rows"])
    _check_names(path, rows)
    _check_budgets(path, rows, values.get("budget", SAME))
    return Grid(
        title=str(values.get("title", path.stem)) + (TRIAL_TITLE if is_trial else ""),
        world=load_settings(path.parent / values["world"]) if "world" in values else WorldSettings(),
        tasks=tuple(values["tasks"]),
        rows=rows,
        shots=tuple(values.get("shots", Grid.shots)),
        seeds=tuple(values.get("seeds", Grid.seeds)),
        score=values.get("score"),
        is_trial=is_trial,
    )


def _shortened(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a grid with its points moved together and one seed, and the keys of its recipes that shorten them."""
    points = sorted({row["at"] for row in values["rows"] if "at" in row})
    rows = [row | {"at": points.index(row["at"]) + 1} if "at" in row else row for row in values["rows"]]
    length = max(1, len(points))
    every = {"max_steps": length, "batch_size": TRIAL_BATCH, "save_every": 1, "keep_checkpoints": length}
    return values | {"rows": rows, "seeds": list(values.get("seeds", Grid.seeds))[:1]}, every


def _row(path: Path, grid: Mapping[str, Any], values: Mapping[str, Any], every: Mapping[str, Any]) -> Row:
    """Read a row with the steps that it shares with the others."""
    name = str(values.get("name", ""))
    place = f"{path}, row {name!r}"
    check_keys(place, values, _ROW_KEYS)
    shown = bool(values.get("base_resolution", False))
    if "checkpoint" in values:
        if values.keys() & {"set", "start", "at"}:
            raise ValueError(
                f"{place} has a checkpoint and {', '.join(sorted(values.keys() & {'set', 'start', 'at'}))}, but a "
                "checkpoint that is there is only scored. Two rows were probably joined: keep one of the two."
            )
        return Row(name, str(values["checkpoint"]), base_resolution=shown)
    shared = grid.get("steps") or {}
    changes = _by_step(place, values.get("set") or {}, shared)
    steps = tuple(_step(path, key, step, changes.get(key, {}), every) for key, step in shared.items())
    row = Row(name, str(values.get("start", grid.get("start", ""))), steps, values.get("at"), shown)
    _check_start(place, row)
    if row.at is not None:
        _check_at(place, row)
    return row


def _by_step(place: str, changes: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort `STEP.key: value` by step."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        step, _, key = name.partition(".")
        if step not in steps or not key:
            raise ValueError(
                f"{place} sets {name!r} but STEP.KEY is expected, the step one of {', '.join(steps) or 'none'}. The "
                "step was probably left out: write it before a full stop."
            )
        found.setdefault(step, {})[key] = value
    return found


def _step(path: Path, name: str, given: Mapping[str, Any], changes: dict[str, Any], every: Mapping[str, Any]) -> Step:
    place = f"{path}, step {name!r}"
    check_keys(place, given, (*KINDS, "set", "around", "keep", "chat_template"))
    kinds = [kind for kind in KINDS if kind in given]
    if len(kinds) != 1 or ("around" in given and kinds != [NEW]) or ("chat_template" in given and kinds != [SETTINGS]):
        raise ValueError(
            f"{place} has the kinds {kinds} but exactly one of {', '.join(KINDS)} is expected, around with new "
            "alone and chat_template with settings. Two steps were probably joined: give each its own name."
        )
    if "keep" in given and "around" not in given:
        raise ValueError(
            f"{place} has keep {given['keep']} without around, but it names parts of the trained model there. The "
            "model was probably left out: add around: with a checkpoint."
        )
    (kind,) = kinds
    changes = {**(given.get("set") or {}), **changes}
    if kind == SETTINGS:
        changes = {**(given[SETTINGS] or {}), **changes}
        check_keys(place, changes, CHANGEABLE, "setting")
        return Step(name, kind, None, changes, changes, str(given.get("chat_template", "")))
    file = path.parent / str(given[kind])
    if kind in TRAINED:
        changes = {**changes, **every}
    values = _with_changes(read_yaml(file), changes)
    values = {key: value for key, value in values.items() if key not in ("model", "output", "seed", *OF_THE_MACHINE)}
    if isinstance(values.get("world"), dict) and "file" in values["world"]:
        rest = {key: value for key, value in values["world"].items() if key != "file"}
        values["world"] = read_yaml(file.parent / values["world"]["file"]) | rest
    elif kind == NEW and "world" in values:
        values["world"] = read_yaml(file.parent / values["world"])
    return Step(name, kind, file, changes, values, str(given.get("around", "")), tuple(given.get("keep", ())))


def _with_changes(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put `key` or `section.key` in the place of a file's values."""
    values = json.loads(json.dumps(values))
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values


# ------------------------------------------------------------------------------------------------------------ checks


def _check_lists(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a text or a number where a list belongs, and a number that is there twice."""
    numbers = (list[int], "numbers")
    for name, (hint, what) in {"tasks": (list[str], "names"), "shots": numbers, "seeds": numbers}.items():
        given = values.get(name, [])
        is_wrong = not is_of(given, hint) or len(set(given)) < len(given) or (name in values and not given)
        if is_wrong:
            raise ValueError(
                f"{path} has {name} {show(given)} but a list of {what} is expected, each once. The brackets were "
                f"probably left out, or one was copied: write {name}: [...]."
            )


def _check_score(path: Path, score: Mapping[str, Any]) -> None:
    check_keys(f"{path}, score", score, _SCORE_KEYS)
    if "dtype" in score:
        check_choice(f"{path}, score: the dtype is", score["dtype"], DTYPES)


def _check_names(path: Path, rows: Sequence[Row]) -> None:
    names = [row.name for row in rows]
    wrong = [name for name in names if not re.fullmatch(r"\w[\w .+-]*", name) or names.count(name) > 1]
    if wrong:
        raise ValueError(
            f"{path} has a row named {wrong[0]!r}, but names are letters, digits, blanks, . + - and _, each once (so "
            f"far {names}). It was probably copied from another row: give it its own name."
        )


def _check_start(place: str, row: Row) -> None:
    if not row.start and (not row.steps or row.steps[0].kind != NEW):
        raise ValueError(
            f"{place} has {len(row.steps)} steps and no checkpoint to start from, but only a step of the kind new "
            "starts from nothing. It was probably left out: add start: with a folder to the grid or the row."
        )


def _check_at(place: str, row: Row) -> None:
    """Refuse a point of a run that leaves no checkpoint there."""
    last = row.steps[-1] if row.steps else None
    if last is None or last.kind != TRAIN or row.at is None:
        raise ValueError(
            f"{place} has at {row.at} but its last step is {last.kind if last else 'missing'}: a point within a run "
            f"is one of a step of the kind {TRAIN}. Remove it, or put that step last."
        )
    recipe = _with_changes(read_yaml(str(last.file)), last.changes)
    steps, every, kept = recipe["max_steps"], recipe.get("save_every", 500), recipe.get("keep_checkpoints", 2)
    is_kept = row.at > 0 and row.at % every == 0 and steps // every * every - row.at < kept * every
    if not is_kept or row.at > steps:
        raise ValueError(
            f"{place} has at {row.at}, but the run of {steps} steps saves every {every} of them and keeps {kept}. "
            "save_every or keep_checkpoints was probably left as in the recipe: set both in the step."
        )


def _check_budgets(path: Path, rows: Sequence[Row], budget: str) -> None:
    """Refuse rows that see more or fewer samples than others, unless that is what is compared."""
    check_choice(f"{path}: the budget is", budget, (SAME, VARIES))
    found = {row.name: row.samples for row in rows if row.samples is not None}
    if budget == SAME and len(set(found.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in found.items())
        raise ValueError(
            f"{path} has rows of unequal training ({shown} samples), but rows are compared at the same budget. "
            "max_steps or batch_size of one was probably changed: make them equal, or write budget: varies where the "
            "number of samples is what you compare."
        )
