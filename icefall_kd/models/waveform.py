"""The convolutional front end of wav2vec 2.0: samples to vectors of 20 ms (Baevski et al. 2020, arXiv 2006.11477)."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import DataError
from icefall_kd.frames import SSL_CONV, FrameFormula, algorithmic_latency, chunk_num_samples, waveform_seconds
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_pad_mask

FIRST_CONV = FrameFormula(kernels=SSL_CONV.kernels[:1], strides=SSL_CONV.strides[:1])


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x, whose gradient will be scaled."""
    return x if scale == 1.0 else x.detach() + (x - x.detach()) * scale


class WaveformFrontEnd(nn.Module):
    """Seven convolutions over samples, LayerNorm, projection; hop 320 samples, receptive field 400 at 16 kHz.

    The convolutions have neither padding nor biases, so that valid frames see valid samples alone.  ``norm``:
    "layer_norm", over the channels behind every convolution (the LARGE model's), or "default", a normalisation of
    every channel over the whole utterance behind the first one (a GroupNorm of as many groups as channels, the BASE
    model's), which sees the future and serves no stream.  Ours: its statistics leave padding out.

    Args:
        dim: channels C of the encoder.
        channels: of the convolutions, or of each.
        norm: see above.
        dropout: behind the projection.
        grad_scale: factor on the gradient that :meth:`forward` hands to the convolutions.
        convolutions: their kernels and strides, which give as many frames as SSL_CONV.
        output_norm: LayerNorm in front of the projection; HuBERT's students do without.
    """

    def __init__(
        self,
        dim: int,
        channels: int | Sequence[int] = 512,
        norm: str = "layer_norm",
        dropout: float = 0.1,
        grad_scale: float = 1.0,
        convolutions: FrameFormula = SSL_CONV,
        output_norm: bool = True,
    ) -> None:
        super().__init__()
        self.kind, self.grad_scale = norm, grad_scale
        widths = [channels] * len(convolutions.kernels) if isinstance(channels, int) else list(channels)
        sizes = zip([1, *widths], widths, convolutions.kernels, convolutions.strides, strict=False)
        self.convolutions = nn.ModuleList(nn.Conv1d(*size, bias=False) for size in sizes)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)
        normed = widths if norm == "layer_norm" else widths[:1]
        self.inner_norms = nn.ModuleList(nn.LayerNorm(width) for width in normed)
        self.norm = nn.LayerNorm(widths[-1]) if output_norm else nn.Identity()
        self.out = nn.Linear(widths[-1], dim)
        self.dropout = Dropout(dropout)

    # Frame arithmetic of this front end; its input is counted in samples.
    hop = SSL_CONV.hop
    window = staticmethod(chunk_num_samples)
    frame_seconds = staticmethod(waveform_seconds)
    latency = staticmethod(functools.partial(algorithmic_latency, waveform=True))

    @staticmethod
    def output_lens(num_samples):
        """Return T' for S samples, an int or an integer tensor (N,)."""
        return frame_lens(SSL_CONV, num_samples)

    @property
    def channels(self) -> int:
        """Return the channels of :meth:`project`."""
        return self.out.in_features

    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map samples (N, S) of which (N,) are valid to (N, T', C) vectors and (N,) their lengths."""
        z, lens = self.project(audio, audio_lens)
        return self.finish(self.norm(scale_gradient(z, self.grad_scale))), lens

    def forward_chunk(self, audio: Tensor, audio_lens: Tensor) -> Tensor:
        """Map the samples of one chunk to its frames (N, C, C'), equal to those of :meth:`forward` for the utterance.

        Args:
            audio: (N, 320 (C - 1) + 400) samples from 320 p on, for a chunk that begins at frame p.
            audio_lens: (N,) those of them that belong to the utterance.
        """
        return self.finish(self.norm(self.project(audio, audio_lens)[0]))

    def freeze(self) -> None:
        """Keep the convolutions as they are from now on; the last LayerNorm and the projection learn on."""
        for module in (self.convolutions, self.inner_norms):
            module.requires_grad_(False)

    def finish(self, z: Tensor) -> Tensor:
        """Map normalised features (N, T', channels) to the encoder's input (N, T', C)."""
        return self.dropout(self.out(z))

    def project(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the convolutions alone.

        Args:
            audio: (N, S) float32 samples in [-1, 1].
            audio_lens: (N,) valid ones.
        Returns:
            (N, T', channels) before the last LayerNorm, and (N,) valid frames.
        Raises:
            DataError: S is too short for one frame.
        """
        if audio.shape[1] < SSL_CONV.receptive_field:
            raise DataError(
                f"a batch of {audio.shape[1]} samples gives no frame; utterances need {SSL_CONV.receptive_field}"
            )
        x = audio.unsqueeze(1)  # (N, 1, S)
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if self.kind == "layer_norm":
                x = self.inner_norms[i](x.transpose(1, 2)).transpose(1, 2)  # (N, C, T) -> (N, T, C) -> (N, C, T)
            elif i == 0:
                x = _over_time(x, frame_lens(FIRST_CONV, audio_lens), self.inner_norms[0])
            x = F.gelu(x)
        return x.transpose(1, 2), frame_lens(SSL_CONV, audio_lens)


def frame_lens(formula: FrameFormula, num_samples):
    """Return the frames of a number of samples, an int or an integer tensor (N,); the formula pads no right end."""
    if isinstance(num_samples, int):
        return formula.num_frames(num_samples)
    lens = num_samples + formula.pad
    for kernel, stride in zip(formula.kernels, formula.strides, strict=True):  # in tensors, which a tracer can follow
        lens = (torch.div(lens - kernel, stride, rounding_mode="floor") + 1).clamp(min=0)
    return lens


def _over_time(x: Tensor, lens: Tensor, affine: nn.LayerNorm) -> Tensor:
    """Normalise every channel of (N, C, T) over the valid frames, and apply the gain and bias (C,) of ``affine``."""
    with torch.autocast(x.device.type, enabled=False):
        valid = ~make_pad_mask(lens, x.shape[2]).unsqueeze(1)  # (N, 1, T)
        x, count = x.float(), lens.clamp(min=1).view(-1, 1, 1)
        centred = (x - (x * valid).sum(dim=2, keepdim=True) / count) * valid
        variance = centred.square().sum(dim=2, keepdim=True) / count
        x = centred * (variance + affine.eps).rsqrt()
        return x * affine.weight.unsqueeze(1) + affine.bias.unsqueeze(1)
