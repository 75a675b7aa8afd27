"""Weights in parts (`trainer=fsdp`) train as whole ones do: every model, number by number; and runs
of them are killed, go on, and are read by one process. (Against one rank, draw by draw:
test_ranks.)
"""

import json
import os
import shutil
import signal
import socket

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import MODELS, SMALL, Fault, differences, state
from tiny import module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import genfw
from genfw import nets
from genfw.evaluate import evaluate
from genfw.noise import BatchNoise
from genfw.train.checkpoint import read
from genfw.train.ema import lerp_
from genfw.train.errors import GenfwError
from genfw.train.sharding import FSDP2, Step, divide, outline, shard, together, units
from genfw.train.stability import gradient_norm

SHAPE, BINS, WORLD = (1, 4, 4), 5, 2

# ---- every model, against gradients that are averaged by hand ------------------------------------


def vdm(net, param=None, likelihood=None, schedule=None, **more):
    denoiser = genfw.NetworkDenoiser(
        net, param or genfw.Eps(), schedule or genfw.Cosine(log_snr_max=4.0, log_snr_min=-6.0)
    )
    return genfw.VDM(denoiser, likelihood or genfw.BinsLikelihood(BINS), shape=SHAPE, **more)


def unet():
    """Odd sizes, which two ranks cannot share evenly; attention; dropout."""
    return vdm(nets.UNet(SHAPE, width=6, multipliers=(1, 2), blocks=1, attention=2, dropout=0.2))


def learned():
    """A schedule of its own, labels, times that follow what was seen."""
    schedule, times = genfw.Learned(4.0, -6.0, hidden=5), genfw.ImportanceTime(bins=4)
    net = nets.MLP(SHAPE, classes=3, width=6, blocks=2)
    return vdm(net, schedule=schedule, times=times, classes=3)


def categorical():
    """Asks its network twice a step."""
    net = nets.MLP(SHAPE, out_channels=BINS, width=6, blocks=2)
    reads = genfw.CategoricalLikelihood(BINS)
    return vdm(net, genfw.CategoricalParameterization(BINS), reads, steps=7)


def vae():
    encoder = nets.ConvEncoder(SHAPE, 3, channels=(5, 8))
    decoder = nets.ConvDecoder(SHAPE, 3, BINS, channels=(5, 8))
    return genfw.VAE(encoder, decoder, genfw.CategoricalLikelihood(BINS), latents=3)


def mhvae():
    encoders = [nets.MLPEncoder(SHAPE, 4, hidden=[6]), nets.MLPEncoder((4,), 3, hidden=[6])]
    below = nets.MLPDecoder(SHAPE, 4, BINS, hidden=[6])
    decoders = [below, nets.MLPDecoder((4,), 3, 2, hidden=[6])]
    return genfw.MHVAE(encoders, decoders, genfw.CategoricalLikelihood(BINS), latents=[4, 3])


def hvae():
    """Latents are drawn, and paid for, in the midst of a block."""
    ladder = nets.Ladder(SHAPE, BINS, classes=3, width=8, blocks=(1, 2))
    return genfw.HVAE(ladder, genfw.CategoricalLikelihood(BINS), classes=3)


CASES = {
    "unet": (unet, genfw.Elbo()),
    "learned": (learned, genfw.Elbo()),
    "categorical": (categorical, genfw.Elbo()),
    "vae": (vae, genfw.Elbo()),
    "mhvae": (mhvae, genfw.Elbo()),
    "dreg": (mhvae, genfw.Dreg(k=3)),  # differentiates once within the step
    "hvae": (hvae, genfw.Elbo()),
}


def trained(make, objective, rank, mesh):
    """Two steps of two micro-batches each.

    Args:
        mesh: None: gradients are averaged by hand.

    Returns:
        The losses and norms of gradients; the whole weights and their average; the share of all
        these that this rank had in memory.
    """
    torch.manual_seed(3)
    model = make().train()
    for p in model.parameters():  # networks begin at zero output, which hides mistakes
        p.data += 0.1 * torch.randn_like(p)
    whole, average = outline(model), outline(model)
    average.load_state_dict(model.state_dict(), assign=True)
    average.load_state_dict({k: v.clone() for k, v in average.state_dict().items()}, assign=True)
    average.requires_grad_(False)

    def loss(seed):
        torch.manual_seed(100 * seed + rank)
        x, y = torch.randint(BINS, (4, *SHAPE)), torch.randint(3, (4,))
        noise = BatchNoise(4, torch.device("cpu"), seed=seed, chunk=rank, chunks=WORLD)
        return objective(model, x, y, noise=noise).mean()

    take = loss
    if mesh is not None:
        take = Step(model, loss)
        divide(average, mesh)
        shard(take, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    said, held = [], 0.0
    for step in range(2):
        for micro in range(2):
            said.append(take(2 * step + micro))
            (said[-1] / 2).backward()
        if mesh is None:
            for p in model.parameters():
                p.grad /= WORLD
                dist.all_reduce(p.grad)
        said.append(gradient_norm(optimizer))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        held = max(held, share(model, average, optimizer))
        optimizer.zero_grad()
        with torch.no_grad():
            lerp_(average, model, 0.3)
    if mesh is not None:
        model, average = together(whole, model), together(whole, average)
    weights = {"model": model.state_dict(), "average": average.state_dict()}
    return torch.stack([each.detach() for each in said]), weights, held


def share(model, average, optimizer):
    """The bytes in this rank's memory, against those of all numbers: weights, average, gradients
    and moments."""
    moments = [v for kept in optimizer.state.values() for v in kept.values() if v.ndim]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = [*model.parameters(), *average.parameters(), *gradients, *moments]
    stored = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    held = {each.data_ptr(): each.nbytes() for each in stored}
    return sum(held.values()) / sum(t.numel() * t.itemsize for t in tensors)


def law(rank, port, file):
    """On one of two ranks."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {
        name: [trained(*case, rank, each) for each in (None, mesh)] for name, case in CASES.items()
    }
    torch.save(found, f"{file}{rank}")
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("law") / "found"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [ranks.context.Process(target=law, args=(r, port, file)) for r in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [torch.load(f"{file}{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_weights_in_parts_are_trained_as_whole_ones(found, name):
    """Losses, the norm that is clipped, weights, averages."""
    for rank in range(WORLD):
        (losses, weights, _), (theirs, parts, _) = found[rank][name]
        torch.testing.assert_close(theirs, losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts, weights, rtol=1e-6, atol=1e-11)
    assert not differences(found[0][name][1][1], found[1][name][1][1])


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_its_part_and_no_more(found, name):
    """Half, and what odd sizes are padded with."""
    for rank in range(WORLD):
        (_, _, alone), (_, _, held) = found[rank][name]
        assert alone == 1 and held < 0.6


def test_units_are_blocks():
    """Were there none, all weights would be whole at once."""
    model = unet()
    found = list(units(model))
    assert {type(unit).__name__ for unit in found} == {"Stage", "Halve", "Double"}
    inside = sum(p.numel() for unit in found for p in unit.parameters())
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in found)
    everything = sum(p.numel() for p in model.parameters())
    assert inside > 0.8 * everything and largest < 0.3 * everything


# ---- what cannot be divided ----------------------------------------------------------------------


def test_what_cannot_be_divided_is_named():
    """Before any rank waits for another."""
    strategy = FSDP2()
    strategy._lightning_module = made = module()
    made.objective.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(GenfwError, match="objective Elbo has some of its own: use trainer=ddp"):
        strategy.configure_ddp()
    strategy._lightning_module = made = module()
    made.model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(GenfwError, match=r"cannot divide scale, .* the shape \(1,\)"):
        strategy.configure_ddp()


# ---- runs ----------------------------------------------------------------------------------------

COMMAND = (
    *(*SMALL, *MODELS["vdm"], "times=uniform", "trainer.max_steps=8"),
    "trainer.limit_test_batches=null",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that nobody touched; one that was killed and went on, and one on one rank from there."""
    place = tmp_path_factory.mktemp("runs")
    whole, killed, moved = place / "whole", place / "killed", place / "moved"
    for folder, fault in ((whole, None), (killed, Fault("train", 5))):
        given = (*COMMAND, f"hydra.run.dir={folder}")
        ended = ranks.run(*given, world=2, strategy="fsdp2", fault=fault)
        assert ended.codes[0] == (-signal.SIGKILL if fault else 0), ended.said
    assert read(killed / "checkpoints" / "last.ckpt")["global_step"] == 3
    shutil.copytree(killed, moved)
    ended = ranks.run(f"resume={killed}", world=2)
    assert ended.codes == [0, 0], ended.said
    alone = ("trainer.devices=1", "trainer.strategy=auto", "trainer.accumulate_grad_batches=2")
    ended = ranks.run(f"resume={moved}", *alone)
    assert ended.codes == [0], ended.said
    return whole, killed, moved


def test_a_killed_run_goes_on_bit_for_bit(runs):
    whole, killed, _ = runs
    assert not differences(state(whole), state(killed))
    best = [read(each / "checkpoints" / "best.ckpt")["state_dict"] for each in (whole, killed)]
    assert not differences(*best)
    mine, theirs = (json.loads((each / "results.json").read_text()) for each in (whole, killed))
    assert mine["test/nll"] == theirs["test/nll"] and mine["val/nll"] == theirs["val/nll"]


def test_its_files_are_those_of_one_process(runs):
    """Every name, shape and type; and training went on from one as the two would have."""
    whole, _, moved = runs
    two, one = state(whole), state(moved)
    assert two["state_dict"].keys() == one["state_dict"].keys()
    kept = [each["optimizer_states"][0] for each in (two, one)]
    assert kept[0]["param_groups"] == kept[1]["param_groups"]
    assert all(type(each) is torch.Tensor for each in two["state_dict"].values())
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kept[1]["state"], kept[0]["state"], rtol=1e-2, atol=1e-4)


def test_one_process_evaluates_what_two_have_trained(runs):
    whole, _, _ = runs
    evaluate([f"run={whole}", "trainer.devices=1", "trainer.strategy=auto"])
    (alone,) = json.loads((whole / "evaluation.json").read_text()).values()
    tested = json.loads((whole / "results.json").read_text())
    assert alone["test/count"] == tested["test/count"]
    assert alone["test/nll"] == pytest.approx(tested["test/nll"], rel=1e-6)
