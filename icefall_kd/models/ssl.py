"""What wav2vec 2.0 puts around an encoder: masked spans, quantised targets, and the contrastive task.

Baevski et al. 2020, arXiv 2006.11477, with the constants of its public code (fairseq).  Masks and negatives
are drawn from a generator of the CPU, so that they are the same on every device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import ModelConfig, SslConfig
from icefall_kd.errors import DataError
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.waveform import WaveformFrontEnd


def sample_spans(
    lens: Tensor, max_len: int, probability: float, span: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which frames are masked: spans that may overlap, and equally many frames of every utterance.

    Of an utterance of T frames int(probability * T / span + u) spans, u uniform in [0, 1), and at least two begin at
    different frames, each as likely as any other (section 3.1 and appendix A of the paper; in the public code as many
    starts are drawn).  Then every utterance loses masked frames at random until all have as many as the least.

    Args:
        lens: (N,) valid frames.
        max_len: T of the mask.
        probability: share of frames that would be masked if no two spans overlapped.
        span: frames.
        generator: of the CPU; None: torch's own.
    Returns:
        (N, T) bool on the CPU, True at masked frames, never beyond the lengths.
    Raises:
        DataError: an utterance is not longer than a span.
    """
    rows: list[Tensor] = []
    for length in lens.tolist():
        if length - span < 1:
            raise DataError(
                f"an utterance of {length} encoder frames cannot hold two different spans of {span} masked frames; "
                "raise --min-utt-duration, or lower --mask-span"
            )
        rows.append(_spans(length, probability, span, 2, generator))
    least = min(len(row) for row in rows)
    mask = torch.zeros(len(rows), max_len, dtype=torch.bool)
    for n, row in enumerate(rows):
        mask[n, row[torch.randperm(len(row), generator=generator)[:least]]] = True
    return mask


def _spans(length: int, probability: float, span: int, least: int, generator: torch.Generator | None) -> Tensor:
    """Return the places of masked spans that begin at different ones of ``length``, ``least`` of them or more."""
    count = max(least, int(probability * length / span + torch.rand((), generator=generator).item()))
    starts = torch.randperm(length - span + 1, generator=generator)[:count]
    return (starts.unsqueeze(1) + torch.arange(span)).unique()


def sample_rows(lens: list[int], width: int, probability: float, span: int, least: int = 0) -> Tensor:
    """Draw masks of :func:`sample_spans` for fine-tuning: every row keeps as many as it drew, on torch's generator.

    Args:
        lens: N lengths; a row that is shorter than a span is not masked.
        width: W of the mask.
        probability, span: see there.
        least: spans of a row.
    Returns:
        (N, W) bool on the CPU.
    """
    mask = torch.zeros(len(lens), width, dtype=torch.bool)
    for n, length in enumerate(lens):
        if length >= span:
            mask[n, _spans(length, probability, span, least, None)] = True
    return mask


def sample_negatives(batch_size: int, num_masked: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw for every masked frame other masked frames of the same utterance, uniformly with replacement.

    Args:
        batch_size: N.
        num_masked: M masked frames of each utterance, at least 2.
        count: K.
        generator: of the CPU; None: torch's own.
    Returns:
        (N, M, K) int64 on the CPU, numbers of masked frames in 0 ... M - 1, never the frame's own.
    """
    drawn = torch.randint(num_masked - 1, (batch_size, num_masked, count), generator=generator)
    return drawn + (drawn >= torch.arange(num_masked).unsqueeze(1))


def gumbel_temperature(step: int, start: float, end: float, decay: float) -> float:
    """Return the temperature of the Gumbel softmax at a step (from 0): it falls by a factor a step, to a floor."""
    return max(start * decay**step, end)


@dataclass(frozen=True)
class Quantized:
    """Targets of M frames of N utterances, and how the codebooks are used."""

    targets: Tensor
    """(N, M, E) float32."""
    codes: Tensor
    """(N, M, G) int64: the entry chosen of every codebook; equal codes are equal targets."""
    diversity_loss: Tensor
    """Scalar in [0, 1): 1 - perplexity / (G V) (eq. 4 of the paper in the form of the public code)."""
    perplexity: Tensor
    """Scalar, summed over the G codebooks: of the mean softmax over all frames, without noise; G V at best."""
    code_perplexity: Tensor
    """Scalar, summed over the codebooks: of the entries that were chosen."""


def _perplexity(probs: Tensor) -> Tensor:
    """Return the sum over G of the perplexities of (G, V) distributions."""
    return (-(probs * (probs + 1e-7).log()).sum(dim=-1)).exp().sum()


class GumbelQuantizer(nn.Module):
    """Choose one entry of each of G codebooks by a straight-through Gumbel softmax (section 2 of the paper).

    Args:
        dim: channels of the frames.
        groups: codebooks G.
        entries: V of each.
        out_dim: E of the targets; an entry has E / G channels.
    """

    def __init__(self, dim: int, groups: int, entries: int, out_dim: int) -> None:
        super().__init__()
        self.groups, self.entries = groups, entries
        self.choice = nn.Linear(dim, groups * entries)
        nn.init.normal_(self.choice.weight)
        nn.init.zeros_(self.choice.bias)
        self.codebooks = nn.Parameter(torch.rand(groups, entries, out_dim // groups))
        self.out = nn.Linear(out_dim, out_dim)

    def forward(self, z: Tensor, temperature: float) -> Quantized:
        """Quantise M frames of N utterances.

        Args:
            z: (N, M, C), unmasked.
            temperature: of the Gumbel softmax; the evaluation takes the largest logit.
        """
        with torch.autocast(z.device.type, enabled=False):
            logits = self.choice(z.float()).unflatten(-1, (self.groups, self.entries))  # (N, M, G, V)
            if self.training:
                # Minus the logarithm of an exponential variable is a Gumbel variable.
                noise = torch.empty_like(logits).exponential_().clamp_(min=1e-30).log()
                soft = ((logits - noise) / temperature).softmax(dim=-1)
                codes = soft.argmax(dim=-1)
                hard = F.one_hot(codes, self.entries).float() + (soft - soft.detach())
            else:
                codes = logits.argmax(dim=-1)
                hard = F.one_hot(codes, self.entries).float()
            chosen = torch.einsum("nmgv,gve->nmge", hard, self.codebooks)  # (N, M, G, E / G)
            perplexity = _perplexity(logits.softmax(dim=-1).mean(dim=(0, 1)))
            return Quantized(
                targets=self.out(chosen.flatten(2)),
                codes=codes,
                diversity_loss=1.0 - perplexity / (self.groups * self.entries),
                perplexity=perplexity.detach(),
                code_perplexity=_perplexity(F.one_hot(codes, self.entries).float().mean(dim=(0, 1))),
            )


def contrastive_logits(
    context: Tensor, targets: Tensor, codes: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """Return the cosines of each masked frame's context to its target and to its negatives, over a temperature.

    Eq. 3 of the paper.  Negatives of the same codes as the target get -inf.  All M x M cosines of an utterance are
    made and those of the negatives picked: the same as gathering K vectors a frame, with M / (K E) of its memory.

    Args:
        context: (N, M, E).
        targets: (N, M, E).
        codes: (N, M, G) of the targets.
        negatives: (N, M, K) of :func:`sample_negatives`.
        temperature: 0.1 in the paper.
    Returns:
        (N, M, K + 1) float32, the target first.
    """
    with torch.autocast(context.device.type, enabled=False):
        context, targets = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (context, targets))
        cosines = context @ targets.transpose(1, 2)  # (N, M, M)
        same = (codes.unsqueeze(2) == codes.unsqueeze(1)).all(dim=-1)  # (N, M, M)
        positive = cosines.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        others = cosines.gather(2, negatives).masked_fill(same.gather(2, negatives), -torch.inf)
        return torch.cat([positive, others], dim=-1) / temperature


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log softmax of the target (N, M) in nats, and whether it beats every negative (N, M) bool."""
    wins = (logits[..., :1] > logits[..., 1:]).all(dim=-1)
    return logits.logsumexp(dim=-1) - logits[..., 0], wins


def contrastive_kd(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of the two modes' distributions over the same candidates (our design).

    Args:
        teacher: (N, M, K + 1) logits, which get no gradient.
        student: (N, M, K + 1) logits with -inf at the same places.
    Returns:
        (N, M) in nats.
    """
    left_out = teacher.isneginf()
    log_p, log_q = teacher.detach().log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q).masked_fill(left_out, 0.0)).sum(dim=-1)


class SslModel(nn.Module):
    """An encoder, and around it the modules that self-supervised training alone needs.

    The encoder is a Conformer with relative positions, where wav2vec 2.0 has a Transformer with a convolution for
    positions, which no stream could compute (our design).  With the waveform front end, that stands in the place of the
    encoder's subsampling, and the encoder maps samples to frames of 20 ms.

    Args:
        model: sizes of the encoder.
        cfg: front end, quantiser and targets.
    """

    def __init__(self, model: ModelConfig, cfg: SslConfig) -> None:
        super().__init__()
        self.encoder = Conformer(model)
        set_front_end(self.encoder, cfg)
        dim, front = self.encoder.dim, self.encoder.subsampling
        self.mask_embedding = nn.Parameter(torch.rand(dim))
        self.quantizer = GumbelQuantizer(front.channels, cfg.codebook_groups, cfg.codebook_entries, cfg.target_dim)
        self.context_out = nn.Linear(dim, cfg.target_dim)


def set_front_end(encoder: Conformer, cfg: SslConfig) -> None:
    """Give an encoder the front end that the options name, in place."""
    if cfg.front_end == "waveform":
        encoder.subsampling = WaveformFrontEnd(
            encoder.dim, cfg.extractor_channels, cfg.extractor_norm, encoder.cfg.dropout, cfg.feature_grad_scale
        )
