# SPDX-License-Identifier: Apache-2.0
"""What a run reads beside its recipe: a resumed one refuses other weights under its adapters, or other data.

    OUTPUT/inputs.json   written when a run starts, beside recipe.yaml: a digest of each

Adapters are the difference to the weights they were trained on: added to others they make a model that nobody trained.
The order of samples follows from the number of records: with others some come twice and some never.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import digest_of, weights_fingerprint
from ..data.downloads import side_files
from ..data.shards import find_shards
from ..data.yaml_files import read_yaml
from ..files import write_json
from .mixture import is_stream
from .recipe import Recipe, RecipeError, RunRecipe
from .sharding import ZERO

INPUTS = "inputs.json"


def inputs_of(recipe: RunRecipe) -> dict[str, dict[str, str]]:
    """Give a digest of all that a run reads and its recipe only names: `weights` under adapters, and `files`.

    Files and shards that are not there have none: whoever opens them says so. Shards in an object store are not asked
    for; those here count by names and sizes.

    Raises:
        FileNotFoundError: if adapters have no checkpoint to start from.
    """
    if not isinstance(recipe, Recipe):
        return {"weights": {}, "files": {}}
    files: dict[str, str] = {}
    for entry in recipe.mixture:
        files |= _streamed(entry) if is_stream(entry) else _listed(entry)
    if recipe.deepspeed and recipe.deepspeed not in ZERO:
        files |= _digests(Path(recipe.deepspeed))
    return {"weights": _weights_of(recipe), "files": files}


def note_inputs(output: Path, inputs: Mapping[str, Any]) -> None:
    """Write what a run reads beside its recipe."""
    write_json(output / INPUTS, inputs)


def noted_inputs(output: Path) -> dict[str, dict[str, str]] | None:
    """Read what a run noted; None where there is no note, as in runs of earlier versions."""
    path = output / INPUTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_inputs(
    output: Path, noted: Mapping[str, Mapping[str, str]], inputs: Mapping[str, Mapping[str, str]]
) -> None:
    """Compare what a resumed run would read with what it read before.

    Raises:
        ValueError: naming the first that differs.
    """
    _check_weights(output, noted, inputs["weights"])
    for name, digest in noted["files"].items():
        if inputs["files"].get(name, digest) != digest:
            raise ValueError(
                f"{output} holds a run that read {name} with digest {digest}, and now it has {inputs['files'][name]}, "
                "but a run sees each sample of one file in its turn; resumed, it would see some twice and others "
                "never. The file was probably edited or downloaded again: put the former one back, or give the recipe "
                "another output."
            )


def check_base(recipe: Recipe) -> None:
    """Compare the weights that adapters are to be added to with those they were trained on.

    Raises:
        RecipeError: if they are others.
    """
    output = Path(recipe.output)
    try:
        _check_weights(output, noted_inputs(output) or {"weights": {}}, _weights_of(recipe))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_weights(output: Path, noted: Mapping[str, Mapping[str, str]], weights: Mapping[str, str]) -> None:
    for name, digest in noted["weights"].items():
        if weights.get(name, digest) != digest:
            raise ValueError(
                f"{output} holds adapters that learned on {name} with weights {digest}, and now it has "
                f"{weights[name]}, but adapters fit the weights they learned on alone. The stage before was probably "
                "run again, or another model put in its place: put the former one back and give the same command, or "
                "give the recipe another output."
            )


def _weights_of(recipe: Recipe) -> dict[str, str]:
    return {recipe.model: weights_fingerprint(recipe.model)} if recipe.adapters else {}


def _listed(entry: Mapping[str, Any]) -> dict[str, str]:
    """Give the digests of files that are held as lists."""
    name = next((entry[kind] for kind in ("records", "llava", "safety", "preferences") if kind in entry), None)
    if name is None:
        return {}
    return {place: digest for path in _files_named(Path(name)) for place, digest in _digests(path).items()}


def _files_named(path: Path) -> Iterator[Path]:
    """Give a file and, if it is LLaVA's list of files, those in it."""
    yield path
    if path.suffix in (".yaml", ".yml") and path.is_file():
        values = read_yaml(path)
        values = values.get("data_path", values) if isinstance(values, dict) else None
        yield from (path.parent / str(name) for name in values or () if isinstance(values, dict))


def _digests(path: Path) -> dict[str, str]:
    return {str(path): digest_of(path).hex()[:32]} if path.is_file() else {}


def _streamed(entry: Mapping[str, Any]) -> dict[str, str]:
    pattern = str(entry.get("stream") or entry["preferences"])
    if "://" in pattern or "::" in pattern:
        return {}
    try:
        shards = find_shards(pattern)
    except (FileNotFoundError, ImportError):  # whoever opens them says what is missing, in every process
        return {}
    return {pattern: _digest_of_sizes(shards)} | _downloaded(str(entry.get("images", "")))


def _downloaded(folder: str) -> dict[str, str]:
    """Give the digest of images by URL: documents lose those that are not there, so others may be without a record."""
    if not folder or "://" in folder or "::" in folder:
        return {}
    files = side_files(folder)
    return {f"downloads in {folder}": _digest_of_sizes(files)} if files else {}


def _digest_of_sizes(files: Iterable[str]) -> str:
    sizes = [f"{Path(file).name} {Path(file).stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:32]
