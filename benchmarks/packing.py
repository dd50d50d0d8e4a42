"""What travels to a machine on loan and back: the data of profiles, and their results."""

import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.errors import UserError
from benchmarks.files import write_bytes, writing
from benchmarks.settings import load_profile, profile_name

# What a result folder can do without, the first to stay behind.
_PLOTS = ("plots", "report.html")


def pack_data(
    profiles: Sequence[str],
    data_dir: Path,
    out: Path,
    *,
    megabytes: float,
    tell: Callable[[str], None],
) -> list[Path]:
    """Gather the data of profiles in a folder that serves as ``--data-dir`` without a network.

    Each data set is read back from there alone and held against the fingerprint of the original.

    Args:
        profiles: Names or TOML files.
        data_dir: Where the data sets are, or are put if they have to be fetched.
        out: The folder.
        megabytes: The most that the data of these profiles may take.
        tell: Takes a line for the user.

    Returns:
        The files written.

    Raises:
        UserError: A data set cannot be had, is not the same when read back, or does not fit.
    """
    from pof.data.loading import search_path
    from pof.data.packing import pack
    from pof.errors import PofError

    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; name another one with --out")
    if out.resolve() == data_dir.resolve():
        raise UserError(f"{out}: the data is there already; name another folder with --out")
    names = dict.fromkeys(name for p in profiles for name in load_profile(p).datasets)
    room, packed = megabytes * 1e6, []
    for name in names:
        try:
            files = pack(name, data_dir, search_path(os.environ), out)
        except PofError as error:
            raise UserError(str(error)) from error
        size = sum(path.stat().st_size for path in files)
        if size > room:
            for path in files:
                path.unlink()
            raise UserError(
                f"{name}: {size / 1e6:.1f} MB do not fit, {room / 1e6:.1f} of {megabytes:g} MB are "
                "left; pack fewer profiles at a time or raise --megabytes" + _smaller(name)
            )
        room -= size
        packed += files
        _check(name, data_dir, out)
        what = ", ".join(str(path.relative_to(out)) for path in files) or "comes with a package"
        tell(f"{name}: {size / 1e6:.1f} MB, {what}")
    return packed


def _smaller(name: str) -> str:
    if name != "cifar10_jpeg":
        return ""
    return "; its JPEG files (cifar10-jpeg.tar.xz) in DATA_DIR or POF_DATA_PATH take a tenth"


def _check(name: str, data_dir: Path, out: Path) -> None:
    """Read a data set from the packed files alone; what that unpacks goes to a scratch folder."""
    from benchmarks.assembly import load_dataset
    from pof.data import load
    from pof.errors import PofError

    temporary = Path(tempfile.gettempdir())
    with writing(temporary), tempfile.TemporaryDirectory() as scratch:
        for path in out.rglob("*"):
            if path.is_file():
                link = Path(scratch) / path.relative_to(out)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        try:
            copy = load(name, Path(scratch), download=False, elsewhere=[])
        except PofError as error:
            raise UserError(f"{out}: what was packed cannot be read: {error}") from error
    original = load_dataset(name, data_dir)
    if copy.fingerprint != original.fingerprint:
        raise UserError(
            f"{name}: packed from {original.source}, it reads as {copy.fingerprint[:19]}… and not "
            f"{original.fingerprint[:19]}…; is {out} left over from other data?"
        )


def pack_results(
    profiles: Sequence[str], results_dir: Path, archive: Path, *, megabytes: float
) -> list[str]:
    """Pack the records, tables and plots of profiles and the measured speed.

    Args:
        profiles: Names or TOML files; those without results are passed over.
        results_dir: Where they are.
        archive: A compressed tar file, to be unpacked in another results folder.
        megabytes: The most it may take; plots and pages stay behind if they do not fit, since
            ``make report`` makes them again.

    Returns:
        What was left behind.

    Raises:
        UserError: Even so it does not fit, or the archive cannot be written.
    """
    folders = [results_dir / name for name in ["speed", *map(profile_name, profiles)]]
    files = sorted(p for f in folders for p in f.rglob("*") if p.is_file())
    left: list[str] = []
    for without in ((), _PLOTS):
        kept = [p for p in files if not set(without) & set(p.relative_to(results_dir).parts)]
        left = [str(p.relative_to(results_dir)) for p in files if p not in set(kept)]
        with writing(archive), tempfile.TemporaryFile() as draft:
            with tarfile.open(fileobj=draft, mode="w:gz") as tar:
                for path in kept:
                    tar.add(path, path.relative_to(results_dir))
            size = draft.tell()
            if size <= megabytes * 1e6:
                draft.seek(0)
                write_bytes(archive, draft.read())
                return left
    raise UserError(
        f"{archive}: the records alone take {size / 1e6:.1f} MB of {megabytes:g}; pack fewer "
        "profiles at a time or raise --results-megabytes"
    )
