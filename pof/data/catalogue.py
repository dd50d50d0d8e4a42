"""What the data sets are: sizes, counts and the constants that images are normalised with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """One data set, whatever files it comes in.

    Attributes:
        name: As in profiles and result files.
        title: As in tables.
        num_classes: Labels are 0 … num_classes − 1.
        image_size: Height and width in pixels.
        channels: 1 or 3.
        mean: What images are normalised with, one a channel, pixels in [0, 1]; the constants
            in common use, for the digits measured on the training images.
        std: Likewise. CIFAR-10's and SVHN's are the means of the images' own deviations, not
            the deviation over all pixels: the ones that published results were made with.
        train_count: Images to train on.
        test_count: Images to test on.
        note: What a reader of a table has to know about it; may be empty.
    """

    name: str
    title: str
    num_classes: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_count: int
    test_count: int
    note: str = ""


_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_STD = (0.2023, 0.1994, 0.2010)

DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="cifar10",
            title="CIFAR-10",
            num_classes=10,
            image_size=32,
            channels=3,
            mean=_CIFAR10_MEAN,
            std=_CIFAR10_STD,
            train_count=50_000,
            test_count=10_000,
        ),
        DatasetInfo(
            name="cifar100",
            title="CIFAR-100",
            num_classes=100,
            image_size=32,
            channels=3,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            train_count=50_000,
            test_count=10_000,
        ),
        DatasetInfo(
            name="svhn",
            title="SVHN",
            num_classes=10,
            image_size=32,
            channels=3,
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            train_count=73_257 + 531_131,
            test_count=26_032,
            note="trained on train and extra together",
        ),
        DatasetInfo(
            name="fashion_mnist",
            title="Fashion-MNIST",
            num_classes=10,
            image_size=28,
            channels=1,
            mean=(0.2859,),
            std=(0.3530,),
            train_count=60_000,
            test_count=10_000,
        ),
        DatasetInfo(
            name="digits",
            title="Digits 8×8",
            num_classes=10,
            image_size=8,
            channels=1,
            mean=(0.3052,),
            std=(0.3760,),
            train_count=1_442,
            test_count=355,
            note="scikit-learn's bundled digits; of each class every fifth image is a test image",
        ),
        DatasetInfo(
            name="cifar10_jpeg",
            title="CIFAR-10 (JPEG copy)",
            num_classes=10,
            image_size=32,
            channels=3,
            mean=_CIFAR10_MEAN,
            std=_CIFAR10_STD,
            train_count=50_000,
            test_count=10_000,
            note="a lossy copy: its numbers are not CIFAR-10's",
        ),
    )
}
