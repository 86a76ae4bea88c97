"""Turn a script's lines `name = literal  # comment` above `config = configure(globals())` into its
command line. The comment is the help; `a | b` at its start are all choices. A whole number must be
positive and a fraction not negative, but for a 0 or -1 whose meaning it gives (`0 = off`). Commas
split a list, but a word that is an existing path stays whole. Understood, the last one wins:

    --max_lr=6e-4  --max_lr 6e-4  max_lr=6e-4  +max_lr=6e-4  arch.max_lr=6e-4  MAX_LR=6e-4
    --compile  --no-compile  --compile false  compile=True  --help  ('-' in a name reads as '_')
    --steps 10,20  --steps 10 20  steps="[10, 20]"  path/settings.py (lines `name = literal`)
"""
import ast
import difflib
import os
import re
import reprlib
import sys
import time

# How a run was launched, not what it is: neither restored on resume nor written to config.py.
LAUNCH = ('auto_resume', 'resume', 'checkpoint_path', 'eval_only', 'generate', 'context', 'chat',
          'export', 'ask')
TORCHRUN = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
NUMBER = r'[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?'
BOOLS = {'true': True, '1': True, 'false': False, '0': False}
KINDS = {bool: 'true/false', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
short = reprlib.Repr()  # how a value is printed
short.maxlist, short.maxstring, short.maxother = 8, 200, 200
if hasattr(sys.stdout, 'reconfigure'):  # a character that the terminal lacks must not end a run
    sys.stdout.reconfigure(errors='backslashreplace')

def is_first(rank):
    """Whether RANK or LOCAL_RANK is 0. Clusters set some of these names; only all make ranks."""
    return not all(os.environ.get(name) for name in TORCHRUN) or os.environ[rank] == '0'

def print0(*words):
    """Print on rank 0, at once. If the terminal or the pipe's reader is gone, the run goes on."""
    try:
        if is_first('RANK'):
            print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def fail(message, code=2):
    """End with one line on stderr. Exit code 2: the user's mistake, 1: the machine's fault."""
    if is_first('LOCAL_RANK'):
        print(' '.join(str(message).split()), file=sys.stderr, flush=True)
    elif 'TORCHELASTIC_RUN_ID' in os.environ:
        time.sleep(3)  # torchrun ends all ranks when the first one exits: let rank 0 speak
    sys.exit(code)

class Config(dict):
    """All settings by name. `typed`: the names that the command line or a settings file gave."""
    def __init__(self, namespace, settings, typed):
        self.namespace, self.settings, self.typed = namespace, settings, set()
        self.fill({name: typed.get(name, default) for name, (default, _) in settings.items()})
        self.typed.update(typed)
        if typed:
            print0('settings given:', *[f'{name}={short.repr(self[name])}' for name in typed])

    def fill(self, values):
        """Assign {name: value} to the settings that nobody typed. Other names are ignored."""
        for name, value in values.items():
            if name in self.settings and name not in self.typed:
                is_off = name == 'compile' and os.environ.get('DISABLE_COMPILE', '0') != '0'
                self[name] = self.namespace[name] = False if is_off else value

    def restore(self, values, where):
        """Check and fill in a stored run's settings. Its folder may have moved since."""
        for name, value in values.items():
            if name in self and name not in (*LAUNCH, 'log_dir', 'output_dir'):
                value = checked(value, *self.settings[name], f'{where}: {name}')
                if name in self.typed and self[name] != value:
                    print0(f'{name} {short.repr(value)} -> {short.repr(self[name])}')
                self.fill({name: value})

    def save(self, path):
        """Write the settings file that repeats this run, whole or not at all."""
        with open(f'{path}.tmp', 'w', encoding='utf-8') as file:
            file.writelines(f'{name} = {self[name]!r}\n' for name in self if name not in LAUNCH)
        os.replace(f'{path}.tmp', path)

def configure(namespace, argv=None, aliases=None):
    """Read the command line into the settings of the script whose globals() are `namespace`."""
    settings, typed, rows = {}, {}, [(namespace.get('__doc__') or '').strip()]
    for name, default, comment, above in assignments(namespace['__file__'], is_script=True):
        settings[name] = default, comment
        heading = '\n' + above.strip('#=- ') + '\n' if above.startswith('#') else ''
        rows.append(heading + f'  --{name + "=" + repr(default):<36} {comment}'.rstrip())
    names = {**(aliases or {}), **{name: name for name in settings}}
    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = re.sub('^--no[-_](.*)', r'--\1=false', words.pop(0), flags=re.I | re.S)
        match = re.fullmatch(r'(--|\+{0,2})([A-Za-z_][\w.-]*)(=.*)?', word, re.S)
        if word in ('--help', '-h'):
            print0('\n'.join(rows))
            sys.exit(0)
        if match and (match[1] == '--' or match[3]):
            name = name_of(match[2], names)
            given = [match[3][1:]] if match[3] else taken(word, words, settings[name][0])
            value = split(given) if isinstance(settings[name][0], list) else given[0]
            typed[name] = checked(value, *settings[name], f'--{name}={" ".join(given)}')
        else:
            for key, value, _, _ in assignments(word):
                name = name_of(key, names, f'{word}: ')
                typed[name] = checked(value, *settings[name], f'{word}: {name}')
    return Config(namespace, settings, typed)

def assignments(path, is_script=False):
    """Yield (name, value, comment, line above) of each top-level `name = literal` of a file."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            lines = file.read().split('\n')
        for node in ast.parse('\n'.join(lines), path).body:
            if "Name(id='configure'" in ast.dump(node):
                return
            is_setting = isinstance(getattr(node, 'targets', [None])[0], ast.Name)
            if is_setting or not (is_script or isinstance(node, ast.Expr)):
                (target,), value = node.targets, ast.literal_eval(node.value)
                comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
                yield target.id, value, comment.strip(' #'), lines[node.lineno - 2]
    except Exception as error:
        fail(f'{path} is neither --name=value nor a file of lines `name = literal`: {error}')

def name_of(key, names, where=''):
    """The setting that a typed name means."""
    key = key.replace('-', '_').removeprefix('arch.')
    name = names.get(key, names.get(key.lower()))
    near = difflib.get_close_matches(key.lower(), names, 1) or ['--help']
    return name or fail(f'{where}unknown setting {key}, did you mean {near[0]}?')

def taken(word, words, default):
    """Take the value of `--name` off the words behind it: one, or a list's up to the next name."""
    if isinstance(default, bool) and ''.join(words[:1]).lower() not in BOOLS:
        return ['true']
    given, end = [], '--[A-Za-z_]'
    while words and not re.match(end, words[0]) and (isinstance(default, list) or not given):
        given.append(words.pop(0))
        end = r'--[A-Za-z_]|\+*[A-Za-z_][\w.-]*='
    return given or fail(f'{word} needs a value')

def split(words):
    """The elements of a b, or a,b, or [a, b], or [{name: a}]. A path may hold a comma."""
    parts = []
    for word in words:
        exists = os.path.exists(os.path.expanduser(word))
        parts += [word] if exists else re.sub(r'^\[(.*)\]$', r'\1', word).split(',')
    parts = [part.removeprefix('{name:').strip(' }\'"') for part in parts]
    return [part for part in parts if part]

def checked(value, default, comment, where):
    """A typed text or a stored value as the default's type. What does not fit ends the script."""
    kind = type(default)
    if kind is list and isinstance(value, list):
        whole = all(re.fullmatch(r'[-+]?\d+(e\d+)?', str(part)) for part in value)
        like = (default or [0 if whole else ''])[0]
        return [checked(part, like, '', where) for part in value]
    if kind is bool and isinstance(value, str):
        value = BOOLS.get(value.lower())
    if kind in (int, float):
        number = float(str(value)) if re.fullmatch(NUMBER, str(value), re.I) else float('nan')
        value = kind(number) if abs(number) < 2 ** 53 and kind(number) == number else None
    if type(value) is not kind:
        fail(f'{where}: expected {KINDS[kind]}')
    low = (kind is int and value <= 0) or (kind is float and value < 0)
    if low and comment and value != default and not re.search(rf'(?<![\d.-]){value:g} = ', comment):
        fail(f'{where}: must not be {value:g} ({comment})')
    choices = re.split('[;,.:(]', comment)[0].strip().split(' | ')
    if len(choices) > 1 and default in choices:
        same = [choice for choice in choices if choice.lower() == value.lower()]
        value = same[0] if same else fail(f'{where}: must be one of {", ".join(choices)}')
    return os.path.expanduser(value) if str(value).split('/')[0] == '~' else value
