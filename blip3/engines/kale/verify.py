# SPDX-License-Identifier: Apache-2.0
"""The engine on rendered images with an alt-text, of which the names are known (task `fusion`).

Without a model of your own a script rewrites: alt-text and caption in a row, and in each reply something about the
task, in the words that language models use. So this measures what the engine does with replies, not how well a model
fuses; name your models, and they are measured.
"""

import io
import re
from collections.abc import Iterable, Sequence

from ...data.records import Record
from ...world.tasks import rendered_records
from ..leaks import has_leak
from ..stages import Sample, StageSpec
from ..work import Work
from .stages import FUSED, Fuse, TakeCaption
from .writers import Reply, Request

TALK = (
    "Sentence 1: {0}.",
    "Sentence 1 and Sentence 2 describe the same image.",
    "This is the merged caption, with real-world details.",
    "The sentence structure of the first is flawed.",
    "This combines the real world knowledge of both sentences.",
    "Merged from sentence 2: {0}.",
    "I kept the names of the alt-text.",
    "As an AI language model, I cannot see images.",
    "The new sentence is well-structured.",
    "Note: I merged the two sentences.",
    "The synthetic caption lacks detail.",
    "Note: the caption is well-structured.",
    "I hope this helps!",
    "Note: I kept all details.",
    "I have kept all the details from both descriptions.",
    "Let me know if you would like any changes.",
    "Sure!",
    "This caption combines both descriptions.",
    "The first sentence provides the names.",
    "I'm sorry, but I cannot see the image.",
    "Please note that I left out the names.",
    "Feel free to adjust the caption.",
    "The revised caption keeps the names.",
    "Here is a caption that combines both.",
)
"""Sentences about the task; {0} is the caption that was given, without its end."""
PREFACES = (
    "Here is the caption: ",
    "Here's a caption that combines both: ",
    "Here\u2019s the merged caption:\n\n",
    "Sure, here is the caption: ",
    "Here is the caption I wrote: ",
    "Sure! Here is the merged caption: ",
    "Certainly, here is a well-structured caption that merges both sentences: ",
    "Based on the two descriptions, ",
    "Based on the information provided, ",
    "Combining both descriptions, ",
    "By merging the two sentences: ",
    "**Caption:** ",
    "**Merged caption:** ",
    "**Caption**: ",
    "## Merged caption\n\n",
    "Caption: ",
    "Final caption: ",
    "The merged and refined caption: ",
    "Answer: ",
    "Merged Sentence: ",
)
"""What leads up to a caption."""
DENSE_COLUMN = "dense"


class ScriptedRewriter:
    """Fuses as a model does that talks too much.

    Attributes:
        wanted: of each request, what it wrote beside its talk.
    """

    def __init__(self) -> None:
        self.wanted: list[str] = []

    def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Reply with the caption, then the alt-text, and something about the task in front, between or behind."""
        return [Reply(self._fuse(request)) for request in requests]

    def _fuse(self, request: Request) -> str:
        number = len(self.wanted)
        alt_text, caption = re.findall(r"^Sentence [12]: (.*)$", request.text, flags=re.MULTILINE)
        caption = f"{caption[:1].upper()}{caption[1:].rstrip('.')}"
        sentences = [f"{caption}.", f"It is {alt_text.rstrip('.')}."]
        self.wanted.append(" ".join(sentences))
        turn, place = divmod(number, 4)
        if place == 3:
            return PREFACES[turn % len(PREFACES)] + " ".join(sentences)
        sentences.insert(place, TALK[(turn + place) % len(TALK)].format(caption))
        return " ".join(sentences)


def verify_scripted(count: int = 300, seed: int = 0) -> dict[str, float]:
    """Clean and measure what the script writes.

    Args:
        count: of images.
        seed: of the rendered world, held-out split.

    Returns:
        what `verify_stages` does, and `whole`: the share of captions that are all that was written beside the talk.
    """
    rewriter = ScriptedRewriter()
    specs = [StageSpec(TakeCaption, {"column": DENSE_COLUMN}), StageSpec(Fuse, {"writer": {}, "opened": rewriter})]
    records = list(rendered_records("fusion", "held_out", seed, count))
    captions = _captions(specs, records, DENSE_COLUMN)
    right = sum(caption == wanted for caption, wanted in zip(captions, rewriter.wanted, strict=True))
    return _figures(captions, records) | {"whole": right / count}


def verify_stages(
    specs: Sequence[StageSpec], count: int = 300, seed: int = 0, dense_column: str = DENSE_COLUMN
) -> dict[str, float]:
    """Measure stages, with their models.

    Args:
        specs: of a plan.
        count: of images.
        seed: of the rendered world, held-out split.
        dense_column: where samples have the caption of what the image shows.

    Returns:
        `images`; `written`, the share of them with a caption; `leaks`, captions in which something still speaks of
        the task; `names_kept`, of the event, place and year of each alt-text the share that its caption has.
    """
    records = list(rendered_records("fusion", "held_out", seed, count))
    return _figures(_captions(specs, records, dense_column), records)


def _captions(specs: Sequence[StageSpec], records: Iterable[Record], column: str) -> list[str]:
    samples = [_sample(str(number), record, column) for number, record in enumerate(records)]
    return [values.get(FUSED) or "" for values in Work(specs)(samples)]


def _sample(key: str, record: Record, column: str) -> Sample:
    file = io.BytesIO()
    record.images[0].open().convert("RGB").save(file, "PNG")
    alt_text = record.turns[0].text.removeprefix("<image>\n")
    return Sample(key, file.getvalue(), caption=alt_text, values={column: record.annotations["dense"]})


def _figures(captions: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
    names = [
        name.lower() in caption.lower()
        for caption, record in zip(captions, records, strict=True)
        for name in record.annotations["names"].values()
    ]
    return {
        "images": len(captions),
        "written": sum(map(bool, captions)) / len(captions),
        "leaks": sum(map(has_leak, captions)),
        "names_kept": sum(names) / len(names),
    }
