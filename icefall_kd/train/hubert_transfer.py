"""What a student of HuBERT takes from its teacher before the first step (--init-from-teacher).

Chang et al. 2021, arXiv 2110.01900: convolutions, projection, positional convolution and the first layers.  A part is
taken as a whole or not at all: of a student that is narrower than its teacher, the convolutions alone fit, and single
biases that happen to have a layer's size stay as they were drawn.
"""

import logging
import re
from dataclasses import asdict

from torch import Tensor

from icefall_kd.errors import ConfigError
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.teachers.hubert_weights import ENCODER_PREFIX, HubertWeights
from icefall_kd.train.checkpoint import load_model
from icefall_kd.train.transfer import TransferReport

logger = logging.getLogger(__name__)

_PARTS = {
    r"subsampling\.(convolutions|inner_norms)\.": "convolutions",
    r"subsampling\.(norm|out|conv)\.": "projection",
    r"subsampling\.cmvn_": "statistics",
    r"body\.pos_conv_embed\.": "positional convolution",
    r"body\.layer_norm\.": "norm in front of the layers",
    r"body\.layers\.(?P<layer>\d+)\.": "layer",
    r"time_reduction\.": "time reduction",
}


def start_from_teacher(encoder: HubertEncoder, weights: HubertWeights) -> tuple[dict, TransferReport]:
    """Give a new student the parts of its teacher that have its shapes.

    Args:
        encoder: the student's.
        weights: the teacher.
    Returns:
        What is recorded of it, as of train/transfer.py: initialise, and the report of every tensor; ``skipped`` are
        those of parts of which others do not fit.
    Raises:
        ConfigError: nothing fits.
    """
    own = encoder.state_dict()
    fits = _fitting_parts(own, encoder, weights)
    taken = {n: x for n, x in weights.encoder.items() if n in own and fits[_part(n)]}
    if not taken:
        raise ConfigError(
            f"--init-from-teacher: no part of the student has the shapes of {weights.source}; leave it out, or give "
            "the student its sizes (--extractor-channels, --encoder-dim)"
        )
    load_model(encoder, taken, strict=False)
    shapes = {n: (tuple(x.shape), tuple(own[n].shape)) for n, x in weights.encoder.items() if n in own}
    report = TransferReport(
        loaded=_named(taken),
        missing=_named(n for n in own if n not in weights.encoder),
        unexpected=_named(n for n in weights.encoder if n not in own),
        mismatched=[
            f"{ENCODER_PREFIX}{n} {theirs} of the teacher, {mine} in the student"
            for n, (theirs, mine) in shapes.items()
            if theirs != mine
        ],
        skipped=_named(n for n, (theirs, mine) in shapes.items() if theirs == mine and n not in taken),
    )
    for part, fit in fits.items():
        logger.info("--init-from-teacher: %s: %s", part, "the teacher's" if fit else "new")
    for line in report.lines():
        logger.debug("--init-from-teacher: %s", line)
    parts = {"parts": [part for part, fit in fits.items() if fit]}
    record = {"teacher": weights.source, "weights_sha256": weights.sha256, **parts}
    return {**record, **{name: len(names) for name, names in asdict(report).items()}}, report


def _named(names) -> list[str]:
    return [f"{ENCODER_PREFIX}{name}" for name in names]


def _part(name: str) -> str:
    """Return what a parameter of the encoder belongs to; layers count from 1."""
    for pattern, part in _PARTS.items():
        if match := re.match(pattern, name):
            return f"layer {int(match['layer']) + 1}" if part == "layer" else part
    return name


def _fitting_parts(own: dict[str, Tensor], encoder: HubertEncoder, weights: HubertWeights) -> dict[str, bool]:
    """Return the student's parts, and whether the teacher has the same with the same shapes."""
    shapes: dict[str, list[dict]] = {}
    for side, state in enumerate((own, weights.encoder)):
        for name, x in state.items():
            shapes.setdefault(_part(name), [{}, {}])[side][name] = x.shape
    fits = {part: mine == theirs for part, (mine, theirs) in shapes.items() if mine}
    if "projection" in fits:
        fits["projection"] = _same_projection(*shapes["projection"])
    if encoder.shape.num_heads != weights.num_heads:  # the same shapes would mean other heads
        fits |= {part: False for part in fits if part.startswith("layer ")}
    return fits


def _same_projection(mine: dict, theirs: dict) -> bool:
    """Return whether projections fit: students have no norm in front of theirs, and take the map behind it."""
    front_ends = ["subsampling.conv.weight" in side for side in (mine, theirs)]
    return front_ends[0] == front_ends[1] and mine.items() <= theirs.items()
