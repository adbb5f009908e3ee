# SPDX-License-Identifier: Apache-2.0
r"""Score checkpoints on the held-out rendered world.

    python -m blip3.evaluation.score --model . --world recipes/small/world.yaml --output outputs/scores
    python -m blip3.evaluation.score --model any-res=. base=. --base-resolution base --task read --output FOLDER

    FOLDER/request.json                     what was asked for; other settings in the same folder are refused
    FOLDER/predictions/MODEL/TASK.jsonl     every answer; complete files are kept, unfinished ones continued
    FOLDER/results.json  table.md  plot.png  samples.md

Run the same command again after an interruption. More tasks and more models may be added to a folder.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checkpoints import fingerprint
from ..world.settings import WorldSettings, load_settings
from .answer import DTYPES, Answerer, Checkpoint, pick_device
from .report import Result, write_report
from .tasks import SPLIT, TASKS, Question, make_questions

Job = tuple[str, int | None]  # task, number of shots


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """One run, as the command line gives it."""

    models: dict[str, Path]
    """Name -> folder, in the order of the table; differences are taken from the first."""
    output: Path
    """Folder, made if need be."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Keys of `TASKS`."""
    world: WorldSettings = dataclasses.field(default_factory=WorldSettings)
    """What may be rendered; a model is scored on the world it was trained for."""
    count: int = 1000
    """Questions of each task."""
    seed: int = 0
    """Of every task's series."""
    shots: tuple[int, ...] = (0, 4, 8)
    """For the task `rule`: a row for each number of shots."""
    base_resolution: tuple[str, ...] = ()
    """Names of the models that see the global view alone, whatever their image processors do by default."""
    subfolder: str = ""
    """Inside each folder."""
    batch_size: int = 16
    """Questions asked at once."""
    max_new_tokens: int = 48
    """Of one answer."""
    dtype: str = "auto"
    """One of `answer.DTYPES`."""
    device: str = "auto"
    """Such as `cpu` or `cuda`; `auto` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)} but must be at least 1. It was probably meant to mean 'all': "
                    "write a number."
                )
        if "caption" in self.tasks and self.count < 2:
            raise ValueError(
                "1 caption was asked for but CIDEr counts rare words over several. A trial run was probably meant: "
                "ask for 2, or name other tasks."
            )
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"The task is {task!r} but must be one of {', '.join(TASKS)}. Correct it.")
        if "rule" in self.tasks and not all(0 <= shots <= self.world.num_shots for shots in self.shots):
            raise ValueError(
                f"Shots {list(self.shots)} were asked for but this world samples {self.world.num_shots} of them. "
                "num_shots is probably smaller in the world's file: ask for fewer, or change the file."
            )
        unknown = [name for name in self.base_resolution if name not in self.models]
        if unknown or not self.models:
            raise ValueError(
                f"The base resolution is asked for {unknown} but the models are {list(self.models)}. A name was "
                "probably left out: write --model NAME=FOLDER."
            )

    @property
    def jobs(self) -> list[Job]:
        """Rows of the table: (task, number of shots)."""
        jobs: list[Job] = []
        for task in self.tasks:
            jobs += [(task, shots) for shots in self.shots] if TASKS[task].has_shots else [(task, None)]
        return jobs


def load_checkpoint(settings: ScoreSettings, name: str) -> Answerer:
    """Load one of the models."""
    return Checkpoint(
        settings.models[name],
        settings.subfolder,
        base_resolution=name in settings.base_resolution,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        device=settings.device,
    )


def score(settings: ScoreSettings, load: Callable[[ScoreSettings, str], Answerer] = load_checkpoint) -> list[Result]:
    """Ask every model everything that has no answer yet, and write the report.

    Args:
        settings: of the run.
        load: (settings, name of a model) -> what answers; for tests. Called only for models with questions left.

    Returns:
        Each model's results, in the order of the table.

    Raises:
        ValueError: if the output folder holds answers of other settings.
        FileNotFoundError: if a folder holds no checkpoint.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    about = _check_request(settings)
    rendered: dict[Job, list[Question]] = {}
    results = []
    for name in settings.models:
        answerer: Answerer | None = None
        for task, num_shots in settings.jobs:
            if (task, num_shots) not in rendered:
                rendered[task, num_shots] = make_questions(
                    task, settings.count, settings.seed, settings.world, num_shots
                )
            questions, job = rendered[task, num_shots], _job_name(task, num_shots)
            file = AnswerFile(settings.output / "predictions" / name / f"{job}.jsonl", questions)
            if not file.is_complete:
                answerer = answerer or load(settings, name)
                _ask(answerer, file, settings.batch_size, f"{name}: {job}")
            answers = file.read()
            scores = TASKS[task].score(questions, answers)
            results.append(Result(name, task, num_shots, questions, answers, scores))
    write_report(results, settings.output, about)
    return results


def _ask(answerer: Answerer, file: "AnswerFile", batch_size: int, description: str) -> None:
    """Ask what is left, batches of similar length, the longest first so that memory runs out early or never."""
    questions = sorted(file.questions, key=lambda question: (-answerer.length(question), question.id))
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    done = file.read_unfinished()
    with tqdm(total=len(questions), desc=description, unit="question", disable=None) as bar:
        for batch in batches:
            # A batch counts as a whole: asked in other company, a question could get another answer by rounding.
            if not all(question.id in done for question in batch):
                file.append(batch, answerer.answer(batch))
            bar.update(len(batch))
    file.finish()


def _job_name(task: str, num_shots: int | None) -> str:
    return task if num_shots is None else f"{task}-{num_shots}-shots"


class AnswerFile:
    """The answers of one model to one task: appended batch by batch, then put in order.

    Args:
        path: of the complete file; the unfinished one lies beside it.
        questions: all of them, in order.
    """

    def __init__(self, path: Path, questions: Sequence[Question]):
        self.path, self.questions = path, questions
        self.unfinished = path.with_name(f"{path.name}.unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether every question has its answer."""
        return self.path.is_file()

    def read(self) -> list[str]:
        """Give the answers of a complete file, in the order of the questions.

        Raises:
            ValueError: if the file is of other questions.
        """
        lines = _parse(self.path, self.path.read_bytes())
        found = [(line["id"], line["question"], line["truth"]) for line in lines]
        wanted = [(question.id, question.text, question.reference) for question in self.questions]
        if found != wanted:
            row = next((row for row, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
            place = f"line {row + 1}" if row is not None else f"{len(found)} lines for {len(wanted)} questions"
            raise ValueError(
                f"{self.path} does not answer the questions of this run ({place}). The world or the file was probably "
                "changed since: delete the file to ask again, or name another output."
            )
        return [line["answer"] for line in lines]

    def read_unfinished(self) -> dict[str, str]:
        """Give the answers so far by question id, and cut off a line that an interruption left half written."""
        if not self.unfinished.is_file():
            return {}
        data = self.unfinished.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.unfinished, len(whole))
        return {line["id"]: line["answer"] for line in _parse(self.unfinished, whole)}

    def append(self, questions: Sequence[Question], answers: Sequence[str]) -> None:
        """Write the answers of a batch to the disk."""
        lines = [
            json.dumps({"id": question.id, "answer": answer}, ensure_ascii=False)
            for question, answer in zip(questions, answers, strict=True)
        ]
        with self.unfinished.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the complete file, which appears whole or not at all, and drop the unfinished one."""
        answers = self.read_unfinished()
        draft = self.path.with_name(f"{self.path.name}.draft")
        with draft.open("w", encoding="utf-8") as file:
            for question in self.questions:
                line = {"id": question.id, "question": question.text, "truth": question.reference}
                file.write(json.dumps(line | {"answer": answers[question.id]}, ensure_ascii=False) + "\n")
        draft.replace(self.path)
        self.unfinished.unlink()


def _parse(path: Path, data: bytes) -> list[dict[str, str]]:
    """Read JSON lines; only a line feed ends a line."""
    lines = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {path} is {line[:40]!r} but an answer as JSON is expected ({error}). The file was "
                "probably edited or damaged: delete it, its questions are then asked again."
            ) from error
    return lines


def _check_request(settings: ScoreSettings) -> dict[str, Any]:
    """Compare with what the folder holds, write the union, and give what results.json says about the run.

    Raises:
        ValueError: if an answer would depend on other settings than those already there.
    """
    compared: dict[str, Any] = {
        "split": SPLIT,
        "seed": settings.seed,
        "count": settings.count,
        "world": json.loads(json.dumps(dataclasses.asdict(settings.world))),
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "device": pick_device(settings.device),
    }
    models = {
        name: {
            "files": fingerprint(folder, settings.subfolder),
            "base_resolution": name in settings.base_resolution,
        }
        for name, folder in settings.models.items()
    }
    path = settings.output / "request.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        ours = {"settings": compared, "models": models}
        for part, values in ours.items():
            known = there[part]
            different = [name for name in values if name in known and known[name] != values[name]]
            if different:
                name = different[0]
                raise ValueError(
                    f"{settings.output} holds answers with {part} {name} = {_short(known[name])}, but this run has "
                    f"{_short(values[name])}. Answers of two kinds would be mixed: repeat the first command to "
                    "continue it, or name another output."
                )
        models = there["models"] | models
    path.write_text(json.dumps({"settings": compared, "models": models}, indent=2) + "\n", encoding="utf-8")
    packages = ("numpy", "pillow", "tokenizers", "torch", "transformers")
    return {
        "settings": compared | {"tasks": list(settings.tasks), "shots": list(settings.shots)},
        "models": {name: {"folder": str(settings.models[name]), **models[name]} for name in settings.models},
        "made_with": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# --------------------------------------------------------------------------------------------------- command line


def parse_models(given: Sequence[str], subfolder: str = "") -> dict[str, Path]:
    """Read `NAME=FOLDER` or `FOLDER`, which is then named after itself (or after the subfolder).

    Raises:
        ValueError: for a name that is no file name, or given twice.
    """
    models: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():
            folder, name = text, subfolder or Path(text).resolve().name
        name = name.replace("/", "-") if not sign else name
        if not re.fullmatch(r"\w[\w.+-]*", name) or name in models:
            raise ValueError(
                f"The model {text!r} is named {name!r}, but names are letters, digits, . + - and _, each once"
                f"{f' (so far {list(models)})' if models else ''}. Two folders probably end alike: write NAME=FOLDER."
            )
        models[name] = Path(folder)
    return models


def parse_arguments(arguments: Sequence[str] | None = None) -> ScoreSettings:
    """Read the command line; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m blip3.evaluation.score", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]FOLDER", help="checkpoints, side by side in one table")
    add("--subfolder", default="", help="inside each folder (default: none)")
    add(
        "--world", type=Path, metavar="FILE", help="YAML of world settings (default: those of blip3/world/settings.py)"
    )
    add("--task", nargs="+", choices=["all", *TASKS], default=["all"], help="tasks (default: all)")
    add("--count", type=int, default=1000, help="questions of each task (default: 1000)")
    add("--seed", type=int, default=0, help="of the series (default: 0)")
    add("--shots", type=int, nargs="+", default=[0, 4, 8], help="of the task rule, a row each (default: 0 4 8)")
    add(
        "--base-resolution",
        nargs="*",
        metavar="NAME",
        help="show these models (without names: all) each image as its global view alone (default: as each model's "
        "image processor is configured)",
    )
    add("--batch-size", type=int, default=16, help="questions at once (default: 16)")
    add("--max-new-tokens", type=int, default=48, help="tokens of one answer (default: 48)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's (default: auto)")
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for answers and report; continued if there")
    given = parser.parse_args(arguments)
    try:
        models = parse_models(given.model, given.subfolder)
        base = () if given.base_resolution is None else tuple(given.base_resolution or models)
        return ScoreSettings(
            models=models,
            output=given.output,
            tasks=tuple(TASKS) if "all" in given.task else tuple(dict.fromkeys(given.task)),
            world=WorldSettings() if given.world is None else load_settings(given.world),
            count=given.count,
            seed=given.seed,
            shots=tuple(sorted(set(given.shots))),
            base_resolution=base,
            subfolder=given.subfolder,
            batch_size=given.batch_size,
            max_new_tokens=given.max_new_tokens,
            dtype=given.dtype,
            device=given.device,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 after printing an error, or 130 when interrupted."""
    settings = parse_arguments(arguments)
    try:
        score(settings)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command continues.", file=sys.stderr)
        return 130
    table = (settings.output / "table.md").read_text(encoding="utf-8")
    print(table.split("\n## ")[0].strip())
    print(f"\n{settings.output / 'table.md'}, results.json, plot.png, samples.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
