"""Six tasks in kvpatch, as docs/coming-from.md shows them. `in_nnsight.py` and `in_transformer_lens.py` do the same."""

# %% load
import kvpatch as kv

model = kv.load("smollm2-135m")

# %% prepare
athens, madrid = "The Acropolis stands in the old city of", "The Prado stands in the old city of"
source, target = model.prefill(athens, chat=False), model.prefill(madrid, chat=False)

# %% swap
mixed = kv.Patch(layers=range(10, 20)).apply(source, target)
text = model.generate(mixed, max_new_tokens=24, temperature=0).texts[0]

# %% slot
answers = kv.logit_difference(" Athens", " Madrid")
one = model.sweep(source, target, {"layers": [12], "slots": [1]}, answers).data.item()

# %% sweep
answers = kv.logit_difference(" Athens", " Madrid")
grid = model.sweep(source, target, {"layers": "each", "slots": "each"}, answers).data

# %% attention
to_slot_2 = model.attention(athens, maps=kv.Maps(layers=12), chat=False).map(12)[:, -1, 2]  # [heads]

# %% residual
edit = kv.InPrefill(site="residual", layers=[12], slots="all")
logits = model.logits(model.intervene(edit, target=madrid, source=athens, chat=False))[0]

# %% batch
sources = model.prefill([athens, "The Kremlin stands in the old city of"], chat=False)
targets = model.prefill([madrid, "The Louvre stands in the old city of"], chat=False)
mixed = kv.Patch(layers=range(10, 20)).apply(sources, targets)
texts = model.generate(mixed, max_new_tokens=24, temperature=0).texts
