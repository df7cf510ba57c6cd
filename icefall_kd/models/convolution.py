"""The convolution module of the Conformer: whole utterances, chunks, and chunks of a stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.models.dropout import Dropout
from icefall_kd.models.right_context import Copies


class ConvolutionModule(nn.Module):
    """Gated depthwise convolution over time (Gulati et al. 2020, section 2.2).

    LayerNorm stands where the paper has BatchNorm: statistics over a padded batch would make an
    utterance depend on its neighbours, and a stream has no batch.

    What a frame sees, by ``kind``: "full", kernel // 2 frames on both sides; "causal", kernel - 1 frames before it;
    "chunk", kernel // 2 frames on both sides of which those behind its chunk count as zero (dynamic chunk
    convolution, Li et al. 2023, arXiv 2304.09325), so that one kernel serves every chunk size.
    """

    def __init__(self, dim: int, kernel: int, dropout: float, kind: str = "full", bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim, bias=bias)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.dropout = Dropout(dropout)
        self.kind = kind
        self.left = kernel - 1 if kind == "causal" else kernel // 2
        self.right = kernel - 1 - self.left

    def forward(
        self,
        x: Tensor,
        padding: Tensor,
        chunk_size: int = -1,
        cache: Tensor | None = None,
        copies: Copies | None = None,
        ahead: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve over the valid frames.

        Args:
            x: (N, T, C).
            padding: (N, T, 1) bool, True at padding, which enters the convolution as zero.
            chunk_size: frames of a chunk, -1: one chunk; only the kind "chunk" asks.
            cache: (N, left, C) the last inputs of the depthwise convolution before x, which is one chunk; None: x
                is a whole utterance.
            copies: x is a whole utterance and the copies of frames behind its chunks.
            ahead: of x with a cache, frames at its end that come again with the next chunk.
        Returns:
            (N, T, C), and the cache of the next chunk.
        """
        x = F.glu(self.gate(self.norm(x)), dim=-1).masked_fill(padding, 0.0)
        if cache is not None:
            several = ahead > 0 and self.kind == "chunk" and chunk_size < x.shape[1]
            x = torch.cat([cache, x], dim=1)
            end = x.shape[1] - ahead
            cache = x[:, end - self.left : end]
            x = self._depthwise_chunks(x, chunk_size, 0) if several else self._depthwise(x, 0, self.right)
        elif copies is not None:
            x = self._depthwise_copies(x, copies)
        elif self.kind == "chunk" and 0 < chunk_size < x.shape[1]:
            x = self._depthwise_chunks(x, chunk_size, self.left)
        else:
            x = self._depthwise(x, self.left, self.right)
        return self.dropout(self.out(F.silu(self.inner_norm(x)))), cache

    def _depthwise(self, x: Tensor, left: int, right: int) -> Tensor:
        """Convolve (N, T, C) with so many zeros on both sides."""
        # A 2-D convolution of height one over (N, C, 1, T): the permuted view is channels-last memory, for
        # which CPUs have a depthwise kernel that is an order of magnitude faster than conv1d's.
        conv, both = self.depthwise, left if left == right else 0
        if left != right:
            x = F.pad(x, (0, 0, left, right))
        x = x.transpose(1, 2).unsqueeze(2)  # (N, T, C) -> (N, C, 1, T)
        x = F.conv2d(x, conv.weight.unsqueeze(2), conv.bias, padding=(0, both), groups=conv.groups)
        return x.squeeze(2).transpose(1, 2)  # (N, C, 1, T) -> (N, T, C)

    def _depthwise_chunks(self, x: Tensor, chunk_size: int, left: int, behind: Tensor | None = None) -> Tensor:
        """Convolve every chunk of (N, T, C), in front of which ``left`` zeros are put, and zeros behind each.

        Args:
            x: its first ``self.left`` frames, with those zeros, are the ones before the first chunk.
            chunk_size: frames of a chunk.
            left: see above.
            behind: (N, chunks, R, C) frames of which R stand between a chunk and the zeros.
        Returns:
            (N, T', C) frames of the chunks, or (N, chunks, chunk_size + R, C) with ``behind``.
        """
        n, num_frames = x.shape[0], x.shape[1] + left - self.left
        x = F.pad(x, (0, 0, left, -num_frames % chunk_size))
        x = x.unfold(1, self.left + chunk_size, chunk_size).transpose(2, 3)  # (N, chunks, C, W) -> (N, chunks, W, C)
        if behind is not None:
            x = torch.cat([x, behind], dim=2)
        x = self._depthwise(F.pad(x, (0, 0, 0, self.right)).flatten(0, 1), 0, 0)  # (N * chunks, chunk_size, C)
        x = x.unflatten(0, (n, -1))
        return x.flatten(1, 2)[:, :num_frames] if behind is None else x

    def _depthwise_copies(self, x: Tensor, copies: Copies) -> Tensor:
        """Convolve what precedes each chunk of (N, L, C), the chunk and its copies as one sequence."""
        size, num_frames = copies.chunks.chunk_size, copies.num_frames
        x, behind = x[:, :num_frames], x[:, num_frames:].unflatten(1, (-1, copies.count))
        x = self._depthwise_chunks(x, size, self.left, behind)
        return torch.cat([x[:, :, :size].flatten(1, 2)[:, :num_frames], x[:, :, size:].flatten(1, 2)], dim=1)
