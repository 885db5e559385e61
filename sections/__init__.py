"""The sections of the configuration: every key, its default and its range (config.py loads them)."""
