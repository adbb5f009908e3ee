# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise on an image, by the steps of a diffusion schedule.

    b_t = 1e-5 + (0.005 - 1e-5) * sigmoid(s_t)    s_t: 1,000 even steps from -6 to 6
    a_t = (1 - b_0) * ... * (1 - b_t)
    x_t = sqrt(a_t) * x + sqrt(1 - a_t) * n       n: normal, mean 0, deviation 1

The schedule is that of VCD (arXiv:2311.16922), which POVID (arXiv:2402.11411, step 500) and BPO (arXiv:2403.08730,
step 900) took over. POVID adds it to the image in 0..1 before it is resized, BPO to normalised pixels, -1..1 here: at
the same step the first is twice as strong. Sources: the published code of the three.
"""

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images import float_options
from ..refusals import check_choice
from .recipe import NOISE_PIXELS

NUM_STEPS = 1000


@cache
def signal_shares() -> tuple[float, ...]:
    """Give a_t of each step: the share of the image's variance that is left."""
    steps = torch.linspace(-6, 6, NUM_STEPS, dtype=torch.float64)
    betas = torch.sigmoid(steps) * (0.005 - 1e-5) + 1e-5
    return tuple(torch.cumprod(1 - betas, dim=0).tolist())


def noise_deviation(step: int) -> float:
    """Give the standard deviation of the noise, sqrt(1 - a_t).

    >>> round(noise_deviation(500), 3)
    0.505
    """
    return (1 - signal_shares()[step]) ** 0.5


def add_noise(pixels: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
    """Noise pixels of any shape; the same generator state gives the same noise."""
    noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float32).to(pixels.dtype)
    return signal_shares()[step] ** 0.5 * pixels + noise_deviation(step) * noise


class Noiser:
    """Noises the images of records; what comes out follows from the seed and the record's id alone.

    Args:
        step: of the schedule, 0 to 999.
        pixels: `normalised` or `unit`, see `NOISE_PIXELS`.
        seed: of the noise.
    """

    def __init__(self, step: int, pixels: str, seed: int):
        check_choice("The noise goes to", pixels, NOISE_PIXELS)
        self.step, self.pixels, self.seed = step, pixels, seed

    def prepare(self, processor: Any, text: str, images: list[Image.Image], record_id: str, **options: Any) -> Any:
        """Prepare a prompt with its images noised.

        Args:
            processor: of the model.
            text: with one `<image>` for each image.
            images: as they are.
            record_id: says which noise it is.
            **options: of the image processor.

        Returns:
            what the processor gives for one prompt; pixels that were noised themselves are floats.
        """
        digest = hashlib.sha256(f"{self.seed} {record_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if self.pixels == "unit":
            images = [self._noise_image(image, generator) for image in images]
        else:
            options |= float_options(processor)
        inputs = processor(text=text, images=images, return_tensors="pt", **options)
        if self.pixels == "normalised":
            inputs["pixel_values"] = add_noise(inputs["pixel_values"], self.step, generator)
        return inputs

    def _noise_image(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Noise an image in 0..1; what leaves the range is cut off there."""
        values = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
        noised = add_noise(values, self.step, generator).clamp(0, 1)
        return Image.fromarray((noised * 255).round().to(torch.uint8).numpy())
