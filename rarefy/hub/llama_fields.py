"""What the config of a Llama-family model may say where it is computed by others than transformers."""

from __future__ import annotations

from typing import Any

# {config field: what it must be}; anything else changes what a layer computes, and is refused by name.
FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "attention_bias": (False, None),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False,),
}
