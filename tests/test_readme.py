"""What README.md says can be typed, and README.zh.md says the same: commands, numbers, settings, tables and links, section by section."""
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def parts(text):
    """[(lines of code without their comments, prose)] of the sections, which begin with ##."""
    found, fenced = [([], [])], False
    for line in text.split('\n'):
        if line.startswith('```'):
            fenced = not fenced
        elif not fenced and line.startswith('## '):
            found.append(([], []))
        elif fenced or line.startswith('    '):
            code = re.sub(r'(^|\s{2,})#.*', '', line).rstrip()
            found[-1][0].extend([code] if code else [])
        else:
            found[-1][1].append(line)
    return [(code, '\n'.join(prose)) for code, prose in found]


# ---- the commands, with few steps: {command: what is added to it}. One folder, in this order, no network.
FEW = '--max_steps=4 --eval_interval=-1 --val_tokens=4096 --generate_interval=-1 --num_workers=0'
RUN = {
    'python prepare/pydocs.py': '',
    'python train_gpt2.py --model=tiny --data_root=data/pydocs': FEW,
    'python train_gpt2.py --auto_resume': '--max_steps=5',
    'python train_gpt2.py --eval_only': '',
    'python train_gpt2.py --eval_only --checkpoint_path=logs/model_best.pt': '',
    'python train_gpt2.py --generate="def main(" --num_samples=3 --temperature=0.8 --top_k=50 --max_new_tokens=200': '--max_new_tokens=8',
    'python train_gpt2.py --export=out --checkpoint_path=logs/model_best.pt': '',
    'torchrun --standalone --nproc_per_node=2 train_gpt2.py --model=tiny --data_root=data/pydocs --batch_size=8 --device=cpu --log_dir=logs_two': FEW,
    'python prepare/fineweb.py --input notes/*.txt --tokenizer=bytes --output_dir=data/notes': '',
    'python train_gpt2.py --model=tiny --data_root=data/pydocs --block_size=512 --batch_size=4 --log_dir=logs_bytes': FEW,
    'python prepare/dolly.py --tokenizer=bytes --max_length=512 --output_dir=data/dolly_bytes': '--input=rows.jsonl',
    'python finetune_dolly.py --data_dir=data/dolly_bytes --max_lr=1e-3 --pretrained_checkpoint=logs_bytes/model_01250.pt':
        '--pretrained_checkpoint=logs_bytes/model_00004.pt --max_steps=2 --batch_size=2 --eval_answers=1 --max_new_tokens=4 --num_samples=1 --forgetting_tokens=512',
    'python finetune_dolly.py --auto_resume': '--max_steps=3',
    'python finetune_dolly.py --eval_only': '',
    'python finetune_dolly.py --generate="Why is the sky blue?"': '',
    'python finetune_dolly.py --export=out': '--export=answers',
    'python prepare/sudoku.py --generate --size=4 --train_size=10000 --output_dir=data/sudoku4': '--train_size=20 --test_size=5',
    'python pretrain_trm.py --preset=tiny --data_paths=data/sudoku4': '--max_steps=3 --log_dir=sudoku',
    'python prepare/sudoku.py --generate --size=6 --train_size=10000 --num_aug=30 --output_dir=data/sudoku6': '--train_size=5 --test_size=2 --num_aug=2',
    'python prepare/maze.py --generate --size=9 --train_size=20000 --aug --output_dir=data/maze9': '--train_size=5 --test_size=2',
    'python prepare/addition.py --max_digits=2 --output_dir=data/addition2': '--test_size=20',
    'python finetune_addition.py --preset=tiny --data_path=data/addition2 --run_name=two_digits': '--total_steps=3 --eval_interval=-1',
    'python finetune_addition.py --run_name=two_digits --ask="57+86, 99+1"': '',
    'python finetune_addition.py --run_name=two_digits --eval_only': '',
    'python finetune_addition.py --run_name=two_digits --ask="57+86"': '',
    'python prepare/addition.py': '--train_size=50 --test_size=5',
    'python prepare/tiny_qwen.py': '--steps=3',
    'python prepare/latent_prm.py --task=arithmetic --model_path=data/tiny_qwen --max_samples=4000 --max_new_tokens=16 --num_paths=8': '--max_samples=12 --num_paths=4',
    'python train_latent_prm.py --preset=tiny --model_path=data/tiny_qwen': '--max_steps=2 --batch_size=4 --val_size=0.3',
    'python train_latent_prm.py --auto_resume': '--max_steps=3',
    'python train_latent_prm.py --ask="What is 17 plus 25?"': '--num_paths=2',
    "python train_latent_prm.py --preset=tiny --ask='37+48=?' --num_paths=20": '--num_paths=2',
}
# Commands that are not run: they download, want GPUs or days, or name what only their reader has.
NOT_RUN = r'''venv|pip |pytest|bench\.py|gpt2$|gpt2 --|--init_from|lm_eval|nproc.per.node[= ][48]|hellaswag|model_20000|a\.parquet|sample\.parquet|data/text|num_epochs=0\.5|sudoku-extreme
|arc1concept|arc\.py|prepare/(fineweb|dolly|sudoku|maze)\.py$|--chat|finetune_dolly\.py$|checkpoints/|step_518071|=1000$|NUM_EPOCHS|srun'''.replace('\n', '')


def commands():
    text, found = (ROOT / 'README.md').read_text().replace('\\\n', ''), []
    for code, _ in parts(text):
        for line in code:
            found += re.findall(r'(?:^|&& |\$ )((?:python3?|torchrun) (?:(?! && |  ).)*)', line.strip())
    return found


def test_every_command_is_run_or_known_not_to_be():
    found = commands()
    assert not [command for command in RUN if command not in found]
    assert not [command for command in found if command not in RUN and not re.search(NOT_RUN, command)]
    assert not [command for command in RUN if re.search(NOT_RUN, command)]


def test_the_commands_on_a_cpu(launcher, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/a.txt').write_text('A note. ' * 400)
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(dict(
        instruction=f'Say {i}.', context='', response=f'It is {i}.', category='open_qa')) + '\n' for i in range(60)))
    for command, added in RUN.items():
        program, *words = shlex.split(f'{command} {added}')
        ranks = int(re.search('nproc_per_node=([0-9])', command)[1]) if program == 'torchrun' else 0
        while words[0].startswith('--'):  # of torchrun
            words.pop(0)
        words = [str(path) for word in words for path in (sorted(tmp_path.glob(word)) if '*' in word else [word])]
        run = launcher.run(words[0], words[1:], cwd=tmp_path, ranks=ranks, timeout=120)
        assert set(run.codes) == {0}, (command, run.out, run.err)
        assert 'Traceback' not in run.out + run.err, command


# ---- the other language
FACTS = dict(numbers=r'\d[\d,.]*\d|\d', settings=r'`[^`]+`', links=r'\]\([^)]*\)', rows=r'(?m)^\|(?=.*\|$)', columns=r'(?m)(?<=.)\|(?=.*\|$)', headings=r'(?m)^#+ ')


@pytest.mark.parametrize('fact', ['code', *FACTS])
def test_the_chinese_readme_is_the_same(fact):
    pages = [parts((ROOT / name).read_text()) for name in ('README.md', 'README.zh.md')]
    assert len(pages[0]) == len(pages[1]) > 10
    for number, ((code, prose), (code_zh, prose_zh)) in enumerate(zip(*pages, strict=True)):
        if fact == 'code':
            assert code == code_zh, f'section {number}'
            continue
        english, chinese = (Counter(re.findall(FACTS[fact], text)) for text in (prose, prose_zh))
        if fact == 'links' and number == 0:  # each names the other
            english, chinese = english - Counter(['](README.zh.md)']), chinese - Counter(['](README.md)'])
        assert english == chinese, f'section {number}: only in English {english - chinese}, only in Chinese {chinese - english}'
