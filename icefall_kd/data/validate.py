"""Validation of prepared data: every assumption that training makes is checked before it starts."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lhotse.cut import Cut, MonoCut

from icefall_kd.data.filters import filter_cuts
from icefall_kd.data.manifests import cuts_file, iterate_cuts
from icefall_kd.data.prepare import is_train
from icefall_kd.errors import DataError
from icefall_kd.frames import fbank_num_frames
from icefall_kd.labels.keys import label_key
from icefall_kd.runtime.files import read_json
from icefall_kd.text.normalize import normalize_text
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What is validated, and the limits."""

    data_dir: Path
    """Folder of everything prepared."""
    lang_dir: Path
    """Folder of the tokenizer."""
    features: Literal["precomputed", "on_the_fly"] = "precomputed"
    """precomputed: the cuts of fbank/ are validated, else those of manifests/."""
    max_unk_ratio: float = 0.01
    """Share of unknown tokens that a training part may have (others get a warning)."""
    max_reject_ratio: float = 0.01
    """Share of utterances with more tokens than frames that a training part may have (others get a warning)."""


def cut_faults(cut: Cut, language: str, needs_features: bool) -> list[str]:
    """Return everything that is wrong with one cut."""
    if not isinstance(cut, MonoCut) or cut.recording is None:
        return [f"is a {type(cut).__name__} without a mono recording of its own"]
    faults = []
    if len(cut.supervisions) != 1:
        return [f"has {len(cut.supervisions)} supervisions; one is needed"]
    supervision = cut.supervisions[0]
    if cut.sampling_rate != SAMPLE_RATE:
        faults.append(f"is at {cut.sampling_rate} Hz, not {SAMPLE_RATE}")
    tolerance = 1.5 / SAMPLE_RATE
    if supervision.start < -tolerance or supervision.end > cut.duration + tolerance:
        faults.append(f"lasts {cut.duration} s, its supervision runs from {supervision.start} to {supervision.end} s")
    if cut.start < 0 or cut.end > cut.recording.duration + tolerance:
        faults.append(f"runs from {cut.start} to {cut.end} s of a recording of {cut.recording.duration} s")
    text = supervision.text or ""
    if not text:
        faults.append("has no text")
    elif normalize_text(text, language) != text:
        faults.append(f"has a text that is not normalised: {text!r}")
    if needs_features:
        faults += _feature_faults(cut)
    try:
        label_key(cut)
    except DataError as error:
        faults.append(f"has no label key ({error})")
    return faults


def _feature_faults(cut: MonoCut) -> list[str]:
    if not cut.has_features:
        return ["has no stored features"]
    expected = fbank_num_frames(cut.num_samples)
    if cut.features.num_frames != expected or cut.features.num_features != 80:
        return [
            f"has features ({cut.features.num_frames}, {cut.features.num_features}); "
            f"{cut.num_samples} samples make ({expected}, 80)"
        ]
    return []


def part_faults(cuts: Iterable[Cut], language: str, needs_features: bool) -> list[str]:
    """Return "id: fault" for everything that is wrong with the cuts of a part, repeated ids and keys included."""
    faults: list[str] = []
    ids: set[str] = set()
    keys: dict[str, str] = {}
    for cut in cuts:
        found = cut_faults(cut, language, needs_features)
        if cut.id in ids:
            found.append("occurs twice")
        ids.add(cut.id)
        if not found:
            other = keys.setdefault(label_key(cut), cut.id)
            if other != cut.id:
                found.append(f"is the same audio as {other}")
        faults += [f"{cut.id} {fault}" for fault in found]
    return faults


def validate_data(config: ValidateConfig) -> dict[str, dict]:
    """Check all prepared parts; one array of each part's features is read, too.

    Returns:
        By part: cuts, hours, and the share of unknown tokens.
    Raises:
        DataError: something is wrong; the message holds the first faults of every part.
    """
    corpus = read_json(config.data_dir / "corpus.json")
    tokenizer = Tokenizer.load(config.lang_dir)
    precomputed = config.features == "precomputed"
    folder = config.data_dir / ("fbank" if precomputed else "manifests")
    problems, report = [], {}
    seen: dict[str, dict[str, str]] = {"keys": {}, "speakers": {}}
    for part, expected in corpus["parts"].items():
        cuts = list(iterate_cuts(cuts_file(folder, part)))
        faults = part_faults(cuts, corpus["language"], precomputed)
        if not faults:
            faults += _shared_faults(part, cuts, **seen)
        if len(cuts) != expected["cuts"]:
            faults.append(f"{len(cuts)} cuts, corpus.json says {expected['cuts']}")
        if precomputed and not faults:
            faults += _array_faults(cuts)
        unk = _unk_ratio(cuts, tokenizer)
        doubts = [] if faults else _length_faults(cuts, tokenizer, config.max_reject_ratio)
        if unk > config.max_unk_ratio:
            doubts.append(f"{100 * unk:.2f} % of the tokens are unknown to {config.lang_dir}; see --max-unk-ratio")
        if is_train(part):
            faults += doubts
        elif doubts:  # a test set is what it is
            logger.warning("%s: %s", part, "; ".join(doubts))
        if faults:
            more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
            problems.append(f"{part}: {'; '.join(faults[:5])}{more}")
        hours = sum(cut.duration for cut in cuts) / 3600
        report[part] = {"cuts": len(cuts), "hours": round(hours, 6), "unk_ratio": round(unk, 6)}
        logger.info(
            "%s: %d cuts, %.3f h, %.3f %% unknown tokens, %d faults", part, len(cuts), hours, 100 * unk, len(faults)
        )
    if problems:
        raise DataError(
            f"{config.data_dir} is not fit for training: {' | '.join(problems)}. Where files are damaged, run their "
            "stage again with --force"
        )
    return report


def _shared_faults(part: str, cuts: list[Cut], keys: dict[str, str], speakers: dict[str, str]) -> list[str]:
    """Complain of audio that an earlier part holds too; log speakers that one has.  Adds this part to both tables.

    Two parts with one label key train on what they test, or (recordings of one name) would share their labels.
    """
    faults = []
    for cut in cuts:
        key = label_key(cut)
        if keys.setdefault(key, part) != part:
            faults.append(f"{cut.id} is in part {keys[key]} too; parts must differ, in the names of recordings too")
    names = {cut.supervisions[0].speaker for cut in cuts} - {None, "unknown"}
    shared = sorted(name for name in names if speakers.setdefault(name, part) != part)
    if shared:
        logger.warning(
            "%s: %d of %d speakers are in other parts too (%s in %s): error rates on it are not those of new speakers",
            part, len(shared), len(names), shared[0], speakers[shared[0]],
        )  # fmt: skip
    return faults


def _array_faults(cuts: list[Cut]) -> list[str]:
    """Read the first and the last array of each shard, and compare their lengths with the manifest."""
    edges: dict[str, list[Cut]] = {}
    for cut in cuts:
        edges.setdefault(cut.features.storage_path, [cut, cut])[1] = cut
    faults = []
    for shard, ends in edges.items():
        for cut in ends:
            try:
                shape = cut.load_features().shape
            except (OSError, ValueError, RuntimeError, IndexError) as error:
                faults.append(f"{cut.id}: features in {shard} cannot be read ({error})")
                continue
            if shape != (cut.features.num_frames, cut.features.num_features):
                faults.append(f"{cut.id}: {shard} holds {shape}, the manifest says {cut.features.num_frames} frames")
    return faults


def _unk_ratio(cuts: list[Cut], tokenizer: Tokenizer) -> float:
    tokens = [t for cut in cuts for s in cut.supervisions for t in tokenizer.encode(s.text or "")]
    return tokens.count(tokenizer.unk_id) / max(1, len(tokens))


def _length_faults(cuts: list[Cut], tokenizer: Tokenizer, max_ratio: float) -> list[str]:
    """Complain when more than a few utterances are too short for their text."""
    _, left_out = filter_cuts(cuts, tokenizer=tokenizer)
    if len(left_out) <= max_ratio * len(cuts):
        return []
    first = "; ".join(f"{x.id}: {x.reason}" for x in left_out[:3])
    return [
        f"{len(left_out)} of {len(cuts)} utterances have more tokens than encoder frames ({first}); training leaves "
        "them out: allow it with --max-reject-ratio, or make fewer tokens"
    ]
