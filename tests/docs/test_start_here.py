# SPDX-License-Identifier: Apache-2.0
"""docs/start_here.md: its map is the tree, and every function that any page names as `path:name` exists."""

import ast
import json
import re
import subprocess
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest

from support import ROOT

PAGE = (ROOT / "docs" / "start_here.md").read_text(encoding="utf-8")
MAP = PAGE.split("<!-- map -->\n```\n")[1].split("```\n<!-- end -->")[0]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
WRITTEN = {"blip3/benchmarks/results/cpu_SUITE.json", "blip3/benchmarks/results/gpu.json"}  # by a run to come
TRACKED = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


# -- The map ----------------------------------------------------------------------------------------------------------


def places_of(tracked: Iterable[str]) -> set[str]:
    """What a map must name: files and folders of the root, and of the package; folders end in a slash."""
    places = set()
    for name in tracked:
        first, *rest = name.split("/")
        if not rest:
            places.add(first)
        elif first != "blip3":
            places.add(f"{first}/")
        else:
            places.add(f"{first}/{rest[0]}" + "/" * (len(rest) > 1))
    return places


def faults_of(file_map: str, places: set[str]) -> list[str]:
    """Say how a map differs from the tree: entries for nothing, places without an entry or with two."""
    entries = [line.split()[0] for line in file_map.splitlines() if line.strip()]
    faults = [f"{entry} is not in the tree" for entry in entries if not any(fnmatch(p, entry) for p in places)]
    for place in sorted(places):
        found = [entry for entry in entries if fnmatch(place, entry)]
        if len(found) != 1:
            faults.append(f"{place} has {len(found)} entries")
    return faults


def test_the_map_is_the_tree():
    assert faults_of(MAP, places_of(TRACKED)) == []


def test_every_entry_says_what_it_is():
    for line in filter(None, MAP.splitlines()):
        assert re.match(r"\S+ +\S+ \S+|LICENSE +\S+$", line), line


@pytest.mark.parametrize("entry", [line for line in MAP.splitlines() if line])
def test_a_map_without_an_entry_is_refused(entry):
    assert faults_of(MAP.replace(f"{entry}\n", ""), places_of(TRACKED))


@pytest.mark.parametrize("new", ["NOTES.md", "tool.py", "new/file.txt", "blip3/tool.py", "blip3/new/tool.py"])
def test_a_tree_with_something_new_is_refused(new):
    assert faults_of(MAP, places_of([*TRACKED, new]))


def test_an_entry_for_nothing_is_refused():
    assert faults_of(f"{MAP}gone.py   was here\n", places_of(TRACKED)) == ["gone.py is not in the tree"]


# -- Paths that are named ---------------------------------------------------------------------------------------------


def missing_paths(text: str, where: Iterable[str] = ()) -> list[str]:
    """Paths in code spans that are not in the tree.

    Args:
        text: Markdown.
        where: folders to look in beside the root. With one, every folder and script must be there; without, only what
            begins with a file or folder of the root, since pages name many that a command writes.
    """
    tops = {name.split("/")[0] for name in TRACKED}
    spans = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    named = {span for span in spans if "/" in span and span.split("/")[0] in tops}
    if where:
        named |= {span for span in spans if span.endswith(("/", ".py"))}
    places = [ROOT, *(ROOT / folder for folder in where)]
    named -= {*WRITTEN, *(f"base/{path.stem}" for path in (ROOT / "recipes/small/provenance/base").iterdir())}
    return sorted(span for span in named if not any((place / span).exists() for place in places))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    assert missing_paths((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [name for name in TRACKED if name.endswith(".ipynb")])
def test_every_path_that_a_notebook_names_exists(name):
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert len(re.findall(r"`[^`]+`", text)) >= 8
    assert missing_paths(text, ["examples"]) == []


def test_a_path_that_is_gone_is_noticed():
    assert missing_paths("See `blip3/gone.py` and `recipes/4b/`.") == ["blip3/gone.py"]
    assert missing_paths("In `mini/`, by `stripes.py`, `gone.py` and `base/`.", ["examples"]) == ["gone.py", "mini/"]


# -- Functions that are named -----------------------------------------------------------------------------------------


def pairs_of(text: str) -> list[tuple[str, str]]:
    """Every `path:name` in code spans."""
    return re.findall(r"`([\w./]+\.py):([\w.]+)`", text)


def defines(path: str, name: str) -> bool:
    """Whether a file defines a class, function, method or constant, by its dotted name."""
    if not (ROOT / path).is_file():
        return False
    bodies = [ast.parse((ROOT / path).read_text(encoding="utf-8")).body]
    for part in name.split("."):
        found = [node for body in bodies for node in body if part in names_of(node)]
        if not found:
            return False
        bodies = [getattr(node, "body", []) for node in found]
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", PAGES)
def test_every_function_named_exists(page):
    missing = [pair for pair in pairs_of((ROOT / page).read_text(encoding="utf-8")) if not defines(*pair)]
    assert missing == []


def test_the_ways_of_a_record_and_an_image_name_their_functions():
    for heading, least in (("One record", 12), ("One image", 10), ("Where to change what", 8)):
        section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
        assert len(pairs_of(section)) >= least, heading


def test_a_name_that_is_gone_is_noticed():
    assert defines("modeling_blip3.py", "Blip3Model.forward")
    assert not defines("modeling_blip3.py", "Blip3Model.backward")
    assert not defines("modeling_blip3.py", "forward")
    assert not defines("modeling_blip4.py", "Blip3Model")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target
