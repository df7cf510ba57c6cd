"""Connected digits: strings joined from recordings of single digits, with exact transcripts in any amount.

Made for the Free Spoken Digit Dataset in trans layout, ``<split>/<speaker>/<...>-<take>.flac`` with one
``*.trans.txt``.  Takes decide the split, so no recording serves both.
"""

import os
import random
import re
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from icefall_kd.data.corpora import Utterance, read_part
from icefall_kd.data.pcm import write_pcm16
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import fingerprint, read_json, sha256_file, write_json

VERSION = 1
DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
# Probabilities of the three digits that may follow one in the bigram grammar: 1.3 bits a digit instead of 3.3.
FOLLOWERS = (0.6, 0.3, 0.1)


@dataclass(frozen=True, kw_only=True)
class DigitsSpec:
    """What strings are made."""

    num_train: int = 3000
    """Training strings."""
    num_dev: int = 2000
    """Dev strings."""
    dev_takes: tuple[int, int] = (5, 9)
    """Takes of the dev split, first and last."""
    train_takes: tuple[int, int] = (10, 49)
    """Takes of the training split, first and last."""
    length: tuple[int, int] = (3, 7)
    """Digits a string, least and most."""
    pause: tuple[float, float] = (0.05, 0.2)
    """Seconds of pause between (and around) digits, least and most."""
    noise_db: float = -60.0
    """Level of the noise in the pauses, in dB below full scale."""
    seed: int = 7
    """Seed of everything drawn."""
    grammar: Literal["uniform", "bigram"] = "uniform"
    """uniform: digits do not depend on each other; bigram: each is followed by three digits only."""

    def __post_init__(self) -> None:
        if self.dev_takes[0] <= self.train_takes[1] and self.train_takes[0] <= self.dev_takes[1]:
            raise ConfigError(f"--dev-takes {self.dev_takes} and --train-takes {self.train_takes} overlap")
        if not 1 <= self.length[0] <= self.length[1]:
            raise ConfigError(f"--length is {self.length}; it must be least,most with least at least 1")

    @property
    def splits(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """(strings, takes) of every split."""
        return {"train": (self.num_train, self.train_takes), "dev": (self.num_dev, self.dev_takes)}

    def describe(self) -> dict:
        """Return the options as plain data; the grammar stands there only if it is not the uniform one."""
        options = asdict(self)
        if self.grammar == "uniform":  # as before there was a choice: those corpora are up to date
            del options["grammar"]
        return options


@dataclass(frozen=True, kw_only=True)
class DigitString:
    """One string of the plan."""

    utt: str
    speaker: str
    sources: tuple[str, ...]
    """Ids of the recordings, in order."""
    text: str


def bigram_grammar(seed: int) -> dict[str, dict[str, float]]:
    """Draw a bigram grammar: of each digit those that may follow it, with their probabilities FOLLOWERS.

    Every digit follows three others, and three follow it, with the same three probabilities: digits are uniform at
    every place of a string, as without a grammar, so what differs is context alone (our design).
    """
    rng = random.Random(f"grammar/{seed}")
    orders = [DIGITS]
    while len(orders) <= len(FOLLOWERS):  # orders of the digits that have no two alike at any place
        order = tuple(rng.sample(DIGITS, len(DIGITS)))
        if not any(a == b for other in orders for a, b in zip(order, other, strict=True)):
            orders.append(order)
    return {d: {order[i]: p for order, p in zip(orders[1:], FOLLOWERS, strict=True)} for i, d in enumerate(DIGITS)}


def take_of(utterance: str) -> int:
    """Return the take number that ends an utterance's id."""
    match = re.search(r"[-_](\d+)$", utterance)
    if match is None:
        raise DataError(f"utterance {utterance} does not end in a take number, as in fsdd-george-0-05")
    return int(match[1])


def plan_digits(recordings: list[Utterance], spec: DigitsSpec) -> dict[str, list[DigitString]]:
    """Draw the strings of both splits; the speakers and digits are uniform (their order is the grammar's), takes are of
    the split alone.

    Args:
        recordings: single digits with transcripts.
        spec: what to draw.
    Raises:
        DataError: a transcript is no digit, or a speaker has no recording of a digit in a split.
    """
    pools: dict[str, dict[str, dict[str, list[str]]]] = {s: defaultdict(lambda: defaultdict(list)) for s in spec.splits}
    for row in recordings:
        digit = (row.text or "").upper()
        if digit not in DIGITS or row.audio is None:
            raise DataError(f"{row.utt} ({row.audio}) has the transcript {row.text!r}; one digit is needed")
        for split, (_, (first, last)) in spec.splits.items():
            if first <= take_of(row.utt) <= last:
                pools[split][row.speaker][digit].append(row.utt)
    plans = {}
    for split, (count, takes) in spec.splits.items():
        rng = random.Random(f"{split}/{spec.seed}")
        speakers = sorted(pools[split])
        if not speakers:
            raise DataError(f"no recording has a take from {takes[0]} to {takes[1]}, those of {split}")
        for speaker in speakers:
            missing = [d for d in DIGITS if d not in pools[split][speaker]]
            if missing:
                raise DataError(f"{split}: speaker {speaker} has no recording of {', '.join(missing)} in takes {takes}")
        plans[split] = [_draw(rng, split, i, speakers, pools[split], spec) for i in range(count)]
    shared = set.intersection(*({s for string in strings for s in string.sources} for strings in plans.values()))
    if shared:
        raise DataError(f"recordings serve both splits: {', '.join(sorted(shared)[:5])}; check their ids")
    return plans


def _draw(rng: random.Random, split: str, index: int, speakers, pool, spec: DigitsSpec) -> DigitString:
    speaker = rng.choice(speakers)
    length = rng.randint(*spec.length)
    if spec.grammar == "uniform":
        digits = [rng.choice(DIGITS) for _ in range(length)]
    else:
        follow, digits = bigram_grammar(spec.seed), [rng.choice(DIGITS)]
        while len(digits) < length:
            following = follow[digits[-1]]
            digits += rng.choices(list(following), list(following.values()))
    return DigitString(
        utt=f"digits-{split}-{speaker}-{index:05d}",
        speaker=speaker,
        sources=tuple(rng.choice(pool[speaker][d]) for d in digits),
        text=" ".join(digits),
    )


def join(waves: list[np.ndarray], rate: int, spec: DigitsSpec, utt: str) -> np.ndarray:
    """Join recordings with pauses of low noise before, between and after them.

    Args:
        waves: (S_i,) float64 each.
        rate: their sampling rate.
        spec: pauses and noise.
        utt: utterance id; with the seed it determines the pauses.
    Returns:
        (S,) float64.
    """
    rng = np.random.default_rng(int(fingerprint([spec.seed, utt])[:16], 16))
    pieces = []
    for i in range(len(waves) + 1):
        pieces.append(rng.standard_normal(round(rng.uniform(*spec.pause) * rate)) * 10 ** (spec.noise_db / 20))
        if i < len(waves):
            pieces.append(waves[i])
    return np.clip(np.concatenate(pieces), -1.0, 1.0)


def make_digits(source: Path, out: Path, spec: DigitsSpec) -> bool:
    """Write connected digits as a trans corpus, ``out/{train,dev}/<speaker>/<utt>.flac``, unless it is there.

    Built in a folder beside ``out`` and renamed when complete; ``out/digits.json`` holds the specification.

    Args:
        source: folder of single digits (all its splits are searched).
        out: folder of the corpus.
        spec: what to make.
    Returns:
        Whether anything was done.
    """
    recordings = read_part(source)
    # The speaker is the folder right above the recording, whatever lies above it.
    by_id = {r.utt: Utterance(utt=r.utt, audio=r.audio, text=r.text, speaker=_speaker(r)) for r in recordings}
    if not by_id:
        raise DataError(f"{source} holds no recordings of digits")
    marker = out / "digits.json"
    content = [[u, r.text, sha256_file(r.audio) if r.audio else None] for u, r in by_id.items()]
    identity = fingerprint([VERSION, spec.describe(), content])
    if marker.is_file() and read_json(marker)["fingerprint"] == identity:
        return False
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise DataError(f"{out} holds files and no digits.json: choose another folder or empty this one")
    plans = plan_digits(list(by_id.values()), spec)
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    for split, strings in plans.items():
        _write_split(building / split, strings, by_id, spec)
    parts = {split: {"utterances": len(strings)} for split, strings in plans.items()}
    description = {"fingerprint": identity, "spec": spec.describe(), "parts": parts}
    if spec.grammar == "bigram":
        description["grammar"] = bigram_grammar(spec.seed)
    write_json(building / "digits.json", description)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(building, out)
    return True


def _speaker(row: Utterance) -> str:
    return row.audio.parent.name if row.audio is not None else row.speaker


def _write_split(folder: Path, strings: list[DigitString], by_id: dict[str, Utterance], spec: DigitsSpec) -> None:
    waves: dict[str, np.ndarray] = {}
    rates: set[int] = set()
    for string in strings:
        for name in string.sources:
            if name not in waves:
                try:
                    waves[name], rate = soundfile.read(by_id[name].audio)
                except (soundfile.SoundFileError, OSError) as error:
                    raise DataError(f"{by_id[name].audio} cannot be read: {error}") from error
                rates.add(rate)
        if len(rates) != 1:
            raise DataError(f"the recordings have several sampling rates: {sorted(rates)}")
        path = folder / string.speaker / f"{string.utt}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        (rate,) = rates
        wave = join([waves[name] for name in string.sources], rate, spec, string.utt)
        write_pcm16(path, wave, rate)
    lines = "".join(f"{s.utt} {s.text}\n" for s in strings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.trans.txt").write_text(lines, encoding="utf-8")
