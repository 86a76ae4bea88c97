"""prepare/fineweb.py and prepare/pydocs.py: what they write and read, what survives a kill. No network.

A script runs in a fork of this process, where torch is imported already: a run takes milliseconds."""
import errno
import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / 'shared'
BPE = SHARED / 'data/tiktoken_cache'
sys.path.insert(0, str(ROOT))

from model import load_tokenizer  # noqa: E402
from prepare import fineweb  # noqa: E402
from prepare.fineweb import open_shards, read_rows  # noqa: E402

EOT = 256
BOM = b'\xef\xbb\xbf'
TEXTS = ['One.', 'Zwölf Boxkämpfer\r\n', '', 'a <|endoftext|> b', '多字节 🙂', 'long ' * 60, '', '\0',
         'x' * 37, 'End.\n']
real_bpe = pytest.mark.skipif(not BPE.exists(), reason='needs the two files of the GPT-2 tokenizer')

def run(tmp_path, script, *args, before=None):
    """Run prepare/<script>.py in a fork, after before(). -> (exit status, -9 if killed; stdout; stderr)"""
    out, err = tmp_path / 'stdout', tmp_path / 'stderr'
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
            sys.argv = [script, *map(str, args)]
            os.chdir(tmp_path)
            if before:
                before()
            runpy.run_path(str(ROOT / 'prepare' / f'{script}.py'), run_name='__main__')
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, out.read_text(), err.read_text()

def run_bytes(tmp_path, *args, before=None):
    return run(tmp_path, 'fineweb', '--output_dir=out', '--tokenizer=bytes', *args, before=before)

def ok(result):
    assert result[0] == 0 and result[2] == '', result
    return result[1]

def one_line(result, *words, code=2):
    status, _, err = result
    assert status == code and len(err.splitlines()) == 1, result
    for word in words:
        assert word in err, (word, err)

def jsonl(path, texts, key='text'):
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts), encoding='utf-8')
    return path

def parquet(path, texts, **options):
    pyarrow = pytest.importorskip('pyarrow')
    table = pyarrow.table(texts if isinstance(texts, dict) else {'text': texts})
    pytest.importorskip('pyarrow.parquet').write_table(table, path, **options)

def tokens_of(texts):
    return [token for text in texts if text for token in (EOT, *text.encode())]

def read_shard(path):
    """By the format's description, not by the code under test."""
    content = path.read_bytes()
    header = np.frombuffer(content[:1024], '<i4')
    tokens = np.frombuffer(content[1024:], '<u2')
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    return tokens.tolist()

def read_folder(folder, name='tokens'):
    """(manifest, all tokens) of a finished folder, with everything checked that must hold for any of them."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    names = [f'{name}_{"val" if k == 0 else "train"}_{k:06d}.bin' for k in range(len(manifest['shards']))]
    assert [shard['name'] for shard in manifest['shards']] == names and len(names) >= 2
    assert sorted(path.name for path in folder.iterdir()) == sorted(['manifest.json', *names])
    tokens = []
    for shard in manifest['shards']:
        tokens += read_shard(folder / shard['name'])
        assert hashlib.sha256((folder / shard['name']).read_bytes()).hexdigest() == shard['sha256']
    assert len(tokens) == manifest['tokens'] == sum(shard['tokens'] for shard in manifest['shards'])
    assert tokens.count(manifest['eot']) == manifest['documents']
    return manifest, tokens

def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}

def test_all_kinds_of_input_give_the_same_tokens(tmp_path):
    parquet(tmp_path / 'a.parquet', TEXTS, row_group_size=3)
    jsonl(tmp_path / 'b.jsonl', TEXTS)
    with open(tmp_path / 'b.jsonl', 'a') as file:
        file.write('\n  \n')  # blank lines are no documents
    names = [f'c{k}' + ['.txt', '.md', '.py', ''][k % 4] for k in range(len(TEXTS))]  # any ending, or none
    for name, text in zip(names, TEXTS, strict=True):
        (tmp_path / name).write_bytes(text.encode())
    inputs = ['a.parquet', 'b.jsonl', *names]
    out = ok(run_bytes(tmp_path, '--num_workers=3', '--input', *inputs))
    manifest, tokens = read_folder(tmp_path / 'out')
    assert tokens == tokens_of(TEXTS) * 3  # a text that spells end-of-text stays text
    facts = dict(tokenizer='bytes', vocab_size=257, eot=256, documents=24, empty_documents=6,
                 bytes=3 * len(''.join(TEXTS).encode()))
    assert {key: manifest[key] for key in facts} == facts
    for entry, name in zip(manifest['source'], inputs, strict=True):
        content = (tmp_path / name).read_bytes()
        assert entry == dict(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert f'{len(tokens):,} tokens' in out and '6 empty documents skipped' in out

def test_a_folder_is_read_with_all_that_is_in_it(tmp_path):
    folder = tmp_path / 'notes'
    (folder / 'b/.git').mkdir(parents=True)
    contents = {'z.md': b'last', 'a.txt': BOM + b'first', 'b/two.jsonl': b'{"text": "second"}',
                'b/Makefile': b'make', '.hidden': b'no', 'b/.git/config': b'no', 'pic.png': b'\x89PNG\xff',
                'b/latin1.txt': b'caf\xe9'}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for _ in range(2):  # what was written into it the first time is not read the second time
        out = ok(run_bytes(tmp_path, '--input', 'notes', '--output_dir=notes/out'))
        assert 'notes: 2 files are not UTF-8 text and were skipped' in out
        manifest, tokens = read_folder(folder / 'out')
        assert tokens == tokens_of(['first', 'make', 'second', 'last'])
        names = [entry['name'] for entry in manifest['source']]
        assert names == ['a.txt', 'b/Makefile', 'b/two.jsonl', 'z.md']
    assert 'is done' in out
    (tmp_path / 'empty').mkdir()
    one_line(run_bytes(tmp_path, '--input=empty'), 'empty holds no text files')

def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes(BOM + b'abc')
    (tmp_path / 'b.jsonl').write_bytes(BOM + b'{"text": "def"}\n{"text": "g"}\n')
    ok(run_bytes(tmp_path, '--input', 'a.txt', 'b.jsonl'))
    assert read_folder(tmp_path / 'out')[1] == tokens_of(['abc', 'def', 'g'])

def test_a_null_is_skipped_and_counted_as_an_empty_text(tmp_path):
    for name, write in (('a.jsonl', jsonl), ('a.parquet', parquet)):
        write(tmp_path / name, ['a', None, '', 'b'])
        ok(run_bytes(tmp_path, f'--input={name}', f'--output_dir={name}.out'))
        manifest, tokens = read_folder(tmp_path / f'{name}.out')
        assert tokens == tokens_of(['a', 'b'])
        assert (manifest['documents'], manifest['empty_documents']) == (2, 2)

@pytest.mark.parametrize('content, words', [
    (b'{"text": ""}\n\n{"text": null}\n', ['no documents']),
    (b'{"text": "a"}\n[1]\n', ['bad.jsonl line 2', 'object']),
    (b'{"text": "a"}\nnonsense\n', ['bad.jsonl line 2', 'JSON']),
    (b'[' * 100_000, ['bad.jsonl line 1', 'JSON']),
    (b'{"text": "a"}\n\n{"body": "a"}\n', ['bad.jsonl line 3', "'text'", '--text_field']),
    (b'{"text": 0}\n', ['bad.jsonl line 1', 'int']),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ['bad.jsonl line 2', 'UTF-8', 'byte 10']),
    (b'{"text": "ab\\ud800"}\n', ['bad.jsonl line 1', 'surrogate', 'character 2']),
])
def test_a_bad_line_is_named(tmp_path, content, words):
    (tmp_path / 'bad.jsonl').write_bytes(content)
    one_line(run_bytes(tmp_path, '--input=bad.jsonl'), *words)
    assert not (tmp_path / 'out').exists()

def test_a_bad_parquet_file_is_named(tmp_path):
    path = tmp_path / 'bad.parquet'

    for table, words in (({'body': ['a']}, "no column 'text' but body"), ([1, 0], 'row 0: the text is int')):
        parquet(path, table)
        one_line(run_bytes(tmp_path, '--input=bad.parquet'), 'bad.parquet', words)
    parquet(path, [f'document {k} ' * 50 for k in range(2000)])
    whole = path.read_bytes()
    for content in (b'', b'PAR1', b'no parquet at all', whole[:-100], b'PAR1' + bytes(2000) + whole[2004:]):
        path.write_bytes(content)
        one_line(run_bytes(tmp_path, '--input=bad.parquet'), 'bad.parquet', 'cannot be read as parquet')

def test_mistakes_are_one_line(tmp_path):
    (tmp_path / 'a.txt').write_text('fine')
    (tmp_path / 'bad.md').write_bytes(b'abc\xff')
    one_line(run_bytes(tmp_path, '--input', 'a.txt', 'bad.md'), 'bad.md', 'not UTF-8', 'byte 3')
    one_line(run_bytes(tmp_path, '--input', 'a.txt', 'missing.txt'), 'missing.txt', 'does not exist')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--name=evaluation'), '"val"')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--name=../x'), '--name=../x')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--shard_size=3e9'), '--shard_size=3000000000')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--tokenizer=bpe'), 'gpt2, bytes')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--output_dir=a.txt/deeper'), 'a.txt')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/old.bin').write_bytes(b'')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--output_dir=other'), 'other', 'no manifest.json')

@pytest.mark.parametrize('package', ['huggingface_hub', 'pyarrow'])
def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, package):
    def hide():
        for module in [package, *(module for module in sys.modules if module.startswith(package + '.'))]:
            sys.modules[module] = None
    one_line(run_bytes(tmp_path, before=hide), package, 'pip install -e ".[data]"')

def test_without_a_network_it_says_what_is_missing(tmp_path):
    pytest.importorskip('pyarrow')
    pytest.importorskip('huggingface_hub')
    (tmp_path / 'a.txt').write_text('fine')

    def offline():
        import tiktoken.load
        import tiktoken.registry
        empty = str(tmp_path / 'empty')
        os.environ.update(HF_HUB_OFFLINE='1', HF_HOME=empty, TIKTOKEN_CACHE_DIR=empty)
        for module in [module for module in sys.modules if module.startswith('huggingface_hub')]:
            del sys.modules[module]  # it reads the environment when it is imported
        tiktoken.registry.ENCODINGS.clear()

        def unreachable(url):
            raise ConnectionError(f'{url} is out of reach')
        tiktoken.load.read_file = unreachable
    one_line(run_bytes(tmp_path, before=offline), '000_00000.parquet', '--input', code=1)
    one_line(run(tmp_path, 'fineweb', '--input=a.txt', before=offline), 'gpt2 tokenizer', code=1)

@real_bpe
def test_a_million_blanks_are_encoded_as_they_are(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(BPE))
    enc = load_tokenizer('gpt2')
    for text in ('report' + ' ' * 1_200_000 + 'page 2', '\n' * 1_500_000, 'x' + '\u3000\xa0' * 600_000):
        ids = fineweb.encode(enc, text)
        assert enc.decode(ids) == text and fineweb.tokenise(enc, text).tolist() == [50256, *ids]
    for text in ('plain', ' ' * 9_999, 'a' * 12_345 + ' \n' * 4_000 + ' b', 'a <|endoftext|> b'):  # not cut
        ids = enc.encode_ordinary(text)
        assert fineweb.encode(enc, text) == ids and fineweb.tokenise(enc, text).tolist() == [50256, *ids]

def test_uint16_never_wraps():
    vocabulary = SimpleNamespace(eot_token=0, encode_to_numpy=lambda text, **_: np.array([5, 70000]))
    with pytest.raises(AssertionError, match='70000'):
        fineweb.tokenise(vocabulary, 'text')

@pytest.mark.parametrize('length, shard_size, expected', [
    (1, 10 ** 8, [1, 1]),            # two tokens: one to validate, one to train
    (99, 10 ** 8, [10, 90]),         # a tenth to validate, the rest in one shard
    (100, 10 ** 8, [11, 90]),
    (99, 40, [10, 40, 40, 10]),      # in as few as shard_size allows
    (99, 10, [10] * 10),             # 10 x shard_size is still little
    (100, 10, [10] * 10 + [1]),      # above, all shards have shard_size
    (99, 7, [7] * 14 + [2]),
])
def test_shard_sizes(tmp_path, length, shard_size, expected):
    (tmp_path / 'a.txt').write_text('y' * length)
    ok(run_bytes(tmp_path, '--input=a.txt', f'--shard_size={shard_size}'))
    manifest, tokens = read_folder(tmp_path / 'out')
    assert [shard['tokens'] for shard in manifest['shards']] == expected
    assert tokens == tokens_of(['y' * length])

@pytest.mark.parametrize('length, T', [(20_478, 1024), (20_478, 128), (2_000, 128)])
def test_a_small_text_loses_less_than_a_row_a_split(tmp_path, length, T):
    (tmp_path / 'a.txt').write_text('z' * length)
    ok(run_bytes(tmp_path, '--input=a.txt'))
    train, val, _ = open_shards(tmp_path / 'out', T)
    for split, share in ((train, 0.9), (val, 0.1)):
        held = sum(map(len, split.values()))
        assert held - sum((len(tokens) - 1) // T * T for tokens in split.values()) <= T
        assert abs(held - share * (length + 1)) <= 1

def shard(path, tokens):
    tokens = np.asarray(tokens, np.uint16)
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())

def test_rows_of_all_shards_are_one_list(tmp_path):
    a, b, c = np.arange(10), np.arange(100, 103), np.arange(200, 209)
    shard(tmp_path / 'x_train_1.bin', a)
    shard(tmp_path / 'x_train_2.bin', b)  # shorter than a row of 5
    np.save(tmp_path / 'x_train_3.npy', c.astype(np.uint16))
    shard(tmp_path / 'x_val_0.bin', a)
    train, val, tokenizer = open_shards(tmp_path, 4)
    assert list(train) == ['x_train_1.bin', 'x_train_2.bin', 'x_train_3.npy'] and list(val) == ['x_val_0.bin']
    assert tokenizer == dict(tokenizer='gpt2', vocab_size=50257, eot=50256)  # without a manifest
    (tmp_path / 'manifest.json').write_text('{"tokenizer": "bytes"}')
    assert open_shards(str(tmp_path), 4)[2] == dict(tokenizer='bytes', vocab_size=257, eot=256)
    (tmp_path / 'x_val_0.bin').unlink()
    assert list(open_shards(tmp_path, 4)[1]) == ['x_train_1.bin']  # none is called val: the first
    rows = read_rows(train, 4, np.array([3, 0, 2, 1, 0]))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [c[4:9].tolist(), a[:5].tolist(), c[:5].tolist(), a[4:9].tolist(), a[:5].tolist()]

def test_the_reader_says_what_is_wrong(tmp_path):
    def refused(*words, T=4):
        with pytest.raises(ValueError) as error:
            open_shards(tmp_path / 'data', T)
        for word in words:
            assert word in str(error.value), error.value
        assert '\n' not in str(error.value)

    refused('data is no folder')
    (tmp_path / 'data/pieces').mkdir(parents=True)
    refused('half made', 'run the prepare script again')
    (tmp_path / 'data/pieces').rmdir()
    refused('holds 0 .bin')
    val, train, manifest = (tmp_path / 'data' / name for name in ('a_val.bin', 'b.bin', 'manifest.json'))
    shard(val, range(10))
    refused('a training and a validation shard')
    shard(train, range(900))
    refused('10 validation tokens', 'block_size + 1 = 11', 'more text', '--block_size', T=10)
    shard(val, range(2000))
    refused('900 training tokens', 'block_size + 1 = 1,025', T=1024)
    train.write_bytes(train.read_bytes()[:-2])
    refused('b.bin', '2822 bytes', '900 tokens')
    train.write_bytes(b'text')
    refused('b.bin', 'header 20240520')
    train.unlink()
    for array in (np.zeros(9, np.int64), np.zeros((3, 3), np.uint16), np.zeros(0, np.uint16)):
        np.save(tmp_path / 'data/b.npy', array)
        refused('b.npy', 'expected one row of uint16')
    (tmp_path / 'data/b.npy').write_bytes(b'\x93NUMPY\x01\0\x10\0{')
    refused('b.npy')
    for content in ('{', '[]', '{}', '{"tokenizer": "qwen"}', '{"tokenizer": []}'):
        manifest.write_text(content)
        refused('manifest.json')

def killer(n):
    """This process dies when about to rename or unlink for the n-th time; of a file.tmp half is there."""
    calls = []
    os.fsync = lambda target: None  # the machine stays up: waiting for its disk tests nothing

    def patch(name, original):
        def function(target, *args, **kwargs):
            calls.append(target)
            if len(calls) == n:
                if str(target).endswith('.tmp'):
                    os.truncate(target, os.stat(target).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(target, *args, **kwargs)
        setattr(os, name, function)
    patch('replace', os.replace)
    patch('unlink', os.unlink)

@pytest.mark.parametrize('shard_size', [40, 200])  # pieces that become shards; pieces that are cut anew
def test_killed_at_any_moment_the_same_command_makes_the_same_files(tmp_path, shard_size):
    parquet(tmp_path / 'a.parquet', TEXTS, row_group_size=3)
    (tmp_path / 'b.txt').write_text('b' * 30)
    jsonl(tmp_path / 'c.jsonl', ['', 'third file', ''])
    args = ['--input', 'a.parquet', 'b.txt', 'c.jsonl', f'--shard_size={shard_size}', '--num_workers=1']
    ok(run_bytes(tmp_path, *args))
    manifest, tokens = read_folder(tmp_path / 'out')
    assert tokens == tokens_of([*TEXTS, 'b' * 30, 'third file']) and manifest['empty_documents'] == 4
    expected = files(tmp_path / 'out')
    for n in range(1, 1000):
        shutil.rmtree(tmp_path / 'out')
        status, _, err = run_bytes(tmp_path, *args, before=lambda n=n: killer(n))
        progress = tmp_path / 'out/pieces/progress.json'
        said = f'{json.loads(progress.read_text())["tokens"]:,} tokens are done' if progress.exists() else ''
        said = 'is done' if (tmp_path / 'out/manifest.json').exists() else said
        assert status == (-signal.SIGKILL if files(tmp_path / 'out') != expected else 0), err
        out = ok(run_bytes(tmp_path, *args, before=lambda: killer(0)))
        assert files(tmp_path / 'out') == expected, f'killed at event {n}'
        assert said in out
        if status == 0:
            break
    assert n > 15

@pytest.mark.parametrize('finished', [False, True])
def test_other_settings_or_an_edited_input_are_refused(tmp_path, finished):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    args = ['--input=a.jsonl', '--shard_size=40']
    run_bytes(tmp_path, *args, before=None if finished else lambda: killer(6))
    assert (tmp_path / 'out/manifest.json').exists() == finished
    before = files(tmp_path / 'out')
    where = 'out/manifest.json' if finished else 'out/pieces/progress.json'
    one_line(run_bytes(tmp_path, *args, '--shard_size=48'), where, 'shard_size 40, now 48', '--output_dir')
    one_line(run_bytes(tmp_path, *args, '--tokenizer=gpt2'), where, "tokenizer 'bytes', now 'gpt2'")
    content = (tmp_path / 'a.jsonl').read_bytes()
    (tmp_path / 'a.jsonl').write_bytes(content.replace(b'One', b'Two'))  # as long as it was
    one_line(run_bytes(tmp_path, *args), where, 'other input')
    (tmp_path / 'a.jsonl').write_bytes(content)
    assert files(tmp_path / 'out') == before
    (tmp_path / where).write_text('{"name": ')
    one_line(run_bytes(tmp_path, *args), where, 'damaged')
    (tmp_path / where).write_bytes(before[Path(where).relative_to('out')])
    ok(run_bytes(tmp_path, *args, '--num_workers=3'))  # does not change the tokens
    assert read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS)
    shard = tmp_path / 'out/tokens_train_000003.bin'
    shard.write_bytes(shard.read_bytes()[:-2])
    one_line(run_bytes(tmp_path, *args), shard.name, 'cut short')

@pytest.mark.parametrize('n', [1, 4, 8])  # a piece, progress.json, a shard
@pytest.mark.parametrize('stop, words, code', [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 'out: No space left on device', 1),
    (KeyboardInterrupt(), 'the same command continues', 130)])
def test_a_full_disk_or_ctrl_c_is_one_line_and_the_same_command_continues(tmp_path, n, stop, words, code):
    jsonl(tmp_path / 'a.jsonl', TEXTS)

    def before():
        def fsync(number):
            calls.append(number)
            if len(calls) == n:
                raise stop
        calls, os.fsync = [], fsync
    one_line(run_bytes(tmp_path, '--input=a.jsonl', '--shard_size=150', before=before), words, code=code)
    ok(run_bytes(tmp_path, '--input=a.jsonl', '--shard_size=150'))
    assert read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS)

@pytest.mark.parametrize('script', ['fineweb', 'pydocs'])
def test_help_and_both_ways_of_launching(tmp_path, script):
    out = ok(run(tmp_path, script, '--help'))
    assert f'python prepare/{script}.py' in out
    assert len(re.findall('^  --', out, re.MULTILINE)) == dict(fineweb=7, pydocs=6)[script]  # no constants
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    args = ['--tokenizer=bytes', *(['--input=a.jsonl'] if script == 'fineweb' else [])]
    for output, launch in (('a', [str(ROOT / f'prepare/{script}.py')]), ('b', ['-m', f'prepare.{script}'])):
        command = [sys.executable, *launch, f'--output_dir={output}', *args]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, '')
    assert files(tmp_path / 'a') == files(tmp_path / 'b')

def test_pydocs_is_the_text_of_this_python(tmp_path):
    assert run(tmp_path, 'pydocs', '--output_dir=out', before=lambda: killer(8))[0] == -signal.SIGKILL
    assert not (tmp_path / 'out/manifest.json').exists()
    ok(run(tmp_path, 'pydocs', '--output_dir=out'))
    manifest, tokens = read_folder(tmp_path / 'out', 'pydocs')
    assert manifest['tokens'] > 10_000_000 and manifest['shards'][0]['tokens'] == 1_000_000
    text = bytes(token for token in tokens if token != EOT)
    for sample in (b'The "if" statement', b'class OrderedDict(dict)', b'math.acos', b'Return the arc cosine'):
        assert sample in text
    assert text.count(Path(json.__file__).read_bytes()) == 1
    val = read_shard(tmp_path / 'out/pydocs_val_000000.bin')
    val_text = bytes(token for token in val if token != EOT)
    topics = importlib.import_module('pydoc_data.topics').topics.values()
    assert val.count(EOT) > 20 and 0 < sum(topic.encode() in val_text for topic in topics) < len(topics) / 2
    assert 'is done' in ok(run(tmp_path, 'pydocs', '--output_dir=out'))
    one_line(run(tmp_path, 'pydocs', '--output_dir=out', '--seed=1'), 'seed 1337, now 1')
