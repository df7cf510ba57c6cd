"""The stages of data preparation behind ``prepare.sh``: manifests, tokens, lexicon."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lhotse.cut import MonoCut

from icefall_kd.config.checks import at_least
from icefall_kd.data.corpora import open_corpus
from icefall_kd.data.manifests import cuts_file, iterate_cuts, part_of, write_cuts, write_jsonl
from icefall_kd.data.recordings import Reject, check_rejects, make_cuts, prepare_cut_set, with_speed_copies
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.keys import label_key
from icefall_kd.runtime.files import atomic_write, fingerprint, read_lines, read_record, write_json
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.normalize import NORMALIZATION, normalize_text
from icefall_kd.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPEEDS = ("9/10", "11/10")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which corpus, and where."""

    corpus: Literal["librispeech", "mini", "demo", "aishell", "trans", "cuts"] = "librispeech"
    """trans: any folder of audio with *.trans.txt files; cuts: lhotse cut sets cuts_<part>.jsonl.gz."""
    corpus_dir: Path
    """Folder of the corpus."""
    parts: list[str] | None = None
    """Parts to prepare; None: all that the corpus has."""
    language: Literal["auto", "en", "zh"] = "auto"
    """Decides the text normalisation; auto: by the corpus, or the script of its transcripts."""
    nj: int = 4
    """Parallel jobs; clipped to the number of items."""
    max_reject_ratio: float = 0.01
    """Share of a part's utterances that may be rejected."""


@dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """How manifests are made."""

    data_dir: Path
    """Folder of everything prepared."""
    speed_perturb: bool = False
    """Add copies at 0.9 and 1.1 of the speed to the parts whose name begins with train."""
    check_audio: Literal["full", "header"] = "full"
    """Decode every recording, or believe the headers."""
    max_utts: int | None = None
    """Take only so many utterances of each part, evenly spread; None: all."""


def is_train(part: str) -> bool:
    """Return whether a part is for training: its name begins with "train"."""
    return part.startswith("train")


def make_manifests(corpus: CorpusConfig, config: ManifestConfig) -> dict:
    """Write ``manifests/cuts_<part>.jsonl.gz``, ``rejected/<part>.jsonl`` and ``corpus.json``.

    Returns:
        What corpus.json holds.
    Raises:
        DataError: the corpus is missing, or more than --max-reject-ratio of a part is unfit.
    """
    made = _read_cut_sets(corpus) if corpus.corpus == "cuts" else _read_corpus(corpus, config)
    parts, identity, languages = {}, [], []
    for part, cuts, rejects, language in made:
        total = len(cuts) + len(rejects)
        rejected_file = config.data_dir / "rejected" / f"{part}.jsonl"
        write_jsonl(rejected_file, (r.to_dict() for r in rejects))
        check_rejects(part, rejects, total, corpus.max_reject_ratio, rejected_file)
        if not cuts:
            raise DataError(f"part {part} of {corpus.corpus_dir} holds no fit utterance; see {rejected_file}")
        perturbed = config.speed_perturb and is_train(part)
        written = with_speed_copies(cuts, SPEEDS) if perturbed else cuts
        count = write_cuts(cuts_file(config.data_dir / "manifests", part), written)
        hours = sum(cut.duration for cut in cuts) / 3600
        parts[part] = {"utterances": len(cuts), "hours": round(hours, 6), "rejected": len(rejects), "cuts": count}
        identity += [[part, label_key(cut), cut.supervisions[0].text] for cut in cuts]
        languages.append(language)
        logger.info("%s: %d utterances, %.3f h, %d rejected, %d cuts", part, len(cuts), hours, len(rejects), count)
    if len(set(languages)) != 1:
        raise DataError(f"the parts of {corpus.corpus_dir} are in {', '.join(sorted(set(languages)))}; give --language")
    content = {
        "corpus": corpus.corpus,
        "language": languages[0],
        "normalization": NORMALIZATION[languages[0]],
        "speeds": ["1", *SPEEDS] if config.speed_perturb else ["1"],
        "parts": parts,
        "fingerprint": fingerprint(identity),
    }
    write_json(config.data_dir / "corpus.json", content)
    return content


def _read_corpus(config: CorpusConfig, manifests: ManifestConfig):
    """Yield (part, cuts, rejects, language) of a corpus of audio files."""
    corpus = open_corpus(config.corpus, config.corpus_dir, config.parts or (), config.language)
    for part, rows in corpus.parts.items():
        if manifests.max_utts is not None and len(rows) > manifests.max_utts:
            rows = [rows[len(rows) * i // manifests.max_utts] for i in range(manifests.max_utts)]
        cuts, rejects = make_cuts(rows, corpus.language, nj=config.nj, check_audio=manifests.check_audio)
        yield part, cuts, rejects, corpus.language


def cut_set_files(config: CorpusConfig) -> dict[str, Path]:
    """Return the cut set of every part of a corpus that is made of lhotse cut sets."""
    if config.corpus_dir.is_file():
        return {part_of(config.corpus_dir): config.corpus_dir}
    if config.parts:
        return {part: cuts_file(config.corpus_dir, part) for part in config.parts}
    files = {part_of(file): file for file in sorted(config.corpus_dir.glob("cuts_*.jsonl.gz"))}
    if not files:
        raise DataError(f"{config.corpus_dir} holds no cuts_<part>.jsonl.gz")
    return files


def _read_cut_sets(config: CorpusConfig):
    """Yield (part, cuts, rejects, language) of lhotse cut sets."""
    for part, file in cut_set_files(config).items():
        cuts, rejects, language = prepare_cut_set(file, config.language, config.nj)
        yield part, *_unique(cuts, rejects), language


def _unique(cuts: Sequence[MonoCut], rejects: list[Reject]) -> tuple[list[MonoCut], list[Reject]]:
    """Reject every cut whose id occurred before."""
    seen: set[str] = set()
    kept, rejects = [], list(rejects)
    for cut in cuts:
        if cut.id in seen:
            rejects.append(Reject(id=cut.id, reason="the same id occurs twice"))
        else:
            kept.append(cut)
        seen.add(cut.id)
    return kept, rejects


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Which tokens are made, of what."""

    data_dir: Path
    """Folder of everything prepared; manifests/ lies in it."""
    token_kind: Literal["bpe", "char", "pinyin", "plm"] = "bpe"
    """bpe: sentencepiece; char: characters; pinyin: initials and finals with tone (Mandarin); plm: pieces of a language
    model, those that occur in the training parts, and characters for everything else."""
    vocab_size: int = 500
    """Tokens of bpe, specials included; clipped where the corpus is too small."""
    plm: str = "minilm"
    """Language model of plm tokens: hub id, local folder or short name, of the BERT family (WordPiece)."""
    plm_min_count: int = 1
    """plm: pieces that occur less often are spelled with shorter ones."""

    def __post_init__(self) -> None:
        at_least(self, plm_min_count=1)
        if self.vocab_size < 8:
            raise ConfigError(f"--vocab-size is {self.vocab_size}; it must be at least 8")

    @property
    def lang_dir(self) -> Path:
        """Where the tokenizer is written."""
        suffix = f"_{self.vocab_size}" if self.token_kind == "bpe" else ""
        return self.data_dir / f"lang_{self.token_kind}{suffix}"


def training_texts(data_dir: Path) -> list[str]:
    """Return the transcripts of the training parts (of all, where none is for training), speed copies left out."""
    parts = list(read_record(data_dir / "corpus.json", parts=dict)["parts"])
    chosen = [p for p in parts if is_train(p)] or parts
    texts = {
        cut.supervisions[0].id: cut.supervisions[0].text
        for part in chosen
        for cut in iterate_cuts(cuts_file(data_dir / "manifests", part))
        if label_key(cut).endswith("|1/1")
    }
    return list(texts.values())


def make_tokens(config: TokenConfig) -> Tokenizer:
    """Train a tokenizer on the transcripts of the training parts."""
    lines = training_texts(config.data_dir)
    if config.token_kind == "bpe":
        tokenizer = Tokenizer.train_bpe(lines, config.vocab_size)
    elif config.token_kind == "char":
        tokenizer = Tokenizer.train_char(lines)
    elif config.token_kind == "plm":
        from icefall_kd.teachers.language_model import word_pieces  # transformers is large

        tokenizer = Tokenizer.of_word_pieces(word_pieces(config.plm, lines, config.plm_min_count))
    else:
        tokenizer = Tokenizer.train_pinyin(lines)
    tokenizer.save(config.lang_dir)
    logger.info(
        "%s: %d %s tokens of %d transcripts", config.lang_dir, tokenizer.vocab_size, config.token_kind, len(lines)
    )
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class LexiconConfig:
    """Which words the decoding graphs know."""

    data_dir: Path
    """Folder of everything prepared; manifests/ lies in it."""
    lang_dir: Path
    """Folder of the tokenizer; lexicon.txt, words.txt and lm_text.txt are written here."""
    lexicon: Path | None = None
    """Ready-made lexicon (WORD token token ... a line, or WORD alone); None: the words of the texts."""
    text: list[Path] = field(default_factory=list)
    """More text, a sentence a line, besides the transcripts of the training parts; several files as a,b."""


def make_lexicon(config: LexiconConfig) -> Lexicon:
    """Write the lexicon, and the text that the language model of its words is made from, words parted by spaces.

    Raises:
        ConfigError: bpe tokens with text without spaces, where tokens do not say what a word is.
        DataError: a file cannot be read, or the lexicon is empty.
    """
    tokenizer = Tokenizer.load(config.lang_dir)
    language = read_record(config.data_dir / "corpus.json", language=str)["language"]
    if language == "zh" and tokenizer.kind == "bpe" and config.lexicon is None:
        raise ConfigError(
            "decoding graphs of bpe tokens need words, which Mandarin text does not show: use --token-kind char or "
            "pinyin, or give --lexicon FILE with --arpa FILE"
        )
    texts = training_texts(config.data_dir)
    for path in config.text:
        texts += [normalize_text(line, language) for line in read_lines(path)]
    if config.lexicon is None:
        lexicon = Lexicon.from_texts(texts, tokenizer)
    else:
        lexicon = Lexicon.read(config.lexicon, tokenizer)
    lexicon.write(config.lang_dir)
    with atomic_write(config.lang_dir / "lm_text.txt", "w") as stream:
        stream.writelines(" ".join(word for word, _ in tokenizer.spell(text)) + "\n" for text in texts if text)
    logger.info("%s: %d words, %d spellings", config.lang_dir, len(lexicon.words) - 4, len(lexicon.entries))
    return lexicon
