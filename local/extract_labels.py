#!/usr/bin/env python3
"""Extract one shard of teacher labels; a finished shard is skipped, a killed one goes on where it was.

Several layers (--layer 6,12) make a label set each (--label-dir a,b --quantizer qa,qb), in one pass of the teacher;
so do several kinds of labels of a recogniser (--kind ctc_posteriors,token_posteriors,nbest --label-dir a,b,c).

    local/extract_labels.py --cuts data/fbank/cuts_train.jsonl.gz --label-dir data/labels/whisper \\
        --teacher whisper-tiny.en --quantizer exp/quantizer/quantizer.safetensors --shard 0 --num-shards 4
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import ExtractLayersConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import format_seconds, setup_logging


def main() -> None:
    setup_logging()
    config = parse_config(ExtractLayersConfig, description=__doc__)
    # Imported late, so that --help and usage errors answer at once.
    import torch

    from icefall_kd.labels.extract import extract_layers

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    for report in extract_layers(config.each()):
        state = "was finished" if report.skipped else f"took {format_seconds(report.seconds)}"
        storage = f", {report.file_bytes / report.hours:,.0f} bytes an hour" if report.hours else ""
        print(
            f"{report.path}: {report.utterances} utterances, {report.hours:.3f} h{storage}, "
            f"{report.rejected} rejected, {state}"
        )


if __name__ == "__main__":
    run_main(main)
