"""Q-Sparse: every matrix of every block reads the k largest activations, and the gradient passes straight through."""

from __future__ import annotations

from rarefy.activations.gates.topk_ste import StraightTopK
from rarefy.activations.places.block_inputs import BlockInputs
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating, Paper

Q_SPARSE = Gating(
    "q-sparse",
    ((BlockInputs(), StraightTopK),),
    Even(),
    density=0.6,
    paper=Paper(
        "q-sparse",
        "Q-Sparse: All Large Language Models can be Fully Sparsely-Activated",
        "arXiv 2407.10969, section 2",
        (
            "the gate does not divide by the L2 norm of what it keeps: a model trained so has `rarefy.tasks.squared_relu_lm.UnitLinear` for its matrices",
            "the quantised variants, 8-bit activations and 1.58-bit weights, are not here",
            "the comparison with a dense model (replications/q_sparse_lm.py) has no committed result yet, so the row stays partial and its twin is not counted",
            "the scaling law is not here: the published constants, as rounded, put its optimum near 50% zeros and not at the printed 45.58%",
        ),
    ),
)
