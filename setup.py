"""Build hooks: the compiled extension where it can be built, and `kernels/` as `gistkern/kernels/` in wheels."""

import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_extension  # noqa: E402


class BuildExtension(build_ext):
    """`gistkern._C` by csrc/build_extension.py: one shared library for every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the interpreter's tag: the library holds no Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; with CUDA kernels where nvcc is."""
        cuda = "nvcc" if build_extension.nvcc() else "none"
        if cuda == "none":
            print(
                "gistkern: no nvcc (CUDA_HOME, the path, or nvidia-cuda-nvcc): the extension gets CPU kernels only",
                file=sys.stderr,
            )
        build_extension.build(Path(self.get_ext_fullpath(ext.name)), cuda)


class BuildWithKernels(build_py):
    """`build_py` that also copies the kernel files next to the path shim."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:  # the shim reads the checkout's folder
            return
        for source in sorted((ROOT / "kernels").rglob("*.py")):
            target = Path(self.build_lib) / "gistkern" / source.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


class AnyPython(bdist_wheel):
    """A wheel with the extension is tied to the platform, not to one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``, or ``py3-none-any`` without the extension."""
        return "py3", "none", super().get_tag()[2]


def long_description() -> str:
    """The README without pictures and links of the repository, which lead nowhere from a package index."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = [block for block in text.split("\n\n") if not re.search(r"!\[[^]]*\]\((?!https?://)", block)]
    text = "\n\n".join(blocks)
    return re.sub(r"\[([^]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)


reason = build_extension.missing()
if reason:
    print(f"gistkern: building without the compiled extension: {reason}", file=sys.stderr)
setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildExtension, "build_py": BuildWithKernels, "bdist_wheel": AnyPython},
    ext_modules=[] if reason else [Extension("gistkern._C", ["csrc/bindings.cpp"])],
)
