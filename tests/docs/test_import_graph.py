# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: imports go one way, nothing stands apart, and the image in the docs is that of today."""

import importlib.util

import pytest

from support import ROOT

SPEC = importlib.util.spec_from_file_location("import_graph", ROOT / "docs" / "import_graph.py")
graph = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(graph)


def test_imports_go_one_way():
    modules = graph.module_graph()
    assert len(modules) > 80
    assert graph.circle_in(modules) == []
    assert graph.circle_in(graph.room_graph(modules)) == []


def test_a_circle_is_found():
    circle = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert graph.circle_in(circle) == ["b", "c", "b"]
    with pytest.raises(ValueError, match=r"b, c, b import each other .* probably stands in the wrong room: move it"):
        graph.floors_of(circle)


USED_FROM_OUTSIDE = {
    "evaluation.harness.lmms_model": "lmms-eval, by the entry point lmms_eval.models",
    "evaluation.harness.few_shot_task": "lmms-eval, by the tasks that write_tasks.py writes",
    "evaluation.harness.vlguard_task": "the same",
    "conversion.random_checkpoint": "tests, in the package so that an installed wheel can be tried without weights",
    "engines.grounding.command": "the command of the data engines, by the engine's name",
    "engines.hashes.command": "the command of the data engines, by the engine's name",
    "engines.kale.command": "the command of the data engines, by the engine's name",
    "serving.endpoint": "handler.py at the root",
}


def test_nothing_stands_apart():
    """Each module is imported by another or runs as a command."""
    modules, files = graph.module_graph(), graph.modules()
    imported = set().union(*modules.values())
    alone = [name for name in modules if name not in imported and files[name].name != "__init__.py"]
    idle = {name for name in alone if 'if __name__ == "__main__"' not in files[name].read_text(encoding="utf-8")}
    assert idle == set(USED_FROM_OUTSIDE)


def test_the_image_is_that_of_today():
    assert graph.render(graph.room_graph(graph.module_graph())) == graph.IMAGE.read_text(encoding="utf-8")
    assert "images/imports.svg" in (ROOT / "docs" / "start_here.md").read_text(encoding="utf-8")
