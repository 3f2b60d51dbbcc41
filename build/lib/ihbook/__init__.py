"""*What needs to go right for an induction head?* (Singh et al., 2024), to read, rerun, take apart and extend.

A map of the house. Imports run one way: what stands higher here is used by what stands lower, never the reverse.

What the paper is about: read it first, from top to bottom.

    config      what a run is: frozen values that decide every number
    task        banks of characters, splits, sequences, evaluation sets
    model       the transformer: weights, tokens and overrides in, named activations out
    clamps/     what a clamp is, the catalogue, how clamps compose
    metrics     losses, induction strength, composition scores, the time of the phase change
    toy         the paper's toy model

What runs it:

    banks/      glyphs, Omniglot, the authors' file, plain vectors, an array of one's own; downloads
    engine/     many runs as one program: the step, the loop, processes, a cluster, the store of finished runs

What tells of it:

    chapters/   what the chapters share: the paper's runs, claims, figures, panels, sweeps

On the ground stand `checks` (clear errors), `digest` (values as names) and `files` (written whole or not at all). The names below
are those that a notebook needs; everything else is imported from where it stands.
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
