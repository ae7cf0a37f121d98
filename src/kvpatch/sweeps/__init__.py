"""Sweeps: one patch for every layer, slot, KV head and part, each read by a metric, as a labelled array."""
