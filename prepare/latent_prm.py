"""Latent reasoning paths and how they end, for train_latent_prm.py: many paths a question, each thought in latent space and then answered in words.

    python prepare/latent_prm.py                                                  Qwen3-0.6B on 50 questions of GSM8K's training set (downloads both)
    python prepare/latent_prm.py --input=train.jsonl --model_path=/path/to/Qwen3-0.6B --max_samples=1000
    python prepare/tiny_qwen.py && python prepare/latent_prm.py --task=arithmetic --model_path=data/tiny_qwen --max_samples=4000 --max_new_tokens=16
    python -m prepare.latent_prm --help

The prompt is read once. Then num_paths copies of its key-value cache go ways of their own: latent_steps times the last hidden state, noise added, is the
next input (LatentMAS: Zou et al. 2025, arXiv 2511.20639), and the answer is sampled behind that path's own thoughts. prm_score of a path is the share of
right answers (num_rollouts of them) below it. All paths of questions whose prompts are equally long run in one batch; siblings share the prompt
and nothing else; every path draws from a generator of its own, made of (seed, question, path), so it does not depend on its batch.

--agents planner,critic,refiner makes a tree: num_paths of each, the first num_parent_paths of one level go on in the next, and the last are judged. A
path from which nobody went on has no prm_score: it was not explored, which is not the same as wrong.

The folder: {name}_00000.pt, ... of shard_size questions each, for torch.load(weights_only=True), and {name}_metadata.json: the settings, which shards are
finished, accuracy, majority vote, pass@N, the distribution of scores. The same command again, after a crash or with a larger --max_samples, continues.
"""
import hashlib
import os
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import Qwen3, QwenTokenizer, answer_of, canonical, read_whole, remove, write_whole
from prepare.fineweb import checked, download_bytes, one_line_errors, parsed, pieces, read_json, write_json

# -----------------------------------------------------------------------------
# settings

# data
output_dir = 'prm_data'          # folder to write
model_path = 'Qwen/Qwen3-0.6B'   # folder with config.json, model.safetensors and tokenizer, or a name of the hub
task = 'gsm8k'                   # gsm8k | arithmetic: arithmetic needs no download
input = ''                       # a .jsonl with the keys question and answer; '' = the task's own
split = 'train'                  # train | test: of GSM8K
allow_test = False               # read a test set: what is trained on it cannot be measured on it
name = ''                        # the files are called {name}_00000.pt, ...; '' = the task's
max_samples = 50                 # questions; 0 = all
shard_size = 100                 # questions in a file

# paths
num_paths = 20                   # paths of each question
latent_steps = 5                 # latent thoughts of a path
num_rollouts = 1                 # answers sampled behind each path
agents = []                      # names of those who think one after another, e.g. planner,critic,refiner; [] = one, who answers
num_parent_paths = 5             # with --agents: paths of each level from which the next one goes on
diversity_strategy = 'hybrid'    # temperature | noise | hybrid: the noise on hidden states; temperature's grows with --temperature, hybrid is both
noise_scale = 1.0                # factor of that noise; 0 = off
latent_space_realign = True      # W_a of LatentMAS before the norm is fitted; without effect where both embeddings are one (up to Qwen3-4B)

# answers
temperature = 1.0                # of the sampled text; 0 = the likeliest token
top_p = 0.95                     # share of the probability that is sampled from
max_new_tokens = 2048            # tokens of an answer, at most
thinking = False                 # Qwen3's thinking mode: the answer may begin with a long thought in words
instruction = ''                 # text behind each question; '' = none for arithmetic, else to put the answer into \\boxed{}

# system
cache_gb = 4.0                   # memory for keys and values, GB: it decides how many paths run at once
device = ''                      # '' = cuda, then mps, then cpu
dtype = ''                       # float32 | bfloat16; '' = bfloat16 on a GPU, else float32
seed = 42                        # of noise, answers and arithmetic; 0 = a seed like any other

if __name__ == '__main__':
    configure(globals(), aliases={'data_file': 'input', 'prm_output_dir': 'output_dir', 'model_name': 'model_path',
                                  'latent_diversity_strategy': 'diversity_strategy'})

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl'
BOXED = 'Solve this problem. Put the final answer, a number, into \\boxed{}.'
ROLES = dict(planner='Think about a plan to solve this problem.', critic='Look at the plan so far: what is wrong in it, what is missing?',
             refiner='Improve the plan with what was found.')
JUDGE = 'Now solve the problem. ' + BOXED.split('. ', 1)[1]
# (sigma at the first step, share of it that is gone at the last step, range of the random factor)
NOISE = dict(temperature=(0.2, 0.2, (0.01, 2.0)), noise=(0.3, 0.3, (0.01, 1.5)))
COUNTS = ('num_questions', 'bytes', 'num_paths', 'num_samples')
METRICS = ('accuracy', 'majority_vote', 'pass_at_n', 'mixed', 'ended', 'answered')


# -----------------------------------------------------------------------------
# questions

WORDS = [('{a} apples and {b} more?', '+'), ('{a} pens, {b} lost?', '-')]
ARITHMETIC = 2 * (90 * 90 + 90 * 91 // 2)  # that there are: sums and differences, in digits and in words


def arithmetic(number, seed):
    """(question, answer) number `number`: the sum or difference of two numbers of two digits, in digits or in words."""
    rng = np.random.default_rng([seed, number])
    a, b, kind = (int(n) for n in rng.integers((10, 10, 0), (100, 100, 4)))
    text, sign = [*WORDS, ('{a}+{b}=?', '+'), ('{a}-{b}=?', '-')][kind]
    if sign == '-':
        a, b = max(a, b), min(a, b)
    return text.format(a=a, b=b), str(a + b if sign == '+' else a - b)


def questions():
    """([(id, question, right answer)], what the metadata calls their source)"""
    if task == 'arithmetic' and not input:
        if max_samples > ARITHMETIC:
            fail(f'--max_samples={max_samples}: there are {ARITHMETIC:,} arithmetic questions')
        found, number = {}, 0
        while len(found) < (max_samples or ARITHMETIC):  # none twice
            question, answer = arithmetic(number, seed)
            found.setdefault(question, answer)
            number += 1
        return [(f'arithmetic_{i}', *pair) for i, pair in enumerate(found.items())], dict(source=f'arithmetic, none twice, seed {seed}', sha256_source='')
    if input and not os.path.isfile(input):
        fail(f'--input: {input} ' + ('is a folder: name the file in it' if os.path.isdir(input) else 'does not exist'))
    if (split == 'test' or re.search('(?<![a-z])test(?![a-z])', os.path.basename(input).lower())) and not allow_test:
        fail(f'{input or "GSM8K"}: this is a test set. What is trained on it cannot be measured on it; --allow_test reads it all the same')
    source = input or URL.format(split)
    content = Path(input).read_bytes() if input else download_bytes(source)
    found = []
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        where = f'{source} line {number}'
        row = parsed(line, where)
        if not isinstance(row, dict) or not {'question', 'answer'} <= row.keys():
            found_keys = f'{sorted(row)!r:.100}' if isinstance(row, dict) else type(row).__name__
            fail(f'{where}: found {found_keys}, expected an object with question and answer')
        question, solution = checked(row['question'], f'{where}: question').strip(), row['answer']
        solution = checked(str(solution) if type(solution) in (int, float) else solution, f'{where}: answer')
        answer = answer_of(solution) or canonical(solution)  # an own file may hold words
        if not question or not answer:
            fail(f'{where}: no question or no answer')
        found.append((f'{name or task}_{len(found)}', question, answer))
        if len(found) == max_samples:
            break
    if not found:
        fail(f'{source}: no questions')
    return found, dict(source=os.path.basename(source), sha256_source=hashlib.sha256(content).hexdigest())


# -----------------------------------------------------------------------------
# paths

def noise(step):
    """What Qwen3.think adds at this step: [(sigma, range of the random factor)]."""
    done = step / max(1, latent_steps - 1)
    for kind in NOISE if diversity_strategy == 'hybrid' else [diversity_strategy]:
        sigma, gone, spread = NOISE[kind]
        yield noise_scale * sigma * (temperature if kind == 'temperature' else 1) * (1 - gone * done), spread


def generator_of(question, path):
    """A generator for this path alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, question, path]).generate_state(1, np.uint64)[0] >> 1))


def turns(question, tokenizer):
    """Ids of what stands in front of each level's thoughts and, last, of the answer; one who answers himself needs nothing there."""
    def turn(text):
        return tokenizer.chat([dict(role='user', content=text)], thinking)
    behind = instruction or ('' if task == 'arithmetic' and not input else BOXED)
    if not agents:
        return [turn(f'{question}\n\n{behind}' if behind else question), []]
    says = [ROLES.get(agent.lower(), f'You are the {agent}: think about this problem.') for agent in agents]
    close = [tokenizer.im_end, *tokenizer.encode('\n')]
    return [turn(f'{question}\n\n{says[0]}'), *(close + turn(text) for text in [*says[1:], instruction or JUDGE])]


def explore(model, tokenizer, numbers, prompts, realignment, at_once):
    """All paths of these questions, whose prompts (see turns) are equally long: for each question a list of levels, each a list of dicts."""
    device, parents_kept = model.head.device, min(num_parent_paths, num_paths)
    depth, found = len(prompts[0]) - 1, [[] for _ in numbers]

    def read(texts, cache=None):
        _, hidden, cache = model(torch.tensor(texts, device=device), cache) if texts[0] else (None, None, cache)
        return hidden[:, -1], cache

    def picked(cache, rows):
        return [(k[rows], v[rows]) for k, v in cache]

    with torch.no_grad():
        hidden, cache = read([prompt[0] for prompt in prompts])
        width = 1  # rows of a question in hidden and cache
        for level in range(depth):
            last, kept = level == depth - 1, []
            children = [(q, j) for q in range(len(numbers)) for j in range(num_paths)]
            for found_q in found:
                found_q.append([])
            for start in range(0, len(children), at_once):
                part = children[start:start + at_once]
                rows = torch.tensor([q * width + j % width for q, j in part], device=device)
                generators = [generator_of(numbers[q], level * num_paths + j) for q, j in part]
                latents, h, own = model.think(hidden[rows], picked(cache, rows), latent_steps, generators, noise, realignment)
                if not torch.isfinite(latents).all():
                    fail(f'question {numbers[part[0][0]]}: the latent thoughts are not finite (NaN or infinity) in {str(latents.dtype)[6:]}', 1)
                for (q, j), path in zip(part, latents.to(torch.bfloat16).cpu(), strict=True):
                    found[q][level].append(dict(parent=j % width if level else None, latents=path.unsqueeze(1).clone(), answers=[]))
                if not last:
                    rows = torch.tensor([i for i, (_, j) in enumerate(part) if j < parents_kept], dtype=torch.long, device=device)
                    kept.append((h[rows], picked(own, rows)))
                    continue
                if prompts[0][-1]:
                    h, own = read([prompts[q][-1] for q, _ in part], own)
                rows = torch.arange(len(part), device=device).repeat_interleave(num_rollouts)
                draws = torch.cat([torch.rand(num_rollouts, max_new_tokens, generator=g) for g in generators])
                spoken = model.speak(h[rows], picked(own, rows) if num_rollouts > 1 else own, draws, temperature, top_p, tokenizer.n_vocab, tokenizer.ends)
                for row, (ids, ended, log_p) in zip(rows.tolist(), spoken, strict=True):
                    q, j = part[row]
                    text = tokenizer.decode(ids)
                    found[q][level][j]['answers'].append((text, answer_of(text), ended, float(np.exp(log_p))))
            if not last:
                width = parents_kept
                hidden = torch.cat([h for h, _ in kept])
                cache = [tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) for layers in zip(*(c for _, c in kept), strict=True)]
                hidden, cache = read([prompts[q][level + 1] for q in range(len(numbers)) for _ in range(width)], cache)
    return found


def record(levels, question_id, question, gold, ids):
    """What a shard holds of a question, see the interface in model.py's open_paths; and its numbers for the metadata."""
    paths, below = [], [[[] for _ in level] for level in levels]  # below: whether right, of all answers under a path
    for level in reversed(range(len(levels))):
        for j, path in enumerate(levels[level]):
            below[level][j] += [answer == gold for _, answer, _, _ in path['answers']]
            if level:
                below[level - 1][path['parent']] += below[level][j]
    for level, members in enumerate(levels):
        for j, path in enumerate(members):
            text, answer, _, confidence = path['answers'][0] if path['answers'] else ('', '', False, 0.0)
            children = [i for i, child in enumerate(levels[level + 1]) if child['parent'] == j] if level + 1 < len(levels) else []
            paths.append(dict(
                path_id=level * num_paths + j, agent_name=agents[level] if agents else 'solver', agent_idx=level,
                parent_path_id=(level - 1) * num_paths + path['parent'] if level else None, child_path_ids=[(level + 1) * num_paths + i for i in children],
                latent_history=path['latents'], num_latent_steps=len(path['latents']), prm_score=float(np.mean(below[level][j])) if below[level][j] else None,
                is_correct=answer == gold if path['answers'] else None, answer=answer, text=text, score=confidence))
    leaves = [path['answers'] for path in levels[-1]]
    votes = Counter(answers[0][1] for answers in leaves if answers[0][1])
    final, right = votes.most_common(1)[0][0] if votes else '', [answers[0][1] == gold for answers in leaves]
    every = [answer for answers in leaves for answer in answers]
    numbers = dict(accuracy=float(np.mean(right)), majority_vote=float(final == gold), pass_at_n=float(any(right)), mixed=float(0 < sum(right) < len(right)),
                   ended=float(np.mean([ended for _, _, ended, _ in every])), answered=float(np.mean([bool(answer) for _, answer, _, _ in every])))
    return dict(question_id=question_id, question=question, gold_answer=gold, final_answer=final, is_correct=final == gold,
                question_ids=torch.tensor(ids), paths=paths), numbers


# -----------------------------------------------------------------------------

def open_model():
    """(model, tokenizer), or one line."""
    chosen = device or ('cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        kind = torch.device(chosen).type
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        fail(f'--device={chosen}: {" ".join(str(error).split())[:150]}')
    try:
        tokenizer = QwenTokenizer.from_pretrained(model_path)
        encode_piece = tokenizer.encode  # chat calls encode: tiktoken fails at a very long run of blanks
        tokenizer.encode = lambda text: [token for piece in pieces(text) for token in encode_piece(piece)]
        model = Qwen3.from_pretrained(model_path).eval()
    except (OSError, ValueError) as error:
        fail(f'--model_path: {error}')
    if tokenizer.n_vocab > model.config.vocab_size:
        fail(f'--model_path: {model_path} has {model.config.vocab_size} embeddings, its tokenizer {tokenizer.n_vocab} ids')
    if dtype not in ('', 'float32', 'bfloat16'):
        fail(f'--dtype={dtype}: must be float32 or bfloat16')
    return model.to(chosen, getattr(torch, dtype or ('float32' if kind == 'cpu' else 'bfloat16'))), tokenizer


def adopt(folder):
    """Take over how the paths in this folder were thought; ValueError if its metadata cannot be read, or has a value that main cannot have written."""
    found = sorted(Path(folder).glob('*_metadata.json'))
    if not found:
        print0(f'WARNING: {folder} holds no *_metadata.json: the paths are thought with the default settings of prepare/latent_prm.py')
    try:
        known = read_whole(str(found[0])) if found else {}
    except (OSError, ValueError) as error:
        raise ValueError(f'{found[0]}: {error}') from error
    if not isinstance(known, dict):
        raise ValueError(f'{found[0]}: it is no dict of settings')
    for name in ('task', 'latent_steps', 'agents', 'num_parent_paths', 'diversity_strategy', 'noise_scale', 'latent_space_realign', 'temperature', 'top_p',
                 'max_new_tokens', 'thinking', 'instruction'):
        usual = globals()[name]
        value = known.get(name, usual)
        like = type(value) is type(usual) or type(usual) is float and type(value) is int
        if type(usual) in (int, float):
            like = like and (0 if type(usual) is float else 1) <= value < 1e300
        elif name in ('agents', 'diversity_strategy'):
            like = like and (all(isinstance(agent, str) for agent in value) if name == 'agents' else value in ('hybrid', *NOISE))
        if not like:
            raise ValueError(f'{found[0]}: {name} is {value!r:.60}')
        globals()[name] = value


def think_about(question, folder, **settings):
    """(tokens of the first agent's prompt, num_paths paths of this one question, see explore), with these settings and those of the paths in the folder.
    ValueError if it is too long for the model, or for what adopt refuses."""
    globals().update(settings)
    adopt(folder)
    model, tokenizer = open_model()
    matrix, norm = model.realignment()
    prompts = turns(question, tokenizer)
    longest, room = sum(map(len, prompts)) + latent_steps * len(prompts) + max_new_tokens, model.config.max_position_embeddings
    if longest > room:
        raise ValueError(f'the question, its thoughts and the answer can be {longest} tokens long, the model has {room} positions')
    number = zlib.crc32(question.encode(errors='surrogatepass'))  # of its random numbers
    return prompts[0], explore(model, tokenizer, [number], [prompts], (matrix if latent_space_realign else None, norm), num_paths)[0][-1]


def main():
    if not re.fullmatch(r'[\w.-]*', name):
        fail(f'--name={name}: letters, digits, "_", "-" and "." only')
    if not 0 < top_p <= 1:
        fail(f'--top_p={top_p}: expected more than 0 and at most 1')
    asked, source = questions()
    model, tokenizer = open_model()
    config, base = model.config, f'{name or task}'
    weights = zlib.crc32(model.model.norm.weight.detach().float().cpu().numpy().tobytes() + model.head[:256].detach().float().cpu().numpy().tobytes())
    same = {key: globals()[key] for key in ('task', 'num_paths', 'latent_steps', 'num_rollouts', 'agents', 'num_parent_paths', 'diversity_strategy',
                                            'noise_scale', 'latent_space_realign', 'temperature', 'top_p', 'max_new_tokens', 'thinking', 'instruction', 'seed',
                                            'shard_size')}
    same.update(source, dtype=str(model.head.dtype)[6:], hidden_size=config.hidden_size, weights_crc32=weights)
    prompts = [turns(question, tokenizer) for _, question, _ in asked]
    for (question_id, _, _), prompt in zip(asked, prompts, strict=True):
        length = sum(map(len, prompt)) + latent_steps * max(1, len(agents)) + max_new_tokens
        if length > config.max_position_embeddings:
            fail(f'{question_id}: prompt, thoughts and answer can be {length} long, {model_path} has {config.max_position_embeddings} positions: '
                 f'--max_new_tokens={max(1, max_new_tokens - length + config.max_position_embeddings)} fits')
    folder = Path(output_dir)
    meta_path = folder / f'{base}_metadata.json'
    meta = read_json(meta_path, same, ('shards',))
    if meta is None:
        strange = sorted(folder.glob(f'{base}_*.pt')) if folder.is_dir() else []
        if strange:  # the trainer would read it together with ours
            fail(f'{folder} already holds {strange[0].name} and no {meta_path.name}: choose another --output_dir or --name')
        meta = {**same, 'shards': []}
    keys = {'name', 'score_histogram', *COUNTS, *METRICS}

    def ours(shard):
        if not isinstance(shard, dict) or not keys <= shard.keys() or any(type(shard[key]) is not int or shard[key] < 0 for key in COUNTS):
            return False
        histogram = shard['score_histogram']
        return (shard['num_questions'] > 0 and all(type(shard[key]) in (int, float) for key in METRICS) and isinstance(histogram, list) and
                len(histogram) == 10 and all(type(count) is int for count in histogram))
    if not isinstance(meta['shards'], list) or not all(map(ours, meta['shards'])):
        fail(f'{meta_path}: its list of shards is not ours: delete it and the shards to start again')
    listed = sum(shard['num_questions'] for shard in meta['shards'])
    if listed > len(asked):
        fail(f'{folder} already holds {listed} questions of this run, more than --max_samples={max_samples}: choose another --output_dir or --name')
    lost = [k for k, shard in enumerate(meta['shards']) if not (there := folder / f'{base}_{k:05d}.pt').is_file() or there.stat().st_size != shard['bytes']]
    if lost:
        print0(f'{base}_{lost[0]:05d}.pt' + f' and {len(lost) - 1} more' * (len(lost) > 1) + f', which {meta_path.name} lists, missing or cut short: made anew')
        listed -= sum(meta['shards'][k]['num_questions'] for k in lost)
    if listed:
        print0(f'continuing in {folder}: {len(meta["shards"]) - len(lost)} shards, {listed:,} questions are done')
    for old in [path for path in folder.glob(f'{base}_*.pt.tmp')] if folder.is_dir() else []:
        remove(str(old))  # of a run that was killed

    realignment = model.realignment()
    realignment = realignment if latent_space_realign else (None, realignment[1])
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.head.element_size()
    begun, done, total_shards = time.time(), 0, -(-len(asked) // shard_size)
    bar = tqdm(total=len(asked), disable=None, unit='question', desc=str(folder))
    for k in range(total_shards):
        part = range(k * shard_size, min(len(asked), (k + 1) * shard_size))
        path = folder / f'{base}_{k:05d}.pt'
        if k < len(meta['shards']) and meta['shards'][k]['num_questions'] == len(part) and k not in lost:
            bar.update(len(part))
            continue
        groups, found = {}, {}
        for i in part:  # equally long prompts need no padding
            groups.setdefault(tuple(map(len, prompts[i])), []).append(i)
        for lengths, members in sorted(groups.items()):
            longest = sum(lengths) + latent_steps * max(1, len(agents)) + max_new_tokens
            rows = max(1, min(4096, int(cache_gb * 1e9 / (row_bytes * longest))) // num_rollouts)  # paths at once
            for start in range(0, len(members), max(1, rows // num_paths)):
                chosen = members[start:start + max(1, rows // num_paths)]
                for i, levels in zip(chosen, explore(model, tokenizer, chosen, [prompts[i] for i in chosen], realignment, rows), strict=True):
                    found[i] = record(levels, *asked[i], prompts[i][0])
                done += len(chosen)
                bar.update(len(chosen))
        numbers = [found[i][1] for i in part]
        shard = dict(batch_name=f'{base}_{k:05d}', model=model_path, hidden_size=config.hidden_size, num_questions=len(part),
                     questions=[found[i][0] for i in part])
        scores = [p['prm_score'] for i in part for p in found[i][0]['paths'] if p['prm_score'] is not None]
        if k == 0 and not folder.is_dir():
            folder.mkdir(parents=True)
        if not meta_path.exists():
            write_json(meta_path, {**meta, **summary(meta['shards'], base)})  # from here on the folder is known as ours
        write_whole(str(path), {'': shard})
        entry = dict(name=path.name, num_questions=len(part), bytes=path.stat().st_size, num_paths=sum(len(found[i][0]['paths']) for i in part),
                     num_samples=len(scores), score_histogram=np.histogram(scores, 10, (0, 1))[0].tolist(),
                     **{metric: float(np.mean([n[metric] for n in numbers])) for metric in METRICS})
        meta['shards'][k:k + 1] = [entry]
        meta.update(summary(meta['shards'], base))
        write_json(meta_path, meta)
        seconds = time.time() - begun
        print0(f'{path} | {done:,} of {len(asked) - listed:,} questions | accuracy {meta["accuracy"]:.3f} | {done * num_paths / seconds:,.1f} paths/s | '
               f'eta {seconds / done * (len(asked) - listed - done):,.0f} s')
    bar.close()
    if not done:
        print0(f'{folder} is done')
        meta.update(summary(meta['shards'], base))
    histogram = ' '.join(f'{count:,}' for count in meta['score_histogram'])
    print0(f'{meta["num_questions"]:,} questions, {meta["num_samples"]:,} scored paths | accuracy of a path {meta["accuracy"]:.3f} | '
           f'majority vote {meta["majority_vote"]:.3f} | pass@{num_paths} {meta["pass_at_n"]:.3f} | questions with both outcomes {meta["mixed"]:.3f}')
    print0(f'scores 0.0 to 1.0 in ten parts: {histogram} | answers that ended {meta["ended"]:.3f}, that held an answer {meta["answered"]:.3f}')
    if not 0.02 <= meta['accuracy'] <= 0.98:
        print0(f'WARNING: {meta["accuracy"]:.1%} of the answers are right: there is little to tell right from wrong paths by. Easier or harder questions, '
               'or another --noise_scale')
    print0(f'wrote {folder}: {len(meta["shards"])} shards and {meta_path.name}')


def summary(shards, base):
    """The metadata's totals."""
    counts = [shard['num_questions'] for shard in shards]
    return dict(model=model_path, method='latent', batch_name=base, data_file=f'{base}_*.pt', timestamp=time.strftime('%Y-%m-%d %H:%M:%S'),
                torch=str(torch.__version__), num_questions=sum(counts),
                **{f'num_{new}': sum(shard[f'num_{old}'] for shard in shards) for new, old in (('paths_total', 'paths'), ('samples', 'samples'))},
                score_histogram=[int(n) for n in np.sum([shard['score_histogram'] for shard in shards] or [[0] * 10], 0)],
                **{metric: float(np.average([shard[metric] for shard in shards], weights=counts)) if shards else 0.0 for metric in METRICS})


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
