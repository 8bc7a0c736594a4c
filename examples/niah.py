"""Needle-in-a-haystack samples: passkeys hidden in varied text, English and Korean, as JSON lines.

    python examples/niah.py --lang ko --tokens 6096 --samples 200 --out niah-ko.jsonl
    python examples/niah.py --filler prose --wordings held_out --out niah-en-prose.jsonl
    python examples/niah.py --task counting --out counting-en.jsonl     # questions that need the whole context

The same seed writes the same bytes. Lengths are counted by the tokenizer: by default a small byte-level BPE
trained here on the spot (single-digit tokens), or any ``--tokenizer`` folder that transformers can load.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from passkey import global_tasks
from passkey.command_line import at_least, errors_as_one_line, output_file
from passkey.haystack import LANGUAGES
from passkey.niah import ASKED_BY, FILLERS, WORDINGS, dataset, train_tokenizer

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", default="en", choices=sorted(LANGUAGES))
    parser.add_argument("--tokens", type=at_least(1), default=2990, help="exact length of every context")
    parser.add_argument("--samples", type=at_least(1), default=200)
    parser.add_argument("--filler", default="templates", choices=FILLERS, help="real prose needs gensim and konlpy")
    parser.add_argument("--wordings", default="training", choices=WORDINGS, help="as in training, or never seen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="a transformers tokenizer's folder; the tiny preset's own by default")
    parser.add_argument("--out", type=output_file, required=True)
    parser.add_argument("--task", default="passkey", choices=("passkey", *global_tasks.TASKS))
    parser.add_argument("--keys", type=int, help="passkeys per context, 1 by default; one is asked for, by name")
    parser.add_argument("--asked-by", choices=ASKED_BY, help="of a passkey: a whole question, or its last words")
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in ("seed", "filler", "wordings")}
    of_passkeys = {name: getattr(given, name) for name in ("keys", "asked_by") if getattr(given, name) is not None}
    with errors_as_one_line(parser):
        what = given.lang, given.tokens, given.samples
        if of_passkeys and given.task != "passkey":
            raise ValueError("--keys and --asked-by are for passkeys: leave them out")
        if given.tokenizer is None:
            tokenizer = train_tokenizer()
        else:
            from passkey.models import read_tokenizer

            tokenizer = read_tokenizer(given.tokenizer).backend_tokenizer
        if given.task == "passkey":
            samples = list(dataset(tokenizer, *what, **options, **of_passkeys))
        else:
            samples = list(global_tasks.dataset(tokenizer, given.task, *what, **options))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples), "utf-8")
    print(f"{len(samples)} {given.task} samples of {given.tokens:,} tokens in {given.out}")


if __name__ == "__main__":
    main()
