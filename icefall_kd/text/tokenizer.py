"""Tokens: sentencepiece BPE, characters, pinyin, or a language model's pieces, with the same fixed special ids."""

import collections
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from icefall_kd.errors import ConfigError, DataError, KdError
from icefall_kd.runtime.files import atomic_write, fingerprint, read_json, reading, write_json
from icefall_kd.text.wordpiece import SPACE, WordPieces  # SPACE: how sentencepiece, too, renders a space

logger = logging.getLogger(__name__)

BLANK, SOS, UNK, MASK = "<blk>", "<sos/eos>", "<unk>", "<mask>"
FORMAT_VERSION = 1


class Tokenizer:
    """Map normalised text to token ids and back.

    Ids: 0 blank, 1 sos and eos, 2 unknown, the last one mask; all others are the kind's own.
    """

    blank_id, sos_id, unk_id = 0, 1, 2

    def __init__(
        self,
        kind: str,
        tokens: Sequence[str],
        unit: str,
        model: bytes | None = None,
        word_pieces: WordPieces | None = None,
    ) -> None:
        """Make a tokenizer of a complete token table; the ``train_*`` methods and :meth:`load` are the usual ways.

        Args:
            kind: "bpe", "char", "pinyin" or "plm".
            tokens: all tokens by id, specials included.
            unit: scoring unit, "word", "char" or "token".
            model: serialised sentencepiece model, for "bpe" alone.
            word_pieces: what spells texts, for "plm" alone.
        """
        if kind not in ("bpe", "char", "pinyin", "plm"):
            raise ConfigError(f"token kind is {kind!r}; it must be bpe, char, pinyin or plm")
        if unit not in ("word", "char", "token"):
            raise ConfigError(f"scoring unit is {unit!r}; it must be word, char or token")
        if (model is not None) != (kind == "bpe"):
            raise ConfigError(f"a {kind} tokenizer {'needs a' if kind == 'bpe' else 'has no'} sentencepiece model")
        if (word_pieces is not None) != (kind == "plm"):
            raise ConfigError(f"a {kind} tokenizer {'needs' if kind == 'plm' else 'has no'} word pieces")
        tokens = list(tokens)
        if tokens[:3] != [BLANK, SOS, UNK] or tokens[-1] != MASK or len(set(tokens)) != len(tokens):
            raise DataError(f"the token table must be different tokens, {BLANK} {SOS} {UNK} ... {MASK}")
        self.kind, self.unit, self.tokens, self._model, self._word_pieces = kind, unit, tokens, model, word_pieces
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._processor = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_processor": None}

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, specials included."""
        return len(self.tokens)

    @property
    def mask_id(self) -> int:
        """Id of the mask token, V - 1."""
        return len(self.tokens) - 1

    @property
    def hash(self) -> str:
        """SHA-256 of everything that determines encoding and decoding."""
        model = hashlib.sha256(self._model).hexdigest() if self._model is not None else None
        content = {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "unit": self.unit,
            "tokens": self.tokens,
            "model": model,
        }
        return fingerprint(content | self._spelling())

    def _spelling(self) -> dict:
        return {} if self._word_pieces is None else {"word_pieces": self._word_pieces.to_dict()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a normalised text; what the table lacks becomes the unknown token."""
        if self.kind == "bpe":
            return self._sentencepiece().encode(text)
        return [self._ids.get(piece, self.unk_id) for piece in self.pieces(text)]

    def pieces(self, text: str) -> list[str]:
        """Return the tokens of a normalised text as strings, those that the table lacks included."""
        if self.kind == "bpe":
            return self._sentencepiece().encode(text, out_type=str)
        if self.kind == "char":
            return list(text.replace(" ", SPACE))
        if self.kind == "plm":
            return self._word_pieces.split(text)
        return pinyin_pieces(text)

    @property
    def word_separator(self) -> str | None:
        """Token between two words; None: the words' own tokens show where they begin, or there are no spaces."""
        return SPACE if self.kind == "char" and SPACE in self._ids else None

    def spell(self, text: str) -> list[tuple[str, list[str]]]:
        """Return the words of a normalised text, each with its tokens; without spaces a character is a word.

        Pinyin of a character depends on those around it, so the same word may come with different tokens.
        """
        if self.kind == "pinyin":
            return [(c, pieces) for c, pieces in zip(text, pinyin_of_characters(text), strict=True) if pieces]
        spaced = self.kind == "bpe" or self.word_separator or (self.kind == "plm" and self.unit == "word")
        units = text.split() if spaced else [c for c in text if not c.isspace()]
        return [(unit, self.pieces(unit)) for unit in units]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; blank, sos/eos and mask are left out.

        Words (or hanzi) for bpe and char; for pinyin the tokens separated by spaces.
        """
        silent = (self.blank_id, self.sos_id, self.mask_id)
        kept = [int(i) for i in ids if int(i) not in silent]
        if kept and not 0 <= min(kept) <= max(kept) < self.vocab_size:
            raise DataError(f"token ids run from {min(kept)} to {max(kept)}; this tokenizer has {self.vocab_size}")
        tokens = [self.tokens[i] for i in kept]
        if self.kind == "pinyin":
            return " ".join(tokens)
        return " ".join("".join(tokens).replace(SPACE, " ").split())

    def words(self, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """Return the words of token ids with the places in ``ids`` of their first and last token.

        Words are those of :meth:`decode`; where texts have no spaces every character is one, for pinyin every token.
        """
        silent = (self.blank_id, self.sos_id, self.mask_id)
        found: list[tuple[str, int, int]] = []
        inside = False  # a word that goes on
        for place, token in enumerate(ids):
            if int(token) in silent:
                continue
            text = self.tokens[int(token)]
            for piece in [text] if self.kind == "pinyin" or int(token) == self.unk_id else text:
                if piece in (SPACE, " "):
                    inside = False
                elif inside:
                    found[-1] = (found[-1][0] + piece, found[-1][1], place)
                else:
                    found.append((piece, place, place))
                    inside = self.unit == "word"
        return found

    def _sentencepiece(self):
        if self._processor is None:
            import sentencepiece

            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        return self._processor

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` (and ``bpe.model``, ``tokens.txt``) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self._model is not None:
            with atomic_write(folder / "bpe.model") as stream:
                stream.write(self._model)
        with atomic_write(folder / "tokens.txt", "w") as stream:
            stream.write(self._table())
        content = {"format": FORMAT_VERSION, "kind": self.kind, "unit": self.unit, "vocab_size": self.vocab_size}
        content |= {"hash": self.hash, "tokens": self.tokens} | self._spelling()
        write_json(folder / "tokenizer.json", content)

    def is_saved_in(self, folder: Path | str) -> bool:
        """Return whether a folder holds this tokenizer, undamaged."""
        folder = Path(folder)
        try:
            same = Tokenizer.load(folder).hash == self.hash
        except DataError:
            return False
        table = folder / "tokens.txt"
        return same and table.is_file() and table.read_bytes() == self._table().encode()

    def _table(self) -> str:
        return "".join(f"{token} {i}\n" for i, token in enumerate(self.tokens))

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Read what :meth:`save` wrote.

        Raises:
            DataError: a file is missing, damaged or was changed.
        """
        folder = Path(folder)
        content = read_json(folder / "tokenizer.json")
        model_file = folder / "bpe.model"
        with reading(f"the tokenizer in {folder}", "run the token stage again"):
            if content["format"] != FORMAT_VERSION:
                raise DataError(f"{folder} has token format {content['format']}; this version reads {FORMAT_VERSION}")
            try:
                model = model_file.read_bytes() if content["kind"] == "bpe" else None
                pieces = WordPieces.from_dict(content["word_pieces"]) if content["kind"] == "plm" else None
                tokenizer = cls(content["kind"], content["tokens"], content["unit"], model, pieces)
            except (OSError, KdError) as error:
                raise ValueError(f"{type(error).__name__}: {error}") from error
            stored, found = content["hash"], tokenizer.hash
        if found != stored:
            raise DataError(
                f"the tokenizer in {folder} was changed: its hash is {found}, recorded is {stored}; "
                "restore it or run the token stage again"
            )
        return tokenizer

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int = 500) -> "Tokenizer":
        """Train sentencepiece BPE; too large a ``vocab_size`` for the corpus is clipped, with a warning.

        Args:
            texts: normalised transcripts.
            vocab_size: tokens V, the four specials included.
        """
        texts = [t for t in texts if t]
        model, pieces = _train_sentencepiece(texts, vocab_size - 1)
        return cls("bpe", [*pieces, MASK], "word", model)

    @classmethod
    def train_char(cls, texts: Iterable[str]) -> "Tokenizer":
        """Make a table of the characters of ``texts``; a space is a token, too."""
        found = sorted({c for text in texts for c in text.replace(" ", SPACE)})
        _require(found)
        return cls("char", [BLANK, SOS, UNK, *found, MASK], "word" if SPACE in found else "char")

    @classmethod
    def train_pinyin(cls, texts: Iterable[str]) -> "Tokenizer":
        """Make a table of the pinyin initials and toned finals of ``texts``."""
        found = sorted({piece for text in texts for piece in pinyin_pieces(text)})
        _require(found)
        return cls("pinyin", [BLANK, SOS, UNK, *found, MASK], "token")

    @classmethod
    def of_word_pieces(cls, pieces: WordPieces) -> "Tokenizer":
        """Make a table of the pieces of a language model, in the recogniser's spelling."""
        found = sorted(pieces.first | pieces.inner)
        _require(found)
        return cls("plm", [BLANK, SOS, UNK, *found, MASK], "word" if pieces.spaced else "char", None, pieces)


def _require(found: Sequence[str]) -> None:
    if not found:
        raise DataError("there is no text to make tokens from; check the transcripts of the training parts")


def _train_sentencepiece(texts: Sequence[str], size: int) -> tuple[bytes, list[str]]:
    """Return a serialised model of at most ``size`` pieces, and the pieces."""
    import sentencepiece

    characters = collections.Counter(c for text in texts for c in text if c != " ")
    _require(list(characters))
    least = len(characters) + 4  # the three specials and the space
    if size < least:
        raise ConfigError(
            f"--vocab-size is {size + 1}; the corpus has {len(characters)} characters, so at least {least + 1}"
        )
    try:
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            user_defined_symbols=[BLANK, SOS],
            unk_id=Tokenizer.unk_id,
            unk_piece=UNK,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        fitting = re.search(r"value <= (\d+)", str(error))
        if not fitting:
            raise DataError(f"sentencepiece cannot train {size} pieces: {error}") from error
        limit = int(fitting[1])
        logger.warning("--vocab-size %d is too large for this corpus, which gives %d tokens", size + 1, limit + 1)
        return _train_sentencepiece(texts, limit)
    processor = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    return buffer.getvalue(), [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def pinyin_pieces(text: str) -> list[str]:
    """Return the pinyin initials and toned finals of hanzi, e.g. zh ong1 g uo2; other characters stay themselves.

    The neutral tone is 5.  Readings of characters with several depend on the word, as pypinyin knows it.
    """
    return [piece for pieces in pinyin_of_characters(text) for piece in pieces]


def pinyin_of_characters(text: str) -> list[list[str]]:
    """Return what :func:`pinyin_pieces` does, of each character by itself; white space has no pieces."""
    try:
        from pypinyin import Style, lazy_pinyin
    except ImportError as error:
        raise ConfigError("pinyin tokens need pypinyin: pip install pypinyin") from error

    def read(style):
        return lazy_pinyin(text, style=style, errors=list, neutral_tone_with_five=True, strict=True)

    result: list[list[str]] = []
    for initial, final, syllable in zip(read(Style.INITIALS), read(Style.FINALS_TONE3), read(Style.TONE3), strict=True):
        if initial == final == syllable:  # no hanzi
            result.append([] if syllable.isspace() else [syllable])
        else:
            result.append([p for p in (initial, final) if p] or [syllable])
    return result
