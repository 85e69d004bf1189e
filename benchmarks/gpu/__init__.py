"""FLUX.1 [dev] on a GPU: beside diffusers, in fp8, under budgets, in batches and sizes, against what the card can do.

``python -m benchmarks.gpu`` is the one command. It ends within ``--minutes``: a section for which too little time is
left is skipped, and says so; each writes its figures to ``--out`` as soon as it has them (``--write``: to the tables).
Weights are random, of real size and made on the device (``random_weights``); nothing is downloaded. The same way is
taken on a CPU with ``--device cpu --size tiny``, where figures mean nothing, and no bar is asked.

What a card can do at most is what the operations of a pass take at the rate of its matrix products in bf16, measured in
the same run; what it can bring, at the rate of copies from pinned memory.
"""
