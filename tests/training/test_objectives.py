"""The objectives equal their formulas, the head sees the tail only, and the teacher stays a teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import SCHEMES, lora, make_features, make_model, patched

import gistkern
from gistkern.training import GistDataCollator, Objectives, answer_loss, distillation_loss, reconstruction_loss

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def collated(scheme="single", count=4, collator=None, **changes):
    model, handle, segments = patched(scheme, **changes)
    collate = GistDataCollator(0, handle, **segments, **(collator or {}))
    return model.train(), handle, collate(make_features(count, span=collate.cue is not None))


def model_inputs(batch):
    keys = ("input_ids", "attention_mask", "labels", "gist_layout")
    return {key: batch[key] for key in keys if key in batch}


def answer_arguments(batch):
    return batch["input_ids"], batch["labels"], batch.get("gist_layout"), batch["attention_mask"]


def gradients(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


# ---- the answer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_answer_loss_is_the_models_own_loss(scheme):
    model, _, batch = collated(scheme)
    plain = model(**model_inputs(batch), use_cache=False).loss
    ours = answer_loss(model, *answer_arguments(batch))
    # transformers computes its loss in fp32
    torch.testing.assert_close(ours, plain.double(), rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(model, ours), gradients(model, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_head_runs_on_the_rows_that_predict_a_label():
    model, _, batch = collated()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    answer_loss(model, *answer_arguments(batch))
    widest = (batch["labels"] != -100).sum(1).max()
    assert seen == [(4, widest, 60)]
    assert widest < batch["labels"].shape[1] / 3
    ids = batch["input_ids"]
    scattered = torch.full_like(ids, -100)
    scattered[0, 9], scattered[1, -1], scattered[2, 0] = ids[0, 9], ids[1, -1], ids[2, 0]
    seen.clear()
    loss = answer_loss(model, ids, scattered, None, batch["attention_mask"])
    assert seen == [(4, 2, 60)], "columns 8 and the last but one; nothing stands before column 0"
    plain = model(ids, attention_mask=batch["attention_mask"], labels=scattered).loss
    torch.testing.assert_close(loss, plain.double(), rtol=1e-6, atol=1e-6)


def test_gist_tokens_are_no_labels():
    model, _, batch = collated()
    everything = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=everything).loss
    ours = answer_loss(model, batch["input_ids"], everything, None, batch["attention_mask"])
    torch.testing.assert_close(ours, plain.double(), rtol=1e-6, atol=1e-6)


def test_gist_rows_get_a_gradient_without_gist_tokens_too():
    """Zeros, but there: DistributedDataParallel waits for the gradient of every parameter."""
    model, handle, _ = patched()
    ids = torch.tensor([[1, 2, 3]])
    answer_loss(model, ids, ids).backward()
    assert torch.equal(handle.inner.gist_embeddings.weight.grad, torch.zeros(3, 32, dtype=torch.float64))


def test_num_items_is_the_divisor():
    model, _, batch = collated()
    count = int((batch["labels"] != -100).sum())
    mean = answer_loss(model, *answer_arguments(batch))
    torch.testing.assert_close(answer_loss(model, *answer_arguments(batch), num_items=7) * 7, mean * count, **CLOSE)


def test_answer_refusals():
    model, handle, batch = collated()
    nothing = torch.full_like(batch["labels"], -100)
    only_gists = torch.where(handle.is_gist(batch["input_ids"]), batch["input_ids"], -100)
    for labels in (nothing, only_gists):
        with pytest.raises(ValueError, match="labels holds nothing to predict"):
            answer_loss(model, batch["input_ids"], labels)
    with pytest.raises(ValueError, match=r"labels must be \[batch, tokens\] like input_ids"):
        answer_loss(model, batch["input_ids"], batch["labels"][:, 1:])
    with pytest.raises(ValueError, match="knows no gist tokens"):
        answer_loss(make_model(), batch["input_ids"] % 60, batch["labels"])


# ---- reconstruction


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reconstruction_is_the_loss_of_the_span_behind_gists_and_cue(scheme):
    model, _, segments = patched(scheme)
    context, cue = torch.tensor(make_features(1)[0]["context_ids"]), [11, 12]
    for span in (None, context[2:5]):
        said = context if span is None else span
        loss = reconstruction_loss(model, [context], None if span is None else [span], cue_ids=cue, **segments)
        # the same through compress: what the cached rows make of cue and span
        cache = gistkern.compress(model, context[None], **segments)
        tail = torch.cat([torch.tensor(cue), said])
        logits = model(tail[None], past_key_values=cache).logits[0, len(cue) - 1 : -1]
        torch.testing.assert_close(loss, F.cross_entropy(logits, said), **CLOSE)


def test_reconstruction_of_the_collator_is_reconstruction_loss():
    model, handle, segments = patched("segments")
    features = make_features(3, span=True)
    batch = GistDataCollator(0, handle, **segments, cue=[11])(features)
    parts = Objectives(reconstruction=1.0)(model, batch).parts
    contexts, spans = ([torch.tensor(one[name]) for one in features] for name in ("context_ids", "span_ids"))
    expected = reconstruction_loss(model, contexts, spans, cue_ids=[11], **segments)
    torch.testing.assert_close(parts["reconstruction"], expected.detach(), **CLOSE)


def test_reconstruction_refusals():
    model, _, _ = patched()
    context = [torch.tensor([1, 2, 3])]
    for arguments, message in [
        ({"cue_ids": []}, "a cue must hold at least one token"),
        ({"cue_ids": [1], "spans": [torch.tensor([60])]}, "a span must hold .* no gist token"),
        ({"cue_ids": [1], "spans": []}, "spans lists 0 samples, contexts 1"),
        ({"cue_ids": [1], "segment_overlap": 2}, "segment_overlap must be less"),
    ]:
        with pytest.raises(ValueError, match=message):
            reconstruction_loss(model, context, **arguments)


# ---- distillation

TEACHER = {"collator": {"teacher": True}}


def test_a_student_that_sees_all_has_nothing_to_learn():
    model, _, batch = collated(**TEACHER)
    same = distillation_loss(model, batch["teacher"], batch["teacher"])
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    assert distillation_loss(model, batch, batch["teacher"]) > 1e-3, "hidden behind gists it has"


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_its_formula_and_no_gradient_reaches_the_teacher(temperature):
    model, _, batch = collated(**TEACHER)
    loss = distillation_loss(model, batch, batch["teacher"], temperature)

    def formula(detach):
        logits = []
        for one in (batch, batch["teacher"]):
            rows = model(**model_inputs({**one, "labels": None})).logits[:, :-1][one["labels"][:, 1:] != -100]
            logits.append((rows.detach() if detach and one is not batch else rows) / temperature)
        log_q, log_p = (one.log_softmax(-1) for one in logits)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    torch.testing.assert_close(loss, formula(True), **CLOSE)
    ours, expected, leaky = (gradients(model, one) for one in (loss, formula(True), formula(False)))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert any((one - other).abs().max() > 1e-4 for one, other in zip(ours, leaky, strict=True))


def test_the_gradient_lowers_the_divergence():
    model, handle, batch = collated(**TEACHER)
    model.requires_grad_(False)
    rows = handle.inner.gist_embeddings.weight.requires_grad_()
    optimizer = torch.optim.SGD([rows], lr=1.0)
    losses = []
    for _ in range(4):
        loss = distillation_loss(model, batch, batch["teacher"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


class Tokenizer:
    """Gives the gist tokens ids inside the model's vocabulary, as a padded vocabulary does."""

    def add_special_tokens(self, *_, **__):
        pass

    def convert_tokens_to_ids(self, token):
        return 55 + int(token.removeprefix("<gist_").removesuffix(">"))


def test_gist_ids_inside_the_vocabulary_change_no_loss():
    """Rows of a padded vocabulary have logits like any other: losses are finite, and ours are the model's own."""
    model = make_model()
    handle = gistkern.patch_llama(model, Tokenizer(), num_gist_tokens=2)
    feature = {"context_ids": [1, 2, 3], "question_ids": [4], "answer_ids": [5, 6]}
    batch = GistDataCollator(0, handle, teacher=True)([feature])
    loss = distillation_loss(model, batch, batch["teacher"])
    assert loss > 0
    assert all(one.isfinite().all() for one in gradients(model, loss))
    ids = batch["input_ids"]
    output = model(ids, labels=ids)
    torch.testing.assert_close(answer_loss(model, ids, ids), output.loss.double(), rtol=1e-6, atol=1e-6)
    p = output.logits.log_softmax(-1)
    assert torch.isfinite((p.exp() * p).sum(-1)).all(), "entropy"
    smoothed = F.cross_entropy(
        output.logits[0, :-1], ids.masked_fill(handle.is_gist(ids), -100)[0, 1:], label_smoothing=0.1
    )
    assert smoothed.isfinite()


def adapted(batch_of=TEACHER, **changes):
    model, handle, batch = collated(**batch_of)
    model = lora(model, init_lora_weights=False, **changes).double()
    return model, handle, batch


def test_the_teacher_has_no_adapter_and_the_student_keeps_its_own():
    model, _, batch = adapted()
    base, *_ = patched()
    taught = answer_loss(base, batch["teacher"]["input_ids"], batch["teacher"]["labels"], None,
                         batch["teacher"]["attention_mask"])  # fmt: skip
    before = answer_loss(model, *answer_arguments(batch))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(answer_loss(model, *answer_arguments(batch["teacher"])), taught)
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    loss = distillation_loss(model, batch, batch["teacher"])
    # the adapter works as before, and what was frozen by hand stays frozen
    torch.testing.assert_close(answer_loss(model, *answer_arguments(batch)), before, rtol=0, atol=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not frozen.requires_grad
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    # the teacher is the base model: its cross entropy is that of a model without adapter
    from gistkern.training.objectives import _teacher_tail

    torch.testing.assert_close(_teacher_tail(model, batch["teacher"]).cross_entropy(), taught, **CLOSE)


def test_adapters_are_on_again_after_an_error():
    model, handle, batch = adapted()
    before = answer_loss(model, *answer_arguments(batch))

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = handle.inner.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        distillation_loss(model, batch, batch["teacher"])
    hook.remove()
    torch.testing.assert_close(answer_loss(model, *answer_arguments(batch)), before, rtol=0, atol=0)
    assert any(p.requires_grad for name, p in model.named_parameters() if "lora" in name)


def test_distillation_refusals():
    model, _, batch = collated(**TEACHER)
    with pytest.raises(ValueError, match="the teacher's stream holds gist tokens"):
        distillation_loss(model, batch, batch)
    other = {**batch["teacher"], "labels": batch["teacher"]["labels"].roll(1, 0)}
    with pytest.raises(ValueError, match="must predict the same labels"):
        distillation_loss(model, batch, other)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        distillation_loss(model, batch, batch["teacher"], temperature=0)
    from peft import LoraConfig, inject_adapter_in_model

    # what model.add_adapter does, where transformers 5.24 asks for a peft that is not out yet
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gist_embeddings"]), model)
    model._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match=r"wrap the model with peft\.get_peft_model"):
        distillation_loss(model, batch, batch["teacher"])


# ---- the composition


def test_weights_of_the_sum():
    model, _, batch = collated("hierarchical", collator={"teacher": True, "cue": [9]})
    losses = Objectives(answer=0.5, distillation=2.0, reconstruction=0.25)(model, batch)
    parts = losses.parts
    assert list(parts) == ["answer", "distillation", "reconstruction"]
    expected = 0.5 * parts["answer"] + 2 * parts["distillation"] + 0.25 * parts["reconstruction"]
    torch.testing.assert_close(losses.total.detach(), expected, **CLOSE)
    torch.testing.assert_close(parts["answer"], answer_loss(model, *answer_arguments(batch)).detach(), **CLOSE)
    divergence = distillation_loss(model, batch, batch["teacher"]).detach()
    torch.testing.assert_close(parts["distillation"], divergence, **CLOSE)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert list(Objectives()(model, batch).parts) == ["answer"]
    assert len(calls) == 1, "what weighs nothing is not computed"


def test_bad_weights():
    for arguments, message in [
        ({"answer": -1}, "the weight of answer must be a number >= 0"),
        ({"distillation": float("nan")}, "the weight of distillation must be"),
        ({"answer": 0, "reconstruction": 1}, "make the cue the question and the context the answer"),
        ({"temperature": -1}, "temperature must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Objectives(**arguments)
    model, _, batch = collated()
    with pytest.raises(ValueError, match=r"distillation needs batch\['teacher'\]: give the GistDataCollator"):
        Objectives(distillation=1)(model, batch)
    with pytest.raises(ValueError, match=r"reconstruction needs batch\['reconstruction'\]"):
        Objectives(reconstruction=1)(model, batch)


def test_counts_of_right_answers():
    from gistkern.training.tail import Tail

    labels = torch.tensor([[1, 2, -100], [3, 0, 1], [-100, -100, -100], [-100, 2, 2]])
    said = torch.tensor([[1, 2, 0], [3, 1, 1], [0, 0, 0], [2, 2, 2]])
    logits = nn.functional.one_hot(said, 4).double()
    assert Tail(logits, labels, torch.tensor([0, 0, 0])).counts().tolist() == [6, 7, 2, 3]
    # the last column is another answer of the same row
    assert Tail(logits, labels, torch.tensor([0, 0, 1])).counts().tolist() == [6, 7, 4, 5]
