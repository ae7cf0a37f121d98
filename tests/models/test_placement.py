"""A device map splits a model over devices or offloads parts of it; what is patched is the same model all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvpatch as kv
from kvpatch.checks.identities import check
from kvpatch.engine.backend import fast_of
from kvpatch.models.fingerprint import tensors_sha256
from kvpatch.models.placement import offloaded, read_device_map, told_placement

ON_DISK = {"": "cpu", "model.layers.1": "disk", "model.layers.3": "disk", "lm_head": "disk"}
PROMPTS = ["Watch yourself choose each of these words now.", "Explain how bread rises in a warm oven."]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_partly_on_disk_is_the_same_model(tiny, tiny_dirs, architecture: str) -> None:
    whole = tiny(architecture)
    model = kv.load(tiny_dirs(architecture), device_map=ON_DISK)
    assert offloaded(model.hf) and any(p.is_meta for p in model.hf.parameters())
    assert tensors_sha256(model.hf) == tensors_sha256(whole.hf) and model.backbone.identity == whole.backbone.identity
    found, expected = model.prefill(PROMPTS), whole.prefill(PROMPTS)
    assert found.checksums() == expected.checksums()
    mixed = kv.Patch(layers=[1, 2], slots="body", donor="gaussian_fitted").apply(found[[0]], found[[1]])
    assert (
        mixed.checksums()
        == kv.Patch(layers=[1, 2], slots="body", donor="gaussian_fitted")
        .apply(expected[[0]], expected[[1]])
        .checksums()
    )
    assert model.generate(mixed, max_new_tokens=5).texts == whole.generate(mixed, max_new_tokens=5).texts
    assert torch.allclose(model.score(mixed, " oven"), whole.score(mixed, " oven"), atol=1e-5)
    assert [i.identity for i in check(model) if i.holds is False] == []
    assert "partly offloaded" in fast_of(model.backbone).note
    assert any(p.is_meta for p in model.hf.parameters()), "an offloaded weight stayed in memory"


def test_a_device_map_of_one_device_leaves_the_model_as_it_is(tiny_dirs) -> None:
    model = kv.load(tiny_dirs("llama"), device_map="auto" if not torch.cuda.is_available() else {"": "cpu"})
    assert not model.backbone.is_dispatched and told_placement(model.hf) == {}
    assert fast_of(model.backbone).network is not None


def test_the_plan_says_what_lies_where_and_whether_it_fits(tiny_dirs, tmp_path: Path, capsys) -> None:
    from kvpatch.cli.planning import planned_summary
    from kvpatch.cli.tables import print_plan
    from kvpatch.protocols.load import load_protocol
    from small import write_protocol

    model = kv.load(tiny_dirs("llama"), device_map=ON_DISK)
    protocol = load_protocol(str(write_protocol(tmp_path, hypotheses=[])))
    summary = planned_summary(protocol, {None: model}, seed=0, n=1, phases=None, is_timed=True)
    whole = sum(p.numel() * p.element_size() for p in (*model.hf.parameters(), *model.hf.buffers()))
    places = summary["placement"]["llama"]
    assert set(places) == {"cpu", "disk"} and sum(places.values()) == whole
    assert summary["fits"] is True and 0 < summary["peak_memory_bytes"] < summary["available_memory_bytes"]
    print_plan(summary | {"error_statement": ""})
    told = " ".join(capsys.readouterr().out.split())
    assert "it fits:" in told and "weights of llama:" in told and "GB on disk" in told
    print_plan(summary | {"error_statement": "", "fits": False})
    assert "it does not fit:" in " ".join(capsys.readouterr().out.split())


def test_weights_that_are_not_numbers_are_found_on_disk_too(tiny_dirs, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_dirs("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(kv.ModelError, match=r"model.layers.3.mlp.up_proj.weight holds NaN"):
        kv.load(tmp_path, device_map=ON_DISK)


def test_run_json_says_where_the_parts_lie(tiny_dirs, tmp_path: Path) -> None:
    from small import write_protocol

    model = kv.load(tiny_dirs("llama"), device_map=ON_DISK)
    run = kv.run(write_protocol(tmp_path, hypotheses=[]), model, tmp_path / "out", n=1)
    assert run.record.model.placement["model.layers.3"] == "disk"
    assert "partly offloaded" in str(run.record.engine["own"]["note"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("everywhere", "is none of auto, balanced"),
        ("{not json", "is no JSON object"),
        ("[1]", "no file of one"),
        ('{"": ' * 100_000, "it is too deeply nested"),
        ("/dev/zero", "no file of one"),
        ("~no-such-user-here/map.json", "no file of one"),
        ({}, "must be one of auto"),
        ({"": "nowhere"}, "a device is a GPU's number, cpu or disk"),
        ({"": 99}, "this machine has"),
        ({"": None}, "a device is a GPU's number, cpu or disk"),
        (7, "must be one of auto"),
    ],
)
def test_a_device_map_that_can_t_be_meant_is_refused_in_one_line(given: object, told: str) -> None:
    with pytest.raises(kv.ModelError, match=told) as caught:
        read_device_map(given)
    assert "\n" not in str(caught.value)


def test_a_device_map_is_read_from_text_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"": "cpu"}))
    assert read_device_map(str(tmp_path / "map.json")) == read_device_map('{"": "cpu"}') == {"": "cpu"}
    assert read_device_map("auto") == "auto"


def test_a_device_and_a_device_map_are_one_too_many(tiny_dirs) -> None:
    with pytest.raises(kv.ModelError, match="give one of them"):
        kv.load(tiny_dirs("llama"), device="cpu", device_map="auto")
    model = kv.load(tiny_dirs("llama"), device="cpu")
    with pytest.raises(kv.ModelError, match=r"move one in memory"):
        kv.load(model=model.hf, tokenizer=model.tokenizer, device_map="auto")


@pytest.mark.parametrize(
    ("device_map", "told"),
    [
        ({"model.layers.0": "cpu", "lm_head": "disk"}, "says no device for model.embed_tokens"),
        ({"": "cpu", "model.layers.77": "disk"}, "names 'model.layers.77', and LlamaForCausalLM has no such module"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused_in_one_line(tiny_dirs, device_map: dict[str, str], told: str):
    with pytest.raises(kv.ModelError, match=told) as caught:
        kv.load(tiny_dirs("llama"), device_map=device_map)
    assert "\n" not in str(caught.value)
