# SPDX-License-Identifier: Apache-2.0
"""What every stage does around `Trainer`: resume or refuse, arguments, optimiser, logs."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState
from transformers.utils import is_torch_tf32_available

from ..checkpoints import CODE_FILES, code_folder, folder_of
from ..conversion.names import name_for_both_lines
from .recipe import Recipe, RunRecipe, load_recipe, save_recipe

SAVED_RECIPE = "recipe.yaml"
RESAMPLER_FILE = "resampler.safetensors"  # beside a published tower
PROCESSOR_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_MAY_CHANGE = ("log_every", "save_every", "keep_checkpoints", "num_workers", "notes")


def resume_or_refuse(recipe: RunRecipe) -> str | None:
    """Find the checkpoint to resume from; save the resolved recipe and seed everything.

    Returns:
        the newest complete checkpoint in `recipe.output`, or None.

    Raises:
        ValueError: if the folder holds a run of another recipe.
    """
    output = Path(recipe.output)
    saved = output / SAVED_RECIPE
    checkpoint = find_checkpoint(output)
    if saved.is_file() and checkpoint:
        before = load_recipe(saved, type(recipe))
        changed = [
            name
            for name in vars(recipe)
            if name not in _MAY_CHANGE and _as_json(getattr(before, name)) != _as_json(getattr(recipe, name))
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run whose {changed[0]} was {getattr(before, changed[0])!r}, and now it is "
                f"{getattr(recipe, changed[0])!r}; resumed, it would be neither of the two. The recipe was probably "
                "edited: give it another output, or remove the folder."
            )
    if is_main_process():
        save_recipe(recipe, saved)
    set_seed(recipe.seed)
    return checkpoint


def find_checkpoint(output: Path) -> str | None:
    """Find the newest complete checkpoint; a run may be killed while it writes one.

    `Trainer` writes its state last, so a folder without a readable one is incomplete. It is overwritten when the
    resumed run gets there.
    """
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            TrainerState.load_from_json(str(folder / "trainer_state.json"))
        except (OSError, ValueError, TypeError):
            continue
        return str(folder)
    return None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def num_processes() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes what all of them share."""
    return os.environ.get("RANK", "0") == "0"


def training_arguments(recipe: RunRecipe, **others: Any) -> TrainingArguments:
    """Translate a recipe for `Trainer`."""
    if not torch.accelerator.is_available():  # unasked, transformers refuses bfloat16 there
        others |= {"use_cpu": True, "ddp_backend": "gloo" if num_processes() > 1 else None}
    # transformers 4.57 leaves a run's precision in the environment, where the next one would take it for granted
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.bf16 else "no"
    if recipe.tf32 and is_torch_tf32_available():  # unasked, transformers refuses it elsewhere
        others |= {"tf32": True}
    if isinstance(recipe, Recipe):
        if recipe.gradient_checkpointing:
            others |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if recipe.fsdp:
            # transformers 4.57 passes neither on to accelerate
            os.environ |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
            others |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        dataloader_num_workers=recipe.num_workers,
        seed=recipe.seed,
        remove_unused_columns=False,
        report_to=["tensorboard"],
        **others,
    )


class RecipeTrainer(Trainer):
    """`Trainer` with the recipe's optimiser.

    Args:
        recipe: of the run.
        **kwargs: of `Trainer`.
    """

    optimizer: Any

    def __init__(self, recipe: RunRecipe, **kwargs: Any):
        self.recipe = recipe
        super().__init__(**kwargs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """AdamW or SOAP, with the tower's own learning rate if the recipe gives one."""
        rate = getattr(self.recipe, "vision_learning_rate", None)
        is_plain = rate is None and self.recipe.optimizer == "adamw"
        if is_plain or self.optimizer is not None:
            return super().create_optimizer(*args)
        model = args[0] if args else self.model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (
                    rate if rate is not None and "vision_tower." in name else self.args.learning_rate,
                    self.args.weight_decay if name in decayed else 0.0,
                )
                groups.setdefault(key, []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        if self.recipe.optimizer == "soap":
            from pytorch_optimizer import SOAP

            # SOAP's own first decay. Sides above 256 keep their basis: their eigenvectors would cost most of a step.
            kind, settings = SOAP, {"betas": (0.95, self.args.adam_beta2), "max_precondition_dim": 256}
        self.optimizer = kind(
            [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()], **settings
        )
        return self.optimizer


def copy_processor(source: str | Path, output: str | Path) -> None:
    """Copy tokenizer, template, processor files and all code unchanged.

    A model's `save_pretrained` leaves the processor's code out, and on transformers 4.57 all of it, if its process has
    loaded other code under the same configuration class before.

    Args:
        source: checkpoint, as `checkpoints.locate` takes it.
        output: folder that exists.
    """
    copy_present(folder_of(source), output, PROCESSOR_FILES)
    copy_present(code_folder(folder_of(source)), output, CODE_FILES)


def copy_present(source: Path, output: str | Path, names: Sequence[str]) -> None:
    """Copy those files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(output) / name)


def save_image_splitting(folder: str | Path, splits: bool) -> None:
    """Make a folder's processor show images as the model was trained to see them.

    Args:
        folder: with preprocessor_config.json.
        splits: whether images are cut into tiles; False leaves the global view alone.
    """
    path = Path(folder) / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"do_image_splitting": splits}, indent=2) + "\n", encoding="utf-8")


def write_metrics(recipe: RunRecipe, metrics: dict[str, Any]) -> None:
    """Write final figures beside the checkpoints."""
    path = Path(recipe.output) / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def name_tower_for_both_lines(folder: str | Path) -> None:
    """Name a folder's tower weights as transformers 4.57 does; 5.x reads these names too and keeps them on saving."""
    for path in Path(folder).glob("model*.safetensors"):
        weights = {name_for_both_lines(name): weight for name, weight in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"] = {name_for_both_lines(name): file for name, file in values["weight_map"].items()}
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
