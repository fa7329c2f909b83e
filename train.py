"""Train an image classifier: edit the constants, or give them on the command line, and run this file.

    python train.py                                        one process, on the GPU where there is one
    python train.py --backbone resnet50 --Init_lr 0.02     any constant below, without an editor
    torchrun --nproc_per_node=2 train.py                   two processes (GPUs, or CPU processes without one)
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST train.py    the first of two machines
"""
import os

import utils  # noqa: F401 before torch, for its OpenMP setting
import numpy as np
import torch
from torch.backends import cudnn
from torch.utils.data import DataLoader

from nets import get_model, head_layers, is_transformer, load_matching, profile
from utils import checks, distributed as processes
from utils.charts import first_batch
from utils.checkpoint import Checkpointer, load_weights, save_image
from utils.console import show_config
from utils.dataloader import DataGenerator, EpochSampler, detection_collate
from utils.errors import TOO_SMALL, one_sentence_errors, rank, world_size
from utils.fit import fit_one_epoch
from utils.loss_history import LossHistory
from utils.recipe import balanced_weights, get_optimizer, get_recipe
from utils.run import open_run, write_config
from utils.sample_data import data_paths
from utils.scheduler import fit_lr, get_lr_scheduler, set_optimizer_lr
from utils.workers import ignore_signals

# The machine
Cuda = torch.cuda.is_available()  # train on the GPU
distributed = "LOCAL_RANK" in os.environ  # several processes; torchrun says so by itself
sync_bn = False  # BatchNorm statistics over all GPUs of a torchrun launch
fp16 = Cuda or torch.cpu.get_capabilities().get("amx_bf16", False)  # mixed precision: float16 on CUDA, bfloat16 on CPU
channels_last = True  # memory format of pictures and weights; faster for nearly every convolutional network
compile = False  # torch.compile the network; may pay on CUDA
num_workers = 2  # data-loader processes for each training process
seed = 11  # of weights, order and augmentation

# The data: lines of 'class_id;path', written by python -m utils.annotation
classes_path = "model_data/cls_classes.txt"  # class names, one a line
train_annotation_path = "model_data/cls_train.txt"  # training pictures
test_annotation_path = "model_data/cls_test.txt"  # pictures to validate on
input_shape = [64, 64]  # [height, width] that the network sees
augmentation = "flip"  # 'none', 'flip', 'crop', or crop and a policy: 'trivial', 'rand', 'auto', 'aug_mix'
crop_scale = 0.08  # smallest share of a picture's area that a random crop keeps
val_crop = 1.0  # share of the picture's sides in validation's centre crop (224 of 256: 0.875)
random_erasing = 0.0  # probability of blanking a random rectangle

# The network
backbone = "shufflenet_v2_x1_0"  # any torchvision classifier, or a file of nets/
pretrained = False  # start from torchvision's weights (downloaded once)
model_path = ""  # or from a weights file; '' for none

# The phases: epochs up to Freeze_Epoch train the head alone, the others everything
Init_Epoch = 0  # epoch to start at
Freeze_Epoch = 5  # last epoch of the frozen phase
Freeze_batch_size = 32  # pictures a step over all processes, frozen
UnFreeze_Epoch = 10  # last epoch
Unfreeze_batch_size = 32  # pictures a step over all processes, unfrozen
Freeze_Train = False  # begin with the frozen phase (useful from pretrained weights)
accumulate = 1  # batches whose gradients make one optimizer step

# The optimizer: rates are for 64 pictures a step (256 for transformers) and scaled to the batch size
Init_lr = 5e-2  # highest learning rate
Min_lr = Init_lr * 0.01  # lowest learning rate
optimizer_type = "sgd"  # 'sgd', 'adam' or 'adamw'
momentum = 0.9  # of sgd; adam's and adamw's beta1
weight_decay = 5e-4  # not applied to biases and norm layers
lr_decay_type = "cos"  # 'cos' or 'step'
backbone_lr_scale = 1.0  # the backbone's share of the learning rate, for fine-tuning

# Recipes
label_smoothing = 0.0  # share of the target spread over all classes
mixup_alpha = 0.0  # blend pairs of pictures, Beta(alpha, alpha); 0 = off
cutmix_alpha = 0.0  # paste a rectangle of another picture, Beta(alpha, alpha); 0 = off
class_weights = "none"  # 'none', or 'balanced' by frequency
ema_decay = 0.0  # exponential moving average of the weights, validated and saved; 0 = off
clip_grad_norm = 0.0  # largest norm of the gradient; 0 = off
early_stop = 0  # stop after this many epochs without a better top-1; 0 = off

# The run's folder
save_dir = "logs"  # each run makes a folder here
save_period = 10  # epochs between kept weight files
save_minutes = 10  # also save the state inside long epochs; 0 = off
resume = False  # True: the newest unfinished run of save_dir; or a run's folder

if __name__ == "__main__":
    one_sentence_errors()
    checks.command_line(globals())
    checks.check_settings(globals())
    local_rank = processes.connect(Cuda) if distributed else 0

    # The data
    classes_path, train_annotation_path, test_annotation_path = data_paths(
        classes_path, train_annotation_path, test_annotation_path)
    checks.check_data_files(globals())
    class_names, num_classes = checks.get_classes(classes_path)
    with open(train_annotation_path, encoding='utf-8') as f:
        train_lines = f.readlines()
    with open(test_annotation_path, encoding='utf-8') as f:
        val_lines = f.readlines()
    train_lines = checks.check_lines(train_lines, train_annotation_path, num_classes, classes_path)
    val_lines = checks.check_lines(val_lines, test_annotation_path, num_classes, classes_path)
    checks.warn_shared(train_lines, val_lines)
    num_train, num_val = len(train_lines), len(val_lines)
    np.random.seed(10101)
    np.random.shuffle(train_lines)
    np.random.seed(None)

    # The run
    settings = {name: globals()[name] for name in checks.constants(__file__)}
    save_dir, config, state = processes.on_rank_0(lambda: open_run(resume, save_dir, settings, class_names))
    fp16 = config["settings"]["fp16"]  # a resumed run keeps the one it began with
    loss_history = LossHistory(save_dir, input_shape=input_shape) if rank() == 0 else None

    # The network
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    if pretrained and state is None and local_rank == 0:  # one download a machine
        model = get_model(backbone, num_classes, input_shape, pretrained)
    processes.barrier()
    model = get_model(backbone, num_classes, input_shape, pretrained and state is None)
    if model_path and state is None:
        load_matching(model, load_weights(model_path), model_path)
    parameters, flops, has_batch_norm = profile(model, backbone, input_shape)
    if has_batch_norm and not sync_bn:
        checks.check_batch_norm("Unfreeze_batch_size", Unfreeze_batch_size)
    if sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to("cuda" if Cuda else "cpu", memory_format=layout)
    scaler = torch.amp.GradScaler("cuda") if fp16 and Cuda else None
    optimizer = get_optimizer(model, head_layers(model), optimizer_type, momentum, weight_decay, backbone_lr_scale)
    weights = balanced_weights(train_lines, num_classes) if class_weights == "balanced" else None
    recipe = get_recipe(settings, model, num_classes, weights.cuda() if weights is not None and Cuda else weights)
    checkpoint = Checkpointer(save_dir, {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": recipe.ema,
                                         "history": loss_history}, save_minutes)
    if state:
        checkpoint.load(state)
        Init_Epoch = state["epoch"]
    train_data = DataGenerator(train_lines, input_shape, True, augmentation, random_erasing, crop_scale, val_crop, seed)
    val_data = DataGenerator(val_lines, input_shape, False, val_crop=val_crop)
    del train_lines, val_lines
    show_config(run=save_dir, backbone=f"{backbone} ({parameters / 1e6:.2f} M parameters, {flops / 1e9:.3f} GFLOPs)",
                input_shape=input_shape, pictures=f"{num_train} training, {num_val} test, {num_classes} classes",
                epochs=f"{Init_Epoch} to {UnFreeze_Epoch}" + f", frozen to {Freeze_Epoch}" * Freeze_Train,
                batch_size=f"{Unfreeze_batch_size} over {world_size()} processes, {accumulate} to a step",
                optimizer=f"{optimizer_type}, Init_lr {Init_lr:g}, {lr_decay_type}",
                device=("CUDA" if Cuda else "CPU") + (", mixed precision" if fp16 else ", float32"))

    processes.on_rank_0(lambda: write_config(save_dir, config))
    checkpoint.catch_signals()
    UnFreeze_flag = None  # no phase is set up yet
    for epoch in range(Init_Epoch, UnFreeze_Epoch):
        unfreeze = not Freeze_Train or epoch >= Freeze_Epoch
        if unfreeze != UnFreeze_flag:
            batch_size = Unfreeze_batch_size if unfreeze else Freeze_batch_size
            Init_lr_fit, Min_lr_fit = fit_lr(batch_size * accumulate, Init_lr, Min_lr, optimizer_type,
                                             is_transformer(backbone))
            lr_scheduler_func = get_lr_scheduler(lr_decay_type, Init_lr_fit, Min_lr_fit, UnFreeze_Epoch)
            if unfreeze:
                model.Unfreeze_backbone()
            else:
                model.freeze_backbone()
            epoch_step = num_train // batch_size
            epoch_step_val = -(-num_val // batch_size)  # rounded up: every picture counts
            if epoch_step == 0 or epoch_step_val == 0:
                raise ValueError(f"{TOO_SMALL} {num_train} training and {num_val} test pictures do not fill one batch "
                                 f"of {batch_size}: add pictures, or lower the batch size")
            recipe.batch_size_name = "Unfreeze_batch_size" if unfreeze else "Freeze_batch_size"

            model_train = torch.compile(model) if compile else model
            if Cuda:
                if distributed:
                    model_train = model_train.cuda(local_rank)
                    model_train = torch.nn.parallel.DistributedDataParallel(
                        model_train, device_ids=[local_rank], gradient_as_bucket_view=True,
                        find_unused_parameters=getattr(model, "has_unused_parameters", False))
                    cudnn.benchmark = True
                else:
                    model_train = torch.nn.DataParallel(model_train)
                    cudnn.benchmark = True
                    model_train = model_train.cuda()
            elif distributed:
                model_train = torch.nn.parallel.DistributedDataParallel(
                    model_train, gradient_as_bucket_view=True,
                    find_unused_parameters=getattr(model, "has_unused_parameters", False))

            train_sampler = EpochSampler(num_train, batch_size, rank(), world_size(), seed=seed)
            val_sampler = EpochSampler(num_val, batch_size, rank(), world_size(), shuffle=False)
            batch_size = batch_size // world_size()
            gen = DataLoader(train_data, batch_size, num_workers=num_workers, pin_memory=Cuda, drop_last=True,
                             collate_fn=detection_collate, sampler=train_sampler, worker_init_fn=ignore_signals,
                             persistent_workers=num_workers > 0)
            gen_val = DataLoader(val_data, batch_size, num_workers=num_workers, pin_memory=Cuda,
                                 collate_fn=detection_collate, sampler=val_sampler, worker_init_fn=ignore_signals,
                                 persistent_workers=num_workers > 0)
            UnFreeze_flag = unfreeze
            if state is None and epoch == Init_Epoch and rank() == 0:
                save_image(os.path.join(save_dir, "first_batch.png"), first_batch(gen, class_names))

        if distributed:
            train_sampler.set_epoch(epoch)
        set_optimizer_lr(optimizer, lr_scheduler_func, epoch)
        fit_one_epoch(model_train, model, loss_history, optimizer, epoch, epoch_step, epoch_step_val, gen, gen_val,
                      UnFreeze_Epoch, Cuda, fp16, scaler, save_period, save_dir, local_rank,
                      recipe=recipe, checkpoint=checkpoint)
        if processes.from_rank_0(early_stop and rank() == 0 and loss_history.since_best() >= early_stop):
            break

    if rank() == 0:
        loss_history.writer.close()
        write_config(save_dir, {**config, "finished": True})
        best = loss_history.best()
        print(f"best top-1 {best['top1']:.2%} (epoch {best['epoch']}) in {save_dir}")
    if distributed:
        processes.leave()
