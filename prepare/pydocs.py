"""The default data of train_gpt2.py: English and code that every machine has, without a download.

The documentation and the source of the Python that runs this: the language reference in
pydoc_data.topics, the standard library's .py files and the docstrings of the modules that are
written in C. 11 MB of text with Python 3.11, one token per byte, in shards of 1 MB. The first one
is for validation; a few seconds. The same Python always gives the same files.

    python prepare/pydocs.py
    python -m prepare.pydocs --output_dir=data/pydocs
"""
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import platform
import random
import sys
import sysconfig
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure
from prepare.fineweb import one_line_errors, write_shards

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/pydocs'  # folder to write
name = 'pydocs'             # {name}_val_000000.bin, {name}_train_000001.bin, ...
tokenizer = 'bytes'         # bytes | gpt2
shard_size = 1000000        # tokens in a shard, at most
seed = 1337                 # of the order of the documents
num_workers = 0             # threads that tokenise, 0 = one per core

if __name__ == '__main__':
    configure(globals())

# Folders left out: tests, what was installed on top, compiled files, two programs; topics.py is
# read as documentation below.
OMITTED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', 'idlelib',
           'lib2to3', 'turtledemo', 'pydoc_data'}

def topics():
    """The language reference, one document per entry. Some distributions leave it out."""
    try:
        entries = importlib.import_module('pydoc_data.topics').topics
    except ImportError:
        return []
    return [entries[label] for label in sorted(entries)]

def sources():
    """(text of each .py file of the standard library, how many are not UTF-8 and left out)"""
    texts, not_utf8 = [], 0
    for folder, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - OMITTED)  # in place: os.walk goes on with these
        for file in sorted(files):
            path = Path(folder, file)
            # _sysconfigdata*.py holds compiler flags
            if path.suffix != '.py' or file.startswith('_sysconfigdata') or not path.is_file():
                continue
            try:
                texts.append(path.read_bytes().decode())
            except UnicodeDecodeError:
                not_utf8 += 1
    return texts, not_utf8

def c_modules():
    """The modules of the standard library without a .py file. Which exist depends on the system."""
    extensions = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for module_name in sorted(sys.stdlib_module_names):
        # CPython's own tests; readline writes to the terminal
        if module_name.lstrip('_').startswith(('test', 'xx', 'readline')):
            continue
        spec = importlib.util.find_spec(module_name)
        if not spec or not spec.origin:
            continue
        if spec.origin != 'built-in' and not spec.origin.endswith(extensions):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # some are about to be removed from Python
                module = importlib.import_module(module_name)
        except ImportError:  # a library of the system that it needs, such as Tk, is not there
            continue
        yield module

def documented(module):
    """(path, object) of everything public in a module and in its classes."""
    for key, value in sorted(vars(module).items()):
        # sys.excepthook may be anybody's, sys.__excepthook__ is the original
        value = vars(module).get(f'__{key}__', value)
        if key.startswith('_') or not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        yield key, value
        if inspect.isclass(value):
            for member, thing in sorted(vars(value).items()):
                if not member.startswith('_'):
                    yield f'{key}.{member}', thing

def docstrings():
    """What help() knows of the C modules, one document per module."""
    texts = []
    for module in c_modules():
        parts = [f'{module.__name__}\n\n{module.__doc__ or ""}']
        for path, thing in documented(module):
            doc = getattr(thing, '__doc__', None)
            if isinstance(doc, str):
                signature = getattr(thing, '__text_signature__', None) or ''
                parts.append(f'{module.__name__}.{path}{signature}\n\n{doc}')
        texts.append('\n\n'.join(parts) + '\n')
    return texts

if __name__ == '__main__':
    with one_line_errors(sysconfig.get_path('stdlib')):
        python_files, not_utf8 = sources()
    documents = topics() + python_files + docstrings()
    random.Random(seed).shuffle(documents)  # the validation shard gets some of everything
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b'\0')
    source = {'name': f'Python {platform.python_version()}', 'documents': len(documents),
              'not_utf8': not_utf8, 'sha256': digest.hexdigest()}

    def stream(file, document):
        if file == 0:
            for number in range(document, len(documents)):
                yield 0, number, documents[number], (number + 1) / len(documents)

    write_shards(output_dir, dict(name=name, tokenizer=tokenizer, shard_size=shard_size, seed=seed,
                                  source=[source]), stream, num_workers)
