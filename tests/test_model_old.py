"""The old mechanics in model.py that the four other scripts still use: their files, weights, optimizers.

Their runs as a whole are in test_reliability_old.py; this goes when the last of them is rewritten."""
import copy
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import differences, make_text_data, write_shard
from safetensors.torch import load_file, save_file

import model
from model import (GPT, TOKENIZERS, GPTConfig, ahead, export_files, find_gpt, fit_weights, newest,
                   open_shards, read_gpt, read_whole, shard_rows)

X = torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(5))

def random_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)
    net = GPT(GPTConfig(**{**shape, **changes}))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.eval()

class Bomb:
    """Unpickling it writes a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')

# ---- small things
def test_the_newest_of_files_that_vanish(tmp_path):
    for age, name in enumerate('abc'):
        (tmp_path / name).write_text('')
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest([tmp_path / 'c', tmp_path / 'gone', tmp_path / 'b']) == tmp_path / 'b'
    assert newest([]) == '' == newest([tmp_path / 'gone'])

@pytest.mark.parametrize('count', [0, 1, 4, 10])
def test_batches_come_in_order_and_so_many_ahead(count):
    begun, turns = [], [(step, micro_step) for step in range(3) for micro_step in range(2)]

    def batch(step, micro_step):
        begun.append((step, micro_step))
        if step == 3:
            raise ValueError('a bad row')
        return 10 * step + micro_step
    batches = ahead(batch, turns, count)
    found = [next(batches)]
    assert len(begun) <= count + 1
    assert found + list(batches) == [0, 1, 10, 11, 20, 21] and begun == turns
    with pytest.raises(ValueError, match='a bad row'):
        list(ahead(batch, [(2, 0), (3, 0)], count))

def test_more_ranks_than_gpus_are_said_by_the_first(monkeypatch, capsys):
    there = dict(is_available=lambda: True, device_count=lambda: 4, set_device=lambda device: None)
    for name, value in there.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in dict(LOCAL_RANK='0', LOCAL_WORLD_SIZE='4').items():
        monkeypatch.setenv(name, value)
    assert model.find_device('', 3) == 'cuda:3' and model.find_device('cuda:1') == 'cuda:1'
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    with pytest.raises(SystemExit):
        model.find_device('cuda', 0)
    assert capsys.readouterr().err == 'no device cuda:7: this machine has 4 GPU(s)\n'

# ---- shards of tokens
def test_rows_of_shards(tmp_path):
    make_text_data(tmp_path / 'd', tokens=100)
    write_shard(tmp_path / 'd/x_train_000003.bin', [1] * 3)  # a short last one is no error
    train, val, tokenizer = open_shards(str(tmp_path / 'd'), 16)
    assert list(train)[:2] == ['x_train_000001.bin', 'x_train_000002.bin']
    assert list(val) == ['x_val_000000.bin'] and tokenizer['eot'] == 256
    flat = [np.asarray(tokens) for tokens in train.values()]
    rows = shard_rows(train, 16, range(8 + 10))  # (137 - 1) // 16 rows, then (174 - 1) // 16
    assert rows.shape == (18, 17) and rows.dtype == torch.int64
    assert np.array_equal(rows[7], flat[0][112:129])
    assert np.array_equal(rows[8], flat[1][:17]) and np.array_equal(rows[17], flat[1][144:161])

def test_npy_shards_are_read_and_other_arrays_refused_unexecuted(tmp_path):
    for name in ('a_train.npy', 'a_val.npy'):
        np.save(tmp_path / name, np.arange(100, dtype=np.uint16))
    train, _, tokenizer = open_shards(str(tmp_path), 16)
    assert tokenizer['tokenizer'] == 'gpt2' and shard_rows(train, 16, [1])[0].tolist() == list(range(16, 33))
    for array in (np.arange(100), np.zeros((4, 100), np.uint16), np.zeros(3, np.uint16),
                  np.array([Bomb(tmp_path / 'boom')], dtype=object)):
        np.save(tmp_path / 'a_train.npy', array, allow_pickle=True)
        with pytest.raises(ValueError, match='a_train.npy'):
            open_shards(str(tmp_path), 16)
    assert not (tmp_path / 'boom').exists()

@pytest.mark.parametrize('name', ['x_val_000000.bin', 'x_train_000002.bin'])
@pytest.mark.parametrize('said, change', [
    ('bytes long', lambda data: data[:-3]), ('bytes long', lambda data: data + b'x'),
    ('token 20 is 65535', lambda data: data[:1064] + b'\xff\xff' + data[1066:]),
    ('header', lambda data: b''), ('holds no tokens', lambda data: data[:8] + bytes(1016)),
    ('header', lambda data: b'\0' + data[1:]), ('header', lambda data: data[:500])])
def test_damaged_shards_are_named(tmp_path, name, said, change):
    path = make_text_data(tmp_path / 'd') / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f'{name}: .*{said}'):
        open_shards(str(tmp_path / 'd'), 16)

@pytest.mark.parametrize('manifest', [
    '', '[]', '{', '{"tokenizer": "gpt2"}', '[' * 100000, '3',
    '{"tokenizer": "bytes", "vocab_size": 70000, "eot": 256}',
    '{"tokenizer": "bytes", "vocab_size": "257", "eot": 256}'])
def test_damaged_manifests_are_named(tmp_path, manifest):
    (make_text_data(tmp_path / 'd') / 'manifest.json').write_text(manifest)
    with pytest.raises(ValueError, match='manifest.json'):
        open_shards(str(tmp_path / 'd'), 16)

def test_missing_shards_are_said(tmp_path):
    with pytest.raises(ValueError, match='folder'):
        open_shards(str(tmp_path / 'none'), 16)
    write_shard(tmp_path / 'only_train.bin', [1] * 100)
    with pytest.raises(ValueError, match='needs a validation and a training shard'):
        open_shards(str(tmp_path), 16)
    write_shard(tmp_path / 'val.bin', [1] * 16)
    with pytest.raises(ValueError, match='val.bin hold no row of 16'):
        open_shards(str(tmp_path), 16)
    (tmp_path / 'pieces').mkdir()
    with pytest.raises(ValueError, match='half made'):
        open_shards(str(tmp_path), 16)

# ---- files of torch.save
def a_file(path):
    torch.save({'model': {'w': torch.arange(500.0), 'b': torch.zeros(3, dtype=torch.bfloat16)},
                'step': 3, 'names': ['a', (1, None)]}, path)
    return path

def test_whole_files_are_read(tmp_path):
    content = read_whole(str(a_file(tmp_path / 'a.pt')))
    assert torch.equal(content['model']['w'], torch.arange(500.0)) and content['names'] == ['a', (1, None)]
    (tmp_path / 'a.json').write_text(json.dumps({'a': 1}))
    assert read_whole(str(tmp_path / 'a.json')) == {'a': 1}
    with pytest.raises(FileNotFoundError):
        read_whole(str(tmp_path / 'none.pt'))

def test_nothing_in_a_file_is_executed_and_nothing_claims_more_than_it_brings(tmp_path):
    torch.save({'model': Bomb(tmp_path / 'boom')}, tmp_path / 'zip.pt')
    torch.save({'model': Bomb(tmp_path / 'boom')}, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    (tmp_path / 'raw.pt').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
    torch.save({'w': torch.zeros(1).expand(10 ** 6, 10 ** 6)}, tmp_path / 'large.pt')
    for name in ('zip.pt', 'old.pt', 'raw.pt', 'large.pt'):
        with pytest.raises(ValueError):
            read_whole(str(tmp_path / name))
    assert not (tmp_path / 'boom').exists()

def test_damaged_files_are_refused_or_harmless(tmp_path, fuzz):
    """Truncated, flipped, overwritten, removed: a ValueError, or exactly what was written."""
    data, rng = a_file(tmp_path / 'a.pt').read_bytes(), random.Random(0)
    expected, path, refused = read_whole(str(tmp_path / 'a.pt')), tmp_path / 'b.pt', 0
    for i in range(fuzz):
        damaged, at = bytearray(data), rng.randrange(len(data))
        if i % 4 == 0:
            del damaged[at:]
        elif i % 4 == 1:
            damaged[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 2:
            damaged[at:at + 50] = rng.randbytes(50)
        else:
            del damaged[at:at + rng.randrange(1, 100)]
        path.write_bytes(bytes(damaged))
        try:
            content = read_whole(str(path))
            assert torch.equal(content['model']['w'], expected['model']['w']) and content['step'] == 3, i
        except ValueError:
            refused += 1
    assert refused > fuzz / 2

def test_every_bit_of_the_tensor_data_counts(tmp_path):
    path = a_file(tmp_path / 'a.pt')
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.file_size == 2000)
    data = path.read_bytes()
    begin = data.index(torch.arange(500.0).numpy().tobytes(), info.header_offset)
    for offset in (0, 777, 1999):
        damaged = bytearray(data)
        damaged[begin + offset] ^= 1
        path.write_bytes(bytes(damaged))
        assert torch.load(path, weights_only=True) is not None  # PyTorch itself does not notice
        with pytest.raises(ValueError, match='damaged'):
            read_whole(str(path))

# ---- optimizers by name
@pytest.mark.parametrize('kind, settings', [
    ('SGD', dict(momentum=0.9)), ('Adafactor', {}), ('RMSprop', dict(momentum=0.9))])
def test_another_optimizer_is_resumed_and_not_taken_for_another_kind(kind, settings):
    config = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)
    nets = [GPT(config) for _ in range(2)]
    first, second = ([getattr(torch.optim, kind)(net.parameters(), lr=0.1, **settings)] for net in nets)

    def step(net, optimizers):
        net.zero_grad()
        net(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
        optimizers[0].step()
    step(nets[0], first)
    stored = copy.deepcopy(model.optimizer_state(nets[0], first))  # as from a file
    model.load_optimizer_state(nets[1], second, stored)
    nets[1].load_state_dict(nets[0].state_dict())
    step(nets[0], first)
    step(nets[1], second)
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))
    adam = model.make_optimizers(nets[1], 'adamw', 0.1, 0.0, (0.9, 0.99))
    for there, here in ((stored, adam), (model.optimizer_state(nets[1], adam), second)):
        with pytest.raises(ValueError, match=f'is not that of {type(here[0]).__name__}'):
            model.load_optimizer_state(nets[1], here, there)

# ---- GPT-2 weights, as finetune_dolly.py reads them
def test_other_vocabularies_and_lengths():
    ours, longer = random_gpt(), random_gpt(block_size=16, vocab_size=128)
    longer.load_state_dict(fit_weights(ours.state_dict(), 16, 128, 96))
    logits = longer(X[:, :16])
    assert torch.allclose(logits[..., :96], ours(X[:, :16]), atol=1e-6)
    new = logits[..., :96].mean(-1, keepdim=True).expand(-1, -1, 32)
    assert torch.allclose(logits[..., 96:], new, atol=1e-4)
    for wrong, said in (((64, 128, 96), 'positions'), ((16, 128, 97), 'ids')):
        with pytest.raises(ValueError, match=said):
            fit_weights(ours.state_dict(), *wrong)

@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_bare_and_prefixed_state_dicts(tmp_path, prefix):
    ours = random_gpt()
    torch.save({prefix + name: p for name, p in ours.state_dict().items()}, tmp_path / 'a.pt')
    found = read_gpt(str(tmp_path / 'a.pt'))
    assert not differences(found['model'], dict(ours.state_dict())) and 'n_head' not in found['config']

def test_nanogpts_checkpoints_and_what_is_exported_are_read(tmp_path):
    folder = Path(__file__).parent / 'files'
    expected = torch.load(folder / 'nanogpt_logits.pt', weights_only=True)
    for name in ('nanogpt.pt', 'nanogpt_nobias.pt'):
        found = read_gpt(str(folder / name))
        net = GPT(GPTConfig(**found['config'])).eval()
        net.load_state_dict(found['model'])
        assert (net(expected['x']) - expected[name]).abs().max() < 1e-5
    ours = random_gpt(vocab_size=320, activation='gelu')
    for name, content in export_files(ours.state_dict(), ours.config, TOKENIZERS['bytes']).items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name).write_bytes(data)
    back = read_gpt(str(tmp_path))
    shape = dict(block_size=32, vocab_size=257, n_layer=2, n_embd=32, n_head=4, activation='gelu')
    assert back['config'] == shape
    weights = dict(ours.state_dict())
    weights['transformer.wte.weight'] = weights['transformer.wte.weight'][:257]
    assert not differences(back['model'], weights)

def test_hostile_folders_are_refused(tmp_path):
    good, ours = tmp_path / 'good', random_gpt(vocab_size=257)
    good.mkdir()
    for name, content in export_files(ours.state_dict(), ours.config, TOKENIZERS['bytes']).items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (good / name).write_bytes(data)
    weights, config = load_file(good / 'model.safetensors'), json.loads((good / 'config.json').read_text())
    data = (good / 'model.safetensors').read_bytes()

    def saved(**changes):
        return lambda folder: save_file({**weights, **changes}, folder / 'model.safetensors')

    def said(**changes):
        return lambda folder: (folder / 'config.json').write_text(json.dumps({**config, **changes}))
    for i, (words, change) in enumerate((
            ('lacks config.json', lambda folder: (folder / 'config.json').unlink()),
            ('lacks model.safetensors', lambda folder: (folder / 'model.safetensors').unlink()),
            ('.', lambda folder: (folder / 'model.safetensors').write_bytes(data[:-100])),
            ('.', lambda folder: (folder / 'config.json').write_text('{')),
            ('model_type', said(model_type='llama')),
            ('activation_function', said(activation_function='relu')),
            ('layer_norm_epsilon', said(layer_norm_epsilon=1e-6)), ('n_head', said(n_head=5)),
            ('n_head', said(n_head='4')), ('lm_head', saved(**{'lm_head.weight': torch.zeros(257, 32)})),
            ('extra', saved(**{'transformer.extra': torch.zeros(9)})),
            ('c_fc', saved(**{'transformer.h.0.mlp.c_fc.weight': torch.zeros(32, 64)})),
            ('no GPT-2 weights',
             lambda folder: save_file({'a': torch.zeros(3)}, folder / 'model.safetensors')))):
        folder = tmp_path / f'bad{i}'
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(ValueError, match=words):
            read_gpt(str(folder))

def test_names_of_the_hub_and_what_lies_here(tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    asked = []

    def snapshot_download(repository, allow_patterns=()):
        asked.append(repository)
        if 'medium' in repository:
            raise ConnectionError('no network')
        return str(tmp_path)
    monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert find_gpt('gpt2') == str(tmp_path) and find_gpt('some/model') == str(tmp_path)
    assert asked == ['openai-community/gpt2', 'some/model']
    with pytest.raises(OSError, match='gpt2-medium was not downloaded.*no network'):
        find_gpt('gpt2-medium')
    for name in ('nowhere', 'a/b/c', 'missing.pt'):
        with pytest.raises(OSError, match='no model of the hub'):
            find_gpt(name)
    os.mkdir('gpt2')  # what lies here comes first
    assert find_gpt('gpt2') == 'gpt2'

def test_another_activation_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(model.ACTIVATIONS, 'relu2', lambda x: x.relu() ** 2)
    net = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8, activation='relu2'))
    torch.save(dict(model=net.state_dict(), config=dict(n_head=2, activation='relu2')), tmp_path / 'a.pt')
    assert read_gpt(str(tmp_path / 'a.pt'))['config']['activation'] == 'relu2'
    monkeypatch.delitem(model.ACTIVATIONS, 'relu2')
    with pytest.raises(ValueError, match='relu2'):
        read_gpt(str(tmp_path / 'a.pt'))
