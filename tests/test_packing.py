"""What travels to a machine on loan and back: data read there without a network, and results."""

import tarfile
from dataclasses import replace

import pytest

from benchmarks import packing
from benchmarks.errors import UserError
from pof.data import DATASETS, load, loading
from pof.data import packing as data_packing
from pof.errors import DataUnavailable
from tests import data_archives as archives
from tests.harness import files_of, profile_file
from tests.test_data_jpeg import files as jpeg_files  # noqa: F401
from tests.test_data_jpeg import put_archive

BOTH = {"datasets": ["fashion_mnist", "cifar10_jpeg", "digits"], "data": None}


@pytest.fixture
def _small(monkeypatch):
    """Small copies of both data sets; whoever asks for a download has failed."""
    made = archives.fashion()
    jpeg = replace(DATASETS["cifar10_jpeg"], train_count=20, test_count=10)
    infos = DATASETS | {"fashion_mnist": made.info, "cifar10_jpeg": jpeg}
    for module in (loading, data_packing):
        monkeypatch.setattr(module, "DATASETS", infos)
        monkeypatch.setattr(module, "OFFICIAL", {"fashion_mnist": made.official})
    monkeypatch.setattr(
        "pof.data.download.Downloader.fetch", lambda *_: pytest.fail("it downloads")
    )
    monkeypatch.delenv("POF_DATA_PATH", raising=False)


@pytest.fixture
def home(tmp_path, jpeg_files, _small):  # noqa: F811
    """A data folder with both: idx files unpacked, JPEG files in their archive."""
    folder = tmp_path / "data"
    archives.fashion().put_unpacked(folder / "FashionMNIST" / "raw")
    put_archive(jpeg_files, folder)
    return folder


def pack(tmp_path, home, *, megabytes=1.0, changes=BOTH):
    profile, said = str(profile_file(tmp_path, changes)), []
    packing.pack_data([profile], home, tmp_path / "out", megabytes=megabytes, tell=said.append)
    return tmp_path / "out", said


def test_what_is_packed_is_read_from_there_alone(tmp_path, home):
    out, said = pack(tmp_path, home)
    names = {"train-images", "train-labels", "t10k-images", "t10k-labels"}
    packed = files_of(out)
    kinds = {name: "idx3" if name.endswith("images") else "idx1" for name in names}
    assert packed.keys() == {"cifar10-jpeg.tar.xz"} | {
        f"FashionMNIST/raw/{name}-{kinds[name]}-ubyte.gz" for name in names
    }
    assert [line.split(":")[0] for line in said] == BOTH["datasets"]
    for name in BOTH["datasets"]:
        there = load(name, out, download=False, elsewhere=[])
        assert there.fingerprint == load(name, home, download=False).fingerprint
    (tmp_path / "again").mkdir()
    again, _ = pack(tmp_path / "again", home)
    assert files_of(again) == packed  # the same bytes


@pytest.mark.usefixtures("_small")
def test_a_folder_of_jpeg_files_is_packed_as_an_archive(tmp_path, jpeg_files):  # noqa: F811
    home = tmp_path / "data"
    archives.put(jpeg_files, home / "cifar10_jpeg")
    out, _ = pack(tmp_path, home, changes={"datasets": ["cifar10_jpeg"], "data": None})
    assert list(files_of(out)) == ["cifar10-jpeg.tar.xz"]


def test_images_decoded_before_are_packed_where_the_files_are_gone(tmp_path, home):
    changes = {"datasets": ["cifar10_jpeg"], "data": None}
    load("cifar10_jpeg", home, download=False)
    (home / "cifar10-jpeg.tar.xz").unlink()
    with pytest.raises(UserError, match=r"cifar10_jpeg: 0\.1 MB do not fit.*cifar10-jpeg\.tar\.xz"):
        pack(tmp_path, home, megabytes=0.05, changes=changes)
    assert files_of(tmp_path / "out") == {}
    out, _ = pack(tmp_path, home, changes=changes)
    assert list(files_of(out)) == ["cifar10_jpeg.npz"]


def test_what_cannot_be_packed_is_one_line(tmp_path, home):
    changes = {"datasets": ["fashion_mnist"], "data": None}
    with pytest.raises(UserError, match=r"fashion_mnist: 0\.0 MB do not fit, 0\.0 of 0\.001 MB"):
        pack(tmp_path, home, megabytes=0.001, changes=changes)
    profile = str(profile_file(tmp_path, changes))
    with pytest.raises(UserError, match="the data is there already"):
        packing.pack_data([profile], home, home, megabytes=1.0, tell=print)
    (home / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"else")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: expected"):
        pack(tmp_path, home, changes=changes)
    (home / "cifar10-jpeg.tar.xz").unlink()
    with pytest.raises(UserError, match=r"CIFAR-10 \(JPEG copy\): no copy of it in"):
        pack(tmp_path, home, changes={"datasets": ["cifar10_jpeg"], "data": None})


def test_data_of_another_origin_in_the_folder_is_noticed(tmp_path, home, jpeg_files):  # noqa: F811
    other = dict(jpeg_files)
    swapped = sorted(other)[:2]
    other[swapped[0]], other[swapped[1]] = other[swapped[1]], other[swapped[0]]
    archives.put(other, tmp_path / "out" / "cifar10_jpeg")  # looked for before the archive
    with pytest.raises(UserError, match=r"is .* left over from other data"):
        pack(tmp_path, home, changes={"datasets": ["cifar10_jpeg"], "data": None})


def test_without_the_packed_files_the_data_is_not_to_be_had(tmp_path, home):
    out, _ = pack(tmp_path, home)
    (out / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataUnavailable, match="fetching it is switched off"):
        load("fashion_mnist", out, download=False, elsewhere=[])


def results(folder):
    for name, size in {
        "speed/a.csv": 10,
        "tiny/errors.csv": 20,
        "tiny/runs/one/result.json": 30,
        "tiny/plots/curves.svg": 300_000,
        "tiny/report.html": 300_000,
        "other/errors.csv": 50,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(i * i * 7 % 251 for i in range(size)))


def names(archive):
    with tarfile.open(archive) as tar:
        return set(tar.getnames())


def test_results_are_packed_and_plots_stay_behind_where_they_do_not_fit(tmp_path):
    results(tmp_path)
    records = {"speed/a.csv", "tiny/errors.csv", "tiny/runs/one/result.json"}
    pictures = {"tiny/plots/curves.svg", "tiny/report.html"}
    archive = tmp_path / "results.tar.gz"
    profiles = ["tiny", "not-run-yet"]
    assert packing.pack_results(profiles, tmp_path, archive, megabytes=1.0) == []
    assert names(archive) == records | pictures
    whole = archive.stat().st_size
    left = packing.pack_results(profiles, tmp_path, archive, megabytes=whole / 1e6 - 1e-6)
    assert set(left) == pictures
    assert names(archive) == records
    with pytest.raises(UserError, match="the records alone take"):
        packing.pack_results(profiles, tmp_path, archive, megabytes=1e-6)
    assert names(archive) == records  # what was packed before stays


@pytest.mark.usefixtures("home")
def test_the_command_says_what_it_packed_and_how_to_use_it(tmp_path):
    from typer.testing import CliRunner

    from benchmarks.cli import app

    profile = str(profile_file(tmp_path, {"datasets": ["fashion_mnist", "digits"], "data": None}))
    out = tmp_path / "out"
    options = ["--out", str(out), "--data-dir", str(tmp_path / "data")]
    done = CliRunner().invoke(app, ["pack-data", profile, *options])
    assert done.exit_code == 0, done.output
    assert "fashion_mnist: 0.0 MB, FashionMNIST/raw/train-images-idx3-ubyte.gz" in done.output
    assert "digits: 0.0 MB, comes with a package" in done.output
    assert f"--data-dir {out}" in done.output
