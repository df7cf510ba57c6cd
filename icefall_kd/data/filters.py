"""The one filter between a corpus and a training: durations, and tokens against encoder frames."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from icefall_kd.data.features import FRAME_SHIFT
from icefall_kd.errors import DataError
from icefall_kd.frames import conv2d_subsampled_len, fbank_num_frames
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One utterance that the filter left out."""

    id: str
    """Cut id."""
    reason: str
    """Why, with the numbers."""


def check_cuts(cuts: Iterable[Cut], features: str, where: str) -> None:
    """Refuse cuts that features cannot be read of, before a training or a decoding begins.

    Args:
        cuts: of one set.
        features: "precomputed": every cut needs stored features; "on_the_fly": every cut needs its audio.
        where: what to call the set in the message.
    Raises:
        DataError: naming the first cut at another rate than 16 kHz, or without features or audio.
    """
    for cut in cuts:
        if cut.sampling_rate != SAMPLE_RATE:
            raise DataError(
                f"{where}: cut {cut.id} is at {cut.sampling_rate} Hz, features and teachers need {SAMPLE_RATE} Hz; "
                f"prepare it with prepare.sh, or use CutSet.resample({SAMPLE_RATE})"
            )
        if features == "precomputed" and not cut.has_features:
            raise DataError(
                f"{where}: cut {cut.id} has no stored features; use --features on_the_fly or the manifests in fbank/"
            )
        if features == "on_the_fly" and not cut.has_recording:
            raise DataError(f"{where}: cut {cut.id} has no recording, which --features on_the_fly needs")


def cut_into_pieces(cuts: Iterable[Cut], longest: float) -> CutSet:
    """Cut utterances of more than ``longest`` seconds into equally long pieces without transcripts.

    All audio of an utterance is heard in every epoch, where wav2vec 2.0 draws one crop (our design).  Pieces begin at
    whole frames of features.
    """
    found: list[Cut] = []
    for cut in cuts:
        pieces = math.ceil(cut.duration / longest)
        if pieces <= 1:
            found.append(cut)
            continue
        frames = math.floor(cut.duration / FRAME_SHIFT)
        bounds = [round(i * frames / pieces) * FRAME_SHIFT for i in range(pieces)] + [cut.duration]
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            piece = cut.truncate(offset=round(begin, 2), duration=round(end - begin, 8), preserve_id=True)
            found.append(fastcopy(piece, id=f"{cut.id}-{i + 1}-of-{pieces}", supervisions=[]))
    return CutSet.from_cuts(found)


def repeats(tokens: list[int]) -> int:
    """Return how many tokens equal their predecessor: CTC needs a blank frame between the two."""
    return sum(a == b for a, b in itertools.pairwise(tokens))


def why_not(
    tokens: list[int],
    num_frames: int,
    *,
    transducer: bool = True,
    ctc: bool = True,
    end_token: bool = False,
    num_encoder_frames=None,
    min_encoder_frames: int = 1,
    text: bool = True,
) -> str | None:
    """Return why an utterance would make a loss infinite, or None.

    Args:
        tokens: U label ids.
        num_frames: T input frames.
        transducer: the pruned transducer needs U <= T'.
        ctc: CTC needs U plus the number of repeats <= T'.
        end_token: the end of the text is one more label.
        num_encoder_frames: the encoder's T -> T'; None: that of Conv2dSubsampling.
        min_encoder_frames: fewest T' of an utterance.
        text: whether there must be any.
    """
    encoder_frames = (num_encoder_frames or conv2d_subsampled_len)(num_frames)
    if encoder_frames < 1:
        return f"{num_frames} frames give no encoder frame"
    if encoder_frames < min_encoder_frames:
        return f"{num_frames} frames give {encoder_frames} encoder frames; {min_encoder_frames} are needed"
    if not tokens:
        return "no tokens" if text else None
    count, shown = len(tokens) + end_token, f"{len(tokens)} tokens{' and the end' if end_token else ''}"
    if (transducer or ctc) and count > encoder_frames:
        return f"{shown}, {encoder_frames} encoder frames"
    if ctc and count + repeats(tokens) > encoder_frames:
        return f"{shown} with {repeats(tokens)} repeats, {encoder_frames} encoder frames"
    return None


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """What an utterance must be like to be trained on."""

    tokenizer: Tokenizer | None
    """Makes the tokens that are counted; None: of audio alone, which needs no supervision."""
    min_duration: float = 0.0
    """Shortest utterance in seconds."""
    max_duration: float = float("inf")
    """Longest utterance in seconds."""
    transducer: bool = True
    """A transducer loss will be used."""
    ctc: bool = True
    """A CTC loss will be used."""
    end_token: bool = False
    """The end of the text is a label, too."""
    num_encoder_frames: Callable[[int], int] | None = None
    """The encoder's T -> T'; None: that of Conv2dSubsampling."""
    min_encoder_frames: int = 1
    """Fewest T' of an utterance."""

    def judge(self, cut: Cut) -> tuple[str | None, int]:
        """Return why a cut is left out, or None, and the number of its tokens."""
        if not self.min_duration <= cut.duration <= self.max_duration:
            return f"{cut.duration:.2f} s, outside of {self.min_duration} to {self.max_duration} s", 0
        if self.tokenizer is not None and len(cut.supervisions) != 1:
            return f"{len(cut.supervisions)} supervisions; one is needed", 0
        tokens = [] if self.tokenizer is None else self.tokenizer.encode(cut.supervisions[0].text or "")
        num_frames = cut.num_frames if cut.has_features else fbank_num_frames(cut.num_samples)
        reason = why_not(
            tokens,
            num_frames,
            transducer=self.transducer,
            ctc=self.ctc,
            end_token=self.end_token,
            num_encoder_frames=self.num_encoder_frames,
            min_encoder_frames=self.min_encoder_frames,
            text=self.tokenizer is not None,
        )
        return reason, len(tokens)


def counted(cut: Cut, num_tokens: int) -> Cut:
    """Return a copy of a cut with ``custom["num_tokens"]``, which batches are limited by."""
    return fastcopy(cut, custom={**(cut.custom or {}), "num_tokens": num_tokens})


def filter_cuts(cuts: Iterable[Cut], **limits) -> tuple[CutSet, list[LeftOut]]:
    """Split cuts into those fit for training and those left out.

    Args:
        cuts: one supervision each, where there is a tokenizer.
        limits: fields of :class:`Fitness`.
    Returns:
        The kept cuts in their order, with ``custom["num_tokens"]`` set, and what was left out with reasons.
    """
    fitness = Fitness(**limits)
    kept: list[Cut] = []
    left_out: list[LeftOut] = []
    for cut in cuts:
        reason, num_tokens = fitness.judge(cut)
        if reason is None:
            kept.append(counted(cut, num_tokens))
        else:
            left_out.append(LeftOut(id=cut.id, reason=reason))
    if left_out:
        first = "; ".join(f"{x.id}: {x.reason}" for x in left_out[:5])
        logger.warning("%d of %d utterances left out: %s", len(left_out), len(left_out) + len(kept), first)
    return CutSet.from_cuts(kept), left_out
