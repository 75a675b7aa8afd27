"""What is done to images on their way: functions of (seed, epoch, index), whatever the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from genfw.noise import Noise, mix
from genfw.train.data.images import Split


class Augmentation(ABC):
    """Random, but a function of its arguments."""

    @abstractmethod
    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Images (b, C, H, W) of these indices as they are in this epoch."""


class Flip(Augmentation):
    """Left for right, with probability 1/2."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        coin = Noise(mix(self.seed, epoch), index).uniform(
            "flip", torch.empty(len(index), 1, 1, 1, device=image.device)
        )
        return torch.where(coin < 0.5, image.flip(-1), image)


class Binarize(Augmentation):
    r"""Pixels become coins, :math:`x_i \sim \mathrm{Bernoulli}(v_i / (K - 1))` for a value v of K.

    References:
        On the Quantitative Analysis of Deep Belief Networks, Salakhutdinov, Murray, 2008 (binarized
            MNIST);
        Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015,
            https://arxiv.org/abs/1509.00519 (dynamic)
    """

    def __init__(self, bins: int, seed: int):
        self.bins, self.seed = bins, seed

    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        probability = image.double() / (self.bins - 1)
        u = Noise(mix(self.seed, epoch), index).uniform("binarize", probability)
        return (u < probability).to(torch.uint8)

    def fixed(self, split: Split) -> Split:
        """One draw for good: the split as it is in epoch 0."""
        images = np.empty_like(split.images)
        for index in torch.arange(len(split)).split(1000):
            rows = slice(int(index[0]), int(index[-1]) + 1)
            images[rows] = self(torch.from_numpy(split.images[rows].copy()), index, epoch=0).numpy()
        return replace(split, images=images)
