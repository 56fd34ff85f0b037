"""Write the data of the miniature recipe."""

from pathlib import Path

from nemo_prolong.config.app import hydra_script
from nemo_prolong.config.schema import PrepareConfig

DESCRIPTION = """\
Turn the Python code, documentation and docstrings of this machine into a tokenizer and directories of packed rows."""

EXAMPLES = [
    "python scripts/prepare_data.py",
    "python scripts/prepare_data.py output=runs/try/data max_bytes_per_domain=2M",
]


def run(cfg: PrepareConfig, overrides: list[str]) -> None:
    """Prepare; heavy imports happen only here."""
    from nemo_prolong.logs import run_logging

    log_file = Path(f"{cfg.output}.log")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with run_logging(log_file, console=True):
        from nemo_prolong.data.prepare import prepare

        prepare(cfg)


def main() -> None:
    """Read the command line."""
    hydra_script(PrepareConfig, "prepare_data", run, DESCRIPTION, EXAMPLES)


if __name__ == "__main__":
    main()
