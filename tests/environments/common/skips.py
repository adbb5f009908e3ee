# SPDX-License-Identifier: Apache-2.0
"""The one table of transformers' common tests that BLIP-3 does not pass, and why.

Listed tests still run and must fail: one that passes, skips itself or does not exist is an error of the run, so the
table cannot outlive its reasons.
"""

from typing import NamedTuple


class Skip(NamedTuple):
    """One test out of bounds.

    Attributes:
        test: class and method, `*` allowed for the variants of a parameterised method.
        lines: major versions of transformers it applies to.
        reason: why the test does not fit the model.
    """

    test: str
    lines: tuple[int, ...]
    reason: str


PRUNING = "prunes attention heads, which SigLIP, Phi-3 and Mistral do not support and transformers 5 has dropped"

SKIPS: tuple[Skip, ...] = (
    Skip("Blip3*ModelTest::test_head_pruning*", (4,), PRUNING),
    Skip("Blip3*ModelTest::test_headmasking", (4,), "passes a mask per attention head, which no part takes"),
    Skip(
        "Blip3ImageProcessingTest::test_call_numpy_4_channels",
        (5,),
        "normalises four channels with do_convert_rgb=False; the vision tower reads three: every image becomes RGB",
    ),
    Skip(
        "Blip3ImageProcessingTest::test_new_models_require_torchvision_backend",
        (5,),
        "policy for new models of transformers' own tree; torchvision resizes unlike PIL, with which the weights were "
        "trained, and is no dependency here",
    ),
)
