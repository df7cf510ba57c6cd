"""Options of teachers, quantizers and label sets."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which teacher, which layer, and how it is run."""

    teacher: str = "whisper-tiny.en"
    """Hub id, local folder (transformers or CTranslate2 Whisper), state dict of fairseq or torchaudio, an exp_dir of
    ours, FILE.py:CLASS, the name of a pip-supplied model (whisper-tiny.en, whisper-base), or mfcc: no model, but 13
    MFCC with differences every 20 ms."""
    layer: int = -1
    """Transformer block whose output is taken, 1-based; -1: the last block; 0: the input of the first, for a quantizer
    and beside other layers."""
    normalize_embeddings: bool = False
    """Apply LayerNorm without parameters to the embeddings."""
    long_utterances: Literal["window", "reject"] = "window"
    """Utterances longer than the teacher's limit: overlapping windows, or reject."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU and for posteriors and n-best lists of a recogniser."""
    teacher_device: str = "auto"
    """auto: the GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Multi-codebook quantizer and its training."""

    num_codebooks: int = 8
    """Codebooks, i.e. bytes a frame: 1, 2, 4, 8, 16 or 32."""
    phase1_steps: int = 10000
    """Steps with 2 x num-codebooks codebooks of 16 entries."""
    phase2_steps: int = 10000
    """Steps with num-codebooks codebooks of 256 entries."""
    frames_per_step: int = 512
    """Frames of a training step."""
    quantizer_utts: int = 1000
    """Utterances of the training sample, drawn with the seed, stratified by duration."""
    entropy_scale: float = 0.01
    """Weight of the entropy term."""
    refine_iters: int = 5
    """Refinement searches at extraction."""
    quantizer_seed: int = 42
    """Seed of sample and initialisation."""
    quantizer_init: Literal["random", "data"] = "data"
    """Start from k-means in balanced subspaces of the data, or from random numbers, as multi_quantization does."""


@dataclass(frozen=True, kw_only=True)
class KmeansConfig:
    """k-means of a teacher's embeddings: HuBERT's clusters.  Where it says fairseq, the default is that code's."""

    num_clusters: int = 100
    """Clusters K: 100 of MFCC, 500 of a layer of the first model, in the paper."""
    kmeans_utts: int = 1000
    """Utterances of the training sample, drawn with the seed, stratified by duration."""
    kmeans_frames: int = 2_000_000
    """About so many frames are drawn of theirs, all if there are fewer: of 768 channels they take 12 GB of memory."""
    kmeans_seed: int = 42
    """Seed of sample and initialisation."""
    kmeans_batch: int = 10000
    """Frames of a mini-batch (fairseq)."""
    kmeans_passes: int = 100
    """Passes over the frames, at most (fairseq); it ends when 100 mini-batches in a row bring nothing."""
    kmeans_inits: int = 20
    """Initialisations by k-means++ that are tried (fairseq)."""

    def __post_init__(self) -> None:
        at_least(self, num_clusters=2, kmeans_utts=1, kmeans_frames=2, kmeans_batch=1, kmeans_passes=1, kmeans_inits=1)
        if self.num_clusters > 65536:
            raise ConfigError(f"--num-clusters is {self.num_clusters}; a cluster's number must fit two bytes (65536)")


LabelKind = Literal["codebook_indexes", "clusters", "embeddings", "ctc_posteriors", "token_posteriors", "nbest"]
# Kinds made of embeddings by what --quantizer names.
QUANTIZED = ("codebook_indexes", "clusters")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, from which cuts, into which label set."""

    cuts: list[Path]
    """Cut sets (cuts_*.jsonl.gz), several as a,b."""
    label_dir: Path
    """Folder of the label set."""
    kind: LabelKind = "codebook_indexes"
    """Codes of a quantizer, clusters of k-means, or the embeddings themselves; of a recogniser that this project
    trained (--system nar --attention-decoder ar): posteriors of its CTC head or of its decoder along the transcript, or
    its n-best."""
    quantizer: Path | None = None
    """Quantizer file (local/train_quantizer.py), needed for codebook_indexes, or clusters (local/train_kmeans.py)."""
    refine_iters: int = 5
    """Refinement searches of the quantizer."""
    embeddings_dtype: Literal["float16", "float32"] = "float16"
    """Type in which embeddings are stored."""
    top_k: int = 8
    """ctc_posteriors and token_posteriors: classes kept of each distribution; the others become one number."""
    nbest_size: int = 4
    """nbest: hypotheses kept of each utterance, at most."""
    nbest_beam_size: int = 10
    """nbest: beam of the teacher's joint CTC/attention search."""
    pieces: float | None = None
    """Label pieces of at most so many seconds, as a training with this --crop-duration hears them; None: utterances."""
    shard: int = 0
    """Which shard to extract, from 0."""
    num_shards: int = 1
    """Into how many shards the set is divided."""
    extract_max_duration: float = 100.0
    """Seconds of padded audio a batch."""
    part_utterances: int = 100
    """Utterances a part: what a kill can cost at most."""
    load_workers: int = 2
    """Threads that read audio ahead."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    max_reject_ratio: float = 0.05
    """Largest fraction of utterances that may be rejected before the shard fails."""
    teacher: TeacherConfig = TeacherConfig()

    def __post_init__(self) -> None:
        if self.kind in QUANTIZED and self.quantizer is None:
            raise ConfigError(f"--kind {self.kind} needs --quantizer FILE (or choose --kind embeddings)")
        if not 0 <= self.shard < self.num_shards:
            raise ConfigError(f"--shard is {self.shard}; with --num-shards {self.num_shards} it runs from 0")
        at_least(self, top_k=1, nbest_size=1, nbest_beam_size=1, pieces=0.5)
        if self.part_utterances < 1 or self.extract_max_duration <= 0 or self.load_workers < 1:
            raise ConfigError("--part-utterances, --extract-max-duration and --load-workers must be positive")


@dataclass(frozen=True, kw_only=True)
class LayersConfig(TeacherConfig):
    """Which teacher, which layers, and how it is run."""

    layer: list[int] = field(default_factory=lambda: [-1])
    """Transformer blocks whose outputs are taken, 1-based, several as 6,12; -1: the last block; beside others 0, the
    input of the first."""


@dataclass(frozen=True, kw_only=True)
class ExtractLayersConfig(ExtractConfig):
    """What to extract, from which cuts, into which label sets: one for each layer, or for each kind of one layer."""

    label_dir: list[Path]
    """Folder of the label set of each layer or kind, several as a,b."""
    kind: list[LabelKind] = field(default_factory=lambda: ["codebook_indexes"])
    """One kind of all label sets, or, of a recogniser, one for each: ctc_posteriors,token_posteriors,nbest,embeddings.
    codebook_indexes are codes of a quantizer, clusters those of k-means."""
    quantizer: list[Path] = field(default_factory=list)
    """Quantizer file of each layer; needed for codebook_indexes and clusters."""
    teacher: LayersConfig = LayersConfig()

    def __post_init__(self) -> None:
        self.each()  # the checks of each label set

    def each(self) -> list[ExtractConfig]:
        """Return the configuration of every label set.

        Raises:
            ConfigError: layers, label sets and quantizers are not equally many, or one label set is named twice.
        """
        kinds, layers, quantizers = self.kind, self.teacher.layer, self.quantizer
        if len(kinds) != 1:
            if set(QUANTIZED) & set(kinds) or len(layers) > 1:
                raise ConfigError(
                    f"--kind {','.join(kinds)}: several kinds come from the heads and the last layer of one "
                    "recogniser; extract clusters, codebook_indexes and other layers in a run of their own"
                )
            layers = layers * len(kinds)
        else:
            kinds = kinds * len(layers)
        if not quantizers and not set(QUANTIZED) & set(kinds):
            quantizers = [None] * len(layers)
        if not len(layers) == len(self.label_dir) == len(quantizers) or not layers:
            raise ConfigError(
                f"--kind and --layer name {len(layers)} layers, --label-dir {len(self.label_dir)} folders, --quantizer "
                f"{len(self.quantizer)} files; give one of each for every label set (a,b), no quantizers for other "
                f"kinds than {' and '.join(QUANTIZED)}"
            )
        if len({folder.resolve() for folder in self.label_dir}) < len(self.label_dir):
            raise ConfigError(f"--label-dir names one folder twice: {', '.join(map(str, self.label_dir))}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        teacher = {f.name: getattr(self.teacher, f.name) for f in fields(self.teacher)}
        return [
            ExtractConfig(
                **values
                | {"kind": kind, "label_dir": folder, "quantizer": quantizer}
                | {"teacher": TeacherConfig(**teacher | {"layer": layer})}
            )
            for kind, layer, folder, quantizer in zip(kinds, layers, self.label_dir, quantizers, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Which language model teaches, which of its layers, and how it is run."""

    plm: str = "minilm"
    """Masked or causal language model: hub id, local folder, minilm (English, pip-supplied), or tiny-random-masked and
    tiny-random-causal, which have learnt nothing."""
    plm_layer: int = -1
    """Layer whose states are taken, 1-based; -1: the last one, with the model's final normalisation."""
    plm_case: Literal["lower", "keep"] = "lower"
    """What the model reads: texts in lower case, or as they are."""
    plm_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and products."""
    plm_device: str = "auto"
    """auto: the GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class ExtractTextConfig:
    """States of a language model: of which texts, into which label set."""

    cuts: list[Path]
    """Cut sets (cuts_*.jsonl.gz) whose texts are read, several as a,b; equal texts, as of speed copies, count once."""
    label_dir: Path
    """Folder of the label set."""
    shard: int = 0
    """Which shard to extract, from 0."""
    num_shards: int = 1
    """Into how many shards the set is divided."""
    batch_pieces: int = 4096
    """Padded pieces of the language model a batch."""
    part_texts: int = 1000
    """Texts a part: what a kill can cost at most."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    max_reject_ratio: float = 0.05
    """Largest fraction of texts that may be rejected (empty, longer than the model reads) before the shard fails."""
    language_model: LanguageModelConfig = LanguageModelConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.num_shards:
            raise ConfigError(f"--shard is {self.shard}; with --num-shards {self.num_shards} it runs from 0")
        at_least(self, batch_pieces=1, part_texts=1, max_reject_ratio=0)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import of codebook indexes that icefall published."""

    indexes: list[Path]
    """Published manifests (cuts with codebook_indexes, jsonl.gz), several as a,b."""
    cuts: list[Path]
    """Your own cut sets of the same utterances (cuts_*.jsonl.gz), several as a,b."""
    label_dir: Path
    """Folder of the label set."""
    h5_dir: Path | None = None
    """Folder of the .h5 archives; None: where the manifests say, else beside them."""
    frames: Literal["floor", "hubert"] = "floor"
    """Frames stored of n samples at 16 kHz: floor, n // 320, which is what the archives hold; hubert, what HuBERT's
    convolutions give, which keeps the utterances of which an archive holds only so many."""
    num_codebooks: int | None = None
    """Codebooks that the archives must have; None: as many as they have."""
    codebook_size: int = 256
    """Entries of a codebook."""
    num_shards: int = 1
    """Into how many shards the set is divided; one is held in memory at a time."""
    min_coverage: float = 1.0
    """Least fraction of the utterances of cuts that must get labels."""
    teacher: str = "unknown"
    """Name of the teacher, for people."""
    teacher_sha256: str = "unknown"
    """SHA-256 of its weights."""
    layer: int | None = None
    """Layer whose output was quantized; None: unknown."""
    layer_convention: str = "unknown"
    """How the layer is counted, for instance 1-based."""
    normalization: str = "unknown"
    """Normalisation of audio and embeddings."""
    dim: int = 0
    """Channels of the teacher's embeddings; 0: unknown."""
    quantizer_sha256: str = "unknown"
    """SHA-256 of the quantizer's tensors."""

    def __post_init__(self) -> None:
        at_least(self, num_codebooks=1, codebook_size=2, num_shards=1, min_coverage=0, dim=0)
        if self.codebook_size > 256:
            raise ConfigError(f"--codebook-size is {self.codebook_size}; indexes are stored as bytes, so at most 256")
