# SPDX-License-Identifier: Apache-2.0
"""A tagger of a few weights as an ONNX file, written field by field: the package onnx is not needed to run one.

The numbers of the fields are those of onnx.proto (github.com/onnx/onnx, version 1 of the format).
"""

from pathlib import Path

import numpy as np

_FLOAT = 1


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes | str) -> bytes:
    """A text, or a message in a message."""
    value = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _node(kind: str, inputs: list[str], output: str) -> bytes:
    return b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, kind)


def _weights(name: str, values: np.ndarray) -> bytes:
    sizes = b"".join(_number(1, size) for size in values.shape)
    return sizes + _number(2, _FLOAT) + _text(8, name) + _text(9, values.astype("<f4").tobytes())


def _value(name: str, shape: list[int | str]) -> bytes:
    sizes = b"".join(_text(1, _number(1, size) if isinstance(size, int) else _text(2, size)) for size in shape)
    return _text(1, name) + _text(2, _text(1, _number(1, _FLOAT) + _text(2, sizes)))


def write_tagger(
    path: Path, weights: np.ndarray, shape: list[int | str], last: str = "Identity", bias: float = 0.0
) -> Path:
    """Write a model that scores tags by the mean colour of an image.

    Args:
        path: of the file.
        weights: (3, tags).
        shape: of the input: images, 3, height, width; a text where it is left open.
        last: `Identity` gives logits, `Sigmoid` probabilities.
        bias: of each logit.
    """
    steps = [
        ("GlobalAveragePool", ["image"], "mean"),
        ("Flatten", ["mean"], "flat"),
        ("Gemm", ["flat", "weights", "bias"], "logits"),
        (last, ["logits"], "scores"),
    ]
    graph = b"".join(_text(1, _node(*step)) for step in steps) + _text(2, "tagger")
    for name, values in (("weights", weights), ("bias", np.full(weights.shape[1], bias))):
        graph += _text(5, _weights(name, values))
    graph += _text(11, _value("image", shape)) + _text(12, _value("scores", [shape[0], weights.shape[1]]))
    path.write_bytes(_number(1, 8) + _text(8, _text(1, "") + _number(2, 13)) + _text(7, graph))
    return path
