"""The engine: many runs trained as one program, kept, and resumed.

From a run to its result: `prepared.py` (its data and first weights) → `blocks.py` (which runs train as one program) → `family.py`
(the loop) around `step.py` (one step, plain; `compiled.py` on a CPU, `captured.py` on a GPU, both by way of `flat.py`) and
`state.py` (what is saved) → `results.py`, `checkpoints.py`. `train.py` does that here or in processes (`processes.py`,
`progress.py`), `cluster.py` on Dask workers; `store.py` keeps the results as `folders.py`.
"""

VERSION = 6  # raise it when a change of code changes a run's numbers or its digest: what other versions stored is not read
