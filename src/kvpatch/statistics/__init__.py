"""From stored trials to verdicts: pair means, intervals, tests, multiplicity, gates. Needs no torch."""
