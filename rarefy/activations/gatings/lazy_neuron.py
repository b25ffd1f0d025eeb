"""Top-k MLPs: every token keeps the same number of its largest MLP units."""

from __future__ import annotations

from rarefy.activations.gates.topk import TopK
from rarefy.activations.places.mlp_units import MlpUnits
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating, Paper

LAZY_NEURON = Gating(
    "lazy-neuron",
    ((MlpUnits(), TopK),),
    Even(),
    density=0.1,
    paper=Paper(
        "lazy-neuron",
        "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
        "arXiv 2210.06313",
        (
            "the largest magnitudes are kept, which are the largest units where they come from a ReLU",
            "calibration error, label noise and input corruptions are not measured here",
            "equations and section numbers rest on memory of the paper beyond its abstract, so the row stays partial and its twins are not counted",
        ),
    ),
)
