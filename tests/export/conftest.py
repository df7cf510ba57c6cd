"""exp_dirs of untrained students, made once."""

from pathlib import Path

import pytest
from students import SIZES, STUDENTS, tokenizer_of, write_student

from icefall_kd.config import AsrLossConfig, LoopConfig, ModelConfig, TrainConfig


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """Return a function from a name of STUDENTS to its exp_dir."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, options = STUDENTS[name]
            exp_dir = tmp_path_factory.mktemp(name)
            config = TrainConfig(model=ModelConfig(**SIZES, **options), loop=LoopConfig(exp_dir=exp_dir))
            made[name] = write_student(exp_dir, tokenizer_of(kind), config)
        return made[name]

    return make


@pytest.fixture(scope="session")
def ctc_student(tmp_path_factory) -> Path:
    exp_dir = tmp_path_factory.mktemp("ctc")
    asr = AsrLossConfig(transducer_scale=0.0)
    config = TrainConfig(model=ModelConfig(**SIZES), asr=asr, loop=LoopConfig(exp_dir=exp_dir))
    return write_student(exp_dir, tokenizer_of("char"), config)
