# SPDX-License-Identifier: Apache-2.0
"""Free fonts by name: Pillow's own and those of three small packages (licences in docs/data.md)."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from ..refusals import check_choice, install

FACES = {
    "Aileron": ("", ""),  # inside Pillow
    "Caladea": ("font_caladea", "Caladea-Regular.ttf"),
    "Caladea Bold": ("font_caladea", "Caladea-Bold.ttf"),
    "Caladea Italic": ("font_caladea", "Caladea-Italic.ttf"),
    "Manrope Light": ("font_manrope", "Manrope-Light.ttf"),
    "Manrope": ("font_manrope", "Manrope-Medium.ttf"),
    "Manrope Bold": ("font_manrope", "Manrope-ExtraBold.ttf"),
    "Fredoka One": ("font_fredoka_one", "FredokaOne-Regular.ttf"),
}
"""Face -> (package, file)."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache(maxsize=2048)
def load_font(face: str, points: int) -> ImageFont.FreeTypeFont:
    """Load a face at a size.

    Args:
        face: a key of `FACES`.
        points: size in pixels.

    Raises:
        ValueError: for an unknown face.
        ImportError: if its package is not installed.
    """
    cause = "It is probably misspelt, or the record was written by a later version: then update"
    check_choice("The font is", face, FACES, cause)
    package, file = FACES[face]
    if not package:
        font = ImageFont.load_default(points)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise ImportError(
                "Pillow was built without FreeType and has no scalable font, which drawing text needs. It was "
                "probably compiled by hand: install a wheel with `pip install --force-reinstall Pillow`."
            )
        return font
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The font {face!r} needs the package {package.replace('_', '-')}, which is not installed. The extra was "
            f"probably left out: run {install('data')}, or write with Pillow's own font, fonts=('Aileron',)."
        )
    # Basic layout: the same everywhere, with or without Raqm.
    return ImageFont.truetype(
        str(Path(spec.origin).parent / "files" / file), points, layout_engine=ImageFont.Layout.BASIC
    )


def wrap(text: str, width: float, font: Font) -> list[str]:
    """Break a text into lines of at most `width` pixels, inside a word where the word alone is longer.

    Returns:
        one line or more; line breaks of the text are kept.
    """
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line = longer
                continue
            lines += [line] if line else []
            *full, line = _break_word(word, width, font)
            lines += full
        lines.append(line)
    return lines


def _break_word(word: str, width: float, font: Font) -> list[str]:
    """Break a word into pieces of at most `width` pixels, of at least one character each."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def shorten(text: str, width: float, font: Font, ending: str = " ...") -> str:
    """Add `ending` to a text that goes on, and take off as many characters as that needs to stay within `width`."""
    while text and font.getlength(text + ending) > width:
        text = text[:-1]
    return text + ending
