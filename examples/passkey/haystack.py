"""Sentences for passkey haystacks in English and Korean, written for this project.

A haystack is made of varied sentences full of numbers, so that "the only number in the text" is no way to
find the key. Sentences and keys are split by a checksum: what evaluation sees, training never did.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

__all__ = ["LANGUAGES", "Language", "is_held_out", "number", "scrambled", "sentence"]


@dataclass(frozen=True)
class Language:
    """Material of one language.

    `templates` take the `words` by name and numbers as ``{n}``; `held_out` ones are for evaluation alone.
    `needles` and `named_needles` state a key twice, as the original passkey task does (Mohtashami and Jaggi
    2023, "Landmark Attention", section 4.2); the named ones also take ``{name}``. `held_out_needles` are built
    otherwise and are for evaluation alone; most state the key once. `statement` is the shortest way to say it,
    `secret` what it is called. Each question, and the `cue`, which only starts the answer, ends where the answer's
    digits follow. `alphabet` is the code point of the first letter and their number.
    """

    code: str
    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    needles: tuple[str, ...]
    held_out_needles: tuple[str, ...]
    named_needles: tuple[str, ...]
    statement: str
    secret: str
    question: str
    cue: str
    named_question: str
    words: dict[str, tuple[str, ...]] = field(repr=False)
    alphabet: tuple[int, int]


_ENGLISH = Language(
    code="en",
    templates=(
        "The {place} keeps {n} {things} behind the {colour} door.",
        "{name} counted {n} {things} near the {place} on {day}.",
        "On {day} the {place} opened at {n} and closed at {n}.",
        "There are {n} steps between the {place} and the {place}.",
        "{name} sold {n} {things} to {name} for {n} coins.",
        "A {colour} train with {n} seats left for the {place}.",
        "Nobody at the {place} remembers the winter of {n}.",
        "The {colour} house has number {n} and a small garden.",
        "{name} and {name} walked past the {place} without a word.",
        "In the afternoon the {things} were moved to the {place}.",
        "Ticket {n} belongs to {name}, who waits at the {place}.",
        "The river rose by {n} inches and reached the {place}.",
        "{name} writes letters about {things} every {day}.",
        "It took {n} days to paint the {place} {colour}.",
        "The bus to the {place} carries {n} people and their {things}.",
        "Page {n} of the old book describes {things} and a {colour} lamp.",
        "{name} lost {n} {things} on the way to the {place}.",
        "The {place} was quiet, and the {things} stayed where they were.",
        "Room {n} has a {colour} carpet and {n} windows.",
        "Every {day} the {things} arrive from the {place}.",
    ),
    held_out=(
        "Since {n} the {place} has traded {things} for bread.",
        "{name} paid {n} coins for a {colour} coat last {day}.",
        "Behind the {place} someone stacked {n} {colour} boxes.",
        "The {things} in the {place} are older than {name}.",
    ),
    needles=(
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "Remember that the pass key is {key}. Yes, {key} is the pass key.",
        "Listen: the pass key is {key}. Again, the pass key is {key}.",
        "Here is the pass key: {key}. Do not forget that {key} is the pass key.",
    ),
    held_out_needles=(
        "Whoever asks for the pass key should be told {key}.",
        "{key} was chosen as the pass key this morning.",
        "A note on the desk gives the pass key as {key}; please copy {key} from it.",
        "To get in you need the pass key, and that would be {key}.",
        "They changed the pass key to {key}, so use {key} from now on.",
        "When asked for the pass key, type {key} and press enter.",
    ),
    named_needles=(
        "The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.",
        "Remember that the pass key of {name} is {key}. Yes, {key} is the pass key of {name}.",
    ),
    statement=" The pass key is {key}.",
    secret="pass key",
    question=" What is the pass key? The pass key is ",
    cue="\nThe pass key is ",
    named_question=" What is the pass key of {name}? The pass key of {name} is ",
    words={
        "place": ("library", "harbour", "station", "mill", "school", "market", "bridge", "tower", "museum", "bakery"),
        "things": ("lamps", "apples", "maps", "ropes", "clocks", "chairs", "bottles", "letters", "stones", "violins"),
        "colour": ("red", "green", "blue", "grey", "yellow", "white", "brown", "black"),
        "name": ("Mira", "Jonas", "Selma", "Pavel", "Ines", "Tariq", "Olga", "Bruno", "Keiko", "Amara"),
        "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    },
    alphabet=(ord("a"), 26),
)

_KOREAN = Language(
    code="ko",
    templates=(
        "{place}에는 {colour} 문 뒤에 {things} {n}개가 있습니다.",
        "{name}은 {day}에 {place} 근처에서 {things} {n}개를 세었습니다.",
        "{day}에 {place}은 {n}시에 열고 {n}시에 닫았습니다.",
        "{place}에서 {place}까지는 계단이 {n}개 있습니다.",
        "{name}은 {name}에게 {things} {n}개를 {n}원에 팔았습니다.",
        "좌석이 {n}개인 {colour} 기차가 {place}으로 떠났습니다.",
        "{place}에서 {n}년의 겨울을 기억하는 사람은 없습니다.",
        "{colour} 집은 {n}번지이고 작은 정원이 있습니다.",
        "{name}과 {name}은 말없이 {place} 앞을 지나갔습니다.",
        "오후에 {things}는 모두 {place}으로 옮겨졌습니다.",
        "표 {n}번은 {place}에서 기다리는 {name}의 것입니다.",
        "강물이 {n}센티미터 올라서 {place}에 닿았습니다.",
        "{name}은 {day}마다 {things}에 대한 편지를 씁니다.",
        "{place}을 {colour} 색으로 칠하는 데 {n}일이 걸렸습니다.",
        "{place}으로 가는 버스에는 {n}명이 {things}와 함께 탔습니다.",
        "오래된 책 {n}쪽에는 {things}와 {colour} 등불이 나옵니다.",
        "{name}은 {place}으로 가는 길에 {things} {n}개를 잃었습니다.",
        "{place}은 조용했고 {things}는 그대로 있었습니다.",
        "{n}호실에는 {colour} 양탄자와 창문 {n}개가 있습니다.",
        "{day}마다 {things}가 {place}에서 도착합니다.",
    ),
    held_out=(
        "{n}년부터 {place}은 {things}를 빵과 바꾸었습니다.",
        "{name}은 지난 {day}에 {colour} 외투를 {n}원에 샀습니다.",
        "{place} 뒤에 누군가 {colour} 상자 {n}개를 쌓았습니다.",
        "{place}의 {things}는 {name}보다 오래되었습니다.",
    ),
    needles=(
        "패스키는 {key}입니다. 기억하세요. {key}이 패스키입니다.",
        "패스키는 {key}라는 것을 기억하세요. 네, {key}이 패스키입니다.",
        "들으세요. 패스키는 {key}입니다. 다시, 패스키는 {key}입니다.",
        "여기 패스키가 있습니다. {key}입니다. {key}이 패스키라는 것을 잊지 마세요.",
    ),
    held_out_needles=(
        "누가 패스키를 물으면 {key}라고 답하면 됩니다.",
        "오늘 아침에 {key}번이 패스키로 정해졌습니다.",
        "책상 위 쪽지에는 패스키가 {key}번이라고 적혀 있으니 {key}번을 옮겨 적으세요.",
        "들어가려면 패스키가 필요한데 그 번호는 {key}입니다.",
        "패스키가 {key}번으로 바뀌었으니 이제부터 {key}번을 쓰세요.",
        "패스키를 넣는 칸에는 숫자 {key}을 치고 확인을 누릅니다.",
    ),
    named_needles=(
        "{name}의 패스키는 {key}입니다. 기억하세요. {key}이 {name}의 패스키입니다.",
        "{name}의 패스키는 {key}라는 것을 기억하세요. 네, {key}이 {name}의 패스키입니다.",
    ),
    statement=" 패스키는 {key}입니다.",
    secret="패스키",
    question=" 패스키는 무엇입니까? 패스키는 ",
    cue="\n패스키는 ",
    named_question=" {name}의 패스키는 무엇입니까? {name}의 패스키는 ",
    words={
        "place": ("도서관", "역", "극장", "시장", "박물관", "공원", "우체국", "식당", "병원", "빵집"),
        "things": ("사과", "지도", "시계", "의자", "모자", "엽서", "그림 엽서", "바구니", "열쇠고리", "우표"),
        "colour": ("빨간", "초록", "파란", "회색", "노란", "하얀", "갈색", "검은"),
        "name": ("민준", "서연", "지훈", "은영", "도윤", "수빈", "태형", "영준", "재석", "하은"),
        "day": ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일"),
    },
    alphabet=(0xAC00, 11_172),
)

LANGUAGES = {language.code: language for language in (_ENGLISH, _KOREAN)}


def is_held_out(text: str) -> bool:
    """Whether a sentence (without its numbers) or a key is for evaluation alone: one in five is."""
    return zlib.crc32(text.encode()) % 5 == 0


def sentence(language: Language, held_out: bool, rng: random.Random) -> str:
    """One haystack sentence of the wanted side of the split, with ``{n}`` where its numbers go."""
    templates = language.templates + (language.held_out if held_out else ())
    while True:
        template = rng.choice(templates)
        filled = template
        for slot, words in language.words.items():
            while f"{{{slot}}}" in filled:
                filled = filled.replace(f"{{{slot}}}", rng.choice(words), 1)
        if template in language.held_out or is_held_out(filled) == held_out:
            return filled


def scrambled(language: Language, rng: random.Random) -> str:
    """Words of two training sentences and invented ones in random order, most often with numbers among them.

    Half of the training haystack: without it a small model learns the few words and places that haystack
    numbers stand beside instead of what announces a key, and every new sentence looks like a needle. Lines without
    any number are among them because a model that met few of those took a held-out sentence without one for a needle.
    """
    numbered = rng.random() < 0.6
    words = " ".join(sentence(language, False, rng) for _ in range(2)).split(" ")
    rng.shuffle(words)
    chosen = [
        word if "{n}" in word or rng.random() < 0.5 else _invented(language, rng)
        for word in words[: rng.randint(4, 12)]
        if numbered or "{n}" not in word
    ]
    if numbered:
        chosen.insert(rng.randint(0, len(chosen)), "{n}")
    return " ".join(chosen) or _invented(language, rng)


def decoy(language: Language, rng: random.Random) -> str:
    """A needle's wording about something else than the pass key, with a number that looks like a key.

    An eighth of the training haystack: without it what a small model learns to look for is the wording around a
    key, and held-out sentences that resemble it ("... is 4821.") are taken for needles, more often the longer the
    context.
    """
    wording = rng.choice((*language.needles, language.statement)).strip()
    words = rng.choice(language.words[rng.choice(sorted(language.words))]), _invented(language, rng)
    thing = rng.choice((*words, " ".join(words)))
    return wording.replace(language.secret, thing).format(key="".join(rng.choice("0123456789") for _ in range(5)))


def _invented(language: Language, rng: random.Random) -> str:
    """A word of random letters or syllables, so that training meets every token of the vocabulary."""
    first, count = language.alphabet
    word = "".join(chr(first + rng.randrange(count)) for _ in range(rng.randint(1, 6)))
    return word.capitalize() if rng.random() < 0.2 else word


def number(rng: random.Random) -> str:
    """A number of a haystack sentence: one to six digits, so that many look like keys."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))
