"""Recipes: how the encoders of one layer are trained. `Listwise` is ours, `HashAttention` and `Hata` the two papers'.

Symbols: T sequence length, n query positions of one step, Hq query heads, Hkv key/value heads, Hs signature heads, G query
heads per signature head, D head_dim, b signature bits.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashfast.hash_attention import HashConfig, HashEncoder


class Recipe(nn.Module):
    """How one layer's encoder is trained: a loss over some query positions of one sequence, and an optimiser.

    Inputs are standardised per channel where `standardise` says so, from statistics of the layer's training sequences.
    """
    config = HashConfig()
    standardise = True

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(True)

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        """The loss. q [Hq, n, D], k [Hkv, T, D], weights [Hq, n, T], selectable bool [n, T], progress 0 to 1 -> scalar."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def finish(self) -> HashEncoder:
        return self.encoder.requires_grad_(False)

    def codes(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Real-valued codes of queries [Hs, G, n, b] and keys [Hs, T, b]."""
        encoder = self.encoder
        return encoder.query_codes(q[None])[0].unflatten(0, (-1, encoder.group)), encoder.key_codes(k[None])[0]


class Listwise(Recipe):
    """Ours: the softmax of the selectable tokens' scores approximates the group's attention over them.

    Cross-entropy between the attention mass of a signature head's query heads (outside sink and recent, normalised) and
    softmax(scale * score), scale learned per head, score = sum_i c_i tanh(slope * phi_k(k)_i) with c the summed query codes.
    The slope grows from 1 to 3, so that the codes learn while they are soft and end close to the bits they become.
    """

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__(encoder)
        # The first distribution is nearly uniform: one that is sharp and wrong costs most of the steps to undo.
        scale = torch.full((encoder.n_signature_head, 1, 1), -3.0, device=encoder.key[0].weight.device)
        self.log_scale = nn.Parameter(scale)

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        slope = 1 + 2 * progress
        query, key = self.codes(q, k)
        if self.encoder.config.query_bits == 1:  # a query code then counts by its sign alone
            query = torch.tanh(slope * query)
        score = (self.log_scale.exp() * query.sum(dim=1)) @ torch.tanh(slope * key).transpose(1, 2)  # [Hs, n, T]
        mass = weights.unflatten(0, (-1, self.encoder.group)).sum(dim=1) * selectable
        mass = mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return (score.masked_fill(~selectable, float("-inf")).logsumexp(dim=-1) - (mass * score).sum(dim=-1)).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-2)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=steps)


class HashAttention(Recipe):
    """HashAttention (arXiv 2412.14468, section 4): for each query head alone, is this key among the query's top tokens?

    Binary cross-entropy of <tanh phi_q(q), tanh phi_k(k)> on the exact top 64 outside sink and recent, positives weighted by
    20. Adam at 1e-3. The paper trains on far more text.
    """
    config = HashConfig(query_bits=1, depth=3, share="query")
    standardise = False
    top = 64

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        query, key = self.codes(q, k)
        logit = torch.tanh(query).sum(dim=1) @ torch.tanh(key).transpose(1, 2)  # [Hs, n, T]
        mass = weights.unflatten(0, (-1, self.encoder.group)).sum(dim=1) * selectable
        label = torch.zeros_like(mass).scatter_(-1, mass.topk(min(self.top, mass.shape[-1]), dim=-1).indices, 1.0)
        loss = F.binary_cross_entropy_with_logits(logit, label, weight=1 + 19 * label, reduction="none")
        return (loss * selectable).sum() / (selectable.sum() * len(logit))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.encoder.parameters(), lr=1e-3)


class Hata(Recipe):
    """HATA (arXiv 2506.02572, section 3.1): one linear map per KV head, shared by queries and keys.

    h = 2 sigmoid(0.1 x W) - 1; the top tenth of the keys are labelled s = 20 down to 1, the others -1; loss
    0.01 mean(s ||h_q - h_k||^2) + bit balance + ||W'W - I||. SGD at 0.1 with momentum 0.9.

    Means are over pairs and heads, and W starts as random projections of unit length. The authors' trainer sums over heads, so
    that similarity weighs more, and starts from unit variance; in our hands that has a lower recall (results/NOTES.md).
    Where bits > D, W'W cannot be I; that W W' could be instead makes no difference.
    """
    config = HashConfig(bits=128, query_bits=1)
    standardise = False  # the map is shared, so that queries and keys must be in one space

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        grouped = q.unflatten(0, (-1, self.encoder.group)).flatten(1, 2)  # [Hs, G * n, D]
        query = torch.tanh(0.05 * self.encoder.key_codes(grouped[None])[0])  # tanh(x / 2) = 2 sigmoid(x) - 1
        key = torch.tanh(0.05 * self.encoder.key_codes(k[None])[0])  # [Hs, T, b]
        distance = query.square().sum(-1)[..., None] + key.square().sum(-1)[:, None] - 2 * query @ key.transpose(1, 2)
        mass = (weights * selectable).unflatten(0, (-1, self.encoder.group)).flatten(1, 2)  # [Hs, G * n, T]
        top = max(1, mass.shape[-1] // 10)
        rank = torch.arange(top, device=q.device).expand(*mass.shape[:-1], -1)
        label = torch.full_like(mass, -1.0).scatter_(-1, mass.topk(top, dim=-1).indices, 20.0 - 20 * rank // top)
        selectable = selectable.repeat(self.encoder.group, 1)
        similarity = 0.01 * (label * distance * selectable).sum() / (selectable.sum() * len(mass))
        balance = key.mean(dim=1).square().sum(dim=-1).mean()
        weight = self.encoder.key[0].weight
        decorrelation = (weight.transpose(1, 2) @ weight - torch.eye(weight.shape[-1], device=q.device)).norm(dim=(1, 2)).mean()
        return similarity + balance + decorrelation

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([layer.weight for layer in self.encoder.key], lr=0.1, momentum=0.9)

    def finish(self) -> HashEncoder:
        encoder = super().finish()
        for key, query in zip(encoder.key, encoder.query, strict=True):
            query.weight.copy_(key.weight.repeat_interleave(encoder.group, dim=0))
        return encoder


RECIPES: dict[str, type[Recipe]] = {"listwise": Listwise, "hashattention": HashAttention, "hata": Hata}
