"""Teachers of users' own: a class in a Python file, ``--teacher my_teacher.py:MyTeacher`` (docs/own_teacher.md)."""

import importlib.util
import re
import sys
from pathlib import Path

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.files import sha256_file
from icefall_kd.teachers.base import Teacher, TeacherOutput, tap

REQUIRED = ("weights_sha256", "layer", "layer_convention")


def is_own(name: str) -> bool:
    """Tell whether a teacher is named as FILE.py:CLASS."""
    return re.search(r"\.py(:|$)", name) is not None


class OwnTeacher:
    """A user's teacher, whose provenance holds the SHA-256 of its code."""

    def __init__(self, teacher: Teacher, name: str, code_sha256: str) -> None:
        """Wrap ``teacher``, which the file of that hash defines.

        Raises:
            ConfigError: it lacks something of the protocol, or its provenance does.
        """
        self.teacher, self.name, self.code_sha256 = teacher, name, code_sha256
        members = (*Teacher.__annotations__, "num_frames", "extract", "provenance")
        lacks = [member for member in members if not hasattr(teacher, member)]
        if lacks:
            raise ConfigError(f"--teacher {name} lacks {', '.join(lacks)}; see teachers/base.py: Teacher")
        self.sampling_rate, self.dim = teacher.sampling_rate, teacher.dim
        self.frame_formula, self.max_samples = teacher.frame_formula, teacher.max_samples
        if lacks := [field for field in REQUIRED if field not in teacher.provenance()]:
            raise ConfigError(f"--teacher {name}: its provenance() lacks {', '.join(lacks)}; labels are known by them")

    def num_frames(self, num_samples: int) -> int:
        """Return the exact number of frames of an utterance."""
        return self.teacher.num_frames(num_samples)

    def extract(self, batch: Batch) -> TeacherOutput:
        """Return what the user's teacher returns."""
        return self.teacher.extract(batch)

    def tap(self, layers: list[int]) -> list[str]:
        """Make one pass give several layers, where the user's teacher can."""
        return tap(self.teacher, layers)

    def provenance(self) -> dict:
        """Return the user's provenance, what it leaves out, and the hash of the code."""
        defaults = {
            "family": "own",
            "teacher": self.name,
            "source": "file",
            "normalization": "none",
            "device": "cpu",
            "dtype": "float32",
        }
        return {
            **defaults,
            "frame_formula": self.frame_formula.to_dict(),
            **self.teacher.provenance(),
            "code_sha256": self.code_sha256,
        }


def load(cfg: TeacherConfig) -> OwnTeacher:
    """Import the file that ``cfg.teacher`` names and build its class from ``cfg``.

    Raises:
        ConfigError: there is no such file or class, or it is no teacher.
    """
    file, _, class_name = cfg.teacher.partition(".py:")
    path = Path(f"{file}.py").expanduser()
    if not class_name or not path.is_file():
        what = f"{path.absolute()} does not exist" if class_name else "no class is named"
        raise ConfigError(f"--teacher {cfg.teacher}: {what}; write FILE.py:CLASS, as in my_teacher.py:MyTeacher")
    # A name of its own: a file called whisper.py or jiwer.py may import the package of that name.
    spec = importlib.util.spec_from_file_location(f"own_teacher_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does: dataclasses look for their module there
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # for files beside it that it imports; last, so that they hide nothing
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise ConfigError(f"--teacher {cfg.teacher}: {path} defines no {class_name}")
    return OwnTeacher(getattr(module, class_name)(cfg), cfg.teacher, sha256_file(path))
