#!/usr/bin/env python3
"""Tell whose layers a student of HuBERT compares with: what local/extract_labels.py must store for it.

All other options are those of train.py, for a training with --teacher-labels online.  Layer 0 is the input of the
teacher's first layer, which --frontend-steps learns; clusters (--disc-scale) are of the last one.

    local/teacher_layers.py --out exp/labels/layers.txt --system hubert --objective distil --teacher exp/hubert
"""

from dataclasses import dataclass
from pathlib import Path

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.frames import SSL_CONV
from icefall_kd.runtime.files import write_text
from icefall_kd.runtime.log import setup_logging


@dataclass(frozen=True, kw_only=True)
class LayersOfConfig(TrainConfig):
    """The options of a training, and where the list of layers goes."""

    out: Path
    """File of the list, as 0,4,12."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.system, self.objective, self.kd.teacher_labels) != ("hubert", "distil", "online"):
            raise ConfigError("the options are of --system hubert --objective distil with --teacher-labels online")


def main() -> None:
    setup_logging()
    config = parse_config(LayersOfConfig, description=__doc__)
    # Imported late, so that --help and usage errors answer at once.
    from icefall_kd.systems import build_system

    target = build_system(config, 0).target
    layers = ",".join(map(str, target.wanted))
    write_text(config.out, f"{layers}\n")
    frames = 3600 * 16000 / SSL_CONV.hop  # of an hour
    cost = frames * 2 * target.source.dim * len(target.wanted)
    print(f"{config.out}: layers {layers} of {target.source.dim} channels, {cost:,.0f} bytes an hour in float16")


if __name__ == "__main__":
    run_main(main)
