"""The page of --system hkd: where the weights of integrate-and-fire divide the speech into tokens."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet

from icefall_kd.config import DecodeConfig, ReportConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.datamodule import decoding_batches
from icefall_kd.data.features import FRAME_SHIFT
from icefall_kd.decode.cif_beam import CifGreedySearch
from icefall_kd.decode.runner import long_enough
from icefall_kd.errors import KdError
from icefall_kd.models.cif import cif_weights
from icefall_kd.recipe import Trained, load_system, part_cuts
from icefall_kd.report.page import Section, code, figure, paragraph, table, text
from icefall_kd.report.plots import draw_cif
from icefall_kd.results import Run, find_folder

logger = logging.getLogger(__name__)
# What stands for the end of the text in a drawing.
_END = "⏎"


@dataclass(frozen=True)
class FiredUtterance:
    """An utterance as integrate-and-fire divides it."""

    name: str
    reference: str
    features: np.ndarray
    """(T, F)."""
    expected: int
    """Tokens of the reference, the end included."""
    quantity: float
    """Sum of the weights."""
    weights: np.ndarray
    """(U + 1, T') weight of each frame in each token as it was predicted, then what no token took."""
    frame_shift: float
    """Seconds of one of T' frames."""
    tokens: list[str]
    """What greedy search says at each of U vectors, the end and what follows it too."""
    recognised: str

    @property
    def begins(self) -> list[float]:
        """Return the seconds at which the weights reach 0, 1, ... U, linearly within a frame."""
        alpha = self.weights.sum(axis=0)
        total = np.concatenate([[0.0], alpha.cumsum()])
        wanted = np.arange(len(self.tokens) + 1)
        return (self.frame_shift * np.interp(wanted, total, np.arange(len(total)))).tolist()


def hkd_sections(run: Run, config: ReportConfig) -> list[Section]:
    """Return the section about integrate-and-fire; where model or audio are gone, it says so."""
    told = (
        "The cyan line is the weight of each frame; where its sum passes a whole number, a token ends (dashed). Below, "
        "each frame's weight is divided among the tokens that took it, in alternating colours; grey is what was left "
        f"behind the last one. {_END} is the end of the text, which is a token, too. Greedy search."
    )
    body = paragraph(text(told), note=True)
    if not config.utterances:
        return []
    try:
        trained = load_system(_checkpoint(run))
        fired = [fire(trained, batch) for batch in _batches(run, config, trained)]
    except (KdError, OSError) as error:
        logger.warning("no utterance is drawn: %s", error)
        return [Section("Integrate and fire", paragraph(f"No utterance is drawn: {text(error)}"))]
    rows = []
    for one in fired:
        svg = draw_cif(one.name, one.features, FRAME_SHIFT, one.weights, one.frame_shift, one.tokens, one.begins)
        body += figure(one.name, one.reference or "no reference", svg, wide=True)
        rows.append([code(one.name), str(one.expected), f"{one.quantity:.2f}", str(len(one.tokens)),
                     text(one.reference), text(one.recognised)])  # fmt: skip
    header = ["utterance", "tokens of the reference", "sum of weights", "fired", "reference", "recognised"]
    body += table(f"The utterances above; parameters: {trained.files_used}", header, rows, numbers=(1, 2, 3))
    return [Section("Integrate and fire", body)]


def _checkpoint(run: Run) -> DecodeConfig:
    """Return the parameters of the last decoding, or the newest."""
    options: dict = {}
    for result in run.results:
        names = ("epoch", "iter", "avg", "use_averaged_model", "weights")
        options = {name: result["config"][name] for name in names}
        options["weights"] = options["weights"] and Path(options["weights"])
    return DecodeConfig(exp_dir=run.exp_dir, device="cpu", **options)


def _batches(run: Run, config: ReportConfig, trained: Trained):
    """Yield a few utterances of a part, one a batch, evenly between the shortest and the longest."""
    folder = config.manifest_dir or find_folder(run.exp_dir, run.config["manifest_dir"], "cuts_*.jsonl.gz")
    part = config.part or run.config["valid_parts"][0]
    cuts = sorted(part_cuts(folder or Path(run.config["manifest_dir"]), part), key=lambda cut: (cut.duration, cut.id))
    count = min(config.utterances, len(cuts))
    for k in range(count):
        cut = cuts[(2 * k + 1) * len(cuts) // (2 * count)]
        features = "precomputed" if cut.has_features else "on_the_fly"
        yield from decoding_batches(
            CutSet.from_cuts([cut]), trained.tokenizer, max_duration=cut.duration + 1, features=features
        )


@torch.no_grad()
def fire(trained: Trained, batch: Batch) -> FiredUtterance:
    """Return how the one utterance of a batch is divided."""
    system, tokenizer = trained.system, trained.tokenizer
    encoder_out, lens = system.encode(long_enough(batch))
    fired = system.model.fire(encoder_out, lens)
    search = CifGreedySearch(system.model)
    count, frames = int(fired.lens), int(lens)
    (hyp,) = search.decode(encoder_out, lens)[0]
    tokens = [tokenizer.tokens[t] for t in hyp.tokens] + [_END] * (count - len(hyp.tokens))
    # The tail of recognition is scaled to weight 1; here it is drawn as it was predicted.
    weights = cif_weights(fired.alpha[:, :frames].double(), count + 1)[0].numpy()
    return FiredUtterance(
        name=batch.ids[0],
        reference=batch.texts[0] if batch.texts else "",
        features=batch.features[0, : int(batch.x_lens[0])].numpy(),
        expected=len(tokenizer.encode(batch.texts[0])) + 1 if batch.texts else 0,
        quantity=float(fired.quantity),
        weights=weights,
        frame_shift=system.frame_seconds(1),
        tokens=tokens,
        recognised=tokenizer.decode(hyp.tokens),
    )
