"""Corpora on disk: which parts there are, whether they are complete, and their utterances.

Every reader gives plain :class:`Utterance` rows; ``data/recordings.py`` turns rows into cuts.
"""

import contextlib
import gzip
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import read_json

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")

TABLE: dict[str, dict[str, tuple[int, float]]] = {
    "librispeech": {
        "train-clean-100": (28539, 100.6),
        "train-clean-360": (104014, 363.6),
        "train-other-500": (148688, 496.9),
        "dev-clean": (2703, 5.4),
        "dev-other": (2864, 5.1),
        "test-clean": (2620, 5.4),
        "test-other": (2939, 5.3),
    },
    "mini": {"train-clean-5": (1519, 5.3), "dev-clean-2": (1089, 2.0)},
    "aishell": {"train": (120098, 150.9), "dev": (14326, 18.1), "test": (7176, 10.0)},
}
"""Utterances with transcripts, and hours, of every part.

librispeech and aishell: the statistics in icefall's egs/{librispeech,aishell}/ASR/local/
display_manifest_statistics.py (lhotse's ``describe``); those of the training parts are with copies at 0.9 and 1.1 of
the speed, so their counts are divided by 3 and their hours by 1 + 1/0.9 + 1/1.1.  The counts of LibriSpeech are also
those of the data set card openslr/librispeech_asr.  Table 1 of the paper (Panayotov et al., ICASSP 2015) has the hours
of dev-other and test-other the other way round, 5.3 and 5.1.

mini (SLR31): from memory, no published source was found.  The names promise 5 and 2 hours; where the counts are wrong,
the check says so with both figures, and ``--partial true`` goes on.

musan is not here: noise is drawn at random, so a file more or less is no fault, and no counts of it were found.
"""
# Hours are given to one decimal, and differ a little between decoders.
HOURS_TOLERANCE = 0.05
# What unpacking raises when an archive is damaged, or holds what the filter refuses.
_UNFIT_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance as a corpus lists it."""

    utt: str
    """Id, unique within its part."""
    audio: Path | None
    """The audio file; None: listed in the transcripts, and absent."""
    text: str | None
    """The transcript as it stands there; None: it has none."""
    speaker: str = "unknown"
    """Speaker id."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus on disk, by part."""

    name: str
    """librispeech, mini, aishell, demo, or trans."""
    language: str
    """"en" or "zh": decides the text normalisation."""
    parts: dict[str, list[Utterance]]
    """Utterances by part, sorted by id."""
    expected: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Published utterances and hours by part; empty for corpora of one's own."""


def open_corpus(name: str, corpus_dir: Path, parts: Sequence[str] = (), language: str = "auto") -> Corpus:
    """Read the list of utterances of a corpus.

    Args:
        name: librispeech, mini, demo (either layout), aishell, or trans (any folder with \\*.trans.txt files).
        corpus_dir: the folder that holds it; the layout's own top folder (LibriSpeech, data_aishell) may be left out.
        parts: which parts; none: all that the corpus has.
        language: "en", "zh", or "auto" by the corpus or by the script of its transcripts.
    Raises:
        DataError: the folder or a part is missing or holds no utterances.
    """
    if not corpus_dir.is_dir():
        raise DataError(f"there is no folder {corpus_dir}; give the corpus with --corpus-dir")
    is_aishell = name == "aishell" or (name == "demo" and _descend(corpus_dir, "data_aishell").name == "data_aishell")
    if name in ("librispeech", "mini", "demo", "aishell"):
        root = _descend(corpus_dir, "data_aishell" if is_aishell else "LibriSpeech")
        expected = _demo_table(root) if name == "demo" else TABLE[name]
        audio_root = root / "wav" if is_aishell else root
        chosen = list(parts) or list(expected)
        missing = [p for p in chosen if not (audio_root / p).is_dir()]
        if missing:
            there = sorted(p.name for p in audio_root.iterdir() if p.is_dir()) if audio_root.is_dir() else []
            raise DataError(
                f"{root} lacks the part{'s'[: len(missing) > 1]} {', '.join(missing)}; it has "
                f"{', '.join(there) or 'none'}. Complete the corpus, or choose with --parts"
            )
        transcripts = _aishell_transcripts(root) if is_aishell else None
        found = {p: read_part(audio_root / p, transcripts) for p in chosen}
        expected = {p: expected[p] for p in chosen if p in expected}
        corpus_language = "zh" if is_aishell else "en"
    elif name == "trans":
        found, expected = {p: read_part(f) for p, f in _trans_parts(corpus_dir, parts).items()}, {}
        corpus_language = guess_language(u.text for rows in found.values() for u in rows)
    else:
        raise ConfigError(f"--corpus is {name!r}; it must be librispeech, mini, demo, aishell or trans")
    for part, rows in found.items():
        if not rows:
            raise DataError(f"part {part} of {corpus_dir} holds no utterances")
    return Corpus(
        name=name,
        language=corpus_language if language == "auto" else language,
        parts=found,
        expected=expected,
    )


def _descend(folder: Path, top: str) -> Path:
    """Return the layout's top folder, wherever of three places it is ("aishell" is where lhotse unpacks AISHELL-1)."""
    for candidate in (folder / top, folder / "aishell" / top):
        if candidate.is_dir():
            return candidate
    return folder


def _demo_table(root: Path) -> dict[str, tuple[int, float]]:
    """Return the counts that the demo's maker left beside (or above) its top folder."""
    for folder in (root, root.parent):
        if (folder / "demo.json").is_file():
            parts = read_json(folder / "demo.json")["parts"]
            return {part: (row["utterances"], row["hours"]) for part, row in parts.items()}
    raise DataError(f"{root} holds no demo corpus (demo.json is missing); make it with local/prepare_demo.py")


def _trans_parts(corpus_dir: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Return the folders of parts: sub-folders, or the whole when it has no sub-folders with transcripts."""
    if parts:
        folders = {p: corpus_dir / p for p in parts}
        if not all(f.is_dir() for f in folders.values()):
            missing = [p for p, f in folders.items() if not f.is_dir()]
            raise DataError(f"{corpus_dir} has no sub-folder {', '.join(missing)}; see --parts")
        return folders
    if any(corpus_dir.glob("*.trans.txt")):
        return {corpus_dir.name: corpus_dir}
    folders = {f.name: f for f in sorted(corpus_dir.iterdir()) if f.is_dir() and any(f.rglob("*.trans.txt"))}
    if not folders:
        raise DataError(f"{corpus_dir} holds no *.trans.txt files (lines of '<utterance> TEXT')")
    return folders


def read_part(folder: Path, transcripts: dict[str, str] | None = None) -> list[Utterance]:
    """Return the utterances of a folder: its audio files joined with transcripts by file name.

    Args:
        folder: searched recursively; the first sub-folder level is the speaker.
        transcripts: text by utterance; None: the ``*.trans.txt`` files in ``folder``, and what they list
            without audio is returned, too.
    """
    listed = _read_trans_files(folder) if transcripts is None else {}
    texts = listed if transcripts is None else transcripts
    rows: dict[str, Utterance] = {}
    for path in _files_below(folder):
        if path.suffix.lower() not in AUDIO_SUFFIXES:
            continue
        inner = path.relative_to(folder).parts
        speaker = inner[0] if len(inner) > 1 else "unknown"
        if path.stem in rows:
            raise DataError(
                f"two audio files of {folder} are named {path.stem}: {rows[path.stem].audio} and {path}; "
                "give them names of their own, in the transcripts too"
            )
        rows[path.stem] = Utterance(utt=path.stem, audio=path, text=texts.get(path.stem), speaker=speaker)
    for utt, text in listed.items():
        if utt not in rows:
            rows[utt] = Utterance(utt=utt, audio=None, text=text)
    return [rows[utt] for utt in sorted(rows)]


def _files_below(folder: Path) -> list[Path]:
    """Return all files of a folder, sorted; a part of it that cannot be read is an error, not an empty folder."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{folder} cannot be read: {error}; check the permissions and links there") from error

    return sorted(
        Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True) for name in names
    )


def _read_trans_files(folder: Path) -> dict[str, str]:
    return _read_transcripts(path for path in _files_below(folder) if path.name.endswith(".trans.txt"))


def _aishell_transcripts(root: Path) -> dict[str, str]:
    files = sorted((root / "transcript").glob("*.txt"))
    if not files:
        raise DataError(f"{root}/transcript holds no transcript file; the download is incomplete")
    return _read_transcripts(files)


def _read_transcripts(paths: Iterable[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in paths:
        for utt, text in _transcript_lines(path):
            if texts.get(utt, text) != text:
                raise DataError(f"{path}: utterance {utt} has two different transcripts; remove one")
            texts[utt] = text
    return texts


def _transcript_lines(path: Path) -> Iterable[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is no readable UTF-8 ({error}); convert it") from error
    for line in lines:
        utt, *text = line.split(maxsplit=1) or [""]  # at a space or a tab
        if utt:
            yield utt, "".join(text).strip()


def guess_language(texts: Iterable[str | None]) -> str:
    """Return "zh" when most of the letters of ``texts`` are hanzi, else "en"."""
    text = "".join(t for t in texts if t)
    hanzi = len(re.findall("[\u4e00-\u9fff]", text))
    return "zh" if hanzi > len(text.replace(" ", "")) / 2 else "en"


@dataclass(frozen=True, kw_only=True)
class PartCheck:
    """What a part holds beside what it should hold."""

    part: str
    utterances: int
    """Utterances with audio and transcript."""
    hours: float
    """Hours of these, by the headers of the files."""
    expected: tuple[int, float] | None
    """Published utterances and hours."""

    @property
    def complete(self) -> bool:
        """Whether count and hours are the table's (always, without a table)."""
        if self.expected is None:
            return True
        count, hours = self.expected
        return self.utterances == count and abs(self.hours - hours) <= HOURS_TOLERANCE * hours

    def __str__(self) -> str:
        """One line for the log."""
        table = (
            "" if self.expected is None else f"; the table says {self.expected[0]} utterances, {self.expected[1]:.2f} h"
        )
        return f"{self.part}: {self.utterances} utterances, {self.hours:.2f} h{table}"


def check_corpus(corpus: Corpus, nj: int = 1, partial: bool = False, max_reject_ratio: float = 0.01) -> list[PartCheck]:
    """Compare every part with the table of published counts and hours.

    Args:
        corpus: what :func:`open_corpus` returned.
        nj: threads that read headers.
        partial: accept parts that differ from the table.
        max_reject_ratio: share of the published utterances that may be missing (they become rejects later).
    Raises:
        DataError: a part differs from the table, and ``partial`` is false.
    """
    checks = []
    for part, rows in corpus.parts.items():
        usable = [r.audio for r in rows if r.audio is not None and r.text]
        with ThreadPoolExecutor(max(1, min(nj, len(usable) or 1))) as pool:
            seconds = sum(pool.map(_header_seconds, usable))
        checks.append(
            PartCheck(part=part, utterances=len(usable), hours=seconds / 3600, expected=corpus.expected.get(part))
        )
        logger.info("%s", checks[-1])
    wrong = [c for c in checks if not c.complete and not _within(c, max_reject_ratio)]
    if wrong and not partial:
        raise DataError(
            f"{corpus.name} is not complete: {' | '.join(map(str, wrong))}. Complete the download, or say "
            "--partial true to go on with what is there"
        )
    return checks


def _within(check: PartCheck, max_reject_ratio: float) -> bool:
    """Whether the part lacks no more utterances than may be rejected."""
    count, hours = check.expected
    few = 0 <= count - check.utterances <= max_reject_ratio * count
    return few and abs(check.hours - hours) <= (HOURS_TOLERANCE + max_reject_ratio) * hours


def _header_seconds(path: Path) -> float:
    try:
        info = soundfile.info(path)
    except (soundfile.SoundFileError, OSError):
        return 0.0  # the manifest stage rejects it with the reason
    return info.frames / info.samplerate


def download(name: str, folder: Path, parts: Sequence[str] = ()) -> None:
    """Download a corpus with lhotse's downloader, as far as it is not in ``folder``.

    What lies there without an archive was put there by the user, and is left alone; a download that was
    stopped has an archive and no mark of completion, and goes on.

    Args:
        name: librispeech, mini, aishell or musan.
        folder: where it goes.
        parts: parts of librispeech and mini; none: all.
    Raises:
        DataError: an archive is damaged, or would write outside of the folder.
    """
    from lhotse.recipes import download_aishell, download_librispeech, download_musan

    folder.mkdir(parents=True, exist_ok=True)
    if name in ("librispeech", "mini"):
        root = _descend(folder, "LibriSpeech")
        wanted = [
            p for p in (parts or TABLE[name]) if _absent(root / p, folder / f"{p}.tar.gz", root / p / ".completed")
        ]
        if wanted:
            logger.info("downloading %s: %s", name, ", ".join(wanted))
            with _unpacked_inside(folder):
                download_librispeech(folder, dataset_parts=wanted)
    elif name == "aishell":
        root = _descend(folder, "data_aishell")
        if _absent(root / "wav", folder / "data_aishell.tgz", root / ".completed"):
            logger.info("downloading aishell")
            with _unpacked_inside(folder):
                download_aishell(folder)
    elif name == "musan":
        if _absent(folder / "musan", folder / "musan.tar.gz", folder / ".musan_completed"):
            logger.info("downloading musan")
            with _unpacked_inside(folder):
                download_musan(folder)
    else:
        raise ConfigError(f"{name!r} cannot be downloaded; give a folder with --corpus-dir")


@contextlib.contextmanager
def _unpacked_inside(folder: Path) -> Iterator[None]:
    """Let lhotse unpack what Python's data filter lets through: files and folders inside, no links out of them.

    lhotse itself compares names alone, and follows links that the archive made before.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ConfigError("this Python unpacks archives without checks (3.11.4 is the first that has them); update it")
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    except Exception as error:
        # What lhotse raises of names is of no class of its own.
        if not isinstance(error, _UNFIT_ARCHIVE) and "Path Traversal" not in str(error):
            raise
        raise DataError(
            f"an archive in {folder} is damaged, or would write outside of it ({error}); delete it and start again"
        ) from error
    finally:
        tarfile.TarFile.extraction_filter = before


def _absent(folder: Path, archive: Path, completed: Path) -> bool:
    return not folder.is_dir() or (archive.is_file() and not completed.is_file())
