"""Turn a script's own top-level assignments into its command line.

This earlier form serves finetune_dolly.py, pretrain_trm.py, finetune_addition.py and train_latent_prm.py, which still use it.

    from configurator import configure
    max_lr = 6e-4       # peak learning rate
    optimizer = 'adamw' # adamw | muon; a comment that starts with words between bars lists all accepted values
    config = configure(globals())

Every top-level `name = <literal>  # comment` above the call is a setting: its default gives the type, its comment the
help. A whole number must be positive and a fraction not negative, except for a 0 or -1 whose meaning the comment gives
(`0 = off`). `configure` assigns what was typed into the caller's globals and returns all settings as a dict. Nothing is
executed: the caller's source and settings files are parsed with ast. Accepted, in any order, the last one wins:

    --max_lr=6e-4   --max_lr 6e-4   max_lr=6e-4   +max_lr=6e-4   arch.max_lr=6e-4   MAX_LR=6e-4    set ('-' reads as '_')
    --compile   --no-compile   --compile false   compile=True                                      bool
    --steps 10,20   --steps 10 20   steps="[10, 20]"                                               list
    path/settings.py                                 a file of such `name = literal` lines (each run writes one)
    --help

A user's mistake ends in one line on stderr and exit 2, on every rank, printed by rank 0 alone.
"""
import ast
import difflib
import errno
import glob
import io
import itertools
import os
import re
import sys
import time
import tokenize
import warnings

# How a run was launched, not what it is: neither stored for a resume nor written to its config.py.
LAUNCH = ('auto_resume', 'resume', 'checkpoint_path', 'eval_only', 'generate', 'context', 'chat', 'export', 'ask')
BOOLS = {'true': True, '1': True, 'false': False, '0': False}
master = os.environ.get('RANK', '0') == '0'
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')  # a character that the terminal cannot show must not end a run


def print0(*words):
    """print, on rank 0 only, at once. The reader of a pipe or the terminal may be gone: that must not cost the run."""
    if master:
        try:
            print(*words, flush=True)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message, code=2):
    """End this rank with one line on stderr (one rank of a node) and an exit code: 2 for the user's mistakes, 1 for the machine's."""
    if os.environ.get('LOCAL_RANK', os.environ.get('RANK', '0')) == '0':
        print(' '.join(str(message).split()), file=sys.stderr, flush=True)
    elif 'TORCHELASTIC_RUN_ID' in os.environ:
        time.sleep(3)  # the launcher ends all ranks when the first one exits: let rank 0 speak
    sys.exit(code)


def fail_if(wrong, message, code=2):
    if wrong:
        fail(message, code)


def nearby(path):
    """For a message that `path` is missing: what exists, the same name at any number, in its folder or one beside it, else in
    its folder under another parent."""
    folder, name = os.path.split(os.path.normpath(path))
    (above, own), numbered = os.path.split(folder), re.sub('[0-9]+', '*', glob.escape(name))
    found = glob.glob(os.path.join(glob.escape(above), '*', numbered))
    found = found or glob.glob(os.path.join(glob.escape(os.path.dirname(above)), '*', glob.escape(own), numbered))
    found = sorted((other for other in found if other != os.path.normpath(path) and not other.endswith(('.old', '.was', '.gone', '.tmp'))), key=lambda other: (
        os.path.basename(other) == name, difflib.SequenceMatcher(None, os.path.dirname(other), folder).ratio(),
        [int(part) if part.isdecimal() else part for part in re.split('([0-9]+)', other)]))  # step_9 before step_10
    return '; there is ' + ', '.join(found[-3:]) if found else ''


class Config(dict):
    """All settings by name. `given`: the names that were typed, `typed_here` those of them that no settings file brought; a preset fills in
    the others, a resume restores them."""

    def __init__(self, namespace, settings):
        super().__init__()
        self.namespace, self.settings, self.given, self.typed_here = namespace, settings, set(), set()
        for name, (default, _) in settings.items():
            self.assign(name, default)

    def assign(self, name, value):
        if name == 'compile' and os.environ.get('DISABLE_COMPILE'):
            value = False
        self[name] = self.namespace[name] = value

    def fill(self, preset):
        """Assign the values of a preset {name: value} to those settings that nobody typed."""
        for name, value in preset.items():
            if name not in self.given:
                self.assign(name, value)

    def restore(self, typed, where):
        """Assign what was typed when a run began ({name: value} out of its checkpoint) unless it is typed anew."""
        if not isinstance(typed, dict):
            fail(f'{where}: the stored settings are no dict')
        for name, value in typed.items():
            if name in self and name not in self.given and name not in LAUNCH:
                self.assign(name, _checked(value, *self.settings[name], f'{where}: {name}'))
                self.given.add(name)

    def compare(self, stored, where, fixed):
        """Say which settings differ from a stored run's ({name: value}), whose folder may have moved; one of `fixed` must not."""
        for name in self:
            old = _checked(stored[name], self.settings[name][0], '', f'{where}: {name}') if name in stored else self[name]
            if old != self[name] and name not in (*LAUNCH, 'log_dir', 'output_dir'):
                if name in fixed:
                    fail(f'{name} cannot change on resume: {old} -> {self[name]} ({where})')
                print0(f'changed since the checkpoint: {name} {old!r} -> {self[name]!r}')

    def typed(self):
        """The typed settings as a plain dict, for `restore`."""
        return {name: self[name] for name in self if name in self.given and name not in LAUNCH}

    def save(self, path):
        """Write the settings file that repeats this run."""
        with open(path + '.tmp', 'w', encoding='utf-8') as file:
            file.writelines(f'{name} = {value!r}\n' for name, value in self.items() if name not in LAUNCH)
        os.replace(path + '.tmp', path)


def configure(namespace, argv=None, aliases=None):
    """Read the command line (argv, else sys.argv[1:]) into the settings of the script that owns `namespace` = globals().

    aliases: {other spelling: setting}. Returns a Config. Exits 2 on a mistake, 0 after --help."""
    settings, help_text = _settings_of(namespace['__file__'])
    config = Config(namespace, settings)
    for name, value, here in _typed_values(sys.argv[1:] if argv is None else argv, settings, aliases or {}, help_text):
        config.assign(name, value)
        config.given.add(name)
        config.typed_here.add(name) if here else config.typed_here.discard(name)
    if config.given:
        print0('settings given:', ' '.join(f'{name}={config[name]!r}' for name in config if name in config.given))
    return config


def _settings_of(path):
    """({name: (default, comment)}, the text of --help) of the script at `path`."""
    with open(path, encoding='utf-8') as file:
        source = file.read()
    tree, comments, headings, settings, rows = ast.parse(source), {}, {}, {}, []
    above = list(itertools.takewhile(lambda node: not any(
        isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'configure' for n in ast.walk(node)), tree.body))
    if len(above) == len(tree.body):
        raise ValueError(f'{path} does not call configure() at the top level')
    lines = itertools.islice(io.StringIO(source), tree.body[len(above)].lineno - 1)
    for token in tokenize.generate_tokens(lines.__next__):
        if token.type == tokenize.COMMENT:  # in the first column it is the heading of a group of settings
            if token.start[1]:
                comments[token.start[0]] = token.string.lstrip('# ')
            else:
                headings[token.start[0]] = token.string.strip('#=- ')
    for node in above:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            where = f'{path}:{node.lineno}: '
            name, default = _assignment(node, where + 'above configure() write only')
            comment = comments.get(node.end_lineno, '')
            settings[name] = _checked(default, default, '', where + name), comment
            rows.append((node.lineno, f'  --{f"{name}={default!r}":<36} {comment}'.rstrip()))
    lines = [line for line, _ in rows] or [0]
    rows += [(line, f'\n{text}') for line, text in headings.items() if text and min(lines) - 1 <= line < max(lines)]
    return settings, '\n'.join([ast.get_docstring(tree) or '', *(row for _, row in sorted(rows))])


def _assignment(node, complaint):
    """(name, value) of the statement `name = literal`, or exit 2. Nothing is executed."""
    try:
        (target,), value = node.targets, ast.literal_eval(node.value)
        if all(isinstance(element, (bool, int, float, str)) for element in (value if isinstance(value, list) else [value])):
            return target.id, value
    except (ArithmeticError, AttributeError, MemoryError, RecursionError, TypeError, ValueError):
        pass
    fail(complaint + ' `name = <bool, number, string or list>`')


def _typed_values(argv, settings, aliases, help_text):
    """Yield (name, value, True) for everything on the command line, (name, value, False) for what is in a settings file."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ('--help', '-h'):
            print0(help_text)
            sys.exit(0)
        if re.fullmatch(r'[^-+=][^=]*\.py', word):
            yield from ((name, value, False) for name, value in _settings_file(word, settings, aliases))
            continue
        match = re.fullmatch(r'(--|\+{0,2})([A-Za-z_][\w.-]*)(?:=(.*))?', word, re.DOTALL)
        if not match or (match[3] is None and match[1] != '--'):
            fail(f'{word!r} is no setting: write --name=value (--help lists the names)')
        name, negated = _name_of(match[2], settings, aliases, match[1])
        default, comment = settings[name]
        texts = []
        if match[3] is not None:
            texts = [match[3]] if not negated else fail(f'{word}: --no-{name} takes no value')
        elif isinstance(default, bool) and (negated or not words or words[0].lower() not in BOOLS):
            texts = [str(not negated)]
        elif isinstance(default, list):
            while words and not re.match(r'--[A-Za-z_]|\+{0,2}[A-Za-z_][\w.-]*=|-h$', words[0]):
                texts.append(words.pop(0))
        elif words and not re.match(r'--[A-Za-z_]|-h$', words[0]):
            texts = [words.pop(0)]
        if not texts:
            fail(f'{word} needs a value')
        text = ','.join(texts)
        try:
            value = _converted(text, default)
        except (KeyError, ValueError):
            value = None  # _checked says what is expected
        yield name, _checked(value, default, comment, f'--{name}={text}'), True


def _name_of(key, settings, aliases, dashes, where=''):
    """(setting, negated?) that a typed key means."""
    key = key.replace('-', '_').removeprefix('arch.')
    for word in (key, key.lower() if key.isupper() else key):
        for positive in (word, word.removeprefix('no_')):
            name = aliases.get(positive, positive)
            if name in settings and (positive == word or isinstance(settings[name][0], bool)):
                return name, positive != word
    near = difflib.get_close_matches(key.lower(), [*settings, *aliases], 1)
    fail(f'{where}unknown setting {dashes}{key}' + (f', did you mean {dashes}{near[0]}?' if near else ' (--help lists the names)'))


def _converted(text, default):
    """The text as a value of the default's type."""
    if isinstance(default, bool):
        return BOOLS[text.lower()]
    if isinstance(default, list):  # a,b or [a, b] or ['a', "b, c"] or [{name: a}]
        inside = re.sub(r'^\s*\[(.*)\]\s*$', r'\1', text, flags=re.DOTALL)
        parts = re.findall(r"""\s*("[^"]*"|'[^']*'|[^,]+)""", inside)
        parts = [re.sub(r'^\{\s*name\s*:(.*)\}$', r'\1', part.strip()).strip(' \'"') for part in parts]
        parts = [part for part in parts if part]
        like = default[0] if default else 0 if all(re.fullmatch(r'[-+]?\d+(e\d+)?', part) for part in parts) else ''
        values = [_converted(part, like) for part in parts]
        return [int(v) if type(like) is int and abs(v) < 2 ** 63 and v == int(v) else v for v in values]  # 1e4
    if isinstance(default, (int, float)):
        return int(text) if re.fullmatch(r'\s*[-+]?\d+\s*', text) else float(text)
    return text


def _checked(value, default, comment, where):
    """A value of the default's type, finite and one of the accepted words, or exit 2."""
    if isinstance(default, list) and type(value) is list:
        like = default[0] if default else 0 if value and type(value[0]) is int else ''
        return [_checked(element, like, '', where) for element in value]
    if type(default) in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < 2 ** 63:  # NaN and infinity too
            fail(f'{where}: expected a finite number')
        value = float(value) if isinstance(default, float) else int(value) if value == int(value) else value
        refused = comment and value != default and (value < 0 or value == 0 and isinstance(default, int))
        if refused and not re.search(rf'(?<![\d.-]){value + 0:g} = ', comment):
            fail(f'{where}: must not be {value:g} ({comment})')
    if type(value) is not type(default):
        kinds = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', list: f'a list like {default!r}'}
        fail(f'{where}: expected {kinds[type(default)]}')
    accepted = re.split(r'[;,.:(]', comment)[0].strip().split(' | ')
    if len(accepted) > 1 and isinstance(default, str) and default in accepted and value not in accepted:
        same = [word for word in accepted if word.lower() == value.lower()]
        return same[0] if same else fail(f'{where}: must be one of {", ".join(accepted)} (the comment of its line lists them)')
    return value


def _settings_file(path, settings, aliases):
    """Yield (name, value) of a file of `name = literal` lines. Parsed, never executed."""
    try:
        with open(path, encoding='utf-8-sig') as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            body = ast.parse(file.read(), path).body
    except OSError as error:
        fail(f'settings file {path}: {error.strerror}')
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fail(f'settings file {path} cannot be parsed: {error}')
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f'{path}:{node.lineno}: '
        key, value = _assignment(node, where + 'expected')
        name, negated = _name_of(key, settings, aliases, '', where)
        if negated:
            fail(f'{where}write {name} = False')
        yield name, _checked(value, *settings[name], where + name)
