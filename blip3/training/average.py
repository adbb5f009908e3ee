# SPDX-License-Identifier: Apache-2.0
r"""Average the weights of models that were trained from one another.

    python -m blip3.training.average outputs/small/13_average outputs/small/11_sft_multi_image/final \
        outputs/small/12_sft_multi_image/final

A fine-tuned model and the one it began with lie in one basin of the loss: their mean often keeps what the second
forgets and has most of what it learned ("Robust fine-tuning of zero-shot models", arXiv:2109.01903).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoints import folder_of, load_model, locate
from ..files import only_writer_in
from .recipe import plain_errors
from .resume import SAVED_RECIPE
from .trainer import copy_present, copy_processor


def main() -> None:
    """Read the command line and write the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("sources", type=Path, nargs="+", help="trained folders, such as outputs/run/final")
    args = parser.parse_args()
    with plain_errors(), only_writer_in(args.output):
        average(args.sources, args.output)


@torch.no_grad()
def average(sources: Sequence[Path], output: Path) -> None:
    """Write the mean of models as a complete folder: weights in float32, and code, processor and recipe of the last.

    Args:
        sources: two or more models of the same sizes, as `checkpoints.locate` takes them.
        output: made if need be.

    Raises:
        ValueError: for fewer than two, or for models that do not have the same tensors.
    """
    if len(sources) < 2:
        raise ValueError(
            f"{len(sources)} model was given but a mean needs two or more. The output was probably left out: name it "
            "first."
        )
    total: dict[str, torch.Tensor] = {}
    located = [locate(source) for source in sources]
    for source, arguments in zip(sources, located, strict=True):
        model = load_model(arguments, dtype=torch.float32)
        weights = model.state_dict()
        total = total or {name: torch.zeros_like(weight) for name, weight in weights.items()}
        differing = _shapes(weights) ^ _shapes(total)
        if differing:
            name, shape = min(differing)
            raise ValueError(
                f"{source} and {sources[0]} do not have the same tensors: only one of the two has {name} of shape "
                f"{shape}. They are probably models of different sizes: average models trained from one another."
            )
        for name, weight in weights.items():
            total[name] += weight
    model.load_state_dict({name: weight / len(sources) for name, weight in total.items()})
    model.save_pretrained(output)
    copy_processor(sources[-1], output)
    copy_present(folder_of(sources[-1]), output, [SAVED_RECIPE])


def _shapes(weights: dict[str, torch.Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(weight.shape)) for name, weight in weights.items()}


if __name__ == "__main__":
    main()
