"""python tests/faults.py [kills=10] [models=vae,mhvae,vdm] [out=<folder>]: many kills and signals.

Each run is killed as often as `kills` says, at steps drawn at random: each time it goes on in its
folder, and is killed again. In the end its weights, averages, optimizer and ledger must be
those of a run that nobody touched, bit for bit. Then signals: how long until the last rank is gone.

Every case writes `<out>/<case>.json` when it is done, and is skipped when that is there, of as many
kills. The table so far is in `<out>/table.md`, and goes from there to docs/reliability.md.
"""

import itertools
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import ranks
from ranks import MODELS, SMALL, Fault

from genfw.train.loggers import git_commit

STEPS = 39
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
    possible = range(1, STEPS) if moment == "train" else range(3, STEPS + 1, 3)
    steps = sorted(draw.sample(possible, min(count, len(possible))))
    arguments = (*command(model, world), f"hydra.run.dir={killed}")
    for step in steps:
        say(f"kill {steps.index(step) + 1} of {len(steps)}, at step {step}")
        ended = ranks.run(*arguments, world=world, fault=Fault(moment, step))
        assert ended.codes[0] == -signal.SIGKILL, ended.said
        arguments = (f"resume={killed}",)
    ended = ranks.run(*arguments, world=world)
    assert ended.codes == [0] * world, ended.said
    return {"steps": steps, "differences": ranks.differences(*map(ranks.state, (whole, killed)))}


def signals(world, who, number, count, folder):
    """From outside, at any moment, and in a validation, in turn."""
    draw = random.Random(f"{world} {who} {number}")
    seconds = []
    for i in range(count):
        moment = ("any", "validation")[i % 2]
        step, after = 3 * draw.randrange(1, STEPS // 3), draw.uniform(0, 3)
        say(f"signal {i + 1} of {count}")
        shutil.rmtree(folder, ignore_errors=True)
        ended = ranks.run(
            *command("vae", world),
            "trainer.max_steps=100000",
            f"hydra.run.dir={folder / 'run'}",
            world=world,
            fault=Fault(moment, step, number, who, after),
        )
        assert ended.codes == [143] * world, ended.said
        seconds.append(round(ended.seconds, 2))
    return {"seconds": seconds, "differences": []}


def say(text):
    print(f"    {text}", flush=True)


def cases(models):
    """{what is done: (by which function, with what)}."""
    found = {}
    for model, world, moment in itertools.product(models, (1, 2), MOMENTS):
        name = f"SIGKILL, {model}, {world} rank{'s' * (world > 1)}, {moment}"
        found[name] = (kills, model, world, moment)
    for (world, who), number in itertools.product(SIGNALS, (signal.SIGTERM, signal.SIGUSR1)):
        name = f"{number.name} to rank {' and '.join(map(str, who))} of {world}"
        found[name] = (signals, world, who, number)
    return found


def main(count=10, models=tuple(MODELS), out="faults"):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    records, failed = {}, 0
    asked = cases(models)
    for place, (name, (act, *arguments)) in enumerate(asked.items(), start=1):
        folder = out / name.replace(", ", "_").replace(" ", "_")
        record = folder.with_suffix(".json")
        found = json.loads(record.read_text()) if record.exists() else {"asked": 0}
        if found["asked"] < count:
            print(f"{place} of {len(asked)}: {name}", flush=True)
            started = time.monotonic()
            try:
                found = act(*arguments, count, folder)
            except AssertionError as error:  # tried again the next time
                print(f"failed: {error}", flush=True)
                failed += 1
                continue
            took = round(time.monotonic() - started)
            found |= {"asked": count, "took": took, "commit": commit()}
            record.write_text(json.dumps(found))
            shutil.rmtree(folder, ignore_errors=True)
        failed += bool(found["differences"])
        records[name] = found
        (out / "table.md").write_text(table(records, len(asked)))
    print((out / "table.md").read_text())
    return 1 if failed else 0


def table(records, asked):
    lines = ["| fault | times | outcome | seconds |", "|---|---|---|---|"]
    for name, found in records.items():
        wrong, times = found["differences"], len(found.get("steps", found.get("seconds", [])))
        said = f"differs: {wrong[0]}" if wrong else "equal to the bit"
        if "seconds" in found:
            said = f"exit code 143, at most {max(found['seconds'])} s after the signal"
        lines.append(f"| {name} | {times} | {said} | {found['took']} |")
    minutes = sum(found["took"] for found in records.values()) / 60
    commits = ", ".join(dict.fromkeys(found["commit"] for found in records.values()))
    done = f"{len(records)} of {asked} cases, {minutes:.0f} minutes, commit {commits}"
    return "\n".join([*lines, "", f"{done}{' (+: with changes)' * ('+' in commits)}.", ""])


def commit():
    found = git_commit() or "unknown"
    return found[:7] + "+" * found.endswith("+")


if __name__ == "__main__":
    given = dict(each.split("=", 1) for each in sys.argv[1:])
    models = given.get("models", ",".join(MODELS)).split(",")
    sys.exit(main(int(given.get("kills", 10)), models, given.get("out", "faults")))
