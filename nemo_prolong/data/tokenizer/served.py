"""Whether a model will be served with the text and the ids that it is trained on.

Those who serve it call ``AutoTokenizer.from_pretrained(DIR).apply_chat_template``. So that is asked, in a clean process
without torch, which takes one to three seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer.chat import ChatEncoder
from nemo_prolong.data.tokenizer.places import REASONING
from nemo_prolong.data.tokenizer.rendering import REFUSALS
from nemo_prolong.data.tokenizer.turns import ANSWER, QUESTION, SYSTEM, TOOL, calling
from nemo_prolong.errors import ConfigError, DataError

_PROGRAM = Path(__file__).with_name("served_program.py")
_TIMEOUT_SECONDS = 600
_ENVIRONMENT = {
    "USE_TORCH": "0",
    "USE_TF": "0",
    "USE_JAX": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_THOUGHT = "Counting the dwarfs."


_ANSWERS: dict[str, dict[str, Any]] = {}
"""What the program said, by a hash of the tokenizer and the questions: many preparations have the same."""


@dataclass(frozen=True)
class _Probe:
    """A conversation on which both sides must agree.

    Attributes:
        conversation: The conversation.
        prompt: Whether it ends with what a model is given before an answer.
        word: What a template must write for the probe to say anything about it.
    """

    conversation: Conversation
    prompt: bool = False
    word: str = ""


def check_served_template(chat: ChatEncoder) -> bool:
    """Compare the text and the ids of short conversations with those of ``transformers``.

    Args:
        chat: The encoder to check.

    Returns:
        Whether the tokenizer's own template writes all that the encoder's writes. It does not where there is none.

    Raises:
        DataError: If ``AutoTokenizer`` cannot load the tokenizer directory, or gives other ids.
        ConfigError: If it gives another text: the model would be served another format than it was trained on.
    """
    probes = list(_probes(chat))
    found = _ask_transformers(chat, probes)
    complete = any("text" in answer for answer in found["answers"]) and bool(found["has_template"])
    for probe, answer in zip(probes, found["answers"], strict=True):
        if "error" in answer and not probe.word:
            continue  # some formats have no system message
        ours = _render_or_say_why_not(chat, probe)
        if probe.word and probe.word not in answer.get("text", ""):
            complete = complete and probe.word not in ours
        elif ours != answer["text"]:
            raise _other_text(chat, ours, answer["text"], found["special_tokens"])
        elif not probe.prompt:
            _check_ids(chat, probe, answer["input_ids"], found["version"])
    return complete


def _probes(chat: ChatEncoder) -> Iterator[_Probe]:
    talks: Sequence[list[dict[str, Any]]] = (
        [QUESTION, ANSWER],
        [SYSTEM, QUESTION, ANSWER],
        [QUESTION, ANSWER, QUESTION, ANSWER],
    )
    for messages in talks:
        yield _Probe(Conversation(messages))
        yield _Probe(Conversation(messages[:-1]), prompt=True)
    for calls in (calling(), calling()[:2]):
        yield _Probe(
            Conversation(calls, variables={"tools": [TOOL]}), word=calls[1]["tool_calls"][0]["function"]["name"]
        )
    for key in REASONING:
        yield _Probe(Conversation([QUESTION, {**ANSWER, key: _THOUGHT}]), word=_THOUGHT)


def _render_or_say_why_not(chat: ChatEncoder, probe: _Probe) -> str:
    try:
        return chat.template.render(probe.conversation, prompt=probe.prompt)
    except REFUSALS as error:
        return f"an error, {error}"


def _check_ids(chat: ChatEncoder, probe: _Probe, expected: list[int], version: str) -> None:
    try:
        found = chat.encode(probe.conversation).input_ids.tolist()
    except DataError:
        return  # refused, so no row is made of such a one
    if found == expected:
        return
    place = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
    raise DataError(
        f"tokenizer={chat.encoder.directory}",
        f"transformers {version} makes other ids of a conversation than its tokenizer.json: from token {place} on "
        f"{expected[place:][:4]} where that gives {found[place:][:4]}.",
        "Load it with AutoTokenizer and save it again, so that tokenizer.json says all that the other files say.",
    )


def _other_text(chat: ChatEncoder, text: str, other: str, special_tokens: dict[str, Any]) -> ConfigError:
    ours, theirs = _first_difference(text, other)
    unknown = {name: token for name, token in special_tokens.items() if chat.encoder.named_tokens.get(name) != token}
    remedy = "Train on the text that the model is served with: add the marks to a copy of the tokenizer's template."
    if unknown:
        remedy = f"Write {json.dumps(unknown)[1:-1]} in {chat.encoder.directory / 'tokenizer_config.json'}."
    return ConfigError(
        chat.template.name,
        f"renders another text than the tokenizer's own template: {ours!r} where that has {theirs!r}.",
        remedy,
    )


def _first_difference(text: str, other: str) -> tuple[str, str]:
    """Return what two different texts hold from the first place where they differ."""
    shorter = min(len(text), len(other))
    place = next((n for n in range(shorter) if text[n] != other[n]), shorter)
    return text[place : place + 30], other[place : place + 30]


def _ask_transformers(chat: ChatEncoder, probes: Sequence[_Probe]) -> dict[str, Any]:
    questions = [
        {
            "messages": probe.conversation.messages,
            "variables": {**chat.variables, **probe.conversation.variables},
            "add_generation_prompt": probe.prompt,
        }
        for probe in probes
    ]
    asked = {"date": chat.format.date, "template": chat.template.source, "questions": questions}
    directory = chat.encoder.directory
    identity = hashlib.sha256((_files(directory) + json.dumps(asked)).encode()).hexdigest()
    if identity not in _ANSWERS:
        _ANSWERS[identity] = _run_program(json.dumps({**asked, "directory": str(directory)}))
    found = _ANSWERS[identity]
    if "error" in found:
        raise DataError(
            f"tokenizer={directory}",
            f"AutoTokenizer of transformers {found['version']} cannot load it: {found['error']:.400}.",
            "Load and save it with that version, or correct tokenizer_class in its tokenizer_config.json "
            "(PreTrainedTokenizerFast takes any tokenizer.json).",
        )
    return found


def _files(directory: Path) -> str:
    """Return a hash of what decides how the tokenizer is loaded."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            digest.update(f"{path.relative_to(directory)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _run_program(request: str) -> dict[str, Any]:
    try:
        result = subprocess.run(
            # -P: the modules beside the program must not stand in for others of their name.
            [sys.executable, "-P", str(_PROGRAM)],
            input=request,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"version": "", "error": f"no answer in {_TIMEOUT_SECONDS} s"}
    except (IndexError, ValueError):
        return {"version": "", "error": result.stderr.strip()[-400:]}
    return found
