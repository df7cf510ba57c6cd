"""Teachers: pre-trained models whose embeddings students learn to predict.

``build_teacher(config)`` is the one entry; :mod:`icefall_kd.teachers.base` states what a teacher owes.
"""

from icefall_kd.config import TeacherConfig
from icefall_kd.teachers.base import Teacher


def build_teacher(cfg: TeacherConfig) -> Teacher:
    """Build the teacher that ``cfg`` names.

    Raises:
        ConfigError: If it cannot be found, or is of no known family.
        DataError: If its files are damaged.
    """
    from icefall_kd.teachers.families import build

    return build(cfg)
