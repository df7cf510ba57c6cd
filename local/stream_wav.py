#!/usr/bin/env python3
"""Recognise a recording, or samples from a pipe, as they come, and print partial results.

local/stream_wav.py --exp-dir exp/mvq-streaming --wav speech.wav
arecord -q -f S16_LE -r 16000 -c 1 -t raw | local/stream_wav.py --exp-dir exp/mvq-streaming --wav -
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import DecodeConfig
from icefall_kd.decode.runner import build_decoder
from icefall_kd.decode.streaming import Stream, read_pcm16, read_recording
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.recipe import load_system


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Recognise a recording, or samples from a pipe, as they come."""

    wav: str
    """Audio file, resampled to 16 kHz when it has another rate; -: raw little-endian 16-bit samples of one channel at
    16 kHz from standard input."""
    block: float = 0.1
    """Seconds of audio that are read at a time."""
    decode: DecodeConfig = DecodeConfig(chunk_by_chunk=True)

    def __post_init__(self) -> None:
        if not self.block > 0:
            raise ConfigError(f"--block is {self.block}; it must be above 0")
        if not self.decode.chunk_by_chunk:
            raise ConfigError("--chunk-by-chunk false: a stream is recognised chunk by chunk; leave the option out")


def blocks(config: StreamConfig) -> Iterator[torch.Tensor]:
    """Yield the samples (S,) in [-1, 1] of the recording or the pipe."""
    size = max(round(16000 * config.block), 1)
    return read_pcm16(sys.stdin.buffer, size) if config.wav == "-" else read_recording(config.wav, size)


def main() -> None:
    """Print a line whenever the text changes: seconds of audio read, and the text so far."""
    config = parse_config(StreamConfig, description=__doc__)
    trained = load_system(config.decode)
    encoder, search = trained.system.model.encoder, build_decoder(trained.system, config.decode, trained.tokenizer)
    stream, text = Stream(encoder, search, encoder.chunks), ""
    if config.wav == "-":
        # Ctrl-C ends the recorder in front of the pipe, and with it the stream; a second one ends this.
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.default_int_handler))
    for samples in blocks(config):
        stream.accept(samples)
        text = report(stream, trained.tokenizer, text)
    stream.accept(torch.zeros(round(16000 * config.decode.tail_padding)))
    stream.finish()
    report(stream, trained.tokenizer, text, final=True)


def report(stream: Stream, tokenizer, before: str, final: bool = False) -> str:
    """Print the text so far if it is not ``before``, or at the end; return it."""
    text = tokenizer.decode(stream.hypothesis().tokens)
    if final or text != before:
        print(f"{stream.seconds:8.2f} s{'  final:' if final else ''}  {text}", flush=True)
    return text


if __name__ == "__main__":
    run_main(main)
