"""The check passes a server that counts every token and refuses too many, and fails every other one."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from nemo_prolong.export.serving.check_server import KEY, CheckError, check, check_stops

LIMIT = 4096


class Server(ThreadingHTTPServer):
    """A model of four characters a token; ``fault`` is what it does wrong."""

    fault = ""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments) -> None:
        """Say nothing."""

    def answer(self, status: int, value) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if self.server.fault == "not healthy" else 200, {})
        else:
            self.answer(200, {"data": [] if self.server.fault == "no model" else [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens, fault = len(body["prompt"]) // 4, self.server.fault
        if tokens + body["max_tokens"] > LIMIT and fault not in ("takes more", "cuts"):
            self.answer(400, {"error": "too long"})
        elif tokens > 2000 and fault == "fails on long prompts":
            self.answer(500, {"error": "out of memory"})
        else:
            counted = min(tokens, 1000) if fault == "cuts" else tokens
            usage = {} if fault == "no usage" else {"usage": {"prompt_tokens": counted}}
            text = " 12345" if fault == "forgets" else f" {KEY}"
            forced = body.get("logit_bias", {}).keys() - ({"497"} if fault == "goes on" else set())
            reason = {"finish_reason": "stop" if forced else "length"} if fault != "no reason" else {}
            self.answer(200, {"choices": [{"text": text, **reason}], **usage})


@contextmanager
def server(fault: str = ""):
    http = Server(("127.0.0.1", 0), Handler)
    http.fault = fault
    thread = Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def test_a_good_server_passes_with_an_almost_full_prompt(capsys):
    with server() as url:
        assert check(url, LIMIT, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "healthy: tiny" and lines[2] == "longer prompt: refused"
    counted = int(lines[1].split()[2])
    assert 0.97 * LIMIT < counted <= LIMIT - 16


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("not healthy", "does not answer 200 within 0.1 s"),
        ("no model", "names no model"),
        ("no usage", "the answer has no text or no usage"),
        ("cuts", "tokens is counted as 1000: the server cuts prompts"),
        ("fails on long prompts", "is answered with status 500"),
        ("takes more", "a prompt longer than 4096 tokens is answered with status 200, not refused"),
    ],
)
def test_a_faulty_server_fails_with_what_it_does_wrong(fault, message):
    with server(fault) as url, pytest.raises(CheckError) as caught:
        check(url, LIMIT, 0.1 if fault == "not healthy" else 5)
    assert message in str(caught.value)


def test_a_server_that_is_not_there_fails():
    with server() as url:
        pass
    with pytest.raises(CheckError, match="does not answer 200"):
        check(url, LIMIT, 0.1)


def test_a_length_too_short_for_the_check_is_refused():
    with server() as url, pytest.raises(CheckError, match="50 tokens are too few for the check"):
        check(url, 50, 5)


def test_the_file_in_an_export_needs_only_python(fp8, tmp_path):
    program = fp8 / "check_server.py"
    with server("forgets") as url:
        command = [sys.executable, "-I", "-S", program, "--url", url, "--timeout", "5"]
        whole = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        short = subprocess.run([*command, "--tokens", str(LIMIT)], capture_output=True, text=True, cwd=tmp_path)
        strict = subprocess.run([*command, "--tokens", str(LIMIT), "--recall"], capture_output=True, cwd=tmp_path)
    assert whole.returncode == 1 and "is answered with status 400" in whole.stderr
    assert short.returncode == 0 and short.stdout.splitlines()[-1] == "pass key: not found"
    assert strict.returncode == 1


def test_a_server_that_ends_answers_at_each_token_passes(capsys):
    with server() as url:
        assert check_stops(url, [497, 505], 5)
    assert capsys.readouterr().out == "answers end at 497, 505\n"


def test_a_server_that_goes_on_after_a_token_is_told_of(capsys):
    with server("goes on") as url:
        assert not check_stops(url, [497, 505], 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "answers end at 505"
    assert lines[1].startswith("answers go on after 497: the server does not read generation_config.json")
    assert lines[1].endswith("Send stop_token_ids=[497, 505] with each request.")


def test_a_server_that_does_not_say_why_it_ended_fails():
    with server("no reason") as url, pytest.raises(CheckError, match="the answer does not say why it ended"):
        check_stops(url, [497], 5)


@pytest.mark.parametrize(("fault", "more", "code"), [("", (), 0), ("goes on", (), 0), ("goes on", ("--stop",), 1)])
def test_the_file_in_an_export_knows_what_ends_an_answer(fp8, tmp_path, fault, more, code):
    stops = json.loads((fp8 / "generation_config.json").read_text())["eos_token_id"]
    assert 497 in stops
    with server(fault) as url:
        command = [sys.executable, "-I", "-S", fp8 / "check_server.py", "--url", url, "--timeout", "5"]
        done = subprocess.run([*command, "--tokens", str(LIMIT), *more], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    ending = [str(stop) for stop in stops if not (fault and stop == 497)]
    assert f"answers end at {', '.join(ending)}" in done.stdout
    assert ("answers go on after 497" in done.stdout) == bool(fault)
