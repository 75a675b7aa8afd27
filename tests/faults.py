"""python tests/faults.py [kills=10] [models=vae,mhvae,vdm] [out=<folder>]: many kills and signals.

Each run is killed as often as `kills` says, at steps drawn at random: each time it goes on in its
folder, and is killed again. In the end its weights, averages, optimizer and ledger must be
those of a run that nobody touched, bit for bit. Then signals: how long until the last rank is gone.

Every case writes `<out>/<case>.json` when it is done, and is skipped when that is there. The table
goes to `<out>/table.md`, and from there to docs/reliability.md.
"""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ranks
from ranks import MODELS, SMALL, Fault

STEPS = 40
MOMENTS = ("train", "validation", "write")
SIGNALS = ((1, (0,)), (2, (0, 1)), (2, (0,)), (2, (1,)))
"""World sizes, and the ranks that get the signal."""


def command(model, world):
    accumulate = f"trainer.accumulate_grad_batches={2 // world}"
    return (*SMALL, *MODELS[model], f"trainer.max_steps={STEPS}", accumulate)


def kills(model, world, moment, count, folder):
    """Sorted steps, so that each kill meets a run that has got that far."""
    whole, killed = folder / "whole", folder / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    ended = ranks.run(*command(model, world), f"hydra.run.dir={whole}", world=world)
    assert ended.codes == [0] * world, ended.said
    draw = random.Random(f"{model} {world} {moment}")
    possible = range(1, STEPS) if moment == "train" else range(3, STEPS, 3)
    steps = sorted(draw.sample(possible, min(count, len(possible))))
    arguments = (*command(model, world), f"hydra.run.dir={killed}")
    for step in steps:
        ended = ranks.run(*arguments, world=world, fault=Fault(moment, step))
        assert ended.codes[0] == -signal.SIGKILL, ended.said
        arguments = (f"resume={killed}",)
    ended = ranks.run(*arguments, world=world)
    assert ended.codes == [0] * world, ended.said
    return {"steps": steps, "differences": ranks.differences(*map(ranks.state, (whole, killed)))}


def signals(world, who, number, count, folder):
    draw = random.Random(f"{world} {who} {number}")
    seconds = []
    for i in range(count):
        moment = MOMENTS[i % 2]
        step = draw.randrange(1, STEPS) if moment == "train" else 3 * draw.randrange(1, STEPS // 3)
        shutil.rmtree(folder, ignore_errors=True)
        ended = ranks.run(
            *command("vae", world),
            f"hydra.run.dir={folder / 'run'}",
            world=world,
            fault=Fault(moment, step, number, who),
        )
        assert ended.codes == [143] * world, ended.said
        seconds.append(round(ended.seconds, 2))
    return {"seconds": seconds, "differences": []}


def main(count=10, models=tuple(MODELS), out="faults"):
    out = Path(out)
    cases = {}
    for model, world, moment in itertools.product(models, (1, 2), MOMENTS):
        name = f"SIGKILL, {model}, {world} rank{'s' * (world > 1)}, {moment}"
        cases[name] = (kills, model, world, moment)
    for (world, who), number in itertools.product(SIGNALS, (signal.SIGTERM, signal.SIGUSR1)):
        name = f"{number.name} to rank {' and '.join(map(str, who))} of {world}"
        cases[name] = (signals, world, who, number)
    lines = ["| fault | times | outcome | seconds |", "|---|---|---|---|"]
    failed = 0
    for name, (act, *arguments) in cases.items():
        folder = out / name.replace(", ", "_").replace(" ", "_")
        record = folder.with_suffix(".json")
        if not record.exists():
            started = time.monotonic()
            found = act(*arguments, count, folder)
            found["took"] = round(time.monotonic() - started)
            record.write_text(json.dumps(found))
            shutil.rmtree(folder, ignore_errors=True)
        found = json.loads(record.read_text())
        wrong = found["differences"]
        failed += bool(wrong)
        times = len(found.get("steps", found.get("seconds", [])))
        said = f"differs: {wrong[0]}" if wrong else "equal to the bit"
        if "seconds" in found:
            said = f"exit code 143, at most {max(found['seconds'])} s after the signal"
        lines.append(f"| {name} | {times} | {said} | {found['took']} |")
        print(lines[-1], flush=True)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    minutes = sum(json.loads(each.read_text())["took"] for each in out.glob("*.json")) / 60
    lines.append(f"\nCommit {commit}, {minutes:.0f} minutes.")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print(lines[-1])
    return 1 if failed else 0


if __name__ == "__main__":
    given = dict(each.split("=", 1) for each in sys.argv[1:])
    models = given.get("models", ",".join(MODELS)).split(",")
    sys.exit(main(int(given.get("kills", 10)), models, given.get("out", "faults")))
