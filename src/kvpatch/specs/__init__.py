"""Everything that a protocol can say, as frozen data without torch."""
