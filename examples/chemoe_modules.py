"""The CheMoE building blocks: a drug and a cell embedding fused by four experts, trained with the balance loss."""

import torch

from moeyard.integrations.moe_modules import FusionMoE, MoELayer

torch.manual_seed(0)
drug, cell = torch.randn(512, 128), torch.randn(512, 64)
target = (drug[:, :10] * cell[:, :10]).tanh()

fusion, head = FusionMoE(latent_dim=128, embed_dim=64), MoELayer(192, 10, num_experts=4, top_k=2)
optimizer = torch.optim.AdamW([*fusion.parameters(), *head.parameters()], lr=1e-3)
for step in range(51):
    loss = (head(fusion(drug, cell)) - target).square().mean()
    balance = fusion.compute_load_balance_loss(0.01) + head.compute_load_balance_loss(0.01)
    optimizer.zero_grad()
    (loss + balance).backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step:3d}   loss {loss:.4f}   samples per expert of the head {head.last_gating.counts.tolist()}")

head.eval()
x = torch.randn(512, 192)
weights, _ = head.gating(x, top_k=2)
every = torch.stack([expert(x) for expert in head.experts], dim=1)
print(
    f"all experts on all samples differs by at most {(head(x) - (every * weights[..., None]).sum(1)).abs().max():.1e}"
)
