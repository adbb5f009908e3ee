# SPDX-License-Identifier: Apache-2.0
"""What a captioner and a rewriter are asked, and what is removed from their answers.

KALE fuses by the prompting method of CapsFusion (arXiv:2310.20550) and publishes no prompt of its own. The method, in
words of this project: sentence 1 is the alt-text, with knowledge of the real world and a flawed structure; sentence 2
is synthetic, with a good structure and little detail, part of it wrong; the answer keeps the knowledge of the first in
a structure as good as that of the second, and is more than both in a row.
"""

import re

CAPTION_PROMPT = (
    "Describe this image in detail: what it shows, the colours, the actions, any text that can be read, and how its "
    "parts stand to each other. Write one paragraph and only what can be seen."
)
FUSION_PROMPT = """\
Below are two sentences about the same image.
Sentence 1 comes from a web page. It holds detailed real-world knowledge, such as names, places, dates and titles, \
but its sentence structure is flawed.
Sentence 2 was written by a machine. Its sentence structure is good, but it lacks detail and may be wrong in places.
Merge and refine the two into one well-structured caption. Keep every real-world detail of sentence 1, and what \
sentence 2 sees. Do not simply put one after the other. Answer with the caption alone.

Sentence 1: {alt_text}
Sentence 2: {caption}"""

_PROMPT_WORDS = re.compile(
    r"\breal[- ]world\b"
    r"|\bsentence(?:'s)? structures?\b|\bwell[- ]structured\b"
    r"|\bsentences? (?:1|2|one|two)\b|\b(?:first|second|original|given|two|both|synthetic|raw|merged) sentences?\b"
    r"|\b(?:merg|refin|rewrit|rephras|fus|combin)\w* (?:the |both |these |two |of )*(?:sentence|caption)s?\b"
    r"|\b(?:fused|merged|refined|revised|final|new) (?:caption|sentence)\b"
    r"|\balt[- ]texts?\b|\b(?:synthetic|raw) captions?\b"
    r"|\bas an ai\b|\blanguage model\b|^\W*(?:sure|certainly|of course)\W*$",
    re.IGNORECASE,
)
_OPENING = re.compile(r"^([^:]{1,100}):\s*")
_LABEL = re.compile(r"^\W*(?:answer|caption|output|result)\W*$", re.IGNORECASE)
_ECHO = re.compile(r"\bsentences? (?:1|2|one|two)\b|\bI\b|^note\b", re.IGNORECASE)
_CLOSING = r"[\"')\]\u201d\u2019]*"
_WIDE_ENDS = r"\u3002\uff01\uff1f"  # of Chinese and Japanese, which write no blank behind them
_END = re.compile(rf"[.!?\u2026]+{_CLOSING}(?=\s)|[{_WIDE_ENDS}]+{_CLOSING}")
_ENDED = re.compile(rf"[.!?\u2026{_WIDE_ENDS}]{_CLOSING}$")
_NO_END = re.compile(
    r"(?:^|[\s(\"'\u201c])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Ft|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|"
    r"No|Nos|Vol|pp?|Fig|ca?|vs|etc|approx|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Ave|Blvd|Rd)\.$"
)


def fusion_prompt(alt_text: str, caption: str) -> str:
    r"""Ask for one caption of two sentences; each is set on one line, so that neither can pose as the other.

    >>> fusion_prompt("Red kite, \n Lisbon 2019", "A kite.").splitlines()[-2:]
    ['Sentence 1: Red kite, Lisbon 2019', 'Sentence 2: A kite.']
    """
    return FUSION_PROMPT.format(alt_text=one_line(alt_text), caption=one_line(caption))


def one_line(text: str) -> str:
    """Write every run of blanks and line breaks as one blank."""
    return " ".join(text.split())


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences; a line break ends one too, an abbreviation or an initial does not.

    >>> split_sentences("Dr. J. Smith at St. Paul's, 5 p.m. today. It rains! Why?")
    ["Dr. J. Smith at St. Paul's, 5 p.m. today.", 'It rains!', 'Why?']
    """
    sentences = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            before = line[start : match.end()]
            if not (match[0] == "." and _NO_END.search(before)):
                sentences.append(before.strip())
                start = match.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def clean_caption(text: str, is_finished: bool = True) -> str:
    """Remove what an answer says about its task, sentence by sentence, as KALE does, and a sentence that was cut off.

    Args:
        text: an answer.
        is_finished: False where the answer came to its limit of tokens: then a last sentence without an end goes too.

    Returns:
        the rest in one line; empty if no letter is left.

    >>> clean_caption("Here is the merged caption: A red kite over Lisbon. It keeps all real-world details.")
    'A red kite over Lisbon.'
    >>> clean_caption("A red kite over Lisbon. It is a", is_finished=False)
    'A red kite over Lisbon.'
    """
    sentences = split_sentences(text)
    if sentences and not is_finished and not _is_ended(sentences[-1]):
        del sentences[-1]
    kept = [sentence for sentence in map(_without_opening, sentences) if not has_prompt_words(sentence)]
    whole = one_line(" ".join(kept))
    if not any(map(str.isalpha, whole)):
        return ""
    is_quoted = len(whole) > 1 and whole[0] == whole[-1] == '"' and whole.count('"') == 2
    return whole[1:-1].strip() if is_quoted else whole


def has_prompt_words(text: str) -> bool:
    """Say whether a text speaks of the task instead of the image.

    >>> has_prompt_words("Sentence 1: a kite."), has_prompt_words("A prisoner reads his sentence.")
    (True, False)
    """
    return _PROMPT_WORDS.search(text) is not None


def _without_opening(sentence: str) -> str:
    """Remove what leads up to the caption, `Here is the merged caption:`; a line of the prompt said again stays."""
    match = _OPENING.match(sentence)
    if match and (_LABEL.match(match[1]) or (has_prompt_words(match[1]) and not _ECHO.search(match[1]))):
        return sentence[match.end() :]
    return sentence


def _is_ended(sentence: str) -> bool:
    return _ENDED.search(sentence) is not None
