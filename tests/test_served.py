"""Whether a model can be trained or measured so is known before anything is computed."""

import pytest
import torch
from test_laws import hvae, mhvae, of_mixture, vae, vdm

import genfw
from genfw import Estimator, LatentModel, Objective
from genfw.objective import Floor
from genfw.train.errors import ConfigError
from genfw.train.parts import served


class Bare(LatentModel):
    """A bound, and nothing else."""

    def elbo(self, x, y=None, *, noise=None):
        zero = torch.zeros(len(x), requires_grad=True)
        return genfw.ELBO(zero, (), zero)

    def sample(self, n, y=None, *, noise=None):
        raise NotImplementedError


MODELS = {
    "vae": vae,
    "mhvae": mhvae,
    "hvae": hvae,
    "continuous": vdm,
    "stepwise": lambda shape, bins: vdm(shape, bins).at(steps=2),
    "mixture": of_mixture,
    "bare": lambda shape, bins: Bare(),
}
ESTIMATORS = {
    "bound": genfw.Bound(2, 1),
    "importance_weighted": genfw.ImportanceWeighted(2, chunk=10),
    "annealed": genfw.Annealed(1, 1, leapfrog=1),
    "ode": genfw.ProbabilityFlow(1, steps=1),
}
FLOORS = {f"free_bits {per.value}": genfw.FreeBits(per=per) for per in Floor}


def ours(interface):
    return {n: c for n, c in interface.registry.items() if c.__module__.startswith("genfw.")}


def ways():
    """Every estimator and objective of genfw, and every floor."""
    assert ESTIMATORS.keys() == ours(Estimator).keys()
    made = {name: cls() for name, cls in ours(Objective).items()}
    for one in made.values():
        one.advance(1)
    return {**ESTIMATORS, **made, **FLOORS}


def refusal(ask, *arguments):
    try:
        ask(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_check_says_what_the_computation_would_have(make):
    model, x = make(shape=(1, 2, 2), bins=3), torch.randint(3, (2, 1, 2, 2))
    refused = 0
    for name, way in ways().items():
        said = refusal(way.check, model)
        assert said == refusal(way, model, x), name
        assert said is None or "\n" not in said, name
        refused += said is not None
    assert refused


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_a_refusal_advises_can_be_done(make, estimator):
    model = make(shape=(1, 2, 2), bins=3)
    said = refusal(estimator.check, model)
    if said is not None:
        advised = [name for name in ESTIMATORS if name in said.partition(": ")[2]]
        assert advised or "steps=T" in said
        assert all(refusal(ESTIMATORS[name].check, model) is None for name in advised)


def test_a_learned_schedule_is_not_trained_by_who_says_nothing_of_it():
    """Of an objective with a check of its own a run asks all the same; a bound may train one."""

    class Sum(genfw.Objective):
        def check(self, model):
            """It reads any model."""

        def forward(self, model, x, y=None, *, noise=None):
            return model.denoising(x, y, noise=noise).eps_error

    class Weights(Sum):
        bound = True

    learned = vdm((1, 2, 2), 3, schedule=genfw.Learned(8.0, -6.0, hidden=4))
    with pytest.raises(ConfigError, match="Sum says nothing of a learned schedule"):
        served(learned, Sum())
    served(learned, Weights(), genfw.Elbo()), served(vdm((1, 2, 2), 3), Sum())


def test_a_job_is_told_in_one_sentence():
    served(Bare(), genfw.Elbo(), genfw.Bound())
    for wrong in (genfw.ImportanceWeighted(), genfw.Iwae()):
        with pytest.raises(ConfigError, match=r"needs importance weights.*Bare has"):
            served(Bare(), genfw.Elbo(), wrong)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_of_no_image_there_is_an_empty_bound_and_no_likelihood(make, keyed):
    model, x = make(shape=(1, 2, 2), bins=3), torch.zeros(0, 1, 2, 2).long()
    noise = genfw.Noise(0, torch.arange(0)) if keyed else None
    assert model.elbo(x, noise=noise).total.shape == (0,)
    for name, way in ways().items():
        if refusal(way.check, model) is None and name in ESTIMATORS:
            with pytest.raises(ValueError, match="at least one image to estimate the likelihood"):
                way(model, x, noise=noise)
        elif refusal(way.check, model) is None:
            assert way(model, x, noise=noise).shape == (0,), name


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("make", [make for name, make in MODELS.items() if name != "bare"])
def test_no_samples_are_an_empty_batch(make, keyed):
    noise = genfw.Noise(0, torch.arange(0)) if keyed else None
    drawn = make(shape=(1, 2, 2), bins=3).sample(0, noise=noise)
    assert drawn.shape == (0, 1, 2, 2) and not drawn.is_floating_point()
