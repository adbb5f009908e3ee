# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from blip3.hub import CODE_FILES
from support import ROOT
from support.house_rules import (
    absolute_paths,
    deep_functions,
    foreign_private_names,
    functions,
    lines_of_code,
    long_functions,
    parse,
    path_edits,
    private_definitions,
    second_names,
    undocumented,
)

TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
PYTHON = [name for name in TRACKED if name.endswith(".py") and not name.startswith("tests/old_files/")]
SOURCES = [name for name in PYTHON if not name.startswith("tests/")]
PACKAGE = [name for name in SOURCES if name.startswith("blip3/") or "/" not in name]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PYTHON}
PRIVATE = {name: private_definitions(text) for name, text in TEXTS.items()}

MOST_NESTED, MOST_LINES, MOST_CODE, MOST_TEST_CODE = 3, 60, 500, 600
LONG_TABLES = {"write_release_layout"}  # one literal per file it writes
LONG_FILES = {  # with their own limits
    "modeling_blip3.py": 560,  # the Hub's reader opens one file
    "tests/model/test_bad_input.py": 720,  # to be cut by model file
}
CONTRACT = {
    "_no_split_modules": "transformers and accelerate read it to place layers on devices",
    "_get_num_multimodal_tokens": "vLLM and transformers' own servers call the processor by this name",
}
OLD_OPTIONS = {
    "--pictures": "command lines written before the option was called --images",
    "--part": "command lines written before the option was called --suite",
    "--flavour": "command lines written before the option was called --variant",
}
# What tests watch or stop where nothing public would show it.
REACHED = {
    "tests/model/test_generation_blip3.py": {"_extend": "counted: copies of the cache show nowhere else"},
    "tests/serving/test_page_chat.py": {"_running": "must be empty once an answer has ended"},
    "tests/serving/test_fetch.py": {"_connect": "given a socket pair in place of a server"},
    "tests/test_checkpoints.py": {"_code_in_use": "state of the process, emptied between tests"},
}
PATH_EDITORS = {
    "tests/conversion/test_conversion_trained.py": "a program that imports as the endpoint's container does",
    "tests/docs/test_publishing_docs.py": "writes the tables of the documentation when it is run as a script",
    "tests/environments/soak/container.py": "stands for the endpoint's container, which puts the folder first",
    "tests/serving/test_handler.py": "a program that imports as the endpoint's container does",
}


def faults_of(names: list[str], rule: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """What breaks a rule, by file."""
    found = {name: rule(TEXTS[name]) for name in names}
    return {name: faults for name, faults in found.items() if faults}


def test_functions_are_short_and_flat():
    assert faults_of(PYTHON, lambda text: deep_functions(text, MOST_NESTED)) == {}
    found = faults_of(PYTHON, lambda text: long_functions(text, MOST_LINES))
    assert {name for faults in found.values() for name in faults if name.split()[0] not in LONG_TABLES} == set(), found


def test_files_have_one_reason_to_exist():
    sizes = {name: lines_of_code(TEXTS[name]) for name in PYTHON}
    limits = {name: MOST_TEST_CODE if name.startswith("tests/") else MOST_CODE for name in PYTHON} | LONG_FILES
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}, "cut these files by theme"


def test_no_file_reaches_for_private_names_of_another():
    found = {}
    for name in PYTHON:
        elsewhere = set().union(*(names for other, names in PRIVATE.items() if other != name))
        found[name] = foreign_private_names(TEXTS[name], elsewhere, CONTRACT | REACHED.get(name, {}))
    assert {name: faults for name, faults in found.items() if faults} == {}


def test_everything_public_has_a_docstring_and_one_name():
    assert faults_of(PACKAGE, undocumented) == {}
    assert faults_of(PACKAGE, lambda text: second_names(text, OLD_OPTIONS)) == {}


def test_no_file_edits_the_import_path():
    assert set(faults_of(PYTHON, path_edits)) == set(PATH_EDITORS)


def test_no_exception_has_outlived_its_reason():
    for name, allowed in REACHED.items():
        assert [private for private in allowed if private not in TEXTS[name]] == [], name
    assert [name for name, most in LONG_FILES.items() if lines_of_code(TEXTS[name]) <= most - 50] == []
    assert [name for name in CONTRACT if name not in set().union(*PRIVATE.values())] == []
    assert [name for name in OLD_OPTIONS if not any(f'"{name}"' in TEXTS[source] for source in PACKAGE)] == []


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_model_reads_easily(name):
    assert deep_functions(TEXTS[name], 3) == []
    for node in parse(TEXTS[name]).body:
        if isinstance(node, ast.ClassDef) and node.name == "Blip3Model":
            (forward,) = (each for each in functions(node) if each.name == "forward")
            forward = textwrap.dedent(ast.get_source_segment(TEXTS[name], forward, padded=True))
            assert long_functions(forward, 35) == []
            assert deep_functions(forward, 1) == []


PATH = "sys." + "path"  # in two, so that this file keeps the rule itself
NESTED = """
def outer():
    for a in b:
        if a:
            with a:
                try:
                    pass
                finally:
                    pass
"""


@pytest.mark.parametrize(
    "fault",
    [
        deep_functions(NESTED, 3),
        long_functions("def long():\n" + "    pass\n" * 61, 60),
        undocumented("def ask():\n    pass\n"),
        undocumented('class Asker:\n    """Asks."""\n\n    def ask(self):\n        pass\n'),
        path_edits(PATH + ".insert(0, folder)"),
        path_edits(PATH + "[:0] = [folder]"),
        path_edits(PATH + " = [folder]"),
        absolute_paths("see /" + "home/someone/model"),
        second_names("def ask():\n    pass\n\n\nquestion = ask\n", {}),
        second_names('parser.add_argument("--images", "--photos")\n', OLD_OPTIONS),
        foreign_private_names("from other import _helper\n", set(), {}),
        foreign_private_names("other._helper()\n", {"_helper"}, {}),
        foreign_private_names('monkeypatch.setattr(other, "_helper", 1)\n', {"_helper"}, {}),
    ],
)
def test_each_rule_can_fail(fault):
    assert len(fault) == 1


def test_what_the_rules_allow():
    assert deep_functions(NESTED, 4) == []
    assert depth_of_elif() == []
    assert lines_of_code('"""Prose."""\n\n# more prose\nx = 1\ny = (\n    2\n)\n') == 4
    assert undocumented("def _ask():\n    pass\n") == []
    assert foreign_private_names("self._helper()\ntorch._dynamo.reset()\n", {"_helper"}, {}) == []
    assert foreign_private_names("other._helper()\n", {"_helper"}, {"_helper": "a contract"}) == []


def depth_of_elif() -> list[str]:
    text = "def choose():\n    if a:\n        pass\n" + "    elif b:\n        pass\n" * 4
    return deep_functions(text, 1)


def test_every_file_names_its_licence_first():
    first = "# SPDX-License-Identifier: Apache-2.0\n"
    assert [name for name, text in TEXTS.items() if not text.startswith(first)] == []


@pytest.mark.parametrize("name", CODE_FILES)
def test_model_files_import_only_what_the_loader_allows(name):
    allowed = {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for node in ast.walk(parse(TEXTS[name])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [] if node.level else [node.module]
            if node.level:
                assert node.level == 1, f"{name} line {node.lineno}"
                assert (ROOT / f"{node.module}.py").is_file(), f"{name} line {node.lineno}: {node.module}"
        else:
            continue
        assert {module.split(".")[0] for module in modules} <= allowed, f"{name} line {node.lineno}"


@pytest.mark.parametrize("name", CODE_FILES)
def test_model_files_name_every_file_they_need(name):
    """Transformers 4.57 copies the files a module imports itself, and not what those import in turn."""

    def imported(file: str) -> set[str]:
        text = (ROOT / file).read_text(encoding="utf-8")
        return {f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)}

    direct = imported(name)
    assert all(imported(needed) <= direct for needed in direct)


@pytest.mark.parametrize("name", CODE_FILES)
def test_model_files_do_not_print_or_assert(name):
    for node in ast.walk(parse(TEXTS[name])):
        assert not isinstance(node, ast.Assert), f"{name} line {node.lineno}"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"{name} line {node.lineno}"


def test_public_functions_of_the_model_files_have_docstrings_and_types():
    for name in CODE_FILES:
        for function in functions(parse(TEXTS[name])):
            if function.name.startswith("_"):
                continue
            assert ast.get_docstring(function) or function.name == "forward", f"{name}: {function.name}"
            arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")]
            untyped = [argument.arg for argument in arguments if argument.annotation is None]
            assert not untyped, f"{name}: {function.name} {untyped}"
            assert function.returns is not None, f"{name}: {function.name}"


@pytest.mark.parametrize("folder", ["", "base", "post_trained", "configs/4b", "configs/14b"])
def test_configurations_of_model_and_processor_agree(folder):
    """Some engines serve different grids in config.json and preprocessor_config.json without a message."""
    config, images, processor = (
        json.loads((ROOT / folder / name).read_text())
        for name in ("config.json", "preprocessor_config.json", "processor_config.json")
    )
    assert config["tile_grids"] == images["tile_grids"]
    assert config["vision_config"]["image_size"] == images["size"]["height"] == images["size"]["width"]
    assert config["resampler_config"]["num_latents"] == processor["num_latents"]
    assert config["resampler_config"]["token_sampling"] == processor["token_sampling"]


def test_no_absolute_paths_and_no_large_files_are_tracked():
    for name in TRACKED:
        content = (ROOT / name).read_bytes()
        is_weights = name.endswith(".safetensors")
        assert len(content) < (6_000_000 if is_weights else 500_000), name
        assert absolute_paths(content.decode("latin-1")) == [], name
