"""csrc/build_extension.py as a module: it is no part of a package."""

import importlib.util
import sys
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"


def load_build(csrc=CSRC):
    """The module build_extension.py of csrc/, or of a copy of that folder, which it then builds."""
    spec = importlib.util.spec_from_file_location("csrc_build", csrc / "build_extension.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
