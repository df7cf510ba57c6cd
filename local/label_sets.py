#!/usr/bin/env python3
"""Look after label sets.

    local/label_sets.py info DIR                      provenance and what it costs on disk
    local/label_sets.py verify DIR...                 read every byte, name what is damaged or missing
    local/label_sets.py merge --into DIR DIR...       shards of one set from several machines
    local/label_sets.py join DIR --cuts FILE...       matched, missing and extra utterances of cut sets
    local/label_sets.py align DIR --cuts FILE... --lang-dir DIR
                                                      how a language model's pieces meet the tokens of cut sets
"""

import argparse
from pathlib import Path

from icefall_kd.errors import DataError, run_main
from icefall_kd.runtime.log import setup_logging


def print_info(path: Path) -> None:
    """Print provenance and storage of a set."""
    from icefall_kd.labels.info import info_json
    from icefall_kd.labels.store import LabelStore

    store = LabelStore(path)
    print(info_json(store.info))
    cost = store.storage_report()
    rows = {"frame": "frames", "token": "tokens", "list": "numbers", "piece": "pieces"}[store.info.row]
    print(f"{cost['utterances']} utterances, {cost['frames']} {rows}, {cost['hours']:.3f} h")
    print(
        f"{cost['value_bytes']} bytes of labels = {cost['bytes_per_hour']:.0f} an hour, plus "
        f"{cost['container_bytes']} of container ({cost['overhead']:.2%})"
    )
    if "ratio_to_float32" in cost:
        kind = store.info.kind
        plain = "posteriors" if kind.endswith("_posteriors") else "states" if kind == "text_states" else "embeddings"
        print(
            f"float32 {plain} of {store.info.plain_floats} would take {cost['ratio_to_float32']:.1f} times as much"
        )


def verify(paths: list[Path]) -> None:
    """Verify sets; a DataError lists every problem of all of them."""
    from icefall_kd.labels.store import LabelStore

    problems = []
    for path in paths:
        store = LabelStore(path, partial=True)
        found = store.verify()
        problems += found
        if not found:
            bytes_per_hour = store.storage_report()["file_bytes_per_hour"]
            print(
                f"{path}: {len(store)} utterances in {store.num_shards} shards, all sound, "
                f"{bytes_per_hour:,.0f} bytes an hour"
            )
    if problems:
        raise DataError(f"{len(problems)} problems:\n" + "\n".join(problems))


def join(path: Path, cuts: list[Path], min_coverage: float, pieces: float | None) -> None:
    """Print how the keys of cut sets meet those of a set, of pieces of at most so many seconds or of utterances."""
    from icefall_kd.data.filters import cut_into_pieces
    from icefall_kd.data.manifests import iterate_cuts
    from icefall_kd.labels.keys import key_of
    from icefall_kd.labels.store import LabelStore

    store = LabelStore(path)
    heard = (cut for file in cuts for cut in iterate_cuts(file))
    keys = (key_of(cut, store.info.key_kind) for cut in (heard if pieces is None else cut_into_pieces(heard, pieces)))
    print(store.join(keys, min_coverage))


def align(path: Path, cuts: list[Path], lang_dir: Path) -> None:
    """Print how the texts of cut sets align with a set of text_states, for tokens and for words."""
    from icefall_kd.data.manifests import iterate_cuts
    from icefall_kd.data.transcripts import transcript
    from icefall_kd.labels.store import LabelStore
    from icefall_kd.labels.text_reading import coverage
    from icefall_kd.text.tokenizer import Tokenizer

    store, tokenizer = LabelStore(path, expect={"kind": "text_states"}), Tokenizer.load(lang_dir)
    texts = [transcript(cut) for file in cuts for cut in iterate_cuts(file)]
    for unit in ("token", "word"):
        print(f"{unit}: {coverage(store, texts, tokenizer, unit)}")


def main() -> None:
    setup_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="provenance and storage")
    info.add_argument("dir", type=Path)
    check = commands.add_parser("verify", help="name what is damaged or missing")
    check.add_argument("dirs", type=Path, nargs="+")
    merge = commands.add_parser("merge", help="bring shards of one set together")
    merge.add_argument("--into", type=Path, required=True, help="new folder")
    merge.add_argument("dirs", type=Path, nargs="+")
    joined = commands.add_parser("join", help="compare with cut sets")
    joined.add_argument("dir", type=Path)
    joined.add_argument("--cuts", type=Path, nargs="+", required=True, help="cut sets")
    joined.add_argument("--min-coverage", type=float, default=1.0, help="least fraction with labels (default: 1.0)")
    joined.add_argument("--pieces", type=float, help="of a set that was extracted with --pieces: that number")
    aligned = commands.add_parser("align", help="a language model's pieces against tokens")
    aligned.add_argument("dir", type=Path)
    aligned.add_argument("--cuts", type=Path, nargs="+", required=True, help="cut sets")
    aligned.add_argument("--lang-dir", type=Path, required=True, help="folder of the tokenizer")
    args = parser.parse_args()
    if args.command == "info":
        print_info(args.dir)
    elif args.command == "verify":
        verify(args.dirs)
    elif args.command == "merge":
        from icefall_kd.labels.merge import merge_label_sets

        store = merge_label_sets(args.dirs, args.into)
        print(f"{args.into}: {len(store)} utterances in {store.num_shards} shards")
    elif args.command == "align":
        align(args.dir, args.cuts, args.lang_dir)
    else:
        join(args.dir, args.cuts, args.min_coverage, args.pieces)


if __name__ == "__main__":
    run_main(main)
