# SPDX-License-Identifier: Apache-2.0
"""A SigLIP that also names what lies under each patch, from patch tokens and from the latents of a resampler.

    pixel_values (N, 3, S, S) -> tower -> patches (N, P, D) --patch_naming--> names (N, P, K)
                                             |
                                         resampler -> latents (N, Q, E) -> reader (N, P, E) --latent_naming--> names

N views, P patches a view, K names, Q latents a view.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, SiglipConfig, SiglipModel

from ...conversion.names import without_inner
from ..recipe import TowerRecipe
from .labels import patch_kinds, patch_names


class Naming(nn.Module):
    """Names what lies under each patch from a vector for each; thrown away afterwards.

    Args:
        width: of the vectors.
        per_side: patches along a side of a view.
    """

    def __init__(self, width: int, per_side: int):
        super().__init__()
        self.kinds = patch_kinds(per_side)
        self.naming = nn.Linear(width, len(patch_names(per_side)))
        self.presence = nn.Linear(width, 2)

    def loss(self, vectors: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
        """Cross-entropy within each kind, over patches that show it; several names under a patch share the target.

        Args:
            vectors: (N, P, width).
            names: (N, P, K), which of K names lie under each patch.
        """
        logits = self.naming(vectors)
        loss = logits.new_zeros(())
        for span in self.kinds.values():
            annotations = names[..., span]
            counts = annotations.sum(-1)
            is_shown = counts > 0
            if is_shown.any():
                target = annotations[is_shown] / counts[is_shown].unsqueeze(-1)
                loss = loss + nn.functional.cross_entropy(logits[..., span][is_shown], target)
        is_present = torch.stack([names[..., self.kinds[kind]].amax(-1) for kind in ("thing", "character")], dim=-1)
        return loss + sigmoid_loss(self.presence(vectors), is_present).mean()


class LatentReader(nn.Module):
    """Reads a vector for each patch from a view's latents, with one learned query a patch; thrown away afterwards.

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

    The patches along a side are those of the tower's configuration.

    Args:
        vision_tower: what training starts from.
        tokenizer: of the model it is for.
        recipe: sizes of the text tower, weight of the image level.
        resampler: to be trained too, or None.
    """

    def __init__(
        self, vision_tower: PreTrainedModel, tokenizer: Any, recipe: TowerRecipe, resampler: Any | None = None
    ):
        super().__init__()
        per_side = patches_per_side(vision_tower.config)
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
        start = {without_inner(name): value for name, value in vision_tower.state_dict().items()}
        self.siglip.vision_model.load_state_dict(start, strict=False)  # the pooling head is new
        nn.init.constant_(self.siglip.logit_scale, float(np.log(10)))
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        self.image_weight = recipe.image_weight
        if not self.image_weight:
            self.siglip.requires_grad_(False)
            self.siglip.vision_model.requires_grad_(True)
            self.siglip.vision_model.head.requires_grad_(False)
        self.patch_naming = Naming(vision["hidden_size"], per_side)
        self.resampler: Any = resampler
        if resampler is not None:
            width = resampler.projection.out_features
            self.reader = LatentReader(width, per_side**2)
            self.latent_naming = Naming(width, per_side)

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
            pixel_values: views (N, 3, S, S).
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


def patches_per_side(vision_config: Any) -> int:
    """Patches along a side of a view, from a tower's configuration."""
    return vision_config.image_size // vision_config.patch_size
