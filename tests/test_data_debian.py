"""Debian's package by way of stand-ins for apt-get and dpkg."""

from pathlib import Path

import pytest

from pof.data.debian import PackageFailed, unpack_package
from pof.data.official import DebianPackage

PACKAGE = DebianPackage("dataset-small", Path("/usr/share/datasets/small"))
DPKG = 'mkdir -p "$3/usr/share/datasets/small" && cp "$2" "$3/usr/share/datasets/small/file.gz"'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Install stand-in commands as the only apt-get and dpkg of this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(**commands):
        for name, script in commands.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_package_is_downloaded_and_unpacked(machine, scratch):
    machine(apt_get="echo content > dataset-small_1.0_all.deb", dpkg=DPKG)
    folder = unpack_package(PACKAGE, scratch)
    assert (folder / "file.gz").read_text() == "content\n"
    assert scratch in folder.parents


def test_relative_scratch_folder(machine, scratch, monkeypatch):
    machine(apt_get="echo content > dataset-small_1.0_all.deb", dpkg=DPKG)
    monkeypatch.chdir(scratch.parent)
    assert (unpack_package(PACKAGE, Path("scratch")) / "file.gz").is_file()


def test_own_package_lists_where_the_machine_has_none(machine, scratch):
    machine(
        apt_get="""
        for word; do case $word in Dir::State::lists=*) lists=${word#*=};; esac; done
        case "$*" in
            *update) touch "$lists/fetched";;
            *) test -e "$lists/fetched" || { echo "E: Unable to locate package" >&2; exit 100; }
               echo content > dataset-small_1.0_all.deb;;
        esac""",
        dpkg=DPKG,
    )
    assert (unpack_package(PACKAGE, scratch) / "file.gz").is_file()
    assert (scratch / "lists" / "fetched").exists()


def test_no_network(machine, scratch):
    machine(apt_get='echo "W: old" >&2; echo "E: Failed to fetch" >&2; exit 100', dpkg=DPKG)
    with pytest.raises(PackageFailed, match=r"^apt-get update: Failed to fetch$"):
        unpack_package(PACKAGE, scratch)


def test_command_that_hangs(machine, scratch):
    machine(apt_get="exec sleep 30", dpkg=DPKG)
    with pytest.raises(PackageFailed, match=r"apt-get update took longer than 0\.2 s"):
        unpack_package(PACKAGE, scratch, seconds=0.2)


def test_broken_package(machine, scratch):
    machine(apt_get="touch dataset-small_1.0_all.deb", dpkg="echo no archive >&2; exit 2")
    with pytest.raises(PackageFailed, match=r"dpkg -x dataset-small_1\.0_all\.deb: no archive"):
        unpack_package(PACKAGE, scratch)


def test_nothing_downloaded(machine, scratch):
    machine(apt_get="exit 0", dpkg=DPKG)
    with pytest.raises(PackageFailed, match="downloaded nothing"):
        unpack_package(PACKAGE, scratch)


def test_machine_without_apt(machine, scratch):
    machine()
    with pytest.raises(PackageFailed, match="no apt-get"):
        unpack_package(PACKAGE, scratch)
