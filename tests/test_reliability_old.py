"""The reliability contract, one promise a test, for every training script: stopped by anything at any moment, continued bit for bit.

    python -m pytest tests/test_reliability_old.py --kills=50      (the long form; 5 kills on one rank and 2 on two without it)

A script is one entry of CASES. Tests know a script by its command line, its files and what it prints; where a run has to be
hurt at a certain place, the method that computes the loss (`model`.forward) is wrapped from outside (see hook).
"""
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
from harness import KILL_AT, ROOT, VOLATILE, clean_log, copy, differences, drop, load, store
from harness import make_addition_data, make_paths, make_puzzle_data, make_qwen, make_rows_data

# script      its file name
# args        tiny settings: 8 steps, evaluation and checkpoint every 2, a sample every 4, dropout, 3 steps a log line
# micro_steps micro-steps of one step on one rank; divisible by 4
# folder      the setting that names the folder of a run
# log         the name of the log in it
# data        makes the data in a folder; `few` the same with several epochs in 8 steps
# name        file name of the checkpoint of a step, or of 'best'
# model       'module.Class' whose forward computes the loss; `sampler` is its method that samples, '' if none
# change      changes the data in a folder so that a resume must refuse it
# shape       settings that cannot change on resume
# eval_json   the keys of what --eval_only writes beside the checkpoint
# names       {the name of a setting here: its name in this script}
# foreign     turns a copy of the data into one of GPT-2's tokens, whose tokenizer is not here
# lenient     a typed checkpoint that is missing is a warning: the run begins anew
# at_start    evaluates at step 0 whatever the interval
# ways        (ranks, `slicing`) that must give the same training, in float32 and in float64; all of the first, the reference, on one rank
# slicing     the setting that says how large a micro-step is
# seen        what a micro-step is trained on, out of the arguments of forward
# loss        before and after code that works on the loss as `result`, where forward returns more
# decays      the weight decays in the optimizer when 0.3 is typed
# draws       each step draws from torch's generator
# without     settings of this file that the script does not have; tests that need one skip, the others leave it out
# ends        other checkpoints that the last step leaves
# kills       each so many-th of the operations of a save is killed, without --kills=50 each
CASES = dict(
    finetune_dolly=dict(
        script='finetune_dolly.py',
        args=dict(data_root='data', block_size=32, n_layer=2, n_head=2, n_embd=16, batch_size=2, grad_accumulation_steps=4, max_steps=8,
                  warmup_steps=2, max_lr=1e-2, eval_interval=2, checkpoint_interval=2, keep_last_n_checkpoints=5, generate_interval=4, eval_answers=2,
                  max_new_tokens=8, log_interval=3, dropout=0.1),
        micro_steps=4,
        folder='log_dir',
        log='log.txt',
        data=make_rows_data,
        few=lambda folder: make_rows_data(folder, rows=25),
        name=lambda step: 'model_best.pt' if step == 'best' else f'model_{step:05d}.pt',
        model='model.GPT',
        sampler='generate',
        change=lambda folder: shutil.copy(folder / 'x_train_000001.npz', folder / 'x_train_000003.npz'),
        shape=dict(n_embd=32, n_layer=1, n_head=4, block_size=64),
        eval_json={'step', 'val_loss', 'val_rows', 'checkpoint', 'data_dir', 'table', 'answers'},
        names=dict(data_root='data_dir'),
        foreign=lambda folder: make_rows_data(folder, eot=50256),
        lenient=True,
        at_start=True,
        ways=dict.fromkeys(('float32', 'float64'), [(0, 2), (1, 2), (2, 2), (4, 2), (3, 2)]),  # three share out four micro-batches
        slicing='batch_size',
        seen='args[1]',
        loss=('', ''),
        decays=[0, 0.3],
        draws=True,
        without=('total_batch_size', 'val_tokens'),
        ends=(),
        kills=1,
    ),
    pretrain_trm=dict(
        script='pretrain_trm.py',
        args=dict(data_root='data', hidden_size=32, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, pos_encodings='rope', puzzle_emb_len=1,
                  halt_max_steps=3, halt_exploration_prob=0.5, global_batch_size=8, grad_accumulation_steps=4, max_steps=8, warmup_steps=2, max_lr=1e-2,
                  ema=True, ema_rate=0.5, eval_interval=2, checkpoint_interval=2, checkpoint_every_eval=False, log_interval=3),
        micro_steps=4,
        folder='log_dir',
        log='log.txt',
        data=make_puzzle_data,
        few=lambda folder: make_puzzle_data(folder, groups=3),
        name=lambda step: f'step_{step}',
        model='trm.TRM',
        sampler='',
        change=lambda folder: make_puzzle_data(folder, seed=1),
        shape=dict(hidden_size=64, L_layers=2, num_heads=4, global_batch_size=16),
        eval_json={'step', 'val_loss', 'checkpoint', 'data_paths', 'cell_accuracy', 'exact_accuracy', 'halting_steps', 'cell_accuracy_by_step',
                   'exact_accuracy_by_step', 'examples'},
        names=dict(data_root='data_paths', max_lr='lr', warmup_steps='lr_warmup_steps'),
        foreign=lambda folder: None,
        lenient=False,
        at_start=False,
        ways=dict(float32=[(0, 4), (1, 4), (2, 4), (4, 4), (0, 1), (2, 1), (0, 8)], float64=[(0, 1), (0, 4), (2, 4), (4, 1)]),
        slicing='grad_accumulation_steps',
        seen="args[1]['inputs']",
        loss=("carry, outputs = result; result = outputs['loss']", "outputs['loss'] = result; result = carry, outputs"),
        decays=[0.3],
        draws=False,
        without=('total_batch_size', 'val_tokens', 'dropout', 'batch_size', 'generate_interval', 'max_new_tokens'),
        ends=(),
        kills=3,
    ),
    finetune_addition=dict(
        script='finetune_addition.py',
        args=dict(data_root='data', hidden_size=32, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, mlp_t=True, pos_encodings='none', puzzle_emb_len=1,
                  halt_max_steps=3, halt_exploration_prob=0.5, global_batch_size=8, grad_accumulation_steps=4, max_steps=8, warmup_steps=2, max_lr=1e-2,
                  ema=True, ema_rate=0.5, copy_loss_weight=0.5, eval_interval=2, checkpoint_interval=2, checkpoint_every_eval=False, log_interval=3),
        micro_steps=4,
        folder='log_dir',
        log='log.txt',
        data=make_addition_data,
        few=lambda folder: make_addition_data(folder, problems=24),
        name=lambda step: 'step_best' if step == 'best' else f'step_{step}',
        model='trm.TRM',
        sampler='',
        change=lambda folder: make_addition_data(folder, seed=1),
        shape=dict(hidden_size=64, L_layers=2, mlp_t=False, global_batch_size=16),
        eval_json={'step', 'val_loss', 'checkpoint', 'data_path', 'cell_accuracy', 'grid_accuracy', 'exact_accuracy', 'halting_steps', 'exact_accuracy_by_step',
                   'by_digits', 'by_carry', 'examples', 'errors'},
        names=dict(data_root='data_path', max_lr='lr', warmup_steps='lr_warmup_steps', max_steps='total_steps'),
        foreign=lambda folder: None,
        lenient=False,
        at_start=False,
        ways=dict(float32=[(0, 4), (1, 4), (2, 4), (4, 4), (0, 1), (2, 1), (0, 8)], float64=[(0, 1), (0, 4), (2, 4), (4, 1)]),
        slicing='grad_accumulation_steps',
        seen="args[1]['inputs']",
        loss=("carry, outputs = result; result = outputs['loss']", "outputs['loss'] = result; result = carry, outputs"),
        decays=[0.3],
        draws=False,
        without=('total_batch_size', 'val_tokens', 'dropout', 'batch_size', 'generate_interval', 'max_new_tokens'),
        ends=(),
        kills=3,
    ),
    train_latent_prm=dict(
        script='train_latent_prm.py',
        args=dict(data_root='data', model_path='data/qwen', batch_size=2, gradient_accumulation_steps=4, max_steps=8, warmup_ratio=0.25, max_lr=1e-2,
                  val_size=0.2, best_metric='val_loss', eval_interval=2, checkpoint_interval=2, log_interval=3, dropout=0.1, device='cpu'),
        micro_steps=4,
        folder='output_dir',
        log='training.log',
        data=lambda folder: make_qwen(make_paths(folder, questions=40, paths=3) / 'qwen'),
        few=lambda folder: make_paths(folder, questions=9),  # 14 micro-batches: the last step of an epoch has two
        name=lambda step: 'best' if step == 'best' else f'checkpoint-{step}',
        model='model.QwenLatentPRM',
        sampler='',
        change=lambda folder: make_paths(folder, questions=40, paths=3, seed=1),
        shape=dict(pooling_strategy='last', question_context=True, batch_size=4, val_size=0.3),
        eval_json={'step', 'val_loss', 'checkpoint', 'data_dir', 'questions', 'paths', 'table'},
        names=dict(data_root='data_dir', max_lr='learning_rate', eval_interval='val_steps', checkpoint_interval='save_steps', log_interval='logging_steps',
                   keep_last_n_checkpoints='save_total_limit', dropout='dropout_prob'),
        foreign=lambda folder: None,
        lenient=False,
        at_start=False,
        ways=dict(float32=[(0, 2), (1, 2), (2, 2), (4, 2), (3, 2)]),
        slicing='batch_size',
        seen='args[1][args[1].any(2).any(1), 0, 0]',  # not what a rank without paths is given
        loss=('', ''),
        decays=[0, 0.3],
        draws=True,
        without=('total_batch_size', 'val_tokens', 'generate_interval', 'max_new_tokens'),
        ends=('final',),
        kills=5,
    ),
)


# Of tests marked `fenced`, `once`, `slots` and `long` the short form leaves out some scripts (see conftest.py).
# ---- a bench: a script, a folder to run it in, finished runs to compare with ------------------------------------------
@pytest.fixture(scope='module', params=CASES)
def case(request):
    return SimpleNamespace(**CASES[request.param])


@pytest.fixture(scope='module')
def home(case, tmp_path_factory):
    """What all tests of a case share: its data, and straight runs by their settings."""
    folder = tmp_path_factory.mktemp('home')
    case.data(folder / 'data')
    case.few(folder / 'few')
    return SimpleNamespace(folder=folder, straight={}, seconds={})


@pytest.fixture
def bench(case, home, launcher, tmp_path):
    link_data(home, tmp_path)
    return SimpleNamespace(case=case, home=home, launcher=launcher, cwd=tmp_path)


def link_data(home, folder):
    for name in ('data', 'few'):
        (folder / name).symlink_to(home.folder / name)


def words(case, verbs=(), out='run', bare=False, **settings):
    """The command line: the case's tiny settings and these; bare = these alone."""
    settings = {**({} if bare else case.args), **settings, case.folder: out}
    return [*verbs, *(f'--{case.names.get(name, name)}={value}' for name, value in settings.items() if name not in case.without)]


def start(bench, *verbs, ranks=0, prelude='', env=None, files_limit=0, **settings):
    return bench.launcher.start(bench.case.script, words(bench.case, verbs, **settings), cwd=bench.cwd, ranks=ranks, prelude=prelude,
                                env=env, files_limit=files_limit)


def go(bench, *verbs, **kwargs):
    """Run to the end."""
    run = start(bench, *verbs, **kwargs)
    run.wait()
    return run


def straight(bench, ranks=0, **kwargs):
    """The folder of a run in one piece, made once for all tests. Nobody may write into it."""
    key = repr((ranks, sorted(kwargs.items())))
    if key not in bench.home.straight:
        folder = bench.home.folder / f'straight{len(bench.home.straight)}'
        folder.mkdir()
        link_data(bench.home, folder)
        began = time.time()
        go(SimpleNamespace(**{**vars(bench), 'cwd': folder}), ranks=ranks, **kwargs).ok()
        bench.home.seconds[key] = time.time() - began
        bench.home.straight[key] = folder / 'run'
    bench.seconds = bench.home.seconds[key]
    return bench.home.straight[key]


def stopped(bench, step, out='run', **kwargs):
    """A folder as it was when the straight run had just saved `step` and was killed, longer log and all."""
    shutil.copytree(straight(bench, **kwargs), bench.cwd / out)
    for later in steps(bench, out):
        if later > step:
            drop(bench.cwd / out / bench.case.name(later))
    for name in bench.case.ends if step < 8 else ():
        drop(bench.cwd / out / name)
    assert steps(bench, out)[-1] == step
    return bench.cwd / out


def steps(bench, folder='run'):
    """Steps of the checkpoints in a folder."""
    names = os.listdir(bench.cwd / folder) if (bench.cwd / folder).exists() else []
    return sorted(int(digits) for name in names for digits in re.findall(r'\d+', name) if bench.case.name(int(digits)) == name)


def checkpoint(bench, step, folder='run'):
    return bench.cwd / folder / bench.case.name(step)


def whole(bench, folder='run'):
    """Every file with a final name reads whole; their contents by step."""
    contents = {}
    for step in [*steps(bench, folder), *(['best'] if checkpoint(bench, 'best', folder).exists() else [])]:
        path = checkpoint(bench, step, folder)
        for file in [path] if path.is_file() else [file for file in path.iterdir() if file.suffix != '.json']:
            with zipfile.ZipFile(file) as archive:
                assert archive.testzip() is None, file
        contents[step] = load(path)
    return contents


def same(bench, expected, folder='run', ignore=()):
    """Both runs ended with the same weights, optimizer, generators, bests and log."""
    last = steps(bench, expected)[-1]
    assert steps(bench, folder)[-1] == last
    for step in (last, 'best'):
        a, b = load(checkpoint(bench, step, expected)), load(checkpoint(bench, step, folder))
        assert differences(a, b, (*VOLATILE, *ignore)) == [], step
    assert clean_log(bench.cwd / expected / bench.case.log) == clean_log(bench.cwd / folder / bench.case.log)


def tree(folder):
    """{path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def raw(path):
    """The bytes of a checkpoint, file or folder."""
    return tree(path) if path.is_dir() else path.read_bytes()


def tensors(value, where=''):
    """(path, tensor or plain value) of everything in a nested checkpoint; nothing else may be in it."""
    if isinstance(value, (dict, list, tuple)):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(element, f'{where}.{key}')
    else:
        assert value is None or isinstance(value, (torch.Tensor, bool, int, float, str)), f'{where} is a {type(value)}'
        yield where, value


def all_finite(contents):
    numbers = [(where, torch.as_tensor(value)) for where, value in tensors(contents) if isinstance(value, (float, torch.Tensor))]
    assert [where for where, number in numbers if not number.isfinite().all()] == []


def losses(folder, kind='loss'):
    """{step: number} out of the log: `loss` in training, or `val loss`."""
    log = next(folder / name for name in ('training.log', 'log.txt') if (folder / name).exists())
    found = re.findall(rf'^step (\d+)/\d+ .*?\| {kind} ([\d.]+)', log.read_text(), re.MULTILINE)
    return {int(step): float(number) for step, number in found}


def micro(bench, ranks):
    """Micro-steps of a step on one of so many ranks."""
    return bench.case.micro_steps // max(1, ranks)


def hook(bench, body):
    """Prelude that runs `body` after each call of the model's forward and sampler. Names that it can use: kind ('training',
    'evaluation' or 'sampling'), trained (calls in training so far, this one too), args and result, which it can replace."""
    module, name = bench.case.model.rsplit('.', 1)
    before, after = bench.case.loss
    body = '\n'.join('    ' + line for line in [before, *body.strip().splitlines(), after] if line)
    return f"""
import importlib, json, math, os, signal, sys, time, torch
owner = getattr(importlib.import_module({module!r}), {name!r})
rank, trained, once = int(os.environ.get('RANK', 0)), 0, []
def pause(seconds=0.2):
    if not once:
        once.append(1)
        print('HERE', flush=True)
        time.sleep(seconds)
def after(kind, args, result):
{body}
    return result
def wrapped(function, sampling):
    def call(*args, **kwargs):
        global trained
        kind = 'sampling' if sampling else 'training' if torch.is_grad_enabled() else 'evaluation'
        trained += kind == 'training'
        return after(kind, args, function(*args, **kwargs))
    return call
owner.forward = wrapped(owner.forward, False)
if {bench.case.sampler!r}:
    owner.{bench.case.sampler or 'x'} = wrapped(owner.{bench.case.sampler or 'forward'}, True)
"""


def kill_after(bench, step, ranks=0):
    """Prelude: killed in the first micro-step after `step` steps of this launch."""
    return hook(bench, f'if kind == "training" and trained == {step * micro(bench, ranks) + 1}: os.kill(os.getpid(), signal.SIGKILL)')


# ---- 3. resume is bit-exact ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('ranks', [0, 2])
def test_killed_at_random_moments(bench, kills, ranks):
    if ranks and kills < 50:
        kills = max(2, kills * 2 // 5)
    expected, rng, times, dead = straight(bench, ranks=ranks), random.Random(kills + ranks), [], 0
    longest = bench.seconds
    while dead < kills:
        assert len(times) < 4 * kills + 20, times
        times.append(rng.uniform(0, longest))
        run = start(bench, '--auto_resume', ranks=ranks)
        time.sleep(times[-1])
        run.kill(signal.SIGKILL)
        assert set(run.wait()) <= {0, -9}, f'{times} {run.codes}\n{run.out}\n{run.err}'
        whole(bench)
        if -9 in run.codes:
            dead += 1
        else:  # it had ended: begin another
            same(bench, expected)
            shutil.rmtree(bench.cwd / 'run')
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, expected)


@pytest.mark.slots
@pytest.mark.parametrize('settings, stops', [
    (dict(data_root='few', num_workers=2), (1, 1, 2)),  # 8 steps are 2.5 epochs of two shards
    (dict(data_root='few', num_workers=0), (3, 2)),
    (dict(data_root='data', log_interval=5), (1, 2, 1)),  # three stops in one epoch
    (dict(data_root='few', ranks=2), (2, 3)),
])
def test_stops_within_an_epoch_and_across_epochs_and_shards(bench, settings, stops):
    settings = dict(settings, checkpoint_interval=1)
    ranks, expected = settings.get('ranks', 0), straight(bench, **settings)
    for stop in stops:
        assert -9 in go(bench, '--auto_resume', prelude=kill_after(bench, stop, ranks), **settings).codes
    assert steps(bench)[-1] == sum(stops)
    go(bench, '--auto_resume', **settings).ok()
    same(bench, expected)


@pytest.mark.fenced
def test_stops_on_four_ranks(bench):
    """From three on the order in which the ranks' gradients are summed counts, and it may depend on how often this process has summed before."""
    expected = straight(bench, ranks=4)
    assert -9 in go(bench, '--auto_resume', prelude=kill_after(bench, 3, 4), ranks=4).codes
    go(bench, '--auto_resume', ranks=4).ok()
    same(bench, expected)


@pytest.mark.slots
def test_num_workers_does_not_matter(bench):
    go(bench, num_workers=0).ok()
    same(bench, straight(bench))
    go(bench, out='other', num_workers=7).ok()
    same(bench, straight(bench), 'other')


def test_resume_repeats_neither_evaluation_nor_save_of_its_step(bench):
    stopped(bench, 4)
    before = checkpoint(bench, 4).stat()
    run = go(bench, '--auto_resume').ok()
    assert 'resumed' in run.out and 'step 4/8' not in run.out and 'step 6/8' in run.out
    assert (checkpoint(bench, 4).stat().st_mtime_ns, checkpoint(bench, 4).stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    same(bench, straight(bench))
    run = go(bench, '--auto_resume').ok()  # a run that is over has nothing to do, and does no harm
    assert not re.search('^step', run.out, re.MULTILINE)
    same(bench, straight(bench))


# ---- 1. a checkpoint is complete or absent -------------------------------------------------------------------------
def operations(bench, **settings):
    run = go(bench, prelude=KILL_AT.format(n=0), **settings).ok()
    shutil.rmtree(bench.cwd / 'run')
    return re.search(r'^operations: (.*)', run.out, re.MULTILINE)[1].split(' ')


@pytest.mark.fenced
def test_killed_at_each_operation_of_a_save(bench, kills):
    settings = dict(keep_last_n_checkpoints=2)
    expected, done, name = straight(bench, **settings), operations(bench, **settings), bench.case.name(6)
    begin = next(i for i in range(len(done)) if f'{name}.tmp' in done[i])
    end = next((i for i in range(begin + 1, len(done)) if done[i].startswith('open:') and f'{name}.tmp' not in done[i]), len(done))
    writes = [i for i in range(begin, end) if done[i].startswith('write:')]
    middle = [i for i in range(begin, end) if i not in writes or i in writes[::max(1, len(writes) // 6)]]
    every = bench.case.kills if kills < 50 else 1
    middle = [i for n, i in enumerate(middle) if n % every == 0 or done[i].startswith(('replace:', 'rename:', 'fsync:run'))]
    others = [i for i in range(len(done)) if not done[i].startswith('write:') and i not in middle]
    assert any(done[i].startswith(('unlink:', 'remove:')) for i in middle), done[begin:end]
    for i in sorted({*middle, *others[::max(1, len(others) // 8)]}):
        shutil.rmtree(bench.cwd / 'run', ignore_errors=True)
        assert go(bench, prelude=KILL_AT.format(n=i + 1), **settings).codes == [-9], done[i]
        kept = whole(bench)
        assert len(kept) >= 2 or i < begin, f'{done[i]}: {list(kept)}'
        go(bench, '--auto_resume', **settings).ok()
        same(bench, expected)
        assert not [*(bench.cwd / 'run').glob('*.tmp'), *(bench.cwd / 'run').glob('*.gone')], done[i]


@pytest.mark.fenced
def test_a_save_is_on_the_disk_before_it_has_its_name_and_before_an_old_one_goes(bench):
    """kill -9 cannot show a missing fsync, a power cut would: so the order of operations is read."""
    done = operations(bench, keep_last_n_checkpoints=2)
    other = ('config.py', '.yaml', 'stats.json', '.was', '.gone')
    renamed = [i for i, operation in enumerate(done) if operation.startswith(('replace:', 'rename:')) and not operation.endswith(other)]
    removed = [i for i, operation in enumerate(done) if operation.startswith(('unlink:', 'remove:')) and not operation.endswith('.tmp')]
    if (straight(bench) / bench.case.name(8)).is_dir():  # a folder goes by another name first
        removed = [i for i, operation in enumerate(done) if operation.startswith('replace:') and operation.endswith('.gone')]
    assert len(renamed) == 4 + 5 + len(bench.case.ends) and len(removed) == 2  # five evaluations, each the best, and four checkpoints
    for i in renamed:
        temporary = done[i].split(':')[1] + '.tmp'
        assert [operation for operation in done[:i] if operation.endswith(temporary)][-1] == f'fsync:{temporary}'
    for i in removed:
        assert 'fsync:run' in done[max(j for j in renamed if j < i):i]


# ---- 2. what a checkpoint holds ------------------------------------------------------------------------------------
@pytest.mark.parametrize('ranks', [0, 2])
def test_contents(bench, ranks):
    folder = straight(bench, ranks=ranks)
    contents = whole(bench, folder)
    assert sorted(contents, key=str) == [2, 4, 6, 8, 'best']
    for step, content in contents.items():
        keys = {'model', 'optimizer', 'scaler', 'step', 'val_loss', 'best_val_loss', 'train_loader_state', 'config', 'ranks'}
        assert keys <= content.keys()
        assert content['step'] == (8 if step == 'best' else step)
        assert len(list(tensors(content))) > 50
        all_finite(content)
        assert len(content['ranks']) == max(1, ranks)
        for state in content['ranks']:
            assert {'torch', 'numpy', 'python'} <= state['rng'].keys()
        if ranks:
            assert not torch.equal(content['ranks'][0]['rng']['torch'], content['ranks'][1]['rng']['torch'])
    printed = losses(folder, 'val loss')
    assert contents[6]['val_loss'] == pytest.approx(printed[6], abs=1e-4) and printed[6] != printed[8]
    assert contents['best']['best_val_loss'] == pytest.approx(min(printed.values()), abs=1e-4)
    assert torch.equal(contents[2]['ranks'][0]['rng']['torch'], contents[4]['ranks'][0]['rng']['torch']) != bench.case.draws
    for generator in ('numpy', 'python'):  # nobody draws from them yet: seeded once, the same ever after
        assert differences(contents[2]['ranks'][0]['rng'][generator], contents[8]['ranks'][0]['rng'][generator]) == []


# ---- 4. data order ------------------------------------------------------------------------------------------------
def record(bench):
    return f"""
if kind == 'training':
    with open(f'seen{{rank}}', 'a') as file:
        file.write(json.dumps({bench.case.seen}.tolist()) + '\\n')
"""


def seen(bench, ranks=1):
    """All rows that the ranks were trained on, in global order; forgets them."""
    files = [bench.cwd / f'seen{rank}' for rank in range(ranks)]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for file in files:
        file.unlink()
    return [row for micro_steps in zip(*lines, strict=True) for rows in micro_steps for row in rows]


@pytest.mark.slots
@pytest.mark.parametrize('before, after', [(0, 2), (2, 0)])
def test_resume_with_another_number_of_ranks(bench, before, after):
    settings = dict(dropout=0, log_interval=1)
    expected = straight(bench, ranks=before, **settings)
    folder = stopped(bench, 4, ranks=before, **settings)
    run = go(bench, '--auto_resume', ranks=after, **settings).ok()
    for kind in ('loss', 'val loss'):
        assert losses(folder, kind) == pytest.approx(losses(expected, kind), abs=1e-5), kind
    reseeded = [line for line in run.out.splitlines() if 'seeded' in line and 'rank' in line]
    assert len(reseeded) == (after > before), run.out
    assert len(load(checkpoint(bench, 8))['ranks']) == max(1, after)


@pytest.mark.once
def test_generators_of_new_ranks_depend_on_seed_rank_and_step_alone(bench):
    for out in ('a', 'b'):
        stopped(bench, 4, out)
        go(bench, '--auto_resume', out=out, ranks=2).ok()
    same(bench, bench.cwd / 'a', 'b')
    rng = [state['rng'] for state in load(checkpoint(bench, 8, 'a'))['ranks']]
    assert all(differences(rng[0][name], rng[1][name]) for name in ('torch', 'numpy', 'python'))


# ---- 5. rotation ---------------------------------------------------------------------------------------------------
@pytest.mark.fenced
@pytest.mark.parametrize('keep, permanent, interval, last, kept', [
    (3, '', 1, 8, [6, 7, 8]),
    (2, '', 1, 8, [7, 8]),
    (1, '', 1, 8, [8]),
    (0, '', 1, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
    (2, '1,3,5', 2, 8, [1, 3, 5, 6, 8]),  # no multiples of the interval
    (1, '2,6', 2, 8, [2, 6, 8]),
    (3, '7', -1, 8, [7, 8]),
    (2, '', 1, 11, [10, 11]),             # as text 9 comes after 11
])
def test_rotation(bench, keep, permanent, interval, last, kept):
    settings = dict(keep_last_n_checkpoints=keep, checkpoint_interval=interval, max_steps=last)
    go(bench, **settings, **(dict(permanent_checkpoints=permanent) if permanent else {})).ok()
    assert steps(bench) == kept
    best = load(checkpoint(bench, 'best'))
    assert losses(bench.cwd / 'run', 'val loss')[best['step']] == min(losses(bench.cwd / 'run', 'val loss').values())


@pytest.mark.fenced
def test_rotation_beyond_five_digits(bench):
    settings = dict(keep_last_n_checkpoints=2, checkpoint_interval=1, max_steps=100001)
    stopped(bench, 8)
    content = load(checkpoint(bench, 8))
    for step in steps(bench):
        drop(checkpoint(bench, step))
    store(dict(content, step=99998), checkpoint(bench, 99998))
    run = go(bench, '--auto_resume', **settings).ok()
    assert 'step 99998' in run.out and steps(bench) == [100000, 100001]
    assert 'step 100001' in go(bench, '--auto_resume', **settings).ok().out


@pytest.mark.fenced
def test_rotation_leaves_foreign_files_alone_and_cleans_up_after_a_killed_save(bench):
    folder = stopped(bench, 4)
    third = bench.case.name(3)
    foreign = [bench.case.name(500).replace('500', '0500'), 'notes.txt', bench.case.name(2) + '.bak', 'x' + third, third + 'x', 'mine.tmp']
    assert foreign[0] != bench.case.name(500)
    for name in foreign:
        (folder / name).write_text('mine')
    (folder / (third + '.tmp')).write_text('half')
    run = go(bench, '--auto_resume', keep_last_n_checkpoints=2).ok()
    assert 'WARNING' not in run.out + run.err
    assert steps(bench) == [6, 8] and not (folder / (third + '.tmp')).exists()
    assert [name for name in foreign if (folder / name).read_text() == 'mine'] == foreign


@pytest.mark.fenced
def test_damaged_files_do_not_count_as_kept_ones(bench):
    folder = stopped(bench, 4)
    for step in (7, 8, 500):
        drop(checkpoint(bench, step))
        checkpoint(bench, step).write_bytes(b'damaged')
    settings = dict(keep_last_n_checkpoints=2)
    run = go(bench, '--auto_resume', prelude=kill_after(bench, 3), **settings)
    assert run.codes == [-9] and steps(bench) == [4, 6, 7, 8, 500]
    go(bench, '--auto_resume', **settings).ok()
    assert steps(bench) == [6, 7, 8, 500] and (folder / bench.case.name(7)).read_bytes() == b'damaged'
    same_final(bench, straight(bench))


def same_final(bench, expected):
    """As same, but for what lies in the folder beyond the last step."""
    for step in (8, 'best'):
        assert differences(load(checkpoint(bench, step, expected)), load(checkpoint(bench, step)), VOLATILE) == []
    assert clean_log(expected / bench.case.log) == clean_log(bench.cwd / 'run' / bench.case.log)


@pytest.mark.fenced
@pytest.mark.parametrize('keep', [1, 2])
def test_a_save_that_went_wrong_on_the_disk_does_not_cost_the_last_good_one(bench, keep):
    """keep 1 is kept as 2 until the newer one is proven readable."""
    spoil = f"""
import os
replace = os.replace
def spoiled(source, target):
    if str(target).endswith({bench.case.name(4)!r}):
        file = os.path.join(source, 'pytorch_model.bin') if os.path.isdir(source) else source
        os.truncate(file, os.path.getsize(file) // 2)
    replace(source, target)
os.replace = os.rename = spoiled
"""
    run = go(bench, prelude=spoil + kill_after(bench, 5), keep_last_n_checkpoints=keep)
    assert run.codes == [-9] and steps(bench) == [2, 4]
    run = go(bench, '--auto_resume', keep_last_n_checkpoints=keep).ok()
    assert 'WARNING' in run.out and bench.case.name(4) in run.out
    same(bench, straight(bench))


# ---- 6. how a run starts -------------------------------------------------------------------------------------------
class Attack:
    def __reduce__(self):
        return os.system, ('touch executed',)


def damage(path, how):
    if how == 'hostile':  # the pickle of an attack
        content = load(path)
        content['model']['more'] = Attack()
        return store(content, path)
    path = path / 'pytorch_model.bin' if path.is_dir() else path
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensor = max((archive.read(name) for name in archive.namelist() if '/data/' in name), key=len)
    middle = data.index(tensor) + len(tensor) // 2
    path.write_bytes(dict(
        truncated=data[:middle],
        short=data[:-1],
        flipped=data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:],  # torch.load reads it without complaint
        empty=b'',
        garbage=random.Random(0).randbytes(5000),
    )[how])
    if how == 'flipped':
        load(path)


@pytest.mark.fenced
@pytest.mark.parametrize('how', ['truncated', 'short', 'flipped', 'empty', 'garbage', 'hostile'])
def test_the_newest_checkpoint_that_reads_whole_is_used(bench, how):
    stopped(bench, 6)
    copy(checkpoint(bench, 6), checkpoint(bench, 7))
    damage(checkpoint(bench, 7), how)
    broken = raw(checkpoint(bench, 7))
    run = go(bench, '--auto_resume', ranks=0, keep_last_n_checkpoints=2).ok()
    warnings = [line for line in (run.out + run.err).splitlines() if 'WARNING' in line]
    assert len(warnings) == 1 and bench.case.name(7) in warnings[0]
    assert 'step 6/8' not in run.out and 'step 8/8' in run.out and raw(checkpoint(bench, 7)) == broken
    same(bench, straight(bench))
    assert not list(bench.cwd.glob('**/executed'))


@pytest.mark.fenced
def test_a_damaged_checkpoint_on_two_ranks(bench):
    stopped(bench, 8, ranks=2)
    damage(checkpoint(bench, 8), 'flipped')
    run = go(bench, '--auto_resume', ranks=2).ok()
    assert run.out.count('WARNING') == 1
    same(bench, straight(bench, ranks=2))


@pytest.mark.fenced
@pytest.mark.parametrize('ranks', [0, 2])
def test_all_checkpoints_damaged(bench, ranks):
    """All numbered ones: it goes on from the best; the best too: it begins anew."""
    stopped(bench, 8, ranks=ranks)
    for path in [*(checkpoint(bench, step) for step in steps(bench)), *(bench.cwd / 'run').glob('epoch_*'), *(bench.cwd / 'run').glob('final')]:
        damage(path, 'truncated')
    shutil.copytree(bench.cwd / 'run', bench.cwd / 'second')
    damage(bench.cwd / 'second' / bench.case.name('best'), 'truncated')
    for folder, best in ('run', True), ('second', False):
        run = go(bench, '--auto_resume', ranks=ranks, out=folder).ok()
        for step in (2, 4, 6, 8, *(() if best else ('best',))):
            assert re.search('WARNING.*' + re.escape(bench.case.name(step)), run.out)
        assert re.search(f'resumed from run/{bench.case.name("best")} at step' if best else 'random|scratch', run.out, re.IGNORECASE)
        same(bench, straight(bench, ranks=ranks), folder)


@pytest.mark.fenced
def test_a_fresh_start_in_a_used_folder_is_refused(bench):
    folder = stopped(bench, 4)
    before = tree(folder)
    assert '--auto_resume' in go(bench).one_line(2)
    assert '--auto_resume' in go(bench, ranks=2).one_line(2)
    assert tree(folder) == before


@pytest.mark.slots
@pytest.mark.parametrize('after, best', [(1, 0), (3, 2)])
def test_the_best_checkpoint_alone_is_a_run(bench, after, best):
    """Killed after an evaluation and before the first numbered checkpoint: what is there is not begun anew over it, and goes on to the bit."""
    settings = dict(checkpoint_interval=1000)
    assert go(bench, prelude=kill_after(bench, after), **settings).code == -9
    assert list(whole(bench)) == ['best']
    before = tree(bench.cwd / 'run')
    assert f'already holds a run ({bench.case.name("best")})' in go(bench, **settings).one_line(2)
    assert tree(bench.cwd / 'run') == before
    assert f'resumed from run/{bench.case.name("best")} at step {best}' in go(bench, '--auto_resume', **settings).ok().out
    same(bench, straight(bench, **settings))


@pytest.mark.fenced
def test_a_folder_in_which_a_run_is_at_work_is_refused(bench):
    """To a fresh start, before the first checkpoint, and to a resume; the run itself goes on as if nothing had been."""
    moments = 1, 5 * micro(bench, 0)
    run = start(bench, eval_interval=-1, prelude=hook(
        bench, f'if kind == "training" and trained in {moments}: print("STOPPED", trained, flush=True); os.kill(os.getpid(), signal.SIGSTOP)'))
    for verb, moment in zip(((), ('--auto_resume',)), moments, strict=True):
        run.wait_for(f'STOPPED {moment}\n')
        before = tree(bench.cwd / 'run')
        told = go(bench, *verb, eval_interval=-1).one_line(2)
        assert 'another process is training in it' in told or not verb and bench.case.script == 'finetune_dolly.py' and 'already holds a run' in told
        assert tree(bench.cwd / 'run') == before
        run.kill(signal.SIGCONT)
    assert run.wait() == [0]
    same(bench, straight(bench, eval_interval=-1))


@pytest.mark.fenced
def test_nothing_trained_is_no_run(bench):
    assert re.search(r'done: .*no checkpoints in run', go(bench, max_steps=0).ok().out)
    assert whole(bench) == {}
    go(bench).ok()
    same(bench, straight(bench))


@pytest.mark.slots
@pytest.mark.parametrize('verb', ['--auto_resume', '--resume'])
def test_resume_where_nothing_is_begins_and_else_continues(bench, verb):
    assert 'no checkpoint in run yet: a new run begins\n' in go(bench, verb).ok().out
    same(bench, straight(bench))
    for path in (bench.cwd / 'run').iterdir():
        if path.name != 'config.py':
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert 'run/config.py repeats the settings' in go(bench, verb).ok().out
    shutil.rmtree(bench.cwd / 'run')
    stopped(bench, 4)
    run = go(bench, verb).ok()
    assert 'step 4/8' not in run.out and 'step 6/8' in run.out
    same(bench, straight(bench))


@pytest.mark.fenced
def test_resume_from_an_explicit_step(bench):
    folder = stopped(bench, 8)
    later = {name: raw(folder / name) for name in map(bench.case.name, (6, 8, 'best'))}
    run = start(bench, '--resume', f'--checkpoint_path=run/{bench.case.name(4)}', prelude=kill_after(bench, 1))
    assert run.wait() == [-9]
    assert [line for line in run.out.splitlines() if '.old' in line and all(name in line for name in later)], run.out
    assert run.out.count('.old') == 1 and steps(bench) == [2, 4] and not checkpoint(bench, 'best').exists()
    go(bench, '--auto_resume').ok()
    assert {name: raw(folder / (name + '.old')) for name in later} == later
    same(bench, straight(bench))
    # again, in one piece and without naming the folder: what was set aside before gives way
    run = bench.launcher.run(bench.case.script, ['--resume', f'--checkpoint_path=run/{bench.case.name(2)}'], cwd=bench.cwd).ok()
    assert bench.case.name(4) + '.old' in os.listdir(folder)
    same(bench, straight(bench))


@pytest.mark.fenced
def test_resume_from_a_checkpoint_into_another_folder(bench):
    stopped(bench, 4, 'first')
    before = tree(bench.cwd / 'first')
    go(bench, '--resume', f'--checkpoint_path=first/{bench.case.name(4)}').ok()
    assert tree(bench.cwd / 'first') == before
    assert differences(load(checkpoint(bench, 8)), load(checkpoint(bench, 8, straight(bench))), VOLATILE) == []
    stopped(bench, 4, 'third')
    err = go(bench, '--resume', f'--checkpoint_path=first/{bench.case.name(4)}', out='third').one_line(2)
    assert 'third' in err and tree(bench.cwd / 'third') == before


@pytest.mark.parametrize('ranks', [0, 2])
def test_a_missing_checkpoint_names_one_that_exists(bench, ranks):
    stopped(bench, 4, 'logs')
    if bench.case.lenient:
        run = go(bench, '--resume', f'--checkpoint_path=log/{bench.case.name(4)}', ranks=ranks).ok()
        assert re.search(f'WARNING: log/{bench.case.name(4)} does not exist; there is .*logs/{bench.case.name(4)}', run.out), run.out
        assert f'weights from logs/{bench.case.name(4)}' in run.out  # the next link of the chain
        return
    err = go(bench, '--resume', f'--checkpoint_path=log/{bench.case.name(4)}', ranks=ranks).one_line(2)
    assert f'logs/{bench.case.name(4)}' in err
    err = go(bench, '--resume', f'--checkpoint_path=logs/{bench.case.name(5)}', ranks=ranks).one_line(2)
    assert f'logs/{bench.case.name(4)}' in err and not (bench.cwd / 'run').exists()
    err = go(bench, '--resume', '--checkpoint_path=logs', ranks=ranks).one_line(2)
    assert 'cannot be read as a checkpoint' in err and '; there is logs/' in err and bench.case.name(4) in err


@pytest.mark.once
def test_checkpoint_path_without_a_verb(bench):
    stopped(bench, 4, 'logs')
    assert '--resume' in go(bench, f'--checkpoint_path=logs/{bench.case.name(4)}').one_line(2)
    assert not (bench.cwd / 'run').exists()


@pytest.mark.parametrize('verb', ['--eval_only', '--generate=He', '--eval_only --auto_resume', '--generate=He --resume'])
def test_evaluating_and_sampling_start_no_run(bench, verb):
    if 'generate' in verb and not bench.case.sampler:
        pytest.skip('does not sample')
    go(bench, *verb.split()).one_line(2)
    assert not (bench.cwd / 'run').exists()
    (bench.cwd / 'run').mkdir()
    go(bench, *verb.split()).one_line(2)
    assert tree(bench.cwd / 'run') == {}
    (bench.cwd / 'run').rmdir()
    folder = stopped(bench, 6)
    before = tree(folder)
    for ranks in (0, 2):
        run = go(bench, *verb.split(), ranks=ranks).ok()
        after = tree(folder)
        found = json.loads(after.pop('eval.json', b'{}'))
        assert after == before
        assert f'checkpoint run/{bench.case.name(6)}\n' in run.out
        if 'eval_only' in verb:
            assert found.keys() == bench.case.eval_json and found['step'] == 6
            assert found['val_loss'] == pytest.approx(losses(straight(bench), 'val loss')[6], abs=1e-4)
        else:
            assert not found and 'loss' not in run.out


def test_an_evaluation_by_path_writes_beside_its_checkpoint(bench):
    """Another run's folder, typed or default, is none of its business."""
    folder = stopped(bench, 6, 'a/b')
    found = []
    for step in (2, 6):
        go(bench, '--eval_only', f'--checkpoint_path=a/b/{bench.case.name(step)}').ok()
        found.append(json.loads((folder / 'eval.json').read_text()))
        assert found[-1]['val_loss'] == pytest.approx(losses(straight(bench), 'val loss')[step], abs=1e-4)
    assert [f['step'] for f in found] == [2, 6] and not (bench.cwd / 'run').exists()


@pytest.mark.slots
@pytest.mark.parametrize('form', ['{"model": weights}', 'weights'])
def test_a_file_of_weights_alone(bench, form):
    stored = load(checkpoint(bench, 8, straight(bench)))
    weights = dict(stored['model'], **stored.get('ema', {}))
    torch.save({'model': weights} if 'model' in form else weights, bench.cwd / 'weights.pt')
    run = go(bench, '--resume', '--checkpoint_path=weights.pt').ok()
    assert re.search('WARNING.*weights', run.out)
    begun, ended = losses(bench.cwd / 'run', 'val loss'), losses(straight(bench), 'val loss')
    assert begun[0] == ended[8] and load(checkpoint(bench, 2))['step'] == 2


def test_the_command_line_beats_the_stored_settings(bench):
    stopped(bench, 4)
    changes = dict(max_lr=2e-3, weight_decay=0.3, beta1=0.8, beta2=0.9)
    changes = {name: value for name, value in changes.items() if name not in bench.case.without}
    stored = load(checkpoint(bench, 4))['config']
    run = go(bench, '--auto_resume', **changes).ok()
    for name, value in changes.items():
        name = bench.case.names.get(name, name)
        assert re.search(rf'\b{name}\b.*{re.escape(str(stored[name]))} -> {re.escape(str(value))}', run.out), run.out
    assert run.out.count(' -> ') == len(changes)
    for step in (6, 8):
        content = load(checkpoint(bench, step))
        groups = content['optimizer']['param_groups']
        assert sorted({group['weight_decay'] for group in groups}) == bench.case.decays
        assert {tuple(group['betas']) for group in groups} == {(0.8, 0.9)}
        assert all(content['config'][bench.case.names.get(name, name)] == value for name, value in changes.items())
    assert groups[0]['lr'] <= 2e-3
    same_until = [line for line in clean_log(bench.cwd / 'run' / bench.case.log) if re.match(r'step [0-4]/', line)]
    assert same_until == [line for line in clean_log(straight(bench) / bench.case.log) if re.match(r'step [0-4]/', line)]


@pytest.mark.once
def test_typed_settings_come_back_without_being_typed_again(bench):
    stopped(bench, 4)
    run = go(bench, '--auto_resume', bare=True).ok()
    assert ' -> ' not in run.out
    same(bench, straight(bench))
    # and those typed on a resume are remembered too
    shutil.rmtree(bench.cwd / 'run')
    stopped(bench, 4)
    go(bench, '--auto_resume', bare=True, weight_decay=0.3, prelude=kill_after(bench, 3))
    assert steps(bench)[-1] == 6
    assert ' -> ' not in go(bench, '--auto_resume', bare=True).ok().out
    assert load(checkpoint(bench, 8))['config'][bench.case.names.get('weight_decay', 'weight_decay')] == 0.3


def test_a_changed_shape_is_refused_by_name(bench):
    folder = stopped(bench, 4)
    before = tree(folder)
    for name, value in bench.case.shape.items():
        assert re.search(rf'\b{name}\b.*\b{value}\b', go(bench, '--auto_resume', **{name: value}).one_line(2))
    assert name in go(bench, '--auto_resume', ranks=2, **{name: value}).one_line(2)
    assert tree(folder) == before


OTHER_FOLDER = "import os; os.environ['RANK'] == '1' and os.chdir('other')"


@pytest.mark.parametrize('missing', [False, True])
def test_ranks_that_see_other_data_end(bench, missing):
    """Rank 1 looks into another folder, as on a node that lacks a shard, or all of them. (Nobody kills the waiting rank here, as none does on another node.)"""
    shutil.copytree(bench.cwd / 'data', bench.cwd / 'other/data')
    if missing:
        shutil.rmtree(bench.cwd / 'other/data')
    else:
        bench.case.change(bench.cwd / 'other/data')
    told = go(bench, ranks=2, prelude=OTHER_FOLDER).one_line(2)
    assert ('must be the same on all nodes' in told) != missing and 'data' in told and not (bench.cwd / 'run').exists()


@pytest.mark.slots
@pytest.mark.parametrize('fits', [True, False])
def test_ranks_that_see_another_checkpoint_end(bench, fits):
    """Of the same name and step, with the same shapes: without a word each rank would train on weights, averages or moments of its own. Or it fits on one
    rank alone. In both cases nothing has been set aside."""
    stopped(bench, 8)
    shutil.copytree(bench.cwd / 'data', bench.cwd / 'other/data')
    shutil.copytree(bench.cwd / 'run', bench.cwd / 'other/run')
    content = load(checkpoint(bench, 4, 'other/run'))
    name = next(name for name, tensor in content['model'].items() if tensor.is_floating_point() and tensor.numel() > 4)
    if fits:
        content['model'][name].view(-1)[3] += 1e-6
    else:
        content['model'][name] = content['model'][name].repeat(2, *[1] * (content['model'][name].dim() - 1))
    drop(checkpoint(bench, 4, 'other/run'))
    store(content, checkpoint(bench, 4, 'other/run'))
    before = tree(bench.cwd / 'run')
    run = go(bench, '--resume', f'--checkpoint_path=run/{bench.case.name(4)}', ranks=2, prelude=OTHER_FOLDER)
    assert ('the ranks found different checkpoints' if fits else f'run/{bench.case.name(4)} does not fit: ') in run.one_line(2)
    assert tree(bench.cwd / 'run') == before


def test_changed_data_are_refused_with_a_sentence(bench):
    folder = stopped(bench, 4)
    before = tree(folder)
    (bench.cwd / 'data').unlink()
    shutil.copytree(bench.home.folder / 'data', bench.cwd / 'data')
    bench.case.change(bench.cwd / 'data')
    assert re.search('data.*changed', go(bench, '--auto_resume').one_line(2))
    assert tree(folder) == before


@pytest.mark.once
def test_a_checkpoint_beyond_max_steps(bench):
    folder = stopped(bench, 6)
    before = tree(folder)
    assert 'max_steps' in go(bench, '--auto_resume', max_steps=4).one_line(2)
    assert tree(folder) == before


# ---- 7. not a number -----------------------------------------------------------------------------------------------
@pytest.mark.slots
@pytest.mark.parametrize('ranks', [0, 2])
@pytest.mark.parametrize('poison', [
    'result = result + math.nan',                              # the loss alone, its gradients are good
    'result = result + math.inf',
    'result.register_hook(lambda g: g * math.inf)',            # gradients alone
    'result.register_hook(lambda g: g * math.nan)',
])
def test_not_a_number_on_one_rank_stops_all(bench, ranks, poison):
    last = max(0, ranks - 1)
    body = f'if kind == "training" and rank == {last} and trained == {2 * micro(bench, ranks) + 1}: {poison}'
    run = go(bench, ranks=ranks, prelude=hook(bench, body))
    assert re.search(r'\bstep 3\b', run.one_line(1))
    contents = whole(bench)
    assert sorted(contents, key=str) == [2, 'best']
    for content in contents.values():
        all_finite(content)
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))


# ---- 8. signals ----------------------------------------------------------------------------------------------------
PHASES = {  # (when it pauses, newest checkpoint that must be there then)
    'training': ('kind == "training" and trained == 3 * MICRO + 1', 3),
    'first step': ('kind == "training" and trained == 1', 0),
    'evaluation': ('kind == "evaluation" and trained == 4 * MICRO', 4),
    'first evaluation': ('kind == "evaluation"', 0),
    'sampling': ('kind == "sampling" and trained == 4 * MICRO', 4),
    'last evaluation': ('kind == "evaluation" and trained == 8 * MICRO', 8),
}
IN_A_SAVE = """
def slow(function):
    def call(source, target):
        if str(target).endswith(NAME):
            pause()
        return function(source, target)
    return call
os.replace = os.rename = slow(os.replace)
"""


def paused(bench, phase, ranks):
    if phase.startswith('saving'):
        step = 'best' if 'best' in phase else 4
        return hook(bench, 'pass') + IN_A_SAVE.replace('NAME', repr(bench.case.name(step))), 0 if step == 'best' else 4
    condition, newest = PHASES[phase]
    return hook(bench, f'if {condition.replace("MICRO", str(micro(bench, ranks)))}: pause()'), newest


@pytest.mark.slots
@pytest.mark.parametrize('phase, number, ranks, to', [
    *((phase, signal.SIGTERM, 0, 0) for phase in [*PHASES, 'saving', 'saving best']),
    *((phase, signal.SIGINT, 0, 0) for phase in ('training', 'sampling', 'saving')),
    *(pytest.param(phase, number, 2, to, marks=pytest.mark.fenced) for number, to, phases in (
        (signal.SIGTERM, 0, ('training', 'sampling')), (signal.SIGTERM, 1, ('training', 'evaluation', 'saving')),
        (signal.SIGINT, None, ('training', 'evaluation', 'first evaluation', 'saving'))) for phase in phases),
])
def test_signal(bench, phase, number, ranks, to):
    if phase == 'sampling' and not bench.case.sampler:
        pytest.skip('does not sample')
    prelude, newest = paused(bench, phase, ranks)
    run = start(bench, ranks=ranks, prelude=prelude)
    run.wait_for('HERE')
    run.kill(number, to)
    sent = time.time()
    assert set(run.wait()) == {128 + number}, f'{run.codes}\n{run.out}\n{run.err}'
    assert time.time() - sent < 10 and run.err == ''
    assert steps(bench)[-1] == newest
    whole(bench)
    if 'evaluation' in phase:
        assert f'step {newest}/8 | val loss' not in run.out  # it was left, not waited for
    go(bench, '--auto_resume', ranks=ranks).ok()
    # after the last update the learning rate in the optimizer is what was left there: nothing reads it
    same(bench, straight(bench, ranks=ranks), ignore=['lr'] if phase == 'last evaluation' else [])


@pytest.mark.once
def test_signals_one_after_the_other(bench):
    """Stopped in a step, at once after the resume, and in the evaluation of the step after that."""
    for phase in ('training', 'first step', 'first evaluation', 'first step'):
        prelude, _ = paused(bench, phase, 0)
        run = start(bench, '--auto_resume', prelude=prelude)
        run.wait_for('HERE')
        run.kill(signal.SIGTERM)
        assert run.wait() == [143]
    assert steps(bench)[-1] == 4
    go(bench, '--auto_resume').ok()
    same(bench, straight(bench))


@pytest.mark.fenced
def test_a_signal_in_the_first_step_after_a_resume_into_another_folder(bench):
    stopped(bench, 4, 'first')
    prelude, _ = paused(bench, 'first step', 0)
    run = start(bench, '--resume', f'--checkpoint_path=first/{bench.case.name(4)}', prelude=prelude)
    run.wait_for('HERE')
    run.kill(signal.SIGTERM)
    assert run.wait() == [143] and steps(bench) == [4]
    go(bench, '--auto_resume').ok()
    assert differences(load(checkpoint(bench, 8)), load(checkpoint(bench, 8, straight(bench))), VOLATILE) == []


@pytest.mark.once
def test_a_second_signal_ends_at_once(bench):
    run = start(bench, prelude=hook(bench, 'if trained == 5: pause(20)'))
    run.wait_for('HERE')
    run.kill(signal.SIGINT)
    time.sleep(0.1)
    run.kill(signal.SIGINT)
    sent = time.time()
    assert run.wait()[0] in (-signal.SIGINT, 130) and time.time() - sent < 5
    go(bench, '--auto_resume').ok()
    same(bench, straight(bench))


@pytest.mark.slots
@pytest.mark.parametrize('verb', ['--eval_only', '--generate=He'])
def test_a_signal_while_evaluating_alone(bench, verb):
    if 'generate' in verb and not bench.case.sampler:
        pytest.skip('does not sample')
    folder = stopped(bench, 6)
    before = tree(folder)
    run = start(bench, verb, '--num_samples=5' if 'generate' in verb else '--seed=1', prelude=hook(bench, 'pause()'))
    run.wait_for('HERE')
    run.kill(signal.SIGTERM)
    assert run.wait() == [143] and tree(folder) == before


# ---- 9. looking does not change ------------------------------------------------------------------------------------
@pytest.mark.slots
@pytest.mark.parametrize('ranks', [0, 2])
def test_intervals_do_not_change_the_training(bench, ranks):
    names = ('eval_interval', 'generate_interval', 'checkpoint_interval')
    busy = straight(bench, ranks=ranks, log_interval=1, **dict.fromkeys(names, 1))
    idle = straight(bench, ranks=ranks, log_interval=1000, **dict.fromkeys(names, -1))
    assert steps(bench, idle) == [8]
    log = (idle / bench.case.log).read_text()
    assert log.count('val loss') == 2 + bench.case.at_start and '# ' in log and len((busy / bench.case.log).read_text().splitlines()) > 30
    for folder in (idle, straight(bench, ranks=ranks)):
        a, b = load(checkpoint(bench, 8, busy)), load(checkpoint(bench, 8, folder))
        for part in ('model', 'optimizer', 'scaler', 'train_loader_state', 'ranks', 'val_loss'):
            assert differences(a[part], b[part]) == [], part


# ---- 10. any number of processes is the same training -----------------------------------------------------------------
def key_bias(where):
    """Their gradient is zero but for rounding, and Adam makes steps out of it."""
    return where.endswith('c_attn.bias')


def farthest(a, b):
    """The largest relative distance between two dicts of tensors, by name; of queries' and values' biases alone."""
    def distance(name):
        x, y = a[name].double(), b[name].double()
        if key_bias(name):
            x, y = (torch.cat((t.chunk(3)[0], t.chunk(3)[2])) for t in (x, y))
        return ((x - y).norm() / x.norm()).item()
    assert a.keys() == b.keys()
    return max((distance(name), name) for name in a)


@pytest.mark.slots
@pytest.mark.parametrize('dtype, near', [pytest.param('float32', 1e-5, marks=pytest.mark.long), ('float64', 1e-6)])
def test_ranks_and_micro_batches_do_not_change_the_training(bench, dtype, near):
    prelude, found = f'import torch; torch.set_default_dtype(torch.{dtype})\n' + hook(bench, record(bench)), []
    if dtype not in bench.case.ways:
        pytest.skip('parts of the model are float32 whatever the dtype')
    for ranks, size in bench.case.ways[dtype]:
        out = f'ranks{ranks}size{size}'
        run = go(bench, out=out, ranks=ranks, dropout=0, log_interval=1, checkpoint_interval=1, keep_last_n_checkpoints=0, prelude=prelude,
                 **{bench.case.slicing: size}).ok()
        weights = {name: tensor for name, tensor in load(checkpoint(bench, 8, out))['model'].items() if tensor.is_floating_point()}
        assert all(tensor.dtype == getattr(torch, dtype) for tensor in weights.values()), run.out
        state = load(checkpoint(bench, 1, out))['optimizer']['state']  # Adam's first moment is a tenth of the first gradient
        gradients = {name: state[name]['exp_avg'] for name in weights if name in state}  # buffers have none
        assert len(gradients) > 5 and all(gradients[name].shape == weights[name].shape for name in gradients)
        found.append((losses(bench.cwd / out), losses(bench.cwd / out, 'val loss'), gradients, weights, seen(bench, max(1, ranks))))
        for kind, rounding in ((0, 1.1e-6), (1, 1.1e-4)):  # as printed
            assert found[-1][kind] == pytest.approx(found[0][kind], rel=1e-6, abs=rounding), out
        assert len(found[-1][0]) == 8 and len(found[-1][1]) == 5
        assert farthest(found[0][2], found[-1][2]) < (1e-5, ''), out
        assert farthest(found[0][3], found[-1][3]) < (near, ''), out
        assert found[-1][4] == found[0][4], f'{out}: other rows, or in another order'


# ---- 3 (a full disk) -----------------------------------------------------------------------------------------------
def says_no_space(run, path):
    err = run.one_line(1)
    assert path in err and re.search(r'[\d,]{4,} bytes free', err), err


@pytest.mark.fenced
@pytest.mark.parametrize('ranks', [0, 2])
def test_disk_full_while_saving(bench, ranks):
    """The temporary file is /dev/full: every write to it fails as on a full disk."""
    redirect = f"""
import builtins
real_open = builtins.open
def full(path, *args, **kwargs):
    return real_open('/dev/full' if {bench.case.name(4) + '.tmp'!r} in str(path) else path, *args, **kwargs)
builtins.open = full
"""
    run = go(bench, ranks=ranks, prelude=redirect)
    says_no_space(run, f'run/{bench.case.name(4)}')
    assert steps(bench) == [2] and not list((bench.cwd / 'run').glob('*.tmp'))
    whole(bench)
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))


@pytest.mark.fenced
@pytest.mark.parametrize('ranks', [0, 2])
def test_a_file_that_cannot_grow(bench, ranks):
    """The limit cuts the checkpoint off in its middle."""
    expected = straight(bench, ranks=ranks)
    path = checkpoint(bench, 2, expected)
    limit = path.stat().st_size - 30000 if path.is_file() else max(file.stat().st_size for file in path.iterdir()) - 1000
    folder = stopped(bench, 4, ranks=ranks)
    (folder / bench.case.log).rename(bench.cwd / 'log')  # it does get longer
    before = tree(folder)
    shutil.copy(bench.cwd / 'log', folder / bench.case.log)
    run = go(bench, '--auto_resume', ranks=ranks, files_limit=limit)
    says_no_space(run, bench.case.name('best') if bench.case.name('best') in run.err else bench.case.name(6))
    after = tree(folder)
    assert after.pop(bench.case.log) and after == before
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, expected)


@pytest.mark.once
@pytest.mark.parametrize('ranks', [0, 2])
def test_disk_full_while_logging(bench, ranks):
    folder = stopped(bench, 4, ranks=ranks)
    log = folder / bench.case.log
    log.rename(bench.cwd / 'kept')
    before = tree(folder)
    log.symlink_to('/dev/full')
    run = go(bench, '--auto_resume', ranks=ranks)
    says_no_space(run, f'run/{bench.case.log}')
    log.unlink()
    assert {name: data for name, data in tree(folder).items() if name in before} == before
    (bench.cwd / 'kept').rename(log)
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))


@pytest.mark.once
@pytest.mark.parametrize('ranks', [0, 2])
def test_disk_full_while_an_evaluation_is_written(bench, ranks):
    """All ranks end: none says that it wrote eval.json, none is left waiting."""
    folder = stopped(bench, 6)
    before = tree(folder)
    redirect = """
import builtins
real_open = builtins.open
builtins.open = lambda path, *args, **kwargs: real_open('/dev/full' if str(path).endswith('eval.json.tmp') else path, *args, **kwargs)
"""
    run = go(bench, '--eval_only', ranks=ranks, prelude=redirect)
    says_no_space(run, 'run/eval.json')
    assert 'wrote' not in run.out and tree(folder) == before


@pytest.mark.once
@pytest.mark.parametrize('ranks', [0, 2])
def test_a_folder_that_cannot_be_written(bench, ranks):
    (bench.cwd / 'file').write_text('mine')
    for out in ('file', 'file/run', '/proc/run'):
        assert out in go(bench, out=out, ranks=ranks).one_line(2)
    assert (bench.cwd / 'file').read_text() == 'mine'


# ---- 12. the network -----------------------------------------------------------------------------------------------
NO_NETWORK = """
import socket
def loopback(host):
    return host in (None, '', b'', 'localhost', 'ip6-localhost', '::1', socket.gethostname()) or str(host).startswith('127.')
def guarded(function, host_of):
    def call(*args, **kwargs):
        host = host_of(args)
        if not loopback(host):
            with open('touched', 'a') as file:
                file.write(f'{host}\\n')
            raise OSError('there is no network in this test')
        return function(*args, **kwargs)
    return call
address = lambda args: args[1][0] if isinstance(args[1], tuple) else None
for name in ('connect', 'connect_ex'):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name), address))
for name in ('getaddrinfo', 'gethostbyname'):
    setattr(socket, name, guarded(getattr(socket, name), lambda args: args[0]))
"""


@pytest.mark.slots
def test_nothing_touches_the_network(bench):
    shutil.copytree(bench.home.folder / 'data', bench.cwd / 'foreign')
    bench.case.foreign(bench.cwd / 'foreign')
    common = dict(prelude=NO_NETWORK, env=dict(TIKTOKEN_CACHE_DIR=str(bench.cwd / 'none')))
    go(bench, **common).ok()
    same(bench, straight(bench))
    for verb in ('--eval_only', '--auto_resume', *(['--generate=He'] if bench.case.sampler else [])):
        go(bench, verb, **common).ok()
    go(bench, out='two', ranks=2, **common).ok()
    if bench.case.sampler:
        run = go(bench, out='foreign_run', data_root='foreign', max_steps=4, **common).ok()
        assert 'no samples' in run.out
        go(bench, '--generate=He', out='foreign_run', data_root='foreign', **common).one_line(2)
    assert not (bench.cwd / 'touched').exists(), (bench.cwd / 'touched').read_text()


# ---- torchrun, for real ----------------------------------------------------------------------------------------------
@pytest.mark.once
def test_torchrun(bench):
    """A worker is killed in the middle, the launcher begins again. And a mistake is told once, not by each rank."""
    expected = straight(bench, ranks=2)
    (bench.cwd / 'site').mkdir()
    (bench.cwd / 'site' / 'sitecustomize.py').write_text(f"""
import os, signal, threading, time
def wait():
    while not os.path.exists('run/{bench.case.name(4)}'):
        time.sleep(0.001)
    open('killed', 'w').close()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':
    threading.Thread(target=wait, daemon=True).start()
""")
    env = dict(os.environ, OMP_NUM_THREADS='1')
    killing = dict(env, PYTHONPATH=str(bench.cwd / 'site'))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    script = str(ROOT / bench.case.script)
    commands = ([*torchrun, '--max_restarts=2', script, *words(bench.case, ['--auto_resume'])],
                [*torchrun, script, *words(bench.case, ['--max_lrr=1'], out='other')])
    launched = [subprocess.Popen(command, cwd=bench.cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                for command, own in zip(commands, (killing, env), strict=True)]
    outs = [process.communicate(timeout=120)[0] for process in launched]
    assert launched[0].returncode == 0 and (bench.cwd / 'killed').exists(), outs[0]
    assert 'step 4' in outs[0] and outs[0].count('resumed from') == 1
    same(bench, expected)
    assert launched[1].returncode and outs[1].count('unknown setting --max_lrr') == 1, outs[1]
    assert 'exitcode  : 2' in outs[1] and not (bench.cwd / 'other').exists()


# ---- config.py and wandb ---------------------------------------------------------------------------------------------
def test_the_settings_file_repeats_the_run(bench):
    folder = stopped(bench, 8, 'first')
    case = bench.case
    bench.launcher.run(case.script, [f'first/{"config.py"}', f'--{case.folder}=run'], cwd=bench.cwd).ok()
    same(bench, straight(bench))
    assert (folder / 'config.py').read_text().replace(f"{case.folder} = 'run'", '') == \
        (bench.cwd / 'run' / 'config.py').read_text().replace(f"{case.folder} = 'run'", '')
    go(bench, '--no_save_config', out='none').ok()
    assert not (bench.cwd / 'none' / 'config.py').exists() and steps(bench, 'none')


WANDB = """
import atexit, json, os, sys, types
def init(**settings):
    with open('wandb.jsonl', 'a') as file:
        file.write(json.dumps(dict(rank=os.environ.get('RANK', '0'), id=settings.get('id'), project=settings.get('project'))) + '\\n')
    def log(values, step=None):
        with open('wandb.jsonl', 'a') as file:
            file.write(json.dumps(dict(step=step, **values)) + '\\n')
    return types.SimpleNamespace(id=settings.get('id') or 'abc123', log=log, finish=lambda *args, **kwargs: None)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'wandb':
            with open('imported', 'a') as file:
                file.write(os.environ.get('RANK', '0'))
            sys.modules['made'] = types.ModuleType('wandb')
            sys.modules['made'].init = init
            from importlib.machinery import ModuleSpec
            return ModuleSpec('wandb', self)
    def create_module(self, spec): return sys.modules['made']
    def exec_module(self, module): pass
sys.modules.pop('wandb', None)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.once
@pytest.mark.parametrize('ranks', [0, 2])
def test_wandb(bench, ranks):
    go(bench, ranks=ranks, prelude=WANDB, out='without').ok()
    assert not (bench.cwd / 'imported').exists()
    assert go(bench, '--wandb_log', '--wandb_project=mine', ranks=ranks, prelude=WANDB + kill_after(bench, 5, ranks)).codes[0] == -9
    assert steps(bench)[-1] == 4
    go(bench, '--auto_resume', '--wandb_log', ranks=ranks, prelude=WANDB).ok()
    lines = [json.loads(line) for line in (bench.cwd / 'wandb.jsonl').read_text().splitlines()]
    assert [line for line in lines if 'rank' in line] == [dict(rank='0', id=i, project='mine') for i in (None, 'abc123')]
    assert any(line.get('step') == 6 for line in lines) and (bench.cwd / 'imported').read_text() == '00'
    same(bench, straight(bench, ranks=ranks), ignore=['wandb_id'])


@pytest.mark.once
def test_wandb_that_is_not_installed(bench):
    if importlib.util.find_spec('wandb'):
        prelude = "import sys; sys.modules['wandb'] = None"
    else:
        prelude = ''
    assert 'wandb' in go(bench, '--wandb_log', prelude=prelude).one_line(2)


@pytest.mark.slots
def test_a_signal_in_the_evaluation_of_the_last_step(bench):
    """No update follows the resume, and still all of its checkpoint is that of the straight run."""
    last = 8 * micro(bench, 0)
    run = start(bench, prelude=hook(bench, f'if kind == "evaluation" and trained == {last}: pause(0.5)'))
    run.wait_for('HERE')
    run.kill(signal.SIGTERM)
    assert run.wait() == [143] and steps(bench)[-1] == 8
    go(bench, '--auto_resume').ok()
    same(bench, straight(bench))
