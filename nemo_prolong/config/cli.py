"""What every script of ``scripts/`` calls: compose with Hydra, load strictly, check, then run the task.

Hydra only composes here: it makes no directory, does not change the working directory and leaves logging alone. A
mistake of the user ends in one message on stderr and the exit code of ``nemo_prolong.errors``, without a traceback and
before torch is imported; anything else keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_prolong.config.hydra_errors import COMPOSITION_ERRORS, check_experiment, explain
from nemo_prolong.config.load import load
from nemo_prolong.config.rules import check
from nemo_prolong.config.schema import Section
from nemo_prolong.errors import ConfigError, ProlongError
from nemo_prolong.redaction import redact

T = TypeVar("T", bound=Section)

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
"""The configuration files of this checkout, wherever a script is started from."""


def hydra_script(
    schema: type[T],
    config_name: str,
    task: Callable[[T, list[str]], None],
    description: str,
    examples: Sequence[str],
    help_overrides: Sequence[str] = (),
) -> None:
    """Run ``task`` with the configuration that the command line asks for. Exits the process on a user's mistake.

    Args:
        schema: What the configuration must be.
        config_name: Entry point in ``conf/``, without ``.yaml``.
        task: Called with the typed configuration and the overrides as they were typed.
        description: What the script does, for ``--help``.
        examples: Command lines worth copying, for ``--help``.
        help_overrides: Overrides that ``--help`` uses when none are typed, for a configuration that is not complete
            by itself.
    """
    try:
        args = get_args_parser().parse_args()
        _refuse_what_hydra_must_not_do(args)
        if args.help or args.cfg:
            # A reader such as `head` may close the pipe early, which is no mistake.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if args.help:
            sys.stdout.write(_help_text(description, examples))
            chosen = any(override.startswith("+exp=") for override in args.overrides)
            with _arguments(*([] if chosen else help_overrides), *sys.argv[1:]):
                _hydra_main(schema, config_name, args, _ignore)
        elif args.cfg:
            # Only a configuration that passes the checks is printed.
            with _arguments(*_config_flags(args), *args.overrides):
                load_command_line(schema, config_name, args)
            with redirect_stdout(StringIO()) as printed:
                _hydra_main(schema, config_name, args, _ignore)
            sys.stdout.write(redact(printed.getvalue()))
        elif args.hydra_help or args.info or args.shell_completion:
            _hydra_main(schema, config_name, args, _ignore)
        else:
            task(*load_command_line(schema, config_name, args))
    except ProlongError as error:
        _exit_with(error)


def load_command_line(schema: type[T], config_name: str, args: Namespace) -> tuple[T, list[str]]:
    """Return the checked configuration of ``sys.argv`` and the overrides typed there.

    Raises:
        ConfigError: For everything that cannot be composed, loaded or run.
    """
    composed: list[tuple[DictConfig, list[str]]] = []

    def keep(cfg: DictConfig) -> None:
        composed.append((cfg, list(HydraConfig.get().overrides.task)))

    _hydra_main(schema, config_name, args, keep)
    cfg, overrides = composed[0]
    typed = load(cfg, schema)
    check(typed)
    return typed, overrides


def typed_config_dir() -> list[str]:
    """Return the ``--config-dir`` of the command line as it was typed, for a script that starts other scripts."""
    directory = get_args_parser().parse_args().config_dir
    return ["--config-dir", directory] if directory else []


def compose(schema: type[T], config_name: str, arguments: Sequence[str]) -> T:
    """Return the checked configuration that a script of this project would get from these arguments.

    Args:
        schema: What the configuration must be.
        config_name: Entry point in ``conf/``, without ``.yaml``.
        arguments: What would be typed after the script.

    Raises:
        ConfigError: For everything that cannot be composed, loaded or run.
    """
    with _arguments(*arguments):
        return load_command_line(schema, config_name, get_args_parser().parse_args())[0]


def _hydra_main(
    schema: type[Section], config_name: str, args: Namespace, receive: Callable[[DictConfig], None]
) -> None:
    """Run Hydra on ``sys.argv`` and hand it ``receive`` as its task; explain what it cannot compose."""
    directories = [Path(args.config_path or CONFIG_DIR), *([Path(args.config_dir)] if args.config_dir else [])]
    check_experiment(schema, args.overrides, directories)
    main = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    try:
        with _full_hydra_errors():
            main(receive)()
    except COMPOSITION_ERRORS as error:
        raise explain(error, schema, args.overrides, directories) from error


def _ignore(cfg: DictConfig) -> None:
    """Do nothing with a configuration that Hydra itself prints."""


def _refuse_what_hydra_must_not_do(args: Namespace) -> None:
    multirun = ["--multirun"] if args.multirun else [o for o in args.overrides if o.startswith("hydra.mode=")]
    if multirun:
        rule = "one process trains one stage: its parallel state cannot be built twice."
        raise ConfigError(multirun[0], rule, "Start one command per run.")
    if args.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun",
            "unpickles a file, which could run any code.",
            "Repeat the command instead; <run>/overrides.txt holds what was typed.",
        )


def _config_flags(args: Namespace) -> list[str]:
    """Return the flags that say where configuration files are, as they were typed."""
    flags = {"--config-path": args.config_path, "--config-name": args.config_name, "--config-dir": args.config_dir}
    return [part for flag, value in flags.items() if value is not None for part in (flag, value)]


@contextmanager
def _arguments(*arguments: str) -> Iterator[None]:
    """Let Hydra see other command-line arguments: it reads ``sys.argv`` only."""
    typed = sys.argv
    sys.argv = [typed[0], *arguments]
    try:
        yield
    finally:
        sys.argv = typed


@contextmanager
def _full_hydra_errors() -> Iterator[None]:
    """Make Hydra raise its errors instead of printing them and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _help_text(description: str, examples: Sequence[str]) -> str:
    return "\n".join([description.strip(), "", "Examples:", *(f"  {example}" for example in examples), "", ""])


def _exit_with(error: ProlongError) -> NoReturn:
    """Print the message on the first rank only, and exit every rank with the error's code."""
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        sys.stderr.write(f"{redact(str(error))}\n")
    sys.exit(error.exit_code)
