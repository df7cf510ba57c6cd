"""Streaming training and decoding give on a GPU what they give on the CPU."""

import copy
import dataclasses

import pytest
import torch

from icefall_kd.config import AsrLossConfig, ModelConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.decode.streaming import encode_chunks
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.models.streaming import Chunks
from icefall_kd.systems.mvq import MvqSystem

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    encoder_size="tiny",
    num_encoder_layers=3,
    dropout=0.0,
    streaming=True,
    chunk_size=[4, 8],
    left_context_frames=[8, 16],
    decoder_dim=32,
    joiner_dim=48,
)


def pair(convolution: str) -> tuple[MvqSystem, MvqSystem, Batch]:
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, convolution=convolution)
    config = TrainConfig(model=model, asr=AsrLossConfig(rnnt_backend="torch"))
    system = MvqSystem(config, 40).double()
    lens = torch.tensor([300, 121, 57])
    features = torch.randn(3, 300, 80, dtype=torch.float64) * 3 - 6
    y_lens = torch.tensor([12, 5, 2])
    batch = Batch(ids=["a", "b", "c"], features=features, x_lens=lens, y=torch.randint(3, 40, (3, 12)), y_lens=y_lens)
    return system, copy.deepcopy(system).cuda(), batch


@pytest.mark.parametrize("convolution", ["causal", "chunk"])
def test_losses_and_gradients_of_a_drawn_chunk_agree(convolution):
    cpu, gpu, batch = pair(convolution)
    for seed in range(3):
        totals = []
        for system, data in ((cpu, batch), (gpu, batch.to("cuda"))):
            system.zero_grad()
            torch.manual_seed(seed)  # the same chunks
            total = system.losses(data, 5).total
            total.backward()
            totals.append(float(total))
        assert totals[0] == pytest.approx(totals[1], rel=1e-5)
        for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("convolution", ["causal", "chunk"])
def test_chunk_by_chunk_recognition_agrees(convolution):
    cpu, gpu, batch = pair(convolution)
    found = []
    for system, data in ((cpu.eval(), batch), (gpu.eval(), batch.to("cuda"))):
        for search in (GreedySearch(system.model), ModifiedBeamSearch(system.model, 4)):
            state = search.start(3)
            with torch.no_grad():
                chunks = encode_chunks(system.model.encoder, data.features, data.x_lens, Chunks(4, 8))
                for encoder_out, lens in chunks:
                    search.advance(state, encoder_out, lens)
            found.append([nbest[0].tokens for nbest in search.result(state)])
    assert found[:2] == found[2:]
