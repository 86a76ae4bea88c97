"""The reliability contract, one promise a test: stopped by anything at any moment, continued bit for bit.

    python -m pytest tests/test_reliability.py --kills=50      (the long form; 5 kills without it)

A script is one entry of SCRIPTS. A test knows it by its command line, its files and what it prints; where
a run must be hurt at a certain place, the forward that computes the loss is wrapped from outside (hook).
"""
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

import numpy as np
import pytest
import torch
from harness import KILL_AT, ROOT, VOLATILE, clean_log, copy, differences, drop, load, make_text_data, store

# args      8 steps, evaluation and checkpoint every 2, a sample every 4, dropout where there is one
# micro     micro-steps of a step on one rank, divisible by 2, 3 and 4
# folder    the setting that names the folder of a run; log: the name of the log in it
# data      makes the data in a folder; change: changes them so that a resume must refuse
# name      file name of the checkpoint of a step, or of 'best'
# model     'module.Class' whose forward computes the loss; seen: the rows, out of its arguments
# shape     what cannot change on resume
# variants  other settings under which a resume must be exact, with several epochs in 8 steps
# slices    (ranks, settings) that are the same training; the first is the reference
SCRIPTS = dict(
    train_gpt2=dict(
        args=dict(data_root='data', block_size=8, n_layer=1, n_head=2, n_embd=16, batch_size=2,
                  total_batch_size=192, max_steps=8, warmup_steps=2, max_lr=1e-2, val_tokens=256,
                  eval_interval=2, checkpoint_interval=2, generate_interval=4, max_new_tokens=4,
                  log_interval=3, dropout=0.1),
        micro=12,
        folder='log_dir',
        log='log.txt',
        data=make_text_data,
        few=lambda folder: make_text_data(folder, tokens=250),
        change=lambda folder: shutil.copy(folder / 'x_train_000001.bin', folder / 'x_train_000003.bin'),
        name=lambda step: 'model_best.pt' if step == 'best' else f'model_{step:05d}.pt',
        model='model.GPT',
        seen='args[1]',
        shape=dict(n_embd=32, n_layer=2, block_size=16, activation='gelu', optimizer='muon'),
        variants=[dict(optimizer='muon', num_workers=0),
                  dict(dynamic_seq_length=True, min_seq_length=4, max_seq_length=8, num_workers=5)],
        slices=[(0, {}), (2, {}), (4, {}), (2, dict(batch_size=4)), (0, dict(batch_size=8))],
        tokens_of_gpt2=lambda folder: (folder / 'manifest.json').unlink(),
    ),
)

# ---- a bench: a script, a folder to run it in, finished runs to compare with -------------------------------
@pytest.fixture(scope='module', params=SCRIPTS)
def case(request, tmp_path_factory):
    home, entry = tmp_path_factory.mktemp('home'), SCRIPTS[request.param]
    for name in ('data', 'few'):
        entry[name](home / name)
    return SimpleNamespace(script=f'{request.param}.py', home=home, finished={}, **entry)

@pytest.fixture
def bench(case, launcher, tmp_path):
    return bench_in(tmp_path, case, launcher)

def bench_in(folder, case, launcher):
    for name in ('data', 'few'):
        (folder / name).symlink_to(case.home / name)
    return SimpleNamespace(case=case, launcher=launcher, cwd=folder)

def words(case, verbs=(), out='run', bare=False, **settings):
    """The command line: the tiny settings and these; bare = these alone."""
    settings = {**({} if bare else case.args), **settings, case.folder: out}
    return [*verbs, *(f'--{name}={value}' for name, value in settings.items())]

def start(bench, *verbs, ranks=0, prelude='', env=None, **settings):
    args = words(bench.case, verbs, **settings)
    return bench.launcher.start(bench.case.script, args, bench.cwd, ranks, prelude, env)

def go(bench, *verbs, **kwargs):
    run = start(bench, *verbs, **kwargs)
    run.wait()
    return run

def straight(bench, ranks=0, **kwargs):
    """The folder of a run in one piece, made once for all tests. Nobody may write into it."""
    key, finished = repr((ranks, sorted(kwargs.items()))), bench.case.finished
    if key not in finished:
        folder, begun = bench.case.home / f'straight{len(finished)}', time.time()
        folder.mkdir()
        run = start(bench_in(folder, bench.case, bench.launcher), ranks=ranks, **kwargs)
        run.wait_for('# run')
        at_work = time.time()
        assert set(run.wait()) == {0}, f'{run.out}\n{run.err}'
        finished[key] = folder / 'run', at_work - begun, time.time() - at_work
    folder, bench.start_seconds, bench.seconds = finished[key]
    return folder

def stopped(bench, step, out='run', **kwargs):
    """A folder as if the straight run had been killed when it had saved `step`, longer log and all."""
    shutil.copytree(straight(bench, **kwargs), bench.cwd / out)
    for later in steps(bench, out):
        if later > step:
            drop(checkpoint(bench, later, out))
    return bench.cwd / out

def checkpoint(bench, step, folder='run'):
    return bench.cwd / folder / bench.case.name(step)

def steps(bench, folder='run'):
    """Steps of the checkpoints in a folder."""
    names = [path.name for path in (bench.cwd / folder).glob('*')]
    found = [(int(digits), name) for name in names for digits in re.findall(r'\d+', name)]
    return sorted(step for step, name in found if bench.case.name(step) == name)

def whole(bench, folder='run'):
    """Every file with a final name reads whole; their contents by step."""
    best = ['best'] if checkpoint(bench, 'best', folder).exists() else []
    found = [*steps(bench, folder), *best]
    for file in [file for step in found for file in files(checkpoint(bench, step, folder))]:
        assert file.suffix == '.json' or zipfile.ZipFile(file).testzip() is None, file
    return {step: load(checkpoint(bench, step, folder)) for step in found}

def same(bench, expected, folder='run', ignore=()):
    """Both runs ended with the same weights, optimizer, generators, bests and log."""
    for step in (steps(bench, expected)[-1], 'best'):
        a, b = load(checkpoint(bench, step, expected)), load(checkpoint(bench, step, folder))
        assert differences(a, b, (*VOLATILE, *ignore)) == [], step
    ours, theirs = (clean_log(bench.cwd / path / bench.case.log) for path in (folder, expected))
    assert ours == theirs

def files(path):
    return [file for file in (path, *path.rglob('*')) if file.is_file()]

def tree(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in files(folder)}

def hook(bench, body):
    """Prelude that runs `body` after each forward of the model. It can use kind ('training' or
    'evaluation'), trained (forwards in training so far, this one too), args, and change result."""
    module, name = bench.case.model.rsplit('.', 1)
    body = '\n'.join('    ' + line for line in body.strip().splitlines())
    return f"""
import importlib, json, math, os, signal, time, torch
owner = getattr(importlib.import_module({module!r}), {name!r})
forward, rank, trained, once = owner.forward, int(os.environ.get('RANK', 0)), 0, []
def pause(seconds):
    if not once:
        once.append(1)
        print('HERE', flush=True)
        time.sleep(seconds)
def wrapped(*args, **kwargs):
    global trained
    kind = 'training' if torch.is_grad_enabled() else 'evaluation'
    trained += kind == 'training'
    result = forward(*args, **kwargs)
{body}
    return result
owner.forward = wrapped
"""

def kill_after(bench, step, ranks=0):
    """Prelude: killed in the first micro-step after `step` steps of this launch."""
    return hook(bench, f'if {at(bench, TRAINING.format(step), ranks)}: os.kill(os.getpid(), 9)')

TRAINING, EVALUATION = 'kind == "training" and trained == {} * MICRO + 1', 'kind == "evaluation"'

def at(bench, when, ranks):
    return when.replace('MICRO', str(bench.case.micro // max(1, ranks)))  # micro-steps of one step on a rank

# ---- 1. stopped and continued = run straight ---------------------------------------------------------------
@pytest.mark.parametrize('ranks', [0, 2, 3])
def test_killed_at_random_moments(bench, kills, ranks):
    kills = kills if kills >= 20 or not ranks else 2
    expected, rng, times, dead = straight(bench, ranks=ranks), random.Random(kills + ranks), [], 0
    while dead < kills:
        run, starting = start(bench, '--auto_resume', ranks=ranks), len(times) % 8 == 7
        starting or run.wait_for('# run')
        times.append(rng.uniform(0, bench.start_seconds if starting else bench.seconds))
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

@pytest.mark.parametrize('variant, ranks', [(0, 0), (1, 2)])
def test_stops_across_epochs_and_shards(bench, variant, ranks):
    settings = dict(bench.case.variants[variant], data_root='few', checkpoint_interval=1)
    expected = straight(bench, ranks=ranks, **settings)
    for stop in (1, 3, 2):
        prelude = kill_after(bench, stop, ranks)
        assert -9 in go(bench, '--auto_resume', ranks=ranks, prelude=prelude, **settings).codes
    assert steps(bench)[-1] == 6
    go(bench, '--auto_resume', ranks=ranks, **settings).ok()
    same(bench, expected)

def told(bench, when, number, ranks=0, to=None, seconds=0.3):
    """A run that has been sent a signal in the midst of its work."""
    prelude = hook(bench, f'if {at(bench, when, ranks)}: pause({seconds})')
    run = start(bench, ranks=ranks, prelude=prelude)
    run.wait_for('HERE')
    run.kill(number, to)
    return run

@pytest.mark.parametrize('when, newest, number, ranks, to', [
    (TRAINING.format(0), 1, signal.SIGTERM, 0, None),
    (TRAINING.format(4), 5, signal.SIGINT, 0, None),
    (EVALUATION, 1, signal.SIGTERM, 0, None),
    (EVALUATION + ' and trained == 4 * MICRO', 5, signal.SIGINT, 0, None),
    (TRAINING.format(2), 3, signal.SIGTERM, 2, None),
    (TRAINING.format(4), 5, signal.SIGTERM, 2, 1),  # to one of the ranks
    (EVALUATION + ' and trained == 2 * MICRO', 3, signal.SIGINT, 2, None),
])
def test_a_signal_ends_the_step_saves_and_is_resumed(bench, when, newest, number, ranks, to):
    run = told(bench, when, number, ranks, to)
    assert set(run.wait(20)) == {128 + number} and run.err == '', f'{run.codes}\n{run.out}\n{run.err}'
    assert steps(bench)[-1] == newest
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))

@pytest.mark.parametrize('step', [4, 8])
def test_a_stop_when_an_evaluation_is_due_lets_the_resume_do_it_first(bench, step):
    run = told(bench, TRAINING.format(step - 1), signal.SIGTERM)
    assert run.wait() == [143] and f'step {step}/8 | val loss' not in run.out
    assert load(checkpoint(bench, step))['evaluated'] is False
    lines = re.findall('^step.*', go(bench, '--auto_resume').ok().out, re.MULTILINE)
    assert lines[0].startswith(f'step {step}/8 | val loss')
    assert load(checkpoint(bench, step))['evaluated'] is True
    same(bench, straight(bench), ignore=['lr'] if step == 8 else [])  # of an update that never follows

def test_a_second_ctrl_c_ends_at_once(bench):
    run = told(bench, TRAINING.format(4), signal.SIGINT, seconds=20)
    time.sleep(0.1)
    run.kill(signal.SIGINT)
    assert run.wait(10)[0] in (-signal.SIGINT, 130)
    go(bench, '--auto_resume').ok()
    same(bench, straight(bench))

def test_a_resume_repeats_nothing(bench):
    stopped(bench, 4)
    before = checkpoint(bench, 4).stat()
    run = go(bench, '--auto_resume').ok()
    assert bench.case.name(4) in run.out and 'step 4/8' not in run.out and 'step 6/8' in run.out
    assert checkpoint(bench, 4).stat().st_mtime_ns == before.st_mtime_ns
    assert '\nstep' not in go(bench, '--auto_resume').ok().out  # a run that is over does no harm
    same(bench, straight(bench))

# ---- 2. a checkpoint is the old one or the new one ---------------------------------------------------------
def operations(bench, **settings):
    """What the saves of a run consist of, in order: open:model_00002.pt.tmp write:... fsync:..."""
    run = go(bench, prelude=KILL_AT.format(n=0), **settings).ok()
    shutil.rmtree(bench.cwd / 'run')
    return re.search(r'^operations: (.*)', run.out, re.MULTILINE)[1].split(' ')

def test_killed_at_each_operation_of_a_save(bench, kills):
    """Of the first save and of the third, with a best one before each."""
    settings = dict(keep_last_n_checkpoints=1, permanent_checkpoints=2, max_steps=6)
    expected, done = straight(bench, **settings), operations(bench, **settings)
    moments = []
    for step in (2, 6):
        numbered = next(i for i, what in enumerate(done) if bench.case.name(step) + '.tmp' in what)
        opened = [i for i, what in enumerate(done) if what.startswith('open:')]
        begin = max(i for i in opened if i < numbered)
        end = min([i for i in opened if i > numbered], default=len(done))
        assert end > numbered and bench.case.name('best') in done[begin]
        writes = [i for i in range(begin, end) if done[i].startswith('write:')]
        few = writes[3::max(1, len(writes) // (2 if kills < 50 else 20))]
        moments += [i for i in range(begin, end) if i not in writes or i in few]
    assert any(done[i].startswith('remove:') for i in moments)
    for i in moments:
        shutil.rmtree(bench.cwd / 'run', ignore_errors=True)
        run = go(bench, prelude=KILL_AT.format(n=i + 1), **settings)
        assert run.codes == [-9], f'{done[i]}\n{run.out}'
        whole(bench)
        go(bench, '--auto_resume', **settings).ok()
        same(bench, expected)
        names = set(os.listdir(bench.cwd / 'run'))
        assert names >= set(os.listdir(expected)) and '.tmp' not in ''.join(names), f'{done[i]}: {names}'

def test_a_save_is_on_the_disk_before_it_has_its_name_and_before_an_old_one_goes(bench):
    """kill -9 cannot show a missing fsync, a power cut would: so the order of operations is read."""
    done = operations(bench, keep_last_n_checkpoints=2)
    renamed = [i for i, what in enumerate(done) if what.startswith('replace:') and 'config.py' not in what]
    removed = [i for i, what in enumerate(done) if what.startswith('remove:')]
    assert len(renamed) >= 5 and len(removed) == 2
    for i in renamed:
        temporary = done[i].split(':')[1] + '.tmp'
        assert [what for what in done[:i] if what.endswith(temporary)][-1] == f'fsync:{temporary}'
    for i in removed:
        assert len([j for j in renamed if j < i and bench.case.name('best') not in done[j]]) >= 3

# ---- 3. any number of ranks and micro-batches is the same training -----------------------------------------
def record(bench):
    """Hook that writes down the rows of each micro-step."""
    rows = f"json.dumps({bench.case.seen}.tolist()) + '\\n'"
    return hook(bench, f"kind == 'training' and open(f'seen{{rank}}', 'a').write({rows})")

def seen(bench, ranks=0):
    """All rows that the ranks were trained on, in global order; forgets them."""
    micro_steps = []
    for file in [bench.cwd / f'seen{rank}' for rank in range(max(1, ranks))]:
        micro_steps.append([json.loads(line) for line in file.read_text().splitlines()])
        file.unlink()
    return [row for parts in zip(*micro_steps, strict=True) for rows in parts for row in rows]

def losses(folder, log, kind='loss'):
    found = re.findall(rf'^step (\d+)/\d+ .*?\| {kind} ([\d.]+)', (folder / log).read_text(), re.MULTILINE)
    return {int(step): float(number) for step, number in found}

def farthest(a, b):
    """The largest relative distance between two dicts of tensors. Without the biases of keys: their
    gradient is zero but for rounding, and Adam makes steps out of it."""
    distances = []
    for name in [name for name in a if a[name].is_floating_point()]:
        parts = [t.chunk(3)[::2] if name.endswith('c_attn.bias') else [t] for t in (a[name], b[name])]
        x, y = (torch.cat(part).double() for part in parts)
        distances.append((((x - y).norm() / x.norm()).item(), name))
    return max(distances)

def test_ranks_and_micro_batches_do_not_change_the_training(bench):
    found = []
    for ranks, settings in bench.case.slices:
        out = f'run{len(found)}'
        settings = dict(settings, out=out, dropout=0, log_interval=1, ranks=ranks)
        go(bench, prelude=record(bench), **settings).ok()
        weights = load(checkpoint(bench, 8, out))['model']
        printed = [losses(bench.cwd / out, bench.case.log, kind) for kind in ('loss', 'val loss')]
        found.append((*printed, weights, seen(bench, ranks)))
        for kind, digit in ((0, 1.1e-6), (1, 1.1e-4)):  # the last one that is printed
            assert found[-1][kind] == pytest.approx(found[0][kind], rel=1e-6, abs=digit), settings
        assert len(found[-1][0]) == 8 and len(found[-1][1]) == 5
        assert farthest(found[0][2], weights) < (1e-5, ''), settings
        assert found[-1][3] == found[0][3], f'{settings}: other rows, or in another order'

def test_resume_with_another_number_of_ranks(bench):
    settings = dict(dropout=0, log_interval=1)
    expected = straight(bench, **settings)
    folder = stopped(bench, 4, **settings)
    killed = dict(settings, checkpoint_interval=1, prelude=kill_after(bench, 3, 2))
    assert -9 in go(bench, '--auto_resume', ranks=2, **killed).codes and steps(bench)[-1] == 7
    go(bench, '--auto_resume', **settings).ok()
    for kind, digit in (('loss', 2.1e-6), ('val loss', 1.1e-4)):
        one, other = (losses(path, bench.case.log, kind) for path in (folder, expected))
        assert one == pytest.approx(other, abs=digit), kind
    go(bench, '--auto_resume', out='second', dropout=0.1, ranks=2).ok()
    ranks = load(checkpoint(bench, 8, 'second'))['ranks']
    assert len(ranks) == 2 and all(differences(ranks[0][name], ranks[1][name]) for name in ranks[0])

@pytest.mark.parametrize('env', [
    dict(WORLD_SIZE='4'), dict(RANK='3'),
    dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', MASTER_ADDR='', MASTER_PORT='')])
def test_variables_of_a_cluster_without_torchrun_make_no_ranks(bench, env):
    go(bench, env=env).ok()
    same(bench, straight(bench))

# ---- 4. looking does not change ----------------------------------------------------------------------------
@pytest.mark.parametrize('ranks', [2])
def test_intervals_do_not_change_the_training(bench, ranks):
    names = [name for name in bench.case.args if name.endswith('_interval') and name != 'log_interval']
    busy = straight(bench, ranks=ranks, log_interval=1, **dict.fromkeys(names, 1))
    idle = straight(bench, ranks=ranks, log_interval=1000, **dict.fromkeys(names, -1))
    assert steps(bench, idle) == [8] and len(steps(bench, busy)) == 5
    for folder in (idle, straight(bench, ranks=ranks)):
        a, b = load(checkpoint(bench, 8, busy)), load(checkpoint(bench, 8, folder))
        for part in ('model', 'optimizer', 'scaler', 'train_loader_state', 'ranks', 'val_loss'):
            assert differences(a[part], b[part]) == [], part

# ---- 5. what is kept, and where a run begins ---------------------------------------------------------------
@pytest.mark.parametrize('keep, permanent, interval, last, kept', [
    (3, '', 1, 8, [6, 7, 8]),
    (0, '', 2, 8, [2, 4, 6, 8]),
    (1, '1,3,6', 2, 8, [1, 3, 6, 8]),  # two of them no multiples of the interval
    (3, '7', -1, 8, [7, 8]),
])
def test_rotation(bench, keep, permanent, interval, last, kept):
    go(bench, permanent_checkpoints=permanent, keep_last_n_checkpoints=keep, checkpoint_interval=interval,
       max_steps=last).ok()
    assert steps(bench) == kept
    found = losses(bench.cwd / 'run', bench.case.log, 'val loss')
    assert found[load(checkpoint(bench, 'best'))['step']] == min(found.values())

def test_rotation_beyond_five_digits(bench):  # as text 99999 comes after 100000
    content = load(checkpoint(bench, 8, straight(bench)))
    (bench.cwd / 'run').mkdir()
    store(dict(content, step=99998), checkpoint(bench, 99998))
    settings = dict(keep_last_n_checkpoints=2, checkpoint_interval=1, max_steps=100001)
    go(bench, '--auto_resume', **settings).ok()
    assert steps(bench) == [100000, 100001]
    assert bench.case.name(100001) in go(bench, '--auto_resume', **settings).ok().out

def test_rotation_leaves_foreign_files_and_damaged_later_ones_alone(bench):
    folder, third = stopped(bench, 4), bench.case.name(3)
    padded = bench.case.name(1).replace('1', '01')  # one digit too many
    mine = ['notes.txt', padded, third + '.bak', 'x' + third, 'mine.tmp', *map(bench.case.name, (500, 501))]
    for name in mine:
        (folder / name).write_text('mine')
    run = go(bench, '--auto_resume', keep_last_n_checkpoints=2).ok()
    assert steps(bench) == [6, 8, 500, 501] and run.out.count('WARNING') == 2
    assert [name for name in mine if (folder / name).read_text() == 'mine'] == mine

class Attack:
    def __reduce__(self):
        return os.system, ('touch executed',)

def damage(path, how):
    if how == 'hostile':
        content = load(path)
        content['model']['more'] = Attack()
        return store(content, path)
    path = path / 'pytorch_model.bin' if path.is_dir() else path
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensor = max((archive.read(name) for name in archive.namelist() if '/data/' in name), key=len)
    middle = data.index(tensor) + len(tensor) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]
    path.write_bytes(dict(truncated=data[:middle], flipped=flipped, empty=b'')[how])
    if how == 'flipped':
        load(path)  # torch.load reads it without complaint

@pytest.mark.parametrize('how', ['truncated', 'flipped', 'empty', 'hostile'])
def test_the_newest_checkpoint_that_reads_whole_is_used(bench, how):
    ranks = 2 if how == 'flipped' else 0
    stopped(bench, 6, ranks=ranks)
    copy(checkpoint(bench, 6), checkpoint(bench, 7))
    damage(checkpoint(bench, 7), how)
    damage(checkpoint(bench, 'best'), how)  # it is not needed to go on
    broken = tree(bench.cwd / 'run')
    run = go(bench, '--auto_resume', ranks=ranks).ok()
    assert re.findall('WARNING.*', run.out)[0].count(bench.case.name(7)) == run.out.count('WARNING') == 1
    assert all(tree(bench.cwd / 'run')[name] == broken[name] for name in broken if bench.case.name(7) in name)
    assert not list(bench.cwd.rglob('executed'))
    same(bench, straight(bench, ranks=ranks))

@pytest.mark.parametrize('ranks', [2])
def test_nothing_that_can_be_read_is_one_line(bench, ranks):
    """All numbered ones damaged: it goes on from the best. The best too: nothing is begun over it."""
    folder = stopped(bench, 4, ranks=ranks)
    for step in steps(bench):
        damage(checkpoint(bench, step), 'truncated')
    shutil.copytree(folder, bench.cwd / 'second')
    run = go(bench, '--auto_resume', ranks=ranks).ok()
    assert run.out.count('WARNING') == 2 and bench.case.name('best') in run.out
    same(bench, straight(bench, ranks=ranks), ignore=['lr'])  # as above: the best was the last
    damage(checkpoint(bench, 'best', 'second'), 'empty')
    before = tree(bench.cwd / 'second')
    assert 'second' in go(bench, '--auto_resume', out='second', ranks=ranks).one_line(2)
    assert tree(bench.cwd / 'second') == before

def test_a_fresh_start_in_a_used_folder_is_refused(bench):
    folder = stopped(bench, 4)
    for left in (steps(bench), ['best']):  # numbered ones and a best, a best alone
        before = tree(folder)
        for ranks in (0, 2):
            assert '--auto_resume' in go(bench, ranks=ranks).one_line(2)
        assert tree(folder) == before
        for step in left:
            drop(checkpoint(bench, step))

@pytest.mark.parametrize('ranks', [2])
def test_resume_from_an_explicit_older_step_sets_later_ones_aside(bench, ranks):
    folder = stopped(bench, 8, ranks=ranks)
    later = {name: tree(folder)[name] for name in map(bench.case.name, (6, 8, 'best'))}
    path = f'--checkpoint_path=run/{bench.case.name(4)}'
    run = go(bench, '--resume', path, ranks=ranks, prelude=kill_after(bench, 1, ranks))
    assert -9 in run.codes and steps(bench) == [2, 4] and not checkpoint(bench, 'best').exists()
    assert run.out.count('.old') == 3, run.out
    go(bench, '--auto_resume', ranks=ranks).ok()
    assert {name: tree(folder)[name + '.old'] for name in later} == later
    same(bench, straight(bench, ranks=ranks))
    missing = path.replace('4', '5')
    assert missing[18:] in go(bench, '--resume', missing, ranks=ranks).one_line(2)
    damage(checkpoint(bench, 'best'), 'empty')  # of unknown step: it must not stand in the way
    go(bench, '--resume', path, ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))

# ---- 6. not a number ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('ranks, poison', [
    (2, 'result = result + math.nan'),                   # the loss alone, its gradients are good
    (2, 'result.register_hook(lambda g: g * math.inf)'),  # gradients alone
    (0, 'result.register_hook(lambda g: g * math.nan)'),
])
def test_not_a_number_on_one_rank_stops_all_before_the_update(bench, ranks, poison):
    when = at(bench, TRAINING.format(2), ranks)
    run = go(bench, ranks=ranks, prelude=hook(bench, f'if {when} and rank == {max(0, ranks - 1)}: {poison}'))
    assert re.search(r'\bstep 3\b', run.one_line(1))
    assert list(whole(bench)) == [2, 'best']
    for content in whole(bench).values():
        assert all(tensor.isfinite().all() for tensor in content['model'].values())
    go(bench, '--auto_resume', ranks=ranks).ok()
    same(bench, straight(bench, ranks=ranks))

# ---- 7. nothing touches the network, no file runs code -----------------------------------------------------
NO_NETWORK = """
import socket
def guarded(owner, name, host_of):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        host = str(host_of(args))
        if not host.startswith(('127.', '::1', 'localhost', 'None', socket.gethostname())):
            open('touched', 'a').write(f'{host}\\n')
            raise OSError('there is no network in this test')
        return function(*args, **kwargs)
    setattr(owner, name, call)
for name in ('connect', 'connect_ex'):
    guarded(socket.socket, name, lambda args: args[1][0] if isinstance(args[1], tuple) else None)
for name in ('getaddrinfo', 'gethostbyname'):
    guarded(socket, name, lambda args: args[0] or None)
"""

def test_nothing_touches_the_network(bench):
    common = dict(prelude=NO_NETWORK, env=dict(TIKTOKEN_CACHE_DIR=str(bench.cwd / 'none')))
    go(bench, ranks=2, **common).ok()
    go(bench, '--eval_only', **common).ok()
    shutil.copytree(bench.case.home / 'data', bench.cwd / 'other')
    bench.case.tokens_of_gpt2(bench.cwd / 'other')  # whose tokenizer is not here
    go(bench, out='second', data_root='other', generate_interval=1, max_steps=2, **common).ok()
    assert not (bench.cwd / 'touched').exists(), (bench.cwd / 'touched').read_text()

def test_no_file_that_is_read_runs_code(bench):
    """Checkpoints: see hostile above. Settings, data and weights:"""
    (bench.cwd / 'evil.py').write_text("seed = __import__('os').system('touch executed')")
    run = bench.launcher.run(bench.case.script, ['evil.py', *words(bench.case)], bench.cwd)
    assert 'evil.py' in run.one_line(2)
    (bench.cwd / 'data').unlink()
    shutil.copytree(bench.case.home / 'data', bench.cwd / 'data')
    np.save(bench.cwd / 'data/x_train_000009.npy', np.array([Attack()]), allow_pickle=True)
    assert 'x_train_000009.npy' in go(bench).one_line(2)
    torch.save(dict(model=Attack()), bench.cwd / 'weights.pt')
    assert 'would run code' in go(bench, '--resume', '--checkpoint_path=weights.pt').one_line(2)
    assert not list(bench.cwd.rglob('executed')) and not (bench.cwd / 'run').exists()

# ---- 8. torchrun, for real ---------------------------------------------------------------------------------
def test_torchrun_restarts_after_a_killed_worker(bench):
    expected = straight(bench, ranks=2)
    (bench.cwd / 'site').mkdir()
    (bench.cwd / 'site/sitecustomize.py').write_text(f"""
import os, signal, threading, time
def wait():
    while not os.path.exists('run/{bench.case.name(4)}'):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':
    threading.Thread(target=wait, daemon=True).start()
""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--max_restarts=2', ROOT / bench.case.script, *words(bench.case, ['--auto_resume'])]
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(bench.cwd / 'site'))
    run = subprocess.run(command, cwd=bench.cwd, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.count('# run ') == 2, f'{run.stdout}\n{run.stderr}'
    same(bench, expected)

# ---- settings and mistakes ---------------------------------------------------------------------------------
def test_typed_settings_beat_the_stored_ones(bench):
    stopped(bench, 4)
    before, changes = load(checkpoint(bench, 4))['config'], dict(max_lr=2e-3, weight_decay=0.3, beta1=0.8)
    run = go(bench, '--auto_resume', bare=True, prelude=kill_after(bench, 3), **changes)
    printed = {f'{name} {before[name]} -> {value}' for name, value in changes.items()}
    assert {line for line in run.out.splitlines() if ' -> ' in line} == printed
    run = go(bench, '--auto_resume', bare=True).ok()  # they are remembered, and so are all the others
    assert ' -> ' not in run.out
    content = load(checkpoint(bench, 8))
    assert content['config'] == {**before, **changes, 'auto_resume': True}
    groups = [group for part in content['optimizer'] for group in part['param_groups']]
    assert {group['weight_decay'] for group in groups} == {0.3, 0.0} and groups[0]['betas'][0] == 0.8
    assert groups[0]['lr'] <= 2e-3 and load(checkpoint(bench, 6))['config']['max_lr'] == 2e-3

def test_a_resume_that_does_not_fit_is_refused_by_name(bench):
    folder = stopped(bench, 4)
    before = tree(folder)
    for name, value in bench.case.shape.items():
        assert re.search(rf'\b{name}\b.*\b{value}\b', go(bench, '--auto_resume', **{name: value}).one_line(2))
    assert name in go(bench, '--auto_resume', ranks=2, **{name: value}).one_line(2)
    assert 'max_steps' in go(bench, '--auto_resume', max_steps=3, warmup_steps=1).one_line(2)
    (bench.cwd / 'data').unlink()
    shutil.copytree(bench.case.home / 'data', bench.cwd / 'data')
    bench.case.change(bench.cwd / 'data')
    assert 'other data' in go(bench, '--auto_resume').one_line(2)
    assert tree(folder) == before

def test_ranks_that_see_different_data_end_with_one_line(bench):
    """Rank 1 looks into another folder, as on a node that lacks a shard."""
    shutil.copytree(bench.cwd / 'data', bench.cwd / 'other/data')
    bench.case.change(bench.cwd / 'other/data')
    prelude = "import os; os.environ['RANK'] == '1' and os.chdir('other')"
    assert 'data' in go(bench, ranks=2, prelude=prelude).one_line(2) and not list(bench.cwd.rglob('run'))

@pytest.mark.parametrize('mistake', [dict(max_lrr=1), dict(max_steps='many'), dict(data_root='nowhere')])
def test_a_mistake_is_one_line_on_rank_0(bench, mistake):
    line = go(bench, ranks=2, **mistake).one_line(2)
    assert (str(*mistake) in line or 'nowhere' in line) and not (bench.cwd / 'run').exists()
