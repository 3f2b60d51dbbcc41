"""The parity cases: the clamps of each golden case, by name."""

import dataclasses

import ihbook.clamps
from ihbook.clamps import (
    Ablate,
    BlockPreviousToken,
    Copy,
    Graft,
    HeadTemperature,
    Induction,
    LabelAttentionOnly,
    PerfectLayer1,
    Preserve,
    PreviousToken,
    SimilarityMatch,
)
from ihbook.config import ModelConfig

ONLY_3 = Ablate(tuple((1, h) for h in range(8) if h != 3))
PT_HEADS = ((0, 1), (0, 2), (0, 5))


def catalogue():
    """The class of every clamp that the package has."""
    return {kind for kind in vars(ihbook.clamps).values() if dataclasses.is_dataclass(kind) and hasattr(kind, "writes")}


def clamps(donor):
    """Case name -> clamps; `donor` holds the golden donor's weights."""
    return {
        "none": (),
        "only_l2h3": (ONLY_3,),
        "ablate_l2h3": (Ablate((1, 3)),),
        "pt_attend_l1h2": (PreviousToken((0, 2)), ONLY_3),
        "pt_attend_l1h125": (PreviousToken(PT_HEADS), ONLY_3),
        "pt_attend_l1h2_labels_only_s07": (PreviousToken((0, 2), 0.7, labels_only=True), ONLY_3),
        "pt_attend_l1h2_s07": (PreviousToken((0, 2), 0.7),),
        "pt_attend_l1h2_and_preserve_patterns_ablate_l1h5": (PreviousToken((0, 2)), Ablate((0, 5)), Preserve("patterns")),
        "match_and_block_pt_l1h25_and_ablate_l2h0": (Induction((1, 3)), BlockPreviousToken(((0, 2), (0, 5))),
                                                     Ablate((1, 0))),
        "layer1": (PerfectLayer1(), ONLY_3),
        "match": (Induction((1, 3)), ONLY_3),
        "match_s03": (Induction((1, 3), 0.3), ONLY_3),
        "copy": (Copy((1, 3)),),
        "layer1_copy": (PerfectLayer1(), Copy((1, 3))),
        "preserve_patterns_ablate_l1h125": (Ablate(PT_HEADS), Preserve("patterns")),
        "preserve_values_ablate_l1h125": (Ablate(PT_HEADS), Preserve("values")),
        "preserve_queries_ablate_l1h125": (Ablate(PT_HEADS), Preserve("queries")),
        "preserve_keys_ablate_l1h125": (Ablate(PT_HEADS), Preserve("keys")),
        "preserve_both_ablate_l1": (Ablate(tuple((0, h) for h in range(8))), Preserve(("patterns", "values"))),
        "similarity_match_t0": (SimilarityMatch((1, 3), 0.0), ONLY_3),
        "similarity_match_t05": (SimilarityMatch((1, 3), 0.5), ONLY_3),
        "block_pt_l1h25": (BlockPreviousToken(((0, 2), (0, 5))),),
        "block_pt_l1h25_labels_only": (BlockPreviousToken(((0, 2), (0, 5)), labels_only=True),),
        "temperature_l2h3_2": (HeadTemperature((1, 3), 2.0), HeadTemperature((1, 5), 0.5)),
        "label_attention_only_l2h35": (LabelAttentionOnly(((1, 3), (1, 5))),),
        "graft_layer1_from_donor": (Graft(donor, 0, "below"),),
        "graft_from_layer2_of_donor": (Graft(donor, 0, "above"),),
    }


VARIANTS = {
    "variant_sinusoidal": ModelConfig(positions="sinusoidal"),
    "variant_learned_position": ModelConfig(positions="learned"),
    "variant_no_norm": ModelConfig(layer_norm=False),
    "variant_mlp4_depth3": ModelConfig(n_layers=3, mlp_ratio=4),
    "variant_one_layer": ModelConfig(n_layers=1),
    "variant_heads4": ModelConfig(n_heads=4),
}
