"""The templates of the files that people and servers read.

What stands in them comes from configuration and data too. The filters ``text`` and ``code`` keep it text.
"""

from __future__ import annotations

import jinja2

from nemo_prolong.text import markdown_code, markdown_text
from nemo_prolong.units import format_bytes

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("nemo_prolong.export"),
    undefined=jinja2.StrictUndefined,
    # Of HTML only, of which none is written.
    autoescape=jinja2.select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters.update(text=markdown_text, code=markdown_code, bytes=format_bytes)


def render(template: str, **values: object) -> str:
    """Return a file made of one of the templates; a value that the template names must be given."""
    return _ENVIRONMENT.get_template(template).render(**values)
