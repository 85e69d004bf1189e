"""Flow sampling as pure functions: schedules, solvers, guidance, noise and the packing of latents into tokens.

The convention throughout: x_t = (1 - t) data + t noise, t (also called sigma) falls from 1 to 0, and the model predicts
the velocity v = noise - data.
"""
