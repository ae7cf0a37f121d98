"""The run directory: its columns, records and parts."""
