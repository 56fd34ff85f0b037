"""Send an export to the Hugging Face Hub: only what was verified, and only the files that the manifest lists.

The token is the one that ``hf auth login`` or ``HF_TOKEN`` left. It is never read here, written or printed. The address
is huggingface_hub's. ``HF_ENDPOINT`` names another Hub.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from huggingface_hub import HfApi

from nemo_prolong.config.schema import ExportTargetConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.records.export_manifest import MANIFEST_FILE, ExportManifest
from nemo_prolong.redaction import redact
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)


def push_to_hub(directory: Path, target: ExportTargetConfig) -> str | None:
    """Send a verified export in one commit, which replaces whatever the repository holds.

    A dry run says what would be sent.

    Args:
        directory: A finished export.
        target: ``push_to_hub`` names the repository.

    Returns:
        Address of the commit; None for a dry run.

    Raises:
        ExportError: If the export is not verified or was changed, or the Hub refuses it.
    """
    repository = target.push_to_hub
    assert repository is not None
    sizes = _listed_files(directory, repository)
    visibility = "private" if target.hub_private else "public"
    if target.hub_dry_run:
        log.info("would send to %s (made %s if it does not exist):", repository, visibility)
        for name, size in sizes.items():
            log.info("  %s  %s", name, format_bytes(size))
        return None
    try:
        return _send(directory, list(sizes), target)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"export.push_to_hub={repository}",
            f"the Hub did not take it: {redact(str(error)).strip().splitlines()[0]}",
            f"The export is complete in {directory}. Check the name and the token (hf auth login), then export again "
            "with overwrite=true.",
        ) from error


def _listed_files(directory: Path, repository: str) -> dict[str, int]:
    """Return the files of the manifest, and itself, with their sizes in bytes."""
    manifest = ExportManifest.read(directory)
    what = f"export.push_to_hub={repository}"
    if manifest.verification is None:
        raise ExportError(what, f"{directory} was exported without verification.", "Set verify=true.")
    names = [*sorted(manifest.files), MANIFEST_FILE]
    sizes = {name: (directory / name).stat().st_size for name in names if (directory / name).is_file()}
    changed = [name for name, file in manifest.files.items() if sizes.get(name) != file.num_bytes]
    if changed:
        raise ExportError(what, f"{directory} was changed after the export: {', '.join(changed[:3])}.", "Export again.")
    return sizes


def _send(directory: Path, names: list[str], target: ExportTargetConfig) -> str:
    api, repository = HfApi(), str(target.push_to_hub)
    api.create_repo(repository, private=target.hub_private, exist_ok=True)
    log.info("sending %d files to %s", len(names), repository)
    # What an earlier export left there goes: of two sets of weights, loaders would take the wrong one.
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=directory,
        # They are patterns there: a name with a bracket would not match itself.
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns="*",
        commit_message="Export of nemo_prolong",
    )
    address = str(commit.commit_url)
    log.info("published: %s", address)
    return address
