# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported where its compiled operators do not fit the installed torch.

The wheel on PyPI is built for CUDA. Beside a CPU build of torch its operators are missing, and the import fails for
the two that it describes further. They find boxes; image processing needs none of them.
"""

import torch

_KEPT: list[torch.library.Library] = []  # what a library defines is gone with it


def load_torchvision() -> bool:
    """Import torchvision if it is installed; to be called before transformers, which imports it as well.

    Returns:
        Whether it can be used.
    """
    try:
        import torchvision
    except ImportError:
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401
    return True
