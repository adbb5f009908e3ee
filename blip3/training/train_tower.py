# SPDX-License-Identifier: Apache-2.0
r"""Stage 0: train a small vision tower on rendered images, and a first resampler for its patch tokens.

    python -m blip3.training.train_tower recipes/small/provenance/01_tower.yaml [key=value ...]

The report starts from a tower that others trained on images and their texts (SigLIP, arXiv:2303.15343). This stage
makes a small one in the same way, with transformers' SiglipModel, on two levels:

    image   each tile or global view against a caption of what it shows: the published sigmoid loss
    patch     each patch token names what lies under it: a thing, a colour, a character, its row and column, by a
              linear layer and cross-entropy within each kind, over patches that show it

The second level is ours: captions alone need far more images before patch tokens tell what is where. The sigmoid on
that level too, patches against the text tower's embeddings of the names, had learned no character after 750 steps.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    SiglipConfig,
    SiglipModel,
)

from ..checkpoints import locate
from ..data.canvas import Drawing, Text, text_box
from ..data.fonts import load_font
from ..data.records import Record
from ..data.things import THINGS
from ..hub import model_code
from ..world.settings import COLOURS, WorldSettings, settings_from
from ..world.tasks import rendered_record
from .recipe import RunRecipe, load_recipe, plain_errors, recipe_arguments, save_recipe
from .run import SAVED_RECIPE, RecipeTrainer, copy_processor, log_metrics, match_names, start, training_arguments

Blip3Resampler = model_code("modeling_blip3.Blip3Resampler")
view_places = model_code("tiling_blip3.view_places")
visible_patches = model_code("tiling_blip3.visible_patches")

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
MIN_OVERLAP = 0.35
MIN_HEIGHT = 8  # pixels of the tile; smaller things and characters are not named

Region = tuple[tuple[str, ...], tuple[float, float, float, float]]  # names, (x1, y1, x2, y2) in pixels of the image


@dataclass(frozen=True)
class TowerRecipe(RunRecipe):
    """Stage 0."""

    tasks: Sequence[str] = ("caption", "ocr")
    """Rendered tasks whose images are shown, in turn."""
    parts: int = 3
    """Parts kept of each image, those that show most; the rest is left out for variety."""
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


def main() -> None:
    """Read the command line, train, and write the model with its new tower."""
    args = recipe_arguments(__doc__).parse_args()
    with plain_errors():
        train_tower(load_recipe(args.recipe, TowerRecipe, args.overrides))


def train_tower(recipe: TowerRecipe) -> Path:
    """Train the tower of `recipe.model`, resuming if there is a checkpoint, and write all to `recipe.output`/final.

    Returns:
        that folder.
    """
    source = locate(recipe.model)
    resume = start(recipe)
    image_processor = AutoImageProcessor.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype=torch.float32)
    settings = settings_from(recipe.world)
    resampler = model.model.resampler if recipe.resampler else None
    siglip = PatchSiglip(model.vision_tower, tokenizer, recipe, resampler)
    train = TowerImages(recipe, settings, image_processor, "train")
    held_out = TowerImages(recipe, settings, image_processor, "held_out", count=128)
    trainer = RecipeTrainer(
        recipe=recipe,
        model=siglip,
        args=training_arguments(recipe, label_names=["names"]),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=TowerCollator(tokenizer, recipe.caption_length),
    )
    trainer.train(resume_from_checkpoint=resume)
    accuracy = evaluate_tower(siglip, held_out)
    log_metrics(recipe, accuracy)
    model.vision_tower.load_state_dict(match_names(siglip.siglip.vision_model.state_dict(), model.vision_tower))
    output = Path(recipe.output) / "final"
    model.save_pretrained(output)
    save_recipe(recipe, output / SAVED_RECIPE)
    copy_processor(recipe.model, output)
    return output


# ------------------------------------------------------------------------------------------------------- the data


class TowerImages(Dataset):
    """Tiles of rendered images, with the caption of each and the names under each patch. Item i never changes."""

    def __init__(
        self,
        recipe: TowerRecipe,
        settings: WorldSettings,
        image_processor: Any,
        split: str,
        count: int | None = None,
    ):
        self.recipe, self.settings, self.image_processor, self.split = recipe, settings, image_processor, split
        self.count = count or recipe.max_steps * recipe.batch_size * recipe.accumulation
        self.patches_per_side = patches_per_side(recipe.model)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        task = self.recipe.tasks[index % len(self.recipe.tasks)]
        record = rendered_record(task, self.split, self.recipe.seed, index, self.settings)
        drawing = record.images[0].drawing
        tiles = self.image_processor(record.images[0].open(), return_tensors="pt")["pixel_values"][0]
        regions = regions_of(record, drawing)
        rng = np.random.default_rng([self.recipe.seed, index])
        grid = self.image_processor.grid_of(*drawing.size)
        places = view_places(drawing.size, grid, self.image_processor.tile_size)
        order = richest_parts(regions, places, self.image_processor.tile_size, rng)[: self.recipe.parts]
        shown = visible_patches(drawing.size, grid, self.patches_per_side, "patch", "tiles")
        pixels, names, captions, visible = [], [], [], []
        for part in order:
            pixels.append(tiles[part])
            is_visible = torch.zeros(self.patches_per_side**2, dtype=torch.bool)
            is_visible[shown[part] - part * len(is_visible)] = True
            visible.append(is_visible)
            label = label_patches(regions, places[part], self.image_processor.tile_size, self.patches_per_side)
            names.append(torch.from_numpy(label))
            captions.append(caption_of(regions, places[part], self.image_processor.tile_size))
        return {
            "pixel_values": torch.stack(pixels),
            "names": torch.stack(names),
            "is_visible": torch.stack(visible),
            "captions": captions,
        }


def patches_per_side(model: str) -> int:
    """Patches along a side of a tile, from the model's configuration."""
    vision = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vision_config"]
    return vision["image_size"] // vision["patch_size"]


def regions_of(record: Record, drawing: Drawing) -> list[Region]:
    """Give each thing of a rendered record with its colour, and each character, with boxes in pixels."""
    height, width = drawing.size
    regions: list[Region] = []
    for thing in record.annotations["pictures"][0]["objects"]:
        x1, y1, x2, y2 = thing["box"]
        regions.append(((thing["thing"], thing["colour"]), (x1 * width, y1 * height, x2 * width, y2 * height)))
    for mark in drawing.marks:
        if isinstance(mark, Text):
            regions += character_regions(mark)
    return regions


def character_regions(mark: Text) -> list[Region]:
    """Give each character of a line of text with its box in pixels."""
    font = load_font(mark.font, mark.points)
    _, top, _, bottom = text_box(mark.text, mark.font, mark.points)
    x, y = mark.origin
    ends = [x + font.getlength(mark.text[: index + 1]) for index in range(len(mark.text))]
    starts = [float(x), *ends[:-1]]
    return [
        ((character,), (start_x, y + top, end_x, y + bottom))
        for character, start_x, end_x in zip(mark.text, starts, ends, strict=True)
        if character in CHARACTERS
    ]


def _boxes_in(regions: Sequence[Region], place: tuple[float, float, float, float]) -> np.ndarray:
    """Boxes (R, 4) of regions in the pixels of a tile."""
    scale_x, scale_y, left, top = place
    boxes = np.array([box for _, box in regions]).reshape(-1, 4)
    return boxes * (scale_x, scale_y, scale_x, scale_y) + (left, top, left, top)


def label_patches(
    regions: Sequence[Region], place: tuple[float, float, float, float], tile_size: int, per_side: int
) -> np.ndarray:
    """Mark which names lie under which patch: (P, number of names) of 0 and 1.

    A region lies under a patch when they share at least `MIN_OVERLAP` of the smaller of the two.
    """
    names = name_index()
    labels = np.zeros((per_side, per_side, len(names)), dtype=np.float32)
    steps = np.arange(per_side)
    labels[steps, :, [names[f"row {step + 1}"] for step in steps]] = 1
    labels[:, steps, [names[f"column {step + 1}"] for step in steps]] = 1
    if regions:
        boxes, side = _boxes_in(regions, place), tile_size / per_side
        edges = steps * side
        shared = [
            np.clip(np.minimum(high[:, None], edges + side) - np.maximum(low[:, None], edges), 0, None)
            for low, high in ((boxes[:, 1], boxes[:, 3]), (boxes[:, 0], boxes[:, 2]))
        ]
        area = np.minimum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), side * side)
        is_under = shared[0][:, :, None] * shared[1][:, None, :] >= MIN_OVERLAP * area[:, None, None]
        is_under &= (boxes[:, 3] - boxes[:, 1] >= MIN_HEIGHT)[:, None, None]
        for (labels_of_region, _), under in zip(regions, is_under, strict=True):
            for name in labels_of_region:
                labels[under, names[name]] = 1
    return labels.reshape(per_side * per_side, -1)


def richest_parts(
    regions: Sequence[Region],
    places: Sequence[tuple[float, float, float, float]],
    tile_size: int,
    rng: np.random.Generator,
) -> list[int]:
    """Order an image's parts: those that show most first, the global view at random first or last."""
    counts = [len(shown_names(regions, place, tile_size)) for place in places]
    tiles = sorted(range(1, len(places)), key=lambda part: (-counts[part], rng.random()))
    return [0, *tiles] if rng.random() < 0.5 else [*tiles, 0]


def shown_names(
    regions: Sequence[Region], place: tuple[float, float, float, float], tile_size: int
) -> list[tuple[str, ...]]:
    """Names of the regions that a tile shows at least half of, in the order they were rendered."""
    if not regions:
        return []
    boxes = _boxes_in(regions, place)
    inside = np.clip(boxes, 0, tile_size)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    seen = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1]) >= 0.5 * area
    return [names for (names, _), is_seen in zip(regions, seen, strict=True) if is_seen]


def caption_of(regions: Sequence[Region], place: tuple[float, float, float, float], tile_size: int) -> str:
    """Name what a tile shows: coloured things, then characters, in the order they were rendered."""
    shown = shown_names(regions, place, tile_size)
    things = [f" {colour} {thing}" for thing, colour in (names for names in shown if len(names) == 2)]
    text = "".join(names[0] for names in shown if len(names) == 1)
    return (f"{','.join(things)}" + (f' "{text}"' if text else "")).strip() or "nothing"


KINDS: dict[str, tuple[str, ...]] = {
    "thing": tuple(THINGS),
    "colour": tuple(COLOURS),
    "character": tuple(CHARACTERS),
}


@cache
def patch_kinds(per_side: int = 8) -> dict[str, slice]:
    """Where each kind of name stands in `patch_names`."""
    sizes = {kind: len(names) for kind, names in KINDS.items()} | {"row": per_side, "column": per_side}
    ends = np.cumsum(list(sizes.values())).tolist()
    return {kind: slice(end - size, end) for (kind, size), end in zip(sizes.items(), ends, strict=True)}


def patch_names(per_side: int = 8) -> list[str]:
    """Everything a patch can be named after, kind by kind."""
    places = [f"{kind} {step + 1}" for kind in ("row", "column") for step in range(per_side)]
    return [name for names in KINDS.values() for name in names] + places


@cache
def name_index(per_side: int = 8) -> dict[str, int]:
    """Position of each name in `patch_names`."""
    return {name: index for index, name in enumerate(patch_names(per_side))}


class TowerCollator:
    """Joins the tiles of several images into one batch."""

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


# ------------------------------------------------------------------------------------------------------ the model


class Naming(nn.Module):
    """Names what lies under each patch from a vector for each; thrown away afterwards.

    Args:
        width: of the vectors.
    """

    def __init__(self, width: int):
        super().__init__()
        self.naming = nn.Linear(width, len(patch_names()))
        self.presence = nn.Linear(width, 2)

    def loss(self, vectors: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """Cross-entropy within each kind, over patches that show it; several names under a patch share the target.

        Args:
            vectors: (N, P, width).
            names: (N, P, K), which of K names lie under each patch.
        """
        logits = self.naming(vectors)
        loss = logits.new_zeros(())
        for span in patch_kinds().values():
            annotations = names[..., span]
            counts = annotations.sum(-1)
            is_shown = counts > 0
            if is_shown.any():
                target = annotations[is_shown] / counts[is_shown].unsqueeze(-1)
                loss = loss + nn.functional.cross_entropy(logits[..., span][is_shown], target)
        is_present = torch.stack([names[..., patch_kinds()[kind]].amax(-1) for kind in ("thing", "character")], dim=-1)
        return loss + sigmoid_loss(self.presence(vectors), is_present).mean()


class LatentReader(nn.Module):
    """Reads a vector for each patch from a tile's latents, with one learned query a patch; thrown away afterwards.

    Args:
        width: of latents and vectors, a multiple of 32.
        num_patches: P.
    """

    def __init__(self, width: int, num_patches: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_patches, width))
        self.latent_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, width // 32, batch_first=True)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, Q, width) to vectors (N, P, width)."""
        latents = self.latent_norm(latents)
        return self.attention(self.queries.expand(len(latents), -1, -1), latents, latents, need_weights=False)[0]


class PatchSiglip(nn.Module):
    """SigLIP that also names what lies under each patch, from patch tokens and, with a resampler, from latents.

    Args:
        vision_tower: what training starts from.
        tokenizer: of the model it is for.
        recipe: sizes of the text tower, weight of the image level.
        resampler: to be trained too, or None.
    """

    def __init__(
        self, vision_tower: nn.Module, tokenizer: Any, recipe: TowerRecipe, resampler: nn.Module | None = None
    ):
        super().__init__()
        vision = vision_tower.config.to_dict() | {"vision_use_head": True}
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.text_width,
            "intermediate_size": 4 * recipe.text_width,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": recipe.text_width // 32,
            "max_position_embeddings": recipe.caption_length,
            "projection_size": vision["hidden_size"],
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        torch.manual_seed(recipe.seed)
        self.siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        start = {name.removeprefix("vision_model."): value for name, value in vision_tower.state_dict().items()}
        self.siglip.vision_model.load_state_dict(start, strict=False)  # the pooling head is new
        nn.init.constant_(self.siglip.logit_scale, float(np.log(10)))
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        self.image_weight = recipe.image_weight
        if not self.image_weight:
            for name, parameter in self.siglip.named_parameters():
                parameter.requires_grad_(name.startswith("vision_model.") and ".head." not in name)
        self.patch_naming = Naming(vision["hidden_size"])
        self.resampler = resampler
        if resampler is not None:
            width = resampler.projection.out_features
            self.reader = LatentReader(width, patches_per_side(recipe.model) ** 2)
            self.latent_naming = Naming(width)

    def forward(
        self,
        pixel_values: torch.Tensor,
        names: torch.Tensor,
        is_visible: torch.Tensor,
        input_ids: torch.Tensor,
        is_same: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compare every level.

        Args:
            pixel_values: tiles (N, 3, S, S).
            names: (N, P, K), which of K names lie under each patch.
            is_visible: (N, P), which patches show image and not padding.
            input_ids: captions (N, L), padded on the left.
            is_same: (N, N), which captions are equal.

        Returns:
            `loss`.
        """
        vision = self.siglip.vision_model(pixel_values)
        loss = self.patch_naming.loss(vision.last_hidden_state, names)
        if self.resampler is not None:
            loss = loss + self.latent_naming.loss(self.read_latents(vision.last_hidden_state, is_visible), names)
        if self.image_weight:
            images = nn.functional.normalize(vision.pooler_output, dim=-1)
            captions = nn.functional.normalize(self.siglip.text_model(input_ids).pooler_output, dim=-1)
            logits = images @ captions.T * self.siglip.logit_scale.exp() + self.siglip.logit_bias
            loss = loss + self.image_weight * sigmoid_loss(logits, is_same).sum(-1).mean()
        return {"loss": loss}

    def read_latents(self, patches: torch.Tensor, is_visible: torch.Tensor) -> torch.Tensor:
        """Resample the visible patches of (N, P, D) and read from the latents a vector for each patch, (N, P, E)."""
        lengths, order = is_visible.sum(-1).sort(stable=True)  # equal lengths side by side, as the resampler wants
        runs = [(int(count), int(length)) for length, count in zip(*lengths.unique(return_counts=True), strict=True)]
        latents = self.resampler(patches[order][is_visible[order]], runs)
        return self.reader(latents[order.argsort()])


def sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss per pair (arXiv:2303.15343): -log sigmoid(z * logit), z = 1 where they match, else -1."""
    return -nn.functional.logsigmoid((2 * labels - 1) * logits)


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
            span = patch_kinds()[kind]
            annotations = names[..., span]
            is_one = annotations.sum(-1) == 1
            best = scores[..., span].argmax(-1)
            right[kind + level] += int((best == annotations.argmax(-1))[is_one].sum())
            seen[kind + level] += int(is_one.sum())
    return {f"held_out_{name}": right[name] / max(1, seen[name]) for name in seen}


if __name__ == "__main__":
    main()
