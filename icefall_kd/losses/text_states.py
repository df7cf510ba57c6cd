"""A language model's states of reference texts, brought beside the tokens of a batch."""

import torch
from torch import Tensor, nn

from icefall_kd.data.batch import TextStates
from icefall_kd.errors import DataError


class TextUnits:
    """The R units (tokens or words) of a batch that have a state, in the order of utterances and units.

    Attributes:
        values: (R, D) float32 states, which get no gradient.
        rows: (R,) utterance of each unit.
    """

    def __init__(self, text: TextStates, lens: Tensor, num_tokens: int) -> None:
        """Find the units.

        Args:
            text: of the batch.
            lens: (N,) units of each utterance that are wanted, at most ``text.lens``.
            num_tokens: U, tokens of the longest text with its end.
        Raises:
            DataError: the states are of other texts.
        """
        size = text.values.shape[1]
        if text.owner.shape[1] != num_tokens:
            raise DataError(
                f"text states for {text.owner.shape[1]} tokens meet texts of {num_tokens} (ends included): "
                "they were aligned with another tokenizer"
            )
        valid = (text.owner >= 0) & (text.owner < lens.unsqueeze(1))
        self._utterance, self._token = valid.nonzero(as_tuple=True)  # (P,)
        slot = self._utterance * size + text.owner[valid]
        count = torch.zeros(len(lens) * size, device=lens.device).index_add_(0, slot, torch.ones_like(slot).float())
        known = count > 0
        kept = known.nonzero().squeeze(1)
        self._unit = (known.cumsum(0) - 1)[slot]  # (P,) the unit of each token
        self._count = count[kept].unsqueeze(1)
        self._last = torch.zeros_like(kept).scatter_reduce_(0, self._unit, self._token, "amax", include_self=False)
        self.rows = torch.div(kept, max(size, 1), rounding_mode="floor")
        self.values = text.values.detach().flatten(0, 1)[kept].float()

    def __len__(self) -> int:
        return len(self.values)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean (R, C) over each unit's tokens of x (N, U', C)."""
        x = x[self._utterance, self._token]
        return x.new_zeros(len(self), x.shape[1]).index_add(0, self._unit, x) / self._count

    def last(self, x: Tensor) -> Tensor:
        """Return what x (N, U', C) holds at the last token of each unit, (R, C)."""
        return x[self.rows, self._last]


class Standardise(nn.Module):
    """Shift and scale every channel to mean 0 and variance 1 over all rows seen in training so far (our design)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(dim, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, D) float32 rows; in training they are counted first."""
        if self.training and len(x):
            rows = x.detach().double()
            mean, total = rows.mean(dim=0), self.count + len(rows)
            step = mean - self.mean
            self.squares += (rows - mean).square().sum(dim=0) + step.square() * (self.count * len(rows) / total)
            self.mean += step * (len(rows) / total)
            self.count += len(rows)
        variance = self.squares / self.count.clamp(min=1)
        return ((x - self.mean) * (variance + 1e-5).rsqrt()).float()
