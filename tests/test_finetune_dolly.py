"""prepare/dolly.py and finetune_dolly.py: rows, masks, order, answers, the chain of beginnings, and the guides' commands."""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, clean_log, load, losses, make_rows_data, make_text_data
from test_configurator import GUIDES
from test_prepare import SHARED, one_line, run

from model import GPT, GPTConfig, HeadLoss, bucketed, distinct_2, instruction_prompt, load_tokenizer, open_rows, padded_length, padded_rows, rouge_l

TINY = ['--data_dir=data', '--block_size=32', '--n_layer=2', '--n_head=2', '--n_embd=16', '--batch_size=4', '--max_steps=4', '--warmup_steps=2', '--max_lr=1e-2',
        '--eval_interval=2', '--checkpoint_interval=2', '--generate_interval=2', '--eval_answers=2', '--max_new_tokens=8', '--log_interval=1']
DOLLY = SHARED / 'data/dolly/databricks-dolly-15k.jsonl'


@pytest.fixture
def tune(launcher, tmp_path):
    """tune('--max_steps=2', ...) finetunes a tiny model in a folder of its own."""
    make_rows_data(tmp_path / 'data')

    def tune(*args, base=TINY, **kwargs):
        return launcher.run('finetune_dolly.py', [*base, *args], cwd=tmp_path, **kwargs)
    return tune


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def prepare(tmp_path, *args, rows=None):
    if rows is not None:
        write(tmp_path / 'in.jsonl', rows)
    return run(tmp_path, 'dolly', '--input=in.jsonl', '--output_dir=out', '--tokenizer=bytes', *args)


def text(data, r, part):
    start, prompt, response = (int(data[key][r]) for key in ('start', 'prompt', 'response'))
    ids = data['tokens'][start:start + prompt] if part == 'prompt' else data['tokens'][start + prompt:start + prompt + response]
    return load_tokenizer('bytes').decode(ids.tolist())


# ---- prepare/dolly.py
def row(i, **changes):
    return dict(dict(instruction=f'Say {i}.', context='', response=f'{i}!', category='open_qa' if i % 2 else 'closed_qa'), **changes)


def test_rows_as_written_by_hand(tmp_path):
    rows = [row(i) for i in range(38)] + [row(38, context='The town[12] of X.[3] It is old.[citation needed]', response='X is old.[3]'),
                                          row(39, response='It is x[1].', instruction=' Which? ')]
    code, out, err = prepare(tmp_path, rows=rows)
    assert code == 0 and err == '', err
    train, val, tokenizer, categories = open_rows(str(tmp_path / 'out'), 1024)
    assert tokenizer == dict(tokenizer='bytes', vocab_size=257, eot=256) and categories == ['closed_qa', 'open_qa']
    assert (len(train['prompt']), len(val['prompt'])) == (38, 2) and sorted(val['category']) == [0, 1]  # one of each category's twenty
    found = {text(data, r, 'prompt'): text(data, r, 'response') for data in (train, val) for r in range(len(data['prompt']))}
    head = '<|endoftext|>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n'
    assert found[head + 'Say 38.\n\nInput:\nThe town of X. It is old.\n\n### Response:\n'] == 'X is old.<|endoftext|>'
    assert found[head + 'Which?\n\n### Response:\n'] == 'It is x[1].<|endoftext|>'  # no citation: its context has none
    assert found[head + 'Say 7.\n\n### Response:\n'] == '7!<|endoftext|>' and len(found) == 40
    assert '4 citation marks removed' in out and '38 rows to train' in out and 'padding in batches of 16 random rows' in out
    tokens = sum(len(prompt.encode()) - 12 + len(response.encode()) - 12 for prompt, response in found.items())  # <|endoftext|> is one token
    answers = sum(len(response.encode()) - 12 for response in found.values())
    assert f'{tokens:,} tokens' in out and f'{answers / tokens:.1%}, in responses' in out
    manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
    assert manifest['rows'] == {'closed_qa': {'val': 1, 'train': 19}, 'open_qa': {'val': 1, 'train': 19}} and manifest['tokens'] == tokens


def test_a_byte_order_mark_is_dropped_and_a_million_blanks_are_text(tmp_path, monkeypatch):
    write(tmp_path / 'in.jsonl', [row(i) for i in range(40)])
    (tmp_path / 'in.jsonl').write_bytes(b'\xef\xbb\xbf' + (tmp_path / 'in.jsonl').read_bytes())
    code, out, err = prepare(tmp_path)
    assert code == 0 and err == '' and '40 rows read: 0 without' in out
    if not (SHARED / 'data/tiktoken_cache').exists():
        pytest.skip('needs the two files of the GPT-2 tokenizer')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'data/tiktoken_cache'))
    code, out, err = prepare(tmp_path, '--tokenizer=gpt2', rows=[row(i, context='' if i else 'a' + ' ' * 1_200_000 + 'b') for i in range(40)])
    assert code == 0 and err == '' and '1 contexts shortened' in out


def test_what_is_too_long_loses_its_context_never_its_response(tmp_path):
    overhead = len(instruction_prompt('Sum up.', 'x').encode()) - 1 + 2
    long = 'äbc ' * 100
    rows = [row(i) for i in range(40)] + [dict(instruction='Sum up.', context=long, response='R' * 50), dict(instruction='Sum up.', context='', response='Q' * 300),
                                          dict(instruction='', context='', response='no'), dict(instruction='no', response=' ')]
    code, out, err = prepare(tmp_path, '--max_length=250', rows=rows)
    assert code == 0, err
    assert '2 without instruction or response and 1 longer than 250 tokens' in out and '1 contexts shortened' in out
    train, val, _, categories = open_rows(str(tmp_path / 'out'), 1024)
    (data, r), = [(data, r) for data in (train, val) for r in range(len(data['prompt'])) if 'R' * 50 in text(data, r, 'response')]
    kept = re.search(r'Input:\n(.*)\n\n### Response', text(data, r, 'prompt'))[1]
    assert long.startswith(kept) and 250 - 5 <= data['prompt'][r] + data['response'][r] <= 250 and len(kept.encode()) <= 250 - overhead - 50
    assert max(max(d['prompt'] + d['response']) for d in (train, val)) <= 250 and categories == ['closed_qa', 'none', 'open_qa']


def test_prepared_again_it_is_the_same(tmp_path):
    files = []
    for args in ([], [], ['--seed=1'], ['--shard_size=2000']):
        assert prepare(tmp_path, '--val_fraction=0.2', *args, rows=[row(i) for i in range(100)])[0] == 0
        assert json.loads((tmp_path / 'out/manifest.json').read_text())['rows'] == {name: dict(val=10, train=40) for name in ('closed_qa', 'open_qa')}
        files.append({path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()})
    assert files[0] == files[1] and files[0]['dolly_val_000000.npz'] != files[2]['dolly_val_000000.npz']
    assert len(files[0]) == 3 and len(files[3]) > 5 and not set(files[3]) - {'manifest.json', *(f'dolly_{s}_{i:06d}.npz' for s in ('val', 'train') for i in range(20))}


@pytest.mark.parametrize('content, told', [
    (b'nonsense', 'line 1: not JSON'), (b'{"instruction": "a"}', 'expected an object with instruction and response'), (b'[1]', 'found list'),
    (b'{"instruction": 3, "response": "a"}', 'instruction: the text is int'), (b'{"instruction": "a\xff", "response": "a"}', 'not UTF-8'),
    (b'{"instruction": "a", "response": "\\ud800"}', 'half a surrogate'), (b'{"instruction": "a", "response": "b", "category": null}', 'category: the text is NoneType'),
    (b'', 'too few'), (b'[' * 100_000, 'not JSON'),
])
def test_a_bad_input_ends_in_one_line(tmp_path, content, told):
    (tmp_path / 'in.jsonl').write_bytes(content)
    one_line(prepare(tmp_path), told)
    assert not (tmp_path / 'out').exists()


def test_an_input_that_is_not_there(tmp_path):
    one_line(prepare(tmp_path), 'does not exist')
    one_line(prepare(tmp_path, '--name=my_val', rows=[row(1)]), 'val')


@pytest.mark.skipif(not DOLLY.exists(), reason='the real file is not shipped')
def test_the_real_rows(tmp_path):
    code, out, err = run(tmp_path, 'dolly', f'--input={DOLLY}', '--output_dir=out', '--tokenizer=bytes', '--max_length=100000')
    assert code == 0 and '15,011 rows read' in out and 'note:' not in out, err
    assert re.search(r'closed_qa +1,684 rows to train, +89 held out', out) and re.search(r'open_qa +3,555 rows to train, +187 held out', out)


# ---- reading what was prepared
def spoil(folder, **changes):
    path = folder / 'x_train_000001.npz'
    arrays = dict(np.load(path))
    arrays.update({key: change(arrays[key]) for key, change in changes.items()})
    np.savez(path, **arrays)


def at(index, value):
    def change(a):
        a = a.copy()
        a[index] = value
        return a
    return change


@pytest.mark.parametrize('changes, told', [
    (dict(tokens=at(5, 999)), 'token 5 is 999, outside the vocabulary of 257'), (dict(tokens=lambda a: a.astype(np.int64)), 'uint16'),
    (dict(tokens=lambda a: a[:-1]), 'need'), (dict(tokens=at(-1, 3)), 'does not end in end-of-text'), (dict(prompt=at(3, 0)), 'row 3 has an empty'),
    (dict(prompt=at(3, -7)), 'row 3 has an empty'), (dict(response=lambda a: a[:-1]), 'responses'), (dict(category=at(2, 9)), 'row 2 has an unknown category'),
    (dict(prompt=lambda a: a.astype(float)), 'whole numbers'), (dict(prompt=lambda a: a.reshape(1, -1)), 'rows'), (dict(response=lambda a: a.astype(np.int64) + 2 ** 40), 'absurd'),
    (dict(tokens=lambda a: np.array([{}], object)), 'Object arrays cannot be loaded'),
])
def test_hostile_rows_are_refused_by_name(tune, tmp_path, changes, told):
    spoil(tmp_path / 'data', **changes)
    err = tune().one_line()
    assert 'x_train_000001.npz' in err and told in err and not (tmp_path / 'logs_finetune').exists()


def test_damaged_files_of_rows(tune, tmp_path, fuzz):
    path, rng = tmp_path / 'data/x_train_000001.npz', np.random.default_rng(0)
    good, expected = path.read_bytes(), open_rows(str(tmp_path / 'data'), 32)[0]
    for _ in range(fuzz):  # a flipped bit, a lost end, foreign bytes: refused, or nothing that is read has changed
        bad = bytearray(good)
        kind, where = rng.integers(3), int(rng.integers(len(good)))
        if kind == 0:
            bad[where] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad) if kind == 0 else good[:where] if kind == 1 else bytes(rng.integers(256, size=where, dtype=np.uint8)))
        try:
            found = open_rows(str(tmp_path / 'data'), 32)[0]
        except ValueError as error:
            assert 'x_train_000001.npz' in str(error)
        else:
            assert all(np.array_equal(found[key], expected[key]) for key in ('tokens', 'prompt', 'response', 'category'))
    path.write_bytes(good[:-30])
    assert 'x_train_000001.npz' in tune().one_line()


@pytest.mark.parametrize('manifest', ['nonsense', '[]', '{}', '{"tokenizer": "bytes", "vocab_size": 9, "eot": 256, "categories": []}',
                                      '{"tokenizer": "bytes", "vocab_size": 257, "eot": 256, "categories": [1]}', None])
def test_hostile_manifests(tune, tmp_path, manifest):
    path = tmp_path / 'data/manifest.json'
    path.write_text(manifest) if manifest else path.unlink()
    assert 'manifest.json' in tune().one_line()


def test_rows_that_do_not_fit_are_told(tune, tmp_path):
    run = tune('--block_size=16', '--max_steps=1').ok()
    train, val, _, _ = open_rows(str(tmp_path / 'data'), 16)
    left = train['left_out'] + val['left_out']
    assert 0 < left < 60 and f'WARNING: {left} rows of more than block_size + 1 = 17 tokens' in run.out
    assert 'at most block_size' in tune('--block_size=2', '--log_dir=b').one_line()


# ---- order, masks, loss
def test_buckets_hold_every_row_once_and_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 2005)
    batches = bucketed(lengths, 8, 1337, 0)
    assert sorted(np.concatenate(batches)) == list(range(2005)) and sorted(map(len, batches)) == [5] + [8] * 250
    waste = [1 - lengths.sum() / sum(len(b) * padded_length(lengths[b].max()) for b in some)
             for some in (batches, [np.arange(i, min(i + 8, 2005)) for i in range(0, 2005, 8)])]
    assert waste[0] < 0.06 < 0.4 < waste[1]
    longest = [lengths[b].max() for b in batches[:50]]
    assert longest != sorted(longest)  # no curriculum from short to long
    assert all(np.array_equal(a, b) for a, b in zip(batches, bucketed(lengths, 8, 1337, 0), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(batches, bucketed(lengths, 8, 1337, 1), strict=True))


ROWS = dict(tokens=np.array([256, 1, 2, 11, 12, 256, 256, 3, 13, 256], np.uint16), start=np.array([0, 6]), prompt=np.array([3, 2]), response=np.array([3, 2]))


def test_mask_and_shift_by_hand():
    x, y, places, factors = padded_rows(ROWS, [0, 1], 32, 256)
    assert x.tolist() == [[256, 1, 2, 11, 12] + [256] * 11, [256, 3, 13] + [256] * 13]
    # 2 sees 11 coming, 11 sees 12, 12 sees the end; 3 sees 13, 13 sees the end
    assert y.tolist() == [11, 12, 256, 13, 256] and places.tolist() == [2, 3, 4, 17, 18] and factors.tolist() == [1] * 5
    assert padded_rows(ROWS, [0, 1], 7, 256)[0].shape == (2, 7)
    x, y, places, factors = padded_rows(ROWS, [1, 0], 32, 256, prompt_loss_weight=0.25)
    assert y.tolist() == [3, 13, 256, 1, 2, 11, 12, 256] and places.tolist() == [0, 1, 2, 16, 17, 18, 19, 20]
    assert factors.tolist() == [0.25, 1, 1, 0.25, 0.25, 1, 1, 1]


def tiny_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize('weight', [0.0, 0.3])
def test_the_loss_of_places_is_that_of_all_logits(weight):
    model = tiny_gpt()
    x, y, places, factors = padded_rows(ROWS, [0, 1], 32, 256, weight)
    loss = model(x, y, 'sum', places, factors)
    expected = (F.cross_entropy(model(x).flatten(0, 1)[places], y, reduction='none') * factors).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))


def test_padding_changes_nothing():
    model = tiny_gpt()
    together = model(*padded_rows(ROWS, [0, 1], 32, 256)[:2], 'sum', padded_rows(ROWS, [0, 1], 32, 256)[2])
    alone = sum(model(*padded_rows(ROWS, [r], 5, 256)[:2], 'sum', padded_rows(ROWS, [r], 5, 256)[2]) for r in (0, 1))
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)


def test_a_batch_without_any_row_is_finite():
    model = tiny_gpt()
    x, y, places, factors = padded_rows(ROWS, [], 32, 256)
    assert y.tolist() == [-1] and len(x) == 1
    for f in (factors, None):
        loss = model(x, y, 'sum', places, f)
        loss.backward()
        assert loss.item() == 0 and all(p.grad.isfinite().all() and not p.grad.any() for p in model.parameters())


def test_factors_of_targets_that_do_not_count():
    torch.manual_seed(0)
    x, weight, y, f = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([3, -1, 4, -1, 0, 19]), torch.rand(6)
    expected = (F.cross_entropy(x @ weight.t(), y, reduction='none', ignore_index=-1) * f).sum()
    assert HeadLoss.apply(x, weight, y, False, f).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ranks_without_rows_do_not_hang_or_count(tune):
    """Two rows a step, four ranks: two of them have none; and an epoch whose last micro-batch is short."""
    args = ['--batch_size=2', '--max_steps=3', '--eval_answers=0', '--generate_interval=-1']
    a, b = tune(*args, '--log_dir=a').ok(), tune(*args, '--log_dir=b', ranks=4).ok()
    assert losses(b) == pytest.approx(losses(a), rel=2e-6)


def test_prompt_loss_weight_reaches_the_loss(tune):
    first = [losses(tune(f'--prompt_loss_weight={w}', f'--log_dir=w{w}', '--max_steps=1', '--eval_answers=0').ok())[0] for w in (0, 1)]
    assert first[0] != first[1]


# ---- answers
def test_prompts_of_different_length_are_answered_as_alone():
    model = tiny_gpt().eval()
    prompts = [[256, 1], [256, 5, 6, 7, 8, 9, 10], [256, 3, 3, 3]]
    width = max(map(len, prompts))
    idx = torch.tensor([p + [256] * (width - len(p)) for p in prompts])
    out = model.generate(idx, 40, temperature=0, eot=256, lengths=torch.tensor(list(map(len, prompts))))  # beyond block_size 32
    for p, together in zip(prompts, out.tolist(), strict=True):
        assert together[:len(p)] == p
        alone = model.generate(torch.tensor([p]), 20, temperature=0, eot=256)[0].tolist()  # while no row has slid
        assert together[len(p):len(p) + 20] == alone[len(p):]
    same = model.generate(torch.tensor([[256, 1], [256, 2]]), 12, temperature=0, lengths=torch.tensor([2, 2]))
    assert torch.equal(same, model.generate(torch.tensor([[256, 1], [256, 2]]), 12, temperature=0))


def test_a_row_that_ended_stays_ended_and_a_prompt_may_hold_end_of_text():
    model = tiny_gpt().eval()
    real = model.transformer.wte.weight.data
    real[7] = real.abs().max() * 50 * model.hidden(torch.tensor([[256, 1]]))[0, -1].sign()  # 7 is what follows 1
    out = model.generate(torch.tensor([[7, 1, 7, 7], [7, 7, 7, 1]]), 3, temperature=0, eot=7, lengths=torch.tensor([2, 4]))
    assert out[1, :4].tolist() == [7, 7, 7, 1] and out[0, 2].item() == 7 and set(out[0, 2:].tolist()) == {7}


def test_rouge_l_and_distinct_2_by_hand():
    assert rouge_l('the cat sat', 'The cat sat.') == 1 and rouge_l('', 'a') == rouge_l('b', 'a') == rouge_l('', '') == 0
    assert rouge_l('police kill the gunman', 'police killed the gunman') == pytest.approx(0.75)  # Lin 2004, section 3
    assert rouge_l('the gunman kill police', 'police killed the gunman') == pytest.approx(0.5)
    assert rouge_l('a b c d e', 'a x b') == pytest.approx(2 * 2 / 8)
    assert distinct_2(['a b a b', 'a b']) == pytest.approx(2 / 4) and distinct_2(['a', '']) == 0


def test_it_learns_to_answer_and_to_stop(tune):
    run = tune('--max_steps=300', '--batch_size=8', '--eval_interval=300', '--eval_answers=10', '--max_lr=1e-2', '--generate_interval=-1', '--max_new_tokens=20').ok()
    log = (run.cwd / 'logs_finetune/log.txt').read_text()
    found = {name: list(map(float, (before, after))) for name, before, after in re.findall(r'^(\S.*?) +(\d\.\d+) +(\d\.\d+)$', log, re.MULTILINE)}
    assert found['response loss, nats'][1] < 0.9 < 4 < found['response loss, nats'][0]
    assert found['end rate, sampled'][1] > 0.9 > 0.3 > found['end rate, sampled'][0]
    assert 'ROUGE-L, closed_qa' in found and 'distinct-2, greedy' in found and log.count('answer to: Why is the sky blue?') == 2


def test_generate_stops_at_end_of_text_and_uses_the_prompt(tune, tmp_path):
    tune('--max_steps=60', '--batch_size=8', '--eval_answers=0').ok()
    record = f'''
import model
real = model.GPT.generate
def generate(self, idx, *args, **kwargs):
    open({str(tmp_path / 'asked')!r}, 'w').write(repr(idx[0].tolist()))
    return real(self, idx, *args, **kwargs)
model.GPT.generate = generate
'''
    run = tune('--generate=Why?', '--context=Sky.', base=[], prelude=record).ok()
    assert '<|endoftext|>' not in run.out
    ids = json.loads((tmp_path / 'asked').read_text())
    assert ids[0] == 256 and load_tokenizer('bytes').decode(ids[1:]) == instruction_prompt('Why?', 'Sky.')
    assert tune('--generate=Why?', '--num_samples=3', base=[]).ok().out.count('----') == 2


def test_chat(tune, tmp_path):
    tune('--max_steps=2').ok()
    env = dict(os.environ, OMP_NUM_THREADS='1')
    out = subprocess.run([sys.executable, ROOT / 'finetune_dolly.py', '--chat', '--max_new_tokens=4'], input='Hello?\nAnd now?\n\nnot reached\n', text=True,
                         capture_output=True, cwd=tmp_path, env=env)
    assert out.returncode == 0 and out.stderr == '' and out.stdout.count('> ') == 3
    assert '--chat is for one process' in tune('--chat', base=[], ranks=2).one_line()
    assert 'give one' in tune('--chat', '--generate=a', base=[]).one_line()


def test_eval_only_tells_what_the_table_told(tune, tmp_path):
    run = tune('--max_steps=4').ok()
    tune('--eval_only', base=[]).ok()
    report = json.loads((tmp_path / 'logs_finetune/eval.json').read_text())
    assert report['step'] == 4 and report['val_rows'] == 10 and len(report['answers']) == 8
    for name, value in report['table'].items():
        assert re.search(rf'^{re.escape(name)} +\S+ +{value:.4f}$', run.out, re.MULTILINE), name
    two = tune('--eval_only', base=[], ranks=2).ok()
    assert json.loads((tmp_path / 'logs_finetune/eval.json').read_text())['table'] == pytest.approx(report['table'], rel=1e-6), two.out


# ---- the chain of beginnings
@pytest.fixture
def pretrained(launcher, tmp_path):
    """logs/ with a tiny model of bytes at steps 2 and 4, as train_gpt2.py leaves it."""
    from harness import TINY
    make_text_data(tmp_path / 'text')
    launcher.run('train_gpt2.py', [*TINY, '--data_root=text', '--block_size=48', '--total_batch_size=192', '--generate_interval=-1', '--dropout=0.1'], cwd=tmp_path).ok()
    return tmp_path / 'logs'


def test_the_newest_pretraining_checkpoint_by_number(tune, pretrained):
    base = ['--data_dir=data', '--max_steps=0', '--eval_answers=0']
    (pretrained / 'model_00004.pt').rename(pretrained / 'model_10000.pt')
    (pretrained / 'model_00002.pt').rename(pretrained / 'model_9900.pt')
    run = tune(base=base).ok()
    assert 'weights from logs/model_10000.pt' in run.out and 'forgetting is not measured' not in run.out and 'pretraining loss, nats' in run.out
    assert '2 layers, 4 heads, width 16, 48 positions, 320 ids' in run.out  # the checkpoint's own shape
    (pretrained / 'model_10000.pt').rename(pretrained / 'model_19072.pt')
    assert 'weights from logs/model_19072.pt' in tune('--log_dir=b', base=base).ok().out
    for path in pretrained.glob('model_[0-9]*'):
        path.unlink()
    run = tune('--log_dir=c', base=[*base, '--model=tiny', '--block_size=32']).ok()  # model_best.pt is there, and is not taken
    assert 'RANDOM INITIALISATION' in run.out and (pretrained / 'model_best.pt').exists()
    assert 'weights from logs/model_best.pt' in tune('--log_dir=d', '--pretrained_checkpoint=logs/model_best.pt', base=base).ok().out


def test_forgetting_is_the_loss_that_pretraining_reported(tune, pretrained):
    run = tune('--max_steps=0', '--eval_answers=0', '--forgetting_tokens=0', base=['--data_dir=data']).ok()
    told = float(re.search(r'pretraining loss, nats +([\d.]+)', run.out)[1])
    reported = load(pretrained / 'model_00004.pt')['val_loss']  # over val_tokens 256 of 2000; this one over all
    assert told == pytest.approx(reported, rel=0.1)
    rows = tune('--max_steps=0', '--eval_answers=0', '--forgetting_tokens=256', '--log_dir=b', base=['--data_dir=data']).ok()
    assert float(re.search(r'pretraining loss, nats +([\d.]+)', rows.out)[1]) == pytest.approx(reported, abs=6e-5)
    two = tune('--max_steps=0', '--eval_answers=0', '--forgetting_tokens=0', '--log_dir=c', base=['--data_dir=data'], ranks=2).ok()
    assert float(re.search(r'pretraining loss, nats +([\d.]+)', two.out)[1]) == told


def test_a_damaged_or_missing_pretrained_checkpoint_is_a_loud_warning(tune, pretrained):
    (pretrained / 'model_00004.pt').write_bytes((pretrained / 'model_00004.pt').read_bytes()[:-100])
    run = tune('--pretrained_checkpoint=logs/model_00004.pt').ok()
    assert run.out.count('RANDOM INITIALISATION') == 2 and 'logs/model_00004.pt' in run.out
    run = tune('--pretrained_checkpoint=log/model_00002.pt', '--log_dir=b').ok()
    assert 'RANDOM INITIALISATION' in run.out and re.search('log/model_00002.pt .*; there is .*logs/model_00002.pt', run.out)


def test_a_shape_that_contradicts_the_checkpoint(tune, pretrained):
    assert '--n_embd=32 is not that of logs/model_00004.pt: 16' in tune('--n_embd=32', base=['--data_dir=data']).one_line()


def test_the_tokens_must_be_the_models(tune, pretrained, tmp_path):
    make_rows_data(tmp_path / 'gpt2_rows', eot=50256)
    assert 'trained on bytes tokens, gpt2_rows holds gpt2' in tune('--data_dir=gpt2_rows', base=[]).one_line()


def test_an_exported_folder_and_export(tune, launcher, pretrained, tmp_path):
    launcher.run('train_gpt2.py', ['--export=exported', '--checkpoint_path=logs/model_00004.pt'], cwd=tmp_path).ok()
    base = ['--data_dir=data', '--max_steps=2', '--eval_answers=0', '--warmup_steps=0']
    a = tune('--log_dir=a', '--pretrained_checkpoint=exported', base=base).ok()
    b = tune('--log_dir=b', '--pretrained_checkpoint=logs/model_00004.pt', '--forgetting_root=', base=base).ok()
    val = [[float(v) for v in re.findall(r'\| val loss ([\d.]+)', run.out)] for run in (a, b)]
    assert val[0] == pytest.approx(val[1], abs=0.02) and 'weights from exported' in a.out  # the padding of the vocabulary is new
    transformers = pytest.importorskip('transformers')
    tune('--export=out', '--checkpoint_path=a/model_00002.pt', base=[]).ok()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out').eval()
    ours, x = GPT.from_pretrained(str(tmp_path / 'a/model_00002.pt')).eval(), torch.randint(256, (2, 20))
    assert (ours(x)[..., :257] - theirs(x).logits).abs().max() < 1e-5
    assert 'val loss' in tune('--eval_only', '--pretrained_checkpoint=exported', '--eval_answers=0', base=['--data_dir=data']).ok().out


# ---- length of a run
@pytest.mark.parametrize('epochs, accumulation, steps', [(0.3, 1, 8), (0.5, 1, 13), (1, 1, 25), (2, 1, 50), (1, 10, 3)])
def test_strategies(tune, epochs, accumulation, steps):
    base = [word for word in TINY if not word.startswith('--max_steps')]
    run = tune(f'--num_epochs={epochs}', f'--grad_accumulation_steps={accumulation}', '--eval_interval=-1', '--generate_interval=-1', '--eval_answers=0', base=base).ok()
    assert f'{steps} steps of {accumulation} x 4 rows' in run.out and f'step {steps}/{steps} | val loss' in run.out


def test_every_row_is_trained_once_an_epoch(tune, tmp_path):
    record = f'''
import model
real = model.padded_rows
def padded_rows(rows, chosen, *args):
    if len(rows['prompt']) == 100:
        open({str(tmp_path / 'rows')!r}, 'a').write(' '.join(map(str, chosen)) + '\\n')
    return real(rows, chosen, *args)
model.padded_rows = padded_rows
'''
    tune('--batch_size=3', '--max_steps=68', '--eval_interval=-1', '--eval_answers=0', '--num_workers=0', '--checkpoint_interval=-1', '--generate_interval=-1', prelude=record).ok()
    seen = [int(r) for r in (tmp_path / 'rows').read_text().split()]
    assert sorted(seen[:100]) == list(range(100)) == sorted(seen[100:]) and seen[:100] != seen[100:]


def test_a_resume_with_another_batch_size_goes_on_at_the_same_share(tune):
    tune('--max_steps=10', '--checkpoint_interval=10').ok()
    run = tune('--auto_resume', '--batch_size=2', '--max_steps=12', base=[]).ok()
    assert 'continuing at micro-batch 20 of 50 of epoch 0' in run.out and 'batch_size 4 -> 2' in run.out
    assert load(run.cwd / 'logs_finetune/model_00012.pt')['train_loader_state']['micro_batch'] == 22


# ---- the warning
WARNING = 'Warning: Overfitting detected'


def test_the_overfitting_warning(tune, launcher, tmp_path):
    """Rows whose responses are noise: they can only be learned by heart. And rows with a rule: the warning must stay away."""
    rng = np.random.default_rng(0)
    for path in make_rows_data(tmp_path / 'noise', rows=16).glob('*.npz'):
        arrays = dict(np.load(path))
        words = arrays['tokens'] != 256
        arrays['tokens'][words] = rng.integers(65, 90, words.sum())
        np.savez(path, **arrays)
    args = ['--max_steps=200', '--eval_interval=20', '--generate_interval=-1', '--eval_answers=0', '--checkpoint_interval=100', '--n_embd=32', '--batch_size=8']
    run = tune('--data_dir=noise', '--log_dir=a', *args).ok()
    assert WARNING in run.out
    at = int(re.search(r'step (\d+)/200 \| val loss [\d.]+\n' + WARNING, run.out)[1])
    val = {int(s): float(v) for s, v in re.findall(r'step (\d+)/200 \| val loss ([\d.]+)', run.out)}
    assert val[at] > min(v for s, v in val.items() if s < at)
    make_rows_data(tmp_path / 'rule', rows=400)
    assert WARNING not in tune('--data_dir=rule', '--log_dir=b', *args, '--max_lr=2e-3').ok().out
    for path in (tmp_path / 'a').glob('model_00200.pt'):  # the warning's memory is in the checkpoint
        path.unlink()
    tune('--auto_resume', '--log_dir=a', base=[]).ok()
    launcher.run('finetune_dolly.py', [*TINY, '--data_dir=noise', '--log_dir=c', *args], cwd=tmp_path).ok()
    assert clean_log(tmp_path / 'a/log.txt') == clean_log(tmp_path / 'c/log.txt')


# ---- the guides
def guide_lines():
    text = re.sub(r'\\\n\s*', '', GUIDES)
    return [line for line in text.splitlines() if 'finetune_dolly.py' in line]


@pytest.mark.parametrize('line', guide_lines())
def test_a_guides_command_runs(launcher, pretrained, tmp_path, line):
    words = shlex.split(line)
    args = words[words.index('finetune_dolly.py') + 1:]
    if '--help' in args:
        out = subprocess.run([sys.executable, ROOT / 'finetune_dolly.py', '--help'], capture_output=True, text=True, cwd=tmp_path)
        return print(out) if out.returncode == 0 and '--prompt_loss_weight' in out.stdout else pytest.fail(out.stderr)
    make_rows_data(tmp_path / 'dolly15k')
    ranks = 4 if words[0] == 'torchrun' else 0
    if '--pretrained_checkpoint' in args:
        path = tmp_path / args[args.index('--pretrained_checkpoint') + 1]
        path.parent.mkdir(exist_ok=True)
        (pretrained / 'model_00004.pt').rename(path)
    small = ['--max_new_tokens=4', '--eval_answers=1']
    if '--checkpoint_path' in args:  # an earlier run wrote it
        launcher.run('finetune_dolly.py', [*small, '--max_steps=2', '--checkpoint_interval=2'], cwd=tmp_path).ok()
        path = tmp_path / args[args.index('--checkpoint_path') + 1]
        step = int(re.search(r'\d+', path.name)[0])
        torch.save(dict(load(tmp_path / 'logs_finetune/model_00002.pt'), step=step), path)
        (tmp_path / 'logs_finetune/model_00002.pt').unlink()
        small.append(f'--max_steps={step + 2}')
    elif '--max_steps 6' not in line:
        small.append('--max_steps=3')
    run = launcher.run('finetune_dolly.py', [*args, *small], cwd=tmp_path, ranks=ranks, timeout=120).ok()
    assert 'done: best val loss' in run.out and 'RANDOM' not in run.out and math.isfinite(losses(run)[0])
    if '--max_lr' in args and '--resume' in args:
        assert f'max_lr 6e-05 -> {float(args[args.index("--max_lr") + 1])}' in run.out


# ---- found by reading
def test_config_py_repeats_a_run_that_took_the_newest_checkpoint(tune, pretrained, tmp_path):
    base = ['--max_new_tokens=4', '--eval_answers=1']
    tune('--max_steps=3', '--data_dir=data', base=base).ok()
    (pretrained / 'model_19072.pt').write_bytes((pretrained / 'model_00002.pt').read_bytes())  # what an untyped launch would take now
    run = tune('logs_finetune/config.py', '--log_dir=b', base=[]).ok()
    assert 'weights from logs/model_00004.pt' in run.out
    assert clean_log(tmp_path / 'logs_finetune/log.txt') == clean_log(tmp_path / 'b/log.txt')
    tune('logs_finetune/config.py', '--eval_only', base=[]).ok()  # the finetuned one, not that where it began
    assert json.loads((tmp_path / 'logs_finetune/eval.json').read_text())['checkpoint'] == 'logs_finetune/model_00003.pt'


def test_a_checkpoint_of_pretraining_is_weights_here(tune, launcher, pretrained, tmp_path):
    base = ['--data_dir=data', '--eval_answers=0']
    tune('--eval_only', '--pretrained_checkpoint=logs/model_00004.pt', '--block_size=40', base=base).ok()
    report = json.loads((tmp_path / 'logs_finetune/eval.json').read_text())
    assert report['step'] == 0 and report['checkpoint'] == 'logs/model_00004.pt' and 'pretraining loss, nats' in report['table']
    run = tune('--resume', '--checkpoint_path=logs/model_00004.pt', '--log_dir=b', '--max_steps=1', base=base).ok()
    assert 'holds weights only' in run.out and 'step 1/1 | val loss' in run.out
    assert f'| val loss {report["val_loss"]:.4f}' in tune('--max_steps=0', '--block_size=40', '--log_dir=c', base=base).ok().out


def test_the_one_before_if_the_newest_pretrained_is_damaged(tune, pretrained):
    (pretrained / 'model_00004.pt').write_bytes(b'x')
    run = tune('--max_steps=0', base=['--data_dir=data', '--eval_answers=0']).ok()
    assert 'weights from logs/model_00002.pt' in run.out and 'WARNING: the pretrained checkpoint cannot be used: logs/model_00004.pt' in run.out


def test_rows_prepared_anew_are_refused_on_resume(tune, tmp_path):
    tune().ok()
    make_rows_data(tmp_path / 'data', seed=1)  # the same names, the same number of rows
    assert 'the data in data changed since, its files' in tune('--auto_resume', '--max_steps=6', base=[]).one_line()


def test_prepare_leaves_foreign_files_alone(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/mine.npz').write_bytes(b'mine')
    one_line(prepare(tmp_path, rows=[row(i) for i in range(60)]), 'out/mine.npz was not written by this script')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine.npz']


def test_a_missing_file_of_rows_is_noticed(tune, tmp_path):
    assert prepare(tmp_path, '--shard_size=3000', rows=[row(i) for i in range(100)])[0] == 0
    assert len(open_rows(str(tmp_path / 'out'), 1024)[0]['prompt']) == 96
    (tmp_path / 'out/dolly_train_000002.npz').unlink()
    assert 'manifest.json: it lists' in tune('--data_dir=out').one_line()


def test_a_flag_that_says_encrypted(tune, tmp_path):
    path = tmp_path / 'data/x_train_000001.npz'
    content = bytearray(path.read_bytes())
    content[content.rindex(b'PK\x01\x02') + 8] |= 1
    path.write_bytes(content)
    assert 'x_train_000001.npz' in tune().one_line()


@pytest.mark.parametrize('change', [dict(tokenizer='foo'), dict(tokenizer=None), dict(tokenizer={}), dict(before={'response loss, nats': 'x'}), dict(before=3),
                                    dict(answers_before={0: 5}), dict(train_loader_state={'micro_batch': -1}), dict(train_loader_state=3)], ids=str)
def test_a_hostile_checkpoint_ends_in_one_line(tune, change):
    run = tune().ok()
    path = run.cwd / 'logs_finetune/model_00004.pt'
    torch.save({**load(path), **change}, path)
    run = tune('--resume', f'--checkpoint_path={path}', '--max_steps=6', '--log_dir=b')
    if run.codes == [0]:  # without its data position it is no checkpoint of finetuning, and its weights are used
        assert change == dict(train_loader_state=3) and 'holds weights only' in run.out and run.err == ''
    else:
        run.one_line()


def test_chat_hears_sigterm(tune, tmp_path):
    tune('--max_steps=2').ok()
    process = subprocess.Popen([sys.executable, ROOT / 'finetune_dolly.py', '--chat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    while b'an empty line ends' not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -15


@pytest.mark.parametrize('size, last', [(2, 40), (8, 18)])
def test_num_epochs_holds_when_the_batch_changes(tune, size, last):
    """10 steps of 4 of 100 rows, then the other 60 rows in steps of another size."""
    base = [word for word in TINY if not word.startswith('--max_steps')]
    tune('--eval_answers=0', '--checkpoint_interval=10', prelude='''
import model, os, signal
real, calls = model.GPT.forward, []
def forward(self, *args, **kwargs):
    calls.append(self.training)
    if sum(calls) == 11: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)
model.GPT.forward = forward
''', base=base)
    run = tune('--auto_resume', f'--batch_size={size}', base=[]).ok()
    assert f'step {last}/{last} | val loss' in run.out


def test_num_epochs_beside_max_steps(tune):
    assert 'give one' in tune('--num_epochs=2').one_line()
    tune('--max_steps=2').ok()
    assert 'step 50/50 | val loss' in tune('--auto_resume', '--num_epochs=2', '--eval_answers=0', base=[]).ok().out
    assert 'is at step 50, beyond max_steps 25' in tune('--auto_resume', '--num_epochs=1', base=[]).one_line()


def test_no_alarm_before_there_is_something_to_compare_with(tune):
    run = tune('--max_lr=1', '--warmup_steps=0', '--grad_clip=0', '--max_steps=2').ok()
    val = [float(v) for v in re.findall(r'\| val loss ([\d.]+)', run.out)]
    assert val[1] > val[0] and WARNING not in run.out


def test_forgetting_folders(tune, pretrained, tmp_path):
    base = ['--data_dir=data', '--eval_answers=0', '--max_steps=1']
    assert 'pretraining loss' in tune('--forgetting_root=auto', base=base).ok().out
    assert 'not measured' in tune('--forgetting_root=', '--log_dir=b', base=base).ok().out
    assert '--forgetting_root=, it is not measured' in tune('--forgetting_root=nowhere', '--log_dir=c', base=base).one_line()
    (tmp_path / 'text').rename(tmp_path / 'moved')  # after the run began
    assert 'WARNING: forgetting is not measured: text is no folder' in tune('--auto_resume', '--max_steps=2', base=[]).ok().out


def test_settings_at_their_limits(tune):
    tune('--seed=9000000000000000000', '--max_steps=1').ok()
    tune('--generate=a', '--temperature=1e-45', base=[]).ok()
    assert '--context belongs to --generate' in tune('--context=a', base=[]).one_line()


def test_ranks_must_see_the_same_checkpoint(tune, pretrained):
    prelude = '''
import os, model
if os.environ['RANK'] == '1':
    real = model.find_gpt
    def find_gpt(source):
        raise OSError('not on this node')
    model.find_gpt = find_gpt
'''
    assert 'the ranks differ: ' in tune(base=['--data_dir=data'], ranks=2, prelude=prelude).one_line()


@pytest.mark.parametrize('missing', [False, True])
def test_ranks_with_other_pretraining_shards_end(tune, pretrained, tmp_path, missing):
    """Of the same name, but shorter on rank 1: it would take fewer turns than the others wait for. Or none at all."""
    shutil.copytree(tmp_path / 'data', tmp_path / 'other/data')
    shutil.copytree(tmp_path / 'logs', tmp_path / 'other/logs')
    if not missing:
        make_text_data(tmp_path / 'other/text', tokens=300)
    run = tune('--forgetting_root=text', ranks=2, base=['--data_dir=data', '--eval_answers=0', '--max_steps=1'], prelude="import os; os.environ['RANK'] == '1' and os.chdir('other')")
    assert ('--forgetting_root: ' if missing else 'must be the same on all nodes') in run.one_line()
