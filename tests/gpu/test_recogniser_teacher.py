"""A recogniser's labels on a GPU are those of the CPU."""

from dataclasses import replace

import pytest
import torch
from recogniser_toys import CPU, KINDS, write_recogniser

from icefall_kd.data.batch import Batch
from icefall_kd.frames import fbank_num_frames
from icefall_kd.teachers.recogniser import RecogniserTeacher
from icefall_kd.text.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu


def test_labels_on_a_gpu_are_those_of_the_cpu(tmp_path):
    tokenizer = Tokenizer.train_char(["ONE TWO", "THREE FOUR"])
    write_recogniser(tmp_path, tokenizer)
    lengths, ids = [16000, 8000], [tokenizer.encode(text) for text in ("TWO", "ONE")]
    batch = replace(
        Batch.from_audio([0.1 * torch.randn(n) for n in lengths]),
        x_lens=torch.tensor([fbank_num_frames(n) for n in lengths]),
        y=torch.tensor(ids),
        y_lens=torch.tensor([3, 3]),
    )
    cpu = RecogniserTeacher.load(tmp_path, CPU).labels(batch, KINDS)
    gpu = RecogniserTeacher.load(tmp_path, replace(CPU, teacher_device="cuda")).labels(batch.to("cuda"), KINDS)
    for kind in ("ctc_posteriors", "token_posteriors"):
        assert gpu[kind].probs.is_cuda and (gpu[kind].probs.cpu() - cpu[kind].probs).abs().max() < 2e-3
        assert torch.equal(gpu[kind].ids[..., 0].cpu(), cpu[kind].ids[..., 0])
    assert torch.allclose(gpu["nbest"].scores[:, 0].cpu(), cpu["nbest"].scores[:, 0], atol=1e-2)
