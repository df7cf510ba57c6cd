"""The one batch that models, teachers, losses and decoders exchange.

Tensor legend of the whole project: N batch, T input frames, T' encoder frames, U labels,
C channels, V vocabulary, Q codebooks, K codebook entries, S samples.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Padding of log-mel features: the logarithm of silence, as in lhotse.
LOG_EPS = math.log(1e-10)
# Padding of integer labels: ignored by every loss.
IGNORE = -100


@dataclass(frozen=True)
class Labels:
    """One named set of teacher labels of a batch."""

    values: Tensor
    """(N, T_l, Q) int64 codes padded with -100, or (N, T_l, C) float embeddings padded with 0."""
    lens: Tensor
    """(N,) int64: valid teacher frames of each utterance."""


@dataclass(frozen=True)
class TopK:
    """Posteriors of a batch: the k likeliest classes of each frame or token, all others as one."""

    ids: Tensor
    """(N, T_l, k) int64 different classes, likeliest first."""
    probs: Tensor
    """(N, T_l, k) float32, 0 beyond the lengths."""
    rest: Tensor
    """(N, T_l) float32: probability of all other classes together; with probs it adds up to 1."""
    lens: Tensor
    """(N,) int64: valid frames or tokens of each utterance; 0: it has no labels."""


@dataclass(frozen=True)
class NBest:
    """A teacher's hypotheses of a batch, best first."""

    tokens: Tensor
    """(N, B, U) int64 token ids padded with 0 (the blank); B is the largest number of hypotheses."""
    lens: Tensor
    """(N, B) int64 tokens of each hypothesis."""
    scores: Tensor
    """(N, B) float32 log-probabilities; -inf where an utterance has fewer hypotheses, or no labels."""


@dataclass(frozen=True)
class TextStates:
    """Contextual states of a language model, of the reference texts of a batch."""

    values: Tensor
    """(N, M, C) float32 padded with 0: one state a unit, the end of the text included."""
    lens: Tensor
    """(N,) int64 units M of each utterance; 0: it has none and is left out of distillation."""
    owner: Tensor
    """(N, U) int64: which of the M units token u belongs to, the end token included (U = y_lens + 1); -100 beyond."""


@dataclass(frozen=True)
class Batch:
    """A batch of N utterances; fields that a consumer does not need may be absent."""

    ids: list[str]
    """Utterance ids for messages and recogs files (never used to find labels)."""
    keys: list[str] = field(default_factory=list)
    """Audio label keys (labels/keys.py)."""
    features: Tensor | None = None
    """(N, T, C) float32, padded with LOG_EPS (before augmentation)."""
    x_lens: Tensor | None = None
    """(N,) int64: valid frames T of each utterance."""
    audio: Tensor | None = None
    """(N, S) float32 clean audio at 16 kHz padded with 0: what a teacher hears."""
    audio_lens: Tensor | None = None
    """(N,) int64: valid samples."""
    texts: list[str] = field(default_factory=list)
    """Normalised transcripts."""
    y: Tensor | None = None
    """(N, U) int64 token ids padded with 0 (the blank)."""
    y_lens: Tensor | None = None
    """(N,) int64."""
    labels: dict[str, Labels | TopK | NBest | TextStates] = field(default_factory=dict)
    """Teacher labels by label set name."""
    durations: list[float] = field(default_factory=list)
    """Seconds of audio."""
    position: dict[str, Any] | None = None
    """Where the streams of a Shar stand after this batch (data/stream.py: Position); None: it is of no stream."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch with every tensor on ``device``."""

        def move(value):
            if isinstance(value, Labels | TopK | NBest | TextStates):
                return type(value)(*(move(getattr(value, f.name)) for f in dataclasses.fields(value)))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        fields = {f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "labels"}
        return Batch(**fields, labels={name: move(x) for name, x in self.labels.items()})

    @classmethod
    def from_audio(cls, waves: Sequence[Tensor], ids: Sequence[str] | None = None) -> "Batch":
        """Make a batch that holds audio alone, from a list of (S_i,) float32 waveforms at 16 kHz."""
        lens = torch.tensor([len(w) for w in waves], dtype=torch.int64)
        audio = torch.nn.utils.rnn.pad_sequence([w.float() for w in waves], batch_first=True)
        ids = list(ids) if ids is not None else [str(i) for i in range(len(waves))]
        return cls(ids=ids, audio=audio, audio_lens=lens)
