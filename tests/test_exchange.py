"""Weights from and for other tools: transformers, nanoGPT, bare state dicts, models with one thing more."""
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from harness import ROOT, TINY, differences, load, losses
from safetensors.torch import load_file, save_file

import model
from model import GPT, TOKENIZERS, GPTConfig, load_tokenizer

SHAPE = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)
X = torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(5))
CACHE = ROOT.parent / 'shared/data/tiktoken_cache'
FILES = Path(__file__).parent / 'files'

def random_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**SHAPE, **changes}))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net.eval()

def their_gpt(activation='gelu_new', **changes):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = dict(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4,
                  activation_function=activation, bos_token_id=0, eos_token_id=0)
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **changes})).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net

def refused(path, *words):
    """from_pretrained says in one plain line what is wrong."""
    with pytest.raises((ValueError, OSError)) as error:
        GPT.from_pretrained(str(path))
    text = str(error.value)
    assert '\n' not in text and '\x1b' not in text and 'BadZipFile' not in text and len(text) < 600, text
    assert all(word in text for word in words), text

# ---- transformers
@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_a_model_saved_by_transformers_has_the_same_logits_and_gradients_here(tmp_path, activation):
    theirs = their_gpt(activation, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert asdict(ours.config) == dict(SHAPE, activation=activation, dropout=0.0)
    assert (ours(X) - theirs(X).logits).abs().max() < 1e-5
    loss = theirs(X, labels=X).loss
    assert ours(X[:, :-1], X[:, 1:]).item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    ours(X[:, :-1], X[:, 1:]).backward()
    mine = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        gradient = mine[name].grad.t() if name.endswith(model.CONV1D) else mine[name].grad
        assert (p.grad - gradient).abs().max() < 1e-4, name

def test_the_layout_of_the_published_files_loads(tmp_path):
    """The hub's gpt2 has no prefix and brings the causal masks; some files are half precision."""
    theirs = their_gpt()
    weights = {name.removeprefix('transformer.'): tensor.contiguous()
               for name, tensor in theirs.state_dict().items() if name != 'lm_head.weight'}
    weights.update({f'h.{i}.attn.bias': torch.ones(1, 1, 32, 32).tril() for i in range(2)})
    save_file(weights, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(theirs.config.to_dict()))
    for path in (tmp_path, tmp_path / 'model.safetensors'):
        found = GPT.from_pretrained(str(path))
        assert (found.eval()(X) - theirs(X).logits).abs().max() < 1e-5
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / 'model.safetensors')
    found = GPT.from_pretrained(str(tmp_path), dropout=0.25)
    assert {p.dtype for p in found.parameters()} == {torch.float32} and found.config.dropout == 0.25

@pytest.mark.parametrize('name, value', [
    ('layer_norm_epsilon', 1e-6), ('scale_attn_weights', False), ('tie_word_embeddings', False),
    ('scale_attn_by_inverse_layer_idx', True), ('n_inner', 64), ('add_cross_attention', True),
    ('model_type', 'llama'), ('activation_function', 'relu'), ('n_head', 5), ('n_head', '4')])
def test_settings_that_this_model_is_not_are_refused_by_name(tmp_path, name, value):
    theirs = their_gpt()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, name: value}))
    words = (name, repr(value)) if 'n_head' != name else ()
    refused(tmp_path, *[word.replace('_function', '') for word in words])

def test_damaged_folders_are_refused_in_one_line(tmp_path):
    good = tmp_path / 'good'
    their_gpt().save_pretrained(good)
    weights, config = load_file(good / 'model.safetensors'), json.loads((good / 'config.json').read_text())
    data = (good / 'model.safetensors').read_bytes()
    no_bias = {name: w for name, w in weights.items() if name != 'transformer.h.1.ln_1.bias'}

    def written(name, content):
        return lambda folder: (folder / name).write_bytes(content)
    for i, (word, change) in enumerate((
            ('config.json', lambda folder: (folder / 'config.json').unlink()),
            ('model.safetensors', lambda folder: (folder / 'model.safetensors').unlink()),
            ('', written('model.safetensors', data[:-100])), ('', written('model.safetensors', b'')),
            ('', written('config.json', b'{')),
            ('model_type', written('config.json', b'{"model_type": "llama", "hidden_size": 64}')),
            ('n_positions', written('config.json', json.dumps(
                {name: value for name, value in config.items() if name != 'n_positions'}).encode())),
            ('lm_head', lambda folder: save_file(
                {**weights, 'lm_head.weight': torch.zeros(96, 32)}, folder / 'model.safetensors')),
            ('extra', lambda folder: save_file(
                {**weights, 'transformer.extra': torch.zeros(9)}, folder / 'model.safetensors')),
            ('h.1.ln_1.bias', lambda folder: save_file(no_bias, folder / 'model.safetensors')),
            ('no GPT-2', lambda folder: save_file({'a': torch.zeros(3)}, folder / 'model.safetensors')))):
        folder = tmp_path / f'bad{i}'
        shutil.copytree(good, folder)
        change(folder)
        refused(folder, word)

def test_a_name_of_the_hub_is_downloaded_and_a_wrong_one_said(tmp_path, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    asked = []

    def snapshot_download(repository, allow_patterns=()):
        asked.append(repository)
        if 'medium' in repository:
            raise ConnectionError('no\nnetwork')
        return str(tmp_path / 'hub')
    monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
    monkeypatch.chdir(tmp_path)
    their_gpt().save_pretrained('hub')
    for name in ('gpt2', 'some/model'):
        assert GPT.from_pretrained(name).config.n_layer == 2
    assert asked == ['openai-community/gpt2', 'some/model']
    refused('gpt2-medium', 'was not downloaded', 'no network')
    for name in ('nowhere', 'a/b/c', 'missing.pt', 'some/missing.pt'):
        refused(name, 'no model of the hub')
    shutil.copytree('hub', 'gpt2-medium')  # what lies here comes first
    assert GPT.from_pretrained('gpt2-medium').config.n_layer == 2

# ---- .pt files
@pytest.mark.parametrize('name', ['nanogpt.pt', 'nanogpt_nobias.pt'])
def test_a_checkpoint_of_nanogpt_has_its_logits_here(name):
    """Written by nanoGPT's train.py, the logits by its model.py, which applies the exact GELU."""
    expected = torch.load(FILES / 'nanogpt_logits.pt', weights_only=True)
    found = GPT.from_pretrained(str(FILES / name)).eval()
    assert found.config.activation == 'gelu' and found.config.n_head == 2
    assert (found(expected['x']) - expected[name]).abs().max() < 1e-5

@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_prefixes_of_compile_and_ddp_and_a_tied_head_do_not_matter(tmp_path, prefix):
    ours = random_gpt()
    weights = {prefix + name: tensor for name, tensor in ours.state_dict().items()}
    weights[prefix + 'lm_head.weight'] = ours.transformer.wte.weight.detach()
    torch.save(weights, tmp_path / 'bare.pt')
    refused(tmp_path / 'bare.pt', 'does not tell the shape', 'model_config')
    torch.save({'model': weights, 'model_config': SHAPE}, tmp_path / 'a.pt')  # as the line says
    assert torch.equal(GPT.from_pretrained(str(tmp_path / 'a.pt')).eval()(X), ours(X))

@dataclass
class ForeignConfig:
    n_layer: int = 2

def test_files_that_are_no_such_weights_are_refused_in_one_line(tmp_path):
    ours = random_gpt()
    weights, shape = dict(ours.state_dict()), asdict(ours.config)

    def save(name, content=None, **changes):
        content = content or dict(model={**weights, **changes}, model_config=shape)
        torch.save(content, tmp_path / name)
        return tmp_path / name
    file = save('good.pt')
    assert torch.equal(GPT.from_pretrained(str(file)).eval()(X), ours(X))
    refused(save('dataclass.pt', dict(model=weights, config=ForeignConfig())),
            'test_exchange.ForeignConfig', 'would run code')
    torch.save(weights, tmp_path / 'legacy.pt', _use_new_zipfile_serialization=False)
    refused(tmp_path / 'legacy.pt', 'another format')
    for name, content in (('text.pt', b'not a checkpoint\n' * 99), ('empty.pt', b''),
                          ('short.pt', file.read_bytes()[:-2000]), ('half.pt', file.read_bytes()[:20000])):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
    data = bytearray(file.read_bytes())
    data[data.index(weights['transformer.h.1.mlp.c_fc.weight'].numpy().tobytes()) + 77] ^= 4
    (tmp_path / 'flipped.pt').write_bytes(data)
    refused(tmp_path / 'flipped.pt', 'damaged')
    refused(save('head.pt', **{'lm_head.weight': torch.zeros(96, 32)}), 'lm_head.weight')
    refused(save('extra.pt', **{'transformer.h.0.q_norm.weight': torch.zeros(3)}), 'h.0.q_norm.weight')
    missing = {name: tensor for name, tensor in weights.items() if 'h.1.ln_2.bias' not in name}
    refused(save('missing.pt', dict(model=missing, model_config=shape)), 'h.1.ln_2.bias')
    refused(save('wide.pt', **{'transformer.h.0.ln_1.bias': torch.zeros(3)}), 'h.0.ln_1.bias')
    refused(save('field.pt', dict(model=weights, model_config=dict(shape, rope=True))), 'rope')
    for i, content in enumerate(([1, 2], {'model.embed_tokens.weight': torch.zeros(3)}, {'step': 3},
                                 {'state_dict': weights, 'epoch': 1})):
        refused(save(f'other{i}.pt', content))

def test_the_script_passes_these_lines_on(go, tmp_path):
    torch.save(dict(model={}, config=ForeignConfig()), tmp_path / 'dataclass.pt')
    (tmp_path / 'text.pt').write_text('text')
    torch.save(random_gpt().state_dict(), tmp_path / 'bare.pt')
    for name, word in (('dataclass.pt', 'would run code'), ('text.pt', 'another format'),
                       ('bare.pt', 'does not tell the shape'), ('none.pt', 'no model of the hub')):
        assert word in go(f'--init_from={name}').one_line() and not (tmp_path / 'logs').exists()
    for name, word in (('text.pt', 'another format'), ('bare.pt', 'weights alone: --init_from=bare.pt')):
        assert word in go(f'--checkpoint_path={name}', '--resume').one_line()
        assert word in go(f'--checkpoint_path={name}', '--eval_only', base=[]).one_line()

# ---- export
@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_what_is_exported_loads_in_transformers_and_comes_back(tmp_path, activation):
    transformers = pytest.importorskip('transformers')
    ours, folder = random_gpt(vocab_size=320, activation=activation, dropout=0.1), str(tmp_path / 'out')
    ours.save_pretrained(folder, TOKENIZERS['bytes'])
    assert sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert theirs.config.attn_pdrop == 0.1 and theirs.config.eos_token_id == 256
    logits = theirs.eval()(X + 160).logits
    assert logits.shape[-1] == 257 and (ours(X + 160)[..., :257] - logits).abs().max() < 1e-5
    back = GPT.from_pretrained(folder)
    assert back.tokenizer == TOKENIZERS['bytes']
    assert asdict(back.config) == dict(asdict(ours.config), vocab_size=257, dropout=0.0)
    assert torch.equal(back.eval()(X), ours(X)[..., :257])

@pytest.mark.skipif(not CACHE.exists(), reason="GPT-2's tokenizer is not here")
def test_an_export_of_gpt2_ids_brings_the_tokenizer(tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    random_gpt(vocab_size=50304).save_pretrained(str(tmp_path / 'out'), TOKENIZERS['gpt2'])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    text = "Hello, I'm a language model é😀\n  x<|endoftext|>"
    assert tokenizer(text)['input_ids'] == load_tokenizer('gpt2').encode(text, allowed_special='all')
    assert tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 32
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').config.vocab_size == 50257

def test_the_script_exports_and_takes_nothing_away(go, tmp_path):
    go('--activation=gelu').ok()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.txt').write_text('x')
    before = sorted(path for path in tmp_path.rglob('*') if not path.name.startswith('.stdout'))
    for there in ('logs', 'mine', 'mine/thesis.txt', '.', ''):
        go(f'--export={there}', base=[]).one_line()
    after = sorted(path for path in tmp_path.rglob('*') if not path.name.startswith('.stdout'))
    assert before == after  # nothing half made is left either
    assert 'wrote out/deep' in go('--export=out/deep', base=[]).ok().out
    stored = load(tmp_path / 'logs/model_00004.pt')['model']
    stored['transformer.wte.weight'] = stored['transformer.wte.weight'][:257]  # the padding stays here
    assert not differences(dict(GPT.from_pretrained(str(tmp_path / 'out/deep')).state_dict()), stored)
    go('--export=two/', '--init_from=out/deep', '--log_dir=none', base=[]).ok()
    assert (tmp_path / 'two/model.safetensors').read_bytes() == (
        tmp_path / 'out/deep/model.safetensors').read_bytes()
    go('--export=three', '--checkpoint_path=logs/model_00002.pt', base=[]).ok()
    # nobody knows how its 65 ids are written
    assert 'tokenizer' in go(f'--init_from={FILES}/nanogpt.pt', '--export=four', base=[]).one_line()

def test_an_export_that_runs_out_of_space_leaves_no_folder(go, tmp_path):
    go().ok()
    run = go('--export=out', base=[], files_limit=2000)
    assert run.code != 0 and not (tmp_path / 'out').exists()
    go('--export=out', base=[]).ok()  # what is left of it is in nobody's way
    assert GPT.from_pretrained(str(tmp_path / 'out')).config.n_layer == 2

# ---- a run that begins with them
def test_init_from_takes_weights_and_shape_and_a_resume_needs_neither(go, tmp_path):
    go('--max_steps=30', '--max_lr=2e-2', '--eval_interval=30', '--checkpoint_interval=30').ok()
    go('--export=out', base=[]).ok()
    begin = [word for word in TINY if not re.match('--(n_|block_size)', word)] + ['--init_from=out']
    run = go('--log_dir=tuned', base=begin).ok()
    assert losses(run)[0] < 3 and load(tmp_path / 'tuned/model_00004.pt')['model_config'] == dict(
        block_size=16, vocab_size=320, n_layer=2, n_head=4, n_embd=16, dropout=0.0, activation='gelu_new')
    short = go('--log_dir=short', '--block_size=8', base=begin).ok()
    assert 'block_size=8' in short.out and losses(short)[0] < 3
    for typed, words in ((['--block_size=32'], 'block_size 32 is over its 16'),
                         (['--n_layer=3'], '--n_layer=3: out has 2'),
                         (['--vocab_size=200'], 'vocab_size 200')):
        assert words in go(*typed, '--log_dir=new', base=begin).one_line()
    assert '--auto_resume' in go('--log_dir=tuned', base=begin).one_line()  # a run is there already
    shutil.rmtree(tmp_path / 'out')
    go('--auto_resume', '--log_dir=tuned', '--max_steps=6', base=[]).ok()
    go('--auto_resume', '--log_dir=tuned', '--max_steps=8', base=begin).ok()  # the same command again
    words = go('--auto_resume', '--log_dir=tuned', '--n_layer=3', base=[]).one_line()
    assert '--n_layer=3: tuned/model_00008.pt has 2' in words

# ---- a model with one field more
PROBE = """
from model import GPT
import sys
print('norm is', GPT.from_pretrained(sys.argv[1]).config.norm)
"""

def replaced(path, *changes):
    text = path.read_text()
    for old, new in changes:
        text, n = re.subn(old, new, text, flags=re.MULTILINE)
        assert n, old
    path.write_text(text)

@pytest.fixture
def mine(tmp_path):
    """A copy of the repository to whose model someone has added `norm`."""
    folder = tmp_path / 'mine'
    shutil.copytree(ROOT / 'prepare', folder / 'prepare')
    for path in (*ROOT.glob('model*.py'), *ROOT.glob('configurator*.py'), ROOT / 'train_gpt2.py'):
        shutil.copy(path, folder)
    replaced(folder / 'model.py', (
        r"^(    activation: str = .*\n)", r"\1    norm: str = 'layernorm'\n"), (
        r'nn\.LayerNorm\(config\.n_embd, eps=1e-5\)',
        "(nn.RMSNorm if config.norm == 'rmsnorm' else nn.LayerNorm)(config.n_embd, eps=1e-5)"))
    replaced(folder / 'train_gpt2.py', (
        r"^(activation = .*\n)", r"\1norm = 'layernorm'        # layernorm | rmsnorm\n"))
    (folder / 'probe.py').write_text(PROBE)
    return folder

def test_a_field_more_comes_back_wherever_the_model_is_read(go, launcher, mine, tmp_path):
    def there(*args, base=TINY):
        return launcher.run(mine / 'train_gpt2.py', [*base, *args], cwd=tmp_path)
    there('--norm=rmsnorm').ok()
    path = 'logs/model_00004.pt'
    stored = load(tmp_path / path)
    assert stored['model_config']['norm'] == 'rmsnorm' and 'transformer.ln_f.bias' not in stored['model']
    # read back, and nobody types it again
    assert 'norm is rmsnorm' in launcher.run(mine / 'probe.py', [path], cwd=tmp_path).ok().out
    there('--log_dir=begun', f'--init_from={path}').ok()
    there('--resume', '--max_steps=6', base=[]).ok()
    for name in ('begun/model_00004.pt', 'logs/model_00006.pt'):
        assert load(tmp_path / name)['model_config']['norm'] == 'rmsnorm'
        assert load(tmp_path / name)['config']['norm'] == 'rmsnorm'
    assert 'val loss' in there('--eval_only', f'--checkpoint_path={path}', base=[]).ok().out
    there('--generate=a', base=[]).ok()
    assert 'norm=layernorm' in there('--resume', '--max_steps=8', '--norm=layernorm', base=[]).one_line()
    # what it cannot be is said by name
    assert 'norm' in there('--export=out', base=[]).one_line() and not (tmp_path / 'out').exists()
    refused(tmp_path / path, 'norm')
    assert 'norm' in go('--log_dir=other', f'--init_from={path}').one_line()
    for mode in (['--resume', '--max_steps=9'], ['--eval_only'], ['--generate=a']):
        assert 'norm' in go(*mode, f'--checkpoint_path={path}', base=[]).one_line()

def test_weights_without_the_field_have_its_default(launcher, mine, tmp_path):
    torch.save(dict(model=random_gpt().state_dict(), model_config=SHAPE), tmp_path / 'plain.pt')
    run = launcher.run(mine / 'probe.py', ['plain.pt'], cwd=tmp_path).ok()
    assert 'norm is layernorm' in run.out

def test_another_activation_is_one_entry_in_the_model_file(go, launcher, tmp_path):
    added = "import model; model.ACTIVATIONS['relu2'] = lambda x: x.relu() ** 2"
    assert '--activation=relu2: must be one of gelu_new, gelu' in go('--activation=relu2').one_line()
    shutil.copytree(ROOT / 'prepare', tmp_path / 'mine/prepare')
    for path in (*ROOT.glob('model*.py'), *ROOT.glob('configurator*.py'), ROOT / 'train_gpt2.py'):
        shutil.copy(path, tmp_path / 'mine')
    replaced(tmp_path / 'mine/train_gpt2.py', (r'# gelu_new \| gelu', '# gelu_new | gelu | relu2'))

    def there(*args, base=TINY):
        return launcher.run(tmp_path / 'mine/train_gpt2.py', [*base, *args], cwd=tmp_path, prelude=(
            f'import sys; sys.path.insert(0, {str(tmp_path / "mine")!r}); {added}'))
    there('--activation=relu2', '--max_steps=2').ok()
    there('--auto_resume', '--max_steps=3', base=[]).ok()
    assert load(tmp_path / 'logs/model_00003.pt')['model_config']['activation'] == 'relu2'
    assert 'activation' in go('--init_from=logs/model_00003.pt', '--log_dir=new').one_line()
