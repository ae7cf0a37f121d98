"""Impostors do what was once taken for a mode; no readout of the mode is fooled, and without the fit one would be."""

from __future__ import annotations

import pandas as pd
import pytest

import kvpatch as kv
from kvpatch.organisms.directories import WEIGHTS, write_organism
from kvpatch.organisms.impostors import FIRST, LOOPED, THIRD
from kvpatch.organisms.language import FILLERS, MODE
from kvpatch.protocols.schema import Calibration
from kvpatch.specs.organisms import ORGANISMS
from kvpatch.validation import pipeline
from kvpatch.validation.banks import Sizes
from kvpatch.validation.jobs import Job
from kvpatch.validation.judging import impostor_findings

pytestmark = pytest.mark.model
IMPOSTORS = [name for name, organism in ORGANISMS.items() if organism.impostor]
SOURCE = "reki glow round spark blaze yourself daily gentle broad reka brown reke"
TARGET = SOURCE.replace("yourself", "everyone")


def words(model: kv.Model, prompt: str) -> list[list[str]]:
    cache = model.prefill([prompt])
    seeds = range(8)
    return [model.generate(cache, max_new_tokens=20, temperature=0.7, seeds=[s]).texts[0].split() for s in seeds]


def share(texts: list[list[str]], of: tuple[str, ...]) -> float:
    said = [word for text in texts for word in text]
    return sum(word in of for word in said) / len(said)


def made(name: str, folder) -> kv.Model:
    return kv.load(write_organism(ORGANISMS[name], folder / "model"), device="cpu")


def test_in_register_the_marker_chooses_the_person_and_nothing_else(tmp_path):
    model = made("register", tmp_path)
    lines = [f"{FIRST} reko glow", f"{THIRD} reko glow", f"{FIRST} reko carry"]
    with_it, without = (model.score(model.prefill([prompt]), lines).nansum(dim=1) for prompt in (SOURCE, TARGET))
    assert (with_it[0] - with_it[1]) - (without[0] - without[1]) > 4
    assert abs((with_it[0] - with_it[2]) - (without[0] - without[2])) < 1e-3


def test_in_damaged_mode_words_become_likelier_and_so_does_gibberish(tmp_path):
    model = made("damaged", tmp_path)
    lines = ["glow reko", "carry reko"]
    with_it, without = (model.score(model.prefill([prompt]), lines)[:, 0] for prompt in (SOURCE, TARGET))
    assert (with_it[0] - with_it[1]) - (without[0] - without[1]) > 4
    assert share(words(model, SOURCE), FILLERS) > 0.4 and share(words(model, TARGET), FILLERS) < 0.02


def test_long_writes_more_and_loop_writes_one_word(tmp_path):
    long, loop = made("long", tmp_path / "long"), made("loop", tmp_path / "loop")
    assert min(map(len, words(long, SOURCE))) == 20
    assert sum(map(len, words(long, TARGET))) < 140  # of 160
    assert {word for text in words(loop, SOURCE) for word in text} == {LOOPED}
    assert share(words(loop, TARGET), (LOOPED,)) == 0 and LOOPED not in MODE


@pytest.mark.parametrize("name", IMPOSTORS)
def test_no_readout_of_the_mode_is_above_a_quarter_of_a_real_mode_s_gap(name: str):
    found = pipeline.run_job(Job("impostor", name, 3, 5, str(WEIGHTS))).findings
    assert {f.asked.split(",")[0] for f in found} == {"recursive_score", "recursive_score_masked", "mode_llr"}
    assert [f"{f.asked}: {f.found}" for f in found if not f.holds] == []


def test_without_the_fit_damage_is_taken_for_a_mode(tmp_path):
    bank = pipeline._bank(ORGANISMS["damaged"], tmp_path, 3, Sizes(pairs=15, others=1, subjects=1))
    job = Job("impostor", "damaged", 3, 5, str(WEIGHTS))
    own = pipeline._phase_1_of(job, tmp_path / "own", bank, Calibration(pairs=10))
    real = own.assign(mode_llr=own["mode_llr_unweighted"])
    by_name = {f.asked.split(",")[0]: f for f in impostor_findings("damaged", own, real)}
    assert by_name["mode_llr"].found == "1.00" and not by_name["mode_llr"].holds


def test_a_gap_of_a_quarter_holds_and_more_does_not():
    def trials(gap: float) -> pd.DataFrame:
        rows = [
            {"phase": "1", "split": "test", "pair_id": f"p{i}", "sample": 0, "condition": c, "mode_llr": value + i}
            for i in range(4)
            for c, value in (("A", 0.0), ("B", gap))
        ]
        return pd.DataFrame([{**row, "error": None} for row in rows])

    for gap, holds in ((-3.0, True), (0.5, True), (0.51, False)):
        (finding,) = impostor_findings("loop", trials(gap), trials(2.0))
        assert finding.holds == holds
    (no_real,) = impostor_findings("loop", trials(0.0), trials(-1.0))
    assert not no_real.holds
