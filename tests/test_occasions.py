"""Callbacks act when they say, in a run that was interrupted too, and cost nobody the run."""

from functools import partial
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from genfw.train.bits import BitAccounting
from genfw.train.callbacks import Frechet, Pictures
from genfw.train.diagnostics import Diagnostics
from genfw.train.errors import Stopped
from genfw.train.occasions import Every, fitting, over_ranks, skipped


def trainer(fn=TrainerFn.FITTING, sanity=False):
    return Mock(spec=L.Trainer, state=Mock(fn=fn), sanity_checking=sanity)


def test_each_third_validation_of_training_also_after_a_break():
    """What is validated before the first step, or in no training run, does not count."""
    first, second = Every(3), Every(3)
    idle = trainer(sanity=True), trainer(TrainerFn.VALIDATING), trainer(TrainerFn.TESTING)
    assert not any(first.due(each) or fitting(each) for each in idle)
    said = [first.due(trainer()) for _ in range(4)]
    second.load_state_dict(first.state_dict())
    said += [second.due(trainer()) for _ in range(5)]
    assert [i for i, due in enumerate(said, 1) if due] == [3, 6, 9]
    never = Every(0)
    assert not any(never.due(trainer()) for _ in range(4)) and never.validations == 4


def test_checkpoints_of_older_runs_are_read():
    """What callbacks keep has the names it always had."""
    old = {"validations": 7}
    for callback, kept in (
        (Pictures(2), old),
        (Frechet("auto", (1, 2, 2), 3), old),
        (BitAccounting(2), old | {"edges": [-1.0, 0.0, 2.0]}),
        (Diagnostics(2), old | {"alarmed": [1]}),
    ):
        callback.load_state_dict(kept)
        assert callback.state_dict() == kept
        assert callback.state_key == type(callback).__qualname__


def test_what_fails_is_said_and_skipped_but_not_a_signal(capsys):
    with skipped("pictures"):
        raise ValueError("no ink\nat all")
    assert capsys.readouterr().out == "pictures skipped: ValueError: no ink\n"
    with pytest.raises(Stopped), skipped("pictures"):
        raise Stopped("interrupted")


def test_ranks_agree_and_keep_their_own(lockstep):
    mine = [torch.tensor([1.0, 5.0]), torch.tensor([4.0, 2.0])]
    assert over_ranks(mine)[0].tolist() == [1, 5], "a rank alone"
    for op, expected in ((dist.ReduceOp.SUM, [5, 7]), (dist.ReduceOp.MAX, [4, 5])):
        both = lockstep(*(partial(over_ranks, [each, each], op) for each in mine))
        assert [[t.tolist() for t in rank] for rank in both] == [[expected] * 2] * 2
    assert mine[0].tolist() == [1, 5]


@pytest.mark.parametrize("callback", [Pictures, Diagnostics, Every, BitAccounting])
def test_every_is_a_count(callback):
    with pytest.raises(ValueError, match="every: expected an integer of at least 0, got -1"):
        Every(-1) if callback is Every else callback(3, every=-1)
