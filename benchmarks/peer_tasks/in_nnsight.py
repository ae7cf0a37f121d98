"""Six tasks in nnsight 0.8, as docs/coming-from.md shows them. `in_kvpatch.py` does the same."""

# %% load
import copy
import os

import torch
from nnsight import TransformersModel

torch.set_grad_enabled(False)
where, options = os.environ["MODEL_DIRECTORY"], {"dtype": torch.float32, "attn_implementation": "eager"}
model = TransformersModel(where, task="text-generation", dispatch=True, **options)

# %% prepare
athens, madrid = "The Acropolis stands in the old city of", "The Prado stands in the old city of"
source, target = (model.trace(text[:-3], trace=False).past_key_values for text in (athens, madrid))

# %% swap
mixed = copy.deepcopy(target)
mixed.layers[10:20] = copy.deepcopy(source.layers[10:20])
ids = model.generate(madrid, past_key_values=mixed, max_new_tokens=24)
text = model.tokenizer.decode(ids[0, 9:])

# %% slot
mixed = copy.deepcopy(target)
mixed.layers[12].keys[:, :, 1] = source.layers[12].keys[:, :, 1]
mixed.layers[12].values[:, :, 1] = source.layers[12].values[:, :, 1]
logits = model.trace(" of", attention_mask=torch.ones(1, 9), past_key_values=mixed, trace=False).logits[0, -1]
first, other = model.tokenizer(" Athens Madrid").input_ids
one = logits[first] - logits[other]

# %% sweep
grid, slots = torch.zeros(30, 8), range(8)
first, other = model.tokenizer(" Athens Madrid").input_ids
for layer in range(30):
    mixed = copy.deepcopy(target)
    mixed.batch_repeat_interleave(8)
    mixed.layers[layer].keys[slots, :, slots] = source.layers[layer].keys[0].transpose(0, 1)
    mixed.layers[layer].values[slots, :, slots] = source.layers[layer].values[0].transpose(0, 1)
    logits = model.trace([" of"] * 8, attention_mask=torch.ones(8, 9), past_key_values=mixed, trace=False).logits[:, -1]
    grid[layer] = logits[:, first] - logits[:, other]

# %% attention
with model.trace(athens):
    to_slot_2 = model.model.layers[12].self_attn.output[1][0, :, -2, 2].save()  # [heads]

# %% residual
with model.trace(athens):
    stream = model.model.layers[12].input.save()
with model.trace(madrid):
    model.model.layers[12].input[:, :-1] = stream[:, :-1]
    logits = model.output.logits[0, -1].save()

# %% batch
prompts = [athens, "The Kremlin stands in the old city of"], [madrid, "The Louvre stands in the old city of"]
sources, mixed = (model.trace([text[:-3] for text in row], trace=False).past_key_values for row in prompts)
mixed.layers[10:20] = sources.layers[10:20]
ids = model.generate(prompts[1], past_key_values=mixed, max_new_tokens=24)
texts = model.tokenizer.batch_decode(ids[:, 9:])
