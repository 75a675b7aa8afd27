"""Down the chain."""

import pytest
import torch
from oracles import FiniteDenoiser, GaussianDenoiser

from genfw import Ancestral, Cosine, Noise, NoiseSchedule, Sampler

ALL = pytest.mark.parametrize("cls", Sampler.registry.values())


@ALL
def test_the_finite_data_oracle_returns_training_points(cls, double):
    points = torch.randn(5, 2, 2)
    schedule = Cosine(12.0, -12.0)
    z = cls(steps=100)(FiniteDenoiser(schedule, points), torch.randn(64, 2, 2))
    nearest = (z[:, None] / schedule.alpha(torch.tensor(0.0)) - points).flatten(2).norm(dim=2)
    assert nearest.min(1).values.max() < 0.05
    assert len(nearest.argmin(1).unique()) == 5


@ALL
def test_chunks_and_order_leave_every_sample_alone(cls, double):
    denoiser = GaussianDenoiser(Cosine(9.0, -9.0), 0.3, 0.4)
    z = torch.randn(8, 3)
    whole = cls(steps=6)(denoiser, z, noise=Noise(0, torch.arange(8)))
    for part in torch.randperm(8).split(3):
        assert torch.allclose(cls(steps=6)(denoiser, z[part], noise=Noise(0, part)), whole[part])


@pytest.mark.parametrize("schedule", NoiseSchedule.registry.values())
def test_one_ancestral_step_is_the_posterior_with_the_guess(schedule, double):
    """Luo (94): mean and variance of many draws of one step."""
    from genfw import posterior

    denoiser = GaussianDenoiser(schedule(9.0, -9.0), 0.3, 0.4)
    z, s, t = torch.full((50_000, 1), 0.7), torch.tensor(0.4), torch.tensor(0.6)
    z_s, prediction = Ancestral(1).step(
        denoiser, z, t, s, None, noise=Noise(0, torch.arange(50_000))
    )
    q = posterior(z, prediction.x, s, t, denoiser.schedule)
    assert abs(z_s.mean() - q.mean[0]) < 5 * q.std[0] / 50_000**0.5
    assert abs(z_s.std() / q.std[0, 0] - 1) < 0.02


def test_the_path_ends_where_the_loop_does_and_the_last_time_is_zero(double):
    denoiser, z, noise = (
        GaussianDenoiser(Cosine(9.0, -9.0), 0.3, 0.4),
        torch.randn(4, 3),
        Noise(0, torch.arange(4)),
    )
    path = list(Ancestral(5).path(denoiser, z, noise=noise))
    assert len(path) == 5 and path[-1].s == 0
    assert torch.equal(path[-1].z, Ancestral(5)(denoiser, z, noise=noise))
    assert path[0].prediction.x.shape == z.shape


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Ancestral(steps=0)
