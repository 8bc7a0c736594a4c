"""Needle-in-a-haystack samples: passkeys hidden in varied text, English and Korean, as JSON lines.

    python examples/niah.py --lang ko --tokens 6096 --samples 200 --out niah-ko.jsonl
    python examples/niah.py --filler prose --wordings held_out --out niah-en-prose.jsonl
    python examples/niah.py --task counting --out counting-en.jsonl     # questions that need the whole context

The same seed writes the same bytes. Lengths are counted by the tokenizer: by default a small byte-level BPE
trained here on the spot (single-digit tokens), or any ``--tokenizer`` folder that transformers can load.
"""

from __future__ import annotations

from passkey import global_tasks
from passkey.command_line import errors_as_one_line
from passkey.niah import ASKED_BY, dataset, given_tokenizer, samples_parser, write_samples

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = samples_parser(__doc__)
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
        tokenizer = given_tokenizer(given.tokenizer)
        if given.task == "passkey":
            samples = list(dataset(tokenizer, *what, **options, **of_passkeys))
        else:
            samples = list(global_tasks.dataset(tokenizer, given.task, *what, **options))
        write_samples(samples, given.out)
    print(f"{len(samples)} {given.task} samples of {given.tokens:,} tokens in {given.out}")


if __name__ == "__main__":
    main()
