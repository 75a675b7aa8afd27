"""Every likelihood is a mass over its K values, whatever it is given."""

import pytest
import torch

from genfw import (
    BernoulliLikelihood,
    BinsLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    DiscretizedLogistic,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    Likelihood,
    LogisticMixtureLikelihood,
)
from genfw.bayes import DiscretePosterior

MASSES = [cls for cls in Likelihood.registry.values() if not cls.density]


def make(cls, bins=None):
    return cls(bins=bins or (2 if cls is BernoulliLikelihood else 17))


def heads(likelihood, n):
    """What this likelihood may be given for n copies of one dimension: network outputs, or a
    diffusion model's pair."""
    if not isinstance(likelihood, BinsLikelihood):
        for size in (1.0, 30.0, 1e4):
            yield (size * torch.randn(1, likelihood.outputs)).expand(n, -1)
            yield torch.full((n, likelihood.outputs), -size)
    if isinstance(likelihood, BinsLikelihood | DiscretizedGaussianLikelihood):
        for where in (-3.0, 0.31, 0.999):
            for width in (1e-3, 0.05, 3.0):
                yield torch.full((n, 1), where), torch.full((n, 1), width)


@pytest.mark.parametrize("cls", MASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extremes(cls, dtype):
    likelihood = make(cls)
    x = torch.arange(likelihood.bins).view(-1, 1)
    for head in heads(likelihood, likelihood.bins):
        parts = head if isinstance(head, tuple) else (head,)
        parts = tuple(part.to(dtype, copy=True).requires_grad_() for part in parts)
        likelihood(parts if isinstance(head, tuple) else parts[0]).log_prob(x).sum().backward()
        assert all(part.grad.dtype == dtype and part.grad.isfinite().all() for part in parts)


@pytest.mark.parametrize(
    "cls", [CategoricalLikelihood, DiscretizedGaussianLikelihood, DiscretizedLogisticLikelihood]
)
def test_images_and_flat_data_are_read_alike(cls, double):
    likelihood = cls(bins=5)
    x = torch.randint(5, (3, 2, 4, 4))
    h = torch.randn(3, 2 * likelihood.outputs, 4, 4)
    image = likelihood(h).log_prob(x)
    flat = likelihood(h.flatten(1)).log_prob(x.flatten(1))
    assert torch.allclose(image, flat)


def test_discretized_logistic_reads_means_then_log_scales(double):
    """Log scales end at -9 and 3."""
    likelihood, x = DiscretizedLogisticLikelihood(bins=5), torch.randint(5, (6, 2))
    where = torch.randn(6, 2)
    for log_scale, read in ((-1.0, -1.0), (0.5, 0.5), (-8.9, -8.9), (-50.0, -9.0), (50.0, 3.0)):
        h = torch.cat([where, torch.full((6, 2), log_scale)], 1)
        expected = DiscretizedLogistic(where, torch.tensor(read).exp(), 5)
        torch.testing.assert_close(likelihood(h).log_prob(x), expected.log_prob(x))


def test_every_channel_has_its_own_outputs(double):
    likelihood = CategoricalLikelihood(bins=5)
    h, x = torch.randn(1, 10, 1, 1), torch.tensor([[[[4]], [[1]]]])
    table = h.view(5, 2).log_softmax(0)  # (outputs, C)
    assert likelihood(h).log_prob(x).item() == pytest.approx((table[4, 0] + table[1, 1]).item())


def test_gaussian_is_a_density_of_real_numbers(double):
    likelihood = GaussianLikelihood()
    assert likelihood.density and likelihood.bins is None
    x = torch.randn(4, 3)
    assert likelihood.normalize(x) is x
    for wrong in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match=r"expected finite numbers, got 1 .* in example 1 of"):
            likelihood.normalize(torch.tensor([[0.0, 1.0], [wrong, 0.0]]))
    with pytest.raises(TypeError, match="density over real numbers"):
        likelihood.normalize(torch.zeros(4, 3, dtype=torch.uint8))
    grid = torch.linspace(-30, 30, 20_001).view(-1, 1)
    h = torch.tensor([[0.3, 0.5]]).expand(20_001, -1)
    assert torch.trapezoid(likelihood(h).log_prob(grid).exp(), grid[:, 0]).item() == pytest.approx(
        1
    )


@pytest.mark.parametrize("cls", MASSES)
def test_what_is_not_integers_in_range_is_refused(cls):
    likelihood = make(cls)
    with pytest.raises(TypeError, match=r"expected integers 0..*, got torch.float32: pass the raw"):
        likelihood.normalize(torch.rand(2, 3))
    with pytest.raises(ValueError, match=rf"bins={likelihood.bins}.*got 0..{likelihood.bins}"):
        likelihood.normalize(torch.tensor([[0, likelihood.bins]]))


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda")
    is_cuda = True


def test_on_a_gpu_every_reported_number_is_of_values_that_were_looked_at(monkeypatch):
    likelihood, x = BernoulliLikelihood(), torch.tensor([[0, 255]]).as_subclass(OnGpu)
    nan = torch.tensor([[0, torch.nan]]).as_subclass(OnGpu)
    likelihood.normalize(x)  # a training step would wait for the look
    GaussianLikelihood().normalize(nan)
    for unseen in (torch.no_grad, torch.inference_mode):
        with unseen(), monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            likelihood.normalize(x)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            with pytest.raises(ValueError, match=r"got 0..255: set bins"):
                likelihood.normalize(x)
            with pytest.raises(ValueError, match="got 1 NaN or infinite"):
                GaussianLikelihood().normalize(nan)
            likelihood.normalize(torch.zeros(2, 3, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("cls", [cls for cls in MASSES if cls is not BernoulliLikelihood])
def test_bytes_of_all_256_values_are_taken(cls):
    likelihood = cls(bins=256)
    x = torch.arange(256).to(torch.uint8).view(2, 128)
    assert torch.equal(likelihood.normalize(x), likelihood.normalize(x.long()))


def test_wrong_bins_and_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="use likelihood=categorical"):
        BernoulliLikelihood(bins=17)
    with pytest.raises(ValueError, match="at least 2"):
        CategoricalLikelihood(bins=1)
    with pytest.raises(ValueError, match="17 channels per data channel, got 18"):
        CategoricalLikelihood(bins=17)(torch.zeros(2, 18))
    for cls in (DiscretizedGaussianLikelihood, DiscretizedLogisticLikelihood):
        with pytest.raises(ValueError, match=f"likelihood {cls.name} needs 2 channels .* got 3"):
            cls(bins=17)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="likelihood gaussian needs 2 channels"):
        GaussianLikelihood()(torch.zeros(2, 3))
    pair = torch.zeros(2, 1), torch.ones(2, 1)
    for cls in (CategoricalLikelihood, DiscretizedLogisticLikelihood, LogisticMixtureLikelihood):
        with pytest.raises(TypeError, match="use bins or discretized_gaussian"):
            cls(bins=17)(pair)
    with pytest.raises(ValueError, match="40 channels per data channel, got 50"):
        LogisticMixtureLikelihood(bins=17)(torch.zeros(2, 50))
    for components in (0, True):
        with pytest.raises(ValueError, match="components: expected an integer of at least 1"):
            LogisticMixtureLikelihood(bins=17, components=components)
    with pytest.raises(TypeError, match="use categorical"):
        BinsLikelihood(bins=17)(torch.zeros(2, 17))


@pytest.mark.parametrize("cls", Likelihood.registry.values(), ids=Likelihood.registry)
def test_what_came_is_named_and_who_takes_it(cls):
    """Each of the three heads is taken, or refused by its name; the likelihoods that are named
    instead take it."""
    pair, numbers = (torch.zeros(2, 1), torch.ones(2, 1)), torch.zeros(2, 2, 1)
    heads = {
        "a network's output": lambda likelihood: torch.zeros(2, likelihood.outputs),
        "a diffusion model's pair": lambda _: pair,
        "a diffusion model's posterior": lambda _: DiscretePosterior(numbers, *pair, pair[1], 2),
    }
    made = {name: make(each, 2) for name, each in Likelihood.registry.items() if not each.density}
    likelihood, refused = made.get(cls.name) or cls(), []
    for came, head in heads.items():
        try:
            likelihood(head(likelihood))
        except TypeError as error:
            refused.append(came)
            said, advice = str(error).split(": use ")
            assert said.startswith(f"likelihood {cls.name} reads ") and f"got {came}" in said
            for name in advice.removesuffix(" there").split(" or "):
                made[name](head(made[name]))
    assert len(refused) in (1, 2), "takes all, or none"


@pytest.mark.parametrize("cls", MASSES)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalized_data_are_in_float32_at_least(cls, default):
    """Whatever torch's default: in half precision neighbours of 256 values would be one."""
    likelihood = make(cls)
    x = torch.arange(likelihood.bins).view(1, -1)
    torch.set_default_dtype(default)
    try:
        data = likelihood.normalize(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert data.dtype == torch.promote_types(default, torch.float32)
    assert torch.allclose(data[0].double(), likelihood.centres(), rtol=0, atol=1e-7)
