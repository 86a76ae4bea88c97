"""The command line of every script: each form that the guides use, each mistake a user can make, and hostile files.

python -m pytest tests/test_configurator.py --fuzz=2000     (100 random command lines and 100 random settings files else)
"""
import ast
import contextlib
import importlib.util
import io
import math
import os
import random
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from configurator import nearby

ROOT = Path(__file__).resolve().parents[1]
ALIASES = {'lr': 'max_lr', 'use_average': 'ema'}
SCRIPT = '''"""Trains nothing.

python train.py --max_lr=1e-3
"""
import os

# a banner far above is no heading

# -- data --
log_dir = 'logs'             # folder of this run
data_paths = ['data/a']      # folders to read
subsets = ['training']       # which parts
evaluators = []              # names; [] = none
# model
L_layers = 2                 # blocks
model = 'tiny'               # preset
pos_encodings = 'rope'       # rope | learned | none: how positions enter
# optimization
max_lr = 6e-4                # peak learning rate
betas = [0.9, 0.95]          # of Adam
batch_size = 16              # sequences per rank
eval_interval = 250          # steps, -1 = never
num_epochs = 5               # passes
scheduler = 'cosine'         # cosine | constant
log_level = 'INFO'           # INFO | DEBUG, any case
dtype = ''                   # bfloat16 | float32, '' = by device
permanent_checkpoints = []   # steps that are never deleted
base_checkpoint = ''         # initialise from; '' = none
run_name = 'run'             # only a name
ema = True                   # average the weights
compile = False              # torch.compile
auto_resume = False          # go on where the newest checkpoint ends
checkpoint_path = ''         # of --resume
milestones = [
    10,  # first
    20,
]                            # steps with a sample

# a banner below is no heading either
config = configure(globals(), aliases={'lr': 'max_lr', 'use_average': 'ema'})
later = 1                    # not a setting
'''


def load():
    spec = importlib.util.spec_from_file_location('configurator_under_test', ROOT / 'configurator.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory with train.py, on rank 0."""
    for name in ('RANK', 'TORCHELASTIC_RUN_ID', 'DISABLE_COMPILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path('train.py').write_text(SCRIPT, encoding='utf-8')
    return tmp_path


def parse(*argv, source=None, aliases=ALIASES):
    """The Config of train.py (or of another source) for these words."""
    if source is not None:
        Path('other.py').write_text(source, encoding='utf-8')
    namespace = {'__file__': 'train.py' if source is None else 'other.py'}
    config = load().configure(namespace, list(argv), aliases)
    assert {name: namespace[name] for name in config} == config
    return config


def attempt(call, *args, **kwargs):
    """(what the call returns or None, exit code or None, its stdout, its stderr), streams as python opens them in UTF-8."""
    out, err = io.TextIOWrapper(io.BytesIO(), 'utf-8'), io.TextIOWrapper(io.BytesIO(), 'utf-8', errors='backslashreplace')
    result = code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = call(*args, **kwargs)
        except SystemExit as exit:
            code = exit.code
    out.flush(), err.flush()
    return result, code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def refused(call, *args, **kwargs):
    """The one line on stderr with which the call ends, exit code 2."""
    result, code, out, err = attempt(call, *args, **kwargs)
    assert code == 2, f'accepted: {result}' if code is None else f'exit code {code}'
    assert out == '' and err.endswith('\n') and len(err.splitlines()) == 1 and len(err) > 10, (out, err)
    return err


def python(*argv, **env):
    """A real run of train.py."""
    source = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from configurator import configure\n' + SCRIPT + 'print(config["max_lr"])\n'
    Path('real.py').write_text(source, encoding='utf-8')
    env = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1', **env}
    return subprocess.run([sys.executable, 'real.py', *argv], env=env, capture_output=True, timeout=60)


# ---- what is accepted ----

@pytest.mark.parametrize('line, expected', [
    # three ways to set
    ('--max_lr=6e-3', {'max_lr': 6e-3}),
    ('--max_lr 6e-3', {'max_lr': 6e-3}),
    ('max_lr=6e-3', {'max_lr': 6e-3}),
    # '-' reads as '_'
    ('--base-checkpoint X --L-layers 3', {'base_checkpoint': 'X', 'L_layers': 3}),
    ('--base-checkpoint=a-b_c', {'base_checkpoint': 'a-b_c'}),
    # bool
    ('--compile', {'compile': True}),
    ('--ema', {'ema': True}),
    ('--no-ema', {'ema': False}),
    ('--no_ema', {'ema': False}),
    ('--ema false', {'ema': False}),
    ('--ema 0 --compile 1', {'ema': False, 'compile': True}),
    ('--compile TRUE', {'compile': True}),
    ('ema=False compile=True', {'ema': False, 'compile': True}),
    ('--compile=False', {'compile': False}),
    ('--no-use-average', {'ema': False}),
    ('--auto_resume --batch_size 4', {'auto_resume': True, 'batch_size': 4}),
    ('--compile max_lr=1', {'compile': True, 'max_lr': 1.0}),
    ('--no-ema --compile', {'ema': False, 'compile': True}),
    # hydra's spellings
    ('+run_name=x', {'run_name': 'x'}),
    ('++run_name=x', {'run_name': 'x'}),
    ('arch.L_layers=2 arch.pos_encodings=none', {'L_layers': 2, 'pos_encodings': 'none'}),
    ('--arch.L-layers 7', {'L_layers': 7}),
    # lists
    ('data_paths="[a,b]"', {'data_paths': ['a', 'b']}),
    ('data_paths="[ a , b ]"', {'data_paths': ['a', 'b']}),
    ("""data_paths='["a, b", c]'""", {'data_paths': ['a, b', 'c']}),
    ("data_paths=\"['a']\"", {'data_paths': ['a']}),
    ('data_paths=a,b[1]', {'data_paths': ['a', 'b[1]']}),
    ('data_paths="[a, , b,]"', {'data_paths': ['a', 'b']}),
    ('data_paths=7', {'data_paths': ['7']}),
    ('--permanent_checkpoints 10000,20000', {'permanent_checkpoints': [10000, 20000]}),
    ('--permanent_checkpoints=10,x', {'permanent_checkpoints': ['10', 'x']}),
    ('--permanent_checkpoints 10 -20', {'permanent_checkpoints': [10, -20]}),
    ('--milestones 1e3,5', {'milestones': [1000, 5]}),
    ('--betas 0,.5', {'betas': [0.0, 0.5]}),
    ('--milestones [1, 2]', {'milestones': [1, 2]}),
    ('evaluators="[{name: arc@ARC}]"', {'evaluators': ['arc@ARC']}),
    ('evaluators="[{name: a}, {name: \'b\'}]"', {'evaluators': ['a', 'b']}),
    ('data_paths="[]"', {'data_paths': []}),
    ('data_paths=', {'data_paths': []}),
    # a list takes the words that follow it, up to the next setting
    ('--subsets training evaluation concept', {'subsets': ['training', 'evaluation', 'concept']}),
    ('--subsets a b --max_lr 1', {'subsets': ['a', 'b'], 'max_lr': 1.0}),
    ('--subsets a b max_lr=1', {'subsets': ['a', 'b'], 'max_lr': 1.0}),
    ('--subsets a b +run_name=x', {'subsets': ['a', 'b'], 'run_name': 'x'}),
    ('--subsets a b arch.L_layers=3', {'subsets': ['a', 'b'], 'L_layers': 3}),
    ('--subsets=a --subsets b', {'subsets': ['b']}),
    # upper case
    ('NUM_EPOCHS=7 BATCH_SIZE=4 LOG_LEVEL=debug', {'num_epochs': 7, 'batch_size': 4, 'log_level': 'DEBUG'}),
    ('LR=0.5 --NO-EMA', {'max_lr': 0.5, 'ema': False}),
    # aliases
    ('--lr 2', {'max_lr': 2.0}),
    ('lr=3 use_average=0', {'max_lr': 3.0, 'ema': False}),
    # numbers
    ('--batch_size 1e4', {'batch_size': 10000}),
    ('--batch_size=+3', {'batch_size': 3}),
    ('--batch_size 9007199254740993', {'batch_size': 9007199254740993}),
    ('--max_lr 0', {'max_lr': 0.0}),
    ('--eval_interval -1', {'eval_interval': -1}),
    # text takes anything, and splits at the first '='
    ('--run_name a=b=c', {'run_name': 'a=b=c'}),
    ('--run_name=a=b', {'run_name': 'a=b'}),
    ('run_name==', {'run_name': '='}),
    ('--run_name -x', {'run_name': '-x'}),
    ('--run_name=--max_lr', {'run_name': '--max_lr'}),
    ("--run_name=''", {'run_name': ''}),
    ("--run_name ''", {'run_name': ''}),
    ("--run_name 'two words'", {'run_name': 'two words'}),
    ('--run_name config.py', {'run_name': 'config.py'}),
    ('run_name=x.py', {'run_name': 'x.py'}),
    # choices: those of the comment, in any case; a default outside them leaves the value free
    ('--scheduler constant', {'scheduler': 'constant'}),
    ('--scheduler=CONSTANT', {'scheduler': 'constant'}),
    ('--log_level info', {'log_level': 'INFO'}),
    ('--dtype float16', {'dtype': 'float16'}),
    # the last one wins
    ('--max_lr 1 max_lr=2 --lr=3', {'max_lr': 3.0}),
    ('', {}),
])
def test_form(line, expected):
    config = parse(*shlex.split(line))
    for name, value in expected.items():
        assert config[name] == value and type(config[name]) is type(value), (name, config[name])
        assert not isinstance(value, list) or [type(v) for v in value] == [type(v) for v in config[name]]
    defaults = parse()
    assert config.given == set(expected)
    assert {name: config[name] for name in config if name not in expected} == {n: defaults[n] for n in defaults if n not in expected}


def test_types_and_names():
    config = parse()
    assert isinstance(config, dict) and list(config)[:3] == ['log_dir', 'data_paths', 'subsets']
    assert config['milestones'] == [10, 20] and config['L_layers'] == 2
    assert 'later' not in config and 'os' not in config
    assert refused(parse, '--later=2').startswith('unknown setting --later')
    assert parse(source="a = 'x' 'y'  # text\nb = -1\n'text'\nconfigure(globals())\nc = 1\n") == {'a': 'xy', 'b': -1}
    assert parse(source="a = 1\nif a:\n    b = a + 1\ndef f(x=a):\n    y = x\nif __name__ == '__main__':\n    configure(globals())\n") == {'a': 1}


def test_prints_what_was_given_once():
    _, code, out, err = attempt(parse, 'run_name=a\nb', '--no-ema', '--lr=1', '--lr=2')
    assert code is None and err == '' and out == "settings given: max_lr=2.0 run_name='a\\nb' ema=False\n"
    assert attempt(parse)[1:] == (None, '', '')


def test_disable_compile(monkeypatch):
    config = parse('--compile')
    assert config['compile'] is True
    monkeypatch.setenv('DISABLE_COMPILE', '1')
    assert parse('--compile')['compile'] is False
    assert parse(source='compile = True\nconfigure(globals())')['compile'] is False
    config = parse()
    config.fill({'compile': True})
    assert config['compile'] is False and config.namespace['compile'] is False
    config.restore({'compile': True}, 'x.pt')
    assert config['compile'] is False


# ---- what is refused ----

@pytest.mark.parametrize('line, message', [
    ('--max_lrr=1', 'unknown setting --max_lrr, did you mean --max_lr?'),
    ('max_lrr=1', 'unknown setting max_lrr, did you mean max_lr?'),
    ('--MAX_LRR=1', 'did you mean --max_lr?'),
    ('--zzzzzzz 1', 'unknown setting --zzzzzzz (--help lists the names)'),
    ('--no-max_lr', 'unknown setting --no_max_lr'),
    ('--Max_Lr=1', 'unknown setting'),
    ('__file__=x', 'unknown setting'),
    ('--arch.=1', 'unknown setting'),
    ('--batch_size=abc', '--batch_size=abc: expected a whole number'),
    ('--batch_size=1.5', 'expected a whole number'),
    ('--batch_size=', 'expected a whole number'),
    ('--batch_size true', 'expected a whole number'),
    ('--batch_size 1e99', 'expected a finite number'),
    ('--batch_size 99999999999999999999', 'expected a finite number'),
    ('--batch_size=' + '9' * 5000, 'expected a whole number'),
    ('--max_lr=fast', 'expected a number'),
    ('--max_lr=nan', 'expected a finite number'),
    ('--max_lr=-inf', 'expected a finite number'),
    ('--max_lr=1e999', 'expected a finite number'),
    ('--betas nan 0.9', 'expected a finite number'),
    ('--betas 0.9 x', 'expected a list like [0.9, 0.95]'),
    ('--milestones=1.5', 'expected a whole number'),
    ('--milestones=a,b', 'expected a list like [10, 20]'),
    ('--ema=yes', '--ema=yes: expected true or false'),
    ('--ema=', 'expected true or false'),
    ('--no-ema=true', 'takes no value'),
    ('no_ema=true', 'takes no value'),
    ('--no-ema false', "'false' is no setting"),
    ('--ema yes', "'yes' is no setting"),
    ('--scheduler linear', 'must be one of cosine, constant'),
    ('--pos_encodings=', 'must be one of rope, learned, none'),
    # a missing value
    ('--batch_size', '--batch_size needs a value'),
    ('--log_dir --batch_size 4', '--log_dir needs a value'),
    ('--log_dir --help', '--log_dir needs a value'),
    ('--log_dir -h', '--log_dir needs a value'),
    ('--subsets', '--subsets needs a value'),
    ('--subsets --ema', '--subsets needs a value'),
    ('--subsets max_lr=1', '--subsets needs a value'),
    # no setting at all
    ('max_lr', "'max_lr' is no setting"),
    ('max_lr 3', "'max_lr' is no setting"),
    ('+run_name x', "'+run_name' is no setting"),
    ('-max_lr=3', 'is no setting'),
    ('--max_lr 1 2', "'2' is no setting"),
    ('--', "'--' is no setting"),
    ("''", "'' is no setting"),
    ('=', "'=' is no setting"),
    ('=x.py', 'is no setting'),
    ("'--max_lr 3'", 'is no setting'),
    ("'max_lr =3'", 'is no setting'),
    ("'a\nb'", 'is no setting'),
    ("'--run\nname=3'", 'is no setting'),
    ("--batch_size='1\n\u2028\x0b2'", 'expected a whole number'),
    # settings files that are none
    ('nofile.py', 'nofile.py: No such file or directory'),
    ('no/such/file.py', 'No such file'),
    ("'two\nlines.py'", 'No such file'),
    ('x' * 5000 + '.py', 'settings file'),
])
def test_refused(line, message):
    assert message in refused(parse, *shlex.split(line))


@pytest.mark.parametrize('source, line', [
    ('a = 1\nb = 2 * a\nconfigure(globals())', 2),
    ('a = 1\n\nb = None\nconfigure(globals())', 3),
    ('a = {}\nconfigure(globals())', 1),
    ('a = {"x": 1}\nconfigure(globals())', 1),
    ('a = (1, 2)\nconfigure(globals())', 1),
    ('a = {1}\nconfigure(globals())', 1),
    ('a = b"x"\nconfigure(globals())', 1),
    ('a = 1j\nconfigure(globals())', 1),
    ('a = ...\nconfigure(globals())', 1),
    ('a = f"{1}"\nconfigure(globals())', 1),
    ('a = print("ran")\nconfigure(globals())', 1),
    ('a = 1e999\nconfigure(globals())', 1),
    ('a = [1, "x"]\nconfigure(globals())', 1),
    ('a = [None]\nconfigure(globals())', 1),
    ('a = [[1]]\nconfigure(globals())', 1),
    ('a, b = 1, 2\nconfigure(globals())', 1),
    ('a = b = 1\nconfigure(globals())', 1),
    ('a = 1\na += 1\nconfigure(globals())', 2),
    ('a: int = 1\nconfigure(globals())', 1),
    ('a: int\nconfigure(globals())', 1),
    ('a = []\na[0:] = [1]\nconfigure(globals())', 2),
    ('import os\nos.x = 1\nconfigure(globals())', 2),
])
def test_default_that_is_no_literal(source, line):
    assert f'other.py:{line}: ' in refused(parse, source=source)


def test_bytes_that_are_no_text():
    name = os.fsdecode(b'caf\xe9')  # what sys.argv holds for an argument in latin-1
    assert parse('--run_name', name)['run_name'] == name
    refused(parse, name)
    refused(parse, f'--{name}=1')
    refused(parse, f'--batch_size={name}')
    refused(parse, f'{name}.py')
    Path('lone.py').write_text('run_name = "\\ud800"\n')
    parse('lone.py').save('again.py')
    assert parse('again.py')['run_name'] == '\ud800'


# ---- help ----

@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help(flag):
    _, code, out, err = attempt(parse, '--max_lr=1', flag, '--not_read')
    assert code == 0 and err == ''
    assert out.startswith('Trains nothing.\n\npython train.py --max_lr=1e-3\n\ndata\n')
    for name, default in parse().items():
        assert out.count(f'\n  --{name}={default!r} ') == 1
    rows = {row.split('=')[0].strip(): row for row in out.splitlines()}
    assert rows['--max_lr'].split() == ['--max_lr=0.0006', 'peak', 'learning', 'rate']
    assert rows['--milestones'].endswith('steps with a sample') and rows['--eval_interval'].endswith('steps, -1 = never')
    headings = [row for row in out.splitlines()[4:] if row and not row.startswith(' ')]
    assert headings == ['data', 'model', 'optimization'] and 'banner' not in out and 'later' not in out
    assert out.index('\n\nmodel\n  --L_layers') > out.index('--evaluators')


def test_help_of_a_bare_script():
    for source in ('configure(globals())', 'a = 1; b = 2\nconfigure(globals())', '# x\nconfigure(globals())\n# y'):
        _, code, out, err = attempt(parse, '-h', source=source)
        assert code == 0 and err == '' and ('--a=1' in out and '--b=2' in out or 'a = 1' not in source)


# ---- presets and resume ----

def test_fill_assigns_what_was_not_typed():
    config = parse('--batch_size', '3', '--run_name=run')
    config.fill({'batch_size': 99, 'max_lr': 1.0, 'run_name': 'preset'})
    assert (config['batch_size'], config['max_lr'], config['run_name']) == (3, 1.0, 'run')  # typed, though equal to the default
    assert config.namespace['max_lr'] == 1.0 and config.given == {'batch_size', 'run_name'}


def test_restore():
    first = parse('--lr=1e-5', '--batch_size=3', '--no-ema', '--subsets', 'a', 'b', '--auto_resume', 'checkpoint_path=x')
    stored = first.typed()
    assert stored == {'max_lr': 1e-5, 'batch_size': 3, 'ema': False, 'subsets': ['a', 'b']} and type(stored) is dict
    config = parse('--batch_size', '4', '--checkpoint_path=y')
    config.restore({**stored, 'auto_resume': True, 'checkpoint_path': 'x', 'gone': 1, 3: 4, 'later': 2}, 'model.pt')
    expected = {**parse(), **stored, 'batch_size': 4, 'checkpoint_path': 'y'}
    assert config == expected and {name: config.namespace[name] for name in config} == expected
    assert config.typed() == {**stored, 'batch_size': 4}  # a run resumed twice still knows them
    config.fill({'max_lr': 7.0, 'num_epochs': 1})
    assert config['max_lr'] == 1e-5 and config['num_epochs'] == 1


@pytest.mark.parametrize('stored', [
    {'batch_size': 'abc'}, {'batch_size': None}, {'batch_size': True}, {'batch_size': 1.5}, {'batch_size': math.nan}, {'batch_size': 2 ** 63},
    {'batch_size': [1]}, {'max_lr': math.nan}, {'max_lr': math.inf}, {'max_lr': '1'}, {'max_lr': 16 ** 9999}, {'max_lr': 1j},
    {'ema': 1}, {'ema': 'true'}, {'run_name': 3}, {'run_name': b'x'}, {'run_name': 16 ** 9999}, {'run_name': 'a\n'.splitlines},
    {'scheduler': 'linear'}, {'scheduler': 3}, {'subsets': 'a'}, {'subsets': ('a',)}, {'subsets': [1]}, {'subsets': [['a']]}, {'subsets': ['a', None]},
    {'betas': [math.nan]}, {'milestones': [True]}, {'milestones': [16 ** 9999]}, {'evaluators': [1, 'a']}, {'evaluators': [{}]}, {'evaluators': {}},
    None, [], 'text', 3,
], ids=lambda stored: str(stored) if not isinstance(stored, dict) else f'{list(stored)[0]}-{type(list(stored.values())[0]).__name__}')
def test_restore_trusts_nothing(stored):
    config = parse()
    line = refused(config.restore, stored, 'model.pt')
    assert line.startswith('model.pt: ') and config == parse()
    assert not isinstance(stored, dict) or list(stored)[0] in line


@pytest.mark.parametrize('words, said', [
    ('--batch_size=0', 'must not be 0'), ('--batch_size=-3', 'must not be -3'), ('--eval_interval=0', 'must not be 0'), ('--eval_interval=-2', 'must not be -2'),
    ('--max_lr=-1e-3', 'must not be -0.001'), ('--num_epochs=-1', 'must not be -1')])
def test_numbers_out_of_range_are_refused(words, said):
    assert said in refused(parse, *words.split())


def test_numbers_at_the_edge_are_taken():
    assert parse('--max_lr=0')['max_lr'] == 0 and parse('--eval_interval=-1')['eval_interval'] == -1


# ---- settings files ----

def test_save_reads_back_the_same():
    config = parse('--eval_interval', '-1', '--lr=1e-300', '--compile', '--subsets', 'ü', "it's", 'a b', '--auto_resume', '--checkpoint_path=c',
                   '--run_name', 'line\nnext\r\t"quoted" \'both\' \\d \u2028 \u00e9 \U0001f600 \x00\x1b # = ', '--permanent_checkpoints', '-1,2')
    config.save('saved.py')
    again = parse('saved.py')
    assert {**config, 'auto_resume': False, 'checkpoint_path': ''} == again
    assert [type(value) for value in again.values()] == [type(value) for value in config.values()]
    assert again.given == set(config) - {'auto_resume', 'checkpoint_path'}  # how a run was launched is not what it is
    again.save('twice.py')
    assert Path('twice.py').read_bytes() == Path('saved.py').read_bytes()


def test_settings_file_mixes_with_the_command_line():
    Path('logs').mkdir()
    Path('logs/config.py').write_text('"""Mine."""\n# faster\nlr = 1  # alias\nBATCH_SIZE = 1e2\nscheduler = "CONSTANT"\nbetas = [0, 1]\nepochs = 2\n')
    assert 'logs/config.py:7: unknown setting epochs' in refused(parse, 'logs/config.py')
    Path('logs/config.py').write_text(Path('logs/config.py').read_text().replace('epochs', 'num_epochs'), encoding='utf-8-sig')
    config = parse('--max_lr=5', 'logs/config.py', '--num_epochs=3')
    assert config['max_lr'] == 1.0 and type(config['max_lr']) is float
    assert config['num_epochs'] == 3 and config['batch_size'] == 100 and type(config['batch_size']) is int
    assert config['scheduler'] == 'constant' and config['betas'] == [0.0, 1.0]
    assert config.given == {'max_lr', 'batch_size', 'scheduler', 'betas', 'num_epochs'}
    assert parse('--compile', './logs/config.py')['compile'] is True
    Path('warns.py').write_text('run_name = "\\d"')  # python warns of such an escape, on stderr: here it is no second line
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert parse('warns.py')['run_name'] == '\\d'
    Path('empty.py').write_text('')
    assert parse('empty.py') == parse()


@pytest.mark.parametrize('text, line', [
    ('import os\nos.system("touch ran")', 1),
    ('max_lr = 1\nimport os; os.system("touch ran")', 2),
    ('max_lr = __import__("os").system("touch ran")', 1),
    ('run_name = open("ran", "w").name', 1),
    ('run_name = f"{open(\'ran\', \'w\')}"', 1),
    ('open("ran", "w")', 1),
    ('[open("ran", "w") for x in [1]]', 1),
    ('if 1:\n    max_lr = 1', 1),
    ('def max_lr(x=open("ran", "w")): pass', 1),
    ('@open("ran", "w")\ndef max_lr(): pass', 2),
    ('class max_lr: pass', 1),
    ('max_lr: open("ran", "w") = 1', 1),
    ('max_lr += 1', 1),
    ('max_lr = batch_size = 1', 1),
    ('max_lr, batch_size = 1, 2', 1),
    ('max_lr.x = 1', 1),
    ('max_lr[0] = 1', 1),
    ('(max_lr := 1)', 1),
    ('del max_lr', 1),
    ('max_lr = min_lr', 1),
    ('max_lr = 2 * 3', 1),
    ('max_lr = None', 1),
    ('max_lr = {1: 2}', 1),
    ('max_lr = {[]: 2}', 1),
    ('max_lr = 1j', 1),
    ('max_lr = 0x' + 'f' * 5000 + ' + 1j', 1),
    ('max_lr = 0x' + 'f' * 5000, 1),
    ('run_name = 0x' + 'f' * 5000, 1),
    ('milestones = [0x' + 'f' * 5000 + ']', 1),
    ('max_lr = 1e999', 1),
    ('max_lr = "1"', 1),
    ('batch_size = 1.5', 1),
    ('batch_size = True', 1),
    ('ema = 1', 1),
    ('no_ema = True', 1),
    ('later = 1', 1),
    ('__file__ = "x"', 1),
    ('subsets = "a"', 1),
    ('subsets = ["a", 1]', 1),
    ('milestones = [True]', 1),
    ('milestones = ' + '[' * 50 + ']' * 50, 1),
    ('evaluators = [1, "a"]', 1),
    ('betas = [1e999]', 1),
    ('scheduler = "linear"', 1),
])
def test_settings_file_is_not_executed(text, line):
    Path('evil.py').write_text(text)
    assert refused(parse, 'evil.py').startswith(f'evil.py:{line}: ')
    assert not Path('ran').exists()


@pytest.mark.parametrize('content', [
    b'max_lr = ', b'max_lr = 1)', b'max_lr 1', b' max_lr = 1', b'max_lr = 1\n\tbatch_size = 2', b'max_lr = 012', b'max_lr = 1e',
    b'max_lr = 1\x00', b'\x00' * 100, b'run_name = "\xff"', b'\xff\xfe\x00', bytes(range(256)), b'\x7fELF\x02\x01\x01' + bytes(64),
    '# coding: latin-1\nrun_name = "é"'.encode('latin-1'), 'run_name = "x"'.encode('utf-16'), b'run_name = "\\N{no such}"', b'run_name = "\\x"',
    b'max_lr = "' + b'x' * 10 ** 6, b'max_lr = ' + b'9' * 10 ** 5, b'x' * 10 ** 6 + b' = 1', b'max_lr = 1\n' * 10 ** 4 + b'max_lr =',
    b'milestones = ' + b'[' * 10 ** 5, b'milestones = ' + b'[' * 150 + b']' * 150, b'milestones = ' + b'[' * 10 ** 5 + b']' * 10 ** 5,
    b'max_lr = ' + b'-' * 10 ** 5 + b'1', b'max_lr = ' + b'1+' * 10 ** 4 + b'1', b'max_lr = ' + b'not ' * 10 ** 4 + b'1',
    b'max_lr = ' + b'x.' * 10 ** 4 + b'x', b'max_lr = ' + b'(' * 180 + b'1' + b')' * 180 + b'[0]',
    b'if 1:\n' + b''.join(b' ' * i + b'if 1:\n' for i in range(1, 200)),
], ids=lambda content: repr(content[:14]))
def test_settings_file_that_is_none(content):
    Path('evil.py').write_bytes(content)
    assert 'evil.py' in refused(parse, 'evil.py')


def test_settings_file_that_cannot_be_read():
    Path('folder.py').mkdir()
    assert 'folder.py: Is a directory' in refused(parse, 'folder.py')
    Path('loop.py').symlink_to('loop.py')
    refused(parse, 'loop.py')
    refused(parse, 'train.py/x.py')
    refused(parse, 'nul\0.py')
    refused(parse, 'lone\ud800.py')


# ---- real processes ----

def test_process_runs():
    done = python('--max_lr=3', 'run_name=été')
    assert (done.returncode, done.stderr) == (0, b'') and done.stdout.decode().splitlines() == ["settings given: max_lr=3.0 run_name='été'", '3.0']
    done = python('--max_lr=3', 'run_name=\u00e9', PYTHONIOENCODING='ascii')  # a terminal that cannot show it
    assert (done.returncode, done.stderr) == (0, b'') and b"run_name='\\xe9'" in done.stdout


@pytest.mark.parametrize('argv', [['--max_lrr=1'], [b'--batch_size=\xff'], ['nofile.py']])
def test_process_refuses(argv):
    done = python(*argv)
    assert done.returncode == 2 and done.stdout == b'' and done.stderr.count(b'\n') == 1 and b'Traceback' not in done.stderr


def test_other_ranks_are_silent(monkeypatch):
    done = python('--max_lrr=1', RANK='1')
    assert (done.returncode, done.stdout, done.stderr) == (2, b'', b'')
    done = python('--help', RANK='1')
    assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')
    monkeypatch.setenv('RANK', '3')
    result, code, out, err = attempt(parse, '--max_lr=4')
    assert (result['max_lr'], code, out, err) == (4.0, None, '', '')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')  # under torchrun they give rank 0 the time to speak
    naps, module = [], load()
    monkeypatch.setattr(module.time, 'sleep', naps.append)
    assert attempt(module.fail, 'x')[1:] == (2, '', '') and naps and sum(naps) < 10
    monkeypatch.setenv('RANK', '0')
    assert attempt(load().fail, 'disk\nfull', 1)[1:] == (1, '', 'disk full\n') and len(naps) == 1


# ---- random input ----

WORDS = ['--', '-', '+', '++', '=', '', ' ', '\n', '--help', '-h', 'true', 'False', '0', '1', '-1', '1e4', '1.5', 'nan', '-inf', '1e999', '9' * 30,
         '[', ']', '[]', '[a,b]', '[1, 2]', '[{name: x}]', '{name:', "'", '"', ',', 'a', 'ü', '\udcff', '\x00', '\u2028', 'a=b', 'no', 'no_', 'no-ema',
         'arch.', 'arch', '.py', 'x.py', 'good.py', 'folder.py', 'max_lrr', 'MAX_LR', 'lr', 'constant', 'linear', 'rope', '__class__', '%s', '\\', '٣']
NODES = ['1', '-1', '1.5', '1e999', '"a"', "'b\\n'", 'True', 'None', '[]', '[1]', '[1, 2]', '["a"]', '[True]', '[[1]]', '{}', '{1: 2}', '(1,)', '1j',
         'b""', 'f""', 'x', 'x()', '-', '+', '*', '=', ':=', ';', '\n', '\n', '    ', '\t', '#', '"""', '(', ')', '[', ']', ',', ':', 'if', 'def', '@',
         'import os', 'lambda: 0', '...', '%', '\x00', '\\', '\\d', 'ü', '0x' + 'f' * 400, '0x' + 'f' * 5000]


def check_ends_well(*argv):
    """Settings of the right types that survive a save, the help, or exit 2 with one line; any other exception is an error."""
    config, code, out, err = attempt(parse, *argv)
    assert code in (None, 0, 2)
    if code == 2:
        assert out == '' and err.endswith('\n') and len(err.splitlines()) == 1, err
        return
    assert err == ''
    if config:
        defaults = parse()
        assert [type(value) for value in config.values()] == [type(value) for value in defaults.values()]
        numbers = [x for value in config.values() for x in (value if isinstance(value, list) else [value]) if not isinstance(x, str)]
        assert all(math.isfinite(x) for x in numbers)
        config.save('fuzz_saved.py')
        kept = {name: value for name, value in config.items() if name not in ('auto_resume', 'checkpoint_path')}
        assert parse('fuzz_saved.py') == {**defaults, **kept}
        fresh = parse()
        fresh.restore(config.typed(), 'x.pt')
        assert fresh == {**defaults, **kept}


@pytest.fixture
def names():
    Path('good.py').write_text('max_lr = 1\n')
    Path('folder.py').mkdir()
    return [*parse(), *ALIASES]


def test_random_command_lines(names, fuzz):
    for seed in range(fuzz):
        random.seed(seed)
        words = []
        for _ in range(random.randint(1, 5)):
            name, value = random.choice(names), ''.join(random.choices(WORDS, k=random.choice([0, 1, 1, 1, 2, 3])))
            words += random.choice([[f'--{name}={value}'], [f'--{name}', value], [f'{name}={value}'], [f'--{name}'], [f'--no-{name}'], [value],
                                    [f'{name.upper()}={value}'], [''.join(random.choices(WORDS + names, k=3))]])
        try:
            check_ends_well(*words)
        except Exception as error:
            pytest.fail(f'seed {seed}, {words!r}: {error!r}')


def test_random_settings_files(names, fuzz):
    parse().save('saved.py')
    saved = Path('saved.py').read_bytes()
    for seed in range(fuzz):
        random.seed(seed)
        kind = seed % 4
        if kind == 0:  # a good file with flipped, cut or doubled bytes
            data = bytearray(saved)
            for _ in range(random.randint(1, 4)):
                at = random.randrange(len(data))
                data[at:at + random.randint(0, 9)] = random.choice([bytes([random.randrange(256)]), b'', data[:at][-20:], b'"', b'\n', b'['])
        elif kind == 1:
            data = random.randbytes(random.randrange(200))
        else:  # lines that nearly are settings
            lines = [f'{random.choice(names)} = ' + ''.join(random.choices(NODES, k=random.choice([1, 1, 1, 2, 3]))) for _ in range(random.randint(1, 3))]
            data = '\n'.join(lines).encode()
        Path('fuzz.py').write_bytes(data)
        try:
            check_ends_well('fuzz.py')
        except Exception as error:
            pytest.fail(f'seed {seed}, {bytes(data)!r}: {error!r}')


# ---- the guides: every command line that they show, with today's paths ----

GUIDES = '''\
# guide 003
python train_gpt2.py
python train_gpt2.py --batch_size 16 --max_lr 3e-4 --max_steps 40000 --checkpoint_interval 1000
python finetune_dolly.py --pretrained_checkpoint log/model_40000.pt
python finetune_dolly.py --pretrained_checkpoint log/model_40000.pt --max_lr 3e-5 --max_steps 1750 --batch_size 8 --eval_interval 50
python train_gpt2.py --auto_resume
python finetune_dolly.py --auto_resume
python train_gpt2.py --resume --checkpoint_path log/model_20000.pt
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00500.pt
python train_gpt2.py --checkpoint_interval 1000 --keep_last_n_checkpoints 5 --permanent_checkpoints 10000,20000,30000
torchrun --standalone --nproc_per_node=gpu train_gpt2.py
torchrun --standalone --nproc_per_node=4 train_gpt2.py
torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 train_gpt2.py
python train_gpt2.py --device cuda --compile --data_root data --num_workers 4 --log_dir logs --wandb_log --wandb_project x
python train_gpt2.py --min_lr 6e-5 --decay_lr --weight_decay 0.1 --grad_clip 1.0 --grad_accumulation_steps 8
python train_gpt2.py --batch_size 8 --grad_accumulation_steps 8 --dtype bfloat16
python train_gpt2.py --checkpoint_interval 500 --eval_interval 100 --log_level debug
python train_gpt2.py --run_name gpt2_lr3e-4_bs16 --save_config --log_dir logs/experiment_001
python train_gpt2.py --max_steps 10 --eval_interval 5 --log_gradients --data_root test_data/
python train_gpt2.py --lr_scheduler cosine_with_restarts --lr_restarts 3
python train_gpt2.py --dynamic_seq_length --min_seq_length 128 --max_seq_length 1024
torchrun --standalone --nproc_per_node=2 train_gpt2.py --model_parallel --model_parallel_size 2
python train_gpt2.py --max_lr=6e-4
torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=192.168.1.1 --master_port=29500 train_gpt2.py
# guide 001
python finetune_dolly.py
python finetune_dolly.py --help
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00100.pt
python finetune_dolly.py --pretrained_checkpoint logs/model_19072.pt --data_dir dolly15k --batch_size 16 --max_lr 6e-5 --warmup_steps 1 \
    --max_steps 6 --checkpoint_interval 2 --keep_last_n_checkpoints 3 --eval_interval 2 --generate_interval 2
python finetune_dolly.py --max_lr 3e-5 --max_steps 1750 --warmup_steps 100
python finetune_dolly.py --batch_size 32
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00500.pt --max_lr 1e-5
torchrun --standalone --nproc_per_node=4 finetune_dolly.py
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=1234 finetune_dolly.py
# guide 002
python -m prepare.arc --input-file-prefix kaggle/combined/arc-agi --output-dir data/arc1concept-aug-1000 --subsets training evaluation \
    concept --test-set-name evaluation
python pretrain_trm.py arch=trm arch.puzzle_emb_ndim=512 data_paths="[data/arc1concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 \
    arch.L_cycles=4 +run_name=my_training_run ema=True global_batch_size=64
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/arc1concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=my_training_run ema=True
python pretrain_trm.py arch=trm data_paths="[data/sudoku-extreme-1k-aug-1000]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.mlp_t=True arch.pos_encodings=none arch.L_layers=2 arch.H_cycles=3 \
    arch.L_cycles=6 +run_name=pretrain_mlp_t_sudoku ema=True
python pretrain_trm.py arch=trm data_paths="[data/maze-30x30-hard-1k]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 \
    +run_name=pretrain_att_maze30x30 ema=True
python pretrain_trm.py arch=trm data_paths="[data/arc1concept-aug-1000]" load_checkpoint=checkpoints/YourProject/your_run_name/step_10000 \
    +run_name=resume_training ema=True
python pretrain_trm.py evaluators="[{name: arc@ARC}]" freeze_weights=True eval_interval=1000000 arch.hidden_size=256 arch.num_heads=4 \
    ema_rate=0.999 global_batch_size=512
DISABLE_COMPILE=1 python pretrain_trm.py arch=trm
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/arc2concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=pretrain_att_arc2concept_4 ema=True
python pretrain_trm.py arch=trm data_paths="[data/sudoku-extreme-1k-aug-1000]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=6 \
    +run_name=pretrain_att_sudoku ema=True
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/maze-30x30-hard-1k]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 puzzle_emb_lr=1e-4 weight_decay=1.0 \
    puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=pretrain_att_maze30x30 ema=True
# guide 000
python -m prepare.addition --output-dir data/addition --train-size 10000 --test-size 1000
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition --epochs 10000 --lr 5e-5 --global-batch-size 64
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 finetune_addition.py --base-checkpoint \
    checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name finetune_addition_4gpu --epochs 10000 --lr 5e-5 \
    --global-batch-size 256
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_full --total-steps 100000 --lr 5e-5 --puzzle-emb-lr 1e-3 --ema
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_emb_only --freeze-weights --puzzle-emb-lr 1e-2
python finetune_addition.py --base-checkpoint checkpoints/Arc1concept-aug-1000-ACT-torch/my_training_run/step_303191 --data-path \
    data/addition_fixed --run-name finetune_addition_step1 --freeze-weights --total-steps 3000 --eval-interval 1500 --puzzle-emb-lr 1e-2 \
    --copy-loss-weight 0 --global-batch-size 64
python finetune_addition.py --base-checkpoint checkpoints/Addition_fixed-ACT-torch/finetune_addition_step1/step_3000 --data-path \
    data/addition_fixed --run-name finetune_addition_step2 --lr 5e-5 --total-steps 25000 --eval-interval 5000 --ema
python pretrain_trm.py arch=trm data_paths="[data/addition]" load_checkpoint=checkpoints/YourProject/base_model/step_30000 \
    +run_name=finetune_addition epochs=10000 eval_interval=1000 lr=5e-5 puzzle_emb_lr=1e-3 global_batch_size=64 ema=True
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_full --epochs 500 --global-batch-size 128 --lr 5e-5 --puzzle-emb-lr 1e-3 --ema
python finetune_addition.py --base-checkpoint checkpoints/AdditionFinetune/finetune_addition/step_5000 --data-path data/addition --run-name \
    finetune_addition_continue --epochs 10000
DISABLE_COMPILE=1 python finetune_addition.py --global-batch-size 32
python finetune_addition.py --L-layers 2 --H-cycles 3 --L-cycles 6 --no-ema
python finetune_addition.py --eval_only --base-checkpoint checkpoints/AdditionFinetune/finetune_addition/step_10000 --data-path \
    data/addition --max-eval-batches 100
# guide 004
python prepare/latent_prm.py
python train_latent_prm.py
python train_latent_prm.py NUM_EPOCHS=5 BATCH_SIZE=4 LEARNING_RATE=2e-5 GRADIENT_ACCUMULATION_STEPS=4 SAVE_STEPS=100 LOGGING_STEPS=10
python train_latent_prm.py WEIGHT_DECAY=0.01 WARMUP_RATIO=0.1 MAX_GRAD_NORM=1.0 POOLING_STRATEGY=mean DROPOUT_PROB=0.1 MAX_SEQ_LENGTH=512 \
    USE_PRM_SCORE=true LOG_LEVEL=INFO DEVICE=cuda MIXED_PRECISION=true SEED=42
python train_latent_prm.py --model_path /path/to/Qwen-0.6B --data_dir prm_data --output_dir checkpoints/my_experiment --num_epochs 10 \
    --batch_size 8 --learning_rate 3e-5 --save_steps 50 --logging_steps 5
python train_latent_prm.py BATCH_SIZE=2 GRADIENT_ACCUMULATION_STEPS=8 MAX_SEQ_LENGTH=256
python train_latent_prm.py POOLING_STRATEGY="last" LEARNING_RATE=1e-5 SAVE_STEPS=500
python train_latent_prm.py --help
'''


def guide_commands():
    """(script, environment, words after the script's name) of each line."""
    for line in GUIDES.splitlines():
        words = shlex.split(line, comments=True)
        env = {}
        while words and '=' in words[0]:
            key, _, env[key] = words.pop(0).partition('=')
        if not words:
            continue
        if words[:2] == ['python', '-m']:
            script, argv = words[2].replace('.', '/') + '.py', words[3:]
        else:
            at = next(i for i, word in enumerate(words) if word.endswith('.py'))
            script, argv = words[at], words[at + 1:]
        yield pytest.param(script, env, argv, id=' '.join([*env, Path(script).stem, *argv])[:90])


def configure_call(source):
    """The call of configure in a script, or None."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'configure']
    return calls[0] if calls else None


@pytest.mark.parametrize('script, env, argv', list(guide_commands()))
def test_guide_command(script, env, argv, monkeypatch):
    path = ROOT / script
    call = configure_call(path.read_text(encoding='utf-8')) if path.exists() else None
    if call is None:
        pytest.skip(f'no {script} yet')
    given = [keyword.value for keyword in call.keywords if keyword.arg == 'aliases'] + call.args[2:]
    aliases = ast.literal_eval(given[0]) if given else {}
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    configure = load().configure
    defaults = configure({'__file__': str(path)}, [], aliases)
    assert set(aliases.values()) <= set(defaults) and not set(aliases) & set(defaults)
    config, code, out, err = attempt(configure, {'__file__': str(path)}, argv, aliases)
    assert err == ''
    if '--help' in argv:
        assert code == 0 and all(f'--{name}=' in out for name in defaults)
    else:
        assert code is None and bool(config.given) == bool(argv)
        assert 'DISABLE_COMPILE' not in env or config['compile'] is False


def test_what_is_near_a_missing_path(tmp_path):
    """The last three by number, not those of another future or half deleted, nor the path itself, which can be there and be refused."""
    for name in ('step_2', 'step_9', 'step_10', 'step_100', 'step_101.old', 'step_102.tmp'):
        (tmp_path / 'a' / name).mkdir(parents=True)
    told = nearby(str(tmp_path / 'a/step_7'))
    assert told == '; there is ' + ', '.join(str(tmp_path / 'a' / name) for name in ('step_9', 'step_10', 'step_100'))
    assert nearby(str(tmp_path / 'a/step_10')) == '; there is ' + ', '.join(str(tmp_path / 'a' / name) for name in ('step_2', 'step_9', 'step_100'))
    assert nearby(str(tmp_path / 'b/c/d/x.pt')) == ''
