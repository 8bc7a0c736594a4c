"""TRL's trainers on a patched model: the losses of an eager model under the dense gist mask, or an error that helps."""

import math
import random
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_oracle import LEARNING_RATE, WORDS, make_tokenizer, twins

from gistkern.training import ignore_gist_labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    from datasets import Dataset

pytestmark = pytest.mark.xdist_group("trl")

GISTS = "<gist_0> <gist_1> <gist_2>"


def words(rng, least, most):
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(least, most)))


def rows(kind, count=8):
    """Contexts of 4 to 9 words, gist tokens, a question of 2, an answer of 1 to 3."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        prompt, answer = f"{words(rng, 4, 9)} {GISTS} {words(rng, 2, 2)}", words(rng, 1, 3)
        other = words(rng, 1, 3)
        made.append(
            {
                "text": {"text": f"{prompt} {answer}"},
                "completion": {"prompt": f"{prompt} ", "completion": answer},
                "chat": {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]},
                "preference": {"prompt": f"{prompt} ", "chosen": answer, "rejected": other},
            }[kind]
        )
    return Dataset.from_list(made)


def lora(model, **changes):
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **changes)
    )


COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 24, "max_steps": 1}


def make(folder, kind, wrap=None, trainer=None, config=None, **changes):
    tokenizer = make_tokenizer()
    model, handle, oracle = twins(tokenizer, wrap)
    arguments = (config or trl.SFTConfig)(str(folder), **{**COMMON, **changes})
    data = rows(kind)
    made = (trainer or trl.SFTTrainer)(
        model=model, args=arguments, train_dataset=data, eval_dataset=rows(kind, 4), processing_class=tokenizer
    )
    return made, handle, oracle


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("kind", "wrap", "changes"),
    [
        pytest.param("completion", None, {}, id="completion"),
        pytest.param("completion", lora, {}, id="peft"),
        pytest.param(
            "completion", None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, id="accumulation"
        ),
        pytest.param("completion", lora, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param("completion", None, {"padding_free": True, "max_length": None}, id="padding-free"),
        pytest.param("completion", None, {"packing": True, "max_length": 40, "max_steps": 1}, id="packing"),
        pytest.param("chat", None, {"assistant_only_loss": True}, id="assistant"),
        pytest.param("text", None, {}, id="text"),
        pytest.param("text", None, WRAPPED, id="wrapped"),
    ],
)  # fmt: skip
def test_sft_has_the_losses_of_the_eager_model_under_the_dense_mask(tmp_path, kind, wrap, changes):
    trainer, handle, oracle = make(tmp_path, kind, wrap, **changes)
    if kind == "text":  # labels are a copy of the ids, gist tokens too
        trainer.data_collator = ignore_gist_labels(trainer.data_collator, handle)
    trainer.train()
    expected = oracle.train(changes.get("gradient_accumulation_steps", 1))
    assert logged(trainer) == pytest.approx(expected, rel=2e-4)
    assert len(expected) == trainer.args.max_steps
    (rows_now,) = handle.trainable_parameters()
    torch.testing.assert_close(rows_now.detach(), oracle.rows.detach(), rtol=1e-3, atol=1e-5)
    assert all(0 <= value <= 6 for value in logged(trainer, "entropy")), "read off logits that are no -inf"
    with torch.no_grad():
        oracle.batches[False].clear()
        found = trainer.evaluate()["eval_loss"]
        assert found == pytest.approx(oracle.loss(oracle.batches[False]).item(), rel=2e-4)


def test_gist_tokens_that_the_trainer_has_counted_are_refused(tmp_path):
    trainer, *_ = make(tmp_path, "text")
    with pytest.raises(ValueError, match=r"trainer.data_collator = gistkern.training.ignore_gist_labels"):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0, "evaluation counts what the model has left"


def test_metrics_read_logits(tmp_path):
    """compute_metrics and label smoothing make TRL ask for logits; gist tokens have none that are special."""
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer, *_ = make(tmp_path, "completion", label_smoothing_factor=0.1)
    trainer.compute_metrics = metrics
    trainer.train()
    trainer.evaluate()
    assert all(value > 0 for value in logged(trainer))
    assert seen[0].shape[-1] == 70


@pytest.mark.parametrize("wrap", [None, lora])
def test_dpo(tmp_path, wrap):
    """The reference is the model before training, patched too: the loss starts at log 2, from the oracle's answers."""
    tokenizer = make_tokenizer()
    model, _, oracle = twins(tokenizer, wrap)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if wrap else twins(tokenizer)[0],
        args=trl.DPOConfig(str(tmp_path), **COMMON),
        train_dataset=rows("preference"),
        processing_class=tokenizer,
    )
    trainer.train()
    first, second = logged(trainer)
    assert first == pytest.approx(math.log(2), rel=1e-5)
    assert second != first
    (batch, *_) = oracle.batches[True]
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        said = oracle.logits(batch)[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (said * (labels >= 0)).sum(1).chunk(2)
    assert logged(trainer, "logps/chosen")[0] == pytest.approx(chosen.mean().item(), rel=1e-3)
    assert logged(trainer, "logps/rejected")[0] == pytest.approx(rejected.mean().item(), rel=1e-3)
