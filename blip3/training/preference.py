# SPDX-License-Identifier: Apache-2.0
r"""The preference loss: DPO (arXiv:2305.18290) with a second term on answers to the noised image.

With pi the log-probability of an answer under the model and ref that without its adapters, r = beta * (pi - ref):

    loss = - log sigmoid(r(chosen) - r(rejected))                       DPO
           - noised_weight * log sigmoid(r(chosen) - r(noised))         where a pair has a noised answer
           - anchor * log sigmoid(r(chosen))                            mDPO's anchor (arXiv:2406.11839)

averaged over pairs. All answers are scored on the clean image. A step takes two passes of the language model, with
adapters and without, over each prompt once (`pairs.py`), and one pass of the frozen tower, whose features the second
pass reads. Teacher-forced answers take one more pass, over the noised image.

Every process has equally many pairs, so the mean over all of them is the mean of the processes' means.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .encode import IMAGE_INPUTS
from .lora import base_of
from .pairs import ANSWERS, PADDING, branch_mask
from .recipe import Recipe

_MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Scores:
    """What one pass gives."""

    logits: torch.Tensor
    """(B, 1 + A, vocabulary): of the prompt's last token and of every answer token."""
    images: dict[str, Any]
    """What a further pass takes, so that it need not encode images."""


class PreferenceObjective:
    """Loss and figures of a batch of pairs.

    Args:
        recipe: `beta`, `anchor`, `noised_weight`, `second_term`.
    """

    def __init__(self, recipe: Recipe):
        self.beta, self.anchor, self.noised_weight = recipe.beta, recipe.anchor, recipe.noised_weight or 0.0
        self.is_teacher_forced = recipe.second_term == "teacher_forced"

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the loss.

        Args:
            model: PEFT's, perhaps wrapped for several processes.
            batch: of `PairCollator`.

        Returns:
            the mean loss over the pairs, and rewards, margins, accuracy and log-probabilities by name.
        """
        policy = self._score(model, batch, _images_of(batch))
        own = self._teacher_forced(model, batch) if self.is_teacher_forced else None
        # After the model's own pass: under FSDP2 a weight's first pass decides whether it takes a gradient.
        with torch.no_grad(), base_of(model).disable_adapter():
            reference = self._score(model, batch, policy.images)
        ratios = {}
        has_noised = (batch["branch"] == 1 + ANSWERS.index("noised")).any(1)
        policy_sums, reference_sums = (answer_log_probs(each.logits, batch) for each in (policy, reference))
        for number, name in enumerate(ANSWERS):
            ratios[name] = policy_sums[:, number] - reference_sums[:, number]
        if own is not None:
            ratios["noised"] = _chosen_places(policy.logits, own, batch) - _chosen_places(reference.logits, own, batch)
            has_noised = batch["has_images"]
        rewards = {name: self.beta * ratio for name, ratio in ratios.items()}
        loss = preference_loss(rewards, has_noised, self.noised_weight, self.anchor)
        return loss, _figures(rewards, policy_sums, has_noised if self.noised_weight else None)

    def _score(
        self, model: Any, batch: dict[str, torch.Tensor], images: dict[str, Any], length: int | None = None
    ) -> Scores:
        """Run the model over the first `length` columns, all if None."""
        branch, position_ids = batch["branch"][:, :length], batch["position_ids"][:, :length]
        num_answer_columns = batch["source"].shape[1] - (batch["branch"].shape[1] - branch.shape[1])
        outputs = model(
            input_ids=batch["input_ids"][:, :length],
            position_ids=position_ids,
            attention_mask=_attention_mask(base_of(model), branch, position_ids),
            logits_to_keep=1 + num_answer_columns,
            use_cache=False,
            **images,
        )
        features = outputs.image_outputs
        if features is None:
            features = _no_features(base_of(model).config, outputs.logits)
        queries = getattr(features, "query_ids", None)
        asked = {} if queries is None else {"query_ids": queries}
        return Scores(outputs.logits, {"mm_encoder_outputs": {"image": features}, **asked})

    @torch.no_grad()
    def _teacher_forced(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Give the likeliest token (B, C) at each place of the chosen answers when the images are noised."""
        is_chosen = batch["branch"] == 1 + ANSWERS.index("chosen")
        first = batch["branch"].shape[1] - batch["source"].shape[1]
        longest = int(is_chosen.sum(1).max())  # the chosen answer comes first
        images = _images_of(batch)
        if images:
            images = images | {"pixel_values": batch["noised_pixel_values"]}
        logits = self._score(model, batch, images, first + longest).logits
        return logits[:, :longest].argmax(-1)


def _no_features(config: Any, like: torch.Tensor) -> Any:
    """Say that there is no image to the next pass, which would else run the tower where ranks share it."""
    features: Any = BaseModelOutputWithPooling(pooler_output=(like.new_zeros(0, config.text_config.hidden_size),))
    if config.resampler_config.num_text_queries:
        features.query_ids = like.new_zeros(0, config.resampler_config.num_text_queries, dtype=torch.long)
    return features


def _images_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def _attention_mask(model: Any, branch: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Make the mask that the model's attention takes: bool for SDPA, added to scores otherwise.

    Raises:
        ValueError: for attention that takes no mask of this kind.
    """
    settings = model.config.text_config
    kind = settings._attn_implementation
    if kind not in _MASKED_ATTENTION:
        raise ValueError(
            f"The language model's attention is {kind!r} but answers that share a prompt need one of "
            f"{', '.join(_MASKED_ATTENTION)}, which take a mask for each pair of tokens. It was probably set when the "
            "model was loaded: leave attn_implementation out."
        )
    sees = branch_mask(branch, position_ids, getattr(settings, "sliding_window", None))
    if kind == "sdpa":
        return sees
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, torch.finfo(torch.float32).min)


def token_log_probs(logits: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Give the log-probability of each token, in float32.

    Args:
        logits: (B, K, vocabulary).
        source: (B, A), the column of `logits` that predicts each token.
        tokens: (B, A).

    Returns:
        (B, A).
    """
    rows = torch.arange(len(source), device=source.device).unsqueeze(1)
    return logits[rows, source, tokens].float() - logits.float().logsumexp(-1)[rows, source]


def answer_log_probs(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the log-probability (B, 3) of each of `ANSWERS`, the sum over its tokens; 0 for one that is not there."""
    num_columns = batch["source"].shape[1]
    tokens, branch = (batch[name][:, -num_columns:] for name in ("input_ids", "branch"))
    log_probs = token_log_probs(logits, batch["source"], tokens).masked_fill(branch == PADDING, 0.0)
    return torch.stack([(log_probs * (branch == number)).sum(1) for number in range(1, 1 + len(ANSWERS))], dim=1)


def _chosen_places(logits: torch.Tensor, tokens: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the log-probability (B,) of tokens (B, C) that stand in the places of the chosen answer's."""
    longest = tokens.shape[1]
    branch = batch["branch"][:, -batch["source"].shape[1] :][:, :longest]
    log_probs = token_log_probs(logits, batch["source"][:, :longest], tokens)
    return (log_probs * (branch == 1 + ANSWERS.index("chosen"))).sum(1)


def preference_loss(
    rewards: dict[str, torch.Tensor], has_noised: torch.Tensor, noised_weight: float, anchor: float
) -> torch.Tensor:
    """Average the loss over pairs.

    Args:
        rewards: beta * log ratio (B,) of each of `ANSWERS`.
        has_noised: (B,) bool; pairs without a noised answer have no second term.
        noised_weight: of the second term.
        anchor: of the third.
    """
    losses = -logsigmoid(rewards["chosen"] - rewards["rejected"])
    if noised_weight:
        losses = losses - noised_weight * logsigmoid(rewards["chosen"] - rewards["noised"]) * has_noised
    if anchor:
        losses = losses - anchor * logsigmoid(rewards["chosen"])
    return losses.mean()


@torch.no_grad()
def _figures(
    rewards: dict[str, torch.Tensor], log_probs: torch.Tensor, has_noised: torch.Tensor | None
) -> dict[str, float]:
    """Name the usual curves as TRL does; those of the second term are means over all pairs, its share beside them."""
    margins = rewards["chosen"] - rewards["rejected"]
    values = {
        "rewards/chosen": rewards["chosen"],
        "rewards/rejected": rewards["rejected"],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": log_probs[:, 0],
        "logps/rejected": log_probs[:, 1],
    }
    if has_noised is not None:
        noised = (rewards["chosen"] - rewards["noised"]) * has_noised
        values |= {"noised/share": has_noised.float(), "noised/margins": noised}
    return {name: value.mean().item() for name, value in values.items()}
