# SPDX-License-Identifier: Apache-2.0
r"""Make a small BLIP-3 with newly initialised weights: sizes from YAML, a tokenizer trained on rendered texts.

    python -m blip3.training.small.new_model recipes/small/model.yaml outputs/small/new
    python -m blip3.training.small.new_model recipes/small/model.yaml OUTPUT --tower outputs/small/04/tower \
        --resampler outputs/small/04/tower/resampler.safetensors
    python -m blip3.training.small.new_model recipes/small/model.yaml OUTPUT resampler_config.num_latents=8
    python -m blip3.training.small.new_model recipes/small/model.yaml OUTPUT resampler_config.num_latents=8 \
        --around base

The second starts with what stage 0 has trained and `publish --tower` has written, the third changes a size, the fourth
initialises a resampler of another size for a trained tower and language model; with `--keep language_model` the tower
is newly initialised too. The 4B model starts from published parts instead: `convert_weights.py --vision SIGLIP --text
PHI3`.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...checkpoints import CODE_FILES, folder_of, load_model, locate
from ...conversion.names import tower_weights_for
from ...data.records import Record
from ...data.yaml_files import read_yaml
from ...files import only_writer_in
from ...hub import RELEASE, ROOT, model_code
from ...refusals import Bounds, check_choice, check_fields, check_keys, describe, is_of, show
from ...world.settings import WorldSettings, load_settings
from ...world.tasks import TASKS, rendered_records
from ..recipe import parse_override, plain_errors
from .tokenizer import save_tokenizer, train_tokenizer

_BOUNDS: dict[str, Bounds] = {"vocab_size": (1, 2**24)}
KEPT = {"vision_tower": ("vision_tower",), "language_model": ("language_model", "lm_head")}
"""What may be taken from a trained model, with the modules of each."""
_MISTYPED = "It was probably left empty or mistyped: correct it"


@dataclass(frozen=True)
class Sizes:
    """What a file of sizes holds."""

    vision_config: dict[str, Any]
    resampler_config: dict[str, Any]
    text_config: dict[str, Any]
    tile_grids: Sequence[tuple[int, int]]
    """Rows and columns."""
    vocab_size: int
    tokenizer_tasks: Sequence[str] = ()
    system_prompt: str = ""
    world: str = ""
    """A YAML file of `WorldSettings` beside this one."""


KEYS = tuple(each.name for each in fields(Sizes))


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=Path, help="YAML file of sizes")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="in place of the file's values")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="rendered records a task for the tokenizer")
    parser.add_argument(
        "--tower", type=Path, help="folder of a trained vision tower (default: newly initialised weights)"
    )
    parser.add_argument(
        "--resampler", type=Path, help="file of a trained resampler (default: newly initialised weights)"
    )
    parser.add_argument("--around", type=Path, help="trained model, all of which is taken but its resampler")
    parser.add_argument(
        "--keep",
        nargs="+",
        choices=KEPT,
        default=tuple(KEPT),
        help="parts of --around that are taken (default: both)",
    )
    args = parser.parse_intermixed_args()
    trained = (args.resampler, args.around, args.keep)
    with plain_errors(), only_writer_in(args.output):
        make_model(args.sizes, args.output, args.seed, args.samples, args.tower, args.overrides, *trained)


def make_model(
    sizes: Path,
    output: Path,
    seed: int = 0,
    samples: int = 400,
    tower: Path | None = None,
    overrides: Sequence[str] = (),
    resampler: Path | None = None,
    around: Path | None = None,
    keep: Sequence[str] = tuple(KEPT),
) -> None:
    """Write a complete model folder: configuration, code, tokenizer, processor files, newly initialised weights.

    Args:
        sizes: YAML with `vision_config`, `resampler_config`, `text_config`, `tile_grids`, `vocab_size`, optionally
            `system_prompt` (empty by default: a small model has no tokens to spare), `tokenizer_tasks`, whose rendered
            texts the tokenizer is trained on (every task by default), and `world`, a YAML file of `WorldSettings`
            beside it.
        output: created if missing.
        seed: of the weights.
        samples: rendered records per task that the tokenizer is trained on.
        tower: folder of a trained vision tower of the same sizes.
        overrides: `key=value` or `section.key=value` each, in place of the file's values.
        resampler: safetensors file of a trained resampler of the same sizes.
        around: folder of a trained model of the same tower, language model and tokenizer, which are taken.
        keep: those of `KEPT` that are taken from `around`; the other parts are newly initialised.

    Raises:
        ValueError: for unknown keys, sizes that contradict each other, or a trained model with another tokenizer.
        FileNotFoundError: if a trained part is not there.
    """
    _check_trained(tower, resampler, around)
    values = read_sizes(sizes, overrides)
    world = load_settings(sizes.parent / values["world"]) if "world" in values else WorldSettings()
    output.mkdir(parents=True, exist_ok=True)
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, output / name)
    texts = rendered_texts(world, samples, values.get("tokenizer_tasks", tuple(TASKS)))
    tokenizer = train_tokenizer(texts, values["vocab_size"])
    save_tokenizer(tokenizer, output)
    _write_template(output, values.get("system_prompt", ""))
    _write_configs(output, values, tokenizer)
    config = AutoConfig.from_pretrained(output, trust_remote_code=True)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    scale_new_weights(model)
    if around:
        take_parts(model, around, tokenizer, keep)
    if tower:
        trained = AutoModel.from_pretrained(folder_of(tower), dtype=torch.float32).state_dict()
        model.vision_tower.load_state_dict(tower_weights_for(model.vision_tower.state_dict(), trained))
    if resampler:
        model.model.resampler.load_state_dict(load_file(resampler))
    model.generation_config = GenerationConfig.from_pretrained(output)  # or its own would replace the file
    model.save_pretrained(output)


def read_sizes(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of sizes, with other values for some.

    Raises:
        ValueError: naming file and key, for one that is unknown or missing, or a value that no model can have.
        FileNotFoundError: if there is no such file.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds {show(values)} but sizes are a mapping of keys to values. It is probably another file: "
            "pass one like recipes/small/model.yaml."
        )
    for name, value in map(parse_override, overrides):
        section, _, key = name.rpartition(".")
        inside = values.setdefault(section, {}) if section else values
        if not isinstance(inside, dict):
            raise ValueError(f"{path} has {section} {show(inside)} but it must be a mapping. {_MISTYPED}.")
        inside[key] = value
    check_keys(str(path), values, KEYS)
    for name in ("vision_config", "resampler_config", "text_config", "tile_grids", "vocab_size"):
        if name not in values:
            raise ValueError(
                f"{path} lacks {name}, without which there is no model. The file is probably unfinished: add {name}: "
                "with its value."
            )
    check_fields(f"{path} has", Sizes(**values), _BOUNDS)
    for section in ("vision_config", "text_config", "resampler_config"):
        _check_section(f"{path} has {section}", values[section], section)
    model_code("configuration_blip3.check_sizes")(str(path), values)
    model_code("configuration_blip3.check_tile_grids")(values["tile_grids"])
    for task in values.get("tokenizer_tasks", ()):
        check_choice(f"{path} has tokenizer_tasks with", task, TASKS)
    return values


def _check_section(place: str, values: dict[str, Any], section: str) -> None:
    """Compare the sizes of a part with the defaults of its configuration, which tell their types."""
    kind = values.get("model_type")
    if section == "resampler_config":
        defaults = model_code("configuration_blip3.Blip3ResamplerConfig")().to_dict()
    else:
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ValueError(
                f"{place} with model_type {show(kind)}, but a type that transformers knows is expected, such as "
                f"siglip_vision_model or phi3. {_MISTYPED}."
            )
        defaults = AutoConfig.for_model(kind).to_dict()
    for name, value in values.items():
        expected = type(defaults.get(name))
        is_number = expected in (int, float)
        if expected in (int, float, bool, str) and not is_of(value, expected):
            raise ValueError(f"{place} with {name} {show(value)} but it must be {describe(expected)}. {_MISTYPED}.")
        if is_number and not 0 <= value < 2**31 and name not in ("pad_token_id", "eos_token_id", "bos_token_id"):
            raise ValueError(f"{place} with {name} {show(value)} but it must be from 0 to 2^31. {_MISTYPED}.")


def _check_trained(tower: Path | None, resampler: Path | None, around: Path | None) -> None:
    """Refuse trained parts that are not there, before the tokenizer takes its time."""
    if around:
        locate(around)
    if tower:
        folder_of(tower)
    if resampler and not resampler.is_file():
        folder_of(resampler.parent)
        raise FileNotFoundError(
            f"The resampler {str(resampler)!r} is not there, but {resampler.parent} is. A safetensors file of a "
            "resampler is expected. The tower was probably trained alone: train both (`resampler: true` in the "
            "recipe of the tower) and publish them again, or leave --resampler out."
        )


@torch.no_grad()
def scale_new_weights(model: Any) -> None:
    """Sample some newly initialised weights at the scale that a narrow model learns from.

    The usual 0.02 is right for thousands of channels. At 192, positions rendered so take hundreds of steps to be heard
    beside pixels, and a resampler learns more slowly (docs/journal.md).
    """
    for name, weight in model.vision_tower.named_parameters():
        if "position_embedding" in name:
            weight.normal_(std=0.5)
    for weight in model.model.resampler.parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    model.model.resampler.latents.normal_(std=1.0)


def take_parts(
    model: Any, source: Path, tokenizer: PreTrainedTokenizerFast, keep: Sequence[str] = tuple(KEPT)
) -> None:
    """Load a trained model's tower, language model or both, so that the other parts stay newly initialised.

    Args:
        model: to be changed.
        source: the trained model, as `checkpoints.locate` takes it.
        tokenizer: of `model`.
        keep: those of `KEPT` that are taken.

    Raises:
        ValueError: if the trained model reads other tokens.
    """
    located = locate(source)
    if AutoTokenizer.from_pretrained(**located).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{source} has another vocabulary than the tokenizer just trained, so its language model would read other "
            "words. It was probably made from other sizes or with another number of samples: repeat those here."
        )
    trained = load_model(located, dtype=torch.float32)
    for part in (each for kept in keep for each in KEPT[kept]):
        getattr(model, part).load_state_dict(getattr(trained, part).state_dict())


def rendered_texts(world: WorldSettings, samples: int, tasks: Sequence[str]) -> Iterator[str]:
    """Give the texts of rendered training records, task by task.

    Raises:
        ValueError: for an unknown task.
    """
    for task in tasks:
        for record in rendered_records(task, "train", seed=0, count=samples, settings=world):
            yield from _texts(record)


def _texts(record: Record) -> Iterator[str]:
    for turn in record.turns:
        yield turn.text.replace("<image>", "")
    for answer in (record.chosen, record.rejected):
        if answer:
            yield answer


def _write_template(output: Path, system_prompt: str) -> None:
    """Write the repository's chat template with another default system prompt, or none."""
    template = (ROOT / RELEASE / "chat_template.jinja").read_text(encoding="utf-8")
    first, rest = template.split("{%- endif -%}", 1)
    if system_prompt:
        before, after = first.split("<|system|>\\n", 1)
        _, after = after.split("<|end|>", 1)
        rest = f"{before}<|system|>\\n{system_prompt}<|end|>{after}{{%- endif -%}}{rest}"
    (output / "chat_template.jinja").write_text(rest.lstrip("\n"), encoding="utf-8")


def _write_configs(output: Path, values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the JSON configurations: the repository's own with other sizes and ids."""
    tokens = ("<s>", "<|end|>", "<pad>", "<image>", "<|endofchunk|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    stops = {"bos_token_id": ids["<s>"], "pad_token_id": ids["<pad>"]}
    vision, grids = values["vision_config"], values["tile_grids"]
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    text = {**values["text_config"], "vocab_size": len(tokenizer), **stops, "eos_token_id": ids["<|end|>"]}
    new = {
        "config.json": {
            "vision_config": vision,
            "resampler_config": {**values["resampler_config"], "hidden_size": vision["hidden_size"]},
            "text_config": text,
            "tile_grids": grids,
            "dtype": "float32",
            "image_token_id": ids["<image>"],
        },
        "preprocessor_config.json": {"size": side, "tile_grids": grids},
        "processor_config.json": {
            key: values["resampler_config"][key]
            for key in ("num_latents", "token_sampling", "num_text_queries")
            if key in values["resampler_config"]
        },
        "generation_config.json": {**stops, "eos_token_id": [ids["<|end|>"], ids["<|endofchunk|>"]]},
    }
    for name, changes in new.items():
        settings = json.loads((ROOT / RELEASE / name).read_text(encoding="utf-8")) | changes
        (output / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
