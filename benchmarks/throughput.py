"""Images a second of training, and what they hold in memory: python benchmarks/throughput.py
[experiment=cifar10_vdm] [batch=128] [steps=30] [device=cuda] [settings=float32,tf32,bf16,compiled]

The model of an experiment, its objective and its optimizer, on random images of its data's shape;
side by side in one run

* float32, every product in full;
* tf32, factors shortened to 10 bits of a mantissa;
* bf16, the network under autocast, numbers in float32 (`trainer.precision=bf16-mixed`);
* compiled, the same with networks compiled by torch (`genfw.train.callbacks.Compile`).

Seconds are of the last two thirds of the steps.
"""

from __future__ import annotations

import sys
import time

import torch

from genfw.train.compile import networks
from genfw.train.compose import compose
from genfw.train.config import build
from genfw.train.session import session

SETTINGS = ("float32", "tf32", "bf16", "compiled")


def measure(setting: str, experiment: str, batch: int, steps: int, device: torch.device):
    """Milliseconds of a step, and GiB at its peak."""
    with session():
        config = compose([f"experiment={experiment}", "data.path=/", "trainer.accelerator=cpu"])
    torch.manual_seed(0)
    model, objective = build(config.model).to(device), build(config.objective).to(device)
    optimizer = build(config.optimizer)(model.parameters())
    if setting == "compiled":
        for network in networks(model):
            network.compile()
    torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = setting == "tf32"
    images = torch.randint(config.data.bins, (batch, *config.data.shape), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        if step == steps // 3:
            wait()
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=setting in ("bf16", "compiled")):
            loss = objective(model, images).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait()
    taken = (time.perf_counter() - start) / (steps - steps // 3)
    held = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return 1e3 * taken, held


def main() -> None:
    given = dict(each.split("=", 1) for each in sys.argv[1:])
    experiment = given.get("experiment", "cifar10_vdm")
    batch, steps = int(given.get("batch", 128)), int(given.get("steps", 30))
    device = torch.device(given.get("device", "cuda"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{experiment}, batches of {batch}, {name}, torch {torch.__version__}")
    print("| setting | ms a step | images a second | GiB | of float32 |\n|---|---|---|---|---|")
    first = None
    for setting in given.get("settings", ",".join(SETTINGS)).split(","):
        taken, held = measure(setting, experiment, batch, steps, device)
        first = first or taken
        line = f"| {setting} | {taken:.1f} | {1e3 * batch / taken:.0f} | {held:.1f} "
        print(f"{line}| {taken / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
