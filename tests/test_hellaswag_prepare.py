"""prepare/hellaswag.py: what it writes, what it refuses, what a failure leaves behind. No network."""
import errno
import hashlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from email.message import Message

import pytest
from test_prepare import ROOT, SHARED, one_line, run

from prepare import hellaswag  # behind test_prepare, which makes it importable

REAL = SHARED / 'data/hellaswag'
URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
ITEMS = [
    dict(ctx='The kettle begins to whistle. a man', endings=['pours the water.', 'sells the sea.', 'is a spoon.', 'folds it twice.'], label=0),
    dict(ctx='[header] How to öffnen a tin [title] Begin.', endings=[' Sing.', 'Turn the key 🙂.', 'Wait\u2028a year.', 'Eat "it".'], label=1),
    dict(ctx='Two dogs run', endings=['up a stair', 'down a stair', 'to a stair\nand back', 'as stairs'], label=3),
]
# What the published file has beside them: all of it is ignored, whatever it is.
REST = dict(ind=7, activity_label='Tea', ctx_a='The kettle', ctx_b='', split='val', split_type='zeroshot', source_id='made~up', more=[{'a': None}])


def lines(items, **changes):
    return [json.dumps({**REST, **item, **changes}) for item in items]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else ''.join(line + '\n' for line in content).encode())
    return path


def prepare(tmp_path, *args, before=None):
    return run(tmp_path, 'hellaswag', '--output_dir=out', *args, before=before)


def ok(result):
    assert result[0] == 0 and result[2] == '', result
    return result[1]


def folder(path):
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else {}


def finished(path, items, source, content):
    """The folder holds exactly these items, and the manifest tells the truth about them."""
    files = folder(path)
    assert sorted(files) == ['hellaswag_val.jsonl', 'manifest.json']
    written = files['hellaswag_val.jsonl']
    assert written.endswith(b'\n') and [json.loads(line) for line in written.split(b'\n')[:-1]] == items
    assert json.loads(files['manifest.json']) == dict(rows=len(items), sha256=hashlib.sha256(written).hexdigest(), source=source,
                                                      sha256_source=hashlib.sha256(content).hexdigest())
    return written


def test_original_schema(tmp_path):
    source = write(tmp_path / 'a.jsonl', lines(ITEMS))
    out = ok(prepare(tmp_path, '--input=a.jsonl'))
    written = finished(tmp_path / 'out', ITEMS, 'a.jsonl', source.read_bytes())
    assert 'öffnen'.encode() in written and written.split(b'\n')[2] == (
        b'{"ctx": "Two dogs run", "endings": ["up a stair", "down a stair", "to a stair\\nand back", "as stairs"], "label": 3}')
    assert 'out/hellaswag_val.jsonl: 3 items; right endings: 0 33.3%, 1 33.3%, 2 0.0%, 3 33.3%' in out
    assert 'note: ' in out and '10,042' in out

    before = folder(tmp_path / 'out')  # the same from other forms of the same items, over the first
    strings = [json.dumps({**REST, **item, 'label': str(item['label'])}, ensure_ascii=False) for item in ITEMS]
    write(tmp_path / 'b.jsonl', ('\r\n' + '\r\n \r\n\r\n'.join(strings)).encode())  # blank lines, no end of the last one
    ok(prepare(tmp_path, '--input=b.jsonl'))
    assert finished(tmp_path / 'out', ITEMS, 'b.jsonl', (tmp_path / 'b.jsonl').read_bytes()) == written
    ok(prepare(tmp_path, '--input=a.jsonl'))
    assert folder(tmp_path / 'out') == before
    ok(prepare(tmp_path, '--input=out/hellaswag_val.jsonl'))  # what it writes, it reads
    assert finished(tmp_path / 'out', ITEMS, 'hellaswag_val.jsonl', written) == written


GOOD = json.dumps(ITEMS[0]).encode()


def changed(**changes):
    return json.dumps({**ITEMS[0], **changes}).encode()


BAD = [
    (b'nonsense', 'not JSON'),
    (GOOD[:-1], 'not JSON'),
    (GOOD + GOOD, 'not JSON'),
    (b'\xef\xbb\xbf' + GOOD, 'not JSON'),
    (b'[' * 100_000, 'not JSON'),
    (b'{"ctx":' * 100_000, 'not JSON'),
    (b'9' * 5000, 'not JSON (Exceeds' if hasattr(sys, 'get_int_max_str_digits') else 'found int'),
    (b'[1]', 'found list, expected an object'),
    (b'null', 'found NoneType, expected an object'),
    (b'"ctx endings label"', 'found str, expected an object'),
    (b'{}', 'found [], expected an object'),
    (b'{"ctx": "a", "label": 1}', "found ['ctx', 'label'], expected an object"),
    (changed(ctx=None), 'ctx: the text is NoneType'),
    (changed(ctx=['a']), 'ctx: the text is list'),
    (changed(ctx=''), 'ctx: the text is empty'),
    (changed(ctx=' \n'), 'ctx: the text is empty'),
    (changed(ctx='ab\ud800'), 'ctx: half a surrogate pair at character 2'),
    (GOOD.replace(b'kettle', b'k\xffttle'), 'not UTF-8 (invalid start byte at byte '),
    (GOOD.replace(b'kettle', b'\xed\xa0\x80'), 'not UTF-8'),
    (changed(endings=['a', 'b', 'c']), 'endings is a list of 3, expected a list of 4'),
    (changed(endings=['a'] * 5), 'endings is a list of 5'),
    (changed(endings='abcd'), 'endings is str'),
    (changed(endings={'0': 'a', '1': 'b', '2': 'c', '3': 'd'}), 'endings is dict'),
    (changed(endings=None), 'endings is NoneType'),
    (changed(endings=['a', 'b', 'c', 4]), 'ending 3: the text is int'),
    (changed(endings=['a', '', 'c', 'd']), 'ending 1: the text is empty'),
    (changed(endings=['a', 'b', '\udc00', 'd']), 'ending 2: half a surrogate pair'),
    (changed(label=4), 'label is 4, expected 0, 1, 2 or 3'),
    (changed(label=-1), 'label is -1'),
    (changed(label=10 ** 4000), 'label is 1000'),
    (changed(label=True), 'label is True'),
    (changed(label=1.0), 'label is float'),
    (changed(label=None), 'label is NoneType'),
    (changed(label=[1]), 'label is list'),
    (changed(label=''), "label is ''"),
    (changed(label='4'), "label is '4'"),
    (changed(label='01'), "label is '01'"),
    (changed(label='²'), "label is '²'"),
    (changed(label='1\n'), r"label is '1\n'"),
    (changed(label='\ud800'), r"label is '\ud800'"),
]


@pytest.mark.parametrize('line, words', BAD, ids=[words for _, words in BAD])
def test_bad_line(capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        list(hellaswag.rows(GOOD + b'\n\n' + line + b'\n' + GOOD + b'\n', 'folder/bad.jsonl'))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith('folder/bad.jsonl line 3: ' + words), message
    assert message.count('\n') == 1 and len(message) < 250


@pytest.mark.parametrize('exists', [False, True])
def test_a_bad_line_changes_nothing(tmp_path, exists):
    if exists:
        write(tmp_path / 'a.jsonl', lines(ITEMS))
        ok(prepare(tmp_path, '--input=a.jsonl'))
    before = folder(tmp_path / 'out')
    for line, words in (BAD[0], BAD[4], BAD[-1]):
        write(tmp_path / 'a.jsonl', GOOD + b'\n' + line)
        one_line(prepare(tmp_path, '--input=a.jsonl'), 'a.jsonl line 2: ' + words)
    assert folder(tmp_path / 'out') == before and (tmp_path / 'out').exists() == exists


def test_other_mistakes(tmp_path):
    (tmp_path / 'empty.jsonl').write_bytes(b'')
    (tmp_path / 'blank.jsonl').write_bytes(b'\n \n')
    (tmp_path / 'folder').mkdir()
    write(tmp_path / 'good.jsonl', lines(ITEMS))
    one_line(prepare(tmp_path, '--input=empty.jsonl'), 'empty.jsonl: no items')
    one_line(prepare(tmp_path, '--input=blank.jsonl'), 'blank.jsonl: no items')
    one_line(prepare(tmp_path, '--input=missing.jsonl'), '--input: missing.jsonl does not exist')
    one_line(prepare(tmp_path, '--input=' + 'long' * 100), 'does not exist')
    one_line(prepare(tmp_path, '--input=folder'), '--input: folder is a folder')
    one_line(prepare(tmp_path, '--input=good.jsonl', '--output_dir=good.jsonl'), 'good.jsonl')
    one_line(prepare(tmp_path, '--input=good.jsonl', '--output_dir=good.jsonl/deeper'), 'good.jsonl')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kill', [False, True])
@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_whole_or_not_at_all(tmp_path, n, kill):
    """The n-th of all calls of os.fsync and os.replace fails as on a full disk, or ends the process there."""
    write(tmp_path / 'old.jsonl', lines(ITEMS[:1]))
    write(tmp_path / 'new.jsonl', lines(ITEMS))
    ok(prepare(tmp_path, '--input=old.jsonl'))
    old, count = folder(tmp_path / 'out')['hellaswag_val.jsonl'], 0

    def breaking(function):
        def broken(*args):
            nonlocal count
            count += 1
            if count == n and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if count == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args)
        return broken

    def before():
        os.fsync, os.replace = breaking(os.fsync), breaking(os.replace)
    result = prepare(tmp_path, '--input=new.jsonl', before=before)
    left = folder(tmp_path / 'out')
    if kill:
        assert result[0] == -signal.SIGKILL
        left = {name: content for name, content in left.items() if not name.endswith('.tmp')}
    else:
        one_line(result, 'out: No space left on device', code=1)
    assert sorted(left) == ['hellaswag_val.jsonl'] and (left['hellaswag_val.jsonl'] == old) == (n <= 2)  # no manifest: not finished
    ok(prepare(tmp_path, '--input=new.jsonl'))
    finished(tmp_path / 'out', ITEMS, 'new.jsonl', (tmp_path / 'new.jsonl').read_bytes())


def serve(content=b'', length=None, refuse=None, cut=None):
    """Put this in the place of the network: it answers with the content, or raises at once (refuse) or while it is read (cut)."""
    class Response(io.BytesIO):
        headers = Message()

        def read(self, size):
            if cut and self.tell():
                raise cut
            return super().read(size)

    def urlopen(url, timeout):
        assert url == URL and timeout > 0
        if refuse:
            raise refuse
        return Response(content)
    if length is not None:
        Response.headers['Content-Length'] = str(length)
    urllib.request.urlopen = urlopen


@pytest.mark.parametrize('known', [True, False])
def test_download(tmp_path, known):
    content = '\n'.join(lines(ITEMS * 500)).encode()  # more than one part
    ok(prepare(tmp_path, before=lambda: serve(content, len(content) if known else None)))
    finished(tmp_path / 'out', ITEMS * 500, URL, content)


@pytest.mark.parametrize('broken, words', [
    (dict(refuse=urllib.error.URLError(OSError(101, 'Network is unreachable'))), 'Network is unreachable'),
    (dict(refuse=urllib.error.HTTPError(URL, 404, 'Not Found', Message(), None)), 'HTTP Error 404'),
    (dict(refuse=TimeoutError('timed out')), 'TimeoutError: timed out'),
    (dict(refuse=http.client.BadStatusLine('hello')), 'BadStatusLine: hello'),
    (dict(cut=ConnectionResetError(errno.ECONNRESET, 'reset')), 'reset'),
    (dict(cut=http.client.IncompleteRead(b'abc', 10)), 'IncompleteRead'),
    (dict(length=10 ** 6), 'of 1,000,000 bytes arrived'),
    (dict(length='many'), 'ValueError'),
])
def test_download_fails(tmp_path, broken, words):
    content = '\n'.join(lines(ITEMS * 500)).encode()
    one_line(prepare(tmp_path, before=lambda: serve(content, **broken)), URL + ' was not downloaded', words, '--input')
    assert not (tmp_path / 'out').exists()


def test_downloaded_something_else(tmp_path):
    one_line(prepare(tmp_path, before=lambda: serve(b'<!DOCTYPE html>\n')), f'{URL} line 1: not JSON')
    one_line(prepare(tmp_path, before=serve), f'{URL}: no items')
    assert not (tmp_path / 'out').exists()


def test_help(tmp_path):
    out = ok(run(tmp_path, 'hellaswag', '--help'))
    assert 'python prepare/hellaswag.py' in out and "--output_dir='data/hellaswag'" in out and 'MIT' in out
    assert sum(line.startswith('  --') for line in out.splitlines()) == 2  # constants below are no settings


def test_as_a_module(tmp_path):
    """In a fresh interpreter, from a folder elsewhere."""
    source = write(tmp_path / 'a.jsonl', lines(ITEMS))
    result = subprocess.run([sys.executable, '-m', 'prepare.hellaswag', '--input=a.jsonl', '--output_dir=out'], cwd=tmp_path,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')
    finished(tmp_path / 'out', ITEMS, 'a.jsonl', source.read_bytes())


@pytest.mark.skipif(not REAL.exists(), reason='needs the real files')
@pytest.mark.parametrize('name, counts', [('hellaswag_val_1000_original_schema', [267, 228, 266, 239]),
                                          ('hellaswag_val_preprocessed', [2515, 2485, 2584, 2458])])
def test_real_files(tmp_path, name, counts):
    source = REAL / f'{name}.jsonl'
    out = ok(prepare(tmp_path, f'--input={source}'))
    originals = [json.loads(line) for line in source.read_bytes().split(b'\n') if line.strip()]
    items = [{key: item[key] for key in ('ctx', 'endings', 'label')} for item in originals]
    finished(tmp_path / 'out', items, source.name, source.read_bytes())
    assert [sum(item['label'] == label for item in items) for label in range(4)] == counts
    assert f'{sum(counts):,} items; right endings: 0 {counts[0] / sum(counts):.1%}' in out
    assert ('note: ' in out) == (len(items) != 10042)
