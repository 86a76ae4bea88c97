"""trm.py: the numbers of the public code, the loss, the optimizers, halting, the puzzle table.

tests/files/trm_*.npz hold what SamsungSAILMontreal/TinyRecursiveModels (e7b6871) computes on a small float32 model on one CPU thread:
weights, six training steps with halting, gradients of steps 1 and 4, weights after six steps, EMA, evaluation."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trm import IGNORE, METRICS, TRM, AdamATan2, Gated, TRMConfig, act_loss, sign_sgd, symlog, trunc_normal

FILES = Path(__file__).parent / 'files'
SMALL = dict(vocab_size=7, seq_len=12, num_puzzle_identifiers=5, hidden_size=32, num_heads=2, H_cycles=2, L_cycles=3, halt_max_steps=3, puzzle_emb_ndim=32,
             puzzle_emb_len=2, forward_dtype='float32')


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = TRM(TRMConfig(**{**SMALL, 'multiple_of': 32, **changes}))
    torch.nn.init.normal_(model.q_head.weight, std=0.5)
    torch.nn.init.zeros_(model.q_head.bias)
    if 'puzzle_emb.weights' in model.state_dict():
        model.puzzle_emb.weights.normal_()
    return model


def batch(seed=0, B=6, **changes):
    g = torch.Generator().manual_seed(seed)
    config = {**SMALL, **changes}
    labels = torch.randint(config['vocab_size'], (B, config['seq_len']), generator=g)
    return dict(inputs=torch.randint(config['vocab_size'], (B, config['seq_len']), generator=g), labels=torch.where(labels == 0, IGNORE, labels),
                puzzle_identifiers=torch.randint(5, (B,), generator=g))


def step(model, carry, data, min_steps=None):
    carry = model.refill(carry, data)
    rows = model.puzzle_emb.rows(carry['puzzle_identifiers'])
    carry, out = model(carry, rows, min_steps)
    return carry, out, rows


# ---- the public code's numbers
@pytest.mark.parametrize('name', ['att', 'mlp'])
def test_golden_numbers(name):
    """Attention: six steps with optimizers, EMA and evaluation. mlp_t multiplies rounding by 5 to 10 a step, so that two CPUs differ by 1e-2
    after five: step 1 alone, forward and gradients."""
    golden = np.load(FILES / f'trm_{name}.npz')
    stated = dict(word.split('=') for word in golden['config'])
    assert {key: str(value) for key, value in SMALL.items()}.items() <= stated.items()
    model = TRM(TRMConfig(**SMALL, mlp_t=stated['mlp_t'] == 'True', pos_encodings=stated['pos_encodings']))
    model.load_state_dict({key[5:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith('init/')})
    optimizer = AdamATan2(model.parameters(), lr=1e-2, weight_decay=0.1)
    ema = {key: p.detach().clone() for key, p in model.named_parameters()}

    def same(found, key):
        expected = torch.from_numpy(golden[key]) if golden[key].ndim else torch.tensor(golden[key].item())
        found = found.detach()
        assert found.shape == expected.shape and (found.double() - expected.double()).abs().max() <= 1e-5 * max(1, expected.double().abs().max()), key

    data = [{key: torch.from_numpy(golden[f'step{k}/batch/{key}']) for key in ('inputs', 'labels', 'puzzle_identifiers')} for k in range(1, 7)]
    carry = model.initial_carry(data[0])
    for k in range(1, 7 if name == 'att' else 2):
        carry, out, rows = step(model, carry, data[k - 1], torch.zeros(6))
        (out['loss'] / 6).backward()
        for key in ('loss', 'logits', 'q_halt_logits'):
            same(out[key], f'step{k}/{key}')
        for key in ('steps', 'halted', 'z_H'):
            same(carry[key].float(), f'step{k}/{key}')
        for i, metric in enumerate(METRICS):
            same(out['sums'][i], f'step{k}/metrics/{metric}')
        if k in (1, 4):
            for key, p in model.named_parameters():
                same(p.grad, f'step{k}/grad/{key}')
            same(rows.grad, f'step{k}/grad/puzzle_emb.local_weights')
        sign_sgd(model.puzzle_emb.weights, carry['puzzle_identifiers'], rows.grad, lr=5e-2, weight_decay=0.1)
        optimizer.step()
        optimizer.zero_grad()
        for key, p in model.named_parameters():
            ema[key].lerp_(p.detach(), 0.1)
    if name == 'mlp':
        return
    for key, value in model.state_dict().items():
        same(value, f'final/{key}')
    for key, value in ema.items():
        same(value, f'ema/{key}')
    with torch.no_grad():
        carry = model.refill(model.initial_carry(data[-1]), data[-1])
        for _ in range(3):
            carry, out = model(carry, model.puzzle_emb.weights[carry['puzzle_identifiers']])
    assert carry['halted'].all()
    for key in ('loss', 'logits', 'q_halt_logits'):
        same(out[key], f'eval/{key}')
    for i, metric in enumerate(METRICS):
        same(out['sums'][i], f'eval/metrics/{metric}')


def test_gating_is_autograds_own_to_the_bit():
    torch.manual_seed(0)
    found = []
    x, weight, gradient = torch.randn(5, 10, 24), torch.randn(7, 12), torch.randn(5, 10, 7)
    for f in (Gated.apply, lambda t, w: F.linear(F.silu(t[..., :12]) * t[..., 12:], w)):
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = f(leaf * 1, w)  # what it is given is overwritten
        y.backward(gradient)
        found.append((y.detach(), leaf.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize('config, parameters', [
    (dict(vocab_size=11, seq_len=81, L_cycles=6, mlp_t=True, pos_encodings='none'), 5_028_866), (dict(vocab_size=11, seq_len=81), 6_828_034),
    (dict(vocab_size=6, seq_len=900), 6_822_914), (dict(vocab_size=6, seq_len=900, mlp_t=True, pos_encodings='none'), 18_795_522),
    (dict(vocab_size=12, seq_len=900), 6_829_058)], ids=['sudoku mlp', 'sudoku', 'maze', 'maze mlp', 'arc'])
def test_sizes_are_the_published_ones(config, parameters):
    with torch.device('meta'):
        model = TRM(TRMConfig(num_puzzle_identifiers=1, **config))
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- loss
def stablemax_loss(logits, labels):
    s = torch.where(logits < 0, 1 / (1 - logits), logits + 1)
    return -torch.log(torch.gather(s / s.sum(-1, keepdim=True), -1, labels.unsqueeze(-1))).squeeze(-1)


def test_the_loss_is_stablemax_and_finite_where_that_is_not():
    torch.manual_seed(0)
    logits = torch.randn(40, 9, dtype=torch.float64) * 5
    logits[3, 4], logits[5, 2], logits[6] = 1.0, 0.0, 0.0
    labels = torch.randint(9, (40,))
    gradients = []
    for f in (stablemax_loss, lambda x, y: F.cross_entropy(symlog(x), y, reduction='none')):
        x = (logits + 1e-9 * (logits == 1) * (f is stablemax_loss)).requires_grad_()  # where its branch for x < 0 divides by zero
        loss = f(x, labels).sum()
        loss.backward()
        gradients.append((loss.item(), x.grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-8) and (gradients[0][1] - gradients[1][1]).abs().max() < 1e-8
    x = logits.float().requires_grad_()
    F.cross_entropy(symlog(x), labels).backward()
    assert x.grad.isfinite().all() and (x.grad * 40 - gradients[1][1]).abs().max() < 1e-6


def test_metrics_by_hand():
    logits = torch.zeros(4, 3, 5)
    labels = torch.tensor([[1, 2, 3], [1, 2, IGNORE], [IGNORE] * 3, [4, 4, 4]])
    for b, row in enumerate([[1, 2, 3], [1, 0, 0], [0, 0, 0], [4, 4, 4]]):
        logits[b, range(3), row] = 2.0
    q, halted, steps = torch.tensor([1.0, 1.0, -1.0, 2.0]), torch.tensor([True, True, True, False]), torch.tensor([2, 3, 1, 1])
    loss, sums, _ = act_loss(logits, q, labels, halted, steps)
    sums = dict(zip(METRICS, sums.tolist(), strict=True))
    assert sums['count'] == 2 and sums['accuracy'] == 1.5 and sums['exact_accuracy'] == 1 and sums['q_halt_accuracy'] == 1 and sums['steps'] == 5
    right, wrong = -math.log(3 / 7), -math.log(1 / 7)  # s = 3, 1, 1, 1, 1
    assert sums['lm_loss'] == pytest.approx(right + (right + wrong) / 2 + right, rel=1e-6)
    expected = F.binary_cross_entropy_with_logits(q, torch.tensor([1.0, 0, 1, 1]), reduction='sum').item()  # without cells all of them are right
    assert sums['q_halt_loss'] == pytest.approx(expected, rel=1e-6) and loss.item() == pytest.approx(sums['lm_loss'] + 0.5 * expected, rel=1e-6)


# ---- carry and halting
def test_only_halted_slots_take_a_new_puzzle():
    model, first, second = small(), batch(1), batch(2)
    carry, _, _ = step(model, model.initial_carry(first), first, torch.zeros(6))
    halted = torch.tensor([True, False, True, False, False, False])
    carry['halted'] = halted
    new = model.refill(carry, second)
    for key in first:
        assert torch.equal(new[key][halted], second[key][halted]) and torch.equal(new[key][~halted], first[key][~halted])
    assert new['steps'].tolist() == [0, 1, 0, 1, 1, 1]
    assert torch.equal(new['z_H'][0], model.H_init.expand_as(new['z_H'][0])) and torch.equal(new['z_L'][1], carry['z_L'][1])


def test_when_slots_halt():
    model, data = small(), batch()
    torch.nn.init.zeros_(model.q_head.weight)
    seen = {}
    for bias, minimum in ((1.0, 0), (1.0, 2), (-1.0, 0), (1.0, None)):
        model.q_head.bias.data[0] = bias
        carry, counts = model.initial_carry(data), []
        for _ in range(3):
            carry, _, _ = step(model, carry, data, None if minimum is None else torch.full((6,), minimum))
            counts.append(int(carry['halted'].sum()))
        seen[bias, minimum] = counts
    # at once; not before the second step, and then again; never before the last; evaluation never halts early
    assert seen == {(1.0, 0): [6, 6, 6], (1.0, 2): [0, 6, 0], (-1.0, 0): [0, 0, 6], (1.0, None): [0, 0, 6]}


def test_only_the_last_cycle_has_gradients():
    model, data = small(H_cycles=3), batch()
    carry = model.refill(model.initial_carry(data), data)
    calls = []
    model.L_level.register_forward_hook(lambda module, args, out: calls.append(out.requires_grad))
    model(carry, model.puzzle_emb.rows(carry['puzzle_identifiers']), torch.zeros(6))
    assert calls == [False] * 8 + [True] * 4


@pytest.mark.parametrize('changes', [dict(), dict(mlp_t=True, pos_encodings='none'), dict(pos_encodings='learned'), dict(puzzle_emb_ndim=0, puzzle_emb_len=0),
                                     dict(puzzle_emb_ndim=40, puzzle_emb_len=0), dict(puzzle_emb_ndim=0, puzzle_emb_len=3), dict(forward_dtype='bfloat16')], ids=str)
def test_slices_of_the_slots_are_the_whole(changes):
    """Gradient accumulation: each slice of the slots with its carry."""
    model, data = small(**changes), batch(B=8)
    table = hasattr(model, 'puzzle_emb')
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        logits = []
        for part in zip(*(value.chunk(parts) for value in data.values()), strict=True):
            part = dict(zip(data, part, strict=True))
            carry = model.refill(model.initial_carry(part), part)
            _, out = model(carry, model.puzzle_emb.rows(carry['puzzle_identifiers']) if table else None, torch.zeros(8 // parts))
            out['loss'].backward()
            logits.append(out['logits'].detach())
        gradients.append([torch.cat(logits).float(), *(p.grad for p in model.parameters())])
    near = 1e-5 if model.config.forward_dtype == 'float32' else 5e-2
    assert all((a - b).norm() <= near * a.norm() for a, b in zip(*gradients, strict=True))


def test_compiled_is_eager():
    model, data = small(), batch()
    outs = []
    for _ in range(2):
        carry = model.refill(model.initial_carry(data), data)
        model.zero_grad()
        carry, out = model(carry, model.puzzle_emb.rows(carry['puzzle_identifiers']), torch.zeros(6))
        out['loss'].backward()
        outs.append([out['logits'].detach(), carry['z_L'], *(p.grad.clone() for p in model.parameters())])
        model.compile()
    assert all((a - b).norm() <= 1e-5 * (1 + a.norm()) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize('wrong, told', [(dict(num_heads=3), 'num_heads 3'), (dict(pos_encodings='alibi'), 'alibi'), (dict(puzzle_emb_ndim=100), 'puzzle_emb_ndim 100'),
                                         (dict(num_heads=32), 'even')], ids=str)
def test_shapes_that_make_no_model(wrong, told):
    with pytest.raises(ValueError, match=told):
        small(**wrong)


def test_trunc_normal():
    torch.manual_seed(0)
    x = trunc_normal((200_000,), 0.3)
    assert x.std().item() == pytest.approx(0.3, rel=0.01) and x.abs().max().item() == pytest.approx(2 * 0.3 / 0.8796256610342398, rel=1e-3)


# ---- optimizers
def test_adam_atan2_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    optimizer = AdamATan2([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    w, m, v = p.detach().double().clone(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t, g in enumerate(([1.0, -3.0, 0.0], [0.5, 1e-20, 0.0], [-2.0, 4.0, 0.0]), 1):
        g = torch.tensor(g)
        p.grad = g.clone()
        optimizer.step()
        w *= 1 - 0.1 * 0.5
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.double() ** 2
        w -= 0.1 / (1 - 0.9 ** t) * torch.atan2(m, v.sqrt() / math.sqrt(1 - 0.95 ** t))
        assert (p.detach() - w).abs().max() < 1e-6
    assert p[2] == 0 and optimizer.state[p]['step'] == 3
    again = AdamATan2([p], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]['exp_avg'], optimizer.state[p]['exp_avg']) and again.state[p]['step'] == 3


def test_sign_sgd_sums_the_slots_of_a_puzzle():
    torch.manual_seed(0)
    table, ids, g = torch.randn(6, 4), torch.tensor([2, 0, 2, 5, 2]), torch.randn(5, 4)
    g[1] = 0
    expected = table.clone()
    for i in (0, 2, 5):
        expected[i] = table[i] * (1 - 0.1 * 0.5) - 0.1 * g[ids == i].sum(0).sign()
    before = table.clone()
    sign_sgd(table, ids, g, lr=0.1, weight_decay=0.5)
    assert torch.equal(table, expected) and torch.equal(table[[1, 3, 4]], before[[1, 3, 4]])
