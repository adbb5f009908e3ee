# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a model's forward, recorded by shape, and run bare: what the arithmetic alone costs.

Attention counts as its two products, over half the keys where it is causal. Convolutions count as the product they
unfold to. Everything else a model does (norms, activations, softmax, copies, Python) is overhead by this measure.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Product = tuple[int, int, int, int]  # (batch, M, K, N): batch times (M, K) @ (K, N)


class RecordProducts(TorchDispatchMode):
    """Records the matrix products, and the largest tensor made, of what runs inside it.

    Attributes:
        products: how often each shape was computed.
        elements: sizes of the tensors that operations gave, in elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.elements: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and note its shapes."""
        outputs = func(*args, **(kwargs or {}))
        for product in _products_of(func.overloadpacket.__name__, args, kwargs or {}, outputs):
            self.products[product] += 1
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.elements.add(output.numel())
        return outputs


def record_products(work: Callable[[], Any]) -> RecordProducts:
    """Run something once and record its products."""
    with torch.inference_mode(), RecordProducts() as record:
        work()
    return record


def count_flops(products: Counter[Product]) -> int:
    """Multiplications and additions of recorded products.

    >>> count_flops(Counter({(2, 3, 4, 5): 10}))
    2400
    """
    return sum(count * 2 * batch * m * k * n for (batch, m, k, n), count in products.items())


def bare_products(products: Counter[Product], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Give a callable that runs every recorded product once each time it was recorded, on preallocated matrices.

    A single product goes through `F.linear`, as layers do, so that both use the same kernel.
    """
    operands = []
    for (batch, m, k, n), count in products.items():
        if batch == 1:
            operands.append((torch.randn(m, k), torch.randn(n, k), count))
        else:
            operands.append((torch.randn(batch, m, k), torch.randn(batch, k, n), count))
    moved = [(left.to(device, dtype), right.to(device, dtype), count) for left, right, count in operands]

    @torch.inference_mode()
    def run() -> None:
        for left, right, count in moved:
            multiply = torch.nn.functional.linear if left.ndim == 2 else torch.bmm
            for _ in range(count):
                multiply(left, right)

    return run


def _products_of(name: str, args: tuple, kwargs: dict, outputs: Any) -> list[Product]:
    if name == "mm":
        return [(1, *args[0].shape, args[1].shape[1])]
    if name == "addmm":
        return [(1, *args[1].shape, args[2].shape[1])]
    if name in ("bmm", "baddbmm"):
        left, right = args[-2:] if name == "baddbmm" else args[:2]
        return [(*left.shape, right.shape[2])]
    if name in ("linear", "_mkldnn_linear"):
        weight = args[1]
        return [(1, args[0].numel() // weight.shape[1], weight.shape[1], weight.shape[0])]
    if name.startswith("_scaled_dot_product") or name == "scaled_dot_product_attention":
        return _attention_products(name, args, kwargs)
    if "convolution" in name:
        weight = args[1]
        return [(1, outputs.numel() // weight.shape[0], weight[0].numel(), weight.shape[0])]
    return []


def _attention_products(name: str, args: tuple, kwargs: dict) -> list[Product]:
    query, key, value = args[:3]
    batch = query.shape[0] * query.shape[1]
    (tokens, width), keys = query.shape[-2:], key.shape[-2]
    is_causal = kwargs.get("is_causal", False) or any(arg is True for arg in args[3:])
    keys = (keys + 1) // 2 if is_causal and tokens > 1 else keys
    return [(batch, tokens, width, keys), (batch, tokens, keys, value.shape[-1])]
