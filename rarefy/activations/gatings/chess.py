"""CHESS: channel-wise thresholds on MLP units, and plain ones on what the query and output matrices read."""

from __future__ import annotations

from rarefy.activations.gates.channel_threshold import ChannelThreshold
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.places.attention_ends import AttentionEnds
from rarefy.activations.places.mlp_units import MlpUnits
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating, Paper

CHESS = Gating(
    "chess",
    ((MlpUnits(), ChannelThreshold), (AttentionEnds(), Threshold)),
    Even(),
    paper=Paper(
        "chess",
        "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
        "arXiv 2409.01366, section 3; github.com/ZeonfaiHo/CHESS",
        (
            "one quantile over at most 2,048 calibration tokens, where the code averages the quantiles of chunks",
            "expected squares and scores come from one sample of tokens, where the code makes two passes",
        ),
    ),
)
