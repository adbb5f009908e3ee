# SPDX-License-Identifier: Apache-2.0
r"""Stage 0: train a small vision tower on rendered images, and a first resampler for its patch tokens.

    python -m blip3.training.tower.train recipes/small/0_tower.yaml [key=value ...]

The report starts from a tower that others trained on images and their texts (SigLIP, arXiv:2303.15343). This stage
makes a small one in the same way, with transformers' SiglipModel, on two levels:

    image   each tile or global view against a caption of what it shows: the published sigmoid loss
    patch     each patch token names what lies under it: a thing, a colour, a character, its row and column, by a
              linear layer and cross-entropy within each kind, over patches that show it

The second level is ours: captions alone need far more images before patch tokens tell what is where. The sigmoid on
that level too, patches against the text tower's embeddings of the names, had learned no character after 750 steps.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, TrainingArguments

from ...checkpoints import load_model, locate
from ...conversion.names import tower_weights_for
from ...hub import model_code
from ...images import float_options
from ...world.settings import WorldSettings, settings_from
from ...world.tasks import rendered_record
from ..recipe import TowerRecipe, load_recipe, plain_errors, recipe_arguments, save_recipe
from ..resume import SAVED_RECIPE, num_processes, resuming, whole_folder
from ..trainer import (
    DivergedError,
    RecipeTrainer,
    copy_processor,
    end_process_group,
    training_arguments,
    write_metrics,
)
from .labels import KINDS, caption_of, drawing_of, label_patches, regions_of, richest_views
from .model import PatchSiglip, patches_per_side

view_places = model_code("tiling_blip3.view_places")
visible_patches = model_code("tiling_blip3.visible_patches")


def main() -> None:
    """Read the command line, train, and write the model with its new tower."""
    args = recipe_arguments(__doc__).parse_args()
    with plain_errors(DivergedError):
        train_tower(load_recipe(args.recipe, TowerRecipe, args.overrides))
    end_process_group()


def train_tower(recipe: TowerRecipe) -> Path:
    """Train the tower of `recipe.model`, resuming if there is a checkpoint, and write all to `recipe.output`/final.

    Returns:
        that folder.
    """
    arguments = training_arguments(recipe, label_names=["names"])
    source = locate(recipe.model)
    with resuming(recipe) as checkpoint:
        return _train(recipe, arguments, source, checkpoint)


def _train(recipe: TowerRecipe, arguments: TrainingArguments, source: dict[str, Any], checkpoint: str | None) -> Path:
    image_processor = AutoImageProcessor.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = load_model(source, dtype=torch.float32)
    settings = settings_from(recipe.world)
    resampler = model.model.resampler if recipe.resampler else None
    siglip = PatchSiglip(model.vision_tower, tokenizer, recipe, resampler)
    per_side = patches_per_side(model.vision_tower.config)
    train = TowerImages(recipe, settings, image_processor, "train", per_side)
    held_out = TowerImages(recipe, settings, image_processor, "held_out", per_side, count=128)
    trainer = RecipeTrainer(
        recipe=recipe,
        model=siglip,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=TowerCollator(tokenizer, recipe.caption_length),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.check_weights()
    write_metrics(recipe, evaluate_tower(siglip, held_out))
    trained, own_names = siglip.siglip.vision_model.state_dict(), model.vision_tower.state_dict()
    model.vision_tower.load_state_dict(tower_weights_for(own_names, trained))
    output = Path(recipe.output) / "final"
    with whole_folder(output, trainer.accelerator.wait_for_everyone) as folder:
        model.save_pretrained(folder)
        save_recipe(recipe, folder / SAVED_RECIPE)
        copy_processor(recipe.model, folder)
    return output


class TowerImages(Dataset):
    """Views of rendered images, with the caption of each and the names under each patch. Item i never changes.

    Args:
        recipe: its tasks, its seed, and how many views of an image are kept.
        settings: of the rendered world.
        image_processor: the model's.
        split: `train` or `held_out`.
        per_side: patches along a side of a view.
        count: of images; as many as the recipe's steps take in all processes if None.
    """

    def __init__(
        self,
        recipe: TowerRecipe,
        settings: WorldSettings,
        image_processor: Any,
        split: str,
        per_side: int,
        count: int | None = None,
    ):
        self.recipe, self.settings, self.image_processor, self.split = recipe, settings, image_processor, split
        self.count = count or recipe.max_steps * recipe.batch_size * recipe.accumulation * num_processes()
        self.per_side = per_side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        task = self.recipe.tasks[index % len(self.recipe.tasks)]
        record = rendered_record(task, self.split, self.recipe.seed, index, self.settings)
        drawing, side = drawing_of(record), self.image_processor.tile_size
        options = {"return_tensors": "pt", **float_options(self.image_processor)}
        pixels = self.image_processor(record.images[0].open(), **options)["pixel_values"][0]
        grid = self.image_processor.grid_of(*drawing.size)
        regions, places = regions_of(record, drawing), view_places(drawing.size, grid, side)
        rng = np.random.default_rng([self.recipe.seed, index])
        views = richest_views(regions, places, side, rng)[: self.recipe.parts]
        names = [label_patches(regions, places[view], side, self.per_side) for view in views]
        return {
            "pixel_values": torch.stack([pixels[view] for view in views]),
            "names": torch.from_numpy(np.stack(names)),
            "is_visible": self._visible_patches(drawing.size, grid)[views],
            "captions": [caption_of(regions, places[view], side) for view in views],
        }

    def _visible_patches(self, image_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
        """Which patches of each view show the image and not padding: (views, P) bool."""
        shown = visible_patches(image_size, grid, self.per_side, "patch", "tiles")
        is_visible = torch.zeros(len(shown), self.per_side**2, dtype=torch.bool)
        is_visible.view(-1)[torch.cat(shown)] = True
        return is_visible


class TowerCollator:
    """Joins the views of several images into one batch."""

    def __init__(self, tokenizer: Any, caption_length: int):
        self.tokenizer, self.caption_length = tokenizer, caption_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [caption for sample in samples for caption in sample["captions"]]
        text = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.caption_length, return_tensors="pt"
        )
        same = torch.tensor([[float(one == other) for other in captions] for one in captions])
        return {
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "names": torch.cat([sample["names"] for sample in samples]),
            "is_visible": torch.cat([sample["is_visible"] for sample in samples]),
            "input_ids": text["input_ids"],
            "is_same": same,
        }


@torch.no_grad()
def evaluate_tower(model: PatchSiglip, images: TowerImages, batch_size: int = 16) -> dict[str, float]:
    """Share of patches whose thing, colour or character is the likeliest of its kind, on held-out images.

    Returns:
        `held_out_thing` and so on and, with a resampler, `held_out_thing_from_latents` and so on.
    """
    model.eval()
    device = model.patch_naming.naming.weight.device
    right, seen = Counter[str](), Counter[str]()
    for first in range(0, len(images), batch_size):
        samples = [images[index] for index in range(first, min(first + batch_size, len(images)))]
        pixels, names, is_visible = (
            torch.cat([sample[name] for sample in samples]).to(device)
            for name in ("pixel_values", "names", "is_visible")
        )
        patches = model.siglip.vision_model(pixels).last_hidden_state
        logits = {"": model.patch_naming.naming(patches)}
        if model.resampler is not None:
            logits["_from_latents"] = model.latent_naming.naming(model.read_latents(patches, is_visible))
        for kind, (level, scores) in product(KINDS, logits.items()):
            span = model.patch_naming.kinds[kind]
            annotations = names[..., span]
            is_one = annotations.sum(-1) == 1
            best = scores[..., span].argmax(-1)
            right[kind + level] += int((best == annotations.argmax(-1))[is_one].sum())
            seen[kind + level] += int(is_one.sum())
    return {f"held_out_{name}": right[name] / max(1, seen[name]) for name in seen}


if __name__ == "__main__":
    main()
