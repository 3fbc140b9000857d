"""Provenance of results: the command, the machine and the commit, stored with a result and printed under its figure."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch


def stamp() -> dict[str, Any]:
    """The command of this process and its `origin`, which a result file begins with."""
    name = Path(sys.argv[0]).stem
    return {"command": " ".join(["python -m", f"experiments.{name}", *sys.argv[1:]]), **origin()}


def origin() -> dict[str, Any]:
    """The machine, torch version and commit of this process; stored with each run, as the runs of a file may differ in them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def caption(result: dict[str, Any], width: int | None = None) -> str:
    """The caption of a figure: the command of the result file, and every machine, torch version and commit of its runs.

    A run that does not name them has those of the file. One line, or lines of at most `width` characters.
    """
    # Runs of earlier commits name only the commit.
    runs = [{**result, **run} for run in result.get("runs", {}).values()] or [result]
    places = dict.fromkeys(f"{run['machine']} · torch {run['torch']}" for run in runs)
    commits = dict.fromkeys(run["commit"] for run in runs)
    text = f"{result['command']} · {'; '.join(places)} · commit {', '.join(commits)}"
    return text if width is None else textwrap.fill(text, width)


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()
