"""Two ranks read different shards of a Shar, do equally many steps, and resume in the middle of an epoch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from micro_corpus import write_corpus
from shar_toys import write_label_sets, write_shar

from icefall_kd.train.checkpoint import load_checkpoint, load_newest
from tests.distributed.test_ddp import finish, free_port

TRAIN = "from icefall_kd import errors, recipe; errors.run_main(recipe.train_main)"
OPTIONS = """
--encoder-size tiny --num-encoder-layers 2 --encoder-dim 16 --num-heads 2 --feedforward-dim 16 --cnn-kernel 3
--decoder-dim 8 --joiner-dim 8 --max-duration 2 --num-workers 0 --num-epochs 1 --device cpu --num-threads 1
--train-parts train --valid-parts dev --kd mvq --shar-streams 1 --shar-buffer 6 --num-buckets 2 --oom-scan false
""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("ddp_shar"), num_train=20)
    write_label_sets(folder)
    write_shar(folder, num_shards=3)  # one rank has two of them
    return folder


def start(corpus, exp_dir, *options, world_size=2):
    paths = {"manifest-dir": "fbank", "lang-dir": "lang_char", "label-dir": "codes", "shar-dir": "shar"}
    found = [word for name, path in paths.items() for word in (f"--{name}", str(corpus / path))]
    command = [sys.executable, "-c", TRAIN, *OPTIONS, *found, "--exp-dir", str(exp_dir), *options]
    port = str(free_port())
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip


def test_ranks_with_unequal_shards_end_together_and_resume_bit_by_bit(corpus, tmp_path):
    results = finish(start(corpus, tmp_path / "whole"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    steps = json.loads((tmp_path / "whole" / "train_summary.json").read_text())["steps"]
    assert steps >= 4
    results = finish(start(corpus, tmp_path / "parts", "--max-steps", "3"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    positions = load_newest(tmp_path / "parts")[1]["train"]["positions"]
    assert [p["streams"][0]["batches"] for p in positions] == [3, 3]
    results = finish(start(corpus, tmp_path / "parts"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    a, b = (load_checkpoint(tmp_path / name / "epoch-1.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_number_of_ranks_in_the_middle_of_an_epoch_is_refused(corpus, tmp_path):
    results = finish(start(corpus, tmp_path, "--max-steps", "2"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    (code, _, err), = finish(start(corpus, tmp_path, world_size=1))
    assert code == 4 and "was saved within an epoch by 2 ranks; 1 ranks see other batches" in err, err
