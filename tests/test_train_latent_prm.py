"""What train_latent_prm.py alone promises: its data and what is wrong with them, evaluation, folders and log lines of guide 004, its commands, --ask."""
import fcntl
import json
import math
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from itertools import product

import numpy as np
import pytest
import torch
from harness import ROOT, VOLATILE, clean_log, differences, drop, load, make_paths, make_qwen
from test_configurator import GUIDES

import model as m
from prepare.tiny_qwen import tokenizer_json

BASE = ['--data_dir=data', '--model_path=qwen', '--output_dir=run', '--val_size=0.2', '--learning_rate=1e-2', '--logging_steps=1', '--save_steps=-1']


@pytest.fixture
def trains(launcher, tmp_path):
    """trains('--max_steps=2', ...) trains a tiny model in a folder of its own: 64 paths to learn from, 4 steps an epoch."""
    make_paths(tmp_path / 'data')
    make_qwen(tmp_path / 'qwen')

    def trains(*args, base=BASE, **kwargs):
        return launcher.run('train_latent_prm.py', [*base, *args], cwd=tmp_path, **kwargs)
    return trains


def shards(folder):
    return sorted(folder.glob('*.pt'))


def edit(file, change):
    """Change a file of paths: `change` gets its first path, the question of it, and all."""
    stored = load(file)
    change(stored['questions'][0]['paths'][0], stored['questions'][0], stored)
    torch.save(stored, file)


# ---- data: what the reader takes, and what it says about the rest
def test_no_data_is_said_as_the_guide_says_it(trains, tmp_path):
    for file in shards(tmp_path / 'data'):
        file.unlink()
    told = trains('--model_path=nowhere').one_line()
    assert told.startswith('✗ ERROR: No .pt files found in data; to collect paths: `python prepare/latent_prm.py --model_path=nowhere --output_dir=data`')
    assert '--output_dir=data --task=arithmetic' in trains('--preset=tiny').one_line()
    assert trains('--data_dir=none', ranks=2).one_line().startswith('✗ ERROR: No .pt files found in none')
    assert not (tmp_path / 'run').exists()


def all_paths(change):
    def apply(path, question, stored):
        for q in stored['questions']:
            for p in q['paths']:
                change(p)
    return apply


def put(target, **values):
    target.update(values)


BAD = dict(
    format=(lambda p, q, s: s.pop('questions'), 'not in the format of prepare/latent_prm.py'),
    list=(lambda p, q, s: put(s, questions=[3]), 'question 0: not in the format'),
    no_paths=(lambda p, q, s: put(q, paths=None), 'question 0: not in the format'),
    path=(lambda p, q, s: q['paths'].insert(1, 'x'), 'question 0, path 1: not in the format'),
    text=(lambda p, q, s: put(q, question=None), 'is no text'),
    ids=(lambda p, q, s: put(q, question_ids=torch.ones(3)), 'no int64 tokens'),
    nan=(lambda p, q, s: p['latent_history'][0, 0].fill_(math.nan), 'question 0, path 0: its latents are not all finite'),
    infinite=(lambda p, q, s: p['latent_history'][0, 0].fill_(math.inf), 'not all finite'),
    nan_score=(lambda p, q, s: put(p, prm_score=math.nan), 'question 0, path 0: its prm_score is nan'),
    high=(lambda p, q, s: put(p, prm_score=1.2), 'its prm_score is 1.2, expected 0 to 1'),
    low=(lambda p, q, s: put(p, prm_score=-0.5), 'its prm_score is -0.5'),
    word=(lambda p, q, s: put(p, prm_score='good'), 'could not convert'),
    right=(lambda p, q, s: put(p, is_correct=0.5), 'its is_correct is 0.5'),
    width=(lambda p, q, s: put(p, latent_history=torch.ones(2, 1, 8)), 'its latents have 16 numbers, those before it 8'),
    shape=(lambda p, q, s: put(p, latent_history=torch.ones(2, 3, 16)), 'no tensor of (steps, 1, hidden)'),
    whole=(lambda p, q, s: put(p, latent_history=torch.ones(2, 1, 16, dtype=torch.int64)), 'no tensor of (steps, 1, hidden)'),
    empty=(lambda p, q, s: put(p, latent_history=torch.ones(0, 1, 16)), 'is empty'),
    equal=(all_paths(lambda p: put(p, prm_score=0.5)), 'all 80 scores in'),
    none=(all_paths(lambda p: put(p, prm_score=None)), 'no path with latents and a score'),
    one=(lambda p, q, s: put(s, questions=[q]), 'of one question only'),
)


@pytest.mark.parametrize('case', BAD)
def test_bad_data(tmp_path, case):
    change, told = BAD[case]
    make_paths(tmp_path / 'data')
    for file in shards(tmp_path / 'data')[:1 if case not in ('equal', 'none', 'one') else 2]:
        edit(file, change)
    if case == 'one':
        shards(tmp_path / 'data')[1].unlink()
    with pytest.raises(ValueError, match='(?s).*' + re.escape(told)) as error:
        m.open_paths(str(tmp_path / 'data'))
    assert str(error.value).count('\n') == 0 and (case in ('equal', 'none', 'one') or re.search(r'x_0000[01]\.pt: ', str(error.value)))


@pytest.mark.parametrize('ranks, case', [(0, 'nan'), (2, 'high'), (0, 'equal'), (0, 'one'), (0, 'format')])
def test_bad_data_end_the_run_before_the_model_is_loaded(trains, tmp_path, ranks, case):
    for file in shards(tmp_path / 'data'):
        edit(file, BAD[case][0])
    if case == 'one':
        shards(tmp_path / 'data')[1].unlink()
    err = trains('--model_path=nowhere', ranks=ranks).one_line()
    assert err.startswith('✗ ERROR: ') and BAD[case][1] in err and 'nowhere' not in err and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('ids', [320, -1])
def test_ids_and_lengths_that_the_model_does_not_have(trains, tmp_path, ids):
    for file in shards(tmp_path / 'data')[:1]:
        edit(file, lambda path, question, stored: question.update(question_ids=torch.tensor([1, ids])))
    assert 'are not all in 0 to ' in trains('--question_context').one_line() and not (tmp_path / 'run').exists()
    edit(tmp_path / 'data' / file.name, lambda path, question, stored: path.update(latent_history=torch.zeros(600, 1, 16), num_latent_steps=600))
    assert 'is 600 long, this model has ' in trains('--max_seq_length=0').one_line()


def test_other_questions_than_those_held_out_are_told(trains, tmp_path):
    trains('--max_steps=1').ok()
    best = trains('--eval_only', '--checkpoint_path=run/final').ok()
    assert 'WARNING: not the data' not in best.out
    shards(tmp_path / 'data')[1].unlink()
    assert 'WARNING: not the data' in trains('--eval_only', '--checkpoint_path=run/final').ok().out


def test_nothing_behind_the_mask_and_no_small_weight_counts(tmp_path):
    model = m.QwenLatentPRM(str(make_qwen(tmp_path / 'qwen') or tmp_path / 'qwen'))
    latents, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = model.predict_scores(latents, mask)
    latents[0, 3:] = math.nan
    assert torch.equal(model.predict_scores(latents, mask), expected)
    assert m.vote(['a', 'a', 'a', 'b'], [1e-10] * 4, [1, 1, 1, 0]) == 1 and m.vote(['a', 'b'], [0.5, 0.5], [1, 0]) == 0.5


def test_another_measure_begins_anew(trains, tmp_path):
    trains('--max_steps=2', '--val_steps=1', '--best_metric=within_auc').ok()
    assert load(tmp_path / 'run/checkpoint-2/training_state.json')['best_score'] <= 0
    trains('--max_steps=4', '--val_steps=1', '--best_metric=val_loss', '--auto_resume').ok()
    assert load(tmp_path / 'run/checkpoint-4/training_state.json')['best_score'] > 0


@pytest.mark.parametrize('content', ['{"latent_steps": ', '[1]', '{"latent_steps": "5"}', '{"latent_steps": 0}'])
def test_metadata_that_ask_cannot_use(trains, tmp_path, content):
    trains('--max_steps=1').ok()
    (tmp_path / 'data/x_metadata.json').write_text(content)
    assert 'x_metadata.json' in trains('--ask=1+1=?', '--checkpoint_path=run/final').one_line()
    assert 'the question is empty' in trains('--ask=').one_line()


def test_latents_of_another_model(trains, tmp_path):
    make_qwen(tmp_path / 'wide', hidden_size=32)
    err = trains('--model_path=wide').one_line()
    assert 'the latents in data are 16 wide, the hidden size of this model is 32' in err and '896' in err and not (tmp_path / 'run').exists()
    assert 'nowhere' in trains('--model_path=nowhere').one_line()


class Attack:
    def __reduce__(self):
        return os.system, ('touch executed',)


def test_a_malicious_file_is_refused_unexecuted(trains, tmp_path):
    edit(shards(tmp_path / 'data')[0], lambda p, q, s: put(p, metadata=Attack()))
    assert 'x_00000.pt cannot be read' in trains().one_line() and not list(tmp_path.glob('**/executed'))
    for content in (b'', b'PK', shards(tmp_path / 'data')[1].read_bytes()[:-100]):
        shards(tmp_path / 'data')[0].write_bytes(content)
        with pytest.raises(ValueError, match='x_00000.pt cannot be read'):
            m.open_paths(str(tmp_path / 'data'))


def test_a_merge_beside_its_parts(tmp_path):
    first, second = shards(make_paths(tmp_path / 'data'))
    torch.save(dict(load(first), questions=load(first)['questions'] + load(second)['questions']), tmp_path / 'data/x_merged.pt')
    with pytest.raises(ValueError, match='x_merged.pt: question 0, path 0: .*x_00000.pt holds the same path: a merge beside its parts'):
        m.open_paths(str(tmp_path / 'data'))


def fork_file(path, questions=6, hidden_size=16):
    """One file of a run, as the program that guide 004 describes writes it: a tree of agents, all questions called q_0, numpy scalars, no tokens."""
    generator, stored = torch.Generator().manual_seed(0), []
    for q in range(questions):
        paths = []
        for p in range(8):
            judge = p >= 6
            latents = None if judge else torch.randn(5, 1, hidden_size, generator=generator).to(torch.bfloat16)
            score = None if p == 5 else np.float64(p % 3 / 2) if p < 3 else float(p % 2)
            paths.append(dict(path_id=p, agent_name='Judger' if judge else 'Planner', agent_idx=3 if judge else 0, parent_path_id=p - 6 if judge else None,
                              child_path_ids=[p + 6] if p < 2 else [], score=0.5, prm_score=score, metadata=dict(temperature=1.0, strategy='hybrid'),
                              latent_history=latents, hidden_states=None if judge else latents[-1], num_latent_steps=0 if judge else 5))
        nodes = [dict(path_id=p['path_id'], agent_name=p['agent_name'], agent_idx=p['agent_idx'], parent_id=p['parent_path_id'], children_ids=p['child_path_ids'],
                      original_score=0.5, prm_score=p['prm_score'], is_leaf=not p['child_path_ids'], depth=0, is_correct=None) for p in paths]
        stored.append(dict(question_id='q_0', question=f'Tom has {q} apples. How many?', gold_answer=str(q), final_answer=str(q), is_correct=True, paths=paths,
                           tree_structure=dict(nodes=nodes, edges=[(0, 6), (1, 7)], root_ids=[0], num_nodes=8, num_edges=2, max_depth=1)))
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(batch_name='gsm8k_latent_mas_multipath_20251226_120000', timestamp='20251226_120000', num_questions=questions, questions=stored), path)


def test_files_of_the_fork_are_read(trains, tmp_path):
    fork_file(tmp_path / 'fork/gsm8k_latent_mas_multipath_20251226_120000.pt')
    with pytest.raises(Exception, match='weights_only'):
        torch.load(next((tmp_path / 'fork').iterdir()), weights_only=True)
    paths, questions, facts = m.open_paths(str(tmp_path / 'fork'))
    assert len(questions) == 6 and len(paths['target']) == 30 and facts['left_out'] == 18 and facts['hidden_size'] == 16  # grouped by their text
    assert paths['target'][:5].tolist() == [0, 0.5, 1, 1, 0] and paths['latents'][0].shape == (5, 16) and not paths['answered'].any()
    run = trains('--data_dir=fork', '--max_steps=2').ok()
    assert 'PRM' in run.out and 'majority vote   ' in run.out and (tmp_path / 'run/final').is_dir()
    assert 'whether its answer is right' in trains('--data_dir=fork', '--use_prm_score=false', '--output_dir=two').one_line()
    assert '--question_context=False' in trains('--data_dir=fork', '--question_context', '--output_dir=two').one_line()


def test_the_last_latents_are_kept_and_own_answers_are_targets(tmp_path):
    make_paths(tmp_path / 'data')
    edit(shards(tmp_path / 'data')[0], lambda p, q, s: put(p, prm_score=0.25, is_correct=True))
    whole, _, _ = m.open_paths(str(tmp_path / 'data'))
    cut, _, _ = m.open_paths(str(tmp_path / 'data'), 2, own_answers=True)
    assert max(map(len, whole['latents'])) == 6 and max(map(len, cut['latents'])) == 2
    assert all(torch.equal(a[-2:], b) for a, b in zip(whole['latents'], cut['latents'], strict=True))
    assert (whole['target'][0], cut['target'][0], cut['correct'][0]) == (0.25, 1, 1)


# ---- measures
def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 5, 60) / 4, rng.integers(0, 2, 60)
    pairs = [(a > b) + (a == b) / 2 for a, b in product(scores[right == 1], scores[right == 0])]
    assert m.auc(scores, right) == pytest.approx(np.mean(pairs)) and math.isnan(m.auc(scores, right * 0))


def test_measures_by_hand():
    paths = dict(question=np.array([0, 1, 0, 1, 0, 2, 2]), correct=np.array([1, 0, 0, 1, 0, 1, 1.0]), target=np.array([0.9, 0, 0, 1, 0, 1, 1]),
                 answered=np.ones(7, bool), answer=['7', '', '5', '3', '5', '2', '2'])
    scores = np.array([0.9, 0.6, 0.5, 0.6, 0.45, 0.5, 0.2])
    found = m.judged(scores, paths, 200)
    assert found['within_auc'] == pytest.approx((1 + 0.5) / 2)  # question 2 has no wrong path
    assert found['best_of_n'] == pytest.approx((1 + 0.5 + 1) / 3)  # a tie counts half
    assert found['weighted_vote'] == pytest.approx((0 + 1 + 1) / 3)  # 5 has 0.95 against 0.9 for 7; no answer is no vote
    assert found['mse'] == pytest.approx(np.mean((scores - paths['target']) ** 2)) and found['brier'] == pytest.approx(np.mean((scores - paths['correct']) ** 2))
    assert found['ece'] == pytest.approx((0.1 + 0.4 + 0.45 + 0.2 - 0.8 + 0.8 + (1 - 0.5 - 0.5) + 0.0) / 7, abs=0.2)
    low, high = found['best_of_n_interval']
    assert low <= found['best_of_n'] <= high
    constant = m.judged(np.full(7, 0.5), paths)
    assert constant['best_of_n'] == pytest.approx((1 / 3 + 1 / 2 + 1) / 3) and constant['weighted_vote'] == pytest.approx((0 + 1 + 1) / 3)
    assert m.judged(paths['correct'], paths)['best_of_n'] == 1


def test_intervals_cover_what_they_claim():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        question, right = np.repeat(np.arange(50), 2), (rng.random(100) < 0.6).astype(float)
        low, high = m.judged(rng.random(100), dict(question=question, correct=right, target=right, answered=np.ones(100, bool), answer=[''] * 100), 200)['best_of_n_interval']
        covered += low <= 0.6 <= high
    assert 85 <= covered <= 100


def test_the_probe_finds_a_direction_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, w, groups = rng.normal(size=(600, 20)), rng.normal(size=20), np.arange(600) // 4
    y = (x @ w > 0).astype(float)
    assert m.auc(m.probe(x[:400], y[:400], groups[:400], x[400:]), y[400:]) > 0.95
    noise = rng.permutation(y)
    assert abs(m.auc(m.probe(x[:400], noise[:400], groups[:400], x[400:]), noise[400:]) - 0.5) < 0.15


LEARN = ['--data_dir=many', '--model_path=qwen', '--learning_rate=1e-2', '--batch_size=32', '--gradient_accumulation_steps=1', '--num_epochs=6', '--val_steps=-1',
         '--val_size=0.3', '--save_steps=-1']


@pytest.mark.parametrize('signal, low, high', [(1.0, 0.95, 1.0), (0.0, 0.4, 0.6)])
def test_a_planted_direction_is_found_and_none_in_shuffled_labels(trains, tmp_path, signal, low, high):
    make_paths(tmp_path / 'many', questions=200, signal=signal)
    run = trains('--output_dir=run', base=LEARN).ok()
    table = json.loads((tmp_path / 'run/training_stats.json').read_text())['table']
    assert low <= table['PRM']['auc'] <= high and low <= table['PRM']['within_auc'] <= high, run.out
    assert abs(table['question only']['within_auc'] - 0.5) < 1e-9 and table['question only']['best_of_n'] == pytest.approx(table['constant']['best_of_n'])
    if signal:
        assert table['PRM']['within_auc_interval'][0] > 0.9 and table['PRM']['best_of_n'] > table['constant']['best_of_n_interval'][1]


# ---- data order
SEEN = """
import json, model, torch
forward = model.QwenLatentPRM.forward
def seen(self, latents, mask, *rest):
    if torch.is_grad_enabled():
        with open('seen', 'a') as file:
            file.write(json.dumps([(latents[:, 0, 0] * 64).int().tolist(), mask.sum(1).int().tolist()]) + '\\n')
    return forward(self, latents, mask, *rest)
model.QwenLatentPRM.forward = seen
"""


@pytest.mark.parametrize('objective', ['bce', 'rank'])
def test_an_epoch_is_every_path_once_and_no_question_is_on_both_sides(trains, tmp_path, objective):
    trains('--batch_size=3', '--num_epochs=2', f'--loss={objective}', '--gradient_accumulation_steps=4', prelude=SEEN).ok()
    batches = [json.loads(line) for line in (tmp_path / 'seen').read_text().splitlines()]
    assert len(batches) == 2 * 22  # 64 paths, batches of three
    epochs = [[path for paths, _ in part for path in paths] for part in (batches[:22], batches[22:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 64 and epochs[0] != epochs[1]
    learned = {(path - 1) // 4 for path in epochs[0]}  # questions of four paths each
    assert len(learned) == 16
    spread = np.mean([max(sizes) - min(sizes) for _, sizes in batches])
    if objective == 'bce':
        assert spread < 0.5  # of like length
    else:
        assert np.mean([len({(path - 1) // 4 for path in paths}) for paths, _ in batches]) < 2.1  # three in a row of questions of four
    stats = json.loads((tmp_path / 'run/training_stats.json').read_text())
    assert stats['total_steps'] == 12 and stats['num_samples'] == 64


def test_short_last_steps_are_scaled_by_their_size_on_any_number_of_ranks(trains, tmp_path):
    """14 micro-batches in steps of 4: the last step of an epoch has two, which two, three or four ranks share."""
    make_paths(tmp_path / 'few', questions=9)
    logs = []
    for ranks in (0, 2, 3, 4):
        args = ['--data_dir=few', '--batch_size=2', '--num_epochs=2', '--dropout_prob=0', f'--output_dir=r{ranks}']
        run = trains(*args, ranks=ranks).ok()
        logs.append([float(x) for x in re.findall(r'^step \d+/8 .*?\| (?:val )?loss ([\d.]+)', run.out, re.MULTILINE)])
        assert len(logs[-1]) == 8 + 3 and logs[-1] == pytest.approx(logs[0], rel=1e-5, abs=1.2e-6)
    weights = [load(tmp_path / f'r{ranks}/final')['model'] for ranks in (0, 2, 3, 4)]
    for other in weights[1:]:
        assert all(torch.allclose(other[name].float(), tensor.float(), atol=2e-5) for name, tensor in weights[0].items())
    # by hand: the mean over the four paths of the last step of the first epoch, with the weights before it
    paths, questions, facts = m.open_paths(str(tmp_path / 'few'))
    held_out = np.isin(paths['question'], np.random.default_rng([42, 1]).permutation(9)[:2])
    rows = np.flatnonzero(~held_out)
    lengths = np.array([len(latents) for latents in paths['latents']])
    chosen = rows[np.concatenate(m.bucketed(lengths[rows], 2, 42, 0)[12:])]
    trains('--data_dir=few', '--batch_size=2', '--num_epochs=2', '--dropout_prob=0', '--output_dir=third', '--save_steps=3').ok()
    net = m.QwenLatentPRM(str(tmp_path / 'qwen'), dropout_prob=0.0)
    net.load_state_dict(load(tmp_path / 'third/checkpoint-3')['model'])
    logits = net(*m.padded_paths([paths['latents'][row] for row in chosen])[:2])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(paths['target'][chosen]).float())
    assert len(chosen) == 4 and expected.item() == pytest.approx(json.loads((tmp_path / 'third/training_stats.json').read_text())['step_losses'][3], abs=1e-6)


# ---- folders, log and statistics of guide 004
def test_layout_log_lines_and_statistics(trains, tmp_path):
    run = trains('--num_epochs=2', '--save_steps=3', '--val_steps=3').ok()
    names = {'best', 'final', 'epoch_1', 'epoch_2', 'checkpoint-3', 'checkpoint-6', 'checkpoint-8', 'training.log', 'training_stats.json', 'config.py'}
    assert set(os.listdir(tmp_path / 'run')) == names
    for name in names - {'training.log', 'training_stats.json', 'config.py'}:
        assert set(os.listdir(tmp_path / 'run' / name)) == {'pytorch_model.bin', 'optimizer.pt', 'scheduler.pt', 'training_state.json', 'config.json'}
    log = (tmp_path / 'run/training.log').read_text()
    for line in (r'Epoch 1/2', r'Epoch 2/2', r'\[Trainer\] Step 3: loss=\d\.\d{4}, avg_loss=\d\.\d{4}, lr=\d\.\d\de-\d\d'):
        assert re.search(f'^{line}$', log, re.MULTILINE) and re.search(f'^{line}$', run.out, re.MULTILINE)
    assert '[Trainer] Checkpoint saved to: run/checkpoint-3\n' in run.out and '[Trainer] Checkpoint saved to: run/final\n' in run.out
    stats = json.loads((tmp_path / 'run/training_stats.json').read_text())
    assert {'total_steps', 'num_epochs', 'best_loss', 'final_loss', 'epoch_losses', 'step_losses', 'step_numbers', 'enable_validation', 'best_val_loss', 'final_val_loss',
            'val_losses', 'val_step_numbers', 'timestamp', 'model_path', 'data_dir', 'num_samples', 'training_time_seconds', 'validation', 'table'} <= stats.keys()
    assert stats['step_numbers'] == list(range(1, 9)) and len(stats['epoch_losses']) == 2 and stats['val_step_numbers'] == [0, 3, 4, 6, 8]
    assert stats['epoch_losses'][0] == pytest.approx(np.mean(stats['step_losses'][:4])) and stats['best_loss'] == min(stats['epoch_losses'])
    assert re.search(rf'Step 8: .*avg_loss={stats["epoch_losses"][1]:.4f}', log)
    config = json.loads((tmp_path / 'run/final/config.json').read_text())
    assert config['hidden_size'] == 16 and config['pooling_strategy'] == 'mean' and config['trainable_parameters'] == config['total_parameters'] > 1000
    ended, again = load(tmp_path / 'run/final'), load(tmp_path / 'run/checkpoint-8')
    assert differences(ended, again, VOLATILE) == [] and load(tmp_path / 'run/epoch_1')['step'] == 4


def test_best_is_the_best(trains, tmp_path):
    fake = """
import model
real, calls = model.judged, []
def judged(scores, paths, resamples=0):
    found = real(scores, paths, resamples)
    if not resamples and len(set(scores)) > 1:
        calls.append(1)
        found.update(within_auc=[0.5, 0.7, 0.6, 0.7, 0.65][len(calls) - 1], auc=[0.1, 0.2, 0.9, 0.3, 0.4][len(calls) - 1])
    return found
model.judged = judged
"""
    for metric, step in (('auto', 1), ('auc', 2), ('val_loss', 4)):
        trains('--max_steps=4', '--val_steps=1', f'--best_metric={metric}', f'--output_dir={metric}', prelude=fake).ok()
        assert load(tmp_path / metric / 'best')['step'] == step
    run = trains('--num_epochs=2', '--val_size=0', '--output_dir=none').ok()
    assert 'val loss' not in run.out.split('done:')[0] and load(tmp_path / 'none/best')['step'] == 10  # the lower loss of two epochs
    assert '--val_size is 0' in trains('--val_size=0', '--best_metric=auc', '--output_dir=x').one_line()
    assert '--val_size is 0' in trains('--val_size=0', '--eval_only', '--checkpoint_path=none/best').one_line()


def test_the_bar_counts_batches_on_a_terminal(trains, tmp_path):
    trains('--max_steps=0').ok()
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 150, 0, 0))
    process = subprocess.Popen([sys.executable, ROOT / 'train_latent_prm.py', *BASE, '--output_dir=two', '--max_steps=8'], cwd=tmp_path, stdout=child, stderr=child,
                               env=dict(os.environ, OMP_NUM_THREADS='1'))
    os.close(child)
    out = b''
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:
            break
        if not data:
            break
        out += data
    assert process.wait() == 0
    assert re.search(rb'100%\|.*\| 16/16 \[.*loss=\d\.\d{4}, lr=\d\.\d\de-\d\d\]', out), out


def test_an_epochs_checkpoint_is_resumed_from_if_there_is_nothing_newer(trains, tmp_path):
    trains('--num_epochs=3').ok()
    for name in ('final', 'checkpoint-12', 'epoch_3'):
        drop(tmp_path / 'run' / name)
    assert 'already holds a run (epoch_2)' in trains('--num_epochs=3').one_line()
    run = trains('--auto_resume', base=['--output_dir=run']).ok()
    assert 'resumed from run/epoch_2 at step 8' in run.out and 'step 8/12' not in run.out.split('saved')[0]
    trains('--num_epochs=3', '--output_dir=straight').ok()
    assert clean_log(tmp_path / 'run/training.log') == [line.replace('straight', 'run') for line in clean_log(tmp_path / 'straight/training.log')]
    for name in ('final', 'epoch_3', 'best'):
        assert differences(load(tmp_path / 'straight' / name), load(tmp_path / 'run' / name), VOLATILE) == []
    (tmp_path / 'run/final/optimizer.pt').write_bytes(b'x')
    for name in ('checkpoint-8', 'checkpoint-12'):
        drop(tmp_path / 'run' / name)
    run = trains('--auto_resume', base=['--output_dir=run']).ok()
    assert 'WARNING: run/final cannot be read' in run.out and 'resumed from run/epoch_3' in run.out and load(tmp_path / 'run/final')['step'] == 12
    (tmp_path / 'run/checkpoint-12/optimizer.pt').write_bytes(b'x')
    drop(tmp_path / 'run/final')
    run = trains('--auto_resume', base=['--output_dir=run']).ok()
    assert 'WARNING: run/checkpoint-12 cannot be read' in run.out and 'resumed from run/epoch_3' in run.out and load(tmp_path / 'run/final')['step'] == 12
    run = trains('--resume', '--checkpoint_path=run/epoch_1', base=[]).ok()
    assert re.search('set aside as .*run/epoch_2.*run/final', run.out) and differences(load(tmp_path / 'straight/final'), load(tmp_path / 'run/final'), VOLATILE) == []


def test_final_is_that_of_the_last_step(trains, tmp_path):
    trains('--max_steps=2').ok()
    trains('--auto_resume', '--max_steps=5', '--save_steps=4', base=['--output_dir=run']).ok()
    drop(tmp_path / 'run/final')
    shutil.copytree(tmp_path / 'run/checkpoint-2', tmp_path / 'run/final')  # as if the run had been killed when checkpoint-5 was written
    trains('--auto_resume', base=['--output_dir=run']).ok()
    assert load(tmp_path / 'run/final')['step'] == 5
    (tmp_path / 'run/final/training_state.json').write_text('{')
    trains('--auto_resume', base=['--output_dir=run']).ok()
    assert load(tmp_path / 'run/final')['step'] == 5


@pytest.mark.parametrize('name', ['checkpoint-8', 'epoch_2', 'final'])
def test_killed_between_the_checkpoints_of_one_step(trains, tmp_path, name):
    kill = f"""
import os, signal
replace = os.replace
def killed(source, target):
    replace(source, target)
    if str(target) == 'run/{name}':
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
"""
    assert trains('--num_epochs=2', prelude=kill).codes == [-9]
    trains('--auto_resume', base=['--output_dir=run']).ok()
    assert {'checkpoint-8', 'epoch_1', 'epoch_2', 'final', 'training_stats.json'} <= set(os.listdir(tmp_path / 'run'))
    assert not [*(tmp_path / 'run').glob('*.tmp')]
    states = [load(tmp_path / 'run' / path) for path in ('checkpoint-8', 'epoch_2', 'final')]
    assert all(state['step'] == 8 and differences(state, states[0], VOLATILE) == [] for state in states)


def test_a_run_that_nobody_named_is_found_again(trains, tmp_path):
    base = [word for word in BASE if not word.startswith('--output_dir')]
    trains('--max_steps=4', base=base).ok()
    (folder,) = (tmp_path / 'checkpoints').iterdir()
    assert re.fullmatch(r'qwen_prm_\d{8}_\d{6}', folder.name)
    run = trains('--auto_resume', '--max_steps=8', base=[]).ok()
    assert f'resumed from checkpoints/{folder.name}/' in run.out and [path.name for path in (tmp_path / 'checkpoints').iterdir()] == [folder.name]
    run = trains('--eval_only', base=[]).ok()
    assert f'wrote checkpoints/{folder.name}/eval.json' in run.out
    trains('--max_steps=1', '--output_dir=checkpoints/qwen_prm_a', base=[w for w in base if 'max_steps' not in w]).ok()
    os.utime(folder)  # as if an evaluation had written into it: the newest run is the one that trained last
    a, b = (tmp_path / 'checkpoints' / name for name in ('qwen_prm_a', 'qwen_prm_b'))
    shutil.copytree(a / 'checkpoint-1', b / 'checkpoint-4.tmp', copy_function=shutil.copy)  # of a run that was killed before its first checkpoint
    assert 'resumed from checkpoints/qwen_prm_a/' in trains('--auto_resume', '--max_steps=2', base=[]).ok().out
    shutil.copytree(a / 'checkpoint-1', b / 'best', copy_function=shutil.copy)  # after its first validation
    assert 'resumed from checkpoints/qwen_prm_b/best at step 1' in trains('--auto_resume', '--max_steps=2', base=[]).ok().out


def test_ranks_without_the_model_end(trains, tmp_path):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/data').symlink_to('../data')
    run = trains('--max_steps=1', ranks=2, prelude="import os; os.environ['RANK'] == '1' and os.chdir('other')")
    assert '--model_path=qwen: qwen does not exist' in run.one_line() and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'optimizer.pt', 'scheduler.pt', 'config.json', 'training_state.json'])
def test_a_checkpoint_with_one_changed_file_is_not_read(trains, tmp_path, name):
    trains('--max_steps=2').ok()
    path = tmp_path / 'run/checkpoint-2' / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b'16', b'17') if name == 'config.json' else content[:-9])
    assert name in trains('--resume', '--checkpoint_path=run/checkpoint-2', base=[]).one_line() or name == 'training_state.json'
    path.unlink()
    trains('--eval_only', '--checkpoint_path=run/checkpoint-2', base=[]) if name != 'training_state.json' else None
    assert 'checkpoint-2' in trains('--resume', '--checkpoint_path=run/checkpoint-2', '--output_dir=run', base=[]).one_line() or name == 'training_state.json'


# ---- evaluation
def test_eval_only_prints_the_table_and_writes_it(trains, tmp_path):
    trains('--num_epochs=1').ok()
    run = trains('--eval_only', '--checkpoint_path=run/best', base=[]).ok()
    for row in ('PRM', 'linear probe', 'question only', 'constant', 'random pick', 'majority vote', 'oracle, pass@N'):
        assert re.search(f'^{row} ', run.out, re.MULTILINE), run.out
    assert 'a majority vote' in run.out
    report = json.loads((tmp_path / 'run/eval.json').read_text())
    assert set(report['table']) == {'PRM', 'linear probe', 'question only', 'constant', 'oracle'} and report['questions'] == 4 and report['paths'] == 16
    keys = {'mse', 'mae', 'brier', 'ece', 'auc', *(name + end for name in ('within_auc', 'best_of_n', 'weighted_vote') for end in ('', '_interval'))}
    assert all(set(row) == keys for row in report['table'].values())
    make_paths(tmp_path / 'other', questions=8, seed=5)
    trains('--eval_only', '--checkpoint_path=run/best', '--data_dir=other', '--val_size=1', base=[]).ok()
    report = json.loads((tmp_path / 'run/eval.json').read_text())
    assert set(report['table']) == {'PRM', 'constant', 'oracle'} and report['questions'] == 8
    # the same scores as the model's own method gives, one path at a time
    paths, _, _ = m.open_paths(str(tmp_path / 'other'))
    net = m.QwenLatentPRM(str(tmp_path / 'qwen'))
    net.load_state_dict(torch.load(tmp_path / 'run/best/pytorch_model.bin', weights_only=True))
    scores = np.array([net.predict_scores(latents.unsqueeze(0), torch.ones(1, len(latents))).item() for latents in paths['latents']])
    assert m.judged(scores, paths)['brier'] == pytest.approx(report['table']['PRM']['brier'], abs=1e-6)


@pytest.mark.parametrize('args', [['--loss=mse'], ['--loss=rank'], ['--pooling_strategy=last'], ['--pooling_strategy=max'], ['--question_context'],
                                  ['--use_prm_score=false'], ['--grad_checkpoint'], ['--log_level=debug'], ['--lr_scheduler=constant'], ['--max_grad_norm=0.1']], ids=' '.join)
def test_settings_do_something_and_resume(trains, tmp_path, args):
    edit(shards(tmp_path / 'data')[0], lambda p, q, s: put(p, prm_score=0.25))
    run = trains('--max_steps=4', '--save_steps=2', *args).ok()
    plain = trains('--max_steps=4', '--output_dir=plain').ok()
    finals = [load(tmp_path / name / 'final')['model'] for name in ('run', 'plain')]
    same = finals[0].keys() == finals[1].keys() and all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert same == (args[0] in ('--log_level=debug', '--grad_checkpoint')), run.out
    assert ('micro-step 4/4' in run.out) == (args[0] == '--log_level=debug') and 'micro-step' not in plain.out
    for name in ('checkpoint-4', 'final', 'epoch_1'):
        drop(tmp_path / 'run' / name)
    trains('--auto_resume', base=['--output_dir=run']).ok()
    assert all(torch.equal(tensor, finals[0][name]) for name, tensor in load(tmp_path / 'run/final')['model'].items())


@pytest.mark.parametrize('args, told', [
    (['--dropout_prob=1'], 'below 1'), (['--learning_rate=0'], 'learning_rate'), (['--val_size=1'], 'some questions must be left'), (['--warmup_ratio=2'], 'shares'),
    (['--pooling_strategy=sum'], 'mean, last, max'), (['--loss=l1'], 'bce, mse, rank'), (['--permanent_checkpoints=a'], 'whole numbers'),
    (['--batch_size=0'], 'must not be 0'), (['--eval_only', '--ask=x'], 'give one'), (['--num_epoch=3'], 'did you mean --num_epochs'),
    (['--resume', '--checkpoint_path=run/checkpoint-9'], 'does not exist'), (['--eval_only'], 'no readable checkpoint in run'),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_what_cannot_be_is_said_in_one_line(trains, tmp_path, args, told):
    assert told in trains(*args).one_line(2)
    assert not (tmp_path / 'run').exists()


def test_weights_of_another_pooling_are_refused_with_both_names(trains, tmp_path):
    trains('--max_steps=1', '--pooling_strategy=last').ok()
    torch.save(load(tmp_path / 'run/final')['model'], tmp_path / 'weights.bin')
    err = trains('--resume', '--checkpoint_path=weights.bin', '--output_dir=two').one_line()
    assert 'last' in err and 'mean' in err


# ---- from a question to a choice
@pytest.mark.parametrize('context', [False, True])
def test_ask_thinks_scores_and_chooses(launcher, tmp_path, context):
    torch.manual_seed(0)
    net = m.Qwen3(m.Qwen3Config(320, 16, 24, 2, 2, 1, 8, 512, 1e-6, 1e6, False))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        net.lm_head.weight[48:58] *= 3  # digits are likely, so that there are answers
    m.write_whole(str(tmp_path / 'qwen'), {**net.files(), 'tokenizer.json': tokenizer_json(['user', 'assistant', '\n\n'], m.QWEN_NEEDED)})
    launcher.run('prepare/latent_prm.py', ['--task=arithmetic', '--model_path=qwen', '--max_samples=8', '--num_paths=4', '--latent_steps=3', '--max_new_tokens=6'],
                 cwd=tmp_path).ok()
    (file,) = shards(tmp_path / 'prm_data')
    edit(file, lambda p, q, s: [put(p, prm_score=i % 2, is_correct=bool(i % 2)) for q in s['questions'] for i, p in enumerate(q['paths'])])
    launcher.run('train_latent_prm.py', ['--model_path=qwen', '--output_dir=run', '--num_epochs=1', f'--question_context={context}'], cwd=tmp_path).ok()
    before = {path: path.read_bytes() for path in tmp_path.rglob('run/**/*') if path.is_file()}
    ask = ['--ask=3+4=?', '--num_paths=5', '--output_dir=run']
    run = launcher.run('train_latent_prm.py', ask, cwd=tmp_path).ok()
    found = re.findall(r'^path +(\d+) \| score ([\d.]+) \| after each thought ([\d. ]+) \| answer (\S+)$', run.out, re.MULTILINE)
    scores = [float(score) for _, score, _, _ in found]
    assert sorted(int(path) for path, _, _, _ in found) == list(range(5)) and scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert all(len(steps.split()) == 3 and steps.split()[-1] == score for _, score, steps, _ in found)  # as many thoughts as the paths of the data have
    path, score, _, answer = next(one for one in found if one[3] != 'none')
    assert f'chosen: path {path}, score {score}, answer {answer}\n' in run.out and 'majority vote: ' in run.out
    assert launcher.run('train_latent_prm.py', ask, cwd=tmp_path).ok().out == run.out
    assert {path: path.read_bytes() for path in tmp_path.rglob('run/**/*') if path.is_file()} == before
    assert 'positions' in launcher.run('train_latent_prm.py', ['--ask=' + '1+' * 300, '--output_dir=run'], cwd=tmp_path).one_line()
    assert 'without torchrun' in launcher.run('train_latent_prm.py', ask, cwd=tmp_path, ranks=2).one_line()
    assert 'no readable checkpoint' in launcher.run('train_latent_prm.py', ['--ask=x', '--output_dir=none'], cwd=tmp_path).one_line()


# ---- guide 004
SNIPPET = '''
from model import QwenLatentPRM
import torch

# 加载最佳 checkpoint
checkpoint_path = "run/best"
model = QwenLatentPRM(model_path="qwen")
model.load_state_dict(torch.load(f"{checkpoint_path}/pytorch_model.bin"))
model.eval()
model.to("cpu")

# 准备 latent sequence
latent_sequence = torch.randn(1, 10, 16)  # [batch, seq_len, hidden_dim]
attention_mask = torch.ones(1, 10)

# 预测分数
with torch.no_grad():
    scores = model.predict_scores(latent_sequence, attention_mask)
    print(f"Predicted score: {scores[0]:.4f}")
'''  # but for its import path, model path, device and hidden size it is the guide's


def test_the_guides_python_runs(trains, tmp_path):
    trains('--max_steps=2').ok()
    out = subprocess.run([sys.executable, '-c', SNIPPET], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert re.fullmatch(r'Predicted score: 0\.\d{4}\n', out.stdout), out.stderr


GUIDE = [line for line in re.sub(r'\\\n\s*', '', GUIDES).splitlines() if ' train_latent_prm.py' in line]


def test_the_guide_is_here():
    assert len(GUIDE) == 7


@pytest.mark.parametrize('line', GUIDE)
def test_guide_commands_run(launcher, tmp_path, line):
    args = shlex.split(line)[2:]
    if '--help' in args:
        out = subprocess.run([sys.executable, ROOT / 'train_latent_prm.py', '--help'], capture_output=True, text=True, cwd=tmp_path)
        assert out.returncode == 0 and out.stderr == '' and re.search(r'--learning_rate=2e-05 +peak learning rate', out.stdout) and not list(tmp_path.iterdir())
        return
    make_paths(tmp_path / 'prm_data')
    name = tmp_path / 'Qwen/Qwen3-0.6B'  # stands for what the hub's name or the guide's path would bring
    name.parent.mkdir()
    make_qwen(name)
    args = [str(name) if word == '/path/to/Qwen-0.6B' else word for word in args]
    run = launcher.run('train_latent_prm.py', [*args, '--max_steps=2'], cwd=tmp_path).ok()
    assert 'done: best val loss' in run.out and '[Trainer] Step 1: loss=' in run.out
    (folder,) = (tmp_path / 'checkpoints').iterdir()
    assert folder.name == 'my_experiment' if '--output_dir' in args else re.fullmatch(r'qwen_prm_\d{8}_\d{6}', folder.name)
    stored = load(folder / 'final')['config']
    given = dict(re.findall(r'([A-Z_]+)=(\S+)', ' '.join(args)))
    assert all(str(stored[name.lower()]).lower() in (value.lower(), str(float(value)) if value[0].isdigit() else '') for name, value in given.items()), (stored, given)
    assert ('WARNING: --device=cuda' in run.out) == (not torch.cuda.is_available() and 'DEVICE=cuda' in args)  # the default asks for nothing
