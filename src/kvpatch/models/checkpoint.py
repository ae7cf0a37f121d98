"""Is a loaded model the one in its files? Refused by name: tensors that are missing, left over, of another shape, given
twice, or not numbers.

transformers fills a missing tensor with random numbers and leaves an unknown one aside, with no more than a warning.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kvpatch.errors import ModelError
from kvpatch.files import read_json
from kvpatch.models.placement import with_numbers
from kvpatch.models.told import damage, one_line

NAMED_AT_MOST = 3
COMPUTED = re.compile(r"(^|\.)(masked_bias|position_ids|rotary_emb\.(inv_freq|(cos|sin)_cached))$")
"""Buffers that older versions saved and every version computes anew."""
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_PREFIXES = {
    "base_model.model.": "an adapter's names begin so: merge the adapter (merge_and_unload) and save again",
    "_orig_mod.": "torch.compile wraps a model so: save its ._orig_mod",
    "module.": "DataParallel and DistributedDataParallel wrap a model so: save its .module",
    "_fsdp_wrapped_module.": "FSDP wraps a model so: save the model's full state dict",
}


def refuse_incomplete(hf: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model whose checkpoint has not just the tensors that it should have.

    Args:
        info: what transformers tells of the loading (`output_loading_info`), mismatched sizes let through.
    Raises:
        ModelError: naming the first of the tensors.
    """
    buffers = {name for name, _ in hf.named_buffers()} - set(hf.state_dict())
    prefix = f"{hf.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    unexpected = sorted(
        name
        for name in info["unexpected_keys"]
        if not COMPUTED.search(name) and not {name, prefix + name, name.removeprefix(prefix)} & buffers
    )
    mismatched = sorted(info["mismatched_keys"])
    faults = []
    if missing:
        faults.append(f"lacks {_some(missing)}, which would be left untrained")
    if unexpected:
        faults.append(f"holds {_some(unexpected)}, which {type(hf).__name__} has no place for")
    if mismatched:
        shapes = [f"{name} {list(found)} where the model has {list(wanted)}" for name, found, wanted in mismatched]
        faults.append(f"holds {_some(shapes)}")
    faults += [" ".join(str(message).split()) for message in info.get("error_msgs") or []]
    if faults:
        others = unexpected or [name for name, *_ in mismatched]
        raise ModelError(f"the checkpoint {'; it '.join(faults)}. {_advice(hf, missing, others)}")


def refuse_doubtful_names(hf: PreTrainedModel, tensors: Sequence[tuple[str, str]]) -> None:
    """Refuse what transformers loads without a word: two tensors for one parameter, whole numbers for a floating one,
    and a missing parameter that the model's code says may be missing.

    Args:
        tensors: name and type of every tensor of the checkpoint, see `tensors_of`.
    Raises:
        ModelError: naming the first of the tensors.
    """
    names = hf.state_dict()
    prefix = f"{hf.base_model_prefix}."

    def landing(name: str) -> str:
        """The parameter a tensor goes to; transformers takes the model's prefix away, or puts it before."""
        bare = name.removeprefix(prefix)
        return bare if bare != name and bare in names else prefix + name if prefix + name in names else name

    lands = [(landing(name), name, dtype) for name, dtype in tensors]
    often = Counter(place for place, _, _ in lands)
    if twice := sorted(place for place, count in often.items() if count > 1):
        both = [name for place, name, _ in lands if place == twice[0]]
        raise ModelError(
            f"the checkpoint gives {_some(twice)} more than once ({' and '.join(both)}); "
            "keep the one that is meant and save it again"
        )
    floating = {name for name, tensor in names.items() if tensor.is_floating_point()}
    whole = [name for place, name, dtype in lands if dtype in INTEGERS and place in floating]
    if whole and getattr(hf.config, "quantization_config", None) is None:
        raise ModelError(
            f"the checkpoint holds {_some(whole)} as whole numbers, and config.json names no quantisation that would "
            "say what they stand for; save the model in a floating type"
        )
    may_lack = hf._keys_to_ignore_on_load_missing
    if not may_lack or not tensors:
        return
    ignored = re.compile("|".join(f"({pattern})" for pattern in may_lack))
    given = {names[place].data_ptr() for place in often if place in names}
    lacking = [
        name
        for name, parameter in hf.named_parameters(remove_duplicate=False)
        if ignored.search(name)
        and not parameter.is_meta  # offloaded, so it was found in a file
        and parameter.data_ptr() not in given
        and bool(parameter.count_nonzero())
    ]
    if lacking:
        raise ModelError(
            f"the checkpoint lacks {_some(lacking)}, which would be left untrained. {_advice(hf, lacking, [])}"
        )


def refuse_unread(hf: PreTrainedModel, gguf: Path) -> None:
    """Refuse a GGUF file that holds more numbers than the model took; transformers leaves unknown tensors aside.

    Raises:
        ModelError: naming the tensors that have no place in the model.
    """
    reader = GGUFReader(gguf)
    left = sum(int(t.n_elements) for t in reader.tensors) - sum(p.numel() for p in hf.parameters())
    if left <= 0:
        return
    named = {value: key for key, value in MODEL_ARCH_NAMES.items()}
    architecture = reader.get_field("general.architecture")
    name_map = get_tensor_name_map(named[architecture.contents()], len(reader.tensors)) if architecture else None
    stems = [name.rpartition(".") for name in hf.state_dict()]
    taken = {f"{name_map.get_name(stem)}.{kind}" for stem, _, kind in stems} if name_map else set()
    unread = [t.name for t in reader.tensors if t.name not in taken]
    raise ModelError(
        f"{left} numbers of {gguf.name} have no place in {type(hf).__name__} (probably {_some(unread)}), so it would "
        "not be the same model; give the model as safetensors"
    )


@torch.no_grad()
def recompute_buffers(hf: PreTrainedModel) -> None:
    """Give a model of remote code the buffers that its constructor computes and no checkpoint holds.

    transformers makes models without memory and computes such buffers again for its own classes alone; in remote code
    it leaves whatever the memory held.
    """
    kept = set(hf.state_dict())
    if not hf.is_custom_code() or all(name in kept for name, _ in hf.named_buffers()):
        return
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(hf)(copy.deepcopy(hf.config)).named_buffers())
    for name, buffer in hf.named_buffers():
        if name not in kept and name in fresh and not fresh[name].is_meta:
            buffer.copy_(fresh[name])


def refuse_not_finite(hf: PreTrainedModel) -> None:
    """Refuse a model with a parameter that is not finite, or a buffer that is not a number (masks may hold infinities).

    Raises:
        ModelError: naming the first of the tensors.
    """
    with_nan = {
        name: bool(tensor.float().isnan().any())
        for name, tensor in with_numbers(hf, hf.named_parameters())
        if not _is_finite(tensor)
    }
    with_nan |= {
        name: True
        for name, tensor in with_numbers(hf, hf.named_buffers())
        if not _is_finite(tensor) and bool(tensor.float().isnan().any())
    }
    if with_nan:
        found, kind = list(with_nan), "NaN" if any(with_nan.values()) else "infinite"
        raise ModelError(
            f"{_some(found)} {'hold' if len(found) > 1 else 'holds'} NaN or infinity in {hf.dtype} ({kind} weights); "
            "fetch the checkpoint again, or load it in a type with more room (float32)"
        )


def tensors_of(directory: Path) -> list[tuple[str, str]]:
    """Name and type of every tensor that transformers reads from a checkpoint's directory; a name comes as often as
    there are files with it. Nothing where the weights have other file names than transformers' own."""
    for single, suffix in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        index = directory / f"{single}.index.json"
        if (directory / single).exists():
            files = [single]
        elif index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        else:
            continue
        read = _of_safetensors if suffix == "safetensors" else _of_pickle
        return [found for file in files for found in read(directory / file)]
    return []


def refuse_damaged(directory: Path) -> None:
    """Refuse a safetensors file that can't be opened, an index that names a file that is not there or is another
    directory's, and what is neither a file nor a folder, such as a pipe, which whoever opens it would wait for.

    Raises:
        ModelError: naming the file.
    """
    if odd := [path.name for path in sorted(directory.iterdir()) if path.exists() and not _is_ordinary(path)]:
        raise ModelError(f"{directory} holds {_some(odd)}, which is neither a file nor a folder; take it away")
    for path in sorted(directory.glob("*.safetensors")):
        try:
            safe_open(path, framework="pt")
        except Exception as error:
            raise ModelError(f"{directory}: {damage(path, error)}") from error
    for index in sorted(directory.glob("*.safetensors.index.json")):
        try:
            named = {PurePath(name) for name in read_json(index)["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{directory}: {index.name} is no index of weights; fetch it again") from error
        if outside := sorted(str(name) for name in named if name.is_absolute() or ".." in name.parts):
            raise ModelError(
                f"{directory}: {index.name} names {_some(outside)}, outside its own directory; put the files together"
            )
        if lacking := sorted(str(name) for name in named if not (directory / name).exists()):
            raise ModelError(f"{directory}: {index.name} names {_some(lacking)}, not there; fetch the model again")


def _is_ordinary(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def refuse_other_vocabulary(hf: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer that is another model's: one with tokens that the model has no embedding for, or with less
    than half of those that it has. (Embeddings are often padded to a round number.)

    Raises:
        ModelError: with both numbers.
    """
    embedding: Any = hf.get_input_embeddings()
    rows, known = len(embedding.weight), getattr(tokenizer, "get_vocab", dict)()
    # A special token that was added later (for padding, say) never comes out of a text.
    added = getattr(tokenizer, "get_added_vocab", dict)()
    last = max((i for token, i in known.items() if token not in added), default=-1)
    if last >= rows:
        raise ModelError(
            f"the tokenizer has tokens up to id {last}, the model embeddings for {rows} (0 to {rows - 1}): the "
            "tokenizer is another model's"
        )
    if known and 2 * len(known) < rows:
        raise ModelError(
            f"the tokenizer knows {len(known)} tokens, the model embeds {rows}: the tokenizer is another model's; give "
            "the one that was saved with the model"
        )


class Reports(logging.Handler):
    """Keeps transformers' loading report while a model loads: some of its errors say no more than "see the report"."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.logger = logging.getLogger("transformers.modeling_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()

    def __enter__(self) -> Reports:
        self.before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self)
        self.logger.setLevel(logging.WARNING)
        self.logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        level, self.logger.propagate = self.before
        self.logger.setLevel(level)

    def explain(self, error: Exception) -> str:
        """One line that says why a model did not load."""
        rows = [line.split("|") for line in self.lines if line.count("|") > 1]
        said = [f"{row[0].strip()} ({row[1].strip().lower()})" for row in rows if row[1].strip().isupper()]
        if "report" in str(error).lower() and said:
            return (
                f"the checkpoint's tensors do not fit the model: {_some(said)}; give the checkpoint of this config.json"
            )
        return one_line(error)


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is; a sum is finite only if they are, and costs no memory."""
    if not tensor.is_floating_point():
        return True
    tensor = tensor.float() if tensor.element_size() < 2 else tensor  # 8-bit floats have neither operation
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _of_safetensors(path: Path) -> list[tuple[str, str]]:
    with safe_open(path, framework="pt") as file:
        return [(name, file.get_slice(name).get_dtype()) for name in file.keys()]


def _of_pickle(path: Path) -> list[tuple[str, str]]:
    kinds = {torch.bool: "BOOL", torch.uint8: "U8"}
    kinds |= {getattr(torch, f"int{bits}"): f"I{bits}" for bits in (8, 16, 32, 64)}
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return [(name, kinds.get(tensor.dtype, "")) for name, tensor in tensors.items() if isinstance(tensor, Tensor)]


def _some(names: Collection[str]) -> str:
    """The first few names, and how many there are more."""
    first = ", ".join(list(names)[:NAMED_AT_MOST])
    return first if len(names) <= NAMED_AT_MOST else f"{first} and {len(names) - NAMED_AT_MOST} more"


def _advice(hf: PreTrainedModel, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What to do about missing and unexpected tensors."""
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "It holds an adapter: merge the adapter into the model (merge_and_unload) and save again"
    for prefix, why in _PREFIXES.items():
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            return f"The names begin with {prefix}; {why}"
    wanted = set(missing)
    for name in unexpected:
        parts = name.split(".")
        if tail := next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted), 0):
            return f"The names begin with {'.'.join(parts[:tail])}. ; save the model itself, so that they begin without"
    own = type(hf).__name__
    saved = (hf.config.architectures or [own])[0]
    head = {f"{name}.weight" for name, module in hf.named_modules() if module is hf.get_output_embeddings()}
    if saved != own:
        return f"config.json names {saved}; give a checkpoint of a causal language model ({own})"
    if missing and wanted <= head:
        return (
            "The model's head is not there, and config.json does not tie it to the embeddings; save the whole causal "
            "language model, not its backbone alone"
        )
    if unexpected:
        return "Give the checkpoint that belongs to this config.json"
    return "The checkpoint is not whole; fetch it or save it again"
