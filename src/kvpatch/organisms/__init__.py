"""Organisms: small models whose mode is known, by construction, to sit in certain layers, KV heads, slots and parts.

`language.py` is the language all of them speak; `wired.py` sets weights by hand; `trained.py` trains them. Each is an
ordinary Hugging Face model directory. `recovery.py` asks the real pipeline where the mode is, and `validation.py`
holds what it says against what was planted.
"""
