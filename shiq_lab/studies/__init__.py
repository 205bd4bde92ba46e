"""The experiments behind the figures and notebooks: one file each, a line each in table.py."""
