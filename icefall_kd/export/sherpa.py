"""sherpa-onnx as a client of exported models.  The only module that imports it."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icefall_kd.data.features import FRAME_SHIFT
from icefall_kd.errors import ConfigError
from icefall_kd.export.exporter import RECORD
from icefall_kd.runtime.files import read_json

RATE = 16000


@dataclass(frozen=True)
class Transcript:
    """What sherpa-onnx made of one utterance."""

    text: str
    """Words separated by single spaces."""
    tokens: list[str]
    """Token strings as sherpa-onnx prints them."""
    timestamps: list[float]
    """Seconds at which each token was emitted."""
    seconds: float
    """Wall time, features included."""


class SherpaRecognizer:
    """Greedy search of an exported folder, one utterance at a time."""

    def __init__(self, folder: Path, precision: str = "fp32", num_threads: int = 1) -> None:
        """Open an export.

        Args:
            folder: what local/export.py --format sherpa-onnx wrote.
            precision: "fp32" or "int8".
            num_threads: of ONNX Runtime.
        Raises:
            ConfigError: sherpa-onnx is not installed, or the folder holds another format or not this precision.
        """
        try:
            import sherpa_onnx
        except ImportError as error:
            raise ConfigError(
                f"this needs sherpa-onnx ({error}): pip install -e '.[export]' -c constraints.txt"
            ) from error
        self.record = read_json(folder / RECORD)
        if self.record["format"] != "sherpa-onnx":
            raise ConfigError(f"{folder} holds format {self.record['format']}; export with --format sherpa-onnx")
        if precision not in self.record["files"]:
            raise ConfigError(f"{folder} has no {precision} files; export with --quantize {precision}")
        files = {name: str(folder / file) for name, file in self.record["files"][precision].items()}
        self.streaming = self.record["streaming"]
        kind = sherpa_onnx.OnlineRecognizer if self.streaming else sherpa_onnx.OfflineRecognizer
        self._recognizer = kind.from_transducer(
            **files,
            tokens=str(folder / "tokens.txt"),
            num_threads=num_threads,
            sample_rate=RATE,
            feature_dim=self.record["features"]["bins"],
            decoding_method="greedy_search",
        )

    def transcribe(self, wave: np.ndarray, tail_padding: float = 0.0) -> Transcript:
        """Decode (S,) float32 samples in [-1, 1] at 16 kHz.

        Args:
            wave: the samples.
            tail_padding: seconds of silence behind them that a streaming model hears, as of decode.py; it hears up to
                a chunk more, since only whole chunks are decoded.
        """
        begin = time.perf_counter()
        text, tokens, timestamps = self._stream(wave, tail_padding) if self.streaming else self._whole(wave)
        return Transcript(" ".join(text.split()), tokens, timestamps, time.perf_counter() - begin)

    def _whole(self, wave: np.ndarray) -> tuple[str, list[str], list[float]]:
        stream = self._recognizer.create_stream()
        stream.accept_waveform(RATE, wave)
        self._recognizer.decode_stream(stream)
        return stream.result.text, list(stream.result.tokens), list(stream.result.timestamps)

    def _stream(self, wave: np.ndarray, tail_padding: float) -> tuple[str, list[str], list[float]]:
        metadata = self.record["graphs"]["encoder"]["metadata"]
        hop, samples = metadata["decode_chunk_len"], round(RATE * FRAME_SHIFT)
        padded = len(wave) + round(tail_padding * RATE)
        num_chunks = -(-padded // (hop * samples))
        # A chunk is decoded when a frame behind its last one is complete, half a window later.
        needed = ((num_chunks - 1) * hop + metadata["T"] + 3) * samples
        stream = self._recognizer.create_stream()
        stream.accept_waveform(RATE, np.pad(wave, (0, max(needed - len(wave), 0))))
        for _ in range(num_chunks):
            if not self._recognizer.is_ready(stream):
                break
            self._recognizer.decode_stream(stream)
        result = self._recognizer.get_result_all(stream)
        return result.text, list(result.tokens), list(result.timestamps)
