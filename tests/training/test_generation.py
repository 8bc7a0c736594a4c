"""GistTrainer.evaluate_generation: what `compress` and `generate` say one by one, compared with the right answers."""

import pytest
import torch
from safetensors.torch import load_file
from training_cases import SCHEMES, arguments, lora, make_features, patched

import gistkern
from gistkern.training import AnswerEvaluation, GistDataCollator, GistTrainer
from gistkern.training.generation import Generated, generate_answers, generation_metrics


def trainer_of(folder, scheme="hierarchical", peft=False, **changes):
    model, handle, segments = patched(scheme)
    trained = lora(model, init_lora_weights=False).double() if peft else model
    collator = GistDataCollator(0, handle, **segments)
    return GistTrainer(trained, arguments(folder, **changes), data_collator=collator), segments


def alone(model, feature, segments, tokens):
    """One sample, by the public functions."""
    cache = gistkern.compress(model, torch.tensor([feature["context_ids"]]), **segments)
    ids = torch.tensor([feature["question_ids"]])
    said = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return said[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_say_what_single_samples_say(scheme, peft, tmp_path):
    trainer, segments = trainer_of(tmp_path, scheme, peft, per_device_eval_batch_size=3)
    features, seen = make_features(7), []

    def keep(generated):
        seen.append(generated)
        return generation_metrics(generated)

    trainer.model.train()
    metrics = trainer.evaluate_generation(features, compute_metrics=keep, metric_key_prefix="held_out")
    assert trainer.model.training
    (generated,) = seen
    trainer.model.eval()
    expected = [alone(trainer.model, one, segments, len(one["answer_ids"])) for one in features]
    assert generated == Generated(expected, [one["answer_ids"] for one in features])
    assert metrics == {f"held_out_{name}": value for name, value in generation_metrics(generated).items()}
    assert trainer.state.log_history[-1]["held_out_exact"] == metrics["held_out_exact"]


def test_right_answers_are_exact(tmp_path):
    """The model's own answers, asked again, are all right; with more tokens they are contained."""
    trainer, segments = trainer_of(tmp_path)
    features = make_features(5)
    trainer.model.eval()
    for one in features:
        one["answer_ids"] = alone(trainer.model, one, segments, 3)
    trainer.eval_dataset = features
    assert set(trainer.evaluate_generation().values()) == {1.0}
    longer = trainer.evaluate_generation(max_new_tokens=5)
    assert (longer["generation_exact"], longer["generation_contained"]) == (0.0, 1.0)
    features[0]["answer_ids"] = [(features[0]["answer_ids"][0] + 1) % 50 + 1, *features[0]["answer_ids"][1:]]
    assert trainer.evaluate_generation()["generation_exact"] == 0.8
    assert trainer.evaluate_generation()["generation_token_accuracy"] == 14 / 15


def test_an_answer_stops_where_the_model_ends_it(tmp_path):
    trainer, segments = trainer_of(tmp_path)
    features = make_features(1)
    trainer.model.eval()
    said = alone(trainer.model, features[0], segments, 4)
    trainer.model.generation_config.eos_token_id = said[2]
    generated = generate_answers(trainer.model, trainer.data_collator, features, max_new_tokens=4)
    assert generated.predictions == [said[: said.index(said[2])]]


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="there is nothing to evaluate"):
        trainer.evaluate_generation()
    with pytest.raises(ValueError, match="feature 0 lacks answer_ids"):
        trainer.evaluate_generation([{"context_ids": [5], "question_ids": [6]}])
    trainer.data_collator = list
    with pytest.raises(ValueError, match="a GistDataCollator tells contexts from questions, the trainer has type"):
        trainer.evaluate_generation(make_features(1))


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
def test_the_checkpoint_that_answers_best_is_kept_and_loaded(peft, tmp_path):
    """Every evaluation generates; of equal ones the lower loss is better."""
    scripted, seen = iter([0.1, 0.9, 0.9, 0.3]), []

    def score(generated):
        seen.append(generated)
        return {"exact": next(scripted), "n": len(generated.predictions)}

    model, handle, segments = patched("segments", dtype=torch.float32)
    trained = lora(model, lora_dropout=0.0) if peft else model
    features = make_features(8)
    trainer = GistTrainer(
        trained,
        arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="generation_best",
        ),
        data_collator=GistDataCollator(0, handle, **segments),
        train_dataset=features,
        eval_dataset=features[:5],
        answers=AnswerEvaluation(samples=3, metrics=score),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_generation_exact"] for entry in log] == [0.1, 0.9, 0.9, 0.3]
    assert all(entry["eval_generation_n"] == 3 for entry in log)
    best = 2 if log[1]["eval_loss"] < log[2]["eval_loss"] else 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    trainer.save_model(str(tmp_path / "end"))
    kept, last = load_file(tmp_path / f"checkpoint-{best}" / name), load_file(tmp_path / "checkpoint-4" / name)
    end = load_file(tmp_path / "end" / name)
    assert all(torch.equal(end[one], kept[one]) for one in kept)
    assert any(not torch.equal(end[one], last[one]) for one in last)


def test_what_ends_an_answer_is_no_part_of_the_right_one(tmp_path):
    trainer, segments = trainer_of(tmp_path)
    features = make_features(2)
    trainer.model.eval()
    for one in features:
        one["answer_ids"] = [*alone(trainer.model, one, segments, 2), 50]
    trainer.model.generation_config.eos_token_id = 50
    assert trainer.evaluate_generation(features, max_new_tokens=2)["generation_exact"] == 1.0
