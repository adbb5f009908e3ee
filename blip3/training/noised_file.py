# SPDX-License-Identifier: Apache-2.0
"""The file of noised answers: a row for every pair that was asked, and what the answers were made with.

    id, chosen, outcome, noised_answer    outcome: kept, malformed, as chosen, without hallucination
    metadata                              model and its fingerprint, noise, resolution, number of pairs asked

A run learns from the answers that were kept. It refuses a file that another model wrote, or one that is made with
other noise than the recipe says, or one whose pairs are not those of the run, all of them. What was asked and not
kept stands in the file too: so a pair without an answer is told apart from one that nobody asked about.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints import fingerprint
from ..data.images import RecordError
from ..data.records import Record
from ..files import sha256_of, writing
from .mixture import Mixture
from .pairs import key_of, pair_key
from .recipe import Recipe, RecipeError

COLUMNS = ("id", "chosen", "outcome", "noised_answer")
KEPT = "kept"
BLOCKS, BLOCK = 10, 100  # samples of a run that are looked at: so many places, and so many neighbours at each
_METADATA = b"blip3.noised_answers"
_COMPARED = ("noise_step", "noise_pixels", "any_resolution")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoisedFile:
    """What a file holds."""

    answers: Mapping[str, str]
    """Those that were kept, by `pairs.pair_key`."""
    asked: frozenset[str]
    """Every pair that the model was asked about."""
    made_with: Mapping[str, Any]
    """As `made_with` gives it, and `pairs`, how many were asked."""


def made_with(recipe: Recipe) -> dict[str, Any]:
    """Name what the answers to a pair depend on, apart from the pair."""
    named = {name: getattr(recipe, name) for name in _COMPARED}
    return {"model": recipe.model, "fingerprint": fingerprint(recipe.model)} | named


def write_noised_file(path: Path, outcomes: Iterable[tuple[Record, str, str]], recipe: Recipe) -> Counter[str]:
    """Write a file.

    Args:
        path: of the file.
        outcomes: pair, outcome and answer of everything that was asked.
        recipe: says what the answers were made with.

    Returns:
        how many there are of each outcome.

    Raises:
        RecipeError: if none was kept.
    """
    import pyarrow
    import pyarrow.parquet

    values = [(record.id, record.chosen, outcome, answer) for record, outcome, answer in outcomes]
    counts = Counter(outcome for _, _, outcome, _ in values)
    if not counts[KEPT]:
        raise RecipeError(
            f"Of {len(values)} noised answers none is left ({dict(counts)}), but a second term needs some. The noise "
            f"(step {recipe.noise_step}) is probably too weak or too strong: look for another step with --scan."
        )
    table = pyarrow.Table.from_pylist([dict(zip(COLUMNS, each, strict=True)) for each in values])
    metadata = json.dumps(made_with(recipe) | {"pairs": len(values)})
    with writing(path) as unfinished:
        pyarrow.parquet.write_table(table.replace_schema_metadata({_METADATA: metadata}), unfinished)
    return counts


def read_noised_file(path: str | Path) -> NoisedFile:
    """Read a file.

    Raises:
        FileNotFoundError: if there is none.
        RecipeError: if it is another file.
    """
    import pyarrow.parquet

    _check_is_there(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except ValueError as error:  # pyarrow's own are
        raise RecipeError(
            f"{path} cannot be read as parquet ({error}), but noised answers are a parquet file. It is probably "
            "another file, or damaged: name the one that blip3.training.noised_answers wrote, or write it again."
        ) from error
    metadata = (table.schema.metadata or {}).get(_METADATA)
    if not set(COLUMNS) <= set(table.column_names) or metadata is None:
        raise RecipeError(
            f"{path} has the columns {', '.join(table.column_names)} and {'no' if metadata is None else 'the'} note "
            f"of what it was made with, but noised answers have {', '.join(COLUMNS)} and that note. It is probably "
            "another file, or one of an earlier version: write it with blip3.training.noised_answers."
        )
    rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    keys = [key_of(name, chosen) for name, chosen, _, _ in rows]
    answers = {key: answer for key, (_, _, outcome, answer) in zip(keys, rows, strict=True) if outcome == KEPT}
    return NoisedFile(answers, frozenset(keys), json.loads(metadata))


def _check_is_there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"The recipe names the noised answers {str(path)!r}, but there is no such file. It was probably not "
            "written yet: run `python -m blip3.training.noised_answers` with the same recipe first."
        )


def with_file_noted(recipe: Recipe) -> Recipe:
    """Note in a recipe which file of noised answers its run reads, so that a resumed run refuses another.

    Raises:
        FileNotFoundError: if there is none.
        RecipeError: if the recipe notes another one already.
    """
    if recipe.second_term != "file":
        return recipe
    _check_is_there(recipe.noised_answers)
    digest = sha256_of(Path(recipe.noised_answers))
    if recipe.noised_answers_sha256 not in ("", digest):
        raise RecipeError(
            f"The recipe has noised_answers_sha256 {recipe.noised_answers_sha256} but {recipe.noised_answers} has "
            f"{digest}. The file was probably written again since: leave the key out to train on the new one."
        )
    return replace(recipe, noised_answers_sha256=digest)


# -- what is compared with a run --------------------------------------------------------------------------------------


def answers_for(recipe: Recipe, mixture: Mixture) -> Mapping[str, str]:
    """Read the noised answers of a run, by `pairs.pair_key`; none where the second term is off.

    Raises:
        FileNotFoundError: if there is no such file.
        RecipeError: if it is another file, or made for another run.
    """
    if recipe.second_term != "file":
        if recipe.noised_answers:
            logger.warning("Not read: %s, because noised_weight is 0.", recipe.noised_answers)
        return {}
    found = read_noised_file(recipe.noised_answers)
    check_made_with(found, recipe)
    check_pairs_asked(found, recipe, mixture)
    logger.warning("%s: %d answers to %d pairs.", recipe.noised_answers, len(found.answers), len(found.asked))
    return found.answers


def check_made_with(found: NoisedFile, recipe: Recipe) -> None:
    """Refuse answers of another model, or to images with other noise.

    Raises:
        RecipeError: naming the first difference.
    """
    wanted = made_with(recipe)
    for name in ("fingerprint", *_COMPARED):
        if found.made_with.get(name) == wanted[name]:
            continue
        given = f"{name} {found.made_with.get(name)!r}" + f" (model {found.made_with.get('model')!r})" * (
            name == "fingerprint"
        )
        raise RecipeError(
            f"{recipe.noised_answers} was written with {given}, but the run has {name} {wanted[name]!r}. The recipe "
            "or the model that it starts from probably changed since: write the file again with "
            "blip3.training.noised_answers."
        )


def check_pairs_asked(found: NoisedFile, recipe: Recipe, mixture: Mixture) -> None:
    """Refuse a file that leaves out pairs of a run; looks at pairs from its first to its last.

    Raises:
        RecipeError: with how many of them were not asked.
    """
    places = places_to_look_at(len(mixture))
    shown = [(place, record) for place in places if (record := mixture[place]).images]
    missing = [
        place
        for place, record in shown
        if pair_key(record) not in found.asked and (recipe.strict or can_be_seen(record))
    ]
    if not missing:
        return
    cause = "for another mixture, seed or world" if len(missing) == len(shown) else "for fewer steps or processes"
    raise RecipeError(
        f"{recipe.noised_answers} holds what was asked about {len(found.asked)} pairs, but of {len(shown)} pairs with "
        f"an image in this run of {len(mixture)} samples {len(missing)} were not asked, the first of them sample "
        f"{missing[0]}. It was probably written {cause}: write it again with this recipe and the run's --processes."
    )


def places_to_look_at(count: int) -> Sequence[int]:
    """Choose samples all over a run, with their neighbours, as streams are read in row groups.

    >>> len(places_to_look_at(30)), len(places_to_look_at(62_592)), places_to_look_at(62_592)[-1]
    (30, 1000, 62591)
    """
    if count <= BLOCKS * BLOCK:
        return range(count)
    starts = [(count - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)]
    return [start + offset for start in starts for offset in range(BLOCK)]


def can_be_seen(record: Record) -> bool:
    """Whether a pair's images open; training passes over one whose images do not."""
    try:
        for image in record.images:
            image.open()
    except RecordError as error:
        logger.warning("Skipped: record %r: %s", record.id, error)
        return False
    return True
