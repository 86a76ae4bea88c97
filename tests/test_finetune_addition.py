"""What prepare/addition.py and finetune_addition.py alone promise: the sums, what is learned and judged, where a model may come from, questions, and the commands of
guide 000."""
import json
import os
import re
import signal
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from harness import ROOT, load, make_addition_data, make_puzzle_data, make_text_data, prepare
from test_configurator import GUIDES
from test_pretrain_trm import EAGER, SEEN

import trm

SHAPE = ['--hidden_size=16', '--num_heads=2', '--multiple_of=16', '--L_layers=1', '--H_cycles=2', '--L_cycles=1', '--puzzle_emb_len=1', '--halt_max_steps=3']
BASE = [*SHAPE, '--mlp_t', '--pos_encodings=none', '--data_path=data', '--log_dir=run', '--global_batch_size=8', '--total_steps=4', '--lr_warmup_steps=2', '--lr=1e-2',
        '--eval_interval=2', '--log_interval=1']
ROPE = [word for word in BASE if word not in ('--mlp_t', '--pos_encodings=none')]


@pytest.fixture
def trains(launcher, tmp_path):
    """trains('--total_steps=2', ...) runs a tiny training in a folder of its own."""
    make_addition_data(tmp_path / 'data')

    def trains(*args, base=BASE, **kwargs):
        return launcher.run('finetune_addition.py', [*base, *args], cwd=tmp_path, **kwargs)
    return trains


def column(run, name):
    return [float(x) for x in re.findall(rf'\| {name} ([\d.e+-]+)', run.out)]


def report(path):
    return json.loads(path.read_text())


def texts(grids):
    """(n, 4) strings, one a row, blanks as spaces."""
    return [[''.join(' 0123456789'[t - 1] for t in row) for row in grid.reshape(4, -1)] for grid in grids]


def plain_carry(a, b):
    """(columns that a carry is added to, the longest carry), digit by digit."""
    to, longest, run, carry = set(), 0, 0, 0
    for j in range(max(len(str(a)), len(str(b)))):
        own = a // 10 ** j % 10 + b // 10 ** j % 10
        carry = own + carry >= 10
        run = 1 if own >= 10 else run + 1 if carry else 0
        longest = max(longest, run)
        to |= {j + 1} if carry else set()
    return to, longest


# ---- prepare/addition.py
@lru_cache
def made(folder, *args):
    prepare('addition', f'--output_dir={folder}', *args, cwd=folder.parent)
    return {split: trm.open_puzzles([str(folder)], split) for split in ('train', 'test')}


def test_every_grid_is_a_sum(tmp_path):
    for args, W in ((('--max_digits=7', '--train_size=3000'), 8), (('--max_digits=3', '--columns=9', '--train_size=500'), 9), (('--max_digits=25', '--train_size=200'), 26)):
        data = made(tmp_path / f'd{W}', *args)
        for split in data.values():
            inputs, labels, ids = split.rows(range(split.examples))
            assert inputs.shape[1] == 4 * W and not ids.any() and split.num_puzzle_identifiers == 1 and split.vocab_size == 12
            _, _, longest = trm.add_columns(*(trm.addition_numbers(inputs[:, i * W:i * W + W])[0] for i in (0, 1)))
            for question, (a, b, carries, total), far in zip(texts(inputs), texts(labels), longest, strict=True):
                assert question == [a, b, ' ' * W, ' ' * W]
                assert all(re.fullmatch(r' *(0|[1-9]\d*)', number) for number in (a, b, total)) and int(a) + int(b) == int(total)
                to, longest_carry = plain_carry(int(a), int(b))
                assert carries == ''.join(' 1'[W - 1 - i in to] for i in range(W)) and far == longest_carry


def test_lengths_are_independent_and_half_of_the_problems_carry_far(tmp_path):
    data = made(tmp_path / 'data', '--max_digits=6', '--train_size=6000')['train']
    inputs, labels, _ = data.rows(range(data.examples))
    a, b = (trm.addition_numbers(inputs[:, i * 7:i * 7 + 7])[0] for i in (0, 1))
    sizes = np.histogram2d((a >= 0).sum(1), (b >= 0).sum(1), bins=[np.arange(1, 8)] * 2)[0]
    assert sizes[2:, 2:].min() > 100 and sizes[2:, 2:].max() < 240  # 6000 / 36 each; of one digit there are only a few pairs
    longest = trm.add_columns(a, b)[2]
    assert (longest == 6).sum() > 100 and (longest >= 4).mean() > 0.1
    assert ((longest >= 4) & (np.maximum(a[:, -1], 0) + np.maximum(b[:, -1], 0) < 10)).sum() > 50  # which did not arise in the units
    data = made(tmp_path / 'none', '--max_digits=6', '--train_size=6000', '--carry_share=0')['train']
    inputs, _, _ = data.rows(range(data.examples))
    assert (trm.add_columns(*(trm.addition_numbers(inputs[:, i * 7:i * 7 + 7])[0] for i in (0, 1)))[2] >= 4).mean() < 0.005


def pairs_of(split, W):
    inputs, _, _ = split.rows(range(split.examples))
    return [frozenset((a, b)) for a, b, _, _ in texts(inputs)]


def test_train_and_test_share_no_pair(tmp_path):
    data = made(tmp_path / 'data', '--max_digits=2', '--train_size=100000')
    train, test = (pairs_of(data[split], 3) for split in ('train', 'test'))
    assert len(set(test)) == len(test) == 1000 and len(set(train)) == len(train) == 5050 - 1000 and not set(train) & set(test)  # all there are: 100 * 101 / 2
    assert {frozenset((f'{a:3}', f'{b:3}')) for a in range(100) for b in range(100)} == set(train) | set(test)


def test_each_in_both_orders(tmp_path):
    data = made(tmp_path / 'data', '--num_aug=1', '--train_size=50')
    train, rows = data['train'], [row[:2] for row in texts(data['train'].rows(range(100))[0])]
    assert train.examples == 100 and len(train.group_indices) == 51 and rows[::2] == [row[::-1] for row in rows[1::2]]
    assert data['test'].examples == 1000


def test_the_trace_is_every_state_of_the_grid(tmp_path):
    data = made(tmp_path / 'data', '--trace', '--train_size=300')
    inputs, labels, _ = data['train'].rows(range(data['train'].examples))
    offsets = data['train'].puzzle_indices
    assert len(offsets) == 301 and data['train'].examples / 300 == report(tmp_path / 'data/train/dataset.json')['mean_puzzle_examples']
    for begin, end in zip(offsets, offsets[1:], strict=False):
        states, answers = texts(inputs[begin:end]), texts(labels[begin:end])
        assert answers == [*states[1:], states[-1]] and states[0][2:] == [' ' * 11] * 2
        a, b, _, total = states[-1]
        assert int(a) + int(b) == int(total) and len(states) == len(total.strip()) + 1
        to, _ = plain_carry(int(a), int(b))
        for j, (_, _, carries, partial) in enumerate(states):
            assert partial == ' ' * (11 - j) + total[11 - j:] and {10 - i for i, c in enumerate(carries) if c == '1'} == {t for t in to if t <= j}
    inputs, _, _ = data['test'].rows(range(1000))
    assert (inputs[:, 22:] == 1).all()  # whole


@pytest.mark.parametrize('args', [(), ('--trace',), ('--num_aug=1',)])
def test_every_example_is_reachable(tmp_path, args):
    data = made(tmp_path / 'data', *args, '--train_size=40')['train']
    size = int(40 * data.examples / len(data.identifiers))
    seen = np.concatenate([trm.examples_of_epoch(data, 0, epoch, size) for epoch in range(12)])
    assert set(seen) == set(range(data.examples))
    orders = {tuple(np.diff(seen[np.isin(seen, range(data.puzzle_indices[p], data.puzzle_indices[p + 1]))])) for p in range(40)}
    assert not args or '--trace' not in args or any(min(order) < 0 for order in orders)


def test_the_seed_decides(tmp_path):
    first, same, other = (made(tmp_path / name, f'--seed={seed}', '--train_size=60')['train'].facts for name, seed in (('a', 3), ('b', 3), ('c', 4)))
    assert first == same != other
    manifest = report(tmp_path / 'a/manifest.json')
    assert manifest['seed'] == 3 and manifest['task'] == 'addition' and 'train/all__inputs.npy' in manifest['files']


@pytest.mark.parametrize('args, told', [
    (['--min_digits=5', '--max_digits=4'], 'min_digits'), (['--num_aug=2'], '0 or 1'), (['--carry_share=2'], 'share'), (['--columns=10'], 'needs 11'), (['--max_digits=0'], 'max_digits'),
    (['--max_digits=1', '--test_size=100'], 'smaller --test_size'), (['--output_dir=tests'], 'something else'), (['--train_size=x'], 'whole number')])
def test_what_cannot_be_made(tmp_path, args, told):
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'tests/mine').write_text('x')
    err = prepare('addition', *args, cwd=tmp_path, code=2)
    assert told in err and len(err.strip().splitlines()) == 1, err
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['mine', 'tests']


# ---- settings
def test_lengths_and_evaluations(trains, tmp_path):
    base = [word for word in BASE if not word.startswith(('--total_steps', '--eval_interval'))]
    run = trains('--epochs=2', '--eval_interval=1', base=base).ok()  # 100 problems, 8 slots
    assert 'an epoch is 100 of them, 12.50 steps: 25 steps, evaluated every 12' in run.out
    assert [int(s) for s in re.findall(r'^step (\d+)/25 \| val loss', run.out, re.MULTILINE)] == [0, 12, 24, 25]
    for args, found in ((['--total_steps=40'], [*range(0, 41, 2)]), (['--total_steps=3'], [0, 1, 2, 3]), (['--total_steps=4', '--eval_interval=-1'], [4]), (['--max_steps=4', '--eval_interval=3'], [0, 3, 4])):
        run = trains(*args, f'--log_dir=r{"".join(args)}', base=base).ok()
        assert [int(s) for s in re.findall(r'^step (\d+)/\d+ \| val loss', run.out, re.MULTILINE)] == found, args
    trains('--epochs=1', '--log_dir=more', base=base).ok()
    run = trains('--total_steps=14', '--log_dir=more', '--auto_resume', base=base).ok()  # a stored length gives way to a typed one
    assert (tmp_path / 'more/step_14').exists()


def test_a_signal_ends_ask_at_once(trains, launcher, tmp_path):
    trains('--total_steps=1').ok()
    run = launcher.start('finetune_addition.py', ['--log_dir=run', '--ask=1+2'], cwd=tmp_path, prelude="""
import time, trm
def slow(self, *args):
    print('HERE', flush=True)
    time.sleep(50)
trm.TRM.forward = slow
""")
    run.wait_for('HERE')
    run.kill(signal.SIGTERM)
    assert run.wait(20) == [-signal.SIGTERM]


@pytest.mark.parametrize('args, told', [
    (['--epochs=3'], '--total_steps'), (['--grad_accumulation_steps=3'], 'the nearest that is: 9'), (['+run_name=a/b'], 'without /'), (['--lr=0'], 'lr'), (['--ema_rate=1'], 'ema_rate'),
    (['--data_path=nowhere'], 'prepare/addition.py --output_dir=nowhere'), (['--sum_loss_weight=0'], 'nothing to learn'), (['--freeze_weights', '--freeze_heads', '--puzzle_emb_ndim=0'], 'freeze_heads'),
    (['--base_checkpoint=run/step_9'], 'does not exist'), (['--columns=4'], '--columns=4 does not fit data: 3'), (['--trace'], '--trace=True does not fit data: False'),
    (['--base_checkpoint=a', '--checkpoint_path=b', '--resume'], 'two beginnings'), (['--ask=12+'], '957+86'), (['--ask=a+b'], '957+86'), (['--ask=1+2,,3+4'], '957+86'), (['--ask=-1+2'], '957+86'),
    (['--ask=１+2'], '957+86'), (['--freeze_heads'], '--freeze_weights'), (['--freeze_heads', '--freeze_weights', '--puzzle_emb_lr=0'], 'puzzle_emb_lr'), (['--ask=1+2', '--eval_only'], 'one at a time'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_what_cannot_be_is_said_in_one_line(trains, tmp_path, args, told):
    assert told in trains(*args).one_line(2)
    assert not (tmp_path / 'run').exists()


# ---- data
def test_data_that_are_no_sums(trains, tmp_path):
    make_puzzle_data(tmp_path / 'sudoku', cells=16, vocab_size=6)
    assert '16 cells of 6 tokens are no sums' in trains('--data_path=sudoku').one_line(2)
    for split, array, (row, cell), value, told in (
            ('train', 'labels', (3, 5), 0, ''), ('train', 'labels', (3, 11), 0, 'row 3'), ('train', 'labels', (3, 11), 1, 'row 3 is no sum'), ('test', 'labels', (2, 8), 3, 'row 2'), ('train', 'inputs', (5, 0), 0, 'row 5'),
            ('train', 'inputs', (6, 2), 1, 'row 6'), ('train', 'inputs', (7, slice(0, 3)), [3, 1, 4], 'row 7'), ('train', 'inputs', (8, slice(3, 6)), [2, 1, 1], 'row 8'), ('train', 'inputs', (4, 2), 12, 'token 12 in row 4, cell 2'), ('test', 'inputs', (0, 7), 5, 'whole sums')):
        shutil.rmtree(tmp_path / 'data')
        make_addition_data(tmp_path / 'data')
        path = tmp_path / f'data/{split}/all__{array}.npy'
        numbers = np.load(path)
        numbers[row, cell] = value
        np.save(path, numbers)
        run = trains('--total_steps=1', f'--log_dir=r{row}_{told}'.replace(' ', ''))
        assert run.ok() if not told else told in run.one_line(2), run.err
    make_addition_data(tmp_path / 'data')
    grid = np.load(tmp_path / 'data/train/all__inputs.npy')
    grid[0, :6] = [11, 11, 11, 1, 1, 3]  # 999 + 1 in three columns
    np.save(tmp_path / 'data/train/all__inputs.npy', grid)
    assert 'row 0 is no sum' in trains().one_line(2)


def test_without_a_test_set(trains, tmp_path):
    shutil.rmtree(tmp_path / 'data/test')
    assert 'nothing is evaluated' in trains().ok().out and (tmp_path / 'run/step_4').exists()
    assert 'test' in trains('--eval_only').one_line(2)


# ---- what is learned
def test_weights_of_the_rows():
    torch.manual_seed(0)
    B, W = 3, 4
    logits, q = torch.randn(B, 4 * W, 12, dtype=torch.float64, requires_grad=True), torch.randn(B, dtype=torch.float64)
    labels = torch.randint(0, 12, (B, 4 * W))
    labels[0, 9], labels[1] = trm.IGNORE, trm.IGNORE
    halted, steps = torch.ones(B, dtype=torch.bool), torch.ones(B)
    weights = torch.tensor([0.0, 0.0, 0.5, 2.0]).repeat_interleave(W)
    loss, sums, scores = trm.act_loss(logits, q, labels, halted, steps, weights)
    p = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    p = p / p.sum(-1, keepdim=True)
    for b in range(B):
        counted = [j for j in range(2 * W, 4 * W) if labels[b, j] != trm.IGNORE]
        mean = sum(-weights[j] * p[b, j, labels[b, j]].log() for j in counted) / sum(weights[j] for j in counted) if counted else torch.tensor(0.0)
        right = [int(logits[b, j].argmax() == labels[b, j]) for j in counted]
        assert scores[b].tolist() == pytest.approx([mean.item(), sum(right) / max(1, len(right)), float(all(right))], abs=1e-7)
    loss.backward()
    assert not logits.grad[:, :2 * W].any() and logits.grad[0, 2 * W:].any() and not logits.grad[0, 9].any()
    assert sums[0] == 2  # the slot without labels does not count
    same = trm.act_loss(logits, q, labels, halted, steps, torch.full((4 * W,), 0.25))
    assert same[0].item() == pytest.approx(trm.act_loss(logits, q, labels, halted, steps)[0].item())


def test_rows_of_weight_0_are_as_if_they_had_no_answer(trains, tmp_path):
    trains('--copy_loss_weight=0', '--log_dir=zero').ok()
    for split in ('train', 'test'):
        path = tmp_path / f'data/{split}/all__labels.npy'
        labels = np.load(path)
        labels[:, :6] = 0
        np.save(path, labels)
    run = trains('--log_dir=removed').ok()
    zero, removed = (load(tmp_path / name / 'step_4') for name in ('zero', 'removed'))
    assert all(torch.allclose(removed['model'][name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in zero['model'].items())
    assert zero['val_loss'] == pytest.approx(removed['val_loss'])
    assert all(torch.equal(*parts) for parts in zip(zero['ranks'][0]['carry'][0].values(), removed['ranks'][0]['carry'][0].values(), strict=True) if parts[0].dtype == torch.uint8)
    trains('--copy_loss_weight=1', '--log_dir=one').ok()
    assert column(run, 'loss')[0] == pytest.approx(float(re.search(r'loss ([\d.]+)', (tmp_path / 'one/log.txt').read_text().split('| lr')[0].split('step 1/')[1])[1]), abs=1e-6)


@pytest.mark.parametrize('ranks', [0, 2])
@pytest.mark.parametrize('args, learn', [([], {'puzzle_emb', 'embed_tokens', 'lm_head', 'q_head'}), (['--freeze_heads'], {'puzzle_emb'})])
def test_freeze_weights(trains, tmp_path, args, learn, ranks):
    trains('--total_steps=2').ok()
    run = trains('--freeze_weights', *args, '--base_checkpoint=run/step_2', '--log_dir=two', '--no-ema', ranks=ranks).ok()
    before, after = load(tmp_path / 'run/step_2'), load(tmp_path / 'two/step_4')['model']
    before = dict(before['model'], **before['ema'])
    assert {name.split('.')[0] for name in before if not torch.equal(before[name], after[name])} == learn
    learning = sum(before[name].numel() for name in before if name.split('.')[0] in learn - {'puzzle_emb'})
    assert f'; {learning:,} of the parameters learn' in run.out
    run = trains('--base_checkpoint=two/step_4', '--log_dir=full').ok()  # then everything, as guide 000 has it
    assert {name.split('.')[0] for name, tensor in load(tmp_path / 'full/step_4')['model'].items() if not torch.equal(tensor, after[name])} == {*learn, 'embed_tokens', 'lm_head', 'q_head', 'L_level'}


def test_the_laptop_command_learns(launcher, tmp_path):
    """A shorter form of the docstring's first command: sums of one digit, a tenth of them never seen."""
    prepare('addition', '--max_digits=1', '--test_size=5', '--output_dir=data', cwd=tmp_path)
    run = launcher.run('finetune_addition.py', ['--preset=tiny', '--data_path=data', '--log_dir=run', '--total_steps=150', '--lr_warmup_steps=20', '--eval_interval=-1', '--halt_max_steps=4'],
                       cwd=tmp_path, timeout=180).ok()
    assert column(run, 'exact')[-2] > 0.7, run.out


def test_weights_of_rows_from_the_command_line(trains, tmp_path):
    record = """
import json, trm
real = trm.act_loss
def act_loss(*args):
    open('weights.json', 'w').write(json.dumps(args[5].tolist()))
    return real(*args)
trm.act_loss = act_loss
"""
    trains('--copy_loss_weight=0.25', '--carry_loss_weight=0', '--sum_loss_weight=2', '--total_steps=1', prelude=record).ok()
    assert report(tmp_path / 'weights.json') == [0.25] * 6 + [0] * 3 + [2] * 3


def test_ema_and_the_rate_of_the_vector(trains, tmp_path):
    trains('--ema_rate=0.75', '--checkpoint_interval=1', '--puzzle_emb_lr=0.25', '--puzzle_emb_weight_decay=0').ok()
    one, two = (load(tmp_path / f'run/step_{s}') for s in (1, 2))
    assert one['ema'].keys() == {name for name in one['model'] if name not in ('H_init', 'L_init', 'puzzle_emb.weights')}
    for name, average in two['ema'].items():
        assert torch.allclose(average, 0.75 * one['ema'][name] + 0.25 * two['model'][name], rtol=1e-5, atol=1e-7), name
    table = [stored['model']['puzzle_emb.weights'] for stored in (one, two)]
    assert set(table[0].abs().unique().tolist()) == {0.125} and {round(x, 3) for x in (table[1] - table[0]).abs().unique().tolist()} == {0.25}  # warmup of two steps


def test_epochs_differ_and_exploration_keeps_slots_at_work(trains, tmp_path):
    trains('--total_steps=25', '--eval_interval=-1', '--num_workers=0', '--halt_max_steps=1', prelude=SEEN).ok()
    offered = [number for numbers in report(tmp_path / 'offered.json') if len(numbers) == 8 for number in numbers]
    assert sorted(offered[:100]) == sorted(offered[100:200]) == list(range(100)) and offered[:100] != offered[100:200]
    always = ['--halt_max_steps=6', '--total_steps=12', '--eval_interval=-1', '--log_interval=12', '--lr=1e-6']
    halts = {p: column(trains(*always, f'--halt_exploration_prob={p}', f'--log_dir=p{p}', prelude=EAGER).ok(), 'halts after')[-2] for p in (0, 1)}
    assert halts[0] == 1 and 2.5 < halts[1] < 4.5


def test_a_settings_file_leaves_what_is_derived_open(trains, tmp_path):
    trains(base=ROPE).ok()
    trains('run/config.py', '--base_checkpoint=run/step_4', '--log_dir=second', base=[]).ok()
    trains('run/config.py', '--hidden_size=8', '--log_dir=narrow', base=[]).ok()
    assert load(tmp_path / 'narrow/step_4')['model']['puzzle_emb.weights'].shape == (1, 8)
    make_addition_data(tmp_path / 'wide', columns=8)
    trains('run/config.py', '--eval_only', '--data_path=wide', base=[]).ok()
    trains('run/config.py', '--columns=0', '--data_path=wide', '--log_dir=third', base=[]).ok()
    trains('--epochs=1', '--log_dir=ep', base=[word for word in BASE if not word.startswith('--total')]).ok()
    trains('ep/config.py', '--total_steps=3', '--log_dir=ep2', base=[]).ok()
    assert (tmp_path / 'ep2/step_3').exists() and (tmp_path / 'ep/step_12').exists()


def test_what_a_resume_cannot_change(trains, tmp_path):
    trains('--freeze_weights').ok()
    assert 'freeze_weights cannot change on resume: True -> False' in trains('--auto_resume', '--no-freeze_weights').one_line(2)


# ---- evaluation
SURE = 0.9  # to halt


def test_the_evaluation_is_that_of_a_plain_loop(trains, tmp_path):
    make_addition_data(tmp_path / 'data', tests=30)
    trains('--total_steps=30', '--eval_interval=-1', '--lr=2e-2', '--copy_loss_weight=0').ok()
    stored = load(tmp_path / 'run/step_30')
    weights = dict(stored['model'], **stored['ema'])
    weights['q_head.bias'] = weights['q_head.bias'] + torch.tensor([5.0, 0])  # some halt early
    weights['lm_head.weight'][1:4] *= 2
    stored.update(model=weights, ema={})
    torch.save(stored, tmp_path / 'run/step_30')
    trains('--eval_only', '--no-ema', base=['--log_dir=run']).ok()
    even = report(tmp_path / 'run/eval.json')['halting_steps']  # where a chance of one half is enough to halt
    out = trains('--eval_only', '--no-ema', f'--halt_threshold={SURE}', base=['--log_dir=run']).ok().out
    found = report(tmp_path / 'run/eval.json')
    model = trm.TRM(trm.TRMConfig(12, 12, 1, hidden_size=16, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, puzzle_emb_len=1, halt_max_steps=3, puzzle_emb_ndim=16,
                                  forward_dtype='float32', mlp_t=True, pos_encodings='none'))
    model.load_state_dict(weights)
    by_step, halts, halt_right, wrong, by = [], [], [], [], dict(by_digits={}, by_carry={})
    data = trm.open_puzzles([tmp_path / 'data'], 'test')
    with torch.no_grad():
        for i in range(data.examples):
            inputs, labels, ids = map(torch.from_numpy, data.rows([i]))
            one = dict(inputs=inputs, labels=labels.int(), puzzle_identifiers=ids)
            carry, halt, rights, answers = model.refill(model.initial_carry(one), one), 0, [], []
            for s in range(3):
                carry, outputs = model(carry, model.puzzle_emb.weights[ids])
                cells = outputs['logits'].argmax(-1)[0]
                rights.append(torch.equal(cells[9:], labels[0, 9:]))
                answers.append(cells[9:].tolist())
                halt = halt or s + 1 if outputs['q_halt_logits'].sigmoid() > SURE or s == 2 else halt
            a, b, _, total = texts(labels.numpy())[0]
            by_step.append(rights)
            halts.append(halt)
            halt_right.append(rights[halt - 1])
            for name, key in (('by_digits', max(len(a.strip()), len(b.strip()))), ('by_carry', plain_carry(int(a), int(b))[1])):
                pair = by[name].setdefault(str(key), [0, 0])
                pair[0], pair[1] = pair[0] + rights[halt - 1], pair[1] + 1
            if not rights[halt - 1]:
                text = ''.join(' 0123456789'[t - 1] if 1 <= t <= 11 else '?' for t in answers[halt - 1]).strip().replace(' ', '?')
                wrong.append(dict(a=a.strip(), b=b.strip(), sum=total.strip(), answer=text, digits=max(len(a.strip()), len(b.strip())), carry=plain_carry(int(a), int(b))[1]))
    assert found['exact_accuracy'] == pytest.approx(np.mean(halt_right)) and found['exact_accuracy_by_step'] == pytest.approx(np.mean(by_step, 0))
    assert found['halting_steps'] == pytest.approx(np.mean(halts)) and found['halting_steps'] > even and {name: found[name] for name in by} == by and found['errors'] == wrong
    right, n = by['by_carry']['1']
    assert re.search(rf'exact by columns of the longest carry 0: .* 1: {right / n:.4f} \({n}\)', out)
    trains('--eval_only', '--no-ema', f'--halt_threshold={SURE}', base=['--log_dir=run'], ranks=2).ok()
    again = report(tmp_path / 'run/eval.json')
    assert again['errors'] == wrong
    assert {name: value for name, value in again.items() if isinstance(value, float)} == pytest.approx({n: v for n, v in found.items() if isinstance(v, float)}, abs=1e-6)
    for args, count in (([], 30), (['--eval_examples=3'], 3), (['--max_eval_batches=1', '--eval_examples=0'], 8), (['--max_eval_batches=2'], 16)):
        trains('--eval_only', *args, base=['--log_dir=run']).ok()
        assert report(tmp_path / 'run/eval.json')['examples'] == count


def test_the_best_is_the_most_exact_one(trains, tmp_path):
    """Of two evaluations with the same exact accuracy it is the one with the lower loss."""
    fake = """
import trm, torch
real, calls = trm.TRM.forward, []
def forward(self, carry, rows=None, min_steps=None):
    carry, outputs = real(self, carry, rows, min_steps)
    if not torch.is_grad_enabled():
        calls.append(1)
        k = (len(calls) - 1) // 3  # one batch, three steps
        right = carry['labels'].clone()
        right[(0, 4, 2, 4, 4)[k]:, 9:] = 0
        outputs['logits'] = torch.nn.functional.one_hot(right.long().clamp(min=0), 12).float()
        outputs['scores'] = torch.full_like(outputs['scores'], (0.9, 0.8, 0.5, 0.7, 0.75)[k])
    return carry, outputs
trm.TRM.forward = forward
"""
    run = trains('--eval_interval=1', prelude=fake).ok()
    assert load(tmp_path / 'run/step_best')['step'] == 3 and 'best val loss 0.7000, exact 0.6667 at step 3' in run.out


RIGHT = """
import trm, torch
real = trm.TRM.forward
def forward(self, carry, rows=None, min_steps=None):
    carry, outputs = real(self, carry, rows, min_steps)
    if not torch.is_grad_enabled():
        W = carry['inputs'].shape[1] // 4
        grids = carry['inputs'].cpu().numpy()
        a, b = (trm.addition_numbers(grids[:, i * W:i * W + W])[0] for i in (0, 1))
        carries, total, _ = trm.add_columns(a, b)
        known = (grids[:, 3 * W:] > 1).sum(1, keepdims=True) + {ahead}
        place = W - 1 - torch.arange(W).numpy()
        wanted = trm.addition_tokens(a, b, carries & (place <= known), __import__('numpy').where(place < known, total, -1))
        outputs['logits'] = torch.nn.functional.one_hot(torch.from_numpy(wanted).long(), 12).float()
        outputs['q_halt_logits'] = torch.full_like(outputs['q_halt_logits'], {q})
    return carry, outputs
trm.TRM.forward = forward
"""  # a model that adds so many digits at once


def test_a_model_of_single_digits_is_fed_its_own_answers(trains, tmp_path):
    prepare('addition', '--trace', '--max_digits=4', '--train_size=40', '--test_size=30', '--output_dir=trace', cwd=tmp_path)
    one_digit, whole = RIGHT.format(ahead=1, q=1.0), RIGHT.format(ahead=9, q=1.0)
    run = trains('--data_path=trace', prelude=one_digit).ok()
    assert 'training examples, a digit each, of 40 problems in 5 columns' in run.out
    by_turn = [float(x) for x in re.findall(r'step 4/4 \| exact by turn (.*)', run.out)[0].split()]
    sums = [len(row[3].strip()) for row in texts(trm.open_puzzles([str(tmp_path / 'trace')], 'test').rows(range(30))[1])]
    assert by_turn == pytest.approx([np.mean([n <= t for n in sums]) for t in range(1, 7)], abs=1e-4) and column(run, 'exact')[-1] == 1
    trains('--eval_only', base=['--log_dir=run'], prelude=one_digit).ok()
    assert report(tmp_path / 'run/eval.json')['exact_accuracy'] == 1 and report(tmp_path / 'run/eval.json')['errors'] == []
    out = trains('--ask=957+86', base=['--log_dir=run'], prelude=one_digit).ok().out  # four digits, and a turn to see that nothing is left to do
    assert [int(x) for x in re.findall(r'957 \+ 86, turn (\d), step 1', out)] == [1, 2, 3, 4, 5] and '957 + 86 = 1043, right' in out
    out = trains('--ask=9+1', base=['--log_dir=run'], prelude=RIGHT.format(ahead=1, q=-1.0)).ok().out
    assert len(re.findall('9 [+] 1, turn', out)) == 9 and '9 + 1 = 10, right, after 9 step(s)' in out
    assert 'reads its own carries' in trains('--data_path=trace', '--carry_loss_weight=0', '--log_dir=no').one_line(2)
    # of data of whole sums the same model is judged by its first answer
    trains('--log_dir=two', prelude=one_digit).ok()
    assert trains('--log_dir=three', prelude=whole).ok().out.count('exact 1.0000 at the halt') == 3
    trains('--eval_only', base=['--log_dir=two'], prelude=one_digit).ok()
    assert report(tmp_path / 'two/eval.json')['exact_accuracy'] < 1


# ---- questions
SUMS = [(a, b) for a in (0, 7, 10, 58) for b in (3, 9, 42, 90, 91)]


def test_twenty_questions(trains, tmp_path):
    trains('--total_steps=1').ok()
    before = sorted(os.listdir(tmp_path / 'run'))
    run = trains('--ask=' + ', '.join(f'{a}+{b}' for a, b in SUMS), base=['--log_dir=run'], prelude=RIGHT.format(ahead=9, q=2.0)).ok()
    for a, b in SUMS:
        W = 3
        carries = ''.join('1' if W - 1 - i in plain_carry(a, b)[0] else '.' for i in range(W))
        grid = ''.join(f'    {" ".join(row.rjust(W, "."))}\n' for row in (str(a), str(b), carries, str(a + b)))
        assert f'{a} + {b}, step 1: would halt with 0.8808\n{grid}{a} + {b} = {a + b}, right, after 1 step(s)\n' in run.out
    assert sorted(os.listdir(tmp_path / 'run')) == before
    run = trains('--ask=007+1', base=['--log_dir=run'], prelude=RIGHT.format(ahead=9, q=-2.0)).ok()
    assert len(re.findall(r'7 \+ 1, step [123]: would halt with 0.1192', run.out)) == 3 and '7 + 1 = 8, right, after 3 step(s)' in run.out
    run = trains('--ask=19+1', base=['--log_dir=run'], prelude=RIGHT.format(ahead=1, q=2.0)).ok()
    assert '19 + 1 = 0, wrong: 20' in run.out
    assert 'a sum of 4 digits does not fit into 3 columns' in trains('--ask=999+1', base=['--log_dir=run']).one_line(2)
    assert '4 digits' in trains('--ask=1+1,1000+1', base=['--log_dir=run'], ranks=2).one_line(2)
    run = trains('--ask=1+1', base=['--log_dir=run'], ranks=2).ok()
    assert run.out.count('1 + 1 =') == 1
    assert 'no readable checkpoint in nowhere' in trains('--ask=1+1', base=['--log_dir=nowhere']).one_line(2)


def test_more_columns_for_a_model_with_rope(trains, tmp_path):
    trains(base=ROPE).ok()
    run = trains('--ask=12345+1', '--columns=6', base=['--log_dir=run'], prelude=RIGHT.format(ahead=9, q=2.0)).ok()
    assert '12345 + 1 = 12346, right' in run.out
    make_addition_data(tmp_path / 'wide', columns=8)
    trains('--eval_only', '--data_path=wide', base=['--log_dir=run']).ok()
    assert report(tmp_path / 'run/eval.json')['data_path'] == 'wide'
    trains(*BASE[:-1], '--log_dir=mlp', base=BASE).ok()
    assert 'bound to its number of cells' in trains('--ask=1+1', '--columns=6', base=['--log_dir=mlp']).one_line(2)


# ---- where a model comes from
def base(tmp_path, launcher, *args, **data):
    make_puzzle_data(tmp_path / 'puzzles', **data)
    words = [word for word in BASE if not word.startswith(('--total', '--data', '--log_dir', '--mlp_t', '--pos'))]
    return launcher.run('pretrain_trm.py', [*words, '--max_steps=2', '--data_paths=puzzles', '--log_dir=base', '--ema', '--ema_rate=0.5', *args], cwd=tmp_path).ok()


def test_from_a_model_of_other_puzzles(trains, launcher, tmp_path):
    base(tmp_path, launcher, '--L_cycles=2', vocab_size=7)  # attention, rope, nine cells, nine puzzles
    run = trains('--base_checkpoint=base/step_2', '--lr=1e-9', '--puzzle_emb_lr=0', '--weight_decay=0', '--total_steps=1', base=['--data_path=data', '--log_dir=run', '--global_batch_size=8']).ok()
    for line in ('puzzle_emb.weights: 9 -> 1 rows, each the mean', 'embed_tokens.embedding_weight: 7 -> 12 rows, 7 of them kept', 'lm_head.weight: 7 -> 12 rows', '1 attention layer(s) of width 16',
                 '2 x (2 + 1) applications', 'at most 3 such steps', 'weights from base/step_2'):
        assert line in run.out, line
    old, new = load(tmp_path / 'base/step_2'), load(tmp_path / 'run/step_1')['model']
    assert all(torch.allclose(new[name], tensor, atol=1e-6) for name, tensor in old['ema'].items() if new[name].shape == tensor.shape)
    assert torch.allclose(new['lm_head.weight'][:7], old['ema']['lm_head.weight'], atol=1e-6)
    common = ['--base_checkpoint=base/step_2', '--data_path=data', '--global_batch_size=8', '--total_steps=1']
    run = trains('--H-cycles', '1', '--L-cycles', '3', '--L-layers', '1', '--log_dir=other', base=common).ok()  # what recurs may change
    assert '1 x (3 + 1) applications' in run.out
    err = trains('--L-layers', '2', '--log_dir=no', base=common).one_line(2)
    assert '--L_layers=2 is not that of base/step_2: 1' in err
    run = trains('--L_layers=0', '--H_cycles=0', '--log_dir=zero', base=common).ok()
    assert '2 x (2 + 1)' in run.out


def test_a_run_of_the_other_script_gives_weights(trains, launcher, tmp_path):
    """Its presets and lengths mean other things there: only weights and shape are taken."""
    base(tmp_path, launcher, '--preset=tiny', '--halt_max_steps=5', vocab_size=12, cells=12)
    run = trains('--eval_only', '--checkpoint_path=base/step_2', base=['--data_path=data']).ok()
    assert len(report(tmp_path / 'base/eval.json')['exact_accuracy_by_step']) == 5 and '9 -> 1 rows' in run.out
    trains('--log_dir=run').ok()
    ours = load(tmp_path / 'run/step_4')
    launcher.run('pretrain_trm.py', ['--eval_only', '--checkpoint_path=run/step_4', '--data_paths=data'], cwd=tmp_path).ok()
    assert report(tmp_path / 'run/eval.json')['val_loss'] == pytest.approx(ours['val_loss'], abs=1e-6)  # of the average


def test_learned_positions_are_fitted(trains, launcher, tmp_path):
    base(tmp_path, launcher, '--pos_encodings=learned')
    run = trains('--base_checkpoint=base/step_2', '--total_steps=1', base=['--data_path=data', '--log_dir=run', '--global_batch_size=8']).ok()
    assert 'embed_pos.embedding_weight: 10 -> 13 rows, 10 of them kept' in run.out


def test_wrong_beginnings(trains, launcher, tmp_path):
    base(tmp_path, launcher, '--mlp_t', '--pos_encodings=none')
    common = ['--data_path=data', '--log_dir=run', '--global_batch_size=8']
    assert 'bound to its number of cells' in trains('--base_checkpoint=base/step_2', base=common).one_line(2)
    assert 'bound to its number of cells' in trains('--eval_only', '--base_checkpoint=base/step_2', base=common).one_line(2)
    make_text_data(tmp_path / 'text')
    launcher.run('train_gpt2.py', ['--data_root=text', '--model=tiny', '--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=2', '--total_batch_size=32', '--max_steps=1', '--val_tokens=64',
                                   '--generate_interval=-1', '--log_dir=gpt'], cwd=tmp_path).ok()
    assert 'not those of a Tiny Recursive Model' in trains('--base_checkpoint=gpt/model_00001.pt', base=common).one_line(2)
    (tmp_path / 'bad').write_bytes(b'x' * 3000)
    assert 'bad' in trains('--base_checkpoint=bad', base=common).one_line(2)
    assert 'base' in trains('--base_checkpoint=base', base=common).one_line(2)
    assert '--columns does' in trains('--ask=1+1', '--base_checkpoint=base/step_2', base=common).one_line(2)
    assert not (tmp_path / 'run').exists()


def test_a_public_checkpoint_evaluates(trains, tmp_path):
    trains().ok()
    stored = load(tmp_path / 'run/step_4')
    (tmp_path / 'public').mkdir()
    torch.save({f'_orig_mod.model.inner.{name}': tensor for name, tensor in dict(stored['model'], **stored['ema']).items()}, tmp_path / 'public/step_9')
    shutil.copy(tmp_path / 'run/all_config.yaml', tmp_path / 'public')
    found = []
    for words in (['--log_dir=run'], ['--base_checkpoint=public/step_9', '--multiple_of=16', '--data_path=data']):
        trains('--eval_only', base=words).ok()
        found.append(report(tmp_path / words[0].replace('--log_dir=', '').replace('--base_checkpoint=public/step_9', 'public') / 'eval.json')['val_loss'])
    assert found[0] == found[1]


# ---- every command of guide 000, with a tiny model and two steps
GUIDE = [line for line in GUIDES.splitlines() if 'data/addition' in line or ' finetune_addition.py' in line]


def test_the_guide_is_here():
    assert len(GUIDE) == 13


@pytest.mark.parametrize('line', GUIDE, ids=range(len(GUIDE)))
def test_guide_commands_run(launcher, tmp_path, line):
    words = shlex.split(line)
    if 'prepare.addition' in line:
        run = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        assert run.returncode == 0 and trm.open_puzzles([str(tmp_path / 'data/addition')], 'train').examples == 10000, run.stderr
        return
    script = next(word for word in words if word.endswith('.py'))
    args, ranks = words[words.index(script) + 1:], 4 if 'torchrun' in words else 0
    make_addition_data(tmp_path / 'data/addition')
    (tmp_path / 'data/addition_fixed').symlink_to('addition')
    make_puzzle_data(tmp_path / 'puzzles', vocab_size=12)
    tiny = ['--hidden_size=16', '--num_heads=2', '--multiple_of=16', '--halt_max_steps=2', '--L_layers=2', '--H_cycles=1', '--L_cycles=1']
    path = next((word for i, word in enumerate(args) if 'checkpoint' in args[i - 1] or word.startswith('load_checkpoint')), '').removeprefix('load_checkpoint=')
    if path:  # an earlier run wrote that one
        folder = tmp_path / os.path.dirname(path)
        launcher.run('pretrain_trm.py', [*tiny, '--data_paths=puzzles', '--global_batch_size=4', '--max_steps=1', f'--log_dir={folder}'], cwd=tmp_path).ok()
        os.rename(folder / 'step_1', tmp_path / path)
    if script == 'pretrain_trm.py':
        run = launcher.run(script, [*args, 'epochs=1', 'eval_interval=1', 'global_batch_size=50'], cwd=tmp_path).ok()
        assert '12 rows' not in run.out and 'done: best val loss' in run.out and 'of 1 puzzles' in run.out
        return
    length = ['--epochs=1', '--global_batch_size=52'] if '--epochs' in args else ['--total_steps=2', '--eval_interval=1']
    shape = tiny if not path else []  # of the checkpoint
    run = launcher.run(script, [*args, *shape, *([] if '--eval_only' in args else length)], cwd=tmp_path, ranks=ranks, env={'DISABLE_COMPILE': '1'}).ok()
    if '--eval_only' in args:
        assert f'wrote {os.path.dirname(path)}/eval.json' in run.out
        return
    assert 'done: best val loss' in run.out
    if '--run-name' in args:
        folder = tmp_path / 'checkpoints/AdditionFinetune' / args[args.index('--run-name') + 1]
        assert (folder / 'all_config.yaml').exists() and list(folder.glob('step_[12]'))
    stored = load(next((tmp_path / 'checkpoints/AdditionFinetune').glob('*/step_[12]')))
    assert (stored['ema'] == {}) == ('--no-ema' in args) and stored['config']['freeze_weights'] == ('--freeze-weights' in args)


def test_a_path_of_the_guide_that_is_elsewhere_here(trains, tmp_path):
    trains('--freeze_weights', '--run_name=finetune_addition_step1', base=[word for word in BASE if not word.startswith('--log_dir')]).ok()
    err = trains('--base-checkpoint', 'checkpoints/Addition_fixed-ACT-torch/finetune_addition_step1/step_4').one_line(2)
    assert 'there is' in err and 'checkpoints/AdditionFinetune/finetune_addition_step1/step_4' in err


def test_help(tmp_path):
    out = subprocess.run([sys.executable, ROOT / 'finetune_addition.py', '--help'], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == '' and '--ask=' in out.stdout and re.search(r'--lr=5e-05 +peak learning rate', out.stdout)
