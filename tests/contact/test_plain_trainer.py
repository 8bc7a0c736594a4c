"""transformers' Trainer on a patched model: the losses of an eager model under the dense mask, whatever it is told."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from training_oracle import LEARNING_RATE, make_tokenizer, twins
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import gistkern
from gistkern.training import ignore_gist_labels

GISTS = [70, 71, 72]
VOCABULARY = 70


def samples(count=8, same_length=False, labels=True):
    rng = random.Random(0)

    def draw(least, most):
        return [rng.randrange(1, VOCABULARY) for _ in range(most if same_length else rng.randint(least, most))]

    made = [{"input_ids": draw(4, 9) + GISTS + draw(2, 6)} for _ in range(count)]
    for one in made if labels else ():
        one["labels"] = list(one["input_ids"])
    return made


def arguments(folder, **changes):
    given = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(str(folder), **given)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collators():
    tokenizer = make_tokenizer()
    yield "default", default_data_collator, {"same_length": True}
    yield "language modelling", DataCollatorForLanguageModeling(tokenizer, mlm=False), {"labels": False}
    yield "seq2seq", DataCollatorForSeq2Seq(tokenizer), {}
    yield "flattening", DataCollatorWithFlattening(), {"labels": False}
    yield "flattening, cu_seq_lens", DataCollatorWithFlattening(return_flash_attn_kwargs=True), {"labels": False}


@pytest.mark.parametrize(("name", "collator", "data"), list(collators()))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_are_the_oracles(tmp_path, name, collator, data, accumulate):
    """Labels are copies of the ids; micro-batches differ in their counts, so a mean of means would show."""
    model, handle, oracle = twins()
    changes = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer = Trainer(
        model,
        arguments(tmp_path, **changes),
        data_collator=ignore_gist_labels(collator, handle),
        train_dataset=samples(**data),
        eval_dataset=samples(4, **data),
    )
    trainer.train()
    assert losses(trainer) == pytest.approx(oracle.train(accumulate), rel=1e-4)
    torch.testing.assert_close(handle.inner.gist_embeddings.weight, oracle.rows, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(oracle.loss(oracle.batches[False]).item(), rel=1e-4)


def test_without_the_wrapper_a_whole_step_is_right_and_a_part_of_one_is_refused(tmp_path):
    model, _, oracle = twins()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=samples(same_length=True))
    trainer.train()
    assert losses(trainer) == pytest.approx(oracle.train(1), rel=1e-4)
    model, *_ = twins()
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=samples(same_length=True))
    with pytest.raises(ValueError, match="ignore_gist_labels"):
        trainer.train()


class OfYourOwn:
    """Labels that are shifted already, as context parallel collators make them."""

    def __call__(self, features):
        batch = default_data_collator(features)
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        return batch


def test_shift_labels(tmp_path):
    model, handle, oracle = twins()
    collator = ignore_gist_labels(OfYourOwn(), handle)
    trainer = Trainer(model, arguments(tmp_path), data_collator=collator, train_dataset=samples(same_length=True))
    trainer.train()
    assert losses(trainer) == pytest.approx(oracle.train(1), rel=1e-4)


def smoothed(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) / num_items_in_batch


@pytest.mark.parametrize("by", ["factor", "function"])
def test_losses_of_the_trainers_and_of_the_users_own(tmp_path, by):
    """Label smoothing and compute_loss_func: the Trainer takes the labels away before the model is called."""
    model, handle, oracle = twins()
    changes = {"label_smoothing_factor": 0.1} if by == "factor" else {}
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, **changes),
        data_collator=ignore_gist_labels(default_data_collator, handle),
        train_dataset=samples(same_length=True),
        compute_loss_func=smoothed if by == "function" else None,
    )
    trainer.train()
    (batch,) = oracle.batches[True]
    labels = batch["input_ids"].masked_fill(handle.is_gist(batch["input_ids"]), -100)[:, 1:].flatten()
    logits = oracle.logits(batch)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert losses(trainer) == pytest.approx([expected], rel=1e-4)


def test_evaluation_metrics_resume_and_the_best_model_come_back(tmp_path):
    def metrics(prediction):
        said, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"hits": float((said == labels)[labels != -100].mean()), "least": float(prediction.predictions.min())}

    def trainer(folder, **changes):
        model, handle, _ = twins()
        given = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **changes}
        return Trainer(
            model,
            arguments(tmp_path / folder, max_steps=3, per_device_eval_batch_size=2, **given),
            data_collator=ignore_gist_labels(default_data_collator, handle),
            train_dataset=samples(same_length=True),
            eval_dataset=samples(4, same_length=True),
            compute_metrics=metrics,
        )

    whole = trainer(
        "whole", load_best_model_at_end=True, metric_for_best_model="eval_step_of_first", greater_is_better=True
    )
    order = iter([3.0, 2.0, 1.0])  # the first checkpoint is the best
    whole.compute_metrics = lambda prediction: {**metrics(prediction), "step_of_first": next(order)}
    whole.train()
    first = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-1")
    gistkern.patch_llama(first)
    assert torch.equal(first.model.gist_embeddings.weight, whole.model.model.gist_embeddings.weight)
    evaluated = [entry for entry in whole.state.log_history if "eval_hits" in entry]
    assert len(evaluated) == 3
    assert all(np.isfinite(entry["eval_least"]) for entry in evaluated), "no logit is -inf"
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    last = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    handle = gistkern.patch_llama(last)
    for one, other in zip(resumed.model.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    resumed.save_model(str(tmp_path / "saved"))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    gistkern.patch_llama(again)
    ids = torch.tensor([samples(1)[0]["input_ids"]])
    assert torch.equal(again.eval()(ids).logits, resumed.model.eval()(ids).logits)
    assert handle.gist_token_ids == GISTS


def test_the_wrapper_is_a_collator_like_the_one_inside():
    _, handle, _ = twins()
    collator = DataCollatorForLanguageModeling(make_tokenizer(), mlm=False)
    wrapped = ignore_gist_labels(collator, handle)
    assert wrapped.tokenizer is collator.tokenizer
    assert not hasattr(wrapped, "nothing")
    features = samples(2, labels=False)
    for one in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)):
        assert torch.equal(one(features)["labels"], wrapped(features)["labels"])
    assert len(pickle.dumps(ignore_gist_labels(default_data_collator, handle))) < 500, "no model goes to the workers"
    labels = wrapped(features)["labels"]
    assert not handle.is_gist(labels).any()
    assert (labels != -100).sum() == sum(len(one["input_ids"]) - 3 for one in features)
    as_numpy = ignore_gist_labels(lambda features: {"labels": np.array([[5, 70, 72, 6]])}, handle)([])
    assert as_numpy["labels"].tolist() == [[5, -100, -100, 6]]
    assert ignore_gist_labels(lambda features: {"input_ids": 1}, handle)([]) == {"input_ids": 1}
    with pytest.raises(TypeError, match="labels of a batch must be a tensor or an array, got list"):
        ignore_gist_labels(lambda features: {"labels": [70]}, handle)([])
    with pytest.raises(TypeError, match="collator must be a function"):
        ignore_gist_labels(None, handle)
