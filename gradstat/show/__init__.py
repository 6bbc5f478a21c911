"""A run in the terminal: ``gradstat show`` and ``gradstat watch``."""
