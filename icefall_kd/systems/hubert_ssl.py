"""HuBERT's pre-training: masked prediction of clusters, without transcripts.

Hsu et al. 2021, "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units",
arXiv 2106.07447, eqs. 1-3, with the penalty and constants of its public code (fairseq):

    total = L_m + alpha * L_u + 10 * M * penalty

L_m is the sum over the M masked frames of the cross-entropy of their clusters, L_u that over all others, penalty the
mean square of what the convolutions give.
"""

import logging
import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config import TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import IGNORE, Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV, waveform_frames
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.models.cluster_head import ClusterHead
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.models.ssl import sample_spans
from icefall_kd.models.waveform import WaveformFrontEnd, scale_gradient
from icefall_kd.systems.base import LabelSpec, LossTerm, LossTerms, System, by_row, stored_labels

logger = logging.getLogger(__name__)

# Steps between two looks at the health of a training, and what they warn of (our choice).
HEALTH_INTERVAL = 1000
FIRST_LOSS_TOLERANCE = 1.0
LEAST_PERPLEXITY, LEAST_SHARE_OF_PERPLEXITY = 1.5, 0.1
_NAME = "clusters"


class HubertSslModel(nn.Module):
    """An encoder, and what masked prediction needs around it.

    Args:
        encoder: of whole utterances.
        num_clusters: K.
        cluster_dim: E in which frames and clusters are compared.
    """

    def __init__(self, encoder: HubertEncoder, num_clusters: int, cluster_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_embedding = nn.Parameter(torch.rand(encoder.dim))
        self.cluster_head = ClusterHead(encoder.dim, num_clusters, cluster_dim)


class HubertSslSystem(System):
    """An encoder that learns to which cluster the frames behind its mask belong.

    Args:
        config: all options of the training.
        encoder: new, or with the parameters of another training to come.
        path: folder of the label set.
        info: its provenance.
    """

    needs_audio = hears_samples = learns_labels = True

    def __init__(self, config: TrainConfig, encoder: HubertEncoder, path: str, info: LabelSetInfo) -> None:
        super().__init__()
        self.cfg, self.ssl = config.hubert_ssl, config.ssl
        self.is_new = config.loop.init_from is None
        self.path, self.num_clusters = path, info.codebook_size
        self.model = HubertSslModel(encoder, self.num_clusters, self.cfg.cluster_dim)
        log_parameter_counts(self.model)

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the label set of the clusters."""
        return [LabelSpec(name=_NAME, kind="clusters", path=self.path)]

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return which utterances are too short to be masked: less than two spans."""
        return {
            "transducer": False,
            "ctc": False,
            "num_encoder_frames": waveform_frames,
            "min_encoder_frames": 2 * self._span,
        }

    @property
    def _span(self) -> int:
        return self.ssl.mask_span or 10  # 200 ms, whichever front end

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return the cross-entropy of masked frames, that of the others and the penalty.

        Raises:
            DataError: an utterance has another number of clusters than frames.
        """
        x, lens, penalty = self._embed(batch)
        clusters = self._clusters(batch, lens, x.shape[1])
        # In validation every epoch masks the same frames.
        generator = None if self.training else torch.Generator().manual_seed(zlib.crc32("|".join(batch.ids).encode()))
        mask = sample_spans(lens.cpu(), x.shape[1], self.ssl.mask_prob, self._span, generator).to(x.device)
        x = torch.where(mask.unsqueeze(-1), self.model.mask_embedding.to(x.dtype), x)
        hidden = self.model.encoder.forward_embedded(x, lens).encoder_out
        masked, metrics = self._predict("masked", hidden, clusters, mask, 1.0)
        others = ~mask & ~make_pad_mask(lens, mask.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg.unmasked_scale > 0):
            unmasked, more = self._predict("unmasked", hidden, clusters, others, self.cfg.unmasked_scale)
        terms = {"masked_loss": masked, "unmasked_loss": unmasked}
        count = masked.count
        if penalty is not None:
            terms["feature_penalty"] = LossTerm(count * penalty, self.ssl.feature_penalty, count, masked.unit)
        if self.training:  # validation has always the same
            metrics["masked_share"] = (float(mask.sum()), float(lens.sum()))
            if step % HEALTH_INTERVAL == 0:
                self._check_health(float(masked.value.detach()) / count, metrics, step)
        return LossTerms(terms, int(count), metrics | more, masked.unit)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the front end's output (N, T', C), (N,) valid frames, and the penalty on the convolutions' output."""
        front = self.model.encoder.subsampling
        if not isinstance(front, WaveformFrontEnd):
            return *front(batch.audio, batch.audio_lens), None
        raw, lens = front.project(batch.audio, batch.audio_lens)
        raw = scale_gradient(raw, front.grad_scale)
        valid = ~make_pad_mask(lens, raw.shape[1])
        return front.finish(front.norm(raw)), lens, raw[valid].float().square().mean()

    def _clusters(self, batch: Batch, lens: Tensor, width: int) -> Tensor:
        """Return (N, T') cluster numbers, -100 in the padding and of utterances without labels."""
        labels = batch.labels[_NAME]
        for utterance, found, frames in zip(batch.ids, labels.lens.tolist(), lens.tolist(), strict=True):
            if found not in (0, frames):
                raise DataError(
                    f"utterance {utterance}: {found} clusters for {frames} frames; label set {self.path} is of other "
                    "audio, extract it again"
                )
        values = labels.values.to(lens.device).squeeze(2)
        return F.pad(values, (0, width - values.shape[1]), value=IGNORE)

    def _predict(
        self, name: str, hidden: Tensor, clusters: Tensor, where: Tensor, scale: float
    ) -> tuple[LossTerm, dict[str, tuple]]:
        """Return the cross-entropy of the frames at ``where`` (N, T') bool that have labels, and its metrics."""
        where = where & (clusters != IGNORE)
        logits = self.model.cluster_head(hidden[where], self.cfg.cluster_temperature)  # (F, K)
        targets = clusters[where]
        loss = F.cross_entropy(logits, targets, reduction="none")
        chosen = logits.detach().argmax(dim=-1)
        # Where no utterance of a batch has labels the sums are 0, and nothing is divided by 0.
        count = float(max(len(targets), 1))
        rows = by_row(loss.detach(), where.nonzero()[:, 0], len(where))
        metrics = {f"{name}_acc": ((chosen == targets).sum(), count)}
        if name == "masked":
            metrics["predicted_perplexity"] = (self._perplexity(chosen), 1.0, float(self.num_clusters))
            if self.training:
                metrics["label_perplexity"] = (self._perplexity(targets), 1.0, float(self.num_clusters))
        return LossTerm(loss.sum(), scale, count, f"{name} frame", rows), metrics

    def _perplexity(self, numbers: Tensor) -> Tensor:
        """Return how many of the clusters a batch uses, as the perplexity of numbers (F,)."""
        shares = torch.bincount(numbers, minlength=self.num_clusters).float() / max(len(numbers), 1)
        return torch.special.entr(shares).sum().exp()

    def _check_health(self, loss: float, metrics: dict[str, tuple], step: int) -> None:
        """Warn of a loss that does not begin near the logarithm of the clusters, and of a collapse to few of them."""
        if step == 0 and self.is_new and abs(loss - math.log(self.num_clusters)) > FIRST_LOSS_TOLERANCE:
            logger.warning(
                "the loss begins at %.3f nats a masked frame; ln K = %.3f of %d clusters is what an untrained model "
                "has, a little more for its cosines (a small --cluster-dim or --cluster-temperature moves it)",
                loss,
                math.log(self.num_clusters),
                self.num_clusters,
            )
        predicted, labels = (float(metrics[f"{name}_perplexity"][0]) for name in ("predicted", "label"))
        if step > 0 and predicted < max(LEAST_PERPLEXITY, LEAST_SHARE_OF_PERPLEXITY * labels):
            logger.warning(
                "at step %d the predictions use as many clusters as %.1f equally likely ones, the labels %.1f: the "
                "model collapses; lower --base-lr, or raise --lr-warmup-steps",
                step,
                predicted,
                labels,
            )

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters: mask embedding and cluster head are what students and fine-tuning take over."""
        return self.state_dict()


def build_hubert_ssl(config: TrainConfig, encoder: HubertEncoder) -> HubertSslSystem:
    """Build the system of --objective ssl.

    Args:
        config: all options of the training.
        encoder: that of ``config``.
    Raises:
        ConfigError: no label set of clusters, clusters of frames that are not the encoder's, or options of others.
    """
    read = ("front_end", "extractor_norm", "extractor_channels", "mask_prob", "mask_span")
    besides = (*read, "feature_penalty", "feature_grad_scale", "crop_duration")
    refuse_options(config.ssl, "dualmode --objective ssl", besides)
    if config.kd.kd != "none" or config.kd.teacher_labels != "stored":
        raise ConfigError("--kd and --teacher-labels online are not for --objective ssl; its clusters are stored")
    if encoder.time_reduction is not None:
        raise ConfigError("--structure fithubert with --objective ssl: it has 25 frames a second, clusters are of 50")
    paths, _ = stored_labels(config.kd.label_dir, {"clusters": "--objective ssl"})
    info = LabelSetInfo.load(paths["clusters"])
    # Two hops show every remainder, and that counts begin at the same length.
    lengths = range(SSL_CONV.receptive_field + 2 * SSL_CONV.hop)
    if info.sampling_rate != 16000 or any(info.formula.num_frames(n) != SSL_CONV.num_frames(n) for n in lengths):
        raise ConfigError(
            f"label set {paths['clusters']} has frames of {info.frame_formula} at {info.sampling_rate} Hz, the model "
            f"of {SSL_CONV.to_dict()}; take MFCC (--teacher mfcc) or a HuBERT model as the teacher of the clusters"
        )
    return HubertSslSystem(config, encoder, paths["clusters"], info)
