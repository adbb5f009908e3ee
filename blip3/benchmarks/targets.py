# SPDX-License-Identifier: Apache-2.0
"""What this repository wants to be true of its speed, and whether the results say so."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .batching import (
    BY_LENGTH,
    CACHE,
    FEATURES,
    ONE_BATCH,
    ONE_BY_ONE,
    STATIC_BATCH,
    name_of_others,
    name_of_share,
)
from .busy import FACTOR, LARGE_FACTOR, ONE_THREAD
from .candidates import BARE, IDEFICS, LLAVA, OURS
from .clock import ratios, summarize
from .cold_start import NAME as COLD_START
from .cold_start import PHASES
from .generation import EAGER, SAME_CACHE
from .generation import name_of as generation_name
from .images import (
    BATCH_MEMORY,
    BYTES,
    FLOATS,
    LLAVA_PIL,
    LLAVA_TORCHVISION,
    PIL_BYTES,
    PIL_RESIZES,
    TORCH_BYTES,
    TORCH_RESIZES,
)
from .images import name_of as name_of_images
from .loader import FEEDING
from .memory import LOADED_DTYPE
from .overhead import ARITHMETIC, PARTS
from .overhead import name_of as overhead_name
from .peers import COUNTS, HALF, IDEFICS_OWN
from .peers import name_of as name_of_peers
from .switches import NO_WINDOW, OFF, ON
from .training_step import PACKED, PADDED

Rows = Mapping[str, Mapping[str, Any]]  # "suite: name of the comparison" -> the comparison as JSON
Measure = Callable[[Rows], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the table of targets."""

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
    headline: tuple[str, str] | None = None
    """For README: what is faster, and than what."""

    @property
    def words(self) -> str:
        """The target in words."""
        if self.limit is None:
            return "reported"
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"

    def compare(self, rows: Rows) -> dict[str, Any]:
        """Value, spread, whether it is reached, and by what share it is missed."""
        values = self.measure(rows)
        found: dict[str, Any] = {"what": self.what, "target": self.words, "unit": self.unit, "result": None}
        found |= {"headline": self.headline} if self.headline else {}
        if not values:
            return found | {"reached": None, "missed_by": None}
        result = summarize(values)
        if self.limit is None:
            return found | {"result": result, "reached": None, "missed_by": None}
        median = result["median"]
        is_reached = median >= self.limit if self.at_least else median <= self.limit
        missed = 0.0 if is_reached else abs(median - self.limit) / (self.limit or 1.0)
        return found | {"result": result, "reached": is_reached, "missed_by": round(missed, 4)}


def ratio(suite: str, name: str, above: str, below: str) -> Measure:
    """Ratio of two candidates of one comparison, round by round."""

    def measure(rows: Rows) -> Sequence[float] | None:
        values = rows.get(f"{suite}: {name}", {}).get("values", {})
        return ratios(values[above], values[below]) if above in values and below in values else None

    return measure


def ratio_of_largest(source: str, threads: int, above: str, below: str) -> Measure:
    """Ratio of two candidates of image processing, for the largest image that was measured."""

    def measure(rows: Rows) -> Sequence[float] | None:
        wanted = {"source": source, "threads": threads}
        of_images = {
            row["facts"]["height"] * row["facts"]["width"]: row["values"]
            for name, row in rows.items()
            if name.startswith("images: ") and wanted.items() <= row["facts"].items()
        }
        values = of_images[max(of_images)] if of_images else {}
        return ratios(values[above], values[below]) if above in values and below in values else None

    return measure


def ratio_of_medians(above: Measure, below: Measure) -> Measure:
    """Ratio of the medians of two measures; their rounds were made at different times."""

    def measure(rows: Rows) -> Sequence[float] | None:
        found = [each(rows) for each in (above, below)]
        return [statistics.median(found[0]) / statistics.median(found[1])] if found[0] and found[1] else None

    return measure


def value(suite: str, name: str, candidate: str) -> Measure:
    """Values of one candidate."""
    return lambda rows: rows.get(f"{suite}: {name}", {}).get("values", {}).get(candidate)


def fact(suite: str, name: str, read: Callable[[Mapping[str, Any]], float]) -> Measure:
    """A number from the facts of a comparison."""

    def measure(rows: Rows) -> Sequence[float] | None:
        row = rows.get(f"{suite}: {name}")
        try:
            return [read(row["facts"])] if row else None
        except (KeyError, ZeroDivisionError):
            return None

    return measure


def make_targets(dtypes: Sequence[str], device: str) -> list[Target]:
    """The targets, for the dtypes that were measured and for a kind of device, `cpu` or `cuda`."""
    targets = _image_targets() + _busy_targets()
    for dtype in dtypes:
        targets += _model_targets(dtype)
    targets += _peer_targets(dtypes[0])
    return targets + _batch_targets(dtypes[0], device) + _memory_targets(dtypes[0]) + _reported(dtypes)


def _image_targets() -> list[Target]:
    from_pil = {threads: name_of_images("all sizes", "PIL", threads) for threads in (1, 2)}
    targets = []
    for threads in (2, 1):
        words = f"image processing to bytes, bit-exact backend, {threads} thread{'s' * (threads > 1)}"
        alone = ratio("images", from_pil[threads], PIL_BYTES, PIL_RESIZES)
        targets.append(Target(f"{words}, against Pillow's two resizes alone", 1.08, False, alone))
        peer = ratio("images", from_pil[threads], LLAVA_PIL, PIL_BYTES)
        targets.append(Target(f"{words}, LLaVA-NeXT's PIL processor takes", None, True, peer))
    targets.append(
        Target(
            "image processing to bytes, torch backend, 1 thread, LLaVA-NeXT's torchvision processor takes",
            2.5,
            True,
            ratio("images", from_pil[1], LLAVA_TORCHVISION, TORCH_BYTES),
            headline=("image processing to bytes, one thread", "LLaVA-NeXT's processor on torchvision"),
        )
    )
    for peer_name, words in ((LLAVA_TORCHVISION, "torchvision"), (LLAVA_PIL, "PIL")):
        what = f"JPEG of 12 megapixels to bytes, torch backend, 1 thread, LLaVA-NeXT's {words} processor takes"
        headline = ("a JPEG of 12 megapixels to bytes, one thread", "LLaVA-NeXT's processor on PIL")
        target = Target(what, 3.0, True, ratio_of_largest("JPEG", 1, peer_name, TORCH_BYTES))
        targets.append(dataclasses.replace(target, headline=headline if peer_name == LLAVA_PIL else None))
    alone = ratio("images", from_pil[1], TORCH_BYTES, TORCH_RESIZES)
    memory = ratio("images", BATCH_MEMORY, BYTES, FLOATS)
    return [
        *targets,
        Target("image processing to bytes, torch backend, 1 thread, against its resizes alone", None, False, alone),
        Target("pixel_values of a batch of 16 images, bytes against float32", 0.26, False, memory),
    ]


def _busy_targets() -> list[Target]:
    words = "image processing beside a busy program, against quiet"
    large = "image processing of 12 megapixels beside a busy program, against quiet"
    ours = {"bit-exact": PIL_BYTES, "torch": TORCH_BYTES}
    peers = {"PIL": LLAVA_PIL, "torchvision": LLAVA_TORCHVISION}
    one_thread = value("busy", FACTOR, ONE_THREAD)
    return [
        *(Target(f"{words}, {name} backend", 1.6, False, value("busy", FACTOR, who)) for name, who in ours.items()),
        Target(f"{words}, bit-exact backend, 1 thread", 1.5, False, one_thread),
        *(
            Target(f"{words}, LLaVA-NeXT's {name} processor", None, False, value("busy", FACTOR, who))
            for name, who in peers.items()
        ),
        Target(f"{large}, torch backend", 1.6, False, _large_busy(TORCH_BYTES)),
        Target(f"{large}, LLaVA-NeXT's torchvision processor", None, False, _large_busy(LLAVA_TORCHVISION)),
    ]


def _large_busy(who: str) -> Measure:
    return value("busy", LARGE_FACTOR, who)


def _model_targets(dtype: str) -> list[Target]:
    name = generation_name(dtype, [1], EAGER)
    prefill = overhead_name(dtype)
    is_headline = dtype == "float32"  # some processors emulate bfloat16
    targets = [
        Target(
            f"time to first token, one image of 5 views, LLaVA-NeXT takes, {dtype}",
            3.0,
            True,
            ratio("generation", f"{name}, first token", LLAVA, OURS),
            headline=(f"time to first token, one image in 5 views, {dtype}", "LLaVA-NeXT") if is_headline else None,
        ),
        Target(
            f"prefill against the sum of its bare parts, {dtype}", 1.05, False, ratio("overhead", prefill, OURS, PARTS)
        ),
        Target(
            f"time per token against the bare language model with the same cache, {dtype}",
            1.05,
            False,
            ratio("generation", f"{name}, each further token", OURS, SAME_CACHE),
        ),
        Target(
            f"time per token against the bare language model with transformers' cache, {dtype}",
            None,
            False,
            ratio("generation", f"{name}, each further token", OURS, BARE),
        ),
        Target(
            f"time per token, LLaVA-NeXT takes, {dtype}",
            1.0,
            True,
            ratio("generation", f"{name}, each further token", LLAVA, OURS),
        ),
    ]
    if dtype == "bfloat16":
        limit = ratio("overhead", prefill, OURS, ARITHMETIC)
        targets.append(Target(f"prefill against its matrix products alone, {dtype}", 2.0, False, limit))
    return targets


def _peer_targets(dtype: str) -> list[Target]:
    targets = []
    for what, over, below, limit in (
        ("each with its own views", IDEFICS_OWN, OURS, 1.5),
        ("equal views, half our latents", IDEFICS, HALF, 1.0),
        ("equal views, all our latents", IDEFICS, OURS, None),
    ):
        for count in COUNTS:
            target = Target(
                f"prefill, {count} image{'s' * (count > 1)}, {what}, Idefics3 takes",
                limit,
                True,
                ratio("peers", name_of_peers(count, dtype), over, below),
            )
            headline = _PEER_HEADLINES.get((what, count))
            targets.append(dataclasses.replace(target, headline=headline))
    grows = "equal views, all our latents: what Idefics3 takes at eight images, over that at one"
    at_one, at_eight = (ratio("peers", name_of_peers(count, dtype), IDEFICS, OURS) for count in (1, 8))
    return [*targets, Target(grows, 1.0, True, ratio_of_medians(at_eight, at_one))]


_PEER_HEADLINES = {
    ("each with its own views", 1): ("prefill of a 1920x1080 image, each with its own views", "Idefics3"),
    ("equal views, all our latents", 1): ("prefill of an image in 5 views, 640 tokens", "Idefics3 with 405 tokens"),
}


def _batch_targets(dtype: str, device: str) -> list[Target]:
    name = f"16 mixed prompts, {dtype}"
    alone = value("batching", name, ONE_BY_ONE)
    questions = f"3 images, {dtype}"
    training = f"mixed lengths, {dtype}"
    return [
        Target(
            "16 mixed prompts in a batch, tokens/s against one by one",
            None if device == "cpu" else 4.0,  # out of reach where one prompt keeps the machine busy
            True,
            ratio("batching", name, ONE_BATCH, ONE_BY_ONE),
        ),
        Target(
            "the same batch, share of the bound",
            0.9 if device == "cpu" else None,
            True,
            value("batching", name_of_share(16, dtype), ONE_BATCH),
            "",
        ),
        Target("the same with a static cache", None, True, ratio_of_medians(_other_way(dtype, STATIC_BATCH), alone)),
        Target(
            "the same in batches of like length", None, True, ratio_of_medians(_other_way(dtype, BY_LENGTH), alone)
        ),
        Target(
            "vision tower runs of a second question, features reused", 0.0, False, _tower_runs(questions, FEATURES), ""
        ),
        Target(
            "vision tower runs of a second question, cache continued", 0.0, False, _tower_runs(questions, CACHE), ""
        ),
        Target(
            "training steps of the small model fed by two workers, samples/s with bytes against float32",
            1.1,
            True,
            ratio("loader", FEEDING, BYTES, FLOATS),
        ),
        Target(
            "start of a process to the first token, small model, LLaVA-NeXT takes",
            1.0,
            True,
            _cold_start("all"),
        ),
        *(
            Target(f"of that, {PHASES[phase].strip(', ')}", None, True, _cold_start(phase))
            for phase in PHASES
            if phase != "all"
        ),
        Target(
            "prefill of 4,096 text tokens, sliding window against none",
            0.95,
            False,
            ratio("switches", NO_WINDOW, ON, OFF),
        ),
        Target(
            "training step, packed, tokens/s against padded",
            1.5,
            True,
            ratio("training", training, PACKED, PADDED),
            headline=("training step, packed, tokens a second", "the same samples padded"),
        ),
    ]


def _other_way(dtype: str, who: str) -> Measure:
    return value("batching", name_of_others(16, dtype), who)


def _memory_targets(dtype: str) -> list[Target]:
    prefill, elements = f"prefill, 1 image, {dtype}", f"elements of a prefill, 1 image, {dtype}"

    def made(facts: Mapping[str, Any]) -> float:
        return float(facts["made"]["logits of every token"] + facts["made"]["scores of a resampler layer"])

    def per_token(facts: Mapping[str, Any]) -> float:
        return facts["kib_per_image_token"][OURS] / facts["kib_per_image_token"][LLAVA]

    return [
        Target(
            "peak memory of from_pretrained, times the weights",
            1.1,
            False,
            value("memory", f"from_pretrained, {LOADED_DTYPE}, with files", OURS),
        ),
        Target(
            "full-length logits and resampler scores made in a prefill", 0.0, False, fact("memory", elements, made), ""
        ),
        Target("prefill memory an image token, against LLaVA-NeXT's", 1.0, False, fact("memory", prefill, per_token)),
        Target("prefill memory an image, against LLaVA-NeXT's", None, False, ratio("memory", prefill, OURS, LLAVA)),
    ]


def _reported(dtypes: Sequence[str]) -> list[Target]:
    targets = [
        Target("image tokens of a 1920x1080 image", None, False, value("tokens", "1920x1080", OURS), ""),
        Target("image tokens of the same, LLaVA-NeXT", None, False, value("tokens", "1920x1080", LLAVA), ""),
    ]
    for dtype in dtypes:
        token = f"{generation_name(dtype, [1], EAGER)}, each further token"
        share = fact("overhead", overhead_name(dtype), lambda facts: facts["share_of_matrix_product_rate"])
        targets.append(Target(f"prefill, share of the rate of a large matrix product, {dtype}", None, True, share, ""))
        targets.append(
            Target(
                f"time per token against copying as many bytes, {dtype}",
                None,
                False,
                ratio("generation", token, OURS, "memory copy"),
            )
        )
    return targets


def _tower_runs(name: str, candidate: str) -> Measure:
    return fact("questions", name, lambda facts: float(facts["tower_runs"][candidate]))


def _cold_start(phase: str) -> Measure:
    return ratio("cold-start", f"{COLD_START}{PHASES[phase]}", LLAVA, OURS)
