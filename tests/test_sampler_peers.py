"""Trajectories equal to those of diffusers, under the same noise, noise levels and network.

Its schedulers hold the levels of T = 1000 discrete times in float32; a grid gives ours the same
levels. What its last step does (to no noise at all) has no counterpart here and is left out.
"""

import diffusers as peers
import pytest
import torch

from genfw import DDIM, Ancestral, DPMSolver, DPMSolverSDE, LogLinear, Noise, TimeGrid
from genfw.testing.oracles import MixtureDenoiser

SETTINGS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading", "steps_offset": 1}


class Given(TimeGrid):
    """At these levels of log SNR."""

    def __init__(self, log_snr):
        super().__init__()
        self.log_snr = log_snr

    def between(self, u, schedule):
        return schedule.inverse(self.log_snr[1:-1])


class Key:
    """The draws that genfw's samplers ask for, for a scheduler that takes a tensor of noise."""

    def __init__(self, noise, steps, like):
        self.noise, self.steps, self.like = noise, steps, like

    def __getitem__(self, i):
        return self.noise.fold(f"z{self.steps - i}").normal("sample", self.like)


def ddpm(**more):
    return peers.DDPMScheduler(variance_type="fixed_small", clip_sample=False, **SETTINGS, **more)


def ddim(**more):
    return peers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SETTINGS, **more)


def dpm(kind):
    return peers.DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_order=2, lower_order_final=False, **SETTINGS
    )


def told(noise):
    return {"variance_noise": noise}


@pytest.mark.parametrize(
    ("ours", "theirs", "random"),
    [
        (lambda n, grid: DDIM(n, 0.0, grid), ddim, lambda noise: {}),
        (lambda n, grid: DDIM(n, 0.6, grid), ddim, lambda noise: {"eta": 0.6, **told(noise)}),
        (Ancestral, ddpm, None),
        (DPMSolver, lambda: dpm("dpmsolver++"), lambda noise: {}),
        (DPMSolverSDE, lambda: dpm("sde-dpmsolver++"), told),
    ],
    ids=["ddim", "ddim_eta", "ddpm", "dpm_solver", "dpm_solver_sde"],
)
def test_trajectory(ours, theirs, random, monkeypatch):
    scheduler, steps = theirs(), 20
    scheduler.set_timesteps(steps + 1)
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    log_snr = kept.logit()
    schedule = LogLinear(log_snr[-1].item(), log_snr[0].item())
    means = torch.tensor([[-0.7, 0.2, 0.1], [0.5, -0.4, 0.6]])
    denoiser = MixtureDenoiser(schedule, means, 0.2)

    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    noise = Noise(0, torch.arange(6))
    sampler = ours(steps, Given(log_snr))
    path, times = list(sampler.path(denoiser, z, noise=noise)), sampler.times(schedule)
    drawn = Key(noise, steps, z)
    for i, step in enumerate(path):
        if random is None:  # DDPMScheduler draws by itself
            draw = f"{type(scheduler).__module__}.randn_tensor"
            monkeypatch.setattr(draw, lambda *_, i=i, **__: drawn[i])
        more = {} if random is None else random(drawn[i])
        eps = denoiser(z, times[i]).eps
        z = scheduler.step(eps, scheduler.timesteps[i], z, **more).prev_sample
        assert torch.allclose(z, step.z, rtol=1e-4, atol=1e-4), f"step {i}"
