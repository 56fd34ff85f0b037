"""Write the data card of a prepared directory: ``card.html`` for a browser, ``card.md`` for where only text goes.

Both follow from ``manifest.json`` and ``samples.json`` alone: no date, no place and no machine is in them, so that two
preparations with the same result have the same card.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.data_manifest import MANIFEST, SAMPLES, DataManifest, Samples, read_for_card
from nemo_prolong.report.data_card import markdown, page


def write_card(directory: Path) -> None:
    """Write ``card.html`` and ``card.md`` into a data directory.

    Raises:
        DataError: If ``manifest.json`` or ``samples.json`` is missing or does not say what a card needs.
    """
    manifest = read_for_card(directory / MANIFEST, DataManifest)
    samples = read_for_card(directory / SAMPLES, Samples)
    sha256 = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    write_text_atomically(directory / "card.html", page.render(manifest, samples, sha256))
    write_text_atomically(directory / "card.md", markdown.render(manifest, samples, sha256))
