"""prepare/hellaswag.py: the folder it writes, what it refuses, the scores of a model. No network."""
import hashlib
import io
import json
import os
import signal
import urllib.request
from dataclasses import asdict

import pytest
import torch
from test_prepare import BPE, SHARED, ok, one_line, run
from torch.nn import functional as F

from model import GPT, TOKENIZERS, GPTConfig, load_tokenizer
from prepare import hellaswag

REAL = SHARED / 'data/hellaswag/hellaswag_val_1000_original_schema.jsonl'
URL = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
ITEMS = [
    dict(ctx='The kettle begins to whistle. a man',
         endings=['pours the water.', 'sells the sea.', 'is a spoon.', 'folds it twice.'], label=0),
    dict(ctx='How to öffnen a tin', endings=[' Sing.', 'Turn the key 🙂.', 'A\u2028year.', '"it"'], label=1),
    dict(ctx='Two dogs run', endings=['up a stair', 'down a hill', 'to a stair\nand on', 'on'], label=3),
]
REST = dict(ind=7, activity_label='Tea', more=[{'a': None}])  # what else there is does not matter

def write(path, items, **changes):
    path.write_text(''.join(json.dumps({**REST, **item, **changes}) + '\n' for item in items))
    return path

def prepare(tmp_path, *args, before=None):
    return run(tmp_path, 'hellaswag', '--output_dir=out', *args, before=before)

def finished(folder, items, source, content):
    """The folder holds exactly these items, and the manifest tells the truth about them."""
    written = (folder / 'hellaswag_val.jsonl').read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ['hellaswag_val.jsonl', 'manifest.json']
    assert [json.loads(line) for line in written.split(b'\n')[:-1]] == items
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert manifest == dict(rows=len(items), sha256=hashlib.sha256(written).hexdigest(), source=source,
                            sha256_source=hashlib.sha256(content).hexdigest())

def test_the_folder_holds_the_items_whatever_form_they_came_in(tmp_path):
    source = write(tmp_path / 'a.jsonl', ITEMS)
    out = ok(prepare(tmp_path, '--input=a.jsonl'))
    finished(tmp_path / 'out', ITEMS, 'a.jsonl', source.read_bytes())
    assert 'out/hellaswag_val.jsonl: 3 items; right endings: 0 33.3%, 1 33.3%, 2 0.0%, 3 33.3%' in out
    assert 'note: ' in out and '10,042' in out
    # a byte order mark, blank lines, labels that are text, no end of the last line
    lines = [json.dumps({**item, 'label': str(item['label'])}, ensure_ascii=False) for item in ITEMS]
    source.write_bytes(b'\xef\xbb\xbf' + '\r\n \r\n\r\n'.join(lines).encode())
    ok(prepare(tmp_path, '--input=a.jsonl'))
    finished(tmp_path / 'out', ITEMS, 'a.jsonl', source.read_bytes())

GOOD = json.dumps(ITEMS[0]).encode()

def changed(**changes):
    return json.dumps({**ITEMS[0], **changes}).encode()

@pytest.mark.parametrize('line, words', [
    (b'nonsense', 'not JSON'),
    (b'[' * 100_000, 'not JSON'),
    (b'{"ctx": "a", "label": 1}', 'expected an object with'),
    (changed(ctx=None), 'ctx: the text is NoneType'),
    (changed(ctx=' \n'), 'ctx: the text is empty'),
    (GOOD.replace(b'kettle', b'k\xffttle'), 'not UTF-8 (invalid start byte at byte '),
    (changed(endings=['a', 'b', 'c']), "endings is ['a', 'b', 'c'], expected a list of 4"),
    (changed(endings=['a', 'b', 'c', 4]), 'ending 3: the text is int'),
    (changed(endings=['a', '', 'c', 'd']), 'ending 1: the text is empty'),
    (changed(label=4), 'label is 4, expected 0, 1, 2 or 3'),
    (changed(label='1\n'), r"label is '1\n'"),
])
def test_a_bad_line_is_named(capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        list(hellaswag.rows(GOOD + b'\n\n' + line + b'\n' + GOOD + b'\n', 'folder/bad.jsonl'))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith('folder/bad.jsonl line 3: ' + words), message
    assert message.count('\n') == 1 and len(message) < 250

def test_mistakes_are_one_line_and_change_nothing(tmp_path):
    (tmp_path / 'blank.jsonl').write_bytes(b'\n \n')
    write(tmp_path / 'good.jsonl', ITEMS)
    one_line(prepare(tmp_path, '--input=blank.jsonl'), 'blank.jsonl: no items')
    one_line(prepare(tmp_path, '--input=missing.jsonl'), '--input: missing.jsonl is no file')
    one_line(prepare(tmp_path, '--checkpoint_path=nowhere.pt', '--input=good.jsonl'), 'nowhere.pt')
    (tmp_path / 'bad.pt').write_text('no checkpoint')
    one_line(prepare(tmp_path, '--checkpoint_path=bad.pt', '--input=good.jsonl'), '_path=bad.pt')
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_items_are_whole_or_the_old_ones_and_a_manifest_is_never_anothers(tmp_path, n):
    """Killed at the n-th of all calls of os.fsync and os.replace."""
    write(tmp_path / 'old.jsonl', ITEMS[:1])
    new = write(tmp_path / 'new.jsonl', ITEMS)
    ok(prepare(tmp_path, '--input=old.jsonl'))
    calls = []

    def deadly(function):
        def wrapped(*args):
            calls.append(args)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapped

    def before():
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    assert prepare(tmp_path, '--input=new.jsonl', before=before)[0] == -signal.SIGKILL
    left = (tmp_path / 'out/hellaswag_val.jsonl').read_bytes()
    assert left.count(b'\n') == (1 if n <= 2 else 3) and not (tmp_path / 'out/manifest.json').exists()
    ok(prepare(tmp_path, '--input=new.jsonl'))
    finished(tmp_path / 'out', ITEMS, 'new.jsonl', new.read_bytes())

def serve(content=b'', length='', refuse=None):
    """Put this in the place of the network: it answers with the content, or raises."""
    class Response(io.BytesIO):
        headers = {'Content-Length': length}

    def urlopen(url, timeout):
        if url != URL or refuse:
            raise refuse
        return Response(content)
    urllib.request.urlopen = urlopen

def test_a_download_is_whole_or_refused(tmp_path):
    content = write(tmp_path / 'a.jsonl', ITEMS * 500).read_bytes()  # more than one part
    for broken, words in [(dict(refuse=ConnectionError('unreachable')), 'unreachable'),
                          (dict(content=content, length='1000000'), 'of 1,000,000 bytes arrived')]:
        result = prepare(tmp_path, before=lambda broken=broken: serve(**broken))
        one_line(result, URL + ' was not downloaded', words, '--input')
    one_line(prepare(tmp_path, before=lambda: serve(b'<!DOCTYPE html>\n')), f'{URL} line 1: not JSON')
    assert not (tmp_path / 'out').exists()
    ok(prepare(tmp_path, before=lambda: serve(content)))
    finished(tmp_path / 'out', ITEMS * 500, URL, content)

def model_of_bytes(block_size, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=320, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # far from uniform
    return model.eval()

def scored_one_by_one(model, encoding, items):
    """(acc, acc_norm, losses of all endings), an ending at a time, by the definition."""
    right, right_norm, losses = 0, 0, []
    for item in items:
        sums, means = [], []
        for ending in item['endings']:
            size = len(encoding.encode_ordinary(' ' + ending))
            ids = encoding.encode_ordinary(item['ctx'] + ' ' + ending)[-model.config.block_size - 1:]
            targets = torch.tensor(ids[1:])[-size:]
            logits = model(torch.tensor([ids[:-1]]))[0, -size:]
            sums.append(F.cross_entropy(logits, targets, reduction='sum').item())
            means.append(sums[-1] / size)
        losses += sums
        right += sums.index(min(sums)) == item['label']
        right_norm += means.index(min(means)) == item['label']
    return right / len(items), right_norm / len(items), losses

@torch.no_grad()
@pytest.mark.parametrize('block_size', [200, 40, 8])  # 40 cuts contexts, 8 endings too
def test_losses_and_scores_are_those_of_one_ending_at_a_time(block_size):
    model, encoding = model_of_bytes(block_size), load_tokenizer('bytes')
    items = [dict(item, label=label) for item in ITEMS for label in range(4)]
    acc, acc_norm, losses = scored_one_by_one(model, encoding, items)
    rows = [(list(f'{item["ctx"]} {ending}'.encode()), len(ending.encode()) + 1)
            for item in items for ending in item['endings']]
    assert torch.allclose(hellaswag.ending_losses(model, rows), torch.tensor(losses), rtol=1e-5)
    for batch_size in (1, 5, 100):
        assert hellaswag.evaluate(model, encoding, items, batch_size, torch.no_grad()) == (acc, acc_norm)

def test_a_checkpoint_is_scored_and_the_scores_lie_beside_it(tmp_path):
    model = model_of_bytes(64)
    (tmp_path / 'logs').mkdir()
    checkpoint = dict(model=model.state_dict(), model_config=asdict(model.config))
    checkpoint.update(tokenizer=TOKENIZERS['bytes'])
    torch.save(checkpoint, tmp_path / 'logs/model_best.pt')
    items = ITEMS + [dict(ITEMS[0], label=2)]
    content = write(tmp_path / 'items.jsonl', items).read_bytes()
    args = ['--checkpoint_path=logs/model_best.pt', '--device=cpu']
    given = '--input=items.jsonl'
    for more, count in (([given], 4), ([given, '--max_items=2'], 2), ([], 4), ([], 4)):
        # the third downloads and prepares, the last finds what was prepared
        out = ok(prepare(tmp_path, *args, *more, before=lambda: serve(content)))
        acc, acc_norm, _ = scored_one_by_one(model, load_tokenizer('bytes'), items[:count])
        assert f'hellaswag acc {acc:.4f} | acc_norm {acc_norm:.4f} ({count} items)' in out
        assert (tmp_path / 'out').exists() == (not more)
        assert json.loads((tmp_path / 'logs/hellaswag.json').read_text()) == dict(
            checkpoint='logs/model_best.pt', acc=acc, acc_norm=acc_norm, items=count, dtype='float32')
    assert 'hellaswag acc ' in ok(prepare(tmp_path, *args, '--dtype=bfloat16'))

@pytest.mark.skipif(not REAL.exists() or not BPE.exists(), reason='needs real items and the BPE of GPT-2')
def test_real_items_are_read_and_scored(monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(BPE))
    items, _, _ = hellaswag.read_items(REAL)
    assert [sum(item['label'] == label for item in items) for label in range(4)] == [267, 228, 266, 239]
    model, encoding = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16)), load_tokenizer('gpt2')
    acc, acc_norm, _ = scored_one_by_one(model.eval(), encoding, items[:25])
    assert hellaswag.evaluate(model, encoding, items[:25], 16, torch.no_grad()) == (acc, acc_norm)
