"""MAERec (Ye et al., 2023): a graph masked autoencoder of item transitions gives a transformer its item table.

Graph: items at most `graph_distance` apart in a training sequence are joined. Encoder, without weights of its own:
E_l = D^-1/2 (A + I) D^-1/2 E_(l-1) from the ids' vectors E_0, table = E_0 + ... + E_L. Each micro-batch masks paths:
from the items with the largest gamma(v) + Gumbel noise, gamma(v) = mean cosine of v and its neighbours in E_0, all
edges of the items met are masked, `mask_depth` hops far, after hop i from a share path_prob^i of the items reached.
Decoder: an edge (u, v) is e = the concatenation of E_l[u] * E_m[v] over all l, m < L, its score s = sigma(MLP(e)), and
L_recon = -log(exp s / (exp s + sum over drawn pairs of exp s)), of drawn masked edges. L_mask = -mean gamma of all
items, and L = L_rec + lambda L_recon + L_mask / 10, L_rec of a causal transformer that reads the table of what is left
of the graph.
Deviations: the encoder is BERT's, whose last states are user vectors (the release adds up all layers', and its
feed-forward has no residual), and weights start as BERT's (Xavier there); the loss is that of --loss; L_recon is a mean
over edges (in the release a sum, of weight 1 and without the logarithm, so that it weighs far more); gamma looks one
hop far; the reward of L_mask is always 1, as one that depends on earlier steps' losses would be lost when a run is
continued; masks are drawn, and L_mask counts a tenth, at each step, where the release does both in each tenth step; a
loop of A + I is masked where all edges of its item are; the MLP has one hidden layer; a drawn pair changes v alone, and
may be an edge; and a path goes on from both ends of its edges (the release adds the numbers of their two items, which
leads to other items, and masks less).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import flag
from models.sr.sasrec import SASRec
from utils.data import TrainingPart
from utils.errors import UserError


def transitions(data: TrainingPart, distance: int) -> np.ndarray:
    """Edges (2, E), both ways, each once, of items at most `distance` apart in a sequence; no item is its own."""
    items, size, found = data.items.astype(np.int64), data.num_items + 1, []
    for apart in range(1, distance + 1):
        left, right = items[:-apart], items[apart:]
        joined = (data.users[:-apart] == data.users[apart:]) & (left != right)
        found += [(left * size + right)[joined], (right * size + left)[joined]]
    return np.stack(np.divmod(np.unique(np.concatenate(found)), size))


def product(edges: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A times rows (V + 1, d), A the matrix of these weights (E,) at sorted edges (2, E); in float32."""
    with torch.autocast(rows.device.type, enabled=False):
        A = torch.sparse_coo_tensor(edges, weights, (len(rows), len(rows)), is_coalesced=True, check_invariants=False)
        return torch.sparse.mm(A, rows)


class MAERec(SASRec):
    """`table` is what is read while it is held: of the masked graph in a step, of the whole one at inference."""

    norm_first = inner_dropout = False

    @dataclass(frozen=True)
    class Config(SASRec.Config):
        graph_layers: int = flag(2, "layers L of the graph encoder", ">= 1")
        graph_distance: int = flag(3, "how far apart in a sequence items are joined", ">= 1")
        mask_seeds: int = flag(50, "items at which masked paths begin", ">= 1")
        mask_depth: int = flag(3, "hops of a masked path", ">= 1")
        path_prob: float = flag(0.5, "p: after hop i a path goes on from a share p^i of the items reached", "0..1")
        recon_edges: int = flag(512, "masked edges that are reconstructed per step", ">= 1")
        recon_negatives: int = flag(20, "drawn pairs per edge", ">= 1")
        recon_weight: float = flag(0.1, "weight lambda of L_recon", ">= 0")

    def __init__(self, config: Config, data: TrainingPart) -> None:
        super().__init__(config, data)
        self.graph_layers, self.table = config.graph_layers, None
        self.mask_seeds, self.mask_depth, self.path_prob = config.mask_seeds, config.mask_depth, config.path_prob
        self.recon_edges, self.recon_negatives = config.recon_edges, config.recon_negatives
        self.recon_weight = config.recon_weight
        edges = torch.from_numpy(transitions(data, config.graph_distance))
        self.register_buffer("edges", edges)  # (2, E), kept with the weights: a run folder does not have the data
        d, pairs = config.item_dim, config.graph_layers**2
        self.decoder = nn.Sequential(nn.Linear(pairs * d, d), nn.ReLU(), nn.Linear(d, 1), nn.Sigmoid())

    def resize(self, weights: dict[str, torch.Tensor]) -> None:
        edges = weights.get("edges")
        if edges is not None and edges.ndim == 2 and len(edges) == 2:
            if edges.is_floating_point() or ((edges < 1) | (edges >= len(self.items.weight))).any():
                raise UserError("the edges of its graph are not items; the file is damaged: train it again")
            self.edges = torch.empty_like(edges, dtype=torch.int64)

    def layers(self, edges: torch.Tensor) -> list[torch.Tensor]:
        """E_0 .. E_L, each (V + 1, d); in float32 also under autocast."""
        found, near = [self.items.weight], self.degree(edges)
        degree = near + 1.0  # with the loop
        lost = (near == 0) & (self.degree(self.edges) > 0)  # their edges are masked, and their loop with them
        loop = (~lost / degree)[:, None]  # (V + 1, 1)
        weights = degree[edges].prod(0).rsqrt()  # (E,)
        for _ in range(self.graph_layers):
            found.append(product(edges, weights, found[-1]) + loop * found[-1])
        return found

    def degree(self, edges: torch.Tensor) -> torch.Tensor:
        """(V + 1,): how many neighbours each item has."""
        return torch.bincount(edges[0], minlength=len(self.items.weight))

    def relation(self) -> torch.Tensor:
        """gamma (V + 1,): the mean cosine of each item and its neighbours, 0 where it has none."""
        unit, degree = F.normalize(self.items.weight, dim=1), self.degree(self.edges)
        near = product(self.edges, torch.ones(self.edges.shape[1], device=unit.device), unit)  # (V + 1, d)
        return (unit * near).sum(1) / degree.clamp_min(1)

    def mask_paths(self, seeds: torch.Tensor) -> torch.Tensor:
        """Which edges (E,) lie on paths that begin at the items `seeds`."""
        u, v = self.edges
        masked = torch.zeros_like(u, dtype=torch.bool)
        at = torch.zeros(len(self.items.weight), dtype=torch.bool, device=u.device)
        at[seeds] = True
        for hop in range(1, self.mask_depth + 1):
            met = ~masked & (at[u] | at[v])
            masked |= met
            at = torch.zeros_like(at).index_fill_(0, self.edges[:, met].flatten(), True)
            at &= torch.rand(at.shape, device=u.device) < self.path_prob**hop
        return masked

    def reconstruction(self, layers: list[torch.Tensor], edges: torch.Tensor) -> torch.Tensor:
        """L_recon of edges (2, N); 0 where there is none."""
        N, V, used = edges.shape[1], len(layers[0]) - 1, layers[:-1]
        drawn = torch.randint(1, V + 1, (N, self.recon_negatives), device=edges.device)
        ends = torch.cat([edges[1][:, None], drawn], 1)  # (N, 1 + S)
        left = torch.stack([E[edges[0]] for E in used], 1)[:, None, :, None]  # (N, 1, L, 1, d)
        right = torch.stack([E[ends] for E in used], 2)[:, :, None]  # (N, 1 + S, 1, L, d)
        scores = self.decoder((left * right).flatten(2))[..., 0]  # (N, 1 + S)
        return -scores.log_softmax(1)[:, 0].sum() / max(N, 1)

    @contextmanager
    def holding(self, table: torch.Tensor) -> Iterator[None]:
        before, self.table = self.table, table
        try:
            yield
        finally:
            self.table = before

    def for_inference(self):
        return self.holding(self.item_vectors().detach())

    def item_vectors(self) -> torch.Tensor:
        return sum(self.layers(self.edges)) if self.table is None else self.table  # (V + 1, d)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.item_vectors(), padding_idx=0)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gamma = self.relation()
        uniform = torch.rand_like(gamma[1:]).clamp_min(1e-20)
        noisy = gamma[1:].detach() - torch.log(-torch.log(uniform))
        seeds = noisy.topk(min(self.mask_seeds, len(noisy))).indices + 1
        masked = self.mask_paths(seeds)
        layers = self.layers(self.edges[:, ~masked])
        with self.holding(sum(layers)):
            terms = super().forward(batch)
        lost = masked.nonzero()[:, 0]
        lost = lost[torch.randperm(len(lost), device=lost.device)[: self.recon_edges]]
        recon = self.recon_weight * self.reconstruction(layers, self.edges[:, lost])
        return terms | {"recon": recon, "mask": -0.1 * gamma[1:].mean()}
