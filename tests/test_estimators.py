"""The reported number and its error bar."""

import dataclasses
import inspect
from functools import partial

import pytest
import torch
from test_vdm import network_vdm

import genfw
from genfw import VDM, BinsLikelihood, Bound, Cosine, Denoiser, Noise, Prediction, bits_per_dim
from genfw.amplitudes import broadcast
from genfw.model import LatentModel
from genfw.train.entries import named


def test_the_terms_make_up_the_number(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (8, 4))
    estimate = Bound(2, 8)(vdm, x, noise=Noise(0, torch.arange(8)))
    assert torch.allclose(estimate.nats, -estimate.elbo.total)
    assert estimate.nats.dtype == torch.float64 and (estimate.variance > 0).all()


def test_the_stated_variance_is_the_variance_found(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (4, 4))
    runs = [Bound(2, 4)(vdm, x, noise=Noise(seed, torch.arange(4))) for seed in range(150)]
    found = torch.stack([run.nats for run in runs]).var(0)
    stated = torch.stack([run.variance for run in runs]).mean(0)
    assert torch.allclose(stated / found, torch.ones(4), atol=0.45)


def test_stratified_times_have_the_smaller_variance(double):
    """A denoiser whose error depends on the noise level alone, steeply: all variance is in the
    choice of times."""

    class Steep(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = Cosine(7.9, -10.0)

        def forward(self, z, t, y=None):
            alpha, sigma = (broadcast(f(t), z) for f in (self.schedule.alpha, self.schedule.sigma))
            x = torch.ones_like(z) * 20
            return Prediction(x, (z - alpha * x) / sigma, alpha, sigma)

    vdm, x = VDM(Steep(), BinsLikelihood(17), shape=(4,)), torch.randint(17, (64, 4))
    noise = Noise(0, torch.arange(64))
    stratified = Bound(sets=8, strata=16, chunk=2**16)(vdm, x, noise=noise).variance.mean()
    plain = Bound(sets=128, strata=1, chunk=2**16)(vdm, x, noise=noise).variance.mean()
    assert stratified < 0.3 * plain


def test_uniform_log_snr_has_a_smaller_variance_than_the_training_schedule(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (200, 4))
    noise = Noise(0, torch.arange(200))
    straight = vdm.for_evaluation().elbo(x, noise=noise).total
    assert straight.var() < vdm.elbo(x, noise=noise).total.var()


def test_batches_and_order_leave_every_number_alone(double):
    vdm, x = network_vdm(Cosine(7.9, -10.0)), torch.randint(17, (9, 4))
    whole = Bound(2, 4)(vdm, x, noise=Noise(0, torch.arange(9)))
    for part in torch.randperm(9).split(2):
        alone = Bound(2, 4)(vdm, x[part], noise=Noise(0, part))
        assert torch.allclose(alone.nats, whole.nats[part], rtol=1e-12)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 20, 35, 1000])
def test_a_chunk_bounds_a_call_and_leaves_every_number_alone(chunk, labelled, double):
    """Against the definition: one elbo call a stratum, all images in it."""
    vdm, x = Recorded(network_vdm(Cosine(7.9, -10.0))), torch.randint(17, (5, 4))
    y = torch.arange(5) if labelled else None
    noise, model = Noise(0, torch.arange(5)), vdm.model.for_evaluation()
    means = []
    for r in range(2):
        of = noise.fold("set", r)
        elbos = [model.elbo(x, noise=of.stratified(j, 7)) for j in range(7)]
        means.append(sum(-elbo.total for elbo in elbos) / 7)
    found = Bound(2, 7, chunk=chunk)(vdm, x, y, noise=noise)
    torch.testing.assert_close(found.nats, sum(means) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.variance, torch.stack(means).var(0) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.nats, -found.elbo.total, rtol=1e-12, atol=0)
    rows = [len(seen) for seen, _ in vdm.calls]
    assert sum(rows) == 2 * 7 * 5 and max(rows) <= chunk
    assert max(rows) > chunk / 2 or chunk > 35
    for seen, given in vdm.calls:
        assert (given is None) == (y is None)
        assert y is None or torch.equal(seen, x[given])  # labels go with their images


class Recorded(LatentModel):
    """A model, and the images and labels of every call of its bound."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model.for_evaluation(), []

    def elbo(self, x, y=None, *, noise=None):
        self.calls.append((x, y))
        return self.model.elbo(x, noise=noise)

    def sample(self, n, y=None, *, noise=None):
        return self.model.sample(n, noise=noise)


def test_bits_per_dim():
    import math

    assert bits_per_dim(torch.tensor(8 * math.log(2) * 3072.0), 3072).item() == pytest.approx(8)


def test_bits_of_no_dimension_are_none():
    with pytest.raises(ValueError, match="dims: expected an integer of at least 1, got 0"):
        bits_per_dim(torch.tensor(1.0), 0)


def test_one_set_has_no_variance():
    with pytest.raises(ValueError, match="sets: expected an integer of at least 2"):
        Bound(sets=1)
    with pytest.raises(ValueError, match="chunk: expected an integer of at least 1"):
        Bound(chunk=0)


class Noisy(torch.nn.Module):
    """A network with dropout; a part of it, frozen, stays in evaluation."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.drop, self.map = torch.nn.Dropout(0.5), torch.nn.Linear(inputs, outputs)
        self.frozen = torch.nn.Dropout(0.5).eval()

    def forward(self, z, *_):
        return self.map(self.frozen(self.drop(z)))


def noisy_vae():
    return genfw.VAE(Noisy(4, 4), Noisy(2, 12), genfw.CategoricalLikelihood(3), latents=2)


def noisy_vdm(steps=None):
    denoiser = genfw.NetworkDenoiser(Noisy(4, 4), genfw.Eps(), Cosine(7.9, -10.0))
    return VDM(denoiser, BinsLikelihood(3), steps, shape=(4,))


MEASURED = [
    (Bound(2, 2), noisy_vae),
    (Bound(2, 2), noisy_vdm),
    (genfw.ImportanceWeighted(4), noisy_vae),
    (genfw.ImportanceWeighted(4), partial(noisy_vdm, 3)),
    (genfw.Annealed(chains=2, temperatures=3, leapfrog=1), noisy_vae),
    (genfw.ProbabilityFlow(draws=2, steps=4), noisy_vdm),
]


@pytest.mark.parametrize(("estimator", "built"), MEASURED, ids=lambda each: type(each).__name__)
def test_a_number_is_one_of_the_model_in_evaluation_and_leaves_every_mode_as_it_was(
    estimator, built
):
    model, x, noise = built(), torch.randint(3, (5, 4)), Noise(0, torch.arange(5))
    modes = [each.training for each in model.modules()]
    with torch.autocast("cpu", torch.bfloat16):
        found = estimator(model, x, noise=noise).nats
    assert [each.training for each in model.modules()] == modes and len({*modes}) == 2
    assert torch.equal(found, estimator(model.eval(), x, noise=noise).nats)
    assert not any(each.training for each in model.modules())


def test_a_mode_is_restored_after_a_failure_too():
    vdm = noisy_vdm()
    with pytest.raises(ValueError):
        Bound(2, 2)(vdm, torch.randint(3, (5, 7)))
    assert vdm.training and vdm.denoiser.training


def test_a_kind_of_vdm_is_measured_as_it_is(double):
    """Also where it is read at other steps or for evaluation: what it overrides counts."""

    class Dearer(VDM):
        price = 5.0

        def elbo(self, x, y=None, *, noise=None):
            terms = super().elbo(x, y, noise=noise)
            return dataclasses.replace(terms, prior=terms.prior + self.price)

    plain = network_vdm(Cosine(7.9, -10.0))
    dearer = Dearer(plain.denoiser, plain.likelihood, shape=plain.shape)
    dearer.price = 7.0
    x, noise = torch.randint(17, (4, 4)), Noise(0, torch.arange(4))
    paid = Bound(2, 2)(dearer, x, noise=noise).nats - Bound(2, 2)(plain, x, noise=noise).nats
    assert torch.allclose(paid, torch.full_like(paid, 7.0))
    read = dearer.eval().at(3)
    assert type(read) is Dearer and read.steps == 3 and dearer.steps is None and not read.training
    assert read.denoiser is dearer.denoiser and dearer.times is not read.for_evaluation().times


def test_what_samples_are_guided_by_is_no_part_of_a_model(double):
    plain = network_vdm(Cosine(7.9, -10.0))
    with pytest.raises(TypeError, match=r"guidance=.*Unguided"):
        VDM(genfw.Unguided(plain.denoiser), plain.likelihood)


OTHERWISE = {  # than by default; chunks change how a number is come by and not the number
    *((genfw.Bound, name, value) for name, value in {"sets": 3, "strata": 7}.items()),
    (genfw.ImportanceWeighted, "k", 7),
    *(
        (genfw.ProbabilityFlow, name, value)
        for name, value in {
            "draws": 3,
            "dequantization": "uniform",
            "tolerance": 0.5,
            "steps": 9,
            "exact_dims": 5,
            "probe": "gaussian",
            "k": 3,
        }.items()
    ),
    *(
        (genfw.Annealed, name, value)
        for name, value in {
            "temperatures": 7,
            "chains": 7,
            "leapfrog": 3,
            "step": 0.5,
            "from_encoder": True,
        }.items()
    ),
}


def test_all_arguments_of_all_estimators_are_looked_at():
    asked = {(cls, name) for cls, name, _ in OTHERWISE}
    for cls in genfw.Estimator.registry.values():
        taken = set(inspect.signature(cls).parameters) - {"chunk"}
        assert {name for of, name in asked if of is cls} == taken


@pytest.mark.parametrize(("cls", "name", "value"), sorted(OTHERWISE, key=str))
def test_an_entry_says_what_its_number_was_made_by(cls, name, value):
    """Numbers made otherwise do not replace each other, and a certificate tells them apart."""
    assert cls(**{name: value}).extra_repr() != cls().extra_repr()


def test_an_estimator_that_says_nothing_of_itself_is_told_apart_by_what_was_typed():
    class Silent(Bound, name="silent_test"):
        def extra_repr(self):
            return ""

    names = {named(Silent(), "best", [f"estimator.strata={n}"]) for n in (2, 4)}
    assert names == {f"silent_test() of best, estimator.strata={n}" for n in (2, 4)}
