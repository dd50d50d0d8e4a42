"""Is this machine ready? Data sets, packages, device, disk and write access."""

import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import environment
from benchmarks.assembly import load_dataset
from benchmarks.errors import UserError
from benchmarks.worker import choose_device, device_name
from pof.data import DATASETS

_WANTED_GIB = 5.0


def examine(console: Console, data_dir: Path, runs_dir: Path) -> bool:
    """Print what was found; data sets that cannot be had are no fault of the machine.

    Returns:
        Whether training could start here.
    """
    machine = list(_machine(data_dir, runs_dir))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "machine", "found"):
        table.add_column(column, overflow="fold")
    for fine, name, found in machine:
        table.add_row(_mark(fine), name, Text(found))
    console.print(table, "")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "data set", "images", "where", "fingerprint"):
        table.add_column(column, overflow="fold")
    for name in DATASETS:
        with console.status(f"looking for {name} …"):
            mark, *cells = _dataset(name, data_dir)
            table.add_row(mark, *map(Text, cells))
    console.print(table)
    return all(fine for fine, _, _ in machine)


def _mark(fine: bool) -> Text:
    return Text("✓", "green") if fine else Text("✗", "red")


def _machine(data_dir: Path, runs_dir: Path) -> Iterator[tuple[bool, str, str]]:
    """(fine, what, found) for everything but data."""
    yield True, "Python", platform.python_version()
    for package, version in environment.packages().items():
        yield version != "missing", package, version
    device = choose_device()
    yield True, "device", f"{device_name(device)} ({device.type})"
    yield True, "threads", str(torch.get_num_threads())
    for name, folder in (("data", data_dir), ("runs", runs_dir)):
        existing = next(p for p in [folder.resolve(), *folder.resolve().parents] if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        yield free > _WANTED_GIB, f"{name} folder", f"{folder} ({free:.0f} GiB free)"
        yield (
            _writable(existing),
            f"{name} folder",
            "can be written"
            if _writable(existing)
            else f"{existing} cannot be written: choose another with --{name}-dir",
        )


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _dataset(name: str, data_dir: Path) -> tuple[Text, str, str, str, str]:
    try:
        dataset = load_dataset(name, data_dir)
    except UserError as error:
        return _mark(False), name, "–", f"UNAVAILABLE: {error}", "–"
    images = f"{len(dataset.train.labels):,} + {len(dataset.test.labels):,}"
    official = "official" if dataset.official else "not the official files"
    where = f"{dataset.source} ({official})"
    return _mark(True), name, images, where, dataset.fingerprint[:19] + "…"
