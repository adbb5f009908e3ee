# SPDX-License-Identifier: Apache-2.0
"""What harnesses wrote, as measurements: one number with its model, benchmark, shots, harness and file.

lmms-eval     FOLDER/.../*_results.json      a run's results
VLMEvalKit    FOLDER/.../status.json         its summary of a run, beside the tables it was made from

Of several results of one model and task a complete one counts before a trial with some of the questions, and among
these the newest by the date that the harness wrote into it: files that were copied have other dates.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from .kit_results import read_kit
from .lmms_results import read_lmms_eval
from .measured import Measured
from .naming import as_file_name

READERS = {"*_results.json": read_lmms_eval, "status.json": read_kit}


@dataclass(frozen=True)
class _Found:
    """A measurement, and what tells it from others."""

    measured: Measured
    path: Path
    is_named: bool
    """Whether the user gave its model's name."""

    @property
    def question(self) -> Hashable:
        """What was measured, of whichever model."""
        each = self.measured
        asked = (each.shots, each.form, each.seed, each.demonstrations, each.settings)
        task = each.task if each.shots is None else ""  # tasks of several seeds are named otherwise than one alone
        return (each.harness, each.benchmark, task, each.metric, *asked)

    @property
    def rank(self) -> tuple[bool, str]:
        """What counts before others is greater."""
        return not self.measured.is_partial, self.measured.date


def read_folders(
    folders: Sequence[str | Path], *, judge_url: str | None = None, names: Mapping[Path, str] | None = None
) -> list[Measured]:
    """Read everything below folders; of several results of one model and task the newest complete one counts.

    Args:
        folders: outputs of lmms-eval, of VLMEvalKit, or folders above several.
        judge_url: of the judge model of the user's own that was asked where a benchmark needs one.
        names: folder or file -> what the models of the results in it are called; the innermost counts.

    Raises:
        FileNotFoundError: if a folder has no results, or none lie where a name is given.
        ValueError: if two models would have one name.
    """
    resolved = {path.resolve(): name for path, name in (names or {}).items()}
    counting: dict[Hashable, _Found] = {}
    used: set[Path] = set()
    for path, read in _read_files(folders, judge_url):
        named = next((parent for parent in (path, *path.parents) if parent in resolved), None)
        used |= {named} if named else set()
        for measured in read:
            model = resolved[named] if named else measured.model
            found = _Found(replace(measured, model=model), path, named is not None)
            key = (found.question, model, measured.full_name)
            counting[key] = max(found, counting.get(key, found), key=lambda each: each.rank)
    for path in resolved.keys() - used:
        raise FileNotFoundError(
            f"--name gives {path} the name {resolved[path]!r}, but no results that were read lie there. It was "
            "probably misspelt, or lies outside the folders that are read: name a folder or a file among them."
        )
    _check_names(list(counting.values()))
    return [found.measured for found in counting.values()]


def read_folder(folder: str | Path) -> list[Measured]:
    """Read everything below one folder, without a judge model.

    Raises:
        FileNotFoundError: as `read_folders`.
        ValueError: as `read_folders`.
    """
    return read_folders([folder])


def _read_files(folders: Sequence[str | Path], judge_url: str | None) -> list[tuple[Path, list[Measured]]]:
    """Read each file once.

    Raises:
        FileNotFoundError: if there is nothing in one of the folders.
    """
    files: dict[Path, list[Measured]] = {}
    for folder in map(Path, folders):
        # The kit links to the summary of its newest run: the link comes first, then the file in its place.
        here = {
            path.resolve(): list(read(path.resolve(), str(path.relative_to(folder)), judge_url=judge_url))
            for pattern, read in READERS.items()
            for path in sorted(folder.rglob(pattern), key=Path.is_symlink, reverse=True)
        }
        if not any(here.values()):
            raise FileNotFoundError(
                f"{folder} holds neither *_results.json of lmms-eval nor status.json of VLMEvalKit with a task in it. "
                "Another folder was probably named, or --output_path was left out: name the folder of a run that has "
                "ended."
            )
        files |= here
    return sorted(files.items())


def _check_names(found: Sequence[_Found]) -> None:
    """Refuse two models under one name.

    Raises:
        ValueError: naming both, and the option that tells them apart.
    """
    models: dict[str, _Found] = {}
    questions: dict[Hashable, _Found] = {}
    for each in found:
        key = as_file_name(each.measured.model)
        other = questions.setdefault((key, each.question), each)
        if not each.is_named:
            other = models.setdefault(key, each) if other is each else other
        if other.measured.full_name != each.measured.full_name:
            raise ValueError(
                f"{other.measured.full_name} (in {other.path}) and {each.measured.full_name} (in {each.path}) would "
                f"both be called {each.measured.model!r}, but each row of a table is one model's. They are probably "
                "two trainings whose folders end alike, or one with other settings: give one another name with --name "
                "PATH=NAME, where PATH is its folder of results or a file in it."
            )


def average_seeds(measured: Iterable[Measured]) -> list[Measured]:
    """Make one number of the seeds of a few-shot task: their mean, and the standard deviation between them.

    Seeds count together only where all else is the same: prompts, how demonstrations are chosen, data, and how many
    questions were asked. Other numbers stay as they are.
    """
    groups: dict[Hashable, list[Measured]] = {}
    for number, each in enumerate(measured):
        alike = replace(each, value=None, error=None, seed=None, task="", source="", date="")
        is_one_of_several = each.seed is not None and each.value is not None
        groups.setdefault(alike if is_one_of_several else number, []).append(each)
    averaged = []
    for group in groups.values():
        values = [each.value for each in group if each.value is not None]
        if len(group) == 1:
            averaged += group
            continue
        mean = replace(group[0], value=fmean(values), error=None, seed=None, spread=stdev(values))
        seeds = ", ".join(sorted(str(each.seed) for each in group))
        averaged.append(replace(mean, num_seeds=len(values)).with_note(f"seeds {seeds}"))
    return averaged
