"""How every plot looks, and how it becomes the same bytes each time it is drawn.

No global state: a figure is made, drawn on and saved within one ``with`` block, under this
module's settings and no user's ``matplotlibrc``.

    with style.figure(7.2, 3.0) as fig:
        axes = fig.subplots(1, 2)
        axes[0].plot(x, y, **style.method_line("sam+pof"))
        style.save(fig, path)
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.files import sha256, write_bytes

# Okabe & Ito's palette: told apart under every common colour blindness.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#6B6B6B"

# Full width of a page, in inches: 10 pt stays legible where a code host scales it to a column.
WIDTH = 8.0
DPI = 110

_METHODS: dict[str, tuple[str, str, str]] = {  # colour, line, marker
    "sgd": (GREY, "-", "s"),
    "sam": (BLUE, "-", "o"),
    "sgd+pof": (PURPLE, "--", "D"),
    "sam+pof": (VERMILLION, "--", "^"),
    "sam+pof-centred": (GREEN, "-.", "v"),
    "sam+frozen": (BLACK, ":", "P"),
}
_OTHERS = ((ORANGE, "-.", "X"), (SKY, "--", "<"), (BLACK, "-.", ">"), (ORANGE, ":", "h"))

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs everywhere
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.fonttype": "path",  # letters as shapes: no viewer's font can move them
    "svg.hashsalt": "pof",
    "path.simplify": True,
    "path.simplify_threshold": 0.3,  # in pixels
}


@contextmanager
def figure(width: float = WIDTH, height: float = 3.2) -> Iterator[Figure]:
    """A figure in inches; draw on it and ``save`` it before the block ends."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made


def save(made: Figure, path: Path) -> None:
    """Write a figure, without date or software version; an unchanged file is not touched.

    Args:
        made: From ``figure``, within its block.
        path: ``.svg`` for lines and text (the choice unless there are thousands of shapes), or
            ``.png``.
    """
    buffer = io.BytesIO()
    if path.suffix == ".svg":
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        content = _compact(buffer.getvalue().decode()).encode()
    else:
        made.savefig(buffer, format="png", metadata={"Software": None})
        content = buffer.getvalue()
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content, durable=False)


def _compact(svg: str) -> str:
    """The same picture in fewer bytes: a hundredth of a point is less than anyone sees.

    Rounding also keeps the last bits of a processor's arithmetic out of the file.
    """

    def rounded(match: re.Match[str]) -> str:
        number = match[0]
        if number.startswith("scale"):
            return number
        return f"{float(number):.2f}".rstrip("0").rstrip(".")

    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"scale\([^)]*\)|-?\d+\.\d{3,}", rounded, svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip() + "\n"


def method_colour(method: str) -> str:
    """The one colour of a method in every plot."""
    return _look(method)[0]


def method_line(method: str) -> dict[str, Any]:
    """Colour and dashes of a method, so that neither is told by colour alone."""
    colour, line, _ = _look(method)
    return {"color": colour, "linestyle": line}


def method_marker(method: str) -> str:
    """The marker of a method."""
    return _look(method)[2]


def _look(method: str) -> tuple[str, str, str]:
    """A method's look; one that a profile made up itself has a look by its name."""
    if method in _METHODS:
        return _METHODS[method]
    return _OTHERS[int(sha256(method)[:8], 16) % len(_OTHERS)]
