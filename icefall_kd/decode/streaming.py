"""Decoding chunk by chunk, with caches: whole parts for scoring, and one stream as its samples come."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from lhotse import Recording
from torch import Tensor

from icefall_kd.data.manifest_rows import refuse_shell_names
from icefall_kd.data.online_fbank import OnlineFbank, OnlineSamples
from icefall_kd.decode.base import Decoder, Hypothesis, StatefulDecoder
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.audio import UNREADABLE
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.streaming import Chunks
from icefall_kd.models.waveform import WaveformFrontEnd


def encode_chunks(
    encoder: Conformer, features: Tensor, x_lens: Tensor, chunks: Chunks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode utterances chunk by chunk, as streams are.

    Args:
        encoder: a streaming one, in evaluation mode.
        features: (N, T, F) log-mel frames, or (N, S) samples for the waveform front end.
        x_lens: (N,) valid ones.
        chunks: finite chunk size and left context.
    Yields:
        encoder_out (N, C, C') and encoder_out_lens (N,) of each chunk.
    """
    size, (window, hop) = chunks.chunk_size, encoder.window(chunks)
    states = encoder.init_states(len(features), chunks, features.device)
    for begin in range(0, max(int(x_lens.max()), 1), hop):
        piece = features[:, begin : begin + window]
        piece = _filled(piece, window)
        out, lens, states = encoder.forward_chunk(piece, (x_lens - begin).clamp(0, window), states, size)
        yield out, lens


def _filled(piece: Tensor, length: int) -> Tensor:
    """Put zeros behind (N, T, ...) so that T becomes ``length``."""
    return F.pad(piece, (0, 0) * (piece.dim() - 2) + (0, length - piece.shape[1]))


class Stream:
    """One stream of 16 kHz samples through a streaming encoder and a search.

    Args:
        encoder: a streaming one, in evaluation mode.
        search: a StatefulDecoder.
        chunks: finite chunk size and left context.
    Raises:
        ConfigError: the search cannot go on chunk by chunk, or there are no chunks.
    """

    def __init__(self, encoder: Conformer, search: Decoder, chunks: Chunks) -> None:
        if not isinstance(search, StatefulDecoder):
            raise ConfigError(
                f"{type(search).__name__} needs whole utterances; use greedy_search or modified_beam_search for streams"
            )
        if min(chunks) < 1:
            raise ConfigError(f"a stream needs a finite chunk and a finite left context, not {tuple(chunks)}")
        self.encoder, self.search, self.chunks = encoder, search, chunks
        self.window, self.hop = encoder.window(chunks)
        self.device = next(encoder.parameters()).device
        # What the encoder hears: features of the samples, or the samples.
        self.heard = OnlineSamples() if isinstance(encoder.subsampling, WaveformFrontEnd) else OnlineFbank()
        self.waiting = self.heard.finish()
        self.encoder_state = encoder.init_states(1, chunks, self.device)
        self.search_state = search.start(1)

    def accept(self, samples: Tensor) -> None:
        """Take the next samples (S,) in [-1, 1] and decode the chunks that they complete."""
        self._advance(self.heard.accept(samples))

    def finish(self) -> None:
        """Decode what is left; nothing may be accepted afterwards."""
        self._advance(self.heard.finish())
        while len(self.waiting):
            self._chunk()

    def hypothesis(self) -> Hypothesis:
        """Return the best hypothesis so far."""
        return self.search.result(self.search_state)[0][0]

    def _advance(self, heard: Tensor) -> None:
        self.waiting = torch.cat([self.waiting, heard])
        while len(self.waiting) >= self.window:
            self._chunk()

    @torch.no_grad()
    def _chunk(self) -> None:
        piece, size = self.waiting[: self.window], self.chunks.chunk_size
        lens = torch.tensor([len(piece)], device=self.device)
        piece = _filled(piece.unsqueeze(0), self.window).to(self.device)
        out, lens, self.encoder_state = self.encoder.forward_chunk(piece, lens, self.encoder_state, size)
        self.search.advance(self.search_state, out, lens)
        self.waiting = self.waiting[self.hop :]

    @property
    def seconds(self) -> float:
        """Seconds of audio accepted so far."""
        return self.heard.num_samples / 16000


def read_pcm16(stream: BinaryIO, size: int) -> Iterator[Tensor]:
    """Yield samples (S,) in [-1, 1] of raw little-endian 16-bit audio, up to ``size`` at a time, as they arrive.

    Args:
        stream: a file or pipe in binary mode.
        size: samples to wait for at most; a pipe gives what it has.
    Raises:
        DataError: the stream ends in the middle of a sample.
    """
    read, rest = getattr(stream, "read1", stream.read), b""
    while data := read(2 * size):
        data = rest + data
        rest = data[len(data) - len(data) % 2 :]
        whole = np.frombuffer(data[: len(data) - len(rest)], dtype="<i2")
        if len(whole):
            yield torch.from_numpy(whole.astype(np.float32) / 32768.0)
    if rest:
        raise DataError("the samples end with half a sample; raw 16-bit little-endian audio of one channel is expected")


def read_recording(path: str, size: int) -> Iterator[Tensor]:
    """Yield samples (S,) in [-1, 1] at 16 kHz of an audio file of one channel, ``size`` at a time.

    Raises:
        DataError: the file cannot be read or has several channels.
    """
    try:
        refuse_shell_names(path)
        samples = Recording.from_file(path).resample(16000).load_audio()  # (channels, S)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as audio: {error}") from error
    if len(samples) != 1:
        raise DataError(f"{path} has {len(samples)} channels; give a recording of one")
    return iter(torch.from_numpy(samples[0]).split(size))
