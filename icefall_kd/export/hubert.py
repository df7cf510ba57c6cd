"""The graph of an exported HuBERT model: samples, or log-mel features, to log-probabilities of CTC.

A model with the log-mel front end takes the features, which no ONNX operator makes of samples: 80 bins of Kaldi's
log-mel energies with whole windows (25 ms every 10 ms), of samples in [-1, 1]; their CMVN is in the graph.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from icefall_kd.data.features import NUM_BINS
from icefall_kd.errors import ConfigError
from icefall_kd.export.graphs import Graph, log_mel_noise
from icefall_kd.models.fbank_front import FbankFrontEnd

# Lengths of the batches that are compared: the shortest, those where a frame begins, padded ones, a long one.
SAMPLES = ((400,), (719,), (720,), (1040, 400), (16001, 8000, 401), (50000,))
FEATURES = ((1,), (2,), (3,), (50, 7), (101, 100, 1), (333,))


class CtcOfSamples(nn.Module):
    """Encoder and CTC head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder, self.ctc_output = model.encoder, model.ctc_output

    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map samples (N, S), of which (N,) are valid, to log-probabilities (N, T', V) and (N,) valid frames."""
        return self._said(*self.encoder.subsampling(audio, audio_lens))

    def _said(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder.forward_embedded(x, lens)
        return self.ctc_output(out.encoder_out).log_softmax(dim=-1), out.encoder_out_lens


class CtcOfFeatures(CtcOfSamples):
    """The same behind the log-mel features."""

    def forward(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (N, F, 80), of which (N,) frames of 10 ms are valid, to what the other graph returns."""
        front = self.encoder.subsampling
        return self._said(*front.project(front.normalise(features, feature_lens), feature_lens))


def hubert_graphs(model: nn.Module) -> list[Graph]:
    """Return the one graph of a HuBERT model with a CTC head.

    The weight norm of the positional convolution is folded into its weights, in place.

    Raises:
        ConfigError: it has no CTC head.
    """
    if model.ctc_output is None:
        raise ConfigError("a HuBERT model is exported with its CTC head, and this one was trained with --ctc-scale 0")
    for module in model.encoder.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    features = isinstance(model.encoder.subsampling, FbankFrontEnd)
    name, module = ("features", CtcOfFeatures(model)) if features else ("audio", CtcOfSamples(model))
    # Of different lengths: the tracer keeps the mask of the padding.
    example = hubert_input((90, 61), True) if features else hubert_input((16000, 9000), False)
    return [
        Graph(
            "ctc",
            module.eval(),
            {name: {0: "N", 1: "F" if features else "S"}, f"{name}_lens".replace("features_", "feature_"): {0: "N"}},
            {"log_probs": {0: "N", 1: "T_out"}, "log_probs_lens": {0: "N"}},
            example,
        )
    ]


def hubert_input(lens: tuple[int, ...], features: bool) -> tuple[Tensor, Tensor]:
    """Return a padded batch of noise, features (N, F, 80) or samples (N, S), and its lengths (N,)."""
    longest, valid = max(lens), torch.tensor(lens)
    if features:
        return log_mel_noise(len(lens), longest, NUM_BINS), valid
    audio = torch.randn(len(lens), longest) * 0.1
    return audio.masked_fill(torch.arange(longest) >= valid.unsqueeze(1), 0.0), valid


def hubert_cases(graph: Graph) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that the graph is compared on."""
    features = isinstance(graph.module, CtcOfFeatures)
    return [hubert_input(lens, features) for lens in (FEATURES if features else SAMPLES)]
