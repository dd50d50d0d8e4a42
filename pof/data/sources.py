"""Where a data set's files are found, or else fetched from, in this order.

1. The data folder, where files lie as data files or still packed.
2. Further folders, which are only read (`POF_DATA_PATH`).
3. The well-known place where a Debian package installs them.
4. Downloads: the official address, then mirrors.
5. The Debian package, downloaded and unpacked without root.

The first place that has every file is used. What is found there and is broken is an error that
the user hears of, not a reason to go on quietly to the next place.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pof.data.catalogue import DatasetInfo
from pof.data.debian import PackageFailed, unpack_package
from pof.data.download import Downloader, DownloadFailed
from pof.data.official import DataFile, DebianPackage, OfficialFiles, Packed
from pof.data.storage import exclusive, require_room, verify, writing_into
from pof.data.unpacking import unpack
from pof.errors import DataUnavailable

_log = logging.getLogger(__name__)

SEARCH_PATH_VARIABLE = "POF_DATA_PATH"
_FETCH_AGAIN = "delete it and run again: it is then fetched anew"


@dataclass(frozen=True)
class Found:
    """Verified data files.

    Attributes:
        root: Each data file lies at its `path` under this folder.
        source: Where they were found, in one phrase.
    """

    root: Path
    source: str


@dataclass(frozen=True)
class _Place:
    root: Path
    title: str
    cure: str


@dataclass(frozen=True)
class Sources:
    """The places to look for data in, and the means to fetch it.

    Attributes:
        folder: The data folder; everything fetched goes there.
        elsewhere: Further folders; nothing is ever written there.
        download: Whether data may be fetched.
        downloader: What downloads.
        unpack_package: What fetches a Debian package into a scratch folder.
    """

    folder: Path
    elsewhere: tuple[Path, ...] = ()
    download: bool = True
    downloader: Downloader = field(default_factory=Downloader)
    unpack_package: Callable[[DebianPackage, Path], Path] = unpack_package

    def locate(self, info: DatasetInfo, official: OfficialFiles) -> Found:
        """Find a data set's files, or fetch them into the data folder.

        Args:
            info: The data set.
            official: Its official files.

        Returns:
            The files, each held against its checksum.

        Raises:
            DataCorrupt: Something that was found is broken.
            DataUnavailable: No source has the files; says what each answered, and what to do.
            PofError: The data folder cannot be written.
        """
        home = self.folder / official.layouts[0]
        reasons = []
        for place in self._places(official):
            missing = _missing(place.root, official)
            if not missing:
                _verify(place.root, official, place.cure)
                return Found(place.root, f"{place.title} ({place.root})")
            packed = _packed(place.root, official, missing)
            if packed is not None:
                with exclusive(self.folder, info.name):
                    _install(packed, place.root, official, home, place.cure)
                _verify(home, official, _FETCH_AGAIN)
                return Found(home, f"{place.title} ({place.root}), unpacked into {home}")
            if len(missing) < len(official.files):
                reasons.append(f"{place.root} lacks {_listed(file.path for file in missing)}")
        if not self.download:
            reasons.append("not in the folders searched, and fetching it is switched off")
        else:
            with exclusive(self.folder, info.name):
                source = self._fetch(official, home, reasons)
            if source is not None:
                _verify(home, official, _FETCH_AGAIN)
                return Found(home, f"{source}, unpacked into {home}")
        raise DataUnavailable(self._unavailable(info, official, reasons))

    def _places(self, official: OfficialFiles) -> Iterable[_Place]:
        for layout in official.layouts:
            root = self.folder / layout
            yield _Place(root, "the data folder", _FETCH_AGAIN)
        for folder in self.elsewhere:
            for layout in official.layouts:
                cure = f"replace it, or take {folder} out of {SEARCH_PATH_VARIABLE}"
                yield _Place(folder / layout, SEARCH_PATH_VARIABLE, cure)
        if package := official.debian:
            title = f"Debian's package {package.name}"
            yield _Place(package.folder, title, f"reinstall Debian's package {package.name}")

    def _fetch(self, official: OfficialFiles, home: Path, reasons: list[str]) -> str | None:
        """Fetch what is missing; the phrase for its source, or None with the reasons added."""
        missing = _missing(home, official)
        if not missing:
            return "fetched by another process"
        needed = [packed for packed in official.packed if _held(packed, missing)]
        require_room(self.folder, _room_needed(home, needed, missing))
        hosts: dict[str, None] = {}
        try:
            for packed in needed:
                if not _is_file(home / packed.name):
                    url = self.downloader.fetch(packed, home / packed.name)
                    hosts[urlsplit(url).netloc] = None
                _install([packed], home, official, home, _FETCH_AGAIN)
            return f"downloaded from {', '.join(hosts)}"
        except DownloadFailed as failed:
            reasons.extend(failed.reasons)
        if official.debian is None:
            return None
        return self._fetch_package(official, official.debian, home, reasons)

    def _fetch_package(
        self, official: OfficialFiles, package: DebianPackage, home: Path, reasons: list[str]
    ) -> str | None:
        title = f"Debian's package {package.name}"
        _log.info("fetching %s", title)
        with writing_into(self.folder):
            scratch = tempfile.TemporaryDirectory(prefix=".debian-", dir=self.folder)
        with scratch:
            try:
                with writing_into(self.folder):
                    folder = self.unpack_package(package, Path(scratch.name))
            except PackageFailed as failed:
                reasons.append(f"{title}: {failed}")
                return None
            missing = _missing(home, official)
            packed = _packed(folder, official, missing)
            if packed is None:
                reasons.append(f"{title}: has other files in it than expected")
                return None
            _install(packed, folder, official, home, f"use another source than {title}")
        return title

    def _unavailable(
        self, info: DatasetInfo, official: OfficialFiles, reasons: Sequence[str]
    ) -> str:
        files = _listed(packed.name for packed in official.packed)
        cure = f"put {files} into {self.folder}, or name a folder that has them in "
        cure += SEARCH_PATH_VARIABLE
        if official.debian is not None:
            cure += f", or install Debian's package {official.debian.name}"
        return f"{info.title} could not be had: {'; '.join(reasons)}; {cure}"


def _install(
    packed: Sequence[Packed], source: Path, official: OfficialFiles, home: Path, cure: str
) -> None:
    """Unpack what is still missing; files that another process has put there are left alone."""
    for archive in packed:
        if wanted := _held(archive, _missing(home, official)):
            unpack(source / archive.name, archive, wanted, home, cure)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that may not be entered
        return False


def _missing(root: Path, official: OfficialFiles) -> list[DataFile]:
    return [file for file in official.files if not _is_file(root / file.path)]


def _held(packed: Packed, files: Iterable[DataFile]) -> list[DataFile]:
    return [file for file in files if file.path in packed.holds]


def _packed(
    root: Path, official: OfficialFiles, missing: Sequence[DataFile]
) -> list[Packed] | None:
    """The packed files in a folder that hold everything that is missing, or None."""
    needed = [packed for packed in official.packed if _held(packed, missing)]
    return needed if all(_is_file(root / packed.name) for packed in needed) else None


def _room_needed(home: Path, packed: Sequence[Packed], missing: Sequence[DataFile]) -> int:
    """Bytes to download, packed files at hand left out, and to unpack, where that is known."""
    names = {archive.name for archive in packed}
    download = sum(archive.size for archive in packed if not _is_file(home / archive.name))
    return download + sum(file.size or 0 for file in missing if file.path not in names)


def _verify(root: Path, official: OfficialFiles, cure: str) -> None:
    for file in official.files:
        verify(root / file.path, file.checksum, cure, file.size)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
