"""Organisms: small models whose mode is known, by construction, to sit in certain layers, KV heads, slots and parts.

`language.py` is the language that all of them speak; `wired.py` sets weights by hand; `trained.py` trains them. Each is
an ordinary Hugging Face model directory. Importing this package lets `kvpatch.load` take their names.
"""

from kvpatch.organisms import directories as directories
