"""Where a run was made: what could move its numbers and is not one of its settings."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
# Says of which commit a copy without git is.
REVISION_VARIABLE = "POF_REVISION"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn")


def packages(names: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions of packages; unless named, of those that can move a number."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code_revision() -> dict[str, Any]:
    """The commit of this checkout and whether its code differs from it (results aside)."""
    revision = _git("rev-parse", "HEAD") or os.environ.get(REVISION_VARIABLE) or None
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(device: str) -> str:
    """A device's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def slurm() -> dict[str, str]:
    """Identifiers of the Slurm job this process runs in; empty outside of one."""
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
    return {name: os.environ[name] for name in names if name in os.environ}


def describe(*, device: str, threads: int, precision: str) -> dict[str, Any]:
    """The environment of a run.

    Args:
        device: Name of the device that computes, e.g. a GPU's; the CPU's name on a CPU.
        threads: Threads that PyTorch uses.
        precision: ``fp32`` or ``bf16``.
    """
    return {
        "code": code_revision(),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "threads": threads,
        "precision": precision,
        "slurm": slurm(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
