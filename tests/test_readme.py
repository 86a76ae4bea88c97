"""What README.md and docs/ say can be typed; README.zh.md says the same as README.md: commands,
numbers, settings, tables and links, section by section."""
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'README.zh.md', 'docs/gpt2.md', 'docs/measured.md', 'docs/old_commands.md')


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


# ---- the commands, with few steps: {command: what is added to it}. In this order, in one folder,
# without a network.
FEW = '--max_steps=4 --eval_interval=-1 --val_tokens=4096 --generate_interval=-1 --num_workers=0'
TINY = f'--model=tiny --data_root=data/pydocs {FEW}'
BYTES = 'python train_gpt2.py --model=tiny --data_root=data/pydocs'
SHAKESPEARE = 'python train_gpt2.py --model=tiny --data_root=data/shakespeare --log_dir={} ' \
    '--block_size=64 --batch_size=12 --total_batch_size=768 --max_steps=2000 --max_lr={} --val_tokens=0'
RUN = {
    'python train_gpt2.py --help': '',
    'python prepare/pydocs.py': '',
    BYTES: FEW,
    'python train_gpt2.py --auto_resume': '--max_steps=5',
    'python train_gpt2.py --resume --checkpoint_path=logs/model_20000.pt':
        '--checkpoint_path=logs/model_00004.pt --max_steps=6',
    'python train_gpt2.py logs/config.py': '--log_dir=logs_config --max_steps=1',
    'python train_gpt2.py logs/config.py --log_dir=logs_again': '--max_steps=1',
    'python train_gpt2.py --max_steps 10 --eval_interval 5 --log_gradients --data_root test_data/':
        '--log_dir=logs_test ' + TINY,
    'python train_gpt2.py --keep_last_n_checkpoints 5 --permanent_checkpoints 10000,20000,30000':
        '--log_dir=logs_kept ' + TINY,
    'python train_gpt2.py --eval_only --checkpoint_path=logs/model_best.pt': '',
    'python train_gpt2.py --generate="def main("': '--max_new_tokens=8',
    'python train_gpt2.py --generate="def main(" --temperature=0.8 --top_k=50 --max_new_tokens=200':
        '--max_new_tokens=8',
    'python train_gpt2.py --export=out --checkpoint_path=logs/model_best.pt': '',
    'python prepare/hellaswag.py --checkpoint_path=logs/model_best.pt': '--input=items.jsonl',
    f'torchrun --standalone --nproc_per_node=2 {BYTES[7:]} --batch_size=8 --device=cpu '
    '--log_dir=logs_two': FEW,
    'torchrun --standalone --nproc_per_node=2 train_gpt2.py --model_parallel --model_parallel_size 2':
        '--optimizer=adamw --batch_size=8 --device=cpu --log_dir=logs_split ' + TINY,
    f'{BYTES} --optimizer=adamw --log_dir=logs_adamw': FEW,
    'python prepare/fineweb.py --input notes --tokenizer=bytes --output_dir=data/notes': '',
    'python prepare/fineweb.py --input=input.txt --tokenizer=bytes --output_dir=data/shakespeare': '',
    SHAKESPEARE.format('logs_shakespeare', '8e-3'): FEW,
    SHAKESPEARE.format('logs_shakespeare_adamw', '4e-3') + ' --optimizer=adamw': FEW,
    f'{BYTES} --block_size=512 --batch_size=4 --log_dir=logs_bytes': FEW,
    'python prepare/dolly.py --tokenizer=bytes --max_length=512 --output_dir=data/dolly_bytes':
        '--input=rows.jsonl',
    'python finetune_dolly.py --data_dir=data/dolly_bytes --max_lr=1e-3 '
    '--pretrained_checkpoint=logs_bytes/model_01080.pt':
        '--pretrained_checkpoint=logs_bytes/model_00004.pt --max_steps=2 --batch_size=2 '
        '--eval_answers=1 --max_new_tokens=4 --num_samples=1 --forgetting_tokens=512',
    'python finetune_dolly.py --auto_resume': '--max_steps=3',
    'python finetune_dolly.py --eval_only': '',
    'python finetune_dolly.py --generate="Why is the sky blue?"': '',
    'python finetune_dolly.py --export=out': '--export=answers',
    'python prepare/sudoku.py --generate --size=4 --train_size=10000 --output_dir=data/sudoku4':
        '--train_size=20 --test_size=5',
    'python pretrain_trm.py --preset=tiny --data_paths=data/sudoku4': '--max_steps=3 --log_dir=sudoku',
    'python prepare/sudoku.py --generate --size=6 --train_size=10000 --num_aug=30 '
    '--output_dir=data/sudoku6': '--train_size=5 --test_size=2 --num_aug=2',
    'python prepare/maze.py --generate --size=9 --train_size=20000 --aug --output_dir=data/maze9':
        '--train_size=5 --test_size=2',
    'python prepare/addition.py --max_digits=2 --output_dir=data/addition2': '--test_size=20',
    'python finetune_addition.py --preset=tiny --data_path=data/addition2 --run_name=two_digits':
        '--total_steps=3 --eval_interval=-1',
    'python finetune_addition.py --run_name=two_digits --ask="57+86, 99+1"': '',
    'python finetune_addition.py --run_name=two_digits --eval_only': '',
    'python finetune_addition.py --run_name=two_digits --ask="57+86"': '',
    'python prepare/addition.py': '--train_size=50 --test_size=5',
    'python prepare/addition.py --train_size=200000 --test_size=2000 --output_dir=data/addition10':
        '--train_size=50 --test_size=5',
    'python finetune_addition.py --preset=tiny --data_path=data/addition10 --run_name=ten_digits '
    '--total_steps=1400 --min_lr_ratio=0.01 --eval_interval=-1': '--total_steps=3',
    'python prepare/tiny_qwen.py': '--steps=3',
    'python prepare/latent_prm.py --task=arithmetic --model_path=data/tiny_qwen --max_samples=4000 '
    '--max_new_tokens=16 --num_paths=8': '--max_samples=12 --num_paths=4',
    'python train_latent_prm.py --preset=tiny --model_path=data/tiny_qwen':
        '--max_steps=2 --batch_size=4 --val_size=0.3',
    'python train_latent_prm.py --auto_resume': '--max_steps=3',
    'python train_latent_prm.py --ask="What is 17 plus 25?"': '--num_paths=2',
    "python train_latent_prm.py --preset=tiny --ask='37+48=?' --num_paths=20": '--num_paths=2',
}
# Commands that are not run: {why: pattern}.
NOT_RUN = {
    'installs': r'venv',
    'tests or measures': r'pytest|tests/',
    "is nanoGPT's": r'python train\.py',
    'downloads': r'(fineweb|dolly|sudoku|maze)\.py$|prepare/arc\.py|=gpt2( |$)|max_samples=1000$',
    'wants GPUs or days': r'node[= ]([48]|gpu)|bfloat16|40000|sudoku-extreme|NUM_EPOCHS=5',
    'names what its reader has': r'\.parquet|\bfw|data/text|num_epochs=0\.5|checkpoints/|step_518071'
                                 r'|load_checkpoint=\.\.\.',
    'is a talk': r'--chat',
}


def commands():
    """Commands of code blocks and of `...` in the prose. docs/old_commands.md names what is gone."""
    found = []
    for page in PAGES:
        if 'zh' in page or 'old' in page:
            continue
        for code, prose in parts(re.sub(r' *\\\n\s*', ' ', (ROOT / page).read_text())):
            for line in code:
                found += re.findall(r'(?:^|&& |\$ )((?:python3?|torchrun) (?:(?! && |  ).)*)',
                                    line.strip())
            found += re.findall(r'`((?:python|torchrun) [^`]*)`', ' '.join(prose.split()))
    return found


def test_every_command_is_run_or_known_not_to_be():
    found = commands()
    known = [c for c in found if any(re.search(pattern, c) for pattern in NOT_RUN.values())]
    assert [c for c in RUN if c not in found] == []
    assert [c for c in found if c not in RUN and c not in known] == []
    assert [c for c in RUN if c in known] == []


def test_the_commands_on_a_cpu(launcher, tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/a.txt').write_text('A note. ' * 400)
    (tmp_path / 'input.txt').write_text('A line of a play.\n' * 3000)
    (tmp_path / 'test_data').symlink_to('data/pydocs')
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(dict(
        instruction=f'Say {i}.', context='', response=f'It is {i}.', category='open_qa')) + '\n'
        for i in range(60)))
    (tmp_path / 'items.jsonl').write_text(json.dumps(dict(ctx='It', endings=[*'abcd'], label=1)))
    for command, added in RUN.items():
        program, *words = shlex.split(f'{command} {added}')
        ranks = int(re.search('nproc_per_node=([0-9])', command)[1]) if program == 'torchrun' else 0
        while words[0].startswith('--'):  # of torchrun
            words.pop(0)
        run = launcher.run(words[0], words[1:], cwd=tmp_path, ranks=ranks, timeout=120)
        assert set(run.codes) == {0}, (command, run.out, run.err)
        assert 'Traceback' not in run.out + run.err, command


def test_settings_of_the_page_exist():
    scripts = [ROOT / 'train_gpt2.py', *(ROOT / 'prepare').glob('*.py')]
    names = {name for path in scripts for name in re.findall(r'(?m)^(\w+) = ', path.read_text())}
    prose = ' '.join(prose for _, prose in parts((ROOT / 'docs/gpt2.md').read_text()))
    typed = set(re.findall(r'--(?:no-)?(\w+)', ' '.join(re.findall(r'`[^`]*`', prose))))
    assert sorted(typed - names - {'help'}) == []


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', text):
        linked = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r'(?m)^#+ (.*)', linked.read_text() if anchor else '')
        headings = [re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings]
        assert linked.exists() and (not anchor or anchor in headings), (target, anchor)


# ---- the other language
FACTS = dict(numbers=r'\d[\d,.]*\d|\d', settings=r'`[^`]+`', links=r'\]\([^)]*\)',
             rows=r'(?m)^\|(?=.*\|$)', columns=r'(?m)(?<=.)\|(?=.*\|$)', headings=r'(?m)^#+ ',
             placeholders=r'@\w+@')


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
            english.subtract(['](README.zh.md)'])
            chinese.subtract(['](README.md)'])
            english, chinese = +english, +chinese
        assert english == chinese, (f'section {number}: only in English {english - chinese}, '
                                    f'only in Chinese {chinese - english}')
