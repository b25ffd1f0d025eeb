"""TEAL: thresholds on what every matrix of every block reads, the density of each found by a greedy search."""

from __future__ import annotations

from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.places.block_inputs import BlockInputs
from rarefy.activations.sharing.greedy_blocks import GreedyBlocks
from rarefy.core.records import Gating, Paper

TEAL = Gating(
    "teal",
    ((BlockInputs(), Threshold),),
    GreedyBlocks(),
    paper=Paper(
        "teal",
        "Training-Free Activation Sparsity in Large Language Models",
        "arXiv 2408.14690; github.com/FasterDecoding/TEAL",
        (
            "thresholds are quantiles of |x| over at most 2,048 calibration tokens, where the code reads both tails of a histogram of 10,000 bins as one symmetric distribution",
            "a move costs 2% of a block's multiply-adds, where the code's step of 0.05 of the query matrix costs about 0.4%; the last move is cut to meet the density exactly",
            "the error is the Frobenius norm over the last quarter of a sequence, where the code averages the norms of the channels; sizes are the matrices' own, where the code has a table",
            "every token is gated, where the paper leaves the first half of a prompt dense",
        ),
    ),
)
