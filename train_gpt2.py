"""GPT-2 pretraining, from an 0.8M-parameter model on a laptop to GPT-2 124M on FineWeb-Edu on many nodes.

What to expect: README.md has the measured table (model, data, hardware, validation loss, time).

Laptop CPU, no download (the documentation and source of your own Python, a few minutes):
    python prepare/pydocs.py
    python train_gpt2.py --model=tiny --data_root=data/pydocs
One GPU (GPT-2 124M, FineWeb-Edu from prepare/fineweb.py):
    python train_gpt2.py --dtype=bfloat16 --compile
Eight GPUs, one epoch of the 10B-token sample:
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --dtype=bfloat16 --compile --batch_size=64 --max_steps=19073 --warmup_steps=715
Two nodes (on the second one --node_rank=1; both must see log_dir):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 train_gpt2.py --dtype=bfloat16 --compile
Interrupted, by whatever and at whatever moment:
    python train_gpt2.py --auto_resume
"""
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, fail, fail_if, master, nearby, print0
from model import ACTIVATIONS, GPT, GPT_SIZES, PEAK_FLOPS, GPTConfig, begin_gpt, encoding_for_all, export_files, fit_weights, git_commit, hellaswag_scores
from model import load_optimizer_state, load_whole_weights, make_optimizers, norms_by_part, open_hellaswag, open_shards, optimizer_state, path_of_gpt, printable
from model import read_gpt, shard_rows, shared_out, sum_alike, sum_gradients, tensor_parallel, tokenizer_of, total_norm, whole_weights
from model import NO_WANDB, agree, ahead, append, cannot_write, cpu_group, differ, everyone, find_device, first_readable, generator_states, on_all_ranks, on_cpu
from model import open_log, rotate, run_checkpoints, same_data, seed_generators, set_generator_states, start_wandb, watch_signals, write_together, write_whole

# ---- settings ------------------------------------------------------------------------------------------------------
# i/o
log_dir = 'logs'                 # folder of this run: checkpoints, log.txt, config.py
run_name = ''                    # a name for wandb and the log; does not change the folder
save_config = True               # write config.py, the settings file that repeats this run
# data
data_root = 'data/fineweb_edu10B'  # folder of token shards, .bin or .npy (see prepare/)
num_workers = 2                  # batches that a background thread prepares ahead; 0 = none
batch_size = 16                  # rows of block_size tokens per micro-step and rank
total_batch_size = 524288        # tokens per optimizer step, over all ranks and micro-steps
grad_accumulation_steps = 0      # micro-batches per step over all ranks: sets total_batch_size; 0 = derived from it
dynamic_seq_length = False       # draw each step's sequence length; tokens per step stay the same
min_seq_length = 128             # shortest drawn length, tokens; the others are its doublings
max_seq_length = 1024            # longest drawn length, tokens
# model
init_from = 'scratch'            # or published weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path (see read_gpt)
model = 'gpt2'                   # tiny | gpt2 | gpt2-medium | gpt2-large | gpt2-xl; fills in whatever is not typed
block_size = 1024                # longest sequence, tokens
vocab_size = -1                  # ids; -1 = the data's, rounded up to a multiple of 64
n_layer = 12                     # blocks
n_head = 12                      # attention heads, must divide n_embd
n_embd = 768                     # width
activation = 'gelu_new'          # one of ACTIVATIONS in model.py: gelu_new is GPT-2's tanh approximation, gelu the exact one (nanoGPT's checkpoints)
dropout = 0.0                    # probability; 0 = off, right for pretraining
# optimization
optimizer = 'adamw'              # adamw | muon; muon on the matrices of the blocks, AdamW on the rest
max_lr = 6e-4                    # peak learning rate
min_lr = -1.0                    # final learning rate, 0 = nothing; -1 = max_lr / 10
warmup_steps = 2000              # steps of linear warmup; 0 = none
max_steps = 40000                # optimizer steps in all; 0 = only the evaluation of the start
decay_lr = True                  # False = constant after the warmup
lr_scheduler = 'cosine'          # cosine | cosine_with_restarts | constant
lr_restarts = 3                  # restarts of cosine_with_restarts, 3 = four equal cycles; 0 = none
weight_decay = 0.1               # on matrices and embeddings, not on biases and norms; 0 = none
beta1 = 0.9                      # AdamW; 0 = off
beta2 = 0.95                     # AdamW; 0 = off
grad_clip = 1.0                  # largest gradient norm; 0 = no clipping
# evaluation
eval_interval = 250              # steps between evaluations; -1 = only at the end
val_tokens = 10485760            # validation tokens, a fixed number whatever the batch and the ranks; 0 = all
eval_only = False                # print the validation loss of a checkpoint, write eval.json, exit
hellaswag_interval = -1          # steps between HellaSwag evaluations, with --eval_only any number does it; -1 = none
hellaswag_root = 'data/hellaswag'  # folder that prepare/hellaswag.py wrote
generate_interval = 1000         # steps between samples; -1 = none
generate = ''                    # continue this text with a checkpoint, exit
export = ''                      # write a checkpoint into this folder for transformers, exit
num_samples = 1                  # samples each time
max_new_tokens = 256             # length of a sample, tokens
temperature = 0.8                # of the samples; 0 = always the likeliest token
top_k = 200                      # sample among the k likeliest; 0 = all
top_p = 1.0                      # sample among the likeliest that hold this probability; 1 = all
# checkpoint
checkpoint_interval = 1000       # steps between checkpoints; -1 = none, but always at the end
keep_last_n_checkpoints = 5      # newest checkpoints to keep; 0 = all
permanent_checkpoints = []       # steps that are saved and kept whatever the two above say
auto_resume = False              # continue from the newest readable checkpoint in log_dir, if there is one
resume = False                   # continue from checkpoint_path; without one the same as auto_resume
checkpoint_path = ''             # a checkpoint for --resume, --eval_only, --generate or --export
# logging
log_interval = 10                # steps between log lines
log_level = 'INFO'               # INFO | DEBUG; DEBUG adds loss and time of every micro-step
log_gradients = False            # add the gradient norm of every part of the model to the log lines
wandb_log = False                # log to Weights & Biases too
wandb_project = 'train_gpt2'     # its project
# system
device = ''                      # cpu, cuda, cuda:1, mps; '' = cuda, then mps, then cpu
dtype = 'float32'                # float32 | bfloat16 | float16; the last two by autocast, weights stay float32
compile = False                  # torch.compile; DISABLE_COMPILE=1 in the environment switches it off
model_parallel = False           # experimental: every block's matrices split over model_parallel_size ranks
model_parallel_size = 2          # ranks that share a model; all ranks / this = data-parallel copies
deterministic = False            # deterministic kernels on the GPU (the CPU's are)
seed = 1337                      # of weights, data order, dropout and samples; 0 = a seed like any other

# ---- command line --------------------------------------------------------------------------------------------------
config = configure(globals(), aliases={'lr': 'max_lr', 'learning_rate': 'max_lr', 'max_grad_norm': 'grad_clip', 'save_steps': 'checkpoint_interval'})

# ---- run folder ----------------------------------------------------------------------------------------------------
typed_now = set(config.given)  # a resume adds what was typed when the run began
run_dir, run_dir_typed, log_name = log_dir, 'log_dir' in typed_now, 'log.txt'
read_only = eval_only or generate != '' or export != ''  # these modes read a checkpoint and start no run
lenient = False                          # True: a typed checkpoint that cannot be read is a warning, not the end

def checkpoint_path_of(step):
    return os.path.join(run_dir, 'model_best.pt' if step == 'best' else f'model_{step:05d}.pt')

def newest_first():
    return run_checkpoints(checkpoint_path_of)

def checkpoint_of(path):  # one dict, whatever the files; ValueError if it is damaged
    return read_gpt(path, whole=True)

fail_if(eval_only + (generate != '') + (export != '') > 1, '--eval_only, --generate and --export are three launches: give one')
fail_if('init_from' in config.typed_here and init_from != 'scratch' and checkpoint_path, '--init_from and --checkpoint_path name two beginnings: give one')
if 'init_from' in config.typed_here and init_from != 'scratch' and read_only:  # in a run's config.py it says where that run began
    config.assign('checkpoint_path', path_of_gpt('init_from', init_from))
fail_if(export and (os.path.isfile(export) or os.path.isdir(export) and os.listdir(export)), f'--export={export} is there already: name a new folder')

# ---- stored run (=) ------------------------------------------------------------------------------------------------
# Which checkpoint this launch reads, if any. What was typed when that run began counts as typed again, unless anew.
reading = resume or auto_resume or read_only
fail_if(checkpoint_path and not reading, f'--checkpoint_path={checkpoint_path} does nothing by itself: add --resume to continue from it')
found = [checkpoint_path] if checkpoint_path else newest_first() if reading else None
checkpoint, checkpoint_file, damaged = first_readable(found, checkpoint_of, checkpoint_path_of, strict=checkpoint_path != '' and not lenient,
                                                      weights_too=checkpoint_path != '' or read_only)
resumed = checkpoint is not None and 'step' in checkpoint and not read_only
if read_only and checkpoint:
    print0(f'checkpoint {checkpoint_file}')
elif read_only:
    fail(f'no readable checkpoint in {run_dir}: name one with --checkpoint_path{nearby(checkpoint_path_of(0))}')
if resumed and checkpoint_path and not run_dir_typed:
    run_dir = os.path.dirname(os.path.normpath(checkpoint_path)) or '.'
elif not (resumed or read_only or reading and not checkpoint_path) and newest_first():
    fail(f'{run_dir} already holds a run ({os.path.basename(newest_first()[0])}): add --auto_resume to continue it, or choose another folder for a new one')
if checkpoint and 'step' in checkpoint:
    config.restore(checkpoint['given'], checkpoint_file)
elif checkpoint:
    print0(f'WARNING: {checkpoint_file} holds weights only: they are used, optimizer and step start anew')

# ---- derived -------------------------------------------------------------------------------------------------------
config.assign('log_dir', run_dir)
if read_only and 'model_parallel' not in typed_now:
    config.assign('model_parallel', False)  # a stored one: files hold whole tensors
checkpoint, checkpoint_file = begin_gpt('init_from', config, checkpoint, checkpoint_file, strict=True)
config.fill({**GPT_SIZES[model], **{
    'tiny': dict(batch_size=16, total_batch_size=2048, val_tokens=131072, max_lr=4e-3, warmup_steps=100, max_steps=1250, eval_interval=250,
                 generate_interval=500, checkpoint_interval=250, log_interval=50, min_seq_length=16, max_seq_length=128),
    'gpt2': {},
    'gpt2-medium': dict(batch_size=8, max_lr=3e-4),
    'gpt2-large': dict(batch_size=4, max_lr=2.5e-4),
    'gpt2-xl': dict(batch_size=2, max_lr=2e-4),
}[model]})
save_every, keep, permanent = checkpoint_interval, keep_last_n_checkpoints, permanent_checkpoints
peak_lr, floor_lr, warmup, clip = max_lr, min_lr if min_lr >= 0 else max_lr / 10, warmup_steps, grad_clip
schedule, cycles = lr_scheduler if decay_lr else 'constant', lr_restarts + 1
shape = ('block_size', 'n_layer', 'n_head', 'n_embd', 'activation')  # settings that a resumed model cannot change
data_parallel = not model_parallel  # False: the script sums the gradients itself, without DistributedDataParallel
rank_state, own_progress = dict, {}  # what each rank alone knows beside its generators, and what this script alone remembers: nothing
fail_if(max(dropout, beta1, beta2) >= 1, f'dropout {dropout}, beta1 {beta1}, beta2 {beta2} must be below 1')
fail_if(any(type(s) is not int for s in permanent), f'permanent_checkpoints {permanent} must be whole numbers')
fail_if(activation not in ACTIVATIONS, f'--activation={activation}: must be one of {", ".join(ACTIVATIONS)}')
fail_if(n_embd % n_head, f'n_embd {n_embd} is not a multiple of n_head {n_head}')
for name, refused in dict(compile=compile, optimizer=optimizer != 'adamw', dropout=dropout > 0, dtype=dtype == 'float16').items():
    fail_if(model_parallel and refused, f'--model_parallel does not work with --{name}={config[name]}')

# ---- distributed (=) -----------------------------------------------------------------------------------------------
ddp = 'RANK' in os.environ  # set by torchrun
rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
device = find_device(device, local_rank if ddp else -1)  # '' = the best there is; one that is not there: the CPU, with a warning
device_type = device.split(':')[0]
if ddp:
    store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), next(rendezvous('env://'))[0])  # dead workers' keys stay behind
    dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world_size)
    cpu_group()  # connected from here on: no rank waits for one that has ended
device_name = torch.cuda.get_device_name(device) if device_type == 'cuda' else device_type
peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), 0)  # 0 = unknown: no mfu

# ---- precision and seed (=) ----------------------------------------------------------------------------------------
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')  # small float16 gradients would round to zero
if device_type == 'cuda':
    torch.set_float32_matmul_precision('high')  # TF32 for what stays float32
if deterministic:
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
torch.manual_seed(seed)  # the same first weights on every rank; each rank's own generators are seeded or restored after them
stop = watch_signals()  # SIGTERM and Ctrl-C leave their number in it, a full disk its message: poll() acts upon them

# ---- data ----------------------------------------------------------------------------------------------------------
model_ranks = model_parallel_size if model_parallel else 1  # that work on the same rows
if world_size % model_ranks or model_parallel and (n_head % model_ranks or not ddp):
    fail(f'model_parallel_size {model_ranks} must divide the number of ranks, {world_size} (torchrun starts them), and n_head {n_head}')
data_ranks, data_rank = world_size // model_ranks, rank // model_ranks
# Row r of a shard is tokens[r*T : r*T + T + 1]. The rows of all shards form one list, each epoch has its own permutation of
# it, and step k takes rows [k*R, (k+1)*R): the order depends on seed and step alone, not on ranks or micro-batches.
T = max_seq_length if dynamic_seq_length else block_size
lengths = [min_seq_length << i for i in range(20) if min_seq_length << i <= T] if dynamic_seq_length else [T]
if T > block_size or not lengths or lengths[-1] != T:
    fail(f'max_seq_length {max_seq_length} must be min_seq_length {min_seq_length} doubled some times, and at most block_size {block_size}')
if 'total_batch_size' in typed_now and 'grad_accumulation_steps' not in typed_now:
    config.assign('grad_accumulation_steps', 0)  # a stored one
if grad_accumulation_steps:
    config.assign('total_batch_size', grad_accumulation_steps * batch_size * T)
    print0(f'total_batch_size = {total_batch_size:,} tokens ({grad_accumulation_steps} micro-batches of {batch_size * T:,})')
micro_total = batch_size * T * data_ranks  # tokens of one micro-step over all ranks
if total_batch_size % micro_total and not read_only:
    fail(f'total_batch_size {total_batch_size} is no multiple of batch_size {batch_size} x {T} tokens x {data_ranks} rank(s); '
         f'the nearest that is: {max(1, round(total_batch_size / micro_total)) * micro_total}')
accumulation = total_batch_size // micro_total  # micro-steps per step
rows_per_step = total_batch_size // T

if generate or export:
    train_shards, val_shards, tokenizer = {}, {}, tokenizer_of(checkpoint, checkpoint_file)
else:
    train_shards, val_shards, tokenizer = on_all_ranks(open_shards, data_root, T, hint='; to make data: `python prepare/fineweb.py`, or without a '
                                                       'download `python prepare/pydocs.py`, then --model=tiny --data_root=data/pydocs')
sizes = {name: len(tokens) for shards in (train_shards, val_shards) for name, tokens in shards.items()}
fail_if(differ((checkpoint_file, sizes)), f'the ranks differ: {checkpoint_file or "the checkpoint"} and {data_root} must be the same on all nodes')
train_rows, val_rows = (sum((len(tokens) - 1) // T for tokens in shards.values()) for shards in (train_shards, val_shards))
val_rows = min(val_rows, max(1, val_tokens // T)) if val_tokens else val_rows
first_step, first_row = 0, 0  # the row where a step begins; only a resume with another total_batch_size moves them

@lru_cache(maxsize=2)
def permutation(epoch):
    return np.random.default_rng([seed, epoch]).permutation(train_rows)

def loader_state(step):
    """Where the data of this step begins, and in which data."""
    epoch, row = divmod(first_row + (step - first_step) * rows_per_step, train_rows)
    return dict(seed=seed, epoch=epoch, row=row, row_length=T, shards={name: len(tokens) for name, tokens in train_shards.items()})

def batch(step, micro_step):
    """(inputs, targets), each (batch_size * T // length, length) int64: what this rank sees in this micro-step."""
    begin = first_row + (step - first_step) * rows_per_step + (micro_step * data_ranks + data_rank) * batch_size
    tokens = shard_rows(train_shards, T, [permutation(row // train_rows)[row % train_rows] for row in range(begin, begin + batch_size)])
    length = lengths[np.random.default_rng([seed, step, 1]).integers(len(lengths))]
    x, y = tokens[:, :-1].reshape(-1, length), tokens[:, 1:].reshape(-1, length)
    return (x.pin_memory(), y.pin_memory()) if device_type == 'cuda' else (x, y)

encoding = encoding_for_all(tokenizer['tokenizer'], needed=generate or export)

hellaswag = []
if hellaswag_interval > 0 and not (generate or export):
    fail_if(not encoding, 'HellaSwag needs the tokenizer, see above')
    hellaswag = on_all_ranks(open_hellaswag, hellaswag_root, encoding, hint='; `python prepare/hellaswag.py` makes it, or --hellaswag_interval=-1')
    fail_if(differ(str(hellaswag)), f'the ranks see different items: {hellaswag_root} must be the same on all nodes')

# ---- model ---------------------------------------------------------------------------------------------------------
fail_if(0 < vocab_size < tokenizer['vocab_size'], f'vocab_size {vocab_size} is smaller than the vocabulary of the data, {tokenizer["vocab_size"]}')
padded_vocab = vocab_size if vocab_size > 0 else -(-tokenizer['vocab_size'] // 64) * 64
raw_model = GPT(GPTConfig(block_size, padded_vocab, n_layer, n_head, n_embd, dropout, activation)).to(device)
if model_parallel:
    mesh = init_device_mesh(device_type, (data_ranks, model_ranks), mesh_dim_names=('data', 'model'))
    tensor_parallel(raw_model, mesh['model'])

# ---- optimizer -----------------------------------------------------------------------------------------------------
parameters = list(raw_model.parameters())
optimizers = make_optimizers(raw_model, optimizer, peak_lr, weight_decay, (beta1, beta2), split=model_parallel)

def state_files(run):
    """{file name: content} of a checkpoint, '' for a single file. run: the part that all scripts share (see save)."""
    return {'': dict(run, model=whole_weights(raw_model), optimizer=optimizer_state(raw_model, optimizers), scaler=scaler.state_dict(),
                     train_loader_state=loader_state(run['step']), tokenizer=tokenizer)}

def load_weights(checkpoint):
    weights = checkpoint['model']
    if 'step' not in checkpoint:  # from elsewhere: its vocabulary may be padded in another way
        weights = fit_weights(weights, block_size, padded_vocab, tokenizer['vocab_size'])
    load_whole_weights(raw_model, weights)

def load_training(checkpoint):
    """Everything else that state_files stored; ValueError if it does not belong to this data."""
    global first_step, first_row
    load_optimizer_state(raw_model, optimizers, checkpoint['optimizer'])  # the present decay and betas stay
    if checkpoint['scaler']:  # empty if the run had another dtype
        scaler.load_state_dict(checkpoint['scaler'])
    there = checkpoint['train_loader_state']
    same_data(there, loader_state(0), ('row_length', 'shards'), data_root)
    if not all(type(there[name]) is int and there[name] >= 0 for name in ('epoch', 'row')):
        raise ValueError(f'its data position is epoch {there["epoch"]}, row {there["row"]}')
    first_step, first_row = checkpoint['step'], there['epoch'] * train_rows + there['row']

# ---- checkpoint (=) ------------------------------------------------------------------------------------------------
# step: completed optimizer steps. progress: plain numbers that a resume continues. snapshot: what a checkpoint of this step
# needs beside weights and optimizers, taken before the step draws a random number; top_done: its evaluation is in the log.
step, snapshot, log_path, log_descriptor = 0, None, os.path.join(run_dir, log_name), -1
progress = dict(val_loss=math.inf, best_val_loss=math.inf, best_step=-1, loss_sum=0.0, loss_count=0, seconds=0.0, wandb_id='', **own_progress)

def log(line, prefix='', show=True):
    """Append a line to log.txt and print it (rank 0)."""
    if show:
        print0(line)
    append(log_path, log_descriptor, prefix + line + '\n', stop)

def take_snapshot(before=None):
    """At the start of a step; again, given the first one, when its evaluation is done: the generators are those of the start."""
    return dict(step=step, top_done=before is not None, log_bytes=os.fstat(log_descriptor).st_size if master else 0, progress=dict(progress),
                rank=before['rank'] if before else dict(rank_state(), rng=generator_states(device_type)))

def save(path):
    """Write the checkpoint of the snapshot, then rotate. Every rank calls it; rank 0 writes."""
    own = on_cpu(snapshot['rank'])
    ranks, problem = [own] * world_size, ''
    if ddp:
        dist.gather_object(own, ranks if master else None, group=cpu_group())
    files = state_files(dict(snapshot['progress'], step=snapshot['step'], top_done=snapshot['top_done'], log_bytes=snapshot['log_bytes'],
                             ranks=ranks, config=dict(config), given=config.typed()))
    if master and max_steps:  # 0 trains nothing, and leaves no run behind
        try:
            os.fsync(log_descriptor)
            write_whole(path, files)
            damaged.discard(path)
            rotate(checkpoint_path_of, checkpoint_of, keep, permanent, damaged)
            print0(f'saved {path} ({sum(os.path.getsize(os.path.join(path, name) if name else path) for name in files) / 1e6:,.1f} MB)')
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            problem = cannot_write(path, error)
    agree(problem, code=1)

def leave(code):
    if ddp:
        dist.destroy_process_group()
    sys.exit(code)

def poll():
    """Has any rank been told to stop? Then write the last whole step and leave. Called by all ranks, between micro-steps
    and evaluation batches: what this step has drawn or summed up so far is forgotten and done again after the resume."""
    told = stop.number
    if ddp:
        flag = torch.tensor(told)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=cpu_group())
        told = int(flag)
    fail_if(told == 1000, stop.trouble, 1)
    if told > 0:
        print0(f'stopped by {signal.Signals(told).name}')
        if not read_only and not (resumed and snapshot['step'] == start_step and os.path.exists(checkpoint_path_of(start_step))):
            save(checkpoint_path_of(snapshot['step']))
        leave(128 + told)

# ---- resume (=) ----------------------------------------------------------------------------------------------------
start_step, top_done, reseeded, problem = 0, False, True, ''
if resumed:
    config.compare(checkpoint['config'], checkpoint_file, fixed=shape)
try:
    if checkpoint:
        load_weights(checkpoint)
    if resumed:
        load_training(checkpoint)
        start_step, top_done = checkpoint['step'], bool(checkpoint['top_done'])
        progress = {name: type(value)(checkpoint[name]) for name, value in progress.items()}
        known = checkpoint['ranks'][rank] if rank < len(checkpoint['ranks']) else None
        reseeded = known is None or not set_generator_states(known['rng'], device_type)
except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:  # what a file that does not fit provokes
    problem = f'{checkpoint_file} does not fit: {"no entry " if isinstance(error, KeyError) else ""}{str(error)[:400]}'
agree(problem)
if reseeded:
    seed_generators(seed, rank, start_step)
new_ranks = [r for r, new in enumerate(everyone(reseeded)) if new]
if resumed and new_ranks:
    print0(f'ranks {new_ranks} are new, or on another kind of device: their generators are seeded from (seed, rank, step)')
fail_if(start_step > max_steps, f'{checkpoint_file} is at step {start_step}, beyond max_steps {max_steps}')
fail_if(differ((start_step, checkpoint)), f'the ranks found different checkpoints, {checkpoint_file or run_dir}: it must lie where all nodes see it')
if master and not read_only:
    try:
        log_descriptor = open_log(log_path, checkpoint_path_of, checkpoint_of, checkpoint if resumed else None, checkpoint_file, checkpoint_path != '')
        if save_config:
            config.save(os.path.join(run_dir, 'config.py'))
    except (OSError, ValueError, TypeError) as error:
        problem = f'cannot use {run_dir} as the folder of this run: {error}'
agree(problem)
wandb_run = start_wandb(wandb_project, run_name, config, run_dir, progress) if wandb_log and master and not read_only else NO_WANDB

# ---- compile and wrap (=) ------------------------------------------------------------------------------------------
if compile:
    raw_model.compile()  # in place: the names in the state dict stay as they are, and raw_model.forward stays eager
net = raw_model
if ddp and data_parallel and not read_only and any(p.requires_grad for p in raw_model.parameters()):
    net = DistributedDataParallel(raw_model, device_ids=[local_rank] if device_type == 'cuda' else None, gradient_as_bucket_view=True)
    sum_alike(net, world_size)  # as DDP would sum, but the same after a resume

# ---- learning rate (=) ---------------------------------------------------------------------------------------------
def get_lr(step):
    """Learning rate of the update that follows `step` completed ones: linear warmup, then `schedule` down to floor_lr."""
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    if schedule == 'constant':
        return peak_lr
    done = (step - warmup) / max(1, max_steps - warmup)  # 0 to 1; at 1 the run is over
    if schedule == 'cosine_with_restarts':
        done = done * cycles % 1
    return floor_lr + (peak_lr - floor_lr) * (1 + math.cos(math.pi * min(1, done))) / 2

# ---- evaluation ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate():
    """Validation loss in nats per token over the first val_rows rows, split over the ranks."""
    raw_model.eval()
    losses = []
    for begin in range(data_rank * batch_size, val_rows + data_rank * batch_size, batch_size * data_ranks):  # as many on every rank
        poll()
        rows = np.arange(begin, begin + batch_size)  # always a full batch, one shape for torch.compile: what is too much counts nothing
        tokens = shard_rows(val_shards, T, np.minimum(rows, val_rows - 1))
        tokens[rows >= val_rows, 1:] = -1
        tokens = tokens.to(device)
        with autocast:
            losses.append(raw_model(tokens[:, :-1].clamp(min=0), tokens[:, 1:], 'sum'))
    raw_model.train()
    return sum(everyone(torch.stack(losses).cpu().double().sum().item())) / (val_rows * T * model_ranks)

def evaluate_hellaswag():
    """Logs and returns the hellaswag_scores; rows of like length together, split over the ranks."""
    rows = [(context + ending, len(ending)) for context, endings, _ in hellaswag for ending in endings]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))

    def work(turn, chosen):
        with autocast:
            return raw_model.ending_losses([rows[i] for i in chosen]).tolist()

    raw_model.eval()
    losses = shared_out([order[i:i + batch_size] for i in range(0, len(order), batch_size)], data_rank, data_ranks, poll, work)
    raw_model.train()
    acc, acc_norm = hellaswag_scores(hellaswag, losses)
    log(f'step {step}/{max_steps} | hellaswag acc {acc:.4f} | acc_norm {acc_norm:.4f}')
    return dict(hellaswag_acc=acc, hellaswag_acc_norm=acc_norm)

def sample(text, seed):
    """num_samples continuations of `text`, a list of strings. Every rank draws the same."""
    generator, texts = torch.Generator(device).manual_seed(seed), []
    prompt = torch.tensor([[tokenizer['eot'], *encoding.encode_ordinary(text)]], device=device)
    for _ in range(num_samples):
        poll()
        with autocast:
            ids = raw_model.generate(prompt, max_new_tokens, temperature, top_k, top_p, tokenizer['vocab_size'], tokenizer['eot'], generator,
                                     stop=lambda: stop.number)
        texts.append(encoding.decode([i for i in ids[0].tolist() if i != tokenizer['eot']]))
    return [printable(text) for text in texts]

if read_only:
    step, path, files = checkpoint.get('step', 0), '', {}
    if export:
        path, files = os.path.normpath(export), export_files(whole_weights(raw_model), raw_model.config, tokenizer)
    elif generate:
        print0('\n----\n'.join(sample(generate, seed)))
    else:
        report = dict(step=step, val_loss=evaluate(), val_tokens=val_rows * T, checkpoint=checkpoint_file, data_root=data_root)
        print0(f'step {step}/{max_steps} | val loss {report["val_loss"]:.4f}')
        if hellaswag:
            report.update(evaluate_hellaswag(), hellaswag_items=len(hellaswag))
        folder = run_dir if 'init_from' in config.typed_here else os.path.dirname(os.path.normpath(checkpoint_file))
        path, files = os.path.join(folder, 'eval.json'), {'': report}
    if path:
        write_together(path, files)
        print0(f'wrote {path}')
    leave(0)

# ---- training loop -------------------------------------------------------------------------------------------------
log('settings given: ' + ' '.join(f'{name}={value!r}' for name, value in config.typed().items()), prefix='# ', show=False)
for line in (
    f'{sum(p.numel() for p in parameters):,} parameters: {n_layer} layers, {n_head} heads, width {n_embd}, {block_size} positions, {padded_vocab} ids',
    f'{total_batch_size:,} tokens per step = {batch_size} rows x {T} x {accumulation} micro-step(s) x {data_ranks} rank(s)',
    f'{train_rows * T:,} training tokens in {data_root}, {max_steps * rows_per_step / train_rows:.2f} epochs; {val_rows * T:,} validation tokens',
    f'device {device} ({device_name}), dtype {dtype}, compile {compile}, torch {torch.__version__}, commit {git_commit()}',
    f'run {run_name or run_dir}: ' + (f'resumed from {checkpoint_file} at step {start_step}' if resumed else
                                      f'weights from {checkpoint_file}' if checkpoint else f'new, random initialisation, seed {seed}'),
):
    log(line, prefix='# ')
flops_per_step = raw_model.flops_per_token(T) * total_batch_size
batches = ahead(batch, ((step, micro_step) for step in range(start_step, max_steps) for micro_step in range(accumulation)), num_workers)
seconds, timed_steps = 0.0, 0
raw_model.train()
for step in range(start_step, max_steps + 1):
    # -- top: what looks at the model after `step` updates; nothing here changes the training
    last = step == max_steps
    snapshot = take_snapshot()
    if step > start_step or not top_done:
        if eval_interval > 0 and step % eval_interval == 0 or last:
            val_loss = progress['val_loss'] = evaluate()
            log(f'step {step}/{max_steps} | val loss {val_loss:.4f}')
            fail_if(not math.isfinite(val_loss), f'step {step}: validation loss {val_loss}; stopped, no checkpoint holds it (try a lower max_lr)', 1)
            wandb_run.log({'val/loss': val_loss}, step=step)
            if val_loss < progress['best_val_loss']:
                progress.update(best_val_loss=val_loss, best_step=step)
                snapshot['progress'] = dict(progress)
                save(checkpoint_path_of('best'))
        if hellaswag and step and (step % hellaswag_interval == 0 or last):
            scores = evaluate_hellaswag()
            wandb_run.log({f'val/{name}': score for name, score in scores.items()}, step=step)
        if encoding and generate_interval > 0 < step and (step % generate_interval == 0 or last):
            for text in sample('', seed + step):
                log(f'step {step}/{max_steps} | sample\n' + '\n'.join('    ' + line for line in text.splitlines()))
    snapshot = take_snapshot(snapshot)
    if step and (step > start_step or not top_done) and (save_every > 0 and step % save_every == 0 or step in permanent or last):
        save(checkpoint_path_of(step))
    if last:
        break

    # -- one update
    started = time.perf_counter()
    lr = get_lr(step)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = lr
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(accumulation):
        poll()
        x, y = (t.to(device, non_blocking=True) for t in next(batches))
        net.require_backward_grad_sync = micro_step == accumulation - 1  # before the forward: DDP reads it there
        with autocast:
            loss = net(x, y, 'sum') / total_batch_size  # over the global count: every token weighs the same
        scaler.scale(loss * world_size if data_parallel else loss).backward()  # DDP divides by world_size
        loss_sum += loss.detach()
        if log_level == 'DEBUG':
            print0(f'step {step + 1} micro-step {micro_step + 1}/{accumulation} | loss {loss.item() * total_batch_size / y.numel():.6f} '
                   f'| {1000 * (time.perf_counter() - started):.0f}ms')
    if model_parallel:
        sum_gradients(parameters, mesh['data'])
    for o in optimizers:
        scaler.unscale_(o)
    reporting = (step + 1) % log_interval == 0 or step == 0 or step + 1 == max_steps
    norms = norms_by_part({name: p.grad for name, p in raw_model.named_parameters()}) if log_gradients and reporting else ''  # before clipping
    norm = total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, clip if clip > 0 else math.inf, norm, foreach=False if model_parallel else None)
    found = torch.stack((loss_sum / model_ranks, norm / world_size))  # one tensor, one host read; NaN or infinity on any rank survives the sum
    if ddp:
        dist.all_reduce(found)
    step_loss, step_norm = found.tolist()
    overflow = scaler.is_enabled() and not math.isfinite(step_norm) and scaler.get_scale() > 1  # the scaler skips it and scales less
    fail_if(not math.isfinite(step_loss) or not math.isfinite(step_norm) and not overflow, f'step {step + 1}: loss {step_loss}, gradient norm {step_norm}; '
            'stopped before the update, no checkpoint holds it (try a lower max_lr or more warmup_steps)', 1)
    for o in optimizers:
        if not overflow:  # the scaler itself would skip only those that saw it
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()

    # -- reporting only
    dt = time.perf_counter() - started
    seconds, timed_steps = seconds + dt, timed_steps + 1
    progress.update(loss_sum=progress['loss_sum'] + step_loss, loss_count=progress['loss_count'] + 1, seconds=progress['seconds'] + dt)
    if reporting:
        dt, mean_loss = seconds / timed_steps, progress['loss_sum'] / progress['loss_count']
        mfu = f'{100 * flops_per_step / dt / world_size / peak_flops:.1f}%' if peak_flops else '-'
        minutes = int(dt * (max_steps - step - 1) / 60)
        log(f'step {step + 1}/{max_steps} ({100 * (step + 1) / max_steps:.2f}%) | loss {mean_loss:.6f} | lr {lr:.2e} | norm {step_norm:.2f} | '
            f'dt {1000 * dt:.0f}ms | tok/s {total_batch_size / dt:,.0f} | mfu {mfu} | eta {minutes // 60}h{minutes % 60:02d}m{norms}')
        wandb_run.log({'train/loss': mean_loss, 'lr': lr, 'norm': step_norm, 'tok/s': total_batch_size / dt}, step=step + 1)
        seconds, timed_steps = 0.0, 0
        progress.update(loss_sum=0.0, loss_count=0)

# ---- finish --------------------------------------------------------------------------------------------------------
log(f'done: best val loss {progress["best_val_loss"]:.4f} at step {progress["best_step"]}, {"" if max_steps else "no "}checkpoints in {run_dir}, '
    f'trained for {progress["seconds"] / 60:.1f} min', prefix='# ')
poll()
wandb_run.finish()
leave(0)
