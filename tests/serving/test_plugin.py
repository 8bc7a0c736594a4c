"""The entry point by which vLLM finds the connector. Its interface is played by a registry that refuses doubles."""

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

from gistkern.serving import plugin


def test_the_entry_point_registers_the_connector_once(monkeypatch):
    known = {}

    def register_connector(name, module, class_name):
        if name in known:
            raise ValueError(f"Connector '{name}' is already registered.")
        known[name] = module, class_name

    path = "vllm.distributed.kv_transfer.kv_connector.factory"
    names = path.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(".".join(names[:end])))
    sys.modules[path].KVConnectorFactory = SimpleNamespace(register_connector=register_connector)
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = declared["vllm.general_plugins"]["gistkern"].partition(":")
    registered = getattr(importlib.import_module(module), function)
    assert registered is plugin.register
    registered()
    registered()
    assert known == {"GistConnector": ("gistkern.serving.vllm", "GistConnector")}
