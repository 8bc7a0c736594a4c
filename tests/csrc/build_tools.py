"""csrc/build_extension.py as a module: it is no part of a package."""

import importlib.util
import sys
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def load_build():
    """The module csrc/build_extension.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build_extension.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
