"""python benchmarks/long_run.py [key=value ...]: what a long run holds on to.

A small diffusion model on the digits, 10000 steps (667 epochs, some minutes of one core) with a W&B
run offline, and after each epoch what the process holds, resident memory, open files, threads, and
what a step costs, its share of validations included. A validation with all that belongs to it
(pictures, distances, bits) comes in every second epoch.

The bars: memory grows by 5 % at most from epoch 2 to 20, and by 5 % from step 1000 to the end; no
file is left open; of the first 1000 steps W&B's folder holds less than 50 MB.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as L

from genfw.__main__ import main

STEPS, EVERY = 10_000, 30
OVERRIDES = (
    *("logger.wandb.mode=offline", f"trainer.max_steps={STEPS}", "trainer.accelerator=cpu"),
    *(f"trainer.val_check_interval={EVERY}", "metrics.fid.every=1", "callbacks.pictures.every=1"),
    *("callbacks.bits.every=1", "callbacks.diagnostics.every=1", "estimator.strata=4"),
    *("net.width=16", "net.blocks=2", "sampler.steps=8", "metrics.fid.samples=250"),
    *("+callbacks.held._target_=long_run.Held", "trusted=[long_run]"),
)
MIB = 2**20


class Held(L.Callback):
    """Writes held.jsonl in the run folder, a line per epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / MIB,
            "files": len(os.listdir("/proc/self/fd")) - 1,  # without the one that lists them
            "threads": len(os.listdir("/proc/self/task")),
            "cpu_s": time.process_time(),
            "wandb_mib": size(Path(trainer.default_root_dir) / "wandb") / MIB,
        }
        with (Path(trainer.default_root_dir) / "held.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")


def size(folder: Path) -> int:
    """Bytes."""
    return sum(each.lstat().st_size for each in folder.rglob("*") if each.is_file())


def measure(folder: Path, overrides: list[str]) -> bool:
    """Runs, and prints what was held; whether all bars were kept."""
    code = main([*OVERRIDES, *overrides, f"hydra.run.dir={folder}"])
    if code:
        return False
    lines = (folder / "held.jsonl").read_text().splitlines()
    held = {each["epoch"]: each for each in map(json.loads, lines)}
    last = max(held)
    print(
        "| epoch | step | resident MiB | open files | threads | W&B MiB | CPU ms per step since |"
    )
    print("|---|---|---|---|---|---|---|")
    before = {"step": 0, "cpu_s": 0.0}
    for epoch in (2, 20, *(e for e in (67, 133, 267, 400, 533) if e < last), last):
        each = held[epoch]
        cost = (each["cpu_s"] - before["cpu_s"]) / (each["step"] - before["step"])
        numbers = (f"{each[key]:.0f}" for key in ("rss_mib", "files", "threads", "wandb_mib"))
        print(
            f"| {epoch} | {each['step']} | {' | '.join(numbers)} | {1000 * cost:.0f} |", flush=True
        )
        before = each
    first = next(each for each in held.values() if each["step"] >= min(1000, held[last]["step"]))
    early = held[20]["rss_mib"] / held[2]["rss_mib"] - 1
    late = held[last]["rss_mib"] / first["rss_mib"] - 1
    opened = {held[epoch]["files"] for epoch in range(2, last + 1)}
    print(
        f"memory {early:+.1%} from epoch 2 to 20, {late:+.1%} from step {first['step']} on; "
        f"W&B's folder {first['wandb_mib']:.1f} MiB at step {first['step']}; open files {opened}"
    )
    return max(early, late) <= 0.05 and len(opened) == 1 and first["wandb_mib"] < 50


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(not measure(Path(place) / "run", sys.argv[1:]))
