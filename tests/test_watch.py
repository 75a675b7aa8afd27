"""What a run says about itself while it trains, against a clock that is turned by hand."""

from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from genfw.train.ema import EMA
from genfw.train.stability import Stability
from genfw.train.watch import GIB, Watch, peak_rss


class Rows(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "rows", ""

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})


class Turned(Callback):
    """A step takes 3 s, its data 1 s, validation 100 s. Stands before `Watch` in the list."""

    now = 0.0

    def on_train_batch_start(self, *_):
        self.now += 1.0

    def on_before_optimizer_step(self, *_):
        self.now += 3.0

    def on_validation_end(self, *_):
        self.now += 100.0


def trained(tmp_path, steps=8, **more):
    rows, turned = Rows(), Turned()
    callbacks = [turned, Watch(clock=lambda: turned.now), Stability(), EMA(decay=0.5)]
    module = tiny.module(lr=0.05)
    trainer = tiny.trainer(
        tmp_path,
        **{"steps": steps, "logger": rows, "callbacks": callbacks, "log_every_n_steps": 2} | more,
    )
    trainer.fit(module, tiny.Images())
    return [row for row in rows.rows if "train/objective" in row]


def test_throughput_and_waiting_leave_validation_out(tmp_path):
    """4 images in 4 s, 1 of them spent waiting; an epoch of 4 steps ends with a validation."""
    rows = trained(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    assert [row["train/images_per_second"] for row in rows] == pytest.approx([1.0] * 4)
    assert [row["train/wait_share"] for row in rows] == pytest.approx([0.25] * 4)


def test_micro_batches_count_all_their_images(tmp_path):
    """A step of two micro-batches: 8 images in 2 x 1 s and 3 s."""
    rows = trained(tmp_path, steps=4, accumulate_grad_batches=2)
    assert [row["train/images_per_second"] for row in rows] == pytest.approx([8 / 5] * 2)
    assert [row["train/wait_share"] for row in rows] == pytest.approx([2 / 5] * 2)


def test_images_are_those_of_all_ranks():
    """Two ranks that take four images each in 2 s."""
    for ranks in (1, 2):
        watch = Watch(clock=Mock(side_effect=[0.0, 1.0, 2.0]))
        module = Mock(spec=L.LightningModule, device=torch.device("cpu"))
        trainer = Mock(spec=L.Trainer, world_size=ranks, global_step=0, log_every_n_steps=1)
        watch.on_train_start(trainer, module)
        watch.on_train_batch_start(trainer, module, Mock(image=torch.zeros(4, 1)), 0)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        watch.on_before_optimizer_step(trainer, module, optimizer)
        logged = dict(call.args for call in module.log.call_args_list)
        assert logged["train/images_per_second"] == 4 * ranks / 2


def test_everything_stands_in_one_row(tmp_path):
    rows = trained(tmp_path)
    for row in rows:
        assert {"train/grad_norm", "train/skip_rate", "train/objective"} <= set(row)
        assert row["train/lr"] == pytest.approx(0.05)
        assert 0 < row["memory/peak_rss_gib"] <= peak_rss() / GIB
    decays = [min(0.5, (1 + n) / (10 + n)) for n in (2, 4, 6, 8)]
    assert [row["train/ema_decay"] for row in rows] == pytest.approx(decays)
