"""Compiled networks train as they are written, and nobody else notices."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import genfw
from genfw.nets.network import Network
from genfw.testing import small
from genfw.train.callbacks import Compile
from genfw.train.compile import networks
from genfw.train.ema import EMA
from genfw.train.errors import GenfwError
from genfw.train.module import LatentModule

SHAPE, BINS = (1, 2, 2), 3
COMPILE = "+callbacks.compile._target_=genfw.train.callbacks.Compile"


class Plain(nn.Module):
    """A network without annotations: what tests check them with cannot be compiled."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, z, level, y=None):
        return self.layers(torch.cat([z.flatten(1), level[:, None]], 1)).view(z.shape)


class Layers(Network):
    """A part of a VAE, as plain."""

    def __init__(self, inputs, *outputs):
        super().__init__()
        self.shape, self.classes = SHAPE, None
        self.layers = nn.Sequential(
            nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 4), nn.Unflatten(1, outputs)
        )

    def forward(self, z, y=None):
        return self.layers(z.flatten(1).to(self.layers[0].weight.dtype))


class Seen(Compile):
    """Counts the calls of what is compiled, and leaves it as it is: that takes no compiler."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.options = {"backend": self.as_written}

    def as_written(self, graph, _):
        def run(*given):
            self.calls += 1
            return graph(*given)

        return run


def module():
    made = tiny.module()
    torch.manual_seed(0)
    made.model.denoiser.network = Plain()
    return made


def trained(folder, *callbacks, steps=4):
    made = module()
    trainer = tiny.trainer(folder, steps, callbacks=list(callbacks), limit_val_batches=1)
    trainer.fit(made, tiny.Images())
    return made, trainer


def command(module, *arguments):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=root, env=environment)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_training_step_goes_through_compiled_code_and_a_reported_number_does_not(tmp_path):
    seen = Seen()
    made, trainer = trained(tmp_path, seen)
    assert seen.calls == 4
    (compiled,) = trainer.test(made, tiny.Images())
    assert seen.calls == 4
    written = module()
    written.load_state_dict(made.state_dict())
    (number,) = tiny.trainer(tmp_path).test(written, tiny.Images())
    assert compiled == number


def test_an_objective_may_go_back_through_a_graph_twice(tmp_path):
    vae = genfw.VAE(Layers(4, 4), Layers(2, *SHAPE), genfw.BernoulliLikelihood(), 2)
    made = LatentModule(vae, genfw.Dreg(3), torch.optim.SGD)
    compiled = Compile()
    compiled.options = {"backend": "aot_eager"}
    x = torch.randint(2, (8, *SHAPE), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    before = copy.deepcopy(vae.state_dict())
    tiny.trainer(tmp_path, 2, callbacks=[compiled]).fit(made, loader)
    assert any(not torch.equal(before[name], each) for name, each in vae.state_dict().items())


def test_it_trains_as_without_and_leaves_the_same_checkpoint(tmp_path):
    (written, _), (compiled, _) = (trained(tmp_path, EMA(), *c) for c in ((), (Seen(),)))
    a, b = written.state_dict(), compiled.state_dict()
    assert list(a) == list(b)
    torch.testing.assert_close(a, b)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
def test_a_run_compiles_and_keeps_its_word(tmp_path):
    """By torch's own compiler, for the two sizes of a batch that decodes a part of itself; the
    run's number is said again by its networks as written."""
    small = (
        "model=vdm net=mlp net.width=8 net.blocks=1 trainer.max_steps=3 metrics=none logger=none "
        "param=categorical model.decoder_share=0.25"
    )
    folder = f"hydra.run.dir={tmp_path}/run"
    ran = command("genfw", *small.split(), COMPILE, folder, "trainer.limit_test_batches=1")
    assert ran.returncode == 0, ran.stderr
    read = command("genfw.evaluate", f"run={tmp_path}/run", "verify=true")
    assert read.returncode == 0, read.stdout + read.stderr


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="mode: expected null or one of default, "):
        Compile(mode="fast")


@pytest.mark.parametrize("make", [small.vdm, small.vae, small.mhvae, small.hvae])
def test_every_layer_of_a_network_is_compiled_once(make):
    model = make(SHAPE, BINS)
    found = list(networks(model))
    inside = [each for network in found for each in network.modules()]
    assert len(inside) == len(set(inside))
    layers = {m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers & set(inside)
    if make is not small.hvae:  # whose way between the blocks draws
        assert layers <= set(inside)


def test_anybodys_network_of_a_diffusion_model_is_one():
    denoiser = genfw.NetworkDenoiser(nn.Linear(2, 2), genfw.Eps(), genfw.Cosine(4.0, -6.0))
    vdm = genfw.VDM(denoiser, genfw.BinsLikelihood(3))
    assert list(networks(vdm)) == [denoiser.network]


def test_a_model_without_networks_is_refused(tmp_path):
    made = module()
    made.model.denoiser = small.vdm(SHAPE, BINS).denoiser.parameterization
    with pytest.raises(GenfwError, match=r"^Compile: expected a model of networks, got VDM"):
        tiny.trainer(tmp_path, callbacks=[Compile()]).fit(made, tiny.Images())


def test_a_module_of_no_latent_model_is_refused(tmp_path):
    with pytest.raises(
        GenfwError, match=r"^Compile: expected a LatentModule, .* got a BoringModel"
    ):
        tiny.trainer(tmp_path, callbacks=[Compile()]).fit(BoringModel())
