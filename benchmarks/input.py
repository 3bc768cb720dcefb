"""Images per second of one loader process: ours against torchvision's reference pipeline.

    python benchmarks/input.py --images 120 --batch 3

Theirs is written after references/segmentation/presets.py of torchvision's repository, which the
package does not contain, with v2 transforms: the smaller edge is resized to 260-1040 pixels (0.5-2
times 520), then flip, crop of 480, float, normalised. It runs on PIL images, its default, and on
tensors. Ours has the same scales for photographs of 375 pixels, and the same crop. It hands over
bytes, which the network normalises on its device. The last row decodes the JPEGs and does nothing
else, which is the least that any pipeline does.
"""

from statistics import median
from typing import Any

import torch
from PIL import Image
from timing import DATA, Table, in_turn, options, speedup, timed
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

BASE, CROP, EDGE = 520, 480, 375  # EDGE: the smaller one of most of VOC's photographs
SCALE = (0.5 * BASE / EDGE, 2 * BASE / EDGE)
FLOOR = "JPEG decoding alone"
SAME_DECODER = "decoding, which is the same in both, takes most of the time here"


class PadIfSmaller(v2.Transform):
    """As theirs: at the right and bottom, so that a crop fits."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(CROP - width, 0), max(CROP - height, 0)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = 255 if isinstance(inpt, tv_tensors.Mask) else 0
        return v2.functional.pad(inpt, fill=fill, **params) if any(params["padding"]) else inpt


def preset(*, tensors: bool) -> v2.Transform:
    """torchvision's reference augmentation, on tv_tensors or on Pillow's images."""
    image = tv_tensors.Image if tensors else torch.Tensor
    steps = [
        v2.RandomResize(int(0.5 * BASE), int(2 * BASE)),
        v2.RandomHorizontalFlip(0.5),
        PadIfSmaller(),
        v2.RandomCrop(CROP),
        v2.ToDtype({image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        v2.ToPureTensor(),
    ]
    steps.insert(0 if tensors else 4, v2.ToImage() if tensors else v2.PILToTensor())
    return v2.Compose(steps)


class Decoded(Dataset[int]):
    """Nothing but libjpeg's work, through Pillow as everywhere here."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> int:
        with Image.open(self.paths[index]) as file:
            file.convert("RGB")
        return index


def main(argv: list[str] | None = None) -> list[Table]:
    """Time our input pipeline and the reference presets in turn."""
    args = options(__doc__, images=120, batch=3, data_root=DATA).parse_args(argv)

    from fcn.datasets.voc2012 import VOC2012
    from fcn.loader_process import Transformed
    from fcn.transforms import collate, train_transform

    voc = VOCSegmentation(args.data_root, image_set="train")
    count = min(args.images, len(voc))
    transform = train_transform(crop_size=CROP, scale=SCALE, flip=0.5)
    ours = Transformed(VOC2012(split="train", root=args.data_root), transform, seed=0)
    shared = {"batch_size": args.batch, "num_workers": 1, "persistent_workers": True}
    keys = [(0, index) for index in range(count)]  # epoch, index
    loaders = {"ours": DataLoader(ours, sampler=keys, collate_fn=collate, **shared)}
    for name, tensors in (("torchvision, PIL", False), ("torchvision, tensors", True)):
        theirs = VOCSegmentation(
            args.data_root, image_set="train", transforms=preset(tensors=tensors)
        )
        theirs = wrap_dataset_for_transforms_v2(theirs)
        loaders[name] = DataLoader(theirs, sampler=range(count), **shared)
    loaders[FLOOR] = DataLoader(Decoded(voc.images), sampler=range(count), **shared)

    runs = {n: lambda x=x: timed(lambda: [None for _ in x]) for n, x in loaders.items()}
    seconds = in_turn(runs, args.rounds)
    peer = min((n for n in seconds if n[:5] == "torch"), key=lambda n: median(seconds[n]))
    table = Table(
        f"Input pipeline, {count} photographs, one worker, batch {args.batch}",
        ("", "images/s", "ms/image", f"× {peer}"),
        [
            (
                name,
                f"{count / median(x):.1f}",
                f"{1000 * median(x) / count:.1f}",
                f"{speedup(seconds, name, peer):.2f}",
            )
            for name, x in seconds.items()
        ],
    )
    ratio = speedup(seconds, "ours", peer)
    what = f"at least 1.3 times the faster of torchvision's ({peer})"
    table.bar(what, ratio, low=1.3, why=SAME_DECODER)
    return table.show()


if __name__ == "__main__":
    main()
