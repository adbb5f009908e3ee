# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import json
import re
import subprocess
import sys

import pytest

from blip3.hub import CODE_FILES
from support import ROOT

TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
PYTHON = [name for name in TRACKED if name.endswith(".py")]
SOURCES = [name for name in PYTHON if not name.startswith("tests/")]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def depth(node: ast.AST) -> int:
    """Blocks inside blocks; an `elif` is not deeper than its `if`."""
    deepest = 0
    for field, children in ast.iter_fields(node):
        for child in children if isinstance(children, list) else [children]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            is_elif = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short_and_flat(name):
    data_tables = {"write_release_layout"}  # one literal per file it writes
    for function in functions(parse(name)):
        assert depth(function) <= 4, f"{name}: {function.name} nests {depth(function)} deep"
        if function.name not in data_tables:
            assert code_lines(function) <= 60, f"{name}: {function.name} has {code_lines(function)} lines"


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_model_reads_easily(name):
    for function in functions(parse(name)):
        assert depth(function) <= 3, f"{name}: {function.name} nests {depth(function)} deep"
    classes = {node.name: node for node in parse(name).body if isinstance(node, ast.ClassDef)}
    for forward in (each for each in functions(classes.get("Blip3Model", ast.Pass())) if each.name == "forward"):
        assert code_lines(forward) <= 35
        assert depth(forward) <= 1


@pytest.mark.parametrize("name", PYTHON)
def test_every_file_names_its_licence_first(name):
    assert (ROOT / name).read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("name", CODE_FILES)
def test_model_files_import_only_what_the_loader_allows(name):
    allowed = {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for node in ast.walk(parse(name)):
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
    for node in ast.walk(parse(name)):
        assert not isinstance(node, ast.Assert), f"{name} line {node.lineno}"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"{name} line {node.lineno}"


def test_public_functions_of_the_model_files_have_docstrings_and_types():
    for name in CODE_FILES:
        for function in functions(parse(name)):
            if function.name.startswith("_"):
                continue
            assert ast.get_docstring(function) or function.name == "forward", f"{name}: {function.name}"
            arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")]
            untyped = [argument.arg for argument in arguments if argument.annotation is None]
            assert not untyped, f"{name}: {function.name} {untyped}"
            assert function.returns is not None, f"{name}: {function.name}"


@pytest.mark.parametrize("folder", ["", "base", "configs/4b", "configs/14b"])
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
        if name != "tests/docs/test_house_rules.py":
            assert not re.search(rb"(?<![\w.:/~])/(work|root|home|opt|tmp)/\w", content), name
