"""Greedy search for CTC (Graves et al. 2006, best path decoding), batched."""

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis
from icefall_kd.errors import ConfigError


class CtcGreedySearch:
    """Take the best symbol of every frame, merge repeats, drop blanks.

    Args:
        model: TransducerModel with a CTC head, in evaluation mode.
        blank_id: id of the blank.
        unk_id: dropped from the output; None: kept.
        end_id: of models whose CTC head writes the end of the text: cut off there; None: others.
    """

    def __init__(
        self, model, *, blank_id: int = 0, unk_id: int | None = UNK_ID, end_id: int | None = None
    ) -> None:
        if model.ctc_output is None:
            raise ConfigError(
                "the model has no CTC head (it was trained with --ctc-scale 0); "
                "decode it with --decoding-method greedy_search"
            )
        self.model = model
        self.blank_id = blank_id
        self.unk_id = unk_id
        self.end_id = end_id

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "CtcGreedySearch":
        """Return the search; no option of decode.py concerns it."""
        return cls(model)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return one hypothesis an utterance.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of one :class:`Hypothesis`; the score is the log-probability of the best path, the
            timestamp of a token the first frame of its run.
        """
        log_probs = self.model.ctc_output(encoder_out).float().log_softmax(dim=-1)  # (N, T', V)
        best, symbols = log_probs.max(dim=-1)
        lens = encoder_out_lens.to(best.device)
        valid = torch.arange(best.size(1), device=best.device) < lens[:, None]
        scores = best.masked_fill(~valid, 0.0).sum(dim=1).tolist()
        starts = valid & (symbols != self.blank_id)
        starts[:, 1:] &= symbols[:, 1:] != symbols[:, :-1]
        if self.unk_id is not None:
            starts &= symbols != self.unk_id
        starts, symbols = starts.cpu(), symbols.cpu()
        result = []
        for i, score in enumerate(scores):
            times = starts[i].nonzero().squeeze(1)
            if self.end_id is not None:
                times = times[: len(times) - int((symbols[i][times] == self.end_id).cumsum(0).gt(0).sum())]
            result.append([Hypothesis(symbols[i][times].tolist(), score, times.tolist())])
        return result
