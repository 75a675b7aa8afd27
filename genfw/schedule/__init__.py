r"""Noise schedules: log SNR as a function of time.

Time t runs from 0 (data) to 1 (noise); :math:`\lambda(t) = \log \mathrm{SNR}(t)` falls strictly
from `log_snr_max` to `log_snr_min`, both finite and exact. Latents are variance preserving:

.. math:: z_t = \alpha_t x + \sigma_t \epsilon, \quad \alpha_t^2 = \mathrm{sigmoid}(\lambda),
    \quad \sigma_t^2 = \mathrm{sigmoid}(-\lambda)

Luo's :math:`\bar\alpha_t` is :math:`\alpha_t^2` here.

* `schedule`: the interface
* `fixed`: loglinear, linear, cosine, sigmoid, edm, laplace
* `learned`: a monotone network
"""

from genfw.schedule.fixed import Cosine as Cosine
from genfw.schedule.fixed import Laplace as Laplace
from genfw.schedule.fixed import Linear as Linear
from genfw.schedule.fixed import LogLinear as LogLinear
from genfw.schedule.fixed import LogNormal as LogNormal
from genfw.schedule.fixed import Sigmoid as Sigmoid
from genfw.schedule.learned import Learned as Learned
from genfw.schedule.schedule import NoiseSchedule as NoiseSchedule
