"""What a command refuses before anything is built is what the classes refuse: rules read names,
`check` reads the model, and both must say the same."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.func import functional_call

from genfw import VDM, Estimator, GaussianLikelihood, Learned, Noise, Objective
from genfw.estimators import annealed, bound, importance, ode  # noqa: F401  (they register)
from genfw.testing import small
from genfw.testing.oracles import GaussianDenoiser
from genfw.train import resolvers
from genfw.train.compose import unchecked
from genfw.train.errors import ConfigError
from genfw.train.nodes import conf_folder
from genfw.train.rules.model import (
    estimator_reads_model,
    learned_schedule_follows_the_bound,
    objective_reads_model,
)
from genfw.train.session import session

resolvers.register()

RULES = learned_schedule_follows_the_bound, objective_reads_model, estimator_reads_model
SHAPE, BINS = (1, 2, 2), 3


def learned():
    return small.vdm(SHAPE, BINS, schedule=Learned(8.0, -6.0, hidden=4))


MODELS = {
    "model=vae": lambda: small.vae(SHAPE, BINS),
    "model=mhvae": lambda: small.mhvae(SHAPE, BINS),
    "model=hvae": lambda: small.hvae(SHAPE, BINS),
    "model=vdm": lambda: small.vdm(SHAPE, BINS),
    "model=vdm model.steps=3": lambda: small.vdm(SHAPE, BINS).at(steps=3),
    "model=vdm schedule=learned": learned,
    "model=vdm schedule=learned model.steps=3": lambda: learned().at(steps=3),
}
JUDGES = {
    f"{group}={name}": (group, name, {})
    for group, interface in (("objective", Objective), ("estimator", Estimator))
    for name, cls in interface.registry.items()
    if cls.__module__.startswith("genfw.") and "<locals>" not in cls.__qualname__
}
JUDGES["objective.per=batch_dimension"] = ("objective", "free_bits", {"per": "batch_dimension"})


def refusal(ask):
    try:
        ask()
    except (ConfigError, TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("command", MODELS)
def test_a_rule_refuses_what_check_refuses(command):
    with session():
        config = unchecked(command.split())
    model, said, found = MODELS[command](), {}, {}
    for judge, (group, name, more) in JUDGES.items():
        usual = config[group]
        config[group] = {**OmegaConf.load(conf_folder() / group / f"{name}.yaml"), **more}
        said[judge] = refusal(lambda: [rule(config) for rule in RULES])
        config[group] = usual
        cls = {"objective": Objective, "estimator": Estimator}[group].registry[name]
        found[judge] = refusal(lambda cls=cls, more=more: cls(**more).check(model))
    apart = {
        judge: (said[judge], found[judge])
        for judge in JUDGES
        if (said[judge] is None) != (found[judge] is None)
    }
    assert not apart
    assert said["objective=elbo"] is said["estimator=bound"] is None


OF_WEIGHTS = ["iwae", "miwae", "ciwae", "stl", "dreg"]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_in_steps_a_learned_schedule_follows_a_bound_of_weights(name, double):
    """Why that is not refused: the gradient in the schedule is the derivative of the mean, at the
    same draws; that of a surrogate in the mean over draws, to five standard errors."""
    schedule, few = Learned(5.0, -6.0, hidden=4), {"miwae": {"m": 2, "k": 2}, "stl": {}}
    denoiser = GaussianDenoiser(schedule, torch.tensor([0.7, -0.6]), torch.tensor([1.0, 0.4]))
    vdm = VDM(denoiser, GaussianLikelihood(), steps=3, shape=(2,))
    objective = Objective.registry[name](**few.get(name, {"k": 4}))
    at = {f"model.{key}": p for key, p in vdm.named_parameters()}
    towards = {key: torch.randn_like(p) for key, p in at.items()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vdm

        def forward(self, x, noise):
            return objective(self.model, x, noise=noise).mean()

    def moved(h, *given):
        there = {key: at[key] + h * towards[key] for key in at}
        return float(functional_call(Loss(), there, given).detach())

    found = []
    for index in torch.arange(900 if objective.surrogate else 6).split(150):
        given = 0.5 * torch.randn(len(index), 2), Noise(0, index)
        slopes = torch.autograd.grad(Loss()(*given), list(at.values()))
        slope = sum(float((g * towards[k]).sum()) for g, k in zip(slopes, at, strict=True))
        found.append((slope, (moved(1e-5, *given) - moved(-1e-5, *given)) / 2e-5))
    slopes, differences = torch.tensor(found).T
    gap, scale = slopes - differences, float(differences.mean().abs())
    error = float(gap.std() / len(gap) ** 0.5) if objective.surrogate else 0.0
    assert abs(float(gap.mean())) < 5 * error + 1e-6
    assert error < 0.05 * scale
