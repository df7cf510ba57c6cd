"""A masked or causal language model as a teacher: its states of a text (Han et al. 2023, arXiv 2301.13003, section 2).

The paper's teacher is BERT's last layer on single characters.  That a causal model is one too, and that every state
comes with the characters it stands for, so that any tokens can be aligned with it, is our design.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icefall_kd.config import LanguageModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.env import package_version, pick_device
from icefall_kd.runtime.files import fingerprint
from icefall_kd.teachers import hf
from icefall_kd.teachers.locate import locate
from icefall_kd.teachers.pretrained import pick_layer
from icefall_kd.text.alignment import close_gaps
from icefall_kd.text.wordpiece import SPACE, WordPieces
from icefall_kd.train.checkpoint import state_sha256

RANDOM_MODELS = {"tiny-random-masked": False, "tiny-random-causal": True}
"""Models of random weights by name, and whether they are causal."""
# Characters are stored as 16 bits.
_MOST_CHARACTERS = 65535


@dataclass(frozen=True)
class Encoded:
    """A text in a language model's pieces, special ones left out."""

    ids: list[int]
    spans: np.ndarray
    """(P, 2) int64 characters of the text that each piece stands for; (i, i) for white space alone."""
    unknown: np.ndarray
    """(P,) bool: the model has no piece for these characters."""


def load_tokenizer(plm: str) -> Any:
    """Return the tokenizer of a language model; raises as :meth:`LanguageModelTeacher.load`."""
    if plm in RANDOM_MODELS:
        return hf.random_language_model(RANDOM_MODELS[plm])[1]
    return hf.text_tokenizer(locate(plm).folder)


def is_byte_level(tokenizer: Any) -> bool:
    """Tell whether pieces of a word hold the space before it, so that a first word's are others without one."""
    return "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])


def encode(tokenizer: Any, texts: Sequence[str], case: str = "lower") -> list[Encoded]:
    """Return texts in the pieces of a language model, with the characters of the texts as they are given.

    Args:
        tokenizer: of :func:`load_tokenizer`.
        texts: normalised texts.
        case: "lower": change it, character by character, so that each keeps its place; "keep".
    """
    leads, given, byte_level = [], [], is_byte_level(tokenizer)
    for text in texts:
        lead = byte_level and text[:1] > " " and unicodedata.east_asian_width(text[0]) not in "WF"
        if case == "lower":
            text = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        leads.append(int(lead))
        given.append(" " * lead + text)
    found = tokenizer(given, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    result = []
    for text, lead, ids, offsets in zip(texts, leads, found["input_ids"], found["offset_mapping"], strict=True):
        spans = np.maximum(np.array(offsets, np.int64).reshape(-1, 2) - lead, 0)
        # A space by itself is a piece of sentencepiece, which gives it the character behind it where it put it in.
        bare = [not piece.strip(SPACE) for piece in tokenizer.convert_ids_to_tokens(ids)]
        spans[bare, 1] = spans[bare, 0]
        unknown = np.array(ids, np.int64) == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)
        result.append(Encoded(ids, close_gaps(spans, text), unknown))
    return result


@dataclass(frozen=True)
class ReadText:
    """A text as the language model reads it."""

    ids: list[int]
    """Ids, special ones included."""
    rows: np.ndarray
    """(P,) int64: which of the model's states are kept: one a piece that stands for characters, and the end."""
    spans: np.ndarray
    """(P, 2) int64 characters of the text that each stands for; of the end (L, L)."""
    unknown: np.ndarray
    """(P,) bool: the model has no piece for these characters."""


class LanguageModelTeacher:
    """A frozen language model, always in evaluation mode.

    A masked model reads [CLS] text [SEP]: [CLS] is dropped and [SEP] is the end of the text.  A causal one reads its
    token for the beginning, or else the end-of-text token, the text and the end-of-text token; a piece's state is the
    one after reading it, the first state is dropped and the last is the end of the text.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, cfg: LanguageModelConfig, identity: dict) -> None:
        """Freeze ``model``.

        Args:
            model: a transformers model without head.
            tokenizer: its tokenizer, with the characters of every piece.
            cfg: layer, case, device.
            identity: teacher, source and weights_sha256 for the provenance.
        Raises:
            ConfigError: it has no such layer, or its tokenizer no token for the end of a text.
        """
        self.model = model.eval().requires_grad_(False)
        self.causal = self._is_causal()
        self.device = pick_device(cfg.plm_device)
        self.model.to(self.device)
        self.tokenizer, self.identity, self.case, self.dtype = tokenizer, identity, cfg.plm_case, cfg.plm_dtype
        self.dim = int(model.config.hidden_size)
        self.num_layers = int(model.config.num_hidden_layers)
        self.layer = pick_layer(cfg.plm_layer, self.num_layers, f"language model {identity['teacher']}")
        self.max_pieces = self._limit()
        self._first, self._last = self._ends()

    @classmethod
    def load(cls, cfg: LanguageModelConfig) -> "LanguageModelTeacher":
        """Find and load the model that ``cfg`` names.

        Raises:
            ConfigError: it cannot be found, or is no language model that can teach.
            DataError: its files are damaged.
        """
        dtype = getattr(torch, cfg.plm_dtype)
        if cfg.plm in RANDOM_MODELS:
            model, tokenizer = hf.random_language_model(RANDOM_MODELS[cfg.plm])
            identity = {"source": "random weights, not trained", "weights_sha256": state_sha256(model.state_dict())}
            return cls(model.to(dtype), tokenizer, cfg, {"teacher": cfg.plm, **identity})
        found = locate(cfg.plm)
        return cls(hf.language_model(found.folder, dtype), hf.text_tokenizer(found.folder), cfg, found.identity)

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Look whether a state changes with what follows: names of architectures do not tell for every model."""
        last = int(self.model.get_input_embeddings().weight.shape[0]) - 1
        # From all over the table: at its end there may be rows that only fill it up, all alike.
        spread = torch.linspace(0, last, 16).round().long()
        ids = torch.stack([torch.cat([spread[8:9], some]) for some in spread.view(2, 8)])
        states = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
        return bool((states[0, 0] - states[1, 0]).abs().max() <= 1e-5 * states[:, 0].abs().max())

    def _limit(self) -> int | None:
        """Return the ids that the model reads at most, special ones included; None: as many as one likes."""
        limits = [int(self.tokenizer.model_max_length)]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions:
            # RoBERTa and its kin count positions from behind that of padding.
            padded = [m.padding_idx for n, m in self.model.named_modules() if n.endswith("position_embeddings")]
            limits.append(positions - sum(p + 1 for p in padded if p is not None))
        return min(limits) if min(limits) < 1 << 30 else None

    def _ends(self) -> tuple[list[int], list[int]]:
        """Return the special ids in front of a text and behind it."""
        tokenizer, name = self.tokenizer, self.identity["teacher"]
        if self.causal:
            end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
            if end is None:
                raise ConfigError(f"language model {name} has no end-of-text token; choose a model with one")
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
            return [start], [end]
        special = tokenizer("", add_special_tokens=True)["input_ids"]
        if len(special) < 2 or special[-1] != tokenizer.sep_token_id:
            raise ConfigError(
                f"masked language model {name} puts {tokenizer.convert_ids_to_tokens(special)} around a text; a [CLS] "
                "in front and a [SEP] behind are needed"
            )
        return special[:-1], special[-1:]

    def read(self, texts: Sequence[str]) -> list[ReadText | str]:
        """Return texts as ids and characters, or why a text cannot be read: it is empty, or too long."""
        found: list[ReadText | str] = []
        for text, encoded in zip(texts, encode(self.tokenizer, texts, self.case) if texts else [], strict=True):
            length = len(self._first) + len(encoded.ids) + len(self._last)
            if not text.strip():
                found.append("there is no text")
            elif self.max_pieces is not None and length > self.max_pieces:
                found.append(f"{length} pieces, the language model reads at most {self.max_pieces}")
            elif len(text) > _MOST_CHARACTERS:
                found.append(f"{len(text)} characters, a label set holds texts of at most {_MOST_CHARACTERS}")
            else:
                found.append(self._with_ends(encoded, len(text)))
        return found

    def _with_ends(self, encoded: Encoded, length: int) -> ReadText:
        kept = np.flatnonzero(encoded.spans[:, 0] < encoded.spans[:, 1])
        return ReadText(
            ids=[*self._first, *encoded.ids, *self._last],
            rows=np.append(kept, len(encoded.ids)) + len(self._first),
            spans=np.concatenate([encoded.spans[kept], [[length, length]]]),
            unknown=np.append(encoded.unknown[kept], False),
        )

    @torch.no_grad()
    def states(self, texts: Sequence[ReadText]) -> list[Tensor]:
        """Return the states (P, C) float32 of each text, on the CPU; padding changes nothing beyond rounding."""
        padding = self.tokenizer.pad_token_id or 0
        longest = max((len(text.ids) for text in texts), default=0)
        ids = torch.full((len(texts), longest), padding)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            ids[i, : len(text.ids)], mask[i, : len(text.ids)] = torch.tensor(text.ids), 1
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            output_hidden_states=self.layer < self.num_layers,
        )
        chosen = output.last_hidden_state if self.layer == self.num_layers else output.hidden_states[self.layer]
        states = chosen.float().cpu()
        for text, values in zip(texts, states, strict=True):
            if not torch.isfinite(values[: len(text.ids)]).all():
                raise DataError(
                    f"language model {self.identity['teacher']} gives states that are not finite; use --plm-dtype "
                    "float32"
                )
        return [values[torch.from_numpy(text.rows)] for text, values in zip(texts, states, strict=True)]

    def provenance(self) -> dict:
        """Return plain data that identifies the states."""
        tokenizer = self.tokenizer
        return {
            **self.identity,
            "layer": self.layer,
            "layer_convention": "transformers' hidden_states[layer]; the last one with the final normalisation",
            "normalization": f"texts in {'lower' if self.case == 'lower' else 'their own'} case",
            "model_type": self.model.config.model_type,
            "causal": self.causal,
            "tokenizer": {
                "class": type(tokenizer).__name__,
                "vocabulary": fingerprint(tokenizer.get_vocab()),
                "in_front": tokenizer.convert_ids_to_tokens(self._first),
                "behind": tokenizer.convert_ids_to_tokens(self._last),
                "space_in_front": is_byte_level(tokenizer),
            },
            "device": self.device.type,
            "dtype": self.dtype,
            "versions": {name: package_version(name) for name in ("torch", "transformers", "tokenizers")},
        }


def word_pieces(plm: str, texts: Sequence[str], min_count: int = 1) -> WordPieces:
    """Return what a language model of the BERT family cuts texts into, in the texts' own spelling.

    Raises:
        ConfigError: its tokenizer is no WordPiece, or does not take ideographs apart.
    """
    tokenizer = load_tokenizer(plm)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    made = [(rules[part] or {}).get("type") for part in ("model", "pre_tokenizer")]
    if made != ["WordPiece", "BertPreTokenizer"] or not (rules["normalizer"] or {}).get("handle_chinese_chars"):
        raise ConfigError(
            f"the tokenizer of {plm} is {made[0]} with {made[1]}; --token-kind plm needs BERT's WordPiece. Use "
            "--token-kind bpe or char, which are aligned with any language model"
        )
    encoded = encode(tokenizer, texts)
    pieces = [zip(*e.spans.T.tolist(), (~e.unknown).tolist(), strict=True) for e in encoded]
    return WordPieces.collect(texts, pieces, min_count)
