"""python -m genfw [group=option ...] [key=value ...]: trains a model, then tests it.

python -m genfw resume=<folder>: goes on with a run that was interrupted.

The configuration is composed and checked first, in well under a second; torch is imported when it
is right.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NoReturn

from genfw.train.errors import ConfigError, GenfwError
from genfw.train.slurm import first_rank, tell
from genfw.train.terminal import detach

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    0, or 1: the run failed, 2: the configuration is wrong, 130: Ctrl-C, 143: SIGTERM or SIGUSR1;
    after either the run is saved.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `_target_: my_file.Flow` may name a file beside the person
    try:
        return _command(arguments)
    except GenfwError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        return tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
        print(*([f"rank {rank}:"] if rank else []), traceback.format_exc(), file=sys.stderr)
        return 1


def _command(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        return _help(arguments)

    from genfw.train import resume, sweep
    from genfw.train.compose import compose
    from genfw.train.nodes import conf_folder
    from genfw.train.overrides import jobs, parse, typed
    from genfw.train.rules.data import data_are_there
    from genfw.train.session import searching, session

    if resume.asked(arguments):
        resume.resume(searching(arguments))
        return 0

    flags = _flags(arguments)
    _trains(flags.overrides)
    name = flags.config_name or "config"
    begun, overrides = sweep.reopen(flags.overrides)
    multirun = flags.multirun or begun is not None
    folder, more = _conf(flags)
    overrides += more
    if flags.hydra_help or flags.info or flags.shell_completion:
        return _hydra(arguments, folder or conf_folder(), name)

    with session(folder, overrides) as hydra:
        if flags.cfg:
            compose(overrides, name)
            hydra.show_cfg(name, overrides, flags.cfg, flags.package, flags.resolve)
            return 0
        commands = jobs(overrides) if multirun else [overrides]
        composed = [_checked(compose, command, name, commands) for command in commands]
        for config in composed:
            data_are_there(config)
        config = composed[0]
        trusted = [*(config.trusted or []), *typed(parse(overrides))]
        if trusted:
            overrides.append(f"trusted=[{','.join(dict.fromkeys(trusted))}]")
        if multirun:
            return _sweep(hydra, flags, overrides, config, begun, len(commands))
        return _start(hydra, name, overrides, config, trusted)


def _help(arguments: Sequence[str]) -> int:
    """The groups and their options, also those of folders that this command line names."""
    from genfw.train import help, plugins
    from genfw.train.session import folders, session

    flags = _flags(arguments)
    folder, more = _conf(flags)
    names = [f"{each.name} ({each.module})" for each in plugins.installed()]
    with session(folder, [*flags.overrides, *more]):
        print(help.text(folders(), names), end="")
    return 0


def _conf(flags: Namespace) -> tuple[Path | None, list[str]]:
    """The conf folder of --config-path; that of --config-dir, as Hydra's override.

    Raises:
        ConfigError: the latter is not there.
    """
    from genfw.train.session import searching

    folder = Path(flags.config_path) if flags.config_path else None
    return folder, [] if flags.config_dir is None else searching(["-cd", flags.config_dir])


def _sweep(
    hydra: Hydra,
    flags: Namespace,
    overrides: Sequence[str],
    config: DictConfig,
    begun: Path | None,
    jobs: int,
) -> int:
    """All jobs of a sweep, or those that are left of one that has begun."""
    from genfw.train import sweep
    from genfw.train.jobs import Fresh
    from genfw.train.overrides import parse
    from genfw.train.run_folder import own_folder

    sweep.check_launcher(config)
    place = own_folder(config, "hydra.sweep.dir") if begun is None else begun.absolute()
    axes = [each for each in parse(overrides) if each.is_sweep_override()]
    if begun is None:
        known = all(each.is_discrete_sweep() for each in axes)
        sweep.keep(place, overrides, jobs if known else None)
    task = Fresh(tuple(_shared(flags)), tuple(each.key_or_group for each in axes))
    return sweep.run(hydra, flags.config_name or "config", task, overrides, place)


def _start(
    hydra: Hydra, name: str, overrides: Sequence[str], config: DictConfig, trusted: Sequence[str]
) -> int:
    """One run; of a SLURM job that was put back into the queue, the run that it had begun."""
    from genfw.train import resume, slurm
    from genfw.train.jobs import quoted
    from genfw.train.run_folder import abandon, named_anew, own_folder

    place = own_folder(config, "hydra.run.dir")
    if slurm.restarted() and (place / "config.yaml").exists():
        resume.resume([f"resume={place}", f"trusted=[{','.join(trusted)}]"])
        return 0
    fixed = [f"hydra.run.dir={quoted(place)}", "hydra.mode=RUN"]
    failures: list[GenfwError] = []
    hydra.run(name, partial(_run, failures=failures), [*overrides, *fixed])
    if failures:
        wrong = failures[0].exit_code == ConfigError.exit_code
        if wrong and named_anew(config, "hydra.run.dir"):
            abandon(place)
        raise failures[0]
    return 0


def _checked(compose: Callable, command: Sequence[str], name: str, commands: Sequence) -> Any:
    """A job's configuration; all are composed before any starts.

    Raises:
        ConfigError: it is wrong; of a sweep, which combination it was.
    """
    try:
        return compose(command, name)
    except ConfigError as error:
        others = next((each for each in commands if each != command), command)
        own = [each for each in command if each not in others or len(commands) == 1]
        if len(commands) == 1:
            raise
        raise ConfigError(f"of this sweep, {' '.join(own)}: {error}") from error


def _run(config, failures: list[GenfwError]) -> float | None:
    """One job, in this process. Heavy imports begin here. What the person can put right goes to
    `failures`: raised through Hydra it would come with a line of Hydra's own."""
    from hydra.core.hydra_config import HydraConfig

    from genfw.train.compose import complete
    from genfw.train.job import run
    from genfw.train.run_folder import locked, noted

    logging.getLogger(
        "lightning"
    ).handlers.clear()  # its lines reach the root logger's handlers as well
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        complete(config, HydraConfig.get())  # Hydra has composed it once more
        with locked(folder), noted(folder):
            results = run(config, folder)
    except GenfwError as error:
        failures.append(error)
        return None
    return results.get(config.optimized)


def _trains(overrides: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the command line is one of another command.
    """
    given = next((each for each in overrides if each.startswith("run=")), None)
    run = "run=<folder>" if given is None else quote(given)
    again = "resume=<folder>" if given is None else quote(given.replace("run", "resume", 1))
    for each in overrides:
        if each == given or each in ("sample", "evaluate", "export"):
            raise ConfigError(
                f"{each}: python -m genfw trains; of a run that is there: python -m genfw.sample "
                f"(or .evaluate, .export) {run}; to go on with it: python -m genfw {again}"
            )


def _flags(arguments: Sequence[str]) -> Namespace:
    """Hydra's own flags."""
    from hydra._internal.utils import get_args_parser

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m genfw --help")

    parser = get_args_parser()
    parser.error = error
    return parser.parse_intermixed_args(arguments)


def _shared(flags: Namespace) -> list[str]:
    """The flags that the jobs of a sweep inherit."""
    pairs = (("--config-path", flags.config_path), ("--config-name", flags.config_name))
    return [each for flag, value in pairs if value for each in (flag, value)]


def _hydra(arguments: Sequence[str], folder: Path, name: str) -> int:
    """Hydra's own questions: --info, --hydra-help, --shell-completion."""
    import hydra

    from genfw.train import resolvers

    resolvers.register()
    sys.argv[1:] = arguments
    answer = hydra.main(config_path=str(folder.absolute()), config_name=name, version_base="1.3")
    answer(partial(_run, failures=[]))()
    return 0


def command() -> NoReturn:
    """`main`, and the end of the process: at once where a signal asked for it, where W&B would
    wait for an upload that was given up, and of further ranks, which leave nothing behind."""
    detach()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    loggers = sys.modules.get("genfw.train.loggers")
    left = loggers is not None and loggers.Wandb.left
    if code in (130, 143) or left or not first_rank():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
