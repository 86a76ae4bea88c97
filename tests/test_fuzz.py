"""A bounded fuzz of what is read from files: every input ends well, or in one line with exit code 2; no traceback, no hang, no output half written.

    python -m pytest tests/test_fuzz.py -n0 --fuzz=2000        the long form; a reader gets a share of this number, an input of a whole script is dearer
    python -m pytest tests/test_fuzz.py -n0 --fuzz=2000 -k shards

Fuzzed elsewhere: settings (test_configurator.py), torch.save's files (test_model.py), rows (test_finetune_dolly.py), puzzles (test_puzzles.py), the header of
safetensors and answers (test_qwen.py). Input number i of a reader is made from (reader, i) alone: a failure names both.
"""
import contextlib
import csv
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import ROOT, drop, load, make_addition_data, make_paths, make_qwen, make_text_data, store
from safetensors.torch import save
from test_puzzles import write_arc
from test_reliability_old import CASES, words

import configurator_old
import prepare.latent_prm as collect
import trm
from configurator_old import configure
from model import (GPT, QWEN_ADDED, QWEN_NEEDED, TOKENIZERS, GPTConfig, Qwen3Config, QwenLatentPRM, QwenTokenizer, begin_gpt, check_paths, export_files, fit_weights,
                   load_tokenizer, open_paths, open_rows, open_shards, open_split, padded_paths, read_prm, shard_rows, vocabulary_of, whole_checkpoint)
from prepare import fineweb, hellaswag
from prepare.tiny_qwen import tokenizer_json

SECONDS = 30         # for one input
MEMORY = 4 << 30     # bytes that one input may ask for
NOT_FINITE = r'(loss|norm) -?(nan|inf)|not finite'  # what alone may end with exit code 1: numbers of a model, which no format can rule out


# ---- what is done to a file: each takes (what was there, a random.Random)
def bytes_changed(data, rng):
    """Cut, flipped, overwritten, removed, foreign."""
    data, at = bytearray(data), rng.randrange(len(data) + 1)
    kind = rng.randrange(12)
    if kind < 2: del data[at:]
    elif kind < 4:
        for _ in range(rng.randint(1, 3)):
            if data: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 4: data[at:at + 50] = rng.randbytes(rng.randint(1, 50))
    elif kind == 5: del data[at:at + rng.randint(1, 100)]
    elif kind == 6: data[at:at] = rng.choice([rng.randbytes(rng.randint(1, 20)), bytes(rng.randint(1, 2000)), b'\n', b'"', b'\xed\xa0\x80', b'\xff\xfe', b'\r'])
    elif kind == 7: data[at:at] = data[rng.randrange(len(data) + 1):][:rng.randint(1, 500)]
    elif kind == 8: data = data + (rng.randbytes(rng.randint(1, 3000)) if rng.random() < 0.7 else data)
    elif kind == 9: data = b'\xef\xbb\xbf' + data
    elif kind == 10: data = data.decode(errors='replace').encode(rng.choice(['utf-16', 'utf-32', 'utf-7'])) if len(data) < 10 ** 5 else b''
    else: data = rng.choice([b'', b'\0' * rng.randint(1, 5000), rng.randbytes(rng.randint(1, 3000))])
    return bytes(data)


DEEP = '@deep@'  # becomes lists in each other, more than Python's stack holds
STRANGE = [None, True, False, 0, 1, -1, 2, 255, 2 ** 31, 2 ** 53, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 30, 10 ** 400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, '', ' ', 'x',
           '1', '-1', 'nan', 'true', '\0', '\ud800', 'a\udfffb', '\u202e', '\u2028', '\x1b[31m', '\ufeff', '\n', '１２', '²', '../../x', '/', '{}', 'x' * 10 ** 5, '9' * 5000, DEEP,
           [], {}, [[]], [None], [1, 'a'], [[[]]], {'': ''}, {'a': None}, [0] * 1000, [math.nan], ['\ud800']]
TENSORS = [torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.ones(2, 2), torch.full((3,), math.nan), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool),
           torch.zeros(2, dtype=torch.complex64), torch.zeros(4, 0), torch.tensor(-1), torch.tensor(2 ** 62), torch.tensor(math.inf), torch.zeros(1, 1, 1, 1),
           torch.zeros(5000, dtype=torch.uint8), torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, requires_grad=True)]


def tensor_changed(tensor, rng):
    tensor = tensor.real if tensor.is_complex() else tensor
    number = torch.tensor(rng.choice([math.nan, math.inf, -1, 1e30, 0, 10 ** 9]))
    return rng.choice([
        lambda: tensor.double(), lambda: tensor.to(torch.int8), lambda: tensor.to(torch.complex64), lambda: tensor.half(), lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        lambda: tensor[:len(tensor) // 2] if tensor.dim() else tensor[None], lambda: tensor.flatten(), lambda: tensor.unsqueeze(-1), lambda: torch.cat((tensor, tensor)) if tensor.dim() else -tensor,
        lambda: tensor.new_zeros(0), lambda: torch.full_like(tensor, number.nan_to_num().clamp(-1, 1).item()) if not tensor.is_floating_point() else torch.full_like(tensor, number.item()),
        lambda: tensor.tolist(), lambda: tensor * 0 - 1 if tensor.dtype != torch.bool else ~tensor, lambda: tensor.expand(3, *tensor.shape)])()


def tweaked(value, rng, strange):
    """Nearly the same value."""
    if torch.is_tensor(value):
        return tensor_changed(value, rng)
    if isinstance(value, bool) or value is None:
        return rng.choice([not value, int(bool(value)), str(value)])
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, value * 2 ** 40, float(min(value, 1e300)), str(value), [value], value / 2 if abs(value) < 1e300 else 0])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice([value[:at], value[:at] + rng.choice(['\0', '\ud800', ' ', 'x', '\n', '|', '/', 'é']) + value[at:], value.upper(), value * 2, [value], value.encode(errors='surrogatepass').hex()])
    elements = list(value.items()) if isinstance(value, dict) else list(value)
    kind, at = rng.randrange(5), rng.randrange(len(elements) + 1)
    if kind == 0: elements[at:at + 1] = []
    elif kind == 1 and elements: elements = elements[:at] + elements[:1] + elements[at:]
    elif kind == 2: rng.shuffle(elements)
    elif kind == 3: return dict(enumerate(elements)) if isinstance(value, list) else [b for _, b in elements] if isinstance(value, dict) else list(elements)
    else: elements.insert(at, (rng.choice(['', 'x', '\ud800', 'step', '0']), rng.choice(strange)) if isinstance(value, dict) else rng.choice(strange))
    return dict(elements) if isinstance(value, dict) else type(value)(elements)


def value_changed(value, rng, strange=STRANGE):
    """The same value with one place in it, anywhere, changed."""
    inside = list(value.keys()) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, (list, tuple)) else []
    if inside and rng.random() < 0.8:
        key = rng.choice(inside)
        if isinstance(value, dict):
            kind = rng.random()
            if kind < 0.1:
                return {k: v for k, v in value.items() if k != key}
            if kind < 0.15:
                return {(rng.choice([f'{k} ', str(k)[:-1], str(k).upper()]) if k == key else k): v for k, v in value.items()}
            if kind < 0.2:
                return {**value, key: value[rng.choice(inside)]}
            return {**value, key: value_changed(value[key], rng, strange)}
        return type(value)(value_changed(element, rng, strange) if i == key else element for i, element in enumerate(value))
    return rng.choice(strange) if rng.random() < 0.5 else tweaked(value, rng, strange)


def json_of(value):
    return json.dumps(value).replace(f'"{DEEP}"', '[' * 10 ** 5 + ']' * 10 ** 5).encode()


def json_changed(data, rng):
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = value_changed(value, rng)
    return json_of(value) if rng.random() < 0.75 else bytes_changed(data, rng)


def lines_changed(data, rng):
    """Lines of JSON."""
    lines, kind = data.split(b'\n'), rng.random()
    at = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    if kind < 0.65: lines[at] = json_changed(lines[at], rng)
    elif kind < 0.75: lines[at:at + 1] = rng.choice([[], [b'', b' \t', lines[at]], [lines[at], lines[at]], [lines[at] + b','], [b'[', lines[at], b']'], [b'null'], [lines[at] * 2]])
    elif kind < 0.8: lines = [b'\r'.join(lines)]
    else: return bytes_changed(data, rng)
    return b'\n'.join(lines)


def csv_changed(data, rng):
    """Cells and columns."""
    rows, kind = list(csv.reader(io.StringIO(data.decode()))), rng.random()
    if kind < 0.3:
        return bytes_changed(data, rng)
    row = rng.choice(rows) if kind < 0.8 else rows[0]
    at = rng.randrange(len(row))
    change = rng.randrange(7)
    if change == 0: row[at] = rng.choice(['', ' ', '\n', '"', ',', 'x', '0', '\0', '１', '²', '9' * 5000, '1' * 200000, row[at][:-1], row[at] + row[at], row[at].replace('1', '²'), '-1', '.' * 81])
    elif change == 1: row[at] = ''.join(rng.sample(row[at], len(row[at])))
    elif change == 2: del row[at]
    elif change == 3: row.insert(at, rng.choice(row))
    elif change == 4: row.reverse()
    elif change == 5: rows[:] = rng.choice([rows[1:], rows[:1], rows[:2], [*rows, *rows], [[], *rows], [row[:1] for row in rows]])
    else: row[at] = tweaked(row[at], rng, STRANGE) if rng.random() < 0.5 else str(rng.choice(STRANGE))[:1000]
    out = io.StringIO()
    csv.writer(out, delimiter=rng.choice(',,,,,;\t'), lineterminator=rng.choice(['\n', '\r\n', '\n', '\r'])).writerows([[str(cell) for cell in row] for row in rows])
    return out.getvalue().encode(errors='surrogatepass')


def npy_of(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_changed(data, rng):
    """Another kind or shape of array; a header that lies."""
    array, kind = np.load(io.BytesIO(data)), rng.randrange(4)
    if kind == 0:
        return bytes_changed(data, rng)
    if kind == 1 and rng.random() < 0.1:
        file = io.BytesIO()
        np.savez(file, array)
        return file.getvalue()
    if kind == 1:
        return npy_of(array.astype(rng.choice([np.int64, np.uint8, np.float16, np.float64, np.complex64, bool, 'S3', 'U2', '>u2', '>i4', object, 'M8[s]', 'i4,i4', 'V3'])))
    if kind == 2:
        array = rng.choice([lambda: array.reshape(-1), lambda: array[None], lambda: array[..., None], lambda: array[:0], lambda: array[:1], lambda: array[..., :1], lambda: np.array(7, array.dtype),
                            lambda: np.concatenate((array, array)), lambda: array[::-1], lambda: np.asfortranarray(array.T), lambda: array.copy()])().copy()
        if array.size and rng.random() < 0.7:
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice([0, 1, np.iinfo(array.dtype).max, np.iinfo(array.dtype).min, 100])
        return npy_of(array)
    header = rng.choice(['(10 ** 18,)', f'({10 ** 18},)', f'({10 ** 30},)', '(-1,)', '(-5, -5)', '(True,)', "('a',)", '(0, 0)', '(1,) * 9', '5', 'None', '(2.0,)', '-' * 5000 + '1', '(' * 5000, '[' * 300,
                         '((1,),)', '(1e999,)', '(1,', '(' + '1,' * 70 + ')', f'({2 ** 62}, 4)', '(' + '9' * 5000 + ',)'])
    descr = rng.choice(["'<u2'", "'<u2'", "'|u1'", "'<i4'", "'|O'", "'<f4'", "'x'", '3', "[('a', '<u2')]", "'<U100000'", "('<u2', 10000)", 'None', "'|V0'"])
    text = f"{{'descr': {descr}, 'fortran_order': {rng.choice(['False', 'True', '0'])}, 'shape': {header}, }}\n".encode()
    return b'\x93NUMPY' + rng.choice([b'\1\0', b'\1\0', b'\3\0', b'\7\7'])[:2] + len(text).to_bytes(2, 'little') + text + data[128:]


def shard_changed(data, rng):
    """llm.c's .bin: numbers of its header and tokens."""
    if rng.random() < 0.4:
        return bytes_changed(data, rng)
    numbers = np.frombuffer(data[:1024], '<i4').copy()
    numbers[rng.choice([0, 1, 2, 2, 2, rng.randrange(256)])] = rng.choice([0, 1, -1, 2, 2 ** 31 - 1, -2 ** 31, len(data), len(data) // 2 - 512, 20240520])
    tokens = np.frombuffer(data[1024:], '<u2').copy()
    if rng.random() < 0.3:
        tokens[rng.randrange(len(tokens))] = rng.choice([256, 257, 65535])
    return numbers.tobytes() + tokens.tobytes()


def content_changed(data, rng):
    """torch.save of a content with something else in it."""
    if rng.random() < 0.15:
        return bytes_changed(data, rng)
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice([1, 1, 1, 2])):
        content = value_changed(content, rng, STRANGE + TENSORS)
    return saved(content)


def saved(content):
    file, limit = io.BytesIO(), sys.getrecursionlimit()

    def with_deep(value):
        if isinstance(value, dict):
            return {name: with_deep(element) for name, element in value.items()}
        if isinstance(value, str) and value == DEEP:
            value = []
            for _ in range(3000):
                value = [value]
            return value
        return type(value)(map(with_deep, value)) if isinstance(value, (list, tuple)) else value
    try:
        sys.setrecursionlimit(50000)
        torch.save(with_deep(content), file)
    finally:
        sys.setrecursionlimit(limit)
    return file.getvalue()


def safetensors_changed(data, rng):
    """Its header is JSON."""
    size = int.from_bytes(data[:8], 'little')
    if rng.random() < 0.25:
        return bytes_changed(data, rng)
    header = json_changed(data[8:8 + size], rng)
    return (rng.choice([len(header)] * 9 + [2 ** 63, 2 ** 32, 0, len(data)])).to_bytes(8, 'little') + header + data[8 + size:]


def parquet_changed(data, rng):
    """The column as another kind of column."""
    if rng.random() < 0.6:
        return bytes_changed(data, rng)
    import pyarrow
    import pyarrow.parquet
    texts = ['a', 'b' * 300, '', None, 'ü'] * 30
    column = rng.choice([
        lambda: pyarrow.array(texts), lambda: pyarrow.array(range(150)), lambda: pyarrow.array([[text] for text in texts]), lambda: pyarrow.array([None] * 150), lambda: pyarrow.array(texts).dictionary_encode(),
        lambda: pyarrow.array([b'\xff\xfe'] * 150), lambda: pyarrow.array(['x'] * 150, pyarrow.large_string()), lambda: pyarrow.array(['x'] * 150, pyarrow.string_view()), lambda: pyarrow.array([dict(a=1)] * 150),
        lambda: pyarrow.array([]), lambda: pyarrow.array([1.5] * 150), lambda: pyarrow.array(['x'] * 150).cast(pyarrow.binary()),
        lambda: pyarrow.StringArray.from_buffers(2, pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b'a\xff\xfeb'))])()
    names = rng.choice([['text'], ['text'], ['text'], ['x'], ['text', 'text'], ['text.a']])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column] * len(names), names), file, row_group_size=rng.choice([1000, 7]), compression=rng.choice(['snappy', 'none', 'gzip']))
    return file.getvalue()


CHANGES = {'.json': json_changed, '.jsonl': lines_changed, '.csv': csv_changed, '.npy': npy_changed, '.bin': shard_changed, '.pt': content_changed, '.safetensors': safetensors_changed,
           '.parquet': parquet_changed, '.txt': bytes_changed, '.tiktoken': bytes_changed, '.yaml': bytes_changed}


# ---- how a file is put there, and how what reads it is watched
def spoil(folder, names, rng):
    """Change one of these files in the folder, seldom two: its content, or it is missing, or a folder."""
    for name in rng.sample(names, 1 if rng.random() < 0.9 else min(2, len(names))):
        path, kind = folder / name, rng.random()
        data = path.read_bytes()
        if kind < 0.04:
            path.unlink()
            if kind < 0.02:
                path.mkdir()
        else:
            path.write_bytes((CHANGES.get(path.suffix, bytes_changed) if kind < 0.97 else bytes_changed)(data, rng))


class TooLong(BaseException):
    """Nothing that reads catches it."""


@contextlib.contextmanager
def bounded():
    """SECONDS and MEMORY for what is read in this process."""
    def too_long(number, frame):
        raise TooLong(f'more than {SECONDS} s')
    before, limits = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_DATA)
    used = next((int(line.split()[1]) << 10 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmData')), 0) if os.path.isdir('/proc/self') else 0
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if used:
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def reads(reader, count, folder, names, read, least=0.3):
    """So many inputs to read(folder), whose files `names` are spoiled: it ends well, or in a ValueError, an OSError or exit code 2. Returns how many were refused."""
    good = folder.parent / (folder.name + '.good')
    shutil.copytree(folder, good)
    read(folder)  # what is not spoiled is good
    refused, failures = 0, []
    for i in range(count):
        spoil(folder, names, random.Random(f'{reader} {i}'))
        complaint = io.StringIO()
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('always')
            try:
                with bounded():
                    read(folder)
            except (ValueError, OSError) as error:
                refused += 1
                if isinstance(error, UnicodeError) or not str(error).strip() or warned:
                    failures.append((i, f'{error!r:.200}', [str(w.message)[:200] for w in warned]))
            except SystemExit as end:
                refused += 1
                if end.code != 2 or len(complaint.getvalue().splitlines()) != 1 or warned:
                    failures.append((i, end.code, complaint.getvalue()[:300], [str(w.message)[:200] for w in warned]))
            except BaseException as error:  # noqa: BLE001  a panic of a library in Rust is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                place = error.__traceback__
                while place.tb_next:
                    place = place.tb_next
                failures.append((i, f'{type(error).__name__}: {error!s:.200}', f'{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}'))
        drop(folder)
        shutil.copytree(good, folder)
    drop(good)
    assert not failures, f'{reader}, {len(failures)} of {count}:\n' + '\n'.join(map(str, failures[:12]))
    assert count < 20 or least * count <= refused, f'{reader}: only {refused} of {count} were refused'
    return refused


PRELUDE = f'import resource\nresource.setrlimit(resource.RLIMIT_DATA, ({MEMORY}, resource.getrlimit(resource.RLIMIT_DATA)[1]))'


def ends_well(launcher, script, args, cwd, codes=(0, 2)):
    """Run it; '' or what is wrong with its end, and its exit code."""
    try:
        run = launcher.run(script, args, cwd=cwd, prelude=PRELUDE, timeout=SECONDS)
    except AssertionError as error:
        return f'hangs: {error}', None
    out, err = run.out, run.err
    for path in (run.outs[0], str(run.outs[0]) + '.err'):
        os.unlink(path)
    if run.code == 0:
        return f'exit 0, and {err[:300]}' * bool(err), 0
    if run.code not in codes or len(err.strip().splitlines()) != 1 or 'Traceback' in err or run.code == 1 and not re.search(NOT_FINITE, err):
        return f'exit {run.code}: {err[-600:]}' + out[-300:] * (not err), run.code
    return '', run.code


# ---- readers in this process
@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator_old, '_settings_of', lru_cache(configurator_old._settings_of))  # a tenth of a second each time


def test_shards(tmp_path, fuzz):
    folder = make_text_data(tmp_path / 'data', tokens=120, train_shards=1)
    np.save(folder / 'x_train_000002.npy', np.arange(100, dtype=np.uint16))

    def read(folder):
        for val_only in (False, True):
            train, val, tokenizer = open_shards(str(folder), 16, val_only)
            for part in (val,) if val_only else (train, val):
                n = sum((len(tokens) - 1) // 16 for tokens in part.values())
                rows = shard_rows(part, 16, range(n))
                assert rows.shape == (n, 17) and 0 <= rows.min() <= rows.max() < tokenizer['vocab_size']

    def read_anew(folder):  # train_gpt2.py compares the ids of a batch with the vocabulary
        train, val, tokenizer = fineweb.open_shards(folder, 16)
        assert tokenizer in TOKENIZERS.values()
        for part in (train, val):
            n = sum((len(tokens) - 1) // 16 for tokens in part.values())
            assert fineweb.read_rows(part, 16, range(n)).shape == (n, 17)
    names = [path.name for path in sorted(folder.iterdir())]
    reads('shards', fuzz // 4, folder, names, read)
    reads('shards_anew', fuzz // 4, folder, names, read_anew)


def test_hellaswag_items(tmp_path, fuzz):
    (tmp_path / 'data').mkdir()
    item = dict(ctx='A man sits', endings=['down', 'up', 'and waits', 'on it.'], label=2)
    (tmp_path / 'data/hellaswag_val.jsonl').write_text(''.join(json.dumps(dict(item, label=i)) + '\n' for i in range(4)))

    def read(folder):
        for item in hellaswag.read_items(folder / 'hellaswag_val.jsonl')[0]:
            assert item['ctx'] and len(item['endings']) == 4 and all(item['endings']) and 0 <= item['label'] < 4
    reads('hellaswag_items', fuzz // 4, tmp_path / 'data', ['hellaswag_val.jsonl'], read)


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=4))


def gpt_files(kind, folder):
    """A GPT-2 in the format of others, and what --init_from names."""
    model = tiny_gpt()
    weights, shape = model.state_dict(), dict(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=4, dropout=0.0)
    folder.mkdir()
    if kind.startswith('folder'):
        for name, content in export_files(weights, model.config, TOKENIZERS['bytes']).items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if kind == 'folder_in_parts':
            weights = {name: tensor.t().contiguous() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else tensor for name, tensor in weights.items()}
            parts = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])]
            for i, part in enumerate(parts):
                (folder / f'part{i}.safetensors').write_bytes(save(part))
            (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={name: f'part{i}.safetensors' for i, part in enumerate(parts) for name in part})))
            (folder / 'model.safetensors').unlink()
        return folder
    content = dict(
        nanogpt=dict(model={'_orig_mod.' + name: tensor for name, tensor in weights.items()}, model_args=dict(shape, bias=True), iter_num=5, best_val_loss=torch.tensor(1.5),
                     optimizer={}, config=dict(out_dir='out')),
        bare=weights, ours=dict(model=weights, config=dict(shape, activation='gelu_new', data_root='data'), given={}, step=4, ranks=[], log_bytes=0, tokenizer=TOKENIZERS['bytes']))[kind]
    (folder / 'a.pt').write_bytes(saved(content))
    return folder / 'a.pt'


@pytest.mark.parametrize('kind', ['folder', 'folder_in_parts', 'nanogpt', 'bare', 'ours'])
def test_gpt(tmp_path, fuzz, kind):
    """begin_gpt, and what finetune_dolly.py does with what it found; the entries of its own checkpoints are those of test_checkpoints."""
    path = gpt_files(kind, tmp_path / 'gpt')

    def read(folder):
        config = configure(dict(__file__=str(ROOT / 'finetune_dolly.py')), [f'--pretrained_checkpoint={path}', *['--n_head=2'] * (kind == 'bare')])
        found, _ = begin_gpt('pretrained_checkpoint', config, None, '', strict=True)
        begin_gpt('pretrained_checkpoint', config, None, '', strict=False)
        weights = fit_weights(found['model'], config['block_size'], 320, 257)
        model = GPT(GPTConfig(config['block_size'], 320, config['n_layer'], config['n_head'], config['n_embd'], 0.0, config['activation']))
        model.load_state_dict(weights)
        assert all(p.dtype == torch.float32 for p in found['model'].values())
    names = [file.name for file in sorted((tmp_path / 'gpt').iterdir())]
    reads(f'gpt_{kind}', fuzz // 8, tmp_path / 'gpt', names, read, least=0.2)


@pytest.mark.parametrize('kind', ['folder', 'nanogpt', 'ours'])
def test_gpt_of_damaged_files(tmp_path, fuzz, kind, monkeypatch):
    """GPT.from_pretrained, which train_gpt2.py uses: of files that are cut, flipped, overwritten."""
    path = gpt_files(kind, tmp_path / 'gpt')
    if kind == 'ours':
        torch.save(dict(model=tiny_gpt().state_dict(), model_config=vars(tiny_gpt().config)), path)
    for suffix in CHANGES:
        monkeypatch.setitem(CHANGES, suffix, bytes_changed)

    def read(folder):
        assert GPT.from_pretrained(str(path)).config.n_layer == 2
    reads(f'gpt_damaged_{kind}', fuzz // 8, tmp_path / 'gpt', [file.name for file in sorted((tmp_path / 'gpt').iterdir())], read, least=0.2)


def test_trm_of_others(tmp_path, fuzz):
    """begin_with and new_trm: a state dict of the public code and the all_config.yaml beside it."""
    folder = tmp_path / 'trm'
    folder.mkdir()
    shape = dict(hidden_size=16, num_heads=2, multiple_of=16, L_layers=1, H_cycles=2, L_cycles=1, puzzle_emb_len=1, halt_max_steps=3, puzzle_emb_ndim=16)
    model = trm.TRM(trm.TRMConfig(5, 9, 9, **shape, forward_dtype='float32'))
    (folder / 'step_7.pt').write_bytes(saved({'_orig_mod.model.inner.' + name: tensor for name, tensor in model.state_dict().items()}))
    lines = dict(shape, H_layers=0, expansion=4, forward_dtype='bfloat16', mlp_t='false', pos_encodings='rope', halt_exploration_prob=0.1)
    (folder / 'all_config.yaml').write_text('arch:\n' + ''.join(f'  {name}: {value}\n' for name, value in lines.items()) + 'beta1: 0.9\n')
    data = SimpleNamespace(vocab_size=5, seq_len=9, num_puzzle_identifiers=9)

    def read(folder):
        config = configure(dict(__file__=str(ROOT / 'pretrain_trm.py')), [f'--load_checkpoint={folder / "step_7.pt"}', '--dtype=float32'])
        found, _ = trm.begin_with('load_checkpoint', config, None, '')
        size = config['puzzle_emb_ndim'] if config['puzzle_emb_ndim'] >= 0 else config['hidden_size']
        new = trm.new_trm(data, config, size, 'cpu')
        try:
            trm.load_trm(found, new, new, True)
        except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:  # those that the scripts catch there
            raise ValueError(f'does not fit: {error}') from error
    reads('trm_of_others', fuzz // 4, folder, ['step_7.pt', 'all_config.yaml'], read, least=0.2)


@pytest.mark.parametrize('parts', [1, 2])
def test_qwen(tmp_path, fuzz, parts):
    folder = make_qwen(tmp_path / 'qwen')
    if parts == 2:
        from safetensors.torch import load as loads
        weights = list(loads((folder / 'model.safetensors').read_bytes()).items())
        some = [dict(weights[:5]), dict(weights[5:])]
        for i, part in enumerate(some):
            (folder / f'part{i}.safetensors').write_bytes(save(part))
        (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={name: f'part{i}.safetensors' for i, part in enumerate(some) for name in part})))
        (folder / 'model.safetensors').unlink()

    def read(folder):
        model = QwenLatentPRM(str(folder), question_context=True).eval()
        with torch.no_grad():
            model(torch.zeros(1, 1, model.hidden_size), torch.ones(1, 1), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0))
    reads(f'qwen_{parts}', fuzz // 8, folder, [file.name for file in sorted(folder.iterdir())], read, least=0.2)


def tokenizer_files(kind, folder):
    folder.mkdir()
    content = tokenizer_json(['Hello there', 'user', 'assistant', '\n\n'], QWEN_NEEDED)
    vocabulary = content['model']['vocab']
    if kind == 'tokenizer':
        (folder / 'tokenizer.json').write_text(json.dumps(content))
    elif kind == 'vocab':
        (folder / 'vocab.json').write_text(json.dumps(dict(vocabulary, **{QWEN_ADDED[0]: len(vocabulary)})))
        (folder / 'merges.txt').write_text('#version: 0.2\n' + ''.join(' '.join(pair) + '\n' for pair in content['model']['merges']))
    else:
        import base64
        ranks = {bytes([i]): i for i in range(256)} | {b'He': 256, b'Hello': 257}
        (folder / 'qwen.tiktoken').write_bytes(b''.join(base64.b64encode(token) + b' %d\n' % rank for token, rank in ranks.items()))


@pytest.mark.parametrize('kind', ['tokenizer', 'vocab', 'tiktoken'])
def test_qwens_tokenizers(tmp_path, fuzz, kind):
    tokenizer_files(kind, tmp_path / 'tok')
    text = 'Hello there, <|im_end|> ü 多 1234\n\n  x\0'

    def read(folder):
        tokenizer = QwenTokenizer.from_pretrained(str(folder))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.n_vocab
        assert tokenizer.decode(tokenizer.chat([dict(role='user', content='Hello')])).startswith('<|im_start|>user')
    reads(f'qwens_tokenizers_{kind}', fuzz // 8, tmp_path / 'tok', [path.name for path in (tmp_path / 'tok').iterdir()], read)


def test_the_tokenizer_of_gpt2(tmp_path, fuzz, monkeypatch):
    """Its two files in TIKTOKEN_CACHE_DIR are none: never used, said in an OSError, and the network is not asked."""
    import hashlib

    import tiktoken.registry
    folder = tmp_path / 'cache'
    folder.mkdir()
    for name in ('vocab.bpe', 'encoder.json'):
        (folder / hashlib.sha1(f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'.encode()).hexdigest()).write_bytes(b'#version: 0.2\n\xc4\xa0 t\n')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(folder))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    for i in range(max(2, fuzz // 20)):
        rng = random.Random(f'gpt2 {i}')
        for path in folder.iterdir():
            path.write_bytes(bytes_changed(b'#version: 0.2\n\xc4\xa0 t\n', rng))
        with pytest.raises(OSError, match='is not in TIKTOKEN_CACHE_DIR'):
            load_tokenizer('gpt2')


@pytest.fixture
def as_collected():
    """prepare/latent_prm.py's settings, which adopt changes, are put back."""
    before = dict(vars(collect))
    yield
    vars(collect).update(before)


def test_paths(tmp_path, fuzz, as_collected):
    folder = make_paths(tmp_path / 'paths', questions=6, paths=3)
    (folder / 'x_metadata.json').write_text(json.dumps({name: getattr(collect, name) for name in (
        'task', 'latent_steps', 'agents', 'num_parent_paths', 'diversity_strategy', 'noise_scale', 'latent_space_realign', 'temperature', 'top_p', 'max_new_tokens', 'thinking', 'instruction')}))
    settings = dict(max_seq_length=4, use_prm_score=True, question_context=True, val_size=0.3, seed=0, preset='', model_path='model')
    tokenizer = QwenTokenizer(*vocabulary_of(tokenizer_json(['user'], QWEN_NEEDED)))
    qwen = Qwen3Config(64, 16, 32, 1, 2, 1, 8, 512, 1e-6, 1e6, True)

    def read(folder):
        paths, questions, facts, learn, held_out = open_split(str(folder), settings)
        assert len(learn) + len(held_out) == len(paths['target']) == len(paths['latents']) and ((0 <= paths['target']) & (paths['target'] <= 1)).all()
        assert all(isinstance(answer, str) for answer in paths['answer'])
        padded_paths(paths['latents'], [questions[q]['ids'] for q in paths['question']])
        check_paths(str(folder), qwen, facts['hidden_size'], max(map(len, paths['latents'])), questions)
        open_paths(str(folder), 0, True)
        collect.adopt(str(folder))
        assert all(math.isfinite(sigma) for sigma, _ in collect.noise(1)) and collect.turns('What?', tokenizer)
    reads('paths', fuzz // 4, folder, [path.name for path in sorted(folder.iterdir())], read)


def test_prm_checkpoints(tmp_path, fuzz):
    """Folders of files, whose SHA-256 must fit; then such whose entries are of another kind."""
    weights = {'score.weight': torch.ones(1, 4), 'pooling': torch.tensor(0)}
    content = dict(model=weights, optimizer=dict(state={}, param_groups=[dict(lr=0.1, params=['score.weight'])]), lr=0.1, scaler={}, train_loader_state=dict(seed=0, files={}), ranks=[], shape={},
                   step=3, log_bytes=0, config={}, given={}, val_loss=1.0)
    store(content, tmp_path / 'best')
    (tmp_path / 'best/pytorch_model.bin').rename(tmp_path / 'best/pytorch_model.pt')  # the name says what is done to it
    names = [path.name for path in (tmp_path / 'best').iterdir()]

    def read(folder):
        if (folder / 'pytorch_model.pt').exists():
            (folder / 'pytorch_model.pt').rename(folder / 'pytorch_model.bin')
        found, problem = whole_checkpoint(str(folder), read_prm, 'best')
        if problem:
            raise ValueError(problem)
        assert isinstance(found['model'], dict)
    reads('prm_checkpoints', fuzz // 8, tmp_path / 'best', names, read)


def test_arc_tasks(tmp_path, fuzz):
    rng = np.random.default_rng(0)
    folder, grid = tmp_path / 'arc', lambda: rng.integers(0, 10, (2, 3)).tolist()
    folder.mkdir()
    tasks = {f'e{i}': dict(train=[dict(input=grid(), output=grid())], test=[dict(input=grid(), output=grid())]) for i in range(2)}
    (folder / 'test_puzzles.json').write_text(json.dumps(tasks))
    (folder / 'identifiers.json').write_text(json.dumps(['<blank>', 'e0', 'e0|||t3|||0132456789', 'e1']))
    data = SimpleNamespace(seq_len=900, num_puzzle_identifiers=4)

    def read(folder):
        identifiers, tasks = trm.read_arc([str(folder)], data)
        votes = {}
        trm.arc_vote(votes, identifiers[2], np.full(900, 3), np.full(900, 4), 0.5)
        shares, submission = trm.arc_result(votes, tasks)
        assert len(identifiers) == 4 and all(0 <= share <= 1 for share in shares.values()) and json.dumps(submission)
    reads('arc_tasks', fuzz // 4, folder, ['test_puzzles.json', 'identifiers.json'], read)


def test_sums(tmp_path, fuzz):
    folder = make_addition_data(tmp_path / 'sums', problems=6, tests=3)

    def read(folder):
        for split in ('train', 'test'):
            data = trm.open_sums(str(folder), split)
            inputs, labels, identifiers = data.rows(np.arange(data.examples))
            assert inputs.max() < 12 and labels.max() < 12 and len(data.carry) == data.examples and identifiers.max() < data.num_puzzle_identifiers
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob('*')) if path.is_file() and path.parent != folder]
    reads('sums', fuzz // 8, folder, names, read)


# ---- prepare/*.py, each input in a run of its own
def text_inputs(folder, kind):
    texts = ['One.', 'Zwölf\r\n', '', 'a <|endoftext|> b', '多 🙂', 'long ' * 60]
    if kind == '.parquet':
        pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        parquet.write_table(pyarrow.table({'text': texts * 3, 'other': list(range(18))}), folder / 'in.parquet', row_group_size=5)
    else:
        (folder / f'in{kind}').write_text(' '.join(texts) if kind == '.txt' else ''.join(json.dumps(dict(text=text)) + '\n' for text in texts))


def make_input(kind, folder):
    """Good input of a script, and the settings that read it."""
    rng = np.random.default_rng(0)
    if kind in ('.jsonl', '.txt', '.parquet'):
        text_inputs(folder, kind)
        return 'fineweb', [f'in{kind}'], [f'--input=in{kind}', '--tokenizer=bytes', '--num_workers=1']
    if kind == 'dolly':
        rows = [dict(instruction=f'Do {i}!', context='Some [1] text.' * (i % 2), response=f'Done {i}.[1]', category=f'c{i % 2}') for i in range(12)]
        (folder / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return 'dolly', ['in.jsonl'], ['--input=in.jsonl', '--tokenizer=bytes', '--val_fraction=0.3', '--max_length=300']
    if kind == 'hellaswag':
        (folder / 'in.jsonl').write_text(''.join(json.dumps(dict(ctx='A man', endings=list('abcd'), label=i, ind=3)) + '\n' for i in range(4)))
        return 'hellaswag', ['in.jsonl'], ['--input=in.jsonl']
    if kind == 'arc':
        write_arc(folder, rng, tasks=2)
        return 'arc', [f'arc_{subset}_{what}.json' for subset in ('training', 'evaluation') for what in ('challenges', 'solutions')], [
            '--input=arc', '--subsets=training,evaluation', '--num_aug=2']
    if kind == 'sudoku':
        solution = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])
        rows = [(rng.permutation(4) + 1)[solution - 1] for _ in range(24)]
        cells = [(''.join(map(str, np.where(rng.random((4, 4)) < 0.5, grid, 0).ravel())), ''.join(map(str, grid.ravel()))) for grid in rows]
        cells = list({question: answer for question, answer in cells}.items())
        (folder / 'in.csv').write_text('source,question,answer,rating\n' + ''.join(f'x,{q},{a},{i}\n' for i, (q, a) in enumerate(cells)))
        (folder / 'test.csv').write_text('question,answer\n' + ''.join(f'{a[:8]}{"." * 8},{a}\n' for _, a in cells[:3]))
        return 'sudoku', ['in.csv', 'test.csv'], ['--input=in.csv', '--test_input=test.csv', '--num_aug=1', '--min_difficulty=1']
    if kind == 'maze':
        lines = [('S' + ' ' * k + 'G' + '#' * (7 - k), 'S' + 'o' * k + 'G' + '#' * (7 - k)) for k in range(1, 6)]
        lines += [(a[::-1], b[::-1]) for a, b in lines] + [(a.replace('#', ' ', 1), b.replace('#', ' ', 1)) for a, b in lines]
        (folder / 'in.csv').write_text('source,question,answer\n' + ''.join(f'x,{q},{a}\n' for q, a in lines))
        return 'maze', ['in.csv'], ['--input=in.csv']
    (folder / 'in.jsonl').write_text(''.join(json.dumps(dict(question=f'What is {i} + 1?', answer=f'It is #### {i + 1}')) + '\n' for i in range(3)))
    return 'latent_prm', ['in.jsonl'], ['--input=in.jsonl', '--model_path=qwen', '--num_paths=2', '--latent_steps=1', '--max_new_tokens=2', '--shard_size=2', '--device=cpu']


def output_problem(script, folder):
    """'' if the folder is whole."""
    try:
        if script == 'fineweb':
            fineweb.open_shards(folder, 1)
        elif script == 'dolly':
            open_rows(str(folder), 1024)
        elif script == 'hellaswag':
            assert json.loads((folder / 'manifest.json').read_text())['rows'] == len(hellaswag.read_items(folder / 'hellaswag_val.jsonl')[0])
        elif script == 'latent_prm':
            shards = json.loads((folder / 'gsm8k_metadata.json').read_text())['shards']
            assert [shard['num_questions'] for shard in shards] == [len(load(folder / shard['name'])['questions']) for shard in shards] and len(list(folder.iterdir())) == len(shards) + 1
        else:
            for split in ('train', 'test'):
                trm.open_puzzles([str(folder)], split)
            if script == 'arc':
                trm.read_arc([str(folder)], trm.open_puzzles([str(folder)], 'test'))
        return ''
    except (ValueError, OSError, AssertionError, KeyError) as error:
        return f'{type(error).__name__}: {error}'


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()} if folder.exists() else None


def make_small_model(folder):
    from model import Qwen3, write_whole
    torch.manual_seed(0)
    model = Qwen3(Qwen3Config(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                              max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True))
    write_whole(str(folder), {**model.files(), 'tokenizer.json': tokenizer_json(['user', 'assistant', '\n\n'], QWEN_NEEDED)})


@pytest.mark.parametrize('kind', ['.jsonl', '.txt', '.parquet', 'dolly', 'hellaswag', 'arc', 'sudoku', 'maze', 'questions'])
def test_prepare(launcher, tmp_path, fuzz, kind):
    """The scripts, whole. Where good output lies already, a bad input leaves it as it is; else there is none, nor anything half made."""
    script, names, args = make_input(kind, tmp_path)
    if kind == 'questions':
        make_small_model(tmp_path / 'qwen')
    good = {name: (tmp_path / name).read_bytes() for name in names}
    assert ends_well(launcher, f'prepare/{script}.py', [*args, '--output_dir=good'], tmp_path) == ('', 0)
    assert output_problem(script, tmp_path / 'good') == ''
    expected, before, failures, refused, count = tree(tmp_path / 'good'), sorted(os.listdir(tmp_path)), [], 0, max(2, fuzz // 40)
    for i in range(count):
        rng = random.Random(f'{kind} {i}')
        spoil(tmp_path, names, rng)
        there = rng.random() < 0.5 and script not in ('fineweb', 'latent_prm')  # these two continue what is there
        if there:
            shutil.copytree(tmp_path / 'good', tmp_path / 'out')
        problem, code = ends_well(launcher, f'prepare/{script}.py', [*args, '--output_dir=out', *(['--shard_size=50'] if script == 'fineweb' and rng.random() < 0.5 else [])], tmp_path)
        refused += code == 2
        out = tmp_path / 'out'
        if not problem and code == 0:
            problem = output_problem(script, out)
        elif not problem and script == 'fineweb' and out.exists():  # finished pieces stay: the same command continues
            problem = '' if os.listdir(out) == ['pieces'] else f'left {os.listdir(out)}'
        elif not problem and tree(out) != (expected if there else None):
            problem = f'left {sorted(tree(out) or ["an empty folder"])}'
        if not problem and (left := [str(path) for path in tmp_path.rglob('*.tmp')]):
            problem = f'left {left}'
        if problem:
            failures.append((i, problem))
        for path in tmp_path.iterdir():
            if path.name not in before or path.name in names:
                drop(path)
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)
    assert not failures, f'prepare {kind}, {len(failures)} of {count}:\n' + '\n'.join(map(str, failures[:8]))
    assert count < 20 or refused > count / 4


@pytest.mark.parametrize('script', ['fineweb', 'latent_prm'])
def test_what_prepare_continues(launcher, tmp_path, fuzz, script):
    """manifest.json and progress.json of fineweb.py, the metadata and shards of latent_prm.py: continued, done, or refused."""
    kind = '.jsonl' if script == 'fineweb' else 'questions'
    _, _, args = make_input(kind, tmp_path)
    args = [*args, '--output_dir=out', *(['--shard_size=50'] if script == 'fineweb' else [])]
    if script == 'latent_prm':
        make_small_model(tmp_path / 'qwen')
    assert ends_well(launcher, f'prepare/{script}.py', args, tmp_path) == ('', 0)
    (tmp_path / 'out').rename(tmp_path / 'done')
    states = ['done']
    for at in (5, 20) if script == 'fineweb' else ():  # killed between two pieces, and between two shards
        launcher.run(f'prepare/{script}.py', args, cwd=tmp_path, prelude=f'''
import os
real, left = os.replace, [{at}]
def replace(*names):
    left[0] -= 1
    real(*names) if left[0] else os._exit(9)
os.replace = replace''')
        (tmp_path / 'out').rename(tmp_path / f'stopped{at}')
        assert (tmp_path / f'stopped{at}/pieces/progress.json').exists()
        states.append(f'stopped{at}')
    failures, count = [], max(2, fuzz // 40)
    for i in range(count):
        rng = random.Random(f'continues {script} {i}')
        state = rng.choice(states)
        shutil.copytree(tmp_path / state, tmp_path / 'out')
        names = [str(path.relative_to(tmp_path / 'out')) for path in sorted((tmp_path / 'out').rglob('*')) if path.is_file()]
        spoil(tmp_path / 'out', [name for name in names if name.endswith('.json')] if rng.random() < 0.8 else names, rng)
        problem, _ = ends_well(launcher, f'prepare/{script}.py', args, tmp_path)
        if problem:
            failures.append((i, state, problem))
        drop(tmp_path / 'out')
    assert not failures, f'continues {script}, {len(failures)} of {count}:\n' + '\n'.join(map(str, failures[:8]))


# ---- checkpoints of the right format whose entries are of the wrong kind
@pytest.mark.parametrize('name', CASES)
def test_checkpoints(launcher, tmp_path, fuzz, name):
    """Resumed or evaluated: well, or exit code 2. A model that computes NaN is no fault of a file's format: it ends in one line too, with 1."""
    case = SimpleNamespace(**CASES[name])
    case.data(tmp_path / 'data')
    small = dict(max_steps=2, eval_interval=2, checkpoint_interval=2)
    assert ends_well(launcher, case.script, words(case, **small), tmp_path) == ('', 0)
    path = tmp_path / 'run' / case.name(2)
    whole, failures, count, refused = load(path), [], max(2, fuzz // 50), 0
    bad, before = tmp_path / 'bad', sorted(os.listdir(tmp_path))
    for i in range(count):
        rng = random.Random(f'{name} {i}')
        content = whole
        while content is whole or not isinstance(content, dict):
            content = value_changed(whole, rng, STRANGE + TENSORS)
        try:
            store_strange(content, bad, whole)
        except (KeyError, TypeError, AttributeError):  # a folder cannot be made of it
            continue
        mode = ['--eval_only'] if rng.random() < 0.3 else ['--resume', f'--{case.names.get("max_steps", "max_steps")}=3']
        problem, code = ends_well(launcher, case.script, [*mode, '--checkpoint_path=bad', f'--{case.folder}=other'], tmp_path, (0, 1, 2))
        refused += code in (1, 2)
        if problem:
            failures.append((i, mode[0], problem))
        for left in tmp_path.iterdir():
            if left.name not in before:
                drop(left)
    assert not failures, f'{name}, {len(failures)} of {count}:\n' + '\n'.join(map(str, failures[:8]))
    assert count < 20 or refused > count / 4


def store_strange(content, path, whole):
    """harness.store, with what torch.save and JSON can hold."""
    if 'shape' in whole:
        store(content, path)
    else:
        path.write_bytes(saved(content))
