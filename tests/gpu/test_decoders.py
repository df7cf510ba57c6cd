"""The searches give the same hypotheses on a GPU as on the CPU."""

import copy

import pytest
import torch

from icefall_kd.config import ModelConfig
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.models.transducer import TransducerModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("search", [GreedySearch, CtcGreedySearch, lambda m: ModifiedBeamSearch(m, 4, nbest=4)])
def test_a_search_on_a_gpu_equals_the_cpu(search):
    torch.manual_seed(0)
    dims = ModelConfig(encoder_size="tiny", num_encoder_layers=1, decoder_dim=32, joiner_dim=48)
    model = TransducerModel(dims, 60).eval().double()
    with torch.no_grad():
        for proj in (model.joiner.encoder_proj, model.joiner.output_linear):
            proj.weight.mul_(8)
    x = torch.randn(7, 50, model.encoder.dim, dtype=torch.float64)
    lens = torch.tensor([50, 3, 0, 49, 20, 11, 1])
    cpu = search(model).decode(x, lens)
    gpu = search(copy.deepcopy(model).cuda()).decode(x.cuda(), lens.cuda())
    assert any(hyps[0].tokens for hyps in cpu)
    for a, b in zip(cpu, gpu, strict=True):
        assert [(h.tokens, h.timestamps) for h in a] == [(h.tokens, h.timestamps) for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-5, abs=1e-4)
