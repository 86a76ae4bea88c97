"""Tiny Recursive Models in plain PyTorch (Jolicoeur-Martineau 2025, "Less is More: Recursive Reasoning with Tiny Networks",
arXiv 2510.04871), their loss, their optimizers, their puzzle table, and the files of public checkpoints.

One small network `net` is applied again and again to two latent states: z_L, the reasoning, L_cycles times, then z_H, the answer, once;
that is a cycle, and H_cycles of them, only the last one with gradients, are a *supervision step*. Each optimizer step is one supervision step for
every *slot* of the batch. A slot keeps its puzzle and its states, its *carry*, until it halts: when the model says so (q_halt > 0) or
after halt_max_steps; then it takes the next puzzle.

Parameter names are those of the public code below `model.inner.`, so that its checkpoints load.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # label of a cell that does not count


@dataclass
class TRMConfig:
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0
    L_layers: int = 2
    H_cycles: int = 3
    L_cycles: int = 6
    mlp_t: bool = False              # a SwiGLU over the positions in place of attention: best on small grids of one size
    pos_encodings: str = 'rope'      # 'rope', 'learned' or 'none'
    puzzle_emb_ndim: int = 512       # numbers of a puzzle's own vector; 0 = none
    puzzle_emb_len: int = 16         # positions in front of the cells; the vector stands in the first, zeros in the others; 0 = as many as it needs
    halt_max_steps: int = 16         # supervision steps
    halt_exploration_prob: float = 0.1
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    forward_dtype: str = 'bfloat16'  # of activations; weights are float32
    multiple_of: int = 256           # the SwiGLU's width is rounded up to it; smaller for tiny models

    @property
    def prefix(self):
        """Positions in front of the cells."""
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    def check(self):
        """ValueError with a sentence if these numbers make no model."""
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2 and self.pos_encodings == 'rope':
            raise ValueError(f'hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a number, an even one for rope')
        if self.pos_encodings not in ('rope', 'learned', 'none'):
            raise ValueError(f'pos_encodings {self.pos_encodings!r}: expected rope, learned or none')
        if self.puzzle_emb_ndim > self.prefix * self.hidden_size:
            raise ValueError(f'puzzle_emb_ndim {self.puzzle_emb_ndim} does not fit into puzzle_emb_len {self.prefix} x hidden_size {self.hidden_size}')


def trunc_normal(shape, std, dtype=torch.float32):
    """Normal numbers within two standard deviations, scaled so that what is left has this standard deviation."""
    if std == 0:
        return torch.zeros(shape, dtype=dtype)
    scale = std / 0.8796256610342398  # of a standard normal cut at 2
    edge = math.erf(math.sqrt(2))
    return (torch.empty(shape, dtype=dtype).uniform_(-edge, edge).erfinv_() * (math.sqrt(2) * scale)).clamp_(-2 * scale, 2 * scale)


class Linear(nn.Module):
    """Weight in float32, product in the input's dtype."""

    def __init__(self, fan_in, fan_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(trunc_normal((fan_out, fan_in), fan_in ** -0.5))
        self.bias = nn.Parameter(torch.zeros(fan_out)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    def __init__(self, n, width):
        super().__init__()
        self.embedding_weight = nn.Parameter(trunc_normal((n, width), width ** -0.5))


def rms_norm(x, eps):
    """Without a learned scale; in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width, expansion, multiple_of):
        super().__init__()
        inner = -(-round(expansion * width * 2 / 3) // multiple_of) * multiple_of
        self.gate_up_proj = Linear(width, 2 * inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, rotation):
        B, L, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, L, 3, self.heads, D // self.heads).unbind(2)  # each (B, L, H, D/H)
        if rotation is not None:
            cos, sin = rotation  # (L, 1, D/H), float32
            q, k = ((t * cos + torch.cat((-t[..., t.size(-1) // 2:], t[..., :t.size(-1) // 2]), -1) * sin).to(x.dtype) for t in (q, k))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # every position sees every other
        return self.o_proj(y.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Mix the positions, then each position's numbers; the norm stands behind each sum."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.prefix + config.seq_len, config.expansion, config.multiple_of)
        else:
            self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.expansion, config.multiple_of)

    def forward(self, x, rotation):
        if hasattr(self, 'mlp_t'):
            x = x.transpose(1, 2)  # (B, D, L); the norm is over the positions too
            x = rms_norm(x + self.mlp_t(x), self.eps).transpose(1, 2)
        else:
            x = rms_norm(x + self.self_attn(x, rotation), self.eps)
        return rms_norm(x + self.mlp(x), self.eps)


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.L_layers))

    def forward(self, z, injection, rotation):
        z = z + injection
        for layer in self.layers:
            z = layer(z, rotation)
        return z


class PuzzleTable(nn.Module):
    """A vector of its own for each puzzle, learned by SignSGD from the rows of the batch alone (see sign_sgd)."""

    def __init__(self, n, width):
        super().__init__()
        self.register_buffer('weights', torch.zeros(n, width))

    def rows(self, ids):
        """The vectors (B, width) of these puzzles, a leaf whose .grad sign_sgd wants."""
        return self.weights[ids].requires_grad_()


class TRM(nn.Module):
    def __init__(self, config):
        super().__init__()
        config.check()
        self.config, D, dtype = config, config.hidden_size, getattr(torch, config.forward_dtype)
        self.embed_tokens = Embedding(config.vocab_size, D)
        self.lm_head = Linear(D, config.vocab_size)
        self.q_head = Linear(D, 2, bias=True)  # halt, and continue, which nothing uses any more
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5)  # at first nothing halts
        if config.puzzle_emb_ndim:
            self.puzzle_emb = PuzzleTable(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        length = config.prefix + config.seq_len
        if config.pos_encodings == 'learned':
            self.embed_pos = Embedding(length, D)
        self.L_level = Net(config)
        self.register_buffer('H_init', trunc_normal((D,), 1).to(dtype))
        self.register_buffer('L_init', trunc_normal((D,), 1).to(dtype))
        if config.pos_encodings == 'rope' and not config.mlp_t:
            half = D // config.num_heads // 2
            angles = torch.outer(torch.arange(length).float(), config.rope_theta ** -(torch.arange(half) / half)).repeat(1, 2).unsqueeze(1)
            self.register_buffer('cos', angles.cos(), persistent=False)
            self.register_buffer('sin', angles.sin(), persistent=False)

    def initial_carry(self, batch):
        """A carry of slots that all take a new puzzle at their first step; batch: any batch of that size."""
        B, config = len(batch['inputs']), self.config
        z = torch.zeros(B, config.prefix + config.seq_len, config.hidden_size, dtype=self.H_init.dtype, device=self.H_init.device)
        return dict(z_H=z, z_L=z.clone(), steps=torch.zeros(B, dtype=torch.int32, device=z.device), halted=torch.ones(B, dtype=torch.bool, device=z.device),
                    **{name: torch.zeros_like(value) for name, value in batch.items()})

    def refill(self, carry, batch):
        """The carry in which halted slots have taken their row of the batch; the other rows of it are not used."""
        new = carry['halted']
        z_H, z_L = (torch.where(new.view(-1, 1, 1), start, carry[name]) for name, start in (('z_H', self.H_init), ('z_L', self.L_init)))
        return dict(z_H=z_H, z_L=z_L, steps=torch.where(new, 0, carry['steps']), halted=new,
                    **{name: torch.where(new.view(-1, *[1] * (value.dim() - 1)), value, carry[name]) for name, value in batch.items()})

    def forward(self, carry, rows=None, min_steps=None):
        """One supervision step for every slot of a carry from `refill`.

        rows: puzzle_emb.rows(carry['puzzle_identifiers']). min_steps (B,): training lets no slot halt before (exploration), None where
        slots never halt early, as in evaluation. Returns (carry, outputs): loss, a sum over the slots that backward takes; sums, a (7,)
        tensor in the order of METRICS; logits (B, S, V); q_halt_logits (B,)."""
        config, dtype = self.config, self.H_init.dtype
        x = F.embedding(carry['inputs'].long(), self.embed_tokens.embedding_weight.to(dtype))  # (B, S, D)
        if config.puzzle_emb_ndim:
            prefix = F.pad(rows.to(dtype), (0, config.prefix * config.hidden_size - config.puzzle_emb_ndim))
            x = torch.cat((prefix.view(-1, config.prefix, config.hidden_size), x), 1)
        elif config.prefix:
            x = F.pad(x, (0, 0, config.prefix, 0))
        if config.pos_encodings == 'learned':
            x = 0.707106781 * (x + self.embed_pos.embedding_weight.to(dtype))  # the variance of a sum of two
        x = math.sqrt(config.hidden_size) * x
        rotation = (self.cos, self.sin) if hasattr(self, 'cos') else None
        z_H, z_L = carry['z_H'], carry['z_L']
        for cycle in range(config.H_cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == config.H_cycles - 1):
                for _ in range(config.L_cycles):
                    z_L = self.L_level(z_L, z_H + x, rotation)
                z_H = self.L_level(z_H, z_L, rotation)
        logits = self.lm_head(z_H[:, config.prefix:])
        q_halt = self.q_head(z_H[:, 0])[:, 0].float()
        steps = carry['steps'] + 1
        halted = steps >= config.halt_max_steps
        if min_steps is not None and config.halt_max_steps > 1:
            halted = halted | (q_halt > 0) & (steps >= min_steps)
        loss, sums = act_loss(logits, q_halt, carry['labels'], halted, steps)
        carry = dict(carry, z_H=z_H.detach(), z_L=z_L.detach(), steps=steps, halted=halted)
        return carry, dict(loss=loss, sums=sums, logits=logits, q_halt_logits=q_halt)


METRICS = ('count', 'accuracy', 'exact_accuracy', 'q_halt_accuracy', 'steps', 'lm_loss', 'q_halt_loss')


def symlog(x):
    """sign(x) log(1 + |x|), whose derivative at 0 is 1 from both sides. softmax(symlog(x)) is "stablemax", s(x) / sum s with
    s(x) = x + 1 or, below 0, 1 / (1 - x) (Prieto et al. 2025, arXiv 2501.04697); written as that quotient, its gradient is NaN
    wherever a logit is exactly 1."""
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


def act_loss(logits, q_halt, labels, halted, steps):
    """(loss, sums): the stablemax cross-entropy, a mean over each slot's cells, and half the cross-entropy of q_halt against "all
    cells are right", summed over the slots; sums (7,) in the order of METRICS, the first five over slots that halted."""
    mask = labels != IGNORE
    cells = mask.sum(1)
    precise = logits.double() if logits.device.type == 'cpu' else logits.float()  # as the public code, bit for bit, where it costs little
    each = F.cross_entropy(symlog(precise).transpose(1, 2), labels.long(), ignore_index=IGNORE, reduction='none')  # (B, S)
    lm_loss = (each.sum(1) / cells.clamp(min=1)).sum()
    with torch.no_grad():
        right = mask & (logits.argmax(-1) == labels)
        exact = right.sum(1) == cells
        counted = halted & (cells > 0)
        shown = torch.stack((torch.ones_like(q_halt), right.sum(1) / cells.clamp(min=1), exact, (q_halt >= 0) == exact, steps), 1)  # (B, 5)
    q_loss = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt.dtype), reduction='sum')
    sums = torch.cat((torch.where(counted.unsqueeze(1), shown, 0).sum(0), torch.stack((lm_loss, q_loss)).detach()))
    return lm_loss + 0.5 * q_loss, sums


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of the division (Everett et al. 2024, arXiv 2407.05872): no epsilon, the same update whatever the gradient's
    scale. As imoneoi/adam-atan2 0.0.3: the first moment's bias correction stands outside of atan2, decay is applied to everything, before the update."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            gradients, states, (beta1, beta2) = [p.grad for p in params], [self.state[p] for p in params], group['betas']
            m, v, steps = ([state[name] for state in states] for name in ('exp_avg', 'exp_avg_sq', 'step'))
            torch._foreach_add_(steps, 1)
            t = steps[0].item()  # a tensor of the CPU
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_lerp_(m, gradients, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(v)
            torch._foreach_div_(roots, math.sqrt(1 - beta2 ** t))
            torch._foreach_add_(params, [torch.atan2(a, b) for a, b in zip(m, roots, strict=True)], alpha=-group['lr'] / (1 - beta1 ** t))


@torch.no_grad()
def sign_sgd(table, ids, gradients, lr, weight_decay):
    """One step for the rows `ids` (B,) of a puzzle table, in place: rows w <- w (1 - lr wd) - lr sign(sum of the gradients (B, width) of
    that row). Under torch.distributed, ids and gradients are those of all ranks. Slots of the same puzzle write the same numbers twice."""
    same = (ids.unsqueeze(1) == ids).to(gradients.dtype)
    table[ids] = table[ids] * (1 - lr * weight_decay) - lr * (same @ gradients).sign()
