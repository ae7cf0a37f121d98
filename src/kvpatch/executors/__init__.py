"""Executors carry out a plan, batch by batch. `batch.py` is one batch; `local.py` runs them all in this process."""
