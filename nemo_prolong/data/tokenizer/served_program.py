"""What ``transformers`` makes of conversations, in a process of its own: it reads a JSON object and writes one.

It imports nothing of this package, so that it sees a tokenizer directory as those do who serve the model.
"""

import datetime as dates
import json
import sys
from collections.abc import Callable
from typing import Any


def _strftime_on(today: str) -> Callable[[str], str]:
    """Return what chat templates call ``strftime_now``, with ``today`` as the date."""
    return dates.datetime.fromisoformat(today).strftime


def _answer(tokenizer: Any, question: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    settings = {**shared, **question["variables"], "add_generation_prompt": question["add_generation_prompt"]}
    try:
        text, ids = (
            tokenizer.apply_chat_template(question["messages"], tokenize=tokenize, **settings)
            for tokenize in (False, True)
        )
    except Exception as error:  # a template may raise anything
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text, "input_ids": ids}


def main() -> None:
    """Answer the questions on standard input."""
    asked = json.load(sys.stdin)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            asked["directory"], trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # from_pretrained raises what its parts raise
        json.dump({"version": transformers.__version__, "error": f"{type(error).__name__}: {error}"}, sys.stdout)
        return
    shared: dict[str, Any] = {} if asked["date"] is None else {"strftime_now": _strftime_on(asked["date"])}
    if tokenizer.chat_template is None:
        shared["chat_template"] = asked["template"]
    answers = [_answer(tokenizer, question, shared) for question in asked["questions"]]
    found = {"version": transformers.__version__, "has_template": tokenizer.chat_template is not None}
    json.dump({**found, "special_tokens": tokenizer.special_tokens_map, "answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
