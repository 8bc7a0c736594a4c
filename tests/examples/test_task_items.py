"""Items of the tasks: of the wanted length, answerable from their context, the same for a seed, and unambiguous."""

import re
from collections import Counter

import pytest

from tasks.catalog import TASKS, items
from tasks.item import Draw, fitting
from tasks.needles import NEEDLES, WORDS
from tasks.rules import broken, drawn_rules
from tasks.scoring import best
from tasks.squad import Paragraph, Question


def words(text):
    return len(text.split())


SQUAD = [
    Paragraph(
        f"Town {town}",
        f"Town {town}, place {place}, has {town * 10 + place} mills. " + "Its mills grind all day. " * 6,
        (Question(f"{town}-{place}", f"How many mills has place {place}?", (str(town * 10 + place),)),),
    )
    for town in range(6)
    for place in range(5)
]
SHORTEST = {"fwe": 120, "vt": 120, "qa_1": 100}


def draw(name, seed=0, length=None):
    return Draw(words, length or SHORTEST.get(name, 300), seed, SQUAD)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_its_seeds_and_grows(name):
    first = items(name, draw(name), 3)
    assert items(name, draw(name), 2) == first[:2]
    assert len({one.digest for one in first}) == 3
    assert items(name, draw(name, seed=1), 3) != first
    for one in first:
        assert one.scores == TASKS[name].scores
        assert all(best(score, ", ".join(one.answers), one.answers, one.language) == 1 for score in one.scores)
        assert all(best(score, "", one.answers, one.language) == 0 for score in one.scores)
        assert one.new_tokens >= words(", ".join(one.answers))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.lengths])
def test_contexts_are_as_long_as_wanted(name):
    for length in (SHORTEST.get(name, 300), 700):
        for one in items(name, draw(name, length=length), 2):
            # a line or paragraph more would be too long, and no line of prose takes more than a quarter
            assert 0.75 * length <= words(one.context) <= length


@pytest.mark.parametrize("end", ["", "_ko"])
@pytest.mark.parametrize("name", NEEDLES)
def test_needles_stand_in_the_haystack(name, end):
    task, language = NEEDLES[name], "ko" if end else "en"
    for one in items(name + end, draw(name), 3):
        assert len(one.answers) == task.asked * task.values
        assert one.language == language
        _, after = re.split(r"\{key\}.*\{value\}", WORDS[language]["needle"])
        assert all(one.context.count(answer) == 1 for answer in one.answers)
        keys = re.split(", | and ", one.question)
        assert len(keys) == task.asked
        for key in keys:
            assert one.context.count(f"{key} is " if not end else f"‘{key}’의") == task.values
            assert key in one.tail
        assert one.context.count(after) >= task.keys * task.values
        assert not [answer for answer in one.answers if answer in one.tail]
        kind = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "words": r"\S+-\S+"}
        assert all(re.fullmatch(kind[task.value], answer) for answer in one.answers)


def test_a_needle_haystack_is_of_needles_alone():
    (one,) = items("niah_multikey_2", draw(""), 1)
    found = re.findall(r"The secret number of (\S+) is (\d{7})\.", one.context)
    assert len(dict(found)) == len(found) > 20
    assert dict(found)[one.question] == one.answers[0]


def test_variables_lead_back_to_the_value():
    for one in items("vt", draw("vt"), 5):
        held = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", one.context))
        value = re.search(r"value (\d+)\?", one.tail)[1]

        def value_of(name, held=held):
            return held[name] if held[name].isdigit() else value_of(held[name])

        assert [name for name in held if value_of(name) == value] == list(one.answers)
        assert len(one.answers) == 5


def test_common_words_are_the_most_common():
    for length in (300, 4200):
        (one,) = items("cwe", draw("cwe", length=length), 1)
        count = Counter(re.findall(r"\d+\. (\S+)", one.context.split("common words are")[1]))
        (top, often), *_ = count.most_common(1)
        assert {word for word, times in count.items() if times == often} == set(one.answers)
        assert often == (30 if length > 4096 else 6)
        assert max(times for word, times in count.items() if word not in one.answers) == (3 if length > 4096 else 1)
        assert top in one.answers


@pytest.mark.parametrize("length", [100, 150, 333, 1000, 3000])
def test_frequent_words_are_told_apart(length):
    for one in items("fwe", draw("fwe", length=length), 3):
        (dots, _), *top = Counter(one.context.split("\n\n")[1].split()).most_common(5)
        assert dots == "..."
        assert [word for word, _ in top[:3]] == list(one.answers)
        times = [count for _, count in top]
        assert times[0] > times[1] > times[2] > times[3]


def test_questions_stand_among_other_articles():
    for one in items("qa_1", draw("qa_1", length=200), 5):
        town, place = one.id.split("-")
        assert one.context.count(f"Town {town}, ") == 1
        assert one.context.startswith("Document 1: ")
        assert one.context.count("Document ") > 2
        assert f"place {place}" in one.question
    with pytest.raises(ValueError, match="the file holds 30 questions, asked for 31"):
        items("qa_1", draw("qa_1"), 31)
    # more room than there are paragraphs
    (one,) = items("qa_1", draw("qa_1", length=10**6), 1)
    assert one.context.count("Document ") == 1 + 25


def test_squad_is_asked_about_paragraphs_and_articles():
    (one,), (whole,) = items("squad", draw("squad"), 1), items("squad_articles", draw("squad_articles"), 1)
    assert one.context in {paragraph.text for paragraph in SQUAD}
    assert whole.context.count("Town ") == 5
    assert one.tail.count("Question: ") == 2
    assert one.tail.endswith(f"Question: {one.question}\nAnswer:")
    with pytest.raises(ValueError, match="asks the questions of a file: pass --squad"):
        items("squad", Draw(words, 0, 0), 1)


def test_a_sentence_is_asked_for_by_words_that_stand_once():
    for name in ("verbatim_contains", "verbatim_follows"):
        for one in items(name, draw(name), 4):
            (answer,) = one.answers
            assert one.context.count(one.question) == one.context.count(answer) == 1
            if name == "verbatim_contains":
                assert one.question in answer
            else:
                start = one.context.index(answer)
                assert one.context.index(one.question) + len(one.question) <= start
                # nothing but the rest of one sentence stands between
                assert len(one.context[one.context.index(one.question) : start].split()) < 80


def test_one_rule_is_broken_and_nine_are_kept():
    seen = set()
    for index in range(60):
        one, rng = broken(draw("rules"), index), draw("rules").rng("rules", index)
        rules = drawn_rules(rng)
        first, last = re.findall(r"^Shop: (.*)$", one.tail, re.M)
        assert all(rule.holds(first) for rule in rules)
        (place,) = [place for place, rule in enumerate(rules, start=1) if not rule.holds(last)]
        assert one.answers == (str(place),)
        assert f"{place}. {rules[place - 1].text}" in one.context
        assert len(rules) == 10
        seen.add(place)
    assert seen == set(range(1, 11))


def test_fitting_finds_the_most():
    def make(k):
        return "x " * (3 * k + 2)

    for length, k in [(2, 0), (4, 0), (5, 1), (100, 32)]:
        assert fitting(make, Draw(words, length, 0)) == k
    assert fitting(make, Draw(words, 100, 0), most=7) == 7
    with pytest.raises(ValueError, match="1 tokens are too few: what must stand in the context takes 2"):
        fitting(make, Draw(words, 1, 0))


def test_a_text_longer_than_its_material_is_refused():
    with pytest.raises(ValueError, match="different needles"):
        items("niah_multikey_2_ko", draw("", length=10**5), 1)
    with pytest.raises(ValueError, match="different words"):
        items("cwe", draw("", length=10**5), 1)
    with pytest.raises(ValueError, match="there is no task nothing"):
        items("nothing", draw(""), 1)
