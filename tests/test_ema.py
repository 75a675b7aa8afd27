"""The averaged weights are the average, are what is reported, and never replace the raw ones."""

import copy

import lightning.pytorch as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from genfw.train.ema import EMA


class Weights(L.Callback):
    """The raw weights after every optimizer step."""

    def __init__(self):
        self.seen: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.seen):
            self.seen.append([p.detach().clone() for p in pl_module.model.parameters()])


def averaged(start, steps, decay):
    """The definition, in float64."""
    mean = [p.double() for p in start]
    for n, weights in enumerate(steps, start=1):
        d = min(decay, (1 + n) / (10 + n))
        mean = [d * m + (1 - d) * w.double() for m, w in zip(mean, weights, strict=True)]
    return mean


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_is_the_hand_computed_one(tmp_path, decay, accumulate):
    module, weights, ema = tiny.module(), Weights(), EMA(decay)
    start = [p.detach().clone() for p in module.model.parameters()]
    trainer = tiny.trainer(
        tmp_path, 6, callbacks=[weights, ema], accumulate_grad_batches=accumulate
    )
    trainer.fit(module, tiny.Images())

    assert ema.updates == trainer.global_step == len(weights.seen) == 6
    expected = averaged(start, weights.seen, decay)
    for mean, found in zip(expected, module.average.parameters(), strict=True):
        torch.testing.assert_close(found, mean.float(), rtol=1e-5, atol=1e-7)
        assert not found.requires_grad


def test_optimizer_does_not_see_the_average(tmp_path):
    module = tiny.module()
    trainer = tiny.trainer(tmp_path, 1, callbacks=[EMA()])
    trainer.fit(module, tiny.Images())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.model.parameters()}


def test_reported_weights_are_the_average_everywhere(tmp_path):
    """The number logged when a file was written = tested by its trainer = tested by a stranger."""
    data = tiny.Images(val=7)
    data.images["test"] = data.images["val"]
    keep = ModelCheckpoint(dirpath=str(tmp_path), monitor="val/nll", filename="best")
    module = tiny.module(lr=0.01)
    trainer = tiny.trainer(
        tmp_path, 8, callbacks=[EMA(0.9), keep], val_check_interval=2, enable_checkpointing=True
    )
    trainer.fit(module, data)
    raw_before = copy.deepcopy(module.model.state_dict())
    logged = float(keep.best_model_score)

    def as_val(module):  # the test's random numbers are other ones: give it validation's
        report = module._evaluate
        module._evaluate = lambda batch, estimator, split: report(batch, estimator, "val")
        return module

    best = keep.best_model_path
    same = trainer.test(as_val(module), data, ckpt_path=best, weights_only=True, verbose=False)
    stranger = as_val(tiny.module(lr=0.01))
    assert stranger.average is None
    fresh = tiny.trainer(tmp_path).test(
        stranger, data, ckpt_path=best, weights_only=True, verbose=False
    )
    assert same[0]["test/nll"] == fresh[0]["test/nll"] == pytest.approx(logged, rel=1e-6)

    stranger.average = None  # the raw weights of the same file give another number
    raw = tiny.trainer(tmp_path).test(stranger, data, verbose=False)
    assert abs(raw[0]["test/nll"] - logged) > 1e-4
    assert raw_before.keys() == module.model.state_dict().keys()


def test_interrupted_validation_leaves_raw_weights_raw(tmp_path):
    class Interrupt(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            raise RuntimeError("interrupted")

    module, weights = tiny.module(), Weights()
    trainer = tiny.trainer(
        tmp_path, 4, callbacks=[EMA(0.9), weights, Interrupt()], val_check_interval=3
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(module, tiny.Images())
    for found, raw in zip(module.model.parameters(), weights.seen[-1], strict=True):
        assert (found == raw).all()


def test_resumed_average_goes_on(tmp_path):
    """4 steps = 2 steps + a new trainer + 2 steps, raw weights and average, bit for bit."""
    whole = tiny.module()
    data = tiny.Images(train=8)  # two steps per epoch: the position in the data is not tested here
    tiny.trainer(tmp_path, 4, callbacks=[EMA(0.9)]).fit(whole, data)

    first = tiny.trainer(tmp_path, 2, callbacks=[EMA(0.9)])
    first.fit(tiny.module(), data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, ema = tiny.module(), EMA(0.9)
    tiny.trainer(tmp_path, 4, callbacks=[ema]).fit(
        resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert ema.updates == 4
    for name, value in whole.state_dict().items():
        assert (resumed.state_dict()[name] == value).all(), name


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        EMA(decay)
