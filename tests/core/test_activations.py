"""Interventions in prefill: against the caches they must give, and against hooks by hand on plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from core_caches import ABSOLUTE, copied, is_same, make_cache, slow_rotation, tensors
from kvpatch.caches.kvcache import KVCache, Segment
from kvpatch.engine.prefill import prefill_pass
from kvpatch.engine.residual import recorded_residual, replaced_residual
from kvpatch.interventions.directions import mean_difference
from kvpatch.interventions.in_prefill import run_in_prefill
from kvpatch.interventions.steering import RowSteering, run_value_steering
from kvpatch.models.hf import LayerEdit
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.interventions import InPrefill, ValueSteering
from kvpatch.specs.patch import Patch
from tiny import LAYERS, WINDOW, random_prompts

pytestmark = pytest.mark.model

ARCHITECTURES = ("llama", "gemma3", "gpt_neox", "cohere")
LENGTHS = [WINDOW + 9, 7, WINDOW + 9]
PAIRS_OF_LENGTHS = ([WINDOW + 9, 7, 20], [20, 12, WINDOW + 9])  # sources longer, shorter, and reaching further left
FOUR = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Run:
    """One intervention on prompts, with the natural caches beside it."""

    def __init__(self, model, spec: InPrefill, lengths: Sequence[int] = LENGTHS, of_targets: Sequence[int] = ()):
        self.sources = random_prompts(lengths, seed=1)
        self.targets = random_prompts(of_targets or lengths, seed=2)
        self.source = prefill_pass(model.backbone, self.sources)
        self.target = prefill_pass(model.backbone, self.targets)
        self.done = run_in_prefill(model.backbone, spec, self.sources, self.targets, self.target)
        self.cache = self.done.cache


def equal(left: Tensor, right: Tensor, where: KVCache) -> bool:
    """Bit for bit, at the slots that are not padding."""
    mask = where.is_real[:, None, :, None]
    return torch.equal(left.masked_fill(~mask, 0), right.masked_fill(~mask, 0))


def changed_slots(cache: KVCache, target: KVCache, layer: int) -> list[list[int]]:
    """Slots of each row, counted from its end, at which a layer's keys or values differ."""
    differ = (cache.keys[layer] != target.keys[layer]) | (cache.values[layer] != target.values[layer])
    at = differ.any(dim=3).any(dim=1) & target.is_real
    return [[slot - cache.slots for slot in row.nonzero().flatten().tolist()] for row in at]


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# --- by hand, on plain transformers ---------------------------------------------------------------------------------


def attention_of(hf, layer: int):
    blocks = hf.gpt_neox.layers if hasattr(hf, "gpt_neox") else hf.model.layers
    return blocks[layer].attention if hasattr(hf, "gpt_neox") else blocks[layer].self_attn


def by_hand(model, architecture: str, layer: int, parts: str, source: EncodedPrompt, target: EncodedPrompt):
    """One unpadded row: forward hooks on the projections keep the source's output and give it to the target."""
    hf, heads = model.hf, model.hf.config.num_attention_heads
    attention = attention_of(hf, layer)
    if architecture == "gpt_neox":
        projections = {"fused": attention.query_key_value}
    else:
        projections = {part: getattr(attention, f"{part}_proj") for part in parts}
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module, args, out):
            kept[name] = out.clone()

        return hook

    def give(name: str) -> Callable:
        def hook(module, args, out):
            if name != "fused":
                return kept[name]
            own, other = (t.view(*t.shape[:2], heads, 3, -1).clone() for t in (out, kept[name]))
            for part in parts:
                own[:, :, :, "qkv".index(part)] = other[:, :, :, "qkv".index(part)]
            return own.view_as(out)

        return hook

    def run(prompt: EncodedPrompt, hook: Callable) -> DynamicCache:
        cache = DynamicCache()
        handles = [module.register_forward_hook(hook(name)) for name, module in projections.items()]
        try:
            with torch.no_grad():
                ids = torch.tensor([prompt.token_ids[:-1]])
                hf(input_ids=ids, use_cache=True, **{model.backbone._cache_argument: cache})
        finally:
            for handle in handles:
                handle.remove()
        return cache

    run(source, keep)
    return [(x.keys[0], x.values[0]) for x in run(target, give).layers]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("site", "parts"), [("values", "v"), ("queries_keys_values", "qkv")])
@FOUR
def test_it_equals_a_hook_written_by_hand(architecture, site, parts, layer, tiny):
    model = tiny(architecture)
    run = Run(model, InPrefill(site=site, layers=[layer]))
    for row, (source, target) in enumerate(zip(run.sources, run.targets, strict=True)):
        slots = len(target.token_ids) - 1
        for i, (keys, values) in enumerate(by_hand(model, architecture, layer, parts, source, target)):
            assert off(run.cache.keys[i][row, :, -slots:], keys) < 1e-5
            assert off(run.cache.values[i][row, :, -slots:], values) < 1e-5


# --- residual -------------------------------------------------------------------------------------------------------


@FOUR
def test_residual_everywhere_rebuilds_the_source_cache_bit_for_bit(architecture, tiny):
    run = Run(tiny(architecture), InPrefill(site="residual"))
    for layer in range(LAYERS):
        assert equal(run.cache.keys[layer], run.source.keys[layer], run.target)
        assert equal(run.cache.values[layer], run.source.values[layer], run.target)
        assert not equal(run.cache.values[layer], run.target.values[layer], run.target)
    assert torch.equal(run.cache.token_ids, run.target.token_ids)
    assert torch.equal(run.cache.pending, run.target.pending)


@FOUR
def test_residual_at_the_last_position_changes_exactly_one_slot_a_layer(architecture, tiny):
    run = Run(tiny(architecture), InPrefill(site="residual", slots="last"))
    for layer in range(LAYERS):
        assert changed_slots(run.cache, run.target, layer) == [[-1]] * len(LENGTHS)


@FOUR
def test_residual_at_the_last_position_of_one_layer_changes_that_slot_from_there_on(architecture, tiny):
    run = Run(tiny(architecture), InPrefill(site="residual", layers=[2], slots="last"))
    for layer in range(LAYERS):
        assert changed_slots(run.cache, run.target, layer) == [[-1] if layer >= 2 else []] * len(LENGTHS)


@pytest.mark.parametrize("at", range(LAYERS))
@FOUR
def test_residual_at_one_layer_is_the_target_below_and_the_source_from_there_on(architecture, at, tiny):
    run = Run(tiny(architecture), InPrefill(site="residual", layers=[at]))
    for layer in range(LAYERS):
        side, other = (run.target, run.source) if layer < at else (run.source, run.target)
        assert equal(run.cache.keys[layer], side.keys[layer], run.target)
        assert equal(run.cache.values[layer], side.values[layer], run.target)
        assert not equal(run.cache.values[layer], other.values[layer], run.target)


@FOUR
def test_residual_of_another_length_lands_from_the_last_slot_backwards(architecture, tiny):
    """Values of the first layer are made of the stream that enters it, slot by slot."""
    run = Run(tiny(architecture), InPrefill(site="residual", layers=[0]), *PAIRS_OF_LENGTHS)
    check_values_landed(run, 0, bound=1e-5)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 3])
@FOUR
def test_v_swap_changes_nothing_up_to_its_layer_but_that_layer_s_values(architecture, at, tiny):
    run = Run(tiny(architecture), InPrefill(site="values", layers=[at]))
    for layer in range(at + 1):
        assert equal(run.cache.keys[layer], run.target.keys[layer], run.target)
        assert equal(run.cache.values[layer], (run.source if layer == at else run.target).values[layer], run.target)
    for layer in range(at + 1, LAYERS):
        assert not equal(run.cache.keys[layer], run.target.keys[layer], run.target)
        assert not equal(run.cache.values[layer], run.source.values[layer], run.target)


def check_values_landed(run: Run, layer: int, bound: float) -> None:
    """A row's last values are its source's, as many as both have; what the target has more of stays its own."""
    for row in range(run.target.batch):
        own, given = int(run.target.lengths[row]), int(run.source.lengths[row])
        both = min(own, given)
        found = run.cache.values[layer][row]
        assert off(found[:, -both:], run.source.values[layer][row, :, -both:]) <= bound
        if own > both:
            rest = slice(run.target.slots - own, run.target.slots - both)
            assert torch.equal(found[:, rest], run.target.values[layer][row, :, rest])


@FOUR
def test_values_of_another_length_land_from_the_last_slot_backwards(architecture, tiny):
    check_values_landed(Run(tiny(architecture), InPrefill(site="values", layers=[1]), *PAIRS_OF_LENGTHS), 1, bound=0)


@FOUR
def test_values_are_swapped_at_the_chosen_slots_alone(architecture, tiny):
    run = Run(tiny(architecture), InPrefill(site="values", layers=[1], slots=[2, -1]))
    assert changed_slots(run.cache, run.target, 1) == [[3 - length, -1] for length in LENGTHS]
    for row, length in enumerate(LENGTHS):
        for slot in (3 - length, -1):
            assert torch.equal(run.cache.values[1][row, :, slot], run.source.values[1][row, :, slot])


# --- queries, keys and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])  # gemma3: a sliding layer, and a full one
@FOUR
def test_qkv_gives_its_layer_the_keys_and_values_of_a_source_of_equal_length(architecture, at, tiny):
    run = Run(tiny(architecture), InPrefill(site="queries_keys_values", layers=[at]))
    assert equal(run.cache.keys[at], run.source.keys[at], run.target)
    assert equal(run.cache.values[at], run.source.values[at], run.target)
    for layer in range(at):
        assert equal(run.cache.keys[layer], run.target.keys[layer], run.target)
    assert not equal(run.cache.keys[at + 1], run.target.keys[at + 1], run.target)


@pytest.mark.parametrize("at", [0, 1])
@FOUR
def test_qkv_turns_keys_to_where_they_land(architecture, at, tiny):
    model = tiny(architecture)
    run = Run(model, InPrefill(site="queries_keys_values", layers=[at]), *PAIRS_OF_LENGTHS)
    check_values_landed(run, at, bound=0)
    for row in range(run.target.batch):
        own, given = int(run.target.lengths[row]), int(run.source.lengths[row])
        assert own != given
        for slot in range(-min(own, given), 0):
            for head in range(model.geometry.kv_heads):
                key = run.source.keys[at][row, head, slot]
                expected = slow_rotation(key, own - given, model.geometry.rope[at])
                torch.testing.assert_close(run.cache.keys[at][row, head, slot].double(), expected, atol=1e-5, rtol=1e-5)


@FOUR
def test_a_band_put_in_while_the_prompt_runs_and_one_put_in_afterwards_differ_above_it_alone(architecture, tiny):
    """What mediation rests on: total and direct effect share the band's own keys and values, slot for slot."""
    run = Run(tiny(architecture), InPrefill(site="queries_keys_values", layers=[1, 2]), *PAIRS_OF_LENGTHS)
    alone = Patch(layers=[1, 2], slots="all", align="end").apply(run.source, run.target)
    reached = torch.arange(run.target.slots, 0, -1) <= run.source.lengths[:, None]
    is_put = (reached & run.target.is_real)[:, None, :, None]
    for layer in range(LAYERS):
        for through, by_itself, own in (
            (run.cache.keys[layer], alone.keys[layer], run.target.keys[layer]),
            (run.cache.values[layer], alone.values[layer], run.target.values[layer]),
        ):
            if layer in (1, 2):
                torch.testing.assert_close(through.where(is_put, 0), by_itself.where(is_put, 0), atol=1e-5, rtol=1e-5)
                assert not equal(by_itself, own, run.target)
            else:
                assert equal(by_itself, own, run.target)
                assert equal(through, own, run.target) is (layer == 0)


@FOUR
def test_qkv_turns_queries_too(architecture, tiny):
    """The chosen slots also see the target's own keys before them, so a query that kept its rotation would show."""
    model, spec = tiny(architecture), InPrefill(site="queries_keys_values", layers=[0], slots=[-2, -1])
    run = Run(model, spec, [12], [9])
    edits = {0: run_edits(model, run, with_turned_queries=True)}
    turned = prefill_pass(model.backbone, run.targets, edits=edits)
    edits = {0: run_edits(model, run, with_turned_queries=False)}
    unturned = prefill_pass(model.backbone, run.targets, edits=edits)
    assert off(run.cache.values[1], turned.values[1]) < 1e-5
    assert off(run.cache.values[1], unturned.values[1]) > 1e-4


def run_edits(model, run: Run, *, with_turned_queries: bool) -> LayerEdit:
    """The edit of layer 0 of one row by hand, turned slowly."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def record(tensor: Tensor) -> Tensor:
            seen[name] = tensor.clone()
            return tensor

        return record

    prefill_pass(model.backbone, run.sources, edits={0: LayerEdit(keep("query"), keep("key"), keep("value"))})
    distance = int(run.target.lengths[0] - run.source.lengths[0])

    def give(name: str, turns: bool) -> Callable[[Tensor], Tensor]:
        def change(own: Tensor) -> Tensor:
            out = own.clone()
            for head in range(own.shape[1]):
                for slot in (-2, -1):
                    vector = seen[name][0, head, slot]
                    turned = slow_rotation(vector, distance, model.geometry.rope[0]) if turns else vector
                    out[0, head, slot] = turned.to(own.dtype)
            return out

        return change

    return LayerEdit(give("query", with_turned_queries), give("key", True), give("value", False))


# --- counts, inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (InPrefill(site="values", layers=[1]), 1),
        (InPrefill(site="queries_keys_values", layers=[1]), 3),
        (InPrefill(site="values"), LAYERS),
        (InPrefill(site="residual"), LAYERS),
        (InPrefill(site="residual", layers=[0, 3], slots="last"), 2),
    ],
)
@FOUR
def test_every_planned_change_is_made_and_counted(architecture, spec, count, tiny):
    done = Run(tiny(architecture), spec).done
    assert (done.planned, done.fired) == (count, count)


@pytest.mark.parametrize("site", ["values", "queries_keys_values", "residual"])
@FOUR
def test_natural_caches_are_left_as_they_were(architecture, site, tiny):
    model = tiny(architecture)
    sources, targets = random_prompts(LENGTHS, seed=1), random_prompts(LENGTHS, seed=2)
    natural = prefill_pass(model.backbone, targets)
    before = copied(natural)
    run_in_prefill(model.backbone, InPrefill(site=site), sources, targets, natural)
    assert is_same(before, tensors(natural))
    assert is_same(before, tensors(prefill_pass(model.backbone, targets)))


# --- steering of values ---------------------------------------------------------------------------------------------


def directions_of(model, seed: int = 5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (model.geometry.kv_heads, model.geometry.head_dim)
    return {layer: torch.randn(*shape, generator=generator) for layer in range(LAYERS)}


def steered(model, spec: ValueSteering):
    targets = random_prompts(LENGTHS, seed=2)
    natural = prefill_pass(model.backbone, targets)
    return natural, run_value_steering(model.backbone, spec, directions_of(model), targets, natural)


@FOUR
def test_steering_with_alpha_0_is_the_natural_run_bit_for_bit(architecture, tiny):
    natural, done = steered(tiny(architecture), ValueSteering(layers=None, alpha=0))
    assert is_same(tensors(natural), tensors(done.cache))
    assert natural.checksums() == done.cache.checksums()
    assert (done.planned, done.fired) == (LAYERS, LAYERS)


@pytest.mark.parametrize("slots", ["all", "last", [1, -2]])
@FOUR
def test_steering_adds_alpha_times_the_direction_at_the_chosen_slots_and_nothing_below(architecture, slots, tiny):
    model = tiny(architecture)
    natural, done = steered(model, ValueSteering(layers=[2], alpha=-1.5, slots=slots))
    assert (done.planned, done.fired) == (1, 1)
    for layer in (0, 1):
        assert equal(done.cache.keys[layer], natural.keys[layer], natural)
        assert equal(done.cache.values[layer], natural.values[layer], natural)
    assert equal(done.cache.keys[2], natural.keys[2], natural)
    for row, length in enumerate(LENGTHS):
        own = range(1 - length, 0)
        chosen = {"all": set(own), "last": {-1}}.get(slots) if isinstance(slots, str) else {2 - length, -2}
        for slot in own:
            step = -1.5 * directions_of(model)[2] if slot in chosen else 0
            assert torch.equal(done.cache.values[2][row, :, slot], natural.values[2][row, :, slot] + step)
    assert not equal(done.cache.values[3], natural.values[3], natural)


def test_row_steering_gives_every_stretch_of_rows_its_own_steps():
    steps = torch.randn(5, 2, 3)
    values = torch.zeros(2, 2, 1, 3)
    edit = RowSteering({1: steps}).edits(slice(2, 4))[1]
    assert torch.equal(edit.apply("value", values)[:, :, 0], steps[2:4])
    assert edit.fired == 1
    assert torch.equal(edit.apply("key", values), values)
    assert edit.fired == 1


# --- hooks ----------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """Stands for whatever goes wrong inside a block."""


def hooks_of(model) -> int:
    modules = list(model.hf.modules())
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


@FOUR
def test_hooks_are_gone_after_an_exception_inside_the_block(architecture, tiny):
    model = tiny(architecture)
    before = hooks_of(model)
    blocks = [
        recorded_residual(model.backbone, [0, 2]),
        replaced_residual(model.backbone, {1: torch.zeros(1), 3: torch.zeros(1)}, torch.zeros(1, 1)),
    ]
    for block in blocks:
        with pytest.raises(Broken), block:
            raise Broken
        assert hooks_of(model) == before and model.backbone.changed_streams == {}


def test_hooks_are_there_while_a_pass_runs_and_no_longer(tiny):
    model = tiny("llama")
    before = hooks_of(model)
    with recorded_residual(model.backbone, [0, 2]), replaced_residual(model.backbone, {}, torch.zeros(1, 1)):
        assert hooks_of(model) == before
        seen: list[int] = []
        handle = model.backbone.blocks[3].register_forward_pre_hook(lambda *_: seen.append(hooks_of(model)))
        prefill_pass(model.backbone, random_prompts(LENGTHS))
        handle.remove()
        assert seen == [before + 3] and hooks_of(model) == before
    assert hooks_of(model) == before and model.backbone.changed_streams == {}


@FOUR
def test_hooks_are_gone_and_attention_is_restored_after_a_hook_failed_inside_the_model(architecture, tiny):
    model, prompts = tiny(architecture), random_prompts(LENGTHS)
    before, attention = hooks_of(model), model.backbone.config._attn_implementation
    natural = prefill_pass(model.backbone, prompts)
    wrong = {1: torch.zeros(7, 5, 3)}
    at = torch.ones(7, 5, dtype=torch.bool)
    with pytest.raises(RuntimeError), replaced_residual(model.backbone, wrong, at):
        prefill_pass(model.backbone, prompts)
    assert hooks_of(model) == before and model.backbone.changed_streams == {}
    assert model.backbone.config._attn_implementation == attention
    assert is_same(tensors(natural), tensors(prefill_pass(model.backbone, prompts)))


@pytest.mark.parametrize("part", ["query", "key", "value"])
@FOUR
def test_attention_is_restored_after_an_edit_failed(architecture, part, tiny):
    model, prompts = tiny(architecture), random_prompts(LENGTHS)
    attention = model.backbone.config._attn_implementation
    natural = prefill_pass(model.backbone, prompts)

    def fail(tensor: Tensor) -> Tensor:
        assert model.backbone.config._attn_implementation != attention
        raise Broken

    with pytest.raises(Broken):
        prefill_pass(model.backbone, prompts, edits={1: LayerEdit(**{part: fail})})
    assert model.backbone.config._attn_implementation == attention
    assert is_same(tensors(natural), tensors(prefill_pass(model.backbone, prompts)))


# --- mean difference ------------------------------------------------------------------------------------------------


def slow_body_mean(cache: KVCache, layer: int, *, of_keys: bool) -> Tensor:
    """Mean over rows of the mean over body slots, vector by vector in float64."""
    rope, means = cache.rope[layer], []
    for row in range(cache.batch):
        total, count = torch.zeros(cache.keys[layer].shape[1], cache.keys[layer].shape[3], dtype=torch.float64), 0
        for slot in range(cache.slots):
            if cache.segments[row, slot] != Segment.body:
                continue
            count += 1
            for head in range(total.shape[0]):
                if not of_keys:
                    total[head] += cache.values[layer][row, head, slot].double()
                elif rope.layout == "absolute":
                    total[head] += cache.keys[layer][row, head, slot].double()
                else:
                    total[head] += slow_rotation(
                        cache.keys[layer][row, head, slot], -int(cache.positions[row, slot]), rope
                    )
        means.append(total / count)
    return torch.stack(means).mean(dim=0)


@pytest.mark.parametrize("rope", ["rotary", "absolute"])
def test_mean_difference_equals_a_slow_loop_over_body_slots(rope):
    kinds = {} if rope == "rotary" else {"rope": ABSOLUTE}
    sources = make_cache([9, 6, 12], seed=1, starts=[0, 3, 40], **kinds)
    targets = make_cache([7, 10, 8, 5], seed=2, starts=[5, 0, 0, 11], **kinds)
    keys, values = mean_difference(sources, targets)
    assert sorted(keys) == sorted(values) == [0, 1, 2]
    for layer in range(3):
        for found, of_keys in ((keys[layer], True), (values[layer], False)):
            slow = [slow_body_mean(cache, layer, of_keys=of_keys) for cache in (sources, targets)]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), slow[0] - slow[1], atol=2e-5, rtol=1e-4)


def test_mean_difference_of_a_group_from_itself_is_zero():
    cache = make_cache([9, 6, 12])
    for part in mean_difference(cache, cache):
        assert all(not direction.any() for direction in part.values())


@pytest.mark.parametrize("count", [1, 3])
def test_random_value_steering_has_the_direction_s_norms_and_as_many_directions_as_asked(count, tiny):
    model = tiny("llama")
    targets = random_prompts([9] * 5, seed=2)
    natural = prefill_pass(model.backbone, targets)
    spec = ValueSteering(layers=[2], alpha=2, random_directions=count)
    known = directions_of(model)
    done = run_value_steering(model.backbone, spec, known, targets, natural, which=range(5))
    assert (done.planned, done.fired) == (1, 1)
    steps = done.cache.values[2] - natural.values[2]  # [rows, kv_heads, slots, head_dim]
    wanted = 2 * known[2].norm(dim=-1)
    assert torch.allclose(steps.norm(dim=-1), wanted[None, :, None].expand(5, -1, steps.shape[2]), rtol=1e-3)
    distinct = {tuple(row.round(decimals=3).flatten().tolist()) for row in steps[:, :, -1]}
    assert len(distinct) == count
    assert not torch.allclose(steps[0, :, -1], 2 * known[2], rtol=1e-2)
