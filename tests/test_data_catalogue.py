import pytest

from pof import _torchvision
from pof.data import DATASETS
from pof.data.official import OFFICIAL


@pytest.fixture
def torchvision_datasets():
    _torchvision.make_importable()
    import torchvision.datasets

    return torchvision.datasets


def checksums(files):
    return {file.path.split("/")[-1]: file.checksum.removeprefix("md5:") for file in files}


def test_every_data_set_is_described():
    assert list(DATASETS) == [
        "cifar10",
        "cifar100",
        "svhn",
        "fashion_mnist",
        "digits",
        "cifar10_jpeg",
    ]
    for name, info in DATASETS.items():
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.channels
    assert DATASETS["svhn"].train_count == 604_388
    assert len({info.title for info in DATASETS.values()}) == len(DATASETS)


@pytest.mark.parametrize(("name", "reader"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_checksums_are_torchvisions(name, reader, torchvision_datasets):
    theirs = getattr(torchvision_datasets, reader)
    ours = OFFICIAL[name]
    (archive,) = ours.packed
    assert checksums(ours.files) == {
        **dict(theirs.train_list),
        **dict(theirs.test_list),
        theirs.meta["filename"]: theirs.meta["md5"],
    }
    assert {file.path.split("/")[0] for file in ours.files} == {theirs.base_folder}
    assert (archive.name, archive.checksum) == (theirs.filename, f"md5:{theirs.tgz_md5}")
    assert archive.urls[0] == theirs.url
    assert set(archive.holds) == {file.path for file in ours.files}


def test_svhn_checksums_are_torchvisions(torchvision_datasets):
    theirs = torchvision_datasets.SVHN.split_list
    ours = OFFICIAL["svhn"]
    assert checksums(ours.files) == {name: md5 for _, name, md5 in theirs.values()}
    assert {packed.urls[0] for packed in ours.packed} == {url for url, _, _ in theirs.values()}


def test_fashion_mnist_checksums_are_torchvisions(torchvision_datasets):
    theirs = torchvision_datasets.FashionMNIST
    ours = OFFICIAL["fashion_mnist"]
    assert {p.name: p.checksum for p in ours.packed} == {
        name: f"md5:{md5}" for name, md5 in theirs.resources
    }
    assert ours.packed[0].urls[0] == theirs.mirrors[0] + ours.packed[0].name
    assert all(file.checksum.startswith("sha256:") for file in ours.files)
