"""From a name to a teacher: which family a folder holds, and a plain dict from family to loader."""

from collections.abc import Callable
from pathlib import Path

from icefall_kd.config import TeacherConfig
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.env import pick_device
from icefall_kd.runtime.files import read_json
from icefall_kd.teachers import ctranslate2
from icefall_kd.teachers.base import Teacher
from icefall_kd.teachers.locate import Located, locate
from icefall_kd.teachers.pretrained import Precision


def _whisper(found: Located, cfg: TeacherConfig, precision: Precision) -> Teacher:
    from icefall_kd.teachers.whisper import WhisperTeacher

    return WhisperTeacher.load(found.folder, **_options(found, cfg, precision))


LOADERS: dict[str, Callable[[Located, TeacherConfig, Precision], Teacher]] = {
    "whisper": _whisper,
}


def _options(found: Located, cfg: TeacherConfig, precision: Precision) -> dict:
    return {
        "layer": cfg.layer,
        "normalize_embeddings": cfg.normalize_embeddings,
        "precision": precision,
        "identity": found.identity,
    }


def family_of(folder: Path) -> str:
    """Return the family of a model folder.

    Raises:
        ConfigError: If it is none of the known ones.
    """
    if ctranslate2.is_whisper_folder(folder):
        return "whisper"
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type in LOADERS:
        return model_type
    raise ConfigError(f"{folder} holds model_type {model_type!r}; teachers are {', '.join(sorted(LOADERS))}")


def build(cfg: TeacherConfig) -> Teacher:
    """Build the teacher that ``cfg`` names; see :func:`icefall_kd.teachers.build_teacher`."""
    precision = Precision.choose(pick_device(cfg.teacher_device), cfg.teacher_dtype)
    found = locate(cfg.teacher)
    return LOADERS[family_of(found.folder)](found, cfg, precision)
