"""`gistkern.serving` without vLLM: light to import, and clear about what is missing."""

import subprocess
import sys


def test_import_is_light_and_vllm_is_asked_for():
    code = """
import sys
sys.modules["vllm"] = None
import gistkern.serving
assert not {"torch", "transformers"} & sys.modules.keys()
assert gistkern.serving.save_plain, "which is for vLLM, and needs none"
for name in set(gistkern.serving.__all__) - {"save_plain"}:
    try:
        getattr(gistkern.serving, name)
    except ImportError as error:
        assert "needs vLLM with the connector interface of 0.32" in str(error), error
        assert "docs/guides/vllm.md" in str(error)
    else:
        raise AssertionError(name)
assert not hasattr(gistkern.serving, "LLM")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
