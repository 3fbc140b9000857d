"""The extension that holds the passes of hyperopt/body/passes.cpp; all else is in setup.cfg.

It cannot be in pyproject.toml, where setuptools reads extensions only together with the metadata.
"""

import zlib
from pathlib import Path

from setuptools import Extension, setup

# For the CPU that they are built on: `usable` in the file says whether the one they run on will do. Where no compiler knows these flags,
# the package is installed without them.
FLAGS = ["-std=c++17", "-O3", "-g0", "-march=native", "-fopenmp", "-fno-math-errno", "-ftree-loop-vectorize"]
SOURCE = "hyperopt/body/passes.cpp"

passes = Extension(
    "hyperopt.body._passes",
    [SOURCE],
    define_macros=[("SOURCE", f"{zlib.crc32((Path(__file__).parent / SOURCE).read_bytes())}u")],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[passes])
