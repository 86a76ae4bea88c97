"""The command line of every script: each form that the guides use, and each mistake a user can make."""
import ast
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from configurator import LAUNCH, configure
from test_configurator_old import GUIDES  # noqa: F401  (the tests of the scripts look for it here)

ROOT = Path(__file__).resolve().parents[1]
ALIASES = {'lr': 'max_lr', 'use_average': 'ema'}
SCRIPT = '''"""Trains nothing."""
import os
os.environ['NOT_A_SETTING'] = '1'

# ---- data ----
log_dir = 'logs'             # folder of this run
data_paths = ['data/a']      # folders to read
input = []                   # files
evaluators = []              # names; [] = none
# model
L_layers = 2                 # blocks
pos_encodings = 'rope'       # rope | learned | none: how positions enter
# optimization
max_lr = 6e-4                # peak learning rate
min_lr = 6e-5                # 0 = nothing; -1 = max_lr / 10
betas = [0.9, 0.95]          # of Adam
batch_size = 16              # sequences per rank
eval_interval = 250          # steps; -1 = never
log_level = 'INFO'           # INFO | DEBUG; any case
permanent_checkpoints = []   # steps that are never deleted
run_name = 'run # 1'         # only a name
ema = True                   # average the weights
compile = False              # torch.compile
auto_resume = False          # go on where the newest checkpoint ends
checkpoint_path = ''         # of --resume
milestones = [10, 20]        # steps with a sample
config = configure(globals(), aliases={'lr': 'max_lr', 'use_average': 'ema'})
later = 1                    # not a setting
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory with train.py, on a process without ranks."""
    for name in (*configurator.TORCHRUN, 'TORCHELASTIC_RUN_ID', 'DISABLE_COMPILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path('train.py').write_text(SCRIPT, encoding='utf-8')
    return tmp_path


def parse(*words):
    namespace = {'__file__': 'train.py', '__doc__': 'Trains nothing.'}
    config = configure(namespace, list(words), ALIASES)
    assert {name: namespace[name] for name in config} == config
    return config


def refused(capsys, call, *args):
    """The one line on stderr with which the call ends, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == '' and err.endswith('\n') and len(err.splitlines()) == 1
    return err


# ---- what is understood ----

@pytest.mark.parametrize('line, expected', [
    ('--max_lr=6e-3', {'max_lr': 6e-3}), ('--max_lr 6e-3', {'max_lr': 6e-3}), ('max_lr=6', {'max_lr': 6.0}),
    ('+run_name=x ++log_dir=y', {'run_name': 'x', 'log_dir': 'y'}),
    ('arch.L_layers=3 --arch.pos-encodings none', {'L_layers': 3, 'pos_encodings': 'none'}),
    ('BATCH_SIZE=4 MAX_LR=1', {'batch_size': 4, 'max_lr': 1.0}),
    ('--log-dir=a-b_c --L-layers 3', {'log_dir': 'a-b_c', 'L_layers': 3}),
    ('--compile --no-ema', {'compile': True, 'ema': False}),
    ('--no_ema --batch_size 4', {'ema': False, 'batch_size': 4}),
    ('--ema false --compile 1', {'ema': False, 'compile': True}), ('ema=False', {'ema': False}),
    ('--compile max_lr=1', {'compile': True, 'max_lr': 1.0}),
    ('--milestones 10,30', {'milestones': [10, 30]}), ('--milestones 10 30', {'milestones': [10, 30]}),
    ('milestones="[10, 30]" --betas 0,.5', {'milestones': [10, 30], 'betas': [0.0, 0.5]}),
    ('data_paths="[a,b]"', {'data_paths': ['a', 'b']}),
    ("data_paths=\"['a', 'b[1]']\"", {'data_paths': ['a', 'b[1]']}),
    ('evaluators="[{name: arc@ARC}]"', {'evaluators': ['arc@ARC']}),
    ('data_paths="[]" evaluators=', {'data_paths': [], 'evaluators': []}),
    ('--permanent_checkpoints 10000,2e4', {'permanent_checkpoints': [10000, 20000]}),
    ('--permanent_checkpoints 10 -20', {'permanent_checkpoints': [10, -20]}),
    ('--data_paths a b max_lr=1', {'data_paths': ['a', 'b'], 'max_lr': 1.0}),
    ('--batch_size 1e4 --max_lr 0', {'batch_size': 10000, 'max_lr': 0.0}),
    ('--min_lr -1 --eval_interval -1', {'min_lr': -1.0, 'eval_interval': -1}),
    ('--run_name a=b=c', {'run_name': 'a=b=c'}),
    ('run_name== --log_dir -x', {'run_name': '=', 'log_dir': '-x'}),
    ("--run_name=--max_lr --log_dir ''", {'run_name': '--max_lr', 'log_dir': ''}),
    ("--run_name 'two words' log_dir=x.py", {'run_name': 'two words', 'log_dir': 'x.py'}),
    ('--log_level debug --pos_encodings=NONE', {'log_level': 'DEBUG', 'pos_encodings': 'none'}),
    ('--max_lr 1 max_lr=2 --lr=3', {'max_lr': 3.0}),  # the last one wins
    ('', {}),
])
def test_every_form_is_understood(line, expected):
    config, defaults = parse(*shlex.split(line)), parse()
    assert config == {**defaults, **expected} and config.typed == set(expected)
    assert [type(value) for value in config.values()] == [type(value) for value in defaults.values()]


def test_aliases_work_in_all_forms():
    Path('mine.py').write_text('lr = 4\n')
    for words, value in (('--lr 2', 2), ('LR=3', 3), ('+lr=5', 5), ('arch.lr=6', 6), ('mine.py', 4)):
        config = parse(*words.split())
        assert config['max_lr'] == value and config.typed == {'max_lr'}
    for words in ('--no-use-average', '--no_use_average', 'USE_AVERAGE=0', '--NO-USE-AVERAGE'):
        assert parse(words)['ema'] is False


def test_an_existing_path_with_a_comma_stays_whole():
    Path('a, b.txt').touch()
    assert parse('--input', 'a, b.txt', 'c.txt')['input'] == ['a, b.txt', 'c.txt']
    assert parse('--input=a, b.txt')['input'] == ['a, b.txt']
    assert parse('--input', 'a,b')['input'] == ['a', 'b']


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    Path('mine.py').write_text('run_name = "~/r"\n')
    config = parse('mine.py', '--log_dir=~/x', '--data_paths', '~', 'a~')
    assert config['log_dir'] == '/home/me/x' and config['data_paths'] == ['/home/me', 'a~']
    assert config['run_name'] == '/home/me/r' and parse('run_name=~ me')['run_name'] == '~ me'


def test_only_what_stands_alone_above_the_call_is_a_setting():
    config = parse()
    assert list(config)[:2] == ['log_dir', 'data_paths'] and config['run_name'] == 'run # 1'
    assert 'later' not in config and 'os' not in config


def test_the_given_settings_are_echoed_once_and_cut(capsys):
    parse()
    parse('run_name=a\nb', '--no-ema', '--lr=1', '--lr=2')
    assert capsys.readouterr().out == "settings given: run_name='a\\nb' ema=False max_lr=2.0\n"
    parse('--input', *[f'file_{number}.txt' for number in range(200)])
    out = capsys.readouterr().out
    assert out.startswith("settings given: input=['file_0.txt', ") and '...' in out and len(out) < 300
    parse('--run_name=' + 'x' * 10000)
    assert len(capsys.readouterr().out) < 300


def test_disable_compile_wins(monkeypatch):
    monkeypatch.setenv('DISABLE_COMPILE', '1')
    assert parse('--compile')['compile'] is False
    config = parse()
    config.fill({'compile': True})
    config.restore({'compile': True}, 'model.pt')
    assert config['compile'] is False
    monkeypatch.setenv('DISABLE_COMPILE', '0')
    assert parse('--compile')['compile'] is True


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_lists_settings_under_their_headings(flag, capsys):
    with pytest.raises(SystemExit) as end:
        parse('--max_lr=1', flag, '--not_read')
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith('Trains nothing.\n\ndata\n  --log_dir=')
    assert [row for row in out.splitlines()[1:] if row and row[0] != ' '] == ['data', 'model', 'optimization']
    rows = {row.split('=')[0].strip(): row.split() for row in out.splitlines()}
    assert rows['--max_lr'] == ['--max_lr=0.0006', 'peak', 'learning', 'rate'] and 'later' not in out


# ---- what is refused ----

@pytest.mark.parametrize('line, said', [
    ('--max_lrr=1', 'unknown setting max_lrr, did you mean max_lr?'),
    ('MAX_LRR=1', 'did you mean max_lr?'),
    ('--zzzzzzz 1', 'unknown setting zzzzzzz, did you mean --help?'),
    ('__file__=x', 'unknown setting'), ('later=2', 'unknown setting'), ('no_ema=true', 'unknown setting'),
    ('--batch_size=abc', '--batch_size=abc: expected a whole number'),
    ('--batch_size=1.5', 'expected a whole number'), ('--batch_size=', 'expected a whole number'),
    ('--batch_size true', 'expected a whole number'), ('--batch_size 1e99', 'expected a whole number'),
    ('--batch_size=' + '9' * 5000, 'expected a whole number'),
    ('--max_lr=fast', 'expected a number'), ('--max_lr=nan', 'expected a number'),
    ('--max_lr=-inf', 'expected a number'), ('--max_lr=1e999', 'expected a number'),
    ('--betas 0.9 x', 'expected a number'), ('--milestones=1.5', 'expected a whole number'),
    ('--ema=yes', 'expected true/false'), ('--ema=', 'expected true/false'),
    ('--no-ema=true', 'expected true/false'), ('--no-max_lr', 'expected a number'),
    ('--pos_encodings linear', 'must be one of rope, learned, none'),
    ('--pos_encodings=', 'must be one of rope, learned, none'),
    ('--batch_size=0', 'must not be 0'), ('--batch_size=-3', 'must not be -3'),
    ('--eval_interval=0', 'must not be 0'), ('--max_lr=-1e-3', 'must not be -0.001'),
    ('--batch_size', '--batch_size needs a value'), ('--log_dir --ema', '--log_dir needs a value'),
    ('--data_paths', '--data_paths needs a value'), ('--data_paths --ema', '--data_paths needs a value'),
    ('max_lr', 'max_lr is neither --name=value nor'), ('--max_lr 1 2', '2 is neither --name=value nor'),
    ('-max_lr=3', 'is neither'), ('--', 'is neither'), ("''", 'is neither'), ("'max_lr =3'", 'is neither'),
    ("'a\nb'", 'is neither'), ('nofile.py', 'No such file'), ('x' * 5000 + '.py', 'too long'),
])
def test_a_mistake_ends_in_one_line(line, said, capsys):
    assert said in refused(capsys, parse, *shlex.split(line))


# ---- settings files ----

def test_a_saved_file_brings_back_the_same():
    text = 'line\nnext\t"quoted" \'both\' \\d \u2028 \u00e9 \U0001f600 \x00 # = '
    config = parse('--min_lr', '-1', '--lr=1e-300', '--compile', '--data_paths', 'ü', "it's",
                   '--auto_resume', '--checkpoint_path=c', f'--run_name={text}', '--milestones', '-1,2')
    config.save('saved.py')
    again = parse('saved.py')
    assert again == {**config, 'auto_resume': False, 'checkpoint_path': ''} and again['run_name'] == text
    assert again.typed == set(config) - set(LAUNCH) and not Path('saved.py.tmp').exists()


def test_a_settings_file_counts_as_typed_where_it_stands():
    text = '"""Mine."""\n# faster\nMAX_LR = 1\nbatch_size = 1e2\nlog_level = "debug"\nbetas = [0, 1]\n'
    Path('mine.py').write_text(text, encoding='utf-8-sig')
    config = parse('--max_lr=5', './mine.py', '--batch_size=3')
    assert (config['max_lr'], config['batch_size'], config['log_level']) == (1.0, 3, 'DEBUG')
    assert config['betas'] == [0.0, 1.0] and config.typed == {'max_lr', 'batch_size', 'log_level', 'betas'}


@pytest.mark.parametrize('text', [
    'import os\nos.system("touch ran")', 'max_lr = __import__("os").system("touch ran")', 'max_lr = 2 * 3',
    'run_name = f"{open(\'ran\', \'w\')}"', 'if 1:\n    max_lr = 1', 'def max_lr(x=open("ran", "w")): pass',
    'max_lr: float = 1', 'max_lr += 1', 'max_lr = batch_size = 1', 'max_lr, min_lr = 1, 2', 'max_lr.x = 1',
    'max_lr = None', 'max_lr = {1: 2}', 'max_lr = 1j', 'max_lr = 1e999', 'batch_size = True', 'ema = 1',
    'batch_size = 1.5', 'later = 1', 'data_paths = "a"', 'data_paths = ["a", 1]', 'milestones = [True]',
    'milestones = [[1]]', 'pos_encodings = "linear"', 'batch_size = 0', 'max_lr = ', 'max_lr = 1\x00',
    'max_lr = "' + 'x' * 9999, 'milestones = ' + '[' * 9999, 'max_lr = ' + '-' * 99999 + '1',
], ids=lambda text: text[:30])
def test_a_settings_file_is_parsed_and_never_executed(text, capsys):
    Path('evil.py').write_text(text)
    assert 'evil.py' in refused(capsys, parse, 'evil.py') and not Path('ran').exists()


# ---- presets and resume ----

def test_fill_assigns_what_was_not_typed():
    config = parse('--batch_size', '16', '--run_name=run')
    config.fill({'batch_size': 99, 'max_lr': 1.0, 'run_name': 'preset', 'no_setting': 1})
    assert (config['batch_size'], config['max_lr'], config['run_name']) == (16, 1.0, 'run')
    assert config.namespace['max_lr'] == 1.0 and config.typed == {'batch_size', 'run_name'}
    assert 'no_setting' not in config and 'no_setting' not in config.namespace


def test_restore_brings_a_run_back_and_says_what_differs(capsys):
    stored = dict(parse('--batch_size=3', '--no-ema', '--data_paths', 'a', '--auto_resume', '--log_dir=old'))
    config = parse('--max_lr', '1e-4', '--checkpoint_path=y', '--batch_size=3')
    capsys.readouterr()
    config.restore({**stored, 'gone': 1, 3: 4}, 'model.pt')
    assert capsys.readouterr().out == 'max_lr 0.0006 -> 0.0001\n'
    assert config['batch_size'] == 3 and config['ema'] is False and config.namespace['data_paths'] == ['a']
    assert config['max_lr'] == 1e-4 and config['log_dir'] == 'logs'
    assert config['auto_resume'] is False and config['checkpoint_path'] == 'y' and 'gone' not in config


@pytest.mark.parametrize('stored', [
    {'batch_size': 'abc'}, {'batch_size': None}, {'batch_size': True}, {'batch_size': 1.5}, {'ema': 1},
    {'batch_size': float('nan')}, {'batch_size': 2 ** 63}, {'max_lr': float('inf')}, {'max_lr': 10 ** 400},
    {'run_name': 3}, {'run_name': b'x'}, {'pos_encodings': 'linear'}, {'data_paths': 'a'},
    {'data_paths': ('a',)}, {'data_paths': [1]}, {'betas': [float('nan')]}, {'input': [{}]},
], ids=str)
def test_restore_checks_the_type_of_what_is_stored(stored, capsys):
    config = parse()
    assert refused(capsys, config.restore, stored, 'model.pt').startswith(f'model.pt: {list(stored)[0]}: ')
    assert config == parse()


# ---- ranks and streams ----

def python(*words, **env):
    """A real run of train.py."""
    start = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from configurator import configure, print0\n'
    Path('real.py').write_text(start + SCRIPT + 'print0(config["max_lr"])\n', encoding='utf-8')
    return subprocess.run([sys.executable, 'real.py', *words], env={**os.environ, **env},
                          capture_output=True, timeout=60)


def test_a_process_prints_what_it_can_and_refuses_in_one_line():
    done = python('--max_lr=3', 'run_name=é', PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stderr) == (0, b'') and b"run_name='\\xe9'" in done.stdout
    done = python(b'--batch_size=\xff')
    assert done.returncode == 2 and done.stdout == b'' and done.stderr.count(b'\n') == 1


def test_a_reader_that_is_gone_costs_nothing():
    end, pipe = os.pipe()
    os.close(end)
    assert python('-h').returncode == 0  # writes real.py
    done = subprocess.run([sys.executable, 'real.py', '--max_lr=3'], stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b'')


def test_only_the_complete_set_of_torchruns_variables_makes_ranks(monkeypatch, capsys):
    naps = []
    monkeypatch.setattr(configurator.time, 'sleep', naps.append)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    for name in configurator.TORCHRUN:
        assert 'needs a value' in refused(capsys, parse, '--max_lr')  # a cluster's variables make no rank 1
        monkeypatch.setenv(name, '1')
    with pytest.raises(SystemExit) as end:
        parse('--max_lr')
    configurator.print0('silent')
    assert end.value.code == 2 and capsys.readouterr() == ('', '') and naps == [3]
    monkeypatch.setenv('LOCAL_RANK', '0')  # the first of the second node
    with pytest.raises(SystemExit) as end:
        configurator.fail('disk\nfull', 1)
    assert end.value.code == 1 and capsys.readouterr() == ('', 'disk full\n') and naps == [3]
    monkeypatch.setenv('MASTER_ADDR', '')
    configurator.print0('heard')
    assert capsys.readouterr().out == 'heard\n'


# ---- random words, and the guides ----

def test_random_words_never_end_in_a_traceback(fuzz, capsys):
    parts = ['--', '-', '+', '=', '', ' ', '\n', 'true', '0', '-1', '1e4', 'nan', '9' * 30, '[', ']',
             '[a,b]', '{name:', "'", ',', 'ü', '\x00', 'no-', 'arch.', '.py', 'LR', '~', *parse()]
    for seed in range(fuzz):
        random.seed(seed)
        words = [''.join(random.choices(parts, k=random.randint(1, 4))) for _ in range(random.randint(1, 4))]
        try:
            config = parse(*words)
        except SystemExit as end:
            assert end.code in (0, 2)
            continue
        config.save('saved.py')
        assert {**parse('saved.py'), **{name: config[name] for name in LAUNCH if name in config}} == config


def guide_lines():
    guides = ROOT.parent / 'shared/check/guide_commands.txt'
    return guides.read_text(encoding='utf-8').splitlines() if guides.exists() else []


@pytest.mark.skipif(not guide_lines(), reason='the list of all commands is not here')
def test_every_line_of_the_guides_is_understood():
    source = (ROOT / 'train_gpt2.py').read_text(encoding='utf-8')
    aliases = ast.literal_eval(re.search(r'aliases=({.*?})', source, re.DOTALL)[1])
    for line in guide_lines():
        if ' train_gpt2.py' in line and not line.startswith('#'):
            words = shlex.split(line.partition(' train_gpt2.py')[2])
            config = configure({'__file__': str(ROOT / 'train_gpt2.py')}, words, aliases)
            assert bool(config.typed) == bool(words), line
