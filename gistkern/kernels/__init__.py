"""Triton kernels. Their files live in the repository's top-level `kernels/`, which has no ``__init__.py``.

A package called `kernels` exists on PyPI and transformers probes for it, so ours must not be importable under
that name. In a checkout (setup.py stands beside this package) the folder joins this package's path; wheels
hold copies of the files (`build_py` in setup.py).
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT / "kernels"))
