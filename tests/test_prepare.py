"""prepare/fineweb.py and prepare/pydocs.py: what they write, what survives a kill, what they refuse. No network.

A script runs in a fork of this process, where torch is imported already: a run takes milliseconds, and can be killed."""
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

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / 'shared'
PARQUET = SHARED / 'data/text/fineweb_sample10BT_2800docs.parquet'
BPE = SHARED / 'data/tiktoken_cache'
sys.path.insert(0, str(ROOT))

from prepare import fineweb  # noqa: E402

EOT = 256
TEXTS = ['One.', 'Zwölf Boxkämpfer\r\n', '', 'a <|endoftext|> b', '多字节 🙂', 'long ' * 60, '', '\0', 'x' * 37, 'End.\n', 'last']
real_bpe = pytest.mark.skipif(not BPE.exists(), reason='needs the two files of the GPT-2 tokenizer')


def run(tmp_path, script, *args, before=None):
    """Run prepare/<script>.py in a fork, after before(). -> (exit status, negative for a signal; stdout; stderr)"""
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


def one_line(result, *words, code=2):
    status, _, err = result
    assert status == code and len(err.splitlines()) == 1, result
    for word in words:
        assert word in err, (word, err)


def jsonl(path, texts, key='text'):
    path.write_text(''.join(json.dumps({key: text}) + '\n' for text in texts), encoding='utf-8')
    return path


def tokens_of(texts):
    return [token for text in texts if text for token in (EOT, *text.encode())]


def read_shard(path):
    """By the format's description, not by the code under test."""
    content = path.read_bytes()
    header = np.frombuffer(content[:1024], '<i4')
    tokens = np.frombuffer(content[1024:], '<u2')
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    return tokens.tolist()


def read_folder(folder, name='edufineweb'):
    """(manifest, all tokens) of a finished folder, with everything checked that must hold for any of them."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    names = [f'{name}_{"val" if k == 0 else "train"}_{k:06d}.bin' for k in range(len(manifest['shards']))]
    assert [shard['name'] for shard in manifest['shards']] == names and len(names) >= 2
    assert sorted(path.name for path in folder.iterdir()) == sorted(['manifest.json', *names])
    tokens = []
    for shard in manifest['shards']:
        part = read_shard(folder / shard['name'])
        assert len(part) == shard['tokens'] > 0
        assert hashlib.sha256((folder / shard['name']).read_bytes()).hexdigest() == shard['sha256']
        tokens += part
    assert len(tokens) == manifest['tokens'] and tokens.count(manifest['eot']) == manifest['documents'] and tokens[0] == manifest['eot']
    return manifest, tokens


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_all_kinds_of_input_give_the_same_tokens(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet as parquet
    parquet.write_table(pyarrow.table({'id': list(range(len(TEXTS))), 'text': TEXTS}), tmp_path / 'a.parquet', row_group_size=3)
    jsonl(tmp_path / 'b.jsonl', TEXTS)
    with open(tmp_path / 'b.jsonl', 'a') as file:
        file.write('\n  \n')  # blank lines are no documents
    for k, text in enumerate(TEXTS):
        (tmp_path / f'c{k:02d}.txt').write_bytes(text.encode())
    inputs = ['a.parquet', 'b.jsonl', *(f'c{k:02d}.txt' for k in range(len(TEXTS)))]
    status, out, err = run_bytes(tmp_path, '--input', *inputs)
    assert (status, err) == (0, '')
    manifest, tokens = read_folder(tmp_path / 'out')
    assert tokens == tokens_of(TEXTS) * 3  # end-of-text before each document; a text that spells it stays text
    facts = {key: manifest[key] for key in ('tokenizer', 'vocab_size', 'eot', 'documents', 'empty_documents', 'bytes')}
    size = len(''.join(TEXTS).encode())
    assert facts == dict(tokenizer='bytes', vocab_size=257, eot=256, documents=27, empty_documents=6, bytes=3 * size)
    assert manifest['source'] == [{'name': name, 'bytes': (tmp_path / name).stat().st_size} for name in inputs]
    assert f'{len(tokens):,} tokens' in out and 'out/edufineweb_val_000000.bin' in out


@pytest.mark.parametrize('length, shard_size, expected', [
    (1, 10 ** 8, [1, 1]),                    # two tokens: one to validate, one to train
    (99, 10 ** 8, [10] * 10),
    (100, 10 ** 8, [11] * 9 + [2]),          # never more than ten shards because of the tenth
    (99, 10, [10] * 10),
    (99, 7, [7] * 14 + [2]),
    (9, 1, [1] * 10),
    (10, 2, [2] * 5 + [1]),
])
def test_shard_sizes(tmp_path, length, shard_size, expected):
    (tmp_path / 'a.txt').write_text('y' * length)
    assert run_bytes(tmp_path, '--input=a.txt', f'--shard_size={shard_size}')[0] == 0
    manifest, tokens = read_folder(tmp_path / 'out')
    assert [shard['tokens'] for shard in manifest['shards']] == expected and tokens == tokens_of(['y' * length])


@real_bpe
def test_gpt2_reads_end_of_text_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(BPE))
    jsonl(tmp_path / 'a.jsonl', ['a <|endoftext|> b', '<|endoftext|>'])
    assert run(tmp_path, 'fineweb', '--input=a.jsonl', '--output_dir=out')[0] == 0
    manifest, tokens = read_folder(tmp_path / 'out')
    spelled = [27, 91, 437, 1659, 5239, 91, 29]
    assert tokens == [50256, 64, 1279, *spelled[1:], 275, 50256, *spelled] and (manifest['vocab_size'], manifest['eot']) == (50257, 50256)


@real_bpe
@pytest.mark.skipif(not PARQUET.exists(), reason='needs the real parquet file')
def test_real_fineweb(tmp_path, monkeypatch):
    pytest.importorskip('pyarrow')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(BPE))
    assert run(tmp_path, 'fineweb', f'--input={PARQUET}', '--output_dir=out', '--shard_size=1e6')[0] == 0
    manifest, tokens = read_folder(tmp_path / 'out')
    assert manifest['tokens'] == 4_361_980 + 2_800 and manifest['documents'] == 2_800 and tokens.count(50256) == 2_800
    assert [shard['tokens'] for shard in manifest['shards']] == [436_478] * 10


def test_number_of_workers_changes_nothing(tmp_path):
    jsonl(tmp_path / 'a.jsonl', [f'{k} ' * (k * k % 900) for k in range(1000)])  # several batches per thread
    contents = []
    for workers in (1, 2, 5):
        assert run_bytes(tmp_path, '--input=a.jsonl', '--shard_size=100000', f'--num_workers={workers}')[0] == 0
        read_folder(tmp_path / 'out')
        contents.append(files(tmp_path / 'out'))
        shutil.rmtree(tmp_path / 'out')
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) > 10


def killer(n):
    """Arrange that this process dies when it is about to rename or unlink for the n-th time; of a file.tmp only half is there."""
    count, os.fsync = 0, lambda target: None  # the machine stays up, so that waiting for its disk tests nothing

    def patch(name):
        original = getattr(os, name)

        def function(target, *args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                if str(target).endswith('.tmp'):
                    os.truncate(target, os.stat(target).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(target, *args, **kwargs)
        setattr(os, name, function)

    patch('replace')
    patch('unlink')


@pytest.mark.parametrize('shard_size', [40, 200])  # pieces that become shards as they are; pieces that are cut anew
def test_killed_at_any_moment(tmp_path, shard_size):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    jsonl(tmp_path / 'b.jsonl', ['', 'second file', ''])
    args = ['--input', 'a.jsonl', 'b.jsonl', f'--shard_size={shard_size}', '--num_workers=1']
    assert run_bytes(tmp_path, *args)[0] == 0
    assert read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS + ['second file'])
    expected = files(tmp_path / 'out')
    assert len(read_shard(tmp_path / 'out/edufineweb_val_000000.bin')) == min(shard_size, 43)
    for n in range(1, 1000):
        shutil.rmtree(tmp_path / 'out')
        status, _, err = run_bytes(tmp_path, *args, before=lambda n=n: killer(n))
        finished = (tmp_path / 'out/manifest.json').exists()
        progress = tmp_path / 'out/pieces/progress.json'
        done = json.loads(progress.read_text())['tokens'] if progress.exists() else 0
        assert status == (-signal.SIGKILL if files(tmp_path / 'out') != expected else 0), err
        again, out, err = run_bytes(tmp_path, *args, before=lambda: killer(0))
        assert (again, err) == (0, '') and files(tmp_path / 'out') == expected, f'killed at event {n}'
        if finished:
            assert 'is done' in out and 'tokenised' not in out
        else:  # what was finished is not done twice
            assert f'tokenised {len(tokens_of(TEXTS + ["second file"])) - done:,} tokens' in out
        if status == 0:
            break
    assert n > 20


def test_continues_inside_of_any_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet as parquet
    parquet.write_table(pyarrow.table({'text': TEXTS}), tmp_path / 'a.parquet', row_group_size=3)
    (tmp_path / 'b.txt').write_text('b' * 300)
    jsonl(tmp_path / 'c.jsonl', ['', *TEXTS])
    args = ['--input', 'a.parquet', 'b.txt', 'c.jsonl', '--shard_size=23']
    for n in range(3, 2 * 23, 4):  # behind every second piece: two renames make one
        assert run_bytes(tmp_path, *args, before=lambda n=n: killer(n))[0] == -signal.SIGKILL
        progress = json.loads((tmp_path / 'out/pieces/progress.json').read_text())
        assert progress['tokens'] == 23 * len(progress['pieces']) == 23 * (n // 2)
        assert run_bytes(tmp_path, *args, before=lambda: killer(0))[0] == 0
        assert read_folder(tmp_path / 'out')[1] == tokens_of([*TEXTS, 'b' * 300, *TEXTS])
        shutil.rmtree(tmp_path / 'out')


def test_killed_twice_and_then_a_piece_is_lost(tmp_path):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    args = ['--input=a.jsonl', '--shard_size=40']
    for _ in range(2):
        assert run_bytes(tmp_path, *args, before=lambda: killer(5))[0] == -signal.SIGKILL
    piece = tmp_path / 'out/pieces/piece_000001.bin'
    piece.write_bytes(piece.read_bytes()[:-2])
    one_line(run_bytes(tmp_path, *args), 'piece_000001.bin', 'cut short')


@pytest.mark.parametrize('finished', [False, True])
def test_other_settings_are_refused(tmp_path, finished, monkeypatch):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    jsonl(tmp_path / 'b.jsonl', TEXTS)
    args = ['--input=a.jsonl', '--shard_size=40']
    assert run_bytes(tmp_path, *args, before=None if finished else lambda: killer(6))[0] == (0 if finished else -signal.SIGKILL)
    before = files(tmp_path / 'out')
    where = 'out/manifest.json' if finished else 'out/pieces/progress.json'
    one_line(run_bytes(tmp_path, *args, '--shard_size=48'), where, 'shard_size 40, now 48', '--output_dir')
    one_line(run_bytes(tmp_path, *args, '--tokenizer=gpt2'), where, "tokenizer 'bytes', now 'gpt2'")
    one_line(run_bytes(tmp_path, *args, '--text_field=body'), where, 'text_field')
    one_line(run_bytes(tmp_path, *args, '--name=other'), where, 'name')
    one_line(run_bytes(tmp_path, *args, '--input', 'a.jsonl', 'b.jsonl'), where, 'other input')
    one_line(run_bytes(tmp_path, *args, '--input=b.jsonl'), where, 'other input')
    assert files(tmp_path / 'out') == before
    (tmp_path / where).write_text('{"name": ')
    one_line(run_bytes(tmp_path, *args), where, 'damaged')
    (tmp_path / where).write_text('[]')
    one_line(run_bytes(tmp_path, *args), where, 'damaged')
    (tmp_path / where).write_bytes(before[Path(where).relative_to('out')])
    assert run_bytes(tmp_path, *args, '--num_workers=3')[0] == 0  # does not change the tokens
    assert read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS)


def test_a_folder_that_is_not_ours(tmp_path):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    assert run_bytes(tmp_path, '--input=a.jsonl')[0] == 0
    shard = tmp_path / 'out/edufineweb_train_000003.bin'
    shard.write_bytes(shard.read_bytes()[:-2])
    one_line(run_bytes(tmp_path, '--input=a.jsonl'), shard.name, 'cut short')
    (tmp_path / 'out/manifest.json').unlink()
    one_line(run_bytes(tmp_path, '--input=a.jsonl'), 'edufineweb_train_000001.bin', 'no manifest.json')
    one_line(run_bytes(tmp_path, '--input=a.jsonl', '--output_dir=a.jsonl'), 'a.jsonl')
    one_line(run_bytes(tmp_path, '--input=a.jsonl', '--output_dir=a.jsonl/deeper'), 'a.jsonl')


@pytest.mark.parametrize('content, words', [
    (b'', ['no documents', 'bad.jsonl']),
    (b'{"text": ""}\n\n', ['no documents']),
    (b'{"text": "a"}\n[1]\n', ['bad.jsonl line 2', 'object']),
    (b'["text"]\n', ['bad.jsonl line 1', 'object']),
    (b'"a text"\n', ['bad.jsonl line 1', 'object']),
    (b'{"text": "a"}\nnonsense\n', ['bad.jsonl line 2', 'JSON']),
    (b'[' * 100_000, ['bad.jsonl line 1', 'JSON']),
    (b'{"text": "a"}\n\n{"body": "a"}\n', ['bad.jsonl line 3', "'text'", '--text_field']),
    (b'{"text": "a"}\n{"text": null}\n', ['bad.jsonl line 2', 'NoneType']),
    (b'{"text": 7}\n', ['bad.jsonl line 1', 'int']),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ['bad.jsonl line 2', 'UTF-8', 'byte 10']),
    (b'{"text": "ab\\ud800"}\n', ['bad.jsonl line 1', 'surrogate', 'character 2']),
])
def test_bad_jsonl(tmp_path, content, words):
    (tmp_path / 'bad.jsonl').write_bytes(content)
    one_line(run_bytes(tmp_path, '--input=bad.jsonl'), *words)
    assert not (tmp_path / 'out').exists()


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet as parquet
    path = tmp_path / 'bad.parquet'

    def refused(table, *words, text_field='text'):
        parquet.write_table(pyarrow.table(table), path)
        one_line(run_bytes(tmp_path, '--input=bad.parquet', f'--text_field={text_field}'), 'bad.parquet', *words)

    refused({'body': ['a'], 'id': ['b']}, "no column 'text'", 'body, id', '--text_field')
    refused({'text': ['a', None]}, 'row 1', 'NoneType')
    refused({'text': [1, 2]}, 'row 0', 'int')
    refused({'text': [b'a']}, 'row 0', 'bytes')
    refused({'text': [['a']]}, 'row 0', 'list')
    refused({'text': pyarrow.array([], pyarrow.string())}, 'no documents')
    refused({'text': pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b'ok', b'\xff']).buffers())}, 'row 1', 'UTF-8')

    parquet.write_table(pyarrow.table({'text': [f'document {k} ' * 50 for k in range(2000)]}), path)
    whole = path.read_bytes()
    for content in (b'', b'PAR1', b'no parquet at all', whole[:-100], whole[:100] + whole[200:], b'PAR1' + bytes(2000) + whole[2004:]):
        path.write_bytes(content)
        one_line(run_bytes(tmp_path, '--input=bad.parquet'), 'bad.parquet', 'cannot be read as parquet')


def test_other_mistakes(tmp_path):
    (tmp_path / 'a.txt').write_text('fine')
    (tmp_path / 'bad.txt').write_bytes(b'abc\xff')
    (tmp_path / 'a.csv').write_text('a,b')
    (tmp_path / 'folder').mkdir()
    one_line(run_bytes(tmp_path, '--input', 'a.txt', 'bad.txt'), 'bad.txt', 'UTF-8', 'byte 3')
    one_line(run_bytes(tmp_path, '--input', 'a.txt', 'missing.txt'), 'missing.txt', 'does not exist')
    one_line(run_bytes(tmp_path, '--input=7'), '7 does not exist')
    one_line(run_bytes(tmp_path, '--input=a.csv'), 'a.csv', '.parquet, .jsonl, .txt')
    one_line(run_bytes(tmp_path, '--input=folder'), 'folder', 'name the files')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--name=evaluation'), '"val"')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--name=../x'), '--name=../x')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--shard_size=0'), '--shard_size=0')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--shard_size=3e9'), '--shard_size=3000000000')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--num_workers=-1'), '--num_workers=-1')
    one_line(run_bytes(tmp_path, '--input=a.txt', '--tokenizer=bpe'), 'gpt2, bytes')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('package', ['huggingface_hub', 'pyarrow'])
def test_missing_packages(tmp_path, package):
    def hide():
        for module in [package, *(module for module in sys.modules if module.startswith(package + '.'))]:
            sys.modules[module] = None
    one_line(run_bytes(tmp_path, before=hide), package, 'pip install -e ".[data]"')


def test_without_a_network(tmp_path):
    pytest.importorskip('pyarrow')
    pytest.importorskip('huggingface_hub')

    def offline():
        os.environ.update(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'empty'))
        for module in [module for module in sys.modules if module.startswith('huggingface_hub')]:
            del sys.modules[module]  # it reads the environment when it is imported
    one_line(run_bytes(tmp_path, before=offline), '000_00000.parquet', '--input', code=1)


def test_gpt2_tokenizer_without_a_network(tmp_path):
    (tmp_path / 'a.txt').write_text('fine')

    def offline():
        import tiktoken.load
        import tiktoken.registry
        tiktoken.registry.ENCODINGS.clear()
        os.environ['TIKTOKEN_CACHE_DIR'] = str(tmp_path / 'empty')

        def unreachable(url):
            raise ConnectionError(f'{url} is out of reach')
        tiktoken.load.read_file = unreachable
    one_line(run(tmp_path, 'fineweb', '--input=a.txt', '--output_dir=out', before=offline), 'gpt2 tokenizer', code=1)


@pytest.mark.parametrize('n', [1, 4, 12, 17])  # a piece, its progress.json, a shard, manifest.json
def test_full_disk(tmp_path, n):
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    args = ['--input=a.jsonl', '--shard_size=200']

    def full():
        count = 0

        def fsync(number):
            nonlocal count
            count += 1
            if count == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync = fsync
    result = run_bytes(tmp_path, *args, before=full)
    one_line(result, 'out: No space left on device', code=1)
    assert re.search(r'\([\d,]+ bytes free\)', result[2]) and not (tmp_path / 'out/manifest.json').exists()
    assert run_bytes(tmp_path, *args)[0] == 0 and read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS)


def test_ctrl_c(tmp_path):
    jsonl(tmp_path / 'a.jsonl', TEXTS)

    def interrupt():
        original = os.replace

        def replace(*paths):
            original(*paths)
            signal.raise_signal(signal.SIGINT)
        os.replace = replace
        signal.signal(signal.SIGINT, signal.default_int_handler)
    one_line(run_bytes(tmp_path, '--input=a.jsonl', '--shard_size=40', before=interrupt), 'continues', code=130)
    assert run_bytes(tmp_path, '--input=a.jsonl', '--shard_size=40')[0] == 0 and read_folder(tmp_path / 'out')[1] == tokens_of(TEXTS)


class Vocabulary:
    """A tokenizer that gives the same ids to everything."""
    def __init__(self, ids, n_vocab):
        self.ids, self.n_vocab, self.eot_token = np.array(ids, np.uint32), n_vocab, 0

    def encode_to_numpy(self, text, disallowed_special):
        return self.ids


def test_uint16_never_wraps(tmp_path, monkeypatch, capsys):
    with pytest.raises(AssertionError, match='70000'):
        fineweb.tokenise(Vocabulary([5, 70000], 65536), ['text'])
    with pytest.raises(AssertionError, match='token 300'):
        fineweb.tokenise(Vocabulary([300], 257), ['text'])
    assert fineweb.tokenise(Vocabulary([65535], 65536), ['text', ''])[0].tolist() == [0, 65535]
    monkeypatch.setattr(fineweb, 'load_tokenizer', lambda name, download: Vocabulary([1], 65537))
    with pytest.raises(SystemExit) as stop:
        fineweb.write_shards(tmp_path / 'out', dict(name='a', tokenizer='huge', shard_size=10, source=[]), lambda *_: iter(()))
    assert stop.value.code == 2 and '65,537 ids' in capsys.readouterr().err


@pytest.mark.parametrize('script', ['fineweb', 'pydocs'])
def test_both_ways_of_launching(tmp_path, script):
    """As a user does, in fresh interpreters, from a folder elsewhere; the two give the same bytes."""
    jsonl(tmp_path / 'a.jsonl', TEXTS)
    args = ['--tokenizer=bytes', *(['--input=a.jsonl'] if script == 'fineweb' else [])]
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    as_file, as_module = ([str(ROOT / f'prepare/{script}.py')], {}), (['-m', f'prepare.{script}'], {'PYTHONPATH': str(ROOT)})
    for output, (launch, path) in (('a', as_file), ('b', as_module)):
        result = subprocess.run([sys.executable, *launch, f'--output_dir={output}', *args], cwd=tmp_path, env={**environment, **path},
                                capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, '')
    assert files(tmp_path / 'a') == files(tmp_path / 'b')
    if script == 'fineweb':
        assert read_folder(tmp_path / 'a')[1] == tokens_of(TEXTS)
    else:  # and where other modules are imported and pytest has put its hooks into sys
        assert run(tmp_path, 'pydocs', '--output_dir=c')[0] == 0 and files(tmp_path / 'a') == files(tmp_path / 'c')


@pytest.mark.parametrize('script', ['fineweb', 'pydocs'])
def test_help(tmp_path, script):
    status, out, err = run(tmp_path, script, '--help')
    assert (status, err) == (0, '') and f'python prepare/{script}.py' in out and '--shard_size=' in out and '--output_dir=' in out
    assert len(re.findall('^  --', out, re.MULTILINE)) == dict(fineweb=7, pydocs=6)[script]  # constants below are no settings


def test_pydocs(tmp_path):
    assert run(tmp_path, 'pydocs', '--output_dir=out', before=lambda: killer(8))[0] == -signal.SIGKILL
    assert not (tmp_path / 'out/manifest.json').exists()
    assert run(tmp_path, 'pydocs', '--output_dir=out')[0] == 0
    manifest, tokens = read_folder(tmp_path / 'out', 'pydocs')
    facts = {key: manifest[key] for key in ('tokenizer', 'vocab_size', 'eot', 'tokens')}
    assert facts == dict(tokenizer='bytes', vocab_size=257, eot=256, tokens=manifest['bytes'] + manifest['documents'])
    assert manifest['tokens'] > 10_000_000 and manifest['shards'][0]['tokens'] == 1_000_000 and manifest['documents'] > 500
    text = bytes(token for token in tokens if token != EOT)
    for sample in (b'The "if" statement', b'class OrderedDict(dict)', b'math.acos', b'Return the arc cosine'):
        assert sample in text
    assert text.count(Path(json.__file__).read_bytes()) == 1
    val = read_shard(tmp_path / 'out/pydocs_val_000000.bin')
    assert val.count(EOT) > 20  # many documents, not a few, and of each kind some: it stands for the rest
    val_text, topics = bytes(token for token in val if token != EOT), importlib.import_module('pydoc_data.topics').topics.values()
    assert 0 < sum(topic.encode() in val_text for topic in topics) < len(topics) / 2
    status, out, _ = run(tmp_path, 'pydocs', '--output_dir=out')
    assert status == 0 and 'is done' in out
    one_line(run(tmp_path, 'pydocs', '--output_dir=out', '--seed=1'), 'seed 1337, now 1')
