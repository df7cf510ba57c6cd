#!/usr/bin/env python3
"""Print how much later than they were spoken a search emitted the tokens (or words) that it recognised.

    local/emission_delay.py --exp-dir exp/streaming --nbest NBEST --align-exp-dir exp/full --part dev
    local/emission_delay.py --exp-dir exp/streaming --nbest NBEST --ctm words.ctm

NBEST is the nbest-*.jsonl of decode.py.  The reference times are those of a CTM file, of the alignments in a cut set
(--part alone), or of the CTC head of a full-context model (--part and --align-exp-dir).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icefall_kd.cli import parse_config
from icefall_kd.config import DecodeConfig
from icefall_kd.decode.alignment import (
    Timed,
    cut_alignments,
    emission_delays,
    emissions,
    forced_alignments,
    read_ctm,
    summarize_delays,
)
from icefall_kd.errors import ConfigError, DataError, run_main
from icefall_kd.models.streaming import WHOLE_UTTERANCE, widest_chunks
from icefall_kd.recipe import load_system, part_batches, part_cuts
from icefall_kd.runtime.files import read_record, write_json
from icefall_kd.runtime.log import setup_logging
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger("emission_delay")


@dataclass(frozen=True, kw_only=True)
class DelayConfig:
    """Print how much later than they were spoken a search emitted the tokens (or words) that it recognised."""

    exp_dir: Path
    """Training whose tokenizer the hypotheses are of."""
    nbest: list[Path]
    """nbest-*.jsonl files, several as a,b."""
    ctm: Path | None = None
    """Reference times of words."""
    align_exp_dir: Path | None = None
    """Training with a CTC head that aligns the reference texts of --part; its tokenizer decides the tokens."""
    part: str | None = None
    """Cut set of the utterances: a name in manifest-dir, a file, or a folder of audio with *.trans.txt."""
    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz."""
    point: Literal["end", "begin"] = "end"
    """Delays count from the end, or the begin, of the reference token or word."""
    max_duration: float = 200.0
    """Seconds of audio a batch of the alignment."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    out: Path | None = None
    """JSON file of the summaries."""

    def __post_init__(self) -> None:
        if self.ctm is None and self.part is None:
            raise ConfigError("give reference times: --ctm FILE, or --part with or without --align-exp-dir")
        if self.ctm is not None and self.align_exp_dir is not None:
            raise ConfigError("--ctm and --align-exp-dir both give reference times; choose one")


def _aligned(config: DelayConfig, tokenizer: Tokenizer) -> dict[str, list[Timed]]:
    """Return the tokens of --part, aligned by the CTC head of --align-exp-dir."""
    trained = load_system(DecodeConfig(exp_dir=config.align_exp_dir, device=config.device))
    if trained.tokenizer.hash != tokenizer.hash:
        raise ConfigError(f"{config.align_exp_dir} has other tokens than {config.exp_dir}; align by one of the same")
    if trained.system.model.ctc_output is None:
        raise ConfigError(f"{config.align_exp_dir} has no CTC head (it was trained with --ctc-scale 0)")
    # A streaming model hears as much as it can: the times that it gives are to say when something was spoken.  One of
    # two modes hears whole utterances already.
    encoder = trained.system.model.encoder
    if encoder.chunks != WHOLE_UTTERANCE:
        encoder.chunks = widest_chunks(trained.config.model)
    batches = part_batches(config.manifest_dir, config.part, tokenizer, config.max_duration)
    found = dict(forced_alignments(trained.system, tokenizer, batches))
    short = [name for name, times in found.items() if times is None]
    if short:
        logger.warning("%d utterances are too short for their text and are left out: %s", len(short), short[:3])
    return {name: times for name, times in found.items() if times is not None}


def _refuse_other_frames(exp_dir: Path) -> None:
    """Raise a ConfigError for a CIF recogniser, which hears whole utterances, and for frames of another length."""
    file = exp_dir / "config.json"
    options = read_record(file, config=dict)["config"] if file.exists() else {}
    if options.get("system") == "hkd":
        raise ConfigError(f"{exp_dir} is of --system hkd, which emits when an utterance is over; there is no delay")
    if options.get("system") == "dualmode" and options.get("front_end") == "waveform":
        raise ConfigError(f"{exp_dir} has frames of 20 ms (--front-end waveform); delays are measured in 40 ms alone")


def main() -> None:
    """Measure every file."""
    config = parse_config(DelayConfig)
    setup_logging()
    for exp_dir in (config.exp_dir, config.align_exp_dir):
        if exp_dir is not None:
            _refuse_other_frames(exp_dir)
    tokenizer = Tokenizer.load(config.exp_dir / "tokenizer")
    if config.ctm is not None:
        reference = read_ctm(config.ctm)
    elif config.align_exp_dir is not None:
        reference = _aligned(config, tokenizer)
    else:
        reference = cut_alignments(part_cuts(config.manifest_dir, config.part))
    words = config.align_exp_dir is None
    unit = "words" if words else "tokens"
    summaries = []
    for file in config.nbest:
        emitted = emissions(file, tokenizer, words)
        both = [name for name in emitted if name in reference]
        if not both:
            raise DataError(f"{file} and the reference times have no utterance in common")
        delays = [d for name in both for d in emission_delays(reference[name], emitted[name], config.point)]
        spoken = sum(len(reference[name]) for name in both)
        summary = summarize_delays(delays) | {"spoken": spoken, "unit": unit, "point": config.point}
        summaries.append({"nbest": str(file), "utterances": len(both)} | summary)
        text = f"{file.name}: {len(delays)} of {spoken} {unit} recognised in {len(both)} utterances"
        if delays:
            mean, median, p90 = (summary[k] for k in ("mean_ms", "median_ms", "p90_ms"))
            text += f", out after their {config.point}: mean {mean:.0f} ms, median {median:.0f} ms, p90 {p90:.0f} ms"
        print(text)
    if config.out is not None:
        write_json(config.out, summaries)


if __name__ == "__main__":
    run_main(main)
