"""What is said of every attention head: the names of its statistics and their meanings. Data only.

Each is a mean over queries, the tokens that look, of what one head's attention does with the slots they may look at.
"""

from __future__ import annotations

from kvpatch.specs.readout import Readout

DISTANCES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Where the bins of the distance profile start, in slots back from the query; the last has no end. Distances 0 and 1
are `own_slot` and `previous_token`."""

STAGES = {
    "own": "while the trial wrote its own text: every token it fed, the pending one first",
    "forced": "while it read the pair's fixed continuation, the same words under every condition",
}
"""When a trial's heads are watched. "forced" compares conditions; "own" follows each one's own words too."""

STATISTICS: dict[str, str] = {
    "entropy": "entropy of the attention over log(number of slots the query may look at): 0 one slot, 1 all alike",
    "peak_mass": "attention on the slot with most of it",
    "peak_position": "position of that slot",
    "peak_distance": "how many positions before the query that slot lies",
    "own_slot": "attention of a token on itself",
    "previous_token": "attention on the slot before the query",
    "induction": "attention on slots that follow an earlier occurrence of the query's token, where there is one",
    "mass_sinks": "attention on the first four slots of the row, whatever they hold",
    "mass_template": "attention on what precedes the user's words, sinks left out",
    "mass_body": "attention on the user's words, sinks left out",
    "mass_trailer": "attention on what follows the user's words, the pending token among it",
    "mass_generated": "attention on what was fed after the prompt; with sinks, template, body and trailer it adds to 1",
    "mass_own": "attention on prompt slots that hold the receiving prompt's own activations, sinks left out",
    "mass_patched": "attention on prompt slots that were put in, sinks left out; with sinks, own and generated it is 1",
    "mass_marked": "attention on the slots that the phase marks, such as self-referential words; sinks left out",
    "mass_marked_each": "the same over the number of those slots; nothing where there is none",
    "mass_beside_each": "attention on as many other slots of the user's words, as frequent as the marked ones "
    "and at like places, over their number; nothing where there is none",
    **{f"distance_{low}": f"attention on slots {low} to {2 * low - 1} back" for low in DISTANCES[:-1]},
    f"distance_{DISTANCES[-1]}": f"attention on slots {DISTANCES[-1]} back and further",
}
"""Statistic -> what it is."""


def statistic_of(readout: Readout) -> str | None:
    """The statistic of single heads whose mean over layers and heads a readout is; None where it is no such mean."""
    if readout.asks not in ("attention", "attention.marked") or readout.axis == "ratio":
        return None  # a ratio is one of means, and no mean of a statistic
    part = readout.name.removeprefix("attention_")
    return part if part in STATISTICS else f"mass_{part}"
