"""Clamps: interventions that hold throughout training, or on a finished network.

`write.py` says what a clamp is, `attention.py` and `content.py` hold the catalogue, and `compose.py` makes one forward pass of
many clamps. The rest of the network computes from what a clamp sets, and learns around it. A replaced entry passes no gradient to
what it replaced; everything else passes its own. Nothing is detached except a donor network, which is frozen. Clamps compose by
standing in one list. A clamp raises ValueError at once for an impossible value, and in `writes` where the network can't have it.
A reader's own clamp is a frozen dataclass with a method `writes(shape)` that returns a list of `Write` (see Extending).
"""

from ihbook.clamps.attention import (
    BlockPreviousToken,
    HeadTemperature,
    Induction,
    LabelAttentionOnly,
    PreviousToken,
    SimilarityMatch,
)
from ihbook.clamps.compose import run_with_clamps
from ihbook.clamps.content import Ablate, AblateEmbedding, Copy, Graft, PerfectLayer1, Preserve, Steer
from ihbook.clamps.write import Clamp, During, Shape, Write

__all__ = ["Ablate", "AblateEmbedding", "BlockPreviousToken", "Clamp", "Copy", "During", "Graft", "HeadTemperature", "Induction",
           "LabelAttentionOnly", "PerfectLayer1", "Preserve", "PreviousToken", "Shape", "SimilarityMatch", "Steer", "Write",
           "run_with_clamps"]
