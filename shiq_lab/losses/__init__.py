"""Losses: pure functions of TokenStats and TokenBatch, one file a family.

To add one: write its function here in a file of its family, and add its line to METHODS in `methods.py` if a table is to be
trained with it.
"""
