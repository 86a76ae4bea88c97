"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): the model,
its loss, sampling, optimizers, published weights in and out, tokenizer.

Parameters are named as in the published checkpoints. The weights of linear layers are (out, in),
the transpose of the published Conv1D ones. The output head is the token embedding (tied), so it
has no entry of its own in the state dict.

Letters in shapes: B rows, T tokens, C width (n_embd), H heads, D = C / H, V ids.
"""
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# Dense bfloat16 FLOP/s that the makers state, by a part of the device's name.
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, '4090': 165e12,
              '3090': 71e12, 'V100': 125e12, 'T4': 65e12}

# The published shapes, and one for a laptop. `--model=<name>` picks one.
GPT_SIZES = {
    'tiny': dict(block_size=128, n_layer=4, n_head=4, n_embd=128),             # 0.8M parameters
    'gpt2': dict(block_size=1024, n_layer=12, n_head=12, n_embd=768),          # 124M
    'gpt2-medium': dict(block_size=1024, n_layer=24, n_head=16, n_embd=1024),  # 355M
    'gpt2-large': dict(block_size=1024, n_layer=36, n_head=20, n_embd=1280),   # 774M
    'gpt2-xl': dict(block_size=1024, n_layer=48, n_head=25, n_embd=1600),      # 1558M
}

# What a folder of data or a checkpoint says of its tokens; eot = end-of-text, between documents.
TOKENIZERS = {
    'gpt2': dict(tokenizer='gpt2', vocab_size=50257, eot=50256),
    'bytes': dict(tokenizer='bytes', vocab_size=257, eot=256),
}

@dataclass
class GPTConfig:
    block_size: int = 1024   # longest sequence, tokens
    vocab_size: int = 50304  # GPT-2's 50257 ids, padded to a multiple of 64: faster products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0     # probability, in training only
    activation: str = 'gelu_new'  # GPT-2's, a tanh approximation; 'gelu' is exact (nanoGPT's)

# ---- model -------------------------------------------------------------------------------------
# By the names of transformers' config.json.
ACTIVATIONS = {'gelu_new': partial(F.gelu, approximate='tanh'), 'gelu': F.gelu}

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            # keys and values (B, H, T, D) of the tokens before these
            if self in cache:
                k = torch.cat((cache[self][0], k), 2)
                v = torch.cat((cache[self][1], v), 2)
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device)
                mask = mask.tril(k.size(2) - T)
            cache[self] = k, v
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
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
        x = x + self.mlp(self.ln_2(x))
        return x

class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies, in nats, of softmax(x @ weight.T) against targets.

    x (N, C), weight (V, C), targets (N,) int64 with -1 where nothing is to be predicted, factors
    (N,) of the terms or None -> scalar. At V = 50304 the logits (N, V) would be by far the
    largest tensor of a step, so they never exist at once: a slice of rows gives its loss and,
    since d loss / d logits = softmax - onehot, in the same pass its share of both gradients."""

    @staticmethod
    def forward(ctx, x, weight, targets, need_gradients, factors=None):
        device = x.device.type
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        factors = (targets >= 0).to(total.dtype) * (1 if factors is None else factors)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight) if need_gradients else None
        if torch.is_autocast_enabled(device):
            x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
        # 2^23 logits are 32 MB; a GPU wants larger slices, each costs it a pass over the weights
        at_once = 2 ** 23 if device == 'cpu' else 2 ** 28
        slices = max(1, -(-len(x) * len(weight) // at_once))
        rows = max(1, -(-len(x) // slices))
        for i in range(0, len(x), rows):
            j = min(i + rows, len(x))
            target, factor = targets[i:j].clamp(min=0).unsqueeze(1), factors[i:j].unsqueeze(1)
            logits = (x[i:j] @ weight.t()).to(total.dtype)
            picked, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            # in place: the slice is the largest tensor there is
            exponentials = logits.sub_(top).exp_()
            sums = exponentials.sum(1, keepdim=True)
            total = total + ((sums.log() + top - picked) * factor).sum()
            if need_gradients:
                dlogits = exponentials.mul_(factor / sums).scatter_add_(1, target, -factor)
                dlogits = dlogits.to(x.dtype)
                dx[i:j] = dlogits @ weight
                if x.dtype == dweight.dtype:
                    dweight.addmm_(dlogits.t(), x[i:j])  # half the time of the line below
                else:
                    dweight += dlogits.t() @ x[i:j]
        ctx.gradients = dx, dweight
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        dx, dweight = ctx.gradients
        ctx.gradients = None  # scaled in place: a second backward must fail, not count twice
        return dx.mul_(upstream), dweight.mul_(upstream), None, None, None

class GPT(nn.Module):
    """forward(idx (B, T) int64) -> logits (B, T, V); with targets the loss in nats."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd {config.n_embd} is no multiple of n_head {config.n_head}')
        if config.activation not in ACTIVATIONS:
            known = ', '.join(ACTIVATIONS)
            raise ValueError(f'activation {config.activation!r} must be one of {known}')
        self.config = config
        self.tokenizer = None  # an entry of TOKENIZERS, where weights were loaded that name it
        self.compiled_hidden = None
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, eps=1e-5),
        ))
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                # 2 n_layer of these add up in the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C). cache: a dict, {} at first, that keeps the keys and
        values of earlier tokens between calls."""
        past = next(iter(cache.values()))[0].size(2) if cache else 0
        end = past + idx.size(1)
        assert end <= self.config.block_size, f'{end} tokens, over {self.config.block_size}'
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[past:end]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, reduction='mean', places=None, factors=None):
        """Without targets the logits (B, T, V). With targets (B, T), -1 where nothing is to be
        predicted, the loss in nats: its mean or sum over the targets that count.

        Where few positions count, places (n,) are theirs in idx.flatten() and targets is (n,):
        no other position meets the head. factors: one for each target's term of the sum."""
        x = (self.compiled_hidden or self.hidden)(idx)
        weight = self.transformer.wte.weight
        if targets is None:
            return F.linear(x, weight)
        x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        if places is not None:
            x = x[places]
        loss = HeadLoss.apply(x, weight, targets, torch.is_grad_enabled(), factors)
        return loss / (targets >= 0).sum() if reduction == 'mean' else loss

    def compile(self, *args, **kwargs):
        """As nn.Module.compile, in place; on a CPU without the head, which gains nothing."""
        if self.transformer.wte.weight.device.type == 'cpu':
            self.compiled_hidden = torch.compile(self.hidden, *args, **kwargs)
        else:
            super().compile(*args, **kwargs)

    def flops_per_token(self, T):
        """Training FLOPs per token: 6 N + 12 L C T (PaLM, arXiv 2204.02311, appendix B), N
        without the position table."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * T

    def mfu(self, tokens_per_second, T):
        """Share of the FLOP/s that a GPU's maker states, as text; '-' if that is not known."""
        device = self.transformer.wte.weight.device
        name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return f'{100 * tokens_per_second * self.flops_per_token(T) / flops:.1f}%'
        return '-'

    def make_optimizers(self, name, lr, weight_decay, betas):
        """[AdamW], or for name = 'muon' [AdamW, Muon]: Muon has the matrices of the blocks.

        Weight decay is for matrices and embeddings, not for biases and norms."""
        matrices = {p for p in self.transformer.h.parameters() if p.dim() == 2}
        muon = matrices if name == 'muon' else set()
        parameters = [p for p in self.parameters() if p.requires_grad]
        adamw = [p for p in parameters if p not in muon]
        groups = [
            dict(params=[p for p in adamw if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in adamw if p.dim() < 2], weight_decay=0.0),
        ]
        # one kernel for all parameters, where there is one: on GPUs and CPUs, not for DTensors
        plain = all(type(p) is nn.Parameter for p in parameters)
        fused = plain and parameters[0].device.type in ('cuda', 'cpu')
        optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused)]
        if muon:
            optimizers.append(Muon([p for p in parameters if p in muon], lr, weight_decay))
        return optimizers

    def gradient_norms(self):
        """' | grad wte 1.00e-02 wpe ... 0 ... 1 ...' for a log line: of every part and block."""
        parts = dict(self.transformer.items()) | dict(self.transformer.h.named_children())
        del parts['h']
        norms = {name: whole(torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]))
                 for name, part in parts.items()}
        return ' | grad ' + ' '.join(f'{name} {norm.item():.2e}' for name, norm in norms.items())

    def shard(self, device_type, copies, ranks):
        """FSDP2: split every weight over `ranks` ranks, in `copies` copies (see whole)."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = init_device_mesh(device_type, (copies, ranks), mesh_dim_names=('copies', 'ranks'))
        for part in [*self.transformer.h, self]:
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(self, 'generate')

    @torch.no_grad()
    def resize(self, block_size, vocab_size):
        """Cut the position table to a shorter block_size, cut or pad the vocabulary to vocab_size.

        New ids get the mean of all embeddings: with zeros they would be the likeliest ids, since
        GPT-2's logits are all far below zero. ValueError if block_size is longer."""
        if (block_size, vocab_size) == (self.config.block_size, self.config.vocab_size):
            return
        if block_size > self.config.block_size:
            raise ValueError(f'block_size {block_size} is over its {self.config.block_size}')
        wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
        new = max(0, vocab_size - len(wte))
        wte = torch.cat((wte, wte.mean(0, keepdim=True).expand(new, -1)))[:vocab_size]
        self.transformer.wte = nn.Embedding.from_pretrained(wte.clone(), freeze=False)
        self.transformer.wpe = nn.Embedding.from_pretrained(wpe[:block_size].clone(), freeze=False)
        self.config = replace(self.config, block_size=block_size, vocab_size=vocab_size)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, n_vocab=0, eot=-1,
                 generator=None, lengths=None):
        """Continue idx (B, T) by up to max_new_tokens ids, with a cache of keys and values.

        temperature 0 = the likeliest id. top_k 0, top_p 1 = off. Ids >= n_vocab (0 = all may be
        drawn) are the padding of the vocabulary, they have no text. Rows that drew eot go on
        with eot; it stops when all did. lengths (B,): of prompts that were padded on the right;
        row b continues at lengths[b], over its padding, and with anything once it has its
        max_new_tokens. At block_size the older half of the context is forgotten: learned
        positions cannot slide. Leaves the training mode as it was."""
        mode, block_size = self.training, self.config.block_size
        self.eval()
        if lengths is None:
            lengths = torch.full((len(idx),), idx.size(1))
        prompts, first, end = idx, int(lengths.min()), int(lengths.max()) + max_new_tokens
        lengths = lengths.to(idx.device).unsqueeze(1)
        idx = idx[:, :first]
        cache, feed = {}, idx[:, -block_size:]
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for place in range(first, end):
            if cache and next(iter(cache.values()))[0].size(2) == block_size:
                cache, feed = {}, idx[:, -max(1, block_size // 2):]
            last = self.hidden(feed, cache)[:, -1]
            logits = F.linear(last, self.transformer.wte.weight).float()  # (B, V)
            logits[:, n_vocab or logits.size(1):] = -math.inf
            feed = pick(logits, temperature, top_k, top_p, generator)
            feed = torch.where(ended, eot, feed)
            if place < prompts.size(1):
                # some prompts go on
                feed = torch.where(place < lengths, prompts[:, place:place + 1], feed)
            idx = torch.cat((idx, feed), 1)
            ended |= (feed == eot) & (place >= lengths)
            if (ended | (place + 1 >= lengths + max_new_tokens)).all():
                break
        self.train(mode)
        return idx

    @classmethod
    def from_pretrained(cls, source, **changes):
        """The model that `source` names, with its own shape; changes: dropout, say.

        source: gpt2, gpt2-medium, gpt2-large, gpt2-xl or owner/name of the Hugging Face hub; a
        folder or .safetensors file of the transformers library; a checkpoint of this repository
        or of nanoGPT, or what read_checkpoint read of it. OSError: it is not there. ValueError:
        it is another model, and which."""
        if isinstance(source, dict):
            path, read = 'the checkpoint', partial(read_gpt_checkpoint, source)
        else:
            hub = source in GPT_SIZES and source != 'tiny'
            path = find_model(source, f'openai-community/{source}' if hub else '',
                              'gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name')
            of_transformers = os.path.isdir(path) or path.endswith('.safetensors')
            read = read_transformers_gpt2
            if not of_transformers:
                read = partial(read_gpt_checkpoint, read_checkpoint(path))
        try:
            weights, shape, tokenizer = read(path)
            model = cls(GPTConfig(**{**shape, **changes}))  # TypeError: a field that it has not
            model.load_state_dict(weights)
        except (RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f'{path} is another model: {one_line(error)}') from error
        model.tokenizer = tokenizer
        return model

    def save_pretrained(self, folder, tokenizer):
        """Write a new folder that transformers' GPT2LMHeadModel.from_pretrained loads.

        tokenizer: an entry of TOKENIZERS. The padding of the vocabulary is left out; GPT-2's own
        tokenizer files are put in, so that lm-eval needs nothing else. ValueError if GPT-2 in
        transformers cannot be this model."""
        folder = os.path.normpath(folder)
        if os.path.exists(folder):
            raise ValueError(f'{folder} is there already: name a new folder')
        names = dict(block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer',
                     n_head='n_head', n_embd='n_embd', activation='activation_function')
        config = asdict(self.config)
        dropout, n_vocab, eot = config.pop('dropout'), tokenizer['vocab_size'], tokenizer['eot']
        weights = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        kinds = {re.sub(r'\.\d+\.', '.*.', name) for name in weights}
        strange = sorted((config.keys() - names.keys()) | (kinds ^ PUBLISHED))
        if strange:
            raise ValueError(f"transformers' GPT-2 differs from this model in {', '.join(strange)}")
        for name in weights:
            if name.endswith(CONV1D):
                weights[name] = weights[name].t().contiguous()
        wte = 'transformer.wte.weight'
        weights[wte] = weights[wte][:n_vocab].contiguous()
        config = {names[name]: value for name, value in config.items()}
        config.update(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=n_vocab,
                      attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
                      bos_token_id=eot, eos_token_id=eot, dtype='float32', **FIXED)
        files = {'config.json': json.dumps(config, indent=1).encode()}
        if tokenizer['tokenizer'] == 'gpt2':
            files.update(gpt2_tokenizer_files(self.config.block_size))
        # under another name until it is whole
        os.makedirs(folder + '.tmp', exist_ok=True)
        save_file(weights, os.path.join(folder + '.tmp', 'model.safetensors'), {'format': 'pt'})
        for name, content in files.items():
            with open(os.path.join(folder + '.tmp', name), 'wb') as file:
                file.write(content)
        os.replace(folder + '.tmp', folder)

def pick(logits, temperature, top_k, top_p, generator):
    """One id (B, 1) for each row of logits (B, V), which are overwritten; see GPT.generate."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    # the largest becomes 0: a tiny temperature must not overflow
    logits = (logits - logits.amax(1, keepdim=True)) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(1)))[0][:, -1:]
        logits[logits < least] = -math.inf
    if top_p < 1:
        values, order = logits.sort(descending=True)
        p = values.softmax(1)
        # on the CPU: a GPU's cumsum is not deterministic
        outside = p.cpu().cumsum(1).to(p.device) - p >= top_p
        outside[:, 0] = False  # the likeliest id always stays
        logits[outside.scatter(1, order, outside)] = -math.inf
    return torch.multinomial(logits.softmax(1), 1, generator=generator)

# ---- optimizer ---------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix instead of the gradient's own size and shape.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. Updates are scaled to the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both take one learning rate. Parameters
    are matrices; those of one shape are stacked and done together."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, by_shape = group['lr'], group['momentum'], {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                gradients = torch.stack([p.grad for p in params])
                for p, gradient in zip(params, gradients, strict=True):
                    state = self.state[p]
                    if not state:
                        state['momentum_buffer'] = torch.zeros_like(p)
                    state['momentum_buffer'].lerp_(gradient, 1 - momentum)
                    gradient.lerp_(state['momentum_buffer'], momentum)  # Nesterov's
                updates = orthogonal(gradients)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - lr * group['weight_decay'])
                    p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(shape)))

def orthogonal(x):
    """U V^T, roughly, of each matrix x = U S V^T in x (n, rows, columns): five Newton-Schulz steps
    x <- (a + b g + c g^2) x with g = x x^T and the coefficients of the Muon post, which bring
    singular values to between 0.7 and 1.2. The steps are made on g, the smaller of both squares,
    and meet x at the end: a third less work for a CPU than on x. float32: g has half the digits."""
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype, tall = x.dtype, x.size(1) > x.size(2)
    x = (x.mT if tall else x).float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x @ x.mT, None
    for step in range(5):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if step == 0 else p @ product
        if step < 4:
            gram = p @ gram @ p
    x = product @ x
    return (x.mT if tall else x).to(dtype)

def whole(state):
    """Tensors, nested in dicts and lists or not, that are whole where GPT.shard split them."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor() if hasattr(state, 'full_tensor') else state

def split_like(optimizer):
    """The reverse: split an optimizer's whole tensors as its parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    for p, state in optimizer.state.items():
        for name, tensor in state.items():
            if isinstance(p, DTensor) and tensor.shape == p.shape:
                state[name] = distribute_tensor(tensor, p.device_mesh, p.placements)

# ---- weights in and out ------------------------------------------------------------------------
# What transformers' GPT-2 can also be, and this model cannot.
FIXED = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, n_inner=None,
             scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
# The weights of a published file, and those of them that are (in, out) there.
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
PUBLISHED = {f'transformer.{part}.{kind}' for kind in ('weight', 'bias') for part in (
    'wte', 'wpe', 'h.*.ln_1', 'h.*.attn.c_attn', 'h.*.attn.c_proj', 'h.*.ln_2', 'h.*.mlp.c_fc',
    'h.*.mlp.c_proj', 'ln_f')} - {'transformer.wte.bias', 'transformer.wpe.bias'}

def one_line(error):
    """The error's own words without terminal codes and line breaks, at most 200 characters."""
    text = re.sub(r'\x1b\[[0-9;]*m', '', f'{type(error).__name__}: {error}')
    return ' '.join(text.split())[:200]

def read_checkpoint(path):
    """The dict in a .pt file of torch.save, tensors on the CPU. Nothing in the file is executed.

    FileNotFoundError, or ValueError: in one line what the file is and what can be read."""
    can = 'tensors and plain values in a dict, as torch.save writes them since torch 1.6'
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load itself overlooks a flipped bit
        if broken:
            raise ValueError(f'{broken} in it is damaged')
        found = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f'it holds a {type(found).__name__}, no dict')
        return found
    except OSError:
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(f'{path} is cut short or of another format; readable: {can}') from error
    except pickle.UnpicklingError as error:
        kind = re.search(r'GLOBAL (\S+)', str(error))
        kind = f'an object, {kind[1]}' if kind else 'an object'
        raise ValueError(f'{path} holds {kind}, and reading it would run code; readable: {can}'
                         ) from error
    except Exception as error:  # a damaged file can provoke any of them
        raise ValueError(f'{path} cannot be read: {one_line(error)}') from error

def read_gpt_checkpoint(found, path):
    """(weights, shape, tokenizer or None) of a checkpoint of this repository or of nanoGPT."""
    weights = clean_names(found.get('model', found), path)
    shape, tokenizer = found.get('model_config'), found.get('tokenizer')
    if shape is None and 'model_args' in found:
        # nanoGPT's; its activation is the exact GELU
        shape = dict(found['model_args'], activation='gelu')
        if not shape.pop('bias', True):
            # it has no biases, here they are zeros
            for name in [name for name in weights if name.endswith('.weight')]:
                if 'wte' not in name and 'wpe' not in name:
                    weights[name[:-6] + 'bias'] = torch.zeros(len(weights[name]))
    if shape is None:
        raise ValueError(f'{path} does not tell the shape of its weights: store it beside them, as '
                         "torch.save({'model': weights, 'model_config': {'n_layer': ...}})")
    if tokenizer not in TOKENIZERS.values():
        tokenizer = tokenizer_of_size(shape['vocab_size'])
    return weights, shape, tokenizer

def read_transformers_gpt2(path):
    """(weights, shape, tokenizer or None) of a folder or .safetensors file of transformers."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    with open(os.path.join(folder, 'config.json'), 'rb') as file:
        config = json.loads(file.read().decode(errors='replace'))
    for name, value in dict(FIXED, model_type='gpt2', add_cross_attention=False).items():
        if config.get(name, value) not in (value, 4 * config.get('n_embd', 0)):
            raise ValueError(f'{folder}/config.json says {name} {config[name]!r}, not {value!r}')
    activation = config.get('activation_function', 'gelu_new')
    shape = dict(block_size=config['n_positions'], vocab_size=config['vocab_size'],
                 n_layer=config['n_layer'], n_head=config['n_head'], n_embd=config['n_embd'],
                 activation={'gelu_pytorch_tanh': 'gelu_new'}.get(activation, activation))
    file = path if path.endswith('.safetensors') else os.path.join(folder, 'model.safetensors')
    weights = clean_names(load_file(file), path)
    for name in weights:
        if name.endswith(CONV1D):
            weights[name] = weights[name].t().contiguous()
    return weights, shape, tokenizer_of_size(shape['vocab_size'])

def clean_names(weights, path):
    """The state dict under this model's names: without what torch.compile and DDP put in front,
    the causal masks of old files, and the head, which is wte."""
    ours = {}
    for name, tensor in weights.items():
        name = re.sub(r'^(_orig_mod\.|module\.)+', '', str(name))
        if not torch.is_tensor(tensor):
            raise ValueError(f'{path} holds no weights: its {name} is a {type(tensor).__name__}')
        if not name.startswith(('transformer.', 'lm_head.')):
            name = f'transformer.{name}'
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):
            ours[name] = tensor.float()
    if not {'transformer.wte.weight', 'transformer.wpe.weight'} <= ours.keys():
        raise ValueError(f'{path} holds no GPT-2 weights but {sorted(ours)[:3]}')
    head = ours.pop('lm_head.weight', ours['transformer.wte.weight'])
    if not torch.equal(head, ours['transformer.wte.weight']):
        raise ValueError(f'{path}: its lm_head.weight differs from wte.weight, here they are one')
    return ours

def find_model(source, repository='', names='owner/name'):
    """Path of the weights that `source` names: a file or folder as it is; owner/name of the
    Hugging Face hub (or `repository`) is downloaded into its cache. OSError says what failed."""
    if os.path.exists(source):
        return source
    if source.endswith('data/tiny_qwen'):
        raise OSError(f'{source} does not exist: python prepare/tiny_qwen.py makes it')
    repository = repository or source
    is_file = source.endswith(('.pt', '.bin', '.safetensors', '.json'))
    if is_file or not re.fullmatch(r'\w[\w.-]*/[\w.-]+', repository):
        raise OSError(f'{source} does not exist and is no model of the hub ({names})')
    try:
        from huggingface_hub import snapshot_download
        wanted = ['config.json', 'model*.safetensors*', 'tokenizer.json']
        return snapshot_download(repository, allow_patterns=wanted)
    except Exception as error:  # the hub's own errors, the network's, no huggingface_hub
        raise OSError(f'{source} was not downloaded from the hub ({one_line(error)}), which needs '
                      "pip install -e '.[data]'; a folder with its config.json and "
                      'model.safetensors works too') from error

# ---- tokenizer ---------------------------------------------------------------------------------
def tokenizer_of_size(vocab_size):
    """The entry of TOKENIZERS with so many ids, padded or not; None if there is none."""
    for known in TOKENIZERS.values():
        if known['vocab_size'] <= vocab_size < known['vocab_size'] + 64:
            return known
    return None

def load_tokenizer(name, download=False):
    """The tiktoken.Encoding called 'bytes' (256 byte values, end-of-text) or 'gpt2' (50,257 ids).

    tiktoken keeps GPT-2's two files in TIKTOKEN_CACHE_DIR, by default data/tiktoken beside this
    file. Without `download` the network is not touched: OSError if the files are not there."""
    import tiktoken
    import tiktoken.load
    if name == 'bytes':
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 256})
    if name != 'gpt2':
        raise ValueError(f"unknown tokenizer {name!r}, expected 'bytes' or 'gpt2'")
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'tiktoken')
    folder = os.environ.setdefault('TIKTOKEN_CACHE_DIR', beside)

    def offline(url):
        raise OSError(f"GPT-2's tokenizer is not in TIKTOKEN_CACHE_DIR={folder} "
                      '(prepare/fineweb.py puts it there)')

    read_file = tiktoken.load.read_file
    try:
        tiktoken.load.read_file = read_file if download else offline
        return tiktoken.get_encoding('gpt2')
    finally:
        tiktoken.load.read_file = read_file

def gpt2_tokenizer_files(block_size):
    """{name: bytes} of what transformers' GPT2Tokenizer reads, out of tiktoken's cache."""
    load_tokenizer('gpt2')
    words = dict(tokenizer_class='GPT2Tokenizer', model_max_length=block_size)
    files = {'tokenizer_config.json': json.dumps(words).encode()}
    for name, url in (('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe')):
        # tiktoken keeps a file under the SHA-1 of its address
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{url}'
        name_there = hashlib.sha1(url.encode()).hexdigest()
        with open(os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], name_there), 'rb') as file:
            files[name] = file.read()
    return files


# What stands from here on is of the four other scripts, until each has its own form.
import base64  # noqa: E402
import fcntl  # noqa: E402
import glob  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import unicodedata  # noqa: E402
import warnings  # noqa: E402
import zlib  # noqa: E402
from collections import deque  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from decimal import Decimal, localcontext  # noqa: E402
from fractions import Fraction  # noqa: E402
from functools import lru_cache  # noqa: E402
from types import SimpleNamespace  # noqa: E402
import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
from configurator_old import fail, fail_if, master, nearby, print0  # noqa: E402


# Qwen3 (Qwen Team 2025, arXiv 2505.09388). Module names are those of the published weights. Rows of different length are padded on the
# right: with causal attention what stands before the padding never sees it, so there is no mask, and the result is that of the row alone.

@dataclass
class Qwen3Config:
    """The shape, in the names of config.json; read it with from_json: no field has a default."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int            # num_attention_heads * head_dim is not hidden_size: 2048 and 1024 at 0.6B
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, content, where='config.json'):
        """From what a config.json holds, the hub's or transformers 5's spelling. ValueError for what is missing or not built here."""
        if not isinstance(content, dict):
            raise ValueError(f'{where} holds no settings')
        rope = content.get('rope_parameters')
        rope = rope if isinstance(rope, dict) else {}
        found = {**content, **({'rope_theta': rope['rope_theta']} if 'rope_theta' in rope else {})}
        if content.get('rope_theta', found.get('rope_theta')) != found.get('rope_theta'):
            raise ValueError(f'{where} says rope_theta {content["rope_theta"]!r} and {rope["rope_theta"]!r}')
        layer_types = content.get('layer_types') or ['full_attention']
        fixed = dict(model_type=('qwen3',), hidden_act=('silu',), attention_bias=(False, None), use_sliding_window=(False, None), rope_scaling=(None,),
                     attention_dropout=(0, None))
        for name, allowed in fixed.items():
            if content.get(name) not in allowed:
                raise ValueError(f'{where} says {name} {content.get(name)!r:.60}, this model has {allowed[0]!r}')
        if rope.get('rope_type', 'default') != 'default' or not isinstance(layer_types, list) or set(map(str, layer_types)) != {'full_attention'}:
            raise ValueError(f'{where} says rope_type {rope.get("rope_type")!r:.40} and layer_types {layer_types!r:.60}, built are default and full_attention')
        values = {}
        for name, kind in cls.__annotations__.items():
            value = found.get(name)
            whole_number = type(value) is int and 0 < value < 2 ** 31
            good = type(value) is bool if kind is bool else whole_number if kind is int else type(value) in (int, float) and 0 < value < 1e300
            if not good:
                raise ValueError(f'{where}: {name} is ' + (f'{value!r:.60}' if name in found else 'missing'))
            values[name] = kind(value)
        heads, kv_heads, size = values['num_attention_heads'], values['num_key_value_heads'], values['head_dim']
        if heads % kv_heads or size % 2:
            raise ValueError(f'{where}: {heads} heads of size {size} do not go with {kv_heads} key-value heads')
        return cls(**values)

    def to_json(self):
        """What from_json, and transformers from 4.51 on, read."""
        return dict(architectures=['Qwen3ForCausalLM'], model_type='qwen3', **self.__dict__, hidden_act='silu', attention_bias=False, attention_dropout=0.0,
                    use_sliding_window=False, sliding_window=None, rope_scaling=None, max_window_layers=self.num_hidden_layers, initializer_range=0.02,
                    use_cache=True, torch_dtype='float32')


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)  # rounded before the weight, as the published code does


class Qwen3Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D, heads, kv_heads = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj, self.o_proj = nn.Linear(C, heads * D, bias=False), nn.Linear(heads * D, C, bias=False)
        self.k_proj, self.v_proj = nn.Linear(C, kv_heads * D, bias=False), nn.Linear(C, kv_heads * D, bias=False)
        self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, past=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, D)
        q, k = (self.rotated(norm(t).transpose(1, 2), cos, sin) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        v, mask = v.transpose(1, 2), None
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # new tensors: whoever holds `past` keeps it as it was
            if T > 1:
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), (k, v)

    @staticmethod
    def rotated(x, cos, sin):
        """Rotary positions (Su et al. 2021): dimension i is paired with i + D/2."""
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin


class Qwen3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(C, hidden, bias=False), nn.Linear(C, hidden, bias=False), nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen3Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, x, cos, sin, past=None):
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Qwen3Stack(nn.Module):
    """Embedding (unless left out), layers, norm: inputs (B, T) int64, or (B, T, C) of the embedding's kind -> final hidden states (B, T, C)."""

    def __init__(self, config, embedding=True):
        super().__init__()
        self.config, self.grad_checkpoint = config, False  # True: activations are computed again in the backward pass, not kept
        if embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs, cache=None):
        """(hidden states, cache of these and all earlier positions). A cache is a list of each layer's (keys, values), (B, heads, T, D), and
        is never written to: a branch takes it by expand, and siblings cannot see each other."""
        x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)
        past = cache[0][0].size(2) if cache else 0
        T, D = x.size(1), self.config.head_dim
        assert past + T <= self.config.max_position_embeddings, f'{past + T} positions, the model has {self.config.max_position_embeddings}'
        frequencies = 1.0 / self.config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
        angles = torch.arange(past, past + T, dtype=torch.float32, device=x.device).unsqueeze(1) * frequencies
        angles = torch.cat((angles, angles), 1)  # (T, D)
        cos, sin, presents = angles.cos().to(x.dtype), angles.sin().to(x.dtype), []
        for i, layer in enumerate(self.layers):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, present = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, cache[i] if cache else None, use_reentrant=False)
            else:
                x, present = layer(x, cos, sin, cache[i] if cache else None)
            presents.append(present)
        return self.norm(x), presents


class Qwen3(nn.Module):
    """forward(inputs, cache=None) -> (logits (B, T, V), hidden states (B, T, C), cache); inputs and cache as Qwen3Stack has them."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Qwen3Stack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    @property
    def head(self):
        """The output embedding (V, C)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, inputs, cache=None):
        hidden, cache = self.model(inputs, cache)
        return F.linear(hidden, self.head), hidden, cache

    @classmethod
    def from_pretrained(cls, source):
        """The model, in float32, of a folder with config.json and model.safetensors, in one file or in several, or of a name of the hub (see
        find_model). OSError if it is not there, ValueError if it is not Qwen3 or not whole."""
        config, weights = read_qwen(source)
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model

    def files(self):
        """{name: content} of a folder that from_pretrained and transformers load (see write_whole), but for the tokenizer."""
        from safetensors.torch import save
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        return {'config.json': self.config.to_json(), 'model.safetensors': save(weights, metadata={'format': 'pt'})}

    @torch.no_grad()
    def realignment(self):
        """(W_a (C, C) or None, norm) of LatentMAS (Zou et al. 2025, arXiv 2511.20639): the next input is h W_a, made as long as input embeddings are on
        average. W_a = (W_out' W_out + 1e-5)^-1 W_out' W_in is the identity, None, where both embeddings are one, as in Qwen3 up to 4B."""
        embedding, head = self.model.embed_tokens.weight.float(), self.head.float()
        matrix = None
        if not self.config.tie_word_embeddings:
            matrix = torch.linalg.solve(head.t() @ head + 1e-5 * torch.eye(head.size(1), device=head.device), head.t() @ embedding)
        return matrix, embedding.norm(dim=1).mean()

    @torch.no_grad()
    def think(self, hidden, cache, steps, generators, noise, realignment=None):
        """LatentMAS's latent thoughts: the last hidden state, noise added, realigned, is the next input, `steps` times; nothing is decoded.

        hidden (B, C) at the last position, its cache, a torch.Generator (on the CPU) for each row, so that a row does not depend on the others;
        noise(step) -> [(sigma, spread)]: normal noise of sigma x u times the row's own standard deviation, u uniform in `spread`;
        realignment: what self.realignment() returned. Returns (inputs (B, steps, C), hidden (B, C) behind the last of them, cache)."""
        matrix, norm = realignment or self.realignment()
        latents = []
        for step in range(steps):
            h = hidden.float()
            for sigma, (low, high) in noise(step):
                drawn = torch.stack([torch.randn(h.size(1), generator=g) * (low + (high - low) * torch.rand((), generator=g)) for g in generators])
                h = h + sigma * h.std(1, keepdim=True) * drawn.to(h.device)
            h = h if matrix is None else h @ matrix
            latents.append((norm * h / h.norm(dim=1, keepdim=True).clamp(min=1e-6)).to(hidden.dtype))
            hidden, cache = self.model(latents[-1].unsqueeze(1), cache)
            hidden = hidden[:, -1]
        return torch.stack(latents, 1), hidden, cache

    @torch.no_grad()
    def speak(self, hidden, cache, draws, temperature, top_p, n_vocab, ends, stop=lambda: False):
        """[(ids, ended?, mean log-probability of the ids, at temperature 1)] of the text that follows each row: hidden (B, C) and cache as think returns
        them; draws (B, n) uniform in [0, 1): one for each of at most n tokens, so that a row does not depend on the others.

        A token is where its draw falls in the sorted probabilities; temperature 0 = the likeliest. Ids >= n_vocab are never drawn; one of `ends`
        ends the row and is left out. Rows that ended leave the batch when half of it is such."""
        rows, texts, sums, ended = torch.arange(len(hidden)), [[] for _ in hidden], [0.0] * len(hidden), [False] * len(hidden)
        for place in range(draws.size(1)):
            if stop():
                break
            logits = F.linear(hidden, self.head)[:, :n_vocab].float()
            probabilities = (logits if temperature == 0 else (logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
            if temperature == 0:
                chosen = probabilities.argmax(1, keepdim=True)
            else:
                values, order = probabilities.sort(1, descending=True)
                sums_before = values.cumsum(1) - values
                values = values.masked_fill((sums_before >= top_p) & (sums_before > 0), 0)  # the likeliest id always stays
                edges = values.cumsum(1)
                target = draws[rows, place].to(edges.device).unsqueeze(1) * edges[:, -1:]
                chosen = order.gather(1, torch.searchsorted(edges, target, right=True).clamp(max=edges.size(1) - 1))
            log_p = (logits.gather(1, chosen) - logits.logsumexp(1, keepdim=True)).squeeze(1).tolist()
            for row, token, p in zip(rows.tolist(), chosen.squeeze(1).tolist(), log_p, strict=True):
                if not ended[row]:
                    ended[row], sums[row] = token in ends, sums[row] + p
                    texts[row] += [] if ended[row] else [token]
            alive = [i for i, row in enumerate(rows.tolist()) if not ended[row]]
            if not alive:
                break
            if 2 * len(alive) <= len(rows):
                index = torch.tensor(alive, device=hidden.device)
                rows, chosen, cache = rows[alive], chosen[index], [(k[index], v[index]) for k, v in cache]
            hidden, cache = self.model(chosen, cache)
            hidden = hidden[:, -1]
        return [(ids, end, total / max(1, len(ids) + end)) for ids, end, total in zip(texts, ended, sums, strict=True)]


def read_qwen(source):
    """(Qwen3Config, state dict of Qwen3 in float32) of `source`, see Qwen3.from_pretrained. Every name and shape is checked."""
    folder = find_model(source)
    try:
        if not os.path.isdir(folder):
            raise ValueError('expected a folder with config.json and model.safetensors')
        config = Qwen3Config.from_json(read_whole(os.path.join(folder, 'config.json')))
        weights = read_safetensors(folder)
        head = weights.get('lm_head.weight')
        if config.tie_word_embeddings and head is not None:  # the published files of tied models hold it all the same
            if not torch.equal(head, weights.get('model.embed_tokens.weight', head.new_zeros(0))):
                raise ValueError('tie_word_embeddings is true, but its lm_head.weight differs from model.embed_tokens.weight')
            del weights['lm_head.weight']
        layers = len({name.split('.')[2] for name in weights if name.startswith('model.layers.')})
        if layers != config.num_hidden_layers:  # before they are built
            raise ValueError(f'its weights have {layers} layers' + ' called model.layers.N' * (not layers) + f', config.json says {config.num_hidden_layers}')
        with torch.device('meta'):
            expected = {name: p.shape for name, p in Qwen3(config).state_dict().items()}
        for name in sorted(expected.keys() | weights.keys()):
            if name not in weights or name not in expected or weights[name].shape != expected[name] or not weights[name].is_floating_point():
                raise ValueError(f'{name} is ' + (f'{weights[name].dtype} {tuple(weights[name].shape)}' if name in weights else 'missing') +
                                 (f', expected {tuple(expected[name])}' if name in expected else ', no weight of this model'))
        return config, {name: tensor.float() for name, tensor in weights.items()}
    except FileNotFoundError as error:
        raise ValueError(f'{folder} lacks {os.path.basename(error.filename or str(error))}') from error
    except (ValueError, RuntimeError, TypeError, OSError) as error:  # what hostile files provoke
        raise ValueError(f'{folder}: {" ".join(str(error).split())[:300]}') from error


# Qwen3's tokenizer: byte-level BPE whose merges are ranked as the ids are, so that tiktoken needs nothing but the vocabulary, and 26 added tokens.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_ADDED = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|object_ref_end|>', '<|box_start|>', '<|box_end|>', '<|quad_start|>',
              '<|quad_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>', '<tool_call>', '</tool_call>',
              '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>', '<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>',
              '<think>', '</think>')
QWEN_NEEDED = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>')
TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'qwen.tiktoken')


def byte_letters():
    """{byte: the character that stands for it in a vocabulary}: printable ones for themselves, the others for 256, 257, ... (GPT-2's way)."""
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable_bytes]
    return {**{b: chr(b) for b in printable_bytes}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class QwenTokenizer:
    """encode(text) -> ids of ordinary text, whatever it spells; chat(messages) -> ids of a prompt; decode(ids) -> text."""

    def __init__(self, ranks, added, name='qwen'):
        """ranks: {bytes: id} with the ids from 0 on; added: {text: id}. ValueError if they do not make a tokenizer."""
        import tiktoken
        ids = [*ranks.values(), *added.values()]
        if any(type(i) is not int for i in ids) or sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError('its vocabulary does not number all bytes and their merges from 0 on')
        if not all(isinstance(text, str) and text for text in added) or len(set(ids)) < len(ids) or not all(len(ranks) <= i < 2 ** 24 for i in added.values()):
            raise ValueError('its added tokens do not have ids of their own behind the vocabulary')
        if lacking := [text for text in QWEN_NEEDED if text not in added]:
            raise ValueError(f'it lacks the added token {lacking[0]}')
        self.encoding = tiktoken.Encoding(name, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=added)
        self.added, self.n_vocab = dict(added), max(ids) + 1
        self.known = set(ids)
        self.eot, self.im_start, self.im_end, self.think_start, self.think_end = (added[text] for text in QWEN_NEEDED)
        self.ends = {self.eot, self.im_end}  # either ends an answer

    @classmethod
    def from_pretrained(cls, source):
        """That of a folder, or name of the hub, with tokenizer.json, or vocab.json (and merges.txt), or qwen.tiktoken. OSError, ValueError."""
        folder = find_model(source)
        names = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(folder, name))]
        if not names:
            raise ValueError(f'{folder} holds no tokenizer: {", ".join(TOKENIZER_FILES)}')
        path = os.path.join(folder, names[0])
        try:
            return cls(*(read_tiktoken(path) if path.endswith('.tiktoken') else read_vocabulary(path)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:  # what hostile files provoke
            raise ValueError(f'{path}: {" ".join(str(error).split())[:200]}') from error

    def encode(self, text):
        """No text can spell a special token: <|im_end|> in a question is eight ordinary ones."""
        return self.encoding.encode_ordinary(unicodedata.normalize('NFC', text))

    def decode(self, ids):
        """Text with special tokens as they are spelled; ids that are none (the padding of the vocabulary) are left out."""
        return self.encoding.decode([i for i in ids if i in self.known], errors='replace')

    def chat(self, messages, thinking=True, generate=True):
        """Ids of [{'role': system | user | assistant, 'content': text}] as Qwen3's template renders them, with the beginning of an answer
        behind (generate). thinking=False: the answer begins with an empty thought. Earlier answers lose their thoughts."""
        ids, last_question = [], max((i for i, m in enumerate(messages) if m['role'] == 'user'), default=len(messages) - 1)
        for i, message in enumerate(messages):
            role, content, thought = message['role'], message['content'], ''
            if role not in ('system', 'user', 'assistant'):
                raise ValueError(f'role {role!r}: expected system, user or assistant')
            ids.append(self.im_start)
            if role == 'assistant' and '</think>' in content:
                thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].strip('\n')
                content = content.split('</think>')[-1].lstrip('\n')
            if role == 'assistant' and i > last_question and (i == len(messages) - 1 or thought):
                ids += [*self.encode('assistant\n'), self.think_start, *self.encode(f'\n{thought}\n'), self.think_end]
                ids += self.encode('\n\n' + content.lstrip('\n'))
            else:
                ids += self.encode(f'{role}\n{content}')
            ids += [self.im_end, *self.encode('\n')]
        if generate:
            ids += [self.im_start, *self.encode('assistant\n')]
            ids += [] if thinking else [self.think_start, *self.encode('\n\n'), self.think_end, *self.encode('\n\n')]
        return ids


def read_vocabulary(path):
    """({bytes: id}, {text: id}) of a tokenizer.json, or of a vocab.json with the merges.txt beside it, if there is one."""
    content = read_whole(path)
    if os.path.basename(path) == 'tokenizer.json':
        return vocabulary_of(content)
    merges_path, merges = os.path.join(os.path.dirname(path), 'merges.txt'), []
    if os.path.exists(merges_path):
        with open(merges_path, encoding='utf-8') as file:
            merges = [line.split(' ') for line in file.read().split('\n') if line and not line.startswith('#version')]
    ranks = ranked({text: i for text, i in content.items() if text not in QWEN_ADDED}, merges)
    return ranks, {text: len(ranks) + i for i, text in enumerate(QWEN_ADDED)}


def vocabulary_of(content):
    """The same of what a tokenizer.json holds."""
    model, steps = content['model'], content['pre_tokenizer']
    steps = steps.get('pretokenizers', [steps])
    kinds = [model.get('type', 'BPE'), content.get('normalizer'), *(step.get('type') for step in steps)]
    if kinds != ['BPE', {'type': 'NFC'}, 'Split', 'ByteLevel'] or steps[0]['pattern'] != {'Regex': QWEN_PATTERN} or steps[1].get('use_regex', True):
        raise ValueError("it does not split text as Qwen's does")
    added = {token['content']: token['id'] for token in content['added_tokens']}
    merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
    return ranked({text: i for text, i in model['vocab'].items() if text not in added}, merges), added


def ranked(vocabulary, merges):
    """{bytes: id} of a vocabulary in letters (see byte_letters), whose ids must number its merges in order."""
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    if merges and [vocabulary.get(a + b) for a, b in merges] != list(range(256, len(vocabulary))):
        raise ValueError('its merges are not ranked as its ids are')
    return {bytes(bytes_of[letter] for letter in text): i for text, i in vocabulary.items()}


def read_tiktoken(path):
    """({bytes: id}, {text: id}) of a qwen.tiktoken: lines of a token in base64 and its id."""
    with open(path, 'rb') as file:
        pairs = [line.split() for line in file.read().splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    return ranks, {text: len(ranks) + i for i, text in enumerate(QWEN_ADDED)}


def canonical(answer):
    """An answer as it is compared: of numbers the shortest spelling ($1,080.00, 1080 dollars and 1080% are 1080; \\frac{1}{2} and 2/4 are 0.5), of
    other texts the words in small letters. '' stays ''."""
    text = re.sub(r'\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}', r' \1 ', answer.strip()[:200])
    text = re.sub(r'\\[!,;: ]|\\left|\\right|\{,\}', lambda m: ',' if m[0] == '{,}' else '', text).replace('\u2212', '-').strip(' \n\t*$').rstrip(' .\n\t*$')
    simple = re.sub(r'\\?[$%€£]|\^\{?\\circ\}?', '', text)
    simple = re.sub(r'(?<=\d)\s*[a-z][a-z .]*$', '', simple.split('=')[-1], flags=re.IGNORECASE).strip().rstrip(' .')  # a unit behind the number
    simple = re.sub(r'^(-?)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}$', r'\1\2/\3', simple)
    number = re.fullmatch(r'([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?|\d+\.)(?:\s*/\s*(\d+))?', simple)
    if not number or not number[2] or number[3] and not int(number[3]):
        return ' '.join(text.lower().split())
    value = Fraction(number[2].replace(',', '').rstrip('.')) / int(number[3] or 1) * (-1 if number[1] == '-' else 1)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1:  # no end of decimals
        return f'{value.numerator}/{value.denominator}'
    with localcontext() as context:
        context.prec = 1000
        return f'{(Decimal(value.numerator) / Decimal(value.denominator)).normalize():f}'


def answer_of(text):
    """The answer in a model's text or in a solution of GSM8K, as canonical leaves it: the last \\boxed{...}, else what follows the last ####, else the
    last number. '' if there is none. What stands before </think> is no answer."""
    text = text.split('</think>')[-1]
    begin = text.rfind('\\boxed{')
    if begin >= 0:
        depth = 1
        for end in range(begin + 7, len(text)):
            depth += (text[end] == '{') - (text[end] == '}')
            if not depth:
                return canonical(text[begin + 7:end])
    if '####' in text:
        return canonical(text.split('####')[-1].strip().split('\n')[0])
    numbers = re.findall(r'(?:(?<![\w.)])[-\u2212])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?', text)
    return canonical(numbers[-1]) if numbers else ''


POOLINGS = ('mean', 'last', 'max')


class QwenLatentPRM(nn.Module):
    """A process reward model: Qwen3's layers read a path of latent thoughts, a linear head scores it.

    forward(latents (B, L, C), mask (B, L), question_ids=None (B, T), question_mask=None) -> logits (B,); a mask is nonzero, of any type, where
    something stands, wherever that is. With question_context the embedded question, which the latents followed, stands in front of them. Its
    embedding table is that of the published model and stays as it is: the latents are points in its space. Without, there is no table."""

    def __init__(self, model_path, pooling_strategy='mean', dropout_prob=0.1, question_context=False):
        super().__init__()
        if pooling_strategy not in POOLINGS:
            raise ValueError(f'pooling_strategy {pooling_strategy!r}: expected one of {", ".join(POOLINGS)}')
        self.config, weights = read_qwen(model_path)
        self.hidden_size, self.pooling_strategy, self.question_context = self.config.hidden_size, pooling_strategy, bool(question_context)
        with torch.device('meta'):
            self.model = Qwen3Stack(self.config, embedding=self.question_context)
        kept = self.model.state_dict().keys()
        self.model.load_state_dict({name: tensor for name, tensor in ((n.removeprefix('model.'), t) for n, t in weights.items()) if name in kept}, assign=True)
        if self.question_context:
            self.model.embed_tokens.weight.requires_grad_(False)
        self.dropout, self.score = nn.Dropout(dropout_prob), nn.Linear(self.hidden_size, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)
        self.register_buffer('pooling', torch.tensor(POOLINGS.index(pooling_strategy)))  # in the state dict: weights must not be used in another way
        self.register_buffer('context', torch.tensor(int(self.question_context)))

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As nn.Module's; ValueError if the weights were trained with another pooling, with or without the question, or of another model."""
        for name, described in (('pooling', POOLINGS), ('context', ('latents alone', 'question and latents'))):
            stored, own = state_dict.get(name), int(getattr(self, name))
            if not torch.is_tensor(stored) or stored.numel() != 1 or not 0 <= int(stored) < len(described):
                raise ValueError(f'these weights do not tell their {name}: they are not those of a QwenLatentPRM')
            if int(stored) != own:
                words = 'pooling_strategy' if name == 'pooling' else 'question_context'
                value = repr(POOLINGS[int(stored)]) if name == 'pooling' else bool(stored)
                raise ValueError(f'these weights were trained on {described[int(stored)]}, this model is made for {described[own]}: '
                                 f'QwenLatentPRM(..., {words}={value})')
        return super().load_state_dict(state_dict, strict, assign)

    def hidden(self, latents, mask, question_ids=None, question_mask=None):
        """(final hidden states at the latents (B, L, C), of each row in order and without gaps; which of them count (B, L); the places (B, L) in
        latents that they come from)."""
        device, dtype = self.score.weight.device, self.score.weight.dtype
        latents, there = torch.as_tensor(latents).to(device, dtype), torch.as_tensor(mask).to(device) != 0
        if latents.dim() != 3 or there.shape != latents.shape[:2]:
            raise ValueError(f'expected latents (B, L, {self.hidden_size}) and a mask (B, L), got {tuple(latents.shape)} and {tuple(there.shape)}')
        if latents.size(2) != self.hidden_size:
            raise ValueError(f'the latents are {latents.size(2)} wide, the hidden size of this model is {self.hidden_size}: they are those of another model '
                             '(Qwen3-0.6B has 1024, Qwen2.5-0.5B 896)')
        if not there.any(1).all():
            raise ValueError(f'row {int((~there.any(1)).nonzero()[0])} has no latents, its mask is all zero')
        if self.question_context != (question_ids is not None):
            raise ValueError('this model was made for ' + ('a question in front of the latents: give question_ids' if self.question_context else
                                                          'latents alone: leave out question_ids, or make it with question_context=True'))
        L, counts = latents.size(1), there.sum(1, keepdim=True)
        order = (~there).long().sort(dim=1, stable=True).indices  # what is there first, padding behind it
        latents = latents.masked_fill(~there.unsqueeze(2), 0)  # 0 x NaN is NaN, even where nobody looks
        x = latents.gather(1, order.unsqueeze(2).expand_as(latents))
        valid = torch.arange(L, device=device) < counts
        if question_ids is None:
            return self.model(x)[0], valid, order
        ids = torch.as_tensor(question_ids).to(device)
        asked = torch.ones_like(ids, dtype=torch.bool) if question_mask is None else torch.as_tensor(question_mask).to(device) != 0
        T, length = ids.size(1), asked.sum(1, keepdim=True)  # (B, 1)
        ids = ids.gather(1, (~asked).long().sort(dim=1, stable=True).indices)
        place = torch.arange(T + L, device=device).expand(len(ids), -1)  # of the whole row: question, latents, padding
        behind = (place - length).clamp(0, L - 1).unsqueeze(2).expand(-1, -1, self.hidden_size)
        words = self.model.embed_tokens(F.pad(ids, (0, L))).to(dtype)
        whole_row = torch.where((place < length).unsqueeze(2), words, x.gather(1, behind))
        hidden = self.model(whole_row)[0]
        latent_places = (length + torch.arange(L, device=device)).unsqueeze(2).expand(-1, -1, self.hidden_size)
        return hidden.gather(1, latent_places), valid, order

    def forward(self, latents, mask, question_ids=None, question_mask=None):
        hidden, valid, _ = self.hidden(latents, mask, question_ids, question_mask)
        hidden, valid, counts = hidden.float(), valid.unsqueeze(2), valid.sum(1)
        if self.pooling_strategy == 'mean':
            pooled = (hidden * valid).sum(1) / counts.unsqueeze(1)
        elif self.pooling_strategy == 'max':
            pooled = hidden.masked_fill(~valid, -math.inf).amax(1)
        else:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), counts - 1]
        return self.score(self.dropout(pooled.to(self.score.weight.dtype))).squeeze(1).float()

    @torch.no_grad()
    def predict_scores(self, latents, mask, question_ids=None, question_mask=None):
        """(B,) in [0, 1]: how likely the path leads to a right answer. Dropout is off, whatever the mode."""
        mode = self.training
        scores = self.eval()(latents, mask, question_ids, question_mask).sigmoid()
        self.train(mode)
        return scores

    @torch.no_grad()
    def step_scores(self, latents, mask, question_ids=None, question_mask=None):
        """(B, L): the score after every latent, that of the path up to there; 0 where the mask is zero."""
        hidden, valid, order = self.hidden(latents, mask, question_ids, question_mask)
        hidden = hidden.float()
        if self.pooling_strategy == 'mean':
            hidden = hidden.cumsum(1) / torch.arange(1, hidden.size(1) + 1, device=hidden.device).unsqueeze(1)
        elif self.pooling_strategy == 'max':
            hidden = hidden.cummax(1).values
        scores = self.score(hidden.to(self.score.weight.dtype)).squeeze(2).float().sigmoid() * valid
        return torch.zeros_like(scores).scatter(1, order, scores)


# Paths of latent thoughts and their scores: what train_latent_prm.py learns from, and how its model is judged.

NUMPY_FLOATS = [(np.float64(0).__reduce__()[0], 'numpy._core.multiarray.scalar'), (np.float64(0).__reduce__()[0], 'numpy.core.multiarray.scalar'),
                (np.dtype, 'numpy.dtype'), type(np.dtype(np.float64))]  # how other programs store a score; numpy < 2 says numpy.core


def open_paths(folder, max_seq_length=0, own_answers=False):
    """(paths, questions, facts) of a folder that prepare/latent_prm.py wrote. Only paths with latents and a score count.

    paths: a dict of what each has: `latents` [(L, H) as stored, the last max_seq_length, 0 = all], `target` (n,), its score, or with own_answers whether
    its own answer is right, `correct` (n,), that in any case (unknown: a score above 0.5), `answered` (n,), is that known, `answer` [str], `question` (n,), its
    number. questions: [dict(text, ids: its tokens or None)]. facts: files {name: [paths, CRC]}, hidden_size, left_out. Everything is checked; ValueError
    names file and place."""
    names = sorted(name for name in os.listdir(folder) if name.endswith('.pt')) if os.path.isdir(folder) else []
    if not names:
        raise ValueError(f'No .pt files found in {folder}')
    paths = {name: [] for name in ('latents', 'target', 'correct', 'answered', 'answer', 'question')}
    questions, number_of, seen, hidden_size, left_out, files = [], {}, {}, 0, 0, {}
    for name in names:
        file, crc, before, place = os.path.join(folder, name), 0, len(paths['target']), ''
        with torch.serialization.safe_globals(NUMPY_FLOATS):
            try:
                stored = read_whole(file)
            except (OSError, ValueError) as error:
                raise ValueError(f'{file} cannot be read: {error}; if it is damaged, delete it, and the command that made it makes it anew') from error
        try:
            if not isinstance(stored, dict):
                raise TypeError('no dict')
            for q, question in enumerate(stored['questions']):
                place = f'question {q}'
                if not isinstance(question, dict):  # a tensor takes any index, with a warning
                    raise TypeError('no dict')
                text, ids = question['question'], question.get('question_ids')
                if not isinstance(text, str) or ids is not None and not (torch.is_tensor(ids) and ids.dtype == torch.int64 and ids.dim() == 1 and len(ids)):
                    raise ValueError('its question is no text, or its question_ids are no int64 tokens')
                for p, path in enumerate(question['paths']):
                    place = f'question {q}, path {p}'
                    if not isinstance(path, dict):
                        raise TypeError('no dict')
                    latents, score, right = path.get('latent_history'), path.get('prm_score'), path.get('is_correct')
                    if latents is None or score is None or own_answers and right is None:
                        left_out += 1
                        continue
                    if not (torch.is_tensor(latents) and latents.is_floating_point() and (latents.dim() == 2 or latents.dim() == 3 and latents.size(1) == 1)):
                        raise ValueError('its latent_history is no tensor of (steps, 1, hidden) numbers')
                    latents = latents.flatten(0, -2)
                    if not latents.numel():
                        raise ValueError('its latent_history is empty')
                    if latents.size(1) != (hidden_size or latents.size(1)):
                        raise ValueError(f'its latents have {latents.size(1)} numbers, those before it {hidden_size}')
                    hidden_size = latents.size(1)
                    if not bool(latents.float().isfinite().all()):
                        raise ValueError('its latents are not all finite numbers (NaN or infinity)')
                    score, right = float(score), None if right is None else float(right)
                    if not 0 <= score <= 1:
                        raise ValueError(f'its prm_score is {score}, expected 0 to 1')
                    if right not in (None, 0.0, 1.0):
                        raise ValueError(f'its is_correct is {right}, expected true or false')
                    content = latents.contiguous().view(torch.uint8).numpy().tobytes()
                    key = hashlib.sha256(f'{text}\0{path.get("path_id")}\0{path.get("agent_idx")}\0'.encode() + content).digest()
                    if seen.setdefault(key, file) != file:
                        raise ValueError(f'{seen[key]} holds the same path: a merge beside its parts? Move one of them away')
                    crc = zlib.crc32(f'{text}\0{score}\0{right}\0{path.get("answer")}\0{None if ids is None else ids.tolist()}'.encode() + content, crc)
                    if text not in number_of:
                        number_of[text] = len(questions)
                        questions.append(dict(text=text, ids=ids))
                    correct = float(score > 0.5) if right is None else right
                    latents, target = latents[-max_seq_length:] if max_seq_length else latents, right if own_answers else score
                    for key, value in dict(latents=latents, target=target, correct=correct, answered=right is not None,
                                           answer=str(path.get('answer') or ''), question=number_of[text]).items():
                        paths[key].append(value)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            problem = f'{error}' if type(error) is ValueError else f'not in the format of prepare/latent_prm.py ({type(error).__name__}: {error})'
            raise ValueError(': '.join(filter(None, (file, place, problem)))) from error
        files[name] = [len(paths['target']) - before, crc]
    paths = {name: values if name in ('latents', 'answer') else np.array(values) for name, values in paths.items()}
    if not len(paths['target']):
        raise ValueError(f'{folder} holds no path with latents and a score' + ', and whether its answer is right' * own_answers)
    if len(questions) < 2:
        raise ValueError(f'{folder} holds paths of one question only: a part of the questions is held out, so at least two are needed')
    if paths['target'].min() == paths['target'].max():
        raise ValueError(f'all {len(paths["target"])} scores in {folder} are {paths["target"][0]:g}: nothing can be learned (take harder or easier questions)')
    return paths, questions, dict(files=files, hidden_size=hidden_size, left_out=left_out)


def open_split(folder, settings):
    """(*open_paths, the rows of the paths to learn from, of those held out): a part of the questions is held out with all their paths. settings: those of
    train_latent_prm.py. ValueError."""
    try:
        paths, questions, facts = open_paths(folder, settings['max_seq_length'], not settings['use_prm_score'])
    except ValueError as error:
        how = ' --task=arithmetic --max_samples=4000 --max_new_tokens=16 --num_paths=8' * (settings['preset'] == 'tiny')
        how = f'; to collect paths: `python prepare/latent_prm.py --model_path={settings["model_path"]} --output_dir={folder}{how}`'
        raise ValueError(f'✗ ERROR: {error}{how * ("No .pt" in str(error))}') from error
    if settings['question_context'] and any(question['ids'] is None for question in questions):
        raise ValueError(f'✗ ERROR: the files in {folder} do not hold the tokens of all questions: --question_context=False does without')
    share, all_of_them = settings['val_size'], len(questions)
    count = all_of_them if share == 1 else min(all_of_them - 1, max(1, round(share * all_of_them))) if share else 0
    held_out = np.isin(paths['question'], np.random.default_rng([settings['seed'], 1]).permutation(all_of_them)[:count])
    return paths, questions, facts, np.flatnonzero(~held_out), np.flatnonzero(held_out)


def check_paths(folder, config, hidden_size, longest, questions):
    """ValueError if the paths of a folder, so wide and so long, or the tokens of these questions are not for a model of this Qwen3Config."""
    if longest > config.max_position_embeddings:
        raise ValueError(f'a path of {folder} is {longest} long, this model has {config.max_position_embeddings} positions: a smaller --max_seq_length fits')
    for question in questions:
        if not 0 <= int(question['ids'].min()) <= int(question['ids'].max()) < config.vocab_size:
            raise ValueError(f'{folder}: the question_ids of {question["text"][:60]!r} are not all in 0 to {config.vocab_size - 1}')
    if hidden_size != config.hidden_size:
        raise ValueError(f'the latents in {folder} are {hidden_size} wide, the hidden size of this model is {config.hidden_size}: they were collected from '
                         'another one (Qwen3-0.6B has 1024, Qwen2.5-0.5B 896)')


def paths_of(paths, rows):
    """`paths` of these rows."""
    return {name: [values[row] for row in rows] if isinstance(values, list) else values[rows] for name, values in paths.items()}


def by_question(question, rows, batch_size, seed, epoch):
    """The micro-batches of an epoch, as bucketed, of these rows; but a question's paths stand side by side: what is compared must be in one micro-batch."""
    generator = np.random.default_rng([seed, epoch])
    order = rows[generator.permutation(len(rows))]
    order = order[np.argsort(generator.permutation(question.max() + 1)[question[order]], kind='stable')]
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def ordered_pairs(paths, chosen):
    """(m, 2): places in `chosen` of two paths of one question, the first with the higher score."""
    target, question = paths['target'][chosen], paths['question'][chosen]
    return np.argwhere((question[:, None] == question) & (target[:, None] > target))


def path_tensors(paths, chosen, questions=None, multiple=1, pairs=False):
    """[*padded_paths, targets (b,), weights (b,), pairs (m, 2)] of these rows, with the tokens of their questions, if they are given, and their ordered_pairs.
    No rows at all (more ranks than paths, but all must take part) give one of one step of zeros that weighs nothing."""
    rows, end = (chosen, None) if len(chosen) else ([0], 1)
    ids = [questions[paths['question'][row]]['ids'][:end] for row in rows] if questions else None
    inputs = padded_paths([paths['latents'][row][:end] for row in rows], ids, multiple)
    targets = torch.tensor(paths['target'][rows]).to(torch.get_default_dtype())
    weights, pairs = torch.ones(len(rows)), torch.from_numpy(ordered_pairs(paths, rows) if pairs else np.zeros((0, 2), np.int64))
    if not len(chosen):
        inputs[0].zero_(), weights.zero_()
    return [*inputs, targets, weights, pairs]


def auc(scores, right):
    """Probability that a right one has a higher score than a wrong one, ties count half; NaN if there are not both."""
    right = right > 0.5
    ordered, n = np.sort(scores), int(right.sum())
    ranks = (np.searchsorted(ordered, scores, 'left') + np.searchsorted(ordered, scores, 'right') + 1) / 2
    return (ranks[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n)) if 0 < n < len(right) else math.nan


def vote(answers, weights, right):
    """Accuracy of the answer with the largest sum of weights (of several with the same sum, their mean); '' is no answer."""
    sums = {}
    for answer, weight, correct in zip(answers, weights, right, strict=True):
        if answer:
            total, count, hits = sums.get(answer, (0.0, 0, 0.0))
            sums[answer] = total + weight, count + 1, hits + correct
    best = max((total for total, _, _ in sums.values()), default=0.0)
    return float(np.mean([hits / count for total, count, hits in sums.values() if total >= best * (1 - 1e-9)] or [0.0]))


def judged(scores, paths, resamples=0):
    """What scores (n,) in 0 to 1 of these paths are worth, a dict of numbers, NaN where one is not defined. Intervals are of 95%, from so many
    resamples of the questions.

    within_auc: mean of the AUCs inside each question that has right and wrong paths: what a choice among its paths lives on. best_of_n: how often
    the path with the highest score is right (of several, their mean). weighted_vote: see vote."""
    order = np.argsort(paths['question'], kind='stable')
    groups = np.split(order, np.flatnonzero(np.diff(paths['question'][order])) + 1)
    right, chooses = paths['correct'], paths['answered'] if paths['answered'].any() else np.ones(len(scores), bool)  # paths without an answer are not chosen
    choices = [g[chooses[g]] for g in groups if chooses[g].any()]
    each = dict(within_auc=[auc(scores[g], right[g]) for g in groups],
                best_of_n=[right[g][scores[g] == scores[g].max()].mean() for g in choices],
                weighted_vote=[vote([paths['answer'][i] for i in g], scores[g], right[g]) for g in choices] if any(paths['answer']) else [math.nan])
    bins = np.minimum((scores * 10).astype(int), 9)
    report = dict(mse=np.mean((scores - paths['target']) ** 2), mae=np.mean(np.abs(scores - paths['target'])), brier=np.mean((scores - right) ** 2),
                  ece=sum(abs((scores - right)[bins == b].sum()) for b in range(10)) / len(scores), auc=auc(scores, right))
    for name, values in each.items():
        values = np.array(values)[np.isfinite(values)]
        report[name] = values.mean() if len(values) else math.nan
        if resamples:
            means = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1) if len(values) else [math.nan]
            report[name + '_interval'] = [float(edge) for edge in np.quantile(means, [0.025, 0.975])]
    return {name: value if isinstance(value, list) else float(value) for name, value in report.items()}


def prm_report(scores, losses, paths):
    """What a validation found, from scores and losses (n,) of its paths: plain numbers."""
    mine, constant = judged(scores, paths), judged(np.ones(len(scores)), paths)
    return dict(val_loss=float(losses.mean()), auc=mine['auc'], within_auc=mine['within_auc'], best_of_n=mine['best_of_n'], random_pick=constant['best_of_n'],
                majority_vote=constant['weighted_vote'], paths=len(scores), questions=len(set(paths['question'])))


def prm_line(report):
    words = dict(auc='AUC', within_auc='within-question AUC', best_of_n='best of N', random_pick='random pick', majority_vote='majority vote')
    return ' | '.join([f'val loss {report["val_loss"]:.4f}', *(f'{words[name]} {report[name]:.4f}' for name in words if not math.isnan(report[name])),
                       f'{report["paths"]:,} paths of {report["questions"]:,} questions'])


def training_stats(progress, **facts):
    """Content of training_stats.json, as guide 004's plots read it."""
    names = ('epoch_losses', 'step_losses', 'step_numbers', 'val_losses', 'val_step_numbers', 'best_loss', 'best_val_loss', 'best_step', 'table')
    return dict(facts, **{name: progress[name] for name in names}, final_loss=(progress['epoch_losses'] or [math.nan])[-1],
                final_val_loss=progress['val_loss'], validation=progress['report'], training_time_seconds=progress['seconds'],
                timestamp=time.strftime('%Y-%m-%d %H:%M:%S'))


def probe(x, y, groups, others, poll=lambda: None):
    """Scores (m,) of `others` (m, d) by logistic regression with a ridge on x (n, d), soft labels y (n,): the strength of the ridge is the best of five on a
    fifth of the groups. Newton's method."""
    if len(x) > 20000:
        keep = np.random.default_rng(0).permutation(len(x))[:20000]
        x, y, groups = x[keep], y[keep], groups[keep]
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, others = (np.concatenate(((a - mean) / std, np.ones((len(a), 1))), 1) for a in (x, others))

    def fit(x, y, ridge):
        poll()
        w = np.zeros(x.shape[1])
        penalty = np.full(len(w), ridge * len(x))
        penalty[-1] = 1e-6  # not of the bias
        for _ in range(20):
            p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
            step = np.linalg.solve((x.T * (p * (1 - p) + 1e-6)) @ x + np.diag(penalty), x.T @ (y - p) - penalty * w)
            w += step
            if abs(step).max() < 1e-6:
                break
        return w

    def scores(x, w):
        return 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))

    def loss(ridge):
        p = np.clip(scores(x[test], fit(x[~test], y[~test], ridge)), 1e-6, 1 - 1e-6)
        return -np.mean(y[test] * np.log(p) + (1 - y[test]) * np.log(1 - p))

    test, ridges = groups % 5 == 0, [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    return scores(others, fit(x, y, min(ridges, key=loss) if 0 < test.sum() < len(test) else 1e-2))


def word_counts(texts):
    """(n, 256): logs of the counts of the words of each text, and of its length; words share places by their CRC."""
    counts = np.zeros((len(texts), 257))
    for row, text in zip(counts, texts, strict=True):
        found = re.findall(r'\w+|[^\w\s]', text.lower())
        np.add.at(row, [zlib.crc32(word.encode()) % 256 for word in found], 1)
        row[256] = len(found)
    return np.log1p(counts)


def compared(scores, held_out, learn, questions, poll):
    """{scorer: judged(...)} of these scores of the held-out paths and of what they must be better than, on the same paths: a constant (whose best
    of N is a random pick, and whose vote the majority's), a linear probe on the mean latent, one on the words of the question; and of the truth.
    learn: the paths to learn from. It takes a minute of a large model's latents: poll() is called between its parts."""
    constant = learn['target'].mean() if len(learn['target']) else 0.5
    found = {'PRM': scores, 'constant': np.full(len(scores), constant), 'oracle': held_out['correct']}
    if len(learn['target']):
        counts = word_counts([question['text'] for question in questions])
        means, others = (np.stack([latents.double().mean(0).numpy() for latents in part['latents']]) for part in (learn, held_out))
        found['linear probe'] = probe(means, learn['target'], learn['question'], others, poll)
        found['question only'] = probe(counts[learn['question']], learn['target'], learn['question'], counts[held_out['question']], poll)
    table = {}
    for name, values in found.items():
        poll()
        table[name] = judged(values, held_out, 1000)
    return table


def table_lines(table):
    """Lines of the table: scorers with all measures, then what chooses without scores."""
    def cell(measures, name, digits=4):
        interval = measures.get(name + '_interval')
        text = '-' if math.isnan(measures[name]) else f'{measures[name]:.{digits}f}'
        return text if not interval or text == '-' else f'{text} [{interval[0]:.3f}, {interval[1]:.3f}]'
    yield f'{"":15}{"MSE":>8}{"MAE":>8}{"Brier":>8}{"ECE":>8}{"AUC":>8}  {"within-question AUC":22}{"best of N":22}{"score-weighted vote":22}'.rstrip()
    for name in ('PRM', 'linear probe', 'question only', 'constant'):
        if name in table:
            numbers = ''.join(f'{cell(table[name], measure):>8}' for measure in ('mse', 'mae', 'brier', 'ece', 'auc'))
            yield f'{name:15}{numbers}  {"".join(f"{cell(table[name], measure, 3):22}" for measure in ("within_auc", "best_of_n", "weighted_vote"))}'.rstrip()
    chosen = {'random pick': ('constant', 'best_of_n'), 'majority vote': ('constant', 'weighted_vote'), 'oracle, pass@N': ('oracle', 'best_of_n')}
    for name, (scorer, measure) in chosen.items():
        yield f'{name:15}{"":64}{cell(table[scorer], measure, 3)}'
    best, weighted, majority = table['PRM']['best_of_n'], table['PRM']['weighted_vote'], table['constant']['weighted_vote']
    if not math.isnan(majority):
        verdict = 'loses to' if best < majority else 'beats' if best > majority else 'equals'
        yield f"choosing the PRM's best path {verdict} a majority vote, {best:.3f} to {majority:.3f}; a vote weighted by its scores has {weighted:.3f}"


def choice_lines(scores, by_step, said):
    """Lines of what is chosen among the paths of a question: their scores, those after each thought, and their (text, answer), '' being none."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    for i in order:
        steps = ' '.join(f'{score:.3f}' for score in by_step[i])
        yield f'path {i:3} | score {scores[i]:.3f} | after each thought {steps} | answer {said[i][1] or "none"}'
    for how, weights in (('majority vote', [1] * len(scores)), ('vote weighted by the scores', scores)):
        sums = {}
        for weight, (_, answer) in zip(weights, said, strict=True):
            if answer:
                sums[answer] = sums.get(answer, 0) + weight
        yield f'{how}: {max(sorted(sums), key=sums.get, default="none")}'
    best = next((i for i in order if said[i][1]), order[0])  # a path without an answer is no choice
    yield f'chosen: path {best}, score {scores[best]:.3f}, answer {said[best][1] or "none"}\n{printable(said[best][0]).strip()}'


def padded_paths(rows, ids=None, multiple=1):
    """(latents (b, L, C), mask (b, L), tokens of their questions (b, T), their mask), the last two None without ids: tensors (l, C) and (t,) padded
    on the right to multiples of this."""
    sizes = [-(-max(map(len, part)) // multiple) * multiple if part else 0 for part in (rows, ids)]
    latents, mask = torch.zeros(len(rows), sizes[0], rows[0].size(1), dtype=torch.get_default_dtype()), torch.zeros(len(rows), sizes[0])
    tokens, asked = (torch.zeros(len(rows), sizes[1], dtype=kind) for kind in (torch.int64, torch.float32))
    for i, row in enumerate(rows):
        latents[i, :len(row)], mask[i, :len(row)] = row, 1
        if ids:
            tokens[i, :len(ids[i])], asked[i, :len(ids[i])] = ids[i], 1
    return (latents, mask, tokens, asked) if ids else (latents, mask, None, None)


PRM_FILES = ('pytorch_model.bin', 'optimizer.pt', 'scheduler.pt', 'config.json')  # of a checkpoint, beside training_state.json


def read_prm(path):
    """A checkpoint of train_latent_prm.py, or a file or a folder of weights alone, as one dict; ValueError if it is damaged."""
    if not os.path.isdir(path):
        return read_whole(path)
    if not os.path.exists(os.path.join(path, 'training_state.json')):
        if not os.path.exists(os.path.join(path, 'pytorch_model.bin')):
            raise ValueError('a folder without training_state.json and pytorch_model.bin')
        return {'model': read_whole(os.path.join(path, 'pytorch_model.bin'))}
    state, files = read_whole(os.path.join(path, 'training_state.json')), [os.path.join(path, name) for name in PRM_FILES]
    for name, file in zip(PRM_FILES, files, strict=True):
        if not os.path.exists(file) or sha256(file) != state['sha256'][name]:
            raise ValueError(f'its {name} is missing or not the one that training_state.json names by its SHA-256')
    model, optimizer, scheduler, shape = map(read_whole, files)
    if not isinstance(scheduler, dict) or not isinstance(optimizer, dict):
        raise ValueError('its scheduler.pt or optimizer.pt holds something else')
    state = {name: math.inf if value is None else value for name, value in state.items()}  # JSON has no infinity
    return dict(state, model=model, optimizer=optimizer, shape=shape, **{name: scheduler[name] for name in ('ranks', 'scaler', 'train_loader_state')})


def prm_files(run, model, optimizer, rest):
    """The files that read_prm reads, {name: content}. run: what all scripts store; rest: more for scheduler.pt."""
    state = {name: value for name, value in run.items() if name != 'ranks'}
    numbers = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    total, trained = map(sum, zip(*numbers, strict=True))
    return {
        'pytorch_model.bin': on_cpu(dict(model.state_dict())),  # on the CPU: the guide's torch.load has no map_location
        'optimizer.pt': optimizer,
        'scheduler.pt': dict(rest, step=run['step'], ranks=run['ranks']),
        'config.json': dict(model.config.to_json(), pooling_strategy=model.pooling_strategy, question_context=model.question_context,
                            dropout_prob=model.dropout.p, total_parameters=total, trainable_parameters=trained),
        'training_state.json': lambda folder: dict(state, sha256={name: sha256(os.path.join(folder, name)) for name in PRM_FILES}),
    }


def newest_prm_run():
    """The folder of the newest run that nobody named, '' if there is none."""
    found = prm_checkpoints(os.path.join('checkpoints', 'qwen_prm_*', '*'), r'checkpoint-\d+|epoch_\d+|final|best')
    return os.path.dirname(os.path.dirname(newest(os.path.join(path, 'training_state.json') for path in found)))


def prm_step(path):
    """The step of the checkpoint in a folder, without reading all of it; -1 if there is none."""
    try:
        return int(read_whole(os.path.join(path, 'training_state.json'))['step'])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return -1


def prm_checkpoints(pattern, names):
    """{path: step} of the checkpoints that fit the glob pattern, and whose names fit the regular expression."""
    steps = {path: prm_step(path) for path in glob.glob(pattern) if re.fullmatch(names, os.path.basename(path))}
    return {path: step for path, step in steps.items() if step >= 0}


def sha256(path):
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 22):
            digest.update(block)
    return digest.hexdigest()


def without_nan(value):
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {name: without_nan(element) for name, element in value.items()}
    return [without_nan(element) for element in value] if isinstance(value, list) else None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the four other scripts ----------------------------------------------------------------------
# What follows is no model: finetune_dolly.py, pretrain_trm.py, finetune_addition.py and train_latent_prm.py import it until each has its own.

def find_gpt(source):
    """find_model, for which 'gpt2', 'gpt2-medium', 'gpt2-large' and 'gpt2-xl' are names too."""
    repository = f'openai-community/{source}' if source in GPT_SIZES and source != 'tiny' else source
    return find_model(source, repository, 'gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name')


def path_of_gpt(setting, source):
    """find_gpt of what a setting names; ends the script if it is not there."""
    try:
        return find_gpt(source)
    except OSError as error:
        fail(f'--{setting}={error}{nearby(source)}')


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, or of a folder with model.safetensors, in one file or in several."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files = [path]
    if os.path.isdir(path):
        index = os.path.join(path, 'model.safetensors.index.json')
        names = ['model.safetensors']
        if os.path.exists(index):
            try:
                names = sorted({os.path.basename(name) for name in read_whole(index)['weight_map'].values()})  # an index cannot lead out of its folder
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError('its model.safetensors.index.json holds no weight_map') from error
        files = [os.path.join(path, name) for name in names]
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f'{error}') from error


def read_gpt(path, whole=False):
    """GPT-2 weights as {'model': state dict of GPT, 'config': its shape in GPTConfig's names}, from a checkpoint of this repository
    (with its 'tokenizer' and 'data_root'; if `whole`, all of it as it is), a folder or .safetensors of the transformers
    library, nanoGPT's ckpt.pt, or a bare state dict, which tells n_head only if its size is a published one; with or without the
    prefixes of torch.compile and DDP. ValueError if it is none of these or does not fit together."""
    try:
        return _read_gpt(path, whole)
    except (AttributeError, TypeError, RuntimeError, IndexError, KeyError, OverflowError) as error:  # what hostile entries provoke
        raise ValueError(f'{type(error).__name__}: {" ".join(str(error).split())[:200]}') from error


def _read_gpt(path, whole):
    config, stored = {}, {}
    if os.path.isdir(path) or path.endswith('.safetensors'):
        try:
            config = read_whole(os.path.join(path if os.path.isdir(path) else os.path.dirname(path), 'config.json'))
            weights = read_safetensors(path)
        except FileNotFoundError as error:
            raise ValueError(f'it lacks {os.path.basename(error.filename or str(error))}') from error
        if not isinstance(config, dict):
            raise ValueError('its config.json holds no settings')
        fixed = dict(model_type='gpt2', layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                     add_cross_attention=False, tie_word_embeddings=True)
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f'config.json says {name} {config[name]!r}, this model has {value!r}')
        config['activation'] = {'gelu_pytorch_tanh': 'gelu_new'}.get(name := str(config.get('activation_function', 'gelu_new')), name)
        if config['activation'] not in ACTIVATIONS:
            raise ValueError(f'config.json says activation_function {name!r}, known are {", ".join(ACTIVATIONS)}')
    else:
        stored = read_whole(path)
        if not isinstance(stored, dict) or not isinstance(stored.get('model', stored), dict):
            raise ValueError('it holds no weights')
        if whole and 'step' in stored and 'model' in stored:
            return stored
        weights = stored.get('model', stored)
        if isinstance(stored.get('model_args'), dict):  # nanoGPT's, whose activation is the exact GELU
            config = dict(stored['model_args'], activation='gelu')
        elif isinstance(stored.get('config'), dict):
            config = stored['config']
    ours = {}
    for name, tensor in weights.items():
        while name.startswith(('_orig_mod.', 'module.', 'transformer.')):
            name = name.split('.', 1)[1]
        if not torch.is_tensor(tensor) or not tensor.is_floating_point() and not name.endswith('attn.bias'):
            raise ValueError(f'its entry {name!r} is no weight')
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # the causal mask, which old files hold
            ours[name] = tensor.float()
    if not {'wte.weight', 'wpe.weight', 'h.0.attn.c_attn.weight'} <= ours.keys():
        raise ValueError(f'it holds no GPT-2 weights but {sorted(ours)[:3]}')
    head = ours.pop('lm_head.weight', ours['wte.weight'])
    if not torch.equal(head, ours['wte.weight']):
        raise ValueError('its lm_head.weight differs from wte.weight, here they are one')
    (vocab, C), block_size = ours['wte.weight'].shape, len(ours['wpe.weight'])
    if ours['h.0.attn.c_attn.weight'].shape == (C, 3 * C):
        ours = {name: tensor.t().contiguous() if name.endswith(CONV1D) else tensor for name, tensor in ours.items()}
    n_layer = len({name.split('.')[1] for name in ours if name.startswith('h.')})
    shape = dict(block_size=block_size, vocab_size=vocab, n_layer=n_layer, n_embd=C)
    with torch.device('meta'):
        expected = {name.removeprefix('transformer.'): p.shape for name, p in GPT(GPTConfig(n_head=1, **shape)).named_parameters()}
    published = {(size['n_layer'], size['n_embd']): size['n_head'] for size in GPT_SIZES.values()}.get((n_layer, C), 0)
    n_head, shape['activation'] = config.get('n_head', published), config.get('activation', 'gelu_new')
    if type(n_head) is not int or n_head < 0 or n_head and C % n_head or str(shape['activation']) not in ACTIVATIONS:
        raise ValueError(f'it says n_head {n_head!r} and activation {shape["activation"]!r} at a width of {C}')
    if n_head:  # a bare state dict of a size of one's own cannot tell
        shape['n_head'] = n_head
    for name, size in expected.items():
        if name not in ours and name.endswith('bias'):
            ours[name] = torch.zeros(size)  # nanoGPT's bias=False
    for name in sorted(expected.keys() | ours.keys()):
        if name not in ours or name not in expected or ours[name].shape != expected[name]:
            raise ValueError(f'{name} is {tuple(ours[name].shape) if name in ours else "missing"}, expected '
                             f'{tuple(expected[name]) if name in expected else "no such weight"}')
    found = {'model': {'transformer.' + name: ours[name] for name in expected}, 'config': shape}
    if stored.get('tokenizer') in TOKENIZERS.values():
        found['tokenizer'], found['data_root'] = stored['tokenizer'], str(config.get('data_root', ''))
    return found


def adopt_shape(config, shape, source, where):
    """Make the shape that read_gpt found that of the settings (a Config), as if it had been typed; the data decide on vocab_size, and
    a shorter block_size may be typed. ValueError if the settings say something else, or if nobody says n_head."""
    if 'n_head' not in shape and 'n_head' not in config.given:
        raise ValueError(f'{where} does not tell the number of heads: add --n_head')
    for name, value in shape.items():
        if name in config.given and config[name] != value and name not in ('block_size', 'vocab_size'):
            raise ValueError(f'--{name}={config[name]} is not that of {where}: {value}')
    size = dict(model=source) if source in GPT_SIZES else {}
    config.restore({**size, **{name: value for name, value in shape.items() if name != 'vocab_size'}}, where)


def begin_gpt(setting, config, checkpoint, file, strict):
    """(checkpoint, its file): without one, that of the source which this setting of the Config names, else (None, ''); the shape of weights
    alone becomes that of the settings. strict: a source that cannot be read ends the script, 'scratch' is none. Else it is a warning, and of a default that is
    not there, like logs/model_19072.pt, the newest in its folder are tried, model_<number>.pt."""
    sources, folder = [] if checkpoint or strict and config[setting] == 'scratch' else [config[setting]], os.path.dirname(config[setting])
    if sources and not strict and setting not in config.given and not os.path.exists(sources[0]) and os.path.isdir(folder):
        numbers = filter(None, (re.fullmatch(r'model_(\d{1,18})\.pt', name) for name in os.listdir(folder)))
        sources = [os.path.join(folder, match[0]) for match in sorted(numbers, key=lambda match: -int(match[1]))] or sources
    for source in sources:
        try:
            path = find_gpt(source)
            checkpoint, file = read_gpt(path), path
            config.restore({setting: source}, path)  # so that config.py repeats this run
            break
        except (ValueError, OSError) as error:
            if strict:
                fail(f'--{setting}={error}{nearby(source)}' if isinstance(error, OSError) else f'--{setting}={source}: {error}')
            print0(f'WARNING: the pretrained checkpoint cannot be used: {error if isinstance(error, OSError) else f"{source}: {error}"}{nearby(source)}')
    if checkpoint and 'step' not in checkpoint:
        try:
            adopt_shape(config, checkpoint['config'], config[setting], file)
        except ValueError as error:
            fail(error)
    return checkpoint, file


def fit_weights(weights, block_size, vocab_size, n_vocab):
    """The state dict for a shorter block_size and for other padding (to vocab_size) of a vocabulary of n_vocab ids. New ids get the
    mean of all embeddings: with zeros they would be the likeliest ids, since GPT-2's logits are all far below zero.
    ValueError if it is not made for n_vocab ids, or too short."""
    weights, wte, wpe = dict(weights), weights['transformer.wte.weight'], weights['transformer.wpe.weight']
    if not n_vocab <= len(wte) <= max(vocab_size, -(-n_vocab // 64) * 64):
        raise ValueError(f'it has {len(wte)} ids, the tokenizer has {n_vocab}')
    if block_size > len(wpe):
        raise ValueError(f'it has {len(wpe)} positions, fewer than block_size {block_size}')
    new = vocab_size - len(wte)
    weights['transformer.wte.weight'] = torch.cat((wte, wte.mean(0, keepdim=True).expand(new, -1))) if new > 0 else wte[:vocab_size]
    weights['transformer.wpe.weight'] = wpe[:block_size]
    return weights


def export_files(weights, config, tokenizer):
    """{name: content} of a folder that transformers' GPT2LMHeadModel.from_pretrained loads (see write_whole), from a state dict of
    GPT and its GPTConfig. The padding of the vocabulary is left out. GPT-2's tokenizer is put in, if it is the model's, so that
    lm-eval needs nothing else."""
    from safetensors.torch import save
    n_vocab, eot = tokenizer['vocab_size'], tokenizer['eot']
    weights = dict(weights, **{'transformer.wte.weight': weights['transformer.wte.weight'][:n_vocab]})
    weights = {name: (tensor.t() if name.endswith(CONV1D) else tensor).detach().cpu().contiguous() for name, tensor in weights.items()}
    files = {'model.safetensors': save(weights, metadata={'format': 'pt'}), 'config.json': dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function=config.activation, n_positions=config.block_size,
        vocab_size=n_vocab, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_inner=None, layer_norm_epsilon=1e-5,
        attn_pdrop=config.dropout, embd_pdrop=config.dropout, resid_pdrop=config.dropout, bos_token_id=eot, eos_token_id=eot,
        tie_word_embeddings=True, dtype='float32')}
    if tokenizer['tokenizer'] == 'gpt2':
        load_tokenizer('gpt2')
        for name, url in (('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe')):  # tiktoken keeps a file under its address's SHA-1
            address = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{url}'
            with open(os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], hashlib.sha1(address.encode()).hexdigest()), 'rb') as file:
                files[name] = file.read()
        files['tokenizer_config.json'] = dict(tokenizer_class='GPT2Tokenizer', model_max_length=config.block_size)
    return files


def make_optimizers(model, optimizer, lr, weight_decay, betas):
    """[torch.optim.AdamW] or, for optimizer='muon', [AdamW, Muon]: Muon has the matrices of the blocks. Weight decay is for matrices
    and embeddings, not for biases and norms.

    Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; its updates scaled to the size of AdamW's (arXiv 2502.16982)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for_muon = {p for p in model.transformer.h.parameters() if p.dim() >= 2} if optimizer == 'muon' else set()
    fused = dict(fused=parameters[0].device.type in ('cuda', 'cpu'))
    optimizers = [torch.optim.AdamW([dict(params=[p for p in parameters if p.dim() >= 2 and p not in for_muon], weight_decay=weight_decay),
                                     dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)], lr=lr, betas=betas, eps=1e-8, **fused)]
    for group in optimizers[0].param_groups:  # its state now: if the first step made it, between the activations, it would break up the memory
        for p in group['params']:
            step = torch.zeros((), device=p.device if fused.get('fused') else 'cpu')
            optimizers[0].state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    if for_muon:
        optimizers.append(torch.optim.Muon([p for p in parameters if p in for_muon], lr=lr, weight_decay=weight_decay, momentum=0.95,
                                           adjust_lr_fn='match_rms_adamw'))
    return optimizers


def optimizer_state(model, optimizers):
    """The state of several torch.optim optimizers by the names of the parameters, full tensors, whichever optimizer has which."""
    names = {p: name for name, p in model.named_parameters()}
    return dict(state={names[p]: {key: value for key, value in state.items()} for o in optimizers for p, state in o.state.items()},
                param_groups=[dict(group, params=[names[p] for p in group['params']], kind=type(o).__name__) for o in optimizers for group in o.param_groups])


def load_optimizer_state(model, optimizers, stored):
    """Load what optimizer_state returned; of its groups the lr alone, which a save before the next update shall repeat. ValueError
    if it was another kind of optimizer."""
    kinds = {name: group.get('kind') for group in stored['param_groups'] for name in group['params']}
    names, shapes = {p: name for name, p in model.named_parameters()}, {name: p.shape for name, p in model.named_parameters()}
    if unknown := stored['state'].keys() - names.values():
        raise ValueError(f'its optimizer knows {sorted(map(str, unknown))[:3]}, this model does not')
    for o in optimizers:
        order = [names[p] for group in o.param_groups for p in group['params']]  # a state_dict numbers them in this order
        if not stored['state'].keys() & set(order):
            continue  # it has made no update yet
        state, kind = {i: {key: value for key, value in stored['state'][name].items()} for i, name in enumerate(order)}, type(o).__name__
        adam = {'step', 'exp_avg', 'exp_avg_sq'}
        expected = dict(Muon={'momentum_buffer'}, AdamW=adam, AdamATan2=adam).get(kind)  # of another one whatever it stored, in its own shapes
        if any(kinds.get(name) not in (None, kind) for name in order) or expected and any(now.keys() != expected for now in state.values()):
            raise ValueError(f'the state of its optimizer is not that of {kind}')
        for name, now in zip(order, state.values(), strict=True):  # load_state_dict does not look at shapes
            if expected and any(torch.is_tensor(value) and value.dim() and value.shape != shapes[name] for value in now.values()):
                raise ValueError('the state of its optimizer has other shapes than the weights')
        o.load_state_dict(dict(o.state_dict(), state=state))
    for group, there in zip([group for o in optimizers for group in o.param_groups], stored['param_groups'], strict=False):
        group['lr'] = float(there['lr'])


def sum_each(world_size, bucket):
    """A communication hook for DistributedDataParallel: the mean over the ranks, each gradient summed by itself. DDP lays out its buckets anew after the first
    backward pass of a process, and from three ranks on the order in which gloo and NCCL add depends on a number's place in what they are given: summed in
    whole buckets, the first step after a resume would round in another way than without the stop."""
    buffer, sums = bucket.buffer(), [dist.all_reduce(gradient, async_op=True) for gradient in bucket.gradients()]

    def mean(last):
        last.value()  # raises what went wrong
        for one in sums[:-1]:  # gloo may end the last one before the others
            one.wait()
        return buffer.div_(world_size)
    return sums[-1].get_future().then(mean)


def sum_alike(net, world_size):
    """sum_each for a DistributedDataParallel, where it matters: two numbers have one sum, in whatever order. On a CPU it is 12% of a small step."""
    if world_size > 2:
        net.register_comm_hook(world_size, sum_each)


def total_norm(gradients):
    """The norm of all numbers in these tensors, as torch.nn.utils.get_total_norm, which takes no mixture of split and other ones."""
    if not any(hasattr(g, 'full_tensor') for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([n.full_tensor() if hasattr(n, 'full_tensor') else n for n in norms]))


def norms_by_part(gradients):
    """' | grad wte 1.00e-02 h.0.ln_1 ...', for a log line: the norm of every part of the model, from {name of a parameter: its gradient}."""
    parts = {}
    for name, gradient in gradients.items():
        part = re.match(r'(?:\w+\.)*?\d+\.\w+|\w+', name.removeprefix('transformer.'))[0]  # a block's part, or what stands outside of the blocks
        parts.setdefault(part, []).append(gradient)
    return ' | grad ' + ' '.join(f'{part} {total_norm(some).item():.2e}' for part, some in parts.items())


def git_commit():
    """Of the scripts, 'unknown' if they are not under git."""
    command = ['git', '-C', os.path.dirname(os.path.abspath(__file__)), 'describe', '--always', '--dirty']
    return (subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which('git') else '') or 'unknown'


def printable(text):
    """The text without control codes, for a terminal."""
    return re.sub(r'[^\n\t -~\xa0-\U0010ffff]', '\ufffd', text)


def converse(answer):
    """Print answer(line, number of the turn) to every line that is typed, until an empty one, end of file or Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdin.reconfigure(errors='replace')
    print0('an instruction and Enter; an empty line ends')
    try:
        for turn in range(10 ** 9):
            line = input('> ').strip()
            if not line:
                break
            print0(answer(line, turn))
    except (EOFError, KeyboardInterrupt):
        print0('')


def tokenizer_of(checkpoint, file):
    """The entry of TOKENIZERS that a checkpoint was trained with. Weights from elsewhere do not name theirs, their number of ids does."""
    if 'step' in checkpoint or 'tokenizer' in checkpoint:
        found = checkpoint.get('tokenizer')
    else:
        ids = checkpoint['config']['vocab_size']
        found = next((known for known in TOKENIZERS.values() if known['vocab_size'] <= ids <= known['vocab_size'] + 63), TOKENIZERS['gpt2'])
    if found not in TOKENIZERS.values():
        fail(f'{file} names an unknown tokenizer')
    return found


def encoding_for_all(name, needed):
    """load_tokenizer on every rank; where one has none, None on all ranks, with a message, or the end if it is needed."""
    encoding, problem = None, ''
    try:
        encoding = load_tokenizer(name)
    except OSError as error:
        problem = str(error)
    missing = next(filter(None, everyone(problem)), '')
    fail_if(missing and needed, missing)
    if missing:
        print0(f'no samples: {missing}')
    return None if missing else encoding


def map_npy(path):
    """The array of a .npy file, mapped, not read. ValueError says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a damaged header
            return np.lib.format.open_memmap(path, mode='r')  # np.load would take other formats too
    except OSError:
        raise
    except Exception as error:  # cut off, of objects; a hostile header can provoke any of them
        raise ValueError(f'cannot be read: {" ".join(str(error).split())[:200]}') from error


def open_shard(path):
    """The tokens (n,) uint16 of one file, mapped, not read: llm.c's .bin (256 int32: 20240520, 1, n; then n uint16) or a
    .npy array. ValueError says what is wrong with it."""
    if path.endswith('.npy'):
        tokens = map_npy(path)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f'holds {tokens.dtype} of shape {tokens.shape}, expected one row of uint16')
        return tokens
    header, size = np.fromfile(path, '<i4', 256), os.path.getsize(path)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError('does not start with the 1024-byte header 20240520, 1, number of tokens')
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f'is {size} bytes long, but its header says {header[2]} tokens = {1024 + 2 * int(header[2])} bytes')
    return np.memmap(path, '<u2', 'r', offset=1024) if header[2] else np.zeros(0, np.uint16)


def open_shards(folder, T, val_only=False):
    """(training shards {name: tokens}, validation shards {name: tokens}, tokenizer) of a folder that prepare/ wrote.

    Validation shards have `val` in their name, else it is the first. All ids are checked: an id beyond the vocabulary would
    otherwise end a run hours later. T: tokens per row; what is left of a shard is not used. val_only: the training shards, which may
    be large, are not opened. ValueError names file and place."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} is no folder')
    if os.path.isdir(os.path.join(folder, 'pieces')):
        raise ValueError(f'{folder} is half made: run the prepare script again, it continues')
    names = sorted(name for name in os.listdir(folder) if name.endswith(('.bin', '.npy')))
    val_names = [name for name in names if 'val' in name] or names[:1]
    if not names or len(names) == len(val_names) and not val_only:
        raise ValueError(f'{folder} needs a validation and a training shard (.bin or .npy), it holds {names}')
    name, tokenizer, shards = 'manifest.json', TOKENIZERS['gpt2'], {}
    try:
        if os.path.exists(os.path.join(folder, name)):
            with open(os.path.join(folder, name), encoding='utf-8') as file:
                manifest = json.load(file)
            tokenizer = {key: manifest.get(key) for key in tokenizer}
            if tokenizer not in TOKENIZERS.values():
                raise ValueError(f'{tokenizer} is none of the known tokenizers')
        for name in val_names if val_only else names:
            shards[name] = tokens = open_shard(os.path.join(folder, name))
            if not len(tokens):
                raise ValueError('holds no tokens')
            for i in range(0, len(tokens), 2 ** 24):
                outside = np.flatnonzero(tokens[i:i + 2 ** 24] >= tokenizer['vocab_size'])
                if len(outside):
                    raise ValueError(f'token {i + outside[0]} is {tokens[i + outside[0]]}, outside the vocabulary of {tokenizer["vocab_size"]}')
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{os.path.join(folder, name)}: {error}') from error
    train, val = {n: s for n, s in shards.items() if n not in val_names}, {n: shards[n] for n in val_names}
    for part in [val] if val_only else [train, val]:
        if all(len(tokens) <= T for tokens in part.values()):
            raise ValueError(f'{folder}: {", ".join(part)} hold no row of {T} + 1 tokens')
    return train, val, tokenizer


def shard_rows(shards, T, rows):
    """Rows (n, T + 1) int64 by number: row r of a shard is its tokens[r*T : r*T + T + 1], the rows of all shards are one list."""
    tokens = list(shards.values())
    first = np.cumsum([0] + [(len(t) - 1) // T for t in tokens])
    picked = [tokens[s][(r - first[s]) * T:(r - first[s] + 1) * T + 1] for r, s in zip(rows, np.searchsorted(first, rows, 'right') - 1, strict=True)]
    return torch.from_numpy(np.stack(picked).astype(np.int64))


def forgetting_shards(config, checkpoint, tokenizer):
    """{name: tokens} of the validation shards in the folder that the setting forgetting_root names; 'auto': that which the checkpoint was trained on. {} where
    there is none. ValueError if it was typed and cannot be used."""
    if config['forgetting_root'] == 'auto':  # it must not outlive the moment in which it is known
        root = checkpoint.get('data_root', '') if checkpoint else ''
        config.assign('forgetting_root', root if os.path.isdir(root) else '')
        config.given.add('forgetting_root')
    if not config['forgetting_root']:
        return {}
    try:
        _, shards, theirs = open_shards(config['forgetting_root'], config['block_size'], val_only=True)
    except ValueError as error:
        if 'forgetting_root' in config.typed_here:
            raise ValueError(f'--forgetting_root: {error} (without a folder, --forgetting_root=, it is not measured)') from error
        print0(f'WARNING: forgetting is not measured: {error}')
        return {}
    if theirs != tokenizer:
        raise ValueError(f'--forgetting_root={config["forgetting_root"]} holds {theirs["tokenizer"]} tokens, the rows {tokenizer["tokenizer"]}')
    return shards


# Instructions and answers: rows of their own, each a prompt and a response. They are not packed into full rows of block_size tokens:
# an answer would stand at positions, and behind other rows' texts, where it never stands when the model is asked.

def instruction_prompt(instruction, context=''):
    """The text that asks for a response: that of databrickslabs/dolly, without its special tokens."""
    context = f'Input:\n{context}\n\n' if context else ''
    return ('Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
            f'### Instruction:\n{instruction}\n\n{context}### Response:\n')


def padded_length(length):
    """Length of the rows of a batch whose longest one has `length` tokens: a multiple of 16, so that there are few different shapes."""
    return -(-length // 16) * 16


def bucketed(lengths, batch_size, seed, epoch):
    """The micro-batches of an epoch: arrays of at most batch_size row numbers, each row once. The rows are shuffled and sorted by
    length inside windows of 50 batches, so that those of a batch are of like length; then the batches are shuffled."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    windows = [order[i:i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
    order = np.concatenate([window[np.argsort(lengths[window], kind='stable')] for window in windows])
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def open_rows(folder, block_size):
    """(training rows, validation rows, tokenizer, names of the categories) of a folder that prepare/dolly.py wrote.

    Rows: a dict of arrays, `tokens` (n,) uint16 of all rows one after another; for each row `start`, its first token's place in
    them, `prompt` and `response`, its numbers of tokens, `category`; `files`: {name: [rows, CRC of it all]}; `left_out`: how many rows of more
    than block_size + 1 tokens there are beside these. Everything is checked; ValueError names file and place."""
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} is no folder')
    name, splits = 'manifest.json', {'train': [], 'val': []}
    if not os.path.exists(os.path.join(folder, name)):
        raise ValueError(f'{folder} has no {name}, so it is half made: run the prepare script again')
    try:
        manifest = read_whole(os.path.join(folder, name))
        tokenizer = {key: manifest.get(key) for key in TOKENIZERS['gpt2']}
        categories = manifest.get('categories')
        if tokenizer not in TOKENIZERS.values() or not isinstance(categories, list) or not all(isinstance(c, str) for c in categories):
            raise ValueError(f'{tokenizer} is none of the known tokenizers, or categories {categories!r} are no names')
        names = sorted(name for name in os.listdir(folder) if name.endswith('.npz'))
        if 'files' in manifest and names != sorted(file['name'] for file in manifest['files']):
            raise ValueError(f'it lists {[file["name"] for file in manifest["files"]]}, the folder holds {names}')
        for name in names:
            with np.load(os.path.join(folder, name), allow_pickle=False) as archive:  # it checks the CRC of what it reads
                tokens, prompt, response, category = (archive[key] for key in ('tokens', 'prompt', 'response', 'category'))
            if tokens.dtype != np.uint16 or not all(a.ndim == 1 and np.issubdtype(a.dtype, np.integer) for a in (tokens, prompt, response, category)):
                raise ValueError(f'expected rows of whole numbers and uint16 tokens, it holds {tokens.dtype} {tokens.shape}, {prompt.dtype} {prompt.shape}')
            prompt, response, category = (a.astype(np.int64) for a in (prompt, response, category))
            if not len(prompt) == len(response) == len(category) > 0:
                raise ValueError(f'{len(prompt)} prompts, {len(response)} responses, {len(category)} categories')
            for what, wrong in (('an empty prompt or response', (prompt < 1) | (response < 1)), ('an absurd length', (prompt > 2 ** 31) | (response > 2 ** 31)),
                                ('an unknown category', (category < 0) | (category >= len(categories)))):
                if wrong.any():
                    raise ValueError(f'row {np.flatnonzero(wrong)[0]} has {what}')
            ends = np.cumsum(prompt + response)
            if ends[-1] != len(tokens):
                raise ValueError(f'its rows need {ends[-1]} tokens, it holds {len(tokens)}')
            outside = np.flatnonzero(tokens >= tokenizer['vocab_size'])
            if len(outside):
                raise ValueError(f'token {outside[0]} is {tokens[outside[0]]}, outside the vocabulary of {tokenizer["vocab_size"]}')
            unended = np.flatnonzero(tokens[ends - 1] != tokenizer['eot'])
            if len(unended):
                raise ValueError(f'row {unended[0]} does not end in end-of-text')
            crc = zlib.crc32(b''.join(a.tobytes() for a in (tokens, prompt, response, category)))
            splits['val' if 'val' in name else 'train'].append((name, tokens, prompt, response, category, crc))
    except Exception as error:  # a hostile file can provoke any of them
        raise ValueError(f'{os.path.join(folder, name)}: {" ".join(str(error).split())[:300] or type(error).__name__}') from error
    found = []
    for split, parts in splits.items():
        if not parts:
            raise ValueError(f'{folder} holds no {split} rows')
        tokens, prompt, response, category = (np.concatenate([part[i] for part in parts]) for i in range(1, 5))
        fits = prompt + response <= block_size + 1
        if not fits.any():
            raise ValueError(f'{folder}: no {split} row has at most block_size + 1 = {block_size + 1} tokens: take a model of a larger block_size '
                             f'(--pretrained_checkpoint), or rows of prepare/dolly.py --max_length={block_size + 1}')
        start = np.cumsum(prompt + response) - prompt - response
        found.append(dict(tokens=tokens, start=start[fits], prompt=prompt[fits], response=response[fits], category=category[fits],
                          files={part[0]: [len(part[2]), part[5]] for part in parts}, left_out=int((~fits).sum())))
    return *found, tokenizer, categories


def padded_rows(rows, chosen, block_size, eot, prompt_loss_weight=0.0):
    """(inputs (b, T), targets (n,), places (n,), factors (n,)) of these rows as GPT.forward takes them: padded on the right, the loss on
    responses and their end-of-text, and with this weight on prompts. No rows at all give one of padding, with one target of -1."""
    longest = max([1, *(rows['prompt'][r] + rows['response'][r] - 1 for r in chosen)])
    T = min(block_size, padded_length(longest))
    x, y, factors = np.full((max(1, len(chosen)), T), eot), np.full((max(1, len(chosen)), T), -1), np.ones((max(1, len(chosen)), T), np.float32)
    for i, r in enumerate(chosen):
        prompt, n = rows['prompt'][r], rows['prompt'][r] + rows['response'][r]
        ids = rows['tokens'][rows['start'][r]:rows['start'][r] + n]
        first = 1 if prompt_loss_weight else prompt  # of the tokens that are to be predicted; the one before it sees it coming
        x[i, :n - 1], y[i, first - 1:n - 1], factors[i, :prompt - 1] = ids[:-1], ids[first:], prompt_loss_weight
    places = np.flatnonzero(y >= 0) if len(chosen) else np.zeros(1, int)
    return tuple(torch.from_numpy(a) for a in (x, y.reshape(-1)[places], places, factors.reshape(-1)[places]))


def rouge_l(candidate, reference):
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, 0 to 1; words as the rouge_score package takes them."""
    a, b = (re.findall('[a-z0-9]+', text.lower()) for text in (candidate, reference))
    longest = [0] * (len(b) + 1)  # of all of a so far and the first j words of b
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, longest[j] = longest[j], before + 1 if word == other else max(longest[j], longest[j - 1])
    return 2 * longest[-1] / (len(a) + len(b)) if longest[-1] else 0.0


def distinct_2(texts):
    """Share of the pairs of neighbouring words, over all texts, that are different ones (Li et al. 2016, arXiv 1510.03055)."""
    pairs = [pair for words in map(str.split, texts) for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def judged_answers(rows, categories, n, encoding, answers):
    """{measure: number} of the answers to the first n held-out rows of open_rows, in a fixed shuffled order.
    answers(prompts, temperature) -> [(ids, did it end by itself)]."""
    order = np.random.default_rng(0).permutation(len(rows['prompt']))
    names = np.array(categories)[rows['category'][order]]

    def prompts(chosen):
        return [rows['tokens'][rows['start'][r]:rows['start'][r] + rows['prompt'][r]].tolist() for r in chosen]

    greedy, sampled = (answers(prompts(order[:n]), temperature) for temperature in (0.0, 1.0))
    found = {f'end rate, {how}': sum(ended for _, ended in some) / len(some) for how, some in (('greedy', greedy), ('sampled', sampled))}
    found['distinct-2, greedy'] = distinct_2([encoding.decode(ids) for ids, _ in greedy])
    for name in ('closed_qa', 'information_extraction'):  # whose answers stand in their contexts
        asked, scores = order[names == name][:n], []
        for r, (ids, _) in zip(asked, answers(prompts(asked), 0.0), strict=True):
            reference = rows['tokens'][rows['start'][r] + rows['prompt'][r]:][:rows['response'][r] - 1]
            scores.append(rouge_l(encoding.decode(ids), encoding.decode(reference.tolist())))
        if scores:
            found[f'ROUGE-L, {name}'] = sum(scores) / len(scores)
    return found


def before_after(before, after):
    """Lines of a table of two columns, {name: number} each; one column if there is nothing before."""
    if before:
        yield f'{"":34}before    after'
    for name, value in after.items():
        yield f'{name:31}' + (f'{before[name]:9.4f}' if name in before else ' ' * 9) + f'{value:9.4f}'


def both_answers(before, after, step):
    """Two answers for a person; at step 0 the second one alone, which is that of before."""
    return '\n'.join(f'    {name:6} | {line}' for name, answer in ((('before', before), ('after', after)) if step else (('before', after),))
                     for line in answer.splitlines() or [''])


def check_table(before, answers):
    """ValueError if what a checkpoint stored of before the training is none: {measure: number}, {number of the prompt: answer}."""
    if not all(type(name) is str and type(x) is float for name, x in before.items()) or not all(
            type(i) is int and type(text) is str for i, text in answers.items()):
        raise ValueError('its table is none')


def overfitting(progress):
    """At an evaluation: a warning if the validation loss is above its best while the train loss fell; a new sum of the train loss begins."""
    if not progress['since_count']:
        return
    val, best, before, now = (progress[name] for name in ('val_loss', 'best_val_loss', 'train_loss_before', 'since_sum'))
    now /= progress['since_count']
    if val > best and now < before:
        yield (f'Warning: Overfitting detected: val loss {val:.4f} is above its best, {best:.4f} at step {progress["best_step"]}, '
               f'while the train loss fell from {before:.4f} to {now:.4f}')
    progress.update(train_loss_before=now, since_sum=0.0, since_count=0)


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
            if torch.is_tensor(value) and value.is_complex():  # copied to real ones with a warning
                raise ValueError('a tensor in it holds complex numbers')
        return content
    except FileNotFoundError:
        raise
    except Exception as error:  # a hostile file can provoke any of them
        raise ValueError(f'{type(error).__name__}: {" ".join(str(error).split())[:200]}') from error


def remove(path):
    """Delete a file or a folder, whole or not at all: a half-deleted folder must not bear the name of a whole one."""
    if os.path.isdir(path) and not os.path.islink(path):
        if not path.endswith(('.tmp', '.old', '.was', '.gone')):  # these are no whole ones by their names
            remove(path + '.gone')  # of a deletion that was killed
            os.replace(path, path + '.gone')
            path += '.gone'
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def whole_checkpoint(path, read, name):
    """(checkpoint, '') or (None, what is wrong with the file or folder at `path`, for a message that begins with the path).

    read: checkpoint_of of the script, see there. Weights alone come back as {'model': weights}. name: one like those of checkpoints, to
    be looked for where the path is a folder of them."""
    try:
        found = read(path if os.path.exists(path) or not os.path.isdir(path + '.was') else path + '.was')  # see write_whole
        if not isinstance(found, dict) or not isinstance(found.get('model', found), dict):
            raise ValueError('it holds no weights')
        found = found if 'model' in found else {'model': found}
        if 'step' in found and not (type(found['step']) is type(found['log_bytes']) is int and found['step'] >= 0 and type(found['ranks']) is list
                                    and type(found['config']) is type(found['given']) is dict):
            raise ValueError('its entries are not those of a checkpoint')
        wrong = [name for name, n in found.items() if str(name).endswith('_count') and not (type(n) is int and n >= 0)]
        if 'step' in found and wrong:
            raise ValueError(f'its {wrong[0]} is no count')
        return found, ''
    except FileNotFoundError:
        return None, 'does not exist' + nearby(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        return None, f'cannot be read as a checkpoint ({error})' + (nearby(os.path.join(path, name)) if os.path.isdir(path) else '')


def set_aside(paths):
    """Give them the name .old; what had it before goes."""
    for path in paths:
        remove(path + '.old')
        os.replace(path, path + '.old')


def steps_on_disk(path_of, suffix=''):
    """Steps of the checkpoints in a run's folder, ascending. Only names that path_of(step) of the script itself writes are ours."""
    folder = os.path.dirname(path_of(0))
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    steps = {int(digits) for name in names for digits in re.findall('[0-9]{1,18}', name)}
    return sorted(s for s in steps if os.path.basename(path_of(s)) + suffix in names)


def run_checkpoints(path_of):
    """Paths of the checkpoints in a run's folder, newest first; the best one last, whatever its step, for where no other reads."""
    best = path_of('best')
    there = os.path.exists(best) or os.path.exists(best + '.was')  # see write_whole
    return [path_of(s) for s in reversed(steps_on_disk(path_of))] + [best] * there


def first_readable(paths, read, path_of, strict=False, weights_too=False):
    """(checkpoint, its path, set of the paths before it that are damaged) of the first of the paths that reads whole; (None, '', ...) if none does. A
    damaged one is named in a warning and left as it is; strict: it ends the script. weights_too: files of weights alone count. None: nothing is looked for."""
    damaged = set()
    for path in paths or ():
        checkpoint, problem = whole_checkpoint(path, read, os.path.basename(path_of(0)))
        if checkpoint and ('step' in checkpoint or weights_too):
            return checkpoint, path, damaged
        problem = problem or 'holds weights only'
        if strict:
            fail(f'{path} {problem}')
        damaged.add(path)
        print0(f'WARNING: {path} {problem}; it is left as it is')
    if paths is not None and not damaged and not weights_too:
        folder = os.path.dirname(path_of(0))
        begun = os.path.exists(os.path.join(folder, 'config.py'))
        print0(f'no checkpoint in {folder} yet: a new run begins' + f' ({folder}/config.py repeats the settings of the one that was begun there)' * begun)
    return None, '', damaged


def rotate(path_of, read, keep, permanent, damaged):
    """Delete the checkpoints that are no longer wanted, once what replaces them is on the disk: the `keep` newest stay (0 = all; 1 only if the newest
    reads whole, else 2), and those in `permanent`. Damaged files neither count nor go."""
    for suffix in ('.tmp', '.gone'):  # of a save that was killed, of a folder's deletion that was
        for s in [*steps_on_disk(path_of, suffix), 'best']:
            remove(path_of(s) + suffix)
    steps = [s for s in steps_on_disk(path_of) if path_of(s) not in damaged]
    stay = 1 if keep == 1 and steps and whole_checkpoint(path_of(steps[-1]), read, '')[0] else max(keep, 2)
    for s in steps[:-stay] if keep else []:
        if s not in permanent:
            remove(path_of(s))


def locked(path):
    """A descriptor that appends to the log of a run. As long as this process lives, no other gets one; ValueError if another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError('another process is training in it') from None
    except OSError as error:  # a file system without locks
        print0(f'WARNING: {path} cannot be locked ({error}): nothing keeps a second process out of this folder')
    return descriptor


def open_log(path, path_of, read, checkpoint, checkpoint_file, explicit):
    """Make or enter the folder of a run; returns a descriptor that appends to its log. ValueError if the folder holds another run, or one that is at work.

    checkpoint: what is resumed, None for a new run. If it lies in this folder, its log is cut back to where that step began (what follows will be written
    again), and, if it was named explicitly, later checkpoints, which belong to another future, get the name .old."""
    folder, start_step = os.path.dirname(path), checkpoint['step'] if checkpoint else 0
    os.makedirs(folder, exist_ok=True)
    in_place = checkpoint is not None and os.path.samefile(os.path.dirname(os.path.normpath(checkpoint_file)) or '.', folder)
    if checkpoint and not in_place and run_checkpoints(path_of):
        raise ValueError(f'{folder} already holds another run: choose an empty folder')
    descriptor = locked(path)
    if in_place and explicit:
        later = [path_of(s) for s in steps_on_disk(path_of) if s > start_step]
        best = whole_checkpoint(path_of('best'), read, '')[0]
        later += [path_of('best')] if best and best.get('step', 0) > start_step else []
        later += sorted(path for path, step in prm_checkpoints(os.path.join(glob.escape(folder), '*'), r'epoch_\d+|final').items() if step > start_step)
        set_aside(later)
        if later:
            print0(f'set aside as *.old, later than step {start_step}:', ', '.join(later))
    if not in_place and os.path.getsize(path):
        set_aside([path])
        descriptor = locked(path)
        print0(f'set aside as {os.path.basename(path)}.old, of a run without a checkpoint: {path}')
    if in_place and os.fstat(descriptor).st_size > checkpoint['log_bytes']:
        os.ftruncate(descriptor, checkpoint['log_bytes'])
    return descriptor


def append(path, descriptor, text, stop):
    """Add the text to the end of the log, nothing if it is not open (-1). A full disk is left in `stop` for poll(), where all ranks meet."""
    data = text.encode(errors='backslashreplace')  # as on the terminal
    try:
        while data and descriptor >= 0:
            data = data[os.write(descriptor, data):]
    except OSError as error:
        stop.number, stop.trouble = 1000, cannot_write(path, error)


def watch_signals():
    """SIGTERM and Ctrl-C no longer end the process: they leave their number in .number of what is returned (0: none came yet)."""
    stop = SimpleNamespace(number=0, trouble='')

    def on_signal(number, frame):
        stop.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once; SIGTERM may come from several sides

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def same_data(there, here, names, data):
    """ValueError if the loader_state of a checkpoint differs from the present one in one of these names."""
    if not isinstance(there, dict):
        raise ValueError('its data position is no dict')
    for name in names:
        if there[name] != here[name]:
            raise ValueError(f'the data in {data} changed since, its {name} was {str(there[name])[:200]}: '
                             'resume with that data, or begin a new run in another folder')


NO_WANDB = SimpleNamespace(log=lambda values, step: None, finish=lambda: None)


def start_wandb(project, name, config, folder, progress):
    """The run of Weights & Biases; progress['wandb_id'] is its id, the same after a resume."""
    try:
        import wandb
    except ImportError:
        fail('--wandb_log needs the package wandb: pip install wandb')
    run = wandb.init(project=project, name=name or None, config=dict(config), dir=folder, id=progress['wandb_id'] or None, resume='allow')
    progress['wandb_id'] = run.id
    return run


def newest(paths):
    """The one of the paths that was changed last, '' if there is none: a running training may delete some meanwhile."""
    changed = {}
    for path in paths:
        try:
            changed[path] = os.path.getmtime(path)
        except FileNotFoundError:
            pass
    return max(changed, key=changed.get, default='')


def ahead(batch, turns, count):
    """Yields batch(step, micro_step) for each of these turns, while a thread prepares the next `count` ones."""
    prepared, thread = deque(), ThreadPoolExecutor(1)
    for turn in turns:
        prepared.append(thread.submit(batch, *turn))
        if len(prepared) > count:
            yield prepared.popleft().result()
    while prepared:
        yield prepared.popleft().result()


@lru_cache(maxsize=1)
def cpu_group():
    """The group for what the ranks tell each other beside gradients; every rank calls it for the first time at the same point."""
    return dist.new_group(backend='gloo')


def everyone(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=cpu_group())
    return values


def differ(value):
    """Is it another one on some rank? value: dicts, lists, tensors, and what else differs in words."""
    return dist.is_initialized() and len(set(everyone(crc_of(value)))) > 1


def crc_of(value, crc=0):
    """CRC of nested dicts and lists, tensors by their bits."""
    if isinstance(value, dict):
        value = [element for pair in value.items() for element in pair]
    if isinstance(value, (list, tuple)):
        for element in value:
            crc = crc_of(element, crc)
        return zlib.crc32(b'%d' % len(value), crc)
    if torch.is_tensor(value):
        return zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return zlib.crc32(str(value).encode(errors='backslashreplace'), crc)


def shared_out(batches, rank, world_size, poll, work):
    """[result of item 0, of item 1, ...], on every rank. batches: lists of the items' numbers, each of which is work(turn, batch) -> [result, ...] of one rank;
    all take as many turns, with poll() before each."""
    found = {}
    for turn in range(rank, len(batches) + rank, world_size):
        poll()
        if turn < len(batches):
            found.update(zip(batches[turn], work(turn, batches[turn]), strict=True))
    poll()
    found = {i: result for part in everyone(found) for i, result in part.items()}
    return [found[i] for i in range(len(found))]


def on_all_ranks(work, *arguments, hint=''):
    """work(*arguments) on every rank. If the data are wrong on any, all end with its words and the hint: none may be left waiting for one that is gone."""
    found, problem = None, ''
    try:
        found = work(*arguments)
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        problem = f'{error or type(error).__name__}{hint}'
    agree(problem)
    return found


def agree(problem, code=2):
    """End all ranks if any has a problem (a sentence; '' = none): none may be left waiting for one that is gone."""
    first = next(filter(None, everyone(problem)), '')
    if first:
        fail(first, code)


def on_cpu(value):
    """Nested dicts and lists with every tensor on the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(element) for name, element in value.items()}
    return [on_cpu(element) for element in value] if isinstance(value, list) else value.cpu() if torch.is_tensor(value) else value


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

    Everything goes to path.tmp, is forced to the disk and then renamed. Content: bytes, JSON if the name ends so (null for NaN and infinity, which it has
    not), else torch.save; a callable is called last with the folder for content that is made of the files before it. OSError or RuntimeError (which
    torch.save raises) if the disk is full; path.tmp is gone then."""
    temporary, is_folder = path + '.tmp', '' not in files
    remove(temporary)
    try:
        if is_folder:
            os.mkdir(temporary)
        for name, content in files.items():
            content = content(temporary) if callable(content) else content
            with open(os.path.join(temporary, name) if name else temporary, 'wb') as file:
                if (name or path).endswith('.json') and not isinstance(content, bytes):
                    content = json.dumps(without_nan(content), indent=1).encode()
                file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            sync(os.path.join(temporary, name) if name else temporary)
        if is_folder:
            sync(temporary)
        if is_folder and os.path.lexists(path):
            remove(path + '.was')
            os.replace(path, path + '.was')  # a folder cannot be replaced in one step: for a moment only .was is there
        os.replace(temporary, path)
    finally:
        remove(temporary)
    sync(os.path.dirname(path) or '.')
    if is_folder:
        remove(path + '.was')


def cannot_write(path, error):
    folder = os.path.dirname(path) or '.'
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
    return f'cannot write {path}: {error} ({free:,} bytes free); earlier checkpoints are intact'


def write_together(path, files):
    """write_whole on rank 0, its folder is made; every rank calls it, and a disk's problem ends them all."""
    problem = ''
    if master:
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            write_whole(path, files)
        except OSError as error:
            problem = cannot_write(path, error)
    agree(problem, 1)




def answered(model, prompts, max_new_tokens, temperature, top_k, top_p, n_vocab, eot, generator):
    """[(ids before end-of-text, did it come?)] for prompts given as lists of ids, all in one batch (see GPT.generate)."""
    lengths, device = torch.tensor([len(prompt) for prompt in prompts]), model.transformer.wte.weight.device
    idx = torch.tensor([prompt + [eot] * (int(lengths.max()) - len(prompt)) for prompt in prompts], device=device)
    rows = model.generate(idx, max_new_tokens, temperature, top_k, top_p, n_vocab, eot, generator, lengths).tolist()
    rows = [row[len(prompt):len(prompt) + max_new_tokens] for prompt, row in zip(prompts, rows, strict=True)]
    return [(row[:row.index(eot)], True) if eot in row else (row, False) for row in rows]


def find_device(device, local_rank=-1):
    """The name of the device that this process computes on: cpu, mps or cuda:0 and so on. '' = the best there is; one of a kind that is not there
    becomes the CPU, with a warning; under torchrun each rank takes the GPU of its local_rank."""
    usable = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available() and local_rank < 0, 'cpu': True}  # gloo knows no mps
    device = device or next(name for name in usable if usable[name])
    kind = device.split(':')[0]
    if kind not in usable:
        fail(f'--device={device}: expected cpu, cuda, cuda:1 or mps')
    if not usable[kind]:
        print0(f'WARNING: --device={device}, but PyTorch sees none here: using the CPU')
        return 'cpu'
    if kind == 'cuda':
        device = f'cuda:{local_rank}' if local_rank >= 0 else 'cuda:0' if device == 'cuda' else device
        last = f'cuda:{int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)) - 1}' if local_rank >= 0 else device  # if it lacks one, the first rank says so
        if last not in [f'cuda:{i}' for i in range(torch.cuda.device_count())]:
            fail(f'no device {last}: this machine has {torch.cuda.device_count()} GPU(s)')
        torch.cuda.set_device(device)
    return device
