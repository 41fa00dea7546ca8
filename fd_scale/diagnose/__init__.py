"""Why does a student fine-tune better than its teacher? The papers' four diagnostics, and a few more.

Each question has a file: ``distance``, ``head_similarity`` and ``average_map`` look at attention,
``token_similarity``, ``norms``, ``spectrum`` and ``similarity`` at tokens, ``landscape`` at the loss around
the weights, ``rollout`` at single images, ``drift`` at the checkpoints of a run. The questions about
attention and tokens share a signature: ``sums(tensor, layer)`` are what a batch adds to float64 sums,
``conclude(sums, layer)`` the answer from the sums of all images; so no answer depends on how images were
divided into batches and over processes. ``survey`` asks them all in one pass, ``session`` puts a diagnosis
together, ``report`` writes the page.
"""
