"""PyG without pyg-lib: radius_graph inside SchNet, and batches gathered from an InMemoryDataset."""

import time

import torch
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SchNet

from moeyard.integrations.pyg import SegmentLoader, patch

torch.manual_seed(0)


class Molecules(InMemoryDataset):
    """2,000 random molecules of 10 to 40 atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.data, self.slices = self.collate([self.molecule(n) for n in torch.randint(10, 41, (2000,)).tolist()])

    @staticmethod
    def molecule(n: int) -> Data:
        pairs = torch.randint(n, (2, 12 * n))
        return Data(z=torch.randint(1, 10, (n,)), pos=4 * torch.rand(n, 3), edge_index=pairs, y=torch.rand(1))


dataset = Molecules()
options = {"batch_size": 64, "shuffle": True}
loaders = [kind(dataset, generator=torch.Generator().manual_seed(1), **options) for kind in (SegmentLoader, DataLoader)]
for epoch in range(2):  # PyG separates each graph in the first epoch and keeps it for the others
    seconds = []
    for loader in loaders:
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - start)
    mine, pygs = seconds
    print(f"epoch {epoch}       moeyard {mine * 1e3:.0f} ms   PyG {pygs * 1e3:.0f} ms   ratio {pygs / mine:.1f}")

ours, theirs = (next(iter(loader)) for loader in loaders)
same = all(torch.equal(ours[key], theirs[key]) for key in theirs.keys())  # noqa: SIM118
print(f"a batch       {ours}")
print(f"equal to PyG's {same}")

model = SchNet(hidden_channels=32, num_filters=32, num_interactions=2, cutoff=3.0)
with patch():
    energy = model(ours.z, ours.pos, ours.batch)
print(f"SchNet on it  {tuple(energy.shape)}, mean {energy.mean().item():.4f}")
