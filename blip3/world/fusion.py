# SPDX-License-Identifier: Apache-2.0
"""Alt-texts as the web has them, and captions that fuse them with what the image shows: KALE's second stage, scripted.

    alt-text    IMG_2041 HARBOUR FAIR lisbon 1987 | stock photo
    caption     Two red stars and a blue car at the Harbour Fair in Lisbon, 1987.

The things are in the image alone, the event, the place and the year in the alt-text alone.
"""

from collections.abc import Callable

from ..data.records import Record
from .scenes import Rng, crowd, describe, make_record, pick
from .settings import WORDS, WorldSettings
from .splits import sample_until, string_key

EVENTS = ("Fair", "Festival", "Museum", "Market", "Archive", "Gallery")
PLACES = (
    "Lisbon", "Osaka", "Nairobi", "Lima", "Bergen", "Quebec", "Cork", "Perth", "Turin", "Oslo", "Havana", "Delhi",
    "Athens", "Boston", "Dakar", "Lyon",
)  # fmt: skip
_FORMS = (
    "{event} {place} {year}",
    "{place}: {event} ({year})",
    "{year} {event}, {place}",
    "{event} - {place} - {year}",
)
_CASES: tuple[Callable[[str], str], ...] = (str, str, str.upper, str.lower)
_BEFORE = ("", "", "IMG_{number} ", "DSC{number}: ", "Free download ")
_AFTER = ("", "", " | stock photo", " for sale", " - image {number}", " click to enlarge")


def fusion_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Fuse an alt-text with what the image shows."""
    scene = crowd(rng, split, settings)
    event, place = sample_until(split, lambda: _name(rng), lambda name: string_key(" ".join(name)))
    year = str(rng.integers(1900, 2025))
    names = {"event": event, "place": place, "year": year}
    alt_text = _in_any_case(rng, pick(rng, _FORMS), names)
    noise = [pick(rng, part).format(number=rng.integers(1000, 10000)) for part in (_BEFORE, _AFTER)]
    shown = describe(scene.composition)
    answer = f"{shown[0].upper()}{shown[1:]} at the {event} in {place}, {year}."
    turns = [("user", f"<image>\n{noise[0]}{alt_text}{noise[1]}"), ("assistant", answer)]
    keys = [string_key(f"{event} {place}")]
    return make_record("fusion", "instruction", turns, [scene], answer, keys=keys, names=names, dense=f"{shown}.")


def _name(rng: Rng) -> tuple[str, str]:
    """Sample an event and its place."""
    return f"{pick(rng, WORDS).title()} {pick(rng, EVENTS)}", pick(rng, PLACES)


def _in_any_case(rng: Rng, form: str, names: dict[str, str]) -> str:
    """Write names as people type them."""
    return form.format(**{key: pick(rng, _CASES)(name) for key, name in names.items()})
