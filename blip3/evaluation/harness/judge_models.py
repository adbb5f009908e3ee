# SPDX-License-Identifier: Apache-2.0
"""Which numbers need a judge model, and what is said of them where none was asked.

Without a server, harnesses stand in for it: by letters at random, by "unclear" for every answer, or by words compared.
"""

from urllib.parse import urlsplit

NO_JUDGE = "not scored: needs a judge"
NEEDS_JUDGE = ("mmvet", "mathvista", "mmbench", "hallusion_bench", "MMVet", "MathVista", "LLaVABench", "MMDU")
"""Beginnings of tasks of lmms-eval and of tables of VLMEvalKit whose numbers mean nothing unless one was asked."""
GPT_METRICS = ("gpt", "llm_as")
"""Beginnings of metrics of lmms-eval that say the same of any task."""
RULES = "exact_matching"
"""What VLMEvalKit calls asking none."""


def check_judge_url(option: str, url: str) -> None:
    """Refuse what is no address of a server, since a number would then stand for a judge model that nobody asked.

    Args:
        option: that it was given to, for the error.
        url: as given.

    Raises:
        ValueError: unless it is http or https with a host; also where it has a user's name or a password in it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{option} is {url!r}, but the URL of an OpenAI-compatible server is expected, such as "
            "http://127.0.0.1:8000/v1. A name of a model was probably given, or http:// left out: name the server "
            "that was asked, or leave the option out where none was."
        )
    if "@" in parts.netloc:
        raise ValueError(
            f"{option} names {parts.hostname} with a user's name or a password, but it is written into tables that "
            "others read. The key was probably kept in the URL: leave out what stands before the @."
        )


def needs_judge_model(task: str, metric: str) -> bool:
    """Whether a task's number means nothing unless a judge model was asked.

    >>> needs_judge_model("mmvet", "any"), needs_judge_model("new", "gpt_score"), needs_judge_model("pope", "pope_f1")
    (True, True, False)
    """
    return task.startswith(NEEDS_JUDGE) or metric.startswith(GPT_METRICS)
