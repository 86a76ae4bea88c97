"""What train_gpt2.py alone promises: its settings, its modes, and the commands of the guides that name it."""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from harness import ROOT, TINY, clean_log, differences, load, losses, make_rows_data, make_text_data
from test_configurator import GUIDES

import model


def column(run, name):
    return [float(x) for x in re.findall(rf'\| {name} ([\d.e+-]+)', run.out)]


def test_more_ranks_than_gpus(monkeypatch, capsys):
    """Said by the first rank of the machine, which has one: the others are silent."""
    for name, value in dict(is_available=lambda: True, device_count=lambda: 4, set_device=lambda device: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert model.find_device('', 3) == 'cuda:3' and model.find_device('cuda:1') == 'cuda:1'
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(SystemExit):
        model.find_device('cuda', 0)
    assert capsys.readouterr().err == 'no device cuda:7: this machine has 4 GPU(s)\n'


# ---- learning rate: read off the log
def test_cosine(go):
    lr = column(go('--max_steps=10', '--warmup_steps=4', '--eval_interval=-1').ok(), 'lr')
    expected = [2.5e-3, 5e-3, 7.5e-3] + [1e-3 + 9e-3 * (1 + math.cos(math.pi * (s - 4) / 6)) / 2 for s in range(4, 10)]
    assert lr == pytest.approx(expected[:3] + [1e-2] + expected[3:], rel=1e-2)


def test_restarts_are_equal_cycles(go):
    lr = column(go('--max_steps=16', '--warmup_steps=0', '--lr_scheduler=cosine_with_restarts', '--lr_restarts=3', '--min_lr=0').ok(), 'lr')
    assert lr == pytest.approx([1e-2, 8.54e-3, 5e-3, 1.46e-3] * 4, rel=1e-2)


@pytest.mark.parametrize('how', [['--lr_scheduler=constant'], ['--no-decay_lr']])
def test_constant(go, how):
    assert column(go('--max_steps=5', *how).ok(), 'lr') == [5e-3] + [1e-2] * 4


def test_warmup_longer_than_the_run(go):
    assert column(go('--warmup_steps=100').ok(), 'lr') == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])


def test_the_run_learns(go):
    run = go('--max_steps=60', '--eval_interval=60', '--log_interval=10', '--max_lr=2e-2').ok()
    val = [float(x) for x in re.findall(r'val loss ([\d.]+)', run.out)]
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.1, 0.1))  # of the data: nothing can be better
    assert val[0] > 5 and entropy - 0.02 < val[-1] < entropy + 0.15


# ---- what a reader may add
def test_another_activation_is_one_entry_in_the_model_file(go, launcher, tmp_path):
    added = "import model; model.ACTIVATIONS['relu2'] = lambda x: x.relu() ** 2"
    assert '--activation=relu2: must be one of gelu_new, gelu' in go('--activation=relu2').one_line()
    go('--activation=relu2', '--max_steps=2', prelude=added).ok()
    go('--auto_resume', '--max_steps=3', base=[], prelude=added).ok()
    make_rows_data(tmp_path / 'dolly15k')
    words = ['--batch_size=4', '--max_steps=1', '--eval_answers=0', '--generate_interval=-1', '--pretrained_checkpoint=logs/model_00002.pt']
    launcher.run('finetune_dolly.py', words, cwd=tmp_path, prelude=added).ok()
    assert load(tmp_path / 'logs_finetune/model_00001.pt')['config']['activation'] == 'relu2'


# ---- batches
def test_grad_accumulation_steps_sets_the_total(go):
    run = go('--grad_accumulation_steps=3').ok()
    assert 'total_batch_size = 96 tokens' in run.out and '96 tokens per step = 2 rows x 16 x 3 micro-step(s) x 1 rank(s)' in run.out


def test_a_total_that_does_not_divide(go):
    assert 'the nearest that is: 96' in go('--total_batch_size=100').one_line()


def test_micro_batches_do_not_matter(go):
    runs = [go(f'--batch_size={b}', f'--log_dir=b{b}', '--eval_interval=-1').ok() for b in (1, 2, 8)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-6) and losses(runs[0]) == pytest.approx(losses(runs[2]), rel=1e-6)


def test_every_row_is_seen_once_an_epoch(go, tmp_path):
    """Two epochs of 253 rows in steps of 8 rows: a recorder in place of shard_rows writes down what is asked for."""
    record = f'''
import model
real = model.shard_rows
def shard_rows(shards, T, rows):
    if len(shards) == 2:
        open({str(tmp_path / 'rows')!r}, 'a').write(' '.join(str(int(r)) for r in rows) + '\\n')
    return real(shards, T, rows)
model.shard_rows = shard_rows
'''
    go('--max_steps=64', '--eval_interval=-1', '--generate_interval=-1', '--num_workers=0', '--log_interval=64', prelude=record).ok()
    rows = [int(r) for r in (tmp_path / 'rows').read_text().split()]
    n = (2037 - 1) // 16 + (2074 - 1) // 16
    assert len(rows) == 64 * 8 and sorted(rows[:n]) == list(range(n)) == sorted(rows[n:2 * n]) and rows[:n] != rows[n:2 * n]


def test_dynamic_lengths(go, tmp_path):
    args = ['--dynamic_seq_length', '--min_seq_length=4', '--max_seq_length=16', '--max_steps=12', '--eval_interval=-1']
    record = f'''
import model
real = model.GPT.forward
def forward(self, idx, targets=None, reduction='mean'):
    if targets is not None and self.training:
        open({str(tmp_path / 'shapes')!r}, 'a').write(f'{{idx.shape[0]}}x{{idx.shape[1]}} ')
    return real(self, idx, targets, reduction)
model.GPT.forward = forward
'''
    go(*args, '--log_dir=a', prelude=record).ok()
    shapes = (tmp_path / 'shapes').read_text().split()
    assert set(shapes) == {'8x4', '4x8', '2x16'}  # tokens of a micro-batch stay the same
    assert all(len(set(shapes[i:i + 4])) == 1 for i in range(0, 48, 4))  # one length a step
    go(*args, '--log_dir=b').ok()
    assert clean_log(tmp_path / 'a/log.txt') == clean_log(tmp_path / 'b/log.txt')
    for wrong in (['--min_seq_length=5'], ['--max_seq_length=32', '--min_seq_length=8'], ['--min_seq_length=32']):
        assert 'max_seq_length' in go(*args, *wrong, '--log_dir=c').one_line()


def test_val_loss_does_not_depend_on_batch_or_ranks(go):
    """250 validation tokens = 15 rows of 16: batches of 1, 2, 4 and two ranks leave different remainders."""
    run = go('--log_dir=v', '--max_steps=1', '--val_tokens=250').ok()
    assert '240 validation tokens' in run.out
    expected = load(run.cwd / 'v/model_00001.pt')['val_loss']
    for batch_size, ranks in ((1, 0), (2, 0), (4, 0), (4, 2)):
        go('--eval_only', '--log_dir=v', f'--batch_size={batch_size}', base=[], ranks=ranks).ok()
        assert json.loads((run.cwd / 'v/eval.json').read_text())['val_loss'] == pytest.approx(expected, rel=1e-6)


# ---- precision
@pytest.mark.parametrize('dtype, tolerance', [('bfloat16', 3e-2), ('float16', 3e-3)])
def test_autocast(go, dtype, tolerance):
    plain, run = go('--log_dir=a').ok(), go('--log_dir=b', f'--dtype={dtype}').ok()
    assert losses(run) == pytest.approx(losses(plain), rel=tolerance) and losses(run) != losses(plain)
    state = load(run.cwd / 'b/model_00004.pt')
    assert {t.dtype for t in state['model'].values()} == {torch.float32}
    assert bool(state['scaler']) == (dtype == 'float16')


def test_float16_overflow_is_skipped_not_fatal(go):
    """The first scale, 65536, is too large for this gradient: the scaler halves it and goes on; weights stay finite."""
    run = go('--dtype=float16', '--max_steps=8', prelude='import model\nreal = model.GPT.forward\n'
             'model.GPT.forward = lambda self, *a: real(self, *a) * (3e4 if len(a) > 1 and self.training else 1)').ok()
    state = load(run.cwd / 'logs/model_00008.pt')
    assert state['scaler']['scale'] < 65536 and all(t.isfinite().all() for t in state['model'].values())


def test_compile_gives_the_same_training(go, monkeypatch):
    """With the eager backend of torch.compile: no C++ compiler is needed, the graph is still captured."""
    prelude = '''import model
real = model.GPT.compile
model.GPT.compile = lambda self: (real(self, backend='eager'), print('compiling'))'''
    plain, run = go('--log_dir=a').ok(), go('--log_dir=b', '--compile', prelude=prelude, timeout=120).ok()
    assert 'compiling' in run.out and losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert not differences(load(run.cwd / 'a/model_00004.pt')['train_loader_state'], load(run.cwd / 'b/model_00004.pt')['train_loader_state'])
    assert load(run.cwd / 'a/model_00004.pt')['model'].keys() == load(run.cwd / 'b/model_00004.pt')['model'].keys()
    run = go('--log_dir=c', '--compile', prelude=prelude, env={'DISABLE_COMPILE': '1'}).ok()
    assert 'compiling' not in run.out and 'compile False' in run.out


# ---- what is printed
def test_log_lines(go):
    run = go('--log_gradients', '--log_level', 'debug').ok()
    assert re.search(r'^step 2/4 \(50\.00%\) \| loss \d\.\d{6} \| lr 1\.00e-02 \| norm \d+\.\d\d \| dt \d+ms \| tok/s [\d,]+ \| mfu - \| eta 0h00m \| grad wte '
                     r'[\d.e+-]+ wpe .*h\.0\.ln_1 .* h\.1\.mlp [\d.e+-]+ ln_f [\d.e+-]+$', run.out, re.MULTILINE), run.out
    assert re.search(r'^step 2/4 \| val loss \d\.\d{4}$', run.out, re.MULTILINE)
    assert len(re.findall(r'^step 3 micro-step \d/4 \| loss ', run.out, re.MULTILINE)) == 4
    block = [line for line in (run.cwd / 'logs/log.txt').read_text().splitlines() if line.startswith('# ')]
    assert len(block) <= 12
    norm = re.search(r'step 2/4 .* norm ([\d.]+) .*grad (.*)', run.out)
    assert math.sqrt(sum(float(x) ** 2 for x in norm[2].split()[1::2])) == pytest.approx(float(norm[1]), rel=1e-2)


def test_clipping(go):
    """With a tiny clip Adam sees gradients of that norm; 0 switches it off."""
    norms = {}
    for clip in ('1e-3', '0'):
        run = go('--max_steps=1', f'--grad_clip={clip}', f'--log_dir=c{clip}').ok()
        state = load(run.cwd / f'c{clip}/model_00001.pt')['optimizer']['state']
        norms[clip] = math.sqrt(sum((s['exp_avg'] / 0.1).square().sum().item() for s in state.values()))
        shown = column(run, 'norm')[0]
    assert norms['1e-3'] == pytest.approx(1e-3, rel=1e-2) and norms['0'] == pytest.approx(shown, rel=1e-2)


def test_no_control_codes_reach_the_terminal(go):
    run = go('--max_new_tokens=400', '--temperature=100', '--top_k=0', '--num_samples=9').ok()
    text = run.out.split('| sample\n', 1)[1].split('saved')[0]
    assert len(text) > 100 and not re.search(r'[^\n\t -~\xa0-\U0010ffff]', text)


# ---- modes that start no run
def test_eval_only_and_generate(go, tmp_path):
    go().ok()
    before = {path.name: path.read_bytes() for path in (tmp_path / 'logs').iterdir()}
    shown = re.findall(r'val loss ([\d.]+)', go('--eval_only', base=[]).ok().out)
    report = json.loads((tmp_path / 'logs/eval.json').read_text())
    assert set(report) == {'step', 'val_loss', 'val_tokens', 'checkpoint', 'data_root'} and report['step'] == 4 and report['val_tokens'] == 256
    assert shown == [f'{report["val_loss"]:.4f}'] == re.findall(r'step 4/4 \| val loss ([\d.]+)', before['log.txt'].decode())
    run = go('--generate=def ', '--num_samples=2', '--max_new_tokens=5', base=[]).ok()
    assert run.out.count('\ndef ') == 2 and run.out == go('--generate=def ', '--num_samples=2', '--max_new_tokens=5', base=[]).ok().out
    (tmp_path / 'data').rename(tmp_path / 'gone')  # talking needs no data
    go('--generate=def ', '--checkpoint_path=logs/model_00002.pt', base=[]).ok()
    (tmp_path / 'logs/eval.json').unlink()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'logs').iterdir()}


def test_missing_data_names_the_way_out(go):
    line = go('--data_root=nowhere').one_line()
    assert 'prepare/fineweb.py' in line and 'prepare/pydocs.py' in line and '--model=tiny' in line


@pytest.mark.parametrize('args, said', [
    (['--n_head=3'], 'n_embd 16 is not a multiple of n_head 3'), (['--dropout=1.0'], 'must be below 1'), (['--dtype=float8'], 'must be one of'),
    (['--device=tpu'], 'expected cpu, cuda'), (['--vocab_size=100'], 'smaller than the vocabulary'), (['--model=huge'], 'must be one of'),
    (['--batch_size=0'], 'must not be 0'), (['--lr_scheduler=linear'], 'must be one of'), (['--max_step=3'], 'did you mean --max_steps?')])
def test_mistakes_end_in_one_line(go, args, said):
    assert said in go(*args).one_line()


def test_hostile_checkpoints_end_in_one_line(go, tmp_path):
    """Entries of the wrong kind in an otherwise sound file: never a traceback, never a training with them."""
    go().ok()
    whole = load(tmp_path / 'logs/model_00004.pt')
    name = next(iter(whole['model']))
    for change in (
        dict(step=-1), dict(step='4'), dict(step=True), dict(ranks=[]), dict(ranks=[{}]), dict(ranks={'rng': 1}), dict(ranks=[{'rng': {'torch': torch.zeros(3)}}]),
        dict(model={}), dict(model=whole['model'] | {'extra': torch.zeros(2)}), dict(model=whole['model'] | {name: torch.zeros(3)}), dict(model=3),
        dict(model=whole['model'] | {name: 'text'}), dict(optimizer={}), dict(optimizer=dict(whole['optimizer'], state={0: {'exp_avg': torch.zeros(2)}})),
        dict(optimizer=dict(whole['optimizer'], state=3)), dict(train_loader_state={}), dict(train_loader_state=None), dict(given=dict(whole['given'], n_layer=3)),
        dict(given={'max_lr': math.nan}), dict(given=[]), dict(config=None), dict(config=dict(whole['config'], n_layer=3)), dict(log_bytes='a'), dict(log_bytes=None),
        dict(best_val_loss='x'), dict(train_loader_state=dict(whole['train_loader_state'], shards={'a': 1})), dict(config=dict(whole['config'], max_lr=torch.zeros(3))),
        dict(config=dict(whole['config'], max_steps=16 ** 9999)),
        dict(train_loader_state=dict(whole['train_loader_state'], epoch='x')), dict(seconds=None),
    ):
        torch.save({**whole, **change}, tmp_path / 'hostile.pt')
        run = go('--resume', '--checkpoint_path=hostile.pt', '--max_steps=6', '--log_dir=other', base=[])
        if change == dict(ranks=[]):
            run.ok()  # every rank is new: seeded anew, and said
            assert 'are new' in run.out
            shutil.rmtree(tmp_path / 'other')
        else:
            assert run.codes == [2], (change, run.out)
            assert 'hostile.pt' in run.one_line(), change
            assert not (tmp_path / 'other').exists(), change


def test_hostile_entries_end_in_one_line_for_the_modes_too(go, tmp_path):
    go().ok()
    whole = load(tmp_path / 'logs/model_00004.pt')
    for change in (dict(model={}), dict(tokenizer={}), dict(tokenizer=3), dict(tokenizer=dict(tokenizer='x', vocab_size=9, eot=8)), dict(given=3)):
        torch.save({**whole, **change}, tmp_path / 'hostile.pt')
        assert 'hostile.pt' in go('--generate=x', '--checkpoint_path=hostile.pt', base=[]).one_line(), change


# ---- every command of the guides that names this script (the paths are today's), with a tiny model and two steps
GUIDE = [line for line in GUIDES.splitlines() if ' train_gpt2.py' in line
         and not re.search('--nproc_per_node=gpu|--nnodes', line)]  # needs GPUs; see test_two_nodes


@pytest.mark.parametrize('line', GUIDE)
def test_guide_commands_run(launcher, tmp_path, line):
    words = shlex.split(line)
    args, ranks = words[words.index('train_gpt2.py') + 1:], 4 if words[0] == 'torchrun' else 0
    make_text_data(tmp_path / 'data/fineweb_edu10B', tokens=40000 if '--dynamic_seq_length' in args else 3000)
    for folder in ('test_data', 'data'):  # where a line names another folder
        for path in (tmp_path / 'data/fineweb_edu10B').iterdir():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    tiny = ['--n_layer=1', '--n_head=2', '--n_embd=8', '--val_tokens=64', '--max_steps=2', '--max_new_tokens=4']
    tiny += ['--block_size=1024', '--batch_size=1', '--total_batch_size=2048'] if '--dynamic_seq_length' in args else ['--block_size=16']
    if not {'--batch_size', '--grad_accumulation_steps', '--dynamic_seq_length'} & set(args):
        tiny += ['--batch_size=2', '--total_batch_size=128']
    elif '--batch_size' in args and '--grad_accumulation_steps' not in args:
        tiny += ['--total_batch_size=256']
    fake_wandb = '''
import sys, types
fake = types.ModuleType('wandb')
fake.init = lambda **kw: types.SimpleNamespace(id='abc', log=lambda *a, **k: None, finish=lambda: print('wandb finished', kw['project']))
sys.modules['wandb'] = fake
'''
    if '--checkpoint_path' in args:  # an earlier run wrote the step-20000 checkpoint
        launcher.run('train_gpt2.py', tiny + ['--log_dir=log'], cwd=tmp_path).ok()
        state = load(tmp_path / 'log/model_00002.pt')
        torch.save(dict(state, step=20000), tmp_path / 'log/model_20000.pt')
        (tmp_path / 'log/model_00002.pt').unlink()
        tiny = ['--max_steps=20002']
    run = launcher.run('train_gpt2.py', args + tiny, cwd=tmp_path, ranks=ranks, prelude=fake_wandb, env={'DISABLE_COMPILE': '1'}, timeout=120).ok()
    assert 'done: best val loss' in run.out
    assert ('wandb finished x' in run.out) == ('--wandb_log' in args)
    assert ('WARNING: --device=cuda' in run.out) == ('--device' in args and not torch.cuda.is_available())


def test_two_nodes(tmp_path):
    """The two-node form of the guide: two torchrun agents, here both on 127.0.0.1 with two processes each."""
    make_text_data(tmp_path / 'data')
    args = [*TINY, '--max_steps=2', '--batch_size=1', '--log_dir=logs']
    agents = [subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--nnodes=2', f'--node_rank={node}', '--master_addr=127.0.0.1', '--master_port=29511',
         str(ROOT / 'train_gpt2.py'), *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
        for node in range(2)]
    outs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert 'x 4 rank(s)' in outs[0] and 'done: best val loss' in outs[0] and 'val loss' not in outs[1]
    assert len(load(tmp_path / 'logs/model_00002.pt')['ranks']) == 4


def test_help(tmp_path):
    out = subprocess.run([sys.executable, ROOT / 'train_gpt2.py', '--help'], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0 and out.stderr == ''
    assert 'torchrun --standalone' in out.stdout and re.search(r'--max_lr=0\.0006 +peak learning rate', out.stdout)
    assert not list(tmp_path.iterdir())


def test_a_typed_total_beats_a_stored_accumulation(go):
    base = [word for word in TINY if not word.startswith('--total_batch_size')]
    go('--grad_accumulation_steps=3', base=base).ok()
    run = go('--auto_resume', '--total_batch_size=128', '--max_steps=6', base=[]).ok()
    assert '128 tokens per step' in run.out and 'total_batch_size 96 -> 128' in run.out


def test_no_rank_waits_for_a_sample_that_another_cannot_draw(go):
    """A tokenizer that is on one node only: no samples, not a hang."""
    prelude = '''
import model, os
real = model.load_tokenizer
def load_tokenizer(name):
    if os.environ['RANK'] == '1':
        raise OSError('not here')
    return real(name)
model.load_tokenizer = load_tokenizer
'''
    assert '| sample' not in go('--generate_interval=1', ranks=2, prelude=prelude, timeout=30).ok().out


def test_without_git(go):
    assert 'commit unknown' in go(env={'PATH': '/nonexistent'}).ok().out


def test_permanent_steps_are_numbers(go):
    run = go('--permanent_checkpoints', '1e0,3', '--checkpoint_interval=-1').ok()
    assert sorted(path.name for path in (run.cwd / 'logs').glob('model_0*')) == ['model_00001.pt', 'model_00003.pt', 'model_00004.pt']
    assert 'whole numbers' in go('--permanent_checkpoints=10k', '--log_dir=other').one_line()


def test_a_hopeless_validation_loss_is_never_saved(go):
    run = go('--max_lr=1e18', '--warmup_steps=0', '--eval_interval=1', '--grad_clip=0')
    assert run.codes == [1] and 'stopped' in run.err and len(run.err.splitlines()) == 1
    assert [path.name for path in (run.cwd / 'logs').glob('model_0*')] == []


def test_weights_alone_start_no_second_run_in_a_folder(go, tmp_path):
    go().ok()
    torch.save(load(tmp_path / 'logs/model_00004.pt')['model'], tmp_path / 'weights.pt')
    assert 'already holds a run' in go('--auto_resume', '--checkpoint_path=weights.pt').one_line()


def test_resume_from_inside_the_run_folder(launcher, go, tmp_path):
    go().ok()
    run = launcher.run('train_gpt2.py', ['--resume', '--checkpoint_path=model_00002.pt', f'--data_root={tmp_path}/data'], cwd=tmp_path / 'logs').ok()
    assert 'resumed from model_00002.pt at step 2' in run.out


@pytest.mark.parametrize('content', [torch.zeros(3), ['model'], 3, {'model': [1]}], ids=str)
def test_files_that_hold_something_else(go, tmp_path, content):
    go().ok()
    torch.save(content, tmp_path / 'logs/model_00009.pt')
    run = go('--auto_resume', base=[]).ok()
    assert 'WARNING: logs/model_00009.pt' in run.out and 'resumed from logs/model_00004.pt' in run.out
    assert 'model_00009.pt' in go('--generate=x', '--checkpoint_path=logs/model_00009.pt', base=[]).one_line()


def test_another_precision_on_resume(go):
    go('--max_steps=2').ok()
    run = go('--auto_resume', '--dtype=float16', '--max_steps=4', base=[]).ok()
    assert load(run.cwd / 'logs/model_00004.pt')['scaler']['scale'] > 0


def test_a_broken_pipe_costs_nothing(tmp_path):
    """`python train_gpt2.py | tee`, and Ctrl-C reaches tee too: the last whole step is saved all the same."""
    make_text_data(tmp_path / 'data')
    process = subprocess.Popen([sys.executable, ROOT / 'train_gpt2.py', *TINY, '--max_steps=100000', '--checkpoint_interval=-1', '--eval_interval=-1'], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    while 'step 3/' not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    process.terminate()
    assert process.wait(30) == 143 and process.stderr.read() == ''
    assert len(list((tmp_path / 'logs').glob('model_0*.pt'))) == 1


def test_a_missing_path_names_the_likeliest_first(go, tmp_path):
    go().ok()
    for folder in ('zzz', 'logs_finetune', 'x_logs'):
        shutil.copytree(tmp_path / 'logs', tmp_path / folder)
    assert go('--eval_only', '--checkpoint_path=log/model_00004.pt', base=[]).one_line().strip().endswith('logs/model_00004.pt')
