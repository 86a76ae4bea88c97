"""FineWeb-Edu, or text files of your own, as shards of GPT-2 tokens for train_gpt2.py.

Without --input it downloads the 14 parquet files of HuggingFaceFW/fineweb-edu's sample-10BT (28 GB,
they stay in the Hugging Face cache) and writes 10 billion tokens: 100 shards, 20 GB. One core makes
about 2 million tokens a second.

    python prepare/fineweb.py                       the 10B sample; needs pip install -e ".[data]"
    python prepare/fineweb.py --input *.parquet --output_dir=data/mine
    python prepare/fineweb.py --input notes book.txt --output_dir=data/notes --tokenizer=bytes
    python -m prepare.fineweb --help

--input: .parquet and .jsonl files (a document a row), other UTF-8 text files (one document each),
folders with all that is in them. The same command again, after a crash, continues.

The folder: {name}_val_000000.bin, {name}_train_000001.bin, ...: a header of 256 little-endian int32
(20240520, 1, number of tokens, zeros), then uint16 tokens, end-of-text before each document.
manifest.json, written last, says what they hold. Until then finished pieces of shard_size tokens
lie in pieces/, and progress.json says where the next one begins. More than 10 x shard_size tokens
become shards of shard_size; of fewer a tenth is the validation shard, few shards hold the rest.
"""
import contextlib
import hashlib
import http.client
import importlib
import json
import os
import re
import shutil
import sys
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import TOKENIZERS, load_tokenizer

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/fineweb_edu10B'  # folder to write
input = []              # files and folders, in this order; [] = download the 10B sample
text_field = 'text'     # column (.parquet) or key (.jsonl) that holds the text
name = ''               # {name}_train_000001.bin; '' = edufineweb for the download, else tokens
tokenizer = 'gpt2'      # gpt2 | bytes
shard_size = 100000000  # tokens in a shard, at most
num_workers = 0         # threads that tokenise, 0 = one per core

if __name__ == '__main__':
    configure(globals())

HUB = 'HuggingFaceFW/fineweb-edu'
HUB_FILES = [f'sample/10BT/{number:03d}_00000.parquet' for number in range(14)]
HEADER = 1024     # bytes: 256 int32
MAGIC = 20240520  # the first of them
BLANKS = 10_000   # white-space characters in a row that may be cut, see pieces

# -----------------------------------------------------------------------------
# reading shards

def open_shard(path):
    """The tokens (n,) uint16 of a .bin or .npy file: mapped, not read."""
    if path.suffix == '.npy':
        tokens = np.lib.format.open_memmap(path, mode='r')
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f'holds {tokens.dtype} {tokens.shape}, expected one row of uint16')
        return tokens
    header = np.fromfile(path, '<i4', 256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != 1 or header[2] < 1:
        raise ValueError(f'does not start with the header {MAGIC}, 1, number of tokens')
    if not whole(path, header[2]):
        size = path.stat().st_size
        raise ValueError(f'is {size} bytes long, but its header says {header[2]} tokens')
    return np.memmap(path, '<u2', 'r', HEADER)

def open_shards(folder, T, expected=None):
    """(training shards {name: tokens}, validation shards {name: tokens}, tokenizer) of a folder.

    tokens: (n,) uint16, mapped; nobody compares them with the vocabulary here. Validation shards
    have `val` in their name, else it is the first. tokenizer: dict(tokenizer, vocab_size, eot),
    GPT-2's if no manifest.json names another. T: block_size. expected: the tokenizer that it must
    be, None = any. ValueError says what is wrong."""
    folder = Path(folder)
    hint = ('; to make data: python prepare/fineweb.py, or without a download python '
            'prepare/pydocs.py, then --model=tiny --data_root=data/pydocs')
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder{hint}')
    if (folder / 'pieces').exists():
        raise ValueError(f'{folder} is half made: run the prepare script again, it continues')
    paths = sorted(path for path in folder.iterdir() if path.suffix in ('.bin', '.npy'))
    val_paths = [path for path in paths if 'val' in path.name] or paths[:1]
    if len(paths) == len(val_paths):
        raise ValueError(f'{folder} holds {len(paths)} .bin or .npy files, a training and a '
                         f'validation shard are needed{hint}')
    train, val = {}, {}
    tokenizer = 'gpt2'
    path = folder / 'manifest.json'
    try:
        if path.exists():
            tokenizer = json.loads(path.read_bytes())['tokenizer']
            if tokenizer not in TOKENIZERS:
                raise ValueError(f'unknown tokenizer {tokenizer!r}')
        for path in paths:
            split = val if path in val_paths else train
            split[path.name] = open_shard(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from error
    for purpose, split in (('training', train), ('validation', val)):
        sizes = [len(tokens) for tokens in split.values()]
        if max(sizes) <= T:
            raise ValueError(
                f'{folder} has {sum(sizes):,} {purpose} tokens ({len(sizes)} shards) and no row of '
                f'block_size + 1 = {T + 1:,}: prepare more text or choose a smaller --block_size')
    if expected and expected != TOKENIZERS[tokenizer]:
        raise ValueError(f'{folder} holds {tokenizer} tokens, the model was trained on '
                         f'{expected["tokenizer"]} tokens')
    return train, val, TOKENIZERS[tokenizer]

def read_rows(shards, T, rows, vocab_size=2 ** 16):
    """Rows (n, T + 1) int64 by number: row r of a shard is its tokens[r*T : r*T + T + 1], the rows
    of all shards are one list. ValueError names a shard with an id beyond the vocabulary."""
    tokens = list(shards.values())
    ends = np.cumsum([(len(part) - 1) // T for part in tokens])
    picked = np.empty((len(rows), T + 1), np.int64)
    for i, (row, shard) in enumerate(zip(rows, np.searchsorted(ends, rows, 'right'), strict=True)):
        first = ends[shard - 1] if shard > 0 else 0
        start = (row - first) * T
        picked[i] = tokens[shard][start:start + T + 1]
        if picked[i].max() >= vocab_size:
            name = list(shards)[shard]
            raise ValueError(f'{name}: id {picked[i].max()} is beyond its tokenizer')
    return torch.from_numpy(picked)

# -----------------------------------------------------------------------------
# reading texts: each reader yields (text, share of the file that has been read); no text is ''

def extra(module):
    """Import what only some inputs need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        fail(f'this needs the Python package {module.split(".")[0]}: pip install -e ".[data]"')

def checked(text, where):
    """A text that is a string and can be written as UTF-8."""
    if not isinstance(text, str):
        fail(f'{where}: the text is {type(text).__name__}, expected a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell such a character, UTF-8 has none
        fail(f'{where}: half a surrogate pair at character {error.start} of the text')
    return text

def parsed(line, where):
    """What a line of JSON (bytes) holds. A byte order mark is no part of it."""
    try:
        return json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as error:
        fail(f'{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)')
    except (ValueError, RecursionError) as error:
        fail(f'{where}: not JSON ({error}), expected an object on each line')

def read_parquet(path):
    pyarrow, parquet = extra('pyarrow'), extra('pyarrow.parquet')
    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                fail(f'{path} has no column {text_field!r} but {", ".join(columns)}: --text_field')
            for batch in file.iter_batches(256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    text = '' if value is None else checked(value, f'{path} row {number}')
                    number += 1
                    yield text, number / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        fail(f'{path} cannot be read as parquet (near row {number}): {error}')

def read_jsonl(path):
    size, seen = path.stat().st_size, 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            seen += len(line)
            if not line.strip():
                continue
            where = f'{path} line {number}'
            row = parsed(line, where)
            if not isinstance(row, dict) or text_field not in row:
                fail(f'{where}: expected an object with a {text_field!r} (other key: --text_field)')
            text = row[text_field]
            yield '' if text is None else checked(text, where), seen / size

def read_text(path):
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        fail(f'{path}: not UTF-8 ({error.reason} at byte {error.start})')
    yield text, 1.0

READERS = {'.parquet': read_parquet, '.jsonl': read_jsonl}  # all others: read_text

def stream_of(sizes, path_of):
    """A function stream(file, document): every document from there on as (file, document, text,
    share of all input read). sizes: of the files, to scale; path_of(file): where it is."""
    def stream(first_file, first_document):
        for file in range(first_file, len(sizes)):
            path, before = Path(path_of(file)), sum(sizes[:file])
            reader = READERS.get(path.suffix.lower(), read_text)
            for document, (text, share) in enumerate(reader(path)):
                if file > first_file or document >= first_document:
                    share = (before + share * sizes[file]) / max(1, sum(sizes))
                    yield file, document, text, share
    return stream

def download(number):
    """The local path of one file of the 10B sample."""
    try:
        hub = extra('huggingface_hub')
        return hub.hf_hub_download(HUB, HUB_FILES[number], repo_type='dataset')
    except Exception as error:  # noqa: BLE001  a network fails in a dozen classes of two libraries
        fail(f'{HUB_FILES[number]} of {HUB} was not downloaded ({type(error).__name__}: {error}); '
             'the same command tries again, --input=... reads local files', 1)

def download_bytes(url):
    """All bytes of the file at `url`."""
    content = bytearray()
    bar = tqdm(unit='B', unit_scale=True, disable=None, desc=url.rsplit('/', 1)[1])
    try:
        with bar, urllib.request.urlopen(url, timeout=60) as response:
            bar.total = int(response.headers.get('Content-Length') or 0)
            for part in iter(lambda: response.read(1 << 16), b''):
                content += part
                bar.update(len(part))
        if bar.total and len(content) != bar.total:  # a cut connection looks like the file's end
            raise ConnectionError(f'{len(content):,} of {bar.total:,} bytes arrived')
    except (OSError, http.client.HTTPException, ValueError) as error:
        fail(f'{url} was not downloaded ({type(error).__name__}: {error}); '
             '--input=... reads a file that you have')
    return bytes(content)

def files_in(folder):
    """(the files below the folder that can be read, sorted; how many others there are). Hidden ones
    do not count, nor does the folder to write."""
    found, others = [], 0
    for path in sorted(folder.rglob('*')):
        hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        ours = Path(output_dir).resolve() in path.resolve().parents
        if hidden or ours or not path.is_file():
            continue
        try:
            if path.suffix.lower() not in READERS:
                path.read_bytes().decode()
            found.append(path)
        except UnicodeDecodeError:
            others += 1
    return found, others

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for part in iter(lambda: file.read(1 << 20), b''):
            digest.update(part)
    return digest.hexdigest()

def sources():
    """(what the manifest says of the inputs, their relative sizes, a function number -> path)"""
    if not input:
        extra('huggingface_hub')  # ask before 2 GB are loaded, not after
        extra('pyarrow.parquet')
        return [{'name': f'{HUB}/{file}'} for file in HUB_FILES], [1] * len(HUB_FILES), download
    entries, paths = [], []
    for given in [Path(str(given)) for given in input]:
        if not given.exists():
            fail(f'--input: {given} does not exist')
        found, skipped = files_in(given) if given.is_dir() else ([given], 0)
        if skipped:
            print0(f'{given}: {skipped:,} files are not UTF-8 text and were skipped')
        if not found:
            fail(f'--input: {given} holds no text files')
        for path in tqdm(found, desc=f'sha256 of {given}', disable=None):
            if path.suffix.lower() == '.parquet':
                extra('pyarrow.parquet')
            label = str(path.relative_to(given)) if given.is_dir() else path.name
            entries.append(dict(name=label, bytes=path.stat().st_size, sha256=sha256_of(path)))
            paths.append(path)
    return entries, [entry['bytes'] for entry in entries], paths.__getitem__

# -----------------------------------------------------------------------------
# tokens

def pieces(text):
    """The text in pieces to be encoded one by one; nearly every text is a single one.

    tiktoken gives up at a million white-space characters in a row (half a million is fine): a text
    is cut behind every BLANKS characters, counted from its beginning, that are nothing else."""
    start = 0
    for end in range(BLANKS, len(text), BLANKS):
        if text[end - BLANKS:end].isspace():
            yield text[start:end]
            start = end
    yield text[start:]

def encode(encoding, text):
    """The ids of ordinary text, whatever it spells, by a tiktoken.Encoding."""
    return [token for piece in pieces(text) for token in encoding.encode_ordinary(piece)]

def tokenise(enc, text):
    """End-of-text and the tokens (n,) uint16 of a text, as encode gives them; of '' none at all."""
    if not text:
        return np.zeros(0, np.uint16)
    # without Python's lists, which only one thread at a time can make
    ids = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
    tokens = np.concatenate([[enc.eot_token], *ids])
    assert tokens.max() < 2 ** 16, f'token {tokens.max()} does not fit into 16 bits'
    return tokens.astype(np.uint16)

def tokenised(documents, enc, workers):
    """Yield (file, document, text, share, tokens) in the order of the documents. Threads do:
    tiktoken works outside of Python's global lock."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for document in documents:
            waiting.append((document, pool.submit(tokenise, enc, document[2])))
            if len(waiting) > 64 * workers:
                document, future = waiting.popleft()
                yield *document, future.result()
        for document, future in waiting:
            yield *document, future.result()

# -----------------------------------------------------------------------------
# writing

@contextlib.contextmanager
def one_line_errors(folder):
    """A disk that is full, a folder that may not be written, Ctrl-C: one line, no traceback."""
    try:
        yield
    except OSError as error:
        theirs = (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)
        code = 2 if isinstance(error, theirs) else 1
        fail(f'{error.filename or folder}: {error.strerror or error}', code)
    except KeyboardInterrupt:
        fail('stopped: the same command continues', 130)

def write_file(path, *parts):
    """The file is there whole or not at all, whenever this is killed. Returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    digest = hashlib.sha256()
    with open(temporary, 'wb') as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()

def write_json(path, facts):
    write_file(path, (json.dumps(facts, indent=1) + '\n').encode())

def write_tokens(path, tokens):
    """Write a shard or a piece. Returns what a list of them says of it."""
    header = np.zeros(256, '<i4')
    header[:3] = MAGIC, 1, len(tokens)
    digest = write_file(path, header.tobytes(), np.ascontiguousarray(tokens, '<u2'))
    return {'tokens': len(tokens), 'sha256': digest}

def whole(path, tokens):
    return path.is_file() and path.stat().st_size == HEADER + 2 * int(tokens)

def read_json(path, settings, more):
    """The facts in a manifest.json or progress.json, None if there is no such file. They must hold
    the same settings (a dict) and the keys `more`."""
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    advice = 'delete the folder or choose another --output_dir'
    if not isinstance(facts, dict) or not {*settings, *more} <= facts.keys():
        fail(f'{path} is damaged or was not written by this script: {advice}')
    for key in settings:
        if facts[key] != settings[key]:
            change = f'{key} {facts[key]!r}, now {settings[key]!r}'
            change = 'other input' if key == 'source' else change
            fail(f'{path} was written with other settings ({change}): {advice}')
    return facts

def write_shards(output_dir, settings, stream, num_workers=0):
    """Write the folder, continue it, or say that it is done.

    settings: name, tokenizer, shard_size, source (one entry per file) and whatever else determines
    the tokens. stream: see stream_of; the same settings must give the same documents."""
    if not re.fullmatch(r'[\w.-]+', settings['name']) or 'val' in settings['name']:
        fail(f'--name={settings["name"]}: letters, digits, "_", "-" and "." only, and not "val", '
             'which marks the validation shard')
    if not 1 <= settings['shard_size'] < 2 ** 31:
        fail(f'--shard_size={settings["shard_size"]}: expected 1 to {2 ** 31 - 1}')
    folder = Path(output_dir)
    with one_line_errors(folder):
        manifest = read_json(folder / 'manifest.json', settings, ('tokens', 'shards'))
        if manifest is None:
            manifest = make_shards(folder, settings, stream, num_workers or os.cpu_count())
            print0(f'{folder}: {manifest["documents"]:,} documents, {manifest["bytes"]:,} bytes, '
                   f'{manifest["empty_documents"]:,} empty documents skipped')
        for shard in manifest['shards']:
            if not whole(folder / shard['name'], shard['tokens']):
                fail(f'{folder / shard["name"]} is missing or cut short: delete the folder')
        print0(f'{folder} is done: {manifest["tokens"]:,} tokens, {len(manifest["shards"])} shards')
        if (folder / 'pieces').exists():
            shutil.rmtree(folder / 'pieces')

def make_shards(folder, settings, stream, workers):
    """Tokenise into pieces of shard_size tokens, which become shards. Returns the manifest."""
    counts = dict(tokens=0, documents=0, empty_documents=0, bytes=0)
    state = {**settings, 'next': [0, 0, 0], **counts, 'pieces': []}
    progress = read_json(folder / 'pieces' / 'progress.json', settings, state)
    if progress:
        state = progress
        print0(f'continuing in {folder}: {state["tokens"]:,} tokens are done')
    elif any(folder.glob('*.bin')):  # a trainer would read them together with ours
        fail(f'{folder} holds .bin files and no manifest.json: choose another --output_dir')
    try:
        enc = load_tokenizer(settings['tokenizer'], download=True)
    except (OSError, ValueError) as error:
        fail(f'the {settings["tokenizer"]} tokenizer was not loaded ({error}): '
             'it is downloaded once, --tokenizer=bytes needs no network', 1)
    write_pieces(folder, settings, state, tokenised(stream(*state['next'][:2]), enc, workers))
    if not state['pieces']:
        names = ', '.join(str(entry['name']) for entry in settings['source'][:5])
        fail(f'no documents in {names}: nothing to write')
    manifest = {**settings, 'vocab_size': enc.n_vocab, 'eot': enc.eot_token}
    manifest.update({key: state[key] for key in counts}, shards=cut(folder, settings, state))
    write_json(folder / 'manifest.json', manifest)
    return manifest

def piece_path(folder, k):
    return folder / 'pieces' / f'piece_{k:06d}.bin'

def write_pieces(folder, settings, state, documents):
    """Fill state['pieces']. state['next']: where the next piece begins, [file, document, token]."""
    size, start = settings['shard_size'], state['next'][2]
    buffer = np.empty(size, np.uint16)  # memory is taken as it fills

    def save(used, place):
        state['next'] = place
        path = piece_path(folder, len(state['pieces']))
        state['pieces'].append(write_tokens(path, buffer[:used]))
        write_json(folder / 'pieces' / 'progress.json', state)  # a piece counts from here on

    done = state['tokens']
    bar = tqdm(unit='tok', unit_scale=True, initial=done, disable=None, desc=str(folder))
    for file, document, text, share, tokens in documents:
        if start == 0:  # else it began in the piece before
            state['documents' if text else 'empty_documents'] += 1
            state['bytes'] += len(text.encode())
        while start < len(tokens):
            used = state['tokens'] % size
            part = tokens[start:start + size - used]
            buffer[used:used + len(part)] = part
            start += len(part)
            state['tokens'] += len(part)
            if used + len(part) == size:
                save(size, [file, document, start])
        start = 0
        bar.total = int(state['tokens'] / share) if share else None  # an estimate, for the ETA
        bar.update(state['tokens'] - bar.n)
    bar.close()
    end = [len(settings['source']), 0, 0]
    if state['tokens'] % size and state['next'] != end:
        save(state['tokens'] % size, end)

def cut(folder, settings, state):
    """Make the pieces shards. Returns the manifest's list of them."""
    def shard_path(k):
        return folder / f'{settings["name"]}_{"train" if k else "val"}_{k:06d}.bin'

    total, size = state['tokens'], settings['shard_size']
    paths = [piece_path(folder, k) for k in range(len(state['pieces']))]
    shards = []
    if total > 10 * size:
        for k, piece in enumerate(state['pieces']):
            if paths[k].exists():  # else it was renamed before a kill
                os.replace(paths[k], shard_path(k))
            shards.append(dict(name=shard_path(k).name, **piece))
        return shards
    # A small text: each shard loses up to a row, so there are as few as can be.
    arrays = [np.memmap(path, '<u2', 'r', HEADER) for path in paths]
    starts = [0, *range(-(-total // 10), total, size)]
    for k, (start, end) in enumerate(zip(starts, [*starts[1:], total], strict=True)):
        parts = [array[max(0, start - i * size):max(0, end - i * size)]
                 for i, array in enumerate(arrays)]
        facts = write_tokens(shard_path(k), np.concatenate(parts))
        shards.append(dict(name=shard_path(k).name, **facts))
    return shards

if __name__ == '__main__':
    with one_line_errors(output_dir):
        source, sizes, path_of = sources()
    name = name or ('tokens' if input else 'edufineweb')
    write_shards(output_dir, dict(name=name, tokenizer=tokenizer, shard_size=shard_size,
                                  text_field=text_field, source=source),
                 stream_of(sizes, path_of), num_workers)
