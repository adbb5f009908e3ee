# SPDX-License-Identifier: Apache-2.0
"""README is executed: its code on the lines it names, its commands, its figure and its figures of speed."""

import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from blip3 import cli
from blip3.hub import CODE_FILES, model_code
from support import IS_TRANSFORMERS_5, ROOT, render_image

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NO_DOCTESTS = (
    "configuration_blip3",
    "image_processing_blip3",
    "modeling_blip3",
    "processing_blip3",
    "towers_blip3",
)


def test_every_python_block_runs_on_the_lines_it_names(monkeypatch):
    """In the repository's folder, as README says; what comes from the Hub comes from the same folder here."""
    monkeypatch.chdir(ROOT)
    assert len(BLOCKS) >= 6
    namespace: dict = {}
    num_run = 0
    for block in BLOCKS:
        first_line = block.splitlines()[0]
        assert re.match(r"# transformers 4\.57( and 5\.x)?(:.*)?$", first_line), f"say which lines: {first_line}"
        if IS_TRANSFORMERS_5 and "5.x" not in first_line:
            continue
        exec(compile(block.replace('"OWNER/NAME"', repr(str(ROOT))), "README.md", "exec"), namespace)
        num_run += 1
    assert num_run == len(BLOCKS) - IS_TRANSFORMERS_5
    assert namespace["loss"].item() > 0


def test_the_first_answer_is_right_and_the_pipeline_reads(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    for block in (BLOCKS[0], next(block for block in BLOCKS if "pipeline(" in block)):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "5"
    assert "98654" in printed


def test_readme_is_short_and_says_what_it_is_first():
    assert len(README.splitlines()) <= 200
    first = README.split("# BLIP-3, open\n\n")[1].split(". ")[0]
    assert "model" in first
    assert "for anyone who" in first


def test_the_figure_is_the_one_the_command_renders(tmp_path):
    """The figure of README, rendered again by the command named there."""
    (file,) = re.findall(r"!\[.*?\]\((docs/images/.*?)\)", README)
    assert f"python demo.py --output {file}" in README.replace("`\n", "` ").replace("\n", " ")
    command = [sys.executable, str(ROOT / "demo.py"), "--output", str(tmp_path / "figure.png")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    with Image.open(ROOT / file) as kept, Image.open(tmp_path / "figure.png") as rendered:
        assert kept.size == rendered.size, "render it again by the command that README names"
        difference = np.abs(np.asarray(kept, dtype=float) - np.asarray(rendered, dtype=float)).mean()
    assert difference < 1, "render it again by the command that README names"


def test_the_rows_of_speed_are_measured_values():
    """Each row's target, value and verdict stand so in the results."""
    results = json.loads((ROOT / "blip3" / "benchmarks" / "results" / "cpu_targets.json").read_text(encoding="utf-8"))
    measured = {
        (
            row["target"],
            f"{row['result']['median']:.2f}{row['unit']}",
            {True: "yes", False: "no", None: ""}[row["reached"]],
        )
        for row in results
        if row["result"]
    }
    block = README.split("<!-- benchmarks:cpu:headline -->\n")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.strip().splitlines()]
    assert rows[0] == ["what", "speed-up over", "target", "measured", "met"]
    assert len(rows[2:]) == 6
    assert {tuple(row[2:]) for row in rows[2:]} <= measured


def test_readme_names_the_python_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} and later" in README


def test_the_older_auto_class_is_shown_and_exists_on_its_line_only():
    import transformers

    assert "AutoModelForVision2Seq" in README
    assert hasattr(transformers, "AutoModelForVision2Seq") == (not IS_TRANSFORMERS_5)


def test_the_header_is_a_valid_model_card():
    data = ModelCard(README).data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"


def extras_with_all_they_hold(named: set[str]) -> set[str]:
    """Add the extras of this package that others refer to."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert named <= set(extras), named
    inner = {name for each in named for text in extras[each] for name in re.findall(r"blip3\[([\w,-]+)\]", text)}
    inner = {name for text in inner for name in text.split(",")} - named
    return extras_with_all_they_hold(named | inner) if inner else named


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_block_of_commands_names_the_extras_it_needs(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    needed = {command.module: command.extra for command in cli.COMMANDS.values()}
    for block in re.findall(r"```bash\n(.*?)```|((?:^    .*\n)+)", text, flags=re.DOTALL | re.MULTILINE):
        block = re.sub(r"\S  +#.*", "", "".join(block))  # remarks behind a command
        modules = re.findall(r"-m blip3\.([\w.]+)|python (\w[\w/]*)\.py", block)
        modules = [first or second.replace("/", ".") for first, second in modules]
        named = {
            extra for found in re.findall(r"pip install -e ['\"]\.\[([\w,-]+)\]", block) for extra in found.split(",")
        }
        wanted = {needed.get(module, "") for module in modules} - {""}
        assert wanted <= extras_with_all_they_hold(named), block


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    pages = ["CONTRIBUTING.md", ".ci/run", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    texts = [README, *((ROOT / name).read_text(encoding="utf-8") for name in pages)]
    code = "\n".join(found for text in texts for found in re.findall(r"`[^`\n]+`|^make .*$", text, flags=re.MULTILINE))
    commands = re.findall(r"\bmake ((?:[a-z-]+(?: |`|$))+)", code, flags=re.MULTILINE)
    named = {target for command in commands for target in command.strip("` ").split()}
    assert {"demo", "test", "check", "setup"} <= named <= defined


def test_the_converters_options_are_those_of_the_command():
    usage = subprocess.run(
        [sys.executable, str(ROOT / "convert_weights.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    text = page + README.split("## Use the released model")[1].split("\n## ")[0]
    text = re.sub(r"^hf download .*$", "", text, flags=re.MULTILINE)  # its options are its own
    options = set(re.findall(r"--[a-z][a-z-]+", text))
    assert {"--dtype", "--verify", "--to-original", "--text-layout"} <= options
    assert options <= set(re.findall(r"--[a-z][a-z-]+", usage))


@pytest.mark.parametrize("name", [name.removesuffix(".py") for name in CODE_FILES])
def test_doctests(name):
    import doctest

    result = doctest.testmod(model_code(name))
    assert result.failed == 0
    assert result.attempted > 0 or name in NO_DOCTESTS


def test_the_demo_runs_from_another_folder_and_answers(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), "--output", str(tmp_path / "figure.png")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("  -> ") == 7
    assert result.stdout.count("(right)") >= 6
    assert (tmp_path / "figure.png").stat().st_size > 30_000


def test_the_demo_answers_ones_own_images(tmp_path, tiny_repo):
    names = [str(tmp_path / f"{index}.png") for index in range(2)]
    for index, name in enumerate(names):
        render_image(90 + 40 * index, 120, seed=index).save(name)
    images = [argument for name in names for argument in ("--image", name)]
    arguments = ["--model", str(tiny_repo), *images, "--question", "Are they alike?", "--max-new-tokens", "4"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *arguments, "--output", str(tmp_path / "figure.png")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "Are they alike?" in result.stdout
    assert "random" not in result.stdout
    assert (tmp_path / "figure.png").stat().st_size > 10_000
