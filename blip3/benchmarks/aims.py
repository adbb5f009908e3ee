# SPDX-License-Identifier: Apache-2.0
"""What this repository wants to be true of its speed, and whether the results say so."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .batching import BY_LENGTH, CACHE, FEATURES, ONE_BATCH, ONE_BY_ONE, STATIC_BATCH
from .clock import ratios, summarize
from .contestants import BARE, LLAVA, OURS
from .generation import EAGER
from .generation import name_of as generation_name
from .images import LLAVA_PIL, LLAVA_TORCHVISION, PIL, PIL_RESIZES, TORCH, TORCH_RESIZES
from .overhead import ARITHMETIC, PARTS
from .overhead import name_of as overhead_name
from .training_step import PACKED, PADDED

Rows = Mapping[str, Mapping[str, Any]]  # "part: name of the comparison" -> the comparison as JSON
Measure = Callable[[Rows], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class Aim:
    """One line of the table of aims."""

    what: str
    """What is compared."""
    limit: float | None
    """To reach; None where the value is only reported."""
    at_least: bool
    """Whether more is better."""
    measure: Measure
    """Results -> a value each round, None if they lack it."""
    unit: str = "x"
    """Written behind the value."""

    @property
    def words(self) -> str:
        """The aim in words."""
        if self.limit is None:
            return "reported"
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"

    def judge(self, rows: Rows) -> dict[str, Any]:
        """Value, spread, whether it is reached, and by what share it is missed."""
        values = self.measure(rows)
        found: dict[str, Any] = {"what": self.what, "aim": self.words, "unit": self.unit, "result": None}
        if not values:
            return found | {"reached": None, "missed_by": None}
        result = summarize(values)
        if self.limit is None:
            return found | {"result": result, "reached": None, "missed_by": None}
        median = result["median"]
        is_reached = median >= self.limit if self.at_least else median <= self.limit
        missed = 0.0 if is_reached else abs(median - self.limit) / (self.limit or 1.0)
        return found | {"result": result, "reached": is_reached, "missed_by": round(missed, 4)}


def ratio(part: str, name: str, above: str, below: str) -> Measure:
    """Ratio of two contestants of one comparison, round by round."""

    def measure(rows: Rows) -> Sequence[float] | None:
        values = rows.get(f"{part}: {name}", {}).get("values", {})
        return ratios(values[above], values[below]) if above in values and below in values else None

    return measure


def value(part: str, name: str, contestant: str) -> Measure:
    """Values of one contestant."""
    return lambda rows: rows.get(f"{part}: {name}", {}).get("values", {}).get(contestant)


def fact(part: str, name: str, read: Callable[[Mapping[str, Any]], float]) -> Measure:
    """A number from the facts of a comparison."""

    def measure(rows: Rows) -> Sequence[float] | None:
        row = rows.get(f"{part}: {name}")
        try:
            return [read(row["facts"])] if row else None
        except (KeyError, ZeroDivisionError):
            return None

    return measure


def make_aims(dtypes: Sequence[str]) -> list[Aim]:
    """The aims, for the dtypes that were measured."""
    aims = [
        Aim(
            "image processing, bit-exact backend, LLaVA-NeXT's PIL processor takes, two threads",
            3.0,
            True,
            ratio("images", "all sizes, from PIL, 2 threads", LLAVA_PIL, PIL),
        ),
        Aim(
            "image processing, torch backend, LLaVA-NeXT's torchvision processor takes, one thread",
            2.5,
            True,
            ratio("images", "all sizes, from PIL, 1 thread", LLAVA_TORCHVISION, TORCH),
        ),
        Aim(
            "bit-exact backend, its resizes alone take, two threads",
            None,
            True,
            ratio("images", "all sizes, from PIL, 2 threads", PIL_RESIZES, PIL),
        ),
        Aim(
            "torch backend, its resizes alone take, one thread",
            None,
            True,
            ratio("images", "all sizes, from PIL, 1 thread", TORCH_RESIZES, TORCH),
        ),
    ]
    for dtype in dtypes:
        aims += _model_aims(dtype)
    return aims + _batch_aims(dtypes[0]) + _memory_aims(dtypes[0], dtypes[-1]) + _reported(dtypes)


def _model_aims(dtype: str) -> list[Aim]:
    name = generation_name(dtype, [1], EAGER)
    prefill = overhead_name(dtype)
    aims = [
        Aim(
            f"time to first token, one picture of 5 parts, LLaVA-NeXT takes, {dtype}",
            3.0,
            True,
            ratio("generation", f"{name}, first token", LLAVA, OURS),
        ),
        Aim(
            f"prefill against the sum of its bare parts, {dtype}", 1.05, False, ratio("overhead", prefill, OURS, PARTS)
        ),
        Aim(
            f"time per token against the bare language model, {dtype}",
            1.1,
            False,
            ratio("generation", f"{name}, each further token", OURS, BARE),
        ),
        Aim(
            f"time per token, LLaVA-NeXT takes, {dtype}",
            1.0,
            True,
            ratio("generation", f"{name}, each further token", LLAVA, OURS),
        ),
    ]
    if dtype == "bfloat16":
        limit = ratio("overhead", prefill, OURS, ARITHMETIC)
        aims.append(Aim(f"prefill against its matrix products alone, {dtype}", 2.0, False, limit))
    return aims


def _batch_aims(dtype: str) -> list[Aim]:
    name = f"16 mixed prompts, {dtype}"
    questions = f"3 pictures, {dtype}"
    training = f"mixed lengths, {dtype}"
    return [
        Aim(
            "16 mixed prompts in a batch, tokens/s against one by one",
            4.0,
            True,
            ratio("batching", name, ONE_BATCH, ONE_BY_ONE),
        ),
        Aim("the same with a static cache", None, True, ratio("batching", name, STATIC_BATCH, ONE_BY_ONE)),
        Aim("the same in batches of like length", None, True, ratio("batching", name, BY_LENGTH, ONE_BY_ONE)),
        Aim(
            "vision tower runs of a second question, features reused", 0.0, False, _tower_runs(questions, FEATURES), ""
        ),
        Aim("vision tower runs of a second question, cache continued", 0.0, False, _tower_runs(questions, CACHE), ""),
        Aim("training step, packed, tokens/s against padded", 1.5, True, ratio("training", training, PACKED, PADDED)),
    ]


def _memory_aims(dtype: str, loaded_dtype: str) -> list[Aim]:
    prefill, elements = f"prefill, 1 picture, {dtype}", f"elements of a prefill, 1 picture, {dtype}"

    def made(facts: Mapping[str, Any]) -> float:
        return float(facts["made"]["logits of every token"] + facts["made"]["scores of a resampler layer"])

    def per_token(facts: Mapping[str, Any]) -> float:
        return facts["kib_per_image_token"][OURS] / facts["kib_per_image_token"][LLAVA]

    return [
        Aim(
            "peak memory of from_pretrained, times the weights",
            1.1,
            False,
            value("memory", f"from_pretrained, {loaded_dtype}, with files", OURS),
        ),
        Aim(
            "full-length logits and resampler scores made in a prefill", 0.0, False, fact("memory", elements, made), ""
        ),
        Aim("prefill memory an image token, against LLaVA-NeXT's", 1.0, False, fact("memory", prefill, per_token)),
        Aim("prefill memory a picture, against LLaVA-NeXT's", None, False, ratio("memory", prefill, OURS, LLAVA)),
    ]


def _reported(dtypes: Sequence[str]) -> list[Aim]:
    aims = [
        Aim("image tokens of a 1920x1080 picture", None, False, value("tokens", "1920x1080", OURS), ""),
        Aim("image tokens of the same, LLaVA-NeXT", None, False, value("tokens", "1920x1080", LLAVA), ""),
    ]
    for dtype in dtypes:
        token = f"{generation_name(dtype, [1], EAGER)}, each further token"
        share = fact("overhead", overhead_name(dtype), lambda facts: facts["share_of_matrix_product_rate"])
        aims.append(Aim(f"prefill, share of the rate of a large matrix product, {dtype}", None, True, share, ""))
        aims.append(
            Aim(
                f"time per token against copying as many bytes, {dtype}",
                None,
                False,
                ratio("generation", token, OURS, "memory copy"),
            )
        )
    return aims


def _tower_runs(name: str, contestant: str) -> Measure:
    return fact("questions", name, lambda facts: float(facts["tower_runs"][contestant]))
