"""vLLM answers from gist rows as the patched model does. Skipped where vLLM is not installed (examples/vllm_queue.py).

build/vllm/bin/pip install pytest hypothesis
PYTHONPATH=.:examples build/vllm/bin/python -m pytest tests/serving -p no:cacheprovider -o addopts=
"""

import os
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm", reason="vLLM lives in an environment of its own")

import vllm_connector  # noqa: E402

WORDS, BLOCK, NEW = 100, 32, 8
DOCUMENTS = {
    f"doc-{place}": random.Random(place).choices(range(WORDS), k=length)
    for place, length in enumerate((5, 60, 90, 130, 90))
}


@pytest.fixture(scope="module", params=["absolute", "gist_first"])
def served(request, tmp_path_factory):
    """The patched model, its store and an engine that has the same weights unpatched."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    gistkern.patch_llama(model, num_gist_tokens=4, sink_tokens=1, positions=request.param)
    store = gistkern.compress_corpus(model, DOCUMENTS, folder / "corpus", segment_length=10, progress=False)
    engine = vllm.LLM(
        str(folder / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=BLOCK,
        kv_transfer_config=vllm_connector.transfer_config(folder / "corpus"),
    )
    return model, store, engine


def questions(count):
    return [random.Random(100 + place).choices(range(WORDS), k=2 + place) for place in range(count)]


def ask(engine, requests):
    prompts, parameters = zip(*requests, strict=True)
    return engine.generate(list(prompts), list(parameters), use_tqdm=False)


def asked(store, name, question):
    return vllm_connector.request_for(
        store, name, question, max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False
    )


def expected(model, store, name, question):
    out = model.generate(
        torch.tensor([question]), past_key_values=store[name], max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return out[0, len(question) :].tolist()


def test_a_batch_of_questions_on_several_documents(served):
    model, store, engine = served
    queue = [(name, question) for question in questions(3) for name in DOCUMENTS]
    outputs = ask(engine, [asked(store, *one) for one in queue])
    for (name, question), out in zip(queue, outputs, strict=True):
        assert list(out.outputs[0].token_ids) == expected(model, store, name, question)
        rows = int(store[name].gist_rows[0])
        assert rows < len(DOCUMENTS[name]) or name == "doc-0"
        assert rows <= out.num_cached_tokens < rows + len(question)


def test_requests_about_one_document_share_its_whole_blocks(served, monkeypatch):
    _, store, engine = served
    loads = []
    write = vllm_connector.GistConnector._write
    monkeypatch.setattr(
        vllm_connector.GistConnector, "_write", lambda self, load: (loads.append(load), write(self, load))
    )
    engine.reset_prefix_cache()
    rows = int(store["doc-3"].gist_rows[0])
    assert rows > BLOCK
    for question in questions(2):
        ask(engine, [asked(store, "doc-3", question)])
    assert [(load.first, load.rows) for load in loads] == [(0, rows), (rows // BLOCK * BLOCK, rows)]


def test_documents_of_as_many_rows_are_not_confused(served):
    """Their prompts are alike, placeholders and question: the salt tells them apart in vLLM's prefix cache."""
    model, store, engine = served
    question = [1, 2, 3]
    twins = [asked(store, name, question) for name in ("doc-2", "doc-4")]
    (one, _), (other, _) = twins
    assert one["prompt_token_ids"] == other["prompt_token_ids"]
    assert len(one["prompt_token_ids"]) > BLOCK
    answers = [list(out.outputs[0].token_ids) for twin in twins for out in ask(engine, [twin])]
    assert answers == [expected(model, store, name, question) for name in ("doc-2", "doc-4")]
    assert answers[0] != answers[1]


def test_a_request_without_a_document_is_an_ordinary_one(served):
    model, _, engine = served
    prompt = questions(5)[-1]
    parameters = vllm.SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, detokenize=False)
    (out,) = ask(engine, [({"prompt_token_ids": prompt}, parameters)])
    said = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert list(out.outputs[0].token_ids) == said[0, len(prompt) :].tolist()


def test_a_document_that_cannot_be_read_fails_alone(served, monkeypatch):
    model, store, engine = served
    broken = asked(store, "doc-2", [1, 2])
    read = gistkern.GistStore.__getitem__

    def damaged(self, name):
        if name == "doc-2":
            raise ValueError("damaged")
        return read(self, name)

    engine.reset_prefix_cache()
    monkeypatch.setattr(gistkern.GistStore, "__getitem__", damaged)
    outputs = ask(engine, [asked(store, "doc-1", [3, 4]), broken, asked(store, "doc-3", [5, 6])])
    monkeypatch.undo()
    assert [out.outputs[0].finish_reason for out in outputs] == ["length", "error", "length"]
    for out, name, question in ((outputs[0], "doc-1", [3, 4]), (outputs[2], "doc-3", [5, 6])):
        assert list(out.outputs[0].token_ids) == expected(model, store, name, question)
    (again,) = ask(engine, [broken])
    assert list(again.outputs[0].token_ids) == expected(model, store, "doc-2", [1, 2])


def test_bad_requests_are_refused_before_the_engine_sees_them(served):
    _, store, _ = served
    with pytest.raises(KeyError, match="no document 'nowhere'"):
        vllm_connector.request_for(store, "nowhere", [1])
    with pytest.raises(ValueError, match="the question is empty"):
        vllm_connector.request_for(store, "doc-1", [])
