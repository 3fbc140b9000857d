"""What a user installs: the metadata and the files of the package, built here without a network."""

import configparser
import email
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hyperopt

ROOT = Path(__file__).parent.parent
HOME = "https://example.org/somebody/hyperopt"
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def built(hook: str, source: Path, out: Path) -> Path:
    """The file or folder that a hook of the build backend makes in `out`."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, hook, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


@pytest.fixture
def source(tmp_path):
    """A copy of the sources, as a build writes among them."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT / "hyperopt", copy / "hyperopt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def metadata(source, out):
    return email.message_from_string((built("prepare_metadata_for_build_wheel", source, out) / "METADATA").read_text())


def links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_metadata(source, tmp_path):
    found = metadata(source, tmp_path / "out")
    assert found["Version"] == hyperopt.__version__
    assert found["Description-Content-Type"] == "text/markdown"
    required = {re.split(r"[<>=;\s]", line)[0] for line in found.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == {"torch", "numpy", "typing_extensions"}
    page = found.get_payload()
    assert page.startswith("# hyperopt")
    assert all(link.startswith("https://") for link in links(page))
    assert "![" not in page or found["Home-page"]
    assert "[guide]" not in page or found["Home-page"]


def test_with_a_home_links_and_figures_are_absolute(source, tmp_path):
    config = configparser.ConfigParser()
    config.read(source / "setup.cfg")
    config["metadata"]["url"] = HOME
    with (source / "setup.cfg").open("w") as file:
        config.write(file)
    page = metadata(source, tmp_path / "out").get_payload()
    found = links(page)
    assert all(link.startswith("https://") for link in found)
    assert f"{HOME}/raw/main/experiments/results/robustness_m3.png" in found
    assert f"{HOME}/blob/main/docs/guide.md#learn-from-held-out-data" in found
    assert len(found) == len(links((ROOT / "README.md").read_text()))


def test_type_checkers_see_the_annotations_of_an_installed_package(source, tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")], cwd=source, check=True)
    installed = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert "hyperopt/py.typed" in installed
    assert "hyperopt/body/passes.cpp" in installed
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "hyperopt").rglob("*.py")} <= installed
    assert all(path.startswith("hyperopt/") for path in installed)


@pytest.mark.skipif(importlib.util.find_spec("twine") is None, reason="twine is not installed")
def test_twine_finds_nothing_to_complain_about(source, tmp_path):
    archive = built("build_sdist", source, tmp_path / "out")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_import_of_the_package_is_required_or_of_python():
    found = set()
    for path in (ROOT / "hyperopt").rglob("*.py"):
        if "integrations" not in path.parts:
            found |= set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE))
    assert found - sys.stdlib_module_names == {"torch", "numpy", "typing_extensions"}
