"""Measures the trainers, by their own log lines: tokens/s, peak memory, share of this machine's matrix-product rate. Not a test.

    python tests/bench.py                                     all five scripts in one table; with the folders below also beside the public code
    python tests/bench.py --cases quickstart head_8 --nanogpt=DIR --build_nanogpt=DIR   beside clones of karpathy/nanoGPT and karpathy/build-nanogpt
    python tests/bench.py --cases head_4 head_8 head_16 head_32
    python tests/bench.py --learning --nanogpt=DIR            the same batches and hyperparameters: loss per step, 3 seeds each
    python tests/bench.py --finetune --nanogpt=DIR            finetune_dolly.py on the rows of --dolly, beside padding random batches, beside nanoGPT
    python tests/bench.py --cases trm_small trm_official --trm=DIR      pretrain_trm.py beside a clone of SamsungSAILMontreal/TinyRecursiveModels
    python tests/bench.py --learning --trm=DIR --data_root=data/sudoku-extreme    the public model on our batches: loss and cells per step, 3 seeds each
    python tests/bench.py --prm                               train_latent_prm.py's step beside transformers' Qwen3Model, on padded random batches
    python tests/bench.py --device=cuda --cases gpt2 --nanogpt=DIR --build_nanogpt=DIR

All contestants of a case are started as users would start them, on the same random tokens, and are stopped by SIGSTOP; then
each in turn is let run for a few steps, round after round (A B C A B C), so that a slow minute of the machine meets all of
them. The step in which one was stopped does not count. build-nanogpt has no command line: its constants are replaced in a copy,
evaluation is left out, and on a CPU the bfloat16 autocast, which is slower there. The public TRM code runs from a copy in which 'cpu' stands for
'cuda', with its optimizer, a CUDA extension, written in torch, and with a wandb that prints a line each step.
"""
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import write_shard

from configurator import configure, fail

# -----------------------------------------------------------------------------
# settings

cases = ['all']               # all; quickstart, head_4, head_8, head_16, head_32 (the head dominates), gpt2 (124M, for a GPU), trm_tiny, trm_small, trm_official
nanogpt = ''                  # folder of a clone of karpathy/nanoGPT
build_nanogpt = ''            # folder of a clone of karpathy/build-nanogpt
previous = ''                 # folder of another checkout of this repository
trm = ''                      # folder of a clone of SamsungSAILMontreal/TinyRecursiveModels
compile = True                # measure everyone compiled, too
rounds = 6                    # turns of each contestant
steps = 0                     # counted steps per turn; 0 = about three seconds' worth
prm = False                   # measure the process reward model instead: paths per second
finetune = False              # measure finetuning instead: response tokens per second
dolly = 'dolly15k'            # a folder of prepare/dolly.py, of GPT-2's tokens
learning = False              # compare losses per step instead, ours with nanoGPT's
learning_steps = 300          # steps of these runs
data_root = 'data/pydocs'     # their data
device = 'cpu'                # cpu | cuda

if __name__ == '__main__':
    configure(globals())

ROOT = Path(__file__).resolve().parents[1]
CASES = {'quickstart': dict(vocab=320, ids=257, n_layer=4, n_head=4, n_embd=128, B=16, T=128),
         **{f'head_{B}': dict(vocab=50304, ids=50257, n_layer=6, n_head=6, n_embd=384, B=B, T=256) for B in (4, 8, 16, 32)},
         'gpt2': dict(vocab=50304, ids=50257, n_layer=12, n_head=12, n_embd=768, B=32, T=1024)}
TRM = {'trm_tiny': dict(hidden_size=64, num_heads=4, L_layers=1, H_cycles=2, L_cycles=2, B=128, cells=16),  # 4 x 4 Sudoku
       'trm_small': dict(hidden_size=64, num_heads=4, L_layers=1, H_cycles=2, L_cycles=2, B=128),  # a laptop's
       'trm_attention': dict(hidden_size=128, num_heads=4, L_layers=2, H_cycles=3, L_cycles=4, B=16, mlp_t=False, pos_encodings='rope'),
       'trm_official': dict(hidden_size=512, num_heads=8, L_layers=2, H_cycles=3, L_cycles=6, B=8)}  # but for the batch, 768

NO_EVALUATION = {'or step == 0 or last:\n            val_loss': ':\n            val_loss'}  # of finetune_dolly.py
RANDOM_BATCHES = {  # of model.py: padded to their longest row, every position meets the head
    'window[np.argsort(lengths[window], kind=\'stable\')]': 'window', 'return -(-length // 16) * 16': 'return int(length)',
    'x = x[places]': 'targets, factors = targets.new_full((len(x),), -1).scatter(0, places, targets), None'}


def replaced(source, changes):
    for old, new in changes.items():
        assert old in source, f'{old!r} is not in it: another version of that repository?'
        source = source.replace(old, new)
    return source


class Contestant:
    """A training script of anyone, paused but for its turns."""

    def __init__(self, name, folder, command, pattern):
        self.name, self.folder, self.pattern, self.ms, self.rates = name, folder, re.compile(pattern), [], []
        env = dict(os.environ, PYTHONUNBUFFERED='1', CUDA_LAUNCH_BLOCKING='0')
        self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True)  # else the kernel continues stopped ones when the launching shell goes
        self.seen = []
        self.lines(4)  # compiled and warm
        self.pause()

    def lines(self, n):
        """The next n step times, ms."""
        found = []
        while len(found) < n:
            line = self.process.stdout.readline()
            self.seen.append(line)
            if not line:
                raise RuntimeError(f'{self.name} ended:\n' + ''.join(self.seen[-30:]))
            if match := self.pattern.search(line):
                found.append(float(match[1]))
                self.rates.append(float(match[2].replace(',', '')) if self.pattern.groups > 1 else 0.0)
        return found

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def turn(self, n):
        self.process.send_signal(signal.SIGCONT)
        self.ms += self.lines(n + 1)[1:]
        self.pause()

    def end(self):
        """Peak resident memory, MB; on a GPU it says nothing."""
        peak = re.search(r'VmHWM:\s*(\d+)', Path(f'/proc/{self.process.pid}/status').read_text())
        self.process.kill()
        self.process.wait()
        return int(peak[1]) / 1024 if peak else math.nan  # it had ended by itself


def contestants(case, folder):
    """{name: (folder, command, pattern of a step's time in ms)}"""
    c, dtype = CASES[case], 'float32' if device == 'cpu' else 'bfloat16'
    tokens = np.random.default_rng(0).integers(c['ids'], size=40 * c['B'] * c['T'] + 1)
    data = folder / 'ours/data'
    data.mkdir(parents=True)
    for i in range(2):
        write_shard(data / f'x_{"train" if i else "val"}_{i:06d}.bin', tokens)
    if c['ids'] == 257:
        (data / 'manifest.json').write_text(json.dumps(dict(tokenizer='bytes', vocab_size=257, eot=256)))
    common = [f'--{name}={c[name]}' for name in ('n_layer', 'n_head', 'n_embd')]
    never, found = 10 ** 8, {}
    for compiled in [False, True] if compile else [False]:
        mark = ' compiled' if compiled else ''
        for name, root in dict(ours=ROOT, previous=previous).items():
            if root:
                found[name + mark] = folder / 'ours', [
                    Path(root, 'train_gpt2.py'), *common, '--data_root=data', f'--log_dir={name}{int(compiled)}', f'--block_size={c["T"]}',
                    f'--vocab_size={c["vocab"]}', f'--batch_size={c["B"]}', '--grad_accumulation_steps=1', '--activation=gelu', '--optimizer=adamw',
                    f'--max_steps={never}', '--eval_interval=-1', '--generate_interval=-1', '--log_interval=1', '--checkpoint_interval=-1',
                    f'--device={device}', f'--dtype={dtype}', f'--compile={compiled}'], r' dt (\d+)ms'
        if nanogpt:
            theirs = folder / f'nanogpt{int(compiled)}'
            (theirs / 'data/bench').mkdir(parents=True)
            for name in ('train.py', 'model.py', 'configurator.py'):
                shutil.copy(Path(nanogpt, name), theirs)
            for name in ('train.bin', 'val.bin'):
                tokens.astype(np.uint16).tofile(theirs / 'data/bench' / name)
            import pickle
            (theirs / 'data/bench/meta.pkl').write_bytes(pickle.dumps({'vocab_size': c['vocab']}))
            found['nanoGPT' + mark] = theirs, [
                'train.py', *common, '--dataset=bench', f'--block_size={c["T"]}', f'--batch_size={c["B"]}', '--gradient_accumulation_steps=1', '--bias=True',
                f'--eval_interval={never}', '--eval_iters=1', f'--max_iters={never}', '--log_interval=1', f'--device={device}', f"--dtype={dtype}",
                f'--compile={compiled}'], r'time ([\d.]+)ms'
        if build_nanogpt:
            theirs = folder / f'build{int(compiled)}'
            (theirs / 'edu_fineweb10B').mkdir(parents=True)
            for name in ('train', 'val'):
                np.save(theirs / f'edu_fineweb10B/x_{name}_000000.npy', tokens.astype(np.uint16))
            source = replaced(Path(build_nanogpt, 'train_gpt2.py').read_text(), {
                'B = 64 #': f'B = {c["B"]} #', 'T = 1024 #': f'T = {c["T"]} #', 'total_batch_size = 524288': f'total_batch_size = {c["B"] * c["T"]}',
                'GPTConfig(vocab_size=50304)': f'GPTConfig({c["T"]}, {c["vocab"]}, {c["n_layer"]}, {c["n_head"]}, {c["n_embd"]})',
                'use_compile = False': f'use_compile = {compiled}', 'step % 250 == 0': 'step < 0', 'max_steps = 19073': f'max_steps = {never}',
                'from hellaswag import': 'pass #', 'tiktoken.get_encoding("gpt2")': 'None',
                **({'dtype=torch.bfloat16)': 'enabled=False)', 'device = "cuda"\n    elif': 'pass\n    elif'} if device == 'cpu' else {})})
            (theirs / 'train_gpt2.py').write_text(source)
            found['build-nanogpt' + mark] = theirs, ['train_gpt2.py'], r'dt: ([\d.]+)ms'
    return found


STUBS = {'wandb.py': """import time
last = [time.perf_counter()]
def log(values, step=None):
    now = time.perf_counter()
    if 'train/lr' in values:
        print(f"step {step} | loss {values['train/lm_loss'] + 0.5 * values['train/q_halt_loss']:.6f} | cells {values['train/accuracy']:.4f} | "
              f"time {1000 * (now - last[0]):.1f}ms", flush=True)
    last[0] = now
init = finish = Settings = lambda *args, **kwargs: None
run = None
""", 'adam_atan2.py': """import math, torch
class AdamATan2(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group['betas'], group['lr']
            for p in group['params']:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s['t'] += 1
                p.mul_(1 - lr * group['weight_decay'])
                s['m'].lerp_(p.grad, 1 - b1)
                s['v'].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.add_(torch.atan2(s['m'], s['v'].sqrt() / math.sqrt(1 - b2 ** s['t'])), alpha=-lr / (1 - b1 ** s['t']))
""", 'coolname.py': "generate_slug = lambda n: 'run'\n"}


def trm_contestants(case, folder):
    """As contestants, on puzzles of 81 cells or fewer."""
    from harness import make_puzzle_data
    c = dict(TRM[case])
    B, cells, mlp_t, positions = c.pop('B'), c.pop('cells', 81), c.pop('mlp_t', True), c.pop('pos_encodings', 'none')
    (folder / 'ours').mkdir()
    make_puzzle_data(folder / 'ours/data', groups=500, cells=cells, vocab_size=11)
    shutil.copytree(folder / 'ours/data', folder / 'data')
    shutil.rmtree(folder / 'ours/data/test')  # theirs does not evaluate before the end either
    arch = [*(f'arch.{name}={value}' for name, value in c.items()), f'arch.mlp_t={mlp_t}', f'arch.pos_encodings={positions}', f'arch.puzzle_emb_ndim={c["hidden_size"]}']
    common = ['data_paths=[data]', 'evaluators=[]', 'epochs=1000000', 'eval_interval=500000', f'global_batch_size={B}', 'lr=1e-4', 'ema=True', 'weight_decay=1.0', *arch]
    dtype, found = 'float32' if device == 'cpu' else 'bfloat16', {}
    for compiled in [False, True] if compile else [False]:
        mark = ' compiled' if compiled else ''
        found['ours' + mark] = folder / 'ours', [ROOT / 'pretrain_trm.py', *common, f'--log_dir=run{int(compiled)}', f'--device={device}', f'--dtype={dtype}', '--log_interval=1',
                                                 f'--compile={compiled}'], r' dt (\d+)ms'
        if trm:
            theirs = folder / f'theirs{int(compiled)}'
            shutil.copytree(trm, theirs, ignore=shutil.ignore_patterns('.git', 'kaggle', 'assets'))
            shutil.copytree(folder / 'data', theirs / 'data')
            for name, source in STUBS.items():
                (theirs / name).write_text(source)
            if device == 'cpu':
                path = theirs / 'pretrain.py'
                path.write_text(replaced(path.read_text(), {'.cuda()': '', 'torch.device("cuda")': 'torch.device("cpu")', 'pin_memory=True': 'pin_memory=False'}))
            found['public code' + mark] = theirs, [*([] if compiled else ['-c', "import os, runpy, sys; os.environ['DISABLE_COMPILE'] = '1'; "
                                                   "sys.path.insert(0, ''); sys.argv = sys.argv[1:]; runpy.run_path('pretrain.py', run_name='__main__')"]),
                                                   'pretrain.py', 'arch=trm', *common, f'arch.forward_dtype={dtype}', '+run_name=x'], r'time ([\d.]+)ms'
    return found


LINE = r' dt (\d+)ms \| (?:tok/s|samples/s) ([\d,.]+)'  # of a log


def laptop_runs(folder):
    """{script: (what it trains here, its arguments)}: the shapes of the scripts' laptop commands, on data made in `folder`."""
    from harness import make_addition_data, make_paths, make_puzzle_data, make_qwen, make_rows_data, make_text_data
    make_text_data(folder / 'text', tokens=200_000)
    make_rows_data(folder / 'rows', rows=1000, longest=60)
    make_puzzle_data(folder / 'puzzles', groups=500, cells=16, vocab_size=6)
    make_addition_data(folder / 'sums', problems=5000)
    make_qwen(folder / 'qwen', hidden_size=128, layers=2, vocab_size=448)
    make_paths(folder / 'paths', questions=100, paths=8, hidden_size=128, longest=8)
    for name in ('puzzles', 'sums'):
        shutil.rmtree(folder / name / 'test')  # without it nothing is evaluated
    gpt = ['--eval_interval=-1', '--checkpoint_interval=-1', '--generate_interval=-1', '--log_interval=1']
    tiny = ['--preset=tiny', '--eval_interval=-1', '--log_interval=1']
    return {
        'train_gpt2.py': ('4 x 128, bytes, 16 x 128 tokens', ['--model=tiny', '--data_root=text', '--val_tokens=2048', *gpt]),
        'finetune_dolly.py': ('4 x 128, bytes, 16 rows', ['--model=tiny', '--data_dir=rows', '--eval_answers=0', *gpt]),
        'pretrain_trm.py': ('mlp_t, 64 wide, 128 slots of 16 cells', ['--data_paths=puzzles', *tiny]),
        'finetune_addition.py': ('mlp_t, 64 wide, 64 slots of 12 cells', ['--data_path=sums', *tiny]),
        'train_latent_prm.py': ('2 x 128, 64 paths of 1 to 8 latents', ['--preset=tiny', '--model_path=qwen', '--data_dir=paths', '--logging_steps=1', '--save_steps=-1']),
    }


def measure_all():
    """One table of all five scripts. What a script is beside public code comes first, where the code or the data for that are here."""
    beside = {}
    if nanogpt or build_nanogpt:
        beside['train_gpt2.py'] = measure('quickstart')
    if os.path.isdir(dolly):
        beside['finetune_dolly.py'] = measure_finetuning()
    if trm:
        beside['pretrain_trm.py'] = measure('trm_tiny')
        beside['finetune_addition.py'] = 'the same model as pretrain_trm.py'
    if importlib.util.find_spec('transformers'):
        beside['train_latent_prm.py'] = measure_prm()
    with tempfile.TemporaryDirectory() as folder:
        running, runs = [], laptop_runs(Path(folder))
        try:
            for script, (_, args) in runs.items():
                common = ['--max_steps=1000000', f'--device={device}', f'--output_dir=run_{script}' if 'prm' in script else f'--log_dir=run_{script}']
                running.append(Contestant(script, folder, [ROOT / script, *args, *common], LINE))
                running[-1].rates.clear()
            for _ in range(rounds):
                for one in running:
                    before = len(one.rates)
                    one.turn(steps or max(2, round(3000 / (statistics.median(one.ms) if one.ms else 1000))))
                    del one.rates[before]  # of the step in which it was stopped
        finally:
            memory = {one.name: one.end() for one in running}
    print('\n| script | model, batch | ms per step (quartiles) | throughput | peak memory | beside public code |\n|---|---|---|---|---|---|')
    for one in running:
        low, middle, high = statistics.quantiles(one.ms, n=4)
        unit = {'train_gpt2.py': 'tokens/s', 'finetune_dolly.py': 'response tokens/s', 'train_latent_prm.py': 'paths/s'}.get(one.name, 'slots/s')
        print(f'| `{one.name}` | {runs[one.name][0]} | {middle:.0f} ({low:.0f} to {high:.0f}, {len(one.ms)} steps) | {statistics.median(one.rates):,.0f} {unit} '
              f'| {memory[one.name]:,.0f} MB | {beside.get(one.name, "-")} |', flush=True)


def matrix_rate():
    """FLOP/s of this CPU's float32 matrix products, or what the GPU's maker states (see PEAK_FLOPS)."""
    import torch

    from model import PEAK_FLOPS
    if device == 'cuda':
        return next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), math.nan)
    x, times = torch.randn(1024, 1024), []
    for _ in range(30):
        began = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - began)
    return 2 * 1024 ** 3 / statistics.median(times[5:])


def measure(case):
    import torch

    from model import GPT, GPTConfig
    c = TRM[case] if case in TRM else CASES[case]
    with torch.device('meta'):
        if case in TRM:
            from trm import TRM as Model
            from trm import TRMConfig
            mine = dict(dict(mlp_t=True, pos_encodings='none'), **c, puzzle_emb_ndim=c['hidden_size'])
            cells = mine.pop('cells', 81)
            flops = Model(TRMConfig(11, cells, 1, **{name: value for name, value in mine.items() if name != 'B'})).flops_per_slot()
        else:
            flops = GPT(GPTConfig(c['T'], c['vocab'], c['n_layer'], c['n_head'], c['n_embd'])).flops_per_token(c['T'])
    with tempfile.TemporaryDirectory() as folder:
        running, rates = [], []
        try:
            for name, start in (trm_contestants if case in TRM else contestants)(case, Path(folder)).items():
                running.append(Contestant(name, *start))
            for _ in range(rounds):
                rates.append(matrix_rate())
                for one in running:
                    one.turn(steps or max(2, round(3000 / (statistics.median(one.ms) if one.ms else 1000))))
        finally:
            memory = {one.name: one.end() for one in running}
    units, unit = (c['B'], 'puzzles') if case in TRM else (c['B'] * c['T'], 'tok')  # of a step
    what = ', '.join(f'{name} {value}' for name, value in c.items()) if case in TRM else (
        f'{c["n_layer"]} layers, width {c["n_embd"]}, {c["vocab"]} ids, {c["B"]} x {c["T"]} tokens a step')
    print(f'\n{case}: {what}, {flops / 1e6:,.1f} MFLOP per {unit.removesuffix("s")}; matrix products: {statistics.median(rates) / 1e9:,.0f} GFLOP/s')
    speed = {one.name: units / statistics.median(one.ms) * 1000 for one in running}
    others = [name for name in speed if not name.startswith('ours')]
    best = max(others, key=speed.get) if others else ''
    ratio = f' {unit}/s and memory, of the best other' if best else ''
    print(f'| | ms per step (quartiles) | {unit}/s | share of the matrix rate | peak memory |{ratio} |\n|---|---|---|---|---|---|')
    for one in running:
        low, middle, high = statistics.quantiles(one.ms, n=4)
        ratio = f'{speed[one.name] / speed[best]:.2f} and {memory[one.name] / memory[best]:.2f}' if best else ''
        print(f'| {one.name} | {middle:.0f} ({low:.0f} to {high:.0f}, {len(one.ms)} steps) | {speed[one.name]:,.0f} '
              f'| {flops * speed[one.name] / statistics.median(rates):.0%} | {memory[one.name]:,.0f} MB | {ratio} |', flush=True)
    ours = max(set(speed) - set(others), key=speed.get)
    return f'{ours}: {speed[ours] / speed[best]:.2f} times {best} ({case})' if best else '-'


def measure_finetuning():
    """Tokens of responses per second: in batches of like length; in random batches padded to their longest row whose every
    position meets the head, as litgpt pads; and nanoGPT's, which trains on the rows as one stream."""
    from model import open_rows
    shape, block_size = ['--n_layer=4', '--n_head=4', '--n_embd=128'], 1024
    rows, _, _, _ = open_rows(dolly, block_size)
    share = rows['response'].sum() / len(rows['tokens'])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        common = ['finetune_dolly.py', *shape, f'--data_dir={os.path.abspath(dolly)}', f'--block_size={block_size}', '--num_epochs=100', '--log_interval=1',
                  '--eval_interval=-1', '--generate_interval=-1', '--checkpoint_interval=-1', '--eval_answers=0', f'--device={device}']
        start = {}
        for name in ('ours', 'random batches, all logits'):
            there = folder / name.split()[0]
            there.mkdir()
            for file in ('finetune_dolly.py', 'configurator_old.py', 'model.py'):
                shutil.copy(ROOT / file, there)
            source = replaced((there / 'finetune_dolly.py').read_text(), NO_EVALUATION)
            (there / 'finetune_dolly.py').write_text(source)
            if name != 'ours':
                (there / 'model.py').write_text(replaced((there / 'model.py').read_text(), RANDOM_BATCHES))
            start[name] = there, common, r' dt (\d+)ms \| tok/s ([\d,]+)'
        if nanogpt:
            there = folder / 'nanogpt'
            (there / 'data/bench').mkdir(parents=True)
            for name in ('train.py', 'model.py', 'configurator.py'):
                shutil.copy(Path(nanogpt, name), there)
            for name in ('train.bin', 'val.bin'):
                rows['tokens'].tofile(there / 'data/bench' / name)
            start['nanoGPT on the stream'] = there, ['train.py', *shape, '--dataset=bench', f'--block_size={block_size}', '--batch_size=4', '--gradient_accumulation_steps=1',
                                                     '--bias=True', '--eval_interval=100000000', '--eval_iters=1', '--max_iters=100000000', '--log_interval=1',
                                                     f'--device={device}', '--dtype=float32', '--compile=False'], r'time ([\d.]+)ms'
        running = []
        try:
            for name, how in start.items():
                running.append(Contestant(name, *how))
                running[-1].rates.clear()
            for _ in range(rounds):
                for one in running:
                    before = len(one.rates)
                    one.turn(steps or 8)
                    del one.rates[before]  # of the step in which it was stopped
        finally:
            memory = {one.name: one.end() for one in running}
    print(f'\n{dolly}: {share:.1%} of the tokens are in responses; 4 layers, width 128, 50304 ids, 16 rows (nanoGPT: 4 x {block_size} tokens) a step')
    print('| | response tokens per second | times | steps | peak memory |\n|---|---|---|---|---|')
    speed = {}
    for one in running:
        tokens = 4 * block_size * share * len(one.ms) if one.pattern.groups == 1 else sum(ms * rate / 1000 for ms, rate in zip(one.ms, one.rates, strict=True))
        speed[one.name] = tokens / sum(one.ms) * 1000
        print(f'| {one.name} | {speed[one.name]:,.0f} | {speed[one.name] / speed["ours"]:.2f} | {len(one.ms)} | {memory[one.name]:,.0f} MB |', flush=True)
    return ', '.join(f'{speed["ours"] / speed[name]:.2f} times {name}' for name in speed if name != 'ours') + ' (response tokens)'


def learn_as_nanogpt(seed, batches, lr_of):
    """Losses of nanoGPT's model and optimizer on `batches`, in its own order of a step."""
    import torch
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(nanogpt, 'model.py'))
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    model = module.GPT(module.GPTConfig(block_size=128, vocab_size=320, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, lr_of(0), (0.9, 0.95), 'cpu')
    losses = []
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group['lr'] = lr_of(step)
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def learn_as_public_trm(seed, config, weights, batches):
    """[(loss, share of right cells in slots that halt), ...] of the public TRM model, loss and optimizer on `batches`, in its own order of a step."""
    import torch
    with tempfile.TemporaryDirectory() as folder:
        for name, source in STUBS.items():
            Path(folder, name).write_text(source)
        sys.path[:0] = [folder, trm]
        from adam_atan2 import AdamATan2
        from models.losses import ACTLossHead
        from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1 as Model
        from models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed as SignSGD
        del sys.path[:2]
    B = config['global_batch_size']
    model = ACTLossHead(Model(dict(config, batch_size=B, H_layers=0, no_ACT_continue=True, forward_dtype='float32')), 'stablemax_cross_entropy')
    model.load_state_dict({f'model.inner.{name}': tensor for name, tensor in weights.items()})
    optimizers = [SignSGD(model.model.puzzle_emb.buffers(), lr=1e-3, weight_decay=0.1, world_size=1),
                  AdamATan2(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))]
    torch.manual_seed(seed)  # of its exploration
    model.train()
    carry, found = None, []
    for batch in batches:
        carry = carry or model.initial_carry(batch)
        carry, loss, metrics, _, _ = model(carry=carry, batch=batch, return_keys=[])
        (loss / B).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        found.append((loss.item() / B, metrics['accuracy'].item(), metrics['count'].item()))
    return found


SPY = """import os, runpy, sys, torch
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import trm
init, refill, seen = trm.TRM.__init__, trm.TRM.refill, []
def first(self, config):
    init(self, config)
    torch.save(self.state_dict(), 'first')
def record(self, carry, rows):
    seen.append(rows)
    return refill(self, carry, rows)
trm.TRM.__init__, trm.TRM.refill = first, record
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    torch.save(seen, 'seen')
"""


def compare_trm_learning():
    """Three seeds of weights, batches and exploration; the public model gets our first weights and our batches."""
    import torch
    shape = dict(hidden_size=128, num_heads=4, L_layers=1, H_cycles=2, L_cycles=2, mlp_t=True, pos_encodings='none', puzzle_emb_ndim=128, halt_max_steps=8, expansion=4.0,
                 puzzle_emb_len=16, halt_exploration_prob=0.1, global_batch_size=32)
    curves = {'ours': [], 'public code': []}
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, 'data').mkdir()
            Path(folder, 'data/train').symlink_to(os.path.abspath(Path(data_root, 'train')))  # without a test set nothing is evaluated
            common = ['--data_paths=data', f'--seed={seed}', f'--max_steps={learning_steps}', '--log_interval=1', '--device=cpu', '--lr=1e-3', '--puzzle_emb_lr=1e-3', '--lr_warmup_steps=0', *(f'--{name}={value}' for name, value in shape.items())]
            run = subprocess.run([sys.executable, '-c', SPY, ROOT / 'pretrain_trm.py', *common], cwd=folder, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            first, batches = (torch.load(Path(folder, name), weights_only=True) for name in ('first', 'seen'))
        numbers = re.findall(r'^step \d+/.*?\| loss ([\d.]+) \| exact [\d.]+ \| cells ([\d.]+) \| halts after ([\d.]+)', run.stdout, re.MULTILINE)
        curves['ours'].append([(float(loss), float(cells), float(cells != '0.0000')) for loss, cells, _ in numbers])
        data = json.loads(Path(data_root, 'train/dataset.json').read_text())
        config = dict(shape, **{name: data[name] for name in ('vocab_size', 'seq_len', 'num_puzzle_identifiers')})
        theirs = learn_as_public_trm(seed, config, first, [dict(b, labels=b['labels'].long(), inputs=b['inputs'].int()) for b in batches[:learning_steps]])
        curves['public code'].append([(loss, cells / max(1, count), float(count > 0)) for loss, cells, count in theirs])
    marks = [m for m in (20, 50, 100, 200, 300, 500, 1000) if m <= learning_steps]
    print(f'\n{data_root}: loss / share of right cells when halting, means of 20 steps; 3 seeds\n| steps | ' + ' | '.join(map(str, marks)) + ' |\n' + '|---' * (len(marks) + 1) + '|')
    for name, runs in curves.items():
        for steps in runs:
            cells = [sum(c for _, c, n in steps[m - 20:m]) / max(1, sum(n for _, _, n in steps[m - 20:m])) for m in marks]
            print(f'| {name} | ' + ' | '.join(f'{statistics.mean(loss for loss, _, _ in steps[m - 20:m]):.4f} / {c:.4f}' for m, c in zip(marks, cells, strict=True)) + ' |')


def compare_learning():
    """Three seeds of weights and batches, both on the same batches."""
    import torch

    from prepare.fineweb import open_shards, read_rows
    T, B, warmup, peak = 128, 16, 100, 4e-3
    try:
        train, _, _ = open_shards(data_root, T)
    except ValueError as error:
        fail(f'{error}: python prepare/pydocs.py writes data/pydocs')
    n = sum((len(tokens) - 1) // T for tokens in train.values())

    def batches(seed):  # what train_gpt2.py draws with this seed
        order = np.random.default_rng([seed, 0]).permutation(n)
        for step in range(learning_steps):
            rows = read_rows(train, T, order[step * B:(step + 1) * B])
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def lr_of(step):
        done = (step - warmup) / max(1, learning_steps - warmup)
        return peak * (step + 1) / warmup if step < warmup else peak / 10 + peak * 0.9 * (1 + math.cos(math.pi * done)) / 2

    curves = {'ours': [], 'nanoGPT': []}
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run([sys.executable, ROOT / 'train_gpt2.py', '--model=tiny', '--activation=gelu', '--optimizer=adamw',
                                  f'--data_root={os.path.abspath(data_root)}', f'--seed={seed}',
                                  f'--max_steps={learning_steps}', '--eval_interval=-1', '--generate_interval=-1', '--log_interval=1', '--device=cpu',
                                  '--val_tokens=128'], cwd=folder, capture_output=True, text=True, check=True)
        curves['ours'].append([float(loss) for loss in re.findall(r'\| loss ([\d.]+)', run.stdout)])
        torch.manual_seed(seed)
        curves['nanoGPT'].append(learn_as_nanogpt(seed, batches(seed), lr_of))
    marks = [m for m in (10, 50, 100, 200, 300, 500, 1000) if m <= learning_steps]
    print('\nloss, mean of 10 steps, 3 seeds (weights and batches)\n| steps | ' + ' | '.join(map(str, marks)) + ' |\n' + '|---' * (len(marks) + 1) + '|')
    for name, runs in curves.items():
        for losses in runs:
            print(f'| {name} | ' + ' | '.join(f'{statistics.mean(losses[m - 10:m]):.4f}' for m in marks) + ' |')
    differences = [statistics.mean(a[-50:]) - statistics.mean(b[-50:]) for a, b in zip(curves['ours'], curves['nanoGPT'], strict=True)]
    print('ours - nanoGPT on the same batches, last 50 steps: ' + ', '.join(f'{d:+.4f}' for d in differences))


def measure_prm():
    """Paths per second of a training step: ours, in batches of like length without a mask; and transformers' Qwen3Model under the same head, whose
    random batches are padded to their longest path and masked. Both see all paths of a turn; A B A B in this process."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    from model import QwenLatentPRM, bucketed, make_optimizers, padded_paths
    B, accumulate, C, layers, n = 4, 4, 128, 4, 96  # paths of a micro-batch, micro-batches of a step, width, layers, paths of a turn
    rng = np.random.default_rng(0)
    lengths = {'mixed lengths': np.clip(rng.lognormal(math.log(60), 0.8, n), 1, 512).astype(int), 'equal lengths': np.full(n, 64)}
    with tempfile.TemporaryDirectory() as folder:
        from harness import make_qwen
        make_qwen(Path(folder, 'qwen'), hidden_size=C, layers=layers)
        config = json.loads(Path(folder, 'qwen/config.json').read_text())
        ours = QwenLatentPRM(str(Path(folder, 'qwen')), dropout_prob=0.0).to(device)
    theirs = torch.nn.ModuleDict(dict(model=Qwen3Model(Qwen3Config(**{name: config[name] for name in (
        'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim')})), score=torch.nn.Linear(C, 1)))
    del theirs['model'].embed_tokens
    theirs.to(device)

    def their_logits(x, mask):
        hidden = theirs['model'](inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
        return theirs['score']((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)).squeeze(1)

    found = {}
    for name, sizes in lengths.items():
        paths, target = [torch.randn(size, C) for size in sizes], torch.rand(n)
        order = rng.permutation(n)
        contestants = {'ours': (ours, lambda x, mask: ours(x, mask), bucketed(sizes, B, 0, 0)),
                       "transformers' Qwen3Model": (theirs, their_logits, [order[i:i + B] for i in range(0, n, B)])}
        optimizers = {one: torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=True) if one != 'ours' else make_optimizers(net, 'adamw', 1e-4, 0.01, (0.9, 0.999))[0]
                      for one, (net, _, _) in contestants.items()}
        times = {one: [] for one in contestants}
        for turn in range(rounds + 1):
            for one, (net, logits, batches) in contestants.items():
                began = time.perf_counter()
                for i, rows in enumerate(batches):
                    x, mask = (t.to(device) for t in padded_paths([paths[r] for r in rows])[:2])
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(x, mask), target[rows].to(device)) / accumulate
                    loss.backward()
                    if i % accumulate == accumulate - 1:
                        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                        optimizers[one].step()
                        optimizers[one].zero_grad()
                loss.item()
                if turn:  # the first one warms up
                    times[one].append(time.perf_counter() - began)
        found[name] = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        padding = {one: 1 - sizes.sum() / sum(len(rows) * sizes[rows].max() for rows in batches) for one, (_, _, batches) in contestants.items()}
        print(f'\n{name}: {layers} layers, width {C}, {accumulate} x {B} paths a step, {sizes.min()} to {sizes.max()} latents, {rounds} turns of {n} paths')
        print('| | paths/s (of each turn) | padding |\n|---|---|---|')
        for one, seconds in times.items():
            print(f'| {one} | {n / statistics.median(seconds):,.0f} ({", ".join(f"{n / s:,.0f}" for s in seconds)}) | {padding[one]:.0%} |')
        print(f'ours is {found[name]:.2f} times as fast (median of the turns)', flush=True)
    return ', '.join(f'{ratio:.2f} times transformers ({name})' for name, ratio in found.items())


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped contestant stays behind
    if set(cases) - {'all', *CASES, *TRM}:
        fail(f'unknown cases {sorted(set(cases) - {"all", *CASES, *TRM})}, known are all, {", ".join((*CASES, *TRM))}')
    if learning and trm:
        compare_trm_learning()
    elif learning:
        compare_learning()
    elif finetune:
        measure_finetuning()
    elif prm:
        measure_prm()
    else:
        for case in cases:
            measure_all() if case == 'all' else measure(case)
