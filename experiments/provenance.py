"""Where a result comes from: the command, the machine and the commit, stored in it and printed under its figure."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def stamp() -> dict[str, Any]:
    """The command, machine, torch version and commit of this process."""
    name = Path(sys.argv[0]).stem
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python -m", f"experiments.{name}", *sys.argv[1:]]),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def caption(result: dict[str, Any]) -> str:
    """One line for under a figure: command, machine and torch of the first run, and every commit that a run was made with."""
    runs = result.get("runs", {}).values()
    commits = dict.fromkeys(run.get("commit", result["commit"]) for run in runs) or [result["commit"]]
    return f"{result['command']} · {result['machine']} · torch {result['torch']} · commit {', '.join(commits)}"


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()
