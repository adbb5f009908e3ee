# SPDX-License-Identifier: Apache-2.0
"""GPUs one can rent: memory, and the peak of dense bfloat16 products, as their makers' data sheets give them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    memory: int
    """GB; the system reports about as many GiB."""
    peak: float
    """TFLOP/s of dense bfloat16 products, without sparsity, accumulated in float32."""
    source: str
    """Whose figures these are."""


GPUS = {
    "a100-40": Gpu(40, 312, "NVIDIA A100 data sheet, SXM"),
    "a100-80": Gpu(80, 312, "NVIDIA A100 data sheet, SXM"),
    "h100": Gpu(80, 989.5, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
    "h200": Gpu(141, 989.5, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
    "b200": Gpu(180, 2250, "NVIDIA DGX B200 data sheet, an eighth: 4,500 with sparsity"),
    "l40s": Gpu(48, 362, "NVIDIA L40S data sheet"),
    "l4": Gpu(24, 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    "rtx4090": Gpu(24, 165.2, "NVIDIA Ada architecture paper, float32 sums"),
    "mi300x": Gpu(192, 1307.4, "AMD Instinct MI300X data sheet"),
}
