"""When a callback acts, and what its ranks and its failures are to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from genfw.check import at_least
from genfw.train.errors import Stopped, one_line


def fitting(trainer: L.Trainer) -> bool:
    """Whether this validation is one of a training run."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


class Every:
    """Each n-th validation of a training run, however often the run was taken up; 0: none.

    Attributes:
        validations: how many there were.

    Raises:
        ValueError: n below 0.
    """

    def __init__(self, n: int):
        self.n = at_least(0, "every", n)
        self.validations = 0

    def due(self, trainer: L.Trainer) -> bool:
        """Counts this validation, if it is one of a training run, and says whether its turn has
        come."""
        if not fitting(trainer):
            return False
        self.validations += 1
        return self.n > 0 and self.validations % self.n == 0

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


@contextmanager
def skipped(what: str) -> Iterator[None]:
    """Whatever goes wrong within is said in a line, and the run goes on without it.

    Raises:
        Stopped: a signal came, on any rank.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        print(f"{what} skipped: {one_line(error)}", flush=True)


def over_ranks(tensors: Sequence[Tensor], op: Any = dist.ReduceOp.SUM) -> list[Tensor]:
    """Sums (or what else `op` says) of all ranks, which must bring as many of the same shapes."""
    tensors = [each.clone() for each in tensors]
    if dist.is_available() and dist.is_initialized():
        for each in tensors:
            dist.all_reduce(each, op=op)
    return tensors
