"""Train an image classifier: edit the constants, or give them on the command line, and run it.

python train.py                                      one process, on the GPU if there is one
python train.py --backbone resnet50 --Init_lr 0.02   any constant below, without an editor
torchrun --nproc_per_node=2 train.py                 two processes, each with a GPU, or on CPUs
torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST train.py
                                                     the first of two machines
"""

import math
import os
from contextlib import suppress

from utils.plumbing.start import start_program, start_worker

if __name__ == "__main__":
    start_program()  # before torch is imported, which reads the OpenMP setting once
elif __name__ == "__mp_main__":
    start_worker()  # where workers are spawned, each imports this file

import numpy as np
import torch
from torch.backends import cudnn
from torch.utils.data import DataLoader

from nets import (
    build,
    head_layers,
    is_transformer,
    load_file,
    load_pretrained,
    profile,
    to_device,
)
from utils.checkpoint import Checkpoint
from utils.dataloader import DataGenerator, detection_collate, own_data
from utils.fit import fit_one_epoch
from utils.loss_history import LossHistory, stops_early
from utils.optimizer import (
    describe_rates,
    fit_lr,
    get_lr_scheduler,
    get_optimizer,
    is_frozen,
    set_optimizer_lr,
)
from utils.plumbing import lists, processes
from utils.plumbing.command_line import command_line
from utils.plumbing.console import prepare_program, say, say_note
from utils.plumbing.processes import count_workers, on_rank_0, prepare_worker, rank, world_size
from utils.plumbing.run import begin_run, new_run, print_header, write_config
from utils.plumbing.sample import find_lists
from utils.plumbing.settings import (
    check_launch,
    check_phases,
    check_settings,
    describe_few_steps,
    too_small,
)
from utils.recipe import CLASS_WEIGHTS, Recipe, balanced_weights
from utils.rehearsal import check_batch, choose_precision, first_batch, save_first_batch
from utils.resume import check_goes_on, continued_run, print_continued
from utils.sampler import EpochSampler

# The machine
Cuda = torch.cuda.is_available()  # train on the GPU
distributed = "LOCAL_RANK" in os.environ  # several processes; torchrun sets LOCAL_RANK
sync_bn = False  # BatchNorm statistics over all GPUs of a torchrun launch
fp16 = "auto"  # mixed precision: True, False, a type such as 'bfloat16', or 'auto': what is fast
compile = False  # torch.compile the network; may pay on CUDA
num_workers = "auto"  # loader processes for each training process; 'auto': what suits the device
cache_mb = 500  # MB to keep all of a list's pictures in memory (not with random crops); 0 = off
seed = 11  # of weights, order and augmentation

# The data: lines of 'class_id;path', written by python -m utils.annotation
classes_path = "model_data/cls_classes.txt"  # class names, one a line
train_annotation_path = "model_data/cls_train.txt"  # training pictures
test_annotation_path = "model_data/cls_test.txt"  # pictures to validate on
input_shape = [48, 48]  # [height, width] that the network sees
resize = "crop"  # 'crop': cut to input_shape's proportions; 'squeeze': keep the whole picture
# 'none', 'flip', 'flips' (also upside down), 'crop', or 'crop' with one of the policies 'trivial',
# 'rand', 'auto', 'aug_mix'
augmentation = "flip"  # 'none' if a mirror image means something else: all others mirror pictures
crop_scale = 0.08  # smallest area of a random crop, as a share of the largest that fits
mean = [0.485, 0.456, 0.406]  # mean of red, green, blue (0 to 1), for normalisation: ImageNet's
std = [0.229, 0.224, 0.225]  # their standard deviations
val_crop = 1.0  # the centre crop's share of each side, without random crops (0.875: 224 of 256)
random_erasing = 0.0  # probability of blanking a random rectangle

# The network
backbone = "resnet9"  # a file of nets/, or any torchvision classifier
pretrained = False  # start from torchvision's weights (downloaded once)
model_path = ""  # or from a weights file; '' for none

# The phases: with Freeze_Train, epochs up to Freeze_Epoch train the head alone
Init_Epoch = 0  # epochs that count as trained already
Freeze_Epoch = 2  # last epoch of the frozen phase
Freeze_batch_size = 32  # pictures a batch over all processes, frozen
UnFreeze_Epoch = 3  # last epoch of all: the number of epochs
Unfreeze_batch_size = 32  # pictures a batch over all processes, unfrozen
Freeze_Train = False  # begin with the frozen phase (useful from pretrained weights)
accumulate = 1  # batches whose gradients make one optimizer step

# The optimizer: rates are for 64 pictures a step (transformers: 256), scaled and limited (fit_lr)
Init_lr = 5e-2  # highest learning rate
Min_lr = Init_lr * 0.01  # lowest learning rate
optimizer_type = "sgd"  # 'sgd', 'adam', 'adamw': OPTIMIZERS in utils/optimizer.py
momentum = 0.9  # of sgd (Nesterov's); adam's and adamw's beta1
weight_decay = 5e-4  # not applied to biases and norm layers
lr_decay_type = "linear"  # 'linear', 'cos', 'step': LR_DECAYS in utils/optimizer.py
backbone_lr_scale = 1.0  # the backbone's share of the learning rate, for fine-tuning

# Recipes
label_smoothing = 0.0  # share of the target spread over all classes
mixup_alpha = 0.0  # blend pairs of pictures, Beta(alpha, alpha); 0 = off
cutmix_alpha = 0.0  # paste a rectangle of another picture, Beta(alpha, alpha); 0 = off
class_weights = "none"  # 'none'; 'balanced': 1 / frequency; 'sqrt': the square root of that
ema_decay = 0.0  # highest decay of an average of the weights, validated and saved; 0 = off
clip_ratio = 0.5  # largest gradient norm of a layer, as a share of its weight norm; 0 = off
clip_grad_norm = 0.0  # largest norm of all gradients together; 0 = off
best_by = "top1"  # metric that picks the best epoch: 'top1', 'top5', 'recall' (mean), 'val_loss'
early_stop = 0  # stop after this many epochs without a better one; 0 = off

# The run's folder
save_dir = "logs"  # each run makes a folder here
save_period = 10  # epochs between kept weight files
save_minutes = 5  # also save inside long epochs: a crash loses no more than that; 0 = off
resume = False  # True: the newest unfinished run of save_dir; or a run's folder

if __name__ == "__main__":
    prepare_program()
    # sets the constants above; recorded: what config.json keeps to continue from
    settings, recorded = command_line(globals())
    check_launch(settings)
    local_rank = processes.connect(Cuda) if distributed else 0
    # The run to continue: its folder, config.json and last_checkpoint.pth. All are None where a new
    # run begins, state alone where it has saved nothing yet.
    run, config, state = on_rank_0(continued_run, resume, save_dir)
    if run:  # it goes on with its own settings, and with Init_Epoch where it has got to
        settings, recorded = command_line(globals(), config=config)
    check_settings(settings, continued=state is not None)

    # The data
    own = own_data(settings)
    if own:
        class_names, train_lines, val_lines = own
        class_names = lists.clean_names(class_names, "own_data")
    else:
        classes_path, train_annotation_path, test_annotation_path = find_lists(settings, config)
        train_version = lists.version(train_annotation_path)
        class_names, num_classes = lists.get_classes(classes_path)
        with open(train_annotation_path, encoding="utf-8") as f:
            train_lines = f.readlines()
        with open(test_annotation_path, encoding="utf-8") as f:
            val_lines = f.readlines()
        train_lines, val_lines = lists.clean_lists(
            train_lines, val_lines, settings, class_names, train_version
        )
        np.random.seed(10101)  # documented; each epoch's own order is EpochSampler's
        np.random.shuffle(train_lines)
        np.random.seed(None)
    if run:
        check_goes_on(run, config, state, settings, class_names)
    num_train, num_val = len(train_lines), len(val_lines)
    num_classes = len(class_names)
    train_data = DataGenerator(
        train_lines, input_shape, num_classes=num_classes, settings=settings, cache_mb=cache_mb
    )
    val_data = DataGenerator(
        val_lines,
        input_shape,
        random=False,
        num_classes=num_classes,
        settings=settings,
        cache_mb=cache_mb,
    )
    del train_lines, val_lines  # the data sets have packed copies
    lists.check_same_everywhere(settings, train_data, val_data)
    num_workers = count_workers(num_workers, Cuda, train_data.in_memory)
    settings["num_workers"] = num_workers
    if num_workers:
        train_data.share_memory()
        val_data.share_memory()

    # The network
    torch.manual_seed(seed)
    model = build(settings, num_classes)
    if pretrained and state is None:
        load_pretrained(model, backbone, settings)
    if model_path and state is None:
        load_file(model, model_path, class_names, settings)
    parameters, flops = profile(model, backbone, input_shape, num_classes)
    check_phases(settings, num_train, num_val)
    device = "cuda" if Cuda else "cpu"
    model = to_device(model, device)
    optimizer = get_optimizer(
        model, head_layers(model), optimizer_type, momentum, weight_decay, backbone_lr_scale
    )
    weights = None
    if class_weights in CLASS_WEIGHTS:
        power = CLASS_WEIGHTS[class_weights]
        weights = balanced_weights(train_data.class_ids(), num_classes, power)
    recipe = Recipe(settings, model, num_classes, weights)
    print_header(
        settings,
        {
            "backbone": f"{backbone} ({parameters / 1e6:.2f} M parameters, "
            f"{flops / 1e9:.3f} GFLOPs)",
            "pictures": f"{num_train} training, {num_val} test, {num_classes} classes",
            "optimizer": describe_rates(settings, is_transformer(model)),
            "device": processes.describe_device(Cuda),
        },
    )
    frozen = is_frozen(settings, Init_Epoch)
    batch = first_batch(train_data, Freeze_batch_size if frozen else Unfreeze_batch_size, seed)
    say_note(train_data.describe_cut())
    say_note(describe_few_steps(settings, num_train))
    check_batch(batch, model, settings, num_classes)
    fp16 = on_rank_0(choose_precision, settings, model, batch)
    settings["fp16"] = fp16  # from here on a type's name
    if sync_bn:  # only now: rank 0 tries precisions alone, and these layers wait for all processes
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if run:
        print_continued(run, config, state, settings, is_transformer(model), train_data)
    scaler = torch.amp.GradScaler(device) if fp16 == "float16" else None

    # The run
    save_dir = run or on_rank_0(new_run, save_dir)  # from here on the run's folder, as documented
    loss_history = None  # rank 0 alone has one
    if rank() == 0:
        loss_history = LossHistory(save_dir, best_by=best_by)
    scored_on = {  # when one of these has changed, the best epoch is sought anew
        **val_data.fingerprint,
        "test pictures": on_rank_0(val_data.content),
        "best_by": best_by,
        "fp16": fp16,
    }
    checkpoint = Checkpoint(
        save_dir, model, optimizer, scaler, recipe.ema, loss_history, save_minutes, scored_on
    )
    if state:
        checkpoint.load(state, save_period, UnFreeze_Epoch)
    if rank() == 0:
        config = begin_run(save_dir, settings, class_names, recorded, val_data, state and config)
    checkpoint.catch_signals()
    if state is None and rank() == 0:
        save_first_batch(f"{save_dir}/first_batch.png", batch, class_names)

    UnFreeze_flag = None  # no phase is set up yet
    for epoch in range(Init_Epoch, UnFreeze_Epoch):
        if on_rank_0(stops_early, loss_history, early_stop):
            break
        unfreeze = not is_frozen(settings, epoch)
        if unfreeze != UnFreeze_flag:
            batch_size = Unfreeze_batch_size if unfreeze else Freeze_batch_size
            Init_lr_fit, Min_lr_fit = fit_lr(settings, batch_size, is_transformer(model))
            lr_scheduler_func = get_lr_scheduler(
                lr_decay_type, Init_lr_fit, Min_lr_fit, UnFreeze_Epoch
            )
            if unfreeze:
                model.Unfreeze_backbone()
            else:
                model.freeze_backbone()
            epoch_step = num_train // batch_size
            epoch_step_val = math.ceil(num_val / batch_size)  # every picture counts
            if epoch_step == 0 or epoch_step_val == 0:  # documented; check_phases came first
                raise ValueError(too_small(num_train, num_val, "the batch size", batch_size))

            model_train = torch.compile(model) if compile else model
            wrapping = dict(
                find_unused_parameters=getattr(model, "has_unused_parameters", False),
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
            if Cuda:  # the documented calls; to_device has moved the model already
                cudnn.benchmark = True
                if distributed:
                    model_train = model_train.cuda(local_rank)
                    model_train = torch.nn.parallel.DistributedDataParallel(
                        model_train, device_ids=[local_rank], **wrapping
                    )
                elif torch.cuda.device_count() > 1:
                    model_train = torch.nn.DataParallel(model_train)
                    model_train = model_train.cuda()
            elif distributed:
                model_train = torch.nn.parallel.DistributedDataParallel(model_train, **wrapping)
                # DDP regroups gradients after its first step, and then adds them up in another
                # order: do it now, so that a resumed run adds as the other did
                model_train.reducer._push_all_rebuilt_params()
            if distributed:
                # set after the construction, which copies rank 0's buffers once: from now on
                # fit_one_epoch copies BatchNorm's statistics before validation, not DDP each step
                model_train.broadcast_buffers = False

            train_sampler = EpochSampler(num_train, batch_size, rank(), world_size(), seed=seed)
            val_sampler = EpochSampler(num_val, batch_size, rank(), world_size(), shuffle=False)
            batch_size = batch_size // world_size()  # from here on the share of each process
            options = dict(
                pin_memory=Cuda, worker_init_fn=prepare_worker, persistent_workers=num_workers > 0
            )
            gen = DataLoader(train_data, batch_size, num_workers=num_workers, drop_last=True,
                             collate_fn=detection_collate, sampler=train_sampler,
                             **options)  # fmt: skip
            gen_val = DataLoader(val_data, batch_size, num_workers=num_workers,
                                 collate_fn=detection_collate, sampler=val_sampler,
                                 **options)  # fmt: skip
            UnFreeze_flag = unfreeze

        # The documented calls. fit_one_epoch repeats both, set_epoch with the step to begin at, the
        # rate at every step; history.csv has the rate that is set here. Another order is another
        # EpochSampler.order, another rate an entry of LR_DECAYS.
        if distributed:
            train_sampler.set_epoch(epoch)
        set_optimizer_lr(optimizer, lr_scheduler_func, epoch)
        fit_one_epoch(model_train, model, loss_history, optimizer, epoch, epoch_step,
                      epoch_step_val, gen, gen_val, UnFreeze_Epoch, Cuda, fp16, scaler,
                      save_period, save_dir, local_rank, recipe=recipe, checkpoint=checkpoint,
                      lr_scheduler_func=lr_scheduler_func)  # fmt: skip

    if rank() == 0:
        config["finished"] = True
        write_config(save_dir, config)
        with suppress(OSError):  # the run is saved, whatever becomes of TensorBoard's files
            loss_history.writer.close()
        say(f"best {loss_history.describe_best()} in {save_dir}")
    processes.finish()
