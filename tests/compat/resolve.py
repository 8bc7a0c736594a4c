"""``make resolve ARGS="PACKAGE==VERSION ..."``: does gistkern resolve beside other packages?

Asks uv, which reads the index's metadata and installs nothing. Prints the table of docs/start/install.md;
the conflict is uv's, in many words.
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
BESIDE = (
    *("vllm==0.33.0", "vllm==0.32.0", "vllm==0.25.0", "vllm==0.22.0", "sglang==0.5.23", "unsloth==2026.10.9"),
    *("llamafactory==0.9.5", "trl", "kvpress==0.5.5", "liger-kernel", "flash-linear-attention", "lmcache"),
)
SHOWN = ("torch", "transformers", "triton", "peft")


def resolve(package: str) -> list[str]:
    """A row: the package's version, yes or the conflict, and the versions of `SHOWN` that were picked."""
    name, _, version = package.partition("==")
    wanted = f"gistkern[triton,train] @ {ROOT.as_uri()}\n{package}\n"
    uv = [sys.executable, "-m", "uv", "pip", "compile", "-", "--python-version", "3.11"]
    done = subprocess.run(
        [*uv, "--quiet", "--no-header", "--no-annotate"], input=wanted, capture_output=True, text=True
    )
    if done.returncode:
        return [name, version or "newest", " ".join(done.stderr.split()), *[""] * len(SHOWN)]
    picked = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
    return [name, picked[name], "yes", *(picked.get(one, "") for one in SHOWN)]


def main() -> None:
    """Resolve each, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(resolve, sys.argv[1:] or BESIDE))
    for row in (["package", "version", "resolves", *SHOWN], ["---"] * (3 + len(SHOWN)), *rows):
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
