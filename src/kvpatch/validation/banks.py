"""Prompt banks in the organisms' language: drawn from a seed, with the marker at a slot of one's choice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpatch.organisms.impostors import FIRST, THIRD
from kvpatch.organisms.language import (
    BLANK,
    BODY,
    DOSE,
    FILLERS,
    LEVELS,
    MARKER,
    MODE,
    PLAIN,
    STYLE_WORDS,
    TOPICS,
    UMBRELLA,
    held_out,
    stems,
    topic_words,
)
from kvpatch.specs.organisms import Ladder

LADDERS: dict[Ladder, tuple[str, ...]] = {"rising": DOSE, "umbrella": UMBRELLA}


@dataclass(frozen=True)
class Sizes:
    """How many prompts a bank has; `in_persons` gives its continuations in the first and in the third person."""

    pairs: int = 48
    others: int = 24
    subjects: int = 20
    continuations: int = 2
    in_persons: bool = False


def bank_entries(slot: int, seed: int, sizes: Sizes = Sizes(), *, dose: tuple[str, ...] = DOSE) -> list[dict[str, Any]]:
    """A bank: its prompts and held-out continuations as plain data.

    Args:
        slot: place of the marker, or of its neutral twin, in every body.
        seed: draws topics and words. Targets, sources and foreign prompts have different topics.
        dose: the markers of the ladder's five levels.
    """
    rng = np.random.default_rng([seed, slot])
    order = [stems()[i] for i in rng.permutation(TOPICS)]
    third = TOPICS // 3
    of = {"plain": order[:third], "recursive": order[third : 2 * third], "foreign": order[2 * third :]}
    entries: list[dict[str, Any]] = []

    def prompt(name: str, group: str, topic: str, marker: str, *, in_style: bool, **more: Any) -> None:
        text = " ".join(body(rng, topic, marker, slot, MODE if in_style else PLAIN))
        entries.append({"id": name, "group": group, "topic": topic, "domain": topic, **more, "text": text})

    for i in range(sizes.pairs):
        target, source, foreign = (of[group][i % third] for group in ("plain", "recursive", "foreign"))
        prompt(f"plain-{i:03}", "plain", target, BLANK, in_style=False)
        prompt(f"mode-{i:03}", "recursive", source, MARKER, in_style=True)
        prompt(f"foreign-{i:03}", "foreign", foreign, BLANK, in_style=False, partner_of=f"plain-{i:03}")
    for i in range(sizes.others):
        topic = of["recursive"][-1 - i]
        prompt(f"pseudo-{i:03}", "pseudo_recursive", topic, BLANK, in_style=True)
        prompt(f"zero-{i:03}", "zero_lexicon", topic, MARKER, in_style=False)
    subjects = of["foreign"][: sizes.subjects]
    for topic in subjects:
        for level, marker in zip(("long_control", *LEVELS), (BLANK, *dose), strict=True):
            prompt(f"{level}-{topic}", "ladder", topic, marker, in_style=False, level=level)
    used = dict.fromkeys(entry["topic"] for entry in entries if entry["group"] in ("plain", "recursive"))
    domains = [(topic, topic) for topic in used] + [(topic, f"{topic}:{topic}") for topic in subjects]
    for topic, domain in domains:
        entries += _continuations(rng, topic, domain, sizes)
    return entries


def body(
    rng: np.random.Generator, topic: str, marker: str, slot: int, style: tuple[str, ...], length: int = BODY
) -> list[str]:
    """The words of one prompt."""
    words = list(topic_words(topic)[0])
    words += [style[i] for i in rng.choice(len(style) // 2, STYLE_WORDS, replace=False)]
    words += [FILLERS[i] for i in rng.choice(len(FILLERS), length - 1 - len(words), replace=False)]
    words = [words[i] for i in rng.permutation(len(words))]
    return [*words[:slot], marker, *words[slot:]]


def _continuations(rng: np.random.Generator, topic: str, domain: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Openings of an answer, in the mode and plain, that differ in their style words alone; and in the persons, where
    they are asked for, in the first word, which is one of style."""
    out = []
    persons = {"first": FIRST, "third": THIRD} if sizes.in_persons else {None: None}
    for number in range(sizes.continuations):
        style = rng.choice(len(MODE) // 2, BODY // 2, replace=False)
        about = [topic_words(topic)[1][i] for i in rng.integers(0, 3, BODY // 2)]
        for mode, words in (("recursive", held_out(MODE)), ("plain", held_out(PLAIN))):
            for person, said in persons.items():
                chosen = [words[i] for i in style] if said is None else [said, *(words[i] for i in style[1:])]
                text = " ".join(f"{one} {word}" for one, word in zip(chosen, about, strict=True))
                entry = {"id": f"{mode}-{domain}-{number}", "mode": mode, "topic_of": "either", "domain": domain}
                if person is not None:
                    entry |= {
                        "id": f"{mode}-{person}-{domain}-{number}",
                        "person": person,
                        "item": f"{domain}-{number}",
                    }
                out.append(entry | {"text": text})
    return out


def write_bank(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Write a bank directory of one file; returns the directory."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"- {json.dumps(entry)}\n" for entry in entries]  # JSON is YAML too
    (folder / "bank.yaml").write_text("".join(lines), encoding="utf-8")
    return folder


SHIPPED = {"slot": 5, "seed": 0, "sizes": Sizes(pairs=130)}
"""What the bank `organism` that comes with kvpatch was drawn from: `python -m kvpatch.validation.banks DIR`."""


if __name__ == "__main__":
    import sys

    print(write_bank(Path(sys.argv[1]), bank_entries(**SHIPPED)))
