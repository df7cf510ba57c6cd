"""sherpa-onnx as a client of exported models.  The only module that imports it."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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

    def transcribe(self, wave: np.ndarray) -> Transcript:
        """Decode (S,) float32 samples in [-1, 1] at 16 kHz."""
        begin = time.perf_counter()
        stream = self._recognizer.create_stream()
        stream.accept_waveform(RATE, wave)
        self._recognizer.decode_stream(stream)
        result = stream.result
        seconds = time.perf_counter() - begin
        return Transcript(" ".join(result.text.split()), list(result.tokens), list(result.timestamps), seconds)
