"""model.py, GPT: shapes, the loss without logits, sampling, Muon, resizing, tokenizers."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPT_SIZES, GPTConfig, HeadLoss, Muon, load_tokenizer, orthogonal

SMALL = dict(block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=32)
X, Y = torch.randint(96, (2, 3, 32), generator=torch.Generator().manual_seed(5))

def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)  # biases and norms too: a zero hides mistakes
    return model

def meta(**changes):
    with torch.device('meta'):
        return GPT(GPTConfig(**changes))

# ---- model
@pytest.mark.parametrize('name, parameters', [
    ('gpt2', 124_439_808), ('gpt2-medium', 354_823_168), ('gpt2-large', 774_030_080),
    ('gpt2-xl', 1_557_611_200)])
def test_sizes_are_the_published_ones(name, parameters):
    model = meta(vocab_size=50257, **GPT_SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == parameters

def test_tiny_has_0_8_million_parameters():
    assert 0.75e6 < sum(p.numel() for p in meta(vocab_size=320, **GPT_SIZES['tiny']).parameters()) < 0.9e6

def test_initialisation():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 4 if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (p == (1 if name.endswith('weight') else 0)).all(), name

def test_logits_have_a_row_of_ids_for_each_token_and_no_token_sees_later_ones():
    model = small()
    logits = model(X)
    assert logits.shape == (3, 32, 96)
    changed = X.clone()
    changed[:, 20:] += 1
    assert torch.equal(model(changed % 96)[:, :20], logits[:, :20])
    assert not torch.equal(model(changed % 96)[:, 20:], logits[:, 20:])

def test_dropout_is_of_the_training_alone():
    model = small(dropout=0.5)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X)) and torch.equal(model(X), small()(X))

def test_what_fits_no_model_is_said():
    with pytest.raises(ValueError, match='n_embd 32 is no multiple of n_head 5'):
        small(n_head=5)
    with pytest.raises(ValueError, match="activation 'relu' must be one of gelu_new, gelu"):
        small(activation='relu')
    with pytest.raises(AssertionError, match='33 tokens, over 32'):
        small()(torch.zeros(1, 33, dtype=torch.long))

def test_flops_and_their_share_of_what_the_maker_states(monkeypatch):
    model = meta(**GPT_SIZES['gpt2'])
    assert model.flops_per_token(1024) == pytest.approx(855.4e6, rel=1e-4)
    assert small().mfu(5e5, 1024) == '-'  # of a CPU nobody states any
    weight = SimpleNamespace(device=torch.device('cuda'))
    on_gpu = SimpleNamespace(flops_per_token=model.flops_per_token,
                             transformer=SimpleNamespace(wte=SimpleNamespace(weight=weight)))
    for name, text in (('NVIDIA H100 80GB HBM3', '43.2%'), ('NVIDIA A100', '137.1%'), ('Unknown', '-')):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert GPT.mfu(on_gpu, 5e5, 1024) == text

# ---- loss
def cross_entropy(x, weight, targets, factors=None):
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')
    return (losses if factors is None else losses * factors).sum()

@pytest.mark.parametrize('dtype, rtol', [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize('with_factors', [False, True])
@pytest.mark.parametrize('N, V', [(70, 96), (4001, 5000)])  # one slice, and three of about 2^23 logits
def test_the_loss_is_cross_entropy_in_value_and_both_gradients(N, V, with_factors, dtype, rtol):
    torch.manual_seed(0)
    x = torch.randn(N, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[::5] = -1
    factors = torch.rand(N) if with_factors else None
    loss = 3 * HeadLoss.apply(x, weight, targets, True, factors)
    expected = 3 * cross_entropy(x, weight, targets, factors)
    assert loss.dtype == dtype and loss.item() == pytest.approx(expected.item(), rel=rtol)
    ours, theirs = (torch.autograd.grad(value, (x, weight)) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and (a - b).norm() < rtol * b.norm()

def test_the_loss_under_autocast_is_that_of_rounded_inputs():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 16, requires_grad=True), torch.randn(96, 16, requires_grad=True)
    targets = torch.randint(96, (64,))
    with torch.autocast('cpu', torch.bfloat16):
        loss = HeadLoss.apply(x, weight, targets, True)
    rounded = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    expected = cross_entropy(*rounded, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for ours, theirs in zip((x, weight), rounded, strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad.float()).norm() < 0.02 * theirs.grad.float().norm()

def test_mean_sum_masks_places_and_factors():
    model = small()
    each = F.cross_entropy(model(X).flatten(0, 1), Y.flatten(), reduction='none')
    assert model(X, Y).item() == pytest.approx(each.mean().item(), rel=1e-6)
    assert model(X, Y, 'sum').item() == pytest.approx(each.sum().item(), rel=1e-6)
    few = Y.clone()
    few[:, 5:] = -1
    kept = each.view(3, 32)[:, :5]
    assert model(X, few).item() == pytest.approx(kept.mean().item(), rel=1e-6)
    with torch.no_grad():
        assert model(X, few).item() == pytest.approx(kept.mean().item(), rel=1e-6)
    places = (few >= 0).flatten().nonzero().squeeze(1)
    factors = torch.rand(len(places))
    loss = model(X, Y.flatten()[places], 'sum', places, factors)
    assert loss.item() == pytest.approx((kept.flatten() * factors).sum().item(), rel=1e-5)
    nothing = model(X, torch.full_like(Y, -1), 'sum')
    nothing.backward()
    assert nothing == 0 and all((p.grad == 0).all() for p in model.parameters())

def test_no_places_are_no_loss_and_no_error():
    nothing = torch.zeros(0, dtype=torch.long)
    loss = small()(X, nothing, 'sum', nothing)
    loss.backward()
    assert loss == 0

def test_a_second_backward_fails():
    loss = small()(X, Y)
    loss.backward(retain_graph=True)
    with pytest.raises((TypeError, RuntimeError)):
        loss.backward()

@pytest.mark.parametrize('compile', [GPT.compile, torch.nn.Module.compile])  # a CPU's, and a GPU's
def test_a_training_step_is_one_graph_for_torch_compile(compile):
    model, compiled = small(), small()
    compile(compiled, fullgraph=True, backend='eager')  # a graph break would be an error
    for m in (model, compiled):
        m(X, Y, 'sum').backward()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)

# ---- sampling
def test_cached_generation_equals_recomputation():
    model, expected = small(), X[:, :5]
    for _ in range(27):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(X[:, :5], 27, temperature=0), expected)
    cache = {}
    parts = [model.hidden(part, cache) for part in expected.split((4, 1, 9, 18), 1)]
    assert (torch.cat(parts, 1) - model.hidden(expected)).abs().max() < 1e-5

def test_beyond_the_block_the_older_half_is_forgotten():
    model, prompt = small(), torch.cat((X, Y), 1)[:, :50]
    expected, feed = prompt, prompt[:, -32:]  # its last 32 tokens alone
    for _ in range(40):
        if feed.size(1) > 32:
            feed = expected[:, -16:]
        drawn = model(feed)[:, -1:].argmax(-1)
        expected, feed = torch.cat((expected, drawn), 1), torch.cat((feed, drawn), 1)
    assert torch.equal(model.generate(prompt, 40, temperature=0), expected)

def test_temperature_top_k_and_top_p():
    model, x = small(), torch.zeros(20000, 1, dtype=torch.long)
    p = (model(x[:1])[0, -1] / 0.7).softmax(0)
    order = p.argsort(descending=True)

    def draw(**how):
        return model.generate(x, 1, 0.7, generator=torch.Generator().manual_seed(3), **how)[:, 1]
    assert (torch.bincount(draw(), minlength=96) / 20000 - p).abs().max() < 0.01
    assert set(draw(top_k=3).tolist()) == set(order[:3].tolist())
    assert set(draw(top_k=1000).tolist()) == set(draw().tolist())
    inside = int((p[order].cumsum(0) < 0.6).sum()) + 1  # as few as hold 0.6
    assert set(draw(top_p=0.6).tolist()) == set(order[:inside].tolist())
    assert set(draw(top_p=1e-9).tolist()) == {int(order[0])}
    for temperature in (0, 1e-30):
        assert (model.generate(x[:9], 1, temperature)[:, 1] == order[0]).all()

def test_the_padding_of_the_vocabulary_is_never_drawn():
    model, x = small(), torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        model.transformer.wte.weight[90:] = 50 * model.transformer.ln_f.bias  # it would win
    assert model.generate(x, 20, 0).max() >= 90
    for temperature in (0, 1.0):
        assert model.generate(x, 20, temperature, n_vocab=90).max() < 90
        assert model.generate(x, 20, temperature, top_k=95, n_vocab=90).max() < 90

def test_end_of_text_stops_a_row_and_all_rows_the_call():
    model = small(dropout=0.5)
    eot = int(model.generate(X[:1, :4], 1, 0)[0, -1])
    assert model.training  # as before
    out = model.generate(X[:, :4], 20, 0, eot=eot)
    for row in out[:, 4:].tolist():
        assert eot not in row or set(row[row.index(eot):]) == {eot}
    assert model.generate(X[:1, :4], 20, 0, eot=eot).shape == (1, 5)
    prompt = torch.full((1, 4), eot)
    assert model.generate(prompt, 3, 0, eot=eot).size(1) > 4  # in a prompt it stops nothing
    model.eval()
    model.generate(X[:, :4], 1)
    assert not model.training

def test_prompts_of_other_lengths_are_continued_as_if_alone():
    model, lengths = small(), torch.tensor([3, 9, 5])
    out = model.generate(X[:, :9], 6, 0, lengths=lengths)
    for row, length, prompt in zip(out, lengths, X, strict=True):
        assert torch.equal(row[:length + 6], model.generate(prompt[None, :length], 6, 0)[0])

def test_sampling_does_not_touch_the_global_generator():
    model = small()
    before = torch.get_rng_state()
    first = model.generate(X[:, :1], 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, model.generate(X[:, :1], 5, generator=torch.Generator().manual_seed(0)))

# ---- optimizers
@pytest.mark.parametrize('shape', [(5, 64, 64), (3, 32, 128), (3, 128, 32), (1, 96, 64)])
@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e4])
def test_orthogonal_brings_singular_values_near_one(shape, scale):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = scale * (u * torch.logspace(-1, 0, u.size(-1))) @ vh  # singular values from 0.1 to 1
    before = x.clone()
    found, exact = orthogonal(x), u @ vh
    assert found.shape == shape and found.dtype == x.dtype and torch.equal(x, before)
    values = torch.linalg.svdvals(found)
    assert 0.5 < values.min() and values.max() < 1.3
    assert (found * exact).sum() / found.norm() / exact.norm() > 0.95  # and keeps the directions

def muon_by_hand(w, gradients, lr, weight_decay, momentum=0.95):
    """The updates of one matrix (rows <= columns) in double precision."""
    w, m = w.double(), torch.zeros_like(w).double()
    for g in gradients:
        g = g.double()
        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g
        u = u / u.norm()
        for _ in range(5):
            a = u @ u.T
            u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
        w = (1 - lr * weight_decay) * w - lr * 0.2 * math.sqrt(max(w.shape)) * u
    return w

def test_muon_is_what_the_paper_says_for_matrices_one_by_one():
    torch.manual_seed(0)
    shapes = [(16, 48), (16, 48), (16, 16), (16, 48), (12, 12)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) for _ in range(3)] for shape in shapes]
    expected = [muon_by_hand(p.detach(), g, 0.1, 0.3) for p, g in zip(params, gradients, strict=True)]
    optimizer = Muon(params, lr=0.1, weight_decay=0.3)
    for step in range(3):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g[step].clone()
        optimizer.step()
    for p, w in zip(params, expected, strict=True):
        assert torch.allclose(p.double(), w, atol=1e-4)

def test_muon_of_a_tall_matrix_is_that_of_its_transpose_and_skips_what_has_no_gradient():
    w, g = torch.randn(48, 16), torch.randn(48, 16)
    tall, idle = torch.nn.Parameter(w.clone()), torch.nn.Parameter(torch.ones(4, 4))
    tall.grad = g.clone()
    Muon([tall, idle], lr=0.1, weight_decay=0.0).step()
    assert torch.allclose(tall.double(), muon_by_hand(w.T, [g.T], 0.1, 0.0).T, atol=1e-4)
    assert (idle == 1).all()

@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_decay_is_of_matrices_and_muon_has_exactly_those_of_the_blocks(name):
    model = small()
    optimizers = model.make_optimizers(name, 1e-3, 0.1, (0.9, 0.95))
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for o in optimizers:
        for group in o.param_groups:
            found.update({names[p]: (type(o).__name__, group['weight_decay']) for p in group['params']})
            assert group['lr'] == 1e-3 and group.get('betas', (0.9, 0.95)) == (0.9, 0.95)
    assert len(optimizers) == 1 + (name == 'muon') and found.keys() == set(names.values())
    for name_, p in model.named_parameters():
        of_muon = name == 'muon' and p.dim() == 2 and '.h.' in name_
        assert found[name_] == ('Muon' if of_muon else 'AdamW', 0.1 if p.dim() == 2 else 0.0), name_

# ---- other shapes
def test_new_ids_get_the_mean_of_the_embeddings_and_positions_are_cut():
    model = small()
    before = model(X[:, :16])
    model.resize(16, 128)
    assert (model.config.block_size, model.config.vocab_size) == (16, 128)
    logits = model(X[:, :16])
    assert torch.allclose(logits[..., :96], before, atol=1e-6)
    new = before.mean(-1, keepdim=True).expand(-1, -1, 32)
    assert torch.allclose(logits[..., 96:], new, atol=1e-4)  # never the likeliest
    model.resize(16, 90)
    assert torch.allclose(model(X[:, :16] % 90)[..., :90], small()(X[:, :16] % 90)[..., :90], atol=1e-6)
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    with pytest.raises(ValueError, match='block_size 17 is over its 16'):
        model.resize(17, 90)

# ---- tokenizers
def test_byte_tokenizer():
    encoding, text = load_tokenizer('bytes'), 'def f(x):\n\treturn "é€😀" <|endoftext|>\x00'
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.eot_token == 256 and encoding.n_vocab == 257

def test_gpt2s_tokenizer_is_not_downloaded_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    with pytest.raises(OSError, match='TIKTOKEN_CACHE_DIR'):
        load_tokenizer('gpt2')
    with pytest.raises(ValueError, match='unknown tokenizer'):
        load_tokenizer('gpt3')
