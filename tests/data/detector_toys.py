"""A detector of a few numbers, whose loss and findings are known by hand."""

import torch
from torch import nn

from attn_notes.foundations.checks import Output


class ToyOutput(Output):
    """What the toy made of images."""

    sums: torch.Tensor
    sizes: torch.Tensor


class Toy(nn.Module):
    """Finds the bright pixels of an image: its box, of the class that red says."""

    loss_weights = {"class": 1.0, "l1": 5.0, "giou": 2.0}

    def __init__(self, masks=False):
        super().__init__()
        self.weight, self.masks = nn.Parameter(torch.ones(())), masks
        if masks:
            self.loss_weights = self.loss_weights | {
                "mask_dice": 1.0,
                "mask_focal": 1.0,
            }

    def forward(self, images, mask=None):
        self.given = images, mask
        return ToyOutput(self.weight * images.sum((1, 2, 3)), torch.tensor(0))

    def losses(self, outputs, targets, sizes):
        boxes = sum(target["boxes"].sum() for target in targets)
        total = self.weight * (boxes + sizes.sum())
        return {name: total * (i + 1) for i, name in enumerate(self.loss_weights)}

    def post_process(self, outputs, sizes):
        images, _ = self.given
        return [self.one(x, *s) for x, s in zip(images, sizes.tolist(), strict=True)]

    def one(self, image, h, w):
        bright = image[0, :h, :w] > 0.1
        rows, columns = (bright.any(axis).nonzero()[:, 0] for axis in (1, 0))
        ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        boxes = torch.tensor([[float(x) for x in ends], [0.0, 0.0, w, h]])
        label = int(image[1, rows[0], columns[0]] > 0)
        found = {"boxes": boxes, "labels": torch.tensor([label, 1 - label])}
        found["scores"] = torch.tensor([0.9, 0.2])
        if self.masks:
            found["masks"] = torch.stack([bright.float(), torch.zeros(h, w)])
        return found


def bright(count=6, size=24, seed=0, masks=False):
    """Dark images with one bright rectangle of one of two colours, and where it is."""
    random = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    targets = []
    for i in range(count):
        x, y = torch.randint(0, size // 2, (2,), generator=random).tolist()
        w, h = torch.randint(4, size // 2, (2,), generator=random).tolist()
        images[i, 0, y : y + h, x : x + w] = 250
        images[i, 1, y : y + h, x : x + w] = 250 * (i % 2)
        target = {"boxes": [[x, y, x + w, y + h]], "labels": [i % 2]}
        if masks:
            target["masks"] = images[i, :1] > 0
        targets.append(target)
    return images, targets
