"""What a recogniser knows beyond its embeddings, as rows of a label set (our design): posteriors and n-best lists.

``ctc_posteriors``: a row a frame of the encoder, uint16: k class ids, their probabilities and the sum of all others'
as the bits of float16.  ``token_posteriors``: a row a token of the transcript, with that token's id in front, so that
they are never taken for those of another text.  ``nbest``: int32 numbers, one a row: how many hypotheses, and of each
its score (the bits of float32), its length and its tokens.

Labels that are made in training go through the same rows, so that they are the stored ones.  All functions are pure.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_kd.data.batch import NBest, TopK
from icefall_kd.errors import DataError
from icefall_kd.labels.info import LabelSetInfo

Hypotheses = list[tuple[list[int], float]]

# Rounding to float16: relative to numbers above 2^-14, absolute below.
_RELATIVE, _ABSOLUTE = 2.0**-11, 2.0**-25
# By how much the stored probabilities of a row may miss 1 and still be whole.
_SUM_SLACK = 0.002


def posterior_width(top_k: int, with_reference: bool) -> int:
    """Return the numbers of a row with ``top_k`` classes."""
    return 2 * top_k + 1 + with_reference


def pack_posteriors(probs: Tensor, top_k: int, reference: Tensor | None = None) -> Tensor:
    """Return rows of the likeliest classes.

    Args:
        probs: (M, V) float32, V up to 65536, each row a distribution.
        top_k: classes kept, at most V.
        reference: (M,) token ids of the transcript, for token_posteriors.
    Returns:
        (M, W) int32 on the device of ``probs``, all numbers in 0 ... 65535.
    """
    top, ids = probs.topk(top_k, dim=1)
    rest = probs.scatter(1, ids, 0.0).sum(dim=1, keepdim=True)  # 1 - top.sum() would be rounding errors alone
    bits = torch.cat([top, rest], dim=1).half().view(torch.int16)
    lead = [] if reference is None else [reference.unsqueeze(1).int()]
    return torch.cat([*lead, ids.int(), bits.int()], dim=1)


def unpack_posteriors(rows: Tensor, lens: Tensor, with_reference: bool) -> TopK:
    """Read rows of :func:`pack_posteriors`; probabilities and rest of each add up to 1 again.

    Args:
        rows: (N, T, W) integers, 0 beyond the lengths.
        lens: (N,) valid rows.
        with_reference: the rows begin with a token of the transcript, which is left out.
    """
    rows = rows[..., int(with_reference) :]
    k = rows.shape[-1] // 2
    values = rows[..., k:].to(torch.int16).view(torch.float16).float()
    total = values.sum(dim=-1, keepdim=True)
    values = values / total.masked_fill(total == 0, 1.0)
    return TopK(rows[..., :k].long(), values[..., :k], values[..., k], lens)


def collate_posteriors(arrays: Sequence[np.ndarray | None], width: int, with_reference: bool) -> TopK:
    """Pad the rows (T_i, W) uint16 of a batch and read them; None: an utterance has no labels."""
    lens = [0 if a is None else len(a) for a in arrays]
    rows = torch.zeros(len(arrays), max(lens, default=0), width, dtype=torch.int32)
    for row, array in zip(rows, arrays, strict=True):
        if array is not None:
            row[: len(array)] = torch.from_numpy(array.astype(np.int32))
    return unpack_posteriors(rows, torch.tensor(lens), with_reference)


def packing_error(loss: Tensor, rest: Tensor, top_k: int, lowest: float | Tensor) -> Tensor:
    """Bound what packed posteriors change in ``posterior_kd`` at temperature 1, against KL over all classes exactly.

    Two things are lost.  The classes of the rest are seen by their sum: KL is the packed loss plus rest * KL among
    them, which is at least 0 and at most -rest * lowest.  Rounding moves each of the k + 1 probabilities p by at most
    e p + b, which moves p log p and p log q as written below; entropies are at most log(k + 1).

    Args:
        loss: (M,) packed loss in nats.
        rest: (M,) probability of the classes that are not kept.
        top_k: classes kept.
        lowest: the student's lowest log-probability of any class.
    Returns:
        (M,) nats; with ``rest`` 0 it bounds what rounding alone changes.
    """
    terms = top_k + 1
    total = _RELATIVE + terms * _ABSOLUTE  # how far the stored numbers of a row may miss 1
    e, b = (_RELATIVE + total) / (1 - total), _ABSOLUTE / (1 - total)
    absolute = terms * b * (-lowest - math.log(b))
    rounding = absolute + (1 + e) * math.log1p(e)
    # The exact loss, of which e is a share, is at most the packed one and this error itself.
    return (rounding + e * (loss + 2 * math.log(terms))) / (1 - e) - rest * lowest


def check_reference(rows: np.ndarray, y: Sequence[int], tokens: Sequence[str], utterance: str, key: str) -> None:
    """Refuse token posteriors along another transcript than ``y``.

    Args:
        rows: (U, W) of token_posteriors.
        y: token ids of the batch.
        tokens: the token table, for the message.
        utterance, key: named in the message.
    Raises:
        DataError: naming the utterance, its key and both transcripts.
    """
    found, wanted = rows[:, 0].tolist(), list(y)
    if found != wanted:
        texts = [" ".join(tokens[i] if i < len(tokens) else f"#{i}" for i in ids) for ids in (found, wanted)]
        raise DataError(
            f"utterance {utterance} (key {key}): its token posteriors are along {texts[0]!r}, its transcript is "
            f"{texts[1]!r}; extract the labels of these cuts again"
        )


def pack_nbest(hypotheses: Hypotheses, size: int, silent: Collection[int]) -> np.ndarray:
    """Return the rows of an n-best list, best first.

    Hypotheses that are the same without the silent tokens become one, with the sum of their probabilities.

    Args:
        hypotheses: token ids and log-probability of each.
        size: hypotheses kept, at most.
        silent: tokens that no text has.
    Returns:
        (R, 1) int32.
    Raises:
        DataError: a score is no number, or infinite.
    """
    merged: dict[tuple[int, ...], float] = {}
    for tokens, score in hypotheses:
        if not math.isfinite(score):
            raise DataError(f"a hypothesis of the recogniser has score {score}; its weights are damaged")
        kept = tuple(int(t) for t in tokens if t not in silent)
        merged[kept] = float(np.logaddexp(merged.get(kept, -math.inf), score))
    best = sorted(merged.items(), key=lambda x: (-x[1], x[0]))[:size]
    return nbest_rows([(list(tokens), score) for tokens, score in best])


def nbest_rows(best: Hypotheses) -> np.ndarray:
    """Return hypotheses as they are as rows (R, 1) int32."""
    parts = [np.array([len(best)], np.int32)]
    for tokens, score in best:
        parts += [np.array([score], np.float32).view(np.int32), np.array([len(tokens), *tokens], np.int32)]
    return np.concatenate(parts)[:, None]


def unpack_nbest(rows: np.ndarray) -> Hypotheses:
    """Read the rows of :func:`pack_nbest`; a DataError when they are none."""
    numbers, place, found = np.ascontiguousarray(rows.reshape(-1), np.int32), 1, []
    for _ in range(int(numbers[0]) if len(numbers) else -1):
        if place + 2 > len(numbers):
            break
        score, length = float(numbers[place : place + 1].view(np.float32)[0]), int(numbers[place + 1])
        if length < 0:
            break
        found.append((numbers[place + 2 : place + 2 + length].tolist(), score))
        place += 2 + length
    if len(numbers) == 0 or len(found) != numbers[0] or place != len(numbers):
        raise DataError(f"an n-best list of {len(numbers)} numbers is damaged: it does not end where they do")
    return found


def collate_nbest(lists: Sequence[Hypotheses | None]) -> NBest:
    """Pad the hypotheses of a batch; None: an utterance has no labels."""
    lists = [hypotheses or [] for hypotheses in lists]
    size = max((len(h) for h in lists), default=0)
    longest = max((len(tokens) for h in lists for tokens, _ in h), default=0)
    shape = len(lists), max(size, 1)
    tokens = torch.zeros(*shape, max(longest, 1), dtype=torch.int64)
    lens, scores = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -math.inf)
    for i, hypotheses in enumerate(lists):
        for j, (ids, score) in enumerate(hypotheses):
            tokens[i, j, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            lens[i, j], scores[i, j] = len(ids), score
    return NBest(tokens, lens, scores)


def content_problem(info: LabelSetInfo, rows: np.ndarray) -> str | None:
    """Return what rows of a recogniser's labels or clusters say that cannot be, or None; others may hold any values."""
    if info.kind == "clusters":
        wrong = rows.size and rows.max() >= info.codebook_size
        return f"cluster {rows.max()}, there are {info.codebook_size}" if wrong else None
    if info.kind == "nbest":
        return _nbest_problem(rows, info.extra["vocab_size"])
    if not info.kind.endswith("_posteriors"):
        return None
    lead = int(info.row == "token")
    k = (info.width - lead) // 2
    classes, values = rows[:, : lead + k], rows[:, lead + k :].view(np.float16).astype(np.float32)
    if classes.size and classes.max() >= info.extra["vocab_size"]:
        return f"class {classes.max()}, the teacher has {info.extra['vocab_size']}"
    total = values.sum(axis=1)
    wrong = np.flatnonzero(~((values >= 0).all(axis=1) & (np.abs(total - 1) < _SUM_SLACK)))
    return f"probabilities {values[wrong[0]].tolist()} in row {wrong[0]}, which add up to no 1" if len(wrong) else None


def _nbest_problem(rows: np.ndarray, vocab_size: int) -> str | None:
    try:
        hypotheses = unpack_nbest(rows)
    except DataError as error:
        return str(error)
    scores = [score for _, score in hypotheses]
    if not all(map(math.isfinite, scores)) or scores != sorted(scores, reverse=True):
        return f"scores {scores}, which are not falling numbers"
    if any(not 0 <= token < vocab_size for tokens, _ in hypotheses for token in tokens):
        return f"tokens beyond 0 ... {vocab_size - 1}"
    same = len({tuple(tokens) for tokens, _ in hypotheses}) < len(hypotheses)
    return "one hypothesis twice" if same else None
