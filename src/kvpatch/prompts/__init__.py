"""The prompt bank (YAML) and pairing."""
