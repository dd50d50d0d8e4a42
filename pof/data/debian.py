"""A data set out of a Debian package, without root and without installing it."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pof.data.official import DebianPackage


class PackageFailed(Exception):
    """The package could not be had; the message says why."""


def unpack_package(package: DebianPackage, scratch: Path, *, seconds: float = 120.0) -> Path:
    """Download a Debian package with apt-get, which checks its signature, and unpack it.

    The package lists of the machine are used; where it has none, or old ones, lists are fetched
    into `scratch`, so that nothing of the system is changed and no root is needed.

    Args:
        package: The package.
        scratch: An empty folder to work in.
        seconds: The longest that any one command may take.

    Returns:
        The folder of the package's data files, inside `scratch`.

    Raises:
        PackageFailed: There is no apt-get, no such package, no network, or no answer in time.
    """
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg")
    if apt is None or dpkg is None:
        raise PackageFailed("this machine has no apt-get")
    scratch = scratch.resolve()  # the commands run in it
    lists, cache = scratch / "lists", scratch / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    patience: tuple[str, ...] = ("-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15")
    own_lists = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}")
    if os.geteuid() == 0:  # apt's own sandbox user may not write into this folder
        patience += ("-o", "APT::Sandbox::User=root")

    def run(what: str, *command: str) -> None:
        _run(what, command, scratch, seconds)

    download = f"apt-get download {package.name}"
    try:
        run(download, apt, *patience, "download", package.name)
    except PackageFailed:
        # Without this apt takes lists that could not be fetched for a mere warning.
        strict = ("-o", "APT::Update::Error-Mode=any")
        run("apt-get update", apt, *patience, *own_lists, *strict, "update")
        run(download, apt, *patience, *own_lists, "download", package.name)
    debs = sorted(scratch.glob(f"{package.name}_*.deb"))
    if not debs:
        raise PackageFailed("apt-get downloaded nothing")
    run(f"dpkg -x {debs[0].name}", dpkg, "-x", str(debs[0]), "unpacked")
    return scratch / "unpacked" / package.folder.relative_to(package.folder.anchor)


def _run(what: str, command: Sequence[str], folder: Path, seconds: float) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PackageFailed(f"{what} took longer than {seconds:g} s") from error
    except OSError as error:
        raise PackageFailed(f"{what}: {error.strerror}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        reason = errors[-1].removeprefix("E: ") if errors else f"exit status {done.returncode}"
        raise PackageFailed(f"{what}: {reason}")
