"""Sentences for language models: lines of text files, transcripts of cut sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.errors import ConfigError
from icefall_kd.labels.keys import label_key
from icefall_kd.runtime.files import read_lines
from icefall_kd.text.normalize import normalize_text


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where the text of a language model is."""

    text: list[Path] = field(default_factory=list)
    """Text files (or .gz) of one sentence a line, several as a,b."""
    cuts: list[Path] = field(default_factory=list)
    """Cut sets whose transcripts are taken, several as a,b; copies at another speed count once."""
    language: Literal["none", "en", "zh"] = "none"
    """Normalise text files as transcripts of this language are; none: they are normalised already."""

    def __post_init__(self) -> None:
        if not self.text and not self.cuts:
            raise ConfigError("there is no text; give --text FILE or --cuts FILE")


def sentences(config: TextConfig) -> Iterator[str]:
    """Yield every sentence that is not empty."""
    for path in config.text:
        for line in read_lines(path):
            line = line.strip() if config.language == "none" else normalize_text(line, config.language)
            if line:
                yield line
    yield from transcripts(config.cuts)


def transcripts(files: Sequence[Path]) -> Iterator[str]:
    """Yield the transcripts of cut sets, those of copies at another speed left out."""
    for path in files:
        for cut in iterate_cuts(path):
            if cut.supervisions and cut.supervisions[0].text and label_key(cut).endswith("|1/1"):
                yield cut.supervisions[0].text
