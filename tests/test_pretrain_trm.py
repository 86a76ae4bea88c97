"""What pretrain_trm.py alone promises: its data order, evaluation, checkpoints of others, run folders, and the commands of guide 002."""
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import ROOT, load, make_puzzle_data, prepare
from test_configurator import GUIDES
from test_puzzles import write_arc

import trm

TINY = ['--hidden_size=16', '--num_heads=2', '--multiple_of=16', '--L_layers=1', '--H_cycles=2', '--L_cycles=1', '--puzzle_emb_len=1', '--halt_max_steps=3']
BASE = [*TINY, '--data_paths=data', '--log_dir=run', '--global_batch_size=8', '--max_steps=4', '--lr_warmup_steps=2', '--lr=1e-2', '--eval_interval=2', '--log_interval=1',
        '--pos_encodings=rope']


@pytest.fixture
def trains(launcher, tmp_path):
    """trains('--max_steps=2', ...) runs a tiny training in a folder of its own."""
    make_puzzle_data(tmp_path / 'data')

    def trains(*args, base=BASE, **kwargs):
        return launcher.run('pretrain_trm.py', [*base, *args], cwd=tmp_path, **kwargs)
    return trains


def column(run, name):
    return [float(x) for x in re.findall(rf'\| {name} ([\d.e+-]+)', run.out)]


# ---- settings
def test_the_published_schedule_is_a_warmup_and_then_constant(trains):
    assert column(trains('--lr_warmup_steps=3', '--max_steps=6').ok(), 'lr') == [3.33e-3, 6.67e-3, 1e-2, 1e-2, 1e-2, 1e-2]
    assert column(trains('--lr_warmup_steps=0', '--min_lr_ratio=0.1', '--log_dir=two').ok(), 'lr') == pytest.approx([1e-2, 8.68e-3, 5.5e-3, 2.32e-3], rel=1e-2)
    assert column(trains('--lr_warmup_steps=0', 'lr_min_ratio=0', '--log_dir=three').ok(), 'lr')[2] == pytest.approx(5e-3, rel=1e-2)


def test_epochs_become_steps(trains, tmp_path):
    base = [word for word in BASE if not word.startswith(('--max_steps', '--eval_interval', '--global'))]
    run = trains('epochs=9', 'eval_interval=4', '--global_batch_size=6', base=base).ok()  # 4 groups of two examples on average: 8 an epoch
    assert 'an epoch is 8 of them, 1.33 steps: 12 steps, evaluated every 5' in run.out
    assert [int(s) for s in re.findall(r'^step (\d+)/12 \| val loss', run.out, re.MULTILINE)] == [0, 5, 10, 12]
    assert sorted(name for name in os.listdir(tmp_path / 'run') if name.startswith('step_')) == ['step_10', 'step_12', 'step_5', 'step_best']
    run = trains('--epochs=4', '--eval_interval=1000000', '--global_batch_size=6', '--log_dir=two', base=base).ok()  # more than there are: at the end
    assert re.findall(r'^step (\d+)/(\d+) \| val loss', run.out, re.MULTILINE) == [('5', '5')]


@pytest.mark.parametrize('args, told', [
    (['arch=hrm'], 'trm'), (['evaluators=[sudoku]'], 'arc@ARC'), (['--no_ACT_continue=False'], 'broken'), (['--epochs=3'], '--max_steps'),
    (['--grad_accumulation_steps=3'], 'the nearest that is: 9'), (['--global_batch_size=9', '--grad_accumulation_steps=2'], 'the nearest that is: 8'),
    (['+run_name=a/b'], 'without /'), (['--num_heads=3'], 'num_heads 3'), (['--pos_encodings=alibi'], 'rope, learned, none'), (['--data_paths='], 'no folder'),
    (['--data_paths=nowhere'], 'nowhere'), (['--dtype=float16'], 'float32, bfloat16'), (['--freeze_weights', '--puzzle_emb_ndim=0'], 'freeze_weights'),
    (['--puzzle_emb_ndim=40'], 'puzzle_emb_ndim 40'), (['--load_checkpoint=run/step_9'], 'does not exist'), (['--ema_rate=1'], 'ema_rate'),
    (['--evaluators=arc@ARC'], 'does not fit'), (['--lr=0'], 'lr'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_what_cannot_be_is_said_in_one_line(trains, tmp_path, args, told):
    assert told in trains(*args).one_line(2)
    assert not (tmp_path / 'run').exists()


def test_ranks_that_do_not_divide_the_slots(trains):
    assert 'the nearest that is: 9' in trains(ranks=3).one_line(2)


def test_several_folders_are_one(trains, tmp_path):
    make_puzzle_data(tmp_path / 'more', groups=3, seed=1)
    run = trains('data_paths="[data,more]"'.replace('"', ''), '--max_steps=8').ok()
    assert '28 training examples of 7 groups; an epoch is 14' in run.out and 'vectors of 16 puzzles' in run.out and '12 test examples' in run.out
    table = load(tmp_path / 'run/step_8')['model']['puzzle_emb.weights']
    assert table.shape == (16, 16) and table[9:].any() and not table[0].any()


# ---- data order
SEEN = """
import atexit, json, numpy as np, trm
offered = []
real = trm.open_puzzles
def open_puzzles(paths, split):
    found = real(paths, split)
    if split == 'train':
        rows = found.rows
        def recorded(numbers):
            offered.append([int(i) for i in numbers])
            return rows(numbers)
        found.rows = recorded
    return found
trm.open_puzzles = open_puzzles
atexit.register(lambda: open('offered.json', 'w').write(json.dumps(offered)))
"""


def test_an_epoch_is_a_random_puzzle_of_every_group(trains, tmp_path):
    trains('--max_steps=40', '--eval_interval=-1', '--num_workers=0', prelude=SEEN).ok()
    stream = np.concatenate(json.loads((tmp_path / 'offered.json').read_text()))
    assert len(stream) == 320
    offsets = np.load(tmp_path / 'data/train/all__puzzle_indices.npy')
    epochs = stream.reshape(40, 8)
    puzzles = np.searchsorted(offsets, epochs, 'right') - 1
    firsts = []
    for row, examples in zip(puzzles, epochs, strict=True):
        groups = [g for i, g in enumerate(row // 2) if i == 0 or g != row[i - 1] // 2]
        firsts.append(tuple(groups))
        whole = {p for p in row if sorted(set(examples[row == p])) == list(range(offsets[p], offsets[p + 1]))}
        assert len(set(row) - whole) <= 1  # the last one may be cut
        assert len({p // 2 for p in row}) >= 3
    assert len(set(firsts)) > 20
    counts = np.bincount(stream, minlength=16)
    assert counts.min() > 5 and abs(counts[1::2].mean() / counts[::2].mean() - 1) < 0.5


EAGER = """
import trm, torch
real = trm.TRM.__init__
def init(self, config):
    real(self, config)
    torch.nn.init.constant_(self.q_head.bias, 5.0)
trm.TRM.__init__ = init
"""  # to halt: only exploration keeps a slot


def test_exploration_keeps_slots_at_work(trains):
    always = ['--halt_max_steps=6', '--max_steps=12', '--eval_interval=-1']
    halts = {p: column(trains(*always, f'--halt_exploration_prob={p}', f'--log_dir=p{p}', '--log_interval=12', '--lr=1e-6', prelude=EAGER).ok(), 'halts after')[-2]  # then comes that of the evaluation
             for p in (0, 0.5, 1)}
    assert halts[0] == 1 and 1.2 < halts[0.5] < halts[1] and 2.5 < halts[1] < 4.5


# ---- evaluation
def test_the_evaluation_is_that_of_a_plain_loop(trains, tmp_path):
    trains('--max_steps=30', '--eval_interval=-1', '--lr=2e-2').ok()
    stored = load(tmp_path / 'run/step_30')
    stored['model']['q_head.bias'][0] += 3.0  # so that some halt early
    torch.save(stored, tmp_path / 'run/step_30')
    trains('--eval_only', base=['--log_dir=run']).ok()
    even = json.loads((tmp_path / 'run/eval.json').read_text())['halting_steps']  # where a chance of one half is enough to halt
    trains('--eval_only', '--halt_threshold=0.4', base=['--log_dir=run']).ok()
    report = json.loads((tmp_path / 'run/eval.json').read_text())
    model = trm.TRM(trm.TRMConfig(5, 9, 9, hidden_size=16, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, puzzle_emb_len=1, halt_max_steps=3,
                                  puzzle_emb_ndim=16, forward_dtype='float32'))
    model.load_state_dict(stored['model'])
    found, data = [], trm.open_puzzles([tmp_path / 'data'], 'test')
    with torch.no_grad():
        for i in range(data.examples):
            inputs, labels, ids = map(torch.from_numpy, data.rows([i]))
            one = dict(inputs=inputs, labels=torch.where(labels == 0, trm.IGNORE, labels.int()), puzzle_identifiers=ids)
            carry, halt = model.refill(model.initial_carry(one), one), 0
            steps = []
            for s in range(3):
                carry, out = model(carry, model.puzzle_emb.weights[ids])
                right = (out['logits'].argmax(-1) == one['labels'])[one['labels'] != trm.IGNORE]
                loss = trm.act_loss(out['logits'], out['q_halt_logits'], one['labels'], carry['halted'], carry['steps'])[0]
                q = torch.nn.functional.binary_cross_entropy_with_logits(out['q_halt_logits'], right.all().float().view(1))
                steps.append(((loss - 0.5 * q).item(), right.float().mean().item(), float(right.all())))
                halt = halt or s + 1 if out['q_halt_logits'].sigmoid() > 0.4 or s == 2 else halt
            found.append((steps, halt))
    by_halt = np.mean([steps[halt - 1] for steps, halt in found], 0)
    assert [report[name] for name in ('val_loss', 'cell_accuracy', 'exact_accuracy')] == pytest.approx(by_halt, abs=1e-5)
    assert report['halting_steps'] == np.mean([halt for _, halt in found]) < even < 3
    assert report['cell_accuracy_by_step'] == pytest.approx(np.mean([[s[1] for s in steps] for steps, _ in found], 0), abs=1e-6)
    assert report['exact_accuracy_by_step'] == pytest.approx(np.mean([[s[2] for s in steps] for steps, _ in found], 0))
    trains('--eval_only', '--halt_threshold=0.4', base=['--log_dir=run'], ranks=2).ok()
    again = json.loads((tmp_path / 'run/eval.json').read_text())
    assert {name: value for name, value in again.items() if isinstance(value, float)} == pytest.approx({n: v for n, v in report.items() if isinstance(v, float)}, abs=1e-6)


def test_accuracies_at_another_threshold_are_not_compared(trains, tmp_path):
    best = []
    for name, threshold in (('same', 0.5), ('other', 0.9)):
        trains('--lr=1e-12', f'--log_dir={name}').ok()
        trains('--auto_resume', '--max_steps=6', f'--halt_threshold={threshold}', base=[f'--log_dir={name}']).ok()
        best.append(load(tmp_path / name / 'step_6')['best_step'])
    assert best[0] < 6 == best[1]


def test_eval_examples_spares_the_training_not_the_end(trains, tmp_path):
    run = trains('--eval_examples=2').ok()
    assert re.findall(r'^step (\d)/4 \| val loss.*\| (\d+) examples', run.out, re.MULTILINE) == [('0', '2'), ('2', '2'), ('4', '6')]
    for args, count in (([], 6), (['--eval_examples=3'], 3), (['--max_eval_batches=1', '--eval_examples=0'], 6)):
        trains('--eval_only', *args, base=['--log_dir=run']).ok()
        assert json.loads((tmp_path / 'run/eval.json').read_text())['examples'] == count


def test_without_a_test_set(trains, tmp_path):
    shutil.rmtree(tmp_path / 'data/test')
    run = trains().ok()
    assert 'nothing is evaluated' in run.out and (tmp_path / 'run/step_4').exists() and not (tmp_path / 'run/step_best').exists()
    assert 'done: checkpoints in run, ' in run.out and 'best val loss' not in run.out
    assert 'test' in trains('--eval_only', base=['--log_dir=run']).one_line(2)


def test_the_best_is_the_most_exact_one(trains, tmp_path):
    """Of two evaluations with the same exact accuracy it is the one with the lower loss."""
    fake = """
import trm, torch
real, calls = trm.act_loss, []
def act_loss(*args):
    loss, sums, scores = real(*args)
    if not torch.is_grad_enabled():
        calls.append(1)
        k = (len(calls) - 1) // 3  # one batch, three steps
        scores = torch.tensor([[0.9, 0.5, 0.0], [0.8, 0.5, 0.5], [0.5, 0.5, 0.3], [0.7, 0.5, 0.5], [0.75, 0.5, 0.5]])[k].expand(len(scores), 3)
    return loss, sums, scores
trm.act_loss = act_loss
"""
    run = trains('--eval_interval=1', prelude=fake).ok()
    assert load(tmp_path / 'run/step_best')['step'] == 3 and 'best val loss 0.7000, exact 0.5000 at step 3' in run.out


def test_a_person_at_a_terminal_sees_puzzles(tmp_path):
    make_puzzle_data(tmp_path / 'data')
    parent, child = pty.openpty()
    run = subprocess.Popen([sys.executable, ROOT / 'pretrain_trm.py', *BASE, '--max_steps=0'], cwd=tmp_path, stdout=child, stderr=child, env=dict(os.environ, OMP_NUM_THREADS='1'))
    os.close(child)
    out = b''
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # how a terminal says that nobody writes any more
            break
        out += part
    assert run.wait() == 0, out
    out = out.decode()
    assert re.search(r'a puzzle that it did not solve:\r\n(    .*\r\n){3}', out) and '\033[41m' in out
    log = (tmp_path / 'run/log.txt').read_text()
    assert '\033' not in log and 'did not solve' not in log


# ---- training
def test_ema(trains, tmp_path):
    first = ['--checkpoint_interval=1', '--lr=1e-2']
    trains('--ema=True', '--ema_rate=0.75', *first).ok()
    one, two, three = (load(tmp_path / f'run/step_{s}') for s in (1, 2, 3))
    assert one['ema'].keys() == {name for name in one['model'] if name not in ('H_init', 'L_init', 'puzzle_emb.weights')}
    for before, after in ((one, two), (two, three)):
        for name, average in after['ema'].items():
            assert torch.allclose(average, 0.75 * before['ema'][name] + 0.25 * after['model'][name], rtol=1e-5, atol=1e-7), name
    # what is evaluated is the average, with the live table
    trains('--eval_only', base=['--log_dir=run']).ok()
    with_average = json.loads((tmp_path / 'run/eval.json').read_text())['val_loss']
    last = load(tmp_path / 'run/step_4')
    torch.save({'model': dict(last['model'], **last['ema'])}, tmp_path / 'weights')
    trains('--eval_only', '--checkpoint_path=weights').ok()
    assert json.loads((tmp_path / 'eval.json').read_text())['val_loss'] == with_average
    torch.save({'model': last['model']}, tmp_path / 'weights')
    trains('--eval_only', '--checkpoint_path=weights').ok()
    assert json.loads((tmp_path / 'eval.json').read_text())['val_loss'] != with_average
    # switched on later, it begins with the weights of that moment
    trains(*first, '--log_dir=two', '--max_steps=2').ok()
    trains(*first, '--log_dir=two', '--max_steps=3', '--auto_resume', '--ema', '--ema_rate=0.75').ok()
    assert load(tmp_path / 'two/step_2')['ema'] == {}
    later, weights = load(tmp_path / 'two/step_3'), load(tmp_path / 'two/step_2')['model']
    assert all(torch.allclose(average, 0.75 * weights[name] + 0.25 * later['model'][name], rtol=1e-5, atol=1e-7) for name, average in later['ema'].items())


@pytest.mark.parametrize('ranks', [0, 2])
def test_freeze_weights(trains, tmp_path, ranks):
    trains('--max_steps=2').ok()
    trains('--freeze_weights', '--load_checkpoint=run/step_2', '--log_dir=two', ranks=ranks).ok()
    before, after = load(tmp_path / 'run/step_2')['model'], load(tmp_path / 'two/step_4')['model']
    assert [name for name in before if not torch.equal(before[name], after[name])] == ['puzzle_emb.weights']
    assert load(tmp_path / 'two/step_4')['optimizer']['state'] == {}
    trains('--freeze_weights', '--load_checkpoint=run/step_2', '--log_dir=three', '--max_steps=2', ranks=ranks).ok()
    trains('--freeze_weights', '--log_dir=three', '--auto_resume', ranks=ranks).ok()
    assert torch.equal(load(tmp_path / 'three/step_4')['model']['puzzle_emb.weights'], after['puzzle_emb.weights'])


def test_the_vectors_of_the_puzzles_learn_at_their_own_rate(trains, tmp_path):
    trains('--max_steps=1', '--lr_warmup_steps=0', '--puzzle_emb_lr=0.25', '--puzzle_emb_weight_decay=0').ok()
    table = load(tmp_path / 'run/step_1')['model']['puzzle_emb.weights']
    assert set(table.unique().tolist()) <= {-0.25, 0.0, 0.25} and 2 <= table.any(1).sum() <= 8
    trains('--puzzle_emb_lr=0', '--log_dir=two').ok()
    assert not load(tmp_path / 'two/step_4')['model']['puzzle_emb.weights'].any()


def test_twenty_steps_in_slices_and_on_ranks(trains, tmp_path):
    """Uneven puzzles, several halts: in float64 the weights agree to 1e-6."""
    double = EAGER + 'torch.set_default_dtype(torch.float64)'
    found, norms = [], []
    for ranks, slices in ((0, 1), (0, 4), (2, 1), (2, 4)):
        out = f'r{ranks}s{slices}'
        run = trains('--max_steps=20', f'--grad_accumulation_steps={slices}', f'--log_dir={out}', '--eval_interval=-1', '--ema', prelude=double, ranks=ranks).ok()
        found.append(load(tmp_path / out / 'step_20'))
        norms.append(column(run, 'norm'))
    assert all(norm == pytest.approx(norms[0], abs=0.011) for norm in norms) and max(norms[0]) > 0.1
    for other in found[1:]:
        for part in ('model', 'ema'):
            for name, tensor in found[0][part].items():
                assert (tensor - other[part][name]).norm() <= 1e-6 * tensor.norm(), name


def test_bfloat16_trains(trains, tmp_path):
    run = trains('--dtype=bfloat16', '--max_steps=30', '--eval_interval=-1', '--lr=3e-3', '--log_interval=10').ok()
    assert column(run, 'loss')[-1] < column(run, 'loss')[0]
    carry = load(tmp_path / 'run/step_30')['ranks'][0]['carry'][0]
    assert carry['z_H'].dtype == torch.bfloat16 and load(tmp_path / 'run/step_30')['model']['lm_head.weight'].dtype == torch.float32


def test_shows_what_it_does(trains):
    run = trains('--log_level=DEBUG', '--log_gradients', '--grad_accumulation_steps=2').ok()
    assert len(re.findall(r'^step \d micro-step [12]/2 \| loss [\d.]+ \| \d+ms$', run.out, re.MULTILINE)) == 8
    parts = re.search(r'grad (.*)', run.out)[1]
    assert {'puzzle_emb', 'embed_tokens', 'lm_head', 'q_head', 'L_level.layers.0.self_attn', 'L_level.layers.0.mlp'} == set(re.findall(r'([a-zL]\S+) \d', parts))


# ---- where runs lie
def test_folders_of_runs(trains, tmp_path):
    base = [word for word in BASE if not word.startswith('--log_dir')]
    trains('+run_name=mine', base=base).ok()
    assert {'step_2', 'step_4', 'step_best', 'all_config.yaml', 'config.py', 'log.txt'} == set(os.listdir(tmp_path / 'checkpoints/Data-ACT-torch/mine'))
    trains('project_name=P', base=base, ranks=2).ok()
    (dated,) = os.listdir(tmp_path / 'checkpoints/P')
    assert re.fullmatch(r'\d{8}_\d{6}', dated) and 'step_4' in os.listdir(tmp_path / 'checkpoints/P' / dated)
    run = trains('project_name=P', '--auto_resume', '--max_steps=6', base=base).ok()
    assert f'resumed from checkpoints/P/{dated}/step_4' in run.out and (tmp_path / f'checkpoints/P/{dated}/step_6').exists()
    run = trains('--eval_only', '--project_name=P', base=['--data_paths=data']).ok()
    assert f'wrote checkpoints/P/{dated}/eval.json' in run.out
    assert '--auto_resume' in trains('+run_name=mine', base=base).one_line(2)
    run = trains('--resume', '--checkpoint_path=checkpoints/Data-ACT-torch/mine/step_2', base=[]).ok()
    assert 'resumed from checkpoints/Data-ACT-torch/mine/step_2' in run.out and os.listdir(tmp_path / 'checkpoints/P') == [dated]


def test_the_newest_run_is_the_one_with_the_newest_checkpoint(trains, tmp_path):
    base = [word for word in BASE if not word.startswith('--log_dir')]
    for name in 'ab':
        trains(f'+run_name={name}', base=base).ok()
    trains('--eval_only', '+run_name=a', base=['--data_paths=data']).ok()  # writes there, trains nothing
    (tmp_path / 'checkpoints/Data-ACT-torch/c').mkdir()  # ended before its first checkpoint
    assert 'resumed from checkpoints/Data-ACT-torch/b/step_4' in trains('--auto_resume', '--max_steps=6', base=base).ok().out
    (tmp_path / 'checkpoints/Data-ACT-torch/d').mkdir()  # killed after its first evaluation
    shutil.copy(tmp_path / 'checkpoints/Data-ACT-torch/b/step_best', tmp_path / 'checkpoints/Data-ACT-torch/d')
    assert 'resumed from checkpoints/Data-ACT-torch/d/step_best at step' in trains('--auto_resume', '--max_steps=6', base=base).ok().out


def test_a_vector_that_is_not_a_number(trains, tmp_path):
    """Of the gradients, those of the puzzles' vectors alone."""
    prelude = """
import trm, math
real, calls = trm.PuzzleTable.rows, []
def rows(self, ids):
    found = real(self, ids)
    calls.append(1)
    if len(calls) == 13:
        found.register_hook(lambda g: g * math.nan)
    return found
trm.PuzzleTable.rows = rows
"""
    err = trains('--grad_accumulation_steps=4', '--eval_interval=-1', prelude=prelude).one_line(1)
    assert 'step 4' in err and not (tmp_path / 'run/step_4').exists()


def test_a_clock_that_differs_between_the_ranks(trains, tmp_path):
    prelude = "import time, os; real = time.strftime; time.strftime = lambda f: '2026_' + os.environ['RANK']"
    trains(base=[word for word in BASE if not word.startswith('--log_dir')], ranks=2, prelude=prelude).ok()
    assert os.listdir(tmp_path / 'checkpoints/Data-ACT-torch') == ['2026_0']


def test_slots_are_kept_when_the_number_of_ranks_changes(trains, tmp_path):
    """In float64 a run that goes on with other ranks and slices is the same run: nothing of the carry is lost."""
    double = EAGER + 'torch.set_default_dtype(torch.float64)'
    common = ['--max_steps=10', '--eval_interval=-1', '--ema', '--halt_max_steps=6', '--halt_exploration_prob=0.7', '--lr=1e-3']
    trains(*common, '--log_dir=whole', prelude=double).ok()
    trains(*common, '--log_dir=parts', '--checkpoint_interval=4', '--grad_accumulation_steps=4', prelude=double, ranks=2).ok()
    (tmp_path / 'parts/step_10').unlink()
    (tmp_path / 'parts/step_8').unlink()
    trains(*common, '--log_dir=parts', '--auto_resume', '--grad_accumulation_steps=1', '--checkpoint_interval=3', prelude=double).ok()
    (tmp_path / 'parts/step_10').unlink()
    (tmp_path / 'parts/step_9').unlink()
    run = trains(*common, '--log_dir=parts', '--auto_resume', '--grad_accumulation_steps=2', prelude=double, ranks=4).ok()
    assert 'resumed from parts/step_6' in run.out
    a, b = load(tmp_path / 'whole/step_10'), load(tmp_path / 'parts/step_10')
    assert all((a['model'][name] - b['model'][name]).norm() <= 1e-6 * a['model'][name].norm() for name in a['model'])
    steps = torch.cat([rank['carry'][0]['steps'] for rank in b['ranks']])
    assert torch.equal(steps, a['ranks'][0]['carry'][0]['steps']) and len(set(steps.tolist())) > 1


@pytest.mark.parametrize('damage', [
    lambda c: c['inputs'].fill_(200), lambda c: c['puzzle_identifiers'].fill_(99), lambda c: c['puzzle_identifiers'].fill_(-1), lambda c: c['labels'].fill_(77),
    lambda c: c.update(z_H=c['z_H'][:, :3]), lambda c: c.update(steps=c['steps'][:3]), lambda c: c.pop('z_L'), lambda c: c.update(halted='no')], ids=range(8))
def test_a_hostile_carry(trains, tmp_path, damage):
    trains('--max_steps=2').ok()
    stored = load(tmp_path / 'run/step_2')
    damage(stored['ranks'][0]['carry'][0])
    torch.save(stored, tmp_path / 'run/step_2')
    assert 'run/step_2 does not fit' in trains('--auto_resume').one_line(2)


# ---- checkpoints of others
def public(tmp_path, prefix='_orig_mod.model.inner.', yaml=True, **changes):
    """A folder as the public code leaves it, of the model of BASE."""
    torch.manual_seed(5)
    config = dict(hidden_size=16, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, puzzle_emb_len=1, halt_max_steps=3, puzzle_emb_ndim=16)
    model = trm.TRM(trm.TRMConfig(5, 9, 9, **{**config, **changes}, forward_dtype='float32'))
    if hasattr(model, 'puzzle_emb'):
        model.puzzle_emb.weights.normal_()
    (tmp_path / 'public').mkdir(exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / 'public/step_7')
    if yaml:
        (tmp_path / 'public/all_config.yaml').write_text(
            'arch:\n  H_cycles: 2\n  H_layers: 0\n  L_cycles: 1\n  L_layers: 1\n  expansion: 4\n  forward_dtype: bfloat16\n  halt_exploration_prob: 0.1\n  halt_max_steps: 3\n'
            '  hidden_size: 16\n  loss:\n    loss_type: stablemax_cross_entropy\n    name: losses@ACTLossHead\n  mlp_t: false\n  name: x@Y\n  num_heads: 2\n  pos_encodings: rope\n'
            '  puzzle_emb_len: 1\n  puzzle_emb_ndim: 16\nbeta1: 0.9\nhidden_size: 77\n')
    return model


@pytest.mark.parametrize('prefix', ['_orig_mod.model.inner.', 'model.inner.', 'model._orig_mod.inner.', ''])
def test_a_public_checkpoint_evaluates(trains, tmp_path, prefix):
    model = public(tmp_path, prefix)
    common = ['--data_paths=data', '--multiple_of=16', '--log_dir=out', '--global_batch_size=8']
    found = []
    for how in ('--load_checkpoint=public/step_7', '--checkpoint_path=public/step_7'):
        trains('--eval_only', how, base=common).ok()
        found.append(json.loads((tmp_path / ('out' if 'load' in how else 'public') / 'eval.json').read_text()))
        assert not (tmp_path / 'out/log.txt').exists()
    torch.save(dict(model=model.state_dict()), tmp_path / 'plain')
    trains('--eval_only', '--checkpoint_path=plain').ok()
    assert found[0]['val_loss'] == found[1]['val_loss'] == json.loads((tmp_path / 'eval.json').read_text())['val_loss']
    run = trains('--load_checkpoint=public/step_7', '--max_steps=0', base=common).ok()
    assert column(run, 'val loss')[0] == pytest.approx(found[0]['val_loss'], abs=1e-4)


def test_what_a_public_checkpoint_does_not_tell_is_asked_for(trains, tmp_path):
    public(tmp_path, yaml=False)
    common = ['--data_paths=data', '--multiple_of=16', '--load_checkpoint=public/step_7', '--max_steps=1', '--global_batch_size=8', '--log_dir=out']
    told = []
    for word in ('--num_heads=2', '--pos_encodings=rope', '--puzzle_emb_len=1'):
        assert f'add {word.split("=")[0]}' in trains(*told, base=common).one_line(2)
        told.append(word)
    trains(*told, '--H_cycles=2', '--L_cycles=3', '--halt_max_steps=2', base=common).ok()
    assert '--L_layers=2 is not that of public/step_7: 1' in trains(*told, '--L_layers=2', '--log_dir=out2', base=common).one_line(2)


def test_other_tables_and_vocabularies_are_fitted_and_said(trains, tmp_path):
    model = public(tmp_path)
    make_puzzle_data(tmp_path / 'other', groups=2, vocab_size=7)
    run = trains('--load_checkpoint=public/step_7', '--max_steps=1', '--lr=1e-9', '--puzzle_emb_lr=0', '--weight_decay=0', '--log_dir=out',
                 base=[word for word in BASE if not word.startswith('--data')] + ['--data_paths=other']).ok()
    for line in ('puzzle_emb.weights: 9 -> 5 rows, each the mean', 'embed_tokens.embedding_weight: 5 -> 7 rows, 5 of them kept', 'lm_head.weight: 5 -> 7 rows'):
        assert line in run.out
    weights = load(tmp_path / 'out/step_1')['model']
    old = model.state_dict()
    assert torch.allclose(weights['puzzle_emb.weights'], old['puzzle_emb.weights'].mean(0).expand(5, 16), atol=1e-6)
    assert torch.allclose(weights['lm_head.weight'][:5], old['lm_head.weight'], atol=1e-6)
    assert torch.allclose(weights['lm_head.weight'][5:], old['lm_head.weight'].mean(0).expand(2, 16), atol=1e-6)


def test_an_average_is_fitted_too(trains, tmp_path):
    trains('--ema', '--ema_rate=0.5').ok()
    make_puzzle_data(tmp_path / 'other', groups=2, vocab_size=7)
    run = trains('--eval_only', '--load_checkpoint=run/step_4', base=['--data_paths=other']).ok()
    assert '5 -> 7 rows' in run.out


def test_constants_that_differ_are_told(trains, tmp_path):
    public(tmp_path)
    path = tmp_path / 'public/all_config.yaml'
    path.write_text(path.read_text().replace('arch:\n', 'arch:\n  rms_norm_eps: 1.0e-05\n  rope_theta: 10000.0\n'))
    common = ['--data_paths=data', '--multiple_of=16', '--load_checkpoint=public/step_7', '--eval_only', '--log_dir=out']
    trains(base=common).ok()
    path.write_text(path.read_text().replace('10000.0', '5000.0'))
    assert 'rope_theta is 5000.0' in trains(base=common).one_line(2)


def test_mlp_t_needs_no_heads(trains):
    trains('--mlp_t', '--pos_encodings=none', '--hidden_size=18', '--num_heads=4', '--max_steps=1').ok()


def test_a_settings_file_leaves_what_is_derived_open(trains, tmp_path):
    trains('--max_steps=1').ok()
    trains('run/config.py', '--hidden_size=8', '--log_dir=two', base=[]).ok()
    assert load(tmp_path / 'two/step_1')['model']['puzzle_emb.weights'].shape == (9, 8)


def test_more_puzzles_than_memory(trains, tmp_path):
    for split in ('train', 'test'):
        path = tmp_path / f'data/{split}/dataset.json'
        path.write_text(json.dumps(dict(json.loads(path.read_text()), num_puzzle_identifiers=2 ** 31 - 1, seq_len=9)))
    assert '2,147,483,647 puzzles' in trains('--puzzle_emb_ndim=8192', '--puzzle_emb_len=512').one_line(2)


def test_mlp_t_is_bound_to_its_length(trains, tmp_path):
    public(tmp_path, mlp_t=True, pos_encodings='none', yaml=False)
    make_puzzle_data(tmp_path / 'other', cells=16)
    common = ['--multiple_of=16', '--load_checkpoint=public/step_7', '--max_steps=1', '--global_batch_size=8', '--log_dir=out', '--puzzle_emb_len=1', '--num_heads=2']
    trains(base=[*common, '--data_paths=data', '--log_dir=fits']).ok()
    assert 'bound to its number of cells' in trains(base=[*common, '--data_paths=other']).one_line(2)


def test_a_new_run_begins_with_the_average_of_an_old_one(trains, tmp_path):
    trains('--ema', '--ema_rate=0.5').ok()
    stored = load(tmp_path / 'run/step_4')
    trains('--load_checkpoint=run/step_4', '--log_dir=two', '--max_steps=1', '--lr=1e-9', '--weight_decay=0', '--puzzle_emb_lr=0', base=['--data_paths=data', '--multiple_of=16']).ok()
    weights = load(tmp_path / 'two/step_1')['model']
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in stored['ema'].items())
    assert torch.equal(weights['puzzle_emb.weights'], stored['model']['puzzle_emb.weights'])


@pytest.mark.parametrize('content', [b'', b'x' * 3000, {'a': torch.ones(2, 2)}, {'model': 3}, {'model': {}}, [1, 2], {'embed_tokens.embedding_weight': torch.ones(5, 16)},
                                     {'embed_tokens.embedding_weight': torch.ones(5)}, {'model': {'embed_tokens.embedding_weight': 'x'}}], ids=range(9))
def test_hostile_checkpoints(trains, tmp_path, content):
    path = tmp_path / 'bad'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert 'bad' in trains('--load_checkpoint=bad').one_line(2)
    assert 'bad' in trains('--eval_only', '--checkpoint_path=bad').one_line(2)


def test_all_config_yaml_is_yaml(trains, tmp_path):
    trains().ok()
    text = (tmp_path / 'run/all_config.yaml').read_text()
    values = trm._arch_of(str(tmp_path / 'run/all_config.yaml'))
    assert values['hidden_size'] == 16 and values['mlp_t'] is False and values['pos_encodings'] == 'rope' and values['expansion'] == 4.0
    trains('--lr=1e-5', '--log_dir=two').ok()
    assert '\nlr: 1.0e-05\n' in (tmp_path / 'two/all_config.yaml').read_text()
    assert 'lr: 0.01\n' in text and 'data_paths: ["data"]\n' in text and 'ema: false\n' in text
    stored = load(tmp_path / 'run/step_4')
    torch.save({f'_orig_mod.model.inner.{name}': tensor for name, tensor in stored['model'].items()}, tmp_path / 'run/step_4')
    trains('--eval_only', '--load_checkpoint=run/step_4', base=['--data_paths=data', '--multiple_of=16']).ok()


# ---- data that are damaged end the run before its first step (see test_puzzles.py for all kinds)
@pytest.mark.parametrize('ranks', [0, 2])
def test_damaged_data(trains, tmp_path, ranks):
    path = tmp_path / 'data/train/all__inputs.npy'
    array = np.load(path)
    array[3, 2] = 5
    np.save(path, array)
    assert 'token 5 in row 3, cell 2' in trains(ranks=ranks).one_line(2)
    os.truncate(path, 140)
    assert 'all__inputs.npy cannot be read' in trains(ranks=ranks).one_line(2)
    assert not (tmp_path / 'run').exists()


# ---- ARC
def test_arc_from_its_files_to_a_submission(launcher, tmp_path):
    write_arc(tmp_path, np.random.default_rng(0), tasks=2)
    prepare('arc', '--input_file_prefix=arc', '--subsets', 'training', 'evaluation', '--num_aug=3', '--output_dir=data/arc', cwd=tmp_path)
    base = [*TINY, '--data_paths=data/arc', '--global_batch_size=4', '--max_steps=2', '--eval_interval=-1', '--log_interval=1']
    found = []
    for ranks in (0, 2):
        run = launcher.run('pretrain_trm.py', [*base, f'--log_dir=r{ranks}'], cwd=tmp_path, ranks=ranks).ok()
        assert re.search(r'^step 2/2 \| ARC pass@1 [\d.]+ \| pass@2 ', run.out, re.MULTILINE)
        found.append(json.loads((tmp_path / f'r{ranks}/submission.json').read_text()))
    tasks = json.loads((tmp_path / 'data/arc/test_puzzles.json').read_text())
    assert {name: len(pairs) for name, pairs in found[0].items()} == {name: len(task['test']) for name, task in tasks.items()} and found[0] == found[1]
    assert all(set(pair) == {'attempt_1', 'attempt_2'} for pairs in found[0].values() for pair in pairs)
    run = launcher.run('pretrain_trm.py', ['--eval_only', '--log_dir=r0'], cwd=tmp_path).ok()
    report = json.loads((tmp_path / 'r0/eval.json').read_text())
    assert {f'pass@{k}' for k in trm.PASS_AT} <= report.keys() and report['examples'] == 3 * 4
    run = launcher.run('pretrain_trm.py', [*base, '--log_dir=none', 'evaluators=[]'], cwd=tmp_path).ok()
    assert 'ARC pass' not in run.out and not (tmp_path / 'none/submission.json').exists()
    shutil.copytree(tmp_path / 'data', tmp_path / 'other/data')
    (tmp_path / 'other/data/arc/test_puzzles.json').unlink()
    for lacks in ('0', '1'):
        run = launcher.run('pretrain_trm.py', [*base, f'--log_dir={tmp_path}/none2'], cwd=tmp_path, ranks=2, prelude=f"import os; os.environ['RANK'] == '{lacks}' and os.chdir('other')")
        assert 'test_puzzles.json' in run.one_line(2)
    names = json.loads((tmp_path / 'data/arc/identifiers.json').read_text())
    grid = dict(input=[[1]], output=[[1]])
    for wrong in (['<blank>'], {}, ['x|||t0', *names[1:]], ['x|||t9|||0123456789', *names[1:]], ['x|||t1|||0123456788', *names[1:]], [7, *names[1:]], 'tasks',
                  dict(t=dict(train=[])), dict(t=dict(test=[])), dict(t=dict(test=[dict(input=[[1]])])), dict(t=dict(test=[dict(grid, output=[[1], [1, 2]])])),
                  dict(t=dict(test=[grid, 3])), dict(t=dict(test=[dict(grid, input=[[10]])])), dict(t=dict(test=[dict(grid, input=[])])), {}, []):
        name = 'identifiers.json' if isinstance(wrong, list) and wrong else 'test_puzzles.json'
        before = (tmp_path / 'data/arc' / name).read_text()
        (tmp_path / 'data/arc' / name).write_text(json.dumps(wrong))
        assert 'does not fit' in launcher.run('pretrain_trm.py', [*base, '--log_dir=none2'], cwd=tmp_path).one_line(2), wrong
        (tmp_path / 'data/arc' / name).write_text(before)
    assert not (tmp_path / 'none2').exists()


# ---- every command of guide 002, with a tiny model and two steps
GUIDE = [line for line in GUIDES.splitlines() if ' pretrain_trm.py' in line and 'data/addition' not in line]


def test_the_guide_is_here():
    assert len(GUIDE) == 10


@pytest.mark.parametrize('line', GUIDE)
def test_guide_commands_run(launcher, tmp_path, line):
    words = shlex.split(line)
    args, ranks = words[words.index('pretrain_trm.py') + 1:], 4 if 'torchrun' in words else 0
    (tmp_path / 'data').mkdir()
    write_arc(tmp_path, np.random.default_rng(0), tasks=2)
    prepare('arc', '--input_file_prefix=arc', '--subsets', 'training', 'evaluation', '--num_aug=1', '--output_dir=data/arc1concept-aug-1000', cwd=tmp_path)
    (tmp_path / 'data/arc2concept-aug-1000').symlink_to('arc1concept-aug-1000')
    make_puzzle_data(tmp_path / 'data/sudoku-extreme-1k-aug-1000', cells=16, vocab_size=11)
    make_puzzle_data(tmp_path / 'data/maze-30x30-hard-1k', cells=25, vocab_size=6)
    tiny = ['hidden_size=16', 'num_heads=2', 'multiple_of=16', 'halt_max_steps=2', 'puzzle_emb_ndim=16', 'global_batch_size=4', 'L_cycles=1', 'H_cycles=1']
    length = [f'--max_steps={2}'] if not any(word.startswith('epochs=') for word in args) else ['epochs=1', 'eval_interval=1']
    if any(word.startswith('load_checkpoint') for word in args):  # an earlier run wrote that step
        launcher.run('pretrain_trm.py', [*args[:2], *tiny, '--max_steps=1', 'log_dir=checkpoints/YourProject/your_run_name'], cwd=tmp_path, timeout=120).ok()
        os.rename(tmp_path / 'checkpoints/YourProject/your_run_name/step_1', tmp_path / 'checkpoints/YourProject/your_run_name/step_10000')
    run = launcher.run('pretrain_trm.py', [*args, *tiny, *length], cwd=tmp_path, ranks=ranks, env={'DISABLE_COMPILE': '1'}, timeout=120).ok()
    assert 'done: best val loss' in run.out
    name = next((word.split('=')[1] for word in args if word.startswith('+run_name')), None)
    if name:
        (folder,) = (tmp_path / 'checkpoints').glob(f'*-ACT-torch/{name}')
        assert (folder / 'all_config.yaml').exists() and list(folder.glob('step_[12]'))
    assert ('ARC pass@1' in run.out) == ('evaluators=[]' not in args)
    assert ('weights frozen' in run.out) == ('freeze_weights=True' in args)


def test_help(tmp_path):
    out = subprocess.run([sys.executable, ROOT / 'pretrain_trm.py', '--help'], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == '' and '--preset' in out.stdout and re.search(r'--lr=0\.0001 +peak learning rate', out.stdout)


def test_the_laptop_command_learns(launcher, tmp_path):
    """A shorter form of the docstring's first command: 4 x 4 Sudoku with solutions that were never seen."""
    prepare('sudoku', '--generate', '--size=4', '--train_size=300', '--test_size=100', '--output_dir=data/sudoku4', cwd=tmp_path)
    run = launcher.run('pretrain_trm.py', ['--preset=tiny', '--data_paths=data/sudoku4', '--max_steps=250', '--global_batch_size=64', '--log_dir=run', '--eval_interval=-1'],
                       cwd=tmp_path, timeout=180).ok()
    assert column(run, 'cells')[-1] > 0.75, run.out
