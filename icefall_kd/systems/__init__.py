"""The distillation systems, by name."""

from icefall_kd.config import TrainConfig
from icefall_kd.config.checks import refuse_options
from icefall_kd.errors import ConfigError
from icefall_kd.systems.base import System
from icefall_kd.systems.dualmode import build_dualmode
from icefall_kd.systems.hkd import build_hkd
from icefall_kd.systems.hubert import build_hubert
from icefall_kd.systems.mvq import build_mvq
from icefall_kd.systems.nar import build_nar

SYSTEMS = {
    "mvq": build_mvq,
    "nar": build_nar,
    "hkd": build_hkd,
    "dualmode": build_dualmode,
    "hubert": build_hubert,
}


def build_system(config: TrainConfig, vocab_size: int, inference: bool = False) -> System:
    """Build the system that ``config.system`` names.

    Args:
        config: all options of the training.
        vocab_size: tokens of the tokenizer.
        inference: leave out everything that only training needs (distillation heads, teachers).
    Raises:
        ConfigError: options of other systems.
    """
    if not inference and config.system != "hubert":
        if config.model.encoder == "conformer":
            refuse_options(config.hubert, "hubert (or mvq with --encoder hubert)")
        elif config.system != "mvq":
            raise ConfigError(f"--encoder hubert with --system {config.system}: it is offered to mvq and hubert alone")
        refuse_options(config.hubert_asr, "hubert")
        refuse_options(config.hubert_kd, "hubert --objective distil")
        refuse_options(config.hubert_ssl, "hubert --objective ssl")
    return SYSTEMS[config.system](config, vocab_size, inference)
