"""Plain float64 definitions of the layers, written from the papers and not from our code."""

import torch
from torch.nn.functional import gelu, layer_norm


def normalised_queries(x, layer, query_norm, heads, width):
    q = (x @ layer.query_QD.T).view(len(x), heads, width)
    if query_norm == "batch":
        mean, var = q.mean(0), q.var(0, unbiased=False)
        q = (q - mean) / (var + 1e-5).sqrt()
        q = q * layer.norm.weight.view(heads, width) + layer.norm.bias.view(heads, width)
    if query_norm == "layer":
        q = layer_norm(q, (width,), layer.norm.weight, layer.norm.bias)
    return q


def brute_force(x, module, expert):
    """sum_h sum_{i in top k of ALL N keys of head h} softmax(scores)_i expert(i), 15 lines."""
    config, router = module.config, module.router
    heads, width, root = config.num_heads, config.key_dim, config.num_sub_keys
    q = normalised_queries(x, router, config.query_norm, heads, width)
    rows = []
    for m in range(len(x)):
        total = torch.zeros_like(x[m])
        for h in range(heads):
            first, second = router.keys_HPSC[0 if config.shared_keys else h]
            keys = [torch.cat([first[i], second[j]]) for i in range(root) for j in range(root)]
            scores = torch.stack(keys) @ q[m, h]
            best = scores.topk(config.experts_per_head).indices
            gates = torch.softmax(scores[best], 0)
            for gate, i in zip(gates, best, strict=True):
                total = total + gate * expert(x[m], i)
        rows.append(total)
    return torch.stack(rows)


def peer(x, module):
    return brute_force(x, module, lambda x_, i: gelu(module.down_ND[i] @ x_) * module.up_ND[i])


def pkm(x, module):
    return brute_force(x, module, lambda _, i: module.value_ND[i])


def expert_choice(x, module):
    """Zhou et al. 2022, section 3, token by token."""
    scores = torch.softmax(x @ module.router_ED.T, 1)
    capacity = module.config.capacity(len(x))
    y = torch.zeros_like(x)
    for e in range(module.config.num_experts):
        for t in scores[:, e].topk(capacity).indices.tolist():
            out = module.out_EDF[e] @ gelu(module.in_EFD[e] @ x[t])
            y = y + torch.eye(len(x), dtype=x.dtype)[:, t, None] * scores[t, e] * out
    return y


def token_choice(x, module):
    scores = torch.softmax(x @ module.router_ED.T, 1)
    rows = []
    for t in range(len(x)):
        best = scores[t].topk(module.config.top_k).indices.tolist()
        outs = [module.out_EDF[e] @ gelu(module.in_EFD[e] @ x[t]) * scores[t, e] for e in best]
        rows.append(torch.stack(outs).sum(0))
    return torch.stack(rows)


def relative_error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
