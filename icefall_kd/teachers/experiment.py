"""Any trained exp_dir of ours as a teacher: one layer of its encoder, 25 frames a second (HuBERT's: 50)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.cli import config_from_dict
from icefall_kd.config import TrainConfig
from icefall_kd.data.batch import LOG_EPS
from icefall_kd.data.features import FbankExtractor
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import FBANK_CONV2D, fbank_num_frames
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.streaming import WHOLE_UTTERANCE, widest_chunks
from icefall_kd.teachers.pretrained import Precision, PretrainedTeacher, pick_layer
from icefall_kd.train.average import load_trained
from icefall_kd.train.checkpoint import load_model, state_sha256

ENCODER_PREFIX = "model.encoder."


class ExperimentTeacher(PretrainedTeacher):
    """The output of one encoder layer of a model that this project trained."""

    family = "experiment"
    layer_convention = "output of encoder layer L, 1-based, after the LayerNorm that closes it"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        layer: int = -1,
        normalize_embeddings: bool = False,
        precision: Precision,
        identity: dict,
        extractor: FbankExtractor | None = None,
    ) -> None:
        """Keep the layers up to ``layer`` of ``encoder``.

        Args:
            encoder: A Conformer; it is cut after ``layer``.
            layer: 1-based layer; -1: the last.
            normalize_embeddings: Apply LayerNorm without parameters to every frame.
            precision: Device and dtype.
            identity: teacher, source and weights_sha256 for the provenance.
            extractor: What makes the features; None: the project's default for 16 kHz.
        """
        layer = pick_layer(layer, encoder.num_layers, f"teacher {identity.get('teacher')}")
        super().__init__(
            dim=encoder.dim,
            layer=layer,
            frame_formula=FBANK_CONV2D,
            max_samples=None,
            normalize_embeddings=normalize_embeddings,
            precision=precision,
            identity=identity,
        )
        encoder.layers = encoder.layers[:layer]
        self.encoder = encoder.eval().requires_grad_(False).to(precision.device)
        self.extractor = extractor or FbankExtractor(sampling_rate=self.sampling_rate)

    @classmethod
    def load(cls, exp_dir: Path, **kwargs) -> PretrainedTeacher:
        """Load the newest model of an exp_dir, averaged over its last epoch as train/average.py: load_trained does it.

        One of --system hubert is a teacher of its own kind (teachers/hubert.py).

        Raises:
            ConfigError: If the training has no encoder of the known kind.
            DataError: If there is no readable checkpoint.
        """
        state, saved, used = load_trained(exp_dir)
        if saved.get("system") == "hubert":
            from icefall_kd.teachers.hubert import HubertTeacher

            return HubertTeacher.load(exp_dir, **kwargs)
        encoder_state = {k.removeprefix(ENCODER_PREFIX): v for k, v in state.items() if k.startswith(ENCODER_PREFIX)}
        if not encoder_state:
            raise ConfigError(f"teacher {exp_dir}: no parameters named {ENCODER_PREFIX}*; this training has no encoder")
        encoder = Conformer(config_from_dict(TrainConfig, saved, str(exp_dir)).model)
        encoder.chunks = widest_chunks(encoder.cfg)
        load_model(encoder, encoder_state, strict=True, source=f"{exp_dir} ({used})")
        sha256 = state_sha256(encoder_state)
        identity = {"teacher": str(exp_dir), "source": f"exp_dir, {used}", "weights_sha256": sha256}
        return cls(encoder, identity=identity, **kwargs)

    def provenance(self) -> dict:
        """Return plain data that identifies the labels of this teacher, the feature extractor included."""
        encoder = self.encoder
        seen = {} if encoder.chunks == WHOLE_UTTERANCE else encoder.chunks._asdict()
        if encoder.look_ahead(encoder.chunks):
            seen |= {"right_context": encoder.cfg.right_context, "right_context_kind": encoder.cfg.right_context_kind}
        return {**super().provenance(), "feature_extractor": self.extractor.info(), **seen}

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def _forward(self, audio: Tensor, num_samples: list[int], frames: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        rows = [i for i, t in enumerate(frames) if t > 0]
        if not rows:
            return
        features = [self.extractor.extract(audio[i, : num_samples[i]].cpu()) for i in rows]
        for i, x in zip(rows, features, strict=True):
            if len(x) != fbank_num_frames(num_samples[i]):
                raise DataError(
                    f"the extractor made {len(x)} frames of {num_samples[i]} samples, "
                    f"{fbank_num_frames(num_samples[i])} were due"
                )
        x_lens = torch.tensor([len(x) for x in features], device=self.device)
        padded = pad_sequence(features, batch_first=True, padding_value=LOG_EPS).to(self.device)
        with self.precision.autocast():
            yield rows, self.encoder(padded, x_lens).encoder_out
