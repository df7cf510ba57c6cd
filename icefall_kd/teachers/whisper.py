"""Whisper encoders as teachers (Radford et al. 2022, arXiv 2212.04356): 50 frames a second, 30 s windows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.frames import WHISPER_CONV
from icefall_kd.teachers import hf
from icefall_kd.teachers.pretrained import Precision, PretrainedTeacher, pick_layer
from icefall_kd.teachers.transcribe import WhisperTranscriber, can_transcribe

N_FFT = 400
HOP = 160
WINDOW_SAMPLES = 480000
LOG_FLOOR = -10.0  # log10 of Whisper's floor of 1e-10


def log_mel(audio: Tensor, filters: Tensor, window_samples: int = WINDOW_SAMPLES) -> Tensor:
    """Compute Whisper's log-mel features of audio that is padded with zeros to 30 s.

    Only the samples that are not padding are transformed; the frames of the padding are known.  The dynamic
    range is limited to 8 below the maximum of the utterance's own window, so an utterance's features do not
    depend on the batch.

    Args:
        audio: (N, S) float32 at 16 kHz, zero beyond each utterance's end, S at most ``window_samples``.
        filters: (M, 201) mel filters.
        window_samples: Samples of the whole window.
    Returns:
        (N, M, window_samples // 160) float32.
    """
    num_frames = window_samples // HOP
    # Two FFT windows of zeros at the end keep the reflected border away from the signal.
    length = min(window_samples, -(-audio.shape[1] // HOP) * HOP + 2 * N_FFT)
    audio = nn.functional.pad(audio.float(), (0, length - audio.shape[1]))
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, HOP, window=window, return_complex=True)[..., :-1]
    power = (spectrum.real.square() + spectrum.imag.square()).contiguous()
    features = (filters @ power).clamp(min=1e-10).log10()  # (N, M, length // HOP)
    top = features.amax(dim=(1, 2), keepdim=True)
    features = nn.functional.pad(features, (0, num_frames - features.shape[2]), value=LOG_FLOOR)
    return (torch.maximum(features, top - 8.0) + 4.0) / 4.0


class WhisperTeacher(PretrainedTeacher):
    """The output of one block of a Whisper encoder, for utterances of up to 30 s."""

    family = "whisper"
    layer_convention = (
        "output of encoder block L, 1-based: the residual stream before the final LayerNorm, which is never applied"
    )
    layer_elsewhere = "transformers: the encoder's hidden_states[L], but the last one has the final LayerNorm applied"
    folder: Path | None = None
    input_normalization = "log-mel limited to 8 below the utterance's maximum, padded with zeros to 30 s"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        layer: int = -1,
        normalize_embeddings: bool = False,
        precision: Precision,
        identity: dict,
        windows_per_forward: int | None = None,
    ) -> None:
        """Keep the blocks up to ``layer`` of ``encoder``.

        Args:
            encoder: A transformers ``WhisperEncoder``; it is cut after block ``layer``.
            layer: 1-based block; -1: the last.
            normalize_embeddings: Apply LayerNorm without parameters to every frame.
            precision: Device and dtype.
            identity: teacher, source and weights_sha256 for the provenance.
            windows_per_forward: 30 s windows in one forward pass; None: 8 on a CPU (as fast as 1 on an
                idle machine, faster on a busy one), 16 on a GPU.
        """
        config = encoder.config
        layer = pick_layer(layer, len(encoder.layers), f"teacher {identity.get('teacher')}")
        super().__init__(
            dim=config.d_model,
            layer=layer,
            frame_formula=WHISPER_CONV,
            max_samples=config.max_source_positions * WHISPER_CONV.hop,
            normalize_embeddings=normalize_embeddings,
            precision=precision,
            identity=identity,
        )
        encoder.eval().requires_grad_(False).to(precision.device)
        self.last_block = encoder.layers[layer - 1]
        encoder.layers = encoder.layers[: layer - 1]
        encoder.layer_norm = nn.Identity()
        self.encoder = encoder
        self.filters = hf.mel_filters(config.num_mel_bins).to(precision.device)
        self.windows_per_forward = windows_per_forward or (8 if precision.device.type == "cpu" else 16)

    @classmethod
    def load(cls, folder: Path, **kwargs) -> "WhisperTeacher":
        """Load from a transformers or a CTranslate2 folder; other arguments as in the constructor."""
        teacher = cls(hf.whisper_encoder(folder), **kwargs)
        teacher.folder = folder
        return teacher

    def transcribe(self, waves: Sequence[Tensor]) -> list[str] | None:
        """Return greedy transcripts of (S_i,) waveforms of one language, or None when the folder has no tokenizer.

        The whole model is loaded for it, in float32, and freed again.
        """
        if self.folder is None or not can_transcribe(self.folder):
            return None
        transcriber = WhisperTranscriber(self.folder, self.device)
        return transcriber.transcribe([log_mel(w[None].to(self.device), self.filters) for w in waves])

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def _forward(self, audio: Tensor, num_samples: list[int], frames: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        rows = [i for i, t in enumerate(frames) if t > 0]
        for start in range(0, len(rows), self.windows_per_forward):
            part = rows[start : start + self.windows_per_forward]
            longest = max(num_samples[i] for i in part)
            features = log_mel(audio[part, :longest], self.filters, self.max_samples)
            with self.precision.autocast():
                hidden = self.encoder(features).last_hidden_state
                yield part, self._last(hidden, max(frames[i] for i in part))

    def _last(self, hidden: Tensor, num_frames: int) -> Tensor:
        """Run the chosen block for the first ``num_frames`` frames only; they attend to the whole window.

        Args:
            hidden: (n, 1500, C) input of the block.
            num_frames: frames that are wanted.
        Returns:
            (n, num_frames, C).
        """
        block = self.last_block
        normed = block.self_attn_layer_norm(hidden)
        attended, _ = block.self_attn(normed[:, :num_frames], key_value_states=normed)
        x = hidden[:, :num_frames] + attended
        return x + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))
