# SPDX-License-Identifier: Apache-2.0
"""What tests of the data engines share."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from blip3.data.things import plural


@pytest.fixture
def any_inflect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package inflect, or where it is not installed something that makes plurals of rendered things."""
    if importlib.util.find_spec("inflect") is None:
        engine = SimpleNamespace(plural_noun=lambda text: " ".join([*text.split()[:-1], plural(text.split()[-1])]))
        monkeypatch.setitem(sys.modules, "inflect", SimpleNamespace(engine=lambda: engine))
