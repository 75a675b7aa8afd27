"""Networks that torch compiles while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import list_mode_options

from genfw.diffusion.denoiser import NetworkDenoiser
from genfw.model import LatentModel
from genfw.nets.blocks import PlainBlock
from genfw.nets.ladder import Head
from genfw.nets.network import Network
from genfw.train.errors import GenfwError
from genfw.train.module import LatentModule


class Compile(L.Callback):
    """In training the networks of the model run as torch compiles them: fewer, longer kernels. The
    first steps take a minute or more.

    What is reported is still said by the networks as they are written (see
    `LatentModule.evaluating`), and checkpoints do not know of it: runs with and without it are
    evaluated, resumed and exported alike.

    Args:
        mode: torch.compile's: null, `reduce-overhead` (CUDA graphs, for networks that wait for
            Python), `max-autotune`. Batches of a second size are compiled once more, for any size.

    Raises:
        ValueError: a mode that there is not.
        GenfwError: in training, a module that is no LatentModule, or a model none of whose parts is
            a network that is called as a whole.
    """

    def __init__(self, mode: str | None = None):
        modes = list_mode_options()
        if mode is not None and mode not in modes:
            raise ValueError(f"mode: expected null or one of {', '.join(modes)}, got {mode!r}")
        self.options: dict[str, Any] = {"mode": mode}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, LatentModule):
            raise GenfwError(
                "Compile: expected a LatentModule, whose numbers are said by networks as written, "
                f"got a {type(pl_module).__name__}: remove the callback"
            )
        model = pl_module.model
        found = list(networks(model))
        if not found:
            raise GenfwError(
                f"Compile: expected a model of networks, got {type(model).__name__}, none of whose "
                "parts is one: remove the callback, or derive them from genfw.nets.network.Network"
            )
        functorch.donated_buffer = False  # objective=dreg goes back through a graph twice
        for network in found:
            network.compile(**self.options)


def networks(model: LatentModel) -> Iterator[nn.Module]:
    """The parts of a model that map numbers to numbers, each called as a whole: networks, and of a
    ladder, which draws on its way, the blocks."""
    inside: set[nn.Module] = set()
    for each in model.modules():
        if each in inside:
            continue
        if isinstance(each, NetworkDenoiser):
            found = each.network
        elif isinstance(each, Network | PlainBlock | Head):
            found = each
        else:
            continue
        inside.update(found.modules())
        yield found
