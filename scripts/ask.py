"""Ask an exported model one question: ``python scripts/ask.py DIRECTORY QUESTION``; needs nothing but transformers."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the answer."""
    if len(sys.argv) != 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    directory, question = sys.argv[1:]
    # A missing directory would be taken for the name of a model on the Hub.
    if not (Path(directory) / "config.json").is_file():
        sys.exit(f"{directory} is no exported directory: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    prompt = make_prompt(tokenizer, question)
    torch.manual_seed(0)
    # What ends an answer is in generation_config.json. The tokenizer's eos_token may end documents only.
    stops = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False, repetition_penalty=1.2, pad_token_id=stops[0])
    answer = [token for token in output[0, prompt["input_ids"].shape[1] :].tolist() if token not in stops]
    print(tokenizer.decode(answer, skip_special_tokens=True).strip())


def make_prompt(tokenizer: Any, question: str) -> Any:
    """Return the question as the model was trained to see it; for a base model, as it is."""
    if tokenizer.chat_template is None:
        return tokenizer(question, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


if __name__ == "__main__":
    main()
