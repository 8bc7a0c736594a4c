"""Ctrl-C in a training: once saves and ends, twice stops at once, and what it says to do goes on."""

import re
import signal

import pytest
import torch
from training_cases import arguments, make_features, patched
from transformers import TrainerCallback

from gistkern.training import Curriculum, GistDataCollator, GistTrainer, Stage
from gistkern.training.interrupt import Interrupt


@pytest.fixture(autouse=True)
def _a_handler_as_in_a_terminal():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Press(TrainerCallback):
    """Ctrl-C, so many times, in the middle of a step."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def make(folder, curriculum=None, press=()):
    model, handle, segments = patched("hierarchical", dtype=torch.float32)
    return GistTrainer(
        model,
        arguments(folder, max_steps=4, optim="adamw_torch"),  # save_strategy="no"
        data_collator=GistDataCollator(0, handle, **segments),
        train_dataset=make_features(24),
        curriculum=curriculum,
        callbacks=list(press),
    )


def curriculum():
    return Curriculum([Stage(4, tokens=(4, 20))])


@pytest.mark.parametrize("step", [1, 3])
def test_one_saves_and_what_it_says_goes_on(tmp_path, step, capfd):
    whole = make(tmp_path / "whole", curriculum())
    whole.train()
    trainer = make(tmp_path / "run", curriculum(), [Press(step)])
    with pytest.raises(KeyboardInterrupt, match=re.escape(str(tmp_path / "run" / f"checkpoint-{step}"))) as said:
        trainer.train()
    assert "Press again to stop at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer = make(tmp_path / "run", curriculum())
    eval(str(said.value).split("go on with ")[1])
    assert trainer.state.global_step == 4
    for one, other in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_stop_at_once(tmp_path):
    trainer = make(tmp_path, press=[Press(2, times=2)])
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_the_last_step_training_is_over(tmp_path):
    trainer = make(tmp_path, curriculum(), [Press(4)])
    trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_handler_of_the_users_own_stays():
    caught = []
    for own in (lambda *_: caught.append(1), signal.SIG_IGN):
        signal.signal(signal.SIGINT, own)
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert not interrupt.requested
            assert signal.getsignal(signal.SIGINT) is own
    assert caught == [1]
