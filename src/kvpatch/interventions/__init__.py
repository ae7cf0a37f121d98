"""Interventions on a cache or on a running prompt, one kind per file."""
