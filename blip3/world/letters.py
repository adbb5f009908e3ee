# SPDX-License-Identifier: Apache-2.0
"""Steps on the way to lettered options, which a small model does not learn from `choose` alone.

To answer with a letter a model must know the answer, find it among the options, and give the letter in front of it.
Asked all at once, a model of 5 million parameters answers with any letter. The `letters` task has the steps apart:

    in words        "Which option is red?"; the text tells the answer, and only the letter is looked for
    after an answer "What colour is the car?", "red"; then the same question with options
    at once         as `choose` asks
"""

from ..data.records import Record
from .descriptions import Choice, letter_options, sample_probed, scene_choices, text_choice
from .instructions import LETTERS
from .scenes import Rng, Scene, conversation, pick, pick_many
from .settings import WorldSettings
from .splits import string_key
from .text_pages import Page, any_string, sample_page

_NAMED = ("Which option is {}?", "Which option says {}?", "It is {}. What is it?")
_LETTER = ("What is option {}?", "What does option {} say?", "What is {}?")


def letters_task(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Answer several questions with letters: half of the records are words alone, the others are about an image."""
    return (_in_words if rng.integers(2) else _beside_an_image)(rng, split, settings)


def _in_words(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask for the letter of an option that the question names, or for the option of a letter."""
    asked, keys = [], []
    for _ in range(int(rng.integers(3, 7))):
        texts = list(dict.fromkeys(any_string(rng, split, settings) for _ in range(6)))
        numbers = [str(number) for number in range(1, settings.max_count + 1)]
        pool = pick(rng, (settings.colours, settings.things, numbers, texts))
        keys += [string_key(text) for text in texts] if pool is texts else []
        right, *wrong = pick_many(rng, pool, min(4, len(pool)))
        if rng.integers(4):
            asked.append(letter_options(rng, pick(rng, _NAMED).format(right), right, wrong)[:2])
            continue
        lettered = list(zip(LETTERS, (right, *wrong), strict=False))
        letter, option = pick(rng, lettered)
        options = "\n".join(f"{each}. {text}" for each, text in lettered)
        asked.append((f"{options}\n{pick(rng, _LETTER).format(letter)}", option))
    return conversation("letters", dict(asked), [], "", keys=keys)


def _beside_an_image(rng: Rng, split: str, settings: WorldSettings) -> Record:
    """Ask about a scene or a text; half of the questions that have an answer without options are asked so before."""
    image: Scene | Page
    if rng.integers(5):
        image = scene = sample_probed(rng, split, settings)
        *short, presence = scene_choices(rng, scene, settings)
        plain = [pick(rng, choices) for choices in short]
        choices = [pick(rng, [*plain, pick(rng, presence)]) for _ in range(int(rng.integers(2, 5)))]
        asked = [each for choice in choices for each in _in_two_steps(rng, choice, has_plain=choice in plain)]
    else:
        text = any_string(rng, split, settings)
        asked = _in_two_steps(rng, text_choice(rng, split, settings, text), has_plain=True)
        image = sample_page(rng, [text], settings)
    return conversation("letters", dict(asked), [image], "<image>\n", keys=[])


def _in_two_steps(rng: Rng, choice: Choice, has_plain: bool) -> list[tuple[str, str]]:
    question, right, wrong = choice
    before = [(question, right)] if has_plain and rng.integers(2) else []
    return [*before, letter_options(rng, question, right, wrong)[:2]]
