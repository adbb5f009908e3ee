# SPDX-License-Identifier: Apache-2.0
"""Filters: stages that drop images, captions or single lines of text, each by an option and counted by its name.

    before     image and alt-text               sides, listed, duplicates, nsfw, faces, alt-text
    between    lines of text that OCR found     confidence, letters, text_area, text_language, personal_data
    after      the caption that kale wrote      caption_length

A filter is off until its option is given; the smallest side is the exception.
"""

from .options import (
    add_caption_options,
    add_least_options,
    add_line_options,
    add_options,
    between,
    describe,
    stages,
)

__all__ = [
    "add_caption_options",
    "add_least_options",
    "add_line_options",
    "add_options",
    "between",
    "describe",
    "stages",
]
