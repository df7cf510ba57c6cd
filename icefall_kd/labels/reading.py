"""The stored labels of a batch, each checked against the audio, features and transcript that it comes with."""

from collections.abc import Sequence

import numpy as np
from lhotse.cut import Cut

from icefall_kd.config.labels import QUANTIZED
from icefall_kd.data.batch import Labels, NBest, TopK
from icefall_kd.errors import DataError
from icefall_kd.frames import conv2d_subsampled_len
from icefall_kd.labels.align import check_lengths, collate_codes, collate_embeddings
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.recogniser import (
    check_reference,
    collate_nbest,
    collate_posteriors,
    content_problem,
    nbest_rows,
    unpack_nbest,
)
from icefall_kd.labels.store import LabelStore
from icefall_kd.text.tokenizer import Tokenizer


def read_labels(
    store: LabelStore,
    cuts: Sequence[Cut],
    keys: Sequence[str],
    num_frames: Sequence[int],
    y: Sequence[Sequence[int]],
    tokens: Sequence[str],
    made_up: bool = False,
) -> Labels | TopK | NBest:
    """Return the labels of a batch, padded; an utterance that the set lacks has none.

    Args:
        store: the label set.
        cuts: of the utterances.
        keys: their label keys.
        num_frames: T input frames of the student.
        y: token ids of the transcripts.
        tokens: the token table.
        made_up: give utterances without labels some of the right size, for a look at the memory.
    Raises:
        DataError: labels of other audio or of another transcript, or that say what cannot be.
    """
    arrays: list[np.ndarray | None] = []
    for cut, key, frames, ids in zip(cuts, keys, num_frames, y, strict=True):
        rows = store.get(key, missing_ok=True)
        if rows is not None:
            _check(store, rows, cut, key, frames)
            if store.info.row == "token":
                check_reference(rows, ids, tokens, cut.id, key)
        elif made_up:
            rows = _made_up(store.info, cut, ids)
        arrays.append(rows)
    info = store.info
    if info.kind in QUANTIZED:
        return collate_codes(arrays, info.num_codebooks)
    if info.kind == "nbest":
        return collate_nbest([None if rows is None else unpack_nbest(rows) for rows in arrays])
    if info.kind.endswith("_posteriors"):
        return collate_posteriors(arrays, info.width, info.row == "token")
    return collate_embeddings(arrays, info.dim)


def _check(store: LabelStore, rows: np.ndarray, cut: Cut, key: str, num_frames: int) -> None:
    """Refuse rows of other audio: by their number, or, where that does not tell, by the samples they were made of."""
    formula = store.info.formula
    label_frames = len(rows) if store.info.row == "frame" else formula.num_frames(store.num_samples(key))
    check_lengths(label_frames, cut.num_samples, formula, conv2d_subsampled_len(num_frames), cut.id, key)
    if problem := content_problem(store.info, rows):
        raise DataError(f"utterance {cut.id} (key {key}): label set {store.path} has {problem}; extract it again")


def _made_up(info: LabelSetInfo, cut: Cut, y: Sequence[int]) -> np.ndarray:
    frames = info.formula.num_frames(cut.num_samples)
    if info.row == "list":
        return nbest_rows([(list(y), -float(i)) for i in range(info.extra["nbest_size"])])
    if not info.kind.endswith("_posteriors"):
        return np.zeros((frames, info.width), np.uint8)
    lead, k = int(info.row == "token"), info.extra["top_k"]
    rows = np.zeros((len(y) if lead else frames, info.width), np.uint16)
    rows[:, lead : lead + k] = np.arange(k) + (Tokenizer.unk_id if lead else 0)  # blank and sos/eos are in no text
    rows[:, lead + k : lead + 2 * k] = np.array(1 / k, np.float16).view(np.uint16)
    return rows
