"""Low-rank adapters on packed layers: by hand, and those of peft where it is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import MissingExtra, Refused
from rarefy.hub.load import load
from rarefy.hub.packed import PackedLinear, dequantize, save_packed
from rarefy.hub.peft import on_packed

transformers = pytest.importorskip("transformers")
IDS = torch.arange(1, 13).view(2, 6)


class Adapter(nn.Module):
    """What a LoRA library puts around a layer that it knows only by in_features, out_features and forward."""

    def __init__(self, base: Any, rank: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, rank, generator=generator) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < 0.4
    save_packed(model, None, tmp_path / "packed", embeddings="int8")
    return tmp_path / "packed"


def pair(folder: Path) -> tuple[Any, Any]:
    """The packed model, and a plain one of the same weights."""
    return load(folder).model, dequantize(load(folder).model)


def trained(model: Any, parameters: list[nn.Parameter], steps: int = 12) -> list[float]:
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_adapters_train_on_packed_layers_as_on_plain_ones(folder: Path) -> None:
    losses, states = [], []
    for model in pair(folder):
        model.requires_grad_(False)
        bytes_before = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        for layer in model.model.layers:
            layer.self_attn.q_proj, layer.mlp.down_proj = Adapter(layer.self_attn.q_proj), Adapter(layer.mlp.down_proj)
        live = [p for p in model.parameters() if p.requires_grad]
        losses.append(trained(model, live))
        states.append(live)
        assert all(torch.equal(model.get_submodule(name.replace("q_proj", "q_proj.base").replace("down_proj", "down_proj.base")).weight, was) for name, was in bytes_before.items())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(*states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def test_without_peft_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"rarefy\[peft\]"):
        on_packed(object())


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 4, **changes})


def test_peft_trains_on_packed_layers_as_on_plain_ones(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    losses = []
    packed, plain = pair(folder)
    for model, config in ((packed, on_packed(lora())), (plain, lora())):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        losses.append(trained(adapted, [p for p in adapted.parameters() if p.requires_grad]))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    mine = peft.get_peft_model(load(folder).model, on_packed(lora()))
    mine.load_state_dict({k: torch.randn_like(v) if "lora_" in k else v for k, v in mine.state_dict().items()})
    mine.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder).model, tmp_path / "adapter", config=on_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, mine(IDS).logits)
        with mine.disable_adapter():
            assert torch.equal(mine(IDS).logits, load(folder).model(IDS).logits)


def test_the_trainer_takes_adapters_and_refuses_packed_weights_alone(folder: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(load(folder).model)
    peft = pytest.importorskip("peft")
    validate_quantization_for_training(peft.get_peft_model(load(folder).model, on_packed(lora())))


def test_peft_is_refused_what_reads_the_dense_weight(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(folder).model, on_packed(lora()))
    with pytest.raises(Refused, match=r"merging an adapter into PackedLinear.*its weights are packed.*dequantize"):
        model.merge_and_unload()
    assert isinstance(model.unload().model.layers[0].mlp.down_proj, PackedLinear)
    for changes in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(Refused, match="it reads the dense weight"):
            on_packed(lora(**changes))
    with pytest.raises(Refused, match="LoRA on PackedEmbedding"):
        peft.get_peft_model(load(folder).model, on_packed(lora(target_modules=["embed_tokens"])))
    with pytest.raises(ValueError, match="Target module PackedLinear"):
        peft.get_peft_model(load(folder).model, lora())
    plain = copy.deepcopy(dequantize(load(folder).model))
    assert peft.get_peft_model(plain, on_packed(lora())).merge_and_unload() is not None
