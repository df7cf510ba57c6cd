"""From a name to a teacher: which family a folder holds, and a plain dict from family to loader."""

from collections.abc import Callable
from pathlib import Path

from icefall_kd.config import TeacherConfig
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.env import pick_device
from icefall_kd.runtime.files import read_record
from icefall_kd.teachers import ctranslate2, mfcc, own
from icefall_kd.teachers.base import Teacher
from icefall_kd.teachers.locate import Located, locate
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.state_dicts import SUFFIXES
from icefall_kd.teachers.windows import WindowedTeacher


def _whisper(found: Located, cfg: TeacherConfig, precision: Precision) -> Teacher:
    from icefall_kd.teachers.whisper import WhisperTeacher

    return WhisperTeacher.load(found.folder, **_options(found, cfg, precision))


def _speech_ssl(found: Located, cfg: TeacherConfig, precision: Precision) -> Teacher:
    from icefall_kd.teachers.speech_ssl import SpeechSslTeacher

    return SpeechSslTeacher.load(found.folder, **_options(found, cfg, precision))


def _state_dict(found: Located, cfg: TeacherConfig, precision: Precision) -> Teacher:
    from icefall_kd.teachers.speech_ssl import SpeechSslTeacher

    return SpeechSslTeacher.from_state_dict(found.folder, **_options(found, cfg, precision))


LOADERS: dict[str, Callable[[Located, TeacherConfig, Precision], Teacher]] = {
    "whisper": _whisper,
    "hubert": _speech_ssl,
    "wavlm": _speech_ssl,
    "wav2vec2": _speech_ssl,
    "data2vec-audio": _speech_ssl,
    "state_dict": _state_dict,
}


def _options(found: Located, cfg: TeacherConfig, precision: Precision) -> dict:
    return {
        "layer": cfg.layer,
        "normalize_embeddings": cfg.normalize_embeddings,
        "precision": precision,
        "identity": found.identity,
    }


def family_of(folder: Path) -> str:
    """Return the family of a model folder; "state_dict" for a file of tensors.

    Raises:
        ConfigError: If it is none of the known ones.
    """
    if folder.is_file():
        if folder.suffix in SUFFIXES:
            return "state_dict"
        raise ConfigError(f"{folder} is no folder; files of tensors end in {', '.join(SUFFIXES)}")
    if ctranslate2.is_whisper_folder(folder):
        return "whisper"
    config = read_record(folder / "config.json")
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in LOADERS:
        return model_type
    raise ConfigError(f"{folder} holds model_type {model_type!r}; teachers are {', '.join(sorted(LOADERS))}")


def is_exp_dir(folder: Path) -> bool:
    """Tell whether a folder is a training of ours: it holds checkpoints by epoch or by step."""
    return folder.is_dir() and (any(folder.glob("epoch-*.pt")) or any(folder.glob("checkpoint-*.pt")))


def build(cfg: TeacherConfig) -> Teacher:
    """Build the teacher that ``cfg`` names; see :func:`icefall_kd.teachers.build_teacher`."""
    precision = Precision.choose(pick_device(cfg.teacher_device), cfg.teacher_dtype)
    if is_exp_dir(Path(cfg.teacher)):
        from icefall_kd.teachers.experiment import ExperimentTeacher

        return ExperimentTeacher.load(
            Path(cfg.teacher), layer=cfg.layer, normalize_embeddings=cfg.normalize_embeddings, precision=precision
        )
    if cfg.teacher == mfcc.NAME:
        return mfcc.MfccTeacher.build(cfg)
    if own.is_own(cfg.teacher):
        teacher: Teacher = own.load(cfg)
    else:
        found = locate(cfg.teacher)
        teacher = LOADERS[family_of(found.folder)](found, cfg, precision)
    if teacher.max_samples is not None and cfg.long_utterances == "window":
        return WindowedTeacher(teacher)
    return teacher
