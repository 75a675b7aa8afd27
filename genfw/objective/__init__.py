"""Objectives: what is minimised. Never what is reported.

The bound (`ELBO`) is a statement about log p(x); an objective may weigh, clip or bend it in any way
that trains well. Reported numbers come from `genfw.estimators`, which do not know objectives.

* `objective`: the interface, and the bound itself
* `rate`: other prices for the latents: beta, warm-ups, free bits; the squared error
* `importance`: bounds of many draws (IWAE and kin), and gradients by the sampled path (DReG,
  sticking the landing)
* `denoising`: other weights for the noise levels of a diffusion model
"""

from genfw.objective.denoising import P2 as P2
from genfw.objective.denoising import EdmWeighted as EdmWeighted
from genfw.objective.denoising import MinSnr as MinSnr
from genfw.objective.denoising import SigmoidWeighted as SigmoidWeighted
from genfw.objective.denoising import Simple as Simple
from genfw.objective.importance import Ciwae as Ciwae
from genfw.objective.importance import Dreg as Dreg
from genfw.objective.importance import Iwae as Iwae
from genfw.objective.importance import Miwae as Miwae
from genfw.objective.importance import Stl as Stl
from genfw.objective.objective import Elbo as Elbo
from genfw.objective.objective import Objective as Objective
from genfw.objective.rate import L2 as L2
from genfw.objective.rate import Beta as Beta
from genfw.objective.rate import CyclicWarmup as CyclicWarmup
from genfw.objective.rate import Floor as Floor
from genfw.objective.rate import FreeBits as FreeBits
from genfw.objective.rate import LinearWarmup as LinearWarmup
