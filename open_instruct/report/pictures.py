"""Pictures as files: the one place where matplotlib is set up and writes. A picture that fails is never an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.text import Text

from open_instruct.errors import BUGS, one_line, warn
from open_instruct.files import replacing_by_name

# Names of folders, adapters and values are no formulas, whatever dollar signs they hold.
matplotlib.rcParams["text.parse_math"] = False
LONGEST_TEXT = 100  # characters: the layout of more takes minutes


def literal(text: str) -> str:
    """Return a text that can be drawn: on one line, cut where it is very long, without halves of surrogate pairs."""
    text = " ".join(text[: 2 * LONGEST_TEXT].encode(errors="replace").decode().split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def write_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG that is there completely or not at all, and close it."""
    try:
        for text in figure.findobj(Text):
            text.set_text(literal(text.get_text()))
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if isinstance(axis.get_major_formatter(), ticker.LogFormatterMathtext):  # it writes formulas
                    axis.set_major_formatter(ticker.LogFormatter())
                    axis.set_minor_formatter(ticker.LogFormatter())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it is drawn as a box
            figure.tight_layout()
            with replacing_by_name(path) as working:
                figure.savefig(working, dpi=dpi)
    finally:
        plt.close(figure)


@contextmanager
def if_possible(path: Path) -> Iterator[None]:
    """Draw a picture in the block. Where that fails, whatever the reason, a warning is all: the numbers are saved."""
    try:
        yield
    except BUGS:
        raise
    except Exception as error:
        plt.close("all")
        warn(f"picture {path} could not be drawn ({one_line(error)}); nothing else is missing")
