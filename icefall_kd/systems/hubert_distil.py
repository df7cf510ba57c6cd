"""Students of a HuBERT teacher: --system hubert --objective distil, without transcripts.

Wang et al. 2022, arXiv 2210.15631; where the paper is silent, the co-author's public code, or our choice, as
docs/hubert.md says.  With p the predictions of the teacher's states y = H[i], q and p_s the posteriors of its clusters:

    total = w_rec mean|p - y| + w_cos mean(-log sigmoid cos(p, y)) + w_disc KL(q || p_s)

Means are over frames, layers and channels; log and optimizer divide the sums over frames.  With --frontend-steps, a
first stage trains the log-mel front end alone, to give what the teacher's layers hear: w_front mean|A x - H[0]|.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icefall_kd.config import TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.losses.hubert_kd import cluster_choice, cluster_divergence, cosine_distance, distance
from icefall_kd.models.cluster_head import ClusterHead, cosine_logits
from icefall_kd.models.conformer import log_parameter_counts
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.models.hubert_heads import DistilModel, ExpandLast, LayerWise, teacher_layers
from icefall_kd.models.masks import make_pad_mask
from icefall_kd.runtime.dist import zero_of
from icefall_kd.runtime.env import pick_device
from icefall_kd.systems.base import LabelSpec, LossTerm, LossTerms, System
from icefall_kd.systems.hubert_encoder import frames_of, refuse_missing_cmvn
from icefall_kd.systems.hubert_states import OnlineStates, States, StateSource, StoredStates
from icefall_kd.teachers.hubert import HubertTeacher
from icefall_kd.teachers.hubert_weights import HubertWeights, load_hubert_weights
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.train.checkpoint import state_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a student learns of its teacher."""

    source: StateSource
    layers: list[int]
    """i of the H[i] that are predicted; none: clusters alone are learnt."""
    last: int
    """The teacher's last layer, of which clusters are made."""
    wanted: list[int]
    """All layers whose states are needed: those, the last for clusters, 0 for the front end's stage."""
    clusters: ClusterHead | None = None
    """The teacher's, frozen; None: regression alone."""
    weights: HubertWeights | None = None
    """What --init-from-teacher takes parameters of."""


class HubertDistilSystem(System):
    """An encoder and, for its training alone, the heads that predict its teacher's states and clusters."""

    needs_audio = hears_samples = True

    def __init__(self, config: TrainConfig, encoder: HubertEncoder, target: Target) -> None:
        super().__init__()
        self.cfg, self.target = config.hubert_kd, target
        self.model = DistilModel(encoder)
        log_parameter_counts(self.model)
        dim, teacher_dim, count = encoder.dim, target.source.dim, len(target.layers)
        scales = self.cfg.layer_scales or [1 / max(count, 1)] * count
        self.register_buffer("layer_scales", torch.tensor(scales), persistent=False)
        self.heads = nn.ModuleDict()
        if target.layers:
            layer_wise = head_kind(config) == "layer_wise"
            self.heads["states"] = (
                LayerWise(dim, teacher_dim, count, encoder.time_reduction is not None)
                if layer_wise
                else ExpandLast(dim, teacher_dim, count)
            )
        if target.clusters is not None:
            num_clusters, proj_dim = target.clusters.label_embs.shape
            self.heads["clusters"] = nn.Linear(dim, num_clusters if self.cfg.disc_type == "type2" else proj_dim)
        if self.cfg.frontend_steps:
            self.heads["front"] = nn.Linear(dim, teacher_dim)
        # No part of the system: it is the teacher's, and no checkpoint needs it.
        self._clusters = [target.clusters]

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return that an utterance needs one frame, and no text."""
        return {"transducer": False, "ctc": False, "num_encoder_frames": frames_of(self.model.encoder)}

    @property
    def learns_labels(self) -> bool:
        """Return whether validation, too, needs stored labels: there is no other loss."""
        return isinstance(self.target.source, StoredStates)

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the stored label sets of the layers that the losses compare with."""
        source = self.target.source
        return source.specs(self.target.wanted) if isinstance(source, StoredStates) else []

    @property
    def online_sources(self) -> dict[str, str]:
        """Return hashes of the teacher that runs in training, and of the clusters that its posterior is over."""
        source, found = self.target.source, {}
        if isinstance(source, OnlineStates):
            found["online_teacher"] = source.teacher.provenance()["weights_sha256"]
        if self._clusters[0] is not None:
            found["teacher_clusters"] = state_sha256(self._clusters[0].state_dict())
        return found

    @property
    def needs_plan(self) -> bool:
        """Return whether the first stage is a share of the planned steps."""
        return self.cfg.in_shares

    def plan(self, steps: int) -> None:
        """Turn a share of ``steps`` into steps."""
        self.cfg = self.cfg.in_steps(steps)

    def heaviest_step(self, step: int) -> int:
        """Return a step of the second stage, which runs everything."""
        return max(step, int(self.cfg.frontend_steps))

    def start(self) -> tuple[dict, object] | None:
        """Take what fits of the teacher, where the options ask for it."""
        if not self.cfg.init_from_teacher:
            return None
        from icefall_kd.train.hubert_transfer import start_from_teacher  # late: it knows systems

        return start_from_teacher(self.model.encoder, self.target.weights)

    def after_step(self, step: int) -> dict[str, float]:
        """Refuse a log-mel front end without statistics before the first step."""
        if step == 0:
            refuse_missing_cmvn(self.model.encoder)
        return {}

    def _is_first_stage(self, step: int) -> bool:
        return step < self.cfg.frontend_steps

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """Return what the other stage trains: its gradients are 0."""
        if "front" not in self.heads:
            return []
        if not self._is_first_stage(step):
            return list(self.heads["front"].parameters())
        learns = {id(p) for part in (self.model.encoder.subsampling, self.heads["front"]) for p in part.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in learns]

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return the losses of the stage that ``step`` is in; validation has those of the second in both."""
        encoder = self.model.encoder
        x, lens = encoder.subsampling(batch.audio, batch.audio_lens)
        states = self.target.source.states(batch, lens, x.shape[1])
        valid = ~make_pad_mask(states.lens, x.shape[1])  # (N, T')
        if self.cfg.pad_frames:
            valid = (states.lens > 0).unsqueeze(1).expand_as(valid)
        terms: dict[str, LossTerm] = {}
        metrics: dict[str, tuple] = {}
        first = self._is_first_stage(step)
        if first:
            front = distance(self.heads["front"](x), states.layers[0], self.cfg.regression)
            terms["frontend_loss"] = _term(front, valid, self.cfg.frontend_scale if self.training else 0.0)
        if not (first and self.training):
            self._second_stage(terms, metrics, encoder, x, lens, states, valid)
        if self.training and "front" in self.heads:
            # Every parameter has a gradient in every step, if only 0: ranks exchange all of them.
            name, term = next(iter(terms.items()))
            value = term.value + zero_of(self.frozen(step))
            terms[name] = LossTerm(value, term.scale, term.count, per_utterance=term.per_utterance)
        return LossTerms(terms, int(valid.sum()), metrics)

    def _second_stage(
        self, terms: dict, metrics: dict, encoder: HubertEncoder, x: Tensor, lens: Tensor, states: States, valid: Tensor
    ) -> None:
        """Add regression and divergence of the input of the layers x (N, T', C)."""
        head = self.heads["states"] if "states" in self.heads else None
        taps = (*(head.taps(encoder.num_layers) if head is not None else ()), encoder.num_layers)
        out = encoder.forward_embedded(x, lens, taps)
        if head is not None:
            wanted = {i: out.taps[i] for i in head.taps(encoder.num_layers)}
            predicted = head(wanted, x.shape[1])  # (N, n, T', D)
            y = torch.stack([states.layers[i] for i in self.target.layers], dim=1)
            for name, loss, scale in (
                ("rec", distance(predicted, y, self.cfg.regression), self.cfg.rec_scale),
                ("cos", cosine_distance(predicted, y), self.cfg.cos_scale),
            ):  # (N, n, T')
                with torch.autocast(loss.device.type, enabled=False):  # the product would have the student's precision
                    each = torch.einsum("nlt,l->nt", loss, self.layer_scales)
                terms[f"{name}_loss"] = _term(each, valid, scale)
                for row, layer in zip(loss.detach().transpose(0, 1), self.target.layers, strict=True):
                    metrics[f"{name}_H{layer}"] = (row.masked_fill(~valid, 0.0).sum(), float(valid.sum()))
        if self._clusters[0] is not None:
            self._divergence(terms, metrics, out.encoder_out, states.layers[self.target.last], valid)

    def _divergence(self, terms: dict, metrics: dict, hidden: Tensor, last: Tensor, valid: Tensor) -> None:
        """Add the discriminative term of the last hidden states (N, T', C) and the teacher's (N, T', D)."""
        clusters, cfg = self._clusters[0].to(hidden.device), self.cfg
        temperature = cfg.disc_temperature if cfg.disc_student_temperature else 1.0
        output = self.heads["clusters"](hidden)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            teacher = clusters(last, cfg.disc_temperature)  # (N, T', K)
        chosen = teacher.argmax(dim=-1)
        if cfg.disc_type == "type2":
            logits = output.float() / temperature
        else:
            logits = cosine_logits(output, clusters.label_embs, temperature)
        if cfg.disc_type == "type3":
            loss = cluster_choice(output, clusters.label_embs, chosen, temperature)
        else:
            loss = cluster_divergence(logits, teacher)
        terms["disc_loss"] = _term(loss, valid, cfg.disc_scale)
        right = (logits.detach().argmax(dim=-1) == chosen) & valid
        metrics["cluster_acc"] = (right.sum().float(), float(valid.sum()))

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters without the heads."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}


def _term(each: Tensor, valid: Tensor, scale: float) -> LossTerm:
    """Return the term of a loss (N, T') a frame, of which ``valid`` (N, T') count."""
    rows = each.masked_fill(~valid, 0.0).sum(dim=1)
    return LossTerm(rows.sum(), scale, max(int(valid.sum()), 1), per_utterance=rows.detach())


def head_kind(config: TrainConfig) -> str:
    """Return "expand_last" or "layer_wise"."""
    chosen = config.hubert_kd.kd_heads
    if chosen != "auto":
        return chosen
    return "expand_last" if config.hubert.structure == "shallow_wide" else "layer_wise"


def build_distil(config: TrainConfig, encoder: HubertEncoder) -> HubertDistilSystem:
    """Build the system of --objective distil.

    Args:
        config: all options.
        encoder: the student, new or to be initialised.
    Raises:
        ConfigError: no teacher or labels, a teacher without clusters, or layers that do not fit.
    """
    kd, cfg = config.kd, config.hubert_kd
    refuse_options(kd, "mvq", besides=("teacher_labels", "label_dir", "min_coverage"))
    heard = ("front_end", "extractor_norm", "extractor_channels", "feature_grad_scale", "crop_duration")
    refuse_options(config.ssl, "dualmode --objective ssl", besides=heard)
    if cfg.frontend_steps and config.ssl.front_end != "fbank":
        raise ConfigError("--frontend-steps teaches a new front end what the teacher hears: it needs --front-end fbank")
    if cfg.disc_scale and encoder.time_reduction is not None:
        raise ConfigError("--disc-scale with --structure fithubert: its last layer has half the teacher's frames; give "
                          "--disc-scale 0")  # fmt: skip
    if cfg.init_from_teacher and config.loop.init_from is not None:
        raise ConfigError("--init-from-teacher and --init-from exclude each other; leave one of them out")
    online = kd.teacher_labels == "online"
    if online and cfg.kd_quantizers:
        raise ConfigError("--kd-quantizers decode stored codes; leave them out, or give --teacher-labels stored")
    weights = None
    if online or cfg.disc_scale or cfg.init_from_teacher:
        with torch.random.fork_rng(devices=[]):  # the student starts as it does without a teacher
            weights = load_hubert_weights(config.teacher.teacher)
        if online and weights.structure == "fithubert":
            raise ConfigError(f"--teacher {config.teacher.teacher} is a FitHuBERT, which has half the frames")
    clusters = None
    if cfg.disc_scale:
        clusters = weights.head
        if clusters is None:
            raise ConfigError(
                f"--disc-scale {cfg.disc_scale}: {weights.source} has no clusters (only pre-trained models of ours and "
                "fairseq's or torchaudio's state dicts have them); give another --teacher, or --disc-scale 0"
            )
    stored = None if online else StoredStates.open(kd, cfg.kd_quantizers, weights.sha256 if weights else None)
    depth = weights.num_layers if weights else max(stored.sets)
    layers = _layers(config, encoder, depth, None if online else [i for i in stored.sets if i > 0])
    wanted = {*layers, *([depth] if clusters else []), *([0] if cfg.frontend_steps else [])}
    source = _online(config, weights, sorted(wanted)) if online else stored
    if not online and (lacking := sorted(wanted - set(stored.sets))):
        raise ConfigError(
            f"--label-dir holds layers {', '.join(map(str, stored.sets))}; layer {lacking[0]} is needed, too (0: "
            "--frontend-steps, the last: --disc-scale)"
        )
    return HubertDistilSystem(config, encoder, Target(source, layers, depth, sorted(wanted), clusters, weights))


def _online(config: TrainConfig, weights: HubertWeights, wanted: Sequence[int]) -> OnlineStates:
    options = config.teacher
    if options.normalize_embeddings:
        raise ConfigError("--normalize-embeddings true: clusters and heads are of HuBERT's states as they are")
    dtype = "float32" if options.teacher_dtype == "auto" else options.teacher_dtype
    precision = Precision.choose(pick_device(options.teacher_device), dtype)
    return OnlineStates(HubertTeacher(weights, layer=max(wanted), precision=precision), wanted)


def _layers(config: TrainConfig, encoder: HubertEncoder, depth: int, known: Sequence[int] | None = None) -> list[int]:
    """Return the teacher layers that are predicted, checked against both depths.

    Args:
        config: all options.
        encoder: the student.
        depth: layers of the teacher.
        known: those of the label sets; None: all.
    """
    cfg, kind = config.hubert_kd, head_kind(config)
    if cfg.rec_scale == cfg.cos_scale == 0:
        return []
    chosen = cfg.teacher_layers or known
    if kind == "layer_wise" and chosen is None and encoder.num_layers != depth:
        raise ConfigError(
            f"the student has {encoder.num_layers} layers, the teacher {depth}: name the teacher layer of each with "
            "--teacher-layers, or use --kd-heads expand_last"
        )
    layers = teacher_layers(kind, chosen, encoder.num_layers, depth)
    if max(layers) > depth:
        raise ConfigError(f"--teacher-layers names layer {max(layers)}; the teacher has {depth}")
    if kind == "layer_wise" and len(layers) != encoder.num_layers:
        raise ConfigError(
            f"{len(layers)} teacher layers for {encoder.num_layers} student layers: --kd-heads layer_wise needs one "
            "for each (--teacher-layers)"
        )
    if cfg.layer_scales is not None and len(cfg.layer_scales) != len(layers):
        raise ConfigError(f"--layer-scales has {len(cfg.layer_scales)} values for {len(layers)} teacher layers")
    return layers
