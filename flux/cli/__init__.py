"""The command line: ``python -m flux generate``, ``fill``, ``inspect`` and the others.

Only this room writes to the terminal. Commands import torch late, so that help and mistakes answer at once.
"""
