"""prepare/latent_prm.py and prepare/tiny_qwen.py: siblings that know nothing of each other, scores, shards, resuming, errors, speed.

    python tests/test_latent_prm_prepare.py data/tiny_qwen      how much faster than one path after another, A B A B
"""
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]

from harness import KILL_AT, differences, load  # noqa: E402

import prepare.latent_prm as collect  # noqa: E402
from model import QWEN_NEEDED, Qwen3, Qwen3Config, QwenLatentPRM, QwenTokenizer, answer_of, write_whole  # noqa: E402
from prepare.tiny_qwen import tokenizer_json  # noqa: E402

SMALL = ['--task=arithmetic', '--model_path=qwen', '--max_samples=5', '--shard_size=2', '--num_paths=4', '--latent_steps=3', '--max_new_tokens=6']


@pytest.fixture(scope='session')
def qwen(tmp_path_factory):
    """A folder with a random model and a tokenizer of bytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('qwen') / 'qwen'
    model = Qwen3(Qwen3Config(vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                              max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        model.lm_head.weight[48:58] *= 3  # digits are likely, so that there are answers
    write_whole(str(folder), {**model.files(), 'tokenizer.json': tokenizer_json(['user', 'assistant', '\n\n'], QWEN_NEEDED)})
    return folder


@pytest.fixture
def go(launcher, qwen, tmp_path):
    """go('--seed=1', ...) collects in a folder of its own."""
    (tmp_path / 'qwen').symlink_to(qwen)

    def go(*args, base=SMALL, **kwargs):
        return launcher.run('prepare/latent_prm.py', [*base, *args], cwd=tmp_path, **kwargs)
    go.folder = tmp_path
    return go


def serial_rollout(model, tokenizer, ids, generator, settings):
    """One path alone, the way the public code goes: the prompt is read for each path, then one position after another. (latents, ids of the answer)"""
    with torch.no_grad():
        _, hidden, cache = model(torch.tensor([ids]))
        h, latents, matrix = hidden[0, -1], [], settings['realignment']
        for step in range(settings['latent_steps']):
            for sigma, (low, high) in settings['noise'](step):
                drawn = torch.randn(len(h), generator=generator)
                h = h + sigma * (low + (high - low) * torch.rand((), generator=generator)) * h.std() * drawn
            z = h if matrix[0] is None else h @ matrix[0]
            latents.append(matrix[1] * z / z.norm())
            _, hidden, cache = model(latents[-1][None, None], cache)
            h = hidden[0, -1]
        said, draws = [], torch.rand(settings['max_new_tokens'], generator=generator)
        for draw in draws.tolist():
            p = (F.linear(h, model.head)[:tokenizer.n_vocab] / settings['temperature']).softmax(0)
            values, order = p.sort(descending=True)
            kept = int((values.cumsum(0) - values < settings['top_p']).sum())
            token = int(order[min(kept - 1, int((values[:kept].cumsum(0) <= draw * values[:kept].sum()).sum()))])
            if token in tokenizer.ends:
                break
            said.append(token)
            _, hidden, cache = model(torch.tensor([[token]]), cache)
            h = hidden[0, -1]
    return torch.stack(latents), said


def settle(monkeypatch, **settings):
    """Settings for the functions of prepare/latent_prm.py, called here."""
    for name, value in {**dict(task='arithmetic', input='', agents=[], num_rollouts=1, num_paths=6, latent_steps=3, max_new_tokens=8, seed=7), **settings}.items():
        monkeypatch.setattr(collect, name, value)


def asked(tokenizer, count, seed=7):
    """Prompts of one length: [(number, (ids, []))]."""
    prompts = [(i, collect.turns(collect.arithmetic(i, seed)[0], tokenizer)) for i in range(200)]
    most = Counter(len(prompt[0]) for _, prompt in prompts).most_common(1)[0][0]
    return [(i, prompt) for i, prompt in prompts if len(prompt[0]) == most][:count]


# ---- paths
@pytest.mark.parametrize('realign, at_once', [(True, 100), (False, 1), (True, 5)])
def test_siblings_are_independent(qwen, monkeypatch, realign, at_once):
    """Every path of a batch is what it is alone: its latents, and its answer token by token."""
    settle(monkeypatch)
    model, tokenizer = Qwen3.from_pretrained(str(qwen)).eval(), QwenTokenizer.from_pretrained(str(qwen))
    matrix, norm = model.realignment()
    chosen = asked(tokenizer, 3)
    levels = collect.explore(model, tokenizer, [i for i, _ in chosen], [p for _, p in chosen], (matrix if realign else None, norm), at_once)
    settings = dict(latent_steps=3, max_new_tokens=8, temperature=1.0, top_p=0.95, noise=collect.noise, realignment=(matrix if realign else None, norm))
    seen = set()
    for (number, prompt), (paths,) in zip(chosen, levels, strict=True):
        assert len(paths) == 6
        for j, path in enumerate(paths):
            latents, said = serial_rollout(model, tokenizer, prompt[0], collect.generator_of(number, j), settings)
            assert path['latents'].shape == (3, 1, 16) and path['latents'].dtype == torch.bfloat16
            assert (path['latents'].float().squeeze(1) - latents).abs().max() < 0.01 * latents.abs().max()
            assert path['answers'][0][0] == tokenizer.decode(said)
            seen.add(path['answers'][0][0])
    assert len(seen) > 9  # they differ


def test_greedy_answers_and_rollouts(qwen, monkeypatch):
    """Temperature 0 is the likeliest token; several answers behind one path differ, the first is that of a single one."""
    model, tokenizer = Qwen3.from_pretrained(str(qwen)).eval(), QwenTokenizer.from_pretrained(str(qwen))
    (number, prompt), = asked(tokenizer, 1)
    found = {}
    for rollouts, temperature in ((1, 0.0), (3, 0.0), (1, 1.0), (4, 1.0)):
        settle(monkeypatch, num_rollouts=rollouts, temperature=temperature, diversity_strategy='noise')
        ((paths,),) = collect.explore(model, tokenizer, [number], [prompt], model.realignment(), 100)
        found[rollouts, temperature] = [[text for text, *_ in path['answers']] for path in paths]
    assert all(len(set(texts)) == 1 for texts in found[3, 0.0]) and [t[0] for t in found[3, 0.0]] == [t[0] for t in found[1, 0.0]]
    assert [t[0] for t in found[4, 1.0]] == [t[0] for t in found[1, 1.0]] and any(len(set(texts)) > 1 for texts in found[4, 1.0])
    latents = collect.explore(model, tokenizer, [number], [prompt], model.realignment(), 100)[0][0][0]['latents'][0].float()
    with torch.no_grad():
        h = model(torch.tensor([prompt[0]]))[1][:, -1]
    sampled = model.speak(h, model(torch.tensor([prompt[0]]))[2], torch.zeros(1, 4), 0, 1.0, tokenizer.n_vocab, set())[0][0]
    ids = list(prompt[0])
    for token in sampled:  # by whole forwards
        assert int(model(torch.tensor([ids]))[0][0, -1, :tokenizer.n_vocab].argmax()) == token
        ids.append(token)
    assert torch.isfinite(latents).all()


def test_sampling_draws_from_the_right_distribution(qwen):
    model = Qwen3.from_pretrained(str(qwen)).eval()
    with torch.no_grad():
        _, hidden, cache = model(torch.tensor([[65, 66]]))
        logits = F.linear(hidden[:, -1], model.head)[0, :256]
    n = 20000
    draws, p = torch.rand(n, 1, generator=torch.Generator().manual_seed(0)), (logits / 0.7).softmax(0)
    said = model.speak(hidden[:, -1].expand(n, -1), [(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in cache], draws, 0.7, 1.0, 256, set())
    assert (torch.bincount(torch.tensor([ids[0] for ids, _, _ in said]), minlength=256) / n - p).abs().max() < 0.015
    assert all(abs(log_p - logits.log_softmax(0)[ids[0]]) < 1e-4 for ids, _, log_p in said[:50])
    inside = set(p.argsort(descending=True)[:int((p.sort(descending=True).values.cumsum(0) < 0.6).sum()) + 1].tolist())
    said = model.speak(hidden[:, -1].expand(n, -1), [(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in cache], draws, 0.7, 0.6, 256, set())
    assert {ids[0] for ids, _, _ in said} == inside


def test_arithmetic_problems(monkeypatch):
    kinds = set()
    for i in range(300):
        question, answer = collect.arithmetic(i, 3)
        a, b = map(int, re.findall(r'\d+', question))
        assert int(answer) == (a - b if '-' in question or 'lost' in question else a + b) >= 0
        kinds.add(re.sub(r'\d+', '', question))
    monkeypatch.setattr(collect, 'max_samples', 3000)
    monkeypatch.setattr(collect, 'task', 'arithmetic')
    found, _ = collect.questions()
    assert len({text for _, text, _ in found}) == len(found) == 3000 and len({collect.arithmetic(i, collect.seed)[0] for i in range(3000)}) < 3000
    every = {WORD.format(a=a, b=b) for WORD, sign in [*collect.WORDS, ('{a}+{b}=?', '+'), ('{a}-{b}=?', '-')] for a in range(10, 100) for b in range(10, 100)
             if sign == '+' or a >= b}
    assert len(every) == collect.ARITHMETIC and {text for _, text, _ in found} < every
    assert len(kinds) == 4 and collect.arithmetic(5, 1) == collect.arithmetic(5, 1) != collect.arithmetic(5, 2)


# ---- shards
def own_file(folder, golds):
    (folder / 'own.jsonl').write_text(''.join(json.dumps(dict(question=f'{i}+1=?', answer=gold)) + '\n' for i, gold in enumerate(golds)))


def test_shards_and_metadata(go):
    """What is stored: equal to grading its own texts; the numbers of the metadata are those of the shards."""
    own_file(go.folder, ['#### 1'] * 6)
    args = ('--input=own.jsonl', '--name=own', '--max_samples=0', '--num_rollouts=3', '--num_paths=8')
    go(*args, '--output_dir=first').ok()
    first = [q for path in sorted((go.folder / 'first').glob('*.pt')) for q in load(path)['questions']]
    golds = [next((p['answer'] for p in q['paths'] if p['answer']), '1') for q in first]  # some answers shall be right
    own_file(go.folder, [f'#### {gold}' for gold in golds])
    out = go(*args, '--output_dir=prm').ok().out
    shards, meta = [load(path) for path in sorted((go.folder / 'prm').glob('*.pt'))], json.loads((go.folder / 'prm/own_metadata.json').read_text())
    assert [s['num_questions'] for s in shards] == [2, 2, 2] and shards[0]['hidden_size'] == 16 and shards[0]['model'] == 'qwen'
    questions = [q for s in shards for q in s['questions']]
    assert len({q['question_id'] for q in questions}) == 6 and [q['gold_answer'] for q in questions] == golds
    right, samples = [], []
    for q in questions:
        votes = Counter(p['answer'] for p in q['paths'] if p['answer'])
        assert q['is_correct'] == (q['final_answer'] == q['gold_answer']) and votes[q['final_answer']] == max(votes.values())
        assert q['question_ids'].dtype == torch.int64 and q['question_ids'].dim() == 1
        for i, p in enumerate(q['paths']):
            assert p['path_id'] == i and p['parent_path_id'] is None and p['child_path_ids'] == [] and p['num_latent_steps'] == 3
            assert p['latent_history'].shape == (3, 1, 16) and p['latent_history'].dtype == torch.bfloat16 and 0 < p['score'] <= 1
            assert p['answer'] == answer_of(p['text']) and p['is_correct'] == (p['answer'] == q['gold_answer']) and p['prm_score'] * 3 == pytest.approx(round(p['prm_score'] * 3))
            samples.append(p['prm_score'])
        right.append([p['is_correct'] for p in q['paths']])
    assert 0 < np.mean(right) < 1
    assert meta['accuracy'] == pytest.approx(np.mean(right)) and meta['pass_at_n'] == np.mean([any(r) for r in right]) and meta['num_samples'] == len(samples) == 48
    assert meta['mixed'] == pytest.approx(np.mean([0 < sum(r) < 8 for r in right])) and meta['majority_vote'] == pytest.approx(np.mean([q['is_correct'] for q in questions]))
    assert meta['score_histogram'] == np.histogram(samples, 10, (0, 1))[0].tolist() and meta['seed'] == 42 and f'accuracy of a path {np.mean(right):.3f}' in out
    prm = QwenLatentPRM(str(go.folder / 'qwen'), question_context=True)
    path = questions[0]['paths'][0]
    assert prm.predict_scores(path['latent_history'].transpose(0, 1), torch.ones(1, 3), questions[0]['question_ids'][None]).shape == (1,)


def test_a_path_does_not_depend_on_what_runs_with_it(go):
    """Other batches, shards, numbers of paths and of questions: the same texts, latents to rounding."""
    go('--output_dir=a').ok()
    go('--output_dir=b', '--cache_gb=0.00001', '--shard_size=100', '--num_paths=3', '--max_samples=4').ok()
    a, b = ({q['question_id']: q for path in sorted((go.folder / name).glob('*.pt')) for q in load(path)['questions']} for name in 'ab')
    assert len(a) == 5 and len(b) == 4
    for name, q in b.items():
        for p, other in zip(q['paths'], a[name]['paths'], strict=False):
            assert p['text'] == other['text'] and p['prm_score'] == other['prm_score']
            assert torch.allclose(p['latent_history'].float(), other['latent_history'].float(), rtol=0.01, atol=1e-3)


def test_a_tree_of_agents(go):
    """Scores are means over the leaves below; a path from which nobody went on has none, rather than 0."""
    go('--agents=planner,critic,Judge Dredd', '--num_parent_paths=2', '--num_rollouts=2', '--output_dir=tree', '--max_samples=2').ok()
    for q in load(go.folder / 'tree/arithmetic_00000.pt')['questions']:
        paths = {p['path_id']: p for p in q['paths']}
        assert len(paths) == 12 and [p['agent_name'] for p in q['paths']] == ['planner'] * 4 + ['critic'] * 4 + ['Judge Dredd'] * 4
        def leaves(p, paths=paths):
            return [p['prm_score']] if p['agent_idx'] == 2 else [s for child in p['child_path_ids'] for s in leaves(paths[child])]
        for p in paths.values():
            assert all(paths[child]['parent_path_id'] == p['path_id'] for child in p['child_path_ids'])
            assert (p['parent_path_id'] is None) == (p['agent_idx'] == 0) and p['latent_history'].shape == (3, 1, 16)
            below = leaves(p)
            assert p['prm_score'] == (pytest.approx(np.mean(below)) if below else None) and (p['is_correct'] is None) == (p['agent_idx'] < 2)
        assert [bool(p['child_path_ids']) for p in q['paths']] == [True, True, False, False] * 2 + [False] * 4


def test_it_continues_and_grows(go):
    straight = go('--output_dir=straight').ok()
    assert 'continuing' not in straight.out
    go('--output_dir=prm', '--max_samples=3').ok()
    assert load(go.folder / 'prm/arithmetic_00001.pt')['num_questions'] == 1
    assert 'continuing in prm: 2 shards, 3 questions are done' in go('--output_dir=prm').ok().out
    again = go('--output_dir=prm').ok()
    assert 'prm is done' in again.out
    for k in range(3):
        assert not differences(*(load(go.folder / name / f'arithmetic_{k:05d}.pt') for name in ('straight', 'prm')))
    assert 'more than --max_samples=3' in go('--output_dir=prm', '--max_samples=3').one_line()
    assert "num_paths 4, now 5" in go('--output_dir=prm', '--num_paths=5').one_line()
    (go.folder / 'prm/arithmetic_00001.pt').write_bytes(b'short')
    (go.folder / 'prm/arithmetic_00002.pt').unlink()
    out = go('--output_dir=prm').ok().out
    assert 'arithmetic_00001.pt and 1 more, which arithmetic_metadata.json lists, missing or cut short: made anew' in out and '1 shards, 2 questions are done' in out
    for k in range(3):
        assert not differences(*(load(go.folder / name / f'arithmetic_{k:05d}.pt') for name in ('straight', 'prm')))
    known = [json.loads((go.folder / name / 'arithmetic_metadata.json').read_text()) for name in ('straight', 'prm')]
    assert known[0]['shards'] == known[1]['shards'] and all(known[0][name] == known[1][name] for name in ('num_questions', 'num_samples', 'accuracy'))
    (go.folder / 'prm/arithmetic_metadata.json').unlink()
    assert 'already holds arithmetic_00000.pt and no arithmetic_metadata.json' in go('--output_dir=prm').one_line()
    (go.folder / 'prm/arithmetic_metadata.json').write_text('{')
    assert 'is damaged' in go('--output_dir=prm').one_line()


def test_killed_while_writing(go):
    """At every operation of its saves: no torn shard under its name, and the same command then gives what one run gives."""
    less = ('--max_samples=2', '--shard_size=1', '--num_paths=2', '--max_new_tokens=2')
    go('--output_dir=straight', *less).ok()
    whole = go('--output_dir=count', *less, prelude=KILL_AT.format(n=0)).ok()
    count = len(re.search('operations: (.*)', whole.out)[1].split())
    assert count > 15
    for n in range(1, count + 1, 5):
        assert go(f'--output_dir=k{n}', *less, prelude=KILL_AT.format(n=n)).codes == [-9]
        folder = go.folder / f'k{n}'
        for path in folder.glob('*.pt') if folder.exists() else []:
            load(path)
        go(f'--output_dir=k{n}', *less).ok()
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (go.folder / 'straight').iterdir()), n
        for k in range(2):
            assert not differences(*(load(where / f'arithmetic_{k:05d}.pt') for where in (go.folder / 'straight', folder))), n


def test_metadata_with_a_damaged_list_of_shards(go):
    go('--output_dir=prm').ok()
    path = go.folder / 'prm/arithmetic_metadata.json'
    good = json.loads(path.read_text())
    first = good['shards'][0]
    for shards in (7, [{}], [1], *([{**first, **bad}] for bad in (dict(bytes='x'), dict(num_paths='x'), dict(accuracy=None), dict(score_histogram=[1]), dict(num_questions=0)))):
        path.write_text(json.dumps({**good, 'shards': shards}))
        assert 'its list of shards is not ours' in go('--output_dir=prm').one_line()


def test_a_full_disk(go):
    run = go('--output_dir=prm', files_limit=3000)
    assert 'prm' in run.one_line(code=1) and not list((go.folder / 'prm').glob('*.pt*'))


ERRORS = [(['--model_path=nowhere'], 'nowhere does not exist and is no model of the hub'), (['--input=none.jsonl'], '--input: none.jsonl does not exist'),
          (['--input=qwen'], 'is a folder'), (['--input=bad.jsonl'], 'bad.jsonl line 2: not JSON'), (['--input=keys.jsonl'], "line 1: found ['q'], expected an object with"),
          (['--input=list.jsonl'], 'found list'), (['--input=number.jsonl'], 'question: the text is int'), (['--input=empty.jsonl'], 'no questions'),
          (['--input=blank.jsonl'], 'no question or no answer'), (['--input=my_test.jsonl'], 'this is a test set'), (['--split=test', '--task=gsm8k'], 'this is a test set'),
          (['--max_samples=24391'], 'there are 24,390 arithmetic questions'), (['--top_p=0'], '--top_p'), (['--top_p=1.5'], '--top_p=1.5'), (['--name=a/b'], '--name=a/b'),
          (['--num_paths=0'], '--num_paths=0'), (['--latent_steps=0'], '--latent_steps=0'), (['--max_new_tokens=600'], '512 positions: --max_new_tokens='),
          (['--diversity_strategy=x'], 'must be one of temperature, noise, hybrid'), (['--task=x'], 'must be one of gsm8k, arithmetic'), (['--device=abacus'], '--device=abacus'),
          (['--dtype=float8'], '--dtype=float8'), (['--output_dir=bad.jsonl'], 'bad.jsonl')]


def test_mistakes_are_said_in_one_line(go):
    for name, content in dict(bad='{"question": "a", "answer": "1"}\n{', keys='{"q": 1}', list='[1]', number='{"question": 1, "answer": "1"}', empty='\n',
                              blank='{"question": " ", "answer": "1"}', my_test='{"question": "a", "answer": "1"}').items():
        (go.folder / f'{name}.jsonl').write_text(content)
    for args, said in ERRORS:
        assert said in go('--output_dir=prm', *args).one_line(), args
        assert not (go.folder / 'prm').exists(), args


def test_a_million_blanks_in_a_question_are_tokens_as_others(go, qwen):
    (go.folder / 'long.jsonl').write_text(json.dumps(dict(question='What' + ' ' * 1_200_000 + 'is 1 + 1?', answer='2')))
    assert '512 positions' in go('--output_dir=prm', '--input=long.jsonl').one_line()  # of this model, not of the tokenizer


def test_a_broken_model_is_said(go, qwen, tmp_path):
    broken = tmp_path / 'broken'
    for name, damage, said in (('config.json', '{', 'broken: '), ('model.safetensors', 'x', 'broken: '), ('tokenizer.json', '[]', 'tokenizer.json'),
                               ('config.json', None, 'lacks config.json'), ('tokenizer.json', None, 'holds no tokenizer'), ('model.safetensors', None, 'lacks model.safetensors')):
        broken.mkdir(exist_ok=True)
        for path in qwen.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        (broken / name).unlink()
        if damage:
            (broken / name).write_text(damage)
        assert said in go('--model_path=broken', '--output_dir=prm').one_line()
    model = Qwen3.from_pretrained(str(qwen))
    with torch.no_grad():
        model.model.norm.weight[0] = float('nan')
    write_whole(str(broken), {**model.files(), 'tokenizer.json': (qwen / 'tokenizer.json').read_bytes()})
    assert 'not finite' in go('--model_path=broken', '--output_dir=prm').one_line(code=1)


# ---- the tiny model
def test_tiny_qwen_is_a_published_folder(launcher, tmp_path):
    transformers = pytest.importorskip('transformers')
    out = launcher.run('prepare/tiny_qwen.py', ['--steps=2', '--batch_size=4', '--output_dir=models/tiny'], cwd=tmp_path).ok().out
    assert '434,944 parameters' in out and 'with latent thoughts' in out
    folder = tmp_path / 'models/tiny'
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), Qwen3.from_pretrained(str(folder))
    tokenizer, text = QwenTokenizer.from_pretrained(str(folder)), '37 apples and 48 more?'
    ids = tokenizer.chat([dict(role='user', content=text)], thinking=False)
    assert transformers.AutoTokenizer.from_pretrained(folder)(tokenizer.decode(ids), add_special_tokens=False)['input_ids'] == ids and len(ids) < 30
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))[0]).abs().max() < 1e-5
    launcher.run('prepare/tiny_qwen.py', ['--steps=1', '--batch_size=4', '--output_dir=models/tiny'], cwd=tmp_path).ok()  # it is replaced
    (folder / 'mine.txt').write_text('')
    assert 'holds something else' in launcher.run('prepare/tiny_qwen.py', ['--steps=1', '--output_dir=models/tiny'], cwd=tmp_path).one_line()


def test_thoughts_in_training_are_those_of_thinking(qwen):
    """As many rounds as thoughts make them exactly what Qwen3.think gives without noise, behind a question whose row is padded, too."""
    from prepare import tiny_qwen
    model = Qwen3.from_pretrained(str(qwen))
    prompts, answer = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], [11, 12, 13, 14, 15, 16, 17]
    longest = max(map(len, prompts)) + len(answer)
    ids = torch.tensor([prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt in prompts])
    places = torch.tensor([row * longest + len(prompt) - 1 + i for row, prompt in enumerate(prompts) for i in range(len(answer))])
    inputs = ids
    for _ in range(tiny_qwen.THOUGHTS):
        inputs = tiny_qwen.with_latent_thoughts(model, ids, inputs, places)
    assert torch.equal(inputs[1, :6], model.model.embed_tokens(ids[1, :6]))
    for prompt, row in zip(prompts, inputs, strict=True):
        with torch.no_grad():
            _, hidden, cache = model(torch.tensor([prompt]))
        latents, _, _ = model.think(hidden[:, -1], cache, tiny_qwen.THOUGHTS, [None], lambda step: [], (None, model.realignment()[1]))
        assert torch.allclose(row[len(prompt):len(prompt) + tiny_qwen.THOUGHTS], latents[0], atol=1e-5)


def speed(folder, questions=8, paths=16):
    """Seconds for the same paths in batches and one after another."""
    for name, value in dict(task='arithmetic', num_paths=paths, latent_steps=5, max_new_tokens=16, seed=0).items():
        setattr(collect, name, value)
    model, tokenizer = Qwen3.from_pretrained(folder).eval(), QwenTokenizer.from_pretrained(folder)
    chosen, realignment = asked(tokenizer, questions, 0), model.realignment()
    settings = dict(latent_steps=5, max_new_tokens=16, temperature=1.0, top_p=0.95, noise=collect.noise, realignment=realignment)
    begun = time.process_time()
    levels = collect.explore(model, tokenizer, [i for i, _ in chosen], [p for _, p in chosen], realignment, 4096)
    together = time.process_time() - begun
    begun = time.process_time()
    alone = [tokenizer.decode(serial_rollout(model, tokenizer, p[0], collect.generator_of(i, j), settings)[1]) for i, p in chosen for j in range(paths)]
    same = np.mean([path['answers'][0][0] == text for path, text in zip([p for (level,) in levels for p in level], alone, strict=True)])
    return together, time.process_time() - begun, same


if __name__ == '__main__':
    torch.set_num_threads(1)
    speed(sys.argv[1], 1, 4)  # warm up
    for _ in range(2):
        together, alone, same = speed(sys.argv[1])
        print(f'128 paths of 5 latent steps and up to 16 tokens | in batches {together:.2f} CPU-s | one after another {alone:.2f} CPU-s | ratio {alone / together:.1f} | '
              f'equal answers {same:.1%}', flush=True)
