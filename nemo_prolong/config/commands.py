"""Commands as one would type them: values as Hydra reads them, words as the shell reads them.

Every command and every setting that is printed, recorded or started goes through these functions. What a name or a path
is made of then changes nothing: blanks, quotes, commas, braces, dollar signs, line ends.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, Literal

_TRAIN = "scripts/train.py"

_PLAIN = re.compile(r"(?![-+.\d])(?!(?:true|false|null|nan|inf)$)[\w/.+@%*-]+", re.ASCII | re.IGNORECASE)
"""Text that Hydra reads as itself without quotes, and the shell too."""

_PLAIN_ALONE = re.compile(rf"{_PLAIN.pattern}(?::{_PLAIN.pattern})*|\d+(?::\d\d){{2}}", re.ASCII | re.IGNORECASE)
"""The same outside of a list or a dict, where a colon is no separator; times of day too."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def hydra_value(value: Any) -> str:
    r"""Return a value as Hydra's command line reads it back, of the same type.

    Args:
        value: None, a truth value, a number, text, or a list or dict of such. Keys of a dict are names of the schema.

    >>> print(hydra_value("runs/stage1"), hydra_value("a, b"), hydra_value("7"), hydra_value(["a b", None]))
    runs/stage1 "a, b" "7" ["a b",null]
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_entry(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_entry, value))}]"
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN_ALONE.fullmatch(value) else _quoted(value)


def _entry(value: Any) -> str:
    """Return a value as it stands in a list or a dict."""
    return _quoted(value) if isinstance(value, str) and not _PLAIN.fullmatch(value) else hydra_value(value)


def _quoted(text: str) -> str:
    # OmegaConf takes ${ for an interpolation, inside of quotes too, unless a backslash is before it. It halves the
    # backslashes that are there already.
    text = re.sub(r"(\\*)\$\{", lambda match: f"{2 * match[1]}\\${{", text)
    # Backslashes before a quote or before the end escape it for Hydra, and no others.
    text = re.sub(r'(\\*)"', lambda match: f'{2 * match[1]}\\"', text)
    text = re.sub(r"\\+$", lambda match: 2 * match[0], text)
    return f'"{text}"'


def hydra_override(key: str, value: Any) -> str:
    """Return what sets a key, for Hydra and not yet for a shell.

    >>> hydra_override("data.root", "/data/run=7")
    'data.root="/data/run=7"'
    """
    return f"{key}={hydra_value(value)}"


def typed(key: str, value: Any) -> str:
    r"""Return what sets a key, as it is typed in a shell.

    >>> print(typed("parent", "runs/stage1"), typed("parent", "runs/stage 1"))
    parent=runs/stage1 'parent="runs/stage 1"'
    """
    return shell_word(hydra_override(key, value))


def shell_word(word: str) -> str:
    r"""Return a word as bash reads it back, on one line and without characters that control a terminal.

    >>> print(shell_word("name=a"), shell_word("name=a b"), shell_word("a\nb"))
    name=a 'name=a b' $'a\nb'
    """
    if not _CONTROL.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'")
    escaped = _CONTROL.sub(lambda match: _ansi_c(match[0]), escaped)
    return f"$'{escaped}'"


def _ansi_c(control: str) -> str:
    if control in "\t\n\r":
        return {"\t": r"\t", "\n": r"\n", "\r": r"\r"}[control]
    return "".join(f"\\{byte:03o}" for byte in control.encode())


def shell_command(words: Iterable[str]) -> str:
    """Return a command line of words as bash reads them back.

    >>> shell_command(["python", "scripts/train.py", "name=a b"])
    "python scripts/train.py 'name=a b'"
    """
    return " ".join(map(shell_word, words))


def train_command(
    overrides: Sequence[str],
    ranks_per_node: int = 1,
    num_nodes: int = 1,
    launcher: Literal["torchrun", "srun"] = "torchrun",
) -> str:
    """Return the command line that trains with these overrides on this many ranks.

    Args:
        overrides: What is typed after the script, e.g. ``["+exp=mini/stage1"]``.
        ranks_per_node: GPUs (or CPU processes) per machine.
        num_nodes: Machines; with more than one, the command of torchrun is to be run on each of them.
        launcher: What starts more than one rank.

    >>> train_command(["+exp=mini/stage1"], ranks_per_node=2)
    'torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1'
    """
    if num_nodes == ranks_per_node == 1:
        words = ["python"]
    elif launcher == "srun":
        words = ["srun", "--nodes", str(num_nodes), "--ntasks-per-node", str(ranks_per_node), "python"]
    else:
        nodes = ["--nnodes", str(num_nodes)] if num_nodes > 1 else []
        words = ["torchrun", *nodes, "--nproc-per-node", str(ranks_per_node)]
    return shell_command([*words, _TRAIN, *overrides])
