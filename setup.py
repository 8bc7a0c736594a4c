"""Build hook: the top-level `kernels/` folder becomes `gistkern/kernels/` in wheels (see that package)."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "kernels"


class BuildWithKernels(build_py):
    """`build_py` that also copies the kernel files next to the path shim."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:  # the shim reads the checkout's folder
            return
        for source in sorted(KERNELS.glob("*.py")):
            target = Path(self.build_lib) / "gistkern" / "kernels" / source.name
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithKernels})
