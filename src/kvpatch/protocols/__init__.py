"""Protocols: what may be said (schema), shipped ones (YAML), and the plan that follows from one."""
