"""Weights of 8 floating bits: float8_e4m3fn numbers with one float32 scale per output, and products by them.

    x [rows, inner] -> each row over its largest number -> e4m3 numbers and one scale per row
      -> products of e4m3 numbers, summed in float32 -> times both scales -> bfloat16

`Fp8Linear` takes the place of `nn.Linear` in a loaded model, so that the model's own forward pass and the engine use
the same numbers. On a GPU the product is `torch._scaled_mm`, and one Triton kernel makes a row's numbers. On a
processor both sides are multiplied as the float32 numbers that they stand for: slow, and meant for trying things out.

A row's numbers depend on the row alone. They are the same to the bit from the kernel and from torch, on any device:
nothing is multiplied or divided but by rules of IEEE 754.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpatch.errors import ModelError
from kvpatch.models.e4m3 import NUMBERS, Rounded, rows_by_torch, vectors_by_torch
from kvpatch.models.kinds import decoder_of

FP8 = "fp8"
"""What such weights are called, as `--dtype` takes it and run.json keeps it."""
MULTIPLE = 16
"""The products want outputs and inner dimension to be multiples of this. Other layers stay as they are."""
FAST_ACCUM = True
"""Whether a GPU may sum in the short registers of its tensor cores all the way, which is faster and rounds more."""
LEAST_ROWS = 16
"""Fewer rows are filled up to these before they are multiplied on a GPU."""
CAPABILITY = (8, 9)
"""The first compute capability of GPUs that multiply such numbers (Ada; Hopper is 9.0)."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight: number [i, j] stands for numbers[i, j] * scale[i]."""

    numbers: Tensor  # [outputs, inner], float8_e4m3fn
    scale: Tensor  # [outputs], float32

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> torch.Size:
        """[outputs, inner]."""
        return self.numbers.shape

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for, in a floating type."""
        return (self.numbers.float() * self.scale[:, None]).to(dtype)


Weight = Tensor | ScaledWeight
"""A matrix that a step multiplies by."""
Input = Tensor | Rounded
"""Rows that a step multiplies: whole, or in e4m3 already where the kernel that made them was told of the weight."""


class Fp8Linear(nn.Module):
    """x @ weight.T + bias with a weight of 8 floating bits."""

    def __init__(self, weight: ScaledWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.numbers, requires_grad=False)
        self.scale = nn.Parameter(weight.scale, requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias of x [..., inputs]."""
        return scaled_linear(x, ScaledWeight(self.weight, self.scale), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.no_grad()
def scaled(weight: Tensor) -> ScaledWeight:
    """A weight [outputs, inner] in 8 floating bits, each output over its own largest number."""
    numbers, scale = rows_by_torch(weight)
    return ScaledWeight(numbers, scale[:, 0])


def rows_of(x: Input) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 numbers and the scale of each, see `e4m3.rows_by_torch`; on a GPU by one kernel where there is
    Triton. Of rows that are rounded already what they are."""
    if isinstance(x, Rounded):
        return x.numbers, x.scale
    if x.device.type == "cuda" and (kernel := _kernel()) is not None:
        return kernel(x)
    return rows_by_torch(x)


@functools.cache
def _kernel() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The Triton kernel; None where it can't be had. Triton needs a compiler, and its errors have no common class."""
    if find_spec("triton") is None:
        return None
    try:
        from kvpatch.models.fp8_kernels import rows_by_triton

        rows_by_triton(torch.zeros(1, MULTIPLE, dtype=torch.bfloat16, device="cuda"))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    return rows_by_triton


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., dim] as e4m3 numbers [..., dim], and the scale of each, see `e4m3.vectors_by_torch`; on a GPU by
    one kernel where there is Triton."""
    if x.device.type == "cuda" and _kernel() is not None:
        from kvpatch.models.fp8_kernels import vectors_by_triton

        return vectors_by_triton(x)
    return vectors_by_torch(x)


def as_held(x: Tensor) -> Tensor:
    """What vectors [..., dim] are once they were rounded by `in_8_bits`, in their own type, which holds it."""
    numbers, scale = in_8_bits(x)
    return (numbers.float() * scale[..., None]).to(x.dtype)


def scaled_linear(x: Input, weight: ScaledWeight, bias: Tensor | None = None, *, whole: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of x [..., inner], in the type of x, which is bfloat16 on a GPU and of rows that are rounded.

    whole: on a processor, the weight's own numbers in float32 in oneDNN's layout, where somebody keeps them.
    """
    if isinstance(x, Rounded):
        rows, dtype, shape = x, torch.bfloat16, x.numbers.shape
    else:
        rows, dtype, shape = x.reshape(-1, x.shape[-1]), x.dtype, x.shape
    if are_activations_whole():
        assert isinstance(rows, Tensor)  # whoever makes rows asks `are_rounded_for` first
        out = F.linear(rows, weight.whole(dtype))
    elif weight.numbers.device.type == "cuda":
        out = product_by_torch(*rows_of(rows), weight)
    else:
        numbers, scale = rows_of(rows)
        sums = _float32_product(numbers.float(), weight.numbers.float() if whole is None else whole)
        out = (sums * scale * weight.scale).to(dtype)
    out = out if bias is None else out + bias
    return out.view(*shape[:-1], len(weight))


def product_by_torch(numbers: Tensor, scale: Tensor, weight: ScaledWeight) -> Tensor:
    """torch's product on a GPU of rows as `rows_of` gives them; [rows, outputs], bfloat16."""
    rows = len(numbers)
    if rows < LEAST_ROWS:
        numbers = F.pad(numbers.view(torch.uint8), (0, 0, 0, LEAST_ROWS - rows)).view(NUMBERS)
        scale = F.pad(scale, (0, 0, 0, LEAST_ROWS - rows), value=1.0)
    out = torch._scaled_mm(
        numbers,
        weight.numbers.t(),
        scale_a=scale,
        scale_b=weight.scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUM,
    )
    return out[:rows]


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T on a processor, a row's numbers its own (see `products`)."""
    if not torch.backends.mkldnn.is_available() or not x.numel():
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


_left_whole: ContextVar[bool] = ContextVar("left_whole", default=False)


@contextlib.contextmanager
def whole_activations() -> Iterator[None]:
    """Within the block what is multiplied stays as it is, also the keys and values that decoding holds, and weights are
    taken for the numbers that they stand for.

    Two ways to compute one thing then differ by the rounding of the model's type alone. With activations of 3 bits they
    differ far more: a number that was off by a hair falls to the other side of a step.
    """
    token = _left_whole.set(True)
    try:
        yield
    finally:
        _left_whole.reset(token)


def are_activations_whole() -> bool:
    """Whether a block of `whole_activations` is entered."""
    return _left_whole.get()


def are_rounded_for(weight: Weight | None) -> bool:
    """Whether rows that this weight multiplies are rounded to e4m3 first; not for none."""
    return isinstance(weight, ScaledWeight) and not are_activations_whole()


def has_fp8(hf: nn.Module) -> bool:
    """Whether some of a model's weights are of 8 floating bits."""
    return any(isinstance(module, Fp8Linear) for module in hf.modules())


def refuse_unfit(
    device: torch.device | None,
    what: str = "fp8 weights",
    instead: str = "use dtype='bfloat16', or 'int8' or 'int4'",
) -> None:
    """Refuse a device that does not compute with such numbers, or None for several.

    Args:
        what: is asked for. instead: what would do on an older GPU.
    Raises:
        ModelError: naming the device, and what would do.
    """
    if device is None:
        raise ModelError("fp8 weights lie on one device; give device in place of device_map, or another dtype")
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ModelError(f"{what} need an NVIDIA GPU of Hopper's kind or a processor, and not {device.type}")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}) has no fp8 products, "
            f"which begin at 8.9 (Ada, Hopper); {instead}"
        )


def bytes_saved(hf: PreTrainedModel) -> int:
    """How many bytes less the weights of a model take once `make_fp8` was over it."""
    linear = {id(m): m for _, _, m in _linear_layers(hf)}.values()
    return sum(m.weight.numel() * (m.weight.element_size() - 1) - 4 * m.out_features for m in linear)


@torch.no_grad()
def make_fp8(hf: PreTrainedModel, device: torch.device) -> None:
    """Turn the linear layers of a bfloat16 model's decoder into `Fp8Linear` on a device, one after the other.

    Embedding, norms and output head stay as they are, and where they are; so do layers whose outputs or inputs are no
    multiple of 16.

    Raises:
        ModelError: where the model has no such layers, or is of another type.
    """
    if hf.dtype != torch.bfloat16:
        raise ModelError(f"fp8 weights are made of bfloat16 ones, and {type(hf).__name__} is {hf.dtype}")
    made: dict[int, Fp8Linear] = {}
    kept: list[nn.Module] = []  # an identity is one as long as the object lives
    for parent, name, module in _linear_layers(hf):
        if id(module) not in made:
            own = cast("nn.Parameter | None", module.bias)
            bias = None if own is None else own.data.to(device)
            made[id(module)] = Fp8Linear(scaled(module.weight.data.to(device)), bias)
            kept.append(module)
            module.weight = nn.Parameter(module.weight.data.new_empty(0), requires_grad=False)
        setattr(parent, name, made[id(module)])
    if not made:
        raise ModelError(
            f"{type(hf).__name__} has no linear layers in its decoder that fp8 weights could stand in for (outputs and "
            "inputs must be multiples of 16); leave the dtype out"
        )


def _linear_layers(hf: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers that fp8 weights stand in for: whose child each is, its name there, and itself."""
    head = hf.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in decoder_of(hf).modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
        if child.in_features % MULTIPLE == child.out_features % MULTIPLE == 0
    ]
