# SPDX-License-Identifier: Apache-2.0
"""What a language model says of its task instead of the image, and captions without it.

    preface    Here is the caption: A kite.          goes, the caption behind it stays
    sentence   A kite. I hope this helps!            goes whole, as KALE (arXiv:2411.07461) does
    echo       Sentence 1: a kite.                   a line of the prompt said again: goes whole

A sentence is convicted by several words together. One word never is enough: there are sentences in prisons, caption
contests and the real world on photographs, too. In doubt a sentence stays.
"""

import re

_TEXTS = r"(?:sentence|caption|description|alt[- ]text|text|input)s?"
_PAIR = r"(?:the|both|these|those|two|of|first|second|original|given|provided|above|all|raw|synthetic|dense|and)"
_JOIN = r"(?:merg|combin|fus|blend|integrat|incorporat|refin|rewrit|rephras)(?:e|es|ed|ing|ting|ten|s)?"
_ANEW = (
    r"(?:merged|fused|combined|refined|revised|rewritten|improved|enhanced|integrated|updated|resulting|joint|blended|"
    r"final|new|single|complete|detailed|concise|coherent|unified|well[- ](?:structured|formed|written))"
)
_DOES = (
    r"(?:keeps?|retains?|combines?|merges?|fuses?|incorporates?|integrates?|preserves?|maintains?|blends?|"
    r"is (?:now )?well[- ](?:structured|formed|written))"
)
_I = r"(?-i:\bI)"

_TALK = (
    # what the prompt calls things
    r"\bsentences? [12]\b",
    r"\b(?-i:Sentence (?:One|Two))\b|\bsentence (?:one|two)\b(?=\W*$|[,:]| (?:and sentence|is|has|says|describes)\b)",
    r"\breal[- ]world (?:details?|knowledge|information|facts?|context)\b",
    r"\bsentence(?:'s)? structures?\b(?=.*\b(?:flawed|good|better|clear|correct|improved|coherent|fluent)\b)",
    r"\b(?:kept|keep\w*|improv\w*|maintain\w*|refin\w*|follow\w*|flawed|good|better|same|clear|the|its)"
    r" (?:the |a |its )?sentence structures?\b(?! (?:work|lesson|chart|poster|game|book|test|of))",
    r"\b(?:the|given|provided|original|this|both|my) (?:[\w-]+ )?alt[- ]texts?\b",
    r"\b(?:raw|synthetic) (?:caption|sentence)s?\b",
    # of the two texts
    rf"\b{_JOIN} (?:{_PAIR} )+(?:[\w-]+ )?(?:sentences|captions|descriptions|alt[- ]texts?)\b",
    rf"\b(?:details?|knowledge|information|elements?|facts?|parts?|names?) (?:of|from|in) (?:{_PAIR} )+{_TEXTS}\b",
    rf"\b(?:details?|knowledge|information|elements?|facts?) (?:of|from|in) {_PAIR} {_PAIR}\b(?=\W*$)",
    r"\bthe (?:first|second|original|other) (?:sentence|caption|description|one) "
    r"(?:mentions|provides|lacks|adds|offers|focuses|describes the|is flawed|has (?:real|more|little|a flawed))\b",
    # of the result
    rf"\b(?:this|the|my|our) (?:{_ANEW},? (?:and )?)+(?:caption|description)\b(?! contest| com)",
    rf"\b(?:a|this|the|my) (?:{_ANEW} )*(?:merged|fused|rewritten) (?:caption|sentence)\b",
    rf"\b(?:this|the)(?: {_ANEW}| above)* (?:sentence|caption|description) (?:now |also )?{_DOES}\b",
    rf"^\W*this (?:{_ANEW} )*(?:sentence|caption|description) (?:includes|provides|describes|captures|gives)\b",
    r"\b(?:caption|sentence)s? (?:is|are) (?:now )?well[- ](?:structured|formed|written)\b",
    r"^\W*the (?:detailed|given|provided|original|above) (?:sentence|caption|description) [a-z]+s\b",
    r"^\W*(?:here(?:'s| is)|below is) "
    rf"(?:the|a|an|my|your|one)(?: {_ANEW},?(?: and)?)* (?:caption|sentence)\b(?! contest)[^:]*$",
    # of the one who writes
    rf"{_I}(?:'ve| have)?(?: also| only| just)? (?:kept|{_JOIN}|retained|preserved|omitted|removed|corrected|included|"
    r"added|left out|changed|made sure|tried to|followed)\b.*\b(?:details?|information|knowledge|facts?|names?|"
    r"captions?|descriptions?|sentences?|structure|alt[- ]text|elements?|instructions?)\b",
    rf"^\W*(?:please )?note\b(?: that)?\W.*(?:{_I}\b|\b(?:captions?|sentences?|descriptions?|alt[- ]text)\b"
    r"|\bdetails?\b.*\b(?:kept|retained|preserved|omitted|added|removed)\b)",
    rf"^\W*(?:{_I} )?hope (?:this|that|it)\b.{{0,30}}\b(?:helps?|helpful|meets|works|suits|satisf\w+)\b",
    r"^\W*(?:please )?(?:let me know (?:if|whether|how|what)|feel free to (?:ask|adjust|modify|change|edit|let))\b",
    r"^\W*(?:would you like|do you want|shall I|should I)\b.*\b(?:me|caption|version|I)\b",
    r"^\W*is there anything else\b",
    r"\bas an ai\b(?: (?:language |text )?model| assistant)?(?=,|\W*$| (?:language|text|model|assistant))"
    r"|\bas a(?: large)? language model\b",
    rf"{_I}(?:'m| am)? (?:cannot|can't|can not|do not|don't|unable to|not able to) "
    r"(?:actually |directly )?(?:see|view|access|open|display|analy[sz]e)\b.*\b(?:images?|photos?|files?|links?)\b",
    rf"^\W*{_I}(?:'m| am) sorry,? (?:but )?I(?:'m| am)? (?:cannot|can't|can not|unable|not able|do not|don't)\b",
    r"^\W*(?:sure|certainly|of course|absolutely|okay|ok|got it|understood)(?: thing)?\W*$",
    rf"^\W*(?:(?:the|my|your) )?(?:{_ANEW},? (?:and )?)*(?:caption|answer|output|sentence)\W*$",
)
_SPEAKS = re.compile("|".join(f"(?:{pattern})" for pattern in _TALK), re.IGNORECASE)

_OPENING = re.compile(r"^([^:]{1,140}):\s*")
_LABELS = (
    r"^\W*(?:answer|caption|output|result|response)\W*$",
    rf"^\W*(?:(?:the|my|your|a) )?(?:{_ANEW},? (?:and )?)+(?:answer|caption|sentence|description|output|version)\W*$",
    r"^\W*(?:(?:sure|certainly|of course|absolutely|okay|ok|got it)(?: thing)?\W+)?"
    r"(?:here(?:'s| is| are| goes)|below is|the following is|this is|this would be)\b.*"
    r"\b(?:captions?|sentences?|descriptions?|versions?|answer|response|result|paragraph|rewrite|attempt)\b"
    r"(?=\W*$| (?:that|which|with|of|for|from|in|as|based|combining|merging|incorporating|integrating|using|you|I)\b)",
)
_LABEL = re.compile("|".join(_LABELS), re.IGNORECASE)
_NUMBER = re.compile(r"\bsentences? (?:1|2|one|two)\b", re.IGNORECASE)
_WRITER = re.compile(rf"{_I}\b|^note\b", re.IGNORECASE)
_CLAUSE = re.compile(
    r"^\W*(?:based (?:up)?on|according to|given|from|using|considering|drawing (?:up)?on|taking|by|when)?\s*"
    rf"(?:{_JOIN} |taken together,? )?(?:{_PAIR} )+(?:[\w-]+ )?"
    r"(?:sentences|captions|descriptions|alt[- ]texts?|texts|inputs|information|details)"
    r"(?: (?:provided|given|above|together|into one|you (?:gave|provided)))*,\s*",
    re.IGNORECASE,
)
_LEADS = re.compile(
    rf"^\W*(?:based|according|given|from|using|considering|drawing|taking|by|when|{_JOIN})\b", re.IGNORECASE
)
_BEGINS = (  # capitalised where a sentence or a part of one begins
    r"(?:Additionally|After(?:wards)?|Again|Also|Although|And|As|Because|Before|But|Can|Could|Did|Do|Finally|First|Hence|"
    r"Here|How|However|If|Instead|May|Next|Now|Once|Only|Or|Otherwise|Overall|Second|Shall|Should|Since|So|Still|Such|"
    r"That|Then|Therefore|This|Though|Thus|Unless|Until|What|When|Where|Whereas|Which|While|Why|Will|Would|Yes|Yet)"
)
_NUMERAL = re.compile(rf"(?<![\w'-])(?!{_BEGINS}\s)([A-Z][\w'.-]*\s+)I\b(?!')")  # World War I, Edward I, Mark I
_BOLD = re.compile(r"(?<![\w*])(\*{2,3})(?=\S)(.+?)(?<=\S)\1(?![\w*])")
_HEADING = re.compile(r"^#{1,6} +", re.MULTILINE)

_CLOSING = r"[\"')\]\u201d\u2019]*"
_WIDE_ENDS = r"\u3002\uff01\uff1f"  # of Chinese and Japanese, which write no blank behind them
_END = re.compile(rf"[.!?\u2026]+{_CLOSING}(?=\s)|[{_WIDE_ENDS}]+{_CLOSING}")
_ENDED = re.compile(rf"[.!?\u2026{_WIDE_ENDS}]{_CLOSING}$")
_NO_END = re.compile(
    r"(?:^|[\s(\"'\u201c])(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Ft|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|"
    r"No|Nos|Vol|pp?|Fig|ca?|vs|etc|approx|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Ave|Blvd|Rd)\.$"
)


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
    """Remove what an answer says about its task, and a sentence that was cut off.

    Args:
        text: an answer.
        is_finished: False where the answer came to its limit of tokens: then a last sentence without an end goes too.

    Returns:
        the rest in one line, without marks of bold type; empty if no letter is left.

    >>> clean_caption("Sure, here is the merged caption: A red kite over Lisbon. I hope this helps!")
    'A red kite over Lisbon.'
    >>> clean_caption("A red kite over Lisbon. It is a", is_finished=False)
    'A red kite over Lisbon.'
    """
    sentences = split_sentences(_BOLD.sub(r"\2", _HEADING.sub("", text)))
    if sentences and not is_finished and not _is_ended(sentences[-1]):
        del sentences[-1]
    kept = [sentence for sentence in map(without_preface, sentences) if not speaks_of_task(sentence)]
    whole = one_line(" ".join(kept))
    if not any(map(str.isalpha, whole)):
        return ""
    is_quoted = len(whole) > 1 and whole[0] == whole[-1] == '"' and whole.count('"') == 2
    return whole[1:-1].strip() if is_quoted else whole


def speaks_of_task(sentence: str) -> bool:
    """Say whether a sentence speaks of the task instead of the image.

    >>> [speaks_of_task(text) for text in ("Sentence 1: a kite.", "A prisoner reads his first sentence.")]
    [True, False]
    """
    return _SPEAKS.search(_plain(sentence)) is not None


def has_leak(text: str) -> bool:
    """Say whether a sentence of a text speaks of the task, or has a preface.

    >>> has_leak("A red kite. Caption: it flies."), has_leak("A red kite. It flies.")
    (True, False)
    """
    return any(speaks_of_task(each) or without_preface(each) != each for each in split_sentences(text))


def without_preface(sentence: str) -> str:
    """Remove what leads up to the caption; a line of the prompt said again stays, to go whole.

    >>> without_preface("Based on the two descriptions, a red kite flies.")
    'A red kite flies.'
    """
    match = _OPENING.match(_plain(sentence))
    if match and not _NUMBER.search(match[1]):
        before = match[1]
        if _LABEL.search(before) or (speaks_of_task(before) and not _WRITER.search(before)):
            return sentence[match.end() :]
    match = _CLAUSE.match(sentence)
    if match and _LEADS.match(sentence):
        rest = sentence[match.end() :]
        return rest[:1].upper() + rest[1:]
    return sentence


def _plain(sentence: str) -> str:
    """Write apostrophes as keyboards do and the I of a name as a numeral, one character for one.

    An I behind a capitalised word is part of a name, as in Edward I, unless sentences begin with that word.
    """
    return _NUMERAL.sub("\\1\u2160", sentence.replace("\u2019", "'"))


def _is_ended(sentence: str) -> bool:
    return _ENDED.search(sentence) is not None
