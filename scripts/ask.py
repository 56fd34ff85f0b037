"""Ask an exported model one question: ``python scripts/ask.py DIRECTORY QUESTION``; needs nothing but transformers."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the answer."""
    if len(sys.argv) != 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    directory, question = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    stop = tokenizer.eos_token_id
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False, repetition_penalty=1.2, pad_token_id=stop)
    print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
