"""Column addition with a Tiny Recursive Model: from a checkpoint of other puzzles, or of shorter sums, or from nothing; then ask it a sum and watch it carry.

What to expect: README.md has the measured table (digits, hardware, exact sums, time).

Laptop CPU, no download (sums of 2 digits, two minutes):
    python prepare/addition.py --max_digits=2 --output_dir=data/addition2
    python finetune_addition.py --preset=tiny --data_path=data/addition2 --run_name=two_digits
    python finetune_addition.py --run_name=two_digits --ask="57+86"
One GPU, from a checkpoint of ARC, guide 000's progressive recipe (data: python prepare/addition.py):
    python finetune_addition.py --base_checkpoint=checkpoints/Arc1concept-aug-1000-ACT-torch/my_run/step_303191 --run_name=heads --freeze_weights \
        --total_steps=3000 --eval_interval=1500 --puzzle_emb_lr=1e-2 --copy_loss_weight=0
    python finetune_addition.py --base_checkpoint=checkpoints/AdditionFinetune/heads/step_3000 --run_name=full --total_steps=25000 --eval_interval=5000
Four GPUs:
    torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 finetune_addition.py --run_name=four --global_batch_size=256
Two nodes (on the second one --node_rank=1; both must see checkpoints/):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 finetune_addition.py --run_name=x
Interrupted, by whatever and at whatever moment:
    python finetune_addition.py --auto_resume            (the newest run; or name it: --run_name=x)
"""
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from configurator_old import configure, fail, fail_if, master, nearby, print0
from model import PEAK_FLOPS, git_commit, load_optimizer_state, norms_by_part, optimizer_state, sum_alike, total_norm
from model import NO_WANDB, agree, ahead, append, cannot_write, cpu_group, differ, everyone, find_device, first_readable, generator_states, on_all_ranks, on_cpu
from model import open_log, rotate, run_checkpoints, same_data, seed_generators, set_generator_states, start_wandb, watch_signals, write_together, write_whole
from trm import IGNORE, METRICS, SHAPE, AdamATan2, all_config, average_of, begin_with, check_progress, deal_carries, examples_of_epoch, gradients_by_name
from trm import least_steps, load_trm, log_means, move_average, new_trm, of_all_ranks, open_both, puzzle_tensors, room_for, run_folder, sign_sgd, slots_of
from trm import sums_found, sums_lines, thinking_aloud, trm_checkpoint

# ---- settings ------------------------------------------------------------------------------------------------------
# i/o
project_name = 'AdditionFinetune'  # folder in checkpoints/, and the project in wandb
run_name = ''                    # folder in checkpoints/{project_name}/; '' = date and time, for --auto_resume, --eval_only and --ask the newest
log_dir = ''                     # folder of this run: checkpoints, log.txt, config.py; '' = checkpoints/{project_name}/{run_name}
save_config = True               # write config.py, the settings file that repeats this run
# data
data_path = 'data/addition'      # folder of prepare/addition.py
columns = 0                      # of the grid; 0 = found in the data; --ask takes longer sums with more of them, from a model with rope
trace = False                    # a digit at a time: the model is fed its own answers until they stay; found in the data (prepare/addition.py --trace)
num_workers = 2                  # batches that a background thread prepares ahead; 0 = none
global_batch_size = 64           # puzzles at work at the same time (slots), over all ranks
grad_accumulation_steps = 1      # slices of the slots that go one after another, over all ranks: more ranks take fewer each; 0 = 1
# model
preset = 'trm'                   # trm | tiny; tiny fills in a small model and what goes with it, for a laptop
base_checkpoint = ''             # begin with the weights of this checkpoint, ours (its EMA) or the public code's, of whatever puzzles; '' = random ones
hidden_size = 512                # width
num_heads = 8                    # attention heads, must divide hidden_size
expansion = 4.0                  # of the SwiGLU
multiple_of = 256                # its width is rounded up to a multiple of this
L_layers = 0                     # blocks of the one network; 0 = as in base_checkpoint, else 2
H_cycles = 0                     # times that the answer is improved in a supervision step, the last one with gradients; 0 = as in base_checkpoint, else 3
L_cycles = 0                     # times that the reasoning is, before each of them; 0 = as in base_checkpoint, else 6
mlp_t = False                    # an MLP over the cells in place of attention: better on small grids of one size
pos_encodings = 'rope'           # rope | learned | none
puzzle_emb_ndim = -1             # numbers of a puzzle's own vector; 0 = none; -1 = hidden_size
puzzle_emb_len = 16              # positions in front of the cells that it takes; 0 = as many as it needs
halt_max_steps = 16              # supervision steps of a puzzle, at most
halt_exploration_prob = 0.1      # share of the slots that may not halt before a random step; 0 = none
halt_threshold = 0.5             # how sure a model must be of its answer to halt, in evaluation and --ask; training takes 0.5
# optimization
lr = 5e-5                        # peak learning rate
min_lr_ratio = 1.0               # final learning rate / lr, 0 = nothing; 1 = constant; 0.1 is better for short runs
lr_warmup_steps = 100            # steps of linear warmup; 0 = none
epochs = 0                       # times that every problem is offered; 0 = total_steps says how long
total_steps = 100000             # optimizer steps in all; 0 = only the evaluation of the start
decay_lr = True                  # False = constant after the warmup
lr_scheduler = 'cosine'          # cosine | cosine_with_restarts | constant
lr_restarts = 3                  # restarts of cosine_with_restarts, 3 = four equal cycles; 0 = none
weight_decay = 0.1               # on everything but the puzzles' vectors; 0 = none
beta1 = 0.9                      # AdamATan2; 0 = off
beta2 = 0.95                     # AdamATan2; 0 = off
puzzle_emb_lr = 1e-3             # peak learning rate of the puzzle's vector (SignSGD); 0 = it stays
puzzle_emb_weight_decay = 0.1    # of the puzzle's vector; 0 = none
grad_clip = 0.0                  # largest gradient norm; 0 = no clipping: AdamATan2 does not see a gradient's scale
ema = True                       # evaluate an exponential moving average of the weights
ema_rate = 0.999                 # its memory: 1 / (1 - ema_rate) steps
copy_loss_weight = 1.0           # of the two rows of the question, which the answer repeats; 0 = they are neither learned nor judged
carry_loss_weight = 1.0          # of the row of the carries; 0 = the same
sum_loss_weight = 1.0            # of the row of the sum
freeze_weights = False           # learn the puzzle's vector, embeddings and heads alone: what another vocabulary needs first
freeze_heads = False             # with freeze_weights: the puzzle's vector alone
# evaluation
eval_interval = 0                # steps between evaluations, or epochs if epochs says how long; 0 = about 20 evaluations in all; -1 = only at the end
eval_examples = 0                # test problems of an evaluation while training, evenly spread; 0 = all; the last one takes all
max_eval_batches = 0             # the same in batches of global_batch_size; 0 = all
eval_only = False                # print the accuracy of a checkpoint on all test problems, or eval_examples typed with it; write eval.json, exit
ask = ''                         # sums like "957+86, 7+5": show the grid after every step of a checkpoint's work on them, exit
# checkpoint
checkpoint_every_eval = True     # save after every evaluation
checkpoint_interval = -1         # steps between checkpoints besides; -1 = none, but always at the end
keep_last_n_checkpoints = 0      # newest checkpoints to keep; 0 = all
permanent_checkpoints = []       # steps that are saved and kept whatever the two above say
auto_resume = False              # continue from the newest readable checkpoint in the run's folder, if there is one
resume = False                   # continue from checkpoint_path; without one the same as auto_resume
checkpoint_path = ''             # a checkpoint for --resume, --eval_only or --ask
# logging
log_interval = 10                # steps between log lines
log_level = 'INFO'               # INFO | DEBUG; DEBUG adds loss and time of every micro-step
log_gradients = False            # add the gradient norm of every part of the model to the log lines
wandb_log = False                # log to Weights & Biases too
# system
device = ''                      # cpu, cuda, cuda:1, mps; '' = cuda, then mps, then cpu
dtype = 'float32'                # float32 | bfloat16; of activations, weights stay float32; bfloat16 is 8 times slower on a CPU without it
compile = False                  # torch.compile; DISABLE_COMPILE=1 in the environment switches it off
deterministic = False            # deterministic kernels on the GPU (the CPU's are)
seed = 0                         # of weights, data order and exploration; 0 = a seed like any other

# ---- command line --------------------------------------------------------------------------------------------------
config = configure(globals(), aliases={'max_lr': 'lr', 'learning_rate': 'lr', 'warmup_steps': 'lr_warmup_steps', 'lr_min_ratio': 'min_lr_ratio',
                                       'max_grad_norm': 'grad_clip', 'save_steps': 'checkpoint_interval', 'load_checkpoint': 'base_checkpoint',
                                       'max_steps': 'total_steps', 'data_paths': 'data_path', 'forward_dtype': 'dtype', 'wandb_project': 'project_name'})

# ---- run folder ----------------------------------------------------------------------------------------------------
typed_now = set(config.given)  # a resume adds what was typed when the run began
project_dir = os.path.join('checkpoints', project_name)
run_dir = run_folder(config, project_dir, auto_resume or resume or eval_only or ask)
run_dir_typed, log_name = bool({'log_dir', 'run_name', 'project_name'} & typed_now), 'log.txt'
read_only = eval_only or bool(ask)       # these modes read a checkpoint and start no run
lenient = False                          # True: a typed checkpoint that cannot be read is a warning, not the end

def checkpoint_path_of(step):
    return os.path.join(run_dir, f'step_{step}')

def newest_first():
    return run_checkpoints(checkpoint_path_of)

def checkpoint_of(path):  # one dict, whatever the files; ValueError if it is damaged
    return trm_checkpoint(path, 'data_paths')  # pretrain_trm.py's are weights here

if 'base_checkpoint' in config.typed_here and base_checkpoint:
    fail_if(checkpoint_path, '--base_checkpoint and --checkpoint_path name two beginnings: give one')
    if read_only:  # in a run's config.py it says where that run began
        config.assign('checkpoint_path', base_checkpoint)
fail_if(eval_only and ask, '--eval_only and --ask: one at a time')
sums_asked = [re.fullmatch(r'\s*0*(\d+)\s*\+\s*0*(\d+)\s*', text, re.ASCII) for text in ask.split(',')] if ask else []
fail_if(None in sums_asked, f'--ask={ask!r}: expected a sum like 957+86, or several with commas between them')

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
config.given -= {name for name in ('L_layers', 'H_cycles', 'L_cycles', 'columns') if not config[name]}
checkpoint, checkpoint_file = begin_with('base_checkpoint', config, checkpoint, checkpoint_file)
config.fill({
    'tiny': dict(hidden_size=64, num_heads=4, multiple_of=32, L_layers=1, H_cycles=2, L_cycles=2, mlp_t=True, pos_encodings='none', puzzle_emb_len=1,
                 halt_max_steps=6, halt_threshold=0.9, lr=1e-2, puzzle_emb_lr=1e-2, min_lr_ratio=0.1, total_steps=600, ema_rate=0.99, log_interval=50),
    'trm': {},
}[preset])
for name, usual in (('L_layers', 2), ('H_cycles', 3), ('L_cycles', 6)):
    config.assign(name, config[name] or usual)
vector_size = hidden_size if puzzle_emb_ndim < 0 else puzzle_emb_ndim  # of a puzzle's own vector
save_every, keep, permanent = checkpoint_interval, keep_last_n_checkpoints, permanent_checkpoints
peak_lr, floor_lr, warmup, clip = lr, min_lr_ratio * lr, lr_warmup_steps, grad_clip
schedule, cycles = lr_scheduler if decay_lr else 'constant', lr_restarts + 1
wandb_project = project_name
shape = (*SHAPE, 'global_batch_size', 'freeze_weights', 'freeze_heads')  # settings that a resumed model cannot change
data_parallel = True  # False: the script sums the gradients itself, without DistributedDataParallel

def rank_state():  # what each rank alone knows beside its generators
    return dict(carry=carries)

own_progress = dict(sums=[0.0] * len(METRICS), best_exact=-1.0)  # of the slots since the last log line; of step_best
fail_if(max(beta1, beta2, ema_rate, halt_threshold) >= 1, f'beta1 {beta1}, beta2 {beta2}, ema_rate {ema_rate}, halt_threshold {halt_threshold} must be below 1')
fail_if(min(lr, halt_threshold) <= 0, 'lr and halt_threshold must be more than 0')
sure = math.log(halt_threshold / (1 - halt_threshold))  # of q_halt, a logit
fail_if(any(type(s) is not int for s in permanent), f'permanent_checkpoints {permanent} must be whole numbers')
fail_if(sum_loss_weight <= 0, f'--sum_loss_weight={sum_loss_weight}: without the sum there is nothing to learn')
fail_if(epochs and {'epochs', 'total_steps'} <= config.typed_here, '--epochs and --total_steps are two lengths: give one')
if 'total_steps' in config.typed_here or 'total_steps' in typed_now and 'epochs' not in typed_now:
    config.assign('epochs', 0)  # a stored one
fail_if(freeze_heads and not (freeze_weights and vector_size and puzzle_emb_lr), '--freeze_heads needs --freeze_weights, puzzle_emb_ndim, puzzle_emb_lr')

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
# A slot is a place in the global batch; it keeps its problem until it halts, then takes the next that is offered to it. Each step offers every
# slot one: an epoch is a list of examples, as many as groups x mean examples of a puzzle (see examples_of_epoch). The lists follow one another, and step
# k offers the k-th slice of global_batch_size: the order depends on seed and step alone, not on the number of ranks.
run_dir = everyone(run_dir)[0]  # a name that the clock gave is rank 0's
config.assign('log_dir', run_dir)
train_data = test_data = None
if ask:
    data = on_all_ranks(room_for, sums_asked, columns, checkpoint_file)
else:
    train_data, test_data = on_all_ranks(open_both, data_path, config, read_only, hint=f'; to make data: `python prepare/addition.py --output_dir={data_path}`')
    data = train_data or test_data
    fail_if(differ([part and part.facts for part in (train_data, test_data)]), f'the ranks see different sums: {data_path} must be the same on all nodes')
accumulation, B = slots_of(global_batch_size, grad_accumulation_steps, world_size)  # micro-steps per step, slots of one of them on a rank
max_steps = max(total_steps, checkpoint.get('step', 0)) if read_only else total_steps
if train_data:
    groups = len(train_data.group_indices) - 1
    epoch_size = max(1, int(groups * train_data.examples / len(train_data.identifiers)))  # examples
    steps_per_epoch = epoch_size / global_batch_size
    if epochs:
        max_steps = max(1, epochs * epoch_size // global_batch_size)
    eval_every = max(1, round(eval_interval * steps_per_epoch) if epochs else eval_interval) if eval_interval else max(1, -(-max_steps // 20))
    eval_every = eval_every if eval_interval >= 0 and eval_every <= max_steps else -1

@lru_cache(maxsize=2)
def epoch_examples(epoch):
    return examples_of_epoch(train_data, seed, epoch, epoch_size)

def loader_state(step):
    """Where the data of this step begins, and in which data."""
    epoch, row = divmod(step * global_batch_size, epoch_size)
    return dict(seed=seed, epoch=epoch, row=row, data=train_data.facts)

def batch(step, micro_step):
    """(what is offered to the slots of this rank and micro-step, their least_steps)"""
    begin = (micro_step * world_size + rank) * B
    numbers = range(step * global_batch_size + begin, step * global_batch_size + begin + B)
    tensors = puzzle_tensors(train_data, [epoch_examples(i // epoch_size)[i % epoch_size] for i in numbers])
    tensors['least'] = torch.from_numpy(least_steps(seed, step, global_batch_size, halt_exploration_prob, halt_max_steps)[begin:begin + B])
    return {name: t.pin_memory() for name, t in tensors.items()} if device_type == 'cuda' else tensors

def on_device(tensors):
    tensors = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
    return dict(tensors, labels=tensors['labels'].to(torch.int32).masked_fill(tensors['labels'] == 0, IGNORE))

# ---- model ---------------------------------------------------------------------------------------------------------
raw_model = new_trm(data, config, vector_size, device)
weights = [copy_loss_weight, copy_loss_weight, carry_loss_weight, sum_loss_weight]
if len(set(weights)) > 1:
    raw_model.cell_weights = torch.tensor(weights, device=device).repeat_interleave(data.seq_len // 4)
judge = average_of(raw_model) if ema else raw_model  # what is evaluated
for name, p in raw_model.named_parameters():
    p.requires_grad_(not freeze_weights or not freeze_heads and not name.startswith('L_level.'))
DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(raw_model, [name for name, _ in raw_model.named_buffers()])  # equal on all ranks as it is
carries = [raw_model.empty_carry(B) for _ in range(accumulation)]  # of this rank, one for each micro-step

# ---- optimizer -----------------------------------------------------------------------------------------------------
parameters = [p for p in raw_model.parameters() if p.requires_grad]
optimizers = [AdamATan2(parameters, peak_lr, (beta1, beta2), weight_decay)] if parameters else []  # the puzzles' vectors: sign_sgd, which has no state

def state_files(run):
    """{file name: content} of a checkpoint, '' for a single file. run: the part that all scripts share (see save)."""
    average = {name: p.detach() for name, p in judge.named_parameters()} if ema else {}
    return {'': dict(run, model=raw_model.state_dict(), ema=average, optimizer=optimizer_state(raw_model, optimizers), scaler=scaler.state_dict(),
                     train_loader_state=loader_state(run['step']))}

def load_weights(checkpoint):
    for change in load_trm(checkpoint, raw_model, judge, fit='step' not in checkpoint or read_only):
        print0(f'{checkpoint_file}: {change}')

def load_training(checkpoint):
    """Everything else that state_files stored; ValueError if it does not belong to this data."""
    global carries
    load_optimizer_state(raw_model, optimizers, checkpoint['optimizer'])  # the present decay and betas stay
    check_progress(checkpoint, halt_threshold)
    same_data(checkpoint['train_loader_state'], loader_state(0), ('data',), data_path)
    carries = deal_carries(checkpoint['ranks'], carries, rank, world_size, data)

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
if compile and judge is not raw_model:
    judge.compile()

typed = {'eval_examples', 'max_eval_batches'} & config.typed_here
cap = typed != {'max_eval_batches'} and eval_examples or max_eval_batches * global_batch_size  # examples; 0 = all

def at_work(rows):
    """Let the model answer these questions. Yields (turn, step, outputs, cells (B, S) that it would answer now, which halt here (B,)) after each supervision
    step. A model of --trace fills in one digit a turn, and its answer is the next question; others have one turn."""
    question = cells = answer = rows['inputs']
    vectors = judge.puzzle_emb.rows(rows['puzzle_identifiers']) if vector_size else None
    for turn in range(columns + 1 if trace else 1):
        rows = dict(rows, inputs=torch.cat((question[:, :2 * columns], answer[:, 2 * columns:]), 1))
        carry, going = judge.refill(judge.initial_carry(rows), rows), torch.ones(len(question), dtype=torch.bool, device=device)
        for s in range(halt_max_steps):
            carry, outputs = judge(carry, vectors)
            cells = outputs['logits'].argmax(-1).to(question.dtype)
            halts = going & (outputs['q_halt_logits'] > sure) if s < halt_max_steps - 1 else going
            yield turn, s, outputs, cells, halts
            answer, going = torch.where(halts.unsqueeze(1), cells, answer), going & ~halts

@torch.no_grad()
def evaluate(limit=0):
    """Accuracy on the test problems, or so many of them evenly spread, split over the ranks: after every supervision step (every turn, of a model of --trace),
    and at the first where the model would halt. A dict of plain numbers; val_loss is the loss at the halt, in nats per cell; exact is a whole sum."""
    W, count, stages = columns, test_data.examples, columns + 1 if trace else halt_max_steps
    chosen = np.arange(count) if not 0 < limit < count else np.linspace(0, count - 1, limit).astype(int)
    exactly = torch.float32 if device_type == 'mps' else torch.float64
    sums = torch.zeros(stages + 1, 4, dtype=exactly, device=device)  # loss, share of right cells, grid, sum; after each stage, then at the halt
    steps, answers = torch.zeros((), device=device), []
    for begin in range(rank * B, len(chosen) + rank * B, B * world_size):  # as many on every rank
        numbers = np.arange(begin, begin + B)  # always a full batch, one shape for torch.compile: what is too much counts nothing
        here = numbers < len(chosen)
        real = torch.from_numpy(here).to(device)
        rows = on_device(puzzle_tensors(test_data, chosen[np.minimum(numbers, len(chosen) - 1)]))
        scores, answer = torch.zeros(B, 4, dtype=exactly, device=device), rows['inputs']
        for turn, s, outputs, cells, halts in at_work(rows):
            poll()
            right = ((cells == rows['labels']) | (rows['labels'] == IGNORE))[:, 3 * W:].all(1)
            now = torch.cat((outputs['scores'].to(exactly), right.unsqueeze(1)), 1)
            sums[turn if trace else s] += (now * (halts & real if trace else real).unsqueeze(1)).sum(0)
            scores, answer = torch.where(halts.unsqueeze(1), now, scores), torch.where(halts.unsqueeze(1), cells, answer)
            steps = steps + (s + 1) * (halts & real).sum()
        sums[-1] += (scores * real.unsqueeze(1)).sum(0)
        answers.append((chosen[numbers[here]], scores.cpu().numpy()[here, 3], answer.cpu().numpy()[here, 3 * W:]))
    found = everyone((sums.cpu(), steps.item(), answers))
    sums, steps = sum(f[0] for f in found) / len(chosen), sum(f[1] for f in found) / len(chosen)
    numbers, right, rows = (np.concatenate(part) for part in zip(*(a for f in found for a in f[2]), strict=True))
    return dict(val_loss=sums[-1, 0].item(), cell_accuracy=sums[-1, 1].item(), grid_accuracy=sums[-1, 2].item(), exact_accuracy=sums[-1, 3].item(),
                halting_steps=steps, exact_accuracy_by_step=sums[:-1, 3].tolist(), examples=len(chosen), **sums_found(test_data, numbers, right, rows))

def say(step, report, whole=False):
    for line in sums_lines(report, 'turn' if trace else 'step', whole):
        log(f'step {step}/{max_steps} | {line}')

if ask:
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
    with torch.no_grad():
        for match in sums_asked:
            for line in thinking_aloud(*match.groups(), columns, trace, at_work, device):
                print0(line)
    leave(0)
if read_only:
    step, report = checkpoint.get('step', 0), evaluate(cap if typed else 0)
    say(step, report, whole=True)
    folder = run_dir if run_dir_typed and 'base_checkpoint' in config.typed_here else os.path.dirname(os.path.normpath(checkpoint_file))
    errors = [answer for answer in report.pop('answers') if not answer.pop('right')]
    write_together(os.path.join(folder, 'eval.json'), {'': dict(report, step=step, checkpoint=checkpoint_file, data_path=data_path, errors=errors)})
    print0(f'wrote {os.path.join(folder, "eval.json")} with {len(errors):,} wrong answers')
    leave(0)

# ---- training loop -------------------------------------------------------------------------------------------------
if save_config:
    write_together(os.path.join(run_dir, 'all_config.yaml'), {'': all_config(config, vector_size, run_dir)})
log('settings given: ' + ' '.join(f'{name}={value!r}' for name, value in config.typed().items()), prefix='# ', show=False)
table_size = raw_model.puzzle_emb.weights.numel() if vector_size else 0
for line in (
    f'{sum(p.numel() for p in raw_model.parameters()):,} parameters in {L_layers} {"mlp_t" if mlp_t else "attention"} layer(s) of width {hidden_size}, '
    f'and {table_size:,} numbers in the vectors of {data.num_puzzle_identifiers:,} puzzles; {sum(p.numel() for p in parameters):,} of the parameters learn',
    f'{H_cycles} x ({L_cycles} + 1) applications in a supervision step, at most {halt_max_steps} such steps a puzzle',
    f'{global_batch_size} slots = {B} x {accumulation} micro-step(s) x {world_size} rank(s)',
    f'{train_data.examples:,} training examples' + ', a digit each,' * trace + f' of {groups:,} problems in {columns} columns; an epoch is {epoch_size:,} '
    f'of them, {steps_per_epoch:.2f} steps: {max_steps:,} steps, evaluated every {eval_every} (-1: at the end)',
    f'{test_data.examples:,} test problems' if test_data else 'no test problems: nothing is evaluated',
    f'device {device} ({device_name}), dtype {dtype}, compile {compile}, torch {torch.__version__}, commit {git_commit()}',
    f'run {run_dir}: ' + (f'resumed from {checkpoint_file} at step {start_step}' if resumed else
                          f'weights from {checkpoint_file}' if checkpoint else f'new, random initialisation, seed {seed}'),
):
    log(line, prefix='# ')
checkpoint = None  # its tensors have been copied
batches = ahead(batch, ((step, micro_step) for step in range(start_step, max_steps) for micro_step in range(accumulation)), num_workers)
seconds, timed_steps = 0.0, 0
for step in range(start_step, max_steps + 1):
    # -- top: what looks at the model after `step` updates; nothing here changes the training
    last = step == max_steps
    snapshot = take_snapshot()
    evaluating = test_data and (eval_every > 0 and step % eval_every == 0 or last)
    if evaluating and (step > start_step or not top_done):
        report = evaluate(0 if last else min(cap or 1000, 1000) if step == 0 else cap)  # of the untrained one a look is enough
        say(step, report, whole=last)
        val_loss = progress['val_loss'] = report['val_loss']
        fail_if(not math.isfinite(val_loss), f'step {step}: validation loss {val_loss}; stopped, no checkpoint holds it (try a lower lr)', 1)
        wandb_run.log({f'val/{name}': value for name, value in report.items() if isinstance(value, float)}, step=step)
        if (report['exact_accuracy'], -report['val_loss']) > (progress['best_exact'], -progress['best_val_loss']):
            progress.update(best_val_loss=report['val_loss'], best_exact=report['exact_accuracy'], best_step=step)
            snapshot['progress'] = dict(progress)
            save(checkpoint_path_of('best'))
    snapshot = take_snapshot(snapshot)
    wanted = save_every > 0 and step % save_every == 0 or evaluating and checkpoint_every_eval or step in permanent or last
    if step and wanted and (step > start_step or not top_done):
        save(checkpoint_path_of(step))
    if last:
        break

    # -- one update: one supervision step of every slot
    started = time.perf_counter()
    scale = get_lr(step) / peak_lr  # of both learning rates
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = peak_lr * scale
    loss_sum, sums, after, used = torch.zeros((), device=device), 0, [], []
    for micro_step in range(accumulation):
        poll()
        rows = on_device(next(batches))
        least = rows.pop('least')
        net.require_backward_grad_sync = micro_step == accumulation - 1  # before the forward: DDP reads it there
        carry = raw_model.refill(carries[micro_step], rows)
        vectors = raw_model.puzzle_emb.rows(carry['puzzle_identifiers']) if vector_size else None
        carry, outputs = net(carry, vectors, least)
        loss = outputs['loss'] / global_batch_size  # over the global count: every slot weighs the same
        (loss * world_size).backward()  # DDP divides by world_size
        loss_sum, sums = loss_sum + loss.detach(), sums + outputs['sums']
        after.append(carry)
        if vector_size:
            used.append((carry['puzzle_identifiers'], vectors.grad / world_size))
        if log_level == 'DEBUG':
            print0(f'step {step + 1} micro-step {micro_step + 1}/{accumulation} | loss {loss.item() * accumulation * world_size:.6f} '
                   f'| {1000 * (time.perf_counter() - started):.0f}ms')
    gradients = [p.grad for p in parameters]
    if vector_size:  # the vectors' gradients, of the slots of all ranks
        used = of_all_ranks([torch.cat(tensors) for tensors in zip(*used, strict=True)])
        gradients.append(used[1])
    reporting = (step + 1) % log_interval == 0 or step == 0 or step + 1 == max_steps
    norms = norms_by_part(gradients_by_name(raw_model, gradients)) if log_gradients and reporting else ''  # before clipping
    norm = total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(parameters, clip if clip > 0 else math.inf, norm)
    found = torch.cat((torch.stack((loss_sum, norm / world_size)), sums.to(loss_sum)))  # one host read; NaN or infinity on any rank survives the sum
    if ddp:
        dist.all_reduce(found)
    step_loss, step_norm, *found = found.tolist()
    fail_if(not math.isfinite(step_loss) or not math.isfinite(step_norm), f'step {step + 1}: loss {step_loss}, gradient norm {step_norm}; '
            'stopped before the update, no checkpoint holds it (try a lower lr or more lr_warmup_steps)', 1)
    if vector_size and puzzle_emb_lr > 0:
        sign_sgd(raw_model.puzzle_emb.weights, *used, puzzle_emb_lr * scale, puzzle_emb_weight_decay)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    if ema:
        move_average(judge, raw_model, ema_rate)
    carries = after

    # -- reporting only
    dt = time.perf_counter() - started
    seconds, timed_steps = seconds + dt, timed_steps + 1
    progress.update(loss_sum=progress['loss_sum'] + step_loss, loss_count=progress['loss_count'] + 1, seconds=progress['seconds'] + dt,
                    sums=[a + b for a, b in zip(progress['sums'], found, strict=True)])
    if reporting:
        dt, mean_loss = seconds / timed_steps, progress['loss_sum'] / progress['loss_count']
        cells, exact, turns = log_means(progress['sums'])
        mfu = f'{100 * raw_model.flops_per_slot() * global_batch_size / dt / world_size / peak_flops:.1f}%' if peak_flops else '-'
        minutes = int(dt * (max_steps - step - 1) / 60)
        log(f'step {step + 1}/{max_steps} ({100 * (step + 1) / max_steps:.2f}%) | loss {mean_loss:.6f} | exact {exact:.4f} | cells {cells:.4f} | '
            f'halts after {turns:.2f} | lr {peak_lr * scale:.2e} | norm {step_norm:.2f} | dt {1000 * dt:.0f}ms | '
            f'samples/s {global_batch_size / dt:,.0f} | mfu {mfu} | eta {minutes // 60}h{minutes % 60:02d}m{norms}')
        wandb_run.log({'train/loss': mean_loss, 'train/exact_accuracy': exact, 'train/accuracy': cells, 'train/steps': turns, 'lr': peak_lr * scale,
                       'norm': step_norm, 'samples/s': global_batch_size / dt}, step=step + 1)
        seconds, timed_steps = 0.0, 0
        progress.update(loss_sum=0.0, loss_count=0, sums=[0.0] * len(METRICS))

# ---- finish --------------------------------------------------------------------------------------------------------
best = f'best val loss {progress["best_val_loss"]:.4f}, exact {max(0, progress["best_exact"]):.4f} at step {progress["best_step"]}, ' if test_data else ''
log(f'done: {best}{"" if max_steps else "no "}checkpoints in {run_dir}, trained for {progress["seconds"] / 60:.1f} min', prefix='# ')
poll()
wandb_run.finish()
leave(0)
