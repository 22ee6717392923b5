"""A small Mixtral with moeyard's experts and gate: the loss, the gradients and the time beside transformers' own."""

import time

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moeyard.integrations.transformers import register, use_moeyard_gate

register()
config = MixtralConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=16,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, experts_implementation="moeyard")
tokens = torch.randint(512, (4, 256))


def step() -> tuple[float, torch.Tensor, float]:
    """Loss, all gradients in one vector, seconds."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    seconds = time.perf_counter() - start
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), seconds


def best(times: int = 3) -> tuple[float, torch.Tensor, float]:
    return min((step() for _ in range(times)), key=lambda result: result[2])


with use_moeyard_gate(model):
    ours = best()
model.set_experts_implementation("eager")
eager = best()
print(f"loss          moeyard {ours[0]:.6f}   eager {eager[0]:.6f}")
print(f"gradients     differ by at most {(ours[1] - eager[1]).abs().max():.1e}, largest {eager[1].abs().max():.1e}")
print(f"step          moeyard {ours[2] * 1e3:.0f} ms   eager {eager[2] * 1e3:.0f} ms   ratio {eager[2] / ours[2]:.2f}")
