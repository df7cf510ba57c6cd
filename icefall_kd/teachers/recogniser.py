"""An autoregressive recogniser of ours as a teacher: CTC posteriors, token posteriors, n-best lists (our design).

The encoder and its frames are those of :class:`ExperimentTeacher`.  What is made of its output goes through the rows
of labels/recogniser.py, stored or in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.cli import config_from_dict
from icefall_kd.config import ExtractConfig, TeacherConfig, TrainConfig
from icefall_kd.data.batch import Batch, Labels, NBest, TopK
from icefall_kd.data.features import FbankExtractor
from icefall_kd.decode.base import Decoder
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FBANK_CONV2D
from icefall_kd.labels.align import check_online_lengths
from icefall_kd.labels.info import RECOGNISER_ROWS
from icefall_kd.labels.recogniser import (
    collate_nbest,
    pack_nbest,
    pack_posteriors,
    posterior_width,
    unpack_nbest,
    unpack_posteriors,
)
from icefall_kd.models.ctc_attention import CtcAttentionModel
from icefall_kd.models.streaming import widest_chunks
from icefall_kd.runtime.env import pick_device
from icefall_kd.teachers.base import TeacherOutput
from icefall_kd.teachers.experiment import ExperimentTeacher
from icefall_kd.teachers.families import is_exp_dir
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_model, state_sha256

_MODEL_PREFIX = "model."
_CONVENTIONS = {
    "ctc_posteriors": "softmax of the CTC head",
    "token_posteriors": "softmax of the decoder along the transcript, without blank, sos/eos and mask",
    "nbest": "joint CTC/attention beam search",
}


@dataclass(frozen=True, kw_only=True)
class RecogniserOptions:
    """What is kept of a recogniser's output."""

    top_k: int = 8
    """Classes of a posterior, at most those that there are."""
    nbest_size: int = 4
    """Hypotheses of an utterance, at most."""
    beam_size: int = 10
    """Beam of the search."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one kind of labels are stored, and what made them."""

    dtype: str
    width: int
    convention: str
    extra: dict
    """Part of the identity of a label set."""


class RecogniserTeacher:
    """A joint CTC/attention recogniser that this project trained, frozen and always in evaluation mode."""

    sampling_rate = 16000
    frame_formula = FBANK_CONV2D
    max_samples: int | None = None

    def __init__(
        self,
        model: CtcAttentionModel,
        tokenizer: Tokenizer,
        *,
        options: RecogniserOptions = RecogniserOptions(),
        kinds: Sequence[str] = tuple(RECOGNISER_ROWS),
        ctc_weight: float = 0.3,
        precision: Precision,
        identity: dict,
        extractor: FbankExtractor | None = None,
        search: Decoder | None = None,
    ) -> None:
        """Freeze ``model``.

        Args:
            model: a trained model with a causal decoder.
            tokenizer: the one that it was trained with.
            options: what is kept of its output.
            kinds: what :meth:`extract` returns beside embeddings.
            ctc_weight: weight of the CTC score in the search.
            precision: device, and type of the encoder's products; the heads always compute in float32.
            identity: teacher, source and weights_sha256 for the provenance.
            extractor: what makes the features; None: the project's default.
            search: what makes the n-best lists; None: the joint CTC/attention beam search.
        """
        self.model = model.eval().requires_grad_(False).to(precision.device)
        self.encoder = ExperimentTeacher(model.encoder, precision=precision, identity=identity, extractor=extractor)
        self.tokenizer, self.options, self.kinds = tokenizer, options, tuple(kinds)
        self.ctc_weight, self.dim = ctc_weight, model.encoder.dim
        self._silent = (model.blank_id, model.sos_id, model.mask_id)
        self._search = search

    @classmethod
    def load(
        cls,
        exp_dir: Path,
        cfg: TeacherConfig,
        *,
        options: RecogniserOptions = RecogniserOptions(),
        kinds: Sequence[str] = tuple(RECOGNISER_ROWS),
        search: Decoder | None = None,
    ) -> "RecogniserTeacher":
        """Load the newest model of an exp_dir, averaged over its last epoch as train/average.py: load_trained does it.

        Args:
            exp_dir: a training with --system nar --attention-decoder ar.
            cfg: device and type; auto is float32 on every device, so that labels are those of any other machine.
            options, kinds, search: as of the constructor.
        Raises:
            ConfigError: it is no such training, or a layer below the last one or normalisation is asked for.
            DataError: there is no readable checkpoint or tokenizer.
        """
        if not is_exp_dir(exp_dir):
            raise ConfigError(
                f"--teacher {exp_dir} is no exp_dir with checkpoints; posteriors and n-best lists come from a training "
                "with --system nar --attention-decoder ar"
            )
        tokenizer = Tokenizer.load(exp_dir / "tokenizer")
        state, saved, used = load_trained(exp_dir, tokenizer.hash)
        config = config_from_dict(TrainConfig, saved, str(exp_dir))
        if (config.system, config.attention.attention_decoder) != ("nar", "ar"):
            trained = f"--system {config.system}"
            if config.system == "nar":
                trained += f" --attention-decoder {config.attention.attention_decoder}"
            raise ConfigError(
                f"teacher {exp_dir} was trained with {trained}; posteriors and n-best lists come from a training with "
                "--system nar --attention-decoder ar"
            )
        model = CtcAttentionModel(config.model, config.attention, tokenizer.vocab_size)
        if cfg.layer not in (-1, model.encoder.num_layers) or cfg.normalize_embeddings:
            raise ConfigError(
                f"--layer {cfg.layer} --normalize-embeddings {cfg.normalize_embeddings} with a recogniser: its heads "
                f"read layer {model.encoder.num_layers} of {exp_dir} as it is; leave both options out"
            )
        model.encoder.chunks = widest_chunks(model.encoder.cfg)
        state = {k.removeprefix(_MODEL_PREFIX): v for k, v in state.items() if k.startswith(_MODEL_PREFIX)}
        load_model(model, state, strict=True, source=f"{exp_dir} ({used})")
        identity = {"teacher": str(exp_dir), "source": f"exp_dir, {used}", "weights_sha256": state_sha256(state)}
        dtype = "float32" if cfg.teacher_dtype == "auto" else cfg.teacher_dtype
        return cls(
            model,
            tokenizer,
            options=options,
            kinds=kinds,
            ctc_weight=config.attention.ctc_weight,
            precision=Precision.choose(pick_device(cfg.teacher_device), dtype),
            identity=identity,
            search=search,
        )

    @classmethod
    def for_training(cls, config: TrainConfig, search: Decoder | None = None) -> "RecogniserTeacher":
        """Build the teacher that makes the labels of a student in training.

        Raises:
            ConfigError: as :meth:`load`, or its tokens or features are not the student's.
        """
        kd = config.recogniser_kd
        options = RecogniserOptions(top_k=kd.kd_top_k, nbest_size=kd.kd_nbest, beam_size=kd.kd_beam_size)
        name = config.teacher.teacher
        teacher = cls.load(Path(name), config.teacher, options=options, search=search)
        student = Tokenizer.load(config.data.lang_dir).hash
        if teacher.tokenizer.hash != student:
            raise ConfigError(
                f"teacher {name} has tokenizer {teacher.tokenizer.hash}, {config.data.lang_dir} holds {student}; "
                "train both with one --lang-dir"
            )
        dims = teacher.model.encoder.cfg.feature_dim, config.model.feature_dim
        if dims[0] != dims[1]:
            raise ConfigError(
                f"teacher {name} hears {dims[0]} mel bins, the student {dims[1]}; give both one --feature-dim"
            )
        return teacher

    @classmethod
    def for_extraction(cls, config: ExtractConfig, kinds: Sequence[str]) -> "RecogniserTeacher":
        """Build the teacher that ``config`` names, to make labels of ``kinds`` in one pass; raises as :meth:`load`."""
        options = RecogniserOptions(
            top_k=config.top_k, nbest_size=config.nbest_size, beam_size=config.nbest_beam_size
        )
        return cls.load(Path(config.teacher.teacher), config.teacher, options=options, kinds=kinds)

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of encoder frames of an utterance."""
        return self.encoder.num_frames(num_samples)

    def extract(self, batch: Batch) -> TeacherOutput:
        """Return embeddings (N, T', C) float32 and, as int32 rows (N, R, W) with their numbers (N,), all kinds.

        Args:
            batch: with audio and, for token_posteriors, y and y_lens.
        Raises:
            DataError: audio or transcripts are missing.
        """
        return self._extract(batch, self.kinds)

    @torch.no_grad()
    def _extract(self, batch: Batch, kinds: Sequence[str]) -> TeacherOutput:
        out = self.encoder.extract(batch)
        encoder_out, encoder_lens = out.arrays["embeddings"], out.lens["embeddings"]
        arrays, lens = dict(out.arrays), dict(out.lens)
        # A search does not end well with numbers that are none; whoever uses the rows looks at the embeddings.
        encoder_out = encoder_out.nan_to_num(0.0, 0.0, 0.0)
        if encoder_out.shape[1] == 0:
            encoder_out = F.pad(encoder_out, (0, 0, 0, 1))
        make = {"ctc_posteriors": self._ctc_rows, "token_posteriors": self._token_rows, "nbest": self._nbest_rows}
        for kind in RECOGNISER_ROWS:
            if kind in kinds:
                arrays[kind], lens[kind] = make[kind](encoder_out, encoder_lens, batch)
        return TeacherOutput(arrays, lens)

    def _top_k(self, kind: str) -> int:
        classes = self.model.vocab_size - (len(self._silent) if kind == "token_posteriors" else 0)
        return min(self.options.top_k, classes)

    def _ctc_rows(self, encoder_out: Tensor, encoder_lens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        valid = torch.arange(encoder_out.shape[1], device=encoder_lens.device) < encoder_lens.unsqueeze(1)
        probs = self.model.ctc_log_probs(encoder_out[valid]).exp()
        top_k = self._top_k("ctc_posteriors")
        return _scatter(pack_posteriors(probs, top_k), valid), encoder_lens

    def _token_rows(self, encoder_out: Tensor, encoder_lens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Follow the transcript: what the decoder expects at each token after those before it, the end left out."""
        if batch.y is None or batch.y_lens is None:
            raise DataError("token posteriors need transcripts, and the batch holds none")
        y, y_lens = batch.y.to(encoder_out.device), batch.y_lens.to(encoder_out.device)
        memory = self.model.decoder.memory(encoder_out, encoder_lens)
        logits = self.model.decoder(F.pad(y, (1, 0), value=self.model.sos_id), y_lens + 1, memory)[:, :-1]
        valid = torch.arange(y.shape[1], device=y.device) < y_lens.unsqueeze(1)
        silent = torch.tensor(self._silent, device=y.device)
        probs = logits[valid].float().index_fill(1, silent, -torch.inf).softmax(dim=1)
        rows = pack_posteriors(probs, self._top_k("token_posteriors"), y[valid])
        return _scatter(rows, valid), y_lens

    def _nbest_rows(self, encoder_out: Tensor, encoder_lens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self._beam_search().decode(encoder_out, encoder_lens)
        lists = [[(hypothesis.tokens, hypothesis.score) for hypothesis in some] for some in found]
        packed = [pack_nbest(some, self.options.nbest_size, self._silent) for some in lists]
        rows = pad_sequence([torch.from_numpy(x) for x in packed], batch_first=True)
        return rows, torch.tensor([len(x) for x in packed])

    def _beam_search(self) -> Decoder:
        if self._search is None:
            beam, nbest = self.options.beam_size, self.options.nbest_size
            self._search = JointBeamSearch(self.model, beam, nbest=nbest, ctc_weight=self.ctc_weight)
        return self._search

    def labels(self, batch: Batch, kinds: Sequence[str]) -> dict[str, TopK | NBest | Labels]:
        """Return labels of ``kinds`` for a batch in training, on the batch's device; "embeddings" is one, too.

        Raises:
            DataError: the encoder's output is not finite, or the frames of teacher, audio and student do not explain
                each other.
        """
        # As in extraction: the student's autocast is not the teacher's.
        with torch.autocast(self.encoder.device.type, enabled=False):
            out = self._extract(batch, kinds)
        self._check(batch, out)
        found: dict[str, TopK | NBest | Labels] = {}
        for kind in kinds:
            values, lens = out.arrays[kind], out.lens[kind]
            if kind == "nbest":
                found[kind] = collate_nbest([unpack_nbest(_stored(x, n)) for x, n in zip(values, lens, strict=True)])
            elif kind == "embeddings":
                found[kind] = Labels(values, lens)
            else:
                found[kind] = unpack_posteriors(values, lens, kind == "token_posteriors")
        return Batch(ids=batch.ids, labels=found).to(batch.audio.device).labels

    def _check(self, batch: Batch, out: TeacherOutput) -> None:
        finite = torch.isfinite(out.arrays["embeddings"]).flatten(1).all(dim=1).tolist()
        if not all(finite):
            name = batch.ids[finite.index(False)]
            raise DataError(f"utterance {name}: the teacher's encoder output is not finite; check its weights")
        check_online_lengths(batch, out.lens["embeddings"], self.frame_formula)

    def row_format(self, kind: str) -> RowFormat:
        """Return how labels of a recogniser's kind are stored."""
        extra: dict = {"tokenizer_hash": self.tokenizer.hash, "vocab_size": self.tokenizer.vocab_size}
        convention = _CONVENTIONS[kind]
        if kind == "nbest":
            extra |= {"nbest_size": self.options.nbest_size, "beam_size": self.options.beam_size}
            return RowFormat("int32", 1, convention, {**extra, "search_ctc_weight": self.ctc_weight})
        top_k = self._top_k(kind)
        width = posterior_width(top_k, kind == "token_posteriors")
        return RowFormat("uint16", width, convention, {**extra, "top_k": top_k})

    def provenance(self) -> dict:
        """Return plain data that identifies the teacher: the hash is over the whole model."""
        return {**self.encoder.provenance(), "family": "recogniser"}


def _scatter(rows: Tensor, valid: Tensor) -> Tensor:
    """Put rows (M, W) where ``valid`` (N, T) is True, 0 elsewhere."""
    out = rows.new_zeros(*valid.shape, rows.shape[1])
    out[valid] = rows
    return out


def _stored(rows: Tensor, length: Tensor) -> np.ndarray:
    return rows[: int(length)].cpu().numpy()
