"""What a search returns and what every search offers to the runner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

# The tokenizer's fixed id of the unknown token: a search never emits it, it acts like the blank.
UNK_ID = 2


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis of an utterance."""

    tokens: list[int]
    """Token ids without blanks; empty when nothing was recognised."""
    score: float
    """Natural log-probability of the hypothesis, as the search that made it defines it."""
    timestamps: list[int] | None = None
    """Encoder frame (0-based) at which each token was emitted."""
    text: str | None = None
    """Words of a search over a graph that has them; None: the tokens spell the text."""
    masked: int | None = None
    """How many tokens of the CTC string were masked, of a search that masks."""


@runtime_checkable
class Decoder(Protocol):
    """A batched search over encoder output, on whatever device that output lies."""

    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of every utterance, best first, never empty.

        Args:
            encoder_out: encoder output (N, T', C); frames beyond the lengths are ignored.
            encoder_out_lens: (N,) valid frames, 0 <= length <= T'; an utterance without a frame
                gets the empty hypothesis with score 0.
        Returns:
            N lists of hypotheses.
        """
        ...


@runtime_checkable
class StatefulDecoder(Decoder, Protocol):
    """A search that also goes on from a state, chunk by chunk; ``decode`` is start, advance and result."""

    def start(self, n: int) -> Any:
        """Return the state of ``n`` streams of which nothing has been heard."""
        ...

    def advance(self, state: Any, encoder_out: Tensor, encoder_out_lens: Tensor) -> None:
        """Consume the next frames of each stream, changing ``state``.

        Args:
            state: what ``start`` returned.
            encoder_out: (N, T', C); frames beyond the lengths are ignored.
            encoder_out_lens: (N,) new frames of each stream, 0 <= length <= T'.
        """
        ...

    def result(self, state: Any) -> list[list[Hypothesis]]:
        """Return what ``decode`` would for the frames heard so far, times from the start of each stream.

        The state stays as it is.
        """
        ...


class PrefixScorer(Protocol):
    """A score of token sequences, one token after the other; a state is never changed once it was returned."""

    def start(self) -> Any:
        """Return the state before the first token."""
        ...

    def extend(self, states: Sequence[Any], tokens: Sequence[int]) -> tuple[list[float], list[Any]]:
        """Return what each token adds after its state, scaled, and the states behind the tokens."""
        ...

    def final(self, state: Any) -> float:
        """Return what the end of the sequence adds."""
        ...


def logits_to_scores(logits: Tensor, blank_id: int, blank_penalty: float, temperature: float) -> Tensor:
    """Return the logits whose log-softmax the transducer searches use, in float32.

    The penalty is subtracted from the blank's logit, then all logits are divided by the temperature.

    Args:
        logits: (..., V), modified in place when it is float32 already.
        blank_id: column of the blank.
        blank_penalty: positive values make blanks rarer (fewer deletions).
        temperature: above 1 flattens the distribution.
    Returns:
        (..., V) float32.
    """
    logits = logits.float()
    if blank_penalty:
        logits[..., blank_id] -= blank_penalty
    return logits if temperature == 1.0 else logits / temperature
