"""GPT-2 in plain PyTorch (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), its tokenizers and token files.

Parameter names are those of the published checkpoints; weights of linear layers are (out, in), the transpose of the
published Conv1D ones. The head is the token embedding (tied), so it has no entry of its own in the state dict.
"""
import json
import math
import os
import random
import shutil
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# The published shapes, and one for a laptop. `--model=<name>` picks one; each number can still be given by itself.
GPT_SIZES = {
    'tiny': dict(block_size=128, n_layer=4, n_head=4, n_embd=128),            # 0.8M with the byte vocabulary
    'gpt2': dict(block_size=1024, n_layer=12, n_head=12, n_embd=768),         # 124M
    'gpt2-medium': dict(block_size=1024, n_layer=24, n_head=16, n_embd=1024),  # 355M
    'gpt2-large': dict(block_size=1024, n_layer=36, n_head=20, n_embd=1280),  # 774M
    'gpt2-xl': dict(block_size=1024, n_layer=48, n_head=25, n_embd=1600),     # 1558M
}

# Dense bfloat16 FLOP/s that the makers state, by a part of the device's name: what the share in use (mfu) is measured by.
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12, '3090': 71e12,
              'V100': 125e12, 'T4': 65e12}


@dataclass
class GPTConfig:
    block_size: int = 1024   # longest sequence, in tokens
    vocab_size: int = 50304  # 50257 rounded up to a multiple of 64: matrix products are faster, the extra ids never occur
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0     # probability, in training only


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mask = None
        if cache is not None:  # keys and values of the tokens before these
            if self in cache:
                k, v = torch.cat((cache[self][0], k), 2), torch.cat((cache[self][1], v), 2)
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            cache[self] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))  # GPT-2's GELU is the tanh approximation
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


LOGITS_AT_ONCE = 2 ** 24  # elements: 64 MB of float32


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies, in nats, of softmax(x @ weight.T) against targets; a target of -1 does not count.

    x (N, C), weight (V, C), targets (N,) -> scalar. The logits (N, V) never exist at once: a slice of rows at a time gives
    its loss and, in the same pass, its share of both gradients, because d loss / d logits = softmax - onehot needs
    nothing from upstream but a factor. At V = 50304 the logits of a micro-batch would be by far the largest tensor."""

    @staticmethod
    def forward(ctx, x, weight, targets, need_gradients):
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        dx, dweight = (torch.empty_like(x), torch.zeros_like(weight)) if need_gradients else (None, None)
        rows = max(1, LOGITS_AT_ONCE // weight.size(0))
        for x_part, dx_part, t in zip(x.split(rows), (dx if need_gradients else x).split(rows), targets.split(rows), strict=True):
            logits = F.linear(x_part, weight)
            logits = logits.to(total.dtype)  # (n, V); a sum over 50,000 exponentials wants float32
            counts = t >= 0
            t = t.clamp(min=0).unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            total = total + ((normalizer - logits.gather(1, t)).squeeze(1) * counts).sum()
            if need_gradients:
                dlogits = logits.sub_(normalizer).exp_()  # softmax, in place of the logits
                dlogits.scatter_add_(1, t, -torch.ones_like(t, dtype=dlogits.dtype)).mul_(counts.unsqueeze(1))
                dlogits = dlogits.to(x.dtype)
                dx_part.copy_(F.linear(dlogits, weight.t()))
                dweight += F.linear(dlogits.t(), x_part.t())
        ctx.gradients = dx, dweight
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        dx, dweight = ctx.gradients
        ctx.gradients = None  # scaled in place: a second backward must fail, not count twice
        return dx.mul_(upstream), dweight.mul_(upstream), None, None


class GPT(nn.Module):
    """forward(idx (B, T) int64) -> logits (B, T, V); with targets (B, T) -> their loss in nats (see forward)."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f'n_embd {config.n_embd} is not a multiple of n_head {config.n_head}'
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=1e-5),
        ))
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):  # 2 n_layer of these add up in the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C). cache: a dict that keeps keys and values between calls, {} at first."""
        past = next(iter(cache.values()))[0].size(2) if cache else 0
        T = idx.size(1)
        assert past + T <= self.config.block_size, f'{past + T} tokens, but block_size is {self.config.block_size}'
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:past + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, reduction='mean'):
        """Without targets the logits (B, T, V). With targets (B, T), -1 where nothing is to be predicted, the loss in nats:
        its mean or sum over the targets that count."""
        x = self.hidden(idx)
        weight = self.transformer.wte.weight
        if targets is None:
            return F.linear(x, weight)
        targets = targets.reshape(-1)
        loss = HeadLoss.apply(x.reshape(-1, x.size(-1)), weight, targets, torch.is_grad_enabled())
        return loss / (targets >= 0).sum() if reduction == 'mean' else loss

    def flops_per_token(self, T):
        """Training FLOPs per token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B; N without the position table)."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * T

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, n_vocab=0, eot=-1, generator=None):
        """Continue idx (B, T) by up to max_new_tokens ids, each step from the last position alone with a key-value cache.

        temperature 0 = the likeliest id. top_k 0, top_p 1 = off. Ids >= n_vocab (0 = all allowed) are never drawn: the
        padding of the vocabulary has no text. Rows that drew `eot` go on with eot; stops when all did. At block_size the
        older half of the context is forgotten: learned positions cannot slide. Leaves the training mode as it was."""
        mode, block_size = self.training, self.config.block_size
        self.eval()
        cache, feed = {}, idx[:, -block_size:]
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache and next(iter(cache.values()))[0].size(2) == block_size:
                cache, feed = {}, idx[:, -max(1, block_size // 2):]
            logits = F.linear(self.hidden(feed, cache)[:, -1], self.transformer.wte.weight).float()  # (B, V)
            logits[:, n_vocab or logits.size(1):] = -math.inf
            if temperature == 0:
                feed = logits.argmax(1, keepdim=True)
            else:
                logits /= temperature
                if top_k:
                    logits[logits < logits.topk(min(top_k, logits.size(1)))[0][:, -1:]] = -math.inf
                if top_p < 1:
                    values, order = logits.sort(descending=True)
                    probabilities = values.softmax(1)
                    before = probabilities.cpu().cumsum(1).to(idx.device) - probabilities  # on a GPU it is not deterministic
                    outside = before >= top_p
                    outside[:, 0] = False  # the likeliest id always stays
                    logits[outside.scatter(1, order, outside)] = -math.inf
                feed = torch.multinomial(logits.softmax(1), 1, generator=generator)  # (B, 1)
            feed = torch.where(ended, eot, feed)
            idx = torch.cat((idx, feed), 1)
            ended |= feed == eot
            if ended.all():
                break
        self.train(mode)
        return idx


def load_tokenizer(name, download=False):
    """The tiktoken.Encoding called 'bytes' (256 byte values and end-of-text) or 'gpt2' (50,257 ids).

    tiktoken keeps GPT-2's two files in TIKTOKEN_CACHE_DIR, by default data/tiktoken beside this file. Without `download`
    the network is not touched: OSError if the files are not there."""
    import tiktoken
    if name == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={'<|endoftext|>': 256})
    if name != 'gpt2':
        raise ValueError(f"unknown tokenizer {name!r}, expected 'bytes' or 'gpt2'")
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'tiktoken'))
    import tiktoken.load
    read_file = tiktoken.load.read_file

    def offline(url):
        raise OSError(f"GPT-2's tokenizer is not in TIKTOKEN_CACHE_DIR={os.environ['TIKTOKEN_CACHE_DIR']} (prepare/fineweb.py puts it there)")

    try:
        tiktoken.load.read_file = read_file if download else offline
        return tiktoken.get_encoding('gpt2')
    finally:
        tiktoken.load.read_file = read_file


# What a manifest.json may say; a folder without one holds GPT-2's ids.
TOKENIZERS = {'gpt2': dict(tokenizer='gpt2', vocab_size=50257, eot=50256), 'bytes': dict(tokenizer='bytes', vocab_size=257, eot=256)}


def open_shard(path):
    """The tokens (n,) uint16 of one file, mapped, not read: llm.c's .bin (256 int32: 20240520, 1, n; then n uint16) or a
    .npy array. ValueError says what is wrong with it."""
    if path.endswith('.npy'):
        tokens = np.load(path, mmap_mode='r', allow_pickle=False)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f'holds {tokens.dtype} of shape {tokens.shape}, expected one row of uint16')
        return tokens
    header, size = np.fromfile(path, '<i4', 256), os.path.getsize(path)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError('does not start with the 1024-byte header 20240520, 1, number of tokens')
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f'is {size} bytes long, but its header says {header[2]} tokens = {1024 + 2 * int(header[2])} bytes')
    return np.memmap(path, '<u2', 'r', offset=1024) if header[2] else np.zeros(0, np.uint16)


def open_shards(folder, T):
    """(training shards {name: tokens}, validation shards {name: tokens}, tokenizer) of a folder that prepare/ wrote.

    Validation shards have `val` in their name, else it is the first. All ids are checked: an id beyond the vocabulary would
    otherwise end a run hours later. T: tokens per row; what is left of a shard is not used. ValueError names file and place."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} is no folder')
    if os.path.isdir(os.path.join(folder, 'pieces')):
        raise ValueError(f'{folder} is half made: run the prepare script again, it continues')
    names = sorted(name for name in os.listdir(folder) if name.endswith(('.bin', '.npy')))
    val_names = [name for name in names if 'val' in name] or names[:1]
    if len(names) == len(val_names):
        raise ValueError(f'{folder} needs a validation and a training shard (.bin or .npy), it holds {names}')
    name, tokenizer, shards = 'manifest.json', TOKENIZERS['gpt2'], {}
    try:
        if os.path.exists(os.path.join(folder, name)):
            with open(os.path.join(folder, name), encoding='utf-8') as file:
                manifest = json.load(file)
            tokenizer = {key: manifest.get(key) for key in tokenizer}
            if tokenizer not in TOKENIZERS.values():
                raise ValueError(f'{tokenizer} is none of the known tokenizers')
        for name in names:
            shards[name] = tokens = open_shard(os.path.join(folder, name))
            if not len(tokens):
                raise ValueError('holds no tokens')
            for i in range(0, len(tokens), 2 ** 24):
                outside = np.flatnonzero(tokens[i:i + 2 ** 24] >= tokenizer['vocab_size'])
                if len(outside):
                    raise ValueError(f'token {i + outside[0]} is {tokens[i + outside[0]]}, outside the vocabulary of {tokenizer["vocab_size"]}')
    except (OSError, ValueError, EOFError, AttributeError, RecursionError) as error:
        raise ValueError(f'{os.path.join(folder, name)}: {error}') from error
    train, val = {n: s for n, s in shards.items() if n not in val_names}, {n: shards[n] for n in val_names}
    for part in train, val:
        if all(len(tokens) <= T for tokens in part.values()):
            raise ValueError(f'{folder}: {", ".join(part)} hold no row of {T} + 1 tokens')
    return train, val, tokenizer


def shard_rows(shards, T, rows):
    """Rows (n, T + 1) int64 by number: row r of a shard is its tokens[r*T : r*T + T + 1], the rows of all shards are one list."""
    tokens = list(shards.values())
    first = np.cumsum([0] + [(len(t) - 1) // T for t in tokens])
    picked = [tokens[s][(r - first[s]) * T:(r - first[s] + 1) * T + 1] for r, s in zip(rows, np.searchsorted(first, rows, 'right') - 1, strict=True)]
    return torch.from_numpy(np.stack(picked).astype(np.int64))


def read_whole(path):
    """Content of a file of torch.save or of a .json, as plain values and CPU tensors. Nothing in the file is executed, a damaged
    or hostile one is a ValueError: torch.load itself overlooks a flipped bit and tensors that claim more than they bring."""
    try:
        if path.endswith('.json'):
            with open(path, encoding='utf-8') as file:
                return json.load(file)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # the first member whose CRC is wrong
        if broken:
            raise ValueError(f'{broken} in it is damaged')
        content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        pending = [content]
        while pending:
            value = pending.pop()
            pending += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
            if torch.is_tensor(value) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError('a tensor in it claims more numbers than it brings')
        return content
    except FileNotFoundError:
        raise
    except Exception as error:  # a hostile file can provoke any of them
        raise ValueError(f'{type(error).__name__}: {" ".join(str(error).split())[:200]}') from error


def remove(path):
    """Delete a file or a folder, whole or not at all: a half-deleted folder must not bear the name of a whole one."""
    if os.path.isdir(path) and not os.path.islink(path):
        os.replace(path, path + '.gone')
        shutil.rmtree(path + '.gone')
    elif os.path.lexists(path):
        os.unlink(path)


def seed_generators(seed, rank, step):
    """Seed this process's generators, all four kinds, from (seed, rank, step): ranks must not drop the same units."""
    words = [int(word) for word in np.random.SeedSequence([seed, rank, step]).generate_state(4)]
    torch.manual_seed(words[0] << 32 | words[1])  # the GPU's too
    np.random.seed(words[2])
    random.seed(words[3])


def generator_states(device_type):
    """The state of all of them as tensors and plain numbers: weights_only loading takes nothing else."""
    _, keys, *numpy_rest = np.random.get_state()
    version, words, gauss_next = random.getstate()
    device = torch.empty(0, dtype=torch.uint8) if device_type == 'cpu' else getattr(torch, device_type).get_rng_state()
    return dict(torch=torch.get_rng_state(), device_type=device_type, device=device, python=(version, torch.tensor(words), gauss_next),
                numpy=(torch.from_numpy(keys.astype(np.int64)), *numpy_rest))


def set_generator_states(states, device_type):
    """Restore them; False, and nothing done, if they were taken on another kind of device."""
    if states['device_type'] != device_type:
        return False
    torch.set_rng_state(states['torch'])
    if device_type != 'cpu':
        getattr(torch, device_type).set_rng_state(states['device'])
    version, words, gauss_next = states['python']
    random.setstate((version, tuple(words.tolist()), gauss_next))
    keys, *numpy_rest = states['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), *numpy_rest))
    return True


def sync(path):
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path, files):
    """Write {'': content} as the file `path`, or {name: content} as a folder of files: whole or absent, also after a power cut.

    Everything goes to path.tmp, is forced to the disk and then renamed. Content: JSON if the name ends so, else torch.save; a
    callable is called last with the folder for content that is made of the files before it. OSError or RuntimeError (which
    torch.save raises) if the disk is full; path.tmp is gone then."""
    temporary, is_folder = path + '.tmp', '' not in files
    remove(temporary)
    try:
        if is_folder:
            os.mkdir(temporary)
        for name, content in files.items():
            content = content(temporary) if callable(content) else content
            with open(os.path.join(temporary, name) if name else temporary, 'wb') as file:
                file.write(json.dumps(content, indent=1).encode()) if (name or path).endswith('.json') else torch.save(content, file)
            sync(os.path.join(temporary, name) if name else temporary)
        if is_folder:
            sync(temporary)
        if is_folder and os.path.isdir(path):
            remove(path + '.old')
            os.replace(path, path + '.old')  # a folder cannot be replaced in one step: for a moment only .old is there
        os.replace(temporary, path)
    finally:
        remove(temporary)
    sync(os.path.dirname(path) or '.')
    if is_folder:
        remove(path + '.old')
