"""The named settings of the methods: every detail that the sources leave open, with its default.

Free of PyTorch, so that a harness can read and check settings without loading it. Each class
checks itself and raises ``ValueError`` with one line that says what is allowed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

# Read by pydantic where these classes are validated from a file: no unknown keys, no coercion.
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Stochastic gradient descent with momentum: the base of every method.

    Attributes:
        learning_rate: The rate at epoch 0; the schedule scales it.
        momentum: Heavy-ball coefficient.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 coefficient λ; adds λw to every gradient.
        label_smoothing: Share of the target spread evenly over the classes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate must be above 0")
        _require(0 <= self.momentum < 1, "momentum must be in [0, 1)")
        _require(not self.nesterov or self.momentum > 0, "nesterov needs a momentum above 0")
        _require(self.weight_decay >= 0, "weight_decay must not be negative")
        _require(0 <= self.label_smoothing < 1, "label_smoothing must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over the epochs.

    Attributes:
        kind: ``step`` multiplies by ``factor`` at each milestone; ``cosine`` falls to 0 over
            ``total_epochs``; ``constant`` stays.
        milestones: Epochs, ascending, at which ``step`` lowers the rate.
        factor: What ``step`` multiplies by.
        total_epochs: Where ``cosine`` reaches 0.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    kind: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (60, 120, 160, 200)
    factor: float = 0.2
    total_epochs: int = 250

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        _require(ascending, "milestones must ascend")
        _require(0 < self.factor <= 1, "factor must be in (0, 1]")
        _require(self.total_epochs > 0, "total_epochs must be above 0")


@dataclass(frozen=True, kw_only=True)
class SAMSettings:
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021) and its open details.

    Attributes:
        rho: Radius ρ of the perturbation.
        adaptive: ASAM (Kwon et al., ICML 2021): the radius is measured relative to |w|.
        eta: ASAM's constant added to |w|; unused otherwise.
        m_sharpness: Images that share one ascent step (the paper's m); ``None``: the whole batch.
            BatchNorm then normalises within each such part, as it does within one replica.
        batchnorm: Whose batch enters the running statistics: the ``first`` pass's (at w), the
            ``second`` pass's (at w + e), or ``both``.
        perturb_weight_decay: Whether λw is part of the gradient that sets the perturbation.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01
    m_sharpness: int | None = None
    batchnorm: Literal["first", "second", "both"] = "first"
    perturb_weight_decay: bool = False

    def __post_init__(self) -> None:
        _require(self.rho >= 0, "rho must not be negative")
        _require(self.eta >= 0, "eta must not be negative")
        _require(
            self.m_sharpness is None or self.m_sharpness > 0, "m_sharpness must be above 0 images"
        )


@dataclass(frozen=True, kw_only=True)
class PoFSettings:
    """Post-training of the feature extractor (Sato et al., ICML 2022) and its open details.

    Attributes:
        direction: ``gradient``: ĝ of batch B, as published; ``centred``: the gradient less its
            running mean, normalised (a variant of this project, not of the paper).
        gamma: Expansion factor γ of the perturbation range (published: 2).
        gamma_sampling: ``fixed`` γ, or drawn per step, ``uniform`` on [0, γ].
        search: ``exact`` minimiser along the ray, or ``grid16``: doubling from one un-normalised
            gradient until the loss rises, then the best of 16 evenly spaced points.
        cap: The largest range ξ searched, in units of ``cap_unit``.
        cap_unit: ``gradient``: multiples of the un-normalised direction's norm, so the cap
            shrinks with ‖g‖; ``distance``: a distance in parameter space.
        capped: What becomes of a batch whose loss still falls at the cap: ``reject`` takes no
            perturbation for this step, ``use`` takes the cap.
        batchnorm: The forward of B: ``batch`` statistics with the running ones left alone,
            ``update`` (the running ones take B in too), or ``eval`` mode.
        momentum: φ's momentum at the start: ``carried`` over from pre-training, or ``fresh``.
        range_batch_size: Size of B; ``None``: that of B̃.
        mean_decay: Decay of the running mean of g_B, used for the cosine that is reported and
            for the centred direction.
        learning_rate: A constant rate during post-training; ``None``: the schedule continues.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    direction: Literal["gradient", "centred"] = "gradient"
    gamma: float = 2.0
    gamma_sampling: Literal["fixed", "uniform"] = "fixed"
    search: Literal["exact", "grid16"] = "exact"
    cap: float = 10_000.0
    cap_unit: Literal["gradient", "distance"] = "gradient"
    capped: Literal["reject", "use"] = "reject"
    batchnorm: Literal["batch", "update", "eval"] = "batch"
    momentum: Literal["carried", "fresh"] = "carried"
    range_batch_size: int | None = None
    mean_decay: float = 0.95
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        _require(self.gamma >= 0, "gamma must not be negative")
        _require(self.cap > 0, "cap must be above 0")
        _require(
            self.search == "exact" or self.cap_unit == "distance" or self.cap >= 1,
            "search 'grid16' starts at one gradient: cap must be at least 1",
        )
        _require(
            self.range_batch_size is None or self.range_batch_size > 0,
            "range_batch_size must be above 0 images",
        )
        _require(0 <= self.mean_decay < 1, "mean_decay must be in [0, 1)")
        _require(
            self.learning_rate is None or self.learning_rate > 0, "learning_rate must be above 0"
        )


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """What is done to a training image.

    Attributes:
        kind: ``none``; ``basic``: zero-pad by 4, random crop, horizontal flip; ``cutout``: basic
            and one square set to zero after normalisation, its centre uniform over the image and
            the square clipped at the borders (DeVries & Taylor, 2017).
        flip: Whether basic and cutout flip (left-right order carries meaning in digits).
        padding: Zero padding in pixels.
        cutout_size: Side of the square in pixels.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    kind: Literal["none", "basic", "cutout"] = "basic"
    flip: bool = True
    padding: int = 4
    cutout_size: int = 16

    def __post_init__(self) -> None:
        _require(self.padding >= 0, "padding must not be negative")
        _require(self.cutout_size > 0, "cutout_size must be above 0")
