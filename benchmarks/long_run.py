"""python benchmarks/long_run.py [key=value ...]: what a long run holds on to.

The default run on the digits, 1000 steps (66 epochs) with a W&B run offline, and after each epoch
what the process holds: resident memory, open files, threads. The bars: from epoch 2 to epoch 20
memory grows by 5 % at most and no file is left open, and W&B's folder stays below 50 MB. A
validation with all that belongs to it (pictures, distances, bits) comes in every second epoch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as L

from genfw.__main__ import main

STEPS, EVERY = 1000, 30
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
        }
        with (Path(trainer.default_root_dir) / "held.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")


def measure(folder: Path, overrides: list[str]) -> bool:
    """Runs, and prints what was held; whether all bars were kept."""
    code = main([*OVERRIDES, *overrides, f"hydra.run.dir={folder}"])
    if code:
        return False
    lines = (folder / "held.jsonl").read_text().splitlines()
    held = {each["epoch"]: each for each in map(json.loads, lines)}
    last = max(held)
    print("| epoch | step | resident MiB | open files | threads |\n|---|---|---|---|---|")
    for epoch in (2, 10, 20, 40, last):
        each = held[epoch]
        print(
            f"| {epoch} | {each['step']} | {each['rss_mib']:.0f} | {each['files']} | "
            f"{each['threads']} |"
        )
    files = [each for each in (folder / "wandb").rglob("*") if each.is_file()]
    size = sum(each.stat().st_size for each in files) / MIB
    growth = held[20]["rss_mib"] / held[2]["rss_mib"] - 1
    opened = {held[epoch]["files"] for epoch in range(2, last + 1)}
    print(f"memory {growth:+.1%} from epoch 2 to 20, W&B's folder {size:.1f} MB, files {opened}")
    return growth <= 0.05 and len(opened) == 1 and size < 50


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(not measure(Path(place) / "run", sys.argv[1:]))
