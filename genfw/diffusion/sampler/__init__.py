r"""Samplers: from noise at t = 1 down to the first latent z_0.

A sampler is a `step` from time t to s < t; the loop over a grid of times is shared and keeps what
multi-step samplers need (`past`), so samplers hold no state. They see a `Denoiser` and nothing
else, so guidance and parameterizations are nothing to them. What is random comes from `noise`.

* `sampler`: the interface and the loop
* `ancestral`: the model's own chain, and its non-Markovian kin, DDIM(eta)
* `ode`: the probability flow, by Euler and Heun; with stochastic churn, EDM's sampler
* `multistep`: exponential integrators that reuse the predictions before: DPM-Solver++ (2M), its SDE
  variant, UniPC
* `langevin`: annealed Langevin dynamics; as the corrector of a predictor

With lambda = log SNR, all but `langevin` solve dz/dlambda = 1/2 sigma^2 (z + score) or the reverse
SDE with the same marginals. Equalities that are tests: DDIM(1) = ancestral; DDIM(0) = Euler in
(z / alpha, sigma / alpha) = DPM-Solver++ without a past; EDM without churn = Heun.
"""

from genfw.diffusion.sampler.ancestral import DDIM as DDIM
from genfw.diffusion.sampler.ancestral import Ancestral as Ancestral
from genfw.diffusion.sampler.langevin import Langevin as Langevin
from genfw.diffusion.sampler.langevin import PredictorCorrector as PredictorCorrector
from genfw.diffusion.sampler.multistep import DPMSolver as DPMSolver
from genfw.diffusion.sampler.multistep import DPMSolverSDE as DPMSolverSDE
from genfw.diffusion.sampler.multistep import UniPC as UniPC
from genfw.diffusion.sampler.ode import Churn as Churn
from genfw.diffusion.sampler.ode import Euler as Euler
from genfw.diffusion.sampler.ode import Heun as Heun
from genfw.diffusion.sampler.sampler import Sampler as Sampler
from genfw.diffusion.sampler.sampler import Step as Step
