"""Compose the typed configuration of a script from what is typed after it, with Hydra's compose API.

Hydra composes and does nothing else: it runs no job, makes no directory, does not change the working directory and
leaves logging alone. What it cannot compose is explained by ``config.hydra_errors``. Needs no torch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_prolong.config.defaults import register_defaults
from nemo_prolong.config.experiments import check_experiment, experiments
from nemo_prolong.config.findings import NothingGivenError, raise_all
from nemo_prolong.config.hydra_errors import COMPOSITION_ERRORS, explain
from nemo_prolong.config.incomplete import load_incomplete
from nemo_prolong.config.load import load
from nemo_prolong.config.rules import check, findings
from nemo_prolong.config.schema import Section
from nemo_prolong.config.typed_text import as_text
from nemo_prolong.errors import ConfigError

T = TypeVar("T", bound=Section)

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
"""The configuration files of this checkout, wherever a script is started from."""

# Whoever composes the files of CONFIG_DIR needs the defaults that they name.
register_defaults()


@dataclass(frozen=True)
class Request(Generic[T]):
    """A configuration that is asked for on a command line.

    Attributes:
        schema: What it must be.
        script: Name of the script without ``.py``, as experiments declare it.
        config_name: The entry point, a file name without ``.yaml``.
        overrides: What was typed, without flags.
        config_dirs: Directories of the files: that of the entry point, then those of the user.
    """

    schema: type[T]
    script: str
    config_name: str
    overrides: tuple[str, ...]
    config_dirs: tuple[Path, ...]

    @classmethod
    def of(cls, schema: type[T], script: str, arguments: Namespace) -> Request[T]:
        """Return the request of a command line that Hydra's parser has read.

        Raises:
            ConfigError: If the directory of ``--config-dir`` does not exist.
        """
        main, more = Path(arguments.config_path or CONFIG_DIR).absolute(), arguments.config_dir
        if more and not Path(more).is_dir():
            rule = f"Additional config directory '{Path(more).absolute()}' not found."
            raise ConfigError("--config-dir", rule, "Give a directory that exists.")
        config_dirs = (main, Path(more).absolute()) if more else (main,)
        return cls(schema, script, arguments.config_name or script, tuple(arguments.overrides), config_dirs)

    @contextmanager
    def composer(self) -> Iterator[Any]:
        """Give Hydra over the files of this request, for as long as it is needed.

        Raises:
            ConfigError: For an experiment of another script, and for whatever Hydra raises meanwhile.
        """
        check_experiment(self.script, self.overrides, self.config_dirs)
        try:
            with hydra.initialize_config_dir(str(self.config_dirs[0]), job_name=self.script, version_base="1.3"):
                composer = GlobalHydra.instance().hydra
                for directory in self.config_dirs[1:]:
                    _add_directory(composer, directory)
                yield composer
        except COMPOSITION_ERRORS as error:
            available = experiments(self.config_dirs, self.script)
            raise explain(error, self.schema, self.overrides, available) from error

    def compose(self) -> tuple[DictConfig, list[str]]:
        """Return what Hydra composes, not yet typed, and the overrides that are no settings of Hydra.

        Raises:
            ConfigError: If it cannot be composed.
        """
        with self.composer():
            cfg = hydra.compose(self.config_name, self.texts(), return_hydra_config=True)
        # So that ${hydra:...} can be resolved.
        HydraConfig.instance().set_config(cfg)
        # As they were typed: what one of them interpolates is not resolved.
        overrides: Any = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg, overrides

    def texts(self) -> list[str]:
        """Return the overrides with quotes around what stands for text and Hydra would take for a number."""
        return [as_text(self.schema, override) for override in self.overrides]

    def load(self) -> tuple[T, list[str]]:
        """Return the typed configuration, checked, and the overrides that are no settings of Hydra.

        Raises:
            ConfigError: For everything that cannot be composed, loaded or run.
        """
        cfg, overrides = self.compose()
        typed = load(cfg, self.schema)
        check(typed)
        return typed, overrides

    def check_what_is_given(self) -> None:
        """Check a configuration that may still lack values.

        Raises:
            ConfigError: For everything that cannot be composed, or breaks a rule whatever the missing values will be.
        """
        found = findings(load_incomplete(self.compose()[0], self.schema))
        raise_all([error for error in found if not isinstance(error, NothingGivenError)])


def compose(schema: type[T], script: str, arguments: Sequence[str]) -> T:
    """Return the checked configuration that a script of this project would get from these arguments.

    Args:
        schema: What the configuration must be.
        script: Name of the script without ``.py``, which is that of its entry point in ``conf/``.
        arguments: What would be typed after the script.

    Raises:
        ConfigError: For everything that cannot be composed, loaded or run.
    """
    return Request.of(schema, script, get_args_parser().parse_args(arguments)).load()[0]


def _add_directory(composer: Any, directory: Path) -> None:
    """Let Hydra search a directory of the user after its own, as ``--config-dir`` of ``hydra.main`` does."""
    loader = composer.config_loader
    search_path = loader.get_search_path()
    search_path.prepend("command-line", f"file://{directory}", anchor=SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(search_path)
