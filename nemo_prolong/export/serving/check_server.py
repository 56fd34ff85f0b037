"""Check a running OpenAI-compatible server: is it up, does it take the whole context, refuse more, and end answers?

    python check_server.py --url http://localhost:8000 --tokens 524288

Needs nothing but Python. A pass key is hidden at the beginning of a long text and asked for at its end. The server must
say that it counted every token: one that cuts prompts would answer too. Whether the answer holds the key is reported;
--recall makes a wrong answer a failure. Each token that generation_config.json lists is made the likeliest one by
logit_bias. Whether the server then ends the answer is reported; --stop makes it a failure if it does not. Some servers
ignore logit_bias, which looks the same. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go, there and back again.\n"
KEY = "71432"
BEGINNING = f"There is a pass key hidden in this text. The pass key is {KEY}. Remember it.\n"
QUESTION = "What is the pass key? The pass key is"

ANSWER_TOKENS = 16
LARGEST_BIAS = 100
"""Of ``logit_bias``: the token is then chosen, whatever the model computes."""
PROBE_LINES = 50
LARGEST_MISS = 0.01
"""Share by which the counted tokens may differ from those that the probe foretells."""


class CheckError(Exception):
    """What the server does wrong."""


def request(url: str, body: dict[str, Any] | None, timeout_seconds: float) -> tuple[int, Any]:
    """Return status and JSON of a GET, or of a POST with a body; status 0 if nobody answers."""
    address = urlsplit(url)
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    connection = kind(address.netloc, timeout=timeout_seconds)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("POST" if data else "GET", address.path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, _json(response.read())
    except (OSError, HTTPException):
        return 0, None
    finally:
        connection.close()


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def say(line: str) -> None:
    """Print one line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wait_until_healthy(url: str, timeout_seconds: float) -> None:
    """Return when ``/health`` answers 200.

    Raises:
        CheckError: If it does not within the time.
    """
    deadline = time.monotonic() + timeout_seconds
    while request(f"{url}/health", None, 10)[0] != 200:
        if time.monotonic() > deadline:
            raise CheckError(f"{url}/health does not answer 200 within {timeout_seconds:g} s")
        time.sleep(1)


def model_name(url: str) -> str:
    """Return the name of the first model that is served.

    Raises:
        CheckError: If there is none.
    """
    status, answer = request(f"{url}/v1/models", None, 30)
    try:
        return str(answer["data"][0]["id"])
    except (TypeError, KeyError, IndexError) as error:
        raise CheckError(f"{url}/v1/models names no model (status {status})") from error


def complete(url: str, model: str, prompt: str, timeout_seconds: float) -> tuple[str, int]:
    """Return the answer to a prompt, and how many tokens the server counted in it.

    Raises:
        CheckError: If the server does not answer, or not with both.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    status, answer = request(f"{url}/v1/completions", body, timeout_seconds)
    if status != 200:
        raise CheckError(f"a prompt of {len(prompt)} characters is answered with status {status}: {answer}")
    try:
        return str(answer["choices"][0]["text"]), int(answer["usage"]["prompt_tokens"])
    except (TypeError, KeyError, IndexError) as error:
        raise CheckError(f"the answer has no text or no usage: {answer}") from error


def make_prompt(lines: int) -> str:
    """Return a prompt with this many lines between the key and the question."""
    return BEGINNING + LINE * lines + QUESTION


def check(url: str, tokens: int, timeout_seconds: float) -> bool:
    """Run every check; return whether the pass key was found.

    Raises:
        CheckError: With the first thing that is wrong.
    """
    wait_until_healthy(url, timeout_seconds)
    model = model_name(url)
    say(f"healthy: {model}")
    none, some = (complete(url, model, make_prompt(lines), timeout_seconds)[1] for lines in (0, PROBE_LINES))
    per_line = (some - none) / PROBE_LINES
    if per_line <= 0:
        raise CheckError(f"{PROBE_LINES} more lines are counted as {some - none} more tokens")
    lines = int((tokens - ANSWER_TOKENS - none) / per_line * (1 - LARGEST_MISS))
    if lines < 1:
        raise CheckError(f"{tokens} tokens are too few for the check; it needs {int(none + 2 * per_line) + 17}")
    started = time.monotonic()
    answer, counted = complete(url, model, make_prompt(lines), timeout_seconds)
    seconds, expected = time.monotonic() - started, none + lines * per_line
    if abs(counted - expected) > LARGEST_MISS * expected:
        raise CheckError(f"a prompt of about {expected:.0f} tokens is counted as {counted}: the server cuts prompts")
    say(f"long prompt: {counted} tokens in {seconds:.1f} s, answer {answer!r}")
    longer = make_prompt(int(lines * (1 + 5 * LARGEST_MISS) + tokens / per_line * LARGEST_MISS) + 2)
    status, _ = request(f"{url}/v1/completions", {"model": model, "prompt": longer, "max_tokens": 1}, timeout_seconds)
    if not 400 <= status < 500:
        raise CheckError(f"a prompt longer than {tokens} tokens is answered with status {status}, not refused")
    say("longer prompt: refused")
    return KEY in answer


def goes_on_after(url: str, token: int, timeout_seconds: float) -> bool:
    """Return whether an answer goes on after a token that is to end it.

    Raises:
        CheckError: If the server does not answer.
    """
    body = {"model": model_name(url), "prompt": QUESTION, "max_tokens": 4, "temperature": 0}
    body["logit_bias"] = {str(token): LARGEST_BIAS}
    status, answer = request(f"{url}/v1/completions", body, timeout_seconds)
    try:
        return status != 200 or str(answer["choices"][0]["finish_reason"]) != "stop"
    except (TypeError, KeyError, IndexError) as error:
        raise CheckError(f"the answer does not say why it ended: {answer}") from error


def check_stops(url: str, tokens: list[int], timeout_seconds: float) -> bool:
    """Report whether answers end at each of the tokens; return whether they do.

    Raises:
        CheckError: If the server does not answer.
    """
    going_on = [token for token in tokens if goes_on_after(url, token, timeout_seconds)]
    ending = [token for token in tokens if token not in going_on]
    if ending:
        say(f"answers end at {', '.join(map(str, ending))}")
    if going_on:
        say(
            f"answers go on after {', '.join(map(str, going_on))}: the server does not read generation_config.json, or "
            f"ignores logit_bias. Send stop_token_ids={tokens} with each request."
        )
    return not going_on


def stop_token_ids() -> list[int]:
    """Return what ends an answer of the model in whose directory this file lies; empty elsewhere."""
    try:
        path = Path(__file__).resolve().parent / "generation_config.json"
        found = json.loads(path.read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError):
        return []
    return list(found) if isinstance(found, list) else [found]


def advertised_length() -> int | None:
    """Return the context of the model in whose directory this file lies, or None."""
    try:
        config = json.loads((Path(__file__).resolve().parent / "config.json").read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError):
        return None


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tokens", type=int, default=advertised_length(), help="length that the server must take")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds to wait for the start and for an answer")
    parser.add_argument("--recall", action="store_true", help="fail if the pass key is not found")
    parser.add_argument("--stop", action="store_true", help="fail if an answer goes on after a token that ends it")
    arguments = parser.parse_args()
    if arguments.tokens is None:
        parser.error("--tokens is needed outside an exported directory")
    try:
        found = check(arguments.url.rstrip("/"), arguments.tokens, arguments.timeout)
        ends = check_stops(arguments.url.rstrip("/"), stop_token_ids(), arguments.timeout)
    except CheckError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    say("pass key: found" if found else "pass key: not found")
    return 0 if (found or not arguments.recall) and (ends or not arguments.stop) else 1


if __name__ == "__main__":
    sys.exit(main())
