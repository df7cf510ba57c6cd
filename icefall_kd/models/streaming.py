"""What a streaming encoder is run with: chunks, drawn in training and chosen in decoding, and the state of a stream."""

from typing import NamedTuple

import torch
from torch import Tensor

from icefall_kd.config import ModelConfig
from icefall_kd.errors import ConfigError


class Chunks(NamedTuple):
    """How far an encoder sees; frames of 40 ms."""

    chunk_size: int
    """Frames that are encoded together; -1: the whole utterance."""
    left_context_frames: int
    """Frames before the chunk that attention sees; -1: all."""


WHOLE_UTTERANCE = Chunks(-1, -1)


class StreamingState(NamedTuple):
    """What an encoder remembers of N streams between two chunks; the layout is that of icefall's Conformer.

    Plain tensors, so that an exported model can take and return them.
    """

    cached_attn: Tensor
    """(layers, left, N, C) last inputs of every attention module."""
    cached_conv: Tensor
    """(layers, K, N, C) last inputs of every depthwise convolution."""
    processed_lens: Tensor
    """(N,) int64: encoder frames before the next chunk."""


def default_chunks(cfg: ModelConfig) -> Chunks:
    """Return what an encoder uses outside training unless it is told otherwise: the first values of the options."""
    return Chunks(cfg.chunk_size[0], cfg.left_context_frames[0]) if cfg.streaming else WHOLE_UTTERANCE


def widest_chunks(cfg: ModelConfig) -> Chunks:
    """Return the most that an encoder was trained to see: what a teacher uses."""
    if not cfg.streaming or -1 in cfg.chunk_size:
        return WHOLE_UTTERANCE
    left = -1 if -1 in cfg.left_context_frames else max(cfg.left_context_frames)
    return Chunks(max(cfg.chunk_size), left)


def draw_chunks(cfg: ModelConfig) -> Chunks:
    """Draw the chunks of a training batch from torch's generator of the CPU.

    Dynamic chunk training (Zhang et al. 2020, arXiv 2012.05481), with the values of two short lists as in icefall's
    streaming Zipformer; a model that is not streaming draws nothing.
    """
    if not cfg.streaming:
        return WHOLE_UTTERANCE
    options = cfg.chunk_size, cfg.left_context_frames
    chunk_size, left = (values[int(torch.randint(len(values), ()))] for values in options)
    return Chunks(chunk_size, left) if chunk_size > 0 else WHOLE_UTTERANCE


def choose_chunks(
    cfg: ModelConfig, chunk_size: int | None, left_context_frames: int | None, chunk_by_chunk: bool = False
) -> Chunks:
    """Return the chunks to decode with.

    Args:
        cfg: options that the model was trained with.
        chunk_size: wanted encoder frames, -1: the whole utterance; None: the model's default.
        left_context_frames: wanted, -1: all; None: the model's default.
        chunk_by_chunk: for decoding with caches, whose size must be finite.
    Raises:
        ConfigError: the model was not trained for that; says what it was trained for.
    """
    if not cfg.streaming:
        given = {"--decode-chunk-size": chunk_size, "--left-context-frames": left_context_frames}
        wanted = next((f"{name} {value}" for name, value in given.items() if value not in (None, -1)), None)
        wanted = "--chunk-by-chunk true" if chunk_by_chunk else wanted
        if wanted is not None:
            raise ConfigError(
                f"{wanted}: this model sees whole utterances (it was trained without --streaming true), in chunks its "
                "output would be nonsense; decode.py without options of chunks decodes it"
            )
        return WHOLE_UTTERANCE
    default, wanted_left = default_chunks(cfg), left_context_frames
    if chunk_size is None:
        # Chunk by chunk, the smallest of its chunks if its default is none.
        finite = [c for c in cfg.chunk_size if c > 0]
        chunk_size = min(finite, default=-1) if chunk_by_chunk and default.chunk_size < 0 else default.chunk_size
    if left_context_frames is None:
        finite = [c for c in cfg.left_context_frames if c > 0]
        left_context_frames = default.left_context_frames
        if chunk_by_chunk and left_context_frames < 0:
            left_context_frames = max(finite, default=-1)
    _within("--decode-chunk-size", chunk_size, cfg.chunk_size, "--chunk-size")
    if chunk_size < 0 and not chunk_by_chunk:
        if wanted_left not in (None, -1):
            raise ConfigError(
                f"--left-context-frames {wanted_left} counts frames before a chunk, but whole utterances are decoded; "
                "leave it out, or give a --decode-chunk-size"
            )
        return WHOLE_UTTERANCE
    _within("--left-context-frames", left_context_frames, cfg.left_context_frames, "--left-context-frames")
    if chunk_by_chunk and min(chunk_size, left_context_frames) < 0:
        raise ConfigError(
            f"--chunk-by-chunk true needs a finite chunk and a finite left context, not {chunk_size} and "
            f"{left_context_frames}: caches cannot grow without end; --chunk-by-chunk false decodes under a mask"
        )
    return Chunks(chunk_size, left_context_frames)


def _within(flag: str, value: int, trained: list[int], trained_flag: str) -> None:
    """Refuse a value outside the range that training drew from."""
    if value == -1 and -1 in trained:
        return
    finite = [v for v in trained if v > 0]
    # Between -1 (no limit) and the largest finite value a model has seen both sides.
    if value > 0 and finite and min(finite) <= value and (value <= max(finite) or -1 in trained):
        return
    raise ConfigError(
        f"{flag} is {value}, but this model was trained with {trained_flag} {','.join(map(str, trained))} "
        "(encoder frames, -1: no limit): choose a value in that range, or train with another one"
    )
