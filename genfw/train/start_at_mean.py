"""A decoder that knows the mean image before its first step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from genfw.likelihood import BernoulliLikelihood
from genfw.models.mhvae import MHVAE
from genfw.nets.mlp import MLPDecoder
from genfw.train.errors import GenfwError


class StartAtMean(L.Callback):
    r"""Before training, sets the bias of a Bernoulli decoder to the logit of the mean training
    image: :math:`\log m_i - \log(1 - m_i)`, m between 0.001 and 0.999.

    A decoder that begins at grey first spends hundreds of steps on a plateau, where it knows the
    mean image and nothing of z.

    Raises:
        GenfwError: in training, a model without a Bernoulli likelihood and an `MLPDecoder`.

    References:
        Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, 2015 (their code),
        https://arxiv.org/abs/1509.00519
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the weights of a checkpoint are read, which win."""
        if stage != "fit":
            return
        data = trainer.datamodule  # pyright: ignore
        images = data.raw.train.images
        mean = torch.from_numpy(images.mean(0, dtype="float64") / (data.raw_bins - 1))
        for model in filter(None, (pl_module.model, pl_module.average)):
            _bernoulli_decoder(model).start_at(mean.clamp(0.001, 0.999).logit())


def _bernoulli_decoder(model: Any) -> MLPDecoder:
    decoder = model.decoders[0] if isinstance(model, MHVAE) else None
    if isinstance(decoder, MLPDecoder) and isinstance(model.likelihood, BernoulliLikelihood):
        return decoder
    raise GenfwError(
        "StartAtMean: expected a VAE or MHVAE with likelihood=bernoulli and MLPDecoder as its "
        f"first decoder, got {type(model).__name__}: remove the callback"
    )
