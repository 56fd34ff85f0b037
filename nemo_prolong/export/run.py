"""Export a run: refuse what can be refused at once, then write, compare and give the output its name."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.schema import ExportConfig, ModelConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.export.output import check_output
from nemo_prolong.export.serving.target import START_FILE, check_target
from nemo_prolong.logs import run_logging
from nemo_prolong.records.export_manifest import ExportManifest
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.units import format_seconds

log = logging.getLogger(__name__)

LOG_FILE = "export.log"


def export(cfg: ExportConfig) -> None:
    """Write the newest checkpoint of ``cfg.run`` as a Hugging Face directory.

    Library output goes to ``export.log`` in the run directory. The output appears when it is complete and verified, or
    not at all.

    Raises:
        CheckpointError: If the run or its checkpoint is missing or incomplete.
        ConfigError: If settings of the target contradict each other.
        ExportError: If the output is taken, the model cannot be exported or does not fit on the device that is to
            serve it, or the export does not equal it.
    """
    run_dir = Path(cfg.run)
    is_complete = cfg.when_complete == "succeed" and run_dir.is_dir() and _is_complete(cfg, run_dir)
    if not is_complete:
        check_output(Path(cfg.output), overwrite=cfg.overwrite)
    if not run_dir.is_dir():
        raise CheckpointError(
            f"run={cfg.run}", "the run directory does not exist.", "Name a run such as run=runs/demo/sft."
        )
    manifest = StageManifest.read(run_dir)
    check_target(cfg, manifest.model, manifest.advertised_context_length)
    started = time.monotonic()
    with run_logging(run_dir / LOG_FILE, console=True):
        log.info(
            "exporting %s as %s to %s; library output goes to %s/%s", cfg.run, cfg.dtype, cfg.output, run_dir, LOG_FILE
        )
        if is_complete:
            log.info("%s is this export already", cfg.output)
        else:
            # torch, transformers and NeMo take seconds to import and print warnings; nothing above needs them.
            from nemo_prolong.export.assemble import write_export

            write_export(cfg)
        if cfg.export.push_to_hub is not None:
            from nemo_prolong.export.hub import push_to_hub

            push_to_hub(Path(cfg.output), cfg.export)
        log.info("exported in %s; %s", format_seconds(time.monotonic() - started), _use(cfg))


def _is_complete(cfg: ExportConfig, run_dir: Path) -> bool:
    """Return whether the output is this export of the last step."""
    manifest = StageManifest.read(run_dir)
    return manifest.status == "complete" and ExportManifest.describes(cfg, manifest.step)


def check_planned(cfg: ExportConfig, model: ModelConfig, advertised_context_length: int) -> None:
    """Refuse an export before its run is trained; see ``check_target`` for arguments.

    Raises:
        ConfigError: If settings of the target contradict each other.
        ExportError: If the output is taken, or the model does not fit on the device that is to serve it.
    """
    check_output(Path(cfg.output), overwrite=cfg.overwrite)
    check_target(cfg, model, advertised_context_length)


def _use(cfg: ExportConfig) -> str:
    """Return how the output is used."""
    if cfg.export.format == "hf":
        call = f"from_pretrained({json.dumps(cfg.output, ensure_ascii=False)})"
        return f"load it with:\n  AutoModelForCausalLM.{call}, AutoTokenizer.{call}"
    if cfg.export.format == "trtllm_engine_checkpoint":
        build = ["trtllm-build", "--checkpoint_dir", cfg.output, "--output_dir", "ENGINES"]
        return f"build engines with:\n  {shell_command(build)}"
    return f"serve it with:\n  {shell_command(['bash', f'{cfg.output}/{START_FILE}'])}"
