"""FineWeb-Edu, or text files of your own, as shards of GPT-2 tokens for train_gpt2.py.

Without --input it downloads the 14 parquet files of HuggingFaceFW/fineweb-edu's sample-10BT (28 GB, they stay in the
Hugging Face cache) and writes 10 billion tokens: 100 shards, 20 GB. One core makes about 2 million tokens a second.

    python prepare/fineweb.py                                             the 10B sample; needs pip install -e ".[data]"
    python prepare/fineweb.py --input *.parquet --output_dir=data/mine    local files: .parquet, .jsonl, .txt (a document each)
    python prepare/fineweb.py --input=book.txt --output_dir=data/book --tokenizer=bytes     without any download
    python -m prepare.fineweb --help

The same command again, after a crash or a kill, continues behind the last finished piece of shard_size tokens.

The folder: {name}_val_000000.bin, {name}_train_000001.bin, ... each a header of 256 little-endian int32 (20240520, 1,
number of tokens, zeros) and then uint16 tokens, end-of-text before each document; manifest.json, written last, says what
they hold. Until then finished pieces lie in pieces/ with progress.json, which says where the next one begins.
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
import time
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import load_tokenizer

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/fineweb_edu10B'  # folder to write
input = []                          # .parquet, .jsonl and .txt files, in this order; [] = download the 10B sample
text_field = 'text'                 # column (.parquet) or key (.jsonl) that holds the text
name = 'edufineweb'                 # the files are called {name}_val_000000.bin, {name}_train_000001.bin, ...
tokenizer = 'gpt2'                  # gpt2 | bytes
shard_size = 100000000              # tokens in a shard, at most: a tenth of all tokens where that is less
num_workers = 0                     # threads that tokenise, 0 = one per core

if __name__ == '__main__':
    configure(globals())

HUB = 'HuggingFaceFW/fineweb-edu'
HUB_FILES = [f'sample/10BT/{number:03d}_00000.parquet' for number in range(14)]
HEADER = 1024                   # bytes: 256 int32
BATCH = 500_000                 # characters that a thread gets at once; with the queue's length this bounds the memory


# -----------------------------------------------------------------------------
# reading: each reader yields (document number, text, share of the file that has been read), from document `first` on

def extra(module):
    """Import what only some inputs need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        fail(f'this needs the Python package {module.split(".")[0]}: pip install -e ".[data]"')


def checked(text, where):
    if not isinstance(text, str):
        fail(f'{where}: the text is {type(text).__name__}, expected a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell such a character, UTF-8 has none
        fail(f'{where}: half a surrogate pair at character {error.start} of the text')
    return text


def read_parquet(path, first):
    pyarrow, parquet = extra('pyarrow'), extra('pyarrow.parquet')
    number, row_group = 0, 'footer'
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if text_field not in file.schema_arrow.names:
                fail(f'{path} has no column {text_field!r} but {", ".join(file.schema_arrow.names)}: choose with --text_field')
            for row_group in range(file.num_row_groups):
                rows = file.metadata.row_group(row_group).num_rows
                if number + rows <= first:  # a resumed run need not decode what is done
                    number += rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[row_group], columns=[text_field]):
                    for value in batch.column(0):
                        if number >= first:
                            yield number, checked(value.as_py(), f'{path} row {number}'), (number + 1) / file.metadata.num_rows
                        number += 1
    except UnicodeDecodeError as error:
        fail(f'{path} row {number}: not UTF-8 ({error.reason})')
    except (pyarrow.ArrowException, OSError) as error:
        fail(f'{path} cannot be read as parquet (row group {row_group}, near row {number}): {error}')


def parsed(line, where):
    """What a line of JSON (bytes) holds."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        fail(f'{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)')
    except (ValueError, RecursionError) as error:
        fail(f'{where}: not JSON ({error}), expected an object on each line')


def read_jsonl(path, first):
    size, seen = os.path.getsize(path), 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file):
            seen += len(line)
            if number < first or not line.strip():
                continue
            where = f'{path} line {number + 1}'
            row = parsed(line, where)
            if not isinstance(row, dict) or text_field not in row:
                fail(f'{where}: expected an object with a {text_field!r} (another key: --text_field)')
            yield number, checked(row[text_field], where), seen / size


def read_txt(path, first):
    if first == 0:
        with open(path, 'rb') as file:
            content = file.read()
        try:
            yield 0, content.decode(), 1.0
        except UnicodeDecodeError as error:
            fail(f'{path}: not UTF-8 ({error.reason} at byte {error.start})')


READERS = {'.parquet': read_parquet, '.jsonl': read_jsonl, '.txt': read_txt}


def download(file):
    """The local path of one file of the 10B sample."""
    try:
        return extra('huggingface_hub').hf_hub_download(HUB, file, repo_type='dataset')
    except Exception as error:  # noqa: BLE001  a network fails in a dozen classes of two HTTP libraries; all are shown
        fail(f'{file} of {HUB} was not downloaded ({type(error).__name__}: {error}); the same command tries again, '
             '--input=... reads local files', 1)


def download_bytes(url):
    """All bytes of the file at `url`."""
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            total = int(response.headers.get('Content-Length') or 0)
            with tqdm(total=total or None, unit='B', unit_scale=True, disable=None, desc=url.rsplit('/', 1)[1]) as bar:
                while part := response.read(1 << 16):
                    content += part
                    bar.update(len(part))
        if total and len(content) != total:  # a connection that is cut looks like the end of the file
            raise ConnectionError(f'{len(content):,} of {total:,} bytes arrived')
    except (OSError, http.client.HTTPException, ValueError) as error:
        fail(f'{url} was not downloaded ({type(error).__name__}: {error}); --input=... reads a file that you have')
    return bytes(content)


def sources():
    """(what the manifest calls the inputs, their relative sizes, a function number -> path)"""
    if not input:
        for module in ('huggingface_hub', 'pyarrow.parquet'):  # ask before 2 GB are loaded, not after
            extra(module)
        return [{'name': f'{HUB}/{file}'} for file in HUB_FILES], [1] * len(HUB_FILES), lambda number: download(HUB_FILES[number])
    paths = [Path(str(path)) for path in input]
    for path in paths:
        if not path.is_file():
            fail(f'--input: {path} ' + ('is a folder: name the files in it' if path.is_dir() else 'does not exist'))
        if path.suffix not in READERS:
            fail(f'--input: {path} must end in {", ".join(READERS)}')
        if path.suffix == '.parquet':
            extra('pyarrow.parquet')
    sizes = [path.stat().st_size for path in paths]
    return [{'name': path.name, 'bytes': size} for path, size in zip(paths, sizes, strict=True)], sizes, paths.__getitem__


def stream_of(sizes, path_of):
    """A function (file, document) -> every document from there on, as (file, document, text, share of all input read)."""
    before = list(accumulate(sizes, initial=0))  # bytes in front of each file

    def stream(first_file, first_document):
        for file in range(first_file, len(sizes)):
            path = Path(path_of(file))
            for document, text, share in READERS[path.suffix](path, first_document if file == first_file else 0):
                yield file, document, text, (before[file] + share * sizes[file]) / max(1, before[-1])
    return stream


# -----------------------------------------------------------------------------
# tokens

def tokenise(enc, texts):
    """The uint16 tokens of each text behind an end-of-text, and none at all for an empty text."""
    arrays = []
    for text in texts:
        ids = enc.encode_to_numpy(text, disallowed_special=())  # a text that spells <|endoftext|> is ordinary text
        assert ids.max(initial=0) < enc.n_vocab, f'token {ids.max()} is outside of the vocabulary of {enc.n_vocab}'  # uint16 would wrap
        arrays.append(np.concatenate(([enc.eot_token], ids)).astype(np.uint16) if text else np.zeros(0, np.uint16))
    return arrays


def tokenised(documents, enc, workers):
    """Yield (file, document, text, share, tokens) in the order of the documents, whatever the number of threads.

    Threads do: tiktoken works outside of Python's global lock (measured on 2 cores: 2.0 x one thread, 2.2 x in processes)."""
    def finished():
        batch, future = waiting.popleft()
        for document, tokens in zip(batch, future.result(), strict=True):
            yield *document, tokens

    with ThreadPoolExecutor(workers) as pool:
        waiting, batch, size = deque(), [], 0
        for document in documents:
            batch.append(document)
            size += len(document[2]) + 1000  # an empty document takes memory too
            if size > BATCH:
                waiting.append((batch, pool.submit(tokenise, enc, [text for _, _, text, _ in batch])))
                batch, size = [], 0
                if len(waiting) > 2 * workers:
                    yield from finished()
        waiting.append((batch, pool.submit(tokenise, enc, [text for _, _, text, _ in batch])))
        while waiting:
            yield from finished()


# -----------------------------------------------------------------------------
# writing

@contextlib.contextmanager
def one_line_errors(folder):
    """A disk that fails or fills, a folder that may not be written, Ctrl-C: one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename or folder)
        existing = next((p for p in (place, *place.absolute().parents) if p.exists()), Path('/'))
        theirs = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError))
        fail(f'{place}: {error.strerror or error} ({shutil.disk_usage(existing).free:,} bytes free)', 2 if theirs else 1)
    except KeyboardInterrupt:
        fail('stopped: the same command continues', 130)


def write_file(path, *parts):
    """The file is there whole or not at all, whenever this is killed. Returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, digest = path.with_name(path.name + '.tmp'), hashlib.sha256()
    with open(temporary, 'wb') as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def write_tokens(path, tokens):
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, len(tokens)
    return {'tokens': len(tokens), 'sha256': write_file(path, header.tobytes(), np.ascontiguousarray(tokens, '<u2'))}


def write_json(path, facts):
    write_file(path, (json.dumps(facts, indent=1) + '\n').encode())


def adds_up(facts, parts):
    """Are the counts in a manifest.json or progress.json whole numbers, and its tokens those of its `parts`, shards or pieces?"""
    files, place = facts[parts], facts.get('next', [0, 0, 0])
    unnamed = '' if parts == 'pieces' else None
    if not isinstance(files, list) or not all(isinstance(file, dict) and isinstance(file.get('name', unnamed), str) for file in files):
        return False
    if not isinstance(place, list) or len(place) != 3:
        return False
    sizes = [file.get('tokens') for file in files]
    counts = [*sizes, *place, *(facts.get(key, 0) for key in ('tokens', 'documents', 'empty_documents', 'bytes'))]
    return all(type(n) is int and n >= 0 for n in counts) and sum(sizes) == facts['tokens']


def read_json(path, settings, more, parts=''):
    """The facts in a manifest.json or progress.json, which must come from the same settings and add up to their `parts`; None if there is no such file."""
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or not all(key in facts for key in (*settings, *more)) or parts and not adds_up(facts, parts):
        fail(f'{path} is damaged or was not written by this script: delete the folder or choose another --output_dir')
    changed = [key for key in settings if facts[key] != settings[key]]
    if changed:
        words = ['other input' if key == 'source' else f'{key} {facts[key]!r}, now {settings[key]!r}' for key in changed]
        fail(f'{path} was written with other settings ({"; ".join(words)}): repeat those, delete the folder or choose another --output_dir')
    return facts


def piece_path(folder, k):
    return folder / 'pieces' / f'piece_{k:06d}.bin'


def shard_name(settings, k):
    return f'{settings["name"]}_{"train" if k else "val"}_{k:06d}.bin'


def whole(path, tokens):
    return path.is_file() and path.stat().st_size == HEADER + 2 * tokens


def write_shards(output_dir, settings, stream, num_workers=0):
    """Write the folder, continue it, or say that it is done.

    settings: name, tokenizer, shard_size, source (one entry per file) and whatever else determines the tokens.
    stream(file, document): see stream_of; the same settings must give the same documents."""
    if not re.fullmatch(r'[\w.-]+', settings['name']) or 'val' in settings['name']:
        fail(f'--name={settings["name"]}: letters, digits, "_", "-" and "." only, and not "val", which marks the validation shard')
    if not 1 <= settings['shard_size'] < 2 ** 31:
        fail(f'--shard_size={settings["shard_size"]}: expected 1 to {2 ** 31 - 1}')
    if num_workers < 0:
        fail(f'--num_workers={num_workers}: expected 0 (one per core) or more')
    with one_line_errors(output_dir):
        folder = Path(output_dir)
        manifest = read_json(folder / 'manifest.json', settings, ('tokens', 'shards'), 'shards')
        if manifest is None:
            manifest = _write_shards(folder, settings, stream, num_workers or os.cpu_count())
            for shard in manifest['shards']:
                print0(f'{folder / shard["name"]}  {shard["tokens"]:,} tokens')
            print0(f'{folder}: {manifest["tokens"]:,} tokens, {manifest["documents"]:,} documents, {manifest["bytes"]:,} bytes of text, '
                   f'{manifest["empty_documents"]:,} empty documents skipped')
        else:
            for shard in manifest['shards']:
                if not whole(folder / shard['name'], shard['tokens']):
                    fail(f'{folder / shard["name"]}, which manifest.json lists, is missing or cut short: delete the folder and start again')
            print0(f'{folder} is done: {manifest["tokens"]:,} tokens in {len(manifest["shards"])} shards')
        if (folder / 'pieces').exists():
            shutil.rmtree(folder / 'pieces')


def _write_shards(folder, settings, stream, workers):
    """Tokenise into pieces of shard_size tokens, then cut those into shards, whose size depends on the total."""
    state = {**settings, 'next': [0, 0, 0], 'tokens': 0, 'documents': 0, 'empty_documents': 0, 'bytes': 0, 'pieces': []}
    progress = read_json(folder / 'pieces' / 'progress.json', settings, state, 'pieces')
    if progress is None:
        strange = sorted(folder.glob('*.bin')) if folder.is_dir() else []
        if strange:  # a trainer would read them together with ours
            fail(f'{folder} already holds {strange[0].name} and no manifest.json: delete the folder or choose another --output_dir')
    else:
        state = progress
        for k, piece in enumerate(state['pieces']):  # killed while the pieces became shards: some lie there already
            if not whole(piece_path(folder, k), piece['tokens']) and not whole(folder / shard_name(settings, k), piece['tokens']):
                fail(f'{piece_path(folder, k)} is missing or cut short: delete the folder {folder} and start again')
        print0(f'continuing in {folder}: {len(state["pieces"])} pieces, {state["tokens"]:,} tokens are done')
    try:
        enc = load_tokenizer(settings['tokenizer'], download=True)
    except (OSError, ValueError) as error:
        fail(f'the {settings["tokenizer"]} tokenizer was not loaded ({error}): it is downloaded once, '
             '--tokenizer=bytes needs no network', 1)
    if enc.n_vocab > 2 ** 16:
        fail(f'the {settings["tokenizer"]} tokenizer has {enc.n_vocab:,} ids, a shard of uint16 holds 65,536')

    write_pieces(folder, settings, state, stream, enc, workers)
    if not state['pieces']:
        fail(f'no documents in {", ".join(str(entry["name"]) for entry in settings["source"][:5])}: nothing to write')
    shards = cut(folder, settings, state)
    manifest = {**settings, 'vocab_size': enc.n_vocab, 'eot': enc.eot_token,
                **{key: state[key] for key in ('tokens', 'documents', 'empty_documents', 'bytes')}, 'shards': shards}
    write_json(folder / 'manifest.json', manifest)
    return manifest


def write_pieces(folder, settings, state, stream, enc, workers):
    """Fill state['pieces']. state['next'] = where the next piece begins: file, document, token inside the document."""
    buffer, used = np.empty(settings['shard_size'], np.uint16), 0  # memory is taken as it fills
    begun, before, said = time.time(), state['tokens'], time.time()

    def save(next_position):
        state['next'] = next_position
        state['pieces'].append(write_tokens(piece_path(folder, len(state['pieces'])), buffer[:used]))
        write_json(folder / 'pieces' / 'progress.json', state)  # a piece counts from here on

    first_file, first_document, start = state['next']
    bar = tqdm(unit='tok', unit_scale=True, initial=before, disable=None, smoothing=0.05, desc=str(folder))
    for file, document, text, share, tokens in tokenised(stream(first_file, first_document), enc, workers):
        state['empty_documents'] += not text
        while start < len(tokens):
            count = min(len(tokens) - start, len(buffer) - used)
            buffer[used:used + count] = tokens[start:start + count]
            used, start, state['tokens'] = used + count, start + count, state['tokens'] + count
            if start == len(tokens):
                state['documents'] += 1
                state['bytes'] += len(text.encode())
            if used == len(buffer):
                save([file, document, start])
                used = 0
        start = 0
        bar.total = max(state['tokens'], int(state['tokens'] / share)) if share else None  # an estimate, for the ETA
        bar.update(state['tokens'] - bar.n)
        if bar.disable and time.time() - said > 10 and state['tokens'] > before:  # no terminal: a line now and then
            said, rate = time.time(), (state['tokens'] - before) / (time.time() - begun)
            print0(f'{state["tokens"]:,} tokens | {share:.1%} of the input | {rate:,.0f} tokens/s | '
                   f'eta {state["tokens"] * (1 / share - 1) / rate:,.0f} s')
    bar.close()
    if used:
        save([len(settings['source']), 0, 0])
    seconds = max(time.time() - begun, 1e-6)
    print0(f'tokenised {state["tokens"] - before:,} tokens in {seconds:.1f} s ({(state["tokens"] - before) / seconds:,.0f} tokens/s)')


def cut(folder, settings, state):
    """The pieces become shards of min(shard_size, a tenth of all tokens), so that also a small set has a train shard."""
    total, pieces = state['tokens'], state['pieces']
    size = min(settings['shard_size'], -(-total // 10))  # rounded up: ten shards, not ten and a crumb
    shards = []
    if size == settings['shard_size']:
        for k, piece in enumerate(pieces):
            if piece_path(folder, k).exists():
                os.replace(piece_path(folder, k), folder / shard_name(settings, k))
            shards.append({'name': shard_name(settings, k), **piece})
        return shards
    arrays = [np.memmap(piece_path(folder, k), '<u2', 'r', HEADER) for k in range(len(pieces))]
    offsets = np.cumsum([0] + [len(array) for array in arrays])
    for k, start in enumerate(range(0, total, size)):
        tokens = np.concatenate([array[max(0, start - offset):max(0, start + size - offset)]
                                 for offset, array in zip(offsets[:-1], arrays, strict=True)])
        shards.append({'name': shard_name(settings, k), **write_tokens(folder / shard_name(settings, k), tokens)})
    return shards


if __name__ == '__main__':
    entries, sizes, path_of = sources()
    write_shards(output_dir, {'name': name, 'tokenizer': tokenizer, 'shard_size': shard_size, 'text_field': text_field, 'source': entries},
                 stream_of(sizes, path_of), num_workers)
