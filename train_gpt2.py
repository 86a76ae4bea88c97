"""GPT-2 pretraining: from a 0.8M-parameter model on a laptop to GPT-2 124M on many nodes.

Laptop CPU, no download (text of your own Python; a validation loss of 1.35 nats per byte):
    python prepare/pydocs.py
    python train_gpt2.py --model=tiny --data_root=data/pydocs
One GPU (GPT-2 124M, FineWeb-Edu from prepare/fineweb.py):
    python train_gpt2.py --dtype=bfloat16 --compile
Eight GPUs, one epoch of the 10B-token sample:
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --dtype=bfloat16 --compile \
        --batch_size=64 --max_steps=19073 --warmup_steps=715
Interrupted, by whatever and at whatever moment:
    python train_gpt2.py --auto_resume
"""
import math
import os
import random
import re
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import lru_cache

# find_unused_parameters, in the training loop, makes DDP warn on every rank
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from configurator import configure, fail, print0
from model import GPT, GPT_SIZES, GPTConfig, load_tokenizer, read_checkpoint, split_like, whole
from prepare.fineweb import open_shards, read_rows

# ---- settings ----------------------------
# The comments are read too: 'a | b' lists the choices, '0 = off' allows 0 (see configurator.py).
# i/o
log_dir = 'logs'  # folder of this run: checkpoints, log.txt, config.py
run_name = ''  # a name for wandb and the log; does not change the folder
save_config = True  # write config.py, the settings file that repeats this run
# data
data_root = 'data/fineweb_edu10B'  # folder of token shards, .bin or .npy (see prepare/)
num_workers = 2  # batches that a background thread prepares ahead; 0 = none
batch_size = 16  # rows of block_size tokens per micro-step and rank
total_batch_size = 524288  # tokens per optimizer step, over all ranks and micro-steps
grad_accumulation_steps = 0  # micro-batches per step over all ranks; 0 = from total_batch_size
dynamic_seq_length = False  # draw each step's sequence length; tokens per step stay the same
min_seq_length = 128  # shortest drawn length, tokens; the others are its doublings
max_seq_length = 1024  # longest drawn length, tokens
# model
init_from = 'scratch'  # or weights to begin from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path
model = 'gpt2'  # tiny | gpt2 | gpt2-medium | gpt2-large | gpt2-xl; presets below
block_size = 1024  # longest sequence, tokens
vocab_size = -1  # ids; -1 = the data's, rounded up to a multiple of 64
n_layer = 12  # blocks
n_head = 12  # attention heads, must divide n_embd
n_embd = 768  # width
activation = 'gelu_new'  # gelu_new | gelu; GPT-2's tanh approximation, or the exact one
dropout = 0.0  # probability; 0 = off, right for pretraining
# optimization
optimizer = 'adamw'  # adamw | muon; muon on the matrices of the blocks, AdamW on the rest
max_lr = 6e-4  # peak learning rate
min_lr = -1.0  # final learning rate, 0 = nothing; -1 = max_lr / 10
warmup_steps = 2000  # steps of linear warmup; 0 = none
max_steps = 40000  # optimizer steps in all; 0 = only the evaluation of the start
decay_lr = True  # False = constant after the warmup
lr_scheduler = 'cosine'  # cosine | cosine_with_restarts | constant
lr_restarts = 3  # restarts of cosine_with_restarts, 3 = four equal cycles; 0 = none
weight_decay = 0.1  # on matrices and embeddings, not on biases and norms; 0 = none
beta1 = 0.9  # AdamW; 0 = off
beta2 = 0.95  # AdamW; 0 = off
grad_clip = 1.0  # largest gradient norm; 0 = no clipping
# evaluation
eval_interval = 250  # steps between evaluations; -1 = only at the end
val_tokens = 10485760  # validation tokens, whatever the batch and the ranks; 0 = all
eval_only = False  # print the validation loss of a checkpoint, exit
generate_interval = 1000  # steps between samples; -1 = none
generate = ''  # continue this text with a checkpoint, exit
export = ''  # write a checkpoint into this new folder for transformers, exit
max_new_tokens = 256  # length of a sample, tokens
temperature = 0.8  # of the samples; 0 = always the likeliest token
top_k = 200  # sample among the k likeliest; 0 = all
# checkpoint
checkpoint_interval = 1000  # steps between checkpoints; -1 = none, but always at the end
keep_last_n_checkpoints = 5  # newest checkpoints to keep; 0 = all
permanent_checkpoints = []  # steps that are saved and kept whatever the two above say
auto_resume = False  # continue from the newest readable checkpoint in log_dir, if any
resume = False  # continue from checkpoint_path, or like auto_resume
checkpoint_path = ''  # the checkpoint to resume, judge, sample from or export; '' = newest
# logging
log_interval = 10  # steps between log lines
log_level = 'INFO'  # INFO | DEBUG; DEBUG adds loss and time of every micro-step
log_gradients = False  # add the gradient norm of every part of the model to the log lines
wandb_log = False  # log to Weights & Biases too
wandb_project = 'train_gpt2'  # its project
# system
device = ''  # cpu, cuda, cuda:1, mps; '' = cuda, then mps, then cpu
dtype = 'float32'  # float32 | bfloat16 | float16; by autocast, weights stay float32
compile = False  # torch.compile; DISABLE_COMPILE=1 in the environment switches it off
model_parallel = False  # experimental: FSDP2, the model split over model_parallel_size ranks
model_parallel_size = 2  # ranks that share a model; all ranks / this = copies of it
deterministic = False  # deterministic kernels on the GPU (the CPU's are)
seed = 1337  # of weights, data order, dropout and samples; 0 = a seed like any other

# ---- command line ------------------------
config = configure(globals(), aliases={
    'lr': 'max_lr', 'learning_rate': 'max_lr', 'max_grad_norm': 'grad_clip',
    'gradient_accumulation_steps': 'grad_accumulation_steps', 'output_dir': 'log_dir',
    'save_steps': 'checkpoint_interval', 'val_steps': 'eval_interval',
    'logging_steps': 'log_interval'})
# what --model sets beside the model's shape
PRESETS = {
    'tiny': dict(activation='gelu', total_batch_size=2048, val_tokens=131072, optimizer='muon',
                 max_lr=1.2e-2, min_lr=0.0, warmup_steps=50, max_steps=1080, eval_interval=360,
                 generate_interval=1080, checkpoint_interval=360, log_interval=50,
                 min_seq_length=16, max_seq_length=128),
    'gpt2-medium': dict(batch_size=8, max_lr=3e-4),
    'gpt2-large': dict(batch_size=4, max_lr=2.5e-4),
    'gpt2-xl': dict(batch_size=2, max_lr=2e-4),
}
# modes that read a model and start no run
one_shot = eval_only or 'generate' in config.typed or 'export' in config.typed

def checked(function, *arguments, **more):
    """The function's result. What a user can mend ends the script with one line."""
    try:
        return function(*arguments, **more)
    except (OSError, ValueError) as error:
        fail(error)

def checkpoint_name(step):
    return os.path.join(log_dir, f'model_{step:05d}.pt')

def checkpoint_steps():
    """Steps of the numbered checkpoints in log_dir, ascending."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    names = [name for name in names if re.fullmatch(r'model_(\d{5}|[1-9]\d{5,})\.pt', name)]
    return sorted(int(name[6:-3]) for name in names)

# Which checkpoint does this launch read? The one typed, else the newest in log_dir that is whole.
if checkpoint_path and not one_shot:
    # a run goes on where it was
    log_dir = config['log_dir'] = os.path.dirname(checkpoint_path) or '.'
best_name = os.path.join(log_dir, 'model_best.pt')
in_folder = [checkpoint_name(step) for step in reversed(checkpoint_steps())]
in_folder += [best_name] if os.path.exists(best_name) else []
checkpoint, checkpoint_file = {}, ''
if checkpoint_path and not os.path.exists(checkpoint_path):
    fail(f'{checkpoint_path} does not exist; the newest in {log_dir}: {in_folder[:3]}')
elif checkpoint_path:
    checkpoint, checkpoint_file = checked(read_checkpoint, checkpoint_path), checkpoint_path
elif resume or auto_resume or (one_shot and init_from == 'scratch'):
    for path in in_folder:
        try:
            checkpoint, checkpoint_file = read_checkpoint(path), path
            break
        except ValueError as error:
            print0(f'WARNING: {error}')
if checkpoint and 'model_config' not in checkpoint:
    fail(f'{checkpoint_file} holds weights alone: --init_from={checkpoint_file} begins with them')
if not checkpoint and in_folder and not one_shot:
    fail(f'{log_dir} holds checkpoints of a run: --auto_resume continues it, if one can be read')
if not checkpoint and init_from == 'scratch' and one_shot:
    fail(f'no checkpoint in {log_dir}: name one with --checkpoint_path')

# A new run: default < preset < typed. A resume: the stored run's < typed. Weights fix the shape.
if checkpoint:
    config.restore(checkpoint['config'], checkpoint_file)
else:
    config.fill(GPT_SIZES[model])
    config.fill(PRESETS.get(model, {}))
    if model == 'tiny' and optimizer == 'adamw':
        config.fill(dict(max_lr=4e-3, min_lr=-1.0, warmup_steps=100, max_steps=1250))
source = checkpoint_file or init_from
pretrained, fixed = None, {}
if source != 'scratch':
    pretrained = checked(GPT.from_pretrained, checkpoint or init_from, dropout=dropout)
    fixed = asdict(pretrained.config)
if checkpoint:
    fixed.update({name: checkpoint['config'][name] for name in ('model', 'optimizer', 'seed')})
for name in fixed.keys() - {'dropout'}:
    # a new run may have fewer positions and other padding of the vocabulary
    new_size = not checkpoint and name in ('block_size', 'vocab_size')
    if name in config.typed and config[name] != fixed[name] and not new_size:
        fail(f'--{name}={config[name]}: {source} has {fixed[name]}')
    if name != 'vocab_size':
        config.fill({name: fixed[name]})
if min_lr < 0:
    min_lr = max_lr / 10
if warmup_steps > max_steps:
    print0(f'WARNING: {warmup_steps} warmup_steps in {max_steps} steps: max_lr is never reached')

if any(type(step) is not int for step in permanent_checkpoints):
    fail(f'--permanent_checkpoints={permanent_checkpoints}: expected whole numbers')

# ---- devices and ranks (=) ---------------
# one process unless all five are set: a cluster may export some of them without torchrun
names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
ddp = all(os.environ.get(name) for name in (*names, 'MASTER_ADDR', 'MASTER_PORT'))
rank, local_rank, world_size = [int(os.environ[name]) for name in names] if ddp else (0, 0, 1)
master = rank == 0  # it prints, logs and saves
usable = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
device = device or next(name for name in usable if usable[name])
device_type = device.split(':')[0]
if not usable.get(device_type):
    print0(f'WARNING: --device={device} is not here: using the CPU')
    device = device_type = 'cpu'
if device_type == 'cuda':
    device = f'cuda:{local_rank}' if ddp or device == 'cuda' else device
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # TF32 for what stays float32
if ddp:
    # a restarted worker would meet the keys of the dead ones: a prefix of its own per restart
    restart = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    store = dist.PrefixStore(restart, next(dist.rendezvous('env://'))[0])
    # nccl for gradients, gloo for what is on the CPU
    backend = 'cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)

def gathered(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    values = [value] * world_size
    if ddp:
        dist.all_gather_object(values, value)
    return values

# precision
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
# small float16 gradients would round to zero: the scaler multiplies the loss
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')

# ---- data --------------------------------
T = max_seq_length if dynamic_seq_length else block_size
lengths = [T]
if dynamic_seq_length:
    lengths = [min_seq_length * 2 ** i for i in range(20) if min_seq_length * 2 ** i <= T]
    if T > block_size or T not in lengths:
        fail(f'max_seq_length {T} must be min_seq_length {min_seq_length} doubled some times, '
             f'and at most block_size {block_size}')
if 'total_batch_size' in config.typed:
    config.fill(dict(grad_accumulation_steps=0))  # a stored one; a typed one stays
if grad_accumulation_steps:
    total_batch_size = grad_accumulation_steps * batch_size * T
micro_total = batch_size * T * world_size  # tokens of one micro-step over all ranks
accumulation = total_batch_size // micro_total  # micro-steps per step
if total_batch_size % micro_total and not one_shot:
    nearest = max(1, round(total_batch_size / micro_total)) * micro_total
    fail(f'total_batch_size {total_batch_size} is no multiple of batch_size {batch_size} x {T} '
         f'tokens x {world_size} rank(s); the nearest that is: {nearest}')
rows_per_step = total_batch_size // T

train_shards, val_shards = {}, {}
tokenizer = pretrained.tokenizer if pretrained else None
if not one_shot or eval_only:
    # refuses data of another tokenizer than that of the weights
    train_shards, val_shards, tokenizer = checked(open_shards, data_root, T, tokenizer)
if not tokenizer:
    fail(f'{source}: its tokenizer is not known')
train_rows = sum((len(tokens) - 1) // T for tokens in train_shards.values())
val_rows = sum((len(tokens) - 1) // T for tokens in val_shards.values())
if val_tokens:
    val_rows = min(val_rows, max(1, val_tokens // T))
shift = 0  # rows; not 0 only after a resume with another total_batch_size

@lru_cache(maxsize=2)
def permutation(epoch):
    return np.random.default_rng([seed, epoch]).permutation(train_rows)

def loader_state(step):
    """Where the data of this step begins, and in which data."""
    epoch, row = divmod(step * rows_per_step + shift, train_rows)
    shards = {name: len(tokens) for name, tokens in train_shards.items()}
    return dict(seed=seed, epoch=epoch, row=row, row_length=T, shards=shards)

def get_batch(step, micro_step):
    """Inputs and targets, each (rows, length) int64, of this rank.

    The rows of all shards form one list, each epoch has its own permutation of it, and a step
    takes the next rows_per_step: nothing depends on batch_size or the ranks."""
    begin = step * rows_per_step + shift + (micro_step * world_size + rank) * batch_size
    rows = [permutation(i // train_rows)[i % train_rows] for i in range(begin, begin + batch_size)]
    tokens = read_rows(train_shards, T, rows, tokenizer['vocab_size'])
    length = lengths[np.random.default_rng([seed, step, 1]).integers(len(lengths))]
    x, y = tokens[:, :-1].reshape(-1, length), tokens[:, 1:].reshape(-1, length)
    return (x.pin_memory(), y.pin_memory()) if device_type == 'cuda' else (x, y)

def batches(step):
    """All batches from this step on; a thread prepares num_workers of them ahead."""
    queue, thread = deque(), ThreadPoolExecutor(1)
    for micro_step in range(step * accumulation, max_steps * accumulation):
        queue.append(thread.submit(get_batch, *divmod(micro_step, accumulation)))
        if len(queue) > num_workers:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()

# ---- model and optimizer -----------------
torch.manual_seed(seed)  # the same first weights on every rank
ids = pretrained.config.vocab_size if checkpoint else vocab_size
if ids < 0:
    ids = math.ceil(tokenizer['vocab_size'] / 64) * 64
shape = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
raw_model = pretrained or checked(GPT, GPTConfig(**{**shape, 'vocab_size': ids}))
checked(raw_model.resize, block_size, ids)
if raw_model.config.vocab_size < tokenizer['vocab_size']:
    fail(f'vocab_size {vocab_size} is less than the tokenizer has, {tokenizer["vocab_size"]}')
raw_model.to(device)
if model_parallel and not one_shot:
    if not ddp or world_size % model_parallel_size or optimizer == 'muon' or dtype == 'float16':
        fail(f'--model_parallel wants {model_parallel_size} ranks of torchrun or a multiple, '
             '--optimizer=adamw, and float32 or bfloat16')
    raw_model.shard(device_type, world_size // model_parallel_size, model_parallel_size)
optimizers = raw_model.make_optimizers(optimizer, max_lr, weight_decay, (beta1, beta2))

# ---- learning rate -----------------------
def get_lr(step):
    """Learning rate of the update that follows `step` completed ones."""
    # 1) linear warmup
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    # 2) constant, if wanted
    if lr_scheduler == 'constant' or not decay_lr:
        return max_lr
    # 3) cosine down to min_lr; done is 0 behind the warmup and 1 at the end
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if lr_scheduler == 'cosine_with_restarts':
        done = done * (lr_restarts + 1) % 1
    return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2

# ---- generators (=) ----------------------
def generator_states():
    """The states of all random generators of this rank, as values that weights_only loads."""
    kind, keys, *others = np.random.get_state()
    states = dict(python=random.getstate(), numpy=(kind, keys.tolist(), *others),
                  torch=torch.get_rng_state())
    if device_type == 'cuda':
        states['cuda'] = torch.cuda.get_rng_state()
    return states

def set_generator_states(states):
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and device_type == 'cuda':
        torch.cuda.set_rng_state(states['cuda'])

def seed_generators(step):
    """Where no stored state fits: other draws on every rank, and in every launch."""
    number = np.random.SeedSequence([seed, rank, step]).generate_state(1).item()
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)

# ---- writing (=) -------------------------
def write_whole(content, path):
    """torch.save, so that `path` is the old file or the new one whenever this is killed."""
    with open(path + '.tmp', 'wb') as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)

# ---- checkpoint --------------------------
step = checkpoint.get('step', 0)  # completed updates
evaluated = checkpoint.get('evaluated', False)  # has what is due at this step been done?
val_loss = checkpoint.get('val_loss', math.inf)
best_val_loss = checkpoint.get('best_val_loss', math.inf)
best_step = checkpoint.get('best_step', -1)

def save_checkpoint(path):
    """Write all that a resume needs, then delete what is not kept. All ranks call it."""
    ranks = gathered(generator_states())
    content = dict(
        model=whole(raw_model.state_dict()), model_config=asdict(raw_model.config),
        optimizer=[whole(o.state_dict()) for o in optimizers], scaler=scaler.state_dict(),
        step=step, evaluated=evaluated, val_loss=val_loss, best_val_loss=best_val_loss,
        best_step=best_step, train_loader_state=loader_state(step), ranks=ranks,
        tokenizer=tokenizer, config=dict(config), wandb_id=wandb_id,
        log_bytes=log_file.tell() if master else 0)
    if master:
        write_whole(content, path)
        print0(f'saved {path} ({os.path.getsize(path) / 1e6:,.1f} MB)')
        # a later number is damaged or of another future: it must not push good ones out
        old = [s for s in checkpoint_steps() if s <= step and s not in permanent_checkpoints]
        for s in old[:-keep_last_n_checkpoints] if keep_last_n_checkpoints else []:
            os.remove(checkpoint_name(s))

# ---- resume ------------------------------
seed_generators(step)
if checkpoint and not one_shot:
    there = checkpoint['train_loader_state']
    if any(there.get(key) != loader_state(0)[key] for key in ('row_length', 'shards')):
        fail(f'{checkpoint_file} was trained on other data: {data_root} has changed')
    if step > max_steps:
        fail(f'{checkpoint_file} is at step {step}, beyond max_steps {max_steps}')
    shift = there['epoch'] * train_rows + there['row'] - step * rows_per_step
    for o, stored in zip(optimizers, checkpoint['optimizer'], strict=True):
        # lr, betas and weight decay are those of the present settings
        o.load_state_dict(dict(stored, param_groups=o.state_dict()['param_groups']))
        if model_parallel:
            split_like(o)
    if checkpoint['scaler']:
        scaler.load_state_dict(checkpoint['scaler'])
    if rank < len(checkpoint['ranks']):
        set_generator_states(checkpoint['ranks'][rank])
# nodes whose folders are not shared would train on different data in silence
facts = gathered((step, train_rows, val_rows))
if len(set(facts)) > 1:
    fail(f'(step, rows, val rows) of the ranks differ, {facts}: share {log_dir}, {data_root}')
if compile:
    raw_model.compile()  # in place: the names in the state dict stay as they are

# ---- evaluation --------------------------
@torch.no_grad()
def evaluate():
    """Validation loss in nats per token over the first val_rows rows, split over the ranks."""
    raw_model.eval()
    loss = 0.0
    for begin in range(0, val_rows, batch_size * world_size):
        # as many batches on every rank, all of one size; a row too many counts nothing
        rows = np.arange(batch_size) + begin + rank * batch_size
        real = np.minimum(rows, val_rows - 1)
        tokens = checked(read_rows, val_shards, T, real, tokenizer['vocab_size'])
        x, y = tokens[:, :-1], tokens[:, 1:].clone()
        y[rows >= val_rows] = -1
        with autocast:
            loss += raw_model(x.to(device), y.to(device), 'sum').item()
    raw_model.train()
    return sum(gathered(loss)) / (val_rows * T)

def sample(text, seed):
    """A continuation of `text`, the same on all ranks."""
    encoding = load_tokenizer(tokenizer['tokenizer'])
    prompt = torch.tensor([[tokenizer['eot'], *encoding.encode_ordinary(text)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with autocast:
        ids = raw_model.generate(prompt, max_new_tokens, temperature, top_k, 1.0,
                                 tokenizer['vocab_size'], tokenizer['eot'], generator)
    text = encoding.decode([i for i in ids[0].tolist() if i != tokenizer['eot']])
    return re.sub(r'[^\n\t -~\xa0-\U0010ffff]', '\ufffd', text)  # no codes for the terminal

# ---- one-shot modes ----------------------
if one_shot:
    print0(f'model {source}')
    if eval_only:
        print0(f'step {step} | val loss {evaluate():.4f}')
    if 'generate' in config.typed:
        print0(checked(sample, generate, seed))
    if 'export' in config.typed and master:
        checked(raw_model.save_pretrained, export, tokenizer)
        print0(f'wrote {export}')
    sys.exit()

# ---- training loop -----------------------
net = raw_model
if ddp and not model_parallel:
    # find_unused_parameters keeps the gradient buckets of the first step. Without it torch lays
    # them out anew after a process's first step: a resumed run would add up in another order.
    net = DistributedDataParallel(raw_model, find_unused_parameters=True)
if checkpoint_path and master:
    # what is later in the folder belongs to another future
    later = [checkpoint_name(s) for s in checkpoint_steps() if s > step]
    try:
        later += [best_name] if read_checkpoint(best_name)['step'] > step else []
    except FileNotFoundError:
        pass  # there is no best one yet
    except ValueError:
        later.append(best_name)
    for path in later:
        os.replace(path, path + '.old')
        print0(f'{path} is later than step {step}, or damaged: now {path}.old')
if master:
    os.makedirs(log_dir, exist_ok=True)
    log_file = open(os.path.join(log_dir, 'log.txt'), 'ab')
    # lines behind the checkpoint will be written again
    log_file.truncate(min(log_file.tell(), checkpoint.get('log_bytes', 0)))
    if save_config:
        config.save(os.path.join(log_dir, 'config.py'))
wandb_run, wandb_id = None, checkpoint.get('wandb_id', '')
if wandb_log and master:
    import wandb
    try:
        wandb_run = wandb.init(project=wandb_project, name=run_name or None, config=dict(config),
                               dir=log_dir, id=wandb_id or None, resume='allow')
    except wandb.errors.Error as error:
        fail(f'wandb: {error}; without an account set WANDB_MODE=offline')
    wandb_id = wandb_run.id

def due(interval):
    return step == max_steps or (interval > 0 and step % interval == 0)

def log(line, **wandb_values):
    print0(line)
    if master:
        log_file.write(f'{line}\n'.encode())
        log_file.flush()
    if wandb_run:
        wandb_run.log(wandb_values, step=step)

# SIGTERM and Ctrl-C are acted upon at the end of a step; after one of them Ctrl-C ends the process
told = {signal.SIGTERM: 0, signal.SIGINT: 0}

def on_signal(number, frame):
    told[number] = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)

for number in told:
    signal.signal(number, on_signal)

parameters = list(raw_model.parameters())
log(f'# run {run_name or log_dir} from {source}, step {step}, seed {seed}')
log(f'# {sum(p.numel() for p in parameters):,} parameters: {raw_model.config}')
log(f'# {total_batch_size:,} tokens per step = {batch_size} rows x {T} x {accumulation} '
    f'micro-step(s) x {world_size} rank(s)')
log(f'# {train_rows * T:,} training tokens in {data_root}, {val_rows * T:,} validation tokens')
log(f'# device {device}, dtype {dtype}, compile {compile}, torch {torch.__version__}')
try:
    load_tokenizer(tokenizer['tokenizer'])
except OSError as error:
    print0(f'no samples: {error}')
    generate_interval = -1
upcoming = batches(step)
start_step, start_time, times = step, time.perf_counter(), []
while True:
    # 1) What is due at this step; it changes nothing. A resume skips what had been done.
    # model_best.pt is written before the numbered checkpoint of its step
    unsaved = not evaluated or checkpoint_file == best_name
    if not evaluated:
        if due(eval_interval):
            val_loss = evaluate()
            log(f'step {step}/{max_steps} | val loss {val_loss:.4f}', val_loss=val_loss)
            if val_loss < best_val_loss:
                best_val_loss, best_step = val_loss, step
        if step and generate_interval > 0 and due(generate_interval):
            text = sample('', seed + step).replace('\n', '\n    ')
            log(f'step {step}/{max_steps} | sample\n    {text}')
        evaluated = True
        if step and step == best_step:
            save_checkpoint(best_name)
    if unsaved and step and (due(checkpoint_interval) or step in permanent_checkpoints):
        save_checkpoint(checkpoint_name(step))
    if step == max_steps:
        break

    # 2) The gradients of one batch, a micro-batch at a time.
    step_begun, lr = time.perf_counter(), get_lr(step)
    step_loss = torch.zeros((), device=device)
    for micro_step in range(accumulation):
        x, y = checked(next, upcoming)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        # the ranks exchange gradients in the last micro-step alone; DDP reads it in the forward
        net.require_backward_grad_sync = micro_step == accumulation - 1
        if model_parallel:
            net.set_requires_gradient_sync(micro_step == accumulation - 1)
        with autocast:
            loss = net(x, y, 'sum') / total_batch_size  # every token of the step weighs the same
        # the ranks average their gradients, world_size makes that a sum
        scaler.scale(loss * world_size).backward()
        step_loss += loss.detach()
        if log_level == 'DEBUG':
            print0(f'step {step + 1} micro-step {micro_step + 1}/{accumulation} | '
                   f'loss {loss.item() * total_batch_size / y.numel():.6f} | '
                   f'{1000 * (time.perf_counter() - step_begun):.0f}ms')
    for o in optimizers:
        scaler.unscale_(o)
    norm = whole(get_total_norm([p.grad for p in parameters]))

    # 3) The one moment at which the host waits for the GPU, and the ranks for each other.
    flags = [norm.new_tensor(told[number]) for number in told]
    # the norm is the same on all ranks already
    report = torch.stack([step_loss, norm / world_size, *flags])
    if ddp:
        dist.all_reduce(report)
    step_loss, step_norm, terminated, interrupted = report.tolist()
    # in float16 a norm may overflow: the scaler then skips the update
    bad_norm = not math.isfinite(step_norm) and not scaler.is_enabled()
    if bad_norm or not math.isfinite(step_loss):
        fail(f'step {step + 1}: loss {step_loss}, gradient norm {step_norm}; stopped before the '
             'update (try a lower max_lr or more warmup_steps)', 1)

    # 4) The update.
    parts = raw_model.gradient_norms() if log_gradients else ''
    if grad_clip > 0:
        clip_grads_with_norm_(parameters, grad_clip, norm)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = lr
        scaler.step(o)
        o.zero_grad()
    scaler.update()
    step, evaluated = step + 1, False

    # 5) The report, and the stop if any rank was told to.
    times.append(time.perf_counter() - step_begun)
    if due(log_interval) or step == 1:
        dt, times = sum(times) / len(times), []
        # at the pace of this launch, with all that it did beside
        pace = (time.perf_counter() - start_time) / (step - start_step)
        minutes = int(pace * (max_steps - step) / 60)
        mfu = raw_model.mfu(total_batch_size / dt / world_size, T)
        log(f'step {step}/{max_steps} ({100 * step / max_steps:.2f}%) | loss {step_loss:.6f} | '
            f'lr {lr:.2e} | norm {step_norm:.2f} | dt {1000 * dt:.0f}ms | '
            f'tok/s {total_batch_size / dt:,.0f} | mfu {mfu} | '
            f'eta {minutes // 60}h{minutes % 60:02d}m{parts}', loss=step_loss, lr=lr)
    if terminated or interrupted:
        save_checkpoint(checkpoint_name(step))
        print0(f'stopped at step {step}; --auto_resume continues')
        gathered(step)  # torchrun kills the others when the first rank leaves: rank 0 must be done
        sys.exit(143 if terminated else 130)

# ---- end ---------------------------------
log(f'# best val loss {best_val_loss:.4f} at step {best_step}, checkpoints in {log_dir}, '
    f'{(time.perf_counter() - start_time) / 60:.1f} min')
if wandb_run:
    wandb_run.finish()
if ddp:
    gathered(step)  # nobody leaves while another rank still writes or reads
    dist.destroy_process_group()
