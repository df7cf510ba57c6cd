"""The provenance of a label set (our design): everything that two sets must share to be the same labels."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_type_hints

from icefall_kd.errors import ConfigError, DataError, KdError
from icefall_kd.frames import FrameFormula
from icefall_kd.runtime.files import fingerprint, read_json, reading

INFO_NAME = "label_set.json"
# 2: keys in order and front-coded, 8 bytes of their hashes (1: offsets and whole hashes, twice as large).
FORMAT_VERSION = 2
# Recorded for people: the weights are known by their SHA-256, wherever they lie and whatever they are called.
_NOT_IDENTITY = ("teacher", "origin")
# What a recogniser knows beyond its embeddings, and what a row of such labels is (labels/recogniser.py).
RECOGNISER_ROWS: dict[str, Literal["frame", "token", "list"]] = {
    "ctc_posteriors": "frame",
    "token_posteriors": "token",
    "nbest": "list",
}
# States of a language model (labels/text_states.py), whose keys name texts.
TEXT_KIND = "text_states"


@dataclass(frozen=True, kw_only=True)
class LabelSetInfo:
    """Where the labels of a set come from; the content of ``label_set.json``."""

    kind: str
    """"codebook_indexes", "clusters", "embeddings", one of a recogniser's: "ctc_posteriors", "token_posteriors",
    "nbest"; or "text_states"."""
    dtype: str
    """Type of the stored values: uint8, float16, float32, ..."""
    width: int
    """Values a row: Q codes (1 of clusters), C channels, or what labels/recogniser.py and labels/text_states.py say of
    their kinds."""
    dim: int
    """Channels C of the teacher's embeddings; 0: unknown (an imported set of codes)."""
    teacher: str
    """Family or name of the teacher, for people."""
    teacher_sha256: str
    """SHA-256 of the teacher's weights."""
    layer: int | None
    """Layer whose output was taken; None: unknown."""
    layer_convention: str
    """How layers are counted and what belongs to one."""
    normalization: str
    """Normalisation of audio and embeddings."""
    frame_formula: dict
    """FrameFormula.to_dict() of the teacher; {} of text_states, which have no frames."""
    sampling_rate: int = 16000
    """Samples a second that the teacher heard."""
    num_codebooks: int | None = None
    """Q of the quantizer; 1 of clusters; None without one."""
    codebook_size: int | None = None
    """K of the quantizer, or clusters."""
    quantizer_sha256: str | None = None
    """SHA-256 of the quantizer's tensors."""
    refine_iters: int | None = None
    """Refinement searches of the quantizer."""
    long_utterances: str = "window"
    """What became of utterances longer than the teacher's limit."""
    device: str = "cpu"
    """Kind of device of the extraction."""
    teacher_dtype: str = "float32"
    """Type in which the teacher ran."""
    corpus_fingerprint: str = ""
    """keys.corpus_fingerprint of the cuts; ids repeat between corpora."""
    key_kind: str = "audio"
    """What label keys name: "audio" or "text"."""
    extra: dict = field(default_factory=dict)
    """Whatever else the teacher states about itself; part of the identity."""
    origin: dict = field(default_factory=dict)
    """Where the weights were found, which library versions ran, and what other code calls the layer; no part of the
    identity."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that identifies the labels."""
        return fingerprint({k: v for k, v in asdict(self).items() if k not in _NOT_IDENTITY})

    @property
    def formula(self) -> FrameFormula:
        """The teacher's frame formula."""
        return FrameFormula.from_dict(self.frame_formula)

    @property
    def row(self) -> Literal["frame", "token", "list", "piece"]:
        """What a row is: a frame of the formula, a token of the transcript, a number of a list as long as it is, or a
        piece of a text as the language model reads it."""
        return "piece" if self.kind == TEXT_KIND else RECOGNISER_ROWS.get(self.kind, "frame")

    @property
    def plain_floats(self) -> int:
        """Numbers a row that stand for its plain float32 form: channels or classes; 0: there is none, or unknown."""
        if self.kind in RECOGNISER_ROWS:
            return 0 if self.row == "list" else self.extra["vocab_size"]
        return self.dim

    @classmethod
    def load(cls, path: Path) -> "LabelSetInfo":
        """Read ``label_set.json`` of a folder; a DataError names what is wrong with it."""
        file = Path(path) / INFO_NAME
        content = read_json(file)
        known = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            version = content.get("format_version") if isinstance(content, dict) else None
            raise DataError(
                f"{file} has format version {version}, this code reads {FORMAT_VERSION}; delete the folder, or give "
                "another --label-dir, and extract the set again"
            )
        if unknown := sorted(set(content) - known):
            raise DataError(f"{file} has unknown fields {unknown}")
        with reading(str(file), "extract the set again"):
            info = cls(**content)
            for name, kind in get_type_hints(cls).items():
                value = getattr(info, name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise TypeError(f"{name} is {str(value)[:80]!r}")
            if info.kind != TEXT_KIND:
                try:
                    formula = FrameFormula.from_dict(info.frame_formula)
                except KdError as error:
                    raise ValueError(str(error)) from error
                if not all(type(x) is int for x in (*formula.kernels, *formula.strides)):
                    raise TypeError(f"frame_formula is {info.frame_formula}")
            _ = info.fingerprint  # of numbers that are finite
        return info

    def differences(self, other: "LabelSetInfo") -> list[str]:
        """Name the identifying fields in which two sets differ, with both values."""
        a, b = asdict(self), asdict(other)
        return [f"{k} is {a[k]!r} and {b[k]!r}" for k in a if k not in _NOT_IDENTITY and a[k] != b[k]]

    def check(self, expect: dict, where: str) -> None:
        """Raise a DataError that names the first field that is not as expected, with both values.

        Args:
            expect: field name -> value; None stands for "any".
            where: what to call this set in the message.
        """
        for name, wanted in expect.items():
            if not hasattr(self, name):
                names = ", ".join(f.name for f in fields(self))
                raise ConfigError(f"a label set has no property {name!r}; it has {names}")
            wanted = wanted.to_dict() if isinstance(wanted, FrameFormula) else wanted
            found = getattr(self, name)
            if wanted is not None and found != wanted:
                raise DataError(
                    f"label set {where}: {name} is {found!r}, expected {wanted!r}; "
                    "extract labels with the expected value, or change the option that expects it"
                )


def info_json(info: LabelSetInfo) -> str:
    """Return the readable form of a set's provenance."""
    return json.dumps({**asdict(info), "fingerprint": info.fingerprint}, indent=2, ensure_ascii=False)
