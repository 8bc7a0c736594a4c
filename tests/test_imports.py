"""Who may import whom (DESIGN section 6), and what `import gistkern` costs. Fresh processes."""

import ast
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


TRANSFORMERS_LIVES_IN = {"cache.py", "compressing.py", "cache_file.py", "doctor.py", "versions.py"}


LAYERED = ("gistkern/*.py", "gistkern/backends/*.py", "gistkern/distributed/*.py", "kernels/*.py")


@pytest.mark.parametrize("path", files(*LAYERED), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_layers(path):
    imported = imports_of(path)
    if path.name not in TRANSFORMERS_LIVES_IN | {"__init__.py"}:
        assert not [name for name in imported if name.startswith(("transformers", "gistkern.hf"))]
    if path.name not in {"testing.py"}:
        assert not [name for name in imported if name.startswith("gistkern.backends.reference")]
    if path.parent.name == "backends":
        others = {f"gistkern.backends.{p.stem}" for p in path.parent.glob("*.py")} - {"gistkern.backends.sdpa_plan"}
        assert not imported & others, "backends never import one another"


def is_all(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"


@pytest.mark.parametrize("path", files("examples/*.py", "examples/passkey/*.py"), ids=lambda p: p.name)
def test_examples_use_public_names_only(path):
    import gistkern

    public = {"gistkern", *(f"gistkern.{name}" for name in gistkern.__all__)}
    for module in files("gistkern/training/*.py"):
        dotted = ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = next(node.value for node in ast.parse(module.read_text()).body if is_all(node))
        public |= {dotted, *(f"{dotted}.{name}" for name in ast.literal_eval(names))}
    assert not {name for name in imports_of(path) if name.startswith("gistkern")} - public


SMALL = (
    *("gistkern/**/*.py", "kernels/*.py", "examples/**/*.py", "bench/*.py", "setup.py", "csrc/**/*.py"),
    *("csrc/**/*.h", "csrc/**/*.c*"),
)


@pytest.mark.parametrize("path", files(*SMALL), ids=str)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) < 400
