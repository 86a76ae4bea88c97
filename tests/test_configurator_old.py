"""What configurator_old.py has beside the common forms, and each command line of the guides, for the scripts that use it."""
import ast
import re
import shlex
from pathlib import Path

import pytest

from configurator_old import configure, nearby

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''max_lr = 6e-4         # peak learning rate
batch_size = 16       # rows
subsets = ['a']       # parts
log_dir = 'logs'      # folder
auto_resume = False   # go on
config = configure(globals())
'''

GUIDES = '''\
# guide 003
python train_gpt2.py
python train_gpt2.py --batch_size 16 --max_lr 3e-4 --max_steps 40000 --checkpoint_interval 1000
python finetune_dolly.py --pretrained_checkpoint log/model_40000.pt
python finetune_dolly.py --pretrained_checkpoint log/model_40000.pt --max_lr 3e-5 --max_steps 1750 --batch_size 8 --eval_interval 50
python train_gpt2.py --auto_resume
python finetune_dolly.py --auto_resume
python train_gpt2.py --resume --checkpoint_path log/model_20000.pt
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00500.pt
python train_gpt2.py --checkpoint_interval 1000 --keep_last_n_checkpoints 5 --permanent_checkpoints 10000,20000,30000
torchrun --standalone --nproc_per_node=gpu train_gpt2.py
torchrun --standalone --nproc_per_node=4 train_gpt2.py
torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=29500 train_gpt2.py
python train_gpt2.py --device cuda --compile --data_root data --num_workers 4 --log_dir logs --wandb_log --wandb_project x
python train_gpt2.py --min_lr 6e-5 --decay_lr --weight_decay 0.1 --grad_clip 1.0 --grad_accumulation_steps 8
python train_gpt2.py --batch_size 8 --grad_accumulation_steps 8 --dtype bfloat16
python train_gpt2.py --checkpoint_interval 500 --eval_interval 100 --log_level debug
python train_gpt2.py --run_name gpt2_lr3e-4_bs16 --save_config --log_dir logs/experiment_001
python train_gpt2.py --max_steps 10 --eval_interval 5 --log_gradients --data_root test_data/
python train_gpt2.py --lr_scheduler cosine_with_restarts --lr_restarts 3
python train_gpt2.py --dynamic_seq_length --min_seq_length 128 --max_seq_length 1024
torchrun --standalone --nproc_per_node=2 train_gpt2.py --model_parallel --model_parallel_size 2
python train_gpt2.py --max_lr=6e-4
torchrun --nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=192.168.1.1 --master_port=29500 train_gpt2.py
# guide 001
python finetune_dolly.py
python finetune_dolly.py --help
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00100.pt
python finetune_dolly.py --pretrained_checkpoint logs/model_19072.pt --data_dir dolly15k --batch_size 16 --max_lr 6e-5 --warmup_steps 1 \
    --max_steps 6 --checkpoint_interval 2 --keep_last_n_checkpoints 3 --eval_interval 2 --generate_interval 2
python finetune_dolly.py --max_lr 3e-5 --max_steps 1750 --warmup_steps 100
python finetune_dolly.py --batch_size 32
python finetune_dolly.py --resume --checkpoint_path logs_finetune/model_00500.pt --max_lr 1e-5
torchrun --standalone --nproc_per_node=4 finetune_dolly.py
torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=192.168.1.1 --master_port=1234 finetune_dolly.py
# guide 002
python -m prepare.arc --input-file-prefix kaggle/combined/arc-agi --output-dir data/arc1concept-aug-1000 --subsets training evaluation \
    concept --test-set-name evaluation
python pretrain_trm.py arch=trm arch.puzzle_emb_ndim=512 data_paths="[data/arc1concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 \
    arch.L_cycles=4 +run_name=my_training_run ema=True global_batch_size=64
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/arc1concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=my_training_run ema=True
python pretrain_trm.py arch=trm data_paths="[data/sudoku-extreme-1k-aug-1000]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.mlp_t=True arch.pos_encodings=none arch.L_layers=2 arch.H_cycles=3 \
    arch.L_cycles=6 +run_name=pretrain_mlp_t_sudoku ema=True
python pretrain_trm.py arch=trm data_paths="[data/maze-30x30-hard-1k]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 \
    +run_name=pretrain_att_maze30x30 ema=True
python pretrain_trm.py arch=trm data_paths="[data/arc1concept-aug-1000]" load_checkpoint=checkpoints/YourProject/your_run_name/step_10000 \
    +run_name=resume_training ema=True
python pretrain_trm.py evaluators="[{name: arc@ARC}]" freeze_weights=True eval_interval=1000000 arch.hidden_size=256 arch.num_heads=4 \
    ema_rate=0.999 global_batch_size=512
DISABLE_COMPILE=1 python pretrain_trm.py arch=trm
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/arc2concept-aug-1000]" arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=pretrain_att_arc2concept_4 ema=True
python pretrain_trm.py arch=trm data_paths="[data/sudoku-extreme-1k-aug-1000]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 \
    puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=6 \
    +run_name=pretrain_att_sudoku ema=True
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 pretrain_trm.py arch=trm \
    data_paths="[data/maze-30x30-hard-1k]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 puzzle_emb_lr=1e-4 weight_decay=1.0 \
    puzzle_emb_weight_decay=1.0 arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=4 +run_name=pretrain_att_maze30x30 ema=True
# guide 000
python -m prepare.addition --output-dir data/addition --train-size 10000 --test-size 1000
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition --epochs 10000 --lr 5e-5 --global-batch-size 64
torchrun --nproc-per-node 4 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --nnodes=1 finetune_addition.py --base-checkpoint \
    checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name finetune_addition_4gpu --epochs 10000 --lr 5e-5 \
    --global-batch-size 256
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_full --total-steps 100000 --lr 5e-5 --puzzle-emb-lr 1e-3 --ema
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_emb_only --freeze-weights --puzzle-emb-lr 1e-2
python finetune_addition.py --base-checkpoint checkpoints/Arc1concept-aug-1000-ACT-torch/my_training_run/step_303191 --data-path \
    data/addition_fixed --run-name finetune_addition_step1 --freeze-weights --total-steps 3000 --eval-interval 1500 --puzzle-emb-lr 1e-2 \
    --copy-loss-weight 0 --global-batch-size 64
python finetune_addition.py --base-checkpoint checkpoints/Addition_fixed-ACT-torch/finetune_addition_step1/step_3000 --data-path \
    data/addition_fixed --run-name finetune_addition_step2 --lr 5e-5 --total-steps 25000 --eval-interval 5000 --ema
python pretrain_trm.py arch=trm data_paths="[data/addition]" load_checkpoint=checkpoints/YourProject/base_model/step_30000 \
    +run_name=finetune_addition epochs=10000 eval_interval=1000 lr=5e-5 puzzle_emb_lr=1e-3 global_batch_size=64 ema=True
python finetune_addition.py --base-checkpoint checkpoints/YourProject/base_model/step_30000 --data-path data/addition --run-name \
    finetune_addition_full --epochs 500 --global-batch-size 128 --lr 5e-5 --puzzle-emb-lr 1e-3 --ema
python finetune_addition.py --base-checkpoint checkpoints/AdditionFinetune/finetune_addition/step_5000 --data-path data/addition --run-name \
    finetune_addition_continue --epochs 10000
DISABLE_COMPILE=1 python finetune_addition.py --global-batch-size 32
python finetune_addition.py --L-layers 2 --H-cycles 3 --L-cycles 6 --no-ema
python finetune_addition.py --eval_only --base-checkpoint checkpoints/AdditionFinetune/finetune_addition/step_10000 --data-path \
    data/addition --max-eval-batches 100
# guide 004
python prepare/latent_prm.py
python train_latent_prm.py
python train_latent_prm.py NUM_EPOCHS=5 BATCH_SIZE=4 LEARNING_RATE=2e-5 GRADIENT_ACCUMULATION_STEPS=4 SAVE_STEPS=100 LOGGING_STEPS=10
python train_latent_prm.py WEIGHT_DECAY=0.01 WARMUP_RATIO=0.1 MAX_GRAD_NORM=1.0 POOLING_STRATEGY=mean DROPOUT_PROB=0.1 MAX_SEQ_LENGTH=512 \
    USE_PRM_SCORE=true LOG_LEVEL=INFO DEVICE=cuda MIXED_PRECISION=true SEED=42
python train_latent_prm.py --model_path /path/to/Qwen-0.6B --data_dir prm_data --output_dir checkpoints/my_experiment --num_epochs 10 \
    --batch_size 8 --learning_rate 3e-5 --save_steps 50 --logging_steps 5
python train_latent_prm.py BATCH_SIZE=2 GRADIENT_ACCUMULATION_STEPS=8 MAX_SEQ_LENGTH=256
python train_latent_prm.py POOLING_STRATEGY="last" LEARNING_RATE=1e-5 SAVE_STEPS=500
python train_latent_prm.py --help
'''


def commands():
    """(script, words after its name) of each line of a script that uses configurator_old."""
    for line in re.sub(r'\\\n\s*', '', GUIDES).splitlines():
        words = shlex.split(line, comments=True)
        at = [i for i, word in enumerate(words) if word.endswith('.py')]
        if at and 'configurator_old' in (ROOT / words[at[0]]).read_text(encoding='utf-8'):
            yield pytest.param(words[at[0]], words[at[0] + 1:], id=' '.join(words[at[0]:])[:80])


@pytest.mark.parametrize('script, argv', list(commands()))
def test_guide_command(script, argv):
    tree = ast.parse((ROOT / script).read_text(encoding='utf-8'))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'configure')
    aliases = ast.literal_eval(call.keywords[0].value) if call.keywords else {}
    if '--help' in argv:
        with pytest.raises(SystemExit) as end:
            configure({'__file__': str(ROOT / script)}, argv, aliases)
        assert not end.value.code
    else:
        assert bool(configure({'__file__': str(ROOT / script)}, argv, aliases).given) == bool(argv)


def parse(tmp_path, *argv):
    (tmp_path / 'train.py').write_text(SCRIPT)
    return configure({'__file__': str(tmp_path / 'train.py')}, list(argv))


def test_restore_brings_back_what_was_typed(tmp_path):
    stored = parse(tmp_path, '--max_lr=1e-5', '--batch_size=3', '--auto_resume').typed()
    assert stored == {'max_lr': 1e-5, 'batch_size': 3}
    config = parse(tmp_path, '--batch_size', '4')
    config.restore({**stored, 'auto_resume': True, 'gone': 1}, 'model.pt')
    assert (config['max_lr'], config['batch_size'], config['auto_resume']) == (1e-5, 4, False)
    assert config.given == {'max_lr', 'batch_size'} and config.typed_here == {'batch_size'}
    config.fill({'max_lr': 7.0})
    assert config['max_lr'] == 1e-5


def test_typed_here_leaves_out_what_a_file_brought(tmp_path):
    (tmp_path / 'mine.py').write_text('max_lr = 1.0\nbatch_size = 2\n')
    config = parse(tmp_path, str(tmp_path / 'mine.py'), '--batch_size=3')
    assert config.typed_here == {'batch_size'} and config.given == {'max_lr', 'batch_size'}


def test_compare_says_what_changed_and_refuses_what_must_not(tmp_path, capsys):
    config = parse(tmp_path, '--max_lr=1e-4', '--log_dir=elsewhere')
    capsys.readouterr()
    config.compare({'max_lr': 6e-4, 'log_dir': 'logs'}, 'model.pt', fixed=('batch_size',))
    assert capsys.readouterr().out == 'changed since the checkpoint: max_lr 0.0006 -> 0.0001\n'
    with pytest.raises(SystemExit) as end:
        config.compare({'batch_size': 8}, 'model.pt', fixed=('batch_size',))
    assert end.value.code == 2 and 'batch_size cannot change on resume: 8 -> 16' in capsys.readouterr().err


def test_assign_reaches_the_script(tmp_path):
    config = parse(tmp_path)
    config.assign('max_lr', 2.0)
    assert config['max_lr'] == config.namespace['max_lr'] == 2.0


def test_what_is_near_a_missing_path(tmp_path):
    """The last three by number, not those of another future or half deleted, nor the path itself, which can be there and be refused."""
    for name in ('step_2', 'step_9', 'step_10', 'step_100', 'step_101.old', 'step_102.tmp'):
        (tmp_path / 'a' / name).mkdir(parents=True)
    told = nearby(str(tmp_path / 'a/step_7'))
    assert told == '; there is ' + ', '.join(str(tmp_path / 'a' / name) for name in ('step_9', 'step_10', 'step_100'))
    assert nearby(str(tmp_path / 'a/step_10')) == '; there is ' + ', '.join(str(tmp_path / 'a' / name) for name in ('step_2', 'step_9', 'step_100'))
    assert nearby(str(tmp_path / 'b/c/d/x.pt')) == ''
