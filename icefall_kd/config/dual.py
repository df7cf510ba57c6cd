"""Options of the dual-mode encoder: one set of weights for whole utterances and, pruned, for streams."""

from dataclasses import dataclass, replace
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError

# No matrix loses more of its blocks: beyond it whole heads and units die (our design).
MAX_SPARSITY = 0.95


# Options in steps that can also be shares of a training.
_STEPS = ("dual_kd_warm_step", "prune_begin_step", "prune_end_step", "mask_interval", "mask_freeze_step")


def is_share(value: float | None) -> bool:
    """Return whether an option in steps is a share of the planned steps."""
    return value is not None and 0 < value < 1


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """The two modes of an encoder (--system dualmode): which are trained, how, and how sparse streams are."""

    modes: Literal["dual", "full", "streaming"] = "dual"
    """Which modes are trained: both, or one alone, as a baseline."""
    sampled_mode: bool = False
    """Each step trains one of the two modes, drawn evenly: half the cost."""
    sandwich: bool = False
    """A third pass a step of a random sparsity up to the present one and of random chunks, of distillation alone."""
    streaming_scale: float = 1.0
    """Weight lambda of the streaming mode's losses; the full mode's is 1."""
    dual_kd_scale: float = 0.0
    """Weight beta of the distillation from the full to the streaming mode; 0: none."""
    dual_kd_warm_step: float = 0
    """Steps over which it grows from 0 to its scale."""
    kd_skip_blank: float = 0.99
    """CTC distillation leaves out frames where the teacher's blank is likelier than this; 1: none."""
    lean: bool = True
    """Forward and backward of the full mode, then of the streaming mode: the memory of one mode, equal gradients."""
    separate_norms: bool = True
    """LayerNorm parameters of their own for each mode."""
    sparsity: float = 0.0
    """Share of the blocks of each encoder matrix that the streaming mode does without; 0: no masks."""
    prune_block: tuple[int, int] = (8, 1)
    """Output rows and input columns of a block, which is pruned as a whole."""
    prune_ranking: Literal["uniform", "global"] = "uniform"
    """uniform: every matrix has that sparsity; global: all of them together, at most 95 % each."""
    prune_score: Literal["l1", "l2"] = "l1"
    """Strength of a block: sum of magnitudes, or root of the sum of squares."""
    prune_begin_step: float = 0
    """Step at which the sparsity begins to grow, by a cubic law; better not before the learning rate's warm-up ends.
    Any option of this group that counts steps can be below 1: a share of the planned ones, epochs by batches of the
    first epoch."""
    prune_end_step: float = 10000
    """Step from which it has its final value; 0: from the beginning, as for the masks of --init-from."""
    mask_interval: float = 500
    """Steps between two refreshes of the masks from the magnitudes of the weights."""
    mask_freeze_step: float | None = None
    """Step after which the masks stay; only checkpoints behind it can be averaged.  None: they never stay."""
    prune_ste: bool = False
    """Straight-through: the streaming mode's gradient reaches masked weights, too."""

    def __post_init__(self) -> None:
        at_least(self, dual_kd_scale=0, dual_kd_warm_step=0, sparsity=0, prune_begin_step=0, kd_skip_blank=0)
        at_least(self, prune_end_step=0, mask_freeze_step=0)
        for name in _STEPS:
            value = getattr(self, name)
            if value is not None and value > 1 and value != int(value):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; give whole steps, or a share below 1")
        if not self.mask_interval > 0:
            raise ConfigError(f"--mask-interval is {self.mask_interval}; it must be above 0")
        if is_share(self.prune_begin_step) == is_share(self.prune_end_step) or self.prune_end_step == 0:
            at_least(self, prune_end_step=self.prune_begin_step)
        if not self.streaming_scale > 0:
            raise ConfigError(f"--streaming-scale is {self.streaming_scale}; it must be above 0 (or --modes full)")
        if not self.sparsity <= MAX_SPARSITY:
            raise ConfigError(f"--sparsity is {self.sparsity}; it can be at most {MAX_SPARSITY}")
        if min(self.prune_block) < 1:
            raise ConfigError(f"--prune-block is {self.prune_block}; a block has at least one row and one column")
        if self.sparsity > 0 and self.modes == "full":
            raise ConfigError(f"--sparsity {self.sparsity} with --modes full: the full mode is dense; leave one out")
        both = {"--sampled-mode": self.sampled_mode, "--sandwich": self.sandwich, "--dual-kd-scale": self.dual_kd_scale}
        for flag, value in both.items():
            if value and self.modes != "dual":
                raise ConfigError(f"{flag} {value} with --modes {self.modes}: it needs both modes; use --modes dual")
        if self.sampled_mode and (self.sandwich or self.dual_kd_scale):
            raise ConfigError("--sampled-mode has no teacher in a step of the streaming mode; leave out --sandwich and "
                              "--dual-kd-scale")  # fmt: skip

    @property
    def in_shares(self) -> bool:
        """Return whether an option in steps is a share of the planned steps."""
        return any(is_share(getattr(self, name)) for name in _STEPS)

    def in_steps(self, planned: int) -> "DualConfig":
        """Return these options with whole steps, where a share is one of ``planned`` steps."""
        shares = {name: getattr(self, name) for name in _STEPS if is_share(getattr(self, name))}
        return replace(self, **{name: max(1, round(share * planned)) for name, share in shares.items()})
