"""Every command that the documentation shows is run, with options that shorten it, in a copy of the repository."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from micro_corpus import read_cuts, write_aishell, write_labels, write_librispeech, write_part, write_trans
from own_teacher import write_own_teacher

from icefall_kd.data.corpora import TABLE

REPO = Path(__file__).resolve().parent.parent.parent
PAGES = ["README.md", "egs/librispeech/README.md", "egs/aishell/README.md", *sorted(
    str(p.relative_to(REPO)) for p in (REPO / "docs").glob("*.md")
)]  # fmt: skip
# Commands of ours: scripts of a recipe, and the tools in local/.
OURS = re.compile(r"^(\./(run_\w+|prepare)\.sh|\./(train|decode)\.py|(\.\./\.\./)?(local|benchmarks)/\w+\.py)\b")
SYSTEMS = ("mvq", "nar", "hkd", "dualmode", "hubert")
DEMO, NAR_DEMO, HKD_DEMO, DUAL_DEMO, HUBERT_DEMO = (f"./run_{system}.sh --corpus demo" for system in SYSTEMS)
# Steps that the second run of a demo finds done, prepare.sh's five among them.
SKIPPED = {DEMO: 12, NAR_DEMO: 10, HKD_DEMO: 13, DUAL_DEMO: 11, HUBERT_DEMO: 15}
TINY = "--encoder-dim 16 --feedforward-dim 16 --num-heads 2"


def inline_code(page: str) -> list[str]:
    text = (REPO / page).read_text(encoding="utf-8")
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def documented_commands() -> list[tuple[str, str]]:
    """Return (page, command) of all fenced lines and inline code that begin with one of our scripts."""
    found = []
    for page in PAGES:
        text = (REPO / page).read_text(encoding="utf-8")
        fenced = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *inline_code(page)]:
            command = line.split("  #")[0].strip()
            if OURS.match(command) and " " in command:
                found.append((page, command))
    return found


class Checkout:
    """A copy of what the commands need, with corpora of noise where the documentation has big ones."""

    def __init__(self, root: Path, env: dict[str, str], demo_corpus) -> None:
        self.root, self.demo_corpus = root, demo_corpus
        for name in ("egs", "local", "icefall_kd"):
            ignored = shutil.ignore_patterns("__pycache__", "data", "exp", "download")
            if name == "icefall_kd":
                ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / name, root / name, ignore=ignored)
        # Where --corpus-dir is not given, the corpus lies where a download would be.
        write_librispeech(root / "egs/librispeech/download/librispeech", TABLE["librispeech"])
        write_aishell(root / "egs/aishell/download/aishell")
        write_part(root / "data", "train", [0.7, 0.9, 1.1])
        self.places = {
            "/corpora/LibriSpeech": write_librispeech(
                root / "corpora", ["train-clean-100", "dev-clean", "test-clean"]
            ) / "LibriSpeech",
            "/my/recordings": write_trans(root / "my recordings"),
            "/corpora/aishell": write_aishell(root / "corpora/aishell"),
            "NAME...": "whisper-base",
            "speech.wav": next((root / "data/audio").glob("*.wav")),
            "my_teacher.py:MyTeacher": write_own_teacher(root),
            "data/labels/hubert": write_labels(root / "labels of hubert", read_cuts(root / "data")),
            **_published_indexes(root / "published"),
        }  # fmt: skip
        self.env = {**env, "ICEFALL_KD_MODELS": str(root / "models"), "CUDA_VISIBLE_DEVICES": ""}
        for name in ("whisper-tiny.en", "whisper-base"):
            _write_teacher(root / "models" / name)

    def run(self, page: str, command: str) -> str:
        """Run a command of a page as it stands there, options that shorten it behind; return its output."""
        words = shlex.split(command)
        folder = self.root / Path(page).parent if page.startswith("egs/") else self.root / "egs/librispeech"
        if "aishell" in words:
            folder = self.root / "egs/aishell"
        if words[0].startswith(("local/", "benchmarks/")):
            folder = self.root
        for i, word in enumerate(words):
            words[i] = str(self.places.get(word, word))
        words += self.shorter(words, "zh" if folder.name == "aishell" else "en")
        assert (folder / words[0]).is_file(), f"{page} shows {words[0]}, which is not there"
        launch = [sys.executable] if words[0].endswith(".py") else ["bash"]
        run = subprocess.run([*launch, *words], cwd=folder, env=self.env, capture_output=True, text=True, timeout=280)
        assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        return run.stdout + run.stderr

    def shorter(self, words: list[str], language: str) -> list[str]:
        """Return the options that shorten a command."""
        name = Path(words[0]).name
        if "--help" in words:
            return []
        if name == "prepare.sh":
            return ["--partial", "true", "--stop-stage", "1"]
        if name == "decode.py":
            return ["--avg", "1", "--device", "cpu"]
        if name == "export.py" and "--mode" in words:  # as below, of masks
            return ["--avg", "1", "--use-averaged-model", "false"]
        if name == "train_lm.py":
            return ["--num-epochs", "1", "--device", "cpu"]
        if name == "export_shar.py":
            return ["--num-shards", "1"]
        if name == "check_teacher.py":
            return ["--check-utts", "2"]
        if name not in [f"run_{system}.sh" for system in SYSTEMS]:
            return []
        if "demo" not in words or language == "zh":  # the corpus and the options decide; the rest is as in the demo
            corpus = ["--corpus-dir", str(self.demo_corpus("zh"))] if "demo" in words else ["--partial", "true"]
            return [*corpus, "--stop-stage", "0", "--prepare-args", "--stop-stage 1 --speed-perturb false"]
        epochs = "--num-epochs 2 --num-workers 0 --average-period 1"
        every = ["--corpus-dir", str(self.demo_corpus("en")), "--nj", "1"]
        every += ["--decode-args", "--avg 1"]
        if name != "run_dualmode.sh":
            every += ["--num-shards", "1"]
        if name == "run_nar.sh":
            searches = ["--decoding-methods", "nar_beam_search", "--teacher-methods", "joint_beam_search"]
            sizes = f"{TINY} --decoder-feedforward-dim 16 {epochs}"
            return [*every, *searches, "--systems", "transfer-both", "--train-args", sizes]
        if name == "run_hkd.sh":
            searches = ["--decoding-methods", "cif_greedy_search", "--systems", "cif both"]
            return [*every, *searches, "--train-args", f"{TINY} --decoder-feedforward-dim 16 {epochs}"]
        if name == "run_dualmode.sh":  # masks change until the last of so few epochs
            one = ["--decode-args", "--use-averaged-model false", "--decode-chunks", "16", "--systems", "a3 c2"]
            return [*every, *one, "--train-args", f"{TINY} {epochs} --decoder-dim 16 --joiner-dim 16"]
        if name == "run_hubert.sh":
            sizes = "--extractor-channels 8 --conv-pos 8 --conv-pos-groups 2 --num-encoder-layers 1"
            # A line that names systems starts from students that the demo has left.
            some = ["--num-clusters", "8", *([] if "--systems" in words else ["--systems", "fbank-two fbank-both"])]
            some += ["--hours", "20s"] if "--hours" in words else []
            return [*every, *some, "--train-args", f"{TINY} {sizes} {epochs}"]
        quantizer = ["--phase1-steps", "10", "--phase2-steps", "10"]
        return [*every, *quantizer, "--decoding-methods", "greedy_search", "--train-args", f"{TINY} {epochs}"]


def _published_indexes(folder: Path) -> dict[str, Path]:
    """Write cuts and the archive that icefall would publish for them; return them by their documented names."""
    import numpy as np
    from lhotse import CutSet, MonoCut, NumpyHdf5Writer

    cuts = write_part(folder, "train", [0.6, 0.62, 1.1], features=False)
    cuts.to_file(folder / "cuts.jsonl.gz")
    manifest, bare = folder / "indexes.jsonl.gz", []
    with NumpyHdf5Writer(folder / "indexes") as writer:
        for cut in cuts:
            codes = np.random.default_rng(1).integers(0, 256, (cut.num_samples // 320, 8), dtype=np.uint8)
            bare.append(MonoCut(id=cut.id, start=cut.start, duration=cut.duration, channel=cut.channel))
            bare[-1].codebook_indexes = writer.store_array(cut.id, codes, frame_shift=0.02, temporal_dim=0, start=0)
    CutSet.from_cuts(bare).to_jsonl(manifest)
    part = "cuts_train-clean-100.jsonl.gz"
    return {
        f"vq/with_codebook_indexes-librispeech-{part}": manifest,
        f"egs/librispeech/data/librispeech/fbank/{part}": folder / "cuts.jsonl.gz",
    }


def _write_teacher(folder: Path) -> None:
    """Write a Whisper of random weights: its neighbouring frames are alike, as the teacher check wants them."""
    import transformers

    sides = ("encoder", "decoder")
    numbers = {"layers": 1, "attention_heads": 1, "ffn_dim": 32}
    sizes = {f"{side}_{name}": number for side in sides for name, number in numbers.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **sizes, **tokens, d_model=64, num_mel_bins=80, vocab_size=8, max_target_positions=8
    )
    transformers.WhisperModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, recipe_env, demo_corpus):
    return Checkout(tmp_path_factory.mktemp("check out"), recipe_env, demo_corpus)


@pytest.fixture(scope="module")
def demo_run(checkout) -> str:
    """The output of the whole demo; several commands look at what it leaves."""
    return checkout.run("README.md", DEMO)


@pytest.fixture(scope="module")
def nar_demo_run(checkout) -> str:
    """The same of the demo of system nar."""
    return checkout.run("README.md", NAR_DEMO)


@pytest.fixture(scope="module")
def hkd_demo_run(checkout) -> str:
    """The same of the demo of system hkd."""
    return checkout.run("README.md", HKD_DEMO)


@pytest.fixture(scope="module")
def dualmode_demo_run(checkout) -> str:
    """The same of the demo of system dualmode."""
    return checkout.run("README.md", DUAL_DEMO)


@pytest.fixture(scope="module")
def hubert_demo_run(checkout) -> str:
    """The same of the demo of system hubert."""
    return checkout.run("README.md", HUBERT_DEMO)


def test_the_pages_show_commands():
    assert len(documented_commands()) >= 10


def test_the_demo_ends_in_its_table(demo_run, checkout):
    assert "student without KD" in demo_run and "student with MVQ-KD" in demo_run
    assert stages_done("run_mvq.sh", demo_run) == ["1", "2", "3", "4", "4", "5", "5"]


def test_the_demo_of_nar_ends_in_its_table(nar_demo_run, checkout):
    assert "| AR | joint_beam_search |" in nar_demo_run
    assert "| NAR + transfer + frame and sequence KD | nar_beam_search |" in nar_demo_run
    assert stages_done("run_nar.sh", nar_demo_run) == ["1", "2", "3", "4", "4"]


def test_the_demo_of_hkd_ends_in_its_table(hkd_demo_run, checkout):
    assert "| CIF | cif_greedy_search |" in hkd_demo_run and "| CIF + ACD + LRD (" in hkd_demo_run
    assert stages_done("run_hkd.sh", hkd_demo_run) == [*"1122334", "4"]


def test_the_demo_of_dualmode_ends_in_its_table(dualmode_demo_run, checkout):
    assert "| A3 sparse streaming mode | streaming, 640 ms | sparse |" in dualmode_demo_run
    assert "| C2 both modes, streams sparse, dual pre-training | full | dense |" in dualmode_demo_run
    assert stages_done("run_dualmode.sh", dualmode_demo_run) == [*"122333"]


def test_the_demo_of_hubert_ends_in_its_table(hubert_demo_run, checkout):
    assert "| deep thin log-mel | two stages, L_reg | all | ctc_greedy_search |" in hubert_demo_run
    assert "| deep thin log-mel | two stages, L_reg + L_disc (type2) | all |" in hubert_demo_run
    assert stages_done("run_hubert.sh", hubert_demo_run) == [*"1112335566"]


def stages_done(script: str, output: str) -> list[str]:
    return re.findall(rf"\({re.escape(script)}\) stage (\d) \w+(?: \[.*\])?: done", output)


@pytest.mark.parametrize(("page", "command"), documented_commands(), ids=lambda x: x[:60])
def test_documented_command_runs(page: str, command: str, checkout, request):
    first = ""
    if "demo" in command and "aishell" not in page:
        system = next((f"{name}_" for name in ("nar", "hkd", "dualmode", "hubert") if name in command), "")
        first = request.getfixturevalue(f"{system}demo_run")
    output = checkout.run(page, command)
    if command in SKIPPED and first:  # the second time: the same table, and nothing is done twice
        assert ": runs, " not in output and output.count("done before, skipped") == SKIPPED[command]
        assert [x for x in first.splitlines() if x[:1] == "|"] == [x for x in output.splitlines() if x[:1] == "|"]
    if "--force" in command:
        assert "is moved to exp/demo/mvq-seed42.old" in output and "stage 4 train [mvq-seed42]: done" in output


@pytest.mark.parametrize("page", PAGES)
def test_options_that_a_page_names_exist(page: str):
    shown = {flag for code in inline_code(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code)}
    known = "".join(p.read_text(encoding="utf-8") for p in REPO.glob("**/*.py") if ".venv" not in p.parts)
    known += "".join(p.read_text(encoding="utf-8") for p in (REPO / "local").glob("*.sh"))
    missing = [flag for flag in shown if not re.search(rf"\b{flag[2:].replace('-', '_')}\b|{flag}\b", known)]
    assert missing == []


def test_the_targets_of_the_readme_exist():
    for target in ("demo", "test", "lint", "env", "clean"):
        run = subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
