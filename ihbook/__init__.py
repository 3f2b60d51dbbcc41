"""*What needs to go right for an induction head?* (Singh et al., 2024), to read, rerun, take apart and extend.

This is a map of the package. Imports run one way: a module uses only what is listed above it.

These modules hold the science of the paper; read them first, from top to bottom:

    config      what a run is: frozen values that decide every number
    task        banks of characters, splits, sequences, evaluation sets
    model       the transformer: weights, tokens and overrides in, named activations out
    clamps/     what a clamp is, the catalogue, how clamps compose
    metrics     losses, induction strength, composition scores, the time of the phase change
    toy         the paper's toy model

These packages run it:

    banks/      glyphs, Omniglot, the authors' file, plain vectors, a reader's own array; downloads
    engine/     many runs as one program: the step, the loop, processes, a cluster, the store of finished runs

This package presents it:

    chapters/   what the chapters share: the paper's runs, claims, figures, panels, sweeps

All of them build on `checks` (clear errors), `digest` (values as names) and `files` (files that are whole or absent). A notebook
needs the names below; import everything else from its own module.
"""

from ihbook.banks import from_array, load_bank
from ihbook.clamps import run_with_clamps
from ihbook.config import BankConfig, ModelConfig, RunConfig, TaskConfig
from ihbook.engine.checkpoints import load_weights, save_weights
from ihbook.engine.cluster import connect
from ihbook.engine.store import Store, fetch
from ihbook.engine.train import seeds, train
from ihbook.metrics import measure, phase_change

__all__ = ["BankConfig", "ModelConfig", "RunConfig", "Store", "TaskConfig", "connect", "fetch", "from_array", "load_bank",
           "load_weights", "measure", "phase_change", "run_with_clamps", "save_weights", "seeds", "train"]
