# SPDX-License-Identifier: Apache-2.0
"""What tests of the page share: uploads, and what one question yields."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import render_image


def upload(chat: Any, name: str, height: int, width: int, seed: int = 0) -> Path:
    path = chat.uploads / name
    render_image(height, width, seed).save(path)
    return path


def ask(chat: Any, text: str, files=(), turns=(), splits=True, length=12, temperature=0, session="one"):
    """What one question yields; of Gradio's parts only the values are looked at."""
    sent = {"text": text, "files": [str(file) for file in files]}
    request = SimpleNamespace(session_hash=session)
    return list(chat.answer(sent, list(turns), length, temperature, splits, request))
