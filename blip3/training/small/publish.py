# SPDX-License-Identifier: Apache-2.0
r"""Write trained models as this repository ships them at its root, with example images never trained on.

    python -m blip3.training.small.publish . --instruct FOLDER --base FOLDER --post-trained FOLDER
    python -m blip3.training.small.publish outputs/small/04 --tower FOLDER

    ./                   configuration, tokenizer, processor files, weights in shards, golden.safetensors to check them
    base/                the same after pre-training, for few-shot prompts
    post_trained/        the same after preference training and safety fine-tuning
    examples/images/     images and examples.json: "prompt", "truth"
    outputs/small/04/tower/   the vision tower alone, after stage 0: SiglipVisionModel; the resampler trained beside it

The code is the repository's own.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...checkpoints import GOLDEN_FILE, code_folder, folder_of, load_model, locate
from ...conversion.names import with_inner
from ...data.records import Record, to_few_shot_prompt
from ...evaluation.golden import write_golden
from ...files import only_writer_in
from ...hub import ROOT
from ...world.settings import WorldSettings, load_settings
from ...world.tasks import rendered_record
from ..recipe import Recipe, TowerRecipe, load_recipe, plain_errors
from ..resume import SAVED_RECIPE
from ..trainer import (
    PROCESSOR_FILES,
    RESAMPLER_FILE,
    copy_present,
    save_image_splitting,
)

WORLD = ROOT / "recipes" / "small" / "world.yaml"
IMAGES = Path("examples", "images")
EXAMPLES = (  # task, index within the held-out series of SEED, what it shows
    ("read", 8),
    ("count", 0),
    ("name", 1),
    ("relation", 2),
    ("box", 0),
    ("compare", 1),
    ("rule", 0),
)
CHAT_TEMPLATE = "chat_template.jinja"
SEED = 1_000_003  # scores use small seeds: examples are no part of them


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write, such as the root of this repository")
    parser.add_argument("--tower", type=Path, help="trained folder whose tower is written to OUTPUT/tower")
    parser.add_argument("--instruct", type=Path, help="trained folder that answers questions")
    parser.add_argument("--base", type=Path, help="trained folder that takes few-shot prompts")
    parser.add_argument("--post-trained", type=Path, help="trained folder that declines unsafe requests")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    parser.add_argument("--max-shard-size", default="5MB", help="of each safetensors file (default: %(default)s)")
    args = parser.parse_args()
    with plain_errors(), only_writer_in(args.output):
        publish_all(args)


def publish_all(args: argparse.Namespace) -> None:
    """Write what the command line asks for."""
    for source in filter(None, (args.tower, args.base, args.instruct, args.post_trained)):
        locate(source)  # before anything is written
    if args.tower:
        publish_tower(args.tower, args.output / "tower", args.dtype)
    if args.base:
        publish(args.base, args.output / "base", args.dtype, args.max_shard_size)
        # as in released base checkpoints: it was not trained to chat
        (args.output / "base" / CHAT_TEMPLATE).unlink(missing_ok=True)
        write_golden(args.output / "base", code_folder(folder_of(args.base)))
    if args.instruct:
        publish(args.instruct, args.output, args.dtype, args.max_shard_size)
        write_examples(args.output / IMAGES, load_settings(WORLD))
        write_golden(args.output, code_folder(folder_of(args.instruct)))
    if args.post_trained:
        publish(args.post_trained, args.output / "post_trained", args.dtype, args.max_shard_size)
        write_golden(args.output / "post_trained", code_folder(folder_of(args.post_trained)))


def publish(source: Path, output: Path, dtype: str = "bfloat16", max_shard_size: str = "5MB") -> None:
    """Write one trained model without its code: `auto_map` then means the files of the repository around it.

    Its image processor cuts tiles by default if the recipe trained with them.

    Args:
        source: folder of a finished stage, as `checkpoints.locate` takes it.
        output: made if need be; its weights are replaced, its other files stay.
        dtype: of the weights, a name of torch.
        max_shard_size: of each safetensors file.
    """
    model = load_model(locate(source), dtype=getattr(torch, dtype))
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("model*.safetensors*"), *output.glob(GOLDEN_FILE)):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="blip3-publish-") as scratch:
        saved = Path(scratch)
        model.save_pretrained(saved, max_shard_size=max_shard_size)
        _tidy_config(saved / "config.json")
        for path in saved.iterdir():
            if path.suffix != ".py":  # the output may be the repository itself, whose code this is a copy of
                shutil.copyfile(path, output / path.name)
    copy_present(folder_of(source), output, (*PROCESSOR_FILES, SAVED_RECIPE))
    if (output / SAVED_RECIPE).is_file():
        save_image_splitting(output, load_recipe(output / SAVED_RECIPE, Recipe).any_resolution)


def publish_tower(source: Path, output: Path, dtype: str = "bfloat16") -> None:
    """Write the vision tower of stage 0 as a SiglipVisionModel of its own, for either transformers line.

    The resampler goes beside it if that stage trained one.

    Args:
        source: folder of a finished stage, as `checkpoints.locate` takes it.
        output: made if need be.
        dtype: of the weights, a name of torch.
    """
    model = load_model(locate(source), dtype=getattr(torch, dtype))
    model.vision_tower.save_pretrained(output)
    if load_recipe(folder_of(source) / SAVED_RECIPE, TowerRecipe).resampler:
        save_file(model.model.resampler.state_dict(), output / RESAMPLER_FILE, metadata={"format": "pt"})
    path = output / "model.safetensors"
    weights = {with_inner(name): weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    copy_present(folder_of(source), output, [SAVED_RECIPE])


def _tidy_config(path: Path) -> None:
    """Name the code by file alone and drop what transformers writes about the machine it was saved on."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {name: value.split("--")[-1] for name, value in config["auto_map"].items()}
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        section.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_examples(folder: Path, world: WorldSettings) -> None:
    """Write one held-out example of each kind: PNG images and examples.json."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for task, index in EXAMPLES:
        record = rendered_record(task, "held_out", SEED, index, world)
        names = [f"{task}-{number}.png" for number in range(len(record.images))]
        prompt, kept = _prompt_of(record)
        for name, image in list(zip(names, record.images, strict=True))[-kept:]:
            image.open().save(folder / name, optimize=True)
        examples.append(
            {"task": task, "images": names[-kept:], "prompt": prompt, "truth": record.annotations["answer"]}
        )
    (folder / "examples.json").write_text(json.dumps(examples, indent=2) + "\n", encoding="utf-8")


def _prompt_of(record: Record, num_shots: int = 4) -> tuple[Any, int]:
    """Give the question (or the few-shot prompt) of a record and the number of images it shows."""
    if record.kind == "few_shot":
        prompt, _ = to_few_shot_prompt(record, num_shots)
    else:
        prompt = record.turns[0].text
    return prompt, prompt.count("<image>")


if __name__ == "__main__":
    main()
