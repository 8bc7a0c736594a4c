"""Needle-in-a-haystack samples: passkeys hidden in varied text, English and Korean, as JSON lines.

    python examples/niah.py --lang ko --tokens 6096 --samples 200 --out niah-ko.jsonl
    python examples/niah.py --filler prose --wordings held_out --out niah-en-prose.jsonl

The same seed writes the same bytes. Lengths are counted by the tokenizer: by default a small byte-level BPE
trained here on the spot (single-digit tokens), or any ``--tokenizer`` folder that transformers can load.
"""

from __future__ import annotations

from passkey.command_line import errors_as_one_line
from passkey.niah import ASKED_BY, dataset, given_tokenizer, samples_parser, write_samples

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = samples_parser(__doc__)
    parser.add_argument("--keys", type=int, default=1, help="passkeys per context; one is asked for, by name")
    parser.add_argument("--asked-by", default="question", choices=ASKED_BY, help="a whole question, or its last words")
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in ("seed", "keys", "filler", "wordings", "asked_by")}
    with errors_as_one_line(parser):
        samples = list(dataset(given_tokenizer(given.tokenizer), given.lang, given.tokens, given.samples, **options))
        write_samples(samples, given.out)
    print(f"{len(samples)} samples of {given.tokens:,} tokens in {given.out}")


if __name__ == "__main__":
    main()
