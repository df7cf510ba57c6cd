"""From utterances to cuts: every recording is checked, and what is unfit is rejected with the reason."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from icefall_kd.data.corpora import Utterance, guess_language, open_corpus, read_part
from icefall_kd.data.manifests import read_cuts
from icefall_kd.errors import DataError
from icefall_kd.labels.audio import UNREADABLE
from icefall_kd.labels.keys import speed_copy, stamp_source
from icefall_kd.text.normalize import normalize_text

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16000
# Shorter audio (a tenth of a second) gives no encoder frame at any speed, and may give no feature frame at all.
SHORTEST = 0.1


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One line of a rejects file."""

    id: str
    """Utterance (or cut) id."""
    reason: str
    """What is wrong with it."""
    where: str = ""
    """The audio file."""

    def to_dict(self) -> dict:
        """Return the plain form that is written."""
        return asdict(self)


def make_cuts(
    utterances: Sequence[Utterance], language: str, *, nj: int = 1, check_audio: str = "full"
) -> tuple[list[MonoCut], list[Reject]]:
    """Turn utterances into cuts at 16 kHz, one supervision each, text normalised, source stamped.

    Args:
        utterances: rows of one part.
        language: of the text normalisation.
        nj: threads; clipped to the number of utterances.
        check_audio: "full" decodes every file; "header" believes the headers.
    Returns:
        The cuts, and what was rejected: unreadable audio or less than ``SHORTEST`` of it, all samples zero, a header
        that promises another length, no or an empty transcript.
    """
    nj = max(1, min(nj, len(utterances)))
    with ThreadPoolExecutor(nj) as pool:
        results = list(pool.map(lambda u: _make_cut(u, language, check_audio == "full"), utterances))
    cuts = [r for r in results if not isinstance(r, Reject)]
    return cuts, [r for r in results if isinstance(r, Reject)]


def _make_cut(utterance: Utterance, language: str, decode: bool) -> MonoCut | Reject:
    def reject(reason: str) -> Reject:
        return Reject(id=utterance.utt, reason=reason, where=str(utterance.audio or ""))

    if utterance.audio is None:
        return reject("no audio file")
    text = normalize_text(utterance.text or "", language)
    if not text:
        return reject("no transcript" if utterance.text is None else "empty transcript")
    recording = read_recording(utterance.utt, utterance.audio, decode)
    if isinstance(recording, str):
        return reject(recording)
    if recording.duration < SHORTEST:
        return reject(f"lasts {recording.duration:.4f} s; at least {SHORTEST} s are needed")
    supervision = SupervisionSegment(
        id=utterance.utt,
        recording_id=recording.id,
        start=0.0,
        duration=recording.duration,
        text=text,
        language=language,
        speaker=utterance.speaker,
    )
    return _mono_cut(recording, [supervision])


def _mono_cut(recording: Recording, supervisions: list[SupervisionSegment]) -> MonoCut:
    """Return the whole recording as a stamped cut."""
    cut = MonoCut(
        id=recording.id,
        start=0.0,
        duration=recording.duration,
        channel=0,
        supervisions=supervisions,
        recording=recording,
    )
    return stamp_source(cut, 1)


def read_recording(name: str, path: Path, decode: bool = True) -> Recording | str:
    """Describe an audio file, resampled to 16 kHz when read; or return the reason why it is unfit."""
    try:
        info = soundfile.info(path)
        wave = soundfile.read(path, dtype="float32", always_2d=True)[0] if decode else None
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        return f"unreadable: {error}"
    if info.channels != 1:
        return f"{info.channels} channels; mono is needed"
    if info.frames == 0:
        return "no samples"
    if wave is not None:
        if len(wave) != info.frames:
            return f"the header says {info.frames} samples, {len(wave)} were read"
        if not np.isfinite(wave).all():
            return "samples that are no finite numbers"
        if not wave.any():
            return "all samples are zero"
    recording = Recording(
        id=name,
        sources=[AudioSource(type="file", channels=[0], source=str(path.absolute()))],
        sampling_rate=info.samplerate,
        num_samples=info.frames,
        duration=info.frames / info.samplerate,
        channel_ids=[0],
    )
    return recording if info.samplerate == SAMPLE_RATE else recording.resample(SAMPLE_RATE)


def prepare_cut_set(path: Path, language: str = "auto", nj: int = 1) -> tuple[list[MonoCut], list[Reject], str]:
    """Make any lhotse cut set fit for training: one supervision a cut, 16 kHz, mono, text normalised, stamped.

    Args:
        path: a cut set file.
        language: of the text normalisation; "auto": by the script of the transcripts.
        nj: threads.
    Returns:
        The cuts, the rejects, and the language.
    """
    found: list[Cut] = []
    for cut in read_cuts(path):
        found += [cut] if len(cut.supervisions) <= 1 else cut.trim_to_supervisions(keep_overlapping=False)
    if language == "auto":
        language = guess_language(s.text for cut in found for s in cut.supervisions)
    with ThreadPoolExecutor(max(1, min(nj, len(found)))) as pool:
        results = list(pool.map(lambda cut: _fit_cut(cut, language), found))
    rejects = [r for r in results if isinstance(r, Reject)]
    return [r for r in results if not isinstance(r, Reject)], rejects, language


def _fit_cut(cut: Cut, language: str) -> MonoCut | Reject:
    if not isinstance(cut, MonoCut) or cut.recording is None:
        return Reject(id=cut.id, reason=f"a {type(cut).__name__} without a mono recording of its own")
    text = normalize_text((cut.supervisions[0].text or "") if cut.supervisions else "", language)
    if not text:
        return Reject(id=cut.id, reason="no transcript")
    if cut.duration < SHORTEST:
        return Reject(id=cut.id, reason=f"lasts {cut.duration:.4f} s; at least {SHORTEST} s are needed")
    try:
        cut = stamp_source(cut.drop_features(), _speed_of(cut))
        if cut.sampling_rate != SAMPLE_RATE:
            cut = cut.resample(SAMPLE_RATE)
        wave = cut.load_audio()
    except UNREADABLE as error:
        return Reject(id=cut.id, reason=f"unreadable: {error}", where=str(cut.recording.sources[0].source))
    for unfit, reason in (
        (not np.isfinite(wave).all(), "samples that are no finite numbers"),
        (not wave.any(), "all samples are zero"),
    ):
        if unfit:
            return Reject(id=cut.id, reason=reason, where=str(cut.recording.sources[0].source))
    supervision = fastcopy(cut.supervisions[0], text=text, language=language)
    return fastcopy(cut, supervisions=[supervision])


def _speed_of(cut: MonoCut) -> Fraction:
    """Return the speed at which a cut of somebody else's set already is."""
    stamp = (cut.custom or {}).get("source")
    if stamp:
        return Fraction(stamp["speed"])
    speed = Fraction(1)
    for transform in cut.recording.transforms or []:
        row = transform if isinstance(transform, dict) else transform.to_dict()
        if row["name"] == "Speed":
            speed *= Fraction(str(row["kwargs"]["factor"]))
    return speed


def with_speed_copies(cuts: Sequence[MonoCut], speeds: Sequence[str] = ("9/10", "11/10")) -> Iterator[MonoCut]:
    """Yield the cuts, then their stamped copies at every other speed (read at that speed when loaded)."""
    yield from cuts
    for speed in speeds:
        yield from (speed_copy(cut, speed) for cut in cuts)


def check_rejects(part: str, rejects: Sequence[Reject], total: int, max_reject_ratio: float, where: Path) -> None:
    """Log the rejects of a part; DataError above the ratio, naming the first five."""
    if not rejects:
        return
    first = "; ".join(f"{r.id}: {r.reason}" for r in rejects[:5])
    message = f"part {part}: {len(rejects)} of {total} utterances rejected (see {where}): {first}"
    if len(rejects) > max_reject_ratio * total:
        raise DataError(f"{message}. Repair them, or allow them with --max-reject-ratio (now {max_reject_ratio})")
    logger.warning("%s", message)


def noise_cuts(folder: Path, window: float = 10.0, shortest: float = 5.0) -> list[MonoCut]:
    """Return windows of all recordings of a noise corpus (MUSAN), without supervisions.

    Args:
        folder: searched recursively for audio.
        window: length of a window in seconds.
        shortest: shorter windows are left out.
    """
    root = folder / "musan" if (folder / "musan").is_dir() else folder
    cuts: list[Cut] = []
    for utterance in read_part(root):
        recording = read_recording(utterance.utt, utterance.audio, decode=False) if utterance.audio else "no audio"
        if isinstance(recording, str):
            logger.warning("%s is left out: %s", utterance.audio, recording)
            continue
        cuts += CutSet.from_cuts([_mono_cut(recording, [])]).cut_into_windows(window)
    kept = [cut for cut in cuts if cut.duration >= shortest]
    if not kept:
        raise DataError(f"{root} holds no recording of at least {shortest} s")
    return kept


def cuts_from_folder(folder: Path, language: str = "auto") -> CutSet:
    """Return the utterances of a folder of audio with ``*.trans.txt`` files, in memory; unfit ones are logged.

    Raises:
        DataError: nothing in the folder is fit.
    """
    corpus = open_corpus("trans", folder, language=language)
    cuts: list[Cut] = []
    for part, rows in corpus.parts.items():
        some, rejects = make_cuts(rows, corpus.language, nj=4)
        check_rejects(part, rejects, len(rows), 1.0, folder)
        cuts += some
    if not cuts:
        raise DataError(f"nothing in {folder} is fit to be decoded")
    return CutSet.from_cuts(cuts)
