"""Does the engine run on a CUDA device, and how fast in the Llama-3-8B shape? Random weights: speed only, no findings.

python benchmarks/gpu_smoke.py [--batch 64 256] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers

from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill
from kvpatch.engine.score import score
from kvpatch.models.hf import Backbone
from kvpatch.models.template import EncodedPrompt


def llama_8b() -> Backbone:
    """A randomly initialised model in the shape of Llama-3-8B, bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        hf = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return Backbone(hf)


def random_prompts(batch: int, tokens: int, vocabulary: int) -> list[EncodedPrompt]:
    rows = torch.randint(10, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [EncodedPrompt(tuple(row), (2,) * tokens, ("",) * tokens) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    backbone = llama_8b()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
    print(backbone.geometry.windows[:1], backbone.geometry.rope[0].layout, backbone.geometry.rope[0].rotary_dim)
    for batch in options.batch:
        prompts = random_prompts(batch, 80, backbone.geometry.vocabulary)
        decode(backbone, prefill(backbone, prompts[:2]), max_new_tokens=2, temperature=0.7, seeds=[0, 1])
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache = prefill(backbone, prompts)
        torch.cuda.synchronize()
        filled = time.perf_counter()
        decode(backbone, cache, max_new_tokens=options.new_tokens, temperature=0.7, seeds=range(batch))
        torch.cuda.synchronize()
        decoded = time.perf_counter()
        score(backbone, cache, [[list(range(20, 28))] * 16] * batch)
        torch.cuda.synchronize()
        scored = time.perf_counter()
        print(
            f"batch {batch}: prefill {batch * 80 / (filled - start):,.0f}, "
            f"decode {batch * options.new_tokens / (decoded - filled):,.0f}, "
            f"score {batch * 128 / (scored - decoded):,.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
