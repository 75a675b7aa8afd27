"""Every registered objective keeps the laws of objectives, and every law can be broken."""

import pytest
import torch

import genfw
from genfw import L2, VDM, Dreg, FreeBits, Iwae, Objective
from genfw.objective import Floor
from genfw.objective.denoising import PerLogSNR
from genfw.objective.importance import _apart, _chain, _moved, log_mean_exp
from genfw.objective.rate import Warmup
from genfw.testing import LAWS, OBJECTIVE_LAWS
from genfw.testing import objective as laws

FEW = {"iwae": {"k": 4}, "miwae": {"m": 2, "k": 3}, "ciwae": {"k": 4}, "dreg": {"k": 4}}

TEMPERED = {"stl": {}} | FEW

each_law = pytest.mark.parametrize("law", OBJECTIVE_LAWS, ids=lambda law: law.__name__)


@each_law
@pytest.mark.parametrize("name", Objective.registry)
def test_objectives(law, name):
    law(Objective.registry[name], **FEW.get(name, {}))


@each_law
@pytest.mark.parametrize(("name", "few"), TEMPERED.items(), ids=TEMPERED)
def test_objectives_amid_their_warmup(law, name, few):
    law(Objective.registry[name], warmup=2 * laws.STEP, **few)


@each_law
@pytest.mark.parametrize("per", Floor)
def test_a_floor_that_some_are_above(law, per):
    law(FreeBits, nats=0.05, per=per)


def test_what_an_objective_says_of_itself():
    said = {
        name: {what for what in ("bound", "surrogate", "batchwise") if getattr(made, what)}
        for name, made in ((name, cls()) for name, cls in Objective.registry.items())
    }
    assert {name for name, whats in said.items() if "surrogate" in whats} == {"stl", "dreg"}
    bounds = {"elbo", "iwae", "miwae", "ciwae", "stl", "dreg"}
    assert {name for name, whats in said.items() if "bound" in whats} >= bounds
    assert [per for per in Floor if FreeBits(per=per).batchwise] == [
        Floor.BATCH_LEVEL,
        Floor.BATCH_DIMENSION,
    ]


# Wrong objectives: each names the law that finds it, and its words.


def made(value, base=Objective, **more):
    """An objective of this value, of itself, a model, images, labels and noise."""

    def forward(self, model, x, y=None, *, noise=None):
        return value(self, model, x, y, noise)

    return type("Wrong", (base,), {"forward": forward, **more})


def of_bound(change, **more):
    """What is made of the model's bound."""
    return made(lambda self, model, x, y, noise: change(model.elbo(x, y, noise=noise)), **more)


def of_rungs(gradient, k=4, beta=1.0, **more):
    """A bound of k draws, or what a warm-up makes of it, whose gradient is that of something of
    (log w, log p, path), (b, k) each."""

    def value(self, model, x, y, noise):
        with torch.enable_grad():
            log_w, log_p, path = _apart(_chain(self, model), x, y, noise, k, beta)
            return _moved(-log_mean_exp(log_w), -gradient(log_w.detach().softmax(1), log_p, path))

    return made(value, check=Dreg.check, **{"surrogate": True} | more)


def elbo(model, x, y, noise):
    return -model.elbo(x, y, noise=noise).total


def moves(self, model, x, y, noise):
    value = elbo(model, x, y, noise)
    for p in model.parameters():
        p.data = 0.99 * p.data
    return value


def freezes(self, model, x, y, noise):
    value = elbo(model, x, y, noise)
    next(model.parameters()).requires_grad_(False)
    return value


def goes_back(self, model, x, y, noise):
    value = elbo(model, x, y, noise)
    value.mean().backward(retain_graph=True)
    return value


def only_a_vae(self, model):
    if isinstance(model, VDM):
        raise ValueError("no")


def weighted(self, model, x, y, noise):
    return -model.log_weight(x, y, noise=noise)


class PerTimeAfterAll(PerLogSNR):
    def weight(self, log_snr):
        return torch.ones_like(log_snr)

    def measure(self, draw):
        return draw.dt


class ByTheLevel(PerTimeAfterAll):
    def weight(self, log_snr):
        return log_snr / 10


class Ramp(Warmup):
    def beta_at(self, step):
        return min(1.0, step / 1000)


class Late(Ramp):
    def advance(self, step):
        super().advance(step + 1)
        self.step = step


class Elsewhere(Ramp):
    def advance(self, step):
        self.step, self.weight = step, torch.tensor(self.beta_at(step))


class Guesses(Ramp):
    step = 0


class Saves(Ramp):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))


L, DRAWS = laws, {"bound": True, "check": Iwae.check}
WRONG = {
    "unchecked": (
        made(weighted),
        L.what_it_cannot_train_it_refuses,
        "check lets a VDM pass, and then: in continuous time",
    ),
    "curt": (
        made(lambda self, *given: elbo(*given), check=only_a_vae),
        L.what_it_cannot_train_it_refuses,
        "check of a VDM says 'no', which is no sentence",
    ),
    "mean": (
        of_bound(lambda bound: -bound.total.mean()),
        L.one_finite_number_per_example,
        r"\(\) for 6 examples of a VAE",
    ),
    "infinite": (
        of_bound(lambda bound: -bound.total / 0),
        L.one_finite_number_per_example,
        "not finite of a VAE",
    ),
    "steep": (
        of_bound(lambda bound: (bound.total - bound.total.detach()).abs().sqrt()),
        L.one_finite_number_per_example,
        "the gradient of encoders.* not finite",
    ),
    "detached": (
        of_bound(lambda bound: -bound.total.detach()),
        L.one_finite_number_per_example,
        "has no gradient",
    ),
    "another without gradients": (
        of_bound(lambda bound: -bound.total - float(torch.is_grad_enabled())),
        L.one_finite_number_per_example,
        "another number of a VAE where there are no gradients",
    ),
    "unkeyed": (
        made(lambda self, model, x, y, noise: elbo(model, x, y, None)),
        L.an_example_keeps_its_number,
        "the same draws give another number of a VAE",
    ),
    "by place": (
        of_bound(lambda bound: -bound.total * torch.arange(len(bound.total))),
        L.an_example_keeps_its_number,
        "depends on its place",
    ),
    "whitened": (
        of_bound(lambda bound: bound.total.mean() - bound.total),
        L.an_example_keeps_its_number,
        "depends on its batch",
    ),
    "unlabelled": (
        made(lambda self, model, x, y, noise: elbo(model, x, None, noise)),
        L.labels_are_passed_on,
        "labels do not matter to a VAE",
    ),
    "moves": (made(moves), L.the_model_is_left_as_it_was, "parameters of a VAE are no more"),
    "freezes": (made(freezes), L.the_model_is_left_as_it_was, "that learn of a VAE are no more"),
    "goes back": (made(goes_back), L.the_model_is_left_as_it_was, "have gradients before"),
    "evaluates": (
        made(lambda self, model, *given: elbo(model.eval(), *given)),
        L.the_model_is_left_as_it_was,
        "modes of a VAE are no more",
    ),
    "no rate": (
        of_bound(lambda bound: bound.rate.detach() - bound.reconstruction, check=L2.check),
        L.what_the_bound_trains_is_trained,
        "of a MHVAE no gradient reaches encoders.1.*decoders.1",
    ),
    "top alone": (
        of_bound(lambda bound: bound.prior - bound.reconstruction, check=L2.check),
        L.what_the_bound_trains_is_trained,
        "of a MHVAE no gradient reaches decoders.1",
    ),
    "weighed by itself": (
        of_bound(lambda bound: bound.total.detach() * bound.total),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "half a rate": (
        of_bound(lambda bound: bound.rate / 2 + bound.rate.detach() / 2 - bound.reconstruction),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "a surrogate that says nothing": (
        of_rungs(lambda share, log_p, path: (log_p + path).sum(1), k=1, surrogate=False),
        L.the_gradient_is_that_of_the_value,
        "± 0 from .*, which differences give",
    ),
    "half a path": (
        of_rungs(lambda share, log_p, path: (log_p + path / 2).sum(1), k=1),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "no path": (
        of_rungs(lambda share, log_p, path: (share * log_p).sum(1)),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "shares of the path not squared": (
        of_rungs(lambda share, log_p, path: (share * (log_p + path)).sum(1)),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "shares of the path squared amid a warm-up": (
        of_rungs(lambda share, log_p, path: (share * log_p + share**2 * path).sum(1), beta=0.5),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "shares of the decoder squared": (
        of_rungs(lambda share, log_p, path: (share**2 * (log_p + path)).sum(1)),
        L.the_gradient_is_that_of_the_value,
        "which differences give",
    ),
    "less": (
        of_bound(lambda bound: -bound.total - 1, bound=True),
        L.a_bound_is_one,
        r"nats above -log p\(x\) of LinearGaussianChain, which a bound is not",
    ),
    "more": (
        of_bound(lambda bound: 2 - bound.total, bound=True),
        L.a_bound_is_one,
        "which a bound is not",
    ),
    "without log k": (
        made(
            lambda self, model, x, y, noise: (
                -model.log_weight(x, y, noise=noise.each(0, 4), k=4).view(-1, 4).logsumexp(1)
            ),
            **DRAWS,
        ),
        L.a_bound_is_one,
        "which a bound is not",
    ),
    "labels lost": (
        made(lambda self, model, x, y, noise: -model.log_weight(x, noise=noise), **DRAWS),
        L.a_bound_is_one,
        r"above -log p\(x\|y\)",
    ),
    "deaf": (
        made(lambda self, *given: elbo(*given), advance=lambda self, step: None),
        L.it_knows_the_step_it_is_told,
        "step is None, told 0",
    ),
    "per drawn time": (
        made(
            lambda self, model, x, y, noise: model.denoising(x, y, noise=noise).eps_error,
            check=lambda self, model: genfw.Simple().check(model),
        ),
        L.the_times_drawn_do_not_matter,
        "for times .* for uniform times along a cosine",
    ),
    "per time after all": (
        PerTimeAfterAll,
        L.the_times_drawn_do_not_matter,
        "for schedule .* for uniform times along a cosine",
    ),
    "below zero": (ByTheLevel, L.weights_are_finite_and_never_negative, "a weight is negative"),
    "late": (Late, L.a_warm_up_is_its_beta, "at step 0 the rate does not count 0 times"),
    "elsewhere": (Elsewhere, L.a_warm_up_is_its_beta, "beta moves to another tensor"),
    "guesses": (Guesses, L.a_warm_up_is_its_beta, "a number comes before any step was told"),
    "saves": (Saves, L.a_warm_up_is_its_beta, "beta is saved"),
}


@pytest.mark.parametrize(("cls", "law", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_objective_is_found(cls, law, said):
    with pytest.raises(AssertionError, match=said):
        law(cls)


def test_every_law_finds_one():
    assert {law for _, law, _ in WRONG.values()} == set(OBJECTIVE_LAWS) == set(LAWS[Objective])


@pytest.mark.parametrize("law", [L.what_it_cannot_train_it_refuses, L.a_warm_up_is_its_beta])
def test_somebody_elses_warm_up_is_found_whole(law):
    law(Ramp)
