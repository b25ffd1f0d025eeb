"""Uniform thresholds: what every matrix of every block reads, each at the same density. The plain baseline of what shares densities out."""

from __future__ import annotations

from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.places.block_inputs import BlockInputs
from rarefy.activations.sharing.even import Even
from rarefy.core.records import Gating

UNIFORM_THRESHOLD = Gating("uniform-threshold", ((BlockInputs(), Threshold),), Even())
