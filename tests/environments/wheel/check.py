# SPDX-License-Identifier: Apache-2.0
"""What the installed package must do by itself: run by the interpreter of its environment, in an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

QUESTION = "What is in the picture?"
RECIPE = """
model: converted
output: run
max_steps: 2
batch_size: 2
learning_rate: 0.001
max_length: 512
log_every: 1
save_every: 2
world: {sides: [48, 96], document_sides: [160, 200], fonts: [Aileron]}
mixture: [{rendered: name}]
"""


def run(*arguments: object) -> str:
    """Run `blip3` as installed, and expect success; gives what it printed."""
    command = [str(Path(sys.executable).with_name("blip3")), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr[-4000:]}")
    print(f"blip3 {arguments[0]}: done", flush=True)
    return result.stdout


def expect(condition: object, message: str) -> None:
    """End with a message unless the condition holds."""
    if not condition:
        raise SystemExit(f"failed: {message}")


def main() -> None:
    """Convert, ask, train, score."""
    from PIL import Image

    import blip3
    from blip3.conversion.random_checkpoint import write_release_layout
    from blip3.hub import ROOT

    package = Path(str(blip3.__file__)).parent
    expect(package.parent.name == "site-packages", f"the package is not installed but {package}")
    expect(package / "_root" == ROOT, f"the model's code is taken from {ROOT}")

    source = write_release_layout("source/xgen-mm-tiny")
    vision = source / "siglip_vision_config.json"
    run("convert", source, "converted", "--vision-config", vision, "--verify")
    expect(Path("converted/handler.py").is_file(), "a converted folder is complete")

    Image.new("RGB", (90, 60), "red").save("red.png")
    asked = ("--image", "red.png", "--question", QUESTION, "--max-new-tokens", 4, "--output", "demo.png")
    expect(QUESTION in run("demo", "--model", "converted", *asked), "the question is printed with its answer")

    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run("train", "recipe.yaml")
    state = json.loads(Path("run/checkpoint-2/trainer_state.json").read_text(encoding="utf-8"))
    expect(state["global_step"] == 2, "two steps are taken")

    request = ("--task", "name", "--count", 4, "--max-new-tokens", 4, "--batch-size", 2, "--output", "scores")
    run("score", "--model", "trained=run/final", *request)
    (result,) = json.loads(Path("scores/results.json").read_text(encoding="utf-8"))["results"]
    expect(result["count"] == 4, "four questions are scored")


if __name__ == "__main__":
    main()
