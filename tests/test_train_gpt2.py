"""What train_gpt2.py promises beside stops, resumes and ranks, which are in test_reliability.py."""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import ROOT, TINY, clean_log, differences, load, losses, make_text_data, write_shard
from test_configurator import GUIDES

# Prints the settings as they are when the data are opened, and ends there.
SETTINGS = """
import json, sys
import prepare.fineweb
def spy(*args):
    print('config', json.dumps(sys.modules['__main__'].__dict__['config']))
    sys.exit(0)
prepare.fineweb.open_shards = spy
"""
FAKE_WANDB = """
import sys, types
fake = types.ModuleType('wandb')
fake.errors = types.SimpleNamespace(Error=type('Error', (Exception,), {}))
def init(**said):
    if said['project'] == 'no_login':
        raise fake.errors.Error('No API key configured.\\nUse `wandb login`')
    print('wandb got', said['project'], said['name'], said['id'], said['config']['max_steps'])
    log = lambda values, step: print('wandb logged', step, sorted(values))
    return types.SimpleNamespace(id='abc', log=log, finish=lambda: print('wandb finished'))
fake.init = init
sys.modules['wandb'] = fake
"""

def column(run, name):
    return [float(x) for x in re.findall(rf'\| {name} ([\d.e+-]+)', run.out)]

def val_losses(run):
    return re.findall(r'\| val loss ([\d.]+)', run.out)

# ---- settings
@pytest.mark.parametrize('args, expected', [
    (['--model=tiny'], dict(optimizer='muon', max_lr=1.2e-2, activation='gelu', n_embd=128, block_size=128)),
    (['--model=tiny', '--optimizer=adamw'], dict(optimizer='adamw', max_lr=4e-3, activation='gelu')),
    (['--model=tiny', '--max_lr=1', '--activation=gelu_new', '--n_layer=2', '--optimizer=adamw'],
     dict(max_lr=1.0, activation='gelu_new', n_layer=2, n_embd=128)),
    ([], dict(n_embd=768, n_layer=12, max_lr=6e-4, optimizer='adamw', activation='gelu_new')),
    (['--model=gpt2-medium'], dict(n_embd=1024, n_layer=24, n_head=16, max_lr=3e-4, batch_size=8)),
    (['--model=gpt2-xl', '--batch_size=4'], dict(n_embd=1600, n_head=25, max_lr=2e-4, batch_size=4)),
    (['--gradient_accumulation_steps=3', '--logging_steps=7', '--val_steps=5', '--output_dir=x'],
     dict(grad_accumulation_steps=3, log_interval=7, eval_interval=5, log_dir='x'))])
def test_presets_give_way_to_what_is_typed(go, args, expected):
    found = json.loads(re.search(r'^config (.*)$', go(*args, base=[], prelude=SETTINGS).ok().out, re.M)[1])
    assert {name: found[name] for name in expected} == expected

def test_a_stored_setting_gives_way_to_a_typed_one_and_beats_a_preset(go, tmp_path):
    base = [word for word in TINY if not word.startswith('--total_batch_size')]
    run = go('--grad_accumulation_steps=3', '--model=tiny', base=base).ok()
    assert '96 tokens per step = 2 rows x 16 x 3 micro-step(s) x 1 rank(s)' in run.out
    run = go('--auto_resume', '--total_batch_size=128', '--max_steps=6', '--weight_decay=0', base=[]).ok()
    assert '128 tokens per step' in run.out and 'weight_decay 0.1 -> 0.0' in run.out
    config = load(tmp_path / 'logs/model_00006.pt')['config']
    assert config['optimizer'] == 'muon' and config['max_lr'] == 1e-2 and config['n_embd'] == 16
    go('logs/config.py', '--log_dir=again', base=[]).ok()  # the file repeats the run
    assert load(tmp_path / 'again/model_00006.pt')['config']['weight_decay'] == 0

@pytest.mark.parametrize('args, said', [
    (['--n_head=3'], 'n_head 3'), (['--dtype=float8'], 'must be one of'), (['--vocab_size=100'], '257'),
    (['--model=huge'], 'must be one of'), (['--batch_size=0'], 'must not be 0'),
    (['--total_batch_size=100'], 'the nearest that is: 96'), (['--max_step=3'], 'did you mean max_steps'),
    (['--total_batch_size=8'], 'the nearest that is: 32'), (['--permanent_checkpoints=10k'], 'whole number'),
    (['--model_parallel'], 'model_parallel'), (['--eval_only'], 'no checkpoint in logs'),
    (['--generate=x', '--checkpoint_path=none.pt'], 'none.pt')])
def test_mistakes_end_in_one_line(go, tmp_path, args, said):
    assert said in go(*args).one_line() and not (tmp_path / 'logs').exists()

# ---- learning rate
def cosine(begin, end, steps=range(8), warmup=2, high=1e-2, low=1e-3):
    return [low + (high - low) * (1 + math.cos(math.pi * (s - begin) / (end - begin))) / 2 for s in steps]

@pytest.mark.parametrize('args, expected', [
    (['--warmup_steps=4'], [2.5e-3, 5e-3, 7.5e-3, 1e-2, *cosine(4, 8, range(4, 8))]),
    (['--warmup_steps=0', '--min_lr=0'], cosine(0, 8, low=0)),
    (['--warmup_steps=0', '--min_lr=0', '--lr_scheduler=cosine_with_restarts', '--lr_restarts=1'],
     cosine(0, 4, range(4), low=0) * 2),
    (['--warmup_steps=0', '--lr_scheduler=cosine_with_restarts', '--lr_restarts=0'], cosine(0, 8)),
    (['--lr_scheduler=constant'], [5e-3] + [1e-2] * 7), (['--no-decay_lr'], [5e-3] + [1e-2] * 7),
    (['--warmup_steps=8'], [1e-2 * s / 8 for s in range(1, 9)]),
    (['--warmup_steps=100'], [1e-4 * s for s in range(1, 9)])])
def test_the_learning_rate_of_every_step(go, args, expected):
    run = go('--max_steps=8', '--eval_interval=-1', '--generate_interval=-1', *args).ok()
    assert column(run, 'lr') == pytest.approx(expected, rel=1e-2)
    assert (re.search('WARNING: .*warmup_steps', run.out) is not None) == ('--warmup_steps=100' in args)

# ---- data
def test_the_order_of_rows_is_that_of_seed_and_epoch_alone(go, tmp_path):
    """Two epochs of 253 rows, every row once in each; any micro-batch and number of ranks."""
    record = f'''
import os
import prepare.fineweb as f
real = f.read_rows
def read_rows(shards, T, rows, vocab_size):
    if len(shards) == 2:
        with open({str(tmp_path)!r} + '/rows' + os.environ.get('RANK', ''), 'a') as file:
            print(*rows, file=file)
    return real(shards, T, rows, vocab_size)
f.read_rows = read_rows
'''
    n, args = (2037 - 1) // 16 + (2074 - 1) // 16, ['--eval_interval=-1', '--generate_interval=-1']
    orders = [np.random.default_rng([1337, epoch]).permutation(n) for epoch in range(3)]
    expected = np.concatenate(orders)[:64 * 8].reshape(64, 8)
    go('--max_steps=64', '--log_interval=64', '--log_dir=one', *args, prelude=record).ok()
    rows = np.array((tmp_path / 'rows').read_text().split(), int).reshape(64, 8)
    assert np.array_equal(rows, expected)
    assert sorted(rows.flat[:n]) == list(range(n)) == sorted(rows.flat[n:2 * n])
    args += ['--max_steps=6', '--log_dir=two', '--batch_size=1', '--num_workers=0']
    go(*args, prelude=record, ranks=2).ok()
    parts = [np.array((tmp_path / f'rows{r}').read_text().split(), int).reshape(6, 4) for r in (0, 1)]
    assert np.array_equal(np.stack(parts, 2).reshape(6, 8), expected[:6])

def test_a_resume_with_another_batch_goes_on_at_its_row(go, tmp_path):
    """8 rows a step, then 16, which the next resume keeps."""
    def row(step):
        return load(tmp_path / f'logs/model_{step:05d}.pt')['train_loader_state']['row']
    go('--grad_accumulation_steps=4').ok()
    assert row(4) == 4 * 8
    go('--auto_resume', '--total_batch_size=256', '--max_steps=6', base=[]).ok()
    assert row(6) == 4 * 8 + 2 * 16
    go('--auto_resume', '--max_steps=7', base=[]).ok()
    assert row(7) == 4 * 8 + 3 * 16

def test_dynamic_lengths_keep_the_tokens_of_a_step(go, tmp_path):
    args = ['--dynamic_seq_length', '--min_seq_length=4', '--max_seq_length=16', '--max_steps=12',
            '--eval_interval=-1']
    record = f'''
import model
real = model.GPT.forward
def forward(self, idx, targets=None, *args):
    if targets is not None and self.training:
        open({str(tmp_path / 'shapes')!r}, 'a').write(f'{{idx.shape[0]}}x{{idx.shape[1]}} ')
    return real(self, idx, targets, *args)
model.GPT.forward = forward
'''
    go(*args, '--log_dir=a', prelude=record).ok()
    shapes = (tmp_path / 'shapes').read_text().split()
    assert set(shapes) == {'8x4', '4x8', '2x16'}
    assert all(len(set(shapes[i:i + 4])) == 1 for i in range(0, 48, 4))  # one length a step
    assert losses(go(*args, '--log_dir=c').ok()) == losses(
        go(*args, '--log_dir=d', '--num_workers=0').ok())
    for wrong in ('--min_seq_length=5', '--max_seq_length=32', '--min_seq_length=32'):
        assert 'max_seq_length' in go(*args, wrong, '--log_dir=e').one_line()

def test_the_validation_loss_depends_on_no_batch_size_and_no_ranks(go):
    """250 validation tokens = 15 rows of 16: batches of 1, 2, 4, 7 and two ranks leave remainders."""
    run = go('--log_dir=v', '--max_steps=1', '--val_tokens=250').ok()
    assert '240 validation tokens' in run.out
    for batch_size, ranks in ((1, 0), (4, 0), (7, 0), (2, 2), (4, 2)):
        again = go('--eval_only', '--log_dir=v', f'--batch_size={batch_size}', base=[], ranks=ranks).ok()
        assert val_losses(again) == val_losses(run)[-1:]
    assert '1,984 validation tokens' in go('--val_tokens=0', '--max_steps=1').ok().out

@pytest.mark.parametrize('name', ['x_train_000001.bin', 'x_val_000000.bin'])
def test_ids_beyond_the_vocabulary_are_refused(go, tmp_path, name):
    write_shard(tmp_path / 'data' / name, [5000] * 2000)
    assert '5000' in go().one_line()

def test_data_of_another_tokenizer_are_refused(go, tmp_path):
    shutil.copytree(tmp_path / 'data', tmp_path / 'gpt2')
    (tmp_path / 'gpt2/manifest.json').unlink()
    go('--data_root=gpt2', '--vocab_size=50304', '--max_steps=1', '--n_embd=8', '--generate_interval=-1').ok()
    for args in (['--eval_only', '--data_root=data'],
                 ['--eval_only', '--data_root=data', '--init_from=logs/model_00001.pt', '--log_dir=x'],
                 ['--auto_resume', '--data_root=data', '--max_steps=2']):
        assert 'bytes tokens, the model was trained on gpt2' in go(*args, base=[]).one_line()

@pytest.mark.parametrize('data', ['nowhere', '.'])
def test_missing_data_name_the_scripts_that_make_them(go, data):
    line = go(f'--data_root={data}').one_line()
    assert 'prepare/fineweb.py' in line and 'prepare/pydocs.py' in line and 'tiny' in line

# ---- modes that start no run
def test_modes_after_a_run_judge_sample_and_export_its_checkpoints(go, tmp_path):
    run = go().ok()
    before = {path.name: path.read_bytes() for path in (tmp_path / 'logs').iterdir()}
    go('--export=out', base=[]).ok()
    step_2 = '--checkpoint_path=logs/model_00002.pt'
    start, middle, end = val_losses(run)
    assert val_losses(go('--eval_only', base=[]).ok()) == [end] != [middle]
    assert val_losses(go('--eval_only', step_2, base=[]).ok()) == [middle]
    data = ['--data_root=data', '--val_tokens=256', '--log_dir=none']
    cut = val_losses(go('--eval_only', '--init_from=out', *data, base=[]).ok())
    assert float(cut[0]) == pytest.approx(float(end), abs=0.02)  # its 63 ids of padding are the mean
    (tmp_path / 'data').rename(tmp_path / 'gone')  # sampling needs no data
    first = go('--generate=def ', '--max_new_tokens=5', base=[]).ok().out
    assert '\ndef ' in first and first == go('--generate=def ', '--max_new_tokens=5', base=[]).ok().out
    texts = [go(*words, *more, base=[]).ok().out for words in (['--generate='], ['--generate', 'def '])
             for more in ([], [step_2], ['--init_from=out', '--log_dir=none'])]
    assert len(set(texts)) == 6 and not any('tokens per step' in text for text in texts)
    go('--export=two', step_2, base=[]).ok()
    for more in ([], [step_2], ['--init_from=out', '--log_dir=none']):
        go('--export=', *more, base=[]).one_line()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'logs').iterdir()} == before
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith('.stdout')}
    assert left == {'logs', 'gone', 'out', 'two'}

def test_no_control_codes_reach_the_terminal(go):
    go().ok()
    run = go('--generate=', '--max_new_tokens=400', '--temperature=100', '--top_k=0', base=[]).ok()
    text = run.out.split('model logs', 1)[1]
    assert len(text) > 100 and not re.search(r'[^\n\t -~\xa0-\U0010ffff]', text)

# ---- precision and devices
@pytest.mark.parametrize('dtype, tolerance', [('bfloat16', 3e-2), ('float16', 3e-3)])
def test_a_lower_precision_trains_and_keeps_float32_weights(go, dtype, tolerance):
    plain, run = go('--log_dir=a').ok(), go('--log_dir=b', f'--dtype={dtype}').ok()
    assert losses(run) == pytest.approx(losses(plain), rel=tolerance) and losses(run) != losses(plain)
    state = load(run.cwd / 'b/model_00004.pt')
    assert {tensor.dtype for tensor in state['model'].values()} == {torch.float32}
    assert bool(state['scaler']) == (dtype == 'float16')
    go('--auto_resume', '--log_dir=a', f'--dtype={dtype}', '--max_steps=6', base=[]).ok()

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_float16_overflow_is_skipped_not_fatal(go, optimizer):
    """The first scale, 65536, is too large for this gradient: it is halved, the weights stay finite."""
    prelude = ('import model\nreal = model.GPT.forward\nmodel.GPT.forward = lambda self, *a: '
               'real(self, *a) * (3e4 if len(a) > 1 and self.training else 1)')
    run = go('--dtype=float16', '--max_steps=6', f'--optimizer={optimizer}', prelude=prelude).ok()
    state = load(run.cwd / 'logs/model_00006.pt')
    assert state['scaler']['scale'] < 65536 and all(t.isfinite().all() for t in state['model'].values())

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is one here')
def test_a_gpu_that_is_not_here_becomes_the_cpu_with_a_warning(go):
    plain = go('--log_dir=a').ok()
    run = go('--device=cuda', '--log_dir=b').ok()
    assert 'WARNING: --device=cuda' in run.out and 'device cpu' in run.out and losses(run) == losses(plain)

def test_compile_gives_the_same_training(go):
    """With torch.compile's eager backend: no C++ compiler is needed, the graph is still captured."""
    prelude = '''import model
real = model.GPT.compile
model.GPT.compile = lambda self: (real(self, backend='eager'), print('compiling'))'''
    plain = go('--log_dir=a').ok()
    run = go('--log_dir=b', '--compile', prelude=prelude, timeout=120).ok()
    assert 'compiling' in run.out and losses(run) == pytest.approx(losses(plain), rel=1e-5)
    states = [load(run.cwd / f'{folder}/model_00004.pt') for folder in 'ab']
    assert states[0]['model'].keys() == states[1]['model'].keys()
    run = go('--log_dir=c', '--compile', prelude=prelude, env={'DISABLE_COMPILE': '1'}).ok()
    assert 'compiling' not in run.out and 'compile False' in run.out

# ---- what is printed
def test_log_lines(go, tmp_path):
    run = go('--log_gradients', '--log_level', 'debug', '--run_name=mine').ok()
    line = re.search(r'^step 2/4 \(50\.00%\) \| loss \d\.\d{6} \| lr 1\.00e-02 \| norm (\d+\.\d\d) \| '
                     r'dt \d+ms \| tok/s [\d,]+ \| mfu - \| eta 0h00m \| grad (.*)$', run.out, re.M)
    norms = dict(zip(line[2].split()[::2], map(float, line[2].split()[1::2]), strict=True))
    assert norms.keys() == {'wte', 'wpe', 'ln_f', '0', '1'}
    assert math.hypot(*norms.values()) == pytest.approx(float(line[1]), rel=1e-2)
    assert re.search(r'^step 2/4 \| val loss \d\.\d{4}$', run.out, re.M)
    assert len(re.findall(r'^step 3 micro-step [1-4]/4 \| loss \d\.\d{6} \| \d+ms$', run.out, re.M)) == 4
    assert 'mine' in run.out and len([s for s in run.out.splitlines() if s.startswith('# ')]) <= 8
    assert set((tmp_path / 'logs/log.txt').read_text().splitlines()) <= set(run.out.splitlines())

def test_micro_steps_losses_have_the_steps_as_their_mean(go):
    run = go('--log_level=DEBUG', '--max_steps=2').ok()
    parts = [float(x) for x in re.findall(r'micro-step \d/4 \| loss ([\d.]+)', run.out)]
    whole = [float(x) for x in re.findall(r'\(\S+%\) \| loss ([\d.]+)', run.out)]
    assert [sum(parts[:4]) / 4, sum(parts[4:]) / 4] == pytest.approx(whole, abs=2e-6)

def test_the_time_left_is_at_the_pace_of_this_launch(go):
    """A clock by which each of the four micro-steps takes a minute; 2 steps were made before."""
    go('--max_steps=2').ok()
    prelude = '''import time, model
clock, real = [0.0], model.GPT.forward
time.perf_counter = lambda: clock[0]
def forward(self, idx, targets=None, *args):
    clock[0] += 60 * (self.training and targets is not None)
    return real(self, idx, targets, *args)
model.GPT.forward = forward'''
    run = go('--auto_resume', '--max_steps=18', base=[], prelude=prelude).ok()
    assert re.findall(r'\| eta (\S+)', run.out)[:3] == ['1h00m', '0h56m', '0h52m']
    assert re.findall(r'\| dt (\S+) \| tok/s (\S+)', run.out)[0] == ('240000ms', '1')

def test_clipping(go):
    """With a tiny clip Adam sees gradients of that norm; 0 switches it off."""
    norms = {}
    for clip in ('1e-3', '0'):
        run = go('--max_steps=1', f'--grad_clip={clip}', f'--log_dir=c{clip}').ok()
        state = load(run.cwd / f'c{clip}/model_00001.pt')['optimizer'][0]['state']
        norms[clip] = math.sqrt(sum((s['exp_avg'] / 0.1).square().sum().item() for s in state.values()))
    assert norms['1e-3'] == pytest.approx(1e-3, rel=1e-2)
    assert norms['0'] == pytest.approx(column(run, 'norm')[0], rel=1e-2)

def test_wandb_gets_the_run_and_is_continued(go, tmp_path):
    words = ['--wandb_log', '--wandb_project=p', '--run_name=r', '--max_steps=2']
    run = go(*words, prelude=FAKE_WANDB).ok()
    assert 'wandb got p r None 2' in run.out and 'wandb finished' in run.out
    assert re.search(r"wandb logged 2 \[.*loss.*lr.*\]", run.out)
    run = go('--auto_resume', '--max_steps=4', base=[], prelude=FAKE_WANDB).ok()
    assert 'wandb got p r abc 4' in run.out

def test_wandb_without_a_login_ends_in_one_line(go):
    line = go('--wandb_log', '--wandb_project=no_login', prelude=FAKE_WANDB).one_line()
    assert 'WANDB_MODE=offline' in line and 'No API key configured. Use' in line

# ---- learning
def test_a_run_learns_all_that_there_is(go):
    run = go('--max_steps=60', '--eval_interval=60', '--log_interval=10', '--max_lr=2e-2').ok()
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.1, 0.1))  # of the data: nothing can be better
    first, last = map(float, val_losses(run))
    assert first > 5 and entropy - 0.02 < last < entropy + 0.15

# ---- FSDP2
PARALLEL = ['--model_parallel', '--max_steps=20', '--eval_interval=10', '--checkpoint_interval=10',
            '--log_gradients']

@pytest.mark.parametrize('ranks', [2, 4])
def test_model_parallel_gives_the_training_of_one_process(go, tmp_path, ranks):
    """4 = two copies of a model on two ranks. Checkpoints are the same files, resumed either way."""
    one = go(*PARALLEL, '--no-model_parallel', '--log_dir=one').ok()
    run = go(*PARALLEL, '--log_dir=split', '--batch_size=1', ranks=ranks, timeout=120).ok()
    assert losses(run) == pytest.approx(losses(one), abs=1e-5) and len(losses(run)) == 20
    assert val_losses(run) == val_losses(one)
    assert column(run, 'norm') == pytest.approx(column(one, 'norm'), abs=0.011)
    states = [load(tmp_path / folder / 'model_00010.pt') for folder in ('split', 'one')]
    assert all(type(tensor) is torch.Tensor for tensor in states[0]['model'].values())
    assert not differences(*({name: t.shape for name, t in state['model'].items()} for state in states))
    for there, here, how in (('split', 0, '--no-model_parallel'), ('one', ranks, '--model_parallel')):
        (tmp_path / there / 'model_00020.pt').unlink()
        resumed = go('--auto_resume', f'--log_dir={there}', how, '--batch_size=1', base=[], ranks=here,
                     timeout=120).ok()
        assert losses(resumed) == pytest.approx(losses(one)[10:], abs=1e-5), there
    alone = go('--eval_only', '--generate=x', '--log_dir=one', base=[]).ok()  # nobody says model_parallel
    assert float(val_losses(alone)[0]) == pytest.approx(float(val_losses(one)[-1]), abs=2e-4)

def test_model_parallel_with_dropout_trains_and_resumes_bit_for_bit(go, tmp_path):
    words = ['--model_parallel', '--dropout=0.1', '--max_steps=8', '--checkpoint_interval=4']
    go(*words, '--log_dir=a', ranks=2).ok()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    (tmp_path / 'b/model_00008.pt').unlink()
    go('--auto_resume', '--log_dir=b', base=[], ranks=2).ok()
    a, b = (load(tmp_path / folder / 'model_00008.pt') for folder in 'ab')
    assert not differences(a['model'], b['model']) and not differences(a['optimizer'], b['optimizer'])
    assert clean_log(tmp_path / 'a/log.txt') == clean_log(tmp_path / 'b/log.txt')

@pytest.mark.parametrize('words', [['--optimizer=muon'], ['--dtype=float16'], ['--model_parallel_size=3']])
def test_what_model_parallel_cannot_do_is_refused_by_name(go, words):
    line = go('--model_parallel', *words, ranks=2).one_line()
    assert {'--optimizer=muon': 'optimizer', '--dtype=float16': 'float32'}.get(words[0], '3 ranks') in line

# ---- Muon
def test_muon_is_ahead_of_adamw_after_the_same_steps(go):
    words = ['--max_steps=10', '--n_embd=32', '--generate_interval=-1', '--warmup_steps=0']
    adamw = go(*words, '--log_dir=a', '--max_lr=4e-3').ok()
    muon = go(*words, '--log_dir=m', '--max_lr=1.2e-2', '--optimizer=muon').ok()
    assert float(val_losses(muon)[-1]) < float(val_losses(adamw)[-1]) - 0.3

def test_muon_keeps_its_state_and_gives_two_ranks_the_training_of_one(go, tmp_path):
    runs = [go('--optimizer=muon', f'--log_dir=r{ranks}', ranks=ranks).ok() for ranks in (0, 2)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    first, second = load(tmp_path / 'r0/model_00004.pt')['optimizer']
    assert len(second['state']) == 8 and all('momentum_buffer' in s for s in second['state'].values())
    assert {'exp_avg', 'exp_avg_sq', 'step'} == set(first['state'][0])
    line = go('--auto_resume', '--log_dir=r0', '--optimizer=adamw', '--max_steps=10', base=[]).one_line()
    assert '--optimizer=adamw' in line and 'muon' in line

# ---- every command of the guides that names this script, with a tiny model and two steps
GUIDE = [line for line in GUIDES.splitlines() if ' train_gpt2.py' in line
         and not re.search('--nproc_per_node=gpu|--nnodes', line)]

@pytest.mark.parametrize('line', GUIDE)
def test_guide_commands_run(launcher, tmp_path, line):
    words = shlex.split(line)
    args, ranks = words[words.index('train_gpt2.py') + 1:], 4 if words[0] == 'torchrun' else 0
    dynamic = '--dynamic_seq_length' in args
    make_text_data(tmp_path / 'data', tokens=40000 if dynamic else 3000)
    for folder in ('test_data', 'data/fineweb_edu10B'):  # where a line names another folder, or none
        shutil.copytree(tmp_path / 'data', tmp_path / folder, ignore=lambda *_: ['fineweb_edu10B'])
    tiny = ['--n_layer=1', '--n_head=2', '--n_embd=8', '--val_tokens=64', '--max_steps=2']
    tiny += ['--batch_size=1', '--total_batch_size=4096'] if dynamic else ['--block_size=16']
    if not {'--batch_size', '--grad_accumulation_steps', '--dynamic_seq_length'} & set(args):
        tiny += ['--batch_size=2', '--total_batch_size=128']
    elif '--batch_size' in args and '--grad_accumulation_steps' not in args:
        tiny += ['--total_batch_size=256']
    if '--checkpoint_path' in args:  # an earlier run wrote the step-20000 checkpoint
        launcher.run('train_gpt2.py', tiny + ['--log_dir=log'], cwd=tmp_path).ok()
        torch.save(dict(load(tmp_path / 'log/model_00002.pt'), step=20000), tmp_path / 'log/model_20000.pt')
        (tmp_path / 'log/model_00002.pt').unlink()
        tiny = ['--max_steps=20002']
    run = launcher.run('train_gpt2.py', args + tiny, cwd=tmp_path, ranks=ranks, prelude=FAKE_WANDB,
                       timeout=120, env={'DISABLE_COMPILE': '1'}).ok()
    assert '# best val loss' in run.out and ('wandb finished' in run.out) == ('--wandb_log' in args)

def test_two_nodes(tmp_path):
    """Two torchrun agents, here both on 127.0.0.1."""
    make_text_data(tmp_path / 'data')
    words = ['-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', '--master_addr=127.0.0.1',
             '--master_port=29511']
    agents = [subprocess.Popen(
        [sys.executable, *words, f'--node_rank={node}', ROOT / 'train_gpt2.py', *TINY],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1')) for node in range(2)]
    outs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert 'x 2 rank(s)' in outs[0] and '# best val loss' in outs[0] and 'val loss' not in outs[1]
    assert len(load(tmp_path / 'logs/model_00004.pt')['ranks']) == 2
