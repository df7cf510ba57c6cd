"""Beam search of the autoregressive model by attention decoder and CTC together, batched over utterances and beam.

Watanabe et al. 2017, "Hybrid CTC/attention architecture for end-to-end speech recognition": hypotheses grow token by
token, each ranked by the decoder's log-probability and by CTC's of all strings that begin with it.  A hypothesis never
gains by growing, so the search ends when the best one that is still open cannot beat those that have ended.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis
from icefall_kd.decode.ctc_string import unknown_as_blank
from icefall_kd.errors import ConfigError
from icefall_kd.models.attention_decoder import DecoderCache
from icefall_kd.models.masks import make_pad_mask

# A token string as a linked list: (all but the last token, last token); None: the empty one.
Linked = tuple["Linked", int] | None
Scored = tuple[float, Linked]


class CtcPrefixScorer:
    """What CTC says of strings that begin with a prefix, of N utterances and G prefixes of each.

    The state of a prefix are the log-probabilities of its alignments up to each frame, those that end in a blank and
    those that end in its last token: float64 (N, G, T' + 1), the first column before the first frame.  Their recursions
    over frames are sums of products, so a cumulative log-sum does all frames at once (our design).
    """

    def __init__(self, log_probs: Tensor, lens: Tensor, blank_id: int) -> None:
        """Begin with the empty prefix.

        Args:
            log_probs: (N, T', V).
            lens: (N,) valid frames.
            blank_id: column of the blank.
        """
        self.padding = make_pad_mask(lens, log_probs.shape[1])
        # Behind the end nothing is said and the blank is certain: the last column is then that of the last frame.
        log_probs = log_probs.masked_fill(self.padding.unsqueeze(2), -torch.inf)
        self.blanks = log_probs[..., blank_id].masked_fill(self.padding, 0.0).double().cumsum(dim=1)  # (N, T')
        self.blanks = F.pad(self.blanks, (1, 0)).unsqueeze(1)  # (N, 1, T' + 1)
        self.log_probs, self.probs = log_probs, log_probs.exp()
        self.in_blank, self.in_token = self.blanks, torch.full_like(self.blanks, -torch.inf)
        self.last: Tensor | None = None  # (N, G), None: of the empty prefix

    def keep(self, rows: Tensor) -> None:
        """Go on with these utterances alone, by their numbers."""
        for name in ("padding", "blanks", "log_probs", "probs", "in_blank", "in_token", "last"):
            setattr(self, name, getattr(self, name)[rows])

    def reorder(self, order: Tensor) -> None:
        """Put the prefixes of each utterance into another order (N, G)."""
        index = order.unsqueeze(2).expand(*order.shape, self.blanks.shape[2])
        self.in_blank, self.in_token = self.in_blank.gather(1, index), self.in_token.gather(1, index)
        self.last = self.last.gather(1, order)

    def whole(self) -> Tensor:
        """Return the log-probability (N, G) of each prefix as the whole string."""
        return torch.logaddexp(self.in_blank[..., -1], self.in_token[..., -1])

    def continuations(self) -> Tensor:
        """Return the log-probability (N, G, V) float32 of strings that begin with each prefix and each token.

        What lies 87 nats below the prefix is cut off there; :meth:`advance` gives the exact figure.
        """
        total = torch.logaddexp(self.in_blank, self.in_token)[..., :-1]  # (N, G, T')
        scores = self._weighted(total, self.probs)
        if self.last is not None:  # a repeated token needs a blank before it
            after, (n, g) = self.in_blank[..., :-1], self.last.shape
            own = self._said(self.last)  # (N, G, T')
            again = torch.logsumexp(after + own, dim=2, keepdim=True).to(scores.dtype)
            scores = scores.scatter(2, self.last.view(n, g, 1), again)
        return scores

    @staticmethod
    def _weighted(log_weights: Tensor, probs: Tensor) -> Tensor:
        """Return the logarithm of the sum over frames of weights (N, G, T') times ``probs`` (N, T', V)."""
        top = log_weights.amax(dim=2, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        sums = torch.bmm((log_weights - top).exp().to(probs.dtype), probs)
        return sums.clamp(min=torch.finfo(probs.dtype).tiny).log() + top.to(probs.dtype)

    def _said(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities (N, G, T') of one token (N, G) of each prefix."""
        index = tokens.unsqueeze(1).expand(-1, self.log_probs.shape[1], -1)
        return self.log_probs.gather(2, index).transpose(1, 2).double()

    def advance(self, sources: Tensor, tokens: Tensor) -> Tensor:
        """Let prefixes grow.

        Args:
            sources: (N, G') which prefix each new one continues.
            tokens: (N, G') by what.
        Returns:
            (N, G') float64 log-probability of strings that begin with the new prefix.
        """
        index = sources.unsqueeze(2).expand(*sources.shape, self.blanks.shape[2])
        in_blank, in_token = self.in_blank.gather(1, index), self.in_token.gather(1, index)
        before = torch.logaddexp(in_blank, in_token)
        if self.last is not None:
            repeated = self.last.gather(1, sources) == tokens
            before = torch.where(repeated.unsqueeze(2), in_blank, before)
        before, said = before[..., :-1], self._said(tokens)  # (N, G', T')
        padding = self.padding.unsqueeze(1)
        run = said.masked_fill(padding, 0.0).cumsum(dim=2)
        begun = before - F.pad(run, (1, 0))[..., :-1]
        in_token = (torch.logcumsumexp(begun, dim=2) + run).masked_fill(padding, -torch.inf)
        in_token = F.pad(in_token, (1, 0), value=-torch.inf)
        closed = torch.logcumsumexp(in_token - self.blanks, dim=2)
        self.in_blank = F.pad(closed[..., :-1], (1, 0), value=-torch.inf) + self.blanks
        self.in_token, self.last = in_token, tokens
        return torch.logsumexp(before + said, dim=2)


class JointBeamSearch:
    """Label-synchronous beam search over w times the CTC prefix score plus (1 - w) times the decoder's.

    Every token of the vocabulary is weighed by both; blank, unknown and mask are never emitted.  With w = 0 CTC is not
    asked, with w = 1 the decoder is not run and a score is CTC's log-probability of the string.

    Args:
        model: CtcAttentionModel with an autoregressive decoder, in evaluation mode.
        beam_size: open hypotheses an utterance.
        nbest: hypotheses returned, at most ``beam_size``.
        ctc_weight: w.
    Raises:
        ConfigError: the decoder is a mask-predicting one.
    """

    def __init__(self, model, beam_size: int = 4, *, nbest: int = 1, ctc_weight: float = 0.3) -> None:
        if not model.decoder.causal:
            raise ConfigError(
                "this model's decoder fills masks in (--attention-decoder mlm) and has no next token; "
                "decode it with --decoding-method mask_predict or nar_beam_search"
            )
        self.model, self.beam_size, self.nbest, self.ctc_weight = model, beam_size, min(nbest, beam_size), ctc_weight

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "JointBeamSearch":
        """Return the search that the options of decode.py describe."""
        return cls(model, config.beam_size, nbest=config.nbest, ctc_weight=config.joint_ctc_weight)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the n-best list of each utterance.

        The score is w log P_ctc(string) + (1 - w) log P_att(string, end), natural logarithms, without normalisation.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,); no hypothesis has more tokens than frames.
        Returns:
            N lists of up to ``nbest`` different :class:`Hypothesis`, best first, without timestamps.
        """
        frames = encoder_out_lens.tolist()
        ended: list[list[Scored]] = [[] for _ in frames]
        rows = [i for i, length in enumerate(frames) if length]
        if rows:
            at = torch.tensor(rows, device=encoder_out.device)
            self._search(encoder_out[at], encoder_out_lens.to(at.device)[at], rows, ended)
        for i, length in enumerate(frames):
            if not length:
                ended[i] = [(0.0, None)]
        return [[Hypothesis(_unlink(string), score) for score, string in hyps] for hyps in ended]

    def _search(self, encoder_out: Tensor, lens: Tensor, rows: list[int], ended: list[list[Scored]]) -> None:
        """Fill ``ended[i]`` with the n-best of each utterance ``i`` of ``rows``."""
        model, w = self.model, self.ctc_weight
        ctc = cache = None
        if w > 0:
            log_probs = unknown_as_blank(model.ctc_log_probs(encoder_out), model.blank_id)
            ctc = CtcPrefixScorer(log_probs, lens, model.blank_id)
        if w < 1:
            cache = model.decoder.start(model.decoder.memory(encoder_out, lens), len(rows))
        frames, opened = lens.tolist(), [[None] for _ in rows]
        attention = torch.zeros(len(rows), 1, dtype=torch.float64, device=encoder_out.device)
        tokens = torch.full_like(attention, model.sos_id, dtype=torch.int64)
        for length in range(max(frames) + 1):
            following = self._following(tokens, cache)
            ends, width = self._ends(attention, following, ctc).tolist(), attention.shape[1]
            sources, tokens, attention, totals = self._grow(attention, following, ctc)
            bests = zip(sources.tolist(), tokens.tolist(), totals.tolist(), strict=True)
            rest = []
            for k, (source, token, total) in enumerate(bests):
                done = ended[rows[k]]
                done += [end for end in zip(ends[k], opened[k], strict=True) if end[0] > -torch.inf]
                done.sort(key=lambda x: -x[0])
                del done[self.nbest :]
                beaten = len(done) == self.nbest and done[-1][0] >= total[0]
                if length < frames[k] and total[0] > -torch.inf and not beaten:
                    opened[k] = [(opened[k][s], t) for s, t in zip(source, token, strict=True)]
                    rest.append(k)
            if not rest:
                return
            some = torch.tensor(rest, device=tokens.device)
            if cache is not None:
                cache.reorder((some.unsqueeze(1) * width + sources[some]).flatten())
            if len(rest) < len(rows):
                rows, frames, opened = ([x[k] for k in rest] for x in (rows, frames, opened))
                tokens, attention = tokens[some], attention[some]
                if ctc is not None:
                    ctc.keep(some)
                if cache is not None:
                    cache.memory = cache.memory.select(some)

    def _following(self, tokens: Tensor, cache: DecoderCache | None) -> Tensor | None:
        """Return the decoder's log-probabilities (N, G, V) of what follows, None without a decoder."""
        if cache is None:
            return None
        logits = self.model.decoder.step(tokens.flatten(), cache)
        return logits.float().log_softmax(dim=-1).view(*tokens.shape, -1)

    def _ends(self, attention: Tensor, following: Tensor | None, ctc: CtcPrefixScorer | None) -> Tensor:
        """Return the scores (N, G) of the open hypotheses as whole strings."""
        scores = torch.zeros_like(attention)
        if following is not None:
            scores += (1 - self.ctc_weight) * (attention + following[..., self.model.sos_id].double())
        if ctc is not None:
            scores += self.ctc_weight * ctc.whole()
        return scores.masked_fill(attention == -torch.inf, -torch.inf)

    def _grow(
        self, attention: Tensor, following: Tensor | None, ctc: CtcPrefixScorer | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the best continuations.

        Args:
            attention: (N, G) float64 decoder's log-probabilities of the hypotheses; minus infinity: no hypothesis.
            following: (N, G, V) of :meth:`_following`.
            ctc: the scorer, which goes on to the new hypotheses.
        Returns:
            (N, B) which hypothesis each new one continues; its token; the decoder's log-probability; the joint one.
        """
        model, w = self.model, self.ctc_weight
        joint = attention.unsqueeze(2).float()
        if following is not None:
            joint = (1 - w) * (joint + following)
        if ctc is not None:
            joint = joint + w * ctc.continuations()
        silent = torch.tensor([model.blank_id, model.sos_id, UNK_ID, model.mask_id], device=joint.device)
        joint = joint.index_fill(2, silent, -torch.inf).flatten(1)
        chosen, index = joint.topk(min(self.beam_size, joint.shape[1]), dim=1)
        sources, tokens = index // model.vocab_size, index % model.vocab_size
        none = chosen == -torch.inf  # fewer continuations than the beam has room for
        tokens, gained = tokens.masked_fill(none, model.mask_id), attention.gather(1, sources)
        gained = gained.masked_fill(none, -torch.inf)
        totals = gained
        if following is not None:
            gained = gained + following.flatten(1).gather(1, index).double()
            totals = (1 - w) * gained
        if ctc is not None:
            totals = totals + w * ctc.advance(sources, tokens)
        # What was chosen in float32 is ranked in float64; a string that does not fit in the frames is none.
        gained = gained.masked_fill(totals == -torch.inf, -torch.inf)
        totals, order = totals.sort(dim=1, descending=True, stable=True)
        if ctc is not None:
            ctc.reorder(order)
        sources, tokens, gained = (x.gather(1, order) for x in (sources, tokens, gained))
        return sources, tokens, gained, totals


def _unlink(string: Linked) -> list[int]:
    tokens = []
    while string is not None:
        string, token = string
        tokens.append(token)
    return tokens[::-1]
