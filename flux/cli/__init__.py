"""The command line: ``python -m flux generate``, ``inspect`` and ``models``.

Only this room writes to the terminal. Commands import torch late, so that help and mistakes answer at once.
"""
