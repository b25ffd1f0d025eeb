"""The once-flow on real architectures: exact counts read from the weights, cascade and parallel, dtypes, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.core.collect import collect_all
from rarefy.core.discover import recipes
from rarefy.core.errors import BadInput
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.patterns import parse_pattern
from rarefy.weights.prune import prune, relative_error, statistic
from rarefy.weights.sites import find_sites
from rarefy.weights.solvers.keep import Keep

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "BERT": ("BertForMaskedLM", "BertConfig", {**SMALL, "max_position_embeddings": 32}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def build(family: str) -> Any:
    model, config, options = FAMILIES[family]
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize("recipe", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_pruned_unpatched_to_the_exact_count(family: str, recipe: str) -> None:
    model = build(family)
    spared = model.get_input_embeddings().weight.clone()
    report = prune(model, [{"input_ids": IDS}], recipes()[recipe], density=0.5)
    params = dict(model.named_parameters())
    sites = {s.name: s for s in find_sites(model)}
    assert len(report["sites"]) == len(sites) >= 8
    for record in report["sites"]:
        weight = sites[record["name"]].read(params[sites[record["name"]].key])
        assert int((weight != 0).sum()) == record["kept"]
        assert 0 < record["error"] < 1 and record["error"] == record["error_mask_only"]
    assert report["density"] == sum(r["kept"] for r in report["sites"]) / sum(s.numel for s in sites.values()) == 0.5
    assert torch.equal(spared, model.get_input_embeddings().weight)
    assert not any("gate.weight" in n or "lm_head" in n or "router" in n for n in sites)


def test_cascade_and_parallel_see_different_inputs_and_agree_on_the_first_block() -> None:
    dense = build("Llama")
    reports = {}
    for mode in ("cascade", "parallel"):
        model = build("Llama")
        model.load_state_dict(dense.state_dict())
        reports[mode] = prune(model, [{"input_ids": IDS}], recipes()["wanda"], density=0.4, mode=mode)["sites"]
    assert reports["cascade"][0]["error"] == reports["parallel"][0]["error"]
    assert reports["cascade"][-1]["error"] != reports["parallel"][-1]["error"]


def test_block_by_block_statistics_equal_those_of_the_whole_forward() -> None:
    model = build("Gemma3")
    again = build("Gemma3")
    again.load_state_dict(model.state_dict())
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    from rarefy.weights.statistics.input import Hessian, InputNorm

    known = collect_all(model, batches, find_sites(model), [InputNorm(), Hessian()])
    a = prune(model, batches, recipes()["wanda"], density=0.5, statistics=known)
    b = prune(again, batches, recipes()["wanda"], density=0.5, mode="parallel")
    for left, right in zip(a["sites"], b["sites"], strict=True):
        assert left["error"] == pytest.approx(right["error"], rel=1e-5)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_padding_changes_nothing(family: str) -> None:
    model, mask = build(family), torch.ones_like(IDS)
    mask[1, 6:] = 0
    noisy = IDS.clone()
    noisy[1, 6:] = 3
    from rarefy.weights.statistics.input import InputNorm

    sites = find_sites(model)
    first, second = (collect_all(model, [{"input_ids": ids, "attention_mask": mask}], sites, [InputNorm()])["input_norm"] for ids in (IDS, noisy))
    for name, norm in first.items():
        assert torch.allclose(norm, second[name], rtol=1e-5), name


def test_bfloat16_stays_bfloat16_and_a_seed_gives_the_same_bytes() -> None:
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build("Llama").bfloat16()
        prune(model, [{"input_ids": IDS}], recipes()["random-pruning"], density=0.3, seed=5)
        outs.append(model.model.layers[0].mlp.up_proj.weight)
    assert outs[0].dtype == torch.bfloat16 and torch.equal(*outs)


def test_convolutions_collect_rows_in_canonical_order() -> None:
    from rarefy.weights.statistics.input import Hessian

    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 9, 8)
    (site,) = find_sites(conv)
    hessian = collect_all(conv, [x], [site], [Hessian()])["hessian"][site.name]
    matrix = site.read(conv.weight.detach()).reshape(5, -1)
    assert float(torch.trace(matrix @ hessian @ matrix.t())) == pytest.approx(float(conv(x).square().sum()), rel=1e-4)


def test_tied_weights_appear_once_and_two_four_holds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Tied()
    report = prune(model, [torch.randn(4, 8)], recipes()["wanda"], density=0.5, pattern=parse_pattern("2:4"))
    assert [s["name"] for s in report["sites"]] == ["a.weight"] and model.a.weight is model.b.weight
    assert ((model.a.weight != 0).view(-1, 4).sum(1) == 2).all()


def test_nan_activations_are_named_by_site_and_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    before = model[1].weight.clone()
    with pytest.raises(BadInput, match=r"site 1\.weight sees 3 NaN or inf values in calibration batch 0"):
        prune(model, [torch.randn(3, 4)], recipes()["wanda"], density=0.5)
    assert torch.equal(before, model[1].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"density 1\.5: a density is the fraction"),
        ({"density": 0.7, "pattern": "2:4"}, r"the nearest that the pattern reaches is 0\.5"),
        ({"density": 0.5, "mode": "sideways"}, "a mode is 'cascade' or 'parallel'"),
        ({"density": 0.5, "include": ["nothing*"]}, "matches no module"),
    ],
)
def test_refusals_name_the_value_and_the_rule(options: dict[str, Any], message: str) -> None:
    if "pattern" in options:
        options = {**options, "pattern": parse_pattern(options["pattern"])}
    with pytest.raises(BadInput, match=message):
        prune(nn.Linear(8, 8), [torch.randn(2, 8)], recipes()["wanda"], **options)


def test_activation_recipes_refuse_to_run_without_batches() -> None:
    with pytest.raises(BadInput, match="no calibration batches for input_norm"):
        prune(nn.Linear(8, 8), [], recipes()["wanda"], density=0.5)


class Grouped(nn.Module):
    """An embedding, a grouped convolution and a matrix: the inputs of the last alone can be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def test_a_weight_only_recipe_measures_what_can_be_measured_and_says_which() -> None:
    torch.manual_seed(0)
    model, ids = Grouped(), torch.arange(10).view(2, 5)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    hessian = collect_all(model, [ids], find_sites(model, include=["out"]), [statistic("hessian")])["hessian"]["out.weight"]
    record = prune(model, [ids], recipes()["magnitude"], density=0.5, include=["*"])
    assert {s["name"]: s["error_on"] for s in record["sites"]} == {"embed.weight": "weight", "conv.weight": "weight", "out.weight": "inputs"}
    for site in record["sites"]:
        known = hessian if site["error_on"] == "inputs" else None
        assert site["error"] == pytest.approx(relative_error(dense[site["name"]], dict(model.named_parameters())[site["name"]].detach(), known), rel=1e-5)
    assert [s.get("dead_inputs") for s in record["sites"]] == [None, None, 0]
    with pytest.raises(BadInput, match=r"conv\.weight.*weight alone|embed\.weight.*weight alone"):
        prune(Grouped(), [ids], recipes()["wanda"], density=0.5, include=["*"])


def test_dead_inputs_are_counted_from_a_hessian_and_from_a_norm() -> None:
    x = torch.randn(6, 8)
    x[:, [1, 4, 5]] = 0
    for recipe, errors in (("sparsegpt", True), ("wanda", False), ("magnitude", True)):
        (site,) = prune(nn.Linear(8, 8), [x], recipes()[recipe], density=0.5, errors=errors)["sites"]
        assert site["dead_inputs"] == 3
        assert site["error_on"] == ("inputs" if errors else "weight")
    (site,) = prune(nn.Linear(8, 8), [x], recipes()["magnitude"], density=0.5, errors=False)["sites"]
    assert "dead_inputs" not in site


class Spare(nn.Module):
    """A chain of two blocks, a matrix before and one after it, and one that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        return self.back(x)


@pytest.mark.parametrize("known", [False, True])
def test_a_site_that_saw_no_row_is_marked_outside_the_chain_and_with_known_statistics(known: bool) -> None:
    model, batches = Spare(), [torch.randn(20, 8)]
    statistics = collect_all(model, batches, find_sites(model), [statistic("hessian")]) if known else None
    sites = prune(model, batches, recipes()["sparsegpt"], density=0.5, statistics=statistics)["sites"]
    assert [s["name"] for s in sites if s.get("idle")] == ["spare.weight"]
    (spare,) = (s for s in sites if s.get("idle"))
    assert spare["error_on"] == "weight" and "dead_inputs" not in spare


@pytest.mark.parametrize("mode", ["cascade", "parallel"])
def test_sites_after_the_chain_see_the_pruned_model_in_cascade_mode_alone(mode: str) -> None:
    torch.manual_seed(0)
    model, x = Spare(), torch.randn(20, 8)
    dense = copy.deepcopy(model)
    record = prune(model, [x], recipes()["wanda"], density=0.3, mode=mode, exclude=["spare"])
    errors = {s["name"]: s["error"] for s in record["sites"]}
    seen = {}
    for side in (dense, model):  # what the pruned model feeds its last matrix, and what the dense one feeds each
        inputs: dict[str, torch.Tensor] = {}
        for name, module in side.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, a, name=name, inputs=inputs: inputs.update({f"{name}.weight": a[0].detach()}))
        side(x)
        seen[side] = inputs
    assert record["mode"] == mode
    for name, error in errors.items():
        rows = seen[model if mode == "cascade" else dense][name]
        old, new = (dict(m.named_parameters())[name].detach() for m in (dense, model))
        assert error == pytest.approx(relative_error(old, new, rows.t() @ rows), rel=1e-4), name


def test_a_model_that_is_no_chain_is_recorded_as_parallel() -> None:
    assert prune(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), [torch.randn(9, 8)], recipes()["wanda"], density=0.5)["mode"] == "parallel"


def test_errors_are_those_of_the_weights_as_stored() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 16, bias=False).bfloat16(), torch.randn(64, 16).bfloat16()
    dense = model.weight.detach().float().clone()
    (site,) = prune(model, [x], recipes()["sparsegpt"], density=0.9)["sites"]
    hessian = x.float().t() @ x.float()
    assert site["error"] == pytest.approx(relative_error(dense, model.weight.detach().float(), hessian), rel=1e-6)


def test_a_bias_for_a_layer_without_one_is_an_error() -> None:
    class Shifting(Keep):
        def solve(self, weights: Any, budget: Any, **options: Any) -> Any:
            return {n: replace(p, bias=torch.ones(p.mask.shape[0])) for n, p in super().solve(weights, budget, **options).items()}

    recipe = replace(recipes()["magnitude"], solver=Shifting(Magnitude()))
    layer = nn.Linear(4, 4)
    prune(layer, [], recipe, density=0.5)
    assert layer.bias.tolist() == [1.0] * 4
    bare = nn.Linear(4, 4, bias=False)
    before = bare.weight.detach().clone()
    with pytest.raises(BadInput, match=r"returned for weight: the layer has none to write it to"):
        prune(bare, [], recipe, density=0.5)
    assert torch.equal(bare.weight, before)
