"""Stateless decoder, joiner, and the parts of the student."""

import pytest
import torch

from icefall_kd.config import ModelConfig
from icefall_kd.errors import ConfigError
from icefall_kd.models.transducer import Joiner, StatelessDecoder, TransducerModel

SMALL = ModelConfig(num_encoder_layers=1, encoder_dim=16, num_heads=2, feedforward_dim=32, cnn_kernel=3,
                    decoder_dim=12, joiner_dim=20)  # fmt: skip


@pytest.mark.parametrize("context_size", [1, 2, 4])
def test_decoder_sees_its_context_only(context_size):
    decoder = StatelessDecoder(11, 8, context_size=context_size)
    y = torch.randint(0, 11, (2, 9))
    base = decoder(y)
    assert base.shape == (2, 9, 8)
    changed = y.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    moved = (decoder(changed) - base).abs().sum((0, 2)) > 0
    assert not moved[:3].any() and not moved[3 + context_size :].any() and moved[3]


@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_decoder_step_by_step_equals_the_whole_sequence(context_size):
    decoder = StatelessDecoder(11, 8, context_size=context_size)
    y = torch.randint(0, 11, (2, 5))
    whole = decoder(decoder.add_sos(y))
    context = [-1] * (context_size - 1) + [decoder.blank_id]
    for u in range(6):
        tokens = torch.tensor([(context + row)[-context_size:] for row in y[:, :u].tolist()])
        torch.testing.assert_close(decoder(tokens, need_pad=False), whole[:, u : u + 1])


def test_negative_ids_embed_to_zero():
    decoder = StatelessDecoder(11, 8, context_size=1)
    assert not decoder(torch.tensor([[-1, -1]])).any()
    decoder = StatelessDecoder(11, 8)
    torch.testing.assert_close(decoder(torch.tensor([[-1, 4]]), need_pad=False), decoder(torch.tensor([[4]])))


def test_joiner_projects_or_not():
    joiner = Joiner(6, 4, 8, 10)
    encoder_out, decoder_out = torch.randn(2, 5, 1, 6), torch.randn(2, 1, 3, 4)
    logits = joiner(encoder_out, decoder_out)
    assert logits.shape == (2, 5, 3, 10)
    projected = joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out)
    assert torch.equal(joiner(*projected, project_input=False), logits)


@pytest.mark.parametrize("transducer, ctc", [(True, True), (True, False), (False, True)])
def test_only_used_parts_are_built(transducer, ctc):
    model = TransducerModel(SMALL, 30, transducer=transducer, ctc=ctc)
    built = {name for name, _ in model.named_children()}
    assert ({"decoder", "joiner", "simple_am_proj", "simple_lm_proj"} <= built) == transducer
    assert ("ctc_output" in built) == ctc and "encoder" in built
    for name in ("decoder", "joiner", "simple_am_proj", "simple_lm_proj", "ctc_output"):
        assert (getattr(model, name) is None) == (name not in built)


def test_what_makes_no_model_is_refused():
    with pytest.raises(ConfigError):
        TransducerModel(SMALL, 30, transducer=False, ctc=False)
    with pytest.raises(ConfigError, match="decoder-dim"):
        StatelessDecoder(10, 6)
    with pytest.raises(ConfigError, match="context-size"):
        StatelessDecoder(10, 8, context_size=0)
