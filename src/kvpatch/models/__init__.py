"""Load a model and know its geometry. `hf.py` is the only file that knows transformers' cache interface."""
