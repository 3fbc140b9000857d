"""What setup.cfg cannot say: the extension that holds the passes of hyperopt/body/passes.cpp, and the README as PyPI shows it.

The extension cannot be in pyproject.toml, where setuptools reads extensions only together with the metadata.
"""

import configparser
import re
import zlib
from pathlib import Path

from setuptools import Extension, setup

# For the CPU that they are built on: `usable` in the file says whether the one they run on will do. Where no compiler knows these flags,
# the package is installed without them.
FLAGS = ["-std=c++17", "-O3", "-g0", "-march=native", "-fopenmp", "-fno-math-errno", "-ftree-loop-vectorize"]
SOURCE = "hyperopt/body/passes.cpp"
ROOT = Path(__file__).parent

passes = Extension(
    "hyperopt.body._passes",
    [SOURCE],
    define_macros=[("SOURCE", f"{zlib.crc32((ROOT / SOURCE).read_bytes())}u")],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    optional=True,
)


def readme(home: str | None) -> str:
    """The README for a page on which paths of the repository lead nowhere.

    Args:
        home: where the repository is, https://github.com/…; None leaves out the figures, and keeps of a link only its text.
    """

    def absolute(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        if home:
            return f"{mark}[{text}]({home}/{'raw' if mark else 'blob'}/main/{target})"
        return "" if mark else text

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


config = configparser.ConfigParser()
config.read(ROOT / "setup.cfg")
home = config["metadata"].get("url")
setup(ext_modules=[passes], long_description=readme(home), long_description_content_type="text/markdown")
