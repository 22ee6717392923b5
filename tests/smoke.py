"""Tries an installed moeyard without any test package: `python smoke.py [README.md]`.

Runs every public op once, then the README's first example when the file is given.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

start = time.perf_counter()
import torch  # noqa: E402

torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import moeyard  # noqa: E402

print(f"moeyard {moeyard.__version__} from {Path(moeyard.__file__).parent}")
print(
    f"import: torch {torch_seconds:.2f} s, moeyard {time.perf_counter() - start:.3f} s more; torch {torch.__version__}"
)


def ops() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    assert torch.equal(moeyard.identity(x), x)
    gating = moeyard.topk_gating(torch.randn(6, 3, requires_grad=True), 2, renormalize=True)
    plan = moeyard.plan_permutation(gating.experts, 3)
    y = moeyard.unpermute_tokens(moeyard.permute_tokens(x, plan), plan, gating.weights)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    pos = torch.rand(50, 3, requires_grad=True)
    graph = moeyard.radius_graph(pos, 0.5)
    graph.distance.sum().backward()
    assert int(graph.num_edges) == graph.edge_index.shape[1] > 0
    assert moeyard.knn_graph(pos.detach(), 3).edge_index.shape == (2, 150)
    assert moeyard.radius(pos.detach(), pos.detach()[:5], 0.5).num_neighbors.shape == (5,)
    packing = moeyard.pack_batches(torch.randint(1, 100, (1000,)), 500, lookahead=16)
    assert sorted(packing.index.tolist()) == list(range(1000))
    assert int(packing.fill.max()) <= 500
    taken = moeyard.gather_segments(torch.arange(10), torch.tensor([0, 3, 10]), torch.tensor([1, 0]))
    assert taken.values.tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


def example(readme: Path) -> None:
    code = re.search(r"```python\n(.*?)```", readme.read_text(), re.S)
    assert code, f"{readme}: no python example"
    exec(compile(code[1], str(readme), "exec"), {"__name__": "__main__"})


ops()
for argument in sys.argv[1:]:
    example(Path(argument))
print("smoke: all ops work")
