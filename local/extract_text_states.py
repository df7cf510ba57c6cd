#!/usr/bin/env python3
"""Extract one shard of a language model's states of transcripts; a finished shard is skipped, a killed one goes on.

    local/extract_text_states.py --cuts data/fbank/cuts_train.jsonl.gz --label-dir data/labels/minilm --plm minilm \\
        --shard 0 --num-shards 4
"""

from icefall_kd.cli import parse_config
from icefall_kd.config import ExtractTextConfig
from icefall_kd.errors import run_main
from icefall_kd.runtime.log import format_seconds, setup_logging


def main() -> None:
    setup_logging()
    config = parse_config(ExtractTextConfig, description=__doc__)
    # Imported late, so that --help and usage errors answer at once.
    import torch

    from icefall_kd.labels.extract_text import extract_text_states

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    report = extract_text_states(config)
    state = "was finished" if report.skipped else f"took {format_seconds(report.seconds)}"
    storage = f", {report.file_bytes / report.hours:,.0f} bytes an hour" if report.hours else ""
    rejected = f"{report.rejected} rejected"
    print(f"{report.path}: {report.utterances} texts of {report.hours:.3f} h{storage}, {rejected}, {state}")


if __name__ == "__main__":
    run_main(main)
