"""Identities that a model must satisfy before its numbers are trusted, and the noise floor."""
