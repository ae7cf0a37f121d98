"""A checkpoint that is not whole is refused by the names of its tensors; hashes and notes tell what was loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import write_gguf
from torch import Tensor

from kvpatch.errors import ModelError
from kvpatch.models import note
from kvpatch.models.checkpoint import one_line
from kvpatch.models.fingerprint import vocabulary_sha256
from kvpatch.models.load import load_model, weights_sha256
from tiny import CHATML, tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def variant(tiny_dirs, tmp_path: Path) -> Callable[..., Path]:
    """`variant(architecture, change, **config)`: a tiny model's directory with its tensors and its config changed."""

    def make(architecture: str, change: Callable[[Tensors], Tensors] = lambda s: s, **config: object) -> Path:
        out = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_dirs(architecture), out)
        changed = change(load_file(out / "model.safetensors"))
        save_file({k: v.contiguous() for k, v in changed.items()}, out / "model.safetensors", {"format": "pt"})
        written = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(written | config))
        return out

    return make


def refusal(where: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        load_model(where, device="cpu", **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda s: {k: v for k, v in s.items() if not any(part in k for part in parts)}


def with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda s: {prefix + k: v for k, v in s.items()}


# --- names ---


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize(
    ("prefix", "advice"),
    [
        ("base_model.model.", "merge the adapter"),
        ("_orig_mod.", "save its ._orig_mod"),
        ("module.", "save its .module"),
        ("_fsdp_wrapped_module.", "full state dict"),
        ("policy.", "The names begin with policy."),
    ],
)
def test_names_with_a_prefix_are_refused_with_what_to_do(variant, architecture: str, prefix: str, advice: str):
    message = refusal(variant(architecture, with_prefix(prefix)))
    first = sorted(tiny_hf(architecture).state_dict())[0]
    assert f"the checkpoint lacks {first}" in message
    assert f"it holds {prefix}" in message
    assert advice in message
    assert " more" in message


def test_a_prefix_twice_is_refused_and_the_model_s_own_once_more_is_read_as_it_stands(variant):
    assert "it holds model.model.lm_head.weight" in refusal(variant("llama", with_prefix("model.model.")))
    loaded = load_model(variant("llama", with_prefix("model.")), device="cpu")
    assert weights_sha256(loaded) == weights_sha256(load_model(variant("llama"), device="cpu"))


@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_refused_by_name(variant, name: str):
    assert f"the checkpoint lacks {name}, which would be left untrained" in refusal(variant("llama", without(name)))


def test_a_backbone_is_refused_where_its_head_is_not_tied_and_read_where_it_is(variant):
    def bare(s: Tensors) -> Tensors:
        return {k.removeprefix("model.").removeprefix("transformer."): v for k, v in without("lm_head")(s).items()}

    assert "save the whole causal language model, not its backbone alone" in refusal(variant("llama", bare))
    message = refusal(variant("llama", bare, architectures=["LlamaModel"]))
    assert "config.json names LlamaModel; give a checkpoint of a causal language model" in message
    for tied in ("gpt2", "gemma3"):
        loaded = load_model(variant(tied, bare), device="cpu")
        assert weights_sha256(loaded) == weights_sha256(load_model(variant(tied), device="cpu"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_classifier_is_refused(variant, architecture: str):
    kind = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[architecture]
    where = variant(
        architecture, lambda s: without("lm_head")(s) | {"score.weight": torch.ones(2, 32)}, architectures=[kind]
    )
    message = refusal(where)
    assert f"config.json names {kind}, a classifier" in message


def test_tensors_of_another_shape_and_surplus_layers_are_refused(variant):
    message = refusal(variant("llama", lambda s: s | {DOWN: s[DOWN][:-1]}))
    assert (
        f"the checkpoint holds {DOWN} [47, 64] where the model has [48, 64]. Give the checkpoint that belongs"
        in message
    )
    fewer = refusal(variant("llama", num_hidden_layers=2))
    assert "the checkpoint holds model.layers.2." in fewer
    assert "Give the checkpoint that belongs to this config.json" in fewer
    assert "the checkpoint lacks model.layers.4." in refusal(variant("llama", num_hidden_layers=5))


def test_an_adapter_s_tensors_are_refused(variant, tiny_dirs):
    lora = {f"model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    assert "It holds an adapter: merge the adapter" in refusal(variant("llama", lambda s: s | lora))
    beside = variant("llama")
    (beside / "adapter_config.json").write_text("{}")
    assert "holds an adapter; merge it into its model" in refusal(beside)


def test_one_parameter_given_under_two_names_is_refused(variant):
    where = variant("llama", lambda s: s | {DOWN.removeprefix("model."): 2 * s[DOWN]})
    assert f"gives {DOWN} more than once ({DOWN.removeprefix('model.')} and {DOWN})" in refusal(where)


def test_whole_numbers_in_place_of_weights_are_refused(variant):
    where = variant("llama", lambda s: s | {DOWN: (100 * s[DOWN]).to(torch.int8)})
    assert f"holds {DOWN} as whole numbers" in refusal(where)


def test_a_parameter_that_the_model_s_code_lets_be_missing_is_refused(variant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM._keys_to_ignore_on_load_missing", ["lm_head.weight"])
    assert "the checkpoint lacks lm_head.weight" in refusal(variant("llama", without("lm_head")))
    assert load_model(variant("llama"), device="cpu").hf is not None


def test_buffers_that_older_versions_saved_are_let_through(variant):
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    same = weights_sha256(load_model(variant("llama"), device="cpu"))
    assert weights_sha256(load_model(variant("llama", lambda s: s | old), device="cpu")) == same
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    load_model(variant("gpt2", lambda s: s | masks), device="cpu")
    neox = {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    load_model(variant("gpt_neox", lambda s: s | neox), device="cpu")


def test_a_conversion_that_fails_names_the_tensors(tmp_path: Path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: Any = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tiny_tokenizer()), num_hidden_layers=1, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    load_model(tmp_path, device="cpu")
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "experts.2.w1" in name)
    save_file(without(gone)(tensors), tmp_path / "model.safetensors", {"format": "pt"})
    assert "do not fit the model: model.layers.0.mlp.experts.gate_up_proj" in refusal(tmp_path)


# --- files ---


def sharded(where: Path) -> Path:
    tiny_hf("llama").save_pretrained(where, max_shard_size="40KB")
    tiny_tokenizer(CHATML).save_pretrained(where)
    assert len(list(where.glob("*.safetensors"))) > 2
    return where


def test_shards_that_are_missing_truncated_or_short_of_tensors_are_refused(tmp_path: Path):
    for name, damage in {"gone": None, "cut": b"", "short": b"x"}.items():
        where = sharded(tmp_path / name)
        shard = sorted(where.glob("*.safetensors"))[1]
        if damage is None:
            shard.unlink()
        elif damage == b"":
            shard.write_bytes(shard.read_bytes()[:-100])
        else:
            tensors = load_file(shard)
            first = sorted(tensors)[0]
            save_file(without(first)(tensors), shard, {"format": "pt"})
            assert f"lacks {first}" in refusal(where)
        assert shard.name in refusal(where) or name == "short"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "more"])
def test_directory_with_a_pipe_is_refused_and_not_read_for_ever(tiny_dirs, tmp_path: Path, name: str):
    home = Path(shutil.copytree(tiny_dirs("llama"), tmp_path / "m"))
    (home / name).unlink(missing_ok=True)
    os.mkfifo(home / name)
    with pytest.raises(ModelError, match=f"holds {name}, which is neither a file nor a folder|without config.json"):
        load_model(home, device="cpu")


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors"])
def test_index_that_names_a_file_of_another_directory_is_refused(tiny_dirs, tmp_path: Path, outside: str):
    home = Path(shutil.copytree(tiny_dirs("llama"), tmp_path / "m"))
    (tmp_path / "other").mkdir()
    (home / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    names = load_file(tmp_path / "other" / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, outside)}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, home / "x.safetensors")
    with pytest.raises(ModelError, match="outside its own directory"):
        load_model(home, device="cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"weight_map": ["x"]}', '{"weight_map": {"a": 1}}', "null"])
def test_index_that_is_none_is_refused(tiny_dirs, tmp_path: Path, content: str):
    home = Path(shutil.copytree(tiny_dirs("llama"), tmp_path / "m"))
    (home / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="is no index of weights"):
        load_model(home, device="cpu")


def test_pickled_checkpoints_are_held_to_the_same(tmp_path: Path):
    def pickled(name: str, change: Callable[[Tensors], Tensors]) -> Path:
        where = tmp_path / name
        tiny_hf("llama").config.save_pretrained(where)
        tiny_tokenizer(CHATML).save_pretrained(where)
        torch.save(change(tiny_hf("llama").state_dict()), where / "pytorch_model.bin")
        return where

    whole = load_model(pickled("whole", dict), device="cpu", allow_pickle=True)
    assert weights_sha256(whole) == weights_sha256(load_model(sharded(tmp_path / "shards"), device="cpu"))
    assert f"lacks {DOWN}" in refusal(pickled("short", without(DOWN)), allow_pickle=True)
    twice = pickled("twice", lambda s: s | {DOWN.removeprefix("model."): s[DOWN]})
    assert f"gives {DOWN} more than once" in refusal(twice, allow_pickle=True)
    whole_numbers = pickled("int", lambda s: s | {DOWN: s[DOWN].to(torch.int8)})
    assert f"holds {DOWN} as whole numbers" in refusal(whole_numbers, allow_pickle=True)


# --- numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(variant, value: float):
    def put(s: Tensors) -> Tensors:
        s[DOWN][3, 5] = value
        return s

    assert f"{DOWN} holds NaN or infinity in torch.float32" in refusal(variant("llama", put))


def test_weights_too_large_for_a_type_are_refused_in_it_and_read_in_another(variant):
    def put(s: Tensors) -> Tensors:
        s[DOWN][3, 5] = 1e5
        return s

    where = variant("llama", put)
    assert f"{DOWN} holds NaN or infinity in torch.float16" in refusal(where, dtype="float16")
    assert float(load_model(where, device="cpu").hf.state_dict()[DOWN][3, 5]) == 1e5


def test_errors_are_told_on_one_line_with_what_follows_a_heading():
    assert one_line(RuntimeError("Error(s) in loading:\n\tlm_head is odd\n")) == "Error(s) in loading: lm_head is odd"
    assert one_line(KeyError()) == "KeyError"


# --- remote code ---

REMOTE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd_llama"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("tones", torch.arange(1000.0) + 1, persistent=False)
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with code of its own, whose constructor computes a buffer that is not saved."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    where = tmp_path / "odd"
    tiny_hf("llama").save_pretrained(where)
    tiny_tokenizer(CHATML).save_pretrained(where)
    (where / "odd.py").write_text(REMOTE)
    config = json.loads((where / "config.json").read_text())
    config |= {"model_type": "odd_llama", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (where / "config.json").write_text(json.dumps(config))
    return where


def test_remote_code_has_the_buffers_that_its_constructor_computes(remote: Path):
    for _ in range(3):
        hf: Any = load_model(remote, device="cpu", trust_remote_code=True).hf
        assert hf.is_custom_code()
        assert torch.equal(hf.tones, torch.arange(1000.0) + 1)
    assert torch.equal(hf.model.rotary_emb.inv_freq, tiny_hf("llama").model.rotary_emb.inv_freq)


def test_remote_code_is_held_to_its_tensors_too(remote: Path):
    tensors = load_file(remote / "model.safetensors")
    save_file(without(DOWN)(tensors), remote / "model.safetensors", {"format": "pt"})
    assert f"lacks {DOWN}" in refusal(remote, trust_remote_code=True)


# --- hashes ---


def test_the_hash_is_of_the_weights_in_memory_whatever_the_files(variant, tmp_path: Path):
    one = load_model(variant("llama"), device="cpu")
    before = weights_sha256(one)
    assert before == weights_sha256(load_model(sharded(tmp_path / "shards"), device="cpu"))
    with torch.no_grad():
        one.hf.state_dict()[DOWN][0, 0] += 1
    changed = weights_sha256(one)
    assert changed != before
    one.hf.model.layers[1].mlp.down_proj.weight.data[0, 0] -= 1
    replaced = torch.nn.Parameter(one.hf.lm_head.weight + 1, requires_grad=False)
    one.hf.lm_head.weight = replaced
    assert weights_sha256(one) not in (before, changed)
    assert weights_sha256(load_model(variant("llama"), device="cpu", dtype="bfloat16")) != before


def test_swapped_tensors_another_shape_and_buffers_change_the_hash(variant):
    one = load_model(variant("llama"), device="cpu")
    seen = [weights_sha256(one)]
    first, second = (one.hf.model.layers[i].self_attn.q_proj for i in (0, 1))
    first.weight, second.weight = second.weight, first.weight
    seen.append(weights_sha256(one))
    one.hf.model.norm.weight.data = one.hf.model.norm.weight.data.reshape(2, -1)
    seen.append(weights_sha256(one))
    one.hf.register_buffer("kept", torch.tensor(True))
    seen.append(weights_sha256(one))
    one.hf.register_buffer("left", torch.ones(2), persistent=False)
    assert weights_sha256(one) == seen[-1]
    assert len(set(seen)) == 4


def test_tied_weights_have_the_hash_of_equal_ones(variant):
    tied = load_model(variant("gpt2"), device="cpu")
    before = weights_sha256(tied)
    tied.hf.lm_head.weight = torch.nn.Parameter(tied.hf.lm_head.weight.clone())
    assert weights_sha256(tied) == before
    assert before != weights_sha256(load_model(variant("llama"), device="cpu"))


def test_the_vocabulary_s_hash_does_not_depend_on_how_the_tokenizer_was_called():
    one, other = tiny_tokenizer(), tiny_tokenizer(CHATML)
    before = vocabulary_sha256(one)
    one(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert vocabulary_sha256(one) == before == vocabulary_sha256(other)
    one.add_tokens(["kvpatch"])
    assert vocabulary_sha256(one) != before


# --- GGUF files and what they are converted to ---


@pytest.fixture
def gguf_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`gguf_of(drop, **more)`: the tiny GGUF without some tensors, and with more."""
    add = gguf.GGUFWriter.add_tensor

    def write(*drop: str, **more: np.ndarray) -> Path:
        def changed(self: gguf.GGUFWriter, name: str, tensor: np.ndarray) -> None:
            if name not in drop:
                add(self, name, tensor)
            if name == "output_norm.weight":
                for extra, value in more.items():
                    add(self, extra.replace("__", "."), value)

        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", changed)
        write_gguf(tmp_path / "tiny.gguf")
        return tmp_path / "tiny.gguf"

    return write


def test_a_gguf_without_all_tensors_is_refused_and_leaves_nothing(gguf_of, tmp_path: Path):
    message = refusal(gguf_of("blk.1.ffn_down.weight"))
    assert f"lacks {DOWN}" in message
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()]


def test_a_gguf_with_tensors_that_have_no_place_is_refused(gguf_of):
    assert "probably rope_freqs.weight" in refusal(gguf_of(rope_freqs__weight=np.full(4, 8, np.float32)))


def test_a_gguf_with_weights_that_are_not_finite_is_refused(gguf_of):
    path = gguf_of("output_norm.weight", output_norm__weight=np.full(48, np.nan, np.float32))
    assert "model.norm.weight holds NaN or infinity" in refusal(path)


def test_a_gguf_without_a_head_of_its_own_is_tied(gguf_of):
    loaded = load_model(gguf_of("output.weight"), device="cpu")
    assert loaded.hf.lm_head.weight is loaded.hf.model.embed_tokens.weight


def test_a_converted_model_that_was_changed_is_refused_and_a_copied_one_is_read(gguf_of):
    path = gguf_of()
    loaded = load_model(path, device="cpu")
    where = loaded.directory
    assert where is not None
    weights = where / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert weights_sha256(load_model(path, device="cpu")) == weights_sha256(loaded)
    assert json.loads((where / note.NOTE).read_text())["files"]["model.safetensors"]["mtime_ns"] == 1
    tensors = load_file(weights)
    save_file(tensors | {DOWN: 2 * tensors[DOWN]}, weights, {"format": "pt"})
    message = refusal(path)
    assert "model.safetensors is not what was written" in message
    assert "delete that directory to convert it again" in message
    shutil.rmtree(where)
    load_model(path, device="cpu")
    (where / "config.json").write_text((where / "config.json").read_text().replace("10000.0", "500.0"))
    assert "config.json is not what was written" in refusal(path)
    (where / note.NOTE).write_text("{")
    assert f"its note {note.NOTE}" in refusal(path)


def test_a_note_of_an_older_version_is_believed_where_its_hash_is_that_of_the_files(gguf_of):
    where = load_model(path := gguf_of(), device="cpu").directory
    assert where is not None
    digest = hashlib.sha256((where / "model.safetensors").read_bytes()).digest()
    old = {"weights_sha256": hashlib.sha256(b"model.safetensors" + digest).hexdigest(), "gguf_bytes": 1}
    (where / note.NOTE).write_text(json.dumps(old))
    load_model(path, device="cpu")
    assert "files" in json.loads((where / note.NOTE).read_text())
    (where / note.NOTE).write_text(json.dumps(old | {"weights_sha256": "0" * 64}))
    assert "was changed" in refusal(path)
