"""Weights from and for other tools (transformers, nanoGPT, bare state dicts), HellaSwag, tensor parallelism, Muon."""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, TINY, clean_log, differences, load, losses
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig, find_gpt, fit_weights, load_tokenizer, open_hellaswag, read_gpt

SHAPE = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)
HELLASWAG = ROOT.parent / 'shared/data/hellaswag/hellaswag_val_1000_original_schema.jsonl'


def random_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval()


def their_gpt(activation='gelu_new', **changes):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = dict(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, activation_function=activation, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


X = torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(5))


# ---- weights in
@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
@pytest.mark.parametrize('shards', [1, 3])
def test_a_model_saved_by_transformers_loads_here(tmp_path, activation, shards):
    theirs = their_gpt(activation)
    theirs.save_pretrained(tmp_path, max_shard_size='40KB' if shards > 1 else '1GB')
    assert len(list(tmp_path.glob('*.safetensors'))) >= shards
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config.activation == activation
    assert (ours(X) - theirs(X).logits).abs().max() < 1e-5


def test_the_layout_of_the_published_files_loads(tmp_path):
    """The hub's gpt2 has no prefix, brings the causal masks, and may be half precision."""
    theirs = their_gpt()
    weights = {name.removeprefix('transformer.'): p.contiguous() for name, p in theirs.state_dict().items() if name != 'lm_head.weight'}
    weights.update({f'h.{i}.attn.bias': torch.ones(1, 1, 32, 32).tril() for i in range(2)})
    save_file(weights, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(theirs.config.to_dict()))
    for path in (tmp_path, tmp_path / 'model.safetensors'):
        assert (GPT.from_pretrained(str(path)).eval()(X) - theirs(X).logits).abs().max() < 1e-5
    save_file({name: w.to(torch.bfloat16) for name, w in weights.items()}, tmp_path / 'model.safetensors')
    found = GPT.from_pretrained(str(tmp_path))
    assert {p.dtype for p in found.parameters()} == {torch.float32} and (found(X) - theirs(X).logits).abs().max() < 0.5


def test_a_checkpoint_of_nanogpt_loads_here():
    """files/nanogpt.pt was written by nanoGPT's train.py, its logits by nanoGPT's model.py (which applies the exact GELU)."""
    folder = Path(__file__).parent / 'files'
    expected = torch.load(folder / 'nanogpt_logits.pt', weights_only=True)
    for name in ('nanogpt.pt', 'nanogpt_nobias.pt'):
        model = GPT.from_pretrained(str(folder / name)).eval()
        assert model.config.activation == 'gelu' and model.config.n_head == 2
        assert (model(expected['x']) - expected[name]).abs().max() < 1e-5


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_bare_and_prefixed_state_dicts(tmp_path, prefix):
    ours = random_gpt()
    torch.save({prefix + name: p for name, p in ours.state_dict().items()}, tmp_path / 'a.pt')
    found = read_gpt(str(tmp_path / 'a.pt'))
    assert not differences(found['model'], dict(ours.state_dict())) and 'n_head' not in found['config']  # 32 wide is no published size
    assert torch.equal(GPT.from_pretrained(str(tmp_path / 'a.pt'), n_head=4).eval()(X), ours(X))


def test_other_vocabularies_and_lengths():
    ours = random_gpt()
    longer = fit_weights(ours.state_dict(), 16, 128, 96)
    model = random_gpt(block_size=16, vocab_size=128)
    model.load_state_dict(longer)
    logits = model(X[:, :16])
    assert torch.allclose(logits[..., :96], ours(X[:, :16]), atol=1e-6)
    assert torch.allclose(logits[..., 96:], logits[..., :96].mean(-1, keepdim=True).expand(-1, -1, 32), atol=1e-4)  # never the likeliest


def test_names_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    for name, said in (('nowhere', 'no model of the hub'), ('a/b/c', 'no model of the hub')):
        with pytest.raises(OSError, match=said):
            find_gpt(name)


def test_a_name_of_the_hub_is_asked_for_in_its_cache_first(tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    asked = []

    def snapshot_download(repository, local_files_only=False, allow_patterns=()):
        asked.append((repository, local_files_only))
        if local_files_only:
            raise FileNotFoundError('not in the cache')
        if repository == 'openai-community/gpt2-medium':
            raise ConnectionError('no network')
        return str(tmp_path)
    monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert find_gpt('gpt2') == str(tmp_path) and find_gpt('some/model') == str(tmp_path)
    assert asked == [(name, first) for name in ('openai-community/gpt2', 'some/model') for first in (True, False)]
    with pytest.raises(OSError, match='gpt2-medium was not downloaded.*no network'):
        find_gpt('gpt2-medium')
    os.mkdir('gpt2')  # what lies here comes first
    assert find_gpt('gpt2') == 'gpt2'


def hostile_folders(tmp_path):
    """(what is wrong, folder)"""
    good = tmp_path / 'good'
    their_gpt().save_pretrained(good)
    weights, config = load_file(good / 'model.safetensors'), json.loads((good / 'config.json').read_text())
    data = (good / 'model.safetensors').read_bytes()
    for i, (said, change) in enumerate((
        ('lacks config.json', lambda folder: (folder / 'config.json').unlink()),
        ('lacks model.safetensors', lambda folder: (folder / 'model.safetensors').unlink()),
        ('', lambda folder: (folder / 'model.safetensors').write_bytes(data[:-100])),
        ('', lambda folder: (folder / 'model.safetensors').write_bytes(b'\xff' * 100)),
        ('', lambda folder: (folder / 'model.safetensors').write_bytes(b'')),
        ('', lambda folder: (folder / 'config.json').write_text('{')),
        ('holds no settings', lambda folder: (folder / 'config.json').write_text('[]')),
        ('model_type', lambda folder: (folder / 'config.json').write_text(json.dumps({**config, 'model_type': 'llama'}))),
        ('activation_function', lambda folder: (folder / 'config.json').write_text(json.dumps({**config, 'activation_function': 'relu'}))),
        ('layer_norm_epsilon', lambda folder: (folder / 'config.json').write_text(json.dumps({**config, 'layer_norm_epsilon': 1e-6}))),
        ('n_head', lambda folder: (folder / 'config.json').write_text(json.dumps({**config, 'n_head': 5}))),
        ('n_head', lambda folder: (folder / 'config.json').write_text(json.dumps({**config, 'n_head': '4'}))),
        ('lm_head', lambda folder: save_file({**weights, 'lm_head.weight': torch.zeros(96, 32)}, folder / 'model.safetensors')),
        ('extra', lambda folder: save_file({**weights, 'transformer.extra': torch.zeros(9)}, folder / 'model.safetensors')),
        ('h.1.ln_1.weight', lambda folder: save_file({k: v for k, v in weights.items() if k != 'transformer.h.1.ln_1.weight'}, folder / 'model.safetensors')),
        ('c_fc', lambda folder: save_file({**weights, 'transformer.h.0.mlp.c_fc.weight': torch.zeros(32, 64)}, folder / 'model.safetensors')),
        ('is no weight', lambda folder: save_file({**weights, 'transformer.h.0.mlp.c_fc.weight': torch.zeros(32, 128, dtype=torch.int64)}, folder / 'model.safetensors')),
        ('no GPT-2 weights', lambda folder: save_file({'a': torch.zeros(3)}, folder / 'model.safetensors')),
        ('weight_map', lambda folder: (folder / 'model.safetensors.index.json').write_text('[]')),
        ('lacks', lambda folder: (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "../good/none.safetensors"}}')),
    )):
        folder = tmp_path / f'bad{i}'
        shutil.copytree(good, folder)
        change(folder)
        yield said, folder


def test_hostile_folders_are_refused(tmp_path, go):
    for i, (said, folder) in enumerate(hostile_folders(tmp_path)):
        with pytest.raises(ValueError) as error:
            read_gpt(str(folder))
        assert said in str(error.value)
        if i % 4 == 0:
            assert said in go(f'--init_from={folder}').one_line()


# ---- weights out
def test_export_loads_in_transformers_and_comes_back(go, tmp_path):
    transformers = pytest.importorskip('transformers')
    go('--activation=gelu').ok()
    assert 'wrote out/deep' in go('--export=out/deep', base=[]).ok().out
    stored = load(tmp_path / 'logs/model_00004.pt')['model']
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out/deep', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    ours = GPT(GPTConfig(16, 320, 2, 4, 16, activation='gelu')).eval()
    ours.load_state_dict(stored)
    x = X[:, :16] + 160
    logits = theirs.eval()(x).logits
    assert logits.shape[-1] == 257 and (ours(x)[..., :257] - logits).abs().max() < 1e-5
    back = read_gpt(str(tmp_path / 'out/deep'))
    stored['transformer.wte.weight'] = stored['transformer.wte.weight'][:257]  # the padding stays here
    assert not differences(back['model'], stored) and back['config'] == dict(block_size=16, vocab_size=257, n_layer=2, n_embd=16, n_head=4, activation='gelu')
    first = re.search(r'val loss ([\d.]+)', go('--eval_only', base=['--data_root=data', '--val_tokens=256']).ok().out)[1]
    again = go('--eval_only', '--init_from=out/deep', '--log_dir=other', base=['--data_root=data', '--val_tokens=256']).ok()
    assert float(re.search(r'val loss ([\d.]+)', again.out)[1]) == pytest.approx(float(first), abs=2e-2)  # 63 ids of padding less trained
    assert (tmp_path / 'other/eval.json').exists() and not (tmp_path / 'out/eval.json').exists()
    assert not (tmp_path / 'other/log.txt').exists()


@pytest.mark.skipif(not (ROOT.parent / 'shared/data/tiktoken_cache').exists(), reason="GPT-2's tokenizer is not here")
def test_export_brings_the_tokenizer(go, tmp_path):
    transformers = pytest.importorskip('transformers')
    cache = dict(TIKTOKEN_CACHE_DIR=str(ROOT.parent / 'shared/data/tiktoken_cache'))
    (tmp_path / 'data/manifest.json').unlink()  # GPT-2's ids
    go('--max_steps=1', env=cache).ok()
    go('--export=out', base=[], env=cache).ok()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    os.environ.update(cache)
    text = "Hello, I'm a language model é😀\n  x<|endoftext|>"
    assert tokenizer(text)['input_ids'] == load_tokenizer('gpt2').encode(text, allowed_special='all')
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').config.vocab_size == 50257


def test_export_takes_nothing_away(go, tmp_path):
    go().ok()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.txt').write_text('x')
    for there in ('logs', 'mine', 'mine/thesis.txt', '.'):
        assert 'is there already' in go(f'--export={there}', base=[]).one_line()
    assert (tmp_path / 'mine/thesis.txt').exists() and (tmp_path / 'logs/model_00004.pt').exists()
    go('--export=new/', base=[]).ok()
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['config.json', 'model.safetensors']
    go('--init_from=new', '--generate=x', base=[]).ok()  # its size tells the tokenizer
    assert 'three launches' in go('--eval_only', '--generate=x', base=[]).one_line()
    assert 'is there already' in go('--export=new', base=[]).one_line()


def test_export_never_leaves_half_a_folder(go, tmp_path):
    go().ok()
    assert go('--export=out', base=[], files_limit=2000).codes == [1]
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('out*'))


# ---- a run that begins with them
def test_init_from(go, tmp_path):
    """Weights and shape come from the file, the optimizer is new, and a resume needs neither the file nor anything typed again."""
    go('--max_steps=30', '--max_lr=2e-2', '--eval_interval=30', '--checkpoint_interval=30').ok()
    go('--export=out', base=[]).ok()
    begin = [word for word in TINY if not re.match('--(n_|block_size)', word)] + ['--init_from=out', '--log_dir=tuned']
    run = go(base=begin).ok()
    assert 'weights from out' in run.out and losses(run)[0] < 3 and '2 layers, 4 heads, width 16, 16 positions, 320 ids' in run.out
    shutil.rmtree(tmp_path / 'out')
    assert 'resumed from tuned/model_00004.pt' in go('--auto_resume', '--log_dir=tuned', '--max_steps=6', base=[]).ok().out
    again = go(*begin, '--auto_resume', '--max_steps=8', base=[]).ok()  # the same command, although the file is gone
    assert 'resumed from tuned/model_00006.pt' in again.out
    assert 'n_layer cannot change' in go('--auto_resume', '--log_dir=tuned', '--n_layer=3', base=[]).one_line()


@pytest.mark.parametrize('content', [{1: torch.zeros(3)}, {'step': 3}, {'wte.weight': torch.zeros(()), 'wpe.weight': torch.zeros(()), 'h.0.attn.c_attn.weight': torch.zeros(())},
                                     {'wte.weight': torch.zeros(0, 2 ** 40), 'wpe.weight': torch.zeros(0, 2 ** 40), 'h.0.attn.c_attn.weight': torch.zeros(0)}, [], 3], ids=str)
def test_hostile_files_end_in_one_line(go, tmp_path, content):
    torch.save(content, tmp_path / 'x.pt')
    assert 'x.pt' in go('--init_from=x.pt').one_line() and 'x.pt' in go('--eval_only', '--checkpoint_path=x.pt', base=['--data_root=data']).one_line()


def test_init_from_what_does_not_fit(go, tmp_path):
    go().ok()
    torch.save(load(tmp_path / 'logs/model_00004.pt')['model'], tmp_path / 'bare.pt')
    short = [word for word in TINY if not re.match('--(n_head|block_size)', word)] + ['--log_dir=new']
    assert 'add --n_head' in go('--init_from=bare.pt', base=short).one_line()
    assert 'fewer than block_size 32' in go('--init_from=bare.pt', '--n_head=4', '--block_size=32', base=short).one_line()
    assert 'no model of the hub' in go('--init_from=missing.pt', base=short).one_line()
    assert '--n_layer=3 is not that of bare.pt: 2' in go('--init_from=bare.pt', '--n_head=4', '--n_layer=3', base=short).one_line()
    assert '--n_head=2 is not that of logs/model_00004.pt: 4' in go('--init_from=logs/model_00004.pt', '--n_head=2', base=short).one_line()
    assert 'two beginnings' in go('--init_from=bare.pt', '--checkpoint_path=logs/model_00004.pt', '--resume', base=short).one_line()
    assert 'logs/model_00004.pt' in go('--init_from=logs/model_4.pt', base=short).one_line()  # what does exist
    assert '8 positions' in go('--init_from=bare.pt', '--n_head=4', '--block_size=8', base=short).ok().out
    random_gpt_file = tmp_path / 'other.pt'
    torch.save(random_gpt().state_dict(), random_gpt_file)
    assert 'it has 96 ids' in go(f'--init_from={random_gpt_file}', '--n_head=4', '--n_embd=32', '--log_dir=other', base=short).one_line()


# ---- HellaSwag
def plain_hellaswag(model, items):
    """One example at a time, as the paper's score is defined: (per item the choice by sum, by mean)."""
    found = []
    with torch.no_grad():
        for context, endings, _ in items:
            sums = []
            for ending in endings:
                ids = (context + ending)[-model.config.block_size - 1:]
                n = min(len(ending), model.config.block_size, len(ids) - 1)
                logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
                sums.append(sum(-logp[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids))))
            found.append((int(np.argmin(sums)), int(np.argmin([s / len(e) for s, e in zip(sums, endings, strict=True)]))))
    return found


def some_items(n=13):
    rng, words = np.random.default_rng(0), 'a man is sitting on the roof and then he pulls tiles off with both hands'.split()
    text = lambda k: ' '.join(rng.choice(words, k))  # noqa: E731
    return [dict(ctx=text(rng.integers(1, 6)), endings=[text(rng.integers(1, 9)) for _ in range(4)], label=int(rng.integers(4))) for _ in range(n)]


def write_items(folder, items):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'hellaswag_val.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))


@pytest.mark.parametrize('ranks', [0, 2])
def test_hellaswag_equals_one_example_at_a_time(go, tmp_path, ranks):
    items = some_items()
    write_items(tmp_path / 'data/hellaswag', items)
    run = go('--hellaswag_interval=2', '--block_size=64', '--total_batch_size=256', '--batch_size=2', ranks=ranks).ok()
    items = open_hellaswag(str(tmp_path / 'data/hellaswag'), load_tokenizer('bytes'))
    shown = re.findall(r'step (\d)/4 \| hellaswag acc ([\d.]+) \| acc_norm ([\d.]+)', run.out)
    assert [step for step, _, _ in shown] == ['2', '4'] and shown == re.findall(r'step (\d)/4 \| hellaswag acc ([\d.]+) \| acc_norm ([\d.]+)', (tmp_path / 'logs/log.txt').read_text())
    for step, acc, acc_norm in shown:
        model = GPT(GPTConfig(64, 320, 2, 4, 16)).eval()
        model.load_state_dict(load(tmp_path / f'logs/model_0000{step}.pt')['model'])
        expected = plain_hellaswag(model, items)
        assert [acc, acc_norm] == [f'{np.mean([pair[k] == label for pair, (_, _, label) in zip(expected, items, strict=True)]):.4f}' for k in (0, 1)]
    report = go('--eval_only', '--hellaswag_interval=1', base=[], ranks=ranks).ok()
    found = json.loads((tmp_path / 'logs/eval.json').read_text())
    assert [f'{found["hellaswag_acc"]:.4f}', f'{found["hellaswag_acc_norm"]:.4f}'] == [acc, acc_norm] and found['hellaswag_items'] == 13, report.out
    plain = go('--log_dir=plain', '--block_size=64', '--total_batch_size=256', '--batch_size=2', ranks=ranks).ok()
    assert losses(plain) == losses(run)  # the evaluation changed nothing of the training


def test_ranks_with_other_items_end(go, tmp_path):
    for folder, n in (('a', 9), ('b', 3)):
        write_items(tmp_path / folder / 'hs', some_items(n))
    run = go('--hellaswag_interval=2', '--hellaswag_root=hs', f'--data_root={tmp_path}/data', ranks=2,
             prelude="import os; os.chdir('b' if os.environ['RANK'] == '1' else 'a')")
    assert 'the ranks see different items: hs must be the same on all nodes' in run.one_line()


def test_losses_of_endings_in_any_batch():
    """Padded, cut off in front, an ending longer than the block, and in slices of the logits."""
    model, rng = random_gpt(), np.random.default_rng(1)
    rows = [(rng.integers(96, size=length).tolist(), n) for length, n in ((5, 2), (33, 4), (50, 10), (60, 40), (2, 1), (33, 32), (1, 1))]
    rows[-1] = ([7], 1)  # nothing before it: nothing to predict it from
    together = model.ending_losses(rows)
    for (ids, n), loss in zip(rows, together, strict=True):
        kept = ids[-33:]
        n = min(n, 32, len(kept) - 1)
        if n:
            logits = model(torch.tensor([kept[:-1]]))[0, -n:]
            assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor(kept[-n:]), reduction='sum').item(), rel=1e-5)
        else:
            assert loss == 0


@pytest.mark.skipif(not HELLASWAG.exists(), reason='the real rows are not here')
def test_hellaswag_on_real_rows(tmp_path):
    write_items(tmp_path, [json.loads(line) for line in HELLASWAG.read_text().splitlines()[:12]])
    items = open_hellaswag(str(tmp_path), load_tokenizer('bytes'))
    model = random_gpt(block_size=128, vocab_size=320)  # most rows do not fit
    rows = [(context + ending, len(ending)) for context, endings, _ in items for ending in endings]
    found = torch.cat([model.ending_losses(rows[i:i + 7]) for i in range(0, len(rows), 7)]).view(-1, 4)
    lengths = torch.tensor([n for _, n in rows]).view(-1, 4)
    assert list(zip(found.argmin(1).tolist(), (found / lengths).argmin(1).tolist(), strict=True)) == plain_hellaswag(model, items)


@pytest.mark.parametrize('line', ['', '{', '[]', '{"ctx": "a"}', '{"ctx": 3, "endings": ["a", "b", "c", "d"], "label": 1}', '\xff\xfe',
                                  '{"ctx": "a", "endings": ["a", "b", "c"], "label": 1}', '{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 1}',
                                  '{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', '{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": true}',
                                  '{"ctx": "a", "endings": "abcd", "label": 1}', '{"ctx": "", "endings": ["", "", "", ""], "label": 0}', '[' * 100000])
def test_damaged_hellaswag_files_are_named(go, tmp_path, line):
    write_items(tmp_path / 'h', some_items(2))
    with open(tmp_path / 'h/hellaswag_val.jsonl', 'ab') as file:
        file.write(line.encode('latin1') + b'\n')
    with pytest.raises(ValueError, match='hellaswag_val.jsonl line 3'):
        open_hellaswag(str(tmp_path / 'h'), load_tokenizer('bytes'))


def test_missing_hellaswag_names_the_way_out(go):
    assert 'prepare/hellaswag.py' in go('--hellaswag_interval=2').one_line()


# ---- tensor parallelism
@pytest.fixture
def one_process(go):
    return go('--max_steps=20', '--log_dir=one', '--eval_interval=10', '--checkpoint_interval=10').ok()


@pytest.mark.parametrize('ranks', [2, 4])
def test_model_parallel_gives_the_training_of_one_process(go, one_process, tmp_path, ranks):
    """2 = one model on two ranks, 4 = two such models on other rows. Checkpoints are the same files, resumed either way."""
    args = ['--max_steps=20', '--eval_interval=10', '--checkpoint_interval=10', '--model_parallel', '--log_gradients']
    run = go(*args, '--log_dir=split', ranks=ranks, timeout=120).ok()
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5) and len(losses(run)) == 20
    assert re.findall(r'val loss [\d.]+', run.out) == re.findall(r'val loss [\d.]+', one_process.out)
    norms = [[float(x) for x in re.findall(r'norm ([\d.]+)', r.out)] for r in (run, one_process)]
    assert norms[0] == pytest.approx(norms[1], abs=0.011)
    ours, theirs = (load(tmp_path / folder / 'model_00020.pt') for folder in ('split', 'one'))
    assert ours['model'].keys() == theirs['model'].keys()
    for name, tensor in ours['model'].items():
        if not name.endswith('c_attn.bias'):  # a third of it, the keys' bias, has no gradient: Adam makes steps of its rounding
            assert type(tensor) is torch.Tensor and torch.allclose(tensor, theirs['model'][name], atol=1e-4), name
    for name, state in ours['optimizer']['state'].items():
        assert torch.allclose(state['exp_avg'], theirs['optimizer']['state'][name]['exp_avg'], atol=1e-4), name
    for there, here, how in (('split', 0, []), ('one', ranks, ['--model_parallel'])):
        shutil.copytree(tmp_path / there, tmp_path / f'{there}_on')
        (tmp_path / f'{there}_on/model_00020.pt').unlink()
        resumed = go('--auto_resume', f'--log_dir={there}_on', *(how or ['--no-model_parallel']), base=[], ranks=here, timeout=120).ok()
        assert losses(resumed) == pytest.approx(losses(one_process)[10:], abs=1e-5), there
    shown = []
    for i, how in enumerate((dict(ranks=ranks), dict())):  # split again, or by one process to which nobody says anything
        again = ['--log_dir=split', *(['--model_parallel'] if how else [])]
        shown.append(go('--eval_only', *again, base=[], **how, timeout=120).ok().out)
        go('--generate=x', *again, base=[], **how, timeout=120).ok()
        go(f'--export=out{i}', *again, base=[], **how, timeout=120).ok()
        assert not differences(read_gpt(str(tmp_path / f'out{i}'))['model'] | {'transformer.wte.weight': 0}, ours['model'] | {'transformer.wte.weight': 0})
    assert len({re.search(r'val loss [\d.]+', out)[0] for out in shown}) == 1


def test_model_parallel_refusals(go):
    for extra, said in ((['--compile'], '--compile'), (['--optimizer=muon'], '--optimizer=muon'), (['--dropout=0.1'], '--dropout'), (['--dtype=float16'], '--dtype'),
                        (['--model_parallel_size=3'], 'must divide')):
        assert said in go('--model_parallel', *extra, ranks=2).one_line()
    assert 'torchrun' in go('--model_parallel').one_line()


def test_model_parallel_resumes_bit_for_bit(go, tmp_path):
    args = ['--model_parallel', '--max_steps=6']
    go(*args, '--log_dir=a', ranks=2).ok()
    go('--model_parallel', '--max_steps=6', '--log_dir=b', ranks=2, prelude=STOP_AFTER_4)
    assert not (tmp_path / 'b/model_00006.pt').exists() and (tmp_path / 'b/model_00004.pt').exists()
    go('--auto_resume', '--log_dir=b', base=[], ranks=2).ok()
    a, b = (load(tmp_path / folder / 'model_00006.pt') for folder in 'ab')
    assert not differences(a['model'], b['model']) and not differences(a['optimizer'], b['optimizer']) and clean_log(tmp_path / 'a/log.txt') == clean_log(tmp_path / 'b/log.txt')


STOP_AFTER_4 = """
import os, signal
real = os.replace
def replace(a, b):
    real(a, b)
    if str(b).endswith('model_00004.pt'):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""


# ---- Muon
def test_muon_trains_and_resumes_bit_for_bit(go, tmp_path):
    """On the matrices of the blocks alone; its state is in the checkpoint; AdamW's checkpoints are not taken for it."""
    args = ['--optimizer=muon', '--max_steps=8', '--eval_interval=-1']
    run = go(*args, '--log_dir=a').ok()
    assert losses(run)[-1] < losses(run)[0] - 0.5
    state = load(tmp_path / 'a/model_00008.pt')['optimizer']
    assert {name for name, s in state['state'].items() if 'momentum_buffer' in s} == {
        f'transformer.h.{i}.{part}.weight' for i in range(2) for part in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')}
    assert [g['lr'] for g in state['param_groups']] == [state['param_groups'][0]['lr']] * 3
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for step in (6, 8):
        (tmp_path / f'b/model_{step:05d}.pt').unlink()
    go('--auto_resume', '--log_dir=b', base=[]).ok()
    a, b = (load(tmp_path / folder / 'model_00008.pt') for folder in 'ab')
    assert not differences(a['model'], b['model']) and not differences(a['optimizer'], b['optimizer'])
    assert 'not that of AdamW' in go('--auto_resume', '--log_dir=b', '--optimizer=adamw', '--max_steps=10', base=[]).one_line()


def test_muon_and_adamw_skip_a_step_together(go, tmp_path):
    """float16: an overflow in one optimizer's gradients; a checkpoint of a run that has made no update yet goes on."""
    prelude = """
import torch
real = torch.nn.utils.clip_grads_with_norm_
def clip(parameters, *args, **kwargs):
    parameters[0].grad[0, 0] = float('inf')
    real(parameters, *args, **kwargs)
torch.nn.utils.clip_grads_with_norm_ = clip
real_unscale = torch.amp.GradScaler.unscale_
def unscale(self, optimizer):
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.param_groups[0]['params'][0].grad[0, 0] = float('inf')
    real_unscale(self, optimizer)
torch.amp.GradScaler.unscale_ = unscale
"""
    args = ['--optimizer=muon', '--dtype=float16', '--checkpoint_interval=1', '--keep_last_n_checkpoints=0', '--max_steps=2', '--eval_interval=-1']
    go(*args, prelude=prelude).ok()
    first, second = (load(tmp_path / f'logs/model_0000{step}.pt') for step in (1, 2))
    assert not differences(first['model'], second['model']) and second['scaler']['scale'] < first['scaler']['scale']
    assert all(state['step'] == 0 for state in second['optimizer']['state'].values()) and second['step'] == 2
    go('--auto_resume', '--max_steps=4', base=[]).ok()


def test_muon_on_two_ranks(go):
    runs = [go('--optimizer=muon', f'--log_dir=r{ranks}', ranks=ranks).ok() for ranks in (0, 2)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=2e-3)  # its products are in bfloat16
