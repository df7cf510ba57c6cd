"""Decode whole test sets: encoder, search, timing, scoring, and every file that is left behind.

Under ``<exp_dir>/<decoding_method>`` each part leaves the files icefall users know (recogs-, errs- and
wer-summary-<part>-<suffix>.txt), nbest-<part>-<suffix>.jsonl, and results-<part>-<suffix>.json: error
counts of every utterance, so that systems are compared without scoring again, with the parameters
used, the options, the command and the git state.
"""

import dataclasses
import itertools
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig
from icefall_kd.data.batch import LOG_EPS, Batch
from icefall_kd.decode.base import Decoder, Hypothesis, StatefulDecoder
from icefall_kd.decode.fusion import build_fusion
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV, conv2d_subsampled_len, encoder_seconds
from icefall_kd.models.streaming import WHOLE_UTTERANCE
from icefall_kd.runtime.env import environment
from icefall_kd.runtime.files import atomic_write, fingerprint, write_json
from icefall_kd.scoring import Score, per_utterance, score, summarize, write_errs, write_recogs, write_summary

logger = logging.getLogger(__name__)

# Seconds of one input frame, for batches that do not state their durations.
_FRAME_SHIFT = 0.01
# Input frames that give the first encoder frame.
_SHORTEST = next(t for t in itertools.count() if conv2d_subsampled_len(t) > 0)


@dataclass
class Decoded:
    """Everything that decoding one part gave."""

    ids: list[str] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    nbest: list[list[Hypothesis]] = field(default_factory=list)
    audio_seconds: float = 0.0
    encoder_seconds: float = 0.0
    """Wall time of the encoder, the warm-up run left out."""
    search_seconds: float = 0.0
    warm_up_seconds: float = 0.0
    """Wall time of the first batch's first run, whose output is thrown away."""
    frame_seconds: Callable[[int], float] = encoder_seconds
    """Where a frame of the encoder begins."""

    def rtf(self) -> dict[str, float | None]:
        """Return real-time factors, wall seconds over audio seconds (data loading left out)."""
        wall = self.encoder_seconds + self.search_seconds
        audio = self.audio_seconds or math.nan
        values = {
            "rtf": wall / audio,
            "rtf_with_warm_up": (wall + self.warm_up_seconds) / audio,
            "rtf_encoder": self.encoder_seconds / audio,
            "rtf_search": self.search_seconds / audio,
        }
        return {name: None if math.isnan(value) else value for name, value in values.items()}

    def masked_share(self) -> dict[str, float | None]:
        """Return the share of the best hypotheses' tokens that were masked; nothing for a search that does not mask."""
        best = [nbest[0] for nbest in self.nbest]
        if not best or any(hyp.masked is None for hyp in best):
            return {}
        tokens = sum(len(hyp.tokens) for hyp in best)
        return {"masked_share": sum(hyp.masked for hyp in best) / tokens if tokens else None}


def build_decoder(system, config: DecodeConfig, tokenizer=None) -> Decoder:
    """Return the search that ``config`` names, from the system's constructors, with language model and hot words.

    Args:
        system: the model, on its device.
        config: options of decode.py.
        tokenizer: of the training; needed for language models and hot words.
    Raises:
        ConfigError: the system has no such search (lists those it has), or a language model is of another tokenizer.
    """
    found = system.decoders()
    if config.decoding_method not in found:
        raise ConfigError(f"--decoding-method {config.decoding_method}: this model offers {', '.join(sorted(found))}")
    entry = found[config.decoding_method]
    decoder = entry if isinstance(entry, Decoder) else entry(config)
    fusion = build_fusion(config, tokenizer, next(system.parameters()).device)
    if fusion is not None:
        decoder.fusion = fusion
    return decoder


@torch.no_grad()
def decode_batches(
    system,
    decoder: Decoder,
    batches: Iterable[Batch],
    warm_up: bool = True,
    chunk_by_chunk: bool = False,
) -> Decoded:
    """Decode the batches of one part.

    Args:
        system: offers ``encode(batch) -> (encoder_out (N, T', C), encoder_out_lens (N,))``.
        decoder: the search.
        batches: the part, in any order.
        warm_up: run the first batch twice and leave its first run out of the times.
        chunk_by_chunk: use ``system.encode_chunks(batch)``, which yields the same by chunks; a StatefulDecoder goes on
            chunk by chunk as well.
    """
    device = next(system.parameters()).device
    out = Decoded(frame_seconds=getattr(system, "frame_seconds", encoder_seconds))
    for batch in batches:
        batch = long_enough(batch).to(device)
        if warm_up:
            seconds = _run(system, decoder, batch, device, chunk_by_chunk)[1:]
            out.warm_up_seconds = sum(seconds)
            warm_up = False
        nbest, encoding, searching = _run(system, decoder, batch, device, chunk_by_chunk)
        out.encoder_seconds += encoding
        out.search_seconds += searching
        out.audio_seconds += sum(batch.durations) if batch.durations else int(batch.x_lens.sum()) * _FRAME_SHIFT
        out.ids += batch.ids
        out.refs += batch.texts or [""] * len(batch)
        out.nbest += nbest
        logger.info("%d utterances decoded", len(out.ids))
    return out


def long_enough(batch: Batch) -> Batch:
    """Pad a batch of utterances that are all too short for an encoder frame; their lengths say so to the search."""
    if batch.audio is not None and batch.audio.size(1) < SSL_CONV.receptive_field:
        audio = torch.nn.functional.pad(batch.audio, (0, SSL_CONV.receptive_field - batch.audio.size(1)))
        batch = dataclasses.replace(batch, audio=audio)
    missing = _SHORTEST - batch.features.size(1) if batch.features is not None else 0
    if missing <= 0:
        return batch
    padding = batch.features.new_full((len(batch), missing, batch.features.size(2)), LOG_EPS)
    return dataclasses.replace(batch, features=torch.cat([batch.features, padding], dim=1))


def _run(
    system, decoder: Decoder, batch: Batch, device: torch.device, chunk_by_chunk: bool
) -> tuple[list[list[Hypothesis]], float, float]:
    """Return the n-best lists, the seconds of the encoder and those of the search."""
    if chunk_by_chunk:
        return _run_chunks(system, decoder, batch, device)
    begin = _now(device)
    encoder_out, encoder_out_lens = system.encode(batch)
    middle = _now(device)
    nbest = decoder.decode(encoder_out, encoder_out_lens)
    return nbest, middle - begin, _now(device) - middle


def _run_chunks(system, decoder: Decoder, batch: Batch, device: torch.device):
    goes_on = isinstance(decoder, StatefulDecoder)
    state, whole, searching, begin = decoder.start(len(batch)) if goes_on else None, [], 0.0, _now(device)
    for encoder_out, encoder_out_lens in system.encode_chunks(batch):
        middle = _now(device)
        if goes_on:
            decoder.advance(state, encoder_out, encoder_out_lens)
        else:
            whole.append((encoder_out, encoder_out_lens))
        searching += _now(device) - middle
    middle = _now(device)
    if goes_on:
        nbest = decoder.result(state)
    else:
        outs, lens = zip(*whole, strict=True)
        nbest = decoder.decode(torch.cat(outs, dim=1), torch.stack(lens).sum(0))
    end = _now(device)
    return nbest, middle - begin - searching, searching + end - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score_decoded(decoded: Decoded, tokenizer, unit: str) -> Score:
    """Score the best hypotheses in ``unit`` ("auto": the tokenizer's); "token" compares token strings."""
    unit = tokenizer.unit if unit == "auto" else unit
    best = [nbest[0] for nbest in decoded.nbest]
    if tokenizer.kind == "pinyin" and unit != "token" and any(hyp.text is None for hyp in best):
        raise ConfigError(f"--unit {unit} compares transcripts, this model writes pinyin; use --unit auto or token")
    if unit != "token":
        return score(decoded.refs, [_text(hyp, tokenizer) for hyp in best], decoded.ids, unit)
    silent = {tokenizer.blank_id, tokenizer.sos_id, tokenizer.mask_id}
    hyps = [[tokenizer.tokens[i] for i in hyp.tokens if i not in silent] for hyp in best]
    # Not through ids: a reference token that the table lacks must not look like another such token.
    return score([tokenizer.pieces(text) for text in decoded.refs], hyps, decoded.ids, unit)


def decode_parts(
    system,
    tokenizer,
    batches: Mapping[str, Iterable[Batch]],
    config: DecodeConfig,
    *,
    files_used: str = "",
    suffix: str | None = None,
    res_dir: Path | None = None,
) -> dict[str, dict]:
    """Decode and score parts, write their files and print one line a part.

    Args:
        system: the model, on its device.
        tokenizer: of the training.
        batches: the batches of each part by the part's name.
        config: options of decode.py.
        files_used: which checkpoint files the parameters come from, for the record.
        suffix: of the file names; None: :func:`decode_suffix`.
        res_dir: where files go; None: ``exp_dir/decoding_method``.
    Returns:
        What results-<part>-<suffix>.json holds, by part.
    Raises:
        DataError: a part without utterances, or with a repeated utterance id.
    """
    system.eval()
    decoder = build_decoder(system, config, tokenizer)
    encoder = getattr(getattr(system, "model", None), "encoder", None)
    chunks = getattr(encoder, "chunks", WHOLE_UTTERANCE)
    if suffix is None:
        network = getattr(getattr(system, "model", None), "decoder", None)
        suffix = decode_suffix(config, files_used, getattr(network, "context_size", None), chunks)
    res_dir = Path(res_dir) if res_dir is not None else config.exp_dir / config.decoding_method
    record = {
        "parameters": sum(p.numel() for p in system.parameters()),
        **latency(encoder),
        **system.decoded_as,
        **_provenance(config, tokenizer, files_used, next(system.parameters()).device),
    }
    results = {}
    for part, part_batches in batches.items():
        decoded = decode_batches(system, decoder, part_batches, not results, config.chunk_by_chunk)
        if not decoded.ids:
            raise DataError(f"part {part} has no utterance to decode; check its cut set and --max-duration")
        scored = score_decoded(decoded, tokenizer, config.unit)
        results[part] = {"part": part, "suffix": suffix, **summarize(scored, config.bootstrap), **decoded.rtf()}
        results[part] |= decoded.masked_share()
        results[part] |= {"audio_seconds": decoded.audio_seconds, **record, "utterances": per_utterance(scored)}
        name = f"{part}-{suffix}"
        write_recogs(res_dir / f"recogs-{name}.txt", scored)
        write_errs(res_dir / f"errs-{name}.txt", scored)
        write_summary(res_dir / f"wer-summary-{name}.txt", {config.decoding_method: scored.error_rate})
        write_nbest(res_dir / f"nbest-{name}.jsonl", decoded, tokenizer)
        if config.ctm:
            write_ctm(res_dir / f"ctm-{name}.ctm", decoded, tokenizer)
        # Last, since its presence says that this part is done.
        write_json(res_dir / f"results-{name}.json", results[part])
        print(_line(scored, results[part]), flush=True)
    return results


def latency(encoder) -> dict:
    """Return what the results say of how long a stream waits.

    Chunk, left context, right context if the encoder (or whatever stands in its place) has any, and seconds, which are
    None without chunks; and the seconds of an encoder frame where it has not the usual 40 ms.
    """
    chunks, seen = getattr(encoder, "chunks", WHOLE_UTTERANCE), {}
    if chunks == WHOLE_UTTERANCE:
        return {**chunks._asdict(), "algorithmic_latency": None}
    if encoder.look_ahead(chunks):
        names = ("right_context", "right_context_kind")
        seen = {name: getattr(encoder.cfg, name) for name in names}
    if (frame := encoder.subsampling.frame_seconds(1)) != encoder_seconds(1):
        seen["frame_seconds"] = frame
    return {**chunks._asdict(), **seen, "algorithmic_latency": encoder.latency(chunks)}


def _provenance(config: DecodeConfig, tokenizer, files_used: str, device: torch.device) -> dict:
    options = config_to_dict(config)
    return {
        "decoding_method": config.decoding_method,
        "files_used": files_used,
        "tokenizer_hash": tokenizer.hash,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": options,
        "config_hash": fingerprint(options),
        "environment": environment(),
    }


def write_nbest(path: Path, decoded: Decoded, tokenizer) -> None:
    """Write one JSON line an utterance, sorted by id: reference and n-best with scores, frames and seconds.

    ``timestamps`` are encoder frames, ``times`` the seconds where these begin.
    """
    with atomic_write(path, "w") as f:
        for line in _nbest_lines(decoded, tokenizer):
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _nbest_lines(decoded: Decoded, tokenizer) -> Iterator[dict]:
    for i in sorted(range(len(decoded.ids)), key=lambda i: decoded.ids[i]):
        hyps = [{**dataclasses.asdict(h), "text": _text(h, tokenizer)} for h in decoded.nbest[i]]
        for hyp in hyps:
            if hyp["masked"] is None:
                del hyp["masked"]
            times = hyp["timestamps"]
            hyp["times"] = [decoded.frame_seconds(t) for t in times] if times is not None else None
        yield {"id": decoded.ids[i], "ref": decoded.refs[i], "nbest": hyps}


def _text(hyp: Hypothesis, tokenizer) -> str:
    return hyp.text if hyp.text is not None else tokenizer.decode(hyp.tokens)


def write_ctm(path: Path, decoded: Decoded, tokenizer) -> None:
    """Write the words of the best hypotheses in NIST's CTM: id, channel, begin and length in seconds, word.

    A word begins with the frame of its first token and ends with that of its last: a transducer emits a token where
    it is sure, which says little about how long the word was spoken.
    """
    with atomic_write(path, "w") as f:
        for i in sorted(range(len(decoded.ids)), key=lambda i: decoded.ids[i]):
            best = decoded.nbest[i][0]
            for word, first, last in tokenizer.words(best.tokens):
                begin, end = (decoded.frame_seconds(t) for t in (best.timestamps[first], best.timestamps[last] + 1))
                f.write(f"{decoded.ids[i]} 1 {begin:.2f} {end - begin:.2f} {word}\n")


def _line(scored: Score, result: dict) -> str:
    line = scored.line(result["part"])
    if result["interval"]:
        line += " 95% interval {:.2f} to {:.2f}".format(*result["interval"])
    if result.get("masked_share") is not None:
        line += f", {100 * result['masked_share']:.1f} % of the tokens masked"
    if result["rtf"] is not None:
        line += f", RTF {result['rtf']:.4f} ({result['rtf_with_warm_up']:.4f} with warm-up)"
    if result["algorithmic_latency"] is None:
        return line + ", latency: the whole utterance"
    frame = 1000 * result.get("frame_seconds", encoder_seconds(1))
    chunk, seconds = result["chunk_size"] * frame, 1000 * result["algorithmic_latency"]
    return line + f", algorithmic latency {seconds:.1f} ms (chunks of {chunk:.0f} ms)"
