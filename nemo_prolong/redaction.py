"""Takes secrets out of what is written: logs, configurations, manifests, what is sent to trackers.

Four things count as a secret: the value of an environment variable whose name says so, the credentials in an address,
the value of a key whose name says so, and keys that have a form of their own.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "<hidden>"
"""What stands in the place of a secret."""

_NAMED_SO = (
    r"(?:api_?key|access_?key(?:_?id)?|secret(?:_?(?:access_?)?key)?|passw(?:or)?d"
    r"|(?:access|api|auth|bearer|hf|hub|refresh|session|tracking|wandb)_?token)"
)
_ENVIRONMENT_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY)(?:_|$)", re.IGNORECASE
)
_NO_SECRET_ENDING = re.compile(r"_(?:PATH|FILE|DIR)$", re.IGNORECASE)
_SHORTEST_VALUE = 8
"""Characters: shorter values of the environment, such as ``true``, would be found in innocent words."""

_VALUE = r"""(?!null\b|None\b)(?:"[^"]*"|'[^']*'|[^\s'",;&}]+)"""
_KEY = re.compile(rf"(?:^|[^a-z])(?:{_NAMED_SO}|token)$", re.IGNORECASE)
_PATTERNS = (
    # scheme://user:password@host, scheme://token@host
    (re.compile(r"(?<=://)[^\s/@'\"]+(?=@)"), HIDDEN),
    # ?token=..., &X-Amz-Signature=...
    (re.compile(r"(?<=[?&])((?:token|sig|signature|key|x-amz-[a-z-]+)=)[^\s&'\"]+", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(rf"((?<![a-z]){_NAMED_SO}['\"]?\s*[=:]\s*){_VALUE}", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}"), rf"\g<1>{HIDDEN}"),
    # Hugging Face, AWS, GitHub.
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|A(?:KI|SI)A[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,})\b"), HIDDEN),
)


def redact(text: str) -> str:
    """Return the text with every secret in it replaced by ``<hidden>``.

    >>> redact("s3://user:pw@host/data?token=abc and HF_TOKEN=hf_1 with 4096 target_tokens: 12")
    's3://<hidden>@host/data?token=<hidden> and HF_TOKEN=<hidden> with 4096 target_tokens: 12'
    """
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_values(value: Any) -> Any:
    """Return plain JSON data without secrets: texts as ``redact`` does, and values of keys that are named as secrets.

    >>> redact_values({"api_key": "abc", "tokenizer": "dir", "addresses": ["http://me:pw@host"]})
    {'api_key': '<hidden>', 'tokenizer': 'dir', 'addresses': ['http://<hidden>@host']}
    """
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(key, item) else redact_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_values(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _KEY.search(str(key)) is not None


def names_a_secret(name: str) -> bool:
    """Return whether the name of a variable of the environment says that its value is a secret.

    >>> names_a_secret("HF_TOKEN"), names_a_secret("HF_TOKEN_PATH"), names_a_secret("NCCL_DEBUG")
    (True, False, False)
    """
    return _ENVIRONMENT_NAME.search(name) is not None and _NO_SECRET_ENDING.search(name) is None


def _environment_secrets() -> list[str]:
    """Return the values of secret variables, the longest first: one may contain another."""
    values = {value for name, value in os.environ.items() if names_a_secret(name) and len(value) >= _SHORTEST_VALUE}
    return sorted(values, key=len, reverse=True)
