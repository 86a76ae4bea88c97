"""Tiny Recursive Models in plain PyTorch (Jolicoeur-Martineau 2025, "Less is More: Recursive Reasoning with Tiny Networks",
arXiv 2510.04871), their loss, their optimizers, their puzzle table, and the files of public checkpoints.

One small network `net` is applied again and again to two latent states: z_L, the reasoning, L_cycles times, then z_H, the answer, once;
that is a cycle, and H_cycles of them, only the last one with gradients, are a *supervision step*. Each optimizer step is one supervision step for
every *slot* of the batch. A slot keeps its puzzle and its states, its *carry*, until it halts: when the model says so (q_halt > 0) or
after halt_max_steps; then it takes the next puzzle.

Parameter names are those of the public code below `model.inner.`, so that its checkpoints load.
"""
import copy
import glob
import json
import math
import os
import re
import time
import zlib
from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from configurator_old import LAUNCH, fail, nearby
from model import map_npy, newest, read_whole

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
    forward_dtype: str = 'bfloat16'  # of activations, float32 or bfloat16; weights are float32
    multiple_of: int = 256           # the SwiGLU's width is rounded up to it; smaller for tiny models

    @property
    def prefix(self):
        """Positions in front of the cells."""
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    def check(self):
        """ValueError with a sentence if these numbers make no model."""
        if not self.mlp_t and (self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2 and self.pos_encodings == 'rope'):
            raise ValueError(f'hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a number, an even one for rope')
        if self.pos_encodings not in ('rope', 'learned', 'none'):
            raise ValueError(f'pos_encodings {self.pos_encodings!r}: expected rope, learned or none')
        if self.forward_dtype not in ('float32', 'bfloat16'):
            raise ValueError(f'forward_dtype {self.forward_dtype!r}: expected float32 or bfloat16')
        if self.puzzle_emb_ndim > self.prefix * self.hidden_size:
            raise ValueError(f'puzzle_emb_ndim {self.puzzle_emb_ndim} does not fit into puzzle_emb_len {self.prefix} x hidden_size {self.hidden_size}')


def trunc_normal(shape, std, dtype=None):
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


def wide(x):
    """In float32 at least."""
    return x.float() if x.dtype == torch.bfloat16 else x


def rms_norm(x, eps):
    """Without a learned scale; in float32."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Gated(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T of gate_up (..., 2I), gate first. Keeps gate_up alone, and puts both gradients in its place: autograd would keep
    silu(gate) and the product too, as much again, and join two gradients."""

    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, -1)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        silu, d_product = F.silu(gate), upstream @ weight
        d_weight = upstream.flatten(0, -2).t() @ (silu * up).flatten(0, -2)
        torch.ops.aten.silu_backward(d_product * up, gate, grad_input=gate)  # to the bit what autograd computes
        torch.mul(d_product, silu, out=up)
        return gate_up, d_weight


class SwiGLU(nn.Module):
    def __init__(self, width, expansion, multiple_of):
        super().__init__()
        inner = -(-round(expansion * width * 2 / 3) // multiple_of) * multiple_of
        self.gate_up_proj = Linear(width, 2 * inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x):
        gate_up = self.gate_up_proj(x)
        if torch.compiler.is_compiling():  # it makes better of the plain form
            gate, up = gate_up.chunk(2, -1)
            return self.down_proj(F.silu(gate) * up)
        return Gated.apply(gate_up, self.down_proj.weight.to(x.dtype))


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
        self.config, D = config, config.hidden_size
        dtype = torch.get_default_dtype() if config.forward_dtype == 'float32' else getattr(torch, config.forward_dtype)  # float32: that of the weights
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
        self.cell_weights = None  # (S,) of the cells' losses, see act_loss; no part of the checkpoint
        self.register_buffer('H_init', trunc_normal((D,), 1).to(dtype))
        self.register_buffer('L_init', trunc_normal((D,), 1).to(dtype))
        if config.pos_encodings == 'rope' and not config.mlp_t:
            half = D // config.num_heads // 2
            angles = torch.outer(torch.arange(length).float(), config.rope_theta ** -(torch.arange(half) / half)).repeat(1, 2).unsqueeze(1)
            self.register_buffer('cos', angles.cos(), persistent=False)
            self.register_buffer('sin', angles.sin(), persistent=False)

    def empty_carry(self, B):
        """initial_carry of a batch of B."""
        empty = torch.zeros(B, self.config.seq_len, dtype=torch.uint8, device=self.H_init.device)
        return self.initial_carry(dict(inputs=empty, labels=empty.int(), puzzle_identifiers=torch.zeros(B, dtype=torch.int64, device=empty.device)))

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
        tensor in the order of METRICS; scores (B, 3), see act_loss; logits (B, S, V); q_halt_logits (B,)."""
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
        q_halt = wide(self.q_head(z_H[:, 0])[:, 0])
        steps = carry['steps'] + 1
        halted = steps >= config.halt_max_steps
        if min_steps is not None and config.halt_max_steps > 1:
            halted = halted | (q_halt > 0) & (steps >= min_steps)
        loss, sums, scores = act_loss(logits, q_halt, carry['labels'], halted, steps, self.cell_weights)
        carry = dict(carry, z_H=z_H.detach(), z_L=z_L.detach(), steps=steps, halted=halted)
        return carry, dict(loss=loss, sums=sums, scores=scores, logits=logits, q_halt_logits=q_halt)

    def flops_per_slot(self):
        """FLOPs of one supervision step of one slot, forward and backward: a product of (m, k) and (k, n) is 2mkn."""
        config, D, L = self.config, self.config.hidden_size, self.config.prefix + self.config.seq_len
        mixing = 6 * D * self.L_level.layers[0].mlp_t.down_proj.weight.shape[1] if config.mlp_t else 8 * D * D + 4 * L * D
        net = L * config.L_layers * (mixing + 6 * D * self.L_level.layers[0].mlp.down_proj.weight.shape[1])
        return net * (config.L_cycles + 1) * (config.H_cycles - 1 + 3) + 6 * config.seq_len * D * config.vocab_size


METRICS = ('count', 'accuracy', 'exact_accuracy', 'q_halt_accuracy', 'steps', 'lm_loss', 'q_halt_loss')


def symlog(x):
    """sign(x) log(1 + |x|), whose derivative at 0 is 1 from both sides. softmax(symlog(x)) is "stablemax", s(x) / sum s with
    s(x) = x + 1 or, below 0, 1 / (1 - x) (Prieto et al. 2025, arXiv 2501.04697); written as that quotient, its gradient is NaN
    wherever a logit is exactly 1."""
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


def act_loss(logits, q_halt, labels, halted, steps, weights=None):
    """(loss, sums, scores): the stablemax cross-entropy, a mean over each slot's cells, and half the cross-entropy of q_halt against "all
    cells are right", summed over the slots; sums (7,) in the order of METRICS, the first five over slots that halted; scores (B, 3), each
    slot's cross-entropy, share of right cells and whether all are. weights (S,), or None = all the same: the mean is weighted, and a cell of
    weight 0 is none of the slot's cells."""
    mask = labels != IGNORE if weights is None else (labels != IGNORE) & (weights > 0)
    cells = mask.sum(1)
    precise = logits.double() if logits.device.type == 'cpu' else logits.float()  # as the public code, bit for bit, where it costs little
    each = F.cross_entropy(symlog(precise).transpose(1, 2), labels.long(), ignore_index=IGNORE, reduction='none')  # (B, S)
    if weights is None:
        lm_losses = each.sum(1) / cells.clamp(min=1)
    else:
        lm_losses = (each * weights).sum(1) / torch.where(cells > 0, (mask * weights).sum(1), 1)
    lm_loss = lm_losses.sum()
    with torch.no_grad():
        right = mask & (logits.argmax(-1) == labels)
        exact = right.sum(1) == cells
        counted, share = halted & (cells > 0), right.sum(1) / cells.clamp(min=1)
        shown = torch.stack((torch.ones_like(q_halt), share, exact, (q_halt >= 0) == exact, steps), 1)  # (B, 5)
    q_loss = F.binary_cross_entropy_with_logits(q_halt, exact.to(q_halt.dtype), reduction='sum')
    sums = torch.cat((torch.where(counted.unsqueeze(1), shown, 0).sum(0), torch.stack((lm_loss, q_loss)).detach()))
    return lm_loss + 0.5 * q_loss, sums, torch.stack((lm_losses.detach(), share, exact), 1)


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


# ---- folders of puzzles
def open_puzzles(folders, split):
    """The puzzles in {folder}/{split}/ (see write_puzzles in prepare/maze.py) as one list; each folder's identifiers follow those before it.

    Returns seq_len, vocab_size, num_puzzle_identifiers, examples (their number), identifiers (P,), puzzle_indices (P + 1,), group_indices (G + 1,),
    facts (plain values that a resumed run must find again) and rows(numbers) -> (inputs, labels (n, S) uint8, 0 in a label = does not count;
    identifiers (n,)). Nothing in the files is trusted: ValueError says which one is wrong, and where."""
    parts = [_open_part(os.path.join(folder, split)) for folder in folders]
    for folder, part in zip(folders, parts, strict=True):
        if (part.seq_len, part.vocab_size) != (parts[0].seq_len, parts[0].vocab_size):
            raise ValueError(f'{folder}: {part.seq_len} cells and {part.vocab_size} tokens, but {folders[0]} has {parts[0].seq_len} and {parts[0].vocab_size}')

    def joined(name, count):  # numbers that refer to what a part has `count` of
        before = np.cumsum([0] + [count(part) for part in parts])
        arrays = [getattr(part, name).astype(np.int64) + n for part, n in zip(parts, before[:-1], strict=True)]
        return np.concatenate(arrays if name == 'identifiers' else [arrays[0][:1], *(array[1:] for array in arrays)])

    identifiers = joined('identifiers', lambda part: part.num_puzzle_identifiers)
    puzzle_indices = joined('puzzle_indices', lambda part: len(part.inputs))
    begins = np.cumsum([0] + [len(part.inputs) for part in parts])

    def rows(numbers):
        numbers = np.asarray(numbers)
        inputs, labels = np.empty((2, len(numbers), parts[0].seq_len), np.uint8)
        for part, begin, end in zip(parts, begins[:-1], begins[1:], strict=True):
            here = np.flatnonzero((numbers >= begin) & (numbers < end))
            inputs[here], labels[here] = part.inputs[numbers[here] - begin], part.labels[numbers[here] - begin]
        return inputs, labels, identifiers[np.searchsorted(puzzle_indices, numbers, 'right') - 1]

    return SimpleNamespace(seq_len=parts[0].seq_len, vocab_size=parts[0].vocab_size, num_puzzle_identifiers=sum(p.num_puzzle_identifiers for p in parts),
                           examples=int(begins[-1]), identifiers=identifiers, puzzle_indices=puzzle_indices,
                           group_indices=joined('group_indices', lambda part: len(part.identifiers)), facts=[part.facts for part in parts], rows=rows)


def read_json(path):
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except OSError as error:
        raise ValueError(f'{path}: {error.strerror or error}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON: {error}') from None


def _open_part(folder):
    path = os.path.join(folder, 'dataset.json')
    facts = read_json(path)
    wanted = ('vocab_size', 'seq_len', 'num_puzzle_identifiers')
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not int or not 1 <= facts[name] < 2 ** 31 for name in wanted) or facts['vocab_size'] > 256:
        raise ValueError(f'{path}: expected positive whole numbers {", ".join(wanted)}, of tokens at most 256')
    if any(facts.get(name, 0) != 0 for name in ('pad_id', 'ignore_label_id', 'blank_identifier_id')) or facts.get('sets', ['all']) != ['all']:
        raise ValueError(f"{path}: expected pad_id, ignore_label_id and blank_identifier_id 0, and sets ['all']")
    part = SimpleNamespace(**{name: facts[name] for name in wanted})
    for name in ('inputs', 'labels', 'puzzle_identifiers', 'puzzle_indices', 'group_indices'):
        path = os.path.join(folder, f'all__{name}.npy')
        try:
            array = map_npy(path)
        except OSError as error:
            raise ValueError(f'{path}: {error.strerror or error}') from None
        except ValueError as error:
            raise ValueError(f'{path} {error}') from None
        if array.dtype.kind not in 'iu' or array.ndim != (2 if name in ('inputs', 'labels') else 1):
            raise ValueError(f'{path}: {array.ndim} dimensions of {array.dtype}, expected whole numbers')
        if array.ndim == 2:
            if array.shape[1] != part.seq_len or array.shape != getattr(part, 'inputs', array).shape:
                raise ValueError(f'{path}: shape {array.shape}, but dataset.json says seq_len {part.seq_len}' + (
                    f' and the inputs have {part.inputs.shape}' if name == 'labels' else ''))
            for begin in range(0, len(array), 65536):
                wrong = np.argwhere((array[begin:begin + 65536] >= part.vocab_size) | (array[begin:begin + 65536] < 0))
                if len(wrong):
                    row, cell = int(wrong[0][0]) + begin, int(wrong[0][1])
                    raise ValueError(f'{path}: token {array[row, cell]} in row {row}, cell {cell}, but vocab_size is {part.vocab_size}')
        setattr(part, name.removeprefix('puzzle_') if name == 'puzzle_identifiers' else name, array)
    known = part.num_puzzle_identifiers
    wrong = np.flatnonzero((part.identifiers < 0) | (part.identifiers >= known))
    if len(wrong):
        raise ValueError(f'{folder}/all__puzzle_identifiers.npy: {part.identifiers[wrong[0]]} at {wrong[0]}, but num_puzzle_identifiers is {known}')
    for name, count in (('puzzle_indices', len(part.inputs)), ('group_indices', len(part.identifiers))):
        array = np.asarray(getattr(part, name), np.int64)
        if len(array) < 2 or array[0] != 0 or array[-1] != count or (np.diff(array) <= 0).any():
            raise ValueError(f'{folder}/all__{name}.npy: expected offsets that rise from 0 to {count}')
    if len(part.puzzle_indices) != len(part.identifiers) + 1:
        raise ValueError(f'{folder}/all__puzzle_indices.npy: {len(part.puzzle_indices)} offsets of {len(part.identifiers)} puzzles, expected one more')
    sample = np.linspace(0, len(part.inputs) - 1, 100).astype(int)
    arrays = (part.identifiers, part.puzzle_indices, part.group_indices, part.inputs[sample], part.labels[sample])
    part.facts = dict(examples=len(part.inputs), puzzles=len(part.identifiers), groups=len(part.group_indices) - 1, identifiers=known,
                      crc=[zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in arrays])
    return part


# ---- what a training script offers to the slots, and takes up again
def examples_of_epoch(data, seed, epoch, size):
    """The numbers of the `size` examples of an epoch: a random puzzle of each group, in random order, gives all of its examples, cut where the list is
    full or going through the groups again."""
    rng, chosen, count = np.random.default_rng([seed, epoch]), [], 0
    first, sizes = data.puzzle_indices, np.diff(data.puzzle_indices)
    while count < size:
        order = rng.permutation(len(data.group_indices) - 1)
        chosen.append(rng.integers(data.group_indices[order], data.group_indices[order + 1]))
        count += sizes[chosen[-1]].sum()
    puzzles = np.concatenate(chosen)
    owner = np.repeat(np.arange(len(puzzles)), sizes[puzzles])
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes[puzzles]) - sizes[puzzles], sizes[puzzles])
    return (first[puzzles][owner] + within)[np.lexsort((rng.random(len(owner)), owner))][:size]


def least_steps(seed, step, slots, probability, most):
    """(slots,): no slot halts before so many supervision steps in this step (exploration)."""
    rng = np.random.default_rng([seed, step, 2])
    return (rng.random(slots) < probability) * rng.integers(min(2, most), most + 1, slots)


def puzzle_tensors(data, numbers):
    """{'inputs', 'labels' (n, S) uint8, 'puzzle_identifiers' (n,)} of these examples."""
    inputs, labels, identifiers = data.rows(numbers)
    return dict(inputs=torch.from_numpy(inputs), labels=torch.from_numpy(labels), puzzle_identifiers=torch.from_numpy(identifiers))


def deal_carries(ranks, carries, rank, world_size, data):
    """The carries of this rank, one for each micro-step, shaped like `carries`, out of those that all ranks stored ([{'carry': [carry, ...]}, ...]): the slots
    are in the order of the global batch, whatever the number of ranks and micro-steps was. ValueError if they do not fit these data."""
    stored = [part['carry'][i] for i in range(len(ranks[0]['carry'])) for part in ranks]
    B, dealt = len(carries[0]['halted']), []
    for micro_step, like in enumerate(carries):
        begin, carry = (micro_step * world_size + rank) * B, {}
        for name, tensor in like.items():
            slots = torch.cat([part[name] for part in stored])
            if slots.shape != (B * world_size * len(carries), *tensor.shape[1:]):
                raise ValueError(f'its carry has {name} of the shape {tuple(slots.shape)}')
            carry[name] = slots[begin:begin + B].to(tensor)
        dealt.append(carry)
        if not (0 <= int(carry['inputs'].min()) and int(carry['inputs'].max()) < data.vocab_size and int(carry['labels'].max()) < data.vocab_size
                and bool(((carry['labels'] >= 0) | (carry['labels'] == IGNORE)).all())
                and 0 <= int(carry['puzzle_identifiers'].min()) and int(carry['puzzle_identifiers'].max()) < data.num_puzzle_identifiers):
            raise ValueError('its carry holds tokens or puzzles that these data do not have')
    return dealt


def check_progress(checkpoint, halt_threshold):
    """ValueError if a checkpoint summed up other measures; accuracies at another threshold are of another kind: its best one is forgotten."""
    if len(checkpoint['sums']) != len(METRICS):
        raise ValueError(f'it sums up {len(checkpoint["sums"])} measures')
    if not all(type(number) in (int, float) for number in checkpoint['sums']):
        raise ValueError('what it sums up are no numbers')
    if checkpoint['config'].get('halt_threshold', 0.5) != halt_threshold:
        checkpoint.update(best_exact=-1.0, best_val_loss=math.inf)


def log_means(sums):
    """(share of the cells, of the puzzles, mean number of steps) of the slots that halted, out of their METRICS summed up."""
    sums = dict(zip(METRICS, sums, strict=True))
    return (sums[name] / max(1, sums['count']) for name in ('accuracy', 'exact_accuracy', 'steps'))


def of_all_ranks(tensors):
    """These tensors joined with those of the other ranks, which have the same shapes."""
    if not dist.is_initialized():
        return tensors
    gathered = [[torch.empty_like(tensor) for _ in range(dist.get_world_size())] for tensor in tensors]
    for tensor, parts in zip(tensors, gathered, strict=True):
        dist.all_gather(parts, tensor)
    return [torch.cat(parts) for parts in gathered]


def run_folder(config, project_dir, look):
    """log_dir, else {project_dir}/{run_name}. A run that nobody named is the newest where one is to be read (look), else a new one."""
    if any(re.search(r'^\.*$|[/\0]', name) for name in (config['run_name'] or 'x', config['project_name'] or os.path.basename(project_dir))):
        fail(f'--run_name={config["run_name"]} and --project_name={config["project_name"]} are names of folders, without /')
    if config['log_dir'] and ('log_dir' in config.typed_here or not {'run_name', 'project_name'} & config.typed_here):
        return config['log_dir']
    steps = [path for path in glob.glob(os.path.join(glob.escape(project_dir), '*', 'step_*')) if re.fullmatch(r'step_(\d+|best)', os.path.basename(path))]
    last = newest(steps) if look and not config['run_name'] else ''
    return os.path.dirname(last) or os.path.join(project_dir, config['run_name'] or time.strftime('%Y%m%d_%H%M%S'))


def slots_of(global_batch_size, grad_accumulation_steps, world_size):
    """(micro-steps of a step, slots of one on one rank)."""
    micro_steps = -(-max(1, grad_accumulation_steps) // world_size)
    slices = micro_steps * world_size
    if global_batch_size % slices:
        fail(f'global_batch_size {global_batch_size} is no multiple of {micro_steps} micro-step(s) x {world_size} rank(s); '
             f'the nearest that is: {max(1, round(global_batch_size / slices)) * slices}')
    return micro_steps, global_batch_size // slices


def all_config(config, vector_size, run_dir):
    """all_config.yaml, as the public code writes it: the model's settings below `arch:`, then the others; bytes."""
    arch = dict(config, puzzle_emb_ndim=vector_size, forward_dtype=config['dtype'])
    others = dict({name: value for name, value in config.items() if name not in (*LAUNCH, *SHAPE, *RECURSION)}, lr_min_ratio=config['min_lr_ratio'],
                  checkpoint_path=run_dir)
    lines = ['arch:', '  name: recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1',
             *(f'  {name}: {json.dumps(arch[name])}' for name in (*SHAPE, *RECURSION, 'forward_dtype')),
             *(f'{name}: {json.dumps(value)}' for name, value in sorted(others.items()))]
    return ''.join(re.sub(r'(: -?\d)(e-\d+)$', r'\1.0\2', line) + '\n' for line in lines).encode()  # JSON values are YAML ones, but for 1e-05


# ---- checkpoints of others
SHAPE = ('hidden_size', 'num_heads', 'expansion', 'multiple_of', 'L_layers', 'mlp_t', 'pos_encodings', 'puzzle_emb_ndim', 'puzzle_emb_len')
RECURSION = ('H_cycles', 'L_cycles', 'halt_max_steps', 'halt_exploration_prob')  # a loaded model may be run with others


def trm_checkpoint(path, others):
    """A checkpoint as the script stored it; one that is not its own is weights alone, as read_trm gives them. others: a setting that only the other script
    has."""
    found = read_whole(path)
    own = isinstance(found, dict) and 'step' in found and not (isinstance(found.get('config'), dict) and others in found['config'])
    return found if own else read_trm(path)


def read_trm(path):
    """{'model': state dict of TRM, 'config': what is known of its shape} from a checkpoint of this repository (its EMA, if it has one) or of the
    public code: a state dict, the prefixes of torch.compile and of its classes taken off, and the `arch:` lines of all_config.yaml
    beside it. FileNotFoundError; ValueError if it is neither."""
    found = read_whole(path)
    if not isinstance(found, dict) or not isinstance(found.get('model', found), dict):
        raise ValueError('it holds no weights')
    weights = dict(found.get('model', found), **(found['ema'] if isinstance(found.get('ema'), dict) else {}))
    weights = {re.sub(r'(_orig_mod|model|inner)\.', '', str(name)): tensor for name, tensor in weights.items()}
    embedding = weights.get('embed_tokens.embedding_weight')
    if any(not torch.is_tensor(t) or not t.is_floating_point() or t.dim() not in (1, 2) for t in weights.values()) or embedding is None or embedding.dim() != 2:
        raise ValueError('its entries are not those of a Tiny Recursive Model')
    config = found['config'] if isinstance(found.get('config'), dict) else _arch_of(os.path.join(os.path.dirname(path), 'all_config.yaml'))
    kinds = {field.name: field.type for field in fields(TRMConfig)}
    for name in ('rope_theta', 'rms_norm_eps'):
        if config.get(name, getattr(TRMConfig, name)) != getattr(TRMConfig, name):
            raise ValueError(f'its {name} is {config[name]!r}, here it is always {getattr(TRMConfig, name)}')
    config = {name: float(value) if kinds[name] is float and type(value) is int else value for name, value in config.items() if name in SHAPE + RECURSION}
    if config.get('puzzle_emb_ndim') == -1:
        del config['puzzle_emb_ndim']
    for name, value in config.items():
        if type(value) is not kinds[name]:
            raise ValueError(f'its {name} is {value!r}')
    config.update(hidden_size=embedding.shape[1], mlp_t=any('.mlp_t.' in name for name in weights),
                  L_layers=len({match[1] for match in map(re.compile(r'L_level\.layers\.(\d+)\.').match, weights) if match}),
                  puzzle_emb_ndim=weights['puzzle_emb.weights'].shape[-1] if 'puzzle_emb.weights' in weights else 0)
    if 'embed_pos.embedding_weight' in weights:
        config['pos_encodings'] = 'learned'
    if config['mlp_t']:
        config.setdefault('pos_encodings', 'none')
    return dict(model=weights, config=config)


def _arch_of(path):
    """The plain values below `arch:` in a file that the public code wrote; {} without one."""
    if not os.path.isfile(path):
        return {}
    with open(path, encoding='utf-8', errors='replace') as file:
        text = file.read()
    values = {}
    for name, value in re.findall(r'^  (\w+): *([^\s#].*?) *$', (re.findall(r'^arch:\n((?:[ \t]+.*\n?|\n)*)', text, re.MULTILINE) or [''])[0], re.MULTILINE):
        number = re.fullmatch(r'[-+]?\d+', value) and int or re.fullmatch(r'[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?', value) and float
        values[name] = number(value) if number else {'true': True, 'false': False}.get(value.lower(), value.strip('\'"'))
    return values


def adopt_trm(config, shape, where):
    """Make the shape that read_trm found that of the settings (a Config), as if it had been typed. ValueError if something else was typed, or if nobody
    says what the weights do not tell; how often and how long the model recurs may be typed anew."""
    if config['puzzle_emb_ndim'] == -1 and shape['puzzle_emb_ndim'] == shape['hidden_size']:  # the same in other words
        config.given.discard('puzzle_emb_ndim')
    for name in SHAPE:
        if name in shape and name in config.given and config[name] != shape[name]:
            raise ValueError(f'--{name}={config[name]} is not that of {where}: {shape[name]}')
    needed = [name for name in ('num_heads', 'pos_encodings', 'puzzle_emb_len') if name not in shape and name not in config.given]
    needed = [name for name in needed if name == 'puzzle_emb_len' or not shape['mlp_t']]  # these mean nothing without attention
    if needed:
        raise ValueError(f'{where} does not tell its {needed[0]}, and no all_config.yaml beside it does: add --{needed[0]}')
    config.restore(shape, where)


def begin_with(setting, config, checkpoint, file):
    """(checkpoint, its file): without one, the weights that this setting of the Config names; the shape of weights alone becomes that of the settings."""
    source = config[setting]
    try:
        if source and not checkpoint:
            checkpoint, file = read_trm(source), source
    except FileNotFoundError:
        fail(f'--{setting}={source} does not exist{nearby(source)}')
    except (ValueError, OSError) as error:
        fail(f'--{setting}={source}: {error}')
    try:
        if checkpoint and 'step' not in checkpoint:
            adopt_trm(config, checkpoint['config'], file)
    except ValueError as error:
        fail(error)
    return checkpoint, file


def new_trm(data, config, vector_size, device):
    """A TRM for these data, of the shape that the settings give."""
    shape = dict({name: config[name] for name in SHAPE + RECURSION}, puzzle_emb_ndim=vector_size)
    try:
        return TRM(TRMConfig(data.vocab_size, data.seq_len, data.num_puzzle_identifiers, forward_dtype=config['dtype'], **shape)).to(device)
    except (ValueError, RuntimeError, MemoryError) as error:  # the last two: a table of more puzzles than the memory holds
        fail(f'no model of {data.num_puzzle_identifiers:,} puzzles: {str(error)[:300]}')


def average_of(model):
    """A copy for the moving average of its weights; they share the table of puzzles, which has no average."""
    return copy.deepcopy(model, {id(table): table for table in [getattr(model, 'puzzle_emb', None)] if table})


@torch.no_grad()
def move_average(average, model, rate):
    """Exponential moving average of the weights: each keeps `rate` of itself."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - rate)


def gradients_by_name(model, gradients):
    """{name: gradient} of the parameters that learn; one more in the list than these is that of the puzzles' vectors."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return dict(zip([*names, 'puzzle_emb'], gradients, strict=False))


def load_trm(checkpoint, model, judge, fit):
    """Load a checkpoint's weights into the model, and their average into `judge`, if that is another. fit: weights of another shape are fitted, both
    models get the average. Returns what was changed, a list of sentences."""
    weights, average, changes = checkpoint['model'], checkpoint.get('ema') or {}, []
    if fit:
        weights, changes = fit_trm(dict(weights, **(average if judge is not model else {})), model.config)
        average = {}
    model.load_state_dict(weights)
    if judge is not model:
        judge.load_state_dict(dict(model.state_dict(), **average))
    return changes


def fit_trm(weights, config):
    """(weights for a TRM of this TRMConfig, what was changed to that end, a list of sentences).

    Another vocabulary: the rows of the tokens that both have stay, new ones are the mean; so with learned positions, in a grid of another size. Another number
    of puzzles: every vector of the table is the mean of the old ones, as in the public code, since nothing says which puzzle is which. ValueError if
    something else differs."""
    with torch.device('meta'):
        wanted = {name: tensor.shape for name, tensor in TRM(config).state_dict().items()}
    if wanted.keys() != weights.keys():
        raise ValueError(f'the weights differ from the model in {sorted(wanted.keys() ^ weights.keys())[:4]}')
    weights, changes = dict(weights), []
    for name, shape in wanted.items():
        old = weights[name]
        if old.shape == shape:
            continue
        if config.mlp_t and '.mlp_t.' in name:
            raise ValueError(f'{name} is {tuple(old.shape)}, here {tuple(shape)}: a model with mlp_t is bound to its number of cells')
        if name not in ('puzzle_emb.weights', 'embed_tokens.embedding_weight', 'lm_head.weight', 'embed_pos.embedding_weight') or old.shape[1:] != shape[1:]:
            raise ValueError(f'{name} is {tuple(old.shape)}, here {tuple(shape)}')
        new = old.mean(0, keepdim=True).repeat(shape[0], 1)
        if name != 'puzzle_emb.weights':
            new[:len(old)] = old[:shape[0]]
        weights[name] = new
        changes.append(f'{name}: {len(old)} -> {shape[0]} rows, ' + ('each the mean of the old ones' if name == 'puzzle_emb.weights' else
                                                                      f'{min(len(old), shape[0])} of them kept'))
    return weights, changes


# ---- what a person sees
ARC_COLOURS = (16, 27, 160, 34, 220, 245, 199, 208, 117, 88)  # of a terminal with 256


def report_lines(report, unit='step'):
    """Lines of what an evaluation found, by supervision step or by turn."""
    by_step = report['exact_accuracy_by_step']
    yield (f'val loss {report["val_loss"]:.4f} | exact {report["exact_accuracy"]:.4f} at the halt, {by_step[-1]:.4f} after {len(by_step)} {unit}s | '
           f'cells {report["cell_accuracy"]:.4f} | halts after {report["halting_steps"]:.2f} steps | {report["examples"]:,} examples')
    yield f'exact by {unit} ' + ' '.join(f'{share:.4f}' for share in by_step)


def drawn(inputs, cells, labels, vocab_size):
    """Lines that show a puzzle (S,) of a square grid on a terminal: mazes (6 tokens) and digits as characters, ARC (12 tokens, 30 x 30) as colours; what was
    filled in is bold, what is wrong stands on red, or is marked with ><."""
    side = math.isqrt(len(cells))
    if side * side != len(cells):
        return [' '.join(map(str, cells))]
    arc, lines = vocab_size == 12 and side == 30, []
    letters = '?# SGo' if vocab_size == 6 else '?.' + '123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'
    for r in range(side):
        line = ''
        for i in range(r * side, r * side + side):
            wrong = labels[i] != 0 and cells[i] != labels[i]
            if arc:
                known = bool(2 <= cells[i] <= 11)
                line += f'\033[48;5;{ARC_COLOURS[cells[i] - 2]}m' * known + ('><' if wrong else '  ') + '\033[0m' * known
            else:
                letter = letters[cells[i]] if cells[i] < len(letters) else '?'
                style = '41' if wrong else '1' if cells[i] != inputs[i] else ''
                line += (f'\033[{style}m{letter}\033[0m' if style else letter) + ' ' * (vocab_size != 6)
        if not arc or labels[r * side:r * side + side].any() or '><' in line:
            lines.append(line)
    return lines


# ---- addition: both numbers, the carries and the sum, a row of the grid each
def add_columns(a, b):
    """Column addition of numbers (n, W) of digits, right-aligned, -1 in front of them. Returns carries (n, W) bool, where one is added; the sum (n, W), -1 in
    front; and of each pair the longest carry: how many columns it runs through, the one in which it arises and those that carry only because of it."""
    carries, total = np.zeros(a.shape, bool), np.full(a.shape, -1, np.int8)
    run, longest = np.zeros((2, len(a)), int)
    for j in reversed(range(a.shape[1])):
        own = np.maximum(a[:, j], 0) + np.maximum(b[:, j], 0)
        here = own + carries[:, j]
        total[:, j] = np.where((a[:, j] >= 0) | (b[:, j] >= 0) | carries[:, j], here % 10, -1)
        run = np.where(own >= 10, 1, np.where(here >= 10, run + 1, 0))
        longest = np.maximum(longest, run)
        if j:
            carries[:, j - 1] = here >= 10
    return carries, total, longest


def addition_tokens(a, b, carries, total):
    """The grid (n, 4 W) uint8 in the tokens of ARC: blank 1, digit d = d + 2."""
    return (np.concatenate((a, b, np.where(carries, 1, -1), total), 1) + 2).astype(np.uint8)


def addition_numbers(row):
    """(digits (n, W), valid (n,)) of one row (n, W) of grids: -1 in front of a number; invalid is what has no digit, or a blank behind one."""
    digits = np.asarray(row).astype(np.int8) - 2
    known = (digits >= 0) & (digits <= 9)
    return np.where(known, digits, -1), known[:, -1] & (known[:, 1:] >= known[:, :-1]).all(1) & (known | (np.asarray(row) == 1)).all(1)


def open_sums(folder, split):
    """open_puzzles of a folder of sums, with the numbers a, b (n, W) of digits, the longest `carry` of each pair, and `whole`: the answers are the sums, not
    the next state of the grid. ValueError names what is no sum."""
    data = open_puzzles([folder], split)
    where, W = os.path.join(folder, split), data.seq_len // 4
    if data.vocab_size != 12 or data.seq_len != 4 * W or W > 1000:
        raise ValueError(f'{where}: {data.seq_len} cells of {data.vocab_size} tokens are no sums: these have four rows of 1,000 cells at most and 12 tokens')
    inputs, labels, _ = data.rows(np.arange(data.examples))
    (data.a, a_valid), (data.b, b_valid) = addition_numbers(inputs[:, :W]), addition_numbers(inputs[:, W:2 * W])
    carries, total, data.carry = add_columns(data.a, data.b)
    data.whole = bool((inputs[:, 2 * W:] == 1).all())
    wrong = ~(a_valid & b_valid) | (np.maximum(data.a[:, 0], 0) + np.maximum(data.b[:, 0], 0) + carries[:, 0] > 9)
    if data.whole:
        wrong |= ((labels != addition_tokens(data.a, data.b, carries, total)) & (labels != 0)).any(1) | (labels[:, 3 * W:] == 0).any(1)
    if wrong.any():
        raise ValueError(f'{where}: row {int(wrong.argmax())} is no sum of two numbers')
    return data


def open_both(folder, config, read_only):
    """(training sums, None if read_only; test sums, None if there are none). The settings `columns` and `trace` of the Config become those of the data.
    ValueError if they, or what was typed, do not fit together."""
    train = None if read_only else open_sums(folder, 'train')
    test = open_sums(folder, 'test') if read_only or os.path.isdir(os.path.join(folder, 'test')) else None
    data = train or test
    if test and (test.seq_len != data.seq_len or test.num_puzzle_identifiers != data.num_puzzle_identifiers or not test.whole):
        raise ValueError(f'{folder}: train and test differ in columns or identifiers, or the test is not of whole sums')
    for name, value in dict(columns=data.seq_len // 4, **dict(trace=not train.whole) if train else {}).items():
        if name in config.typed_here and name in config.given and config[name] != value:
            raise ValueError(f'--{name}={config[name]} does not fit {folder}: {value}')
        config.assign(name, value)
        config.given.add(name)  # so that it is stored
    if train and not train.whole and config['carry_loss_weight'] <= 0:
        raise ValueError('--carry_loss_weight=0: a model of single digits reads its own carries, it has to learn them')
    return train, test


def room_for(sums, columns, file):
    """What new_trm needs to know of sums in a grid of so many columns; ValueError if one of them, a match of both numbers, does not fit into it."""
    if not 0 < columns <= 1000:
        raise ValueError(f'--columns={columns}: expected 1,000 at most' if columns else f'{file} does not tell how many columns its sums have: '
                         '--columns does, if it is a model of sums')
    longest = max(len(str(int(a) + int(b))) for a, b in (match.groups() for match in sums))
    if longest > columns:
        raise ValueError(f'--ask: a sum of {longest} digits does not fit into {columns} columns')
    return SimpleNamespace(seq_len=4 * columns, vocab_size=12, num_puzzle_identifiers=1)


def sum_text(row):
    """The number in a row of tokens, ? for what is no digit; for a person."""
    return ''.join(' 0123456789'[t - 1] if 1 <= t <= 11 else '?' for t in row).strip().replace(' ', '?')


def sums_found(data, numbers, right, rows):
    """Of the answers to the examples `numbers` of open_sums: right (n,) bool, rows (n, W) the tokens of the sum. {'by_digits', 'by_carry': {group: [right ones,
    all]}, 'answers': [...] in the order of the numbers}."""
    a, b = data.a[numbers], data.b[numbers]
    groups = dict(digits=np.maximum((a >= 0).sum(1), (b >= 0).sum(1)), carry=data.carry[numbers])
    a, b = ([''.join(str(d) for d in row if d >= 0) for row in some] for some in (a, b))
    answers = [dict(a=a[i], b=b[i], sum=str(int(a[i]) + int(b[i])), answer=sum_text(rows[i]), right=bool(right[i]),
                    **{name: int(of[i]) for name, of in groups.items()}) for i in np.argsort(numbers)]
    return dict({f'by_{name}': {str(k): [int(right[of == k].sum()), int((of == k).sum())] for k in np.unique(of)} for name, of in groups.items()},
                answers=answers)


def sums_lines(report, unit, whole):
    """Lines of what an evaluation found, a sample of the answers among them; whole: by the kind of sum too."""
    yield from report_lines(report, unit)
    for name, what in (('digits', 'digits of the longer number'), ('carry', 'columns of the longest carry')) if whole else ():
        yield f'exact by {what} ' + ' '.join(f'{k}: {right / n:.4f} ({n})' for k, (right, n) in report[f'by_{name}'].items())
    yield 'sample ' + ', '.join(f'{r["a"]}+{r["b"]}={r["answer"]}' + ('' if r['right'] else f' ({r["sum"]})') for r in report['answers'][:3])


def thinking_aloud(a, b, columns, trace, at_work, device):
    """Lines of a model's work on a + b (texts of digits), a grid for every supervision step until it halts. at_work: see finetune_addition.py."""
    digits = [np.array([[-1] * (columns - len(number)) + [int(d) for d in number]], np.int8) for number in (a, b)]
    grid = torch.from_numpy(addition_tokens(*digits, np.zeros((1, columns), bool), np.full((1, columns), -1))).to(device)
    rows = dict(inputs=grid, labels=torch.full_like(grid, IGNORE, dtype=torch.int32), puzzle_identifiers=torch.zeros(1, dtype=torch.int64, device=device))
    before, halted, answer, shown = grid, -1, '', 0
    for turn, step, outputs, cells, halts in at_work(rows):
        if turn == halted:
            continue  # it has halted in this turn: what it would do further on
        shown += 1
        yield f'{a} + {b}, ' + f'turn {turn + 1}, ' * trace + f'step {step + 1}: would halt with {outputs["q_halt_logits"].sigmoid().item():.4f}'
        for row in cells[0].view(4, columns).tolist():
            yield '    ' + ' '.join('.0123456789'[t - 1] if 1 <= t <= 11 else '?' for t in row)
        if halts:
            same, before, halted, answer = bool((cells == before)[0, 2 * columns:].all()), cells, turn, sum_text(cells[0, 3 * columns:].tolist())
            if same or not trace:
                break
    yield f'{a} + {b} = {answer}' + (', right' if answer == str(int(a) + int(b)) else f', wrong: {int(a) + int(b)}') + f', after {shown} step(s)'


# ---- ARC: one answer out of the answers to all copies of a task
PASS_AT = (1, 2, 5, 10, 100, 1000)


def read_arc(folders, data):
    """(names of all identifiers, {name of a test task: task}) of folders of prepare/arc.py, to the test in them as open_puzzles gave it (None: there is none);
    ValueError says what is wrong with them."""
    if not data or data.seq_len != 900:
        raise ValueError(f'{data.seq_len} cells, expected 30 x 30' if data else 'there is no test')
    identifiers, tasks = [], {}
    for folder in folders:
        names, puzzles = (read_json(os.path.join(folder, name)) for name in ('identifiers.json', 'test_puzzles.json'))
        if not isinstance(names, list) or not isinstance(puzzles, dict):
            raise ValueError(f'{folder}: expected a list in identifiers.json and an object in test_puzzles.json')
        for i, name in enumerate(names):
            how = re.fullmatch(r'[^|]*(?:\|\|\|t[0-7]\|\|\|(\d{10}))?', name) if isinstance(name, str) else None
            if not how or how[1] and sorted(how[1]) != list('0123456789'):
                raise ValueError(f'{folder}/identifiers.json: number {i} is {name!r:.80}')
        for name, task in puzzles.items():
            pairs = task.get('test') if isinstance(task, dict) else None
            grids = [pair.get(key) for pair in pairs if isinstance(pair, dict) for key in ('input', 'output')] if isinstance(pairs, list) else []
            if not grids or len(grids) != 2 * len(pairs) or name in tasks or not all(
                    isinstance(grid, list) and 1 <= len(grid) <= 30 and all(
                        isinstance(row, list) and 1 <= len(row) == len(grid[0]) <= 30 and all(type(cell) is int and 0 <= cell <= 9 for cell in row)
                        for row in grid) for grid in grids):
                why = 'is in another folder too' if name in tasks else 'has no grids in its test'
                raise ValueError(f'{folder}/test_puzzles.json: task {name!r:.80} {why}')
        identifiers += names
        tasks.update(puzzles)
    if len(identifiers) != data.num_puzzle_identifiers or not tasks:
        raise ValueError(f'{len(identifiers)} identifiers and {len(tasks)} test tasks, expected {data.num_puzzle_identifiers} identifiers')
    return identifiers, tasks


def arc_grid(tokens):
    """The grid (rows, columns) uint8 of colours in (900,) tokens: the largest rectangle from the upper left corner that holds nothing but colours."""
    board = np.asarray(tokens).reshape(30, 30)
    width = np.minimum.accumulate(np.cumprod((board >= 2) & (board <= 11), 1).sum(1))
    rows = int((width * np.arange(1, 31)).argmax()) + 1
    return (board[:rows, :width[rows - 1]] - 2).astype(np.uint8) if width[rows - 1] else np.zeros((0, 0), np.uint8)


def arc_undone(identifier, grid):
    """(the task's name, the grid as it is in the task itself) of a grid in a copy, see prepare/arc.py."""
    name, *how = identifier.split('|||')
    if not how:
        return name, grid
    turn, colours = int(how[-2][1:]), np.argsort([int(digit) for digit in how[-1]]).astype(np.uint8)
    turn = (0, 3, 2, 1, 4, 5, 6, 7)[turn]  # the way back; as dihedral in prepare/maze.py
    turned = np.rot90(grid, turn) if turn < 4 else (grid[:, ::-1], grid[::-1], grid.T, np.rot90(grid)[:, ::-1])[turn - 4]
    return name, colours[turned]


def grid_key(grid):
    return bytes(grid.shape) + np.asarray(grid, np.uint8).tobytes()


def arc_vote(votes, identifier, inputs, cells, q_halt):
    """Add an answer, both as (900,) tokens, to votes: {(task, input): {answer: [number of votes, sum of their sigmoid(q_halt)]}}."""
    name, question = arc_undone(identifier, arc_grid(inputs))
    vote = votes.setdefault((name, grid_key(question)), {}).setdefault(grid_key(arc_undone(identifier, arc_grid(cells))[1]), [0, 0.0])
    vote[0] += 1
    vote[1] += 1 / (1 + math.exp(-max(-700.0, q_halt)))


def all_votes(parts):
    """The votes of several ranks as one."""
    votes = {}
    for part in parts:
        for question, answers in part.items():
            for answer, (n, q) in answers.items():
                vote = votes.setdefault(question, {}).setdefault(answer, [0, 0.0])
                vote[0], vote[1] = vote[0] + n, vote[1] + q
    return votes


def arc_result(votes, tasks):
    """({'pass@1': share of the tests that are right within so many answers, a task's tests sharing its weight, ...}, submission for Kaggle) of the
    votes on these tasks ({name: {'test': [{'input', 'output'}, ...]}}): most votes first, then the highest mean q."""
    right, submission = dict.fromkeys(PASS_AT, 0.0), {}
    for name, task in tasks.items():
        submission[name] = []
        for pair in task['test']:
            found = votes.get((name, grid_key(np.array(pair['input']))), {})
            ranked = sorted(found, key=lambda key: (-found[key][0], -found[key][1] / found[key][0], key))  # the last: whatever the ranks
            answer = grid_key(np.array(pair['output']))
            for k in PASS_AT:
                right[k] += (answer in ranked[:k]) / len(task['test'])
            grids = [np.frombuffer(key[2:], np.uint8).reshape(key[0], key[1]).tolist() for key in ranked[:2]] or [[[0]]]
            submission[name].append({'attempt_1': grids[0], 'attempt_2': grids[-1]})
    return {f'pass@{k}': count / len(tasks) for k, count in right.items()}, submission
