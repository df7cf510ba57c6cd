"""A copy of a recipe with a stand-in for Python, which only notes what was started and writes its outputs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Notes the command, and writes what the real one would; the stage engine keeps its own Python.
STAND_IN = r"""#!/bin/bash
case "$*" in *stage_marker.py* | *submit.py*) exec REAL "$@" ;; esac
echo "${1##*/}" >> "$LOG"
declare -A o
words=("$@")
for ((i = 1; i < ${#words[@]}; i++)); do [[ ${words[i]} != --* ]] || o[${words[i]}]=${words[i + 1]:-}; done
data=${o[--data-dir]:-}
write() { mkdir -p "$(dirname "$1")" && echo "$2" > "$1"; }
case $1 in
  *check_corpus.py | *check_teacher.py) write "${o[--out]}" x ;;
  *train_quantizer.py) echo "$* " >> "$LOG.quantizers"; write "${o[--out]}" x ;;
  *compute_cmvn.py | *similarity.py) write "${o[--out]}" x ;;
  *train_kmeans.py) echo "$* " >> "$LOG.words"; write "${o[--out]}" x ;;
  *teacher_layers.py)
    echo "$* " >> "$LOG.layers"
    if [[ -n ${o[--frontend-steps]:-} ]]; then write "${o[--out]}" 0,2; else write "${o[--out]}" 2,4; fi
    ;;
  *select_hours.py)
    IFS=, read -r -a amounts <<< "${o[--hours]}"
    for amount in "${amounts[@]}"; do write "${o[--out-dir]}/cuts_${o[--part]}_$amount.jsonl.gz" x; done
    ;;
  *make_manifests.py)
    write "$data/corpus.json" x
    for part in train dev; do write "$data/manifests/cuts_$part.jsonl.gz" x; done
    ;;
  *compute_features.py) write "$data/fbank/feature_extractor.json" x; cp "$data"/manifests/* "$data/fbank" ;;
  *make_tokens.py)
    kind=${o[--token-kind]}
    [[ $kind != bpe ]] || kind=bpe_${o[--vocab-size]}
    write "$data/lang_$kind/tokenizer.json" "$kind"
    write "$data/lang_$kind/tokens.txt" "$kind"
    ;;
  *validate_data.py) write "$data/validated_$(basename "${o[--lang-dir]}").json" x ;;
  *extract_labels.py | *extract_text_states.py)
    IFS=, read -r -a sets <<< "${o[--label-dir]}"
    for set in "${sets[@]}"; do
      write "$set/label_set.json" x
      write "$(printf '%s/shard-%05d-of-%05d.safetensors' "$set" "${o[--shard]}" "${o[--num-shards]}")" x
    done
    echo "$* " >> "$LOG.words"
    ;;
  *label_sets.py) echo "$* " >> "$LOG.sets" ;;
  *report.py) write "${o[--exp-dir]}/report.html" x ;;
  *results.py) echo "$* " >> "$LOG.tables" ;;
  *train.py) echo "$* " >> "$LOG.words"; write "${o[--exp-dir]}/train_summary.json" x ;;
  *decode.py)
    echo "$* " >> "$LOG.decodings"
    IFS=, read -r -a parts <<< "${o[--test-parts]}"
    for part in "${parts[@]}"; do
      [[ ",${FORGETS:-}," == *",$part,"* ]] ||
        write "${o[--exp-dir]}/${o[--decoding-method]}/results-$part-$(cksum <<< "$*" | cut -d" " -f1).json" "$*"
    done
    ;;
esac
"""
# What prepare.sh starts.
FEATURES = ["compute_features.py"]
PREPARED = ["check_corpus.py", "make_manifests.py", *FEATURES, "make_tokens.py", "validate_data.py"]


class RecipeCopy:
    """A copy of a recipe over a corpus that nobody reads."""

    def __init__(self, root: Path, script: str, *options: str) -> None:
        self.script, self.options = script, options
        self.folder = root / "egs/librispeech"
        for name in ("egs", "local", "icefall_kd"):
            ignored = shutil.ignore_patterns("__pycache__", *(["data", "exp", "download"] if name == "egs" else []))
            shutil.copytree(REPO / name, root / name, ignore=ignored)
        stand_in = root / "bin/python3"
        stand_in.parent.mkdir()
        stand_in.write_text(STAND_IN.replace("REAL", sys.executable))
        stand_in.chmod(0o755)
        (self.folder / "decode.py").write_text('#!/bin/bash\nexec python3 decode.py "$@"\n')
        (root / "corpus").mkdir()
        (root / "teacher").mkdir()
        (root / "teacher/model").write_text("one")
        self.root, self.log = root, root / "log"
        path = f"{stand_in.parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "LOG": str(self.log), "VIRTUAL_ENV": "other"}
        self.env.pop("PYTHON", None)

    def run(self, *options: str, code: int = 0) -> tuple[list[str], str]:
        """Return the names of what was started, and the log."""
        self.log.write_text("")
        line = ["bash", str(self.folder / self.script), "--corpus", "trans", "--corpus-dir", str(self.root / "corpus")]
        line += [*self.options, *options]
        done = subprocess.run(line, cwd=self.root, env=self.env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return self.log.read_text().split(), done.stderr
