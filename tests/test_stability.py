"""No bad step reaches the weights, all ranks agree, and training never stands still."""

import math
import os
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import tiny
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

import genfw
from genfw.train.errors import GenfwError
from genfw.train.stability import Outliers, Stability, decide


class Broken(genfw.Objective):
    """The bound, times what `factors` says at its steps (nan, inf, 1000, ...)."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.step = factors, 0

    def advance(self, step):
        self.step = step

    def forward(self, model, x, y=None, *, noise=None):
        return -model.elbo(x, y, noise=noise).total * self.factors.get(self.step, 1.0)


class Weights(L.Callback):
    """The weights after every optimizer step, the initial ones first."""

    def on_fit_start(self, trainer, pl_module):
        self.seen = [[p.detach().clone() for p in pl_module.model.parameters()]]

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == len(self.seen):
            self.seen.append([p.detach().clone() for p in pl_module.model.parameters()])

    def moved(self):
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in pairs]


def adam(factors):
    """Momentum and weight decay: with gradients of zero the weights would still move."""
    module = tiny.module(Broken(factors))
    module.optimizer = lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)
    return module


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stops_before_the_weights_change(tmp_path, value):
    module, weights, stability = adam({3: value}), Weights(), Stability()
    keep = ModelCheckpoint(dirpath=str(tmp_path), every_n_train_steps=1, save_last=True)
    trainer = tiny.trainer(
        tmp_path, 6, callbacks=[stability, weights, keep], enable_checkpointing=True
    )
    with pytest.raises(
        GenfwError, match=r"^step 3: the loss is .* images 12, 13, 14, 15 \(gradient norms"
    ) as error:
        trainer.fit(module, tiny.Images())
    norms = ", ".join(f"{norm:.3g}" for norm in stability.outliers.norms)
    assert f"before it: {norms})" in str(error.value) and len(stability.outliers.norms) == 3
    assert error.value.exit_code == 1
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    named = zip(module.model.named_parameters(), weights.seen[3], strict=True)
    for (name, found), before in named:
        assert found.isfinite().all()
        assert (found == before).all()
        assert (last["state_dict"][f"model.{name}"] == before).all()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Edge(genfw.Objective):
        def forward(self, model, x, y=None, *, noise=None):
            weight = next(model.parameters()).flatten()[0]
            return -model.elbo(x, y, noise=noise).total + (weight - weight).abs().sqrt()

    with pytest.raises(GenfwError, match=r"^step 0: the gradient norm is nan for training images"):
        tiny.trainer(tmp_path, 2, callbacks=[Stability()]).fit(tiny.module(Edge()), tiny.Images())


@pytest.mark.parametrize("scaler", [None, Mock()], ids=["none", "scaler"])
def test_infinite_gradients_are_left_to_a_loss_scaler(scaler):
    """Where there is one, and the loss is finite: it lowers its scale, and skips them itself."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    trainer = Mock(spec=L.Trainer, global_step=0, log_every_n_steps=1)
    trainer.precision_plugin = Mock(spec=MixedPrecision, scaler=scaler)
    module = Mock(spec=L.LightningModule)

    def step(loss, gradient):
        stability, weight.grad = Stability(), torch.tensor([1.0, gradient])
        stability.on_train_batch_start(trainer, module, Mock(index=torch.arange(3)), 0)
        stability.on_before_backward(trainer, module, torch.tensor(loss))
        stability.on_before_optimizer_step(trainer, module, optimizer)
        return stability

    assert step(1.0, 2.0).skipped == 0 and weight.grad is not None
    if scaler is None:
        with pytest.raises(GenfwError, match="step 0: the gradient norm is inf"):
            step(1.0, math.inf)
    else:
        assert step(1.0, math.inf).skipped == 0
        assert torch.equal(weight.grad, torch.tensor([1.0, math.inf]))
    with pytest.raises(GenfwError, match="step 0: the loss is nan"):
        step(math.nan, 2.0)


def test_names_the_images_of_every_micro_batch(tmp_path):
    trainer = tiny.trainer(tmp_path, 2, callbacks=[Stability()], accumulate_grad_batches=2)
    with pytest.raises(GenfwError, match=r"^step 1: .* images 8, 9, 10, 11, 12, 13, 14, 15 \("):
        trainer.fit(tiny.module(Broken({1: math.nan})), tiny.Images())


def test_skipped_step_leaves_the_weights_and_is_counted(tmp_path):
    module, weights, stability = adam({2: math.nan, 4: math.inf}), Weights(), Stability("skip")
    trainer = tiny.trainer(tmp_path, 6, callbacks=[stability, weights], gradient_clip_val=1.0)
    trainer.fit(module, tiny.Images())
    assert weights.moved() == [True, True, False, True, False, True]
    assert trainer.global_step == 6
    assert float(trainer.callback_metrics["train/skip_rate"]) == pytest.approx(2 / 6)
    state = trainer.optimizers[0].state.values()
    assert {int(each["step"]) for each in state} == {4}  # the optimizer saw four


def test_skips_not_finite_steps_only_so_often(tmp_path):
    stability = Stability("skip", max_consecutive=2)
    module = adam({1: math.nan, 3: math.nan, 4: math.nan, 5: math.nan})
    with pytest.raises(GenfwError, match=r"^2 steps in a row, step 4:"):
        tiny.trainer(tmp_path, 8, callbacks=[stability]).fit(module, tiny.Images())
    assert stability.skipped == 2  # steps 1 and 3; the second in a row ends it


def test_long_gradient_is_skipped_and_its_norm_is_that_before_clipping(tmp_path):
    weights = Weights()
    stability = Stability(factor=50.0, quantile=0.5, window=3)
    trainer = tiny.trainer(tmp_path, 6, callbacks=[stability, weights], gradient_clip_val=1e-3)
    module = tiny.module(Broken({4: 1e4}), lr=1.0)
    trainer.fit(module, tiny.Images())
    assert weights.moved() == [True, True, True, True, False, True]
    norms = list(stability.outliers.norms)
    assert norms[-1] == pytest.approx(float(trainer.callback_metrics["train/grad_norm"]))
    assert min(norms) > 1e-2
    step = [b - a for a, b in zip(weights.seen[-2], weights.seen[-1], strict=True)]
    assert math.hypot(*(float(d.norm()) for d in step)) == pytest.approx(1e-3, rel=1e-2)  # clipped


@pytest.mark.parametrize("growth", [3.0, 1e3])
def test_growing_gradients_never_stop_training(growth):
    """Whatever the norms: five skipped, one taken, and three that fill the new window of four."""
    outlier = Outliers(factor=2.0, quantile=0.5, window=4, max_consecutive=5)
    skipped = [outlier(growth**n) for n in range(94)]
    assert skipped == [False] * 4 + ([True] * 5 + [False] * 4) * 10


def test_end_of_a_plateau_costs_few_steps():
    """Gradients that have become longer for good are no outliers, however long the window."""
    outlier = Outliers(factor=10.0, quantile=0.9, window=200, max_consecutive=5)
    skipped = [outlier(norm) for norm in [1.0] * 300 + [20.0] * 300]
    assert skipped == [False] * 300 + [True] * 5 + [False] * 295


def test_state_survives_a_checkpoint(tmp_path):
    data = tiny.Images(train=8)
    first = Stability("skip", window=4)
    trainer = tiny.trainer(tmp_path, 3, callbacks=[first])
    trainer.fit(tiny.module(Broken({1: math.nan, 2: math.nan})), data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    held = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["Stability"]
    assert held == first.state_dict()
    second = Stability("skip", window=4)
    tiny.trainer(tmp_path, 4, callbacks=[second]).fit(
        tiny.module(), data, ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert (second.steps, second.skipped, second.nonfinite) == (4, 2, 0)
    assert list(second.outliers.norms)[:1] == list(first.outliers.norms)
    assert len(second.outliers.norms) == 2
    restored = Stability("skip", window=4)
    restored.load_state_dict(held)
    assert restored.state_dict() == held
    assert restored.nonfinite == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.0},
        {"quantile": 1.1},
        {"window": 0},
        {"max_consecutive": -1},
    ],
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Stability(**wrong)


def _rank(rank, port, answers):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    norms = [torch.tensor([1.0, 2.0][rank]), torch.tensor([math.nan, 3.0][rank])]
    answers.put((rank, [decide(~norm.isfinite(), norm) for norm in norms]))
    torch.distributed.destroy_process_group()


def test_two_ranks_decide_together():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    mp.start_processes(_rank, (port, answers), nprocs=2, start_method="spawn")
    found = dict(answers.get() for _ in range(2))
    assert found[0] == found[1] == [(False, 2.0), (True, 3.0)]


def test_the_quantile_is_no_maximum():
    """A minority of large norms in the window does not say what is usual."""
    outlier = Outliers(factor=2.0, quantile=0.5, window=10, max_consecutive=9)
    assert not any(outlier(norm) for norm in (1.0, 9.0, 1.0, 1.0, 8.0, 1.0, 1.0, 9.0, 1.0, 1.0))
    assert outlier(3.0) and not outlier(1.9)


def test_what_was_skipped_is_not_usual():
    """Or a few long gradients would make the next ones pass."""
    outlier = Outliers(factor=2.0, quantile=0.5, window=4, max_consecutive=9)
    assert [outlier(norm) for norm in [1.0] * 4 + [5.0] * 9] == [False] * 4 + [True] * 9
    assert list(outlier.norms) == [1.0] * 4
