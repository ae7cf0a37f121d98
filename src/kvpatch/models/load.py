"""Find a model by name, hub id, directory or GGUF file, convert it once if need be, and load it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvpatch.caches.devices import device_of
from kvpatch.errors import ModelError
from kvpatch.files import cache_directory, held, is_directory, is_file, read_json
from kvpatch.models.checkpoint import (
    Reports,
    recompute_buffers,
    refuse_damaged,
    refuse_doubtful_names,
    refuse_incomplete,
    refuse_not_finite,
    refuse_other_vocabulary,
    refuse_unread,
    tensors_of,
)
from kvpatch.models.fingerprint import tensors_sha256
from kvpatch.models.fp8 import FP8, bytes_saved, make_fp8, refuse_unfit
from kvpatch.models.hub import fetch_from_hub
from kvpatch.models.kinds import auto_class
from kvpatch.models.makers import made_model
from kvpatch.models.named import (
    Progress,
    cache_key,
    cached_model,
    fetch_gguf,
    hub_models,
    kept_gguf,
    named_models,
    part_of,
    refuse_unknown,
    unconverted_gguf,
    unwritable_cache,
)
from kvpatch.models.note import refuse_changed, write_note
from kvpatch.models.placement import (
    POLICIES,
    DeviceMap,
    expanded,
    offload_folder,
    read_device_map,
    refuse_too_large,
    usual_device,
)
from kvpatch.models.precision import QUANTISED, Precision, precision_of
from kvpatch.models.told import one_line, why_unread
from kvpatch.specs.arguments import shown, switch

OWNERLESS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt")
"""Models of the hub that are mostly named without their owner."""
CONVERSION = 2
"""Version of the conversion from GGUF; part of the cache path, so that a changed conversion converts again. Since 2 a
file that lacks tensors is refused."""


@dataclass(frozen=True)
class Loaded:
    """A model on its device, with its tokenizer and the name that a run records.

    is_held: whether it was in memory already, so that nothing on disk tells what it is.
    revision: the hub's commit, of a model that came from there.
    """

    hf: PreTrainedModel
    tokenizer: Any
    name: str
    directory: Path | None
    is_converted: bool
    is_held: bool = False
    revision: str | None = None

    @property
    def published_name(self) -> str:
        """The name as a run stores it: of a path on this machine its last part; the hashes say which model it is."""
        path = _place(self.name)
        is_here = path.is_absolute() or is_directory(path) or is_file(path)
        return path.resolve().name if is_here else self.name


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: a named model, an organism, a local directory, a `.gguf` file, or a hub id.
        device: "cuda" where there is one, else "cpu".
        dtype: float32 on a CPU, bfloat16 elsewhere. "auto" on a CPU: bfloat16 where the processor multiplies it faster.
            "int8" and "int4" quantise the weights with bitsandbytes; "fp8" makes them 8 floating bits.
        device_map: splits the model over devices, or offloads parts to memory or disk, in place of `device`: "auto",
            or names of modules with their devices (`placement.read_device_map`).
        allow_pickle: also take weights in pickled files, which can run code when read.
        trust_remote_code: run modelling code that comes with the model.
        revision: of a hub model, a branch, a tag or a commit.
        progress: told what is being fetched or converted.
    Raises:
        ModelError: where the model can't be found, read or trusted.
    """
    report = progress or (lambda what, done, total: None)
    if device is not None and device_map is not None:
        raise ModelError("device and device_map both say where a model goes; give one of them")
    placed = None if device_map is None else read_device_map(device_map)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    device = str(device_of(usual if device is None else device, error=ModelError))
    allow_pickle = switch("allow_pickle", allow_pickle, error=ModelError)
    trust_remote_code = switch("trust_remote_code", trust_remote_code, error=ModelError)
    if revision is not None and not isinstance(revision, str):
        raise ModelError(f"revision must be a branch, a tag or a commit of a hub model, got {shown(revision)}")
    precision = _precision(dtype, device, placed)
    found, is_converted = resolve(str(name), report)
    if isinstance(found, Path) and revision is not None:
        raise ModelError(f"a revision is of a hub model (owner/name), which {name} is not; leave it out")
    if isinstance(found, Path):
        where, commit = found, None
    else:
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        where = fetch_from_hub(found, report, revision=revision, **allowed)
        commit = where.name
    if is_converted:
        refuse_changed(where, str(name) if str(name) in named_models() else None)
    _refuse_unreadable(where, allow_pickle)
    settings = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **settings)
            hf = _read(where, precision, placed or device, allow_pickle, settings)
            refuse_other_vocabulary(hf, tokenizer)
        except Exception as error:
            raise ModelError(f"{name}: {why_unread(error, where)}") from error
    return Loaded(hf, tokenizer, str(name), where, is_converted, revision=commit)


def _precision(dtype: str | torch.dtype | None, device: str, placed: str | dict[str, Any] | None) -> Precision:
    """What a type means on a device, or on those of a map, which take no fp8 weights."""
    found = precision_of(dtype, device if placed is None else usual_device(placed))
    if found.quantised == FP8:
        refuse_unfit(None if placed is not None else torch.device(device))
    return found


def _read(
    where: Path, precision: Precision, place: str | dict[str, Any], allow_pickle: bool, settings: dict[str, Any]
) -> PreTrainedModel:
    """A model of a directory, its weights whole, finite and where they belong.

    Args:
        place: a device, or a map as `placement.read_device_map` gives it.
        settings: what each of transformers' readers is given.
    """
    config = AutoConfig.from_pretrained(where, **settings)
    auto = auto_class(config)
    use: dict[str, Any] = precision.settings | {"use_safetensors": None if allow_pickle else True}
    is_device = isinstance(place, str) and place not in POLICIES
    is_quantised_there = bool(getattr(config, "quantization_config", None))
    if precision.quantised == FP8 and is_quantised_there:
        raise ModelError("the checkpoint is quantised already, and fp8 weights are made of whole ones; leave dtype out")
    if is_device and (precision.quantised in QUANTISED or is_quantised_there):
        place, is_device = {"": place}, False  # quantised weights are made on their device and can't be moved
    if not is_device:
        with torch.device("meta"):
            modules = auto.from_config(config, trust_remote_code=settings["trust_remote_code"])
        use |= {"device_map": expanded(place, modules), "offload_folder": str(offload_folder())}
    hf, info = _from_pretrained(where, auto, generation_config=_generation_tokens(where), **use, **settings)
    refuse_incomplete(hf, info)
    recompute_buffers(hf)
    refuse_doubtful_names(hf, tensors_of(where))
    if precision.quantised == FP8:
        refuse_not_finite(hf)
        refuse_too_large(hf, torch.device(str(place)), saved=bytes_saved(hf))
        make_fp8(hf, torch.device(str(place)))
        return hf.to(device=torch.device(str(place))).requires_grad_(False)
    if is_device:
        refuse_too_large(hf, torch.device(str(place)))
        hf.to(device=torch.device(str(place)))
    refuse_not_finite(hf)
    return hf.requires_grad_(False)


def _refuse_unreadable(where: Path, allow_pickle: bool) -> None:
    """Refuse a directory whose weights can't be read, or not without being asked to."""
    if (where / "adapter_config.json").exists():
        raise ModelError(f"{where} holds an adapter; merge it into its model (merge_and_unload) and save that")
    if not allow_pickle and not any(where.glob("*.safetensors")):
        found = "pickled weights only (allow_pickle=True reads them)" if any(where.glob("*.bin")) else "no weights"
        raise ModelError(f"{where} holds {found}; kvpatch reads safetensors and GGUF")
    refuse_damaged(where)


def _generation_tokens(where: Path) -> GenerationConfig:
    """Of a model's generation settings the special tokens alone. kvpatch decodes by itself, so that penalties, beams
    and the like say nothing here, and settings that transformers finds contradictory are no reason to refuse a model.
    """
    for file in ("generation_config.json", "config.json"):
        try:
            content = read_json(where / file)
        except (OSError, ValueError):  # no such file, or no settings in it
            continue
        if isinstance(content, dict):
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            return GenerationConfig(**{name: content[name] for name in names if content.get(name) is not None})
    return GenerationConfig()


def _place(name: str) -> Path:
    """A name as a path, with the user's home written out where there is one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the home of a user that there is not
        return Path(name)


def resolve(name: str, report: Progress) -> tuple[Path | str, bool]:
    """The directory (or hub id) to load, and whether kvpatch made it; a GGUF is converted once."""
    path = _place(name)
    if (made := made_model(name, cache_directory())) is not None:
        return made, False
    if name in named_models():
        return _converted(name, cache_key(name), report), True
    if name in (of_hub := hub_models()) and not is_directory(path):
        return of_hub[name].repository, False
    if is_file(path):
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but not a .gguf file; give a .gguf file or a model directory")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _converted(str(path.resolve()), f"gguf-{digest[:24]}-v{CONVERSION}", report), True
    if is_directory(path):
        if not (path / "config.json").exists():
            raise ModelError(f"{name} is a directory without config.json; give a model saved by transformers")
        return path, False
    if name in OWNERLESS:
        return f"openai-community/{name}", False
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name:
        known = ", ".join([*named_models(), *hub_models()])
        raise ModelError(
            f"no model {name!r}: not one of {known}, nor a directory, a .gguf file or a hub id (owner/name)"
        )
    return name, False


def pull(name: str, progress: Progress | None = None, *, again: bool = False) -> Path:
    """Fetch and convert a named model; returns its directory. again: also where it is there already, in place of that.

    Raises:
        ModelError: for an unknown name or a failed download.
    """
    if name in hub_models():
        return fetch_from_hub(hub_models()[name].repository, progress or (lambda what, done, total: None))
    refuse_unknown(name)
    if again:
        return _converted(name, cache_key(name), progress or (lambda what, done, total: None), again=True)
    where, _ = resolve(name, progress or (lambda what, done, total: None))
    return Path(where)


def weights_sha256(loaded: Loaded) -> str:
    """Hash of the weights as they are in memory now; see `fingerprint.tensors_sha256`."""
    return tensors_sha256(loaded.hf)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the tokenizer's vocabulary, merges and special tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template, None where there is none."""
    template = tokenizer.chat_template
    return None if not template else hashlib.sha256(json.dumps(template).encode()).hexdigest()


def _converted(source: str, key: str, report: Progress, *, again: bool = False) -> Path:
    """The safetensors directory of a named model or GGUF file, made once, also where other processes want it.

    again: made anew, and then put in the place of what is there.
    """
    home = cached_model(key)
    if home.exists() and not again:
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with held(Path(f"{home}.lock")), part_of(home) as folder:
            if home.exists() and not again:
                return home
            part = folder
            made = part / "model"
            if source in named_models():
                kept = None if again else kept_gguf(source)
                _convert(kept or fetch_gguf(source, part, report), made, report)
            else:
                _convert(Path(source), made, report)
            if home.exists():
                os.replace(home, part / "before")
            os.replace(made, home)
            if source in named_models():
                shutil.rmtree(unconverted_gguf(source).parent, ignore_errors=True)
    except OSError as error:
        raise unwritable_cache(home.parent, error) from error
    return home


def _convert(gguf: Path, out: Path, report: Progress) -> None:
    """Read a GGUF, dequantise it, and save it as safetensors with its tokenizer."""
    from transformers import GgufConfig

    size = gguf.stat().st_size
    report(f"converting {gguf.name} to safetensors", 0, size)
    with open(gguf, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf.name} is not a GGUF file, or is damaged")
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            hf, info = _from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            refuse_incomplete(hf, info)
            refuse_unread(hf, gguf)
            refuse_not_finite(hf)
            hf.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except OSError:
            shutil.rmtree(out, ignore_errors=True)
            raise
        except Exception as error:
            raise ModelError(f"{gguf.name} can't be read as a GGUF: {one_line(error)}") from error
    write_note(out, {"converted_from": gguf.name, "gguf_bytes": size, "weights_sha256": tensors_sha256(hf)})
    report(f"converting {gguf.name} to safetensors", size, size)


def _from_pretrained(
    where: Path | str, auto: Any = AutoModelForCausalLM, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A causal language model, made by a class of transformers, and what transformers tells of its loading.

    Raises:
        ModelError: where the tensors can't be put into the model at all.
    """
    with Reports() as reports:
        try:
            loaded: Any = auto.from_pretrained(
                where, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
            return loaded
        except RuntimeError as error:
            raise ModelError(reports.explain(error)) from error


class _quiet:
    """Silence transformers' own progress bars and warnings while it loads, and accelerate's."""

    def __enter__(self) -> None:
        self.accelerate = logging.getLogger("accelerate")
        self.accelerate_level = self.accelerate.level
        self.accelerate.setLevel(logging.ERROR)
        self.level = transformers_logging.get_verbosity()
        self.has_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.level)
        self.accelerate.setLevel(self.accelerate_level)
        if self.has_bars:
            transformers_logging.enable_progress_bar()
