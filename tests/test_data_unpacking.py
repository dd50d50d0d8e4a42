import io
import tarfile

import pytest

from pof.data.official import DataFile, Packed
from pof.data.unpacking import tar_files, unpack
from pof.errors import DataCorrupt
from tests.data_archives import md5, sha256, tar_gz

CURE = "fetch it again"


def member(name, **settings):
    info = tarfile.TarInfo(name)
    for key, value in settings.items():
        setattr(info, key, value)
    return info


def archive_of(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return path


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside", size=3),
        member("set/../../outside", size=3),
        member("/tmp/outside", size=3),
        member("..\\outside", size=3),
        member("set/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("set/link", type=tarfile.LNKTYPE, linkname="set/file"),
        member("set/device", type=tarfile.CHRTYPE),
        member("set/pipe", type=tarfile.FIFOTYPE),
    ],
)
def test_unsafe_archive_is_refused(evil, tmp_path):
    archive = archive_of(tmp_path / "set.tar.gz", member("set/file", size=3), evil)
    content = archive.read_bytes()
    wanted = [DataFile(evil.name, md5(bytes(3))), DataFile("set/file", md5(bytes(3)))]
    packed = Packed(archive.name, md5(content), len(content), (), ())
    with pytest.raises(DataCorrupt, match=r"set\.tar\.gz: expected plain files") as error:
        unpack(archive, packed, wanted, tmp_path / "deep" / "data", CURE)
    assert CURE in str(error.value)
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "deep" / "outside").exists()


def test_only_wanted_files_are_written(tmp_path):
    archive = tmp_path / "set.tar.gz"
    archive.write_bytes(tar_gz({"set/wanted": b"1", "set/other": b"2"}))
    packed = Packed(archive.name, md5(archive.read_bytes()), archive.stat().st_size, (), ())
    unpack(archive, packed, [DataFile("set/wanted", md5(b"1"))], tmp_path / "data", CURE)
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert written == [tmp_path / "data" / "set" / "wanted"]


def test_file_missing_in_the_archive(tmp_path):
    archive = tmp_path / "set.tar.gz"
    archive.write_bytes(tar_gz({"set/other": b"2"}))
    packed = Packed(archive.name, md5(archive.read_bytes()), archive.stat().st_size, (), ())
    with pytest.raises(DataCorrupt, match="expected set/wanted inside, found no such file"):
        unpack(archive, packed, [DataFile("set/wanted", md5(b"1"))], tmp_path / "data", CURE)


def test_wrong_file_in_the_archive_leaves_nothing_behind(tmp_path):
    archive = tmp_path / "set.tar.gz"
    archive.write_bytes(tar_gz({"set/wanted": b"2"}))
    packed = Packed(archive.name, md5(archive.read_bytes()), archive.stat().st_size, (), ())
    expected = sha256(b"1")
    with pytest.raises(DataCorrupt, match=f"set/wanted in it: expected {expected}, found sha256:"):
        unpack(archive, packed, [DataFile("set/wanted", expected)], tmp_path / "data", CURE)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("cut", [1, 10, 0.5])
@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_archive_cut_short(compression, cut, tmp_path):
    path = tmp_path / f"set.tar.{compression}"
    with tarfile.open(path, f"w:{compression}") as tar:
        for number in range(50):
            content = (str(number) * 700).encode()
            tar.addfile(member(f"set/{number}", size=len(content)), io.BytesIO(content))
    assert len(dict(tar_files(path, lambda name: True, CURE))) == 50
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: -cut if cut >= 1 else int(size * cut)])
    with pytest.raises(DataCorrupt, match="a whole tar archive"):
        dict(tar_files(path, lambda name: True, CURE))
