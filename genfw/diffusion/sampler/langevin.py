r"""Langevin dynamics: at one noise level, a walk whose stationary law is p_t.

.. math:: z \leftarrow z + c\, \nabla \log p_t(z) + \sqrt{2 c}\; \epsilon, \qquad
    c = \text{size} \cdot \sigma_t^2

c follows sigma_t^2, as the score is of the order of 1 / sigma_t: at every level the walk moves by
the same share of the noise. A finite step has a stationary law that is a little too wide: on
N(m, s^2) its variance is s^2 / (1 - c / (2 s^2)).
"""

from __future__ import annotations

from torch import Tensor

from genfw.amplitudes import broadcast
from genfw.check import at_least_one, positive, share_below_one
from genfw.diffusion.denoiser import Denoiser
from genfw.diffusion.grid import TimeGrid
from genfw.diffusion.process import posterior
from genfw.diffusion.sampler.sampler import Sampler
from genfw.noise import Draws
from genfw.parameterization import Prediction
from genfw.types import Data, Labels


class Langevin(Sampler, name="langevin"):
    r"""Annealed: at every time of the grid the walk begins where the one before ended, z / alpha
    kept.

    Its samples spread a little too far, for two reasons. The walk follows the falling noise with a
    delay: on normal data, their exact denoiser and `grid=log_snr` the deviation is 5 % too large
    with the defaults, and 2.4 % with twice the steps, or twice the corrections. And where data have
    no width of their own the stationary law shows: the noise that is left is wider by
    :math:`1 / \sqrt{1 - \text{size} / 2}`. A larger size shortens the delay and widens that law.
    On grids with few stops near the data the delay is longer: take `log_snr`.

    Args:
        steps: noise levels.
        corrections: steps of the walk at each.
        size: of a step of the walk, in (0, 1).

    Raises:
        ValueError: corrections below 1, or size outside (0, 1).

    References:
        Generative Modeling by Estimating Gradients of the Data Distribution, Song, Ermon, 2019,
        https://arxiv.org/abs/1907.05600.
    """

    def __init__(
        self,
        steps: int = 100,
        corrections: int = 10,
        size: float = 0.1,
        grid: TimeGrid | None = None,
    ):
        super().__init__(steps, grid)
        self.corrections, self.size = _checked(corrections, size)
        self.calls = corrections

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        alpha = denoiser.schedule.alpha
        z, predictions = broadcast(alpha(s) / alpha(t), z) * z, []
        for i in range(self.corrections):
            z, prediction = walk(denoiser, z, s, y, self.size, noise.fold(i))
            predictions.append(prediction)
        return z, predictions[-1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, corrections={self.corrections}, size={self.size:g}"


class PredictorCorrector(Sampler, name="predictor_corrector"):
    r"""An ancestral step, then steps of the walk at the level it arrives at.

    Song et al. choose c by a signal-to-noise ratio r, 2 r^2 ||eps||^2 / ||score||^2 averaged over
    the batch; as ||score|| is about sqrt(D) / sigma, that is size = 2 r^2 here (0.05 for their r =
    0.16), and an image does not depend on its batch.

    Args:
        corrections: steps of the walk after each of `steps`.
        size: of a step of the walk, in (0, 1).

    Raises:
        ValueError: corrections below 1, or size outside (0, 1).

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, Song et al.,
        2021, https://arxiv.org/abs/2011.13456.
    """

    def __init__(
        self,
        steps: int = 100,
        corrections: int = 1,
        size: float = 0.05,
        grid: TimeGrid | None = None,
    ):
        super().__init__(steps, grid)
        self.corrections, self.size = _checked(corrections, size)
        self.calls = 1 + corrections

    def step(
        self,
        denoiser: Denoiser,
        z: Data,
        t: Tensor,
        s: Tensor,
        y: Labels | None,
        *,
        noise: Draws,
        past: tuple[Prediction, ...] = (),
    ) -> tuple[Data, Prediction]:
        prediction = denoiser(z, t, y)
        z = posterior(z, prediction.x, s, t, denoiser.schedule).sample(noise)
        for i in range(self.corrections):
            z, _ = walk(denoiser, z, s, y, self.size, noise.fold(i))
        return z, prediction

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, corrections={self.corrections}, size={self.size:g}"


def walk(
    denoiser: Denoiser, z: Data, t: Tensor, y: Labels | None, size: float, noise: Draws
) -> tuple[Data, Prediction]:
    """One step of Langevin dynamics at time t, and the prediction it went by."""
    prediction = denoiser(z, t, y)
    c = size * prediction.sigma**2
    return z + c * prediction.score + (2 * c).sqrt() * noise.normal("walk", z), prediction


def _checked(corrections: int, size: float) -> tuple[int, float]:
    return at_least_one("corrections", corrections), share_below_one("size", positive("size", size))
