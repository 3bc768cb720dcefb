"""Ours and other people's networks, each with its authors' loss, optimizer and input, in one form.

    contestant = make("torchfcn FCN8s vgg16", "cpu")
    loss = contestant.step(*contestant.prepare(image, mask))  # uint8 (N, 3, H, W), (N, H, W)

- ours: SegmentationModule as `python train.py` builds it, with conf/'s defaults.
- torchfcn 1.9.7 (PyPI; github.com/wkentaro/pytorch-fcn), the best known FCN in PyTorch.
- segmentation-models-pytorch (PyPI): FPN and Unet; loss and optimizer of its multiclass example,
  or, as "our recipe", those of one of ours.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import timing  # noqa: F401  # puts the project on the path of a script in this folder
import torch
from torch import Tensor, nn
from torch.nn import functional as F

OURS = {
    f"ours {backbone} {precision}": (backbone, flag)
    for backbone in ("vgg19", "vgg16")
    for precision, flag in (("float32", "32-true"), ("bf16", "bf16-mixed"), ("fp16", "16-mixed"))
}
TORCHFCN = {  # its class and learning rate, examples/voc/train_fcn8s.py and train_fcn8s_atonce.py
    "torchfcn FCN8s vgg16": ("FCN8s", 1e-14),
    "torchfcn FCN8sAtOnce vgg16": ("FCN8sAtOnce", 1e-10),  # the same; pools scaled as in the paper
}
SMP = {  # its network and VGG
    f"smp {network} {backbone}": (network, backbone)
    for backbone in ("vgg19", "vgg16")
    for network in ("FPN", "Unet")
}
SMP_OUR_RECIPE = {f"{name}, our recipe": network for name, network in SMP.items()}
PEER = next(iter(TORCHFCN))  # the one that the bars compare with
GROUPS = {  # what is timed together; all of a group are in memory at once
    "vgg19": ("ours vgg19 float32", "ours vgg19 bf16", PEER, *list(SMP)[:2]),
    "vgg16": ("ours vgg16 float32", "ours vgg16 bf16", PEER),
}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@dataclass
class Contestant:
    """A network with what its authors train it with.

    prepare: RGB uint8 (N, 3, H, W) and labels uint8 (N, H, W), 255 void -> what its loader gives.
    step: one whole training step on that; its loss.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    step: Callable[[Tensor, Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @torch.inference_mode()
    def logits(self, image: Tensor) -> Tensor:
        """(N, K, H', W') of a prepared image; what it was padded with is still there."""
        with self.autocast():
            return self.network(image)


def require(name: str) -> None:
    """Import what a contestant needs, so that building it measures the network alone.

    Raises ImportError if it is not installed (benchmarks/requirements.txt).
    """
    if name in OURS:
        import_module("hydra.utils")
        import_module("fcn.training.loss_statistics")
    elif name in TORCHFCN:
        # Its trainer and data sets import these for downloads, pictures and .mat files: not used.
        # `import fcn`, its author's, finds our package of that name; only downloads would use it.
        for unused in ("pytz", "skimage", "skimage.io", "scipy", "scipy.io"):
            try:
                import_module(unused)
            except ImportError:
                sys.modules[unused] = ModuleType(unused)
        import_module("torchfcn")
    else:
        import_module("segmentation_models_pytorch")


def make(
    name: str,
    device: str,
    weights: str | Path | None = None,
    *overrides: str,
    recipe: str = "voc_mini",
    classes: int = 21,
    seed: int = 0,
) -> Contestant:
    """A contestant.

    Args:
        weights: of the contestant's VGG, as `fcn.weights.load_weights` takes them: a file, or the
            name that torchvision has for them; None: random.
        overrides: of conf/, such as optimizer.lr=1e-3; for ours, and for those with our recipe.
        recipe: of conf/experiment/, for those with our recipe.
        classes: K, for those of others; ours has as many as its data.
        seed: of the first weights.
    """
    require(name)
    torch.manual_seed(seed)
    if name in OURS:
        backbone, precision = OURS[name]
        given = [f"model.weights={weights}"] if weights else []
        given += [f"model.backbone={backbone}", f"trainer.precision={precision}"]
        given += [f"trainer.accelerator={torch.device(device).type}", *overrides]
        cfg, module = configured(*given)
        if cfg.trainer.compile:
            module.network.compile()
        return _ours(module.to(device), precision, device, cfg.trainer.gradient_clip_val)
    if name in TORCHFCN:
        vgg = weights and features("vgg16", weights)
        return _torchfcn(*TORCHFCN[name], device, vgg, classes)
    architecture, backbone = (SMP | SMP_OUR_RECIPE)[name]
    vgg = weights and features(backbone, weights)
    network = _smp_network(architecture, backbone, device, vgg, classes)
    if name in SMP_OUR_RECIPE:
        cfg = composed("train", f"experiment={recipe}", "model.weights=null", *overrides)
        return _smp_our_recipe(network, device, cfg)
    return _smp(network, device)


def features(backbone: str, source: str | Path) -> dict[str, Tensor]:
    """A VGG's features with torchvision's names, for images with torchvision's mean and deviation.

    They are read by our own network, so that all contestants begin with the same: of the weights
    IMAGENET1K_FEATURES, which expect other images, the first layer is adapted to these.
    """
    from fcn.network import FCN
    from fcn.weights import load_weights, torchvision_layers

    network = FCN(1, backbone=backbone, head_width=1, head_kernel=1)
    load_weights(network, source)
    return {
        f"{name}.{kind}": value
        for layer, name in torchvision_layers(network).items()
        for kind, value in network.get_submodule(layer).state_dict().items()
        if name.startswith("features.")
    }


def _ours(module: Any, precision: str, device: str, clip: float | None) -> Contestant:
    """In Lightning's order: forward, zero_grad, backward, gradient norm, clipping, update."""
    from fcn.precision import AUTOCAST
    from fcn.training.loss_statistics import LossStatistics

    optimizer, statistics = module.configure_optimizers(), LossStatistics()
    kind = torch.device(device).type
    mixed = partial(torch.autocast, kind, AUTOCAST.get(precision))
    autocast = mixed if precision in AUTOCAST else nullcontext
    # Where it is not enabled, it returns the loss as it is, and calls the optimizer.
    scaler = torch.amp.GradScaler(kind, enabled=precision == "16-mixed")

    def step(image: Tensor, mask: Tensor) -> Tensor:
        with autocast():
            loss = module.training_step({"image": image, "mask": mask}, 0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        statistics.on_before_optimizer_step(None, module, optimizer)
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def prepare(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return image.to(device), mask.to(device)

    return Contestant(module.network, optimizer, prepare, step, autocast)


def _theirs(
    network: nn.Module, loss: Callable, optimizer: Any, prepare: Callable, clip: float | None = None
) -> Contestant:
    def step(image: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(network(image), target)
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        return value.detach()

    return Contestant(network, optimizer, prepare, step)


def _torchfcn(
    kind: str, lr: float, device: str, vgg: dict[str, Tensor] | None, classes: int
) -> Contestant:
    """As in its examples/voc: loss summed over pixels, biases twice as fast, fixed upsampling."""
    import torchfcn

    caffe_mean = torch.from_numpy(torchfcn.datasets.voc.VOCClassSegBase.mean_bgr).float()
    network = getattr(torchfcn.models, kind)(n_class=classes)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    for layer in layers[:-3]:  # all zero, for weights to be copied in; the scores stay so
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if vgg is not None:
        numbers = sorted({int(key.split(".")[1]) for key in vgg})
        for layer, number in zip(layers, numbers, strict=False):
            layer.weight.data.copy_(vgg[f"features.{number}.weight"])
            layer.bias.data.copy_(vgg[f"features.{number}.bias"])
        weight, bias = layers[0].weight.data, layers[0].bias.data  # to BGR minus Caffe's mean
        bias += (weight.sum((2, 3)) * (caffe_mean.flip(0) / 255 - MEAN) / STD).sum(1)
        weight.copy_((weight / (255 * STD)[:, None, None]).flip(1))
    network.to(device)
    biases = {"params": [m.bias for m in layers], "lr": 2 * lr, "weight_decay": 0}
    groups = [{"params": [m.weight for m in layers]}, biases]

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        return torchfcn.trainer.cross_entropy2d(logits, label, size_average=False) / len(logits)

    def prepare(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        label = mask.long().masked_fill(mask == 255, -1)
        return (image.flip(1) - caffe_mean[:, None, None]).to(device), label.to(device)

    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.99, weight_decay=5e-4)
    return _theirs(network, loss, optimizer, prepare)


def _smp(network: Any, device: str) -> Contestant:
    """Its example's loss and optimizer: Dice, Adam at 2e-4 for all layers."""
    import segmentation_models_pytorch as smp

    loss = smp.losses.DiceLoss("multiclass", from_logits=True, ignore_index=255)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    return _theirs(network, loss, optimizer, partial(_smp_input, device))


def _smp_our_recipe(network: Any, device: str, cfg: Any) -> Contestant:
    """As our recipe says: stages frozen, the decoder many times as fast as the rest of the VGG."""
    from fcn.precision import best_layout, best_precision

    place = torch.device(device)
    if best_layout(place, best_precision(place)):  # as for ours, by model.channels_last=auto
        network.to(memory_format=torch.channels_last)
    pools = [i for i, m in enumerate(network.encoder.features) if isinstance(m, nn.MaxPool2d)]
    frozen = [0, *pools][cfg.model.freeze_stages]
    network.encoder.features[:frozen].requires_grad_(False)
    rate = cfg.optimizer.lr
    head = [p for n, p in network.named_parameters() if not n.startswith("encoder.")]
    groups = [
        {"params": list(network.encoder.features[frozen:].parameters()), "lr": rate},
        {"params": head, "lr": rate * cfg.model.head_lr_multiplier},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.optimizer.weight_decay)
    weights = cfg.model.class_weights
    if weights is not None:
        weights = torch.tensor(list(weights), dtype=torch.float32, device=device)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        # As in SegmentationModule.loss: a weight counts in the sum, and not in what divides it.
        each = F.cross_entropy(logits, label, weights, ignore_index=255, reduction="sum")
        return each / (label != 255).sum().clamp(min=1)

    prepare = partial(_smp_input, device)
    return _theirs(network, loss, optimizer, prepare, cfg.trainer.gradient_clip_val)


def _smp_network(
    architecture: str, backbone: str, device: str, vgg: dict[str, Tensor] | None, classes: int
) -> Any:
    import segmentation_models_pytorch as smp

    network = smp.create_model(architecture, backbone, encoder_weights=None, classes=classes)
    network.to(device)
    if vgg is not None:
        network.encoder.load_state_dict(vgg)
    return network


def _smp_input(device: str, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded to whole 32-pixel cells, which its networks demand."""
    pad = (0, -mask.shape[-1] % 32, 0, -mask.shape[-2] % 32)
    image = (image / 255 - MEAN[:, None, None]) / STD[:, None, None]
    return F.pad(image, pad).to(device), F.pad(mask, pad, value=255).long().to(device)


@torch.no_grad()
def even_out(features: nn.Sequential, image: Tensor) -> None:
    """Scale a VGG's convolutions: what each gives for `image`, after ReLU, has a spread of 1.

    ReLU and max-pooling pass a factor on, so the features stay what they are but for one factor
    each. Ours has `model.pool_scales` for this; features of the first VGG have spreads up to 425.
    """
    x, factor = image, 1.0  # what x is multiplied by
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            layer.bias *= factor
            scale = 1 / layer(x).relu().std().item()
            layer.weight *= scale
            layer.bias *= scale
            factor *= scale
        x = layer(x)


def composed(name: str, *overrides: str) -> Any:
    """conf/<name>.yaml, as a script's command line composes it."""
    from fcn import cli

    return cli.compose(overrides, name)


def configured(*overrides: str) -> tuple[Any, Any]:
    """The configuration and the module that `python train.py` makes of conf/ and `overrides`."""
    from fcn import cli
    from fcn.training.settle import settle_precision

    cfg = composed("train", "name=benchmark", "model.weights=null", *overrides)
    cfg.scheduler = None  # it would ask the Trainer how long the run is
    settle_precision(cfg)
    data, optimizer = cli.build(cfg, "data"), cli.build(cfg, "optimizer")
    palette = [list(colour) for colour in data.palette]
    names = list(data.classes)
    return cfg, cli.build(cfg, "model", class_names=names, palette=palette, optimizer=optimizer)


def ours_here(device: str, backbone: str = "vgg19") -> str:
    """Ours in the precision that `trainer.precision=auto` means on this machine."""
    from fcn.precision import best_precision

    best = best_precision(torch.device(device).type)
    names = [name for name in OURS if OURS[name][0] == backbone]
    return next((name for name in names if OURS[name][1] == best), names[0])


def save_checkpoint(path: Path, *overrides: str) -> tuple[Path, str]:
    """An untrained network with what evaluate.py and export.py read; its path and precision."""
    from omegaconf import OmegaConf

    from fcn.checkpoint import without_targets

    cfg, module = configured("data.download=false", *overrides)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    checkpoint |= {
        "config": without_targets(OmegaConf.to_container(cfg, resolve=True)),
        "global_step": 0,
    }
    checkpoint |= {"precision": cfg.trainer.precision, "pytorch-lightning_version": "2.6.0"}
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path, cfg.trainer.precision


def random_batch(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images of noise, and labels in cells of 16 pixels with a few per cent of void; uint8."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(22, (batch, height // 16 + 1, width // 16 + 1), generator=generator)
    mask = cells.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width]
    image = torch.randint(256, (batch, 3, height, width), generator=generator)
    return image.to(torch.uint8), mask.masked_fill(mask == 21, 255).to(torch.uint8)
