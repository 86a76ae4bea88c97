"""model.py: Qwen3 against transformers, its files, its tokenizer and chat template, latent thoughts, QwenLatentPRM."""
import json

import numpy as np
import pytest
import torch
from harness import ROOT

from model import Qwen3, Qwen3Config, QwenLatentPRM, write_whole

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
REAL = ROOT.parent / 'shared' / 'data' / 'qwen_tokenizer'


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = Qwen3(Qwen3Config(**{**SHAPE, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # norms too: a one hides mistakes
    return model.eval()


def theirs(folder):
    """The same weights in transformers, from the folder that ours wrote."""
    transformers = pytest.importorskip('transformers')
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def folder(tmp_path):
    write_whole(str(tmp_path / 'qwen'), small().files())
    return str(tmp_path / 'qwen')


def rewrite(folder, **changes):
    """Change fields of its config.json; None deletes one."""
    path = f'{folder}/config.json'
    with open(path) as file:
        content = {**json.load(file), **changes}
    with open(path, 'w') as file:
        json.dump({name: value for name, value in content.items() if value != 'gone'}, file)
    return folder


# ---- equality with transformers
@pytest.mark.parametrize('tied', [True, False])
def test_parity_with_transformers(tmp_path, tied):
    ours = small(tie_word_embeddings=tied)
    write_whole(str(tmp_path / 'qwen'), ours.files())
    reference, ids = theirs(tmp_path / 'qwen'), torch.randint(96, (3, 20))
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        logits, hidden, _ = ours(ids)
        assert (hidden - expected.hidden_states[-1]).abs().max() < 1e-5
        assert (logits - expected.logits).abs().max() < 1e-5
        embedded = ours.model.embed_tokens(ids)
        assert torch.equal(ours(embedded)[0], logits)
        again = Qwen3.from_pretrained(str(tmp_path / 'qwen'))
        assert torch.equal(again(ids)[0], logits) and ('lm_head.weight' in again.state_dict()) is not tied
    weights = dict(reference.named_parameters())
    assert weights.keys() == ours.state_dict().keys() and all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())


def test_parity_of_gradients(folder):
    ours, reference, ids = small(), theirs(folder), torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    for hidden in (ours(ids)[1], reference.model(ids).last_hidden_state):
        (hidden * torch.linspace(-1, 1, 32)).sum().backward()
    weights = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - weights[name].grad).abs().max() < 1e-4 * p.grad.abs().max(), name


@pytest.mark.parametrize('parts', [(1,) * 20, (4, 1, 9, 6), (20,)])
def test_cached_steps_equal_whole_forwards(parts):
    ours, ids, cache, found = small(), torch.randint(96, (2, 20)), None, []
    with torch.no_grad():
        for part in ids.split(parts, 1):
            _, hidden, cache = ours(part, cache)
            found.append(hidden)
        assert (torch.cat(found, 1) - ours(ids)[1]).abs().max() < 1e-5


def test_a_cache_is_never_written_to():
    ours, ids = small(), torch.randint(96, (1, 8))
    with torch.no_grad():
        _, _, cache = ours(ids)
        before = [(k.clone(), v.clone()) for k, v in cache]
        branches = [ours(torch.tensor([[token]]), cache)[0] for token in (3, 4)]
        both = ours(torch.tensor([[3], [4]]), [(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)) for k, v in cache])[0]
        assert (torch.cat(branches) - both).abs().max() < 1e-5
    assert all(torch.equal(a, b) for old, new in zip(before, cache, strict=True) for a, b in zip(old, new, strict=True))


def test_padding_on_the_right_changes_nothing(folder):
    ours, reference, ids = small(), theirs(folder), torch.randint(96, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        expected = reference.model(ids, attention_mask=mask).last_hidden_state
        assert ((ours(ids)[1] - expected) * mask.unsqueeze(2)).abs().max() < 1e-5
        assert (ours(ids)[1][1, :7] - ours(ids[1:, :7])[1][0]).abs().max() < 1e-5


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        ours = small()
        ours.model.grad_checkpoint = recompute
        ours(torch.arange(12).unsqueeze(0))[0].logsumexp(2).sum().backward()
        gradients.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_published_size():
    config = dict(SHAPE, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                  head_dim=128, max_position_embeddings=40960)
    with torch.device('meta'):
        model = Qwen3(Qwen3Config(**config))
    assert sum(p.numel() for p in model.parameters()) == 596_049_920
    assert sum(p.numel() for p in [*model.model.layers.parameters(), *model.model.norm.parameters()]) == 440_467_456


# ---- files
def test_both_dialects_of_config_json(folder):
    transformers = pytest.importorskip('transformers')
    theirs(folder).save_pretrained(folder + '5')
    spelling = json.loads((open(folder + '5/config.json')).read())
    assert Qwen3Config.from_json(spelling) == Qwen3Config(**SHAPE)
    assert ('rope_parameters' in spelling) == (int(transformers.__version__.split('.')[0]) >= 5)
    hub = dict(SHAPE, architectures=['Qwen3ForCausalLM'], attention_bias=False, attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645, hidden_act='silu',
               initializer_range=0.02, max_window_layers=28, model_type='qwen3', rope_scaling=None, rope_theta=1000000, sliding_window=None,
               torch_dtype='bfloat16', transformers_version='4.51.0', use_cache=True, use_sliding_window=False)
    assert Qwen3Config.from_json(hub) == Qwen3Config(**SHAPE)


BAD_CONFIGS = [*(({name: 'gone'}, f'{name} is missing') for name in SHAPE), (dict(rope_theta='1e6'), 'rope_theta'), (dict(head_dim=15), 'heads of size 15'),
               (dict(num_key_value_heads=3), '3 key-value heads'), (dict(hidden_size=-4), 'hidden_size is -4'), (dict(hidden_size=32.5), 'hidden_size is 32.5'),
               (dict(hidden_size=10 ** 30), 'hidden_size is 1000'), (dict(tie_word_embeddings=1), 'tie_word_embeddings is 1'),
               (dict(rms_norm_eps=float('nan')), 'rms_norm_eps is nan'), (dict(model_type='qwen2'), 'model_type'), (dict(attention_bias=True), 'attention_bias'),
               (dict(use_sliding_window=True), 'use_sliding_window'), (dict(rope_scaling=dict(type='yarn')), 'rope_scaling'), (dict(hidden_act='gelu'), 'hidden_act'),
               (dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e6)), 'rope_type'), (dict(rope_parameters=dict(rope_theta=1e4)), 'says rope_theta'),
               (dict(layer_types=['full_attention', 'sliding_attention']), 'layer_types'), (dict(layer_types=3), 'layer_types'),
               (dict(num_hidden_layers=4), 'model.layers.3.*is missing'), (dict(vocab_size=97), r'embed_tokens.weight is .*\(96, 32\), expected \(97, 32\)'),
               (dict(tie_word_embeddings=False), 'lm_head.weight is missing'), (dict(num_hidden_layers=2), 'no weight of this model'),
               (dict(vocab_size=2 ** 31 - 1, hidden_size=2 ** 31 - 1, intermediate_size=2 ** 31 - 1), '.')]


@pytest.mark.parametrize('changes, said', BAD_CONFIGS, ids=[said for _, said in BAD_CONFIGS])
def test_wrong_configs_are_named(folder, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        Qwen3.from_pretrained(rewrite(folder, **changes))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['', '[]', '{', '3', '[' * 100000, '{"model_type": "qwen3"}', '\x00'])
def test_damaged_configs_are_named(folder, text):
    with open(folder + '/config.json', 'w') as file:
        file.write(text)
    with pytest.raises(ValueError, match='qwen: '):
        Qwen3.from_pretrained(folder)


def test_sharded_weights_and_a_head_although_tied(tmp_path, folder):
    from safetensors.torch import save_file
    ids, expected = torch.randint(96, (1, 9)), small()
    theirs(folder).save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
    assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
    assert torch.equal(Qwen3.from_pretrained(str(tmp_path / 'shards'))(ids)[0], expected(ids)[0])
    weights = dict(expected.state_dict(), **{'lm_head.weight': expected.head.detach().clone()})
    save_file(weights, folder + '/model.safetensors')
    assert torch.equal(Qwen3.from_pretrained(folder)(ids)[0], expected(ids)[0])
    weights['lm_head.weight'] = weights['lm_head.weight'] + 1
    save_file(weights, folder + '/model.safetensors')
    with pytest.raises(ValueError, match='lm_head.weight differs'):
        Qwen3.from_pretrained(folder)


def test_half_precision_files_become_float32(folder):
    from safetensors.torch import save_file
    save_file({name: p.bfloat16() for name, p in small().state_dict().items()}, folder + '/model.safetensors')
    model = Qwen3.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and torch.equal(model.head, small().head.bfloat16().float())


def test_damaged_weights_are_refused_or_harmless(folder, fuzz):
    """Truncations and flipped bits in the header: ValueError in one line. (The file holds no check sum of its numbers.)"""
    path, rng = folder + '/model.safetensors', np.random.default_rng(0)
    with open(path, 'rb') as file:
        whole = file.read()
    header = 8 + int.from_bytes(whole[:8], 'little')
    for i in range(fuzz // 2):
        data = bytearray(whole)
        if i % 2:
            data = data[:rng.integers(len(whole))]
        else:
            data[rng.integers(header)] ^= 1 << int(rng.integers(8))
        with open(path, 'wb') as file:
            file.write(data)
        try:
            Qwen3.from_pretrained(folder)
            assert i % 2 == 0 and bytes(data) != whole  # a bit of a blank or of the metadata
        except ValueError as error:
            assert '\n' not in str(error)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(OSError, match='no model of the hub'):
        Qwen3.from_pretrained(str(tmp_path / 'none'))
    for name in ('model.safetensors', 'config.json'):
        (tmp_path / 'qwen' / name).unlink()
        with pytest.raises(ValueError, match=f'lacks {name}'):
            Qwen3.from_pretrained(folder)
    with pytest.raises(ValueError, match='expected a folder'):
        Qwen3.from_pretrained(__file__)


# ---- realignment
def test_realignment():
    """W_a is None, the identity, where the embeddings are one; else the least-squares way from one to the other."""
    tied, untied = small(), small(tie_word_embeddings=False)
    matrix, norm = tied.realignment()
    assert matrix is None and norm.item() == pytest.approx(tied.head.norm(dim=1).mean().item())
    head, embedding = untied.head.detach().double(), untied.model.embed_tokens.weight.detach().double()
    expected = torch.linalg.inv(head.T @ head + 1e-5 * torch.eye(32)) @ head.T @ embedding
    assert (untied.realignment()[0] - expected).abs().max() < 1e-5
    untied.lm_head.weight = untied.model.embed_tokens.weight
    assert (untied.realignment()[0] - torch.eye(32)).abs().max() < 1e-5  # so None is right


# ---- QwenLatentPRM
def prm(folder, seed=0, **settings):
    torch.manual_seed(seed)
    model = QwenLatentPRM(folder, **settings)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    return model


@pytest.mark.parametrize('question', [False, True])
@pytest.mark.parametrize('pooling', ['mean', 'last', 'max'])
def test_a_score_does_not_depend_on_batch_or_padding(folder, pooling, question):
    """Alone and in a batch, padding in front, behind or between, masks of any type: the same score."""
    model, rng = prm(folder, pooling_strategy=pooling, question_context=question), np.random.default_rng(0)
    paths = [torch.randn(n, 32) for n in (5, 1, 9, 5)]
    asked = [torch.randint(96, (n,)) for n in (7, 12, 3, 4)]
    alone = torch.cat([model.predict_scores(p[None], torch.ones(1, len(p)), *([q[None]] if question else [])) for p, q in zip(paths, asked, strict=True)])
    assert alone.std() > 0.01 and (alone > 0).all() and (alone < 1).all()
    for dtype in (torch.bool, torch.long, torch.float32, torch.bfloat16):
        latents, mask = torch.randn(4, 11, 32), torch.zeros(4, 11, dtype=dtype)
        ids, ids_mask = torch.randint(96, (4, 14)), torch.zeros(4, 14, dtype=dtype)
        for b, (path, words) in enumerate(zip(paths, asked, strict=True)):
            places = np.sort(rng.choice(11, len(path), replace=False))
            latents[b, places], mask[b, places] = path, 1
            places = np.sort(rng.choice(14, len(words), replace=False))
            ids[b, places], ids_mask[b, places] = words, 1
        scores = model.predict_scores(latents, mask, *((ids, ids_mask) if question else ()))
        assert (scores - alone).abs().max() < 1e-5
        steps = model.step_scores(latents, mask, *((ids, ids_mask) if question else ()))
        for b, path in enumerate(paths):
            for n, step in enumerate(steps[b, mask[b] != 0], 1):  # each is the score of the path up to there
                own = model.predict_scores(path[None, :n], torch.ones(1, n), *([asked[b][None]] if question else []))
                assert abs(step - own[0]) < 1e-5
        assert (steps[mask == 0] == 0).all()


def test_the_question_is_what_the_generator_read(folder):
    """With a question in front, the hidden states at the latents are those of the language model itself."""
    model, base = prm(folder, question_context=True).eval(), small()
    ids, latents = torch.randint(96, (1, 6)), torch.randn(1, 4, 32)
    with torch.no_grad():
        hidden, _, _ = model.hidden(latents, torch.ones(1, 4), ids)
        expected = base(torch.cat((base.model.embed_tokens(ids), latents), 1))[1][:, 6:]
    assert (hidden - expected).abs().max() < 1e-5


def test_parameters_of_the_prm(folder):
    """Latents alone: no embedding table. With a question: the published one, which does not learn. The rest all gets gradients."""
    for question in (False, True):
        model = prm(folder, question_context=question)
        names = dict(model.named_parameters())
        assert ('model.embed_tokens.weight' in names) == question
        ids = [torch.randint(96, (2, 5))] if question else []
        model(torch.randn(2, 3, 32), torch.ones(2, 3), *ids).sum().backward()
        assert all((p.grad is not None) == (name != 'model.embed_tokens.weight') for name, p in names.items())


def test_modes_and_dropout(folder):
    model, latents, mask = prm(folder, dropout_prob=0.5), torch.randn(2, 3, 32), torch.ones(2, 3)
    model.train()
    assert torch.equal(model.predict_scores(latents, mask), model.predict_scores(latents, mask)) and model.training
    assert not torch.equal(model(latents, mask), model(latents, mask))
    model.eval()
    assert torch.equal(model(latents, mask).sigmoid(), model.predict_scores(latents, mask)) and not model.training


def test_weights_are_not_used_in_another_way(folder, tmp_path):
    torch.save(prm(folder).state_dict(), tmp_path / 'pytorch_model.bin')
    weights = torch.load(tmp_path / 'pytorch_model.bin')
    model = QwenLatentPRM(folder)
    model.load_state_dict(weights)
    latents, mask = torch.randn(2, 3, 32), torch.ones(2, 3)
    assert torch.equal(model.predict_scores(latents, mask), prm(folder).predict_scores(latents, mask))
    with pytest.raises(ValueError, match='trained on mean, this model is made for last.*pooling_strategy=\'mean\''):
        QwenLatentPRM(folder, pooling_strategy='last').load_state_dict(weights)
    with pytest.raises(ValueError, match='trained on latents alone, this model is made for question and latents.*question_context=False'):
        QwenLatentPRM(folder, question_context=True).load_state_dict(weights)
    for wrong in ({}, {'pooling': torch.tensor(7)}, {'pooling': 'mean'}, {**weights, 'context': torch.zeros(3)}):
        with pytest.raises(ValueError, match='do not tell their'):
            model.load_state_dict(wrong)


def test_what_the_prm_refuses(folder):
    model, latents, mask = prm(folder), torch.randn(2, 3, 32), torch.ones(2, 3)
    with pytest.raises(ValueError, match='896 wide, the hidden size of this model is 32.*1024'):
        model.predict_scores(torch.randn(1, 10, 896), torch.ones(1, 10))
    for bad_latents, bad_mask in ((latents[0], mask), (latents, mask[:1]), (latents, torch.ones(2, 4))):
        with pytest.raises(ValueError, match='expected latents'):
            model.predict_scores(bad_latents, bad_mask)
    with pytest.raises(ValueError, match='row 1 has no latents'):
        model.predict_scores(latents, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match='question_context=True'):
        model.predict_scores(latents, mask, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match='give question_ids'):
        prm(folder, question_context=True).predict_scores(latents, mask)
    with pytest.raises(ValueError, match='pooling_strategy'):
        QwenLatentPRM(folder, pooling_strategy='sum')
