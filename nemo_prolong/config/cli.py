"""What every script of ``scripts/`` calls: compose the configuration, check it, then run the task.

A mistake of the user ends in one message on stderr and the exit code of ``nemo_prolong.errors``, without a traceback
and before torch is imported.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from hydra._internal.utils import get_args_parser

from nemo_prolong.config.compose import Request
from nemo_prolong.config.ending import clean_ending, end_with_the_reader
from nemo_prolong.config.schema import Section
from nemo_prolong.errors import ConfigError, ProlongError
from nemo_prolong.redaction import redact

T = TypeVar("T", bound=Section)


def hydra_script(
    schema: type[T],
    script: str,
    task: Callable[[T, list[str]], None],
    description: str,
    examples: Sequence[str],
    help_overrides: Sequence[str] = (),
    os_errors: type[ProlongError] = ProlongError,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run ``task`` with the configuration that the command line asks for. Exits the process on a user's mistake.

    Args:
        schema: What the configuration must be.
        script: Name of the script without ``.py``, which is that of its entry point in ``conf/``.
        task: Called with the typed configuration and the overrides as they were typed.
        description: What the script does, for ``--help``.
        examples: Command lines worth copying, for ``--help``.
        help_overrides: Overrides that ``--help`` uses when none are typed, for a configuration that is not complete
            by itself.
        os_errors: Whose exit code a full disk, a missing permission and the like have in this script.
        arguments: The words after the script, where they are not those that were typed.
    """

    def run(request: Request[T], parsed: Namespace) -> None:
        task(*request.load())

    request_script(schema, script, run, description, examples, help_overrides, os_errors, arguments=arguments)


def request_script(
    schema: type[T],
    script: str,
    task: Callable[[Request[T], Namespace], None],
    description: str,
    examples: Sequence[str],
    help_overrides: Sequence[str] = (),
    os_errors: type[ProlongError] = ProlongError,
    flags: Mapping[str, str] = MappingProxyType({}),
    arguments: Sequence[str] | None = None,
) -> None:
    """As ``hydra_script``, for a task that does not end at a configuration which cannot be loaded.

    Args:
        schema: As there.
        script: As there.
        task: Called with what was asked for, not loaded yet, and the flags of the command line.
        description: As there.
        examples: As there.
        help_overrides: As there.
        os_errors: As there.
        flags: Flags of this script besides those of Hydra, with what ``--help`` says of them.
        arguments: As there.
    """
    with clean_ending(os_errors):
        parser = get_args_parser()
        for flag, meaning in flags.items():
            parser.add_argument(flag, action="store_true", help=meaning)
        parsed = parser.parse_args(arguments)
        _refuse(parsed)
        request = Request.of(schema, script, parsed)
        if parsed.help:
            end_with_the_reader()
            sys.stdout.write(_help_text(description, examples))
            _print_help(request, parser, parsed, help_overrides)
        elif parsed.cfg:
            end_with_the_reader()
            _print_config(request, parsed)
        elif parsed.hydra_help or parsed.info or parsed.shell_completion:
            _print_of_hydra(request, parser, parsed)
        else:
            task(request, parsed)


def typed_config_dir() -> list[str]:
    """Return the ``--config-dir`` of the command line as it was typed, for a script that starts other scripts."""
    directory = get_args_parser().parse_args().config_dir
    return ["--config-dir", directory] if directory else []


def typed_config_flags() -> list[str]:
    """Return the flags of the command line that say which files are composed, with absolute paths."""
    typed = get_args_parser().parse_args()
    paths = {"--config-path": typed.config_path, "--config-dir": typed.config_dir}
    flags = [word for flag, path in paths.items() if path for word in (flag, str(Path(path).absolute()))]
    return [*flags, *(["--config-name", typed.config_name] if typed.config_name else [])]


def _refuse(arguments: Namespace) -> None:
    """Refuse flags that a script must not follow, and those that do not go together."""
    overrides = arguments.overrides
    multirun = ["--multirun"] if arguments.multirun else [o for o in overrides if o.startswith("hydra.mode=")]
    if multirun:
        rule = "one process trains one stage: its parallel state cannot be built twice."
        raise ConfigError(multirun[0], rule, "Start one command per run.")
    if arguments.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun",
            "unpickles a file, which could run any code.",
            "Repeat the command instead; <run>/overrides.txt holds what was typed.",
        )
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise ConfigError("--resolve", "changes what --cfg and --help print.", "Add --cfg job.")
    does = {"--run": arguments.run, "--cfg": arguments.cfg, "--info": arguments.info}
    chosen = [flag for flag, value in {**does, "--shell-completion": arguments.shell_completion}.items() if value]
    if len(chosen) > 1:
        raise ConfigError(" ".join(chosen), "a script does one of them.", f"Keep one, e.g. {chosen[0]}.")


def _print_help(
    request: Request[T], parser: ArgumentParser, arguments: Namespace, help_overrides: Sequence[str]
) -> None:
    """Print groups and keys."""
    if not any(override.startswith("+exp=") for override in request.overrides):
        request = replace(request, overrides=(*help_overrides, *request.overrides))
    with request.composer() as composer:
        typed = Namespace(overrides=request.texts(), resolve=arguments.resolve)
        composer.app_help(request.config_name, parser, typed)


def _print_config(request: Request[T], arguments: Namespace) -> None:
    """Print a configuration that breaks no rule, without its secrets. Values may be missing."""
    request.check_what_is_given()
    with request.composer() as composer, redirect_stdout(StringIO()) as printed:
        overrides, package = request.texts(), arguments.package
        composer.show_cfg(request.config_name, overrides, arguments.cfg, package, arguments.resolve)
    sys.stdout.write(redact(printed.getvalue()))


def _print_of_hydra(request: Request[T], parser: ArgumentParser, arguments: Namespace) -> None:
    """Print what Hydra says about itself, or what a shell completes."""
    with request.composer() as composer:
        if arguments.hydra_help:
            composer.hydra_help(request.config_name, parser, arguments)
        elif arguments.info:
            composer.show_info(arguments.info, request.config_name, list(request.overrides))
        else:
            composer.shell_completion(request.config_name, list(request.overrides))


def _help_text(description: str, examples: Sequence[str]) -> str:
    return "\n".join([description.strip(), "", "Examples:", *(f"  {example}" for example in examples), "", ""])
