# SPDX-License-Identifier: Apache-2.0
"""What every stage does around `Trainer`: arguments, optimiser, checkpoints, logs."""

import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.utils import is_torch_tf32_available

from ..checkpoints import CODE_FILES, code_folder, folder_of
from ..refusals import list_names
from .recipe import Recipe, RunRecipe
from .resume import checkpoints_in, keep_newest, num_processes, remove_checkpoint, write_manifest
from .sharding import shard_on_cpus, sharding_arguments

RESAMPLER_FILE = "resampler.safetensors"  # beside a published tower
PROCESSOR_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
MAX_BAD_IN_A_ROW = 3  # steps without a finite loss and gradient; weights that are broken stay broken
MAX_BAD_STEPS = 100  # of a whole run

logger = logging.getLogger(__name__)


def training_arguments(recipe: RunRecipe, **others: Any) -> TrainingArguments:
    """Translate a recipe for `Trainer`, and start the process group where a launcher has started several."""
    if not torch.accelerator.is_available():  # unasked, transformers refuses bfloat16 there
        others |= {"use_cpu": True, "ddp_backend": "gloo" if num_processes() > 1 else None}
        # of several processes accelerate names cpu:0, to which torch reads no file; transformers 4.57 resumes so
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # transformers 4.57 leaves a run's precision in the environment, where the next one would take it for granted
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.bf16 else "no"
    if recipe.tf32 and is_torch_tf32_available():  # unasked, transformers refuses it elsewhere
        others |= {"tf32": True}
    if isinstance(recipe, Recipe):
        if recipe.gradient_checkpointing:
            others |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        others |= sharding_arguments(recipe.fsdp, recipe.deepspeed)
    arguments = TrainingArguments(
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
        save_total_limit=None,  # ours are removed once the newest is whole
        logging_nan_inf_filter=False,  # which logs a loss that is no number as 0
        dataloader_num_workers=recipe.num_workers,
        seed=recipe.seed,
        remove_unused_columns=False,
        report_to=["tensorboard"],
        **others,
    )
    if arguments.n_gpu > 1:
        logger.warning(
            "Training on one of %d GPUs, as one process. For all of them start with `torchrun --nproc_per_node %d`. "
            "A step then takes as many times the samples.",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        # as accelerate does without a launcher. `Trainer` would wrap the model in DataParallel: a batch for each GPU,
        # and every tensor cut into as many parts by its first axis, rows of several images away from their images
        arguments._n_gpu = 1
    if isinstance(recipe, Recipe) and recipe.fsdp and arguments.device.type == "cpu":
        shard_on_cpus()
    return arguments


def end_process_group() -> None:
    """End the group that `training_arguments` started, in every process of a run that has succeeded.

    Left open, its threads outlive Python's last steps, and now and then one of them aborts its process: the launcher
    then takes a run that has ended well for a failed one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class DivergedError(ArithmeticError):
    """A run whose loss, gradients or weights are no longer numbers."""


class StepGuard(TrainerCallback):
    """Lets a trainer look at the gradients before each step."""

    def __init__(self, trainer: "RecipeTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the count of the run that is resumed."""
        self.trainer.bad_steps = int(logged(state, "skipped_steps"))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave out a step without a finite loss and gradient."""
        self.trainer.leave_out_bad_step()


def logged(state: TrainerState, name: str) -> float:
    """Give the last value of a count in the log; 0 if there is none."""
    return next((entry[name] for entry in reversed(state.log_history) if name in entry), 0)


class RecipeTrainer(Trainer):
    """`Trainer` with the recipe's optimiser, which stops where there is nothing to learn from.

    A step whose loss or gradient is not finite is left out and counted (`skipped_steps` in the log). After
    `MAX_BAD_IN_A_ROW` or `MAX_BAD_STEPS` of them the run ends. Weights that are not finite are never saved.

    Args:
        recipe: of the run.
        **kwargs: of `Trainer`.
    """

    optimizer: Any

    def __init__(self, recipe: RunRecipe, **kwargs: Any):
        self.recipe = recipe
        super().__init__(**kwargs)
        self.bad_steps = self.bad_in_a_row = 0
        self.had_bad_loss = False  # since the last line of the log
        self.is_loss_bad = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.add_callback(StepGuard(self))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute a batch's gradients, and remember whether its loss is finite.

        `Trainer` adds losses up, also beyond a line of the log: one NaN would stay in the sum for good. So `log`
        writes it in its line, and the sum goes without it.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        is_finite = loss.isfinite()
        self.is_loss_bad |= ~is_finite.to(self.is_loss_bad.device)
        return loss.where(is_finite, 0.0)

    def leave_out_bad_step(self) -> None:
        """Drop the gradients of a step that has no finite loss and gradient.

        Raises:
            DivergedError: if there were too many; at the first under DeepSpeed, which has taken the step by then.
        """
        if self.is_deepspeed_enabled:
            self._refuse_bad_step()
            return
        gradients = [local(each.grad) for each in self.model.parameters() if each.grad is not None]
        is_gradient_bad = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        had_bad_loss, had_bad_gradient = self.are_so_anywhere(bool(self.is_loss_bad), is_gradient_bad)
        self.had_bad_loss |= had_bad_loss
        self.is_loss_bad.zero_()
        if not had_bad_loss and not had_bad_gradient:
            self.bad_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_in_a_row += 1
        self.model.zero_grad(set_to_none=True)
        step = self.state.global_step + 1
        logger.warning("Left out: step %d, whose loss or gradient is not finite (%d so far).", step, self.bad_steps)
        if self.bad_in_a_row >= MAX_BAD_IN_A_ROW or self.bad_steps >= MAX_BAD_STEPS:
            raise DivergedError(
                f"The loss or its gradient was not finite (NaN or infinity) in {self.bad_steps} steps, "
                f"{self.bad_in_a_row} of them one after another up to step {step}, but {MAX_BAD_IN_A_ROW - 1} in a "
                f"row and {MAX_BAD_STEPS - 1} in all are passed over. {self._advice()}"
            )

    def _refuse_bad_step(self) -> None:
        norm = float(self.model_wrapped.get_global_grad_norm() or 0.0)
        is_gradient_bad = not 0 <= norm < math.inf  # -1 stands for NaN
        had_bad_loss, had_bad_gradient = self.are_so_anywhere(bool(self.is_loss_bad), is_gradient_bad)
        if had_bad_loss or had_bad_gradient:
            raise DivergedError(
                f"The loss or its gradient was not finite (NaN or infinity) in step {self.state.global_step + 1}, and "
                f"DeepSpeed takes a step before it can be left out. {self._advice()}"
            )

    def check_weights(self) -> None:
        """Refuse weights that are not finite.

        Raises:
            DivergedError: naming the first.
        """
        bad = [
            name for name, each in self.model.named_parameters()
            if each.is_floating_point() and not bool(local(each).detach().isfinite().all())
        ]  # fmt: skip
        if any(self.are_so_anywhere(bool(bad))):
            raise DivergedError(
                f"After step {self.state.global_step} {len(bad)} weights are not finite (NaN or infinity), "
                f"{list_names(bad, 2)}, but a model needs numbers; they were not saved. {self._advice()}"
            )

    def are_so_anywhere(self, *values: bool) -> list[bool]:
        """Tell of each value whether it is true in any of the processes."""
        return self.accelerator.gather(torch.tensor([values], device=self.args.device)).any(0).tolist()

    def _advice(self) -> str:
        checkpoint = next((path.name for path in reversed(checkpoints_in(Path(self.args.output_dir)))), "none")
        return (
            f"The learning rate, {self.args.learning_rate}, is probably too high, or the weights that training began "
            f"with are damaged: lower it and give another output. The newest checkpoint, {checkpoint}, is kept."
        )

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Write a line of the log, with the number of steps that were left out; a loss that was NaN stays NaN."""
        if "loss" in logs and self.had_bad_loss:
            logs, self.had_bad_loss = logs | {"loss": float("nan")}, False
        super().log(logs | ({"skipped_steps": self.bad_steps} if self.bad_steps else {}), *args)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, its manifest last, and then remove older ones."""
        self.check_weights()
        step, is_main = self.state.global_step, self.is_world_process_zero()
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{step}"
        if is_main:
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if is_main:
            write_manifest(folder)
            keep_newest(output, step, self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

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


def local(tensor: Any) -> torch.Tensor:
    """Give what this process holds of a tensor that may be sharded, by FSDP2 or by ZeRO-3."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
