# SPDX-License-Identifier: Apache-2.0
"""One word for one thing: words that the repository does not use, what it says instead, and where an old one stays."""

import re

# A pattern, and what to say instead.
FORBIDDEN = {
    r"pictur\w*": "image",
    r"draws?\b|drawn\b": "render (pixels), sample (at random), plot (figures), initialise (weights)",
    r"doors?\b": "serving entry point, backend",
    r"contestants?\b": "candidate",
    r"aims?\b": "target",
    r"judg\w+": "score",
    r"truths?\b": "reference (an answer), annotations (of a record)",
    r"flavou?rs?\b": "variant",
    r"fresh\b": "new; newly initialised (weights)",
    r"num_parts|(?:tile|image|tokens?|\d) (?:a|per|of) parts?|\d parts\b": "view: the global one or a tile",
}

# Removed from a line before it is searched: a pattern, and why it stays.
ALLOWED = {
    # names in files and environments that others wrote or set
    r"(?:BLIP3_PICTURE|BLIP3_\(\?:PICTURE\|REQUEST\)|P)_\w*": "environment variables keep their names",
    r"\"MAX_PICTURES\"": "the end of one",
    r"[\"'`](?:pictures|truth|part)\\?[\"'`]": "keys of records, build.json, answers and results of benchmarks",
    r"\"(?:drawn|picture_weight)\"|\bdrawn: |\bpicture_weight(?:: |=)": "former keys of recipes, which are still read",
    r"--(?:pictures|flavour|part)\b": "options under their old spelling, for old command lines",
    # texts that the small model was trained on, or that people write
    r"(?:Describe|What is (?:written )?in|in) the picture\b": "prompts of the rendered world",
    r"The picture shows": "an answer of the rendered world",
    r"A picture of |\(image\|picture\)|\(\?:image\|picture\)": "captions",
    r"(?:Do )?(?:the two|both) pictures show": "prompts of the rendered world",
    r"(?:Which|In which|\{ORDINALS\[index\]\}|\(first\|second\)) picture": "prompts of the rendered world",
    r"(?:How many|There are \{NUMBERS\[len\(images\)\]\}|A walk in \{NUMBERS\[len\(images\)\]\}) pictures": "the same",
    r"colour is the door|A red door": "a thing in an example",
    r"cream creek .*|jazz jewel .*|.* doll door .*": "English words that the rendered world prints",
    # a model that scores answers, by the name that harnesses give it
    r"judge models?|needs? a judge|no judge|without a judge": "as harnesses say",
    r"--judge\b|-judge-|judge[_-](?:model|base[_-]url|url)|given\.judge|(?:has|check)_judge": "options and names",
    r"NEEDS_JUDGE|NO_JUDGE": "constants",
    # names of libraries
    r"ImageDraw\.Draw": "Pillow's name",
    r"draw\((?:st\.|texts)|records\(draw\)": "Hypothesis's name",
}


def forbidden_words(text: str) -> list[str]:
    """Lines that use a forbidden word, each with the word and what to say instead."""
    allowed, found = re.compile("|".join(ALLOWED)), []
    patterns = {re.compile(rf"(?<![a-zA-Z])(?:{word})", re.IGNORECASE): instead for word, instead in FORBIDDEN.items()}
    for row, line in enumerate(text.splitlines(), 1):
        rest = allowed.sub("", line)
        matches = ((pattern.search(rest), instead) for pattern, instead in patterns.items())
        found += [f"line {row}: {match[0]!r}, say {instead}" for match, instead in matches if match]
    return found
