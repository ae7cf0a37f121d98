"""Six tasks in TransformerLens 4.3, as docs/coming-from.md shows them. `in_kvpatch.py` does the same."""

# %% load
import copy
import os

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_grad_enabled(False)
where = os.environ["MODEL_DIRECTORY"]
hf_model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, attn_implementation="eager")
model = TransformerBridge.boot_transformers(where, hf_model=hf_model, tokenizer=AutoTokenizer.from_pretrained(where))
model.cfg.default_prepend_bos = False

# %% prepare
athens, madrid = "The Acropolis stands in the old city of", "The Prado stands in the old city of"
cached = {"return_type": "logits_and_cache", "use_cache": True}
source, target = (model(text[:-3], **cached)[1] for text in (athens, madrid))

# %% swap
mixed = copy.deepcopy(target)
mixed.layers[10:20] = copy.deepcopy(source.layers[10:20])
ids = model.hf_generate(model.to_tokens(madrid), past_key_values=mixed, max_new_tokens=24, do_sample=False)
text = model.to_string(ids[0, 9:])

# %% slot
mixed = copy.deepcopy(target)
mixed.layers[12].keys[:, :, 1] = source.layers[12].keys[:, :, 1]
mixed.layers[12].values[:, :, 1] = source.layers[12].values[:, :, 1]
logits = model(" of", past_key_values=mixed)[0, -1]
one = logits[model.to_single_token(" Athens")] - logits[model.to_single_token(" Madrid")]

# %% sweep
grid, slots = torch.zeros(30, 8), range(8)
first, other = model.to_single_token(" Athens"), model.to_single_token(" Madrid")
for layer in range(30):
    mixed = copy.deepcopy(target)
    mixed.batch_repeat_interleave(8)
    mixed.layers[layer].keys[slots, :, slots] = source.layers[layer].keys[0].transpose(0, 1)
    mixed.layers[layer].values[slots, :, slots] = source.layers[layer].values[0].transpose(0, 1)
    logits = model([" of"] * 8, past_key_values=mixed)[:, -1]
    grid[layer] = logits[:, first] - logits[:, other]

# %% attention
to_slot_2 = model.run_with_cache(athens)[1]["pattern", 12][0, :, -2, 2]  # [heads]

# %% residual
stream = model.run_with_cache(athens)[1]["resid_pre", 12]
hook = ("blocks.12.hook_resid_pre", lambda own, hook: torch.cat([stream[:, :-1], own[:, -1:]], dim=1))
logits = model.run_with_hooks(madrid, fwd_hooks=[hook])[0, -1]

# %% batch
prompts = [athens, "The Kremlin stands in the old city of"], [madrid, "The Louvre stands in the old city of"]
sources, mixed = (model([text[:-3] for text in row], **cached)[1] for row in prompts)
mixed.layers[10:20] = sources.layers[10:20]
ids = model.hf_generate(model.to_tokens(prompts[1]), past_key_values=mixed, max_new_tokens=24, do_sample=False)
texts = model.to_string(ids[:, 9:])
