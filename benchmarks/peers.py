"""genfw beside its named peers: make peers, or python benchmarks/peers.py [rounds] [threads]

Side by side in one process, in turn, the best of all rounds of each; a ratio is theirs to genfw's,
above 1 where genfw is the quicker.

* A training step of a VAE 784-[200 tanh, 200 tanh]-50, Bernoulli, batches of 100, fused Adam, as
  each trains: a LatentModule under `Trainer.fit`, with what `python -m genfw` brings (average of
  the weights, gradient norms, throughput) and without; Pythae's BaseTrainer; Pyro's SVI with
  TraceMeanField_ELBO in a loop of one's own. Time is of steps alone, no checkpoints.
* -log p(x) of 20 images by 5000 importance weights, of one trained VAE: the three have the same
  networks and weights, and should have the same nats.
* A denoising training step (the unweighted error of eps, Adam, batches of 64) and sampling (64
  images) with one U-Net of 8x8 images, beside diffusers' schedulers in the loops of its manual.

Images of the VAE are scikit-learn's digits, three times as large, a pixel being 1 as often as it is
black.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from importlib.metadata import version

import diffusers
import numpy as np
import pyro
import torch
import torch.nn.functional as F
from pyro import distributions
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.importance import vectorized_importance_weights
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training_step import BATCH, IMAGES, SHAPE, STEPS, Clock, fit, vae

import genfw
from genfw.nets import UNet
from genfw.train.data import ImageData, Source, Split, Splits
from genfw.train.ema import EMA
from genfw.train.memory import keep_freed_memory
from genfw.train.module import LatentModule
from genfw.train.stability import Stability
from genfw.train.watch import Watch

K, CHUNK, TEST = 5000, 2500, 20
LEARNING_RATE, BETAS = 1e-3, "squaredcos_cap_v2"
adam = partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)


def bitmaps(n: int) -> Tensor:
    """(n, 1, 28, 28) of 0 and 1: the digits, as often as it takes, 1 where they are black."""
    ink = load_digits().images[np.arange(n) % 1797] / 16
    large = torch.from_numpy(np.pad(np.kron(ink, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2))))
    drawn = torch.rand(large.shape, generator=torch.Generator().manual_seed(0)) < large
    return drawn.to(torch.uint8).unsqueeze(1)


class Bitmaps(Source):
    def read(self, shape, path):
        images = Split(bitmaps(IMAGES).numpy(), np.zeros(IMAGES, dtype=np.int64))
        return Splits(images, images, images)


class Encoder(BaseEncoder):
    """genfw's encoder, as Pythae asks one."""

    def __init__(self, model: genfw.VAE):
        super().__init__()
        self.network = model.encoder

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_std = self.network(x - 0.5).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=2 * log_std)


class Decoder(BaseDecoder):
    def __init__(self, model: genfw.VAE):
        super().__init__()
        self.network = model.decoder

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.network(z).sigmoid())


def in_pythae(model: genfw.VAE) -> VAE:
    config = VAEConfig(input_dim=SHAPE, latent_dim=50, reconstruction_loss="bce")
    return VAE(config, Encoder(model), Decoder(model))


class InPyro:
    """A model and a guide of genfw's networks."""

    def __init__(self, model: genfw.VAE):
        self.networks = model

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.networks.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", distributions.Normal(torch.zeros(len(x), 50), 1.0).to_event(1))
            logits = self.networks.decoder(z.reshape(-1, 50)).reshape(*z.shape[:-1], 784)
            seen = distributions.Bernoulli(logits=logits, validate_args=False).to_event(1)
            pyro.sample("x", seen, obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.networks.encoder)
        with pyro.plate("images", len(x)):
            mean, log_std = self.networks.encoder(x - 0.5).chunk(2, 1)
            pyro.sample("z", distributions.Normal(mean, log_std.exp()).to_event(1))


def train_genfw(callbacks: bool = True) -> float:
    data = ImageData(Bitmaps(), SHAPE, 2, 1, raw_bins=2, batch_size=BATCH)
    more = (EMA(), Stability(), Watch()) if callbacks else ()
    return fit(LatentModule(vae(), genfw.Elbo(), adam), data, *more)


def train_pythae() -> float:
    class Ticks(TrainingCallback):
        def on_train_step_end(self, training_config, **kwargs):
            clock()

    clock, images = Clock(), bitmaps(IMAGES)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        config = BaseTrainerConfig(
            folder,
            per_device_train_batch_size=BATCH,
            num_epochs=-(-STEPS * BATCH // IMAGES),
            learning_rate=LEARNING_RATE,
            optimizer_params={"fused": True},
            no_cuda=True,
        )
        data = BaseDataset(images, torch.zeros(IMAGES))
        BaseTrainer(in_pythae(vae()), data, training_config=config, callbacks=[Ticks()]).train()
    return clock.seconds


def train_pyro() -> float:
    pyro.clear_param_store()
    clock, images, both = Clock(), bitmaps(IMAGES), InPyro(vae())
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE, "fused": True})
    svi = SVI(both.model, both.guide, optimizer, TraceMeanField_ELBO())
    for _ in range(STEPS):
        svi.step(images[torch.randint(IMAGES, (BATCH,))].float())
        clock()
    return clock.seconds


def trained() -> genfw.VAE:
    """600 steps of the images that are not tested: the encoder is near the posterior, and 5000
    weights are worth 27 or more (`ess`). Before and after it can be 1, and then the number of any
    of the three differs by tenths of a nat from seed to seed."""
    torch.manual_seed(0)
    model, images = vae(), bitmaps(1797)[TEST:]
    optimizer = adam(model.parameters())
    for _ in range(600):
        optimizer.zero_grad()
        (-model.elbo(images[torch.randint(len(images), (BATCH,))]).total.mean()).backward()
        optimizer.step()
    return model.eval()


def nll_genfw(model: genfw.VAE, images: Tensor) -> float:
    return genfw.ImportanceWeighted(K, CHUNK)(model, images).nats.mean().item()


@torch.no_grad()
def nll_pythae(model: genfw.VAE, images: Tensor) -> float:
    return -float(in_pythae(model).eval().get_nll(images.float(), n_samples=K, batch_size=CHUNK))


@torch.no_grad()
def nll_pyro(model: genfw.VAE, images: Tensor) -> float:
    both, nats = InPyro(model), []
    for x in images.float().split(1):
        log_w = [
            vectorized_importance_weights(
                both.model, both.guide, x, num_samples=CHUNK, max_plate_nesting=1, normalized=False
            )[0].flatten()
            for _ in range(K // CHUNK)
        ]
        nats.append(np.log(K) - torch.cat(log_w).logsumexp(0).item())
    return float(np.mean(nats))


def an_image(nll: Callable[..., float], model: genfw.VAE, images: Tensor) -> float:
    """Its seconds."""
    start = time.perf_counter()
    nll(model, images)
    return (time.perf_counter() - start) / len(images)


def denoiser() -> genfw.NetworkDenoiser:
    torch.manual_seed(0)
    network = UNet((1, 8, 8), bins=17)
    return genfw.NetworkDenoiser(network, genfw.Eps(), genfw.Cosine(7.9, -10.0))


def denoise_genfw() -> float:
    model, clock = genfw.VDM(denoiser(), genfw.BinsLikelihood(17)), Clock()
    objective, optimizer, x = genfw.Simple(), adam(model.parameters()), digits(64)
    for _ in range(STEPS):
        optimizer.zero_grad()
        objective(model, x).mean().backward()
        optimizer.step()
        clock()
    return clock.seconds


def denoise_diffusers() -> float:
    scheduler, network = diffusers.DDPMScheduler(beta_schedule=BETAS), denoiser().network
    optimizer, x = adam(network.parameters()), (2 * digits(64).float() + 1) / 17 - 1
    level, clock = scheduler.alphas_cumprod.logit() / 10, Clock()
    for _ in range(STEPS):
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        loss = F.mse_loss(network(scheduler.add_noise(x, noise, t), level[t]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock()
    return clock.seconds


def digits(n: int) -> Tensor:
    return torch.from_numpy(load_digits().images[:n]).long().unsqueeze(1)


def sample_genfw(denoiser: genfw.NetworkDenoiser, sampler: genfw.Sampler) -> None:
    sampler(denoiser, torch.randn(64, 1, 8, 8))


@torch.no_grad()
def sample_diffusers(network: nn.Module, scheduler, steps: int) -> None:
    z = torch.randn(64, 1, 8, 8)
    level = scheduler.alphas_cumprod.logit() / 10
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, level[t].expand(len(z))), t, z).prev_sample


@torch.no_grad()
def call(network: nn.Module, steps: int) -> None:
    z, level = torch.randn(64, 1, 8, 8), torch.zeros(64)
    for _ in range(steps):
        network(z, level)


def compare(what: str, rounds: int, **ways: Callable[[], object]) -> None:
    """A row for each way: milliseconds, those that it returns of its own clock or those that it
    takes."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            torch.manual_seed(0)
            start = time.perf_counter()
            own = way()
            taken = own if isinstance(own, float) else time.perf_counter() - start
            best[name] = min(best[name], 1e3 * taken)
    for name, each in best.items():
        print(f"| {what} | {name} | {each:.2f} | {each / best['genfw']:.2f} |", flush=True)


def main() -> None:
    given = [int(each) for each in sys.argv[1:]]
    rounds, threads = (*given, *(3, 1)[len(given) :])
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    keep_freed_memory()
    named = [f"{name} {version(name)}" for name in ("torch", "pythae", "pyro-ppl", "diffusers")]
    print(f"best of {rounds} rounds, {threads} thread(s), {', '.join(named)}\n")
    print("| | | ms | of genfw |\n|---|---|---|---|")
    ways = {
        "genfw": train_genfw,
        "genfw, callbacks=none": partial(train_genfw, False),
        "pythae": train_pythae,
        "pyro": train_pyro,
    }
    compare("a training step of the VAE", rounds, **ways)

    model, images = trained(), bitmaps(TEST)
    nats = {"genfw": nll_genfw, "pythae": nll_pythae, "pyro": nll_pyro}
    for name, way in nats.items():
        said = [way(model, images) for _ in range(3)]
        spread = f"{np.mean(said):.3f} ± {np.std(said, ddof=1) / np.sqrt(3):.3f}"
        print(f"| -log p(x) in nats, three times | {name} | {spread} | |")
    seconds = {name: partial(an_image, way, model, images) for name, way in nats.items()}
    compare("5000 weights of an image", rounds, **seconds)

    compare("a training step of eps", rounds, genfw=denoise_genfw, diffusers=denoise_diffusers)
    field = denoiser().eval()
    for what, steps, sampler, scheduler in (
        ("ancestral", 64, genfw.Ancestral, diffusers.DDPMScheduler),
        ("DPM-Solver++ (2M)", 20, genfw.DPMSolver, diffusers.DPMSolverMultistepScheduler),
    ):
        ways = {
            "genfw": partial(sample_genfw, field, sampler(steps)),
            "diffusers": partial(
                sample_diffusers, field.network, scheduler(beta_schedule=BETAS), steps
            ),
            "the network alone": partial(call, field.network, steps),
        }
        compare(f"{steps} steps, {what}", rounds, **ways)


if __name__ == "__main__":
    main()
