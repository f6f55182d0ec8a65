"""How figures and tables look: colours, number formats, direct labels. No global matplotlib state is changed."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
PAGE_WIDTH, PANEL_WIDTH = 11.0, 4.7  # inches
INK = "#22262e"
MUTED = "#6b7280"

# Okabe and Ito's palette: told apart with every common form of colour blindness.
_KIND_COLOURS: dict[str, tuple[str, ...]] = {
    "knowledge": ("#0072b2", "#56b4e9", "#003f66"),
    "reasoning": ("#d55e00", "#e69f00", "#7a3600"),
    "question_answer": ("#009e73", "#66c2a5", "#00563f"),
    "text": ("#aa4499", "#cc79a7", "#5c1f52"),
}
_OTHER_COLOURS = ("#4d4d4d", "#999999", "#332288")
SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#4d4d4d", "#332288")
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")

_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 10.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#9aa1ab",
    "ytick.color": "#9aa1ab",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.wspace": 0.03,
    "figure.constrained_layout.hspace": 0.04,
    "savefig.facecolor": "white",
    "svg.hashsalt": "jaxmoe",
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """matplotlib's settings of the report, for the `with` block only."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(panels: int, columns: int, *, panel_height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in rows of at most `columns`, as wide as the page if there are several; in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(columns, panels))
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(PAGE_WIDTH if columns > 1 else PANEL_WIDTH, panel_height * rows))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def image_bytes(figure: Figure, kind: str = "png") -> bytes:
    """The figure as the bytes of a PNG (150 dots per inch) or SVG file, the same for the same figure."""
    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with figure_style():  # settings of SVG files are read when they are written
        layout = figure.get_layout_engine()
        if layout is not None:  # once for all formats; savefig would draw everything twice to do the same
            layout.execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def pixels(figure: Figure) -> tuple[int, int]:
    """Width and height of the figure's PNG."""
    width, height = figure.get_size_inches()
    return round(width * DPI), round(height * DPI)


def file_stem(name: str) -> str:
    """A name as part of a file's and an anchor's: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "slice"


# ------------------------------------------------------------------------------------------------ numbers


def count(value: float | None) -> str:
    """A count as a reader says it: 119k, 1.7M, 320M, 26B."""
    if missing(value):
        return "–"
    for limit, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e3, 1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / divisor
            return f"{scaled:.1f}{unit}" if scaled < 9.95 and unit != "k" else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def short(value: Any) -> str:
    """A number with three significant digits and no exponent where it can be avoided: 20.6, 0.217, 6e-05."""
    if missing(value):
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == 0:
        return "0"
    if abs(value) >= 100_000:
        return count(value)
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) >= 0.001:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.2g}"


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals, `–` where there is none."""
    return "–" if missing(value) else f"{value:.{digits}f}".replace("-", "\u2212")


def missing(value: Any) -> bool:
    """None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def words(name: str) -> str:
    """`experts_per_token` as a reader says it: `experts per token`."""
    return str(name).rsplit(".", 1)[-1].replace("_", " ")


# ------------------------------------------------------------------------------------------------ colours


def source_colours(kinds: Mapping[str, str]) -> dict[str, str]:
    """A colour for every source, the same in every figure; by kind, darker or lighter for a second of a kind."""
    used: dict[str, int] = {}
    colours = {}
    for source, kind in kinds.items():
        palette = _KIND_COLOURS.get(kind, _OTHER_COLOURS)
        colours[source] = palette[used.get(kind, 0) % len(palette)]
        used[kind] = used.get(kind, 0) + 1
    return colours


def sequential_colours(values: Sequence[float]) -> list[str]:
    """Dark violet to light green (viridis without its yellow, which is too light on white) over `values`."""
    import matplotlib
    from matplotlib.colors import to_hex

    colormap = matplotlib.colormaps["viridis"]
    low, width = min(values), (max(values) - min(values)) or 1.0
    return [to_hex(colormap(0.02 + 0.80 * (value - low) / width)) for value in values]
