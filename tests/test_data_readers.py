"""Each reader on small archives in the official format, good ones and broken ones."""

import gzip
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from pof.data import DATASETS, load
from pof.data.loading import load_official
from pof.data.official import DIGITS_FINGERPRINT, OfficialFiles
from pof.data.readers import read_cifar, read_idx, read_svhn
from pof.data.sources import Sources
from pof.errors import DataCorrupt, PofError
from tests import data_archives as archives

READERS = {
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "svhn": read_svhn,
    "fashion_mnist": read_idx,
}
SMALL = {
    "cifar10": archives.cifar("cifar10"),
    "cifar100": archives.cifar("cifar100"),
    "svhn": archives.svhn(),
    "fashion_mnist": archives.fashion(),
}
every_format = pytest.mark.parametrize("name", SMALL)


def read(small, folder, **settings):
    sources = Sources(folder, download=False, **settings)
    return load_official(small.info, small.official, sources, READERS[small.info.name])


def with_files(small, files):
    """The same data set, were these its official data files."""
    official = OfficialFiles(
        tuple(
            replace(
                file,
                checksum=(archives.sha256 if "sha" in file.checksum else archives.md5)(
                    files[file.path]
                ),
                size=None,
            )
            for file in small.official.files
        ),
        (),
        small.official.layouts,
    )
    return replace(small, official=official, data_files=files)


@every_format
@pytest.mark.parametrize("put", ["put_packed", "put_unpacked"])
def test_reads_what_was_written(name, put, tmp_path):
    small = SMALL[name]
    getattr(small, put)(tmp_path)
    dataset = read(small, tmp_path)
    train = small.info.train_count
    assert torch.equal(dataset.train.images, torch.from_numpy(small.images[:train].copy()))
    assert torch.equal(dataset.test.images, torch.from_numpy(small.images[train:].copy()))
    assert dataset.train.labels.tolist() == small.labels[:train].tolist()
    assert dataset.test.labels.tolist() == small.labels[train:].tolist()
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.train.images.is_contiguous()
    assert dataset.official
    assert "the data folder" in dataset.source


@every_format
def test_fingerprint_is_the_same_wherever_it_was_found(name, tmp_path):
    small = SMALL[name]
    here, there = tmp_path / "here", tmp_path / "there"
    small.put_packed(here)
    small.put_unpacked(there)
    first = read(small, here)
    second = read(small, tmp_path / "empty", elsewhere=(there,))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint.startswith("sha256:")
    assert len(first.fingerprint) == len("sha256:") + 64


def test_fingerprint_changes_with_the_content(tmp_path):
    first, second = archives.cifar(seed=0), archives.cifar(seed=1)
    first.put_packed(tmp_path / "1")
    second.put_packed(tmp_path / "2")
    assert read(first, tmp_path / "1").fingerprint != read(second, tmp_path / "2").fingerprint


@every_format
def test_truncated_data_file(name, tmp_path):
    small = SMALL[name]
    small.put_unpacked(tmp_path)
    file = small.official.files[0]
    path = tmp_path / file.path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataCorrupt) as error:
        read(small, tmp_path)
    message = str(error.value)
    assert str(path) in message
    assert file.checksum in message
    assert "delete it and run again" in message
    assert "\n" not in message


@every_format
def test_changed_byte_is_a_wrong_checksum(name, tmp_path):
    small = SMALL[name]
    small.put_unpacked(tmp_path)
    path = tmp_path / small.official.files[-1].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = archives.sha256 if name == "fashion_mnist" else archives.md5
    with pytest.raises(DataCorrupt, match=found(bytes(content))):
        read(small, tmp_path)


@every_format
def test_truncated_archive(name, tmp_path):
    small = SMALL[name]
    small.put_packed(tmp_path)
    path = tmp_path / next(iter(small.packed_files))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataCorrupt) as error:
        read(small, tmp_path)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)
    assert "found" in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


def test_gzip_that_holds_something_else(tmp_path):
    small = SMALL["fashion_mnist"]
    small.put_packed(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataCorrupt, match=r"train-labels-idx1-ubyte\.gz, .* in it: expected"):
        read(small, tmp_path)
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(DataCorrupt, match="expected 17 bytes, found more"):
        read(small, tmp_path)


def test_not_a_gzip_file(tmp_path):
    small = SMALL["fashion_mnist"]
    small.put_packed(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataCorrupt, match=r"t10k-labels-idx1-ubyte\.gz: .*a whole gzip file"):
        read(small, tmp_path)


@every_format
def test_wrong_count(name, tmp_path):
    small = SMALL[name]
    small.put_unpacked(tmp_path)
    expecting = replace(small, info=replace(small.info, train_count=100))
    with pytest.raises(DataCorrupt, match="expected 100"):
        read(expecting, tmp_path)


def test_a_pickle_with_a_wrong_checksum_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    small = SMALL["cifar10"]
    small.put_unpacked(tmp_path)
    (tmp_path / small.official.files[0].path).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataCorrupt):
        read(small, tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"labels": []}), b"\x80\x05"])
def test_cifar_batch_that_cannot_be_read(content, tmp_path):
    small = SMALL["cifar10"]
    files = {**small.data_files, "cifar-10-batches-py/data_batch_2": content}
    small = with_files(small, files)
    small.put_unpacked(tmp_path)
    with pytest.raises(DataCorrupt, match="expected CIFAR-10's batches, found"):
        read(small, tmp_path)


def test_cifar_labels_and_images_of_different_number(tmp_path):
    small = SMALL["cifar100"]
    batch = {"data": np.zeros((20, 3072), np.uint8), "fine_labels": [0] * 19}
    small = with_files(
        small, {**small.data_files, "cifar-100-python/train": pickle.dumps(batch, protocol=2)}
    )
    small.put_unpacked(tmp_path)
    with pytest.raises(DataCorrupt, match="expected 20 labels, found 19"):
        read(small, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        archives.idx(np.zeros((9, 28, 28), np.uint8))[:-5],
        archives.idx(np.zeros((9, 28), np.uint8)),
        archives.idx(np.zeros((9, 14, 14), np.uint8)),
    ],
)
def test_idx_file_that_cannot_be_read(content, tmp_path):
    small = SMALL["fashion_mnist"]
    small = with_files(small, {**small.data_files, "train-images-idx3-ubyte": content})
    small.put_unpacked(tmp_path)
    with pytest.raises(DataCorrupt, match="train-images-idx3-ubyte: expected"):
        read(small, tmp_path)


def mat(**arrays):
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no matrix" * 100,
        mat(X=np.zeros((32, 32, 3, 7), np.uint8)),
        mat(X=np.zeros((16, 16, 3, 7), np.uint8), y=np.ones((7, 1), np.uint8)),
        mat(X=np.zeros((32, 32, 3, 7), np.uint8), y=np.ones((6, 1), np.uint8)),
    ],
)
def test_mat_file_that_cannot_be_read(content, tmp_path):
    small = SMALL["svhn"]
    small = with_files(small, {**small.data_files, "extra_32x32.mat": content})
    small.put_unpacked(tmp_path)
    with pytest.raises(DataCorrupt, match=r"extra_32x32\.mat: expected"):
        read(small, tmp_path)


@pytest.mark.parametrize("make", [archives.svhn, archives.fashion])
def test_label_that_is_no_class(make, tmp_path):
    small = make(labels=np.array([1] * 8 + [11] + [2] * 6)[: 15 if make is archives.svhn else 13])
    small.put_unpacked(tmp_path)
    with pytest.raises(DataCorrupt, match=r"expected labels 0 … 9, found labels 1 … 11"):
        read(small, tmp_path)


def test_digits(tmp_path):
    digits = load("digits", tmp_path / "never written")
    info = DATASETS["digits"]
    pixels = digits.train.images.double() / 255
    assert digits.fingerprint == DIGITS_FINGERPRINT
    assert digits.official
    assert len(digits.train) == info.train_count
    assert len(digits.test) == info.test_count
    assert pixels.mean().item() == pytest.approx(info.mean[0], abs=5e-5)
    assert pixels.std(correction=0).item() == pytest.approx(info.std[0], abs=5e-5)
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    counts = digits.test.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 36
    assert not (tmp_path / "never written").exists()


def test_unknown_name(tmp_path):
    with pytest.raises(PofError, match="no data set 'mnist'; there are cifar10, cifar100, svhn"):
        load("mnist", tmp_path)
