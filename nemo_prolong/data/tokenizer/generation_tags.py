"""The ``{% generation %}`` tags of a training template, which whoever serves the model does without."""

from __future__ import annotations

import re

_TAG = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")


def without_generation_tags(source: str) -> str:
    """Return a chat template without the tags, which many servers refuse as unknown.

    Comments take their place, which leave the white space around them as the tags did.
    """
    return _TAG.sub(r"{#\1 \2 \3#}", source)
