"""The functions that conf/ calls by name, `${name:argument}`. No torch here: `--help` composes."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf


def log_snr_max(bins: int) -> float:
    r"""The data end of a schedule: half a bin is 3.02 noise deviations, :math:`2 \log(3.02\, K)`.

    On a scale of (-1, 1) half a bin is 1/K, so 1/K = 3.02 sigma_0 / alpha_0: for a pixel in the
    middle of its bin the noise leaves the bin once in 400 times. 13.3 for K = 256.

    Example:
        >>> round(log_snr_max(256), 1), round(log_snr_max(17), 1)
        (13.3, 7.9)
    """
    return 2 * math.log(3.02 * bins)


def binarized_bins(binarize: str, raw_bins: int) -> int:
    """K as models see it: 2 for binarized images, otherwise that of the files.

    Example:
        >>> binarized_bins("none", 256), binarized_bins("dynamic", 256)
        (256, 2)
    """
    return raw_bins if binarize == "none" else 2


def outputs(likelihood: DictConfig) -> int:
    """`Likelihood.outputs` of the node's class: channels that it reads per channel of the data.

    genfw's own are known without importing them.
    """
    known = {
        "genfw.CategoricalLikelihood": likelihood.get("bins"),
        "genfw.BernoulliLikelihood": 1,
        "genfw.BinsLikelihood": 1,
        "genfw.DiscretizedGaussianLikelihood": 2,
        "genfw.DiscretizedLogisticLikelihood": 2,
        "genfw.LogisticMixtureLikelihood": 4 * likelihood.get("components", 10),
        "genfw.GaussianLikelihood": 2,
    }
    if likelihood._target_ in known:
        return known[likelihood._target_]
    from genfw.train.config import build

    return build(likelihood).outputs


def out_channels(param: DictConfig, channels: int) -> int:
    """`Parameterization.channels` of the node's class: what the network must give.

    Known without importing it: genfw's own, and linear ones, which need as many as the data have.
    Somebody else's that needs more is given net.out_channels.
    """
    known = {
        "genfw.CategoricalParameterization": param.get("bins"),
        "genfw.LogisticMixtureParameterization": 3 * param.get("components", 10),
    }
    return channels * known.get(param._target_, 1)


def fused(trainer: DictConfig) -> bool:
    """Whether the optimizer may take all weights in one call: always, but where gradients of a
    mixed precision are clipped. Lightning refuses that, since a fused optimizer would unscale
    float16 gradients after it; bfloat16 ones, which have no scale, too.

    Example:
        >>> fused(OmegaConf.create({"precision": "bf16-mixed", "gradient_clip_val": 1.0}))
        False
    """
    mixed = str(trainer.get("precision")) in ("16", "bf16", "16-mixed", "bf16-mixed")
    return not (mixed and trainer.get("gradient_clip_val"))


def register() -> None:
    """Makes the functions of this page known to OmegaConf. Again is allowed."""
    for function in (log_snr_max, binarized_bins, outputs, out_channels, fused):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
