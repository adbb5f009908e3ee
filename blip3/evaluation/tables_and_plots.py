# SPDX-License-Identifier: Apache-2.0
"""What every report is written with: Markdown tables and matplotlib figures."""

import re
from collections.abc import Sequence
from typing import Any

from ..refusals import install


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Give the lines of a Markdown table.

    >>> markdown_table(["a", "b"], [["1", "2"]])
    ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]


def escape(text: str) -> str:
    r"""Write a text on one line of a Markdown table, as it is.

    >>> print(escape("a|b"))
    a\|b
    """
    return " ".join(re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text).split())


def new_figure(size: tuple[float, float], extra: str) -> Any:
    """Make an empty matplotlib `Figure` that needs no display.

    Args:
        size: (width, height) in inches.
        extra: of this package, named where matplotlib is missing.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"The plot is rendered by matplotlib, which cannot be imported ({error}). It is probably not installed: "
            f"run {install(extra)}, or `pip install matplotlib`."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
