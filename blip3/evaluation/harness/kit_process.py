# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit's run.py with one model more, in the process that vlmevalkit.py starts for it.

    python -m blip3.evaluation.harness.kit_process '{"name": "blip3", "pretrained": ...}' OPTIONS OF run.py

The current folder is the kit's.
"""

import json
import runpy
import sys
from functools import partial
from typing import Any


def make_model(**settings: Any) -> Any:
    """Load a model as the kit asks one: messages in the order of the benchmark, images at their places.

    Args:
        **settings: of `ChatModel`, and `max_new_tokens`.
    """
    from vlmeval.vlm.base import BaseModel

    from .models import ChatModel

    class InterleavedModel(BaseModel):
        INTERLEAVE = True
        allowed_types = ("text", "image")

        def __init__(self, max_new_tokens: int, **settings: Any):
            super().__init__()
            self.chat_model, self.max_new_tokens = ChatModel(**settings), max_new_tokens

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """Answer one question greedily."""
            keys = {"text": "text", "image": "url"}
            content = [{"type": part["type"], keys[part["type"]]: part["value"]} for part in message]
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
            return self.chat_model.answer_messages([{"role": "user", "content": content}], **options)

    return InterleavedModel(**settings)


def forget_checksums() -> None:
    """Let tables of the kit's names have other contents; otherwise it fetches its own over them."""
    import vlmeval.dataset

    for value in vars(vlmeval.dataset).values():
        if isinstance(value, type) and hasattr(value, "DATASET_MD5"):
            value.DATASET_MD5 = {}


def main() -> None:
    """Add the model to the kit's, and become its run.py."""
    settings = json.loads(sys.argv[1])
    name, is_look_alike = settings.pop("name"), settings.pop("is_look_alike")
    from vlmeval import config

    config.supported_VLM[name] = partial(make_model, **settings)
    if is_look_alike:
        forget_checksums()
    sys.argv = ["run.py", *sys.argv[2:]]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
