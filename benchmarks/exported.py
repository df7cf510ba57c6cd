#!/usr/bin/env python3
"""Decode test sets with sherpa-onnx and an exported model, and compare with decode.py's greedy search.

    benchmarks/exported.py --model-dir exported --exp-dir exp/mvq --manifest-dir data/fbank --test-parts dev

sherpa-onnx computes its own features from the audio, utterance by utterance, with one thread; the model of exp-dir is
the one that was exported (the same files, averaged in the same way).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import DecodeConfig
from icefall_kd.data.datamodule import decoding_batches
from icefall_kd.decode.runner import build_decoder, decode_batches
from icefall_kd.errors import ConfigError, DataError, run_main
from icefall_kd.export.exporter import RECORD
from icefall_kd.export.sherpa import RATE, SherpaRecognizer
from icefall_kd.recipe import load_system, part_cuts
from icefall_kd.results import parts_by_name
from icefall_kd.runtime.env import measured_on, package_version
from icefall_kd.runtime.files import read_json, write_json
from icefall_kd.scoring import RATE_NAMES, score, summarize


@dataclass(frozen=True, kw_only=True)
class ExportedConfig:
    """Decode test sets with sherpa-onnx and an exported model, and compare with decode.py's greedy search."""

    model_dir: Path
    """Folder that local/export.py --format sherpa-onnx wrote."""
    exp_dir: Path
    """exp_dir of the training that was exported."""
    test_parts: list[str] = field(default_factory=lambda: ["test"])
    """Parts of manifest-dir, paths of lhotse cut sets, or folders of audio with *.trans.txt."""
    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz."""
    tail_padding: float = 0.8
    """Seconds of silence behind each utterance, of streaming models."""
    bootstrap: int = 1000
    """Bootstrap samples of the confidence intervals."""
    out: Path | None = None
    """JSON file of the figures."""


def eager(config: ExportedConfig, cuts, record: dict) -> tuple[dict[str, str], dict]:
    """Decode with the model of exp-dir; return the texts by utterance, and the real-time factors."""
    options = DecodeConfig(
        exp_dir=config.exp_dir,
        decoding_method="greedy_search",
        device="cpu",
        **record["parameters"],
        chunk_by_chunk=record["streaming"],
    )
    trained = load_system(options)
    if (trained.files_used, trained.tokenizer.hash) != (record["files_used"], record["tokenizer_hash"]):
        raise ConfigError(f"{config.model_dir} was exported from other parameters than {config.exp_dir} has now")
    tokenizer = trained.tokenizer
    features = "precomputed" if all(c.has_features for c in cuts) else "on_the_fly"
    tail_padding = config.tail_padding if record["streaming"] else 0.0
    batches = decoding_batches(cuts, tokenizer, max_duration=200.0, features=features, tail_padding=tail_padding)
    decoded = decode_batches(
        trained.system,
        build_decoder(trained.system, options),
        batches,
        chunk_by_chunk=record["streaming"],
    )
    texts = [tokenizer.decode(nbest[0].tokens) for nbest in decoded.nbest]
    return dict(zip(decoded.ids, texts, strict=True)), decoded.rtf()


def compare(config: ExportedConfig, part: str, cuts, record: dict) -> list[dict]:
    """Return one row a decoder: decode.py's first, then sherpa-onnx by precision."""
    reference, rtf = eager(config, cuts, record)
    unit = load_unit(config.exp_dir)
    ids = [c.id for c in cuts]
    refs = [" ".join(s.text for s in c.supervisions) for c in cuts]
    waves = [c.load_audio()[0] for c in cuts]
    audio = sum(len(wave) for wave in waves) / RATE
    texts = {"decode.py": ([reference[i] for i in ids], rtf["rtf"])}
    for precision in record["files"]:
        recognizer = SherpaRecognizer(config.model_dir, precision)
        found = [recognizer.transcribe(wave, config.tail_padding) for wave in waves]
        texts[f"sherpa-onnx {precision}"] = ([t.text for t in found], sum(t.seconds for t in found) / audio)
    rows = []
    for name, (hyps, factor) in texts.items():
        scored = summarize(score(refs, hyps, ids, unit), config.bootstrap)
        different = [i for i, hyp in zip(ids, hyps, strict=True) if hyp != reference[i]]
        rows.append({"part": part, "decoder": name, **scored, "rtf": factor, "different": different})
        low, high = scored["interval"]
        print(
            f"{part:10s} {name:18s} %{RATE_NAMES[unit]} {scored['error_rate']:6.2f} [{low:.2f}, {high:.2f}]  "
            f"{len(different):3d} of {len(ids)} texts differ  RTF {factor:.4f}",
            flush=True,
        )
    return rows


def load_unit(exp_dir: Path) -> str:
    """Return the unit that the tokenizer of ``exp_dir`` is scored in."""
    return read_json(exp_dir / "tokenizer" / "tokenizer.json")["unit"]


def main() -> None:
    """Compare on every part."""
    config = parse_config(ExportedConfig, description=__doc__)
    torch.set_num_threads(1)
    record = read_json(config.model_dir / RECORD)
    rows = []
    for name, part in parts_by_name(config.test_parts).items():
        cuts = part_cuts(config.manifest_dir, part).to_eager()
        if not len(cuts):
            raise DataError(f"part {name} has no utterance")
        rows += compare(config, name, cuts, record)
    if config.out is not None:
        sizes = {f.name: f.stat().st_size for f in sorted(config.model_dir.glob("*.onnx"))}
        versions = {"sherpa_onnx": package_version("sherpa-onnx")}
        write_json(config.out, {**measured_on(), **versions, "bytes": sizes, "rows": rows})


if __name__ == "__main__":
    run_main(main)
