"""The catalogue of readouts: one entry for each number that is measured on a trial.

Columns, effects, sentences, tables, charts, filters and checks of a protocol all read this catalogue. A readout of
another package is added by `register`, or by an entry point of the group "kvpatch.readouts"; docs/extending.md shows
one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvpatch.errors import ExtensionError
from kvpatch.specs.extensions import register_installed
from kvpatch.specs.readout import Asks, Place, Readout, TrialRecord

__all__ = [
    "BUILT_IN",
    "MODE",
    "SCORE",
    "SHOWN",
    "Place",
    "Readout",
    "TrialRecord",
    "from_outside",
    "readouts",
    "register",
    "shown",
    "sparse",
    "unregister",
]

GROUP = "kvpatch.readouts"
"""Group of entry points; each gives a `Readout`, or a list of them."""
MODE = "mode_llr"
"""The readout of the mode where none is named; it counts no words of an output, so that it needs no sampling."""
SCORE = "recursive_score"
"""The readout of the mode in the words of an output."""
SHOWN: dict[Place, tuple[str, ...]] = {
    "effects": (
        "recursive_score", "recursive_score_masked", "semantic_score", "mode_llr", "content_llr", "rv_output",
    ),
    "report": (
        "recursive_score", "recursive_score_masked", "semantic_score", "mode_llr", "content_llr", "rv_output",
        "n_tokens", "nll_own", "nll_target", "nll_context", "repetition",
    ),
    "maps": ("mode_llr", "recursive_score_masked"),
    "dose": ("mode_llr", "recursive_score", "recursive_score_masked", "semantic_score", "rv_output"),
    "across": ("mode_llr", "recursive_score_masked", "recursive_score", "semantic_score"),
    "trials": ("mode_llr", "recursive_score", "recursive_score_masked", "semantic_score"),
    "newest": ("mode_llr", "recursive_score", "semantic_score"),
    "r_v": ("rv_prompt", "rv_output", "rv_own"),
    "copying": ("recursive_score_masked",),
}  # fmt: skip
"""For each place, the readouts of kvpatch that are shown there, in their order. Those from outside come after them."""
RESERVED = frozenset(
    """
    trial_id content_id phase split model condition condition_role pair_id source_id target_id sample seed patch
    source_domain target_domain
    changes_planned changes_fired n_slots_patched n_layers_patched n_kv_heads_patched equals_text source_text
    target_text source_token_ids target_token_ids cache_token_ids output_token_ids output_logprobs text stopped
    mode_hits mode_llr_damage mode_llr_by_position content_llr_by_position rv_trajectory rv_forced_trajectory pr_v
    pr_v_corrected
    pr_k pr_k_corrected coherent cache_checksum_before cache_checksum_after error failed part place
    """.split()
)
"""Names that no readout may have: the other columns of a trial, and what tables of trials add to them."""


def _own(name: str, label: str, about: str, **more: object) -> Readout:
    """An entry of kvpatch's own; where it is shown stands in `SHOWN`."""
    places = frozenset(place for place, names in SHOWN.items() if name in names)
    return Readout(name=name, label=label, about=about, places=places, **more)  # pyright: ignore[reportArgumentType]


def _r_v(name: str, label: str, about: str, **more: object) -> Readout:
    return _own(name, label, about, is_positive=True, transform="log", **more)


def _geometry(name: str, label: str, about: str, **more: object) -> Readout:
    return _own(name, label, about, asks="geometry", is_of_sampled_text=False, **more)


def _attention(name: str, label: str, about: str, asks: Asks = "attention", **more: object) -> Readout:
    return _own(name, label, about, asks=asks, is_of_sampled_text=False, **more)


_HITS = "hits per 100 words"
_NATS = "nats per token"
_RATIO = "log-likelihood ratio"
BUILT_IN: tuple[Readout, ...] = (
    _own(
        "n_tokens", "Length", "tokens written, end token included",
        unit="tokens", kind="int32", is_positive=True, direction="a longer output",
        explained="Tokens generated until the end token or the limit.",
    ),
    _own(
        "recursive_score", "Mode score", "score of the protocol's mode, whatever it is: hits per 100 words of the text",
        unit=_HITS, direction="more of the mode", may_be_evidence=True,
        headings={"effects": "score", "trials": "score", "newest": "score"},
        explained="What the protocol's lexicon or scorer counts, in the generated text alone. Copied words count.",
    ),
    _own(
        "recursive_score_masked", "Mode score, masked",
        "the same without hits that occur in the pair's source or foreign prompt",
        unit=_HITS, direction="more of the mode", may_be_evidence=True,
        headings={"effects": "masked score", "trials": "masked", "newest": "masked"},
        explained="The same, without words that occur in the source. What copying alone can produce is gone.",
    ),
    _own(
        "semantic_score", "Mode, by meaning",
        "mean log-odds that a window of the text is in the mode, by its sentence embedding; each window within -4 to 4",
        asks="semantic", axis="log-odds of the mode", direction="more of the mode", may_be_evidence=True,
        headings={"effects": "meaning", "trials": "meaning", "newest": "meaning"},
        explained="Log-odds of the mode by what the text means, in the generated text alone. Above 0: rather in the "
        "mode. Measured where the protocol gives readouts: {semantic: ...} and the extra 'semantic' is installed.",
    ),
    _own(
        "overlap_4gram", "Overlap with the source",
        "share of the text's word 4-grams that occur in the source prompt",
        axis="share of 4-grams", direction="more copied words",
    ),
    _r_v(
        "rv_prompt", "R_V of the prompt",
        "R_V of the cache the trial starts from; under a full swap the source's by construction",
        axis="participation ratio, late over early", is_of_sampled_text=False,
        direction="late values spread over more dimensions",
    ),
    _r_v(
        "rv_output", "R_V of the output",
        "R_V of the values of a fixed continuation, the same for all conditions of the pair",
        axis="participation ratio, late over early", is_of_sampled_text=False,
        direction="late values spread over more dimensions",
        explained="Geometry of the cached values, every condition forced on the same continuation. "
        "Tests use its logarithm.",
    ),
    _r_v(
        "rv_own", "R_V of its own words", "R_V of the values of the trial's own last tokens; tracks its words too",
        axis="participation ratio, late over early", direction="late values spread over more dimensions",
    ),
    _own(
        "nll_own", "Surprise, own",
        "mean negative log-likelihood of the text under the trial's own cache, nats a token",
        unit=_NATS, direction="a less likely text",
        explained="Negative log-likelihood of the output under the patched cache that produced it.",
    ),
    _own(
        "nll_target", "Surprise, target",
        "the same under the natural cache of the pair's target prompt, whatever the condition",
        unit=_NATS, direction="a less likely text",
        explained="Negative log-likelihood of the output under the unpatched target prompt. High: off topic, damaged.",
    ),
    _own(
        "nll_context", "Surprise, in context",
        "the same under the natural cache of the prompt whose words the trial's cache holds; the smaller number where "
        "it holds words of two; null in older runs",
        unit=_NATS, direction="a less likely text",
        explained="Negative log-likelihood of the output under the unpatched prompt whose words the cache holds. "
        "High: damaged, or in a language that the model knows less well.",
    ),
    _own(
        "excess_context", "Surprise beyond the expected",
        "nll_context less the mean entropy of the distributions that it is read from. Coherence is judged by it; null "
        "in older runs",
        unit=_NATS, direction="a less likely text than the model expects of itself",
        explained="How much more surprising the output is, under the unpatched prompt whose words the cache holds, "
        "than the model expects at each of its tokens. High: damaged.",
    ),
    _own(
        "mode_llr", "Mode, by likelihood",
        "log-likelihood of continuations in the mode less plain ones over topics and persons, less what damage "
        "explains by the calibration pairs, nats a token",
        unit="nats", axis=_RATIO, direction="more of the mode", may_be_evidence=True, is_of_sampled_text=False,
        explained="How much likelier held-out continuations in the mode are than plain ones, whatever the topic.",
    ),
    _own(
        "mode_llr_unweighted", "Mode, by likelihood, nothing subtracted",
        "the same as mode_llr before what damage explains is subtracted; equal to it where nothing was fitted",
        unit="nats", axis=_RATIO, direction="more of the mode", is_of_sampled_text=False,
    ),
    _own(
        "content_llr", "Content, by likelihood",
        "log-likelihood of the source's topic less the target's over modes, nats a token",
        unit="nats", is_of_sampled_text=False, axis=_RATIO, direction="closer to the source's topic",
        explained="How much likelier continuations on the source's topic are than on the target's. This is not mode.",
    ),
    _own(
        "register_llr", "Register, by likelihood",
        "log-likelihood of continuations in the first person less those in the third, nats a token; null for a bank "
        "that does not state persons",
        unit="nats", is_of_sampled_text=False, axis=_RATIO, direction="closer to the first person",
        explained="How much likelier continuations that say I are, whatever their mode and topic. This is not mode.",
    ),
    _geometry(
        "pr_v_late", "Participation ratio of late values",
        "participation ratio of the late layer's cached values, last window, sinks left out, heads joined",
        axis="participation ratio", is_positive=True, direction="more dimensions",
    ),
    _geometry(
        "pr_v_late_corrected", "Participation ratio of late values, corrected",
        "the same without the bias of a small window",
        axis="participation ratio", is_positive=True, direction="more dimensions",
    ),
    _geometry(
        "pr_k_late", "Participation ratio of late keys",
        "participation ratio of the late layer's cached keys, before RoPE",
        axis="participation ratio", is_positive=True, direction="more dimensions",
    ),
    _geometry(
        "pr_k_late_corrected", "Participation ratio of late keys, corrected",
        "the same without the bias of a small window",
        axis="participation ratio", is_positive=True, direction="more dimensions",
    ),
    _geometry(
        "angle_target", "Angle to the target",
        "mean principal angle, in degrees, between the late values of the fixed continuation and those that it has "
        "after the natural target",
        axis="degrees", direction="further from the natural target",
    ),
    _geometry(
        "angle_source", "Angle to the source", "the same against the natural source",
        axis="degrees", direction="further from the natural source",
    ),
    _attention(
        "attention_entropy", "Entropy of attention",
        "entropy of attention over log(keys), fixed continuation, mean over all heads",
        axis="share of the largest entropy", direction="attention spread over more slots",
    ),
    _attention(
        "attention_sinks", "Attention on the sinks", "attention on the first four slots; the same mean",
        axis="share of attention",
    ),
    _attention(
        "attention_template", "Attention on the template", "attention on what precedes the user's words",
        axis="share of attention",
    ),
    _attention(
        "attention_body", "Attention on the user's words", "attention on the user's words", axis="share of attention"
    ),
    _attention(
        "attention_trailer", "Attention on the trailer", "attention on what follows the user's words",
        axis="share of attention",
    ),
    _attention(
        "attention_generated", "Attention on generated tokens", "attention on tokens after the prompt",
        axis="share of attention",
    ),
    _attention(
        "attention_own", "Attention on own slots",
        "attention on the receiving prompt's own slots, sinks left out", axis="share of attention",
    ),
    _attention(
        "attention_patched", "Attention on patched slots", "attention on slots that were put in, sinks left out",
        axis="share of attention",
    ),
    _attention(
        "attention_marked", "Attention on marked words",
        "attention on all slots the phase marks together, such as self-referential words: it grows with their number",
        "attention.marked", axis="share of attention",
    ),
    _attention(
        "attention_marked_each", "Attention on each marked word",
        "attention on the slots the phase marks over their number; nothing where the cache has none",
        "attention.marked", axis="share of attention", is_positive=True,
    ),
    _attention(
        "attention_marked_beside", "Attention on marked words over others like them",
        "attention on the marked slots over that on as many others, as frequent and at like places; nothing where the "
        "cache has none of either",
        "attention.marked", axis="ratio", is_positive=True,
    ),
    _attention(
        "attention_marked_lift", "Attention on marked words over the body's",
        "attention on a marked slot over that on a slot of the body, on average",
        "attention.marked", axis="ratio", is_positive=True,
    ),
    _own(
        "js_pull", "Pull of the source",
        "JS(this, A) - JS(this, B) of next-token distributions at fixed positions, nats",
        is_of_sampled_text=False, axis="nats", direction="closer to the natural source",
    ),
    _own(
        "repetition", "Repetition", "repetition_4",
        axis="share of repeated 4-grams", direction="more repeated words",
        explained="0: no run of four tokens occurs twice. Near 1: the output is a loop.",
    ),
    _own(
        "repetition_1", "Repeated tokens", "share of repeated tokens",
        axis="share of tokens", direction="more repeated words",
    ),
    _own(
        "repetition_2", "Repeated 2-grams", "share of repeated token 2-grams",
        axis="share of 2-grams", direction="more repeated words",
    ),
    _own(
        "repetition_4", "Repeated 4-grams", "share of repeated token 4-grams",
        axis="share of 4-grams", direction="more repeated words",
    ),
    _own(
        "repetition_8", "Repeated 8-grams", "share of repeated token 8-grams",
        axis="share of 8-grams", direction="more repeated words",
    ),
    _own(
        "source_tokens", "Length of the source", "length of `source_token_ids`",
        axis="tokens", kind="int32", is_positive=True, is_stored=False, is_of_sampled_text=False,
        direction="a longer source prompt",
    ),
)  # fmt: skip
"""Every readout that kvpatch measures itself, in the order of the columns of a trial."""

_outside: dict[str, Readout] = {}
_lock = threading.RLock()
_is_looked_up = False
_refused: str | None = None


def readouts() -> dict[str, Readout]:
    """Every readout by its name: numbers with a fraction, then counts, then those from outside.

    Raises:
        ExtensionError: where an installed package registers a readout that can't be used.
    """
    fractions = [readout for readout in BUILT_IN if readout.kind == "float64"]
    counts = [readout for readout in BUILT_IN if readout.kind != "float64"]
    return {readout.name: readout for readout in (*fractions, *counts, *from_outside())}


def from_outside() -> tuple[Readout, ...]:
    """The readouts that other packages or a notebook registered, in the order in which they came.

    Entry points are looked up once in a process; one that is broken is refused each time, so that no run goes on
    without a readout that its user believes to be there.

    Raises:
        ExtensionError: naming the entry point that can't be used.
    """
    global _is_looked_up, _refused
    with _lock:
        if not _is_looked_up:
            _is_looked_up = True  # a module that is being loaded may call `register` itself
            try:
                register_installed(GROUP, Readout, register)
            except ExtensionError as error:
                _refused = str(error)
        if _refused is not None:
            raise ExtensionError(_refused)
        return tuple(_outside.values())


def register(readout: Readout) -> Readout:
    """Add a readout from outside to the catalogue, for this process; returns it.

    Raises:
        ExtensionError: for what is no `Readout`, has no `measure`, asks something of its phase, or has a name that
            exists.
    """
    if not isinstance(readout, Readout):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ExtensionError(f"register takes a kvpatch.specs.readouts.Readout, not {readout!r:.80}")
    name = readout.name
    if not callable(readout.measure):
        raise ExtensionError(f"readout {name!r} has no measure; give a function of a TrialRecord that returns a number")
    if readout.asks is not None or readout.kind != "float64" or not readout.is_stored:
        raise ExtensionError(
            f"readout {name!r} is measured on a TrialRecord alone; leave asks, kind and is_stored as they are"
        )
    with _lock:
        known = {own.name for own in BUILT_IN} | {other.name for other in from_outside()}
        if name in known or name in RESERVED:
            what = "a readout" if name in known else "another column of a trial"
            raise ExtensionError(f"the name {name!r} is that of {what} already; give the readout another name")
        _outside[name] = readout
    return readout


def unregister(name: str) -> None:
    """Take a readout from outside out of the catalogue of this process, such as at the end of a test.

    Raises:
        ExtensionError: where no readout of this name was registered.
    """
    with _lock:
        if _outside.pop(name, None) is None:
            raise ExtensionError(f"no readout {name!r} was registered; there are {', '.join(_outside) or 'none'}")


def sparse() -> tuple[Readout, ...]:
    """Readouts that a run may lack altogether: those from outside, and those that a whole protocol asks for."""
    return (*(readout for readout in BUILT_IN if readout.asks == "semantic"), *from_outside())


def shown(place: Place, measured: Iterable[str] | None = None) -> list[Readout]:
    """The readouts that are shown in a place, in their order; those from outside come last.

    measured: names of the sparse readouts (`sparse`) that the trials at hand hold; the others are left out, so that a
    run that was made without them reads as before. None for all.
    """
    known = {readout.name: readout for readout in BUILT_IN}
    left_out = set[str]() if measured is None else {readout.name for readout in sparse()} - set(measured)
    outside = [readout for readout in from_outside() if place in readout.places]
    return [r for r in (*(known[name] for name in SHOWN[place]), *outside) if r.name not in left_out]
