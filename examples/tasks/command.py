"""The command: its arguments, and the loop over tasks, methods and ratios."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passkey.command_line import at_least, errors_as_one_line, input_file, input_folder, output_folder
from passkey.report import command_line, environment, write_json
from tasks.catalog import TASKS, items
from tasks.item import Draw, Item
from tasks.record import Record
from tasks.scoring import best
from tasks.squad import read_squad, refuse_trained_on
from tasks.summary import METHODS, markdown, read_folder, rows_of, show

if TYPE_CHECKING:
    from tasks.engine import Engine

__all__ = ["ask", "main"]

GISTS, PRESSES = "gists", METHODS[5:]
UNCOMPRESSED = {"full": 1.0, "none": 0.0}  # whatever the ratios


def arguments_of(description: str) -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show all tasks and leave")
    parser.add_argument("--output", type=output_folder, help="folder for answers, summary.json and summary.md")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", default=["squad"], help="see --list")
    parser.add_argument("--lengths", nargs="+", type=at_least(64), default=[1024], help="tokens of contexts made here")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:4]))
    parser.add_argument("--ratios", nargs="+", type=_ratio, default=[4.0, 8.0, 16.0, 32.0], help="tokens per row")
    parser.add_argument("--n", type=at_least(1), default=100, help="questions of each task and length")
    parser.add_argument("--seed", type=int, default=0, help="draws the questions")
    parser.add_argument(
        "--squad", type=input_file, help="SQuAD's JSON, or its paragraphs as JSON lines; may be gzipped"
    )
    parser.add_argument("--trained-on", nargs="+", type=input_file, default=[], metavar="FILE",
                        help="training files: refuse if an article of --squad stands in one")  # fmt: skip
    parser.add_argument(
        "--model", type=input_folder, help="a model and its tokenizer; by default SmolLM2-135M-Instruct"
    )
    parser.add_argument(
        "--checkpoint", type=input_folder, help=f"for {GISTS}: an adapter or checkpoint; default the demo's"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=at_least(1), default=1)
    return parser


def _ratio(text: str) -> float:
    if not (value := float(text)) >= 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def main(description: str, arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments_of(description)
    given = parser.parse_args(arguments)
    if given.list:
        for name, task in TASKS.items():
            needs = ", needs --squad" * task.squad + ", needs gensim and konlpy" * task.prose
            print(f"{name:22} {task.about}: {', '.join(task.scores)}{', any length' * task.lengths}{needs}")
        return
    if given.output is None:
        parser.error("the following arguments are required: --output")
    with errors_as_one_line(parser):
        paragraphs = read_squad(given.squad) if given.squad else []
        if given.trained_on and not paragraphs:
            raise ValueError("--trained-on is looked at for the articles of a file: pass --squad, too")
        refuse_trained_on(paragraphs, given.trained_on)
        run(given, paragraphs, command_line("tasks.py", arguments))


def run(given: argparse.Namespace, paragraphs: list[Any], command: str) -> None:
    """Ask everything that was not asked before, and write the summary of the folder."""
    # here and below: what takes seconds to load, and a wrong argument is refused without
    import torch

    from tasks.engine import Engine

    torch.set_num_threads(given.threads)
    folder = given.model or _demo_base()
    loading = {"dtype": getattr(torch, given.dtype), "device_map": given.device} if given.device != "cpu" else {
        "dtype": getattr(torch, given.dtype)
    }  # fmt: skip
    about = {
        "model": {"name": folder.name, "files": _digest(folder)},
        "dtype": given.dtype,
        "seed": given.seed,
        "squad": hashlib.sha256(given.squad.read_bytes()).hexdigest()[:16] if given.squad else None,
    }
    engine = Engine.load(str(folder), **loading)
    for method in given.methods:
        reader, more = _reader(method, engine, given, folder, loading)
        record = Record(given.output / f"answers-{method}.jsonl.gz", {**about, "method": method, **more})
        for name in given.tasks:
            for length in given.lengths if TASKS[name].lengths else [0]:
                draw = Draw(lambda text: len(engine.ids(text)), length, given.seed, paragraphs)
                asked = items(name, draw, given.n)
                for ratio in [UNCOMPRESSED[method]] if method in UNCOMPRESSED else given.ratios:
                    ask(reader, record, asked, {"task": name, "length": length, "method": method, "ratio": ratio})
    runs, lines = read_folder(given.output)
    rows = rows_of(lines)
    where = environment("torch", "transformers")
    write_json(given.output / "summary.json", {"command": command, "environment": where, "runs": runs, "rows": rows})
    (given.output / "summary.md").write_text(markdown(rows), encoding="utf-8")
    show(rows)


def ask(reader: Any, record: Record, asked: Sequence[Item], cell: dict[str, Any]) -> None:
    """Answer the items of a cell of the table that no line of the record answers; a context is read once."""
    from tqdm import tqdm

    done = record.done
    missing = [one for one in asked if (*cell.values(), one.digest) not in done]
    with tqdm(total=len(missing), desc=" ".join(map(str, cell.values())), disable=None, leave=False) as bar:
        for group in _same_context(missing):
            answers = reader(group, cell["ratio"])
            record.add(
                {
                    **cell,
                    "item": item.digest,
                    "id": item.id,
                    "said": answer.said,
                    "scores": {name: best(name, answer.said, item.answers, item.language) for name in item.scores},
                    "tokens": answer.tokens,
                    "rows": answer.rows,
                    "bytes": answer.nbytes,
                    "seconds": round(answer.seconds, 4),
                }
                for item, answer in zip(group, answers, strict=True)
            )
            bar.update(len(group))


def _same_context(asked: Sequence[Item]) -> Iterator[list[Item]]:
    groups: dict[str, list[Item]] = {}
    for one in asked:
        groups.setdefault(one.context, []).append(one)
    yield from groups.values()


def _reader(method: str, engine: Engine, given: argparse.Namespace, folder: Path, loading: dict[str, Any]) -> Any:
    """What reads, as a function of items and ratio, and what else there is to say of it."""
    if method == GISTS:
        from tasks.methods import Gists

        checkpoint = given.checkpoint or _demo_adapter()
        adapter = (checkpoint / "adapter_config.json").is_file()
        gists = Gists(str(checkpoint), str(folder) if adapter else None, **loading)
        return gists.read, {
            **_versions("gistkern"),
            "checkpoint": {"name": checkpoint.name, "files": _digest(checkpoint)},
        }
    if method in PRESSES:
        from tasks.presses import Pressed, make_press

        make_press(method, 1, 2)  # says what is missing before anything is read
        return Pressed(engine, method).read, _versions("kvpress")
    from tasks import methods

    return partial(methods.PLAIN[method], engine), _versions()


def _versions(*packages: str) -> dict[str, Any]:
    return {"versions": environment("torch", "transformers", *packages)["versions"]}


def _demo_base() -> Path:
    from gistkern import demo

    return demo.base()


def _demo_adapter() -> Path:
    from gistkern import demo

    return demo.folder("smollm2")


def _digest(folder: Path) -> str:
    """Identity of a folder's weights and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
