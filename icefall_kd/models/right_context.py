"""Copies of the frames behind a chunk: right context that stays the same at every depth.

A mask that lets a frame see beyond its chunk adds up over layers; copies of these frames that are encoded with the
chunk, and belong to it alone, do not (Shi et al. 2021, Emformer, arXiv 2010.10759).  The layout is our design.
"""

import torch
from torch import Tensor

from icefall_kd.models.masks import chunk_mask
from icefall_kd.models.streaming import Chunks


class Copies:
    """How T frames and behind them the copies of every chunk lie in one sequence of L = T + ceil(T / C) R frames.

    Frame i < T is frame i of the utterance; frame T + k R + r is the copy of its frame (k + 1) C + r that belongs to
    chunk k, where the utterance has such a frame.

    Args:
        num_frames: T.
        chunks: finite chunk size C, and the left context.
        count: R, copies of each chunk.
        device: of the indices.
    """

    def __init__(self, num_frames: int, chunks: Chunks, count: int, device: torch.device | str = "cpu") -> None:
        self.num_frames, self.chunks, self.count = num_frames, chunks, count
        frames = torch.arange(num_frames, device=device)
        chunk = torch.arange(-(-num_frames // chunks.chunk_size), device=device)
        copied = (chunk + 1).unsqueeze(1) * chunks.chunk_size + torch.arange(count, device=device)  # (chunks, R)
        self.position = torch.cat([frames, copied.flatten()])
        """(L,) place in the utterance; of copies, it may be behind the end."""
        self.chunk = torch.cat([frames // chunks.chunk_size, chunk.repeat_interleave(count)])
        """(L,) the chunk that each belongs to."""
        self.source = self.position.clamp(max=num_frames - 1)
        """(L,) the frame of the utterance that stands here; where ``position`` is behind the end, any."""
        # Distance d stands in row T - 1 - d of the embeddings of T frames (models/attention.py: RelativePositions).
        self.columns = num_frames - 1 - (self.source.unsqueeze(1) - self.source)
        """(L, L) the row of the embeddings that holds the distance of query and key."""

    def allowed(self) -> Tensor:
        """Return (L, L) bool: chunk k and its copies see chunk k, its left context, and its copies."""
        begin = self.chunk * self.chunks.chunk_size
        frames = chunk_mask(begin, self.position[: self.num_frames], *self.chunks)
        return torch.cat([frames, self.chunk.unsqueeze(1) == self.chunk[self.num_frames :]], dim=1)

    def padding(self, lens: Tensor) -> Tensor:
        """Return (N, L) bool, True behind the end of utterances of (N,) frames; such copies do not exist."""
        return self.position >= lens.unsqueeze(1)
