"""The engine trains many runs as one program, stores their results, and resumes what was stopped.

From a run to its result: `prepared.py` (its data and first weights) → `blocks.py` (which runs train as one program) → `family.py`
(the training loop) → `results.py`, `checkpoints.py`. The loop takes the steps of `step.py`, compiled on a CPU (`compiled.py`;
`programs.py` keeps what is compiled, and `products.py` has its matrix products) or captured on a GPU (`captured.py`); both use
`flat.py`. `state.py` saves the loop's state. `train.py` trains here or in processes (`processes.py`, `progress.py`), `cluster.py`
on Dask workers; `store.py` stores the results in folders (`folders.py`), and `archive.py` hands them out as one file.
"""

VERSION = 7  # raise it when a code change alters a run's numbers or its digest; results of other versions are not read
