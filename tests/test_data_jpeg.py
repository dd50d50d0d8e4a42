import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pof.data import DATASETS, load
from pof.data.jpeg import CACHE_NAME, CLASSES, load_jpeg_copy
from pof.errors import DataCorrupt, DataUnavailable
from tests.data_archives import put

INFO = replace(DATASETS["cifar10_jpeg"], train_count=20, test_count=10)


def jpeg(seed, size=32, mode="RGB"):
    rng = np.random.default_rng(seed)
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files():
    """Two training images and one test image of each class."""
    made = {}
    for label, name in enumerate(CLASSES):
        made[f"train/{name}/0000.jpg"] = jpeg(3 * label)
        made[f"train/{name}/0001.jpg"] = jpeg(3 * label + 1)
        made[f"test/{name}/0000.jpg"] = jpeg(3 * label + 2)
    return made


def put_archive(files, folder, *, prefix="cifar10-jpeg/"):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar10-jpeg.tar.xz", "w:xz", preset=0) as tar:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read(folder, *elsewhere):
    return load_jpeg_copy(INFO, folder, elsewhere)


def test_folder_and_archive_are_the_same_copy(files, tmp_path):
    put(files, tmp_path / "1" / "cifar10_jpeg")
    put_archive(files, tmp_path / "2")
    put_archive(files, tmp_path / "3", prefix="CIFAR-10-images-master/")
    first, second, third = (read(tmp_path / name) for name in "123")
    assert first.content == second.content == third.content
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, third.test.images)
    assert first.train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert first.test.labels.tolist() == list(range(10))
    assert first.train.images.shape == (20, 32, 32, 3)
    expected = Image.open(io.BytesIO(files["test/bird/0000.jpg"]))
    assert np.array_equal(first.test.images[2].numpy(), np.asarray(expected))
    assert first.source == str(tmp_path / "1" / "cifar10_jpeg")


def test_decoded_once(files, tmp_path):
    put_archive(files, tmp_path)
    first = read(tmp_path)
    again = read(tmp_path)
    assert "decoded before" in again.source
    assert torch.equal(first.train.images, again.train.images)
    assert first.content == again.content
    (tmp_path / "cifar10-jpeg.tar.xz").unlink()
    assert torch.equal(read(tmp_path).test.labels, first.test.labels)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_cache_is_rebuilt(files, tmp_path, damage):
    put_archive(files, tmp_path)
    first = read(tmp_path)
    cache = tmp_path / CACHE_NAME
    content = bytearray(cache.read_bytes())
    if damage == "flip":
        content[2000] ^= 1  # within the pixels; zip's own checksum or ours notices
    damaged = {"truncate": content[:-500], "flip": content, "empty": b"", "text": b"text"}[damage]
    cache.write_bytes(damaged)
    again = read(tmp_path)
    assert "decoded before" not in again.source
    assert torch.equal(first.train.images, again.train.images)
    assert "decoded before" in read(tmp_path).source


def test_changed_source_is_decoded_anew(files, tmp_path):
    put(files, tmp_path / "cifar10_jpeg")
    first = read(tmp_path)
    put({"test/ship/0000.jpg": jpeg(99)}, tmp_path / "cifar10_jpeg")
    again = read(tmp_path)
    assert not torch.equal(first.test.images, again.test.images)
    assert first.content != again.content


def test_further_folder_is_only_read(files, tmp_path):
    put_archive(files, tmp_path / "extra")
    read(tmp_path / "data", tmp_path / "extra")
    assert [path.name for path in (tmp_path / "extra").iterdir()] == ["cifar10-jpeg.tar.xz"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [CACHE_NAME]


def test_data_folder_that_cannot_be_written_costs_only_time(files, tmp_path, caplog):
    put_archive(files, tmp_path / "extra")
    (tmp_path / "data").write_text("a file, no folder")
    assert len(read(tmp_path / "data", tmp_path / "extra").train) == 20
    assert "could not be written" in caplog.text


def test_missing_image(files, tmp_path):
    fewer = dict(list(files.items())[1:])
    put(fewer, tmp_path / "cifar10_jpeg")
    with pytest.raises(DataCorrupt, match=r"cifar10_jpeg/train: expected 20 images, found 19"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JPEG file, found an unreadable file of 0 bytes"),
        (b"no image", "expected a JPEG file, found an unreadable file of 8 bytes"),
        (jpeg(1)[:400], "expected a JPEG file, found an unreadable file of 400 bytes"),
        (jpeg(1, size=16), "expected 32 × 32 pixels, found 16 × 16 pixels"),
    ],
)
@pytest.mark.parametrize("place", [put, put_archive])
def test_image_that_cannot_be_read_is_named(files, tmp_path, content, message, place):
    broken = {**files, "train/frog/0001.jpg": content}
    place(broken, tmp_path / "cifar10_jpeg" if place is put else tmp_path)
    with pytest.raises(DataCorrupt, match=rf"train/frog/0001\.jpg: {message}"):
        read(tmp_path)
    assert not (tmp_path / CACHE_NAME).exists()


def test_unknown_class(files, tmp_path):
    put({**files, "train/zebra/0000.jpg": jpeg(5)}, tmp_path / "cifar10_jpeg")
    with pytest.raises(DataCorrupt, match=r"expected the classes airplane.*found train/zebra/0000"):
        read(tmp_path)


def test_truncated_archive(files, tmp_path):
    put_archive(files, tmp_path)
    archive = tmp_path / "cifar10-jpeg.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(DataCorrupt, match=r"cifar10-jpeg\.tar\.xz: expected a whole tar archive"):
        read(tmp_path)


def test_unavailable(tmp_path, monkeypatch):
    monkeypatch.delenv("POF_DATA_PATH", raising=False)
    with pytest.raises(DataUnavailable, match=r"cifar10_jpeg/ or cifar10-jpeg\.tar\.xz; put"):
        load("cifar10_jpeg", tmp_path)
