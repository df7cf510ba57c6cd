"""Drawings of a report, as SVG that stands in the page.  The only module that imports matplotlib.

Text stays text, in the reader's own font, and colours are names of report/page.py, so that one drawing serves light
and dark screens.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from icefall_kd.report.page import text

# matplotlib draws in these, and the page's names replace them.
_NAMES = {"#010101": "fg", "#020202": "muted", "#030303": "line", "#040404": "c1", "#050505": "c2", "#060606": "c3"}
FG, MUTED, LINE, C1, C2, C3 = _NAMES
_RC = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": FG,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}

Points = list[tuple[int, float]]


@dataclass
class Curve:
    """A value over the steps of a training."""

    train: Points = field(default_factory=list)
    """(step, value in that step); NaN where it was not finite, here and below."""
    running: Points = field(default_factory=list)
    """(step, running mean)."""
    valid: Points = field(default_factory=list)
    """(step, value on the validation set)."""

    def last(self) -> tuple[float | None, float | None]:
        """Return the last running mean and the last validation value; None: there is none."""
        return tuple(points[-1][1] if points else None for points in (self.running or self.train, self.valid))


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    """Draw in our style; ``salt`` keeps names within a drawing apart from those of the others in a page."""
    with matplotlib.rc_context(_RC | {"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's font draws them
        yield


def _svg(figure: Figure, alt: str) -> str:
    """Return a figure as SVG with an alternative text."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", stream.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every drawing, and nothing refers to a group
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{text(alt)}" ', 1)


def draw_curve(name: str, curve: Curve, unit: str) -> str:
    """Draw one value over the steps: each logged step faintly, its running mean, and validation points.

    Args:
        name: of the value.
        curve: its points.
        unit: what its axis is called.
    """
    with _style(name):
        figure = Figure(figsize=(3.7, 2.4), layout="constrained")
        axes = figure.subplots()
        faint = {"alpha": 0.4, "linewidth": 1} if curve.running else {"linewidth": 1.7}
        for points, style in (
            (curve.train, {"color": C1, "label": "one step"} | faint),
            (curve.running, {"color": C1, "linewidth": 1.7, "label": "running mean"}),
            (curve.valid, {"color": C2, "linewidth": 1.7, "marker": "o", "markersize": 3, "label": "validation"}),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set(xlabel="step", ylabel=unit)
        if len(axes.lines) > 1:
            axes.legend()
        told = [f"{what} ends at {x:.4g}" for what, x in zip(("training", "validation"), curve.last(), strict=True)
                if x is not None]  # fmt: skip
        return _svg(figure, f"{name} over the steps: {', '.join(told)}")


def draw_codebooks(
    name: str, reached: Sequence[float], entropies: Sequence[float] | None, bound: float | None, unit: str
) -> str:
    """Draw a bar a codebook, with what it is compared with.

    Args:
        name: of the value.
        reached: (M,) the value of each codebook.
        entropies: (M,) marks above the bars; None: there are none.
        bound: a line across all; None: unknown.
        unit: of the vertical axis.
    """
    with _style(name):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        place = np.arange(len(reached))
        axes.bar(place, reached, color=C1, width=0.7, label=name)
        if entropies is not None:
            axes.plot(place, entropies, color=C2, marker="_", markersize=14, linestyle="", markeredgewidth=2,
                      label="entropy of the labels")  # fmt: skip
        if bound is not None:
            axes.axhline(bound, color=MUTED, linestyle="--", linewidth=1.2, label=f"bound {bound:.3f}")
        axes.set(xlabel="codebook", ylabel=unit, xticks=place if len(place) <= 32 else place[::8])
        axes.set_ylim(0, 1.28 * max([*reached, *(entropies or ()), bound or 0]))
        axes.grid(axis="x", visible=False)
        axes.legend(ncols=3, loc="upper right")
        return _svg(figure, f"{name} of {len(reached)} codebooks, from {min(reached):.3f} to {max(reached):.3f} {unit}")


def draw_counts(name: str, labels: Sequence[str], counts: Sequence[float], xlabel: str, ylabel: str) -> str:
    """Draw a bar for each of ``labels``."""
    with _style(name):
        figure = Figure(figsize=(3.7, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(counts)), counts, color=C1, width=0.8)
        step = -(-len(labels) // 12)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(range(0, len(labels), step), labels[::step])
        axes.grid(axis="x", visible=False)
        told = ", ".join(f"{label}: {count:g}" for label, count in zip(labels, counts, strict=True))
        return _svg(figure, f"{name}; {ylabel} by {xlabel}: {told}")


def draw_cif(
    name: str,
    features: np.ndarray,
    feature_shift: float,
    weights: np.ndarray,
    frame_shift: float,
    tokens: Sequence[str],
    begins: Sequence[float],
) -> str:
    """Draw a spectrogram with the CIF weights and the boundaries of the tokens, and below how frames were shared.

    Args:
        name: of the utterance.
        features: (T, F) log-mel frames.
        feature_shift: seconds between two of them.
        weights: (U + 1, T') weight of each frame in each of U tokens, then what no token took.
        frame_shift: seconds between two of these frames.
        tokens: (U,) what was recognised.
        begins: (U + 1,) seconds where each token begins, and where the last one ends.
    """
    with _style(name):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        strip, spectrum, shares = figure.subplots(3, 1, sharex=True, height_ratios=(0.35, 2.2, 1.3))
        end = max(len(features) * feature_shift, weights.shape[1] * frame_shift)
        edges = frame_shift * np.arange(weights.shape[1] + 1)
        spectrum.imshow(features.T, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
                        extent=(0, len(features) * feature_shift, 0, features.shape[1]))  # fmt: skip
        spectrum.vlines(begins, 0, features.shape[1], color="white", linewidth=0.9, linestyle="--")
        spectrum.grid(visible=False)
        spectrum.set(ylabel="mel bin", xlim=(0, end), ylim=(0, features.shape[1]))
        scale = spectrum.twinx()
        scale.stairs(weights.sum(axis=0), edges, color="cyan", linewidth=1.3, baseline=None)
        scale.set(ylim=(0, 1.05), ylabel="weight")
        scale.grid(visible=False)
        bottom = np.zeros(weights.shape[1])
        for u, row in enumerate(weights):
            colour = MUTED if u == len(tokens) else (C1, C2)[u % 2]
            here = row > 0
            shares.bar(edges[:-1][here], row[here], frame_shift, bottom[here], color=colour, align="edge")
            bottom += row
        shares.set(xlabel="seconds", ylabel="weight", ylim=(0, max(1.0, 1.05 * bottom.max(initial=0))))
        strip.set(ylim=(0, 1))
        strip.axis("off")
        for u, token in enumerate(tokens):
            strip.text((begins[u] + begins[u + 1]) / 2, 0.3, token, ha="center", color=(C1, C2)[u % 2],
                       parse_math=False)  # fmt: skip
        return _svg(figure, f"Spectrogram of {name} with CIF weights and the boundaries of {len(tokens)} tokens: "
                            f"{' '.join(tokens)}")  # fmt: skip
