# SPDX-License-Identifier: Apache-2.0
r"""Run VLMEvalKit on a vision-language model of transformers, in a process of its own.

    git clone https://github.com/open-compass/VLMEvalKit KIT
    python -m venv KIT/.venv && KIT/.venv/bin/pip install -r KIT/requirements.txt rouge_score -e .
    python -m blip3.evaluation.harness.vlmevalkit --kit KIT --python KIT/.venv/bin/python --model . \
        --data TextVQA_VAL POPE MMStar --output outputs/kit

Importing the kit switches off checks of TLS certificates and reads a file `.env`, and its packages exclude those of
lmms-eval: hence the process and the environment of its own. Its files stay as they are. Options behind `--` go to the
kit's run.py.

Beside a model's answers stands which checkpoint gave them, since the kit keeps a name alone; `collect` reads it.
Answers are scored by rules. A benchmark that no rule scores is refused unless you name the URL of a judge model.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...hub import PACKAGE
from .judge_models import RULES, check_judge_url
from .kit_results import write_asked
from .naming import as_file_name, name_model

GIT_LINE = "git clone https://github.com/open-compass/VLMEvalKit"
NO_RULE = ("MMVet", "MathVista", "LLaVABench", "MMDU")
"""Beginnings of names of benchmarks that the kit scores by a judge model alone, or by rules that mean little."""


def check_kit(folder: Path) -> None:
    """Refuse a folder that is no copy of the kit.

    Raises:
        FileNotFoundError: naming the line that fetches one.
    """
    if not (folder / "run.py").is_file() or not (folder / "vlmeval").is_dir():
        raise FileNotFoundError(
            f"{folder} has no run.py beside a folder vlmeval, but --kit names a copy of VLMEvalKit. It was probably "
            f"not fetched yet: {GIT_LINE} {folder}"
        )


def find_python(given: Path) -> Path:
    """Give the absolute path of an interpreter, since the kit's process starts in the kit's folder.

    Links stay: that of a virtual environment leads to an interpreter without its packages.

    Args:
        given: a path from here, or a name to look for on PATH.

    Raises:
        FileNotFoundError: if it is neither.
    """
    found = shutil.which(given)
    if found is None:
        raise FileNotFoundError(
            f"--python is {given}, but no program is there. The kit's environment was probably not made yet, or was "
            f"made elsewhere: python -m venv {given.parent.parent} makes one, or name the interpreter of yours."
        )
    return Path(found).absolute()


def check_judge(data: Sequence[str], model: str, url: str | None, mode: str) -> None:
    """Refuse what would give a number that means nothing.

    Raises:
        ValueError: for a judge model without a URL, what is no URL, or a benchmark that only a judge model scores.
    """
    if url:
        check_judge_url("--judge-base-url", url)
    if model != RULES and not url:
        raise ValueError(
            f"The judge model {model!r} was named without --judge-base-url, but answers go to no server that "
            f"you did not name. It was probably taken from the kit's own examples: name the URL too, or leave {RULES}."
        )
    unscored = [name for name in data if name.startswith(NO_RULE)]
    if unscored and model == RULES and mode != "infer":
        raise ValueError(
            f"{', '.join(unscored)}: not scored: needs a judge. No rule scores these answers, and the kit's stand-in "
            "would give a number that means nothing. Name --judge MODEL and --judge-base-url URL, or keep the answers "
            "alone with --mode infer."
        )


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Give what answers depend on, as `naming.name_model` takes it.

    Args:
        given: as `main` reads it.
    """
    return {
        "pretrained": str(Path(given.model).resolve()) if Path(given.model).exists() else given.model,
        "subfolder": given.subfolder,
        "dtype": given.dtype,
        "max_new_tokens": given.max_new_tokens,
    } | ({"do_image_splitting": False} if given.base_resolution else {})


def kit_command(given: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Give the command of the kit's process and the variables it adds.

    Args:
        given: as `main` reads it.

    Raises:
        FileNotFoundError: if there is no such interpreter.
    """
    settings = settings_of(given)
    model = {key: settings[key] for key in ("pretrained", "subfolder", "dtype", "max_new_tokens")} | {
        "name": given.name,
        "device": given.device,
        "image_options": {key: settings[key] for key in ("do_image_splitting",) if key in settings},
        "is_look_alike": given.look_alike,
    }
    options = ["--model", given.name, "--data", *given.data, "--work-dir", str(given.output.resolve())]
    options += ["--mode", given.mode, "--judge", given.judge, *(given.further or [])]
    if given.judge_base_url:
        options += ["--judge-base-url", given.judge_base_url]
    # `-m` finds the kit in the current folder and this package by the variable, whether or not it is installed there.
    inherited = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    folders = [str(PACKAGE.parent), *(str(Path(folder).absolute()) for folder in inherited)]
    variables = {"PYTHONPATH": os.pathsep.join(folders)}
    if given.data_folder:
        variables["LMUData"] = str(given.data_folder.resolve())
    return [str(find_python(given.python)), "-m", f"{__package__}.kit_process", json.dumps(model), *options], variables


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    words: list[Any] = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m blip3.evaluation.harness.vlmevalkit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kit", type=Path, required=True, metavar="FOLDER", help=f"from {GIT_LINE}")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the kit's environment")
    parser.add_argument("--model", required=True, help="a folder, or owner/name on the Hub")
    parser.add_argument("--subfolder", default="", help="of the checkpoint inside it")
    parser.add_argument("--name", help="of the model in the kit's files (default: made of --model and its settings)")
    parser.add_argument("--data", nargs="+", required=True, help="names of the kit's benchmarks")
    parser.add_argument("--data-folder", type=Path, help="where the kit keeps tables (default: its own)")
    parser.add_argument("--look-alike", action="store_true", help="tables are our own: do not compare their checksums")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and scores")
    parser.add_argument("--mode", choices=["all", "infer", "eval"], default="all", help="(default: all)")
    parser.add_argument("--judge", default=RULES, help=f"(default: {RULES}, which asks no model)")
    parser.add_argument("--judge-base-url", help="of an OpenAI-compatible server")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of one answer (default: 1024)")
    parser.add_argument("--base-resolution", action="store_true", help="show each image as its global view alone")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(words[:at])
    given.further = words[at + 1 :]
    given.name = given.name or as_file_name(name_model(settings_of(given)).short)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the kit's exit status, or 1 where it was not started."""
    given = _parse(arguments)
    try:
        check_kit(given.kit)
        check_judge(given.data, given.judge, given.judge_base_url, given.mode)
        command, variables = kit_command(given)
        write_asked(given.output / given.name, settings_of(given))
        return subprocess.run(command, cwd=given.kit, env=os.environ | variables, check=False).returncode
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
