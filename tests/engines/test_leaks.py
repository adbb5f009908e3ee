# SPDX-License-Identifier: Apache-2.0
"""What language models say of their task is removed, and captions that sound like it stay."""

import doctest

import pytest

from blip3.engines import leaks
from blip3.engines.grounding.captions import drop_leaked
from blip3.engines.kale.verify import PREFACES, TALK
from blip3.engines.leaks import clean_caption, has_leak

INNOCENT = (
    "He served the first sentence of two years in Lisbon.",
    "A new caption contest cartoon by Ana Reis, 2014.",
    "A new caption is printed on the shirt.",
    "A prisoner hears his sentence.",
    "The court merged prison terms; he serves both sentences at once.",
    "The first sentence of the novel is printed on the mug.",
    "The final sentence of the book is on the wall.",
    'The book\'s first sentence says "Call me Ishmael".',
    "The sheriff may sentence one man to prison.",
    'The caption below the photo reads "Porto, 1921".',
    "The caption includes a joke about cats.",
    "The Real World: Seattle, the cast in 1998.",
    "Real World Records studio in Box, Wiltshire.",
    "Robots tested in a real-world kitchen.",
    "A well-structured blazer by Hugo Boss.",
    "Sentence structure worksheets for Grade 3.",
    "A diagram of a large language model.",
    "Ada works as an AI researcher at MIT.",
    "I hope you dance, a sign by Mary Lee.",
    'A card that reads "I\'m sorry, but I ate your fries".',
    "I kept the blue roof of the old house.",
    "Note the red kite above the tower.",
    "Note: batteries are not included.",
    "Based on the novel by Jane Austen, the film stars Keira Knightley.",
    "Given both hands, the clock shows noon.",
    "From the two towers, flags wave.",
    "Combining glass and steel, the tower rises over Lisbon.",
    "He combines the two texts of the Torah on one page.",
    "Here is the church of St. Mary in Porto.",
    "Here is the new caption contest of the New Yorker.",
    "Lisbon: a kite at 5:30.",
    "Final: Benfica 2, Porto 1.",
    'Text: "OPEN" on a sign.',
    "Of course we can, a poster of 1943.",
    "Sure Thing, a boat in Cascais.",
    "This is a description board at the zoo: it lists three birds.",
    "This version keeps the red roof of the church.",
    "The description on the label is in French.",
    "An original sentence by Hemingway is carved into the bench.",
    "M*A*S*H in a 5* hotel and F**k it, a b**k.",
    "Let me know by Friday, says the note on the fridge.",
    "The original alternative text editor of 1985.",
    "A stone memorial for soldiers of World War I included the names of the fallen.",
    "Note the World War I tank on the left.",
    "World War I added names to the memorial.",
    "The castle that Edward I changed shows its original structure.",
    "Edward I changed the structure of the castle.",
    "Tsar Peter I changed the structure of the city, and the captions describe it.",
    "A coin of Elizabeth I. Note the crown that Henry I kept.",
    "The Mark I tank of World War I corrected design details of earlier vehicles.",
    "A Type I engine, of which World War I; museum staff kept parts and details.",
)
FIRST_PERSON = (
    "I kept the names of the alt-text.",
    "Then I changed the structure.",
    "Here I added the details of the place.",
    "In the new text I included the name of Edward I too.",
    "Of World War I, I kept all details.",
    "For Lisbon, I\u2019ve kept the names.",
    "Note that I left out the year of World War I there.",
)


def test_examples_of_the_docstrings():
    failed, tried = doctest.testmod(leaks)
    assert tried
    assert not failed


@pytest.mark.parametrize("talk", TALK)
def test_a_sentence_about_the_task_goes_whole(talk):
    talk = talk.format("A kite")
    assert has_leak(talk)
    for text in (f"{talk} A red kite. It flies.", f"A red kite. {talk} It flies.", f"A red kite. It flies. {talk}"):
        assert clean_caption(text) == drop_leaked(text) == "A red kite. It flies."
    assert clean_caption(talk) == drop_leaked(talk) == ""


@pytest.mark.parametrize("talk", FIRST_PERSON)
def test_the_writer_is_told_from_kings_and_wars(talk):
    assert has_leak(talk)
    assert clean_caption(f"A red kite. {talk} It flies.") == "A red kite. It flies."


@pytest.mark.parametrize("preface", PREFACES)
def test_what_leads_up_to_a_caption_goes_and_the_caption_stays(preface):
    for caption in ("A red kite. It flies.", "A red kite"):
        assert has_leak(preface + caption)
        assert clean_caption(preface + caption) == caption
    assert clean_caption(f'{preface}"A red kite over Lisbon."') == "A red kite over Lisbon."


@pytest.mark.parametrize("caption", INNOCENT)
def test_captions_that_sound_like_it_stay(caption):
    assert not has_leak(caption)
    for text in (caption, f"A red kite. {caption} It flies."):
        assert clean_caption(text) == drop_leaked(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Merged sentence: it has the details of both sentences.", ""),
        ("A **red** kite, ***new***", "A red kite, new"),
        ("A kite\n\nover Lisbon", "A kite over Lisbon"),
        ("", ""),
        (". 2.", ""),
    ],
)
def test_what_else_is_tidied(text, expected):
    assert clean_caption(text) == expected


def test_a_sentence_that_was_cut_off_goes():
    assert clean_caption("A kite by Dr. Lee. It is", is_finished=False) == "A kite by Dr. Lee."
    assert clean_caption("A kite that is", is_finished=False) == ""
    assert clean_caption("A kite that is") == "A kite that is"
