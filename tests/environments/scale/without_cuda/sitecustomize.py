# SPDX-License-Identifier: Apache-2.0
"""Let torchvision's build for CUDA be imported beside torch's build for CPUs, as far as timm needs it.

The library of its operators cannot be loaded then, and the import fails where it registers what they do. So they are
declared beforehand. Calling one of them fails, as it should. Python imports this file by itself where its folder is on
PYTHONPATH.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = ("nms", "qnms")


class Declare(importlib.abc.MetaPathFinder):
    """Declare the operators when torchvision is first looked for; finds nothing itself."""

    library: Any = None

    def find_spec(self, fullname: str, *_: Any) -> None:
        """Called before each import that is not done yet."""
        if fullname == "torchvision" and self.library is None:
            import torch

            Declare.library = torch.library.Library("torchvision", "DEF")
            for name in OPERATORS:
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declare())
