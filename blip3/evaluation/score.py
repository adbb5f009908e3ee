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
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..answering import DTYPES, pick_device
from ..checkpoints import fingerprint
from ..files import UNFINISHED, JsonLines, read_json_lines, to_json, write_json, write_json_lines
from ..jobs.output import check_settings
from ..refusals import check_choice, check_positive
from ..world.settings import WorldSettings, load_settings
from .answer import Checkpoint, Respondent
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
            check_positive(f"{name} is", getattr(self, name))
        if "caption" in self.tasks and self.count < 2:
            raise ValueError(
                "1 caption was asked for but CIDEr counts rare words over several. A trial run was probably meant: "
                "ask for 2, or name other tasks."
            )
        for task in self.tasks:
            check_choice("The task is", task, TASKS)
        if "rule" in self.tasks and not all(0 <= shots <= self.world.num_shots for shots in self.shots):
            raise ValueError(
                f"Shots {list(self.shots)} were asked for but this world draws {self.world.num_shots} of them. "
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


def load_checkpoint(settings: ScoreSettings, name: str) -> Respondent:
    """Load one of the models."""
    return Checkpoint(
        settings.models[name],
        settings.subfolder,
        base_resolution=name in settings.base_resolution,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        device=settings.device,
    )


def score(settings: ScoreSettings, load: Callable[[ScoreSettings, str], Respondent] = load_checkpoint) -> list[Result]:
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
        respondent: Respondent | None = None
        for task, num_shots in settings.jobs:
            if (task, num_shots) not in rendered:
                rendered[task, num_shots] = make_questions(
                    task, settings.count, settings.seed, settings.world, num_shots
                )
            questions, job = rendered[task, num_shots], _job_name(task, num_shots)
            path = settings.output / "predictions" / name / f"{job}.jsonl"
            if not path.is_file():
                respondent = respondent or load(settings, name)
                _ask(respondent, path, questions, settings.batch_size, f"{name}: {job}")
            answers = read_answers(path, questions)
            scores = TASKS[task].score(questions, answers)
            results.append(Result(name, task, num_shots, questions, answers, scores))
    write_report(results, settings.output, about)
    return results


def _job_name(task: str, num_shots: int | None) -> str:
    return task if num_shots is None else f"{task}-{num_shots}-shots"


_REMEDY = "delete the file, its questions are then asked again"


def _ask(respondent: Respondent, path: Path, questions: Sequence[Question], batch_size: int, description: str) -> None:
    """Ask what is left, batches of similar length, the longest first so that memory runs out early or never.

    Answers are appended to the unfinished file beside `path`, and put in order at the end.
    """
    by_length = sorted(questions, key=lambda question: (-respondent.length(question), question.id))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    with JsonLines(path.with_name(f"{path.name}{UNFINISHED}"), ("id", "answer"), "an answer", _REMEDY) as lines:
        answers: dict[str, str] = {line["id"]: line["answer"] for line in lines}
        with tqdm(total=len(questions), desc=description, unit="question", disable=None) as bar:
            for batch in batches:
                # A batch counts as a whole: asked in other company, a question could get another answer by rounding.
                if not all(question.id in answers for question in batch):
                    new = dict(zip([question.id for question in batch], respondent.answer(batch), strict=True))
                    lines.append(to_json({"id": name, "answer": answer}) for name, answer in new.items())
                    answers |= new
                bar.update(len(batch))
        write_json_lines(path, (_line(question) | {"answer": answers[question.id]} for question in questions))
        lines.remove()


def _line(question: Question) -> dict[str, str]:
    """What stands beside each answer of a complete file."""
    return {"id": question.id, "question": question.text, "truth": question.reference}


def read_answers(path: Path, questions: Sequence[Question]) -> list[str]:
    """Give the answers of a complete file, in the order of the questions.

    Raises:
        ValueError: if the file is of other questions.
    """
    lines = list(read_json_lines(path, ("id", "question", "truth", "answer"), "an answer", _REMEDY))
    found = [{name: line[name] for name in ("id", "question", "truth")} for line in lines]
    wanted = list(map(_line, questions))
    if found != wanted:
        row = next((row for row, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
        place = f"line {row + 1}" if row is not None else f"{len(found)} lines for {len(wanted)} questions"
        raise ValueError(
            f"{path} does not answer the questions of this run ({place}). The world or the file was probably "
            "changed since: delete the file to ask again, or name another output."
        )
    return [line["answer"] for line in lines]


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
        for section, values in ours.items():
            shared = {name: value for name, value in values.items() if name in there[section]}
            check_settings(settings.output, there[section], shared, "answers", section)
        models = there["models"] | models
    write_json(path, {"settings": compared, "models": models})
    packages = ("numpy", "pillow", "tokenizers", "torch", "transformers")
    return {
        "settings": compared | {"tasks": list(settings.tasks), "shots": list(settings.shots)},
        "models": {name: {"folder": str(settings.models[name]), **models[name]} for name in settings.models},
        "made_with": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


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
