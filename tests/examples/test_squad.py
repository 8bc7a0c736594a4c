"""Files in SQuAD's format: both kinds read alike, questions drawn by a seed, trained articles refused."""

import gzip
import json

import pytest

from tasks.squad import articles, read_squad, refuse_trained_on, shuffled, trained_on

PARAGRAPHS = [
    ("Super_Bowl", "Denver won. It was in Levi's Stadium.", [("a", "Who won?", ["Denver", "Denver", "Denver team"])]),
    ("Super_Bowl", "The colour was gold.", [("b", "Which colour?", ["gold"]), ("c", "Was it gold?", ["gold", "yes"])]),
    ("Warsaw", "Warsaw lies on the Vistula.", [("d", " Which river?", ["Vistula"]), ("none", "Which sea?", [])]),
]


def lines():
    return "".join(
        json.dumps(
            {
                "article": article,
                "context": text,
                "questions": [dict(zip(("id", "question", "answers"), one, strict=True)) for one in asked],
            }
        )
        + "\n"
        for article, text, asked in PARAGRAPHS
    )


def squads_own():
    groups = {}
    for article, text, asked in PARAGRAPHS:
        qas = [{"id": i, "question": q, "answers": [{"text": a, "answer_start": 0} for a in r]} for i, q, r in asked]
        groups.setdefault(article, []).append({"context": text, "qas": qas})
    return json.dumps({"version": "1.1", "data": [{"title": t, "paragraphs": p} for t, p in groups.items()]})


@pytest.fixture
def paragraphs(tmp_path):
    (tmp_path / "squad.jsonl").write_text(lines())
    return read_squad(tmp_path / "squad.jsonl")


def test_every_format_reads_alike(tmp_path, paragraphs):
    (tmp_path / "squad.json").write_text(squads_own())
    (tmp_path / "squad.jsonl.gz").write_bytes(gzip.compress(lines().encode()))
    assert read_squad(tmp_path / "squad.json") == read_squad(tmp_path / "squad.jsonl.gz") == paragraphs
    assert [one.article for one in paragraphs] == ["Super_Bowl", "Super_Bowl", "Warsaw"]
    assert paragraphs[0].questions[0].answers == ("Denver", "Denver team")
    assert [q.text for q in paragraphs[2].questions] == ["Which river?"]  # the one without an answer is left out


def test_whole_articles(paragraphs):
    bowl, warsaw = articles(paragraphs)
    assert bowl.text == "Denver won. It was in Levi's Stadium.\nThe colour was gold."
    assert [q.id for q in bowl.questions] == ["a", "b", "c"]
    assert warsaw == paragraphs[2]


def test_questions_are_shuffled_by_a_seed(paragraphs):
    every = shuffled(paragraphs, seed=3)
    assert every == shuffled(paragraphs, seed=3)
    assert sorted(q.id for _, q in every) == ["a", "b", "c", "d"]
    assert len({tuple(q.id for _, q in shuffled(paragraphs, seed)) for seed in range(8)}) > 1
    assert all(q in p.questions for p, q in every)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"article": "super bowl", "context": "Other words."}, ["Super_Bowl"]),
        ({"article": "X", "context": "the COLOUR was  gold."}, ["Super_Bowl"]),
        ({"context": "A line.\nWarsaw lies on the Vistula.\nMore.", "question": "?", "answer": "x"}, ["Warsaw"]),
        ({"article": "Rome", "context": "Warsaw lies on the Vistula, and more."}, []),
    ],
)
def test_what_was_trained_on_is_found(entry, found, paragraphs, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(entry) + "\n")
    assert trained_on(paragraphs, tmp_path / "train.jsonl") == found
    if found:
        with pytest.raises(ValueError, match=f"1 articles of the evaluation were trained on .*{found[0]}"):
            refuse_trained_on(paragraphs, [tmp_path / "train.jsonl"])
    else:
        refuse_trained_on(paragraphs, [tmp_path / "train.jsonl"])


def test_a_file_was_trained_on_itself(paragraphs, tmp_path):
    (tmp_path / "squad.json").write_text(squads_own())
    assert trained_on(paragraphs, tmp_path / "squad.json") == ["Super_Bowl", "Warsaw"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "line 1 is no JSON"),
        (b'{"data": [{"title": "x"}]}', "not in SQuAD's format: KeyError 'paragraphs'"),
        (b'{"article": "x", "context": "y", "questions": []}\n', "holds no questions"),
        (b"[1]\n", "not in SQuAD's format"),
        (b"\xff\xfe", "cannot be read"),
        (gzip.compress(b"x" * 99)[:-9], "cannot be read"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_squad(tmp_path / "other")


def test_a_training_file_that_says_nothing_is_no_clearance(paragraphs, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="holds no contexts"):
        trained_on(paragraphs, tmp_path / "train.jsonl")
