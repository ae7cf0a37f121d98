"""From a protocol, a bank and models to a list of trials: pairing, fitting and batches."""
