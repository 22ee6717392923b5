"""The experts and routers of transformers with ours in their place: the same logits and the same gradients."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from moeyard.integrations import transformers as drop_in  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24, "num_key_value_heads": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "deepseek_v3": DEEPSEEK,
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 16, "num_key_value_heads": 4},
}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


@pytest.fixture(autouse=True)
def _registered() -> None:
    drop_in.register()


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.AutoConfig.for_model(name, **SMALL, **MODELS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moeyard").to(dtype)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Routers as drawn would be indifferent, and a zero bias would decide nothing.
            if name.endswith(("gate.weight", "e_score_correction_bias")):
                tensor.normal_(std=0.3)
    return model


def logits_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    ids = torch.randint(64, (2, 11), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"logits": out.logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    assert any("gate_up_proj" in key and want[key].abs().max() > 1e-6 for key in want)
    for key in want:
        torch.testing.assert_close(got[key], want[key], **TOLERANCE[dtype], msg=lambda m, key=key: f"{key}: {m}")


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_model_with_our_experts_is_the_eager_one(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    assert model.config._experts_implementation == "moeyard"
    ours = logits_and_gradients(model)
    model.set_experts_implementation("eager")
    assert_same(ours, logits_and_gradients(model), dtype)


def test_ours_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers go through our permutation, and neither does with "eager"."""
    calls = []
    permute = drop_in.permute_tokens
    monkeypatch.setattr(drop_in, "permute_tokens", lambda x, plan: calls.append(x.shape) or permute(x, plan))
    model = build("mixtral")
    model(input_ids=torch.arange(8)[None])
    assert calls == [(8, 32)] * 2
    model.set_experts_implementation("eager")
    model(input_ids=torch.arange(8)[None])
    assert len(calls) == 2


def test_from_pretrained(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moeyard")
    assert again.config._experts_implementation == "moeyard"
    ids = torch.arange(8)[None]
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def experts_of(module: str, name: str, **config: Any) -> Any:
    """An experts module by itself, its weights drawn at random."""
    room = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    experts = getattr(room, name)(SimpleNamespace(_experts_implementation="moeyard", **config)).double()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.3)
    return experts


def mixtral_experts(act: str = "silu") -> Any:
    config = {"num_local_experts": 4, "hidden_size": 12, "intermediate_size": 10, "hidden_act": act}
    return experts_of("mixtral", "MixtralExperts", **config)


LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gated": ("mixtral", "MixtralExperts", {"hidden_act": "silu"}),
    "gated by another activation": ("mixtral", "MixtralExperts", {"hidden_act": "gelu_pytorch_tanh"}),
    "transposed": ("aria", "AriaExperts", {"moe_num_experts": 4}),
    "interleaved, transposed, biased": ("gpt_oss", "GptOssExperts", {"swiglu_alpha": 1.702, "swiglu_limit": 1.0}),
    "no gate": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "relu2"}),
    "no gate, relu": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "relu"}),
    "no gate, gelu": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "gelu"}),
    "norm after the expert": ("muse_spark", "MuseSparkExperts", {"hidden_act": "silu", "post_norm_eps": 1e-5}),
}
SIZES = {
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "hidden_size": 12,
    "moe_hidden_size": 12,
    "moe_latent_size": None,
    "intermediate_size": 10,
    "moe_intermediate_size": 10,
}


def run(experts: Any, x: Tensor, ids: Tensor, weights: Tensor, how: str) -> dict[str, Tensor]:
    experts.config._experts_implementation = how
    experts.zero_grad(set_to_none=True)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = experts(x, ids, weights)
    out.square().sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


def draw(tokens: int, k: int = 2, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 12, dtype=torch.float64, generator=rng)
    ids = torch.rand(tokens, experts, generator=rng).argsort(1)[:, :k]
    return x, ids, torch.rand(tokens, k, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("idle", [False, True], ids=["all experts", "two idle experts"])
def test_layouts(layout: str, idle: bool) -> None:
    module, name, config = LAYOUTS[layout]
    experts = experts_of(module, name, **{**SIZES, **config})
    if hasattr(experts, "post_expert_norm"):
        experts.post_expert_norm = nn.RMSNorm(12, dtype=torch.float64)  # its own works in float32
    x, ids, weights = draw(9, experts=2 if idle else 4)
    ours, eager = (run(experts, x, ids, weights, how) for how in ("moeyard", "eager"))
    for key in eager:
        torch.testing.assert_close(ours[key], eager[key], rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_slots_of_other_ranks_add_nothing() -> None:
    """Expert parallelism marks them with the id E; token 0 has no expert here at all."""
    experts = mixtral_experts()
    x, ids, weights = draw(7)
    ids[0], ids[3, 1] = 4, 4
    ours, eager = (run(experts, x, ids, weights, how) for how in ("moeyard", "eager"))
    for key in eager:
        torch.testing.assert_close(ours[key], eager[key], rtol=1e-10, atol=1e-10)
    assert ours["out"][0].abs().sum() == 0
    assert ours["weights"][3, 1] == 0
    everything_elsewhere = run(experts, x, torch.full_like(ids, 4), weights, "moeyard")
    assert all(value.abs().sum() == 0 for value in everything_elsewhere.values())


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_no_tokens(act: str) -> None:
    experts = mixtral_experts(act)
    got = run(experts, *draw(0), "moeyard")
    assert got["out"].shape == (0, 12)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_bfloat16_and_autocast_are_near_float32(act: str) -> None:
    experts = mixtral_experts(act).float()
    x, ids, weights = draw(16)
    x, weights = x.float(), weights.float()
    want = run(experts, x, ids, weights, "moeyard")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(experts, x, ids, weights, "moeyard")
    # The router of Mixtral hands float32 weights to experts of any dtype.
    half = run(experts.bfloat16(), x.bfloat16(), ids, weights, "moeyard")
    assert cast["out"].dtype == torch.float32
    assert half["out"].dtype == torch.bfloat16
    for key in want:
        near = {"rtol": 0.05, "atol": 0.02 * float(want[key].abs().max())}
        torch.testing.assert_close(cast[key], want[key], **near)
        torch.testing.assert_close(half[key].float(), want[key], **near)


def test_no_grad_gives_the_same() -> None:
    experts = mixtral_experts()
    x, ids, weights = draw(9)
    with torch.no_grad():
        out = experts(x, ids, weights)
    assert not out.requires_grad
    assert torch.equal(out, run(experts, x, ids, weights, "moeyard")["out"])


def test_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"register: expected transformers 5\.0 or newer.*got 4\.57\.1"):
        drop_in.register()


def test_unsupported_weights_are_named() -> None:
    hook = importlib.import_module("transformers.integrations.moe")

    @hook.use_experts_implementation(is_concatenated=False)
    class Interleaved(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, nn.SiLU()

        def forward(self, *args: Any) -> None: ...

    experts = Interleaved(SimpleNamespace(_experts_implementation="moeyard"))
    with pytest.raises(ValueError, match=r"is_concatenated=False: expected an `_apply_gate` of Interleaved's own"):
        experts(*draw(3))
    experts = mixtral_experts()
    del experts.down_proj
    with pytest.raises(TypeError, match=r"MixtralExperts\.down_proj: expected one tensor for all experts, got None"):
        experts(*draw(3))
    experts.down_proj = nn.Parameter(torch.zeros(4, 12, 10, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"down_proj: expected 3 dimensions of floats, got .* of torch\.int8"):
        experts(*draw(3))


# ---- routers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_model_with_our_gate_is_the_eager_one(name: str) -> None:
    model = build(name)
    model.set_experts_implementation("eager")
    want = logits_and_gradients(model)
    with drop_in.use_moeyard_gate(model):
        assert_same(logits_and_gradients(model), want, torch.float32)
        recorded = model(input_ids=torch.arange(8)[None], output_router_logits=True)
    plain = model(input_ids=torch.arange(8)[None], output_router_logits=True)
    if "router_logits" in plain:  # what the auxiliary loss of transformers is taken from
        torch.testing.assert_close(recorded.router_logits, plain.router_logits)
        torch.testing.assert_close(recorded.aux_loss, plain.aux_loss)
    again = logits_and_gradients(model)
    assert all(torch.equal(again[key], want[key]) for key in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", drop_in._GATES)
def test_router(name: str, dtype: torch.dtype) -> None:
    """Logits, weights per expert, ids and gradients of every router that the gate knows."""
    room = {
        "Mixtral": "mixtral",
        "MiniMax": "minimax",
        "Qwen2Moe": "qwen2_moe",
        "Qwen3Moe": "qwen3_moe",
        "Qwen3Next": "qwen3_next",
        "Olmoe": "olmoe",
        "FlexOlmo": "flex_olmo",
        "DeepseekV3": "deepseek_v3",
        "Glm4Moe": "glm4_moe",
        "Dots1": "dots1",
    }[name.removesuffix("TopKRouter").removesuffix("TopkRouter")]
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=8,
        num_experts=8,
        hidden_size=12,
        norm_topk_prob=True,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    router = getattr(importlib.import_module(f"transformers.models.{room}.modeling_{room}"), name)(config).to(dtype)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in (router.weight, *router.buffers()):
            tensor.normal_(std=0.5, generator=rng)
    x = torch.randn(3, 7, 12, generator=rng).to(dtype)

    def outputs() -> list[Tensor]:
        router.zero_grad()
        logits, weights, ids = router(x)
        dense = torch.zeros(21, 8, dtype=weights.dtype).scatter(1, ids, weights)
        (dense * torch.arange(168.0).reshape(21, 8).sin()).sum().backward()
        return [logits.detach(), dense.detach(), ids.sort(1).values, router.weight.grad.clone()]

    want = outputs()
    with drop_in.use_moeyard_gate(nn.ModuleList([router])):
        got = outputs()
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tight)
    assert "forward" not in router.__dict__


def test_gate_without_renormalisation() -> None:
    """OLMoE's default: weights are the plain softmax scores."""
    model = build("olmoe")
    assert not model.config.norm_topk_prob
    with drop_in.use_moeyard_gate(model):
        _, weights, ids = model.model.layers[0].mlp.gate(torch.ones(1, 32))
    scores = (model.model.layers[0].mlp.gate.weight.sum(1)).softmax(0)
    torch.testing.assert_close(weights[0], scores[ids[0]])


def test_model_without_a_known_router() -> None:
    class SomeRouter(nn.Linear): ...

    with pytest.raises(ValueError, match=r"model: expected a router among MixtralTopKRouter, .* got SomeRouter"):
        drop_in.use_moeyard_gate(nn.Sequential(SomeRouter(3, 4)))
    with pytest.raises(ValueError, match="got none"):
        drop_in.use_moeyard_gate(nn.Linear(3, 4))
