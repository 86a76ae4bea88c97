"""A tiny Qwen3 (0.4M parameters, the real architecture) that adds and subtracts: a stand-in for Qwen3-0.6B that needs no download.

    python prepare/tiny_qwen.py                       about two minutes on 2 CPU cores
    python -m prepare.tiny_qwen --help

It learns the problems of `prepare/latent_prm.py --task=arithmetic`, drawn with another seed; there are 24,390, so most of those that will be asked occur.
First come five written thoughts, then the answer. For 37+48 they are `78580#### 085`: the last digits, 7 and 8, and the last, second and first digit of the
sum. The last part of the training replaces the written thoughts by latent ones, as prepare/latent_prm.py will: a model that never saw them gets lost in them.

The folder is that of published models: config.json, model.safetensors, tokenizer.json (all bytes and a few words), which transformers loads too.
"""
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import configure, fail, print0
from model import QWEN_NEEDED, QWEN_PATTERN, Qwen3, Qwen3Config, QwenTokenizer, answer_of, byte_letters, vocabulary_of, write_whole
from prepare.fineweb import one_line_errors
from prepare.latent_prm import WORDS, arithmetic

# -----------------------------------------------------------------------------
# settings

output_dir = 'data/tiny_qwen'  # folder to write; it is replaced
steps = 1000                   # updates
batch_size = 32                # problems in each
lr = 2e-3                      # peak learning rate, cosine to 0 after a linear warmup of a tenth
latent_share = 0.4             # of the updates, the last ones: thoughts are latent
seed = 1337                    # of weights and problems; 0 = a seed like any other

if __name__ == '__main__':
    configure(globals())

THOUGHTS = 5    # as many as prepare/latent_prm.py --latent_steps
CHECKED = 400  # problems of the check at the end, at most as many as were trained on


def tokenizer_json(texts, added):
    """A tokenizer.json of all bytes and of the merges that make one token of every word in `texts`, and of these added tokens."""
    letters = byte_letters()
    words = Counter(piece for text in texts for piece in re.findall(r' ?[A-Za-z]+|\n+|[^\sA-Za-z\d]+', text))
    words = {tuple(letters[b] for b in word.encode()): n for word, n in words.items()}
    vocabulary, merges = {letter: i for i, letter in enumerate(letters[b] for b in range(256))}, []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append([a, b])
        vocabulary[a + b] = len(vocabulary)
        words = {merged(word, a, b): n for word, n in words.items()}
    added = [dict(id=len(vocabulary) + i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=not text.endswith('think>'))
             for i, text in enumerate(added)]
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=False, use_regex=False)
    return dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=dict(type='NFC'),
                pre_tokenizer=dict(type='Sequence', pretokenizers=[dict(type='Split', pattern=dict(Regex=QWEN_PATTERN), behavior='Isolated', invert=False),
                                                                   byte_level]),
                post_processor=byte_level, decoder=byte_level,
                model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='', fuse_unk=False, byte_fallback=False,
                           ignore_merges=False, vocab=vocabulary, merges=merges))


def merged(word, a, b):
    found = []
    for letter in word:
        if found and found[-1] == a and letter == b:
            found[-1] = a + b
        else:
            found.append(letter)
    return tuple(found)


def example(tokenizer, number):
    """(prompt ids, ids of thoughts and answer, right answer) of a problem, drawn with another seed than those of prepare/latent_prm.py."""
    question, answer = arithmetic(number, seed + 2 ** 31)
    (*_, a), (*_, b) = re.findall('[0-9]+', question)
    digits = answer.zfill(3)
    thoughts = a + b + digits[::-1]  # side by side, two digits and their sum are learned in 600 updates; from afar the sum stayed at chance
    prompt = tokenizer.chat([dict(role='user', content=question)], thinking=False)
    return prompt, [*tokenizer.encode(f'{thoughts}#### {digits}'), tokenizer.im_end], answer


def batches(tokenizer):
    """Yield (inputs (B, T), places (n,), targets (n,)): rows of like length, padded on the right; only thoughts and answers are to be predicted."""
    for step in range(0, steps, 8):
        rows = sorted((example(tokenizer, step * batch_size + i)[:2] for i in range(8 * batch_size)), key=lambda row: len(row[0]) + len(row[1]))
        for k in np.random.default_rng([seed, step]).permutation(8):
            part = rows[k * batch_size:(k + 1) * batch_size]
            T = max(len(p) + len(a) for p, a in part) - 1
            ids, predicted = np.full((len(part), T + 1), tokenizer.eot), np.zeros((len(part), T), bool)
            for row, counts, (p, a) in zip(ids, predicted, part, strict=True):
                row[:len(p) + len(a)], counts[len(p) - 1:len(p) + len(a) - 1] = p + a, True
            places = np.flatnonzero(predicted)
            yield torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(places), torch.from_numpy(ids[:, 1:].reshape(-1)[places])


def with_latent_thoughts(model, ids, inputs, places):
    """Inputs (B, T, C) in which every thought is the hidden state in front of it, as long as embeddings are: see Qwen3.think. Its gradient stays out."""
    with torch.no_grad():
        hidden, _ = model.model(inputs)
    thoughts = places.view(len(ids), -1)[:, :THOUGHTS].reshape(-1)
    h, embedded = hidden.reshape(-1, hidden.size(2))[thoughts], model.model.embed_tokens(ids)
    latents = model.realignment()[1].detach() * h / h.norm(dim=1, keepdim=True)
    return embedded.flatten(0, 1).index_copy(0, thoughts + 1, latents).view_as(embedded)


def train(model, tokenizer):
    optimizer = torch.optim.AdamW([dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=0.01),
                                   dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)], lr=lr, betas=(0.9, 0.98), fused=True)
    warmup, begun = max(1, steps // 10), time.time()
    for step, (ids, places, targets) in enumerate(batches(tokenizer)):
        if step == steps:
            break
        for group in optimizer.param_groups:
            group['lr'] = lr * min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        inputs = ids
        if step >= (1 - latent_share) * steps:
            for _ in range(2):  # thought by thought would be exact; twice all at once is nearly that, and fast
                inputs = with_latent_thoughts(model, ids, inputs, places)
        hidden, _ = model.model(inputs)
        loss = F.cross_entropy(F.linear(hidden.reshape(-1, hidden.size(2))[places], model.head), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print0(f'step {step + 1}/{steps} | loss {loss.item():.4f} | {time.time() - begun:.0f} s')


def accuracy(model, tokenizer, latent):
    """Share of newly drawn problems, most of which occurred in training, answered rightly, by the likeliest tokens: with written or with latent thoughts."""
    groups, right, checked = {}, 0, min(CHECKED, steps * batch_size)
    for i in range(checked):
        prompt, _, answer = example(tokenizer, steps * batch_size + 8 * batch_size + i)
        groups.setdefault(len(prompt), []).append((prompt, answer))
    for rows in groups.values():
        with torch.no_grad():
            _, hidden, cache = model(torch.tensor([prompt for prompt, _ in rows]))
        hidden, length = hidden[:, -1], THOUGHTS + 8
        if latent:
            _, hidden, cache = model.think(hidden, cache, THOUGHTS, [None] * len(rows), lambda step: [])
        spoken = model.speak(hidden, cache, torch.zeros(len(rows), length), 0, 1.0, tokenizer.n_vocab, tokenizer.ends)
        right += sum(answer_of(tokenizer.decode(ids)) == answer for (ids, _, _), (_, answer) in zip(spoken, rows, strict=True))
    return right / checked


def main():
    folder = Path(output_dir)
    ours = {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - ours):
        fail(f'{folder} holds something else: choose another --output_dir')
    torch.manual_seed(seed)
    texts = [text.format(a='', b='') for text, _ in WORDS] + ['user', 'assistant', '\n\n', '####', '=?']
    files = {'tokenizer.json': tokenizer_json(texts, QWEN_NEEDED)}
    tokenizer = QwenTokenizer(*vocabulary_of(files['tokenizer.json']))
    config = Qwen3Config(vocab_size=-(-tokenizer.n_vocab // 64) * 64, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
    model = Qwen3(config)
    for name, p in model.named_parameters():  # the published std of 0.02 is for large models: here a token would drown in the first layer's noise
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.0 if name.endswith(('o_proj.weight', 'down_proj.weight')) else 0.05 if 'embed' in name else p.size(1) ** -0.5)
    print0(f'{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.n_vocab} tokens')
    train(model, tokenizer)
    written, latent = accuracy(model, tokenizer, False), accuracy(model, tokenizer, True)
    print0(f'right answers to newly drawn problems: with written thoughts {written:.3f}, with latent thoughts {latent:.3f}')
    files['tokenizer_config.json'] = dict(tokenizer_class='Qwen2Tokenizer', eos_token='<|im_end|>', pad_token='<|endoftext|>', model_max_length=4096)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(str(folder), {**files, **model.files()})
    print0(f'wrote {folder}')


if __name__ == '__main__':
    with one_line_errors(output_dir):
        main()
