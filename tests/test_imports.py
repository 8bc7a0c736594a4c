"""Who may import whom (DESIGN section 6), and what `import gistkern` costs. Fresh processes."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_gistkern_is_light():
    loaded = modules_after("import gistkern")
    assert not loaded & {"torch", "transformers", "triton", "peft", "matplotlib"}


def test_the_op_needs_no_transformers_and_no_triton():
    code = """
import torch
from gistkern import GistLayout, gist_attention
layout = GistLayout.from_segments([4], 1, tail=1)
x = torch.randn(1, 1, 6, 16)
gist_attention(x, x, x, layout)
"""
    loaded = modules_after(code)
    assert not loaded & {"transformers", "triton", "peft", "bitsandbytes"}
    assert "gistkern.backends.reference" not in loaded, "no optimized code imports the reference"


# all of them, and the one that others of them import
@pytest.mark.parametrize("blocked", ["triton peft bitsandbytes accelerate matplotlib", "accelerate"])
def test_everything_public_works_without_the_extras(blocked):
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked!r}.split())
import torch, gistkern
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, vocab_size=50))
with gistkern.patch_llama(model):
    cache = gistkern.compress(model, torch.tensor([[1, 2, 3]]))
    model.generate(torch.tensor([[4]]), past_key_values=cache, max_new_tokens=2)
"""
    modules_after(code)


def imports_of(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*patterns):
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


# DESIGN section 6: a folder imports only what stands before it; those in one line do not know each other
ORDER = [
    ("layout",),
    ("rows", "files", "lazy", "tables", "progress"),
    ("kernels",),
    ("backends",),
    ("ops",),
    ("distributed",),
    ("cache",),
    ("hf",),
    ("corpus", "training"),
    ("demo",),
    ("serving",),
    ("testing",),
    ("autotune", "doctor", "memory"),
    ("cli",),
    ("__main__",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in files("gistkern/**/*.py")
} | {f"gistkern.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path for path in files("kernels/**/*.py")}
FACES = {name for name, path in MODULES.items() if path.name == "__init__.py" and name.count(".") < 2}


def room_of(name):
    return name.split(".")[1] if "." in name else ""


def ours(path):
    """The modules of the package that a file imports, at its top or later; public names by where they stand."""
    exports = importlib.import_module("gistkern")._EXPORTS
    found = {exports.get(name.removeprefix("gistkern."), name) for name in imports_of(path)}
    return {name for name in found if name in MODULES and name != "gistkern"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"gistkern"}))
def test_a_folder_imports_only_what_stands_before_it(name):
    path, room = MODULES[name], room_of(name)
    imported = ours(path)
    wrong = {one for one in imported if room_of(one) != room and RANK[room_of(one)] >= RANK[room]}
    assert not wrong, f"{name} ({room}) imports upwards"
    if RANK[room] < RANK["cache"]:
        assert not [one for one in imports_of(path) if one.split(".")[0] == "transformers"]
    assert "gistkern.backends.reference" not in imported or room == "testing", "tests alone import the reference"


def test_nothing_imports_in_a_circle():
    arrows = {name: ours(path) - FACES for name, path in MODULES.items() if name not in FACES}
    done = set()
    while ready := {name for name, wanted in arrows.items() if name not in done and wanted - {name} <= done}:
        done |= ready
    assert not {name: arrows[name] - done for name in arrows.keys() - done}


@pytest.mark.parametrize("path", files("gistkern/backends/*.py"), ids=lambda p: p.name)
def test_no_backend_computes_by_another(path):
    imported = {name for name in imports_of(path) if name.startswith("gistkern.backends.")}
    others = {"cpu", "cuda", "triton", "sdpa", "reference", "plain"} - {path.stem}
    assert not imported & {f"gistkern.backends.{name}" for name in others}


@pytest.mark.parametrize("path", files("examples/*.py", "examples/*/*.py"), ids=lambda p: p.name)
def test_examples_use_public_names_only(path):
    packages = {
        name: importlib.import_module(name)
        for name in ("gistkern", "gistkern.demo", "gistkern.training", "gistkern.serving")
    }
    public = {*packages, *(f"{name}.{one}" for name, package in packages.items() for one in package.__all__)}
    assert not {name for name in imports_of(path) if name.startswith("gistkern")} - public


SMALL = (
    *("gistkern/**/*.py", "kernels/**/*.py", "examples/**/*.py", "bench/*.py", "setup.py", "csrc/**/*.py"),
    *("csrc/**/*.h", "csrc/**/*.c*"),
)


@pytest.mark.parametrize("path", files(*SMALL), ids=str)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) < 400


def test_no_two_test_files_have_one_name():
    """pytest would collect only one of them in a run of all."""
    names = [path.name for path in files("tests/**/test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
