r"""Guidance: a denoiser, steered towards a label while it samples.

Guidance wraps a denoiser and is a denoiser; samplers do not know it. An NLL is always of the bare
model: a model puts guidance around its denoiser to sample, and nowhere else.

| name                | score                                       | needs                        |
|---------------------|---------------------------------------------|------------------------------|
| none                | s(z, y)                                     |                              |
| epsilon_scaling     | w s(z, y)                                   |                              |
| classifier_free     | w s(z, y) + (1 - w) s(z)                    | labels dropped in training   |
| autoguidance        | w s(z, y) + (1 - w) s_weaker(z, y)          | a weaker model               |
| classifier          | s(z) + w grad log p(y given z)              | a classifier of noisy images |
| classifier_denoised | s(z) + w grad log p(y given x_hat(z))       | a classifier                 |

w = 1 is plain, and Bayes' rule, Luo (165), (166); w > 1 sharpens. All of it is said of the score
and done to x and eps: since z = alpha x + sigma eps, weights that sum to 1, as those of two models
do, do the same to each of them, and to the output of any linear parameterization.

A guidance is a denoiser, so one goes around another:
`VDM(guidance=lambda bare: EpsilonScaling(ClassifierFree(bare, 2.0)))`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genfw.amplitudes import broadcast
from genfw.check import finite, share
from genfw.diffusion.denoiser import Denoiser, Unlabelled
from genfw.model import as_read
from genfw.parameterization import Prediction
from genfw.registry import Registered
from genfw.types import Data, Labels, Nats, Time


class Guidance(Registered, Denoiser, ABC, group="guidance"):
    """A denoiser around another, along the same schedule."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule

    @property
    def title(self) -> str:
        """What is done to samples, for names of files and metrics; nothing where nothing is."""
        own, inner = f"{self.called()}({self.extra_repr()})", ""
        if isinstance(self.denoiser, Guidance):
            inner = self.denoiser.title
        return f"{own} of {inner}" if inner else own


class Unguided(Guidance, name="none"):
    """The denoiser as it is."""

    @property
    def title(self) -> str:
        return ""

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        return self.denoiser(z, t, y)


Guide = Callable[[Denoiser], Guidance]
"""A choice of guidance that waits for its denoiser."""


NEAR = 0.1
"""Tolerance in log SNR: asked up to this far beyond its end points, another model answers as at
the end point. Learned end points move while a model trains, so that its own earlier weights reach a
little less far."""


class Scaled(Guidance):
    """Guidance of a strength that holds in an interval of noise levels.

    Args:
        denoiser: what is guided.
        scale: w.
        interval: lowest and highest log SNR where it guides; None: everywhere.

    Raises:
        ValueError: interval is not two rising numbers, or scale not finite.

    References:
        Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
        Diffusion Models, Kynkaanniemi et al., 2024, https://arxiv.org/abs/2404.07724
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: Sequence[float] | None):
        super().__init__(denoiser)
        self.scale = finite("scale", scale)
        self.interval = None if interval is None else _ordered(interval)

    @property
    def reach(self) -> tuple[float, float]:
        """Lowest and highest log SNR at which it is asked to guide."""
        lowest, highest = self.interval or (-math.inf, math.inf)
        most, least = self.schedule.ends
        return max(lowest, least), min(highest, most)

    def weight(self, t: Time, like: Data, plain: float) -> Tensor:
        """w where it guides and `plain` elsewhere, one per example, broadcastable to `like`."""
        log_snr = self.schedule.log_snr(t).to(like.device).expand(len(like))
        lowest, highest = self.interval or (-math.inf, math.inf)
        inside = (log_snr >= lowest) & (log_snr <= highest)
        return broadcast(torch.where(inside, log_snr.new_tensor(self.scale), plain), like)

    def extra_repr(self) -> str:
        interval = self.interval and ", interval=[{:g}, {:g}]".format(*self.interval)
        return f"scale={self.scale:g}{interval or ''}"


class EpsilonScaling(Scaled, name="epsilon_scaling"):
    r"""The predicted noise made larger, and x_hat with it:

    .. math:: \hat\epsilon \leftarrow w\, \hat\epsilon, \qquad
        \hat x \leftarrow \hat x - (w - 1)\, \frac{\sigma}{\alpha} \hat\epsilon

    A network's errors leave images between those of the data. The noise of the reverse SDE forgets
    them; the probability flow does not, and w > 1 at middling noise, where the image is decided,
    makes it as near to the data (docs/score.md, where the defaults were found: on digits).

    Args:
        denoiser: what is scaled.
        scale: w.
        interval: lowest and highest log SNR where it is; None: everywhere.

    Raises:
        ValueError: see `Scaled`.

    References:
        Elucidating the Exposure Bias in Diffusion Models, Ning et al., 2024,
        https://arxiv.org/abs/2308.15321 (they divide, and for other networks make eps smaller)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float = 1.2,
        interval: Sequence[float] | None = (-2.0, 2.0),
    ):
        super().__init__(denoiser, scale, interval)

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        plain = self.denoiser(z, t, y)
        w = self.weight(t, z, plain=1.0)
        x = plain.x - (w - 1) * plain.sigma / plain.alpha * plain.eps
        return Prediction(x, w * plain.eps, plain.alpha, plain.sigma)


class Extrapolated(Scaled):
    r"""Away from a second prediction, through the first:

    .. math:: \hat x = w\, \hat x_1 + (1 - w)\, \hat x_2, \qquad
        \hat x \leftarrow \hat x \left(1 - \phi + \phi\,
        \frac{\mathrm{std}\, \hat x_1}{\mathrm{std}\, \hat x}\right)

    Args:
        denoiser: gives the first.
        scale: w.
        interval: lowest and highest log SNR where it guides; None: everywhere.
        rescale: phi, how far the contrast of every image is brought back to that of the first; one
            that has none (it is constant) stays as it is.

    Raises:
        ValueError: rescale outside [0, 1], or see `Scaled`.

    References:
        Common Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al., 2023,
        https://arxiv.org/abs/2305.08891 (rescale)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        interval: Sequence[float] | None,
        rescale: float,
    ):
        super().__init__(denoiser, scale, interval)
        self.rescale = share("rescale", rescale)

    @abstractmethod
    def away(self, z: Data, t: Time, y: Labels | None) -> Prediction:
        """The second prediction."""

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        first = self.denoiser(z, t, y)
        w = self.weight(t, z, plain=1.0)
        if bool((w == 1).all()):
            return first
        x = w * first.x + (1 - w) * self.away(z, t, y).x
        if self.rescale:
            contrast = _contrast(first.x, x)
            x = x * torch.where(w == 1, 1, 1 - self.rescale + self.rescale * contrast)
        return Prediction(x, (z - first.alpha * x) / first.sigma, first.alpha, first.sigma)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", rescale={self.rescale:g}" if self.rescale else "")


class ClassifierFree(Extrapolated, name="classifier_free"):
    """Away from the same model without a label.

    Args:
        denoiser: of a model that was trained with labels dropped.
        scale: w; 1 is the conditional model, 0 the one without labels.
        interval, rescale: see `Extrapolated`.

    Raises:
        ValueError: of a model without classes, or see `Extrapolated`.

    References:
        Classifier-Free Diffusion Guidance, Ho, Salimans, 2022, https://arxiv.org/abs/2207.12598
            (their w is ours less 1)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float = 3.0,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
    ):
        if isinstance(denoiser, Unlabelled):
            raise ValueError(
                f"guidance: {self.called()} needs a conditional model, trained with labels "
                "dropped, and this one has classes=None: build it with classes=<number of labels>, "
                "or guide it by a classifier or by a weaker model"
            )
        super().__init__(denoiser, scale, interval, rescale)

    def away(self, z: Data, t: Time, y: Labels | None) -> Prediction:
        return self.denoiser(z, t, None)


class Autoguidance(Extrapolated, name="autoguidance"):
    """Away from a weaker model of the same data: smaller, or trained less. It needs no labels.

    Args:
        denoiser: the better one.
        weaker: the other, along whatever schedule: it is asked at the same log SNR, or at its own
            end where that is `NEAR`.
        scale: w.
        interval, rescale: see `Extrapolated`.

    Raises:
        ValueError: the weaker one's schedule does not reach as far as guidance does.

    References:
        Guiding a Diffusion Model with a Bad Version of Itself, Karras et al., 2024,
        https://arxiv.org/abs/2406.02507
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weaker: Denoiser,
        scale: float = 2.0,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
    ):
        super().__init__(denoiser, scale, interval, rescale)
        (most, least), (lowest, highest) = weaker.schedule.ends, self.reach
        if most < highest - NEAR or least > lowest + NEAR:
            raise ValueError(
                f"weaker: expected a model of log SNR {highest:.4g} to {lowest:.4g}, got one of "
                f"{most:.4g} to {least:.4g}: guide within interval=[{least:.4g},{most:.4g}]"
            )
        self.weaker, self.known = weaker, (least, most)

    def away(self, z: Data, t: Time, y: Labels | None) -> Prediction:
        log_snr = self.schedule.log_snr(t).clamp(*self.known)
        return self.weaker(z, self.weaker.schedule.inverse(log_snr), y)


class ByClassifier(Scaled):
    r"""Up the gradient of log p(y | z), from the model without a label:

    .. math:: \hat\epsilon = \hat\epsilon(z) - w\, \sigma\, \nabla_z \log p(y \mid z),
        \quad \text{Luo (165), (166)}

    Args:
        denoiser: of an unconditional model, or of one that was trained with labels dropped: it is
            asked without a label.
        classifier: (z (b, ...), log SNR (b,)) -> logits (b, classes).
        scale: w; 0 is the denoiser without a label.
        interval: lowest and highest log SNR where it guides; None: everywhere.

    Raises:
        ValueError: see `Scaled`; when called, there are no labels.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: nn.Module,
        scale: float,
        interval: Sequence[float] | None,
    ):
        super().__init__(denoiser, scale, interval)
        self.classifier = classifier

    @abstractmethod
    def evidence(self, z: Data, t: Time, y: Labels) -> Nats:
        """log p(y | z), (b,) nats, with a gradient in z."""

    def forward(self, z: Data, t: Time, y: Labels | None = None) -> Prediction:
        if y is None:
            raise ValueError(f"{self.title} needs labels to guide to: none came")
        plain = self.denoiser(z, t, None)
        w = self.weight(t, z, plain=0.0)
        if bool((w == 0).all()):
            return plain
        eps = plain.eps - w * plain.sigma * self.gradient(z, t, y)
        return Prediction((z - plain.sigma * eps) / plain.alpha, eps, plain.alpha, plain.sigma)

    def gradient(self, z: Data, t: Time, y: Labels) -> Data:
        """grad log p(y | z) at z (b, ...), also where gradients are switched off."""
        with torch.inference_mode(False), torch.enable_grad():
            z, t, y = z.detach().clone().requires_grad_(), t.clone(), y.clone()
            (gradient,) = torch.autograd.grad(self.evidence(z, t, y).sum(), z)
        return gradient

    def log_prob(self, z: Data, t: Time, y: Labels) -> Nats:
        """What the classifier says of y at z, which it reads in its own precision."""
        read = as_read(self.classifier, z)
        log_snr = self.schedule.log_snr(t).to(z.device).expand(len(z))
        log_snr = log_snr.to(torch.promote_types(read.dtype, torch.float32))
        said = self.classifier(read, log_snr).log_softmax(1)
        return said.gather(1, y[:, None].long())[:, 0].to(z.dtype)


class ClassifierGuidance(ByClassifier, name="classifier"):
    """By a classifier that was trained on noisy images: exact where it is.

    Args:
        denoiser, classifier, scale, interval: see `ByClassifier`.

    References:
        Diffusion Models Beat GANs on Image Synthesis, Dhariwal, Nichol, 2021,
        https://arxiv.org/abs/2105.05233
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: nn.Module,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
    ):
        super().__init__(denoiser, classifier, scale, interval)

    def evidence(self, z: Data, t: Time, y: Labels) -> Nats:
        return self.log_prob(z, t, y)


class DenoisedClassifierGuidance(ByClassifier, name="classifier_denoised"):
    """By what the classifier says of x_hat, the gradient taken through the denoiser.

    log p(y | x_hat) stands for log E[p(y | x) | z], which it is not; but the classifier needs to
    know clean images alone.

    Args:
        denoiser, classifier, scale, interval: see `ByClassifier`.

    References:
        Universal Guidance for Diffusion Models, Bansal et al., 2023,
        https://arxiv.org/abs/2302.07121
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: nn.Module,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
    ):
        super().__init__(denoiser, classifier, scale, interval)

    def evidence(self, z: Data, t: Time, y: Labels) -> Nats:
        start = torch.zeros((), dtype=torch.float64, device=z.device)
        z_0 = broadcast(self.schedule.alpha(start), z) * self.denoiser(z, t, None).x
        return self.log_prob(z_0, start, y)


def _ordered(interval: Any) -> tuple[float, float]:
    """Lowest and highest log SNR, infinite ones too.

    Example:
        >>> _ordered([-3, float("inf")])
        (-3.0, inf)
        >>> _ordered("wide")
        Traceback (most recent call last):
        ValueError: interval: expected [lowest, highest] log SNR, got wide
    """
    try:
        lowest, highest = map(float, interval)
    except (TypeError, ValueError):  # no two, or no numbers
        lowest, highest = 0.0, 0.0
    if not lowest < highest:
        raise ValueError(f"interval: expected [lowest, highest] log SNR, got {interval}")
    return lowest, highest


def _contrast(one: Data, other: Data) -> Tensor:
    """The standard deviation of each example of the one by that of the other, broadcastable to
    them; 1 where the other is constant but for rounding."""
    own, its = (x.flatten(1).std(1, correction=0) for x in (one, other))
    rounding = 16 * torch.finfo(other.dtype).eps * other.flatten(1).abs().amax(1)
    return broadcast(torch.where(its > rounding, own / its, 1), other)
