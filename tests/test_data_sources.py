"""The order of sources, what each failure says, and that no failure leaves half a data set."""

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pof.data import storage
from pof.data.debian import PackageFailed
from pof.data.download import DownloadFailed
from pof.data.loading import load, search_path
from pof.data.official import DebianPackage
from pof.data.sources import Sources
from pof.errors import DataCorrupt, DataUnavailable, PofError
from tests import data_archives as archives


class Served:
    """A downloader that serves files from memory, or fails."""

    def __init__(self, files, failing=()):
        self.files, self.failing, self.asked = files, failing, []

    def fetch(self, packed, target):
        self.asked.append(packed.name)
        if packed.name in self.failing or packed.name not in self.files:
            raise DownloadFailed(["example.org: HTTP 404 Not Found"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[packed.name])
        return f"https://example.org/{packed.name}"


def no_package(package, scratch):
    raise PackageFailed("this machine has no apt-get")


@pytest.fixture
def small(tmp_path):
    """A small Fashion-MNIST that a Debian package would install."""
    made = archives.fashion()
    package = DebianPackage("dataset-small", tmp_path / "usr" / "share")
    return replace(made, official=replace(made.official, debian=package))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def locate(small, folder, **settings):
    settings = {"downloader": Served({}), "unpack_package": no_package, **settings}
    return Sources(folder, **settings).locate(small.info, small.official)


def test_order_of_sources(small, folder, tmp_path):
    """Each source is used when all before it have nothing, and not when one has."""
    extra = tmp_path / "extra"
    downloader = Served(small.packed_files)

    def package(package, scratch):
        small.put_packed(scratch / "p")
        return scratch / "p"

    def find():
        return locate(
            small,
            folder,
            elsewhere=(extra,),
            downloader=downloader,
            unpack_package=package,
        ).source

    small.put_unpacked(folder)
    small.put_unpacked(extra)
    small.put_packed(small.official.debian.folder)
    home = folder / "FashionMNIST/raw"
    assert find() == f"the data folder ({folder})"
    remove(folder)
    assert find() == f"POF_DATA_PATH ({extra})"
    assert not folder.exists()
    remove(extra)
    place = small.official.debian.folder
    assert find() == f"Debian's package dataset-small ({place}), unpacked into {home}"
    remove(folder)
    remove(place)
    assert find() == f"downloaded from example.org, unpacked into {home}"
    remove(folder)
    downloader.failing = tuple(small.packed_files)
    assert find() == f"Debian's package dataset-small, unpacked into {home}"
    assert find() == f"the data folder ({home})"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".debian")]


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
def test_layouts(small, folder, layout):
    small.put_unpacked(folder / layout)
    assert locate(small, folder).root == folder / layout


def test_further_folders_are_never_written(small, folder, tmp_path):
    extra = tmp_path / "extra"
    small.put_packed(extra)
    before = sorted(extra.rglob("*"))
    found = locate(small, folder, elsewhere=(extra,))
    assert found.root == folder / "FashionMNIST/raw"
    assert sorted(extra.rglob("*")) == before


def test_only_what_is_missing_is_downloaded(small, folder):
    home = folder / "FashionMNIST/raw"
    small.put_unpacked(home)
    (home / "t10k-labels-idx1-ubyte").unlink()
    (home / "train-images-idx3-ubyte").unlink()
    archives.put(
        {"t10k-labels-idx1-ubyte.gz": small.packed_files["t10k-labels-idx1-ubyte.gz"]}, home
    )
    downloader = Served(small.packed_files)
    locate(small, folder, downloader=downloader)
    assert downloader.asked == ["train-images-idx3-ubyte.gz"]


def test_archive_beside_a_folder_that_was_unpacked_half(folder):
    cifar = archives.cifar()
    cifar.put_packed(folder)
    cifar.put_unpacked(folder)
    (folder / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert locate(cifar, folder).root == folder
    assert (folder / "cifar-10-batches-py" / "data_batch_3").is_file()


def test_package_completes_a_download_that_failed(small, folder):
    def package(package, scratch):
        small.put_packed(scratch / "p")
        return scratch / "p"

    downloader = Served(small.packed_files, failing=("t10k-images-idx3-ubyte.gz",))
    found = locate(small, folder, downloader=downloader, unpack_package=package)
    assert found.source.startswith("Debian's package")


def test_unavailable_says_what_each_source_answered_and_what_to_do(small, folder):
    archives.put({"train-labels-idx1-ubyte": small.data_files["train-labels-idx1-ubyte"]}, folder)
    with pytest.raises(DataUnavailable) as error:
        locate(small, folder)
    message = str(error.value)
    assert message.startswith("Fashion-MNIST could not be had: ")
    assert f"{folder} lacks train-images-idx3-ubyte, t10k-images-idx3-ubyte" in message
    assert "example.org: HTTP 404 Not Found" in message
    assert "Debian's package dataset-small: this machine has no apt-get" in message
    assert "put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images" in message
    assert "POF_DATA_PATH" in message
    assert "\n" not in message


def test_package_with_other_files(small, folder):
    with pytest.raises(DataUnavailable, match="has other files in it than expected"):
        locate(small, folder, unpack_package=lambda package, scratch: scratch)


def test_nothing_is_fetched_when_that_is_switched_off(small, folder):
    downloader = Served(small.packed_files)
    with pytest.raises(DataUnavailable, match="fetching it is switched off"):
        locate(small, folder, downloader=downloader, download=False)
    assert downloader.asked == []
    assert not folder.exists()


def test_broken_file_is_told_not_passed_over(small, folder, tmp_path):
    extra = tmp_path / "extra"
    small.put_unpacked(extra)
    small.put_unpacked(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataCorrupt, match=r"expected 17 bytes .*, found 0 bytes"):
        locate(small, folder, elsewhere=(extra,))


def test_each_place_has_its_own_cure(small, folder, tmp_path):
    place = small.official.debian.folder
    small.put_packed(place)
    (place / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    with pytest.raises(DataCorrupt, match="reinstall Debian's package dataset-small"):
        locate(small, folder)
    extra = tmp_path / "extra"
    small.put_unpacked(extra)
    (extra / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataCorrupt, match=f"take {extra} out of POF_DATA_PATH"):
        locate(small, folder, elsewhere=(extra,))


def test_data_folder_that_is_a_file(small, folder):
    folder.write_text("")
    with pytest.raises(PofError, match="data cannot be written here"):
        locate(small, folder)


def test_full_disk(small, folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small.put_packed(folder)
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(PofError, match=r"No space left on device.*make room") as error:
        locate(small, folder)
    assert type(error.value) is PofError
    assert not (folder / "FashionMNIST/raw/train-images-idx3-ubyte").exists()
    assert not list(folder.rglob("*.tmp"))


def test_too_little_room_is_told_before_the_download(small, folder, monkeypatch):
    usage = storage.shutil.disk_usage(folder.parent)._replace(free=5_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    downloader = Served(small.packed_files)
    with pytest.raises(PofError, match="0 MB are free; make room there"):
        locate(small, folder, downloader=downloader)
    assert downloader.asked == []


def test_two_processes_at_once(folder, tmp_path):
    archives.fashion().put_packed(folder)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from tests.data_archives import fashion\n"
        "from pof.data.sources import Sources\n"
        "small = fashion()\n"
        "print(Sources(Path(sys.argv[1]), download=False).locate(small.info, small.official).root)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, program, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
        assert out.decode().strip() == str(folder / "FashionMNIST/raw")


def test_second_process_waits_and_says_so(folder, caplog):
    caplog.set_level("INFO")
    inside, leave = threading.Event(), threading.Event()

    def first():
        with storage.exclusive(folder, "set"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    with storage.exclusive(folder, "set"):
        assert leave.is_set()
    thread.join()
    assert "waiting for another process" in caplog.text


def test_file_system_without_locks(folder, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with storage.exclusive(folder, "set"):
        pass


def test_search_path(tmp_path):
    assert search_path({}) == ()
    assert search_path({"POF_DATA_PATH": ""}) == ()
    assert search_path({"POF_DATA_PATH": "/a::b"}) == (Path("/a"), Path("b"))


def test_load_reads_the_search_path(tmp_path, monkeypatch):
    broken = tmp_path / "extra" / "cifar-10-python.tar.gz"
    broken.parent.mkdir()
    broken.write_bytes(b"broken")
    monkeypatch.setenv("POF_DATA_PATH", str(broken.parent))
    with pytest.raises(DataCorrupt, match=r"expected 170498071 bytes .*, found 6 bytes"):
        load("cifar10", tmp_path / "data", download=False)
