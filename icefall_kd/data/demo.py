"""The demo corpora: speech synthesised offline by espeak-ng, in LibriSpeech or AISHELL-1 layout.

Formant speech in many voices is right for a corpus that every machine can make by itself, and wrong for
claims about real speech.  espeak-ng (GPL-3.0) only makes data here; this is the one module that loads it.
"""

import ctypes
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import random
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icefall_kd.data.demo_text import make_sentences, vocabulary
from icefall_kd.data.pcm import write_pcm16
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import atomic_folder, fingerprint, read_json, remove_leftovers, write_json
from icefall_kd.runtime.signals import end_with_parent

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
# A change of the synthesis below must change this number, so that old corpora are made again.
VERSION = 3
ACCENTS = {
    "en": ("en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan"),
    "zh": ("cmn-latn-pinyin",),
}
MALE = (
    "m1 m2 m3 m4 m5 m6 m7 m8 Alex Andy Denis Diogo Gene Hugo Jacky Lee Marco Michael Mike Reed adam david edward ian"
).split()
FEMALE = "f1 f2 f3 f4 f5 Alicia Andrea Annie anika aunty belinda linda steph steph2".split()
# (speakers, utterances of each) of train, dev and test.  Mandarin has 14 female voices: half of the speakers.
_SIZES = {"en": (60, 12, 10, 6, 20, 6), "zh": (20, 36, 4, 15, 4, 30)}
# Numbers of espeak_SetParameter, and of the constants that Initialize and Synth take (speak_lib.h).
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_SYNCHRONOUS, _DONT_EXIT, _CHARS_UTF8 = 2, 0x8000, 1


@dataclass(frozen=True, kw_only=True)
class DemoSpec:
    """Everything that determines a demo corpus: the same specification gives the same bytes."""

    language: str = "en"
    """en: LibriSpeech layout; zh: AISHELL-1 layout."""
    train_speakers: int | None = None
    """Speakers of the training part; no voice serves two parts.  This and the next five, None: 60 x 12 English
    utterances to train on, 10 x 6 and 20 x 6 for dev and test; 20 x 36, 4 x 15 and 4 x 30 Mandarin ones,
    where there are fewer voices."""
    train_utts: int | None = None
    """Utterances of each training speaker."""
    dev_speakers: int | None = None
    """Speakers of the dev part."""
    dev_utts: int | None = None
    """Utterances of each dev speaker."""
    test_speakers: int | None = None
    """Speakers of the test part."""
    test_utts: int | None = None
    """Utterances of each test speaker."""
    joined: float = 0.6
    """Share of utterances that are two sentences: a teacher with a fixed window costs the same for both."""
    rate: tuple[int, int] = (140, 180)
    """Range of the speaking rate, words a minute."""
    pitch: tuple[int, int] = (35, 65)
    """Range of the base pitch, 0 to 99."""
    pitch_range: tuple[int, int] = (30, 80)
    """Range of the intonation's width, 0 to 99."""
    snr: tuple[float, float] = (25.0, 40.0)
    """Range of the signal-to-noise ratio in dB; the noise is coloured."""
    gain: tuple[float, float] = (-14.0, -2.0)
    """Range of the peak level in dB below full scale."""
    reverb: tuple[float, float] = (0.02, 0.1)
    """Range of the reverberation time in seconds."""
    seed: int = 1
    """Seed of sentences, voices, noise and reverberation."""

    def __post_init__(self) -> None:
        if self.language not in ACCENTS:
            raise ConfigError(f"--language is {self.language!r}; the demo corpora are {', '.join(ACCENTS)}")
        voices = len(ACCENTS[self.language]) * len(MALE + FEMALE)
        if self.num_speakers > voices:
            raise ConfigError(f"{self.num_speakers} speakers asked for; {self.language!r} has {voices} voices")

    @property
    def sizes(self) -> dict[str, int]:
        """The six numbers of speakers and utterances, those of the language where None was said."""
        names = (f"{part}_{what}" for part in ("train", "dev", "test") for what in ("speakers", "utts"))
        given = {name: getattr(self, name) for name in names}
        defaults = dict(zip(given, _SIZES[self.language], strict=True))
        return {name: defaults[name] if value is None else value for name, value in given.items()}

    @property
    def num_speakers(self) -> int:
        """Speakers of all parts."""
        return sum(speakers for speakers, _ in self.parts.values())

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """(speakers, utterances of each) by part, in the layout's own names."""
        names = ("train-demo", "dev-demo", "test-demo") if self.language == "en" else ("train", "dev", "test")
        numbers = list(self.sizes.values())
        return dict(zip(names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))

    def identity(self) -> str:
        """Return the fingerprint that a finished corpus is marked with."""
        spec = {
            **dataclasses.asdict(self),
            **self.sizes,
            "version": VERSION,
            "words": sorted(vocabulary(self.language)),
        }
        return fingerprint(spec)


@dataclass(frozen=True, kw_only=True)
class DemoUtterance:
    """One utterance of the plan."""

    utt: str
    text: str
    spoken: str


@dataclass(frozen=True, kw_only=True)
class DemoSpeaker:
    """One voice of the plan, with what it says."""

    part: str
    speaker: str
    chapter: str
    voice: str
    sex: str
    rate: int
    pitch: int
    pitch_range: int
    utterances: tuple[DemoUtterance, ...]


def plan_corpus(spec: DemoSpec) -> list[DemoSpeaker]:
    """Return every speaker and utterance of a corpus; no sentence occurs twice."""
    rng = random.Random(f"voices/{spec.seed}")
    voices = [(a, v) for a in ACCENTS[spec.language] for v in MALE + FEMALE]
    rng.shuffle(voices)
    # Even numbers of both sexes in every part, as far as they go.
    male, female = ([v for v in voices if (v[1] in MALE) == is_male] for is_male in (True, False))
    total = sum(speakers * utts for speakers, utts in spec.parts.values())
    sentences = iter(make_sentences(spec.language, total, spec.seed, spec.joined))
    plan = []
    for part, (speakers, utts) in spec.parts.items():
        for _ in range(speakers):
            pool = male if (len(plan) % 2 == 0 and male) or not female else female
            accent, variant = pool.pop()
            number = len(plan) + 1
            speaker, chapter = (
                (str(9000 + number), str(90000 + number)) if spec.language == "en" else (f"S{number:04d}", "W")
            )
            ids = (
                f"{speaker}-{chapter}-{i:04d}" if spec.language == "en" else f"BAC009{speaker}{chapter}{i:04d}"
                for i in range(utts)
            )
            plan.append(
                DemoSpeaker(
                    part=part,
                    speaker=speaker,
                    chapter=chapter,
                    voice=f"{accent}+{variant}",
                    sex="M" if variant in MALE else "F",
                    rate=rng.randint(*spec.rate),
                    pitch=rng.randint(*spec.pitch),
                    pitch_range=rng.randint(*spec.pitch_range),
                    utterances=tuple(
                        DemoUtterance(utt=utt, text=s.text, spoken=s.spoken)
                        for utt, s in zip(ids, sentences, strict=False)
                    ),
                )
            )
    return plan


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """Load and initialise espeak-ng once a process; return the library and its sampling rate."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ConfigError("the demo corpora need espeak-ng: pip install espeakng-loader") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
    if rate <= 0 or not hasattr(library, "espeak_ng_SetRandSeed"):
        raise ConfigError(
            f"espeak-ng does not start with the data in {data} (or is too old): install espeakng-loader 0.2.4"
        )
    return library, rate


def _speak(speaker: DemoSpeaker, spoken: str) -> np.ndarray:
    """Synthesise in this process: (S,) int16 at espeak-ng's own rate.  Changes espeak-ng's state."""
    library, _ = _espeak()
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(wave, num_samples, _events):
        if wave and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
        raise ConfigError(f"this espeak-ng has no voice {speaker.voice!r}: install espeakng-loader 0.2.4")
    for parameter, value in (
        (_RATE, speaker.rate),
        (_VOLUME, 80),
        (_PITCH, speaker.pitch),
        (_RANGE, speaker.pitch_range),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    text = spoken.encode()
    if library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _CHARS_UTF8, None, None) != 0:
        raise DataError(f"espeak-ng cannot synthesise {spoken!r}")
    library.espeak_Synchronize()
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16)


def synthesise(speaker: DemoSpeaker, spoken: str) -> np.ndarray:
    """Synthesise one sentence in a process of its own, so that no state is left over from another one.

    espeak-ng keeps phases and random numbers between two calls, and neither its seed nor a new
    initialisation resets them all; a forked child costs a few milliseconds.

    Returns:
        (S,) float64 in [-1, 1] at 16 kHz.
    """
    _, rate = _espeak()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(_speak(speaker, spoken).tobytes())
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        samples = np.frombuffer(pipe.read(), dtype=np.int16)
    _, status = os.waitpid(child, 0)
    if status != 0 or len(samples) == 0:
        raise DataError(f"espeak-ng gave no speech for {spoken!r} with voice {speaker.voice!r} (status {status})")
    return resample(samples / 32768.0, rate, SAMPLE_RATE)


@functools.cache
def _resampling_taps(rate_in: int, rate_out: int, zeros: int) -> np.ndarray:
    """Return the filters (phases, taps) of :func:`resample`, each with gain 1 at frequency 0."""
    cutoff = min(1.0, rate_out / rate_in) * 0.97
    half = int(np.ceil(zeros / cutoff))
    phases = np.arange(rate_out) * (rate_in / rate_out) % 1.0
    distance = phases[:, None] + half - 1 - np.arange(2 * half)
    taps = np.sinc(distance * cutoff) * np.where(
        np.abs(distance) < half, 0.5 + 0.5 * np.cos(np.pi * distance / half), 0
    )
    return taps / taps.sum(axis=1, keepdims=True)


def resample(wave: np.ndarray, rate_in: int, rate_out: int, zeros: int = 16) -> np.ndarray:
    """Resample (S,) by a Hann-windowed sinc of ``zeros`` zero crossings a side; S' = S * rate_out // rate_in."""
    common = math.gcd(rate_in, rate_out)
    rate_in, rate_out = rate_in // common, rate_out // common
    if rate_in == rate_out:
        return wave
    taps = _resampling_taps(rate_in, rate_out, zeros)
    half = taps.shape[1] // 2
    position = np.arange(len(wave) * rate_out // rate_in) * rate_in
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wave, half), 2 * half)
    return np.einsum("st,st->s", windows[position // rate_out + 1], taps[np.arange(len(position)) % rate_out])


def add_reality(wave: np.ndarray, spec: DemoSpec, utt: str) -> np.ndarray:
    """Add reverberation, coloured noise and a random level, all determined by the seed and the utterance.

    Args:
        wave: (S,) clean speech at 16 kHz.
        spec: ranges of reverberation, noise and level.
        utt: utterance id.
    Returns:
        (S,) float64 in [-1, 1].
    """
    rng = np.random.default_rng(int(fingerprint([spec.seed, utt])[:16], 16))
    silence = np.zeros(int(rng.uniform(0.05, 0.2) * SAMPLE_RATE))
    wave = np.concatenate([silence, wave, silence])
    reverb_time = rng.uniform(*spec.reverb)
    tail = np.arange(1, max(2, int(reverb_time * SAMPLE_RATE)))
    # Amplitude falls by 60 dB over the reverberation time; the direct sound stays 3 to 9 dB above the tail.
    impulse = rng.standard_normal(len(tail)) * 10 ** (-3 * tail / SAMPLE_RATE / reverb_time)
    impulse *= 10 ** (-rng.uniform(3, 9) / 20) / np.sqrt((impulse**2).sum())
    size = 1 << (len(wave) + len(tail)).bit_length()
    response = np.concatenate([[1.0], impulse])
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    # Noise with a spectrum 1/f**slope, from white (0) to brown (2).
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(len(wave))) / np.maximum(frequency, 50.0) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(wave))
    noise *= np.sqrt((wet**2).mean() / (noise**2).mean()) * 10 ** (-rng.uniform(*spec.snr) / 20)
    mixed = wet + noise
    return mixed * (10 ** (rng.uniform(*spec.gain) / 20) / np.abs(mixed).max())


def _write_speaker(speaker: DemoSpeaker, spec: DemoSpec, folder: Path) -> tuple[str, float]:
    """Write one speaker's audio into ``folder``; return the speaker's id and minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    suffix = ".flac" if spec.language == "en" else ".wav"
    for u in speaker.utterances:
        wave = add_reality(synthesise(speaker, u.spoken), spec, u.utt)
        write_pcm16(folder / (u.utt + suffix), wave, SAMPLE_RATE)
        seconds += len(wave) / SAMPLE_RATE
    if spec.language == "en":
        lines = "".join(f"{u.utt} {u.text}\n" for u in speaker.utterances)
        (folder / f"{speaker.speaker}-{speaker.chapter}.trans.txt").write_text(lines, encoding="utf-8")
    return speaker.speaker, seconds / 60


def _audio_folder(root: Path, speaker: DemoSpeaker, language: str) -> Path:
    if language == "en":
        return root / "LibriSpeech" / speaker.part / speaker.speaker / speaker.chapter
    return root / "data_aishell" / "wav" / speaker.part / speaker.speaker


def _write_tables(root: Path, plan: Iterable[DemoSpeaker], spec: DemoSpec, minutes: dict[str, float]) -> None:
    """Write the layout's table of speakers, or its transcripts."""
    if spec.language == "en":
        rows = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
        rows += [f"{s.speaker:<5}| {s.sex} | {s.part:<17}| {minutes[s.speaker]:5.2f} | {s.voice}" for s in plan]
        (root / "LibriSpeech" / "SPEAKERS.TXT").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return
    transcripts = root / "data_aishell" / "transcript"
    transcripts.mkdir(parents=True)
    lines = "".join(f"{u.utt} {u.text}\n" for s in plan for u in s.utterances)
    (transcripts / "aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")


def make_demo(root: Path, spec: DemoSpec, nj: int = 1) -> bool:
    """Make a demo corpus in ``root``, unless it is there already.

    The corpus is built in a folder beside ``root`` and renamed when complete, so ``root`` is either absent
    or whole; ``root/demo.json`` holds the specification, its fingerprint and the size of every file.  A corpus whose
    files have lost something since is made again.

    Args:
        root: folder of the corpus; ``LibriSpeech`` or ``data_aishell`` lies in it.
        spec: what to make.
        nj: processes.
    Returns:
        Whether anything was done.
    Raises:
        DataError: ``root`` holds something that is no demo corpus.
        ConfigError: espeak-ng is missing.
    """
    marker = root / "demo.json"
    if marker.is_file() and _is_whole(root, spec):
        return False
    if root.exists() and any(root.iterdir()) and not marker.is_file():
        raise DataError(f"{root} holds files and no demo.json: choose another folder or empty this one")
    plan = plan_corpus(spec)
    remove_leftovers(root.parent, root.name)
    # A folder of this process alone: one that outlives the kill of its shell may still be building its own.
    with atomic_folder(root, marker.name) as building:
        folders = [_audio_folder(building, s, spec.language) for s in plan]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max(1, min(nj, len(plan))), spawn, initializer=end_with_parent) as pool:
            minutes = dict(pool.map(_write_speaker, plan, [spec] * len(plan), folders, chunksize=1))
        _write_tables(building, plan, spec, minutes)
        counts = {part: {"utterances": s * u, "speakers": s} for part, (s, u) in spec.parts.items()}
        for part in counts:
            counts[part]["hours"] = round(sum(minutes[s.speaker] for s in plan if s.part == part) / 60, 6)
        what = dataclasses.asdict(spec) | spec.sizes
        content = {"fingerprint": spec.identity(), "spec": what, "parts": counts, "bytes": _sizes(building)}
        write_json(building / marker.name, content)
    return True


def _sizes(root: Path) -> dict[str, int]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in files}


def _is_whole(root: Path, spec: DemoSpec) -> bool:
    """Return whether ``root`` is the corpus of ``spec`` and all of its files are as long as they were made."""
    try:
        made = read_json(root / "demo.json")
    except DataError as error:
        logger.warning("%s is made again: %s", root, error)
        return False
    if made["fingerprint"] != spec.identity():
        return False
    found = _sizes(root)
    damaged = [name for name, size in made.get("bytes", {}).items() if found.get(name) != size]
    if damaged:
        logger.warning(
            "%s is made again: %s has %s of %d bytes (and %d more files)",
            root,
            damaged[0],
            found.get(damaged[0], "none"),
            made["bytes"][damaged[0]],
            len(damaged) - 1,
        )
    return not damaged
