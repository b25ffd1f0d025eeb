"""Packed layers in native code: what they compute, in which cases, and that a moved or edited tensor is seen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.core.errors import BadInput
from rarefy.hub.load import load
from rarefy.hub.packed import PackedLinear, save_packed
from rarefy.hub.plan import Layer
from rarefy.kernels.library import native
from rarefy.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")


def sparse(rows: int = 24, columns: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) < 0.4)


def layer(layout: str) -> tuple[PackedLinear, torch.Tensor]:
    weight = sparse()
    data = LAYOUTS[layout].pack(weight)
    return PackedLinear(Layer.of(weight, data, layout), data, nn.Parameter(torch.randn(24))), LAYOUTS[layout].unpack(data, (24, 70), weight.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_few_and_many_rows(layout: str, rows: int) -> None:
    packed, weight = layer(layout)
    x = torch.randn(rows, 70)
    want = nn.functional.linear(x, weight, packed.bias)
    with torch.no_grad():
        error = (packed(x) - want).norm() / want.norm()
    assert error < (1e-6 if LAYOUTS[layout].lossless else 0.01)  # int layouts round a few rows of x to 8 bits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_compiled_code_take_the_dense_product(layout: str) -> None:
    packed, weight = layer(layout)
    x = torch.randn(2, 70, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 70))
    assert packed.bias.grad is not None and packed.bias.grad.eq(2).all()
    compiled = torch.compile(packed, backend="eager")
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, weight, packed.bias))


def test_edited_moved_and_copied_bytes_are_seen() -> None:
    packed, _ = layer("bitmask")
    x = torch.ones(1, 70)
    with torch.no_grad():
        before = packed(x)
        twin = copy.deepcopy(packed)
        other = sparse() * 2
        packed.weight.data.copy_(LAYOUTS["bitmask"].pack(other))
        packed.weight[:0].zero_()  # a write in place
        torch.testing.assert_close(packed(x), 2 * (before - packed.bias) + packed.bias)
        torch.testing.assert_close(twin(x), before)


def test_the_decoder_reads_a_packed_folder(tmp_path: Path) -> None:
    from rarefy.hub.decoder import use_decoder

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.3)).eval()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < 0.5
    ids = torch.randint(1, 61, (2, 20))
    for layout in ("bitmask", "int8", "int4-asymmetric"):
        save_packed(model, None, tmp_path / layout, layout)
        packed = load(tmp_path / layout).model
        with torch.no_grad():
            rounded = packed(ids, use_cache=False).logits
            got = use_decoder(packed)(ids, use_cache=True).logits
        assert packed.rarefy_decoder is not None and isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)
        assert (got - rounded).norm() / rounded.norm() < (1e-5 if layout == "bitmask" else 0.05)


def test_a_head_in_another_layout_changes_the_logits_a_little_and_says_so() -> None:
    from rarefy.hub.engines import use_engine

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    ids = torch.randint(1, 61, (1, 9))
    with torch.no_grad():
        want = model(ids).logits
        assert use_engine(model, "native", "int8").endswith("head int8")
        error = (model(ids, use_cache=True).logits - want).norm() / want.norm()
    assert 1e-5 < error < 0.02
    with pytest.raises(BadInput, match="layout 'int3': known are bitmask"):
        use_engine(model, "native", "int3")
    with pytest.raises(BadInput, match="head 'int8' with transformers"):
        use_engine(model, "transformers", "int8")
