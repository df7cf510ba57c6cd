"""Every option of the project, as frozen dataclasses; one thin command line over them.

A command's configuration is a dataclass whose fields are groups (the dataclasses of these modules); on the
command line and in YAML all fields are flat, since a field name occurs once among the groups of a command.
Precedence: defaults < ``--config conf/x.yaml`` < flags.
"""

from icefall_kd.config.cif import CifConfig, TextKdConfig
from icefall_kd.config.data import AugmentConfig, DataConfig, SharConfig
from icefall_kd.config.decoding import DecodeConfig, DecodingMethod, ExportConfig
from icefall_kd.config.dual import DualConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.hubert_asr import HubertAsrConfig
from icefall_kd.config.hubert_kd import HubertKdConfig
from icefall_kd.config.hubert_ssl import HubertSslConfig
from icefall_kd.config.labels import (
    ExtractConfig,
    ExtractLayersConfig,
    ExtractTextConfig,
    ImportConfig,
    KmeansConfig,
    LanguageModelConfig,
    LayersConfig,
    QuantizerConfig,
    TeacherConfig,
)
from icefall_kd.config.model import ENCODER_SIZES, ModelConfig
from icefall_kd.config.nar import AttentionDecoderConfig, RecogniserKdConfig, TransferConfig
from icefall_kd.config.report import ReportConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.config.training import AsrLossConfig, Kd, KdConfig, LoopConfig, OptimConfig, TrainConfig

__all__ = [
    "ENCODER_SIZES",
    "AsrLossConfig",
    "AttentionDecoderConfig",
    "AugmentConfig",
    "CifConfig",
    "DataConfig",
    "DecodeConfig",
    "DecodingMethod",
    "DualConfig",
    "ExportConfig",
    "ExtractConfig",
    "ExtractLayersConfig",
    "ExtractTextConfig",
    "HubertAsrConfig",
    "HubertConfig",
    "HubertKdConfig",
    "HubertSslConfig",
    "ImportConfig",
    "Kd",
    "KdConfig",
    "KmeansConfig",
    "LanguageModelConfig",
    "LayersConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantizerConfig",
    "RecogniserKdConfig",
    "ReportConfig",
    "SharConfig",
    "SslConfig",
    "TeacherConfig",
    "TextKdConfig",
    "TrainConfig",
    "TransferConfig",
]
