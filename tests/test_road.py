"""The whole road as a user walks it: fresh processes, in an environment made from the wheel, far from the checkout.

Train on 40 lines, load, ask, compress a folder, serve 20 questions in batches and from a plain model: equal answers.
"""

import ast
import json
import os
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging"), pytest.mark.timeout(1200)]

QUESTIONS = ["Who signed it?", "When did it begin?", "Who came late?"]
WORDS = [*(f"w{number}" for number in range(40)), *sorted({word for one in QUESTIONS for word in one.split()})]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# what the guide's commands become, so that a tiny model walks them in seconds
SMALLER = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "base",
    "--segment-length 512": "--segment-length 12",
    "--gists 10": "--gists 2",
    "--lora 16": "--lora 4",
    "--steps 500": "--steps 24",
    "--eval-every 100": "--eval-every 12",
    "--accumulate 8": "--accumulate 2",
}
GUIDE = ROOT / "docs/guides/llama-8b.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an environment, a base model, 40 lines to train on, and a folder of documents with questions."""
    place = tmp_path_factory.mktemp("road")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(place / "dist"), str(ROOT)]
    subprocess.run(build, env=os.environ | {"GISTKERN_NO_EXTENSION": "1"}, check=True, capture_output=True)
    (wheel,) = (place / "dist").glob("*.whl")
    venv.create(place / "env", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "env/bin/python"), "install", "-q", "--no-deps"]
    subprocess.run([*pip, str(wheel)], env=outside(), check=True)
    # what the wheel requires is taken from the environment of the tests, whose own gistkern stands behind the wheel's
    site = next((place / "env/lib").glob("python*")) / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    special = ["<unk>", "<pad>", "<end>", "<user>", "<system>", "<assistant>"]
    raw = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*special, *WORDS, "?"])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(place / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=2, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(place / "base")

    rng = random.Random(0)
    rows = [
        (" ".join(rng.choices(WORDS, k=rng.randint(9, 40))), rng.choice(WORDS), rng.choice(WORDS)) for _ in range(40)
    ]
    with (place / "mine.jsonl").open("w") as file:
        for context, question, answer in rows:
            said = {"context": context, "question": question, "answer": answer}
            file.write(json.dumps(said) + "\n")
    names = ["lease.txt", "minutes.txt", "more/a.txt", "more/b.md", "more/c.txt"]
    (place / "texts/more").mkdir(parents=True)
    for number, name in enumerate(names):
        (place / "texts" / name).write_text(" ".join(rng.choices(WORDS, k=35 + number)))
    asked = [[names[number % 5], " ".join(rng.choices(WORDS, k=1 + number % 3))] for number in range(20)]
    (place / "asked.json").write_text(json.dumps(asked))
    return place


def outside():
    """The variables of the environment without those that lead to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GISTKERN_LIBRARY")}


def walk(place, *words):
    """A command of the environment, as its user types it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GISTKERN_LIBRARY")}
    done = subprocess.run(
        [str(place / "env/bin" / words[0]), *words[1:]], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD_AND_ASK = """
import json, gistkern
assert "env" in gistkern.__file__, gistkern.__file__
model, tokenizer, handle = gistkern.load("runs/mine")
print(json.dumps([gistkern.ask(model, tokenizer, open(f"texts/{name}").read(), question, max_new_tokens=6)
                  for name, question in json.load(open("asked.json"))]))
"""
SERVE = """
import json, torch, gistkern
from gistkern.hf.chat import question_after
model, tokenizer, handle = gistkern.load("runs/mine")
store, asked, said = gistkern.GistStore("store"), json.load(open("asked.json")), []
for first in range(0, 20, 8):
    names, questions = zip(*asked[first:first + 8])
    texts = [question_after(tokenizer, one, store.role) for one in questions]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids, mask = gistkern.left_padded([torch.tensor(one) for one in ids], tokenizer.pad_token_id)
    out = model.generate(input_ids=ids, attention_mask=mask.long(), past_key_values=store.batch(names, shared=True),
                         max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    said += tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
print(json.dumps(said))

from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("plain"), AutoTokenizer.from_pretrained("plain")
said = []
for name, question in asked:
    prefix = gistkern.plain_prefix(store[name], model.config)
    ids = tokenizer(question_after(tokenizer, question, store.role), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[0] * prefix.get_seq_length() + ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, past_key_values=prefix, max_new_tokens=6, do_sample=False)
    said.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(said))
"""


def test_the_guide_from_nothing_to_served(place):
    """Its commands and programs, one after the other; and 20 questions get one answer each, however they are served."""
    printed = []
    for kind, text in re.findall(r"```(bash|python)\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        if kind == "python":
            printed.append(walk(place, "python", "-c", text))
        for line in text.splitlines() if kind == "bash" else ():
            if not line.startswith(("python3 -m venv", "pip install")):
                printed.append(walk(place, *shlex.split(line)))
    _, memory, trained, measured, asked, summary, told, served = printed
    assert "calculated" in memory
    assert "gistkern ask" in trained
    assert "no context" in measured.replace("none", "no context")
    assert summary.startswith("5 documents, ")
    answers = ast.literal_eval(asked.splitlines()[-1])
    assert told.strip() == answers[0].strip()
    assert ast.literal_eval(served.splitlines()[-1])[0] == answers[0]

    said = json.loads(walk(place, "python", "-c", LOAD_AND_ASK).splitlines()[-1])
    assert len(said) == 20
    assert len(set(said)) > 5, "answers depend on what is asked"
    patched, plain = map(json.loads, walk(place, "python", "-c", SERVE).splitlines()[-2:])
    assert patched == said
    assert plain == said
