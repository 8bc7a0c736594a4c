"""Global tasks: exact lengths, answers that the text bears out, a clean split, no shortcut past the context."""

import random
import re
from collections import Counter

import pytest

import niah
from passkey.global_tasks import TASKS, WORDINGS, GlobalTask, dataset
from passkey.haystack import LANGUAGES
from passkey.niah import Haystack, train_tokenizer
from passkey.samples import read_samples

BOTH = pytest.mark.parametrize("language", LANGUAGES)
ALL = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def haystack(tokenizer):
    """Haystacks by language and side, built once: each encodes ten thousand sentences."""
    made = {}

    def get(language, held_out=True, wordings="training", seed=0):
        key = (language, held_out, wordings)
        if key not in made:
            made[key] = Haystack(tokenizer, language, held_out, random.Random(seed), wordings=wordings)
        made[key].rng = random.Random(seed)
        return made[key]

    return get


def statements(task, language, wordings, text):
    """What the text says, read back with the task's templates: the words of each statement, in order."""
    words = LANGUAGES[language].words
    wording = WORDINGS[task][language]
    found = []
    for template in wording["held_out"] if wordings == "held_out" else wording["statements"]:
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        for slot, choices in words.items():
            pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(sorted(choices, key=len, reverse=True))})")
        found += [(match.start(), match.groupdict()) for match in re.finditer(f"(?<=[ ]){pattern}", text)]
    return [words for _, words in sorted(found, key=lambda pair: pair[0])]


def solve(task, language, wordings, text, question):
    """The answer, from the text and the question alone."""
    said = statements(task, language, wordings, text)
    if task == "counting":
        (place,) = (place for place in LANGUAGES[language].words["place"] if re.search(rf"\b{place}", question))
        return str(sum(words["place"] == place for words in said))
    if task == "majority":
        (first, most), (_, second) = Counter(words["things"] for words in said).most_common(2)
        assert most > second, "the winner is alone in front"
        return first
    named = [words["name"] for words in said]
    pair = [name for name in named if name in question]
    assert len(pair) == 2
    return pair[0] if re.search("first|먼저", question) else pair[-1]


@ALL
@BOTH
@pytest.mark.parametrize("wordings", ["training", "held_out"])
def test_the_text_bears_out_the_answer(haystack, tokenizer, task, language, wordings):
    drawn = GlobalTask(task, haystack(language, wordings=wordings))
    for _ in range(12):
        ids, sample = drawn.draw(900)
        assert ids == tokenizer.encode(sample.context).ids
        assert len(ids) == sample.tokens == 900
        assert solve(task, language, wordings, sample.context, sample.question) == sample.answer
        assert sample.answer in sample.choices
        assert (sample.filler, sample.wordings, sample.task) == ("templates", wordings, task)


@ALL
@BOTH
def test_half_of_the_context_is_not_enough(haystack, task, language):
    """An answer from the front half alone is right in far fewer cases than one from the whole."""
    drawn = GlobalTask(task, haystack(language))
    right = 0
    for _ in range(60):
        _, sample = drawn.draw(700)
        try:
            half = solve(task, language, "training", sample.context[: len(sample.context) // 2], sample.question)
        except (AssertionError, ValueError, IndexError):
            continue
        right += half == sample.answer
    assert right < 40


@ALL
@BOTH
def test_guessing_scores_chance(haystack, task, language):
    """No answer is more frequent than chance allows (n = 400, three standard deviations)."""
    haystack_ = haystack(language)
    drawn = GlobalTask(task, haystack_)
    plans = [TASKS[task](drawn, haystack_.rng) for _ in range(400)]
    chance = plans[0].chance
    if task == "counting":
        frequent = Counter(plan.answer for plan in plans).most_common(1)[0][1]
    elif task == "majority":
        frequent = sum(plan.answer == next(iter(plan.facts)) for plan in plans)
    else:
        frequent = sum(plan.answer == min(plan.facts, key=plan.question.find) for plan in plans)
    assert frequent / 400 < chance + 3 * (chance * (1 - chance) / 400) ** 0.5 + 0.02
    assert len({plan.answer for plan in plans}) >= 9


@ALL
@BOTH
def test_training_never_sees_what_evaluation_asks(haystack, task, language):
    sides = []
    for held_out in (False, True):
        drawn = GlobalTask(task, haystack(language, held_out))
        sides.append({drawn.say() for _ in range(400)})
    assert not sides[0] & sides[1]
    wording = WORDINGS[task][language]
    assert not set(wording["statements"]) & set(wording["held_out"])


def test_same_seed_same_samples(tokenizer):
    first, second, other = (list(dataset(tokenizer, "counting", "ko", 500, 2, seed=seed)) for seed in (3, 3, 4))
    assert first == second != other
    assert first[0] != first[1]


def test_the_file_is_what_evaluation_reads(tokenizer, tmp_path, capsys):
    path = tmp_path / "ordering.jsonl"
    niah.main(["--task", "ordering", "--tokens", "300", "--samples", "3", "--seed", "5", "--out", str(path)])
    assert read_samples(path) == list(dataset(tokenizer, "ordering", "en", 300, 3, seed=5))
    assert "3 ordering samples of 300 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "counting", "--tokens", "20"], "20 tokens are too few for the counting task"),
        (["--task", "counting", "--keys", "2"], "--keys and --asked-by are for passkeys"),
        (["--task", "poetry"], "invalid choice: 'poetry'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        niah.main([*arguments, "--out", str(tmp_path / "x")])
    assert message in capsys.readouterr().err


def test_unknown_task_names_the_known_ones(haystack):
    with pytest.raises(ValueError, match="unknown task 'poetry': expected one of counting, majority, ordering"):
        GlobalTask("poetry", haystack("en"))
