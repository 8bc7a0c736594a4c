"""Gist tokens for your own texts: train on questions about contexts, save, load again and answer from gist rows alone.

    python examples/own_data.py --model folder/or/hub-name --data mine.jsonl --output runs/mine --lora 16

Each line of the file is {"context": "...", "question": "...", "answer": "..."}. The answer is what follows the question
as it stands, so end the question accordingly ("... Answer:"), or spell out your model's chat template in both. The last
line is not trained on: the saved model is asked it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from passkey.command_line import at_least, errors_as_one_line, input_file, output_folder

__all__ = ["answer", "main", "train"]

FIELDS = dict.fromkeys(("answer", "context", "question"), str)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a model (docs/families.md)")
    parser.add_argument("--data", type=input_file, required=True, help="JSON lines")
    parser.add_argument("--output", type=output_folder, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--gists", type=at_least(1), default=10, help="gist tokens per context, or per segment")
    parser.add_argument("--segment", type=at_least(1), help="tokens per segment; a context is one by default")
    parser.add_argument("--lora", type=at_least(0), default=0, help="rank of the adapter; all weights by default")
    parser.add_argument("--steps", type=at_least(1), default=500)
    parser.add_argument("--batch", type=at_least(1), default=4)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        *lines, asked = read(given.data)
        train(given, lines)
        said = answer(given.output / "model", asked["context"], asked["question"], given.segment)
    print(f"{asked['question']!r} is answered {said!r}; the file says {asked['answer']!r}")


def read(path: Path) -> list[dict[str, str]]:
    """The lines of the file; ValueError names the one that is wrong."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(lines[-1], dict) or {name: type(one) for name, one in lines[-1].items()} != FIELDS:
            raise ValueError(f"{path}, line {number} must be an object of texts: {', '.join(FIELDS)}")
    if len(lines) < 2:
        raise ValueError(f"{path} holds {len(lines)} lines: give one to train on and one to ask, at least")
    return lines


def train(given: argparse.Namespace, lines: list[dict[str, str]]) -> None:
    """Fine-tune the model with its gist tokens on the lines, into given.output/model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from gistkern import patch_llama
    from gistkern.training import GistDataCollator, GistTrainer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    handle = patch_llama(model, tokenizer, num_gist_tokens=given.gists)
    if given.lora:
        from peft import LoraConfig, get_peft_model

        adapter = {"r": given.lora, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        # the gist rows are trained and saved beside the adapter
        model = get_peft_model(model, LoraConfig(modules_to_save=["gist_embeddings"], **adapter))
    arguments = TrainingArguments(
        str(given.output),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        warmup_steps=given.steps // 20,
        logging_steps=10,
        report_to="none",
    )
    ended = [{**line, "answer": line["answer"] + (tokenizer.eos_token or "")} for line in lines]
    collator = GistDataCollator(tokenizer, handle, given.segment)
    GistTrainer(model, arguments, data_collator=collator, train_dataset=ended).train()
    if given.lora:
        model = model.merge_and_unload()
    model.save_pretrained(given.output / "model")
    tokenizer.save_pretrained(given.output / "model")


def answer(folder: Path, context: str, question: str, segment: int | None = None) -> str:
    """What a saved model says to a question, from the context's gist rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gistkern import compress, patch_llama

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    patch_llama(model, tokenizer)  # the folder knows its gist tokens
    cache = compress(model, tokenizer(context, return_tensors="pt"), segment_length=segment)
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**asked, past_key_values=cache, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
