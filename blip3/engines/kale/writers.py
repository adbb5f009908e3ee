# SPDX-License-Identifier: Apache-2.0
"""One protocol for all that writes captions: a model in this process, or a server that speaks OpenAI's words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from ...answering import DTYPES
from ...refusals import check_choice, check_positive


@dataclass(frozen=True)
class Request:
    """One thing to write."""

    text: str
    """What is asked."""
    image: Image.Image | None = field(default=None, repr=False)
    """What it is about, upright and RGB."""


@dataclass(frozen=True)
class Reply:
    """What was written, or why nothing was."""

    text: str = ""
    is_finished: bool = True
    """Whether it came to its end, rather than to the limit of tokens."""
    error: str = ""
    """One sentence where the request failed; else empty."""


class Writer(Protocol):
    """What writes: greedily, so that the same request has the same reply."""

    def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Write a reply to each request, in order.

        Raises:
            RuntimeError: if none can be answered, now or later: no fault of a request.
        """


@dataclass(frozen=True)
class WriterOptions:
    """Which writer, and how it writes.

    Raises:
        ValueError: if a value cannot work.
    """

    model: str
    """A folder or owner/name, for transformers in this process; with `url` the name that the server gives it."""
    url: str = ""
    """Of the server's API, such as http://127.0.0.1:8000/v1; empty for a model in this process."""
    max_new_tokens: int = 256
    """Of one reply."""
    seed: int = 0
    """Sent to a server; a model in this process takes the likeliest token and needs none."""
    dtype: str = "auto"
    """In this process: one of `answering.DTYPES`."""
    device: str = "cpu"
    """In this process."""
    batch_size: int = 8
    """In this process: requests in one call of the model's `generate`."""
    concurrency: int = 8
    """With a server: requests under way at a time, for each worker."""
    timeout: float = 120
    """With a server: seconds for one try, from the first byte sent to the last one received."""
    tries: int = 5
    """With a server: of a request, the first among them."""
    key_variable: str = ""
    """With a server: name of the environment variable that holds its key; the key itself is written nowhere."""

    def __post_init__(self) -> None:
        check_choice("The writer's dtype is", self.dtype, DTYPES)
        for name in ("max_new_tokens", "batch_size", "concurrency", "tries"):
            check_positive(f"The writer's {name} is", getattr(self, name))
        check_positive("The writer's timeout is", self.timeout, float)
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"The server's url is {self.url!r} but must begin with http:// or https://. The beginning was "
                "probably left out: write for example http://127.0.0.1:8000/v1."
            )
