# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md as functions of a file's text: each returns what breaks it, one line a fault."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
BESIDE_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@cache
def parse(text: str) -> ast.Module:
    """Parse a file; each rule asks for the same ones."""
    return ast.parse(text)


def functions(tree: ast.AST) -> list[Function]:
    """Every function and method, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def depth(node: ast.AST) -> int:
    """Blocks inside blocks; an `elif` is not deeper than its `if`."""
    deepest = 0
    for field, children in ast.iter_fields(node):
        for child in children if isinstance(children, list) else [children]:
            if not isinstance(child, ast.AST) or isinstance(child, Function | ast.ClassDef):
                continue
            is_elif = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def deep_functions(text: str, limit: int) -> list[str]:
    """Functions that nest deeper than `limit` blocks."""
    found = [(function.name, depth(function)) for function in functions(parse(text))]
    return [f"{name} nests {levels} deep, at most {limit} are allowed" for name, levels in found if levels > limit]


def long_functions(text: str, limit: int) -> list[str]:
    """Functions of more than `limit` lines, signature and docstring not counted."""
    found = []
    for function in functions(parse(text)):
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        found.append((function.name, (body[-1].end_lineno or 0) - body[0].lineno + 1))
    return [f"{name} has {lines} lines, at most {limit} are allowed" for name, lines in found if lines > limit]


def lines_of_code(text: str) -> int:
    """Lines that hold code: neither empty, nor a comment, nor part of a docstring."""
    prose: set[int] = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in BESIDE_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def undocumented(text: str) -> list[str]:
    """Public functions, classes, and methods of public classes without a docstring; PyTorch's `forward` needs none."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_") or node.name == "forward":
                continue
            if ast.get_docstring(node) is None:
                yield f"{prefix}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{node.name}.")

    return list(walk(parse(text).body, ""))


def path_edits(text: str) -> list[str]:
    """Lines that change `sys.path`, or say in a text that is run that it should be."""
    pattern = r"sys\.path\s*(\[.*\]\s*=|=|\+=|\.(insert|append|extend|remove|pop|clear)\b)"
    return [f"line {row}: {line.strip()}" for row, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]


def absolute_paths(text: str) -> list[str]:
    """Paths of one machine."""
    return re.findall(r"(?<![\w.:/~])/(?:work|root|home|opt|tmp)/\w+", text)


def second_names(text: str, old_options: Mapping[str, str]) -> list[str]:
    """A function or class given a second name, and options with two spellings that `old_options` does not name."""
    tree = parse(text)
    named = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in named:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            spelt = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            found += [f"line {call.lineno}: {option}" for option in spelt[1:] if option not in old_options]
    return found


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_definitions(text: str) -> set[str]:
    """Private names that a file gives: functions, classes, constants, attributes."""
    found: set[str] = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
    return set(filter(is_private, found))


def foreign_private_names(text: str, defined_elsewhere: set[str], allowed: Mapping[str, str]) -> list[str]:
    """Private names of other modules that a file imports, reads, or names to `setattr` and the like.

    Args:
        text: of the file.
        defined_elsewhere: private names that files of the repository give; those of libraries are not meant.
        allowed: names with the reason why they may be used.
    """
    foreign = defined_elsewhere - private_definitions(text) - set(allowed)
    found = []
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in foreign and not _is_own(node.value) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "hasattr")):
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = [name for name in texts if name in foreign]
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


def _is_own(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    return ast.unparse(node) in ("self", "cls", "super()")
