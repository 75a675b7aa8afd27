"""python -m genfw.export run=<folder>: the weights of a run as one safetensors file.

The weights that the run reports (the averaged ones where there are any), with what is needed to
build the model again as the file's metadata: version, configuration, shape and bins of the data.

    from genfw.export import load

    model = load("model.safetensors")  # a LatentModel
    model.elbo(x).total

A configuration may name classes. As with every file that may come from anywhere, those of genfw and
of installed plug-ins are imported, others only if `trusted` says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from genfw.train.errors import GenfwError
from genfw.train.files import replaced
from genfw.train.runs import all_but, checkpoint, command, guide, output, read, unguided

if TYPE_CHECKING:
    from genfw.model import LatentModel

USAGE = """python -m genfw.export run=<folder> [checkpoint=best|last] [out=<safetensors>]
Example: python -m genfw.export run=outputs/2026-11-23_10-15-42_k3f9ab"""

CHANGES = ("model", "sampler", "grid", "guidance", "trusted")
"""Of a run's configuration, what its model is built from."""


def export(arguments: Sequence[str]) -> None:
    defaults = {"checkpoint": "best", "out": None}
    folder, config, options = read(arguments, defaults, USAGE, keeps=all_but(CHANGES))
    weights_file = checkpoint(folder, options.checkpoint)
    out = output(options.out, folder / "model.safetensors")
    if (left := guide(config)) is not None:
        unguided(config)
        print(f"samples are not guided, as export takes no other run with it: {left}")

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    import genfw
    from genfw.train.parts import restore
    from genfw.train.process import prepare

    prepare()
    module, _ = restore(config, weights_file)
    held = module.evaluated.state_dict()
    weights = {name: value.clone().contiguous() for name, value in held.items()}
    metadata = {
        "genfw": genfw.__version__,
        "model": json.dumps(OmegaConf.to_container(config.model, resolve=True)),
        "data": json.dumps(
            {"name": config.data.name, "shape": [*config.data.shape], "bins": config.data.bins}
        ),
    }
    try:
        with replaced(out) as beside:
            save_file(weights, beside, metadata)
    except (OSError, SafetensorError) as error:  # a full disk
        raise GenfwError(f"{out} cannot be written: {error}; give out=<path>") from error
    print(f"{sum(each.numel() for each in weights.values()) / 1e6:.2f} M numbers: {out}")


def load(file: str | Path, trusted: Sequence[str] = ()) -> LatentModel:
    """The model of an exported file, on the CPU, in evaluation mode.

    Args:
        file: written by `python -m genfw.export`.
        trusted: packages, modules or classes that its configuration may name, besides genfw's and
            installed plug-ins'.

    Raises:
        GenfwError: not such a file; its weights do not fit its configuration.
        ConfigError: it names a class that is not trusted.
    """
    from safetensors import SafetensorError, safe_open

    from genfw.train.config import build

    try:
        with safe_open(file, framework="pt") as held:
            metadata = held.metadata() or {}
            weights = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise GenfwError(f"{file} cannot be read: {error}") from error
    if "model" not in metadata:
        raise GenfwError(f"{file} holds no configuration: it was not written by genfw.export")
    config = OmegaConf.create({"model": json.loads(metadata["model"]), "trusted": list(trusted)})
    model = build(config.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise GenfwError(f"{file}: {' '.join(str(error).split())}") from error
    return model.eval()


if __name__ == "__main__":
    sys.exit(command(export))
