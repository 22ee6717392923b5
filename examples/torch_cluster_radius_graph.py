"""torch_cluster's radius and radius_graph: one changed import."""

import torch

from moeyard.integrations.torch_cluster import (
    radius,
    radius_graph,
)  # was: from torch_cluster import radius, radius_graph

torch.manual_seed(0)
positions = 20 * torch.rand(1000, 3)  # angstrom
molecule = torch.arange(1000) // 250  # four molecules of 250 atoms

edge_index = radius_graph(positions, r=5.0, batch=molecule, loop=False, max_num_neighbors=64)
source, target = edge_index
distance = (positions[source] - positions[target]).norm(dim=1)
print(f"radius_graph  {len(source)} edges, longest {distance.max():.3f}, {len(source) / 1000:.1f} per atom")

sites = 20 * torch.rand(4, 3)
site, atom = radius(positions, sites, r=5.0, batch_x=molecule, batch_y=torch.arange(4))
print(f"radius        atoms within 5 of each site: {torch.bincount(site, minlength=4).tolist()}")

near = (positions[:, None] - positions[None]).norm(dim=2) < 5.0
near &= (molecule[:, None] == molecule[None]) & ~torch.eye(1000, dtype=torch.bool)
print(f"all pairs in plain torch: {int(near.sum())} edges")
