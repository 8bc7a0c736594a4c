"""serve.py on a small checkpoint, and what it says without vLLM; tests/serving runs that."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import gistkern
import serve
from gistkern.cache.versions import CACHE
from passkey.trained import open_trained


@pytest.mark.xdist_group("training")
@pytest.mark.timeout(600)
def test_a_queue_is_answered_and_handed_on(finished, tmp_path, capsys):
    run, _ = finished
    how = ["--documents", "3", "--requests", "2", "--batch", "4"]
    serve.main(["transformers", "--checkpoint", str(run), "--output", str(tmp_path), *how])
    assert "answers right, about 3 documents of 120 tokens" in capsys.readouterr().out
    requests = json.loads((tmp_path / "requests.json").read_text())["requests"]
    assert sorted(one["document"] for one in requests) == sorted(2 * list({one["document"] for one in requests}))
    opened = open_trained(run)
    samples = {sample.id: sample for dataset in opened.datasets(0) for sample in dataset}
    reader = opened.reader()
    for one in requests:
        (alone,) = reader.read([samples[one["document"]]])
        assert one["said"] == alone.said
        assert (one["question"], one["answer"]) == (samples[one["document"]].question, samples[one["document"]].answer)
    # the weights are the checkpoint's, without anything of gistkern: what vLLM loads reads the store's rows
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(plain.config, "gistkern")
    assert not any("gist" in name for name in plain.state_dict())
    document, question = requests[0]["document"], torch.tensor([[5, 6, 7]])
    cache = gistkern.GistStore(tmp_path / "corpus")[document]
    with torch.no_grad():
        found = plain(question, **{CACHE: gistkern.plain_prefix(cache, plain.config)}).logits
        expected = opened.model(question, **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_requests_come_first_and_vllm_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        serve.main(["vllm", "--output", str(tmp_path)])
    assert "requests.json is missing, or none that `serve.py transformers` wrote" in capsys.readouterr().err
    if importlib.util.find_spec("vllm") is None:
        (tmp_path / "requests.json").write_text('{"requests": []}')
        with pytest.raises(SystemExit, match="2"):
            serve.main(["vllm", "--output", str(tmp_path)])
        assert "needs vLLM with the connector interface of 0.32" in capsys.readouterr().err
