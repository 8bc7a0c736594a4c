"""The curriculum moves when the measured accuracy passes the gate, gives up in time, and resumes exactly."""

import json
import random

import pytest

from gistkern.training import Curriculum, Stage

STAGES = (
    Stage(steps=4, gate=0.5, tokens=(50, 60)),
    Stage(steps=3, gate=0.9, segments=(1, 4), segment_length=96, depth=(0.25, 0.75), keys=(1, 3)),
    Stage(steps=2, tokens=(50, 3000), batch_size=4),
)


def run(curriculum, accuracies):
    return [curriculum.update(accuracy) for accuracy in accuracies]


def test_a_gate_opens_when_the_running_accuracy_reaches_it():
    curriculum = Curriculum(STAGES, smoothing=0.5)
    assert run(curriculum, [1, 1, 1]) == [False] * 3, "not before the stage's steps are done"
    assert curriculum.running_accuracy == 0.875
    assert curriculum.update(0.0) is False, "0.4375 is below the gate"
    assert curriculum.update(1.0) is True
    assert (curriculum.index, curriculum.stage_step, curriculum.step) == (1, 0, 5)
    assert curriculum.running_accuracy == 0, "the next stage starts its mean afresh"


def test_patience_ends_a_stage_whose_gate_stays_shut():
    curriculum = Curriculum(STAGES, patience=1.5)
    assert run(curriculum, [0] * 6) == [False] * 5 + [True], "after 1.5 times 4 steps"
    assert run(curriculum, [0] * 5) == [False] * 4 + [True], "after 4.5 steps, rounded up"
    assert run(curriculum, [0] * 2) == [False, True], "the last stage ends after its steps"
    assert curriculum.finished
    assert curriculum.step == curriculum.max_steps == 13
    assert Curriculum(curriculum.stages).remaining_steps == 9
    assert curriculum.remaining_steps == 0
    with pytest.raises(ValueError, match="the curriculum is finished"):
        curriculum.update(1.0)


def test_remaining_steps_count_down_but_not_while_a_gate_is_waited_for():
    curriculum = Curriculum([Stage(steps=2, gate=0.9, tokens=(5, 5)), Stage(steps=3, tokens=(5, 9))], patience=2.0)
    left = [curriculum.remaining_steps]
    while not curriculum.finished:
        curriculum.update(0.0)
        left.append(curriculum.remaining_steps)
    assert left == [5, 4, 3, 3, 3, 2, 1, 0]


def test_it_is_the_rule_of_the_training_example():
    """The same accuracies through the arithmetic of examples/train_niah.py, written out again here."""
    rng = random.Random(3)
    curriculum = Curriculum(STAGES)
    stage = steps = 0
    mean = 0.0
    while not curriculum.finished:
        accuracy = rng.random()
        ended = curriculum.update(accuracy)
        steps, mean = steps + 1, 0.95 * mean + 0.05 * accuracy
        last = stage == len(STAGES) - 1
        passed = steps >= STAGES[stage].steps and (last or mean >= STAGES[stage].gate)
        assert ended == (passed or (not last and steps >= 1.5 * STAGES[stage].steps))
        if ended and not last:
            stage, steps, mean = stage + 1, 0, 0.0
        assert (curriculum.index, curriculum.stage_step) == (stage, steps)
        assert curriculum.running_accuracy == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("cut", [0, 3, 5, 8])
def test_a_resumed_curriculum_goes_on_bit_for_bit(cut):
    rng = random.Random(cut)
    accuracies = [rng.random() for _ in range(9)]
    whole, first, second = (Curriculum(STAGES, smoothing=0.8) for _ in range(3))
    run(first, accuracies[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected = run(whole, accuracies)
    assert run(second, accuracies[cut:]) == expected[cut:]
    assert second.state_dict() == whole.state_dict()


def test_a_state_of_another_curriculum_is_refused():
    state = Curriculum(STAGES).state_dict()
    for other in (Curriculum(STAGES[1:]), Curriculum(STAGES, patience=2), Curriculum(STAGES, smoothing=0)):
        with pytest.raises(ValueError, match=r"the state is of another curriculum: its (stages|patience|smoothing)"):
            other.load_state_dict(state)
    state.pop("stage_step")
    with pytest.raises(ValueError, match="lacks stage_step"):
        Curriculum(STAGES).load_state_dict(state)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"steps": 0, "tokens": (1, 2)}, "steps must be an int >= 1, got 0"),
        ({"steps": 1}, "either tokens or segments"),
        ({"steps": 1, "tokens": (1, 2), "segments": (1, 2), "segment_length": 4}, "either tokens or segments"),
        ({"steps": 1, "segments": (1, 2)}, "segments needs segment_length"),
        ({"steps": 1, "tokens": (9, 2)}, r"tokens must be \(least, most\) with 1 <= least <= most, got \(9, 2\)"),
        ({"steps": 1, "tokens": (1, 2), "keys": (0, 1)}, "keys must be"),
        ({"steps": 1, "tokens": (1, 2), "depth": (0.5, 1.5)}, "depth must be"),
        ({"steps": 1, "tokens": (1, 2), "gate": 93}, r"gate must be an accuracy in \[0, 1\], got 93"),
        ({"steps": 1, "tokens": (1, 2), "batch_size": True}, "batch_size must be an int >= 1"),
    ],
)
def test_bad_stages(stage, message):
    with pytest.raises(ValueError, match=message):
        Stage(**stage)


def test_bad_curricula():
    for arguments, message in [
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"steps": 4}]}, "stage 0 must be a Stage, got dict"),
        ({"stages": STAGES[:1]}, "the last stage has a gate of 0.5"),
        ({"stages": STAGES, "patience": 0.5}, "patience must be at least 1"),
        ({"stages": STAGES, "smoothing": 1}, "smoothing must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            Curriculum(**arguments)
    for accuracy in (float("nan"), 1.01, -0.1):
        with pytest.raises(ValueError, match="accuracy must lie in"):
            Curriculum(STAGES).update(accuracy)
