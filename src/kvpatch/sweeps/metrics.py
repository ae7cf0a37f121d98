"""Metrics of a sweep: what is read off the model at the token behind a patched cache.

A metric says what to feed behind the pending token and how to read the hidden states. `kv.logit_difference` and the
others make one; a function of logits is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpatch.errors import ProtocolError, visible
from kvpatch.models.backbone import Backbone
from kvpatch.models.changes import is_plain_linear
from kvpatch.specs.arguments import plain as as_plain
from kvpatch.specs.arguments import shown, unicode_text

if TYPE_CHECKING:
    from kvpatch.engine.model import Model

ROWS_AT_ONCE = 256
"""Rows whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Pass:
    """One pass of the model: `fed`, tokens behind the pending one, and `read`, from hidden states [rows, 1 + fed,
    width] to one number a row."""

    fed: tuple[int, ...]
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """A metric on a model and a pair of caches: its passes, and what their numbers, [rows] each, come to."""

    passes: Sequence[Pass]
    combine: Callable[[Sequence[Tensor]], Tensor] = lambda values: values[0]


@dataclass(frozen=True)
class Context:
    """What a metric may look at: the model, and the natural next-token logits [vocabulary] of source and target."""

    model: Model
    source_logits: Tensor
    target_logits: Tensor


@dataclass(frozen=True)
class Metric:
    """A metric: its name with its unit, as it stands on a figure, and how it is read."""

    name: str
    reading: Callable[[Context], Reading]

    def __repr__(self) -> str:
        return f"<metric: {visible(self.name)}>"


def logit_difference(answer: str, other: str) -> Metric:
    """The logit of `answer` less that of `other`, at the token behind the cache.

    Of an answer of several tokens the first one counts (`log_likelihood` takes all of them).

    Raises:
        ProtocolError: for an answer that is empty, or two answers that begin with the same token.
    """
    _refuse_no_text(answer, other)

    def reading(context: Context) -> Reading:
        one, two = (_ids(context.model, text)[0] for text in (answer, other))
        if one == two:
            raise ProtocolError(
                f"{answer!r} and {other!r} begin with the same token, {context.model.tokenizer.decode([one])!r}, so "
                "their logits do not differ; give answers that begin otherwise, or use log_likelihood"
            )
        read = _logits_of(context.model.backbone, [one, two])
        return Reading([Pass((), lambda hidden: read(hidden[:, 0]).diff(dim=1)[:, 0].neg())])

    return Metric(f"logit of {_quoted(answer)} less that of {_quoted(other)}", reading)


def log_likelihood(answer: str) -> Metric:
    """The log-probability of an answer behind the cache, natural logarithm, summed over all of its tokens."""
    _refuse_no_text(answer)
    return Metric(
        f"log-likelihood of {_quoted(answer)} (nats)", lambda context: Reading([_likelihood(context.model, answer)])
    )


def probability(answer: str) -> Metric:
    """The probability of an answer behind the cache; of several tokens, that of all of them in turn."""
    _refuse_no_text(answer)

    def reading(context: Context) -> Reading:
        return Reading([_likelihood(context.model, answer)], lambda values: values[0].exp())

    return Metric(f"probability of {_quoted(answer)}", reading)


def mode_likelihood_ratio(mode: Sequence[str], plain: Sequence[str]) -> Metric:
    """How much likelier continuations in the mode are than plain ones: the mean log-probability per token of the first
    less that of the second, in nats. The mode readout of a protocol, with texts of one's own.

    Raises:
        ProtocolError: where either side has no text.
    """
    sides = [as_plain(side) for side in (mode, plain)]
    texts = [[side] if isinstance(side, str) or not isinstance(side, Iterable) else list(side) for side in sides]
    if not all(texts):
        raise ProtocolError("mode_likelihood_ratio needs at least one text of the mode and one plain text")
    _refuse_no_text(*texts[0], *texts[1])

    def reading(context: Context) -> Reading:
        passes = [_likelihood(context.model, text) for text in (*texts[0], *texts[1])]
        lengths = [1 + len(one.fed) for one in passes]
        cut = len(texts[0])

        def combine(values: Sequence[Tensor]) -> Tensor:
            means = torch.stack([value / length for value, length in zip(values, lengths, strict=True)])
            return means[:cut].mean(dim=0) - means[cut:].mean(dim=0)

        return Reading(passes, combine)

    return Metric("log-likelihood per token of the mode's texts less that of plain ones (nats)", reading)


def kl_to_source() -> Metric:
    """How far the next-token distribution is from the source's own: KL(source || patched), nats."""
    return Metric("KL to the source (nats)", lambda context: _kl(context.model, context.source_logits))


def kl_to_target() -> Metric:
    """How far the next-token distribution is from the target's own: KL(target || patched), nats."""
    return Metric("KL to the target (nats)", lambda context: _kl(context.model, context.target_logits))


def metric_of(given: Any) -> Metric:
    """A metric as it is, or one made of a function of logits, [rows, vocabulary] to [rows].

    Raises:
        ProtocolError: for anything else.
    """
    if isinstance(given, Metric):
        return given
    known = "logit_difference, log_likelihood, probability, mode_likelihood_ratio, kl_to_source and kl_to_target"
    makers = (logit_difference, log_likelihood, probability, mode_likelihood_ratio, kl_to_source, kl_to_target)
    if any(given is maker for maker in makers):
        raise ProtocolError(f"metric {given.__name__} is not called yet; write kv.{given.__name__}(...)")
    if not callable(given):
        raise ProtocolError(f"metric must be one of kv.{known}, or a function of logits, got {shown(given)}")
    name = getattr(given, "__name__", type(given).__name__)
    name = "a function of the logits" if name == "<lambda>" else name

    def reading(context: Context) -> Reading:
        backbone = context.model.backbone
        return Reading(
            [Pass((), lambda hidden: _in_parts(backbone, hidden, lambda logits: _asked(name, given, logits)))]
        )

    return Metric(name, reading)


def _asked(name: str, function: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    found = torch.as_tensor(function(logits))
    if found.shape != logits.shape[:1]:
        raise ProtocolError(
            f"metric {name} gave {list(found.shape)} for logits {list(logits.shape)}; it must give one number a row, "
            "so write logits[..., token]"
        )
    return found.to(torch.float32)


def _kl(model: Model, reference: Tensor) -> Reading:
    own = reference.log_softmax(dim=-1)

    def divergence(logits: Tensor) -> Tensor:
        return (own.exp() * (own - logits.log_softmax(dim=-1))).sum(dim=-1)

    return Reading([Pass((), lambda hidden: _in_parts(model.backbone, hidden, divergence))])


def _in_parts(backbone: Backbone, hidden: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the logits behind the pending token, [rows, vocabulary], for some rows at a time."""
    return torch.cat([function(backbone.logits(part)) for part in hidden[:, 0].split(ROWS_AT_ONCE)])


def _likelihood(model: Model, answer: str) -> Pass:
    """Log-probability of an answer, summed over its tokens."""
    ids = _ids(model, answer)

    def read(hidden: Tensor) -> Tensor:
        wanted = torch.tensor(ids, device=hidden.device).repeat(len(hidden))
        return model.backbone.token_logprobs(hidden.flatten(0, 1), wanted).view(len(hidden), len(ids)).sum(dim=1)

    return Pass(tuple(ids[:-1]), read)


def _logits_of(backbone: Backbone, tokens: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Logits of a few tokens alone, [rows, tokens] of hidden states [rows, width]."""
    head, at = backbone.head, torch.tensor(list(tokens), device=backbone.device)
    if not is_plain_linear(head):  # somebody's head, or hooks on it: ask it for all it gives
        return lambda hidden: torch.cat([backbone.logits(part)[:, at] for part in hidden.split(ROWS_AT_ONCE)])
    weight, bias = head.weight[at], None if head.bias is None else head.bias[at]
    return lambda hidden: backbone.scaled(torch.nn.functional.linear(hidden, weight, bias).float())


def _ids(model: Model, text: str) -> list[int]:
    ids = model.continuation_ids(text)
    if not ids:
        raise ProtocolError(f"the answer {text!r} has no token")
    return ids


def _quoted(answer: str) -> str:
    """An answer in quotes, all of it to be seen."""
    return "'" + visible(answer).replace("\n", "\u2424").replace("\t", "\u2409") + "'"


def _refuse_no_text(*texts: object) -> None:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ProtocolError(f'an answer must be text, such as " Rome", got {shown(text)}')
        unicode_text("an answer", text, error=ProtocolError)
