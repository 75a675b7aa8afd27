"""genfw: likelihood-based latent-variable models under one evidence lower bound.

`import genfw` loads nothing; touching a name loads what it needs (torch, never Lightning or Hydra).

    >>> import genfw
    >>> genfw.Cosine(log_snr_max=7.9, log_snr_min=-10.0)
    Cosine(log_snr: 7.9 -> -10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genfw.bayes import DiscretePosterior as DiscretePosterior
    from genfw.bayes import Prior as Prior
    from genfw.diffusion.denoiser import Denoiser as Denoiser
    from genfw.diffusion.denoiser import NetworkDenoiser as NetworkDenoiser
    from genfw.diffusion.denoising import Denoises as Denoises
    from genfw.diffusion.denoising import Denoising as Denoising
    from genfw.diffusion.grid import AngleGrid as AngleGrid
    from genfw.diffusion.grid import KarrasGrid as KarrasGrid
    from genfw.diffusion.grid import LogSNRGrid as LogSNRGrid
    from genfw.diffusion.grid import TimeGrid as TimeGrid
    from genfw.diffusion.grid import UniformGrid as UniformGrid
    from genfw.diffusion.guidance import Autoguidance as Autoguidance
    from genfw.diffusion.guidance import ByClassifier as ByClassifier
    from genfw.diffusion.guidance import ClassifierFree as ClassifierFree
    from genfw.diffusion.guidance import ClassifierGuidance as ClassifierGuidance
    from genfw.diffusion.guidance import DenoisedClassifierGuidance as DenoisedClassifierGuidance
    from genfw.diffusion.guidance import EpsilonScaling as EpsilonScaling
    from genfw.diffusion.guidance import Extrapolated as Extrapolated
    from genfw.diffusion.guidance import Guidance as Guidance
    from genfw.diffusion.guidance import Guide as Guide
    from genfw.diffusion.guidance import Scaled as Scaled
    from genfw.diffusion.guidance import Unguided as Unguided
    from genfw.diffusion.process import marginal as marginal
    from genfw.diffusion.process import posterior as posterior
    from genfw.diffusion.process import transition as transition
    from genfw.diffusion.sampler import DDIM as DDIM
    from genfw.diffusion.sampler import Ancestral as Ancestral
    from genfw.diffusion.sampler import Churn as Churn
    from genfw.diffusion.sampler import DPMSolver as DPMSolver
    from genfw.diffusion.sampler import DPMSolverSDE as DPMSolverSDE
    from genfw.diffusion.sampler import Euler as Euler
    from genfw.diffusion.sampler import Heun as Heun
    from genfw.diffusion.sampler import Langevin as Langevin
    from genfw.diffusion.sampler import PredictorCorrector as PredictorCorrector
    from genfw.diffusion.sampler import Sampler as Sampler
    from genfw.diffusion.sampler import Step as Step
    from genfw.diffusion.sampler import UniPC as UniPC
    from genfw.diffusion.times import AntitheticTime as AntitheticTime
    from genfw.diffusion.times import ImportanceTime as ImportanceTime
    from genfw.diffusion.times import IndependentTime as IndependentTime
    from genfw.diffusion.times import TimeSampler as TimeSampler
    from genfw.diffusion.times import UniformLogSNR as UniformLogSNR
    from genfw.diffusion.times import UniformTime as UniformTime
    from genfw.discretized import BinSoftmax as BinSoftmax
    from genfw.discretized import DiscretizedLogistic as DiscretizedLogistic
    from genfw.discretized import DiscretizedNormal as DiscretizedNormal
    from genfw.discretized import LogisticMixture as LogisticMixture
    from genfw.distributions import Bernoulli as Bernoulli
    from genfw.distributions import Categorical as Categorical
    from genfw.distributions import Distribution as Distribution
    from genfw.distributions import Normal as Normal
    from genfw.elbo import ELBO as ELBO
    from genfw.elbo import bits_per_dim as bits_per_dim
    from genfw.estimators.annealed import Annealed as Annealed
    from genfw.estimators.annealed import Sandwich as Sandwich
    from genfw.estimators.bound import Bound as Bound
    from genfw.estimators.estimator import Estimate as Estimate
    from genfw.estimators.estimator import Estimator as Estimator
    from genfw.estimators.importance import ImportanceWeighted as ImportanceWeighted
    from genfw.estimators.ode import ProbabilityFlow as ProbabilityFlow
    from genfw.likelihood import BernoulliLikelihood as BernoulliLikelihood
    from genfw.likelihood import BinsLikelihood as BinsLikelihood
    from genfw.likelihood import CategoricalLikelihood as CategoricalLikelihood
    from genfw.likelihood import DiscretizedGaussianLikelihood as DiscretizedGaussianLikelihood
    from genfw.likelihood import DiscretizedLogisticLikelihood as DiscretizedLogisticLikelihood
    from genfw.likelihood import GaussianLikelihood as GaussianLikelihood
    from genfw.likelihood import Likelihood as Likelihood
    from genfw.likelihood import LogisticMixtureLikelihood as LogisticMixtureLikelihood
    from genfw.model import Diverges as Diverges
    from genfw.model import LatentModel as LatentModel
    from genfw.model import MarkovianHierarchy as MarkovianHierarchy
    from genfw.model import Weighs as Weighs
    from genfw.models.hvae import HVAE as HVAE
    from genfw.models.hvae import TopDown as TopDown
    from genfw.models.mhvae import MHVAE as MHVAE
    from genfw.models.posterior import FullPosterior as FullPosterior
    from genfw.models.posterior import Posterior as Posterior
    from genfw.models.posterior import ResidualPosterior as ResidualPosterior
    from genfw.models.vae import VAE as VAE
    from genfw.models.vdm import VDM as VDM
    from genfw.noise import BatchNoise as BatchNoise
    from genfw.noise import Draws as Draws
    from genfw.noise import Noise as Noise
    from genfw.noise import draws as draws
    from genfw.objective.denoising import P2 as P2
    from genfw.objective.denoising import DenoisingObjective as DenoisingObjective
    from genfw.objective.denoising import EdmWeighted as EdmWeighted
    from genfw.objective.denoising import MinSnr as MinSnr
    from genfw.objective.denoising import PerLogSNR as PerLogSNR
    from genfw.objective.denoising import PerTime as PerTime
    from genfw.objective.denoising import SigmoidWeighted as SigmoidWeighted
    from genfw.objective.denoising import Simple as Simple
    from genfw.objective.importance import Ciwae as Ciwae
    from genfw.objective.importance import Dreg as Dreg
    from genfw.objective.importance import Iwae as Iwae
    from genfw.objective.importance import Miwae as Miwae
    from genfw.objective.importance import OfWeights as OfWeights
    from genfw.objective.importance import Stl as Stl
    from genfw.objective.importance import Tempered as Tempered
    from genfw.objective.objective import Elbo as Elbo
    from genfw.objective.objective import Objective as Objective
    from genfw.objective.rate import L2 as L2
    from genfw.objective.rate import Beta as Beta
    from genfw.objective.rate import CyclicWarmup as CyclicWarmup
    from genfw.objective.rate import Floor as Floor
    from genfw.objective.rate import FreeBits as FreeBits
    from genfw.objective.rate import LinearWarmup as LinearWarmup
    from genfw.objective.rate import Warmup as Warmup
    from genfw.parameterization import X0 as X0
    from genfw.parameterization import CategoricalParameterization as CategoricalParameterization
    from genfw.parameterization import DiscreteParameterization as DiscreteParameterization
    from genfw.parameterization import Edm as Edm
    from genfw.parameterization import Eps as Eps
    from genfw.parameterization import Flow as Flow
    from genfw.parameterization import LinearParameterization as LinearParameterization
    from genfw.parameterization import (
        LogisticMixtureParameterization as LogisticMixtureParameterization,
    )
    from genfw.parameterization import Parameterization as Parameterization
    from genfw.parameterization import Prediction as Prediction
    from genfw.parameterization import Score as Score
    from genfw.parameterization import V as V
    from genfw.registry import Registered as Registered
    from genfw.schedule import Cosine as Cosine
    from genfw.schedule import Laplace as Laplace
    from genfw.schedule import Learned as Learned
    from genfw.schedule import Linear as Linear
    from genfw.schedule import LogLinear as LogLinear
    from genfw.schedule import LogNormal as LogNormal
    from genfw.schedule import NoiseSchedule as NoiseSchedule
    from genfw.schedule import Sigmoid as Sigmoid

_HOMES = {
    "genfw.bayes": ("DiscretePosterior", "Prior"),
    "genfw.diffusion.denoiser": ("Denoiser", "NetworkDenoiser"),
    "genfw.diffusion.denoising": ("Denoises", "Denoising"),
    "genfw.diffusion.guidance": (
        "Autoguidance",
        "ByClassifier",
        "ClassifierFree",
        "ClassifierGuidance",
        "DenoisedClassifierGuidance",
        "EpsilonScaling",
        "Extrapolated",
        "Guidance",
        "Guide",
        "Scaled",
        "Unguided",
    ),
    "genfw.diffusion.process": ("marginal", "posterior", "transition"),
    "genfw.diffusion.grid": ("AngleGrid", "KarrasGrid", "LogSNRGrid", "TimeGrid", "UniformGrid"),
    "genfw.diffusion.sampler": (
        "DDIM",
        "Ancestral",
        "Churn",
        "DPMSolver",
        "DPMSolverSDE",
        "Euler",
        "Heun",
        "Langevin",
        "PredictorCorrector",
        "Sampler",
        "Step",
        "UniPC",
    ),
    "genfw.diffusion.times": (
        "AntitheticTime",
        "ImportanceTime",
        "IndependentTime",
        "TimeSampler",
        "UniformLogSNR",
        "UniformTime",
    ),
    "genfw.discretized": (
        "BinSoftmax",
        "DiscretizedLogistic",
        "DiscretizedNormal",
        "LogisticMixture",
    ),
    "genfw.distributions": ("Bernoulli", "Categorical", "Distribution", "Normal"),
    "genfw.elbo": ("ELBO", "bits_per_dim"),
    "genfw.estimators.annealed": ("Annealed", "Sandwich"),
    "genfw.estimators.bound": ("Bound",),
    "genfw.estimators.estimator": ("Estimate", "Estimator"),
    "genfw.estimators.importance": ("ImportanceWeighted",),
    "genfw.estimators.ode": ("ProbabilityFlow",),
    "genfw.likelihood": (
        "BernoulliLikelihood",
        "BinsLikelihood",
        "CategoricalLikelihood",
        "DiscretizedGaussianLikelihood",
        "DiscretizedLogisticLikelihood",
        "GaussianLikelihood",
        "Likelihood",
        "LogisticMixtureLikelihood",
    ),
    "genfw.model": ("Diverges", "LatentModel", "MarkovianHierarchy", "Weighs"),
    "genfw.models.hvae": ("HVAE", "TopDown"),
    "genfw.models.mhvae": ("MHVAE",),
    "genfw.models.posterior": ("FullPosterior", "Posterior", "ResidualPosterior"),
    "genfw.models.vae": ("VAE",),
    "genfw.models.vdm": ("VDM",),
    "genfw.noise": ("BatchNoise", "Draws", "Noise", "draws"),
    "genfw.objective.denoising": (
        "DenoisingObjective",
        "EdmWeighted",
        "MinSnr",
        "P2",
        "PerLogSNR",
        "PerTime",
        "SigmoidWeighted",
        "Simple",
    ),
    "genfw.objective.importance": (
        "Ciwae",
        "Dreg",
        "Iwae",
        "Miwae",
        "OfWeights",
        "Stl",
        "Tempered",
    ),
    "genfw.objective.objective": ("Elbo", "Objective"),
    "genfw.objective.rate": (
        "Beta",
        "CyclicWarmup",
        "Floor",
        "FreeBits",
        "L2",
        "LinearWarmup",
        "Warmup",
    ),
    "genfw.parameterization": (
        "CategoricalParameterization",
        "DiscreteParameterization",
        "Edm",
        "Eps",
        "Flow",
        "LinearParameterization",
        "LogisticMixtureParameterization",
        "Parameterization",
        "Prediction",
        "Score",
        "V",
        "X0",
    ),
    "genfw.registry": ("Registered",),
    "genfw.schedule": (
        "Cosine",
        "Laplace",
        "Learned",
        "Linear",
        "LogLinear",
        "LogNormal",
        "NoiseSchedule",
        "Sigmoid",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'genfw' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
