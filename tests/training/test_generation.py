"""GistTrainer.evaluate_generation: what `compress` and `generate` say one by one, compared with the right answers."""

import pytest
import torch
from training_cases import SCHEMES, arguments, lora, make_features, patched

import gistkern
from gistkern.training import GistDataCollator, GistTrainer
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
