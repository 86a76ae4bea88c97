"""model.py: equality with the published GPT-2, the loss without logits, generation, tokenizers, and every file it reads."""
import copy
import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import make_text_data, write_shard

import model
from model import GELU, GPT, GPT_SIZES, GPTConfig, HeadLoss, ahead, load_tokenizer, newest, open_shards, read_whole, shard_rows

SMALL = GPTConfig(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=32)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL.__dict__, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)  # biases and norms too: a zero hides mistakes
    return model


# ---- equality with transformers
def test_parity_with_transformers():
    transformers = pytest.importorskip('transformers')
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0))
    ours, linear = small(), ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    weights = {name: w.t() if name.endswith(linear) else w for name, w in ours.state_dict().items()}  # Conv1D is (in, out)
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ['lm_head.weight'] and not missing.unexpected_keys
    x, y = torch.randint(96, (2, 3, 32))
    logits = theirs(x).logits
    assert (ours(x) - logits).abs().max() < 1e-5
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert abs(ours(x, y) - loss) < 1e-5
    loss.backward()
    ours(x, y).backward()
    for name, p in theirs.named_parameters():
        gradient = dict(ours.named_parameters())[name].grad
        assert (p.grad - (gradient.t() if name.endswith(linear) else gradient)).abs().max() < 1e-5, name


@pytest.mark.parametrize('name, parameters', [('gpt2', 124_439_808), ('gpt2-medium', 354_823_168), ('gpt2-large', 774_030_080), ('gpt2-xl', 1_557_611_200)])
def test_sizes_are_the_published_ones(name, parameters):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257, **GPT_SIZES[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_flops_per_token():
    with torch.device('meta'):
        model = GPT(GPTConfig(**GPT_SIZES['gpt2']))
    assert model.flops_per_token(1024) == pytest.approx(855.4e6, rel=1e-4)


def test_initialisation():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02 / 4 if name.endswith('c_proj.weight') else 0.02, rel=0.1), name
        else:
            assert (p == (1 if name.endswith('weight') else 0)).all(), name


def test_gelu_is_the_tanh_approximation():
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4001, dtype=torch.float64)
    ours, theirs = GELU.apply(x), F.gelu(x, approximate='tanh')
    assert (ours - theirs).abs().max() < 1e-14
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    far = torch.tensor([-1e18, -1e4, 1e4], requires_grad=True)
    GELU.apply(far).sum().backward()
    assert far.grad.tolist() == [0, 0, 1]


def test_the_newest_of_files_that_vanish(tmp_path):
    for age, name in enumerate('abc'):
        (tmp_path / name).write_text('')
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest([tmp_path / 'c', tmp_path / 'gone', tmp_path / 'b']) == tmp_path / 'b' and newest([]) == '' == newest([tmp_path / 'gone'])


# ---- loss
@pytest.mark.parametrize('rows, slices', [(1, 5), (20, 3), (70, 1)])  # of at least 16 rows, the last one shorter
def test_loss_is_cross_entropy_without_the_logits(rows, slices, monkeypatch):
    """In slices of any size, with targets that do not count, in float64 to the last digits."""
    torch.manual_seed(0)
    x, w = torch.randn(70, 8, dtype=torch.float64, requires_grad=True), torch.randn(96, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(96, (70,))
    targets[::5] = -1
    monkeypatch.setattr('model.LOGITS_AT_ONCE', rows * 96)
    products, mm = [], torch.mm
    monkeypatch.setattr('torch.mm', lambda *args, **kwargs: products.append(1) or mm(*args, **kwargs))
    loss = HeadLoss.apply(x, w, targets, True) * 3
    assert len(products) == 2 * slices  # each with its logits and a gradient
    expected = F.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction='sum') * 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_reductions_and_masks():
    model = small()
    x, y = torch.randint(96, (2, 3, 32))
    per_token = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='none')
    assert model(x, y).item() == pytest.approx(per_token.mean().item(), rel=1e-6)
    assert model(x, y, 'sum').item() == pytest.approx(per_token.sum().item(), rel=1e-6)
    y[:, 5:] = -1
    assert model(x, y).item() == pytest.approx(per_token.view(3, 32)[:, :5].mean().item(), rel=1e-6)
    loss = model(x, torch.full_like(y, -1), 'sum')
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    with torch.no_grad():
        assert model(x, y).item() == pytest.approx(per_token.view(3, 32)[:, :5].mean().item(), rel=1e-6)


def test_loss_refuses_a_second_backward():
    model = small()
    x, y = torch.randint(96, (2, 3, 32))
    loss = model(x, y)
    loss.backward(retain_graph=True)
    with pytest.raises((TypeError, RuntimeError)):
        loss.backward()


@pytest.mark.parametrize('compile', [GPT.compile, torch.nn.Module.compile])  # on a CPU without the head, elsewhere all
def test_a_training_step_is_one_graph_for_torch_compile(compile):
    model, compiled = small(), small()
    compile(compiled, fullgraph=True, backend='eager')  # a graph break would be an error
    x, y = torch.randint(96, (2, 3, 32))
    for m in (model, compiled):
        m(x, y, 'sum').backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_too_long_a_sequence_is_said():
    with pytest.raises(AssertionError, match='block_size is 32'):
        small()(torch.zeros(1, 33, dtype=torch.long))


# ---- generation
def test_cached_generation_equals_whole_forwards():
    model = small()
    x = torch.randint(96, (3, 5))
    expected = x
    for _ in range(27):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(x, 27, temperature=0), expected)
    cache, whole = {}, model.hidden(expected)
    parts = [model.hidden(part, cache) for part in expected.split((4, 1, 9, 18), 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_generation_beyond_the_block_and_from_a_long_prompt():
    model = small()
    out = model.generate(torch.randint(96, (2, 50)), 70, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert out.shape == (2, 120)


def test_generation_draws_from_the_right_distribution():
    model, x = small(), torch.zeros(20000, 1, dtype=torch.long)
    p = (model(x[:1])[0, -1] / 0.7).softmax(0)
    order = p.argsort(descending=True)
    draw = lambda **how: model.generate(x, 1, 0.7, generator=torch.Generator().manual_seed(3), **how)[:, 1]  # noqa: E731
    assert (torch.bincount(draw(), minlength=96) / 20000 - p).abs().max() < 0.01
    assert set(draw(top_k=3).tolist()) == set(order[:3].tolist())
    inside = int((p[order].cumsum(0) < 0.6).sum()) + 1  # as few as hold 0.6
    assert set(draw(top_p=0.6).tolist()) == set(order[:inside].tolist())
    assert set(draw(top_p=1e-9).tolist()) == {int(order[0])}


def test_generation_never_draws_the_padding_of_the_vocabulary():
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[90:] = 50 * model.transformer.ln_f.bias  # the padding would win
    x = torch.zeros(4, 1, dtype=torch.long)
    assert model.generate(x, 20, 0).max() >= 90
    for temperature in (0, 1.0):
        assert model.generate(x, 20, temperature, n_vocab=90).max() < 90


def test_generation_stops_at_end_of_text_and_keeps_the_mode():
    model, x = small(dropout=0.5), torch.randint(96, (3, 4))
    eot = int(model.generate(x[:1], 1, 0)[0, -1])
    assert model.training
    out = model.generate(x, 20, 0, eot=eot)
    for row in out[:, 4:].tolist():
        if eot in row:
            assert set(row[row.index(eot):]) == {eot}
    assert model.generate(x[:1], 20, 0, eot=eot).shape == (1, 5)
    model.eval()
    model.generate(x, 1)
    assert not model.training


def test_generation_does_not_touch_the_global_generator():
    model, before = small(), torch.get_rng_state()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


# ---- tokenizers
def test_byte_tokenizer():
    encoding, text = load_tokenizer('bytes'), 'def f(x):\n\treturn "é€😀" <|endoftext|>\x00'
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257


def test_gpt2_tokenizer_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    with pytest.raises(OSError, match='TIKTOKEN_CACHE_DIR'):
        load_tokenizer('gpt2')
    with pytest.raises(ValueError, match='unknown tokenizer'):
        load_tokenizer('gpt3')


# ---- token files
def test_rows_of_shards(tmp_path):
    make_text_data(tmp_path / 'd', tokens=100)
    train, val, tokenizer = open_shards(str(tmp_path / 'd'), 16)
    assert list(train) == ['x_train_000001.bin', 'x_train_000002.bin'] and list(val) == ['x_val_000000.bin'] and tokenizer['eot'] == 256
    flat = [np.asarray(t) for t in train.values()]
    rows = shard_rows(train, 16, range(8 + 10))  # (137 - 1) // 16 rows, then (174 - 1) // 16
    assert rows.shape == (18, 17) and rows.dtype == torch.int64
    assert np.array_equal(rows[7], flat[0][112:129]) and np.array_equal(rows[8], flat[1][:17]) and np.array_equal(rows[17], flat[1][144:161])


def test_npy_shards_are_read(tmp_path):
    for name in ('edufineweb_train_000001.npy', 'edufineweb_val_000000.npy'):
        np.save(tmp_path / name, np.arange(100, dtype=np.uint16))
    train, val, tokenizer = open_shards(str(tmp_path), 16)
    assert list(train) == ['edufineweb_train_000001.npy'] and tokenizer['tokenizer'] == 'gpt2'
    assert shard_rows(train, 16, [1])[0].tolist() == list(range(16, 33))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == 'truncated':
        data = data[:-3]
    elif how == 'odd length':
        data += b'x'
    elif how == 'token 65535':
        data[1024 + 40:1024 + 42] = b'\xff\xff'
    elif how == 'empty':
        data = bytearray()
    elif how == 'no tokens':
        data = data[:8] + bytes(1016)
    elif how == 'wrong header':
        data[0] ^= 1
    elif how == 'wrong version':
        data[4] = 2
    elif how == 'negative length':
        data[8:12] = b'\xff\xff\xff\xff'
    elif how == 'header only':
        data = data[:500]
    path.write_bytes(bytes(data))


DAMAGES = {'truncated': 'bytes long', 'odd length': 'bytes long', 'token 65535': 'token 20 is 65535', 'empty': 'header', 'no tokens': 'holds no tokens',
           'wrong header': 'header', 'wrong version': 'header', 'negative length': 'bytes long', 'header only': 'header'}


@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('name', ['x_val_000000.bin', 'x_train_000002.bin'])
def test_damaged_shards_are_named(tmp_path, how, name):
    path = make_text_data(tmp_path / 'd') / name
    damage(path, how)
    with pytest.raises(ValueError, match=f'{name}: .*{DAMAGES[how]}'):
        open_shards(str(tmp_path / 'd'), 16)


@pytest.mark.parametrize('array', [np.arange(100), np.zeros((4, 100), np.uint16), np.zeros(100, np.float32), np.zeros(3, np.uint16)])
def test_wrong_npy_shards_are_named(tmp_path, array):
    np.save(tmp_path / 'a_train.npy', array)
    np.save(tmp_path / 'a_val.npy', np.zeros(100, np.uint16))
    with pytest.raises(ValueError, match='a_train.npy'):
        open_shards(str(tmp_path), 16)


def test_pickled_npy_is_not_executed(tmp_path):
    np.save(tmp_path / 'a_train.npy', np.array([Bomb(tmp_path / 'boom')], dtype=object), allow_pickle=True)
    np.save(tmp_path / 'a_val.npy', np.zeros(100, np.uint16))
    with pytest.raises(ValueError, match='a_train.npy: '):
        open_shards(str(tmp_path), 16)
    assert not (tmp_path / 'boom').exists()


@pytest.mark.parametrize('manifest', ['', '[]', '{', '{"tokenizer": "gpt2"}', '{"tokenizer": "bytes", "vocab_size": 70000, "eot": 256}', '[' * 100000, '\x00', '3',
                                      '{"tokenizer": "bytes", "vocab_size": "257", "eot": 256}', '{"tokenizer": ["bytes"], "vocab_size": 257, "eot": 256}'])
def test_damaged_manifests_are_named(tmp_path, manifest):
    (make_text_data(tmp_path / 'd') / 'manifest.json').write_text(manifest)
    with pytest.raises(ValueError, match='manifest.json'):
        open_shards(str(tmp_path / 'd'), 16)


def test_missing_data_is_said(tmp_path):
    for folder in (tmp_path / 'none', tmp_path):
        with pytest.raises(ValueError, match='folder|needs a validation'):
            open_shards(str(folder), 16)
    write_shard(tmp_path / 'only_train.bin', [1] * 100)
    with pytest.raises(ValueError, match='needs a validation and a training shard'):
        open_shards(str(tmp_path), 16)
    write_shard(tmp_path / 'val.bin', [1] * 16)
    with pytest.raises(ValueError, match='val.bin hold no row of 16'):
        open_shards(str(tmp_path), 16)
    (tmp_path / 'pieces').mkdir()
    with pytest.raises(ValueError, match='half made'):
        open_shards(str(tmp_path), 16)


def test_a_short_last_shard_is_no_error(tmp_path):
    make_text_data(tmp_path / 'd', tokens=100)
    write_shard(tmp_path / 'd/x_train_000003.bin', [1] * 3)
    train, _, _ = open_shards(str(tmp_path / 'd'), 16)
    assert shard_rows(train, 16, range(18)).shape == (18, 17)


def test_without_a_manifest_a_single_shard_is_not_enough(tmp_path):
    write_shard(tmp_path / 'only_train.bin', [1] * 100)
    with pytest.raises(ValueError, match='needs a validation and a training shard'):
        open_shards(str(tmp_path), 16)


# ---- files of torch.save
class Bomb:
    """Unpickling it writes a file."""
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


def a_checkpoint(path):
    torch.save({'model': {'w': torch.arange(500.0), 'b': torch.zeros(3, dtype=torch.bfloat16)}, 'step': 3, 'names': ['a', (1, None)]}, path)
    return path


def test_whole_files_are_read(tmp_path):
    content = read_whole(str(a_checkpoint(tmp_path / 'a.pt')))
    assert torch.equal(content['model']['w'], torch.arange(500.0)) and content['names'] == ['a', (1, None)]
    (tmp_path / 'a.json').write_text(json.dumps({'a': 1}))
    assert read_whole(str(tmp_path / 'a.json')) == {'a': 1}
    with pytest.raises(FileNotFoundError):
        read_whole(str(tmp_path / 'none.pt'))


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({'model': Bomb(tmp_path / 'boom')}, tmp_path / 'zip.pt')
    torch.save({'model': Bomb(tmp_path / 'boom')}, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    (tmp_path / 'raw.pt').write_bytes(pickle.dumps(Bomb(tmp_path / 'boom')))
    for name in ('zip.pt', 'old.pt', 'raw.pt'):
        with pytest.raises(ValueError):
            read_whole(str(tmp_path / name))
    assert not (tmp_path / 'boom').exists()


def test_tensors_cannot_claim_more_than_they_bring(tmp_path):
    torch.save({'w': torch.zeros(1).expand(10 ** 6, 10 ** 6)}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='claims more'):
        read_whole(str(tmp_path / 'a.pt'))


def test_damaged_files_are_refused_or_harmless(tmp_path, fuzz):
    """Truncations, flipped bits, overwritten and removed stretches: a ValueError, or exactly what was written."""
    whole = a_checkpoint(tmp_path / 'a.pt').read_bytes()
    expected, rng, path, refused = read_whole(str(tmp_path / 'a.pt')), random.Random(0), tmp_path / 'b.pt', 0
    for i in range(fuzz):
        data, at = bytearray(whole), rng.randrange(len(whole))
        if i % 4 == 0:
            del data[at:]
        elif i % 4 == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 2:
            data[at:at + 50] = rng.randbytes(50)
        else:
            del data[at:at + rng.randrange(1, 100)]
        path.write_bytes(bytes(data))
        try:
            content = read_whole(str(path))
            assert torch.equal(content['model']['w'], expected['model']['w']) and content['step'] == 3, i
        except ValueError:
            refused += 1
    assert refused > fuzz / 2


def test_every_bit_of_the_tensor_data_counts(tmp_path):
    path = a_checkpoint(tmp_path / 'a.pt')
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 2000)
    data = path.read_bytes()
    begin = data.index(torch.arange(500.0).numpy().tobytes(), info.header_offset)
    for offset in (0, 777, 1999):
        damaged = bytearray(data)
        damaged[begin + offset] ^= 1
        path.write_bytes(bytes(damaged))
        assert torch.load(path, weights_only=True) is not None  # PyTorch itself does not notice
        with pytest.raises(ValueError, match='damaged'):
            read_whole(str(path))


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


# ---- what a reader may add
@pytest.mark.parametrize('kind, settings', [('SGD', dict(momentum=0.9)), ('Adafactor', {}), ('RMSprop', dict(momentum=0.9))])
def test_another_optimizer_is_resumed(kind, settings):
    """To the bit, whatever the shapes of its state (Adafactor's has rows and columns); the state of one kind is not taken for another's."""
    config = model.GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8)
    nets = [model.GPT(config) for _ in range(2)]
    first, second = ([getattr(torch.optim, kind)(net.parameters(), lr=0.1, **settings)] for net in nets)

    def step(net, optimizers):
        net.zero_grad()
        net(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
        optimizers[0].step()
    step(nets[0], first)
    stored = copy.deepcopy(model.optimizer_state(nets[0], first))  # as from a file
    assert stored['state']
    model.load_optimizer_state(nets[1], second, stored)
    nets[1].load_state_dict(nets[0].state_dict())
    step(nets[0], first)
    step(nets[1], second)
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))
    adam = model.make_optimizers(nets[1], 'adamw', 0.1, 0.0, (0.9, 0.99))
    for there, here in ((stored, adam), (model.optimizer_state(nets[1], adam), second)):
        with pytest.raises(ValueError, match=f'is not that of {type(here[0]).__name__}'):
            model.load_optimizer_state(nets[1], here, there)


def test_another_activation_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(model.ACTIVATIONS, 'relu2', lambda x: x.relu() ** 2)
    net = model.GPT(model.GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8, activation='relu2'))
    torch.save(dict(model=net.state_dict(), config=dict(n_head=2, activation='relu2')), tmp_path / 'a.pt')
    assert model.read_gpt(str(tmp_path / 'a.pt'))['config']['activation'] == 'relu2'
    monkeypatch.delitem(model.ACTIVATIONS, 'relu2')
    with pytest.raises(ValueError, match='relu2'):
        model.read_gpt(str(tmp_path / 'a.pt'))
