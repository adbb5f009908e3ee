# SPDX-License-Identifier: Apache-2.0
"""What a job writes: a line for all that is done, and a manifest of what the results depend on.

FOLDER/manifest.json  {"settings": {...}, "made_with": {...}}; other settings in the same folder are refused
FOLDER/NAME.jsonl     {"id": ..., ...} in the order of completion; complete lines stay, the rest is done again
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import JsonLines, remove_unfinished, to_json, write_json

MANIFEST = "manifest.json"


class Output:
    """The lines of a run and of the runs before it; one process at a time, the only one that writes.

    Args:
        folder: made if need be.
        name: of the file of lines.
        settings: what the results depend on, as JSON values: a later run must have the same.
        made_with: what else they were made with, for the reader.
        former: name of a setting -> what earlier versions of this software wrote there, where that is another value.
        what: the lines are, for errors.
        is_there: line -> whether what it speaks of still exists; a line that lost its file is not done.

    Attributes:
        path: of the file of lines.
        done: ids of complete lines, as JSON.

    Raises:
        ValueError: if the folder is in use, holds results of other settings, or a line that is none.
            A folder without results takes any settings.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        made_with: Mapping[str, Any] | None = None,
        *,
        former: Mapping[str, Callable[[], Any]] | None = None,
        what: str = "results",
        is_there: Callable[[dict[str, Any]], bool] = lambda line: True,
    ):
        self.folder, self.path, self.what = folder, folder / name, what
        self._lines = JsonLines(self.path, ("id",), "a result")
        try:
            remove_unfinished(folder)
            self._check_manifest(json.loads(to_json(settings)), dict(made_with or {}), former or {})
            self.done = {json.dumps(line["id"]) for line in self._lines if is_there(line)}
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        try:
            if kind is None:  # workers of a driver that was killed may have begun a file since the start
                remove_unfinished(self.folder)
        finally:
            self._lines.close()

    def append(self, lines: Iterable[str]) -> None:
        """Write lines of JSON, each with an `id`, and wait until they are on the disk."""
        self._lines.append(lines)

    def _check_manifest(
        self, settings: dict[str, Any], made_with: dict[str, Any], former: Mapping[str, Callable[[], Any]]
    ) -> None:
        """Write the manifest where there are no results, or compare it with that of results already there."""
        path = self.folder / MANIFEST
        is_empty = not self._lines.num_bytes and not any(self.folder.rglob("*.parquet"))
        if is_empty or not path.is_file():  # a run that failed before it had a result binds nobody
            if self._lines.num_bytes:
                raise ValueError(
                    f"{self.path} holds {self.what} but there is no {MANIFEST} to say of what. It was probably copied "
                    "or deleted: bring it back, or name another output."
                )
            return write_json(path, {"settings": settings, "made_with": made_with})
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is not as a run writes it. It was probably edited: bring it back, or name another output."
            ) from None
        for name, compute in former.items():
            if theirs.get(name) != settings[name] and theirs.get(name) == compute():
                theirs[name] = settings[name]
        check_settings(self.folder, theirs, settings, self.what)


def check_apart(source: Path, output: Path) -> None:
    """Refuse an output that would be read as input by the next run, or be written over a file of the input.

    Args:
        source: the input, a file or a folder.
        output: the folder that is written.

    Raises:
        ValueError: if the output is the input or inside it, or the folder that the input file lies in.
    """
    read, written = source.resolve(), output.resolve()
    is_inside = written.is_relative_to(read)
    if is_inside or (read.is_file() and written == read.parent):
        place = "the input itself" if written == read else "inside it" if is_inside else "its folder"
        raise ValueError(
            f"The input is {source} and the output {output} is {place}, but the two are expected apart: what is "
            "written would be read as input, or overwrite it. The output was probably named relative to the input: "
            "name a folder beside it."
        )


def check_settings(
    folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str = "results", section: str = ""
) -> None:
    """Refuse to mix results of two kinds in a folder.

    Args:
        folder: with results.
        theirs: settings they were made with, as JSON values.
        ours: settings of this run.
        what: the results are, for the error.
        section: that the settings stand in, for the error.

    Raises:
        ValueError: naming the first of our settings that differs.
    """
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder} holds {what} with {f'{section} ' if section else ''}{name} = {_short(theirs.get(name))}, "
                f"but this run has {_short(value)}. {what.capitalize()} of two kinds would be mixed: repeat the first "
                "command to continue it, or name another output."
            )


def _short(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
