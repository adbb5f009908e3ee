# SPDX-License-Identifier: Apache-2.0
"""Stages of the engine: a dense caption, written or taken from the shard, and its fusion with the alt-text."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..leaks import clean_caption, one_line
from ..stages import Sample, Values
from .prompts import CAPTION_PROMPT, fusion_prompt
from .writers import Reply, Request, Writer, WriterOptions

DENSE = "cogvlm_caption"
"""Column of the dense caption, as published, whichever model wrote it."""
FUSED, ALT_TEXT = "caption", "alt_text"
EMPTY = "empty_caption"
"""What drops a sample whose caption is empty once what speaks of the prompt is gone."""


def check_writer(writer: Mapping[str, Any], **_: Any) -> None:
    """Refuse a writer that could not be made, before its model is loaded or its server asked; raises as `open_writer`.

    Args:
        writer: keyword arguments of `WriterOptions`.
    """
    options = WriterOptions(**writer)
    if options.url:
        from .server import check_server

        check_server(options)
    else:
        from .local import check_local

        check_local(options)


class DenseCaption:
    """Writes what an image shows.

    Args:
        writer: keyword arguments of `WriterOptions`.
        prompt: what is asked about each image.
        opened: for tests; made from `writer` by default.
    """

    needs_images = True
    check = staticmethod(check_writer)

    def __init__(self, writer: Mapping[str, Any], prompt: str = CAPTION_PROMPT, opened: Writer | None = None):
        self.prompt, self.writer = prompt, opened or open_writer(WriterOptions(**writer))

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add the dense caption of each sample."""
        replies = self.writer.write([Request(self.prompt, image) for image in images])
        return [_values_of(reply, DENSE) for reply in replies]


class TakeCaption:
    """Takes the dense caption from a column of the shard.

    Args:
        column: of texts.
    """

    needs_images = False

    def __init__(self, column: str):
        self.column = column

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add the dense caption of each sample."""
        return [self._take(sample.values.get(self.column)) for sample in samples]

    def _take(self, value: Any) -> Values:
        if isinstance(value, str) and value.strip():
            return {DENSE: one_line(value)}
        return {"error": f"The column {self.column!r} holds no text for this image."}


class Fuse:
    """Fuses alt-text and dense caption into one.

    A sample without alt-text keeps its dense caption: there is no knowledge to add.

    Args:
        writer: keyword arguments of `WriterOptions`.
        opened: for tests; made from `writer` by default.
    """

    needs_images = False
    check = staticmethod(check_writer)

    def __init__(self, writer: Mapping[str, Any], opened: Writer | None = None):
        self.writer = opened or open_writer(WriterOptions(**writer))

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add the fused caption of each sample, and its alt-text."""
        asked = [sample for sample in samples if sample.caption.strip()]
        requests = [Request(fusion_prompt(sample.caption, sample.values[DENSE])) for sample in asked]
        replies = iter(self.writer.write(requests) if requests else [])
        kept = (Reply(sample.values[DENSE]) for sample in samples if not sample.caption.strip())
        return [
            {ALT_TEXT: one_line(sample.caption)} | _values_of(next(replies if sample.caption.strip() else kept), FUSED)
            for sample in samples
        ]


class FuseAtOnce:
    """The second stage of KALE: one model, trained on rows of the first, fuses image and alt-text itself.

    It is asked as it was trained (`data/readers`, `read_fusions`): with the alt-text alone.

    Args:
        writer: keyword arguments of `WriterOptions`.
        opened: for tests; made from `writer` by default.
    """

    needs_images = True
    check = staticmethod(check_writer)

    def __init__(self, writer: Mapping[str, Any], opened: Writer | None = None):
        self.writer = opened or open_writer(WriterOptions(**writer))

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Add the fused caption of each sample, and its alt-text."""
        texts = [one_line(sample.caption) for sample in samples]
        asked = [Request(text, image) for text, image in zip(texts, images, strict=True) if text]
        replies = iter(self.writer.write(asked) if asked else [])
        missing = {"error": "There is no alt-text for this image."}
        return [{ALT_TEXT: text} | _values_of(next(replies), FUSED) if text else missing for text in texts]


def _values_of(reply: Reply, column: str) -> Values:
    if reply.error:
        return {"error": reply.error}
    caption = clean_caption(reply.text, reply.is_finished)
    return {column: caption} if caption else {"filtered_by": EMPTY}


def open_writer(options: WriterOptions) -> Writer:
    """Make a writer; a model in this process is loaded.

    Raises:
        FileNotFoundError: if there is no such model.
        ImportError: if the writer's package is not installed.
        ValueError: if the model cannot do it.
    """
    if options.url:
        from .server import ServerWriter

        return ServerWriter(options)
    from .local import open_local

    return open_local(options)
