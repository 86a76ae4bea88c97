"""A process reward model on latent thoughts: Qwen3 reads the hidden states in which another copy of it has thought, and learns how likely the answer is right.

What to expect: README.md has the measured table (model, paths, hardware, within-question AUC, best of N beside majority vote, time).

Laptop CPU, no download (a tiny Qwen3 that adds numbers, five minutes):
    python prepare/tiny_qwen.py
    python prepare/latent_prm.py --task=arithmetic --model_path=data/tiny_qwen --max_samples=4000 --max_new_tokens=16 --num_paths=8
    python train_latent_prm.py --preset=tiny
One GPU (16 GB for short latents, see README.md):
    python prepare/latent_prm.py
    python train_latent_prm.py
    python train_latent_prm.py NUM_EPOCHS=5 BATCH_SIZE=4 LEARNING_RATE=2e-5 GRADIENT_ACCUMULATION_STEPS=4 SAVE_STEPS=100 LOGGING_STEPS=10
Four GPUs (the effective batch, batch_size x gradient_accumulation_steps, stays the same):
    torchrun --standalone --nproc_per_node=4 train_latent_prm.py
Two nodes (on the second one --node_rank=1; both must see checkpoints/):
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 train_latent_prm.py --output_dir=checkpoints/x
Interrupted, by whatever and at whatever moment:
    python train_latent_prm.py --auto_resume          (the newest run; or name it: --output_dir=checkpoints/x)
Judge a checkpoint, or let it choose among several paths of a question:
    python train_latent_prm.py --eval_only --checkpoint_path=checkpoints/x/best
    python train_latent_prm.py --ask="What is 17 plus 25?"
"""
import glob
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
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator_old import configure, fail, fail_if, master, nearby, print0
from model import PEAK_FLOPS, QwenLatentPRM, bucketed, by_question, check_paths, choice_lines, compared, find_model, git_commit, load_optimizer_state
from model import make_optimizers, newest_prm_run, open_split, optimizer_state, ordered_pairs, padded_paths, path_tensors, paths_of, prm_checkpoints, prm_files
from model import prm_line, prm_report, prm_step, read_prm, shared_out, steps_on_disk, sum_alike, table_lines, total_norm, training_stats
from model import NO_WANDB, agree, ahead, append, cannot_write, cpu_group, differ, everyone, find_device, first_readable, generator_states, on_all_ranks, on_cpu
from model import open_log, rotate, run_checkpoints, same_data, seed_generators, set_generator_states, start_wandb, watch_signals, write_together, write_whole

# ---- settings ------------------------------------------------------------------------------------------------------
# i/o
output_dir = ''                  # folder of this run: checkpoints, training.log, config.py; '' = checkpoints/qwen_prm_ and the time, to go on the newest
run_name = ''                    # a name for wandb; does not change the folder
save_config = True               # write config.py, the settings file that repeats this run
# data
data_dir = 'prm_data'            # folder of .pt files with paths (see prepare/latent_prm.py)
num_workers = 2                  # batches that a background thread prepares ahead; 0 = none
batch_size = 4                   # paths per micro-batch
gradient_accumulation_steps = 4  # micro-batches per optimizer step, over all ranks: more ranks take fewer each
max_seq_length = 512             # latents of a path that are used, the last ones; 0 = all
use_prm_score = True             # learn the mean over all answers below a path; False = whether its own answer is right
val_size = 0.1                   # share of the questions that is held out, with all its paths; 0 = none; 1 = all, for --eval_only
# model
preset = 'qwen'                  # qwen | tiny; tiny fills in what goes with the model of prepare/tiny_qwen.py, for a laptop
model_path = 'Qwen/Qwen3-0.6B'   # published weights to begin with: a folder, or a name of the Hugging Face hub
pooling_strategy = 'mean'        # mean | last | max; how the latents' hidden states become one
dropout_prob = 0.1               # of the pooled state, probability; 0 = off
question_context = False         # put the question in front of the latents: better, but then predict_scores needs its tokens
grad_checkpoint = False          # compute activations again in the backward pass: less memory, a third more time
# optimization
num_epochs = 5                   # times that every path is seen; unless max_steps says how long
max_steps = -1                   # optimizer steps in all; 0 = only the validation of the start; -1 = from num_epochs
loss = 'bce'                     # bce | mse | rank; cross-entropy on soft scores; squared error; bce and the order of a question's paths
learning_rate = 2e-5             # peak learning rate; 1e-5 to 5e-5 for all parameters of Qwen3-0.6B
min_lr = 0.0                     # final learning rate; 0 = nothing
warmup_ratio = 0.1               # share of the steps with linear warmup; 0 = none
lr_scheduler = 'cosine'          # cosine | cosine_with_restarts | constant
lr_restarts = 3                  # restarts of cosine_with_restarts, 3 = four equal cycles; 0 = none
weight_decay = 0.01              # on matrices, not on norms; 0 = none
beta1 = 0.9                      # AdamW; 0 = off
beta2 = 0.999                    # AdamW; 0 = off
max_grad_norm = 1.0              # largest gradient norm; 0 = no clipping
# evaluation
val_steps = 100                  # steps between validations; -1 = only at the end of each epoch, where there is one in any case
best_metric = 'auto'             # auto | within_auc | auc | best_of_n | val_loss | train_loss; what best/ is best at; auto = the first that is defined
eval_only = False                # print the table of a checkpoint on the held-out questions, write eval.json, exit
ask = ''                         # answer this question: think num_paths times, score the paths, choose, exit
num_paths = 20                   # paths of --ask
# checkpoint
save_steps = 100                 # steps between checkpoints; -1 = none, but always at the end (and epoch_N, best and final)
save_total_limit = 0             # newest checkpoint-N to keep; 0 = all
permanent_checkpoints = []       # steps that are saved and kept whatever the two above say
auto_resume = False              # continue from the newest readable checkpoint in the run's folder, if there is one
resume = False                   # continue from checkpoint_path; without one the same as auto_resume
checkpoint_path = ''             # a checkpoint for --resume, --eval_only or --ask
# logging
logging_steps = 10               # steps between log lines
log_level = 'INFO'               # INFO | DEBUG; DEBUG adds loss and time of every micro-step
wandb_log = False                # log to Weights & Biases too
wandb_project = 'latent_prm'     # its project
# system
device = 'cuda'                  # cpu, cuda, cuda:1, mps; '' = cuda, then mps, then cpu
mixed_precision = True           # on a GPU: bfloat16 by autocast (float16 where it has none), weights stay float32
compile = False                  # torch.compile; DISABLE_COMPILE=1 in the environment switches it off
deterministic = False            # deterministic kernels on the GPU (the CPU's are)
seed = 42                        # of the split, data order and dropout; 0 = a seed like any other

# ---- command line --------------------------------------------------------------------------------------------------
config = configure(globals(), aliases={
    'log_dir': 'output_dir', 'data_root': 'data_dir', 'grad_accumulation_steps': 'gradient_accumulation_steps', 'log_interval': 'logging_steps',
    'max_lr': 'learning_rate', 'lr': 'learning_rate', 'grad_clip': 'max_grad_norm', 'eval_interval': 'val_steps', 'checkpoint_interval': 'save_steps',
    'keep_last_n_checkpoints': 'save_total_limit', 'dropout': 'dropout_prob'})

# ---- run folder ----------------------------------------------------------------------------------------------------
typed_now = set(config.given)  # a resume adds what was typed when the run began

fail_if('ask' in typed_now and not ask.strip(), '--ask: the question is empty')
fail_if(eval_only and ask, '--eval_only and --ask are launches of their own: give one')
read_only = eval_only or ask != ''       # these modes read a checkpoint and start no run
lenient = False                          # True: a typed checkpoint that cannot be read is a warning, not the end
run_dir = output_dir or (newest_prm_run() if not checkpoint_path and (auto_resume or resume or read_only) else '')
run_dir = run_dir or os.path.join('checkpoints', 'qwen_prm_' + time.strftime('%Y%m%d_%H%M%S'))
run_dir_typed, log_name = 'output_dir' in typed_now, 'training.log'

def checkpoint_path_of(step):
    return os.path.join(run_dir, 'best' if step == 'best' else f'checkpoint-{step}')

def newest_first():
    """Those of epochs too: after the checkpoint-N of the same step, for they are never deleted. best/ is the last, for --ask the first."""
    steps = {path: math.inf if ask else -1 for path in run_checkpoints(checkpoint_path_of)} | elsewhere
    steps.update({checkpoint_path_of(step): step for step in steps_on_disk(checkpoint_path_of)})
    return sorted(steps, key=lambda path: (-steps[path], path in elsewhere, os.path.basename(path) != 'final', path))

def checkpoint_of(path):  # one dict, whatever the files; ValueError if it is damaged
    return read_prm(path)

elsewhere = prm_checkpoints(os.path.join(glob.escape(run_dir), '*'), r'epoch_\d+|final')  # {path: step}

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
config.assign('output_dir', run_dir)
config.fill({
    'tiny': dict(model_path='data/tiny_qwen', num_epochs=2, batch_size=64, gradient_accumulation_steps=1, learning_rate=1e-3, dropout_prob=0.0,
                 question_context=True, val_steps=-1),
    'qwen': {},
}[preset])
save_every, keep, permanent = save_steps, save_total_limit, permanent_checkpoints
peak_lr, floor_lr, clip = learning_rate, min_lr, max_grad_norm
schedule, cycles, objective = lr_scheduler, lr_restarts + 1, loss
shape = ('pooling_strategy', 'question_context', 'batch_size', 'gradient_accumulation_steps', 'val_size')  # settings that a resumed run cannot change
data_parallel = True  # False: the script sums the gradients itself, without DistributedDataParallel
rank_state = dict  # returns what each rank alone knows beside its generators: nothing here
# best_score: of best/, the smaller the better. Then what training_stats.json lists, the losses since the epoch began, the last validation.
own_progress = dict(best_score=math.inf, best_loss=math.inf, step_numbers=[], step_losses=[], epoch_losses=[], val_step_numbers=[], val_losses=[],
                    epoch_sum=0.0, epoch_count=0, report={}, table={})
device = device if 'device' in config.given or torch.cuda.is_available() else ''  # nobody asked for cuda: no warning
mixed = mixed_precision and (device or 'cuda').startswith('cuda') and torch.cuda.is_available()
dtype = 'float32' if not mixed else 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
fail_if(max(dropout_prob, beta1, beta2) >= 1, f'dropout_prob {dropout_prob}, beta1 {beta1}, beta2 {beta2} must be below 1')
fail_if(learning_rate <= 0, f'learning_rate {learning_rate} must be more than 0')
fail_if(max(warmup_ratio, val_size) > 1, 'warmup_ratio and val_size are shares, at most 1')
fail_if(val_size == 1 and not read_only, '--val_size=1: without --eval_only some questions must be left to learn from')
fail_if(any(type(s) is not int for s in permanent), f'permanent_checkpoints {permanent} must be whole numbers')
fail_if(best_metric not in ('auto', 'train_loss') and val_size == 0, f'--best_metric={best_metric} needs held-out questions, --val_size is 0')

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
# A part of the questions is held out, with all their paths. An epoch is a list of micro-batches of batch_size paths of like length (see bucketed; for
# --loss=rank by_question), and every gradient_accumulation_steps of them are a step; its last step takes what is left, so that an epoch is every path once.
# The order depends on seed and step alone. The micro-batches are shared out among the ranks; where there are fewer than ranks, their paths are. A loss is
# divided by the count of the whole step, so it does not matter who has how many.
run_dir = everyone(run_dir)[0]  # a name that the clock gave is rank 0's
config.assign('output_dir', run_dir)
if ask:  # needs no data
    train_rows = val_rows = []
else:
    paths, questions, facts, train_rows, val_rows = on_all_ranks(open_split, data_dir, config)
    fail_if(differ((checkpoint_file, facts)), f'the ranks differ: {checkpoint_file or "the checkpoint"} and {data_dir} must be the same on all nodes')
    question_lengths = np.array([len(question['ids']) if question_context else 0 for question in questions])
    full_lengths = np.array([len(latents) for latents in paths['latents']]) + question_lengths[paths['question']]
batches_per_epoch = -(-len(train_rows) // batch_size)
steps_per_epoch = max(1, -(-batches_per_epoch // gradient_accumulation_steps))
if 'num_epochs' in typed_now and 'max_steps' not in typed_now:
    config.assign('max_steps', -1)  # a stored one
max_steps = num_epochs * steps_per_epoch if max_steps < 0 else max_steps  # of this launch alone: the setting stays -1
max_steps = max(max_steps, checkpoint.get('step', 0)) if read_only else max_steps
epochs, warmup = -(-max_steps // steps_per_epoch), math.ceil(warmup_ratio * max_steps)
accumulation = -(-gradient_accumulation_steps // world_size)  # micro-steps per step
cut = gradient_accumulation_steps % world_size > 0 and objective != 'rank'

@lru_cache(maxsize=2)
def micro_batches(epoch):
    """The micro-batches of an epoch, arrays of row numbers."""
    if objective == 'rank':
        return by_question(paths['question'], train_rows, batch_size, seed, epoch)
    return [train_rows[chosen] for chosen in bucketed(full_lengths[train_rows], batch_size, seed, epoch)]

def loader_state(step):
    """Where the data of this step begins, and in which data."""
    epoch, position = divmod(step, steps_per_epoch)
    return dict(seed=seed, epoch=epoch, step_of_epoch=position, max_seq_length=max_seq_length, use_prm_score=use_prm_score, files=facts['files'])

def parts_of(step):
    """The rows of each micro-batch of a step."""
    epoch, position = divmod(step, steps_per_epoch)
    return micro_batches(epoch)[position * gradient_accumulation_steps:(position + 1) * gradient_accumulation_steps]

def micro_steps_of(step):
    """How many micro-steps it takes: an epoch's last step may need fewer than `accumulation`."""
    return accumulation if cut else -(-len(parts_of(step)) // world_size)

def batch(step, micro_step):
    """(inputs of the model, targets (b,), their weights (b,), pairs (m, 2), paths and pairs of the whole step): what this rank sees in this micro-step."""
    parts, part = parts_of(step), micro_step * world_size + rank
    count, pairs_count = sum(map(len, parts)), sum(len(ordered_pairs(paths, rows)) for rows in parts) if objective == 'rank' else 0
    if cut:  # the paths of the step into as many parts as there are ranks and micro-steps
        parts = np.array_split(np.concatenate(parts), accumulation * world_size)
    tensors = path_tensors(paths, parts[part] if part < len(parts) else [], questions if question_context else None, 8 if compile else 1, objective == 'rank')
    return [t.pin_memory() if t is not None and device_type == 'cuda' else t for t in tensors], count, pairs_count

# ---- model ---------------------------------------------------------------------------------------------------------
problem = ''
try:
    model_folder = find_model(model_path)
    raw_model = QwenLatentPRM(model_folder, pooling_strategy, dropout_prob, question_context).to(device, torch.get_default_dtype())
    if not ask:
        check_paths(data_dir, raw_model.config, facts['hidden_size'], full_lengths.max(initial=0), questions if question_context else ())
except (ValueError, OSError) as error:
    problem = f'✗ ERROR: --model_path={model_path}: {error}'
agree(problem)
raw_model.model.grad_checkpoint = grad_checkpoint
DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(raw_model, [name for name, _ in raw_model.named_buffers()])  # equal on all ranks as it is

# ---- optimizer -----------------------------------------------------------------------------------------------------
parameters = [p for p in raw_model.parameters() if p.requires_grad]
optimizers = make_optimizers(raw_model, 'adamw', peak_lr, weight_decay, (beta1, beta2))

def state_files(run):
    """{file name: content} of a checkpoint, '' for a single file. run: the part that all scripts share (see save)."""
    return prm_files(run, raw_model, optimizer_state(raw_model, optimizers), dict(
        lr=get_lr(run['step']), scaler=scaler.state_dict(), train_loader_state=loader_state(run['step'])))

def load_weights(checkpoint):
    raw_model.load_state_dict(checkpoint['model'])

def load_training(checkpoint):
    """Everything else that state_files stored; ValueError if it does not belong to this data."""
    load_optimizer_state(raw_model, optimizers, checkpoint['optimizer'])  # the present decay and betas stay
    if checkpoint['scaler'] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint['scaler'])
    if any(checkpoint['config'].get(name) != config[name] for name in ('best_metric', 'loss')):
        checkpoint['best_score'] = math.inf  # scores of another kind cannot be compared
    there = checkpoint['train_loader_state']
    same_data(there, loader_state(checkpoint['step']), ('seed', 'max_seq_length', 'use_prm_score', 'files'), data_dir)

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
def losses_of(logits, targets):
    """(n,) of each path, in training and validation; --loss=rank adds its pairs in the training loop."""
    return (logits.sigmoid() - targets) ** 2 if objective == 'mse' else F.binary_cross_entropy_with_logits(logits, targets, reduction='none')

@torch.no_grad()
def evaluate(full=False):
    """(report, table) on the held-out questions, plain numbers, NaN where one is not defined. full: with the table of all baselines."""
    def work(turn, chosen):
        inputs = path_tensors(paths, val_rows[chosen], questions if question_context else None, 8 if compile else 1)[:4]
        with autocast:
            return raw_model(*(None if t is None else t.to(device) for t in inputs)).tolist()

    order = np.argsort(full_lengths[val_rows], kind='stable')
    raw_model.eval()
    logits = shared_out([order[i:i + 4 * batch_size] for i in range(0, len(order), 4 * batch_size)], rank, world_size, poll, work)
    raw_model.train()
    logits, held_out = torch.tensor(logits, dtype=torch.float64), paths_of(paths, val_rows)
    scores, losses = logits.sigmoid().numpy(), losses_of(logits, torch.from_numpy(held_out['target']))
    return prm_report(scores, losses, held_out), compared(scores, held_out, paths_of(paths, train_rows), questions, poll) if full else {}

if ask:
    fail_if(ddp, '--ask is for one process, without torchrun')
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
    from prepare import latent_prm as collect
    try:
        prompt, thoughts = collect.think_about(ask, data_dir, num_paths=num_paths, num_rollouts=1, model_path=model_folder, device=device, seed=seed)
    except ValueError as error:
        fail(f'--ask: {error}')
    latents = [path['latents'].flatten(0, 1)[-max_seq_length:] for path in thoughts]  # as in training; -0 = all
    inputs = padded_paths(latents, [torch.tensor(prompt)] * num_paths if question_context else None)
    scores, by_step = raw_model.predict_scores(*inputs).tolist(), raw_model.step_scores(*inputs).tolist()
    print0('\n'.join(choice_lines(scores, by_step, [path['answers'][0][:2] for path in thoughts])))
    leave(0)

if eval_only:
    fail_if(not len(val_rows), '--eval_only: no questions are held out, --val_size is 0 (1 = all)')
    step = checkpoint.get('step', 0)
    there, here = checkpoint.get('train_loader_state', {}), loader_state(step)
    if there and (any(there.get(name) != here[name] for name in ('seed', 'files')) or checkpoint['config'].get('val_size') != val_size):
        print0('WARNING: not the data, the seed and the val_size of the training: some of these questions may have been learned from')
    report, table = evaluate(full=True)
    fail_if(not math.isfinite(report['val_loss']), f'{checkpoint_file}: its scores are not finite', 1)
    log(f'step {step}/{max_steps} | {prm_line(report)}')
    print0('\n'.join(table_lines(table)))
    path = os.path.join(os.path.dirname(os.path.normpath(checkpoint_file)), 'eval.json')
    found = {name: report[name] for name in ('val_loss', 'questions', 'paths')}
    write_together(path, {'': dict(found, step=step, checkpoint=checkpoint_file, data_dir=data_dir, table=table)})
    print0(f'wrote {path}')
    leave(0)

# ---- training loop -------------------------------------------------------------------------------------------------
log('settings given: ' + ' '.join(f'{name}={value!r}' for name, value in config.typed().items()), prefix='# ', show=False)
padded_length = sum(len(rows) * full_lengths[rows].max() for rows in micro_batches(0))
target = paths['target'][train_rows]
total, trained = (sum(p.numel() for p in part) for part in (raw_model.parameters(), parameters))
for line in (
    f'{total:,} parameters, {trained:,} of them trained: {raw_model.config.num_hidden_layers} layers, width {raw_model.config.hidden_size}, '
    f'pooling {pooling_strategy}, ' + ('question and latents' if question_context else 'latents alone'),
    f'{len(train_rows):,} paths to learn from, {len(val_rows):,} held out, of {len(questions):,} questions; {facts["left_out"]:,} without latents or a score; '
    f'scores {target.min():.2f} to {target.max():.2f}, {target.mean():.3f} on average',
    f'{max_steps:,} steps of {gradient_accumulation_steps} x {batch_size} paths, {steps_per_epoch:,} an epoch; '
    f'{1 - full_lengths[train_rows].sum() / padded_length:.0%} of a batch is padding',
    f'device {device} ({device_name}), dtype {dtype}, compile {compile}, {world_size} rank(s), torch {torch.__version__}, commit {git_commit()}',
    f'run {run_dir}: ' + (f'resumed from {checkpoint_file} at step {start_step}' if resumed else
                          f'weights from {checkpoint_file}' if checkpoint else f'weights from {model_folder}, random head, seed {seed}'),
    *([f'WARNING: {len(paths["target"])} paths are few: at least 100, better 1,000'] if len(paths['target']) < 100 else []),
):
    log(line, prefix='# ')
checkpoint = None  # its tensors have been copied
seconds, timed_steps, timed_paths, timed_latents = 0.0, 0, 0, 0
batches = ahead(batch, ((step, micro_step) for step in range(start_step, max_steps) for micro_step in range(micro_steps_of(step))), num_workers)
bar = tqdm(total=0, disable=True)
raw_model.train()
for step in range(start_step, max_steps + 1):
    # -- top: what looks at the model after `step` updates; nothing here changes the training
    last, fresh = step == max_steps, step > start_step or not top_done
    epoch_ended = step > 0 and step % steps_per_epoch == 0
    snapshot = take_snapshot()
    if fresh:
        score, train_loss = math.inf, progress['epoch_sum'] / max(1, progress['epoch_count'])
        if epoch_ended or last and progress['epoch_count']:
            bar.close()
            log(f'[Trainer] Epoch {-(-step // steps_per_epoch)}: loss={train_loss:.4f}')
            progress.update(epoch_losses=[*progress['epoch_losses'], train_loss], best_loss=min(progress['best_loss'], train_loss), epoch_sum=0.0,
                            epoch_count=0)
            if best_metric == 'train_loss' or not len(val_rows):
                score = train_loss
        if len(val_rows) and (val_steps > 0 and step % val_steps == 0 or epoch_ended or last):
            report, table = evaluate(full=last)
            log(f'step {step}/{max_steps} | {prm_line(report)}')
            for line in table_lines(table) if table else ():
                log(line)
            val_loss = report['val_loss']
            fail_if(not math.isfinite(val_loss), f'step {step}: validation loss {val_loss}; stopped, no checkpoint holds it (try a lower learning_rate)', 1)
            wandb_run.log({f'val/{name}': value for name, value in report.items()}, step=step)
            progress.update(val_loss=val_loss, best_val_loss=min(progress['best_val_loss'], val_loss), report=report, table=table,
                            val_step_numbers=[*progress['val_step_numbers'], step], val_losses=[*progress['val_losses'], val_loss])
            metric = ('val_loss' if math.isnan(report['within_auc']) else 'within_auc') if best_metric == 'auto' else best_metric
            if metric != 'train_loss':
                score = val_loss if metric == 'val_loss' else -report[metric]
        if score < progress['best_score']:  # never if it is NaN
            progress.update(best_score=score, best_step=step)
            of_best = ('best_score', 'best_step', 'val_loss', 'best_val_loss', 'report', 'table')
            snapshot['progress'].update({name: progress[name] for name in of_best})  # the rest, sums and lists, a resume finds out again
            save(checkpoint_path_of('best'))
    snapshot = take_snapshot(snapshot)
    wanted = [checkpoint_path_of(step)] if save_every > 0 and step % save_every == 0 or step in permanent or last else []
    wanted += [os.path.join(run_dir, f'epoch_{step // steps_per_epoch}')] if epoch_ended else []
    for path in [*wanted, *([os.path.join(run_dir, 'final')] if last else [])] if step else []:
        if fresh or not everyone(prm_step(path) == step and path not in damaged)[0]:  # a run that was killed between two of them, or was shorter once
            save(path)
            print0(f'[Trainer] Checkpoint saved to: {path}')
    if last:
        break
    if step % steps_per_epoch == 0:
        log(f'Epoch {step // steps_per_epoch + 1}/{epochs}')
    if step % steps_per_epoch == 0 or step == start_step:  # the bar counts micro-batches
        bar = tqdm(total=batches_per_epoch, initial=step % steps_per_epoch * gradient_accumulation_steps, disable=not (master and sys.stdout.isatty()))

    # -- one update
    started = time.perf_counter()
    lr = get_lr(step)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = lr
    loss_sum = torch.zeros((), device=device)
    micro_steps = micro_steps_of(step)
    for micro_step in range(micro_steps):
        poll()
        tensors, count, pairs_count = next(batches)
        latents, mask, tokens, asked, targets, weights, pairs = (None if t is None else t.to(device, non_blocking=True) for t in tensors)
        net.require_backward_grad_sync = micro_step == micro_steps - 1  # before the forward: DDP reads it there
        with autocast:
            logits = net(latents, mask, tokens, asked)
        loss = (losses_of(logits, targets) * weights).sum() / count  # over the count of the whole step: every path weighs the same, and of the pairs every pair
        if pairs_count:
            loss = loss + F.softplus(logits[pairs[:, 1]] - logits[pairs[:, 0]]).sum() / pairs_count
        scaler.scale(loss * world_size).backward()  # DDP divides by world_size
        loss_sum += loss.detach()
        timed_paths, timed_latents = timed_paths + len(latents), timed_latents + latents.size(0) * latents.size(1)
        if log_level == 'DEBUG':
            print0(f'step {step + 1} micro-step {micro_step + 1}/{micro_steps} | loss {loss.item() * count / len(latents):.6f} '
                   f'| {1000 * (time.perf_counter() - started):.0f}ms')
    for o in optimizers:
        scaler.unscale_(o)
    reporting = (step + 1) % logging_steps == 0 or step == 0 or step + 1 == max_steps
    norm = total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, clip if clip > 0 else math.inf, norm)
    found = torch.stack((loss_sum, norm / world_size))  # one tensor, one host read; NaN or infinity on any rank survives the sum
    if ddp:
        dist.all_reduce(found)
    step_loss, step_norm = found.tolist()
    overflow = scaler.is_enabled() and not math.isfinite(step_norm) and scaler.get_scale() > 1  # the scaler skips it and scales less
    fail_if(not math.isfinite(step_loss) or not math.isfinite(step_norm) and not overflow, f'step {step + 1}: loss {step_loss}, gradient norm {step_norm}; '
            'stopped before the update, no checkpoint holds it (try a lower learning_rate or a longer warmup_ratio)', 1)
    for o in optimizers:
        if not overflow:  # the scaler itself would skip only those that saw it
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()

    # -- reporting only
    dt = time.perf_counter() - started
    seconds, timed_steps = seconds + dt, timed_steps + 1
    progress.update(loss_sum=progress['loss_sum'] + step_loss, loss_count=progress['loss_count'] + 1, seconds=progress['seconds'] + dt,
                    epoch_sum=progress['epoch_sum'] + step_loss, epoch_count=progress['epoch_count'] + 1)
    bar.update(len(parts_of(step)))
    bar.set_postfix(loss=f'{step_loss:.4f}', lr=f'{lr:.2e}')
    if reporting:
        dt, mean_loss = seconds / timed_steps, progress['loss_sum'] / progress['loss_count']
        mfu = f'{100 * 6 * trained * timed_latents / seconds / peak_flops:.1f}%' if peak_flops else '-'  # of what is computed, padding too
        minutes = int(dt * (max_steps - step - 1) / 60)
        bar.clear()
        log(f'step {step + 1}/{max_steps} ({100 * (step + 1) / max_steps:.2f}%) | loss {mean_loss:.6f} | lr {lr:.2e} | norm {step_norm:.2f} | '
            f'dt {1000 * dt:.0f}ms | samples/s {timed_paths * world_size / seconds:,.1f} | mfu {mfu} | eta {minutes // 60}h{minutes % 60:02d}m')
        log(f'[Trainer] Step {step + 1}: loss={mean_loss:.4f}, avg_loss={progress["epoch_sum"] / progress["epoch_count"]:.4f}, lr={lr:.2e}')
        wandb_run.log({'train/loss': mean_loss, 'lr': lr, 'norm': step_norm, 'samples/s': timed_paths * world_size / seconds}, step=step + 1)
        progress.update(step_numbers=[*progress['step_numbers'], step + 1], step_losses=[*progress['step_losses'], mean_loss], loss_sum=0.0, loss_count=0)
        seconds, timed_steps, timed_paths, timed_latents = 0.0, 0, 0, 0

# ---- finish --------------------------------------------------------------------------------------------------------
path = os.path.join(run_dir, 'training_stats.json')
write_together(path, {'': training_stats(progress, total_steps=max_steps, num_epochs=epochs, enable_validation=len(val_rows) > 0, best_metric=best_metric,
                                         model_path=model_path, data_dir=data_dir, num_samples=len(train_rows))})
print0(f'wrote {path}')
best = f'best val loss {progress["best_val_loss"]:.4f}, ' if len(val_rows) else ''
best += f'best/ is that of step {progress["best_step"]}, ' if max_steps else 'no '
log(f'done: {best}checkpoints in {run_dir}, trained for {progress["seconds"] / 60:.1f} min', prefix='# ')
poll()
wandb_run.finish()
leave(0)
