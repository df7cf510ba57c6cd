"""A HuBERT model in our own encoder as a teacher: batches of any lengths, and H[0] beside the layers' outputs.

Models of transformers are teachers as they are (teachers/speech_ssl.py); those whose first convolution is normalised
over time then run on one length at a time, for which a training has no time.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.frames import SSL_CONV, FrameFormula
from icefall_kd.teachers.hubert_weights import LAYER_CONVENTION, HubertWeights, load_hubert_weights
from icefall_kd.teachers.pretrained import Precision, PretrainedTeacher, pick_layer
from icefall_kd.teachers.speech_ssl import normalize_audio

# FitHuBERT's layers see every pair of frames; a last frame without a partner is a pair, too.
_PAIRS = FrameFormula(kernels=(*SSL_CONV.kernels, 1), strides=(*SSL_CONV.strides, 2))


class HubertTeacher(PretrainedTeacher):
    """The output of one layer of a pre-trained, distilled or fine-tuned HuBERT model."""

    family = "hubert"
    layer_convention = LAYER_CONVENTION

    def __init__(
        self,
        weights: HubertWeights,
        *,
        layer: int = -1,
        normalize_embeddings: bool = False,
        precision: Precision,
        identity: dict | None = None,
    ) -> None:
        """Build the encoder up to a layer.

        Args:
            weights: of teachers/hubert_weights.py.
            layer: 1-based layer; -1: the last.
            normalize_embeddings: apply LayerNorm without parameters to every frame.
            precision: device and dtype.
            identity: teacher, source and weights_sha256 for the provenance; None: those of ``weights``.
        Raises:
            ConfigError: the model has no such layer.
        """
        source = weights.source
        identity = identity or {"teacher": source, "source": source, "weights_sha256": weights.sha256}
        layer = pick_layer(layer, weights.num_layers, f"teacher {identity['teacher']}")
        super().__init__(
            dim=weights.dim,
            layer=layer,
            frame_formula=_PAIRS if weights.structure == "fithubert" else SSL_CONV,
            max_samples=None,
            normalize_embeddings=normalize_embeddings,
            precision=precision,
            identity=identity,
        )
        self.normalize_audio = weights.normalize_audio
        self.input_normalization = "zero mean, unit variance per utterance" if self.normalize_audio else "none"
        # A new encoder draws its parameters, and a student must start as it does without a teacher.
        with torch.random.fork_rng(devices=[]):
            encoder = weights.new_encoder()
        encoder.layers = encoder.layers[:layer]
        self.encoder = encoder.eval().requires_grad_(False).to(precision.device)

    @classmethod
    def load(cls, exp_dir: Path, **kwargs) -> "HubertTeacher":
        """Load the newest model of a training of --system hubert, whatever its objective; raises as its weights do."""
        weights = load_hubert_weights(exp_dir)
        identity = {"teacher": str(exp_dir), "source": weights.source, "weights_sha256": weights.sha256}
        return cls(weights, identity=identity, **kwargs)

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def _forward(self, audio: Tensor, num_samples: list[int], frames: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        rows = [i for i, count in enumerate(frames) if count > 0]
        if not rows:
            return
        lens = torch.tensor([num_samples[i] for i in rows], device=audio.device)
        waves = audio[rows, : int(lens.max())]
        with self.precision.autocast():
            yield rows, self.encoder(normalize_audio(waves, lens) if self.normalize_audio else waves, lens).encoder_out
