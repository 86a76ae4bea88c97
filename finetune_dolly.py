"""Instruction finetuning: a pretrained GPT-2 learns to answer, on databricks-dolly-15k or rows of your own.

What to expect: README.md has the measured table (model, data, hardware, response loss and end rate before and after, time).

Laptop CPU, no download but the 13 MB of Dolly (a model of bytes, which learns the form, not the facts):
    python prepare/pydocs.py && python train_gpt2.py --model=tiny --data_root=data/pydocs --block_size=512 --batch_size=4 --log_dir=logs_bytes
    python prepare/dolly.py --tokenizer=bytes --max_length=512 --output_dir=data/dolly_bytes
    python finetune_dolly.py --data_dir=data/dolly_bytes --max_lr=1e-3 --pretrained_checkpoint=logs_bytes/model_01080.pt
One GPU, from the newest checkpoint in logs/, from OpenAI's weights, or from any folder that transformers reads:
    python prepare/dolly.py
    python finetune_dolly.py --dtype=bfloat16
    python finetune_dolly.py --dtype=bfloat16 --pretrained_checkpoint=gpt2
Four GPUs:
    torchrun --standalone --nproc_per_node=4 finetune_dolly.py --dtype=bfloat16
Two nodes (on the second one --node_rank=1; both must see log_dir):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 finetune_dolly.py --dtype=bfloat16
Interrupted, by whatever and at whatever moment:
    python finetune_dolly.py --auto_resume
Talk to it:
    python finetune_dolly.py --chat
    python finetune_dolly.py --generate="Why is the sky blue?"
"""
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from configurator_old import configure, fail, fail_if, master, nearby, print0
from model import ACTIVATIONS, GPT, GPT_SIZES, PEAK_FLOPS, GPTConfig, answered, before_after, begin_gpt, both_answers, bucketed, check_table, converse
from model import encoding_for_all, export_files, fit_weights, forgetting_shards, git_commit, instruction_prompt, judged_answers, load_optimizer_state
from model import make_optimizers, norms_by_part, open_rows, optimizer_state, overfitting, padded_length, padded_rows, path_of_gpt, printable
from model import read_gpt, shard_rows, shared_out, sum_alike, tokenizer_of, total_norm
from model import NO_WANDB, agree, ahead, append, cannot_write, cpu_group, differ, everyone, find_device, first_readable, generator_states, on_all_ranks, on_cpu
from model import open_log, rotate, run_checkpoints, same_data, seed_generators, set_generator_states, start_wandb, watch_signals, write_together, write_whole

# ---- settings ------------------------------------------------------------------------------------------------------
# i/o
log_dir = 'logs_finetune'        # folder of this run: checkpoints, log.txt, config.py
run_name = ''                    # a name for wandb and the log; does not change the folder
save_config = True               # write config.py, the settings file that repeats this run
# data
data_dir = 'dolly15k'            # folder of rows (see prepare/dolly.py)
num_workers = 2                  # batches that a background thread prepares ahead; 0 = none
batch_size = 16                  # rows per micro-batch
grad_accumulation_steps = 1      # micro-batches per optimizer step, over all ranks: more ranks take fewer each
prompt_loss_weight = 0.0         # weight of the prompt's tokens in the loss, a response's have 1; 0 = responses only
# model
pretrained_checkpoint = 'logs/model_19072.pt'  # or gpt2, gpt2-medium ..., any path (see read_gpt); not typed and not there: the newest logs/model_<number>.pt
model = 'gpt2'                   # tiny | gpt2 | gpt2-medium | gpt2-large | gpt2-xl; the shape, if there is no pretrained checkpoint
block_size = 1024                # longest row, tokens; the checkpoint's, or less
vocab_size = -1                  # ids; -1 = the data's, rounded up to a multiple of 64
n_layer = 12                     # blocks; the checkpoint's, as the three below
n_head = 12                      # attention heads, must divide n_embd
n_embd = 768                     # width
activation = 'gelu_new'          # one of ACTIVATIONS in model.py: gelu_new is GPT-2's tanh approximation, gelu the exact one (nanoGPT's checkpoints)
dropout = 0.0                    # probability; 0 = off
# optimization
optimizer = 'adamw'              # adamw | muon; muon on the matrices of the blocks, AdamW on the rest
max_lr = 6e-5                    # peak learning rate, a tenth of pretraining's
min_lr = -1.0                    # final learning rate, 0 = nothing; -1 = max_lr / 10
warmup_steps = 30                # steps of linear warmup; 0 = none
num_epochs = 1.0                 # times that every row is seen: 0.3, 0.5, 1, 2 or 3; unless max_steps says how long
max_steps = -1                   # optimizer steps in all; 0 = only the evaluation of the start; -1 = from num_epochs
decay_lr = True                  # False = constant after the warmup
lr_scheduler = 'cosine'          # cosine | cosine_with_restarts | constant
lr_restarts = 3                  # restarts of cosine_with_restarts, 3 = four equal cycles; 0 = none
weight_decay = 0.01              # on matrices and embeddings, not on biases and norms; 0 = none
beta1 = 0.9                      # AdamW; 0 = off
beta2 = 0.95                     # AdamW; 0 = off
grad_clip = 1.0                  # largest gradient norm; 0 = no clipping
# evaluation
eval_interval = 100              # steps between evaluations; -1 = only at the start and at the end
eval_answers = 64                # held-out rows that are answered for the table before and after, by each measure; 0 = no table
forgetting_root = 'auto'         # pretraining shards on whose validation part forgetting is measured; auto = the pretrained checkpoint's own; '' = none
forgetting_tokens = 65536        # validation tokens of it; 0 = all
eval_only = False                # print the response loss and the table of a checkpoint, write eval.json, exit
generate_interval = 200          # steps between samples; -1 = none
generate = ''                    # answer this instruction with a checkpoint, exit
context = ''                     # the text that the instruction of --generate is about
chat = False                     # answer what is typed, a line at a time, until an empty one
export = ''                      # write a checkpoint into this folder for transformers, exit
num_samples = 1                  # answers to --generate; fixed prompts answered each time while training
max_new_tokens = 256             # length of an answer, tokens
temperature = 0.8                # of answers; 0 = always the likeliest token
top_k = 200                      # sample among the k likeliest; 0 = all
top_p = 1.0                      # sample among the likeliest that hold this probability; 1 = all
# checkpoint
checkpoint_interval = 200        # steps between checkpoints; -1 = none, but always at the end
keep_last_n_checkpoints = 3      # newest checkpoints to keep; 0 = all
permanent_checkpoints = []       # steps that are saved and kept whatever the two above say
auto_resume = False              # continue from the newest readable checkpoint in log_dir, if there is one
resume = False                   # continue from checkpoint_path; without one the same as auto_resume
checkpoint_path = ''             # a checkpoint for --resume, --eval_only, --generate, --chat or --export
# logging
log_interval = 10                # steps between log lines
log_level = 'INFO'               # INFO | DEBUG; DEBUG adds loss and time of every micro-step
log_gradients = False            # add the gradient norm of every part of the model to the log lines
wandb_log = False                # log to Weights & Biases too
wandb_project = 'finetune_dolly'  # its project
# system
device = ''                      # cpu, cuda, cuda:1, mps; '' = cuda, then mps, then cpu
dtype = 'float32'                # float32 | bfloat16 | float16; the last two by autocast, weights stay float32
compile = False                  # torch.compile; DISABLE_COMPILE=1 in the environment switches it off
deterministic = False            # deterministic kernels on the GPU (the CPU's are)
seed = 1337                      # of data order, dropout, samples and new weights; 0 = a seed like any other

# ---- command line --------------------------------------------------------------------------------------------------
config = configure(globals(), aliases={'lr': 'max_lr', 'learning_rate': 'max_lr', 'max_grad_norm': 'grad_clip', 'save_steps': 'checkpoint_interval',
                                       'data_root': 'data_dir'})

# ---- run folder ----------------------------------------------------------------------------------------------------
typed_now = set(config.given)  # a resume adds what was typed when the run began
run_dir, run_dir_typed, log_name = log_dir, 'log_dir' in typed_now, 'log.txt'
read_only = eval_only or generate != '' or chat or export != ''  # these modes read a checkpoint and start no run
lenient = not read_only                  # True: a typed checkpoint that cannot be read is a warning, not the end

def checkpoint_path_of(step):
    return os.path.join(run_dir, 'model_best.pt' if step == 'best' else f'model_{step:05d}.pt')

def newest_first():
    return run_checkpoints(checkpoint_path_of)

def checkpoint_of(path):  # one dict, whatever the files; ValueError if it is damaged. One of pretraining is weights here
    found = read_gpt(path, whole=True)
    ours = isinstance(found.get('train_loader_state'), dict) and 'micro_batch' in found['train_loader_state']
    return found if ours or 'step' not in found else read_gpt(path)

fail_if(eval_only + (generate != '') + chat + (export != '') > 1, '--eval_only, --generate, --chat and --export are launches of their own: give one')
fail_if('num_epochs' in config.typed_here and 'max_steps' in config.typed_here and max_steps >= 0, '--num_epochs and --max_steps are two lengths: give one')
fail_if(context and not generate, '--context belongs to --generate')
judged = 'pretrained_checkpoint' in config.typed_here and read_only  # a model before it is finetuned; in config.py it says where that run began
if judged:
    fail_if(checkpoint_path, '--pretrained_checkpoint and --checkpoint_path name two models: give one')
    config.assign('checkpoint_path', path_of_gpt('pretrained_checkpoint', pretrained_checkpoint))
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
# The chain goes on: a checkpoint of finetuning (see above), else the pretrained one, else random weights.
checkpoint, checkpoint_file = begin_gpt('pretrained_checkpoint', config, checkpoint, checkpoint_file, strict=False)
if not checkpoint:
    print0('WARNING: RANDOM INITIALISATION: nothing was pretrained, so the answers will be no language (name a model with --pretrained_checkpoint)')
config.fill({name: value for name, value in GPT_SIZES[model].items()})
save_every, keep, permanent = checkpoint_interval, keep_last_n_checkpoints, permanent_checkpoints
peak_lr, floor_lr, warmup, clip = max_lr, min_lr if min_lr >= 0 else max_lr / 10, warmup_steps, grad_clip
schedule, cycles = lr_scheduler if decay_lr else 'constant', lr_restarts + 1
shape = ('block_size', 'n_layer', 'n_head', 'n_embd', 'activation')  # settings that a resumed model cannot change
data_parallel = True  # False: the script sums the gradients itself, without DistributedDataParallel
rank_state = dict  # returns what each rank alone knows beside its generators: nothing here
# The table's first column; the train loss since the last evaluation, and between the two before it (-1: none yet).
own_progress = dict(before={}, answers_before={}, since_sum=0.0, since_count=0, train_loss_before=-1.0)
fail_if(max(dropout, beta1, beta2) >= 1, f'dropout {dropout}, beta1 {beta1}, beta2 {beta2} must be below 1')
fail_if(any(type(s) is not int for s in permanent), f'permanent_checkpoints {permanent} must be whole numbers')
fail_if(activation not in ACTIVATIONS, f'--activation={activation}: must be one of {", ".join(ACTIVATIONS)}')
fail_if(n_embd % n_head, f'n_embd {n_embd} is not a multiple of n_head {n_head}')

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
# An epoch is a list of micro-batches of batch_size rows of like length (see bucketed), all epochs are one list of them, and step k takes
# grad_accumulation_steps of it: the order depends on seed and step alone. They are shared out among the ranks; where there are fewer than
# ranks, their rows are. A loss is divided by the count of the whole step, so it does not matter who has how many.
if generate or chat or export:
    tokenizer, forgetting = tokenizer_of(checkpoint, checkpoint_file), {}
else:
    train_data, val_data, tokenizer, categories = on_all_ranks(open_rows, data_dir, block_size, hint='; to make data: `python prepare/dolly.py`')
    theirs = tokenizer_of(checkpoint, checkpoint_file) if checkpoint and 'tokenizer' in checkpoint else tokenizer
    fail_if(theirs != tokenizer, f'{checkpoint_file} was trained on {theirs["tokenizer"]} tokens, {data_dir} holds {tokenizer["tokenizer"]}: '
            f'python prepare/dolly.py --tokenizer={theirs["tokenizer"]} --output_dir=...')
    train_rows, val_rows = len(train_data['prompt']), len(val_data['prompt'])
    batches_per_epoch = -(-train_rows // batch_size)
    if 'num_epochs' in typed_now and 'max_steps' not in typed_now:
        config.assign('max_steps', -1)  # a stored one
    max_steps = math.ceil(num_epochs * batches_per_epoch / grad_accumulation_steps) if max_steps < 0 else max_steps  # the setting stays -1
    forgetting = on_all_ranks(forgetting_shards, config, checkpoint, tokenizer)  # the validation shards of the pretraining data
    found = (checkpoint_file, *map(config.get, shape), train_data['files'], val_data['files'], *forgetting, *map(len, forgetting.values()))
    fail_if(differ(found), f'the ranks differ: {found[0] or "the checkpoint"}, {data_dir}, {forgetting_root} must be the same on all nodes')
accumulation = -(-grad_accumulation_steps // world_size)  # micro-steps per step
first_step, first_batch = 0, 0  # the micro-batch where a step begins; only a resume with another batch moves them

@lru_cache(maxsize=2)
def micro_batches(epoch):
    return bucketed(train_data['prompt'] + train_data['response'], batch_size, seed, epoch)

def begin_of(step):
    return first_batch + (step - first_step) * grad_accumulation_steps

def loader_state(step):
    """Where the data of this step begins, and in which data."""
    epoch, i = divmod(begin_of(step), batches_per_epoch)
    return dict(seed=seed, epoch=epoch, micro_batch=i, batches_per_epoch=batches_per_epoch, block_size=block_size,
                files={**train_data['files'], **val_data['files']})

def batch(step, micro_step):
    """(inputs (b, T), targets (n,), their places (n,), their factors (n,), weight of the whole step): what this rank sees in this
    micro-step (see padded_rows)."""
    parts = [micro_batches(i // batches_per_epoch)[i % batches_per_epoch] for i in range(begin_of(step), begin_of(step + 1))]
    rows, part = np.concatenate(parts), micro_step * world_size + rank
    if grad_accumulation_steps % world_size:  # cut the rows of the step into as many parts as there are ranks and micro-steps
        parts = np.array_split(rows, accumulation * world_size)
    weight = train_data['response'][rows].sum() + prompt_loss_weight * (train_data['prompt'][rows] - 1).sum()
    tensors = padded_rows(train_data, parts[part], block_size, tokenizer['eot'], prompt_loss_weight)
    return *([t.pin_memory() for t in tensors] if device_type == 'cuda' else tensors), float(weight)

encoding = encoding_for_all(tokenizer['tokenizer'], needed=generate or chat or export)

# ---- model ---------------------------------------------------------------------------------------------------------
fail_if(0 < vocab_size < tokenizer['vocab_size'], f'vocab_size {vocab_size} is smaller than the vocabulary of the data, {tokenizer["vocab_size"]}')
padded_vocab = vocab_size if vocab_size > 0 else -(-tokenizer['vocab_size'] // 64) * 64
raw_model = GPT(GPTConfig(block_size, padded_vocab, n_layer, n_head, n_embd, dropout, activation)).to(device)

# ---- optimizer -----------------------------------------------------------------------------------------------------
parameters = list(raw_model.parameters())
optimizers = make_optimizers(raw_model, optimizer, peak_lr, weight_decay, (beta1, beta2))

def state_files(run):
    """{file name: content} of a checkpoint, '' for a single file. run: the part that all scripts share (see save)."""
    return {'': dict(run, model=raw_model.state_dict(), model_config=asdict(raw_model.config), optimizer=optimizer_state(raw_model, optimizers),
                     scaler=scaler.state_dict(), train_loader_state=loader_state(run['step']), tokenizer=tokenizer)}

def load_weights(checkpoint):
    weights = checkpoint['model']  # without a step they are from elsewhere: the vocabulary may be padded in another way
    raw_model.load_state_dict(weights if 'step' in checkpoint else fit_weights(weights, block_size, padded_vocab, tokenizer['vocab_size']))

def load_training(checkpoint):
    """Everything else that state_files stored; ValueError if it does not belong to this data."""
    global first_step, first_batch, max_steps
    load_optimizer_state(raw_model, optimizers, checkpoint['optimizer'])  # the present decay and betas stay
    if checkpoint['scaler']:  # empty if the run had another dtype
        scaler.load_state_dict(checkpoint['scaler'])
    same_data(there := checkpoint['train_loader_state'], loader_state(0), ('block_size', 'files'), data_dir)
    if not all(type(there[name]) is int and there[name] >= 0 for name in ('epoch', 'micro_batch', 'batches_per_epoch')) or not there['batches_per_epoch']:
        raise ValueError(f'its data position is {there}')
    position = there['micro_batch'] * batches_per_epoch // there['batches_per_epoch']  # another batch_size: the same share of the epoch
    if there['batches_per_epoch'] != batches_per_epoch:
        print0(f'another batch_size: continuing at micro-batch {position} of {batches_per_epoch} of epoch {there["epoch"]}: some rows may come twice or never')
    first_step, first_batch = checkpoint['step'], there['epoch'] * batches_per_epoch + position
    if config['max_steps'] < 0:  # fewer epochs than it has had are refused
        left = math.ceil((num_epochs * batches_per_epoch - first_batch) / grad_accumulation_steps)
        max_steps = first_step + (left if num_epochs < checkpoint['config']['num_epochs'] else max(0, left))
    check_table(checkpoint['before'], checkpoint['answers_before'])

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
PROMPTS = ['Why is the sky blue?', 'Give three tips for staying healthy.', 'Write a short poem about the sea.', 'What is the capital of France?',
           'Classify each as fruit or vegetable: apple, carrot, banana, spinach.', 'Explain what a computer program is to a child.',
           'How do I make a cup of tea?', 'List five animals that live in the forest.']

@torch.no_grad()
def evaluate():
    """Loss in nats per response token, end-of-text among them, over all held-out rows, split over the ranks."""
    raw_model.eval()
    order, losses = np.argsort(val_data['prompt'] + val_data['response'], kind='stable'), []
    for begin in range(rank * batch_size, val_rows + rank * batch_size, batch_size * world_size):  # as many on every rank
        poll()
        x, y, places, _ = (t.to(device) for t in padded_rows(val_data, order[begin:begin + batch_size], block_size, tokenizer['eot']))
        with autocast:
            losses.append(raw_model(x, y, 'sum', places))
    raw_model.train()
    return sum(everyone(torch.stack(losses).cpu().double().sum().item())) / val_data['response'].sum()

@torch.no_grad()
def evaluate_forgetting():
    """Loss in nats per token on the first forgetting_tokens validation tokens of the pretraining data."""
    rows = sum((len(tokens) - 1) // block_size for tokens in forgetting.values())
    rows = min(rows, max(1, forgetting_tokens // block_size)) if forgetting_tokens else rows

    def work(turn, chosen):
        tokens = shard_rows(forgetting, block_size, chosen).to(device)
        with autocast:
            return [raw_model(tokens[:, :-1], tokens[:, 1:], 'sum').item()]

    raw_model.eval()
    losses = shared_out([[row] for row in range(rows)], rank, world_size, poll, work)  # a row at a time, it is as long as a batch of answers
    raw_model.train()
    return sum(losses) / (rows * block_size)

def answers(prompts, seed, temperature, top_k=0, top_p=1.0):
    """[(ids without end-of-text, did it end by itself)] for prompts given as lists of ids: in batches, split over the ranks, the
    same whatever the number of ranks."""
    def work(turn, chosen):
        generator = torch.Generator(device).manual_seed((seed * 1000 + turn) % 2 ** 63)
        with autocast:
            return answered(raw_model, [prompts[i] for i in chosen], max_new_tokens, temperature, top_k, top_p, tokenizer['vocab_size'], tokenizer['eot'],
                            generator)

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return shared_out([order[i:i + 16] for i in range(0, len(order), 16)], rank, world_size, poll, work)

def prompt_ids(instruction, context=''):
    return [tokenizer['eot'], *encoding.encode_ordinary(instruction_prompt(instruction, context))]

def readable(ids):
    return printable(encoding.decode(ids)).strip()

def measure():
    """What the table shows, {name: number}, and the answers to PROMPTS. Its generators are its own."""
    found = {'response loss, nats': progress['val_loss']}
    if forgetting:
        found['pretraining loss, nats'] = evaluate_forgetting()
    if not encoding or not eval_answers:
        return found, []
    found.update(judged_answers(val_data, categories, eval_answers, encoding, lambda prompts, temperature: answers(prompts, seed, temperature)))
    return found, [readable(ids) for ids, _ in answers([prompt_ids(text) for text in PROMPTS], seed, 0.0)]

if read_only:
    step, path, files = checkpoint.get('step', 0), '', {}
    if export:
        path, files = os.path.normpath(export), export_files(raw_model.state_dict(), raw_model.config, tokenizer)
    elif generate:
        print0('\n----\n'.join(readable(ids) for ids, _ in answers([prompt_ids(generate, context)] * num_samples, seed, temperature, top_k, top_p)))
    elif chat:
        fail_if(ddp, '--chat is for one process, without torchrun')
        converse(lambda line, turn: readable(answers([prompt_ids(line)], seed + turn, temperature, top_k, top_p)[0][0]))
    else:
        progress['val_loss'] = evaluate()
        print0(f'step {step}/{max_steps} | val loss {progress["val_loss"]:.4f}')
        found, texts = measure()
        print0('\n'.join(before_after({}, found)))
        path = os.path.join(run_dir if judged else os.path.dirname(os.path.normpath(checkpoint_file)), 'eval.json')
        files = {'': dict(step=step, val_loss=progress['val_loss'], val_rows=val_rows, checkpoint=checkpoint_file, data_dir=data_dir, table=found,
                          answers=dict(zip(PROMPTS, texts, strict=False)))}
    if path:
        write_together(path, files)
        print0(f'wrote {path}')
    leave(0)

# ---- training loop -------------------------------------------------------------------------------------------------
log('settings given: ' + ' '.join(f'{name}={value!r}' for name, value in config.typed().items()), prefix='# ', show=False)
lengths = train_data['prompt'] + train_data['response'] - 1
padded = sum(len(rows) * min(block_size, padded_length(lengths[rows].max())) for rows in micro_batches(0))
for line in (
    f'{sum(p.numel() for p in parameters):,} parameters: {n_layer} layers, {n_head} heads, width {n_embd}, {block_size} positions, {padded_vocab} ids',
    f'{train_rows:,} training rows in {data_dir}, {lengths.sum():,} tokens, {train_data["response"].sum() / lengths.sum():.1%} of them in responses; '
    f'{val_rows:,} held out',
    f'{max_steps} steps of {grad_accumulation_steps} x {batch_size} rows = {max_steps * grad_accumulation_steps / batches_per_epoch:.2f} epochs; '
    f'{1 - lengths.sum() / padded:.0%} of a batch is padding',
    f'device {device} ({device_name}), dtype {dtype}, compile {compile}, {world_size} rank(s), torch {torch.__version__}, commit {git_commit()}',
    f'run {run_name or run_dir}: ' + (f'resumed from {checkpoint_file} at step {start_step}' if resumed else
                                      f'weights from {checkpoint_file}' if checkpoint else f'RANDOM INITIALISATION, seed {seed}'),
    *([f'WARNING: {train_data["left_out"] + val_data["left_out"]:,} rows of more than block_size + 1 = {block_size + 1} tokens are left out: '
       f'prepare/dolly.py --max_length={block_size + 1} shortens contexts'] if train_data['left_out'] + val_data['left_out'] else []),
    *([] if forgetting else ['forgetting is not measured: --forgetting_root names no pretraining shards']),
):
    log(line, prefix='# ')
batches = ahead(batch, ((step, micro_step) for step in range(start_step, max_steps) for micro_step in range(accumulation)), num_workers)
seconds, timed_steps, timed_tokens, flops = 0.0, 0, 0, 0
raw_model.train()
for step in range(start_step, max_steps + 1):
    # -- top: what looks at the model after `step` updates; nothing here changes the training
    last = step == max_steps
    snapshot = take_snapshot()
    if step > start_step or not top_done:
        if eval_interval > 0 and step % eval_interval == 0 or step == 0 or last:
            val_loss = progress['val_loss'] = float(evaluate())
            log(f'step {step}/{max_steps} | val loss {val_loss:.4f}')
            fail_if(not math.isfinite(val_loss), f'step {step}: validation loss {val_loss}; stopped, no checkpoint holds it (try a lower max_lr)', 1)
            wandb_run.log({'val/loss': val_loss}, step=step)
            for warning in overfitting(progress):
                log(warning)
            if step == 0 or last:
                found, texts = measure()
                log('\n'.join(before_after(progress['before'], found)))
                for i, text in enumerate(texts):
                    log(f'step {step}/{max_steps} | answer to: {PROMPTS[i]}\n' + both_answers(progress['answers_before'].get(i, ''), text, step))
                if step == 0:
                    progress.update(before=found, answers_before=dict(enumerate(texts)))
            if val_loss < progress['best_val_loss']:
                progress.update(best_val_loss=val_loss, best_step=step)
                snapshot['progress'].update(val_loss=val_loss, best_val_loss=val_loss, best_step=step)  # the rest a resume finds out again
                save(checkpoint_path_of('best'))
        if encoding and generate_interval > 0 < step and step % generate_interval == 0 and not last:
            samples = answers([prompt_ids(text) for text in PROMPTS[:num_samples]], seed + step, temperature, top_k, top_p)
            for text, (ids, _) in zip(PROMPTS, samples, strict=False):
                log(f'step {step}/{max_steps} | answer to: {text}\n' + '\n'.join('    ' + line for line in readable(ids).splitlines()))
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
        x, y, places, factors, total = (t.to(device, non_blocking=True) if torch.is_tensor(t) else t for t in next(batches))
        net.require_backward_grad_sync = micro_step == accumulation - 1  # before the forward: DDP reads it there
        with autocast:
            loss = net(x, y, 'sum', places, factors) / total  # over the count of the whole step: every response token weighs the same
        scaler.scale(loss * world_size).backward()  # DDP divides by world_size
        loss_sum += loss.detach()
        timed_tokens += len(y)  # those that teach something
        flops += raw_model.flops_per_token(x.size(1)) * x.numel() - 6 * raw_model.transformer.wte.weight.numel() * (x.numel() - len(y))
        if log_level == 'DEBUG':
            print0(f'step {step + 1} micro-step {micro_step + 1}/{accumulation} | loss {loss.item() * total / len(y):.6f} | {len(x)} x {x.size(1)} tokens '
                   f'| {1000 * (time.perf_counter() - started):.0f}ms')
    for o in optimizers:
        scaler.unscale_(o)
    reporting = (step + 1) % log_interval == 0 or step == 0 or step + 1 == max_steps
    norms = norms_by_part({name: p.grad for name, p in raw_model.named_parameters()}) if log_gradients and reporting else ''  # before clipping
    norm = total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, clip if clip > 0 else math.inf, norm)
    found = torch.stack((loss_sum, norm / world_size))  # one tensor, one host read; NaN or infinity on any rank survives the sum
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
    progress.update(loss_sum=progress['loss_sum'] + step_loss, loss_count=progress['loss_count'] + 1, seconds=progress['seconds'] + dt,
                    since_sum=progress['since_sum'] + step_loss, since_count=progress['since_count'] + 1)
    if reporting:
        dt, mean_loss = seconds / timed_steps, progress['loss_sum'] / progress['loss_count']
        mfu = f'{100 * flops / seconds / peak_flops:.1f}%' if peak_flops else '-'
        minutes = int(dt * (max_steps - step - 1) / 60)
        log(f'step {step + 1}/{max_steps} ({100 * (step + 1) / max_steps:.2f}%) | loss {mean_loss:.6f} | lr {lr:.2e} | norm {step_norm:.2f} | '
            f'dt {1000 * dt:.0f}ms | tok/s {timed_tokens * world_size / seconds:,.0f} | mfu {mfu} | eta {minutes // 60}h{minutes % 60:02d}m{norms}')
        wandb_run.log({'train/loss': mean_loss, 'lr': lr, 'norm': step_norm, 'tok/s': timed_tokens * world_size / seconds}, step=step + 1)
        seconds, timed_steps, timed_tokens, flops = 0.0, 0, 0, 0
        progress.update(loss_sum=0.0, loss_count=0)

# ---- finish --------------------------------------------------------------------------------------------------------
log(f'done: best val loss {progress["best_val_loss"]:.4f} at step {progress["best_step"]}, {"" if max_steps else "no "}checkpoints in {run_dir}, '
    f'trained for {progress["seconds"] / 60:.1f} min', prefix='# ')
poll()
wandb_run.finish()
leave(0)
