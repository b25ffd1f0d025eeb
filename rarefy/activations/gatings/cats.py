"""CATS: one threshold a layer on what the activation function of a gated MLP returns."""

from __future__ import annotations

from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.places.mlp_units import MlpUnits
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating, Paper

CATS = Gating(
    "cats",
    ((MlpUnits(), Threshold),),
    Even(),
    paper=Paper(
        "cats",
        "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
        "arXiv 2404.08763; github.com/ScalingIntelligence/CATS",
        (
            "thresholds are quantiles over at most 2,048 calibration tokens, where the code has histograms of 20,000 bins between -2 and 2",
            "fine-tuning with the threshold is an ordinary training loop through the gate; its optional penalty and warm-up are not built in",
        ),
    ),
)
