"""Pixel values and labels: which are meant, looked at where that costs no wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from genfw.types import Labels


def readable(x: Tensor) -> bool:
    """Whether the values of x may be looked at: always on the CPU, and on a GPU where no gradient
    is taken, so that every reported number is of values that were looked at. A training step would
    wait for the look, and a CUDA graph that is being captured cannot have one."""
    if x.device.type == "cpu":
        return True
    if torch.is_grad_enabled() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_integers(x: Tensor, bins: int) -> None:
    """Refuses what is not integers 0..bins-1."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(
            f"images: expected integers 0..{bins - 1}, got {x.dtype}: pass the raw values, "
            "genfw normalizes them itself (likelihood.normalize)"
        )
    # int(): a uint8 tensor compared with 256 would compare with 0
    if readable(x) and x.numel() and not (int(x.min()) >= 0 and int(x.max()) < bins):
        raise ValueError(
            f"images: expected values 0..{bins - 1} (bins={bins}), got {int(x.min())}.."
            f"{int(x.max())}: set bins to the number of values of your data"
        )


def check_labels(y: Labels, classes: int) -> None:
    """Refuses labels outside 0..classes, `classes` itself standing for none. A GPU is not waited
    for: there an assertion of its own fails; nor does compiled code wait.

    Raises:
        ValueError: there are some.
    """
    known = ((y >= 0) & (y.long() <= classes)).all()
    expected = f"labels: expected 0..{classes - 1}, or {classes} for none"
    if y.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(known, expected)  # pyright: ignore[reportPrivateImportUsage]
    elif readable(y) and not known:
        raise ValueError(
            f"{expected}, got {int(y.min())}..{int(y.max())}: set classes to the number of "
            "classes of your data"
        )
