"""genfw beside named peers: make peers, or python benchmarks/peers.py [rounds] [threads]

In turn in one process, the best of all rounds of each; ratios are theirs to genfw's, above 1 where
genfw is quicker.

* A training step of a VAE 784-[200 tanh, 200 tanh]-50, Bernoulli, batches of 100, Adam, by what each
  has for training: genfw's LatentModule under `Trainer.fit` with what `python -m genfw` brings
  (average of the weights, gradient norms, logged numbers), Pythae's BaseTrainer, Pyro's SVI with
  TraceMeanField_ELBO.
* -log p(x) by 5000 importance weights of one trained VAE, the same weights in all three: nats, and
  seconds an image. Images: the 8x8 digits of scikit-learn, three times as large, black and white.
* Sampling and training of a diffusion model, beside diffusers' schedulers with the same network:
  milliseconds of a step, and how much of it is the network's.

What they do not count alike: Pythae draws its noise in float32 from torch's generator, keeps no
average and logs once an epoch; Pyro's loop logs nothing. genfw's draws are keyed by the image.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial

import diffusers
import lightning.pytorch as L
import numpy as np
import pyro
import pythae.data.datasets
import pythae.models
import pythae.trainers
import torch
from pyro import distributions as dist
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training_step import BATCH, FIRST, IMAGES, STEPS, Random, fit, vae

import genfw
from genfw.nets import UNet
from genfw.train.data import ImageData
from genfw.train.ema import EMA
from genfw.train.memory import keep_freed_memory
from genfw.train.module import LatentModule
from genfw.train.stability import Stability
from genfw.train.watch import Watch

adam = partial(torch.optim.Adam, lr=1e-3)


class Encoder(BaseEncoder):
    """genfw's encoder, as Pythae calls one."""

    def __init__(self, vae: genfw.VAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_std = self.vae.encoder(x - 0.5).chunk(2, 1)
        return ModelOutput(embedding=mean.flatten(1), log_covariance=2 * log_std.flatten(1))
