"""The native decoder against transformers: logits, text, batches with padding, beams, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from rarefy.activations.gates.channel_threshold import ChannelThreshold
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gates.topk import TopK
from rarefy.activations.gates.topk_ste import StraightTopK
from rarefy.activations.rows import collect_rows
from rarefy.core.attach import attach_gate, gated
from rarefy.core.errors import BadInput, Refused
from rarefy.kernels.library import available, instruction_set, native
from rarefy.layouts import LAYOUTS

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(native() is None, reason="the native kernels were not built here")

from rarefy.hub.decoder import PLACES, UNITS, DecoderCache, use_decoder  # noqa: E402
from rarefy.hub.engines import use_engine  # noqa: E402
from rarefy.hub.load import load  # noqa: E402
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


def structured(hidden):
    """Weights that every layout can hold: of each four columns one, in pairs of rows that agree, and one row of zeros."""
    model = llama(hidden_size=hidden, intermediate_size=hidden + 12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                keep = torch.rand(-(-p.shape[0] // 2), -(-p.shape[1] // 4), 4, generator=torch.Generator().manual_seed(len(name))).argsort(-1) == 0
                p.mul_(keep.flatten(1).repeat_interleave(2, 0)[: p.shape[0], : p.shape[1]])
                p[2] = 0
    return model


@pytest.mark.parametrize("hidden", [48, 60])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_model_in_any_layout_decodes_natively(tmp_path, layout, hidden):
    save_packed(structured(hidden), None, tmp_path / "packed", layout)
    plain, again = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed") for _ in range(2))
    use_engine(again, "native")
    assert (again.rarefy_copied_bytes > 0) == (layout == "compact")  # which is decoded as bitmask
    ids, grown = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (2, 3))
    with torch.no_grad():
        want = plain(torch.cat([ids, grown], 1), use_cache=False).logits
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = again(ids, use_cache=True)
            got = [out.logits] + [again(grown[:, [t]], past_key_values=out.past_key_values, use_cache=True).logits for t in range(3)]
            error = (torch.cat(got, 1) - want).norm() / want.norm()
            assert error < (1e-5 if LAYOUTS[layout].lossless else 0.02), f"{layout} on {threads} threads: {error}"
    torch.set_num_threads(1)


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


GATES = {
    "threshold": lambda: Threshold(density=0.5),
    "channels": lambda: ChannelThreshold(density=0.5),
    "topk": lambda: TopK(0.4),
    "blocks": lambda: StraightTopK(0.5, block=4),
}


def gated_pair(places, gate, turn=lambda model: model, **changes):
    """A model with gates calibrated on its own activations, and a copy that decodes in native code."""
    model = llama(**changes)
    ids = torch.randint(1, 61, (2, 60))
    paths = [f"model.layers.{n}.{place}" for n in range(3) for place in places]
    for path, rows in collect_rows(model, paths, [{"input_ids": ids}]).items():
        mine = gate()
        mine.calibrate(rows)
        attach_gate(model, path, mine)
    model = turn(model)
    fast = copy.deepcopy(model)
    for place, mine in gated(model).items():
        if mine.stored:
            gated(fast)[place].threshold = mine.threshold.clone()
    return model, use_decoder(fast)


def decoded(fast, ids, prompt):
    out = fast(ids[:, :prompt], use_cache=True)
    got = [out.logits]
    for t in range(prompt, ids.shape[1]):
        out = fast(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        got.append(out.logits)
    return torch.cat(got, 1)


LINEAR_PLACES = tuple(PLACES.values())


@pytest.mark.parametrize("places", [LINEAR_PLACES, (UNITS,), (*LINEAR_PLACES, UNITS), ("self_attn.k_proj", "mlp.down_proj")], ids=["linears", "units", "all", "two"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gated_logits_are_transformers_over_many_steps(gate, places):
    plain, fast = gated_pair(places, gate)
    ids = torch.randint(1, 61, (1, 90))
    with torch.no_grad():
        want, dense = plain(ids).logits, llama()(ids).logits
    got = decoded(fast, ids, 40)
    assert (dense - want).abs().max() > 1e-2  # the gates do something
    assert (got - want).abs().max() < 1e-3
    assert fast.model.layers[1].mlp.down_proj.weight.stride() == (1, 48)


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("threads", [1, 2])
def test_gated_prompts_with_padding_are_transformers(isa, threads):
    plain, fast = gated_pair((*LINEAR_PLACES, UNITS), GATES["threshold"])
    ids, mask, before = torch.randint(1, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long), torch.get_num_threads()
    for row, pads in enumerate((0, 3, 7)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    try:
        torch.set_num_threads(threads)
        with instruction_set(isa):
            assert torch.equal(*(model.generate(ids, attention_mask=mask, max_new_tokens=25) for model in (plain, fast)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", available())
def test_a_closed_unit_spares_its_row_of_up_and_its_column_of_down(isa):
    model = llama(num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    open_, shut = torch.zeros(100), torch.full((100,), float("inf"))
    attach_gate(model, f"model.layers.0.{UNITS}", gate := ChannelThreshold(channels=100))
    gate.threshold = torch.where(torch.arange(100) % 3 == 0, open_, shut)
    with torch.no_grad(), instruction_set(isa):
        want = model(ids := torch.randint(1, 61, (1, 20))).logits
        mlp.up_proj.weight[gate.threshold > 0] = float("nan")
        mlp.down_proj.weight[:, gate.threshold > 0] = float("nan")
        assert (decoded(use_decoder(model), ids, 7) - want).abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["flat", "columns", "bitmask"])
def test_gated_packed_folders_decode_as_transformers_does(layout, tmp_path):
    def packed(model):
        save_packed(model, None, tmp_path / "packed", layout)
        return load(tmp_path / "packed").model

    plain, fast = gated_pair((*LINEAR_PLACES, UNITS), GATES["channels"], packed)
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    assert sum(p.numel() * p.element_size() for p in fast.parameters()) == size
    ids = torch.randint(1, 61, (1, 40))
    with torch.no_grad():
        assert (decoded(fast, ids, 15) - decoded(plain, ids, 15)).abs().max() < 1e-3


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("places", [(*LINEAR_PLACES, UNITS), (UNITS,)], ids=["all", "units"])
@pytest.mark.parametrize("layout", ["int8", "int4", "int4-asymmetric"])
def test_gated_integer_layers_decode_as_transformers_does(layout, places, isa, tmp_path):
    """Short texts: x is rounded to 8 bits, so that a difference in the last bit may become one of 1/127 in some entry, and that one grows."""

    def packed(model):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[::3, 32:] = 0.0  # groups that are not stored
        save_packed(model, None, tmp_path / "packed", layout)
        return load(tmp_path / "packed").model

    plain, fast = gated_pair(places, GATES["channels"], packed, hidden_size=60)
    with torch.no_grad(), instruction_set(isa):
        texts = torch.randint(1, 61, (24, 1, 4))
        errors = torch.stack([(decoded(fast, ids, 2) - decoded(plain, ids, 2)).abs().amax((0, 2)) for ids in texts])
    assert (errors < 1e-3).double().mean() > 0.9


def test_threads_give_the_same_bits_of_gated_integer_layers(tmp_path):
    def packed(model):
        save_packed(model, None, tmp_path / "packed", "int4")
        return load(tmp_path / "packed").model

    _, fast = gated_pair((*LINEAR_PLACES, UNITS), GATES["threshold"], packed, intermediate_size=200)
    ids, before, seen = torch.randint(1, 61, (2, 12)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(decoded(fast, ids, 5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_turned_layer_no_longer_saves_as_the_layer_of_its_plan(tmp_path):
    model = llama()
    attach_gate(model, "model.layers.0.mlp.down_proj", TopK(0.5))
    save_packed(model, None, tmp_path / "packed", "flat")
    fast = use_decoder(load(tmp_path / "packed").model)
    assert fast.model.layers[0].mlp.down_proj.layer.layout == "columns"
    with pytest.raises(Refused, match="not the packed layer of the plan any more"):
        fast.save_pretrained(tmp_path / "again")


def test_turned_weights_are_decoded_again_and_saved_as_they_were(tmp_path):
    model = llama()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    attach_gate(model, "model.layers.0.mlp.down_proj", TopK(0.5))
    ids = torch.randint(1, 61, (1, 9))
    first, again = (use_decoder(model)(ids, use_cache=True).logits for _ in range(2))
    assert torch.equal(first, again) and torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)
    save_packed(model, None, tmp_path / "packed", "flat")
    assert (load(tmp_path / "packed").model(ids).logits - first).abs().max() < 1e-3


def test_a_refused_model_is_left_as_it_was():
    model = llama()
    attach_gate(model, "model.layers.0.mlp.down_proj", TopK(0.5))
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(BadInput, match="has forward hooks"):
        use_decoder(model)
    assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()


class Odd(Threshold):
    name = "odd"

    def keep(self, x):
        return x > 0


@pytest.mark.parametrize(
    ("place", "gate", "message"),
    [
        ("model.layers.1.mlp.up_proj", Odd, "model.layers.1 up has a odd gate: the native decoder computes threshold, channel-threshold, topk, straight-topk"),
        (f"model.layers.1.{UNITS}", Odd, "model.layers.1 units has a odd gate"),
        ("model.layers.1.mlp.act_fn", Threshold, "the gate on model.layers.1.mlp.act_fn: the native decoder computes gates on what"),
        ("model.layers.0.mlp.up_proj:output", Threshold, "the gate on model.layers.0.mlp.up_proj:output"),
        ("lm_head", Threshold, "the gate on lm_head"),
        ("model.norm", Threshold, "the gate on model.norm"),
        ("model.layers.0.mlp.down_proj", lambda: ChannelThreshold(channels=7), "model.layers.0 down has 7 thresholds: it reads 100 channels"),
        ("model.layers.0.mlp.down_proj", lambda: StraightTopK(0.5, block=7), "model.layers.0 down keeps some of every 7 activations: it reads 100"),
    ],
)
def test_gates_it_does_not_compute_are_refused_by_name(place, gate, message):
    model = llama()
    attach_gate(model, place, gate())
    with pytest.raises(BadInput, match=message):
        use_decoder(model)


def test_of_equal_magnitudes_the_first_are_kept():
    model = llama(num_hidden_layers=1, intermediate_size=64)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for half in (mlp.gate_proj.weight, mlp.up_proj.weight):
            half[32:] = half[:32]  # every unit twice
    attach_gate(model, "model.layers.0.mlp.down_proj", TopK(15 / 64))
    ids = torch.randint(1, 61, (1, 30))
    with torch.no_grad():
        want = model(ids).logits
        mlp.down_proj.weight[:, 32:] *= 1e3  # of the 15 kept, the last one is a first of two
        assert (model(ids).logits - want).abs().max() > 1
        mlp.down_proj.weight[:, 32:] /= 1e3
        assert (decoded(use_decoder(model), ids, 10) - want).abs().max() < 1e-3
