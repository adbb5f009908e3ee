# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file says everything about a run, and the resolved one is saved beside the checkpoint."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..data.images import RecordError
from ..data.yaml_files import parse_yaml, read_yaml
from ..files import write_text
from ..refusals import Bounds, check_choice, check_fields, check_keys, check_positive, is_of, show
from ..world.settings import settings_from
from ..world.tasks import TASKS
from .mixture import check_entry, is_stream
from .sharding import check_sharding, stage_of

MODULES = ("vision_tower", "resampler", "language_model")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "soap")
LOSSES = ("next_token", "preference")
NOISE_PIXELS = ("normalised", "unit")
_COUNTED = ("max_steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints", "max_length")
_BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(_COUNTED, (1, 2**31)),
    **dict.fromkeys(("batch_size", "accumulation"), (1, 2**16)),
    "max_length": (1, 2**24),
    "seed": (0, 2**32 - 1),  # what numpy takes
    "learning_rate": (0, None),
    "vision_learning_rate": (0, None),
    "warmup_steps": (0, 2**31),
    "weight_decay": (0, None),
    "adam_beta2": (0, 1 - 1e-9),
    "max_grad_norm": (0, None),
    "num_workers": (0, 1024),
    "noise_step": (0, 999),
    "anchor": (0, None),
    "noised_weight": (0, None),
    "parts": (1, 1000),
    "text_width": (1, 2**16),
    "text_layers": (1, 1000),
    "caption_length": (1, 2**16),
    "image_weight": (0, None),
}
LORA_LAYERS = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
_NOISED = ("noised_answers", "noised_answers_sha256", "noise_step", "noise_pixels")
_ONLY_NEXT_TOKEN = ("learn_end_of_chunk", "learn_questions")
_FORMER_KEYS = {"drawn": "rendered", "picture_weight": "image_weight"}


@dataclass(frozen=True)
class RunRecipe:
    """What every run has: where it starts, where it ends, and how it steps."""

    model: str
    """Folder of the checkpoint to start from; a relative one starts at the current folder."""
    output: str
    """Folder for checkpoints, logs and, at the end, the trained model."""
    max_steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples a step and process, before accumulation."""
    learning_rate: float
    """Peak learning rate."""
    seed: int = 0
    """Of data order, rendered samples and newly initialised weights."""
    accumulation: int = 1
    """Batches whose gradients are summed into one step."""
    optimizer: str = "adamw"
    """`adamw`, or `soap` (arXiv:2409.11321, by pytorch-optimizer): AdamW in the eigenbasis of each matrix's gradients.
    Pays off where matrices are small, as the small model's are; not with `fsdp` or `deepspeed`."""
    schedule: str = "cosine"
    """`constant`, `linear` (to zero) or `cosine` (to zero), after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled; norms and biases are spared."""
    adam_beta2: float = 0.999
    """Second decay of AdamW, also within SOAP."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    tf32: bool = False
    """Products of float32 matrices with 10 bits of mantissa (TensorFloat-32); only on GPUs that have it."""
    log_every: int = 50
    """Steps between lines of the log."""
    save_every: int = 500
    """Steps between checkpoints, from which a killed run resumes."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    num_workers: int = 0
    """Processes that render and tile images beside the training process."""
    world: dict[str, Any] = field(default_factory=dict)
    """Settings of the rendered world (`world/settings.py`), or `file` with the name of a YAML file of them beside the
    recipe."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Source of each value that has one; not read by the code."""

    def __post_init__(self) -> None:
        for name in _COUNTED[:-1]:
            check_positive(f"The recipe has {name}", getattr(self, name))
        self._check_numbers()
        check_fields("The recipe has", self, _BOUNDS)
        for name in ("model", "output"):
            if not getattr(self, name).strip() or "\0" in getattr(self, name):
                raise ValueError(
                    f"The recipe has {name} {getattr(self, name)!r} but it must name a folder. It was probably left "
                    "empty: write its path."
                )
        settings_from(self.world)
        for name, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            check_choice(f"The recipe has {name}", getattr(self, name), choices)

    def _check_numbers(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type is float and not is_of(value, float):
                raise ValueError(
                    f"The recipe has {each.name} {value!r} but it must be a number, and a finite one. It was "
                    "probably left empty or written as text: write it as a plain number."
                )


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv:2106.09685) on the language model's linear layers."""

    rank: int
    """Of each pair of matrices."""
    alpha: int
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped."""
    targets: Sequence[str] = LORA_LAYERS
    """Names of layers; those a model does not have are passed over, so both text layouts may stand here."""
    quantize: str | None = None
    """`4bit` keeps the frozen weights in 4 bits while the adapters learn (QLoRA, arXiv:2305.14314; bitsandbytes)."""

    def __post_init__(self) -> None:
        check_positive("lora has rank", self.rank)
        check_positive("lora has alpha", self.alpha)
        check_fields("lora has", self, {"rank": (1, 2**16), "alpha": (1, 2**16)})
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora has dropout {self.dropout!r} but it must be a share from 0 to below 1. A percentage was "
                "probably written: divide it by 100."
            )
        if self.quantize is not None:
            check_choice("lora has quantize", self.quantize, ("4bit",))
        if not self.targets:
            raise ValueError(
                f"lora has no targets but adapters need layers of {', '.join(LORA_LAYERS)}. The list was probably "
                "left empty: remove the key to take all."
            )
        for name in self.targets:
            cause = "The output layer takes no adapter, and neither do the vision modules"
            check_choice("lora targets", name, LORA_LAYERS, cause)


@dataclass(frozen=True)
class Recipe(RunRecipe):
    """A stage of training on one loss, next token or preference: pre-training, fine-tuning, DPO, safety."""

    mixture: Sequence[dict[str, Any]] = ()
    """Sources with weights: see `blip3/training/mixture.py`."""
    strict: bool = False
    """Stop at the first record that cannot be read or encoded; False passes it over, counted and named in the log."""
    trainable: Sequence[str] = ("resampler", "language_model")
    """Modules that learn, of `vision_tower`, `resampler` and `language_model`; the report freezes the tower."""
    any_resolution: bool = True
    """Global view and tiles; False gives the global view alone, as the report's stage 1."""
    max_length: int = 2048
    """Longest sample in tokens, image tokens included; longer ones are cut at a turn or chunk, never in an image."""
    packing: bool = False
    """Put several samples into one sequence of `max_length`, each with its own positions and attention."""
    group_by_length: bool = False
    """Steps of samples of like length; costs one pass over the lengths of a window of samples."""
    learn_end_of_chunk: bool = False
    """Learn to write `<|endofchunk|>` after a caption or an answer; the released models do not."""
    learn_questions: bool = True
    """Learn few-shot prompts whole; False learns their answers alone: a bare image is then no cue for a question."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser with FSDP2, a decoder, vision or resampler layer at a time."""
    deepspeed: str = ""
    """Shard with DeepSpeed: `zero2`, `zero3`, or a JSON file of its settings (`blip3/training/sharding.py`)."""
    vision_learning_rate: float | None = None
    """Learning rate of the tower, which must be trainable; that of the rest if None."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Fields of `LoraSettings`: train adapters of the language model in place of its weights. Empty trains those."""
    loss: str = "next_token"
    """`next_token`, or `preference` (DPO, arXiv:2305.18290) on pairs; the reference is the model without adapters."""
    beta: float = 0.1
    """Preference: how much leaving the reference costs."""
    anchor: float = 0.0
    """Preference: weight of a term that keeps the chosen answer from becoming less likely (mDPO, arXiv:2406.11839)."""
    noised_weight: float | None = None
    """Preference: weight of a second term, whose rejected answer the model gave when the image was noised. 0 switches
    the term off, whatever the other keys of it say; it may be left out only where they are too."""
    noised_answers: str = ""
    """Preference: file of such answers (`blip3/training/noised_answers.py`). Without one they are teacher-forced: the
    likeliest token at each place of the chosen answer, from one more pass over the noised image (POVID,
    arXiv:2402.11411)."""
    noised_answers_sha256: str = ""
    """Preference: of that file. A run notes it in its saved recipe, and does not go on with another file."""
    noise_step: int = 500
    """Preference: strength of the noise, of 1,000 steps (`blip3/training/noise.py`)."""
    noise_pixels: str = "normalised"
    """Preference: pixels that take the noise: `normalised`, -1 to 1, as BPO; or `unit`, the image in 0 to 1 before it
    is resized, as POVID, which is twice as strong at the same step."""

    def __post_init__(self) -> None:
        check_positive("The recipe has max_length", self.max_length)
        super().__post_init__()
        self._check_modules()
        if not self.mixture:
            raise ValueError(
                "The recipe has no mixture, so there is nothing to train on. The key was probably left out: list "
                "sources, for example `- {rendered: count, weight: 1}`."
            )
        for index, entry in enumerate(self.mixture):
            check_entry(entry, index)
        streams = [entry.get("stream") or entry["preferences"] for entry in self.mixture if is_stream(entry)]
        if self.group_by_length and streams:
            raise ValueError(
                f"The recipe has group_by_length and streams {streams[0]!r}, but a stream is read in its order and "
                "would be opened again for each sample. The switch was probably copied from a stage with lists: set "
                "packing: true instead, which needs no order."
            )
        self._check_preference()

    @property
    def second_term(self) -> str:
        """Where the noised answers come from: `file`, `teacher_forced`, or empty where there is no second term."""
        if not self.noised_weight:
            return ""
        return "file" if self.noised_answers else "teacher_forced"

    @property
    def adapters(self) -> LoraSettings | None:
        """What `lora` says; None if the weights themselves are trained."""
        if not self.lora:
            return None
        check_keys("lora", self.lora, [each.name for each in fields(LoraSettings)])
        missing = [name for name in ("rank", "alpha") if name not in self.lora]
        if missing:
            raise ValueError(
                f"lora lacks {missing[0]}, without which there is no adapter. It was probably left out: add "
                f"{missing[0]}: with its value, for example {{rank: 64, alpha: 16}}."
            )
        return LoraSettings(**self.lora)

    def _check_modules(self) -> None:
        unknown = [name for name in self.trainable if name not in MODULES or self.trainable.count(name) > 1]
        if unknown or not self.trainable:
            raise ValueError(
                f"The recipe has trainable {list(self.trainable)} but it must name one or more of "
                f"{', '.join(MODULES)}. A name is probably misspelt: correct it."
            )
        if self.adapters and list(self.trainable) != ["language_model"]:
            raise ValueError(
                f"The recipe has lora and trainable {list(self.trainable)}, but adapters are added to the language "
                "model and everything else stays as it is. The list was probably left out: write trainable: "
                "[language_model]."
            )
        if self.vision_learning_rate is not None and "vision_tower" not in self.trainable:
            raise ValueError(
                f"The recipe has vision_learning_rate {self.vision_learning_rate!r} and trainable "
                f"{list(self.trainable)}, but the rate is the tower's, which does not learn here. It was probably "
                "copied from another stage: leave it out, or add vision_tower to trainable."
            )
        quantizes = self.adapters is not None and self.adapters.quantize is not None
        is_whole = {"optimizer 'soap'": self.optimizer == "soap", "lora with quantize '4bit'": quantizes}
        check_sharding(self.fsdp, self.deepspeed, [name for name, is_so in is_whole.items() if is_so])

    def _check_preference(self) -> None:
        check_choice("The recipe has loss", self.loss, LOSSES)
        check_choice("The recipe has noise_pixels", self.noise_pixels, NOISE_PIXELS)
        check_positive("The recipe has beta", self.beta, float)
        defaults = {each.name: each.default for each in fields(self)}
        unread = _ONLY_NEXT_TOKEN if self.loss == "preference" else ("beta", "anchor", "noised_weight", *_NOISED)
        changed = [name for name in unread if getattr(self, name) != defaults[name]]
        if changed:
            other = next(each for each in LOSSES if each != self.loss)
            raise ValueError(
                f"The recipe has {changed[0]} {getattr(self, changed[0])!r} but its loss is {self.loss}, which does "
                f"not read it. The key belongs to the other loss: leave it out, or write loss: {other}."
            )
        noised = [name for name in _NOISED if getattr(self, name) != defaults[name]]
        if noised and self.noised_weight is None:
            raise ValueError(
                f"The recipe has {noised[0]} {getattr(self, noised[0])!r} but no noised_weight, without which there "
                "is no second term to read it. It was probably left out: write noised_weight: 1.0, or 0 to switch "
                "the term off."
            )
        if self.noised_answers_sha256 and not self.noised_answers:
            raise ValueError(
                f"The recipe has noised_answers_sha256 {self.noised_answers_sha256!r} and no noised_answers, of which "
                "it is the digest. It was probably left over from a saved recipe: leave it out, or name the file."
            )
        if self.loss == "preference" and self.deepspeed and stage_of(self.deepspeed) == 3:
            raise ValueError(
                f"The recipe has loss preference and deepspeed {self.deepspeed!r}, which shards weights (ZeRO-3), but "
                "the reference pass switches adapters off between two gathers, and no such run has ended yet. The key "
                "was probably copied from another stage: take deepspeed: zero2, or fsdp: true."
            )
        if self.loss == "preference" and (not self.lora or self.packing):
            found = "packing true" if self.lora else "no lora"
            raise ValueError(
                f"The recipe has loss preference and {found}, but the reference is the model without its adapters, "
                "and a pair fills a row of its own. It was probably copied from another stage: give lora a rank and "
                "alpha, and leave packing out."
            )


@dataclass(frozen=True)
class TowerRecipe(RunRecipe):
    """Stage 0: a vision tower and, if asked for, a first resampler."""

    tasks: Sequence[str] = ("caption", "ocr")
    """Rendered tasks whose images are shown, in turn."""
    parts: int = 3
    """Views kept of each image, those that show most; the rest is left out for variety."""
    text_width: int = 128
    """Of the text tower, which is thrown away afterwards."""
    text_layers: int = 2
    """Of the text tower."""
    caption_length: int = 32
    """Tokens of a caption; longer ones are cut."""
    image_weight: float = 0.1
    """Weight of the image level against the patch level; at 0 it is left out."""
    resampler: bool = False
    """Train the resampler beside the tower, on the latents' level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError(
                "The recipe has no tasks, so there are no images to learn from. The list was probably left empty: "
                "remove the key to take caption and ocr."
            )
        for task in self.tasks:
            check_choice("The recipe has tasks with", task, TASKS)


class RecipeError(ValueError):
    """A recipe that cannot be run."""


SomeRecipe = TypeVar("SomeRecipe", bound=RunRecipe)


def load_recipe(path: str | Path, kind: type[SomeRecipe], overrides: Sequence[str] = ()) -> SomeRecipe:
    """Read a recipe.

    Args:
        path: YAML file.
        kind: `Recipe` or another dataclass derived from `RunRecipe`.
        overrides: `key=value` each, value in YAML, in place of the file's.

    Raises:
        RecipeError: naming file and key, for an unknown, missing or repeated key, or a value that cannot be.
        FileNotFoundError: if a file is missing.
    """
    try:
        return _load(Path(path), kind, overrides)
    except ValueError as error:
        raise RecipeError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _load(path: Path, kind: type[SomeRecipe], overrides: Sequence[str]) -> SomeRecipe:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__} but a recipe is a mapping of keys to values. It is probably "
            "another file: pass one of recipes."
        )
    values = with_current_names(values | dict(map(parse_override, overrides)))
    check_keys(str(path), values, [each.name for each in fields(kind)])
    missing = [each.name for each in fields(kind) if _is_required(each) and each.name not in values]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, without which a run cannot start. The file is probably unfinished: "
            f"add {missing[0]}: with its value."
        )
    values["world"] = _world_of(values.get("world"), path)
    for each in fields(kind):  # YAML reads 1e-3 as text
        if each.type in (float, float | None) and type(values.get(each.name)) in (str, int):
            values[each.name] = _as_float(values[each.name])
    resolved: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
    return kind(**resolved)


def _world_of(world: Any, path: Path) -> Any:
    """Give settings of the world, with those of the file that they name."""
    world = {"file": world} if isinstance(world, str) else {} if world is None else world
    if not isinstance(world, dict) or "file" not in world:
        return world  # the recipe refuses what is no mapping
    if not isinstance(world["file"], str):
        raise ValueError(
            f"world has file {show(world['file'])} but it must name a YAML file beside the recipe. It was probably "
            "left empty: write its name."
        )
    file = path.parent / world["file"]
    inside = read_yaml(file)
    if not isinstance(inside, dict):
        raise ValueError(
            f"{file} holds {show(inside)} but settings of the world are a mapping. It is probably another file: name "
            "one like recipes/small/world.yaml."
        )
    settings_from(inside, str(file))
    return inside | {key: value for key, value in world.items() if key != "file"}


def with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Take the keys of recipes saved by earlier versions under their names of today.

    >>> with_current_names({"picture_weight": 0.1, "mixture": [{"drawn": "count"}]})
    {'image_weight': 0.1, 'mixture': [{'rendered': 'count'}]}
    """
    renamed = {_FORMER_KEYS.get(key, key): value for key, value in values.items()}
    if isinstance(renamed.get("mixture"), list):
        renamed["mixture"] = [
            {_FORMER_KEYS.get(key, key): value for key, value in entry.items()} if isinstance(entry, dict) else entry
            for entry in renamed["mixture"]
        ]
    return renamed


def parse_override(override: str) -> tuple[str, Any]:
    """Read one `key=value`, value in YAML; `key=` alone is the empty text.

    Raises:
        ValueError: without the sign.
    """
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(
            f"The override is {override!r} but must be key=value. The sign was probably forgotten: write for "
            "example max_steps=10."
        )
    return key, parse_yaml(value, f"The override {override[:80]!r}") if value else ""


def recipe_arguments(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of what every command of this folder takes: `recipe` and `overrides` of `load_recipe`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the recipe's values")
    return parser


@contextlib.contextmanager
def plain_errors(*others: type[Exception]) -> Iterator[None]:
    """End a command with the message alone: a file, recipe or record at fault, a package missing, other errors."""
    known: tuple[type[Exception], ...] = (FileNotFoundError, ImportError, RecipeError, RecordError, *others)
    try:
        yield
    except known as error:
        raise SystemExit(f"error: {error}") from None


@contextlib.contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Take errors for the recipe's fault, where what it names is opened.

    Raises:
        RecipeError: with their message.
    """
    try:
        yield
    except RecipeError:
        raise
    except errors as error:
        raise RecipeError(str(error)) from error


def _as_float(value: str | int) -> Any:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value  # the recipe refuses it


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def save_recipe(recipe: RunRecipe, path: str | Path) -> None:
    """Write the resolved recipe, every default included, as YAML that `load_recipe` reads.

    The file appears whole: another process that resumes the same run may be reading it.
    """
    path = Path(path)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
