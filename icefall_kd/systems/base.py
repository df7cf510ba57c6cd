"""What every distillation system offers to the training loop and to the decoder."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from icefall_kd.config import DecodeConfig, ModelConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import encoder_seconds
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.models.streaming import choose_chunks


@dataclass(frozen=True)
class LossTerm:
    """One named loss of a batch."""

    value: Tensor
    """Scalar float32: the SUM over all utterances, frames or tokens of the batch (differentiable)."""
    scale: float
    """Weight of this sum in the total; 0 means logged only."""
    count: float
    """What the log divides the sum by: frames or tokens."""
    unit: str = "frame"
    """Name of what ``count`` counts: "frame" or "token"."""
    per_utterance: Tensor | None = None
    """(N,) detached values, so that a non-finite loss can name its utterances."""


@dataclass(frozen=True)
class LossTerms:
    """All losses of a batch."""

    terms: dict[str, LossTerm]
    frames: int
    """What the log's totals and the gradients of AdamW are divided by: encoder frames of the batch, or what ``unit``
    says."""
    metrics: dict[str, tuple] | None = None
    """Logged beside the losses: name -> (sum, count) or (sum, count, bound), for instance codebook accuracy."""
    unit: str = "frame"
    """Name of what ``frames`` counts: "frame" or "token"."""

    @property
    def total(self) -> Tensor:
        """Return the weighted sum of the active terms, a scalar."""
        active = [t.scale * t.value for t in self.terms.values() if t.scale != 0]
        return torch.stack(active).sum()


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """A label set that a system wants in every training batch."""

    name: str
    """Name in ``Batch.labels``."""
    kind: str
    """LabelSetInfo.kind: "codebook_indexes", "embeddings", "nbest", "text_states", ..."""
    path: str | None
    """Folder of the stored set; None when the labels are made online by a teacher."""
    expect: dict = field(default_factory=dict)
    """Properties that the stored set must have (labels/info.py), for instance {"quantizer_sha256": ...}."""


# Names of parameters that training alone needs begin so.
TRAINING_ONLY = ("heads.", "model.mask_embedding")


class System(nn.Module):
    """A model together with its losses.

    Subclasses build only the modules that their active losses use, so that no parameter stays
    without a gradient.  ``forward`` is ``losses``, so that DistributedDataParallel can wrap the system.
    """

    decoded_as: Mapping[str, object] = MappingProxyType({})
    """What stands in the results besides, of :meth:`set_up_decoding`."""
    norm_mode = "full"
    """Whose norms a model of one mode takes of a training of both (--init-from): "full" or "streaming"."""

    @property
    def label_specs(self) -> list[LabelSpec]:
        """Return the label sets that training batches must hold."""
        return []

    @property
    def needs_audio(self) -> bool:
        """Return whether training batches must hold audio, for a teacher that runs in training."""
        return False

    @property
    def hears_samples(self) -> bool:
        """Return whether the model itself hears samples, so that all batches must hold audio."""
        return False

    @property
    def learns_labels(self) -> bool:
        """Return whether stored labels are all that it learns: then batches of validation hold them, too."""
        return False

    @property
    def online_sources(self) -> dict[str, str]:
        """Return hashes of what makes labels in training, by name: a resumed training must find the same."""
        return {}

    @property
    def alignment_losses(self) -> dict[str, object]:
        """Return what asks for enough frames an utterance, as keywords of data.filters.why_not."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: int) -> LossTerms:
        """Return all loss terms of ``batch`` at global step ``step`` (0-based, for warm-ups).

        A system with several passes also takes ``part``, of which the sum over all parts is what it returns without.
        """
        raise NotImplementedError

    def passes(self, batch: Batch, step: int) -> int:
        """Return how many times forward and backward are run for ``batch``, each with ``losses(batch, step, part)``.

        Ranks must agree.  The frames of the batch count in one part alone, and the last part gives every parameter a
        gradient, if only 0: it is then that ranks exchange what all parts added up.
        """
        return 1

    @property
    def needs_plan(self) -> bool:
        """Return whether schedules are shares of the planned steps, which :meth:`plan` tells before the first."""
        return False

    def plan(self, steps: int) -> None:
        """Learn how many steps the training will have."""

    def frozen(self, step: int) -> Iterable[nn.Parameter]:
        """Return the parameters that do not change at ``step`` (0-based), although a gradient of 0 comes to them.

        AdamW then has no moments of theirs and does not let them decay.
        """
        return ()

    def heaviest_step(self, step: int) -> int:
        """Return a step from ``step`` on that needs as much memory as any: what is tried before the first one."""
        return step

    def start(self) -> tuple[dict, object] | None:
        """Take parameters from elsewhere before the first step of a new training, where the options ask for it.

        Returns:
            The record and the report of train/transfer.py: initialise; None: nothing was taken.
        """
        return None

    def after_step(self, step: int) -> dict[str, float]:
        """Do what comes between steps; return figures for the log, if there are new ones.

        Args:
            step: steps done; 0: before the first of a new training (a resumed one had that call).
        """
        return {}

    def forward(self, batch: Batch, step: int, part: int | None = None) -> LossTerms:
        """Call :meth:`losses`."""
        return self.losses(batch, step) if part is None else self.losses(batch, step, part)

    def frame_seconds(self, frame: int) -> float:
        """Return where a frame (0-based) of the encoder output begins, in seconds."""
        return encoder_seconds(frame)

    def set_up_decoding(self, config: DecodeConfig, model: ModelConfig) -> None:
        """Give the encoder the chunks that the options of decoding name, as far as its own (``model``) allow.

        Raises:
            ConfigError: the model cannot be run with these chunks, or has no modes.
        """
        if (config.encoder_mode, config.sparse) != ("auto", "auto"):
            raise ConfigError("--encoder-mode and --sparse choose a mode of --system dualmode; leave them out")
        chosen = config.decode_chunk_size, config.left_context_frames
        self.model.encoder.chunks = choose_chunks(model, *chosen, config.chunk_by_chunk)

    def decoders(self) -> dict[str, "object"]:
        """Return the decoders of this system by method name (decode/base.py: Decoder)."""
        raise NotImplementedError

    def inference_state_dict(self) -> dict[str, Tensor]:
        """Return the parameters needed at inference, distillation heads left out."""
        return self.state_dict()


def parts(system: System, batch: Batch, step: int) -> list[int | None]:
    """Return the parts of a batch's losses to be run one after the other; [None]: all at once."""
    count = system.passes(batch, step)
    return [None] if count == 1 else list(range(count))


def by_row(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """Return the sums (n,) of values (M,) of the same row, by the rows' numbers (M,)."""
    return values.new_zeros(n).index_add_(0, rows, values)


def stored_labels(folders: Sequence, wanted: dict[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the path and the teacher's channels of the one label set of each kind.

    Args:
        folders: those of --label-dir.
        wanted: options that need a kind, for the message, by the kind.
    Raises:
        ConfigError: a kind has no label set, or several.
    """
    infos = [(str(path), LabelSetInfo.load(path)) for path in folders]
    paths, dims = {}, {}
    for kind, options in wanted.items():
        found = [(path, info) for path, info in infos if info.kind == kind]
        if len(found) != 1:
            there = ", ".join(f"{path} ({info.kind})" for path, info in infos) or "none"
            raise ConfigError(
                f"{options}: one label set of kind {kind} is needed, --label-dir names {len(found)} (of all: {there})"
            )
        paths[kind], dims[kind] = found[0][0], found[0][1].dim
    return paths, dims
