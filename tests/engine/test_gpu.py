"""What only a CUDA device can show: graphs and fused kernels write the texts of the model's own forward pass."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpatch.engine.backend import Fast, fast_of
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill
from kvpatch.models.backbone import Backbone
from tiny import CONFIGS, WINDOW, random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [1 + (7 * i) % (WINDOW + 30) for i in range(40)]


def on_the_gpu(architecture: str) -> Backbone:
    """A tiny model whose heads are large enough for the fused kernels."""
    name, settings = CONFIGS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings | {"head_dim": 32, "hidden_size": 128})
    return Backbone(transformers.AutoModelForCausalLM.from_config(config).float().cuda().requires_grad_(False))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("ops", ["fused", "plain"])
def test_texts_equal_those_of_the_model_s_own_forward_pass(architecture: str, temperature: float, ops: str):
    backbone = on_the_gpu(architecture)
    known = fast_of(backbone)
    assert known.ops == "fused", known.note
    cache = prefill(backbone, random_prompts(LENGTHS))
    settings = {"max_new_tokens": 40, "temperature": temperature, "seeds": range(len(LENGTHS))}
    backbone.kept.backend = Fast(None, "model", "")
    free = decode(backbone, cache, **settings)
    ends = [int(free.token_ids[row, row]) for row in range(3, 30, 4)]
    expected = decode(backbone, cache, **settings, end_tokens=ends, keep_values=[1])
    backbone.kept.backend = Fast(known.network, ops, "")
    for places in (40, 16):
        found = decode(backbone, cache, **settings, end_tokens=ends, keep_values=[1], places=places)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-3, equal_nan=True)
        assert torch.allclose(found.values[1], expected.values[1], atol=1e-3)
