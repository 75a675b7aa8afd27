"""The score of 2-D data, learned and exact.

    python examples/score_field.py [out=docs/images/score_field.png] [steps=6000] [seed=0]

A VDM (param=score, a normal density as its decoder) is trained on samples of a mixture of eight
normals and on 500 points of two half moons by denoising score matching, objective `simple`. Its
field, `Prediction.score`, is drawn beside the exact one, which both data have in closed form: a
mixture of normals, and the softmax-weighted mean of the finite set. Error: E ||sigma (score_hat -
score)||^2 / E ||sigma score||^2 over z ~ p_t, at the time drawn and summed over levels of log SNR.

References:
    Generative Modeling by Estimating Gradients of the Data Distribution, Song, Ermon, 2019,
    https://arxiv.org/abs/1907.05600.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor
from torch.utils.data import DataLoader

import genfw
from genfw.nets import MLP
from genfw.testing.oracles import FiniteDenoiser, MixtureDenoiser
from genfw.train.data import Batch
from genfw.train.module import LatentModule, warmup_cosine

BATCH, SHOWN, LONG = 256, 4.0, 0.2
"""Examples a step; the log SNR at which fields are drawn; and how long the longest arrows are, but
for one in ten of the exact field."""


def circle(schedule: genfw.NoiseSchedule) -> MixtureDenoiser:
    """Eight normals on a circle."""
    angle = torch.arange(8) * math.pi / 4
    return MixtureDenoiser(schedule, 0.7 * torch.stack([angle.cos(), angle.sin()], 1), 0.08)


def moons(schedule: genfw.NoiseSchedule) -> FiniteDenoiser:
    """500 points of two half moons."""
    points, _ = make_moons(500, noise=0.05, random_state=0)
    points = torch.tensor(points, dtype=torch.float32)
    return FiniteDenoiser(schedule, (points - points.mean(0)) / 1.5)


def drawn(exact: MixtureDenoiser, n: int, seed: int) -> Tensor:
    """n examples of the data, (n, 2)."""
    made = torch.Generator().manual_seed(seed)
    which = torch.randint(len(exact.means), (n,), generator=made)
    return exact.means[which] + exact.std * torch.randn(n, 2, generator=made)


def trained(exact: MixtureDenoiser, steps: int, seed: int) -> genfw.VDM:
    torch.manual_seed(seed)
    network = MLP((2,), width=64, blocks=3)
    denoiser = genfw.NetworkDenoiser(network, genfw.Score(), exact.schedule)
    model = genfw.VDM(denoiser, genfw.GaussianLikelihood(), shape=(2,))
    module = LatentModule(
        model,
        genfw.Simple(),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0),
        scheduler=warmup_cosine,
        seed=seed,
    )
    x = drawn(exact, steps * BATCH, seed)
    label, index = torch.zeros(BATCH, dtype=torch.long), torch.arange(BATCH)
    batches = [Batch(some, label, index) for some in x.split(BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return model.eval()


@torch.no_grad()
def field_error(model: genfw.VDM, exact: MixtureDenoiser, log_snr: Tensor, n: int = 10000) -> float:
    """The share of E ||sigma score||^2 that is wrong, over z ~ p_t at these levels."""
    wrong = there = 0.0
    for i, t in enumerate(exact.schedule.inverse(log_snr)):
        noise = genfw.Noise(1000 + i, torch.arange(n))
        z = genfw.marginal(drawn(exact, n, seed=1000 + i), t, exact.schedule).sample(noise)
        truth, found = exact(z, t), model.denoiser(z, t)
        wrong += float((found.sigma * (found.score - truth.score)).square().sum())
        there += float((truth.sigma * truth.score).square().sum())
    return wrong / there


@torch.no_grad()
def field(denoiser: genfw.Denoiser) -> tuple[Tensor, Tensor]:
    """A grid of z and sigma * score there, at log SNR `SHOWN`, (n, 2) each."""
    at = torch.linspace(-1.2, 1.2, 21)
    z = torch.cartesian_prod(at, at)
    p = denoiser(z, denoiser.schedule.inverse(torch.tensor(SHOWN)))
    return z, p.sigma * p.score


def draw(axes: Axes, denoiser: genfw.Denoiser, data: Tensor, title: str, scale: float) -> None:
    """The field over noisy data, arrows of length |sigma * score| / `scale`."""
    z, arrows = field(denoiser)
    t = denoiser.schedule.inverse(torch.tensor(SHOWN))
    noisy = genfw.marginal(data, t, denoiser.schedule).sample(
        genfw.Noise(0, torch.arange(len(data)))
    )
    axes.plot(*noisy.T.numpy(), ".", color="0.75", ms=2, zorder=0)
    axes.quiver(
        *z.T.numpy(),
        *arrows.T.numpy(),
        angles="xy",
        scale_units="xy",
        scale=scale,
        color="C0",
        width=0.004,
    )
    axes.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))


def main(out: str = "docs/images/score_field.png", steps: str = "6000", seed: str = "0") -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    figure = Figure(figsize=(7, 7), dpi=65, layout="constrained")
    rows = FigureCanvasAgg(figure).figure.subplots(2, 2)
    for axes, data in zip(rows, (circle, moons)):
        exact = data(genfw.Cosine(log_snr_max=8.0, log_snr_min=-8.0))
        start = time.process_time()
        model = trained(exact, int(steps), int(seed))
        seconds = time.process_time() - start
        everywhere = field_error(model, exact, torch.linspace(-7, 5, 25))
        shown = field_error(model, exact, torch.tensor([SHOWN]))
        print(
            f"{data.__name__}: {seconds:.0f} s of CPU; of the mean square of sigma score, wrong: "
            f"{100 * everywhere:.2f} % over log SNR -7..5, {100 * shown:.2f} % at {SHOWN:g}"
        )
        sample = drawn(exact, 500, seed=7)
        scale = float(field(exact)[1].norm(dim=1).quantile(0.9)) / LONG  # one for both panels
        draw(
            axes[0],
            model.denoiser,
            sample,
            f"{data.__name__}, learned: {100 * shown:.1f} % wrong",
            scale,
        )
        draw(axes[1], exact, sample, f"{data.__name__}, exact", scale)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    print(out)


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
