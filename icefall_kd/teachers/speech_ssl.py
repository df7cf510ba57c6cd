"""HuBERT, WavLM, wav2vec 2.0 and data2vec as teachers: 50 frames a second.

Papers: arXiv 2106.07447, 2110.13900, 2006.11477, 2202.03555 (its audio model).

What makes an utterance's embeddings independent of its batch:

* every utterance is normalised over its own samples, before padding;
* the convolutions are un-padded, so the frame count is exact and valid frames see valid samples only;
* padding frames are zeroed before the positional convolution and masked in the attention; data2vec stacks several
  positional convolutions, and a LayerNorm between them fills the padding again, so they are zeroed before each;
* models whose first convolution has a GroupNorm over time (``feat_extract_norm: group``) or whose positional
  convolution has a BatchNorm would see the padding all the same: they run on utterances of equal length only.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.errors import ConfigError
from icefall_kd.frames import FrameFormula
from icefall_kd.runtime.files import read_json
from icefall_kd.teachers import hf
from icefall_kd.teachers.pretrained import Precision, PretrainedTeacher, pick_layer
from icefall_kd.teachers.state_dicts import read_state_dict
from icefall_kd.teachers.transcribe import CtcTranscriber, can_transcribe

FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")


def normalize_audio(audio: Tensor, audio_lens: Tensor) -> Tensor:
    """Give every utterance zero mean and unit variance over its valid samples; padding becomes 0.

    Args:
        audio: (N, S) float32, zero in the padding.
        audio_lens: (N,) int64.
    Returns:
        (N, S) float32, ``(x - mean) / sqrt(var + 1e-7)``.
    """
    valid = torch.arange(audio.shape[1], device=audio.device) < audio_lens[:, None]
    count = audio_lens.clamp(min=1).double()[:, None]
    centred = (audio.double() - audio.double().sum(dim=1, keepdim=True) / count) * valid
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return (centred / (variance + 1e-7).sqrt()).float()


def _feature_norm(config) -> str:
    """Return "group" or "layer": data2vec always has LayerNorm in its convolutions, and no option for it."""
    return getattr(config, "feat_extract_norm", "layer")


class SpeechSslTeacher(PretrainedTeacher):
    """The output of one transformer block of a HuBERT, WavLM, wav2vec 2.0 or data2vec model."""

    folder: Path | None = None
    layer_elsewhere = (
        "transformers: hidden_states[L], where version 4 normalises the last one of pre-norm models; fairseq: "
        "layer_results[L-1][0], or output_layer=L; torchaudio: extract_features()[0][L-1]; WavLM's own code: "
        "layer_results[L][0]"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: int = -1,
        normalize_audio: bool = True,
        normalize_embeddings: bool = False,
        precision: Precision,
        identity: dict,
    ) -> None:
        """Keep the blocks up to ``layer`` of ``model``.

        Args:
            model: A transformers ``HubertModel``, ``WavLMModel``, ``Wav2Vec2Model`` or ``Data2VecAudioModel``; it is
                cut after the block.
            layer: 1-based block; -1: the last.
            normalize_audio: Zero mean and unit variance per utterance, as the model was trained.
            normalize_embeddings: Apply LayerNorm without parameters to every frame.
            precision: Device and dtype.
            identity: teacher, source and weights_sha256 for the provenance.
        Raises:
            ConfigError: For another family, or a layer that the model does not have.
        """
        config = model.config
        if config.model_type not in FAMILIES:
            raise ConfigError(f"model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
        layer = pick_layer(layer, len(model.encoder.layers), f"teacher {identity.get('teacher')}")
        super().__init__(
            dim=config.hidden_size,
            layer=layer,
            frame_formula=FrameFormula(kernels=tuple(config.conv_kernel), strides=tuple(config.conv_stride)),
            max_samples=None,
            normalize_embeddings=normalize_embeddings,
            precision=precision,
            identity=identity,
        )
        self.family = config.model_type
        self.normalize_audio = normalize_audio
        self.input_normalization = "zero mean, unit variance per utterance" if normalize_audio else "none"
        model.encoder.layers = model.encoder.layers[:layer]
        if getattr(config, "do_stable_layer_norm", False):  # data2vec has no such choice
            # This norm follows the last block only; without it the last layer means what the others mean.
            model.encoder.layer_norm = nn.Identity()
            self.layer_convention = (
                "output of block L, 1-based = hidden_states[L]: the residual stream of pre-norm blocks; "
                "the encoder's final LayerNorm is never applied"
            )
        else:
            self.layer_convention = (
                "output of block L, 1-based = hidden_states[L]: after the LayerNorm that closes a post-norm block"
            )
        model.adapter = None
        self.equal_lengths_only = _feature_norm(config) == "group" or getattr(config, "conv_pos_batch_norm", False)
        self.model = model.eval().requires_grad_(False).to(precision.device)
        self._valid: Tensor | None = None
        for conv in getattr(model.encoder.pos_conv_embed, "layers", [])[1:]:
            conv.register_forward_pre_hook(lambda _, args: (args[0] * self._valid[:, None, : args[0].shape[2]],))

    @classmethod
    def load(cls, folder: Path, **kwargs) -> "SpeechSslTeacher":
        """Load from a transformers folder; other arguments as in the constructor.

        Whether audio is normalised is read from ``preprocessor_config.json``; without that file models with
        ``feat_extract_norm: layer`` are taken to want it, as fairseq's large models do.
        """
        model = hf.speech_ssl_model(folder)
        path = folder / "preprocessor_config.json"
        by_norm = _feature_norm(model.config) == "layer"
        normalize = bool(read_json(path).get("do_normalize", by_norm)) if path.is_file() else by_norm
        teacher = cls(model, normalize_audio=normalize, **kwargs)
        teacher.folder = folder
        return teacher

    @classmethod
    def from_state_dict(cls, path: Path, *, identity: dict, **kwargs) -> "SpeechSslTeacher":
        """Load from a state dict of fairseq or torchaudio; other arguments as in the constructor.

        What the tensors do not tell (teachers/state_dicts.py) is part of the provenance.
        """
        found = read_state_dict(path)
        model = hf.speech_ssl_from_tensors(found.model_type, found.config, found.tensors, path)
        identity = {**identity, "state_dict_of": found.origin, "conventions": found.conventions}
        return cls(model, normalize_audio=found.do_normalize, identity=identity, **kwargs)

    def transcribe(self, waves: Sequence[Tensor]) -> list[str] | None:
        """Return greedy CTC transcripts of (S_i,) waveforms, or None when the model has no CTC head."""
        if self.folder is None or not can_transcribe(self.folder):
            return None
        transcriber = CtcTranscriber(self.folder, self.device)
        texts = []
        for wave in waves:
            audio = wave[None].to(self.device, torch.float32)
            lens = torch.tensor([len(wave)], device=self.device)
            texts.append(transcriber.transcribe(normalize_audio(audio, lens) if self.normalize_audio else audio))
        return texts

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.model.encoder.layers

    def _forward(self, audio: Tensor, num_samples: list[int], frames: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for row, (samples, count) in enumerate(zip(num_samples, frames, strict=True)):
            if count > 0:
                groups[samples if self.equal_lengths_only else 0].append(row)
        for rows in groups.values():
            lens = torch.tensor([num_samples[i] for i in rows], device=audio.device)
            waves = audio[rows, : int(lens.max())]
            if self.normalize_audio:
                waves = normalize_audio(waves, lens)
            counts = torch.tensor([frames[i] for i in rows], device=audio.device)
            self._valid = torch.arange(int(counts.max()), device=audio.device) < counts[:, None]
            mask = (torch.arange(waves.shape[1], device=audio.device) < lens[:, None]).long()
            with self.precision.autocast(), warnings.catch_warnings():
                # WavLM mixes a boolean padding mask with a float position bias; torch warns and does the right thing.
                warnings.filterwarnings("ignore", message="Support for mismatched")
                yield rows, self.model(waves, attention_mask=mask).last_hidden_state
