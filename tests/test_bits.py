"""Bits per interval of log SNR: against exact integrals, against the bound that is reported, and at
no cost."""

import math

import pytest
import tiny
import torch
from oracles import GaussianDenoiser
from PIL import Image as PIL
from test_diagnostics import module as module_of
from test_diagnostics import vae

import genfw
from genfw.diffusion import denoising
from genfw.diffusion.denoising import register_denoising_hook
from genfw.train.bits import BitAccounting, alike, findings, spent

MEAN, STD, HIGH, LOW = 0.3, torch.tensor([0.5, 0.2, 1.1]).double(), 6.0, -6.0
NATS = 4 * math.log(2)  # per bit/dim of a tiny image


def exact(edges):
    """1/2 int sum_d sigmoid(lambda + 2 log s_d), of every interval, in nats."""
    steep = edges[:, None] + 2 * STD.log()
    return 0.5 * torch.nn.functional.softplus(steep).sum(1).diff()


def draws(vdm, x, times, seed=7):
    found = []
    handle = register_denoising_hook(lambda d: found.append((d.log_snr, d.cost)))
    for j in range(times):
        vdm.denoising(x, noise=genfw.Noise(seed, torch.arange(len(x))).stratified(j, times))
    handle.remove()
    return [torch.stack(each, 1) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("schedule", [genfw.Cosine, genfw.LogLinear])
@pytest.mark.parametrize("times", [1, 3])
def test_intervals_hold_their_share_of_the_integral(schedule, times, double):
    n, edges = 20_000, torch.linspace(LOW, HIGH, 6)
    denoiser = GaussianDenoiser(schedule(HIGH, LOW), MEAN, STD)
    vdm = genfw.VDM(denoiser, genfw.GaussianLikelihood(), shape=(3,))
    x = MEAN + STD * torch.randn(n, 3)
    log_snr, cost = draws(vdm, x, times)
    nats, error = findings(spent(log_snr, cost, edges))
    assert ((nats - exact(edges)).abs() < 4 * error).all()
    assert (error < 0.05 * exact(edges)).all()
    torch.testing.assert_close(nats.sum(), cost.mean())


@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 100])
def test_accounts_do_not_depend_on_how_draws_are_chunked(tmp_path, chunk):
    """A call holds several draws of every image, or one draw of some of them."""
    found = []
    for each in (4, chunk):  # batches are of four images: 4 is one draw of each a call
        module, callback = tiny.module(), BitAccounting(4, every=0)
        module.estimator = genfw.Bound(sets=2, strata=3, chunk=each)
        trainer = tiny.trainer(tmp_path, callbacks=[callback])
        (tested,) = trainer.test(module, tiny.Images(), verbose=False)
        found.append({key: value for key, value in tested.items() if "bpd_at" in key})
    assert len(found[0]) == 8 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_standard_error_is_the_spread_of_repetitions(double):
    edges = torch.linspace(LOW, HIGH, 4)
    denoiser = GaussianDenoiser(genfw.Cosine(HIGH, LOW), MEAN, STD)
    vdm = genfw.VDM(denoiser, genfw.GaussianLikelihood(), shape=(3,))
    reports = []
    for _ in range(150):
        x = MEAN + STD * torch.randn(64, 3)
        seed = int(torch.randint(2**31, ()))
        reports.append(findings(spent(*draws(vdm, x, 2, seed), edges)))
    spread = torch.stack([nats for nats, _ in reports]).std(0)
    stated = torch.stack([error for _, error in reports]).square().mean(0).sqrt()
    assert ((spread / stated - 1).abs() < 0.25).all()  # a standard deviation of 150: 6 %


def test_sums_of_batches_add_up(double):
    edges = torch.linspace(-1.0, 1.0, 5)
    log_snr, cost = 2 * torch.rand(6, 4) - 1, torch.rand(6, 4)
    whole = spent(log_snr, cost, edges)
    halves = [spent(log_snr[i], cost[i], edges) for i in ([0, 3, 4], [1, 2, 5])]
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_batches_with_as_many_draws_are_one():
    batches = [(torch.rand(n, m), torch.rand(n, m)) for n, m in ((3, 1), (2, 1), (3, 2), (4, 1))]
    merged = list(alike(batches))
    assert [tuple(cost.shape) for _, cost in merged] == [(5, 1), (3, 2), (4, 1)]
    assert torch.equal(merged[0][0], torch.cat([batches[0][0], batches[1][0]]))


def test_outermost_intervals_hold_what_lies_beyond(double):
    edges, cost = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    nats, _ = findings(spent(torch.tensor([-9.0, -1.0, 1.0, 9.0])[:, None], cost[:, None], edges))
    assert nats.tolist() == [0.75, 3.0]


def series(metrics, split):
    start = f"{split}/bpd_at_"
    found = {k.removeprefix(start): float(v) for k, v in metrics.items() if k.startswith(start)}
    return {k: v for k, v in found.items() if not k.endswith("_stderr")}


def test_intervals_sum_to_the_denoising_term_that_is_reported(tmp_path):
    trainer = tiny.trainer(tmp_path, 2, val_check_interval=2, callbacks=[BitAccounting(4, every=1)])
    module, data = tiny.module(), tiny.Images()
    trainer.fit(module, data)
    assert list(series(trainer.callback_metrics, "val")) == ["-4.75", "-2.25", "0.25", "2.75"]
    for split, results in (
        ("val", trainer.callback_metrics),
        ("test", trainer.test(module, data, verbose=False)[0]),
    ):
        reported = float(results[f"{split}/levels"]) / NATS
        assert sum(series(results, split).values()) == pytest.approx(reported, rel=1e-5)
        assert all(float(results[f"{split}/bpd_at_{k}_stderr"]) > 0 for k in series(results, split))
    with PIL.open(tmp_path / "bits.png") as picture:
        assert picture.width > picture.height > 300


class Ledger(genfw.Objective):
    """simple, and what the bound would have been charged."""

    def __init__(self):
        super().__init__()
        self.costs = []

    def forward(self, model, x, y=None, *, noise=None):
        draw = model.denoising(x, y, noise=noise)
        self.costs.append(draw.cost.detach().double())
        return draw.eps_error


class Rows(tiny.L.Callback):
    """What is logged on the way."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(series(trainer.callback_metrics, "train"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_bits_are_those_of_all_steps_since_the_last_row(tmp_path, accumulate):
    """Whatever the objective weighs."""
    objective, rows = Ledger(), Rows()
    trainer = tiny.trainer(
        tmp_path,
        4,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        callbacks=[BitAccounting(4), rows],
    )
    trainer.fit(tiny.module(objective), tiny.Images(train=32))
    each = 2 * accumulate
    assert len(objective.costs) == 2 * each
    for i in range(2):
        window = torch.cat(objective.costs[i * each : (i + 1) * each]).mean() / NATS
        row = rows.rows[(i + 1) * each - 1]
        assert sum(row.values()) == pytest.approx(float(window), rel=1e-5)


def test_nothing_is_computed_twice_and_no_weight_differs(tmp_path):
    def run(callbacks):
        module, calls = tiny.module(), []
        module.model.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
        trainer = tiny.trainer(tmp_path, 4, val_check_interval=2, callbacks=callbacks)
        trainer.fit(module, tiny.Images())
        return len(calls), torch.cat([p.flatten() for p in module.model.parameters()])

    (calls, weights), (more, same) = run([]), run([BitAccounting(every=0)])
    assert more == calls
    assert torch.equal(weights, same)


def test_nobody_watches_after_a_run_be_it_broken(tmp_path):
    class Broken(genfw.Objective):
        def forward(self, model, x, y=None, *, noise=None):
            raise RuntimeError("broken")

    data = tiny.Images()
    tiny.trainer(tmp_path, 2, callbacks=[BitAccounting()]).fit(tiny.module(), data)
    assert not denoising._hooks
    with pytest.raises(RuntimeError, match="broken"):
        tiny.trainer(tmp_path, 2, callbacks=[BitAccounting()]).fit(tiny.module(Broken()), data)
    assert not denoising._hooks


def test_a_validation_that_was_broken_off_is_in_no_account(tmp_path):
    """Of a second one those bits are left that are the validation's."""

    class Breaks(tiny.L.Callback):
        times = 1

        def on_validation_batch_end(self, trainer, *_):
            if self.times:
                self.times -= 1
                raise RuntimeError("broken")

    trainer = tiny.trainer(tmp_path, callbacks=[BitAccounting(4, every=0), Breaks()])
    module, data = tiny.module(), tiny.Images()
    with pytest.raises(RuntimeError, match="broken"):
        trainer.validate(module, data, verbose=False)
    (found,) = trainer.validate(module, data, verbose=False)
    assert sum(series(found, "val").values()) == pytest.approx(found["val/levels"] / NATS, rel=1e-5)


def test_nothing_for_a_model_that_does_not_denoise(tmp_path):
    trainer = tiny.trainer(tmp_path, 2, val_check_interval=2, callbacks=[BitAccounting(every=1)])
    trainer.fit(module_of(vae()), tiny.Images())
    assert not [key for key in trainer.callback_metrics if "bpd_at" in key]
    assert not list(tmp_path.glob("*.png"))


def test_intervals_stay_where_they_are_when_a_run_goes_on(tmp_path):
    first = BitAccounting(3)
    tiny.trainer(tmp_path, 2, callbacks=[first]).fit(tiny.module(), tiny.Images())
    second = BitAccounting(3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.edges, second.edges)
    assert first.edges.tolist() == pytest.approx([-6.0, -8 / 3, 2 / 3, 4.0])


def test_at_least_one_interval():
    with pytest.raises(ValueError, match="intervals: expected an integer of at least 1, got 0"):
        BitAccounting(0)


def test_the_standard_error_is_about_the_mean(double):
    """Images that cost much and alike are known well: means and errors of each interval are
    numpy's."""
    edges = torch.tensor([-10.0, 0.0, 8.0])
    cost = torch.tensor([[50.0, 3.0], [51.0, 7.0], [52.0, 2.0]])  # two draws, one in each interval
    nats, error = findings(spent(torch.tensor([[-4.0, 4.0]]).repeat(3, 1), cost, edges))
    assert torch.allclose(nats, cost.mean(0) / 2)
    assert torch.allclose(error, cost.std(0) / 2 / 3**0.5)
