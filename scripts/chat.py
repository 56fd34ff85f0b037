"""Talk to an exported model from a terminal; needs nothing but transformers."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BatchEncoding, TextStreamer
from transformers.utils import logging

EXAMPLES = """\
examples:
  python scripts/chat.py exports/llama3-8b-512k
  python scripts/chat.py exports/llama3-8b-512k --file book.txt
  python scripts/chat.py exports/llama3-8b-512k --file book.txt --ask "Who is the narrator?" > answer.txt

/clear forgets the conversation but for the file; Ctrl-D ends.
"""


# Nothing from the network, and no code from the directory.
HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class PromptTooLong(Exception):
    """A conversation that does not fit into the context, with what to do about it."""


def main() -> None:
    """Read the command line and talk."""
    arguments = parse_arguments()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    config = AutoConfig.from_pretrained(arguments.directory, **HERE)
    if getattr(config, "quantization_config", None):
        sys.exit(
            f"{arguments.directory}: transformers does not read FP8 weights. Chat with the bf16 export, or serve it."
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.directory, **HERE)
    model = AutoModelForCausalLM.from_pretrained(arguments.directory, dtype="auto", use_safetensors=True, **HERE)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(arguments.seed)
    chat(model, tokenizer, arguments)


def parse_arguments() -> argparse.Namespace:
    """Return the command line; a missing directory or file ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", help="exported directory")
    parser.add_argument("--file", type=Path, help="text that the conversation is about, as long as the context allows")
    parser.add_argument("--ask", action="append", help="ask this and end; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(text="")
    arguments = parser.parse_args()
    if not (Path(arguments.directory) / "config.json").is_file():
        parser.error(f"{arguments.directory} is no exported directory: it has no config.json")
    if (Path(arguments.directory) / "rank0.safetensors").is_file():
        parser.error(f"{arguments.directory} holds the checkpoint of an engine, which transformers does not read")
    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0")
    if arguments.file:
        try:
            arguments.text = f"{arguments.file.read_text(encoding='utf-8')}\n\n"
        except FileNotFoundError:
            parser.error(f"{arguments.file} does not exist")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{arguments.file} cannot be read as text in UTF-8: {error}")
    return arguments


def chat(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Answer questions until there are no more, keeping the conversation."""
    conversation: list[dict[str, str]] = []
    for question in questions(arguments.ask):
        if question == "/clear":
            conversation = []
            continue
        content = question if conversation else arguments.text + question
        asked = [*conversation, {"role": "user", "content": content}]
        try:
            reply = answer(model, tokenizer, asked, arguments)
        except PromptTooLong as error:
            if arguments.ask:
                sys.exit(str(error))
            sys.stderr.write(f"{error}\n")
        else:
            conversation = [*asked, {"role": "assistant", "content": reply}]


def questions(asked: list[str] | None) -> Iterator[str]:
    """Yield what is asked on the command line, else what is typed, one line a question."""
    if asked:
        yield from asked
        return
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question


def answer(model: Any, tokenizer: Any, conversation: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    """Print the answer token by token and return it.

    Raises:
        PromptTooLong: If prompt and longest answer together exceed the length that the model advertises.
    """
    prompt = make_prompt(tokenizer, conversation).to(model.device)
    tokens, context = prompt["input_ids"].shape[1], model.config.max_position_embeddings
    if tokens + arguments.max_new_tokens > context:
        raise PromptTooLong(
            f"The prompt has {tokens} tokens and the answer may have {arguments.max_new_tokens}: more than the "
            f"{context} the model is made for. Shorten the file, type /clear, or lower --max-new-tokens."
        )
    stops, padding = stop_ids(model), model.generation_config.pad_token_id
    if padding is None:
        padding = stops[0]  # one answer at a time needs none, and generate warns without it
    sampling = {"temperature": arguments.temperature} if arguments.temperature else {}
    output = model.generate(
        **prompt,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=bool(sampling),
        streamer=AnswerStreamer(tokenizer, stops),
        pad_token_id=padding,
        **sampling,
    )
    reply = [token for token in output[0, tokens:].tolist() if token not in stops]
    return tokenizer.decode(reply, skip_special_tokens=True)


def stop_ids(model: Any) -> list[int]:
    """Return what ends an answer: ``eos_token_id`` of ``generation_config.json``, which may be one or several."""
    found = model.generation_config.eos_token_id
    if found is None:
        sys.exit(f"{model.name_or_path}: generation_config.json names no eos_token_id, so no answer would end.")
    return list(found) if isinstance(found, list) else [int(found)]


class AnswerStreamer(TextStreamer):
    """Prints an answer without the token that ends it, which need not be a special token of the tokenizer."""

    def __init__(self, tokenizer: Any, stops: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stops = torch.tensor(stops)

    def put(self, value: torch.Tensor) -> None:
        """Print the text of new tokens as soon as it is known."""
        if self.next_tokens_are_prompt or not torch.isin(value, self._stops.to(value.device)).any():
            super().put(value)


def make_prompt(tokenizer: Any, conversation: list[dict[str, str]]) -> Any:
    """Return the conversation as the model was trained to see it; for a base model, the texts one after the other."""
    if tokenizer.chat_template is None:
        prompt = tokenizer("\n".join(turn["content"] for turn in conversation), return_tensors="pt")
        if prompt["input_ids"][0, -1] == tokenizer.eos_token_id:
            # A tokenizer that ends every text with it says that nothing follows, and the answer would.
            prompt = BatchEncoding({name: values[:, :-1] for name, values in prompt.items()})
        return prompt
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


if __name__ == "__main__":
    main()
