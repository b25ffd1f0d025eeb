"""The native decoder against transformers: logits, text, batches with padding, beams, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from rarefy.core.errors import BadInput, Refused
from rarefy.kernels.library import available, instruction_set, native
from rarefy.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")

from rarefy.hub.decoder import DecoderCache, use_decoder  # noqa: E402
from rarefy.hub.engines import use_engine  # noqa: E402
from rarefy.hub.packed import dequantize, save_packed  # noqa: E402


def llama(**changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 600,
        "pad_token_id": 0,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.3) + (p.dim() == 1)
    return model


def pair(**changes):
    model = llama(**changes)
    return model, use_decoder(copy.deepcopy(model))


@pytest.mark.parametrize("isa", available())
def test_logits_are_transformers_over_many_steps(isa):
    plain, fast = pair()
    ids = torch.randint(1, 61, (1, 400))
    with instruction_set(isa), torch.no_grad():
        want = plain(ids).logits
        out = fast(ids[:, :150], use_cache=True)
        got = [out.logits]
        for t in range(150, 400):
            out = fast(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits)
    assert (torch.cat(got, 1) - want).abs().max() < 1e-3
    assert isinstance(out.past_key_values, DecoderCache) and out.past_key_values.get_seq_length() == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"hidden_size": 60, "intermediate_size": 33},
    ],
)
def test_other_shapes(changes):
    plain, fast = pair(**changes)
    ids = torch.randint(1, 61, (2, 20))
    with torch.no_grad():
        assert (fast(ids, use_cache=True).logits - plain(ids).logits).abs().max() < 1e-3


def test_qwen2_has_biases():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
    )
    plain = transformers.Qwen2ForCausalLM(config).eval()
    for p in plain.parameters():
        p.data = torch.randn_like(p) * 0.3
    fast = use_decoder(copy.deepcopy(plain))
    ids = torch.randint(1, 61, (1, 20))
    with torch.no_grad():
        assert (fast(ids, use_cache=True).logits - plain(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=lambda how: "-".join(how) or "greedy",
)
def test_generate_is_transformers_own(how):
    plain, fast = pair()
    ids, mask = torch.randint(1, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    for row, pads in enumerate((0, 3, 7)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    texts = []
    for model in (plain, fast):
        torch.manual_seed(5)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=25, **how))
    assert torch.equal(*texts)


def test_calls_without_a_cache_are_transformers():
    plain, fast = pair()
    ids = torch.randint(1, 61, (1, 9))
    assert torch.equal(fast(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    fast(ids, labels=ids).loss.backward()
    assert fast.model.layers[0].mlp.up_proj.weight.grad is not None


def test_threads_give_the_same_bits():
    _, fast = pair()
    ids, before, seen = torch.randint(1, 61, (2, 30)), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(fast(ids, use_cache=True).logits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


def test_the_context_ends_with_a_sentence_and_the_cache_as_it_was():
    _, fast = pair(max_position_embeddings=16)
    out = fast(torch.ones(1, 16, dtype=torch.long), use_cache=True)
    with pytest.raises(BadInput, match="a context of 17 tokens: the model has 16 positions"):
        fast(torch.ones(1, 1, dtype=torch.long), past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values.store.length == [16]
    with pytest.raises(BadInput, match="outside the vocabulary"):
        fast(torch.full((1, 1), 61), use_cache=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type='dynamic'"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(changes, message):
    with pytest.raises(BadInput, match=message):
        use_decoder(llama(**changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [None, "bitmask", "int8"])
def test_half_precision_weights_are_copied_to_float32(tmp_path, dtype, layout):
    model = llama(tie_word_embeddings=True).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p[torch.rand_like(p) < 0.5] = 0
    if layout is not None:
        save_packed(model, None, tmp_path / "packed", layout)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    whole = dequantize(copy.deepcopy(model)).float()
    if layout == "int8":  # it rounds a few rows of x to 8 bits, in any dtype
        save_packed(whole, None, tmp_path / "whole", layout)
        whole = use_decoder(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
        assert whole.rarefy_copied_bytes == 0
    fast = use_decoder(model)
    ids = torch.randint(1, 61, (2, 20))

    def logits(decoding):
        with torch.no_grad():
            out = decoding(ids[:, :12], use_cache=True)
            return torch.cat([out.logits, *(decoding(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True).logits for t in range(12, 20))], 1)

    got = logits(fast)
    assert fast.dtype == dtype and got.dtype == torch.float32
    assert (got - logits(whole)).abs().max() < 1e-3
    dense = 4 * sum(p.numel() for p in whole.parameters())
    copied = {None: (dense, dense), "bitmask": (0.5 * dense, 0.75 * dense), "int8": (4 * 68 * 48, 4 * 68 * 48)}[layout]  # int8: the tied embedding and seven norms
    assert copied[0] <= fast.rarefy_copied_bytes <= copied[1]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_model_in_any_layout_decodes_natively_or_says_what_does_not(tmp_path, layout):
    model = llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.view(-1, 4)[:, 1:] = 0
    save_packed(model, None, tmp_path / "packed", layout)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    engine = use_engine(again)
    assert engine.startswith("rarefy") or f"model.layers.0 q in layout {layout}: the native decoder does not read that layout" in engine
    assert again.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


def test_other_models_hooks_and_dtypes_are_refused():
    with pytest.raises(BadInput, match="a GPT2LMHeadModel"):
        use_decoder(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    hooked = llama()
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(BadInput, match=r"model.layers.1 up has forward hooks"):
        use_decoder(hooked)
    with pytest.raises(BadInput, match="float32"):
        use_decoder(llama().double())
    _, fast = pair()
    out = fast(torch.ones(1, 4, dtype=torch.long), use_cache=True)
    with pytest.raises(Refused, match="output_attentions with a decoder cache"):
        fast(torch.ones(1, 1, dtype=torch.long), past_key_values=out.past_key_values, use_cache=True, output_attentions=True)
