"""Times of reference tokens or words, and how much later a search emitted the same ones."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import kaldialign
import numpy as np
import torch
from torch import Tensor

from icefall_kd.decode.runner import long_enough
from icefall_kd.errors import DataError
from icefall_kd.frames import encoder_seconds
from icefall_kd.runtime.files import read_lines

_GAP = "\0"


class Timed(NamedTuple):
    """A token or word and when it is spoken, in seconds from the begin of the utterance."""

    unit: str
    begin: float
    end: float


def ctc_align(log_probs: Tensor, tokens: Sequence[int], blank_id: int = 0) -> list[tuple[int, int]] | None:
    """Return the first and last frame of each token in the best CTC path of a text (Viterbi; Graves et al. 2006).

    Args:
        log_probs: (T', V) of one utterance.
        tokens: the text.
        blank_id: id of the blank.
    Returns:
        Frames from 0, the last one included; None where the text does not fit in T' frames.
    """
    if not tokens:
        return []
    states = [blank_id]
    for token in tokens:
        states += [token, blank_id]
    emitted = log_probs.double().cpu().numpy()[:, states]  # (T', 2U + 1)
    num_frames, num_states = emitted.shape
    skips = np.array([s >= 3 and s % 2 == 1 and states[s] != states[s - 2] for s in range(num_states)])
    score = np.full(num_states, -np.inf)
    score[0] = 0.0  # before the first frame: state 0 leads to states 0 and 1
    back = np.zeros((num_frames, num_states), dtype=np.int8)
    for t in range(num_frames):
        reached = np.full((3, num_states), -np.inf)
        reached[0] = score
        reached[1, 1:] = score[:-1]
        reached[2, 2:] = np.where(skips[2:], score[:-2], -np.inf)
        back[t] = reached.argmax(axis=0)
        score = reached.max(axis=0) + emitted[t]
    state = num_states - 1 if score[-1] >= score[-2] else num_states - 2
    if score[state] == -np.inf:
        return None
    spans: list[list[int]] = [[-1, -1] for _ in tokens]
    for t in range(num_frames - 1, -1, -1):
        if state % 2:
            span = spans[state // 2]
            span[0], span[1] = t, span[1] if span[1] >= 0 else t
        state -= int(back[t, state])
    return [(first, last) for first, last in spans]


@torch.no_grad()
def forced_alignments(system, tokenizer, batches: Iterable) -> Iterator[tuple[str, list[Timed] | None]]:
    """Yield the id and the aligned tokens of every utterance, by the CTC head of a model.

    A token begins with its first frame and ends with its last.

    Args:
        system: offers ``encode(batch)``, and ``model.ctc_output``.
        tokenizer: of the training.
        batches: with texts.
    """
    device = next(system.parameters()).device
    for batch in batches:
        encoder_out, lens = system.encode(long_enough(batch).to(device))
        log_probs = system.model.ctc_output(encoder_out).float().log_softmax(dim=-1)
        for name, text, row, length in zip(batch.ids, batch.texts, log_probs, lens.tolist(), strict=True):
            tokens = tokenizer.encode(text)
            spans = ctc_align(row[:length], tokens, tokenizer.blank_id)
            if spans is None:
                yield name, None
                continue
            found = zip(tokenizer.pieces(text), spans, strict=True)
            yield name, [Timed(p, encoder_seconds(a), encoder_seconds(b + 1)) for p, (a, b) in found]


def read_ctm(file: Path) -> dict[str, list[Timed]]:
    """Read the words of each utterance of a CTM file (id, channel, begin, length, word), in order of time."""
    found: dict[str, list[Timed]] = {}
    for number, line in enumerate(read_lines(file), 1):
        words = line.split()
        if not words or words[0].startswith(";;"):
            continue
        try:
            begin, length = float(words[2]), float(words[3])
            if not math.isfinite(begin + length):
                raise ValueError("no time")
            found.setdefault(words[0], []).append(Timed(words[4], begin, round(begin + length, 6)))
        except (ValueError, IndexError):
            raise DataError(f"{file}:{number} is no line of a CTM file: {line.strip()[:80]}") from None
    return {name: sorted(items, key=lambda x: x.begin) for name, items in found.items()}


def cut_alignments(cuts: Iterable, kind: str = "word") -> dict[str, list[Timed]]:
    """Return the alignments that the supervisions of lhotse cuts hold, by cut id; cuts without one are left out."""
    found = {}
    for cut in cuts:
        items = (cut.supervisions[0].alignment or {}).get(kind) if cut.supervisions else None
        if items:
            found[cut.id] = [Timed(item.symbol, item.start, item.end) for item in items]
    return found


def emissions(nbest_file: Path, tokenizer, words: bool) -> dict[str, list[tuple[str, float]]]:
    """Return when each token (or the last token of each word) of the best hypotheses was emitted.

    Args:
        nbest_file: ``nbest-*.jsonl`` of decode.py.
        tokenizer: of the training.
        words: words instead of tokens.
    Returns:
        (unit, seconds) by utterance.  A token of encoder frame t is out when the frame is over, 0.04 (t + 1) s after
        the begin; what a streaming encoder waits for, its chunk, comes on top.
    """
    found = {}
    for line in read_lines(nbest_file):
        try:
            record = json.loads(line)
            tokens, frames = record["nbest"][0]["tokens"], record["nbest"][0]["timestamps"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{nbest_file} is no nbest-*.jsonl of decode.py ({error!r}): {line.strip()[:80]}") from None
        if frames is None:
            raise DataError(f"{nbest_file}: {record['id']} has no timestamps; decode it again")
        if max(tokens, default=0) >= tokenizer.vocab_size:
            raise DataError(f"{nbest_file} holds token {max(tokens)}, of {tokenizer.vocab_size}; choose its --exp-dir")
        units = tokenizer.words(tokens) if words else [(tokenizer.tokens[t], k, k) for k, t in enumerate(tokens)]
        found[record["id"]] = [(unit, encoder_seconds(frames[last] + 1)) for unit, _, last in units]
    return found


def emission_delays(
    reference: Sequence[Timed], emitted: Sequence[tuple[str, float]], point: str = "end"
) -> list[float]:
    """Return emission time minus reference time of every unit that was recognised correctly, in seconds.

    Args:
        reference: what was spoken, and when.
        emitted: what was recognised, and when it was out.
        point: "end" or "begin" of the reference unit.
    """
    pairs = kaldialign.align([x.unit for x in reference], [unit for unit, _ in emitted], _GAP)
    delays, i, j = [], 0, 0
    for ref, hyp in pairs:
        if ref == hyp:
            delays.append(emitted[j][1] - getattr(reference[i], point))
        i, j = i + (ref != _GAP), j + (hyp != _GAP)
    return delays


def summarize_delays(delays: Sequence[float]) -> dict[str, float | int | None]:
    """Return number, mean, median and 90th percentile in milliseconds (None without any)."""
    values = 1000 * np.array(delays, dtype=np.float64)
    if not len(values):
        return {"count": 0, "mean_ms": None, "median_ms": None, "p90_ms": None}
    return {
        "count": len(values),
        "mean_ms": float(values.mean()),
        "median_ms": float(np.median(values)),
        "p90_ms": float(np.quantile(values, 0.9)),
    }
