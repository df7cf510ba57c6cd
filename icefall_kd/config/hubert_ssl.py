"""Options of HuBERT's pre-training: --system hubert --objective ssl."""

from dataclasses import dataclass

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HubertSslConfig:
    """Masked prediction of clusters, HuBERT; --label-dir names their label set (kind clusters).

    Mask, front end, penalty and pieces are those of SslConfig; HuBERT's mask is --mask-prob 0.8 --mask-span 10.
    """

    cluster_dim: int = 256
    """Channels in which frames are compared with clusters."""
    cluster_temperature: float = 0.1
    """Temperature of their cosines."""
    unmasked_scale: float = 0.0
    """Weight of the loss of a frame that is not masked."""

    def __post_init__(self) -> None:
        at_least(self, cluster_dim=1, unmasked_scale=0)
        if not self.cluster_temperature > 0:
            raise ConfigError(f"--cluster-temperature is {self.cluster_temperature}; it must be above 0")
