"""Key-value caches: their tensors and labels, positions, selections and noise."""
