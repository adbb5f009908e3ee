# SPDX-License-Identifier: Apache-2.0
"""What a captioner and a rewriter are asked; what is removed from their answers is in `engines/leaks.py`.

KALE fuses by the prompting method of CapsFusion (arXiv:2310.20550) and publishes no prompt of its own. The method, in
words of this project: sentence 1 is the alt-text, with knowledge of the real world and a flawed structure; sentence 2
is synthetic, with a good structure and little detail, part of it wrong; the answer keeps the knowledge of the first in
a structure as good as that of the second, and is more than both in a row.
"""

from ..leaks import one_line

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


def fusion_prompt(alt_text: str, caption: str) -> str:
    r"""Ask for one caption of two sentences; each is set on one line, so that neither can pose as the other.

    >>> fusion_prompt("Red kite, \n Lisbon 2019", "A kite.").splitlines()[-2:]
    ['Sentence 1: Red kite, Lisbon 2019', 'Sentence 2: A kite.']
    """
    return FUSION_PROMPT.format(alt_text=one_line(alt_text), caption=one_line(caption))
