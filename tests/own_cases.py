"""A tiny base model with a tokenizer of its own, and forty rows that it learns in seconds."""

import json
import os
import pty
import random
import subprocess
import sys
import termios
import threading

import torch
from chat_cases import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

PEOPLE = ("Mira", "Odette", "Jonas", "Petra")
THINGS = ("bell", "lamp", "rope", "key")


def rows(count=40, seed=0, chat=False):
    """Who has it; the answer is a word of the context."""
    rng, found = random.Random(seed), []
    for number in range(count):
        people = [rng.choice(PEOPLE)]
        context = f"The {rng.choice(THINGS)} number {number} is with {people[0]}."
        question = "Who has it?"
        if chat:
            turns = [("system", context), ("user", question), ("assistant", people[0])]
            found.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        else:
            found.append({"context": context, "question": f" {question}", "answer": f" {people[0]}"})
    return found


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_base(folder, template=None, **changes):
    """A Llama of two layers, with random weights."""
    torch.manual_seed(0)
    texts = [one["context"] + one["question"] + one["answer"] for one in rows()]
    tokenizer = chat_tokenizer(template, texts, words=384)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
        **{**size, **changes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gistkern(*words, watched=False, **options):
    """The command, in a process of its own; `watched` makes a terminal of its standard error."""
    command = [sys.executable, "-m", "gistkern", *map(str, words)]
    options = {"env": dict(os.environ)} | options  # without the COLUMNS that pytest's readline leaves
    if not watched:
        return subprocess.run(command, capture_output=True, text=True, **options)
    ours, theirs = terminal()
    shown = []
    reading = threading.Thread(target=_read, args=(ours, shown))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, **options)
    os.close(theirs)
    reading.start()
    said = process.communicate()[0]
    reading.join()
    os.close(ours)
    text = b"".join(shown).decode(errors="replace").replace("\r", "\n")
    return subprocess.CompletedProcess(command, process.returncode, said, text)


def terminal():
    """Both ends of one, as file numbers: what a process writes to the second is read from the first."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    return ours, theirs


def _read(end, shown):
    while True:
        try:
            shown.append(os.read(end, 1 << 16))
        except OSError:  # the process has ended
            return
