"""Options of losses, distillation and the training loop: train.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.config.cif import CifConfig, TextKdConfig
from icefall_kd.config.data import AugmentConfig, DataConfig
from icefall_kd.config.dual import DualConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.hubert_asr import HubertAsrConfig
from icefall_kd.config.hubert_kd import HubertKdConfig
from icefall_kd.config.hubert_ssl import HubertSslConfig
from icefall_kd.config.labels import TeacherConfig
from icefall_kd.config.model import ModelConfig
from icefall_kd.config.nar import AttentionDecoderConfig, RecogniserKdConfig, TransferConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import ConfigError

Kd = Literal["none", "l1", "l2", "mvq"]
Objective = Literal["asr", "ssl", "distil"]
# Of the systems that have other objectives than asr.
OBJECTIVES = {"dualmode": ("asr", "ssl"), "hubert": ("asr", "ssl", "distil")}


@dataclass(frozen=True, kw_only=True)
class AsrLossConfig:
    """Transducer and CTC losses."""

    rnnt_backend: Literal["auto", "torch", "k2", "fast_rnnt"] = "auto"
    """Which implementation computes the pruned transducer loss."""
    prune_range: int = 5
    """Symbols a frame that the full joiner sees."""
    lm_scale: float = 0.25
    """Smoothing with the decoder alone."""
    am_scale: float = 0.0
    """Smoothing with the encoder alone."""
    simple_loss_scale: float = 0.5
    """Scale of the simple loss after the warm-up."""
    rnnt_warm_step: int = 2000
    """Steps over which the simple loss fades to its scale and the pruned loss grows from 0.1 to 1."""
    transducer_scale: float = 1.0
    """Scale of the transducer losses; 0 builds no transducer (CTC alone)."""
    ctc_scale: float = 0.2
    """Scale of the CTC loss; 0 builds no CTC head."""

    def __post_init__(self) -> None:
        at_least(self, prune_range=2, lm_scale=0, am_scale=0, transducer_scale=0, ctc_scale=0, rnnt_warm_step=0)
        if self.lm_scale + self.am_scale > 1:
            raise ConfigError(f"--lm-scale {self.lm_scale} and --am-scale {self.am_scale} add up to more than 1")
        if self.transducer_scale == 0 and self.ctc_scale == 0:
            raise ConfigError("--transducer-scale and --ctc-scale are both 0: there is nothing to train")


@dataclass(frozen=True, kw_only=True)
class KdConfig:
    """Distillation: whether and how, and where the labels come from."""

    kd: Kd = "none"
    """none, l1 or l2 embedding regression, or mvq codebook indexes."""
    teacher_labels: Literal["stored", "online"] = "stored"
    """Read labels from label-dir, or run the teacher (and the quantizer) in training."""
    label_dir: list[Path] = field(default_factory=list)
    """One or several stored label sets."""
    kd_layer: list[int] = field(default_factory=lambda: [0])
    """Student layer (1-based) of each label set; 0: the middle layer, num_layers // 2."""
    kd_scale: list[float] = field(default_factory=lambda: [0.1])
    """Scale of each label set's loss (summed over frames and codebooks)."""
    codebook_head: Literal["independent", "joint"] = "independent"
    """Independent classifiers, or each codebook conditioned on the earlier ones."""
    min_coverage: float = 1.0
    """Least fraction of training utterances that must have labels."""
    quantizer: Path | None = None
    """Quantizer file, needed for mvq with online labels."""
    online_refine_iters: int = 5
    """Refinement searches of online codes; as many as the stored labels had."""
    kd_delay: int = 0
    """Student frames of 40 ms by which teacher labels come late: a streaming layer has not heard yet what they tell."""

    def __post_init__(self) -> None:
        at_least(self, kd_delay=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    optimizer: Literal["scaled_adam", "adamw"] = "scaled_adam"
    """ScaledAdam or AdamW, both by default with warm-up and Eden decay."""
    base_lr: float = 0.045
    """Peak learning rate."""
    lr_schedule: Literal["eden", "tri_stage", "linear"] = "eden"
    """eden: see lr-batches and lr-epochs; tri_stage: up, constant, then exponentially down, in shares of the planned
    steps (epochs by batches of the first epoch, at most max-steps); linear: up over the first of these shares, then
    down to 0."""
    lr_stages: tuple[float, float, float] = (0.1, 0.4, 0.5)
    """tri_stage: shares of the three stages; linear: the first is its warm-up."""
    lr_initial_scale: float = 0.01
    """tri_stage: of the peak, at the first step."""
    lr_final_scale: float = 0.05
    """tri_stage: of the peak, at the end."""
    lr_batches: float = 7500.0
    """Eden: batches until the rate falls."""
    lr_epochs: float = 3.5
    """Eden: epochs until the rate falls."""
    lr_warmup_steps: int = 500
    """Eden: steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW only."""
    grad_clip: float = 5.0
    """AdamW only: largest gradient norm."""

    def __post_init__(self) -> None:
        at_least(self, base_lr=0, lr_batches=1, lr_epochs=0.1, lr_warmup_steps=0, weight_decay=0, grad_clip=0)
        if min(self.lr_stages) < 0 or abs(sum(self.lr_stages) - 1) > 1e-6:
            raise ConfigError(f"--lr-stages is {self.lr_stages}; three shares from 0 on add up to 1")
        for name in ("lr_initial_scale", "lr_final_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop."""

    exp_dir: Path = Path("exp")
    """Everything that a training writes lies here."""
    num_epochs: int = 30
    """Epochs to train."""
    max_steps: int | None = None
    """Stop after so many steps (a test or a benchmark); None: only num-epochs counts."""
    seed: int = 42
    """Seed of initialisation, sampling, augmentation and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the model; losses stay in float32."""
    accum_grad: int = 1
    """Batches a step."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    dist_timeout: float = 1800.0
    """Seconds that a rank waits for the others, at the start and in every step, before all of them end."""
    log_interval: int = 50
    """Steps between two log lines."""
    valid_interval: int | None = None
    """Steps between two validations; None: only at the end of an epoch."""
    save_every_n: int = 4000
    """Steps between two checkpoint-N.pt."""
    keep_last_k: int = 10
    """checkpoint-N.pt files kept."""
    keep_epochs: int | None = None
    """epoch-N.pt files kept, the last ones; None: all."""
    keep_best: int = 0
    """Besides those, so many epoch-N.pt with the lowest validation loss are kept, for local/average.py --best."""
    average_period: int = 100
    """Steps between two updates of the running averaged model."""
    max_skips: int = 10
    """Non-finite batches in a row that are skipped before the training stops with exit code 3."""
    oom_scan: bool = True
    """Run the memory-worst batches once, with all losses, before step one."""
    start_epoch: int = 1
    """Kept for icefall users: training resumes by itself from the newest checkpoint of exp-dir."""
    init_from: Path | None = None
    """Another exp_dir: parameters of the same name and shape start from its newest (averaged) ones."""

    def __post_init__(self) -> None:
        at_least(self, num_epochs=1, accum_grad=1, log_interval=1, save_every_n=1, keep_last_k=1, average_period=1)
        at_least(self, max_steps=1, valid_interval=1, keep_epochs=1, keep_best=0, max_skips=0, start_epoch=1)
        at_least(self, dist_timeout=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of train.py."""

    system: Literal["mvq", "nar", "hkd", "dualmode", "hubert"] = "mvq"
    """The distillation system: mvq, a transducer; nar, CTC with an attention decoder; hkd, continuous
    integrate-and-fire; dualmode, one set of weights for whole utterances and, pruned, for streams; hubert, HuBERT and
    its students."""
    objective: Objective = "asr"
    """asr: losses of transcripts; ssl: self-supervised, the contrastive loss of wav2vec 2.0 (dualmode) or masked
    prediction of clusters (hubert); distil: the states and clusters of a HuBERT teacher (hubert)."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    asr: AsrLossConfig = AsrLossConfig()
    attention: AttentionDecoderConfig = AttentionDecoderConfig()
    kd: KdConfig = KdConfig()
    recogniser_kd: RecogniserKdConfig = RecogniserKdConfig()
    cif: CifConfig = CifConfig()
    text_kd: TextKdConfig = TextKdConfig()
    dual: DualConfig = DualConfig()
    ssl: SslConfig = SslConfig()
    hubert: HubertConfig = HubertConfig()
    hubert_asr: HubertAsrConfig = HubertAsrConfig()
    hubert_ssl: HubertSslConfig = HubertSslConfig()
    hubert_kd: HubertKdConfig = HubertKdConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    transfer: TransferConfig = TransferConfig()

    def __post_init__(self) -> None:
        offered = OBJECTIVES.get(self.system, ("asr",))
        if self.objective not in offered:
            raise ConfigError(f"--objective {self.objective} with --system {self.system}: it has {', '.join(offered)}")
        if self.dual.sandwich and self.objective == "ssl":
            raise ConfigError("--sandwich true with --objective ssl: this variant is offered for --objective asr alone")

    @property
    def self_supervised(self) -> bool:
        """Return whether the training hears audio alone: no transcripts, no tokenizer."""
        return self.objective != "asr"
