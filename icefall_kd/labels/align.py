"""Teacher frames to student frames: padding, joining, and refusing lengths that the formulas do not explain.

All functions are pure.  A student frame of 40 ms takes the teacher frames ``ratio * t ... ratio * t + ratio - 1``
(two of a 50 Hz teacher; the authors of MVQ-KD join successive frames in this way in their icefall recipe).
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from icefall_kd.data.batch import IGNORE, Batch, Labels
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FrameFormula, conv2d_subsampled_len, fbank_num_frames

# Four frames of 10 ms at 16 kHz.
STUDENT_HOP = 640
STUDENT_RATE = 16000


def label_ratio(
    formula: FrameFormula, sampling_rate: int = STUDENT_RATE, student_hop: int = STUDENT_HOP
) -> int:
    """Return how many teacher frames make one student frame, exactly.

    Args:
        formula: the teacher's frame formula.
        sampling_rate: samples a second of the teacher's input.
        student_hop: samples at 16 kHz between two student frames.
    Raises:
        ConfigError: the student's frame is no whole number of teacher frames.
    """
    teacher, student = Fraction(sampling_rate, formula.hop), Fraction(STUDENT_RATE, student_hop)
    ratio = teacher / student
    if ratio.denominator != 1:
        raise ConfigError(
            f"the teacher gives {float(teacher):g} frames a second, the student {float(student):g}; "
            "the first must be a whole multiple of the second"
        )
    return ratio.numerator


def collate_codes(arrays: Sequence[np.ndarray | None], num_codebooks: int | None = None) -> Labels:
    """Pad the codes of a batch with -100.

    Args:
        arrays: (T_i, Q) codes of each utterance; None: it has no labels.
        num_codebooks: Q, needed when no utterance has labels.
    Returns:
        values (N, T_l, Q) int64 and lens (N,) int64.
    """
    return _collate(arrays, num_codebooks, IGNORE, torch.int64)


def collate_embeddings(arrays: Sequence[np.ndarray | None], dim: int | None = None) -> Labels:
    """Pad the embeddings of a batch with 0; as :func:`collate_codes`, values (N, T_l, C) float32."""
    return _collate(arrays, dim, 0, torch.float32)


def _collate(arrays: Sequence[np.ndarray | None], width: int | None, padding: int, dtype: torch.dtype) -> Labels:
    widths = sorted({a.shape[1] for a in arrays if a is not None} | ({width} if width is not None else set()))
    if len(widths) != 1:
        raise DataError(f"labels of a batch are {widths or 'of unknown'} wide; they must all have one width")
    lens = [0 if a is None else len(a) for a in arrays]
    values = torch.full((len(arrays), max(lens, default=0), widths[0]), padding, dtype=dtype)
    for row, array in zip(values, arrays, strict=True):
        if array is not None:
            row[: len(array)] = torch.from_numpy(np.asarray(array)).to(dtype)
    return Labels(values, torch.tensor(lens, dtype=torch.int64))


def _spread(labels: Labels, encoder_out_lens: Tensor, ratio: int, padding: int) -> tuple[Tensor, Tensor]:
    """Cut or pad labels to ratio * T' frames; return them (N, T' * ratio, Q) and where they are valid."""
    values = labels.values
    lens, encoder_out_lens = labels.lens.to(values.device), encoder_out_lens.to(values.device)
    if len(values) != len(encoder_out_lens):
        raise DataError(f"labels of {len(values)} utterances, encoder output of {len(encoder_out_lens)}")
    total = int(encoder_out_lens.max()) * ratio if len(encoder_out_lens) else 0
    spread = values.new_full((len(values), total, values.shape[2]), padding)
    common = min(total, values.shape[1])
    spread[:, :common] = values[:, :common]
    valid = torch.arange(total, device=values.device) < torch.minimum(lens, encoder_out_lens * ratio)[:, None]
    return spread.masked_fill(~valid[..., None], padding), valid


def join_frames(labels: Labels, encoder_out_lens: Tensor, ratio: int) -> Tensor:
    """Join ``ratio`` successive teacher frames of codes into one student frame.

    Args:
        labels: values (N, T_l, Q) int64, lens (N,).
        encoder_out_lens: (N,) student frames T' of each utterance.
        ratio: teacher frames a student frame.
    Returns:
        (N, T', ratio * Q) int64; columns 0 ... Q-1 are the first teacher frame.  -100 behind the end of an
        utterance and where teacher frames are missing.
    """
    spread, _ = _spread(labels, encoder_out_lens, ratio, IGNORE)
    n, total, q = spread.shape
    return spread.reshape(n, total // ratio, ratio * q)  # (N, T' * ratio, Q) -> (N, T', ratio * Q)


def join_embeddings(labels: Labels, encoder_out_lens: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """Join embeddings as :func:`join_frames` joins codes.

    Returns:
        (N, T', ratio * C) float, 0 where there is no label, and the mask (N, T', ratio) bool, True where there is.
    """
    spread, valid = _spread(labels, encoder_out_lens, ratio, 0)
    n, total, c = spread.shape
    return spread.reshape(n, total // ratio, ratio * c), valid.reshape(n, total // ratio, ratio)


def delay_frames(joined: Tensor, encoder_out_lens: Tensor, delay: int, padding: float) -> Tensor:
    """Shift labels to later student frames, for students that hear the audio as it comes.

    Args:
        joined: (N, T', ...) labels of :func:`join_frames` or :func:`join_embeddings`, or their mask.
        encoder_out_lens: (N,) student frames of each utterance.
        delay: student frames d: frame t gets the labels of frame t - d.
        padding: value of the first d frames and of those behind the end; the labels of the last d frames are dropped.
    Returns:
        (N, T', ...).
    """
    if delay == 0:
        return joined
    total = joined.shape[1]
    shifted = torch.full_like(joined, padding)
    shifted[:, delay:] = joined[:, : max(total - delay, 0)]
    behind = torch.arange(total, device=joined.device) >= encoder_out_lens.to(joined.device).unsqueeze(1)
    return shifted.masked_fill(behind.reshape(*behind.shape, *(1 for _ in joined.shape[2:])), padding)


def surplus_bounds(formula: FrameFormula, student_hop: int = STUDENT_HOP) -> tuple[int, int]:
    """Return the least and largest possible ``label_len - ratio * T'`` of an utterance with T' > 0.

    With S samples, T = floor((S + 80) / 160) Fbank frames and T' = floor((T - 3) / 4), so that
    S/640 - 13/8 < T' <= S/640 - 5/8.  A stack of convolutions with hop h and receptive field less padding R has
    S/h - R/h < L <= S/h - R/h + 1 frames, a right-padded one S/h <= L < S/h + 1.  The difference of the two
    lies between the differences of the limits.

    Args:
        formula: the teacher's frame formula, at 16 kHz.
        student_hop: 640, the one subsampling for which this is derived.
    """
    ratio = label_ratio(formula, student_hop=student_hop)
    low, high = ratio * Fraction(5, 8), ratio * Fraction(13, 8)
    if formula.right_pad:
        return math.ceil(low), math.ceil(high + 1) - 1
    shift = Fraction(formula.receptive_field - formula.pad, formula.hop)
    return math.floor(low - shift) + 1, math.ceil(high - shift + 1) - 1


def check_lengths(
    label_len: int, num_samples: int, formula: FrameFormula, encoder_len: int, utterance: str = "", key: str = ""
) -> None:
    """Refuse labels whose length the formulas do not explain.

    Args:
        label_len: teacher frames stored.
        num_samples: samples of the (speed-perturbed) audio at 16 kHz as it is loaded.
        formula: the teacher's frame formula.
        encoder_len: student frames T'.
        utterance, key: named in the message.
    Raises:
        DataError: stored and computed length differ, of the labels or of the student.
    """
    who = f"utterance {utterance or '?'} (key {key or '?'})"
    expected = formula.num_frames(num_samples)
    if label_len != expected:
        raise DataError(
            f"{who}: {label_len} label frames, the teacher's formula gives {expected} for its {num_samples} samples; "
            "the labels are of other audio (speed, cut or teacher)"
        )
    student = conv2d_subsampled_len(fbank_num_frames(num_samples))
    if encoder_len == student:
        return
    low, high = surplus_bounds(formula)
    surplus = label_len - label_ratio(formula) * encoder_len
    raise DataError(
        f"{who}: the student has {encoder_len} frames, {num_samples} samples give {student} (label frames beyond "
        f"the student's: {surplus}, healthy are {low} ... {high}); features and labels are of different audio"
    )


def check_online_lengths(batch: Batch, label_lens: Tensor, formula: FrameFormula) -> None:
    """Refuse what :func:`check_lengths` refuses of stored labels, of those (N,) that a teacher makes in training."""
    counts = (label_lens, batch.audio_lens, conv2d_subsampled_len(batch.x_lens))
    for utterance, found, num_samples, student in zip(batch.ids, *(x.tolist() for x in counts), strict=True):
        check_lengths(found, num_samples, formula, student, utterance)
