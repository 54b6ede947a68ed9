"""Image recognition: a network that says which class an image belongs to.

**Data.** `digits` is scikit-learn's copy of the test part of the UCI set "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak, 1998): 1,797 digits by 13 writers, 8 x 8 pixels of 17
grey levels, here scaled to 0..255. Your own images come from a folder with one subfolder per class,
from a folder with `train/` and optionally `val/` and `test/` that contain such subfolders, or from
Parquet. Unsplit data is split class by class in the order of a hash of the encoded images. So the
split depends neither on names nor on `size`, and copies of an image are in the same split.

**Model.** `resnet`: basic blocks (He et al., CVPR 2016, doi:10.1109/CVPR.2016.90), the last
normalisation of each block starting at zero (Goyal et al. 2017, arXiv:1706.02677), with group
normalisation (Wu and He, ECCV 2018, arXiv:1803.08494) in place of batch normalisation: a sample's
result must not depend on the other samples of its worker. `vit`: a transformer over patches
(Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) with pre-normalisation, which classifies the mean
over patches instead of a class token (Beyer et al. 2022, arXiv:2205.01580).

**Measured** on the 359 test digits, trained on the 1,258 of `train` alone: `specs/digits.yaml`
99.7, 99.4 and 99.7 % right with the seeds 0, 1 and 2; on the pixels as 0..16, scikit-learn's
`KNeighborsClassifier(3)` 98.9 % and `SVC(gamma=0.001)`, an RBF kernel, 98.9 %. One digit is 0.28 %.

**Not shown:** digits of other writers (all splits have the same ones), and large images (the first
stage keeps the full resolution, which suits up to about 64 pixels).
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cluster.base.config import Spec
from cluster.base.errors import SpecError
from trainers.counter_rng import SampleRandom
from trainers.workload import Batch
from trainers.workloads.vision.images import Images

# Suffixes: B images of the batch, C channels, H x W pixels, K classes, P patches, D channels of one
# head (H).

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Vision(Images):
    """Classifies images of one size."""

    class Model(Spec):
        """The network and its regularisation."""

        network: Literal["resnet", "vit"] = "resnet"
        """A residual convolutional network, or a vision transformer."""
        width: Annotated[int, Field(ge=4)] = 24
        """resnet: channels of the first stage; each further stage has twice as many. vit: channels
        of all layers."""
        blocks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 1)
        """resnet: residual blocks of each stage; stages after the first halve the resolution.
        vit: the sum is the number of layers."""
        patch: PositiveInt = 2
        """vit: side length of a patch in pixels."""
        heads: PositiveInt = 4
        """vit: attention heads, with width / heads channels each."""
        dropout: Fraction = 0.0
        """Dropout probability of the classifier's input features."""
        label_smoothing: Fraction = 0.0
        """Share of each training label that is distributed evenly over all classes."""
        augment: Annotated[float, Field(ge=0)] = 0.0
        """Strength of random augmentation. 0 is none; 1 rotates by up to 12 degrees, scales by up
        to 10 % and shifts by up to 12 % of the side; other values are in proportion."""

    data: Images.Data
    model: Model

    def __init__(self, data: Any, model: Any) -> None:
        super().__init__(data, model)
        if self.model.network == "vit":
            if self.data.size % self.model.patch:
                raise SpecError(f"model.patch: must divide data.size, which is {self.data.size}")
            if self.model.width % self.model.heads:
                raise SpecError(
                    f"model.heads: must divide model.width, which is {self.model.width}"
                )

    def build(self) -> nn.Module:
        if self.model.network == "vit":
            return ViT(self.data, self.model)
        return ResNet(self.data.channels, self.data.classes, self.model)

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        if self.model.augment == 0:
            return batch
        return {**batch, "image": _random_affine(batch["image"], self.model.augment, random)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities [B, K]."""
        logits_BK: Tensor = model(batch["image"])
        return logits_BK

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats, with label smoothing only while gradients are recorded.

        Evaluation records none, so its loss refers to the true labels and can be compared between
        trials with different smoothing.
        """
        smoothing = self.model.label_smoothing if torch.is_grad_enabled() else 0.0
        return F.cross_entropy(output, batch["label"], reduction="none", label_smoothing=smoothing)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(-1) == batch["label"]).float()}

    def example(self) -> Tensor:
        shape = (1, self.data.channels, self.data.size, self.data.size)
        return torch.zeros(shape, dtype=torch.uint8)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, ResNet | ViT)
        return list(model.blocks)


class ResNet(nn.Module):
    """Class scores [B, K] of images [B, C, H, W] with values 0 to 255, uint8 or floating."""

    def __init__(self, channels: int, classes: int, spec: Vision.Model) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, spec.width, 3, padding=1, bias=False)
        self.norm = _group_norm(spec.width)
        self.blocks = nn.Sequential()
        inputs = spec.width
        for stage, count in enumerate(spec.blocks):
            width = spec.width * 2**stage
            for block in range(count):
                self.blocks.append(
                    ResidualBlock(inputs, width, stride=2 if stage and not block else 1)
                )
                inputs = width
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = image_BCHW.to(self.stem.weight.dtype) / 127.5 - 1
        x_BCHW = self.blocks(F.relu(self.norm(self.stem(x_BCHW))))
        logits_BK: Tensor = self.classifier(self.dropout(x_BCHW.mean((2, 3))))
        return logits_BK.to(self.stem.weight.dtype)  # autocast stops here: the loss is exact


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; initialised as the identity if shapes allow it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = _group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = _group_norm(width)
        nn.init.zeros_(self.norm2.weight)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), _group_norm(width)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(self.norm2(self.conv2(y_BCHW)) + self.skip(x_BCHW))


class ViT(nn.Module):
    """Class scores [B, K] of images [B, C, H, W] with values 0 to 255, uint8 or floating."""

    def __init__(self, data: Images.Data, spec: Vision.Model) -> None:
        super().__init__()
        self.embed = nn.Conv2d(data.channels, spec.width, spec.patch, stride=spec.patch)
        patches = (data.size // spec.patch) ** 2
        self.place = nn.Parameter(0.02 * torch.randn(patches, spec.width))
        self.blocks = nn.Sequential(*(TransformerLayer(spec) for _ in range(sum(spec.blocks))))
        self.norm = nn.LayerNorm(spec.width)
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.width, data.classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = image_BCHW.to(self.place.dtype) / 127.5 - 1
        x_BPC = self.embed(x_BCHW).flatten(2).transpose(1, 2) + self.place
        x_BPC = self.norm(self.blocks(x_BPC))
        logits_BK: Tensor = self.classifier(self.dropout(x_BPC.mean(1)))
        return logits_BK.to(self.place.dtype)  # autocast stops here: the loss is exact


class TransformerLayer(nn.Module):
    """Attention among the patches, then an MLP, each with a skip connection."""

    def __init__(self, spec: Vision.Model) -> None:
        super().__init__()
        width, self.heads = spec.width, spec.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BPC: Tensor) -> Tensor:
        into = self.query_key_value(self.norm1(x_BPC)).unflatten(-1, (3, self.heads, -1))
        query_BHPD, key_BHPD, value_BHPD = into.permute(2, 0, 3, 1, 4)
        y_BHPD = F.scaled_dot_product_attention(query_BHPD, key_BHPD, value_BHPD)
        x_BPC = x_BPC + self.out(y_BHPD.transpose(1, 2).flatten(2))
        y_BPC: Tensor = self.down(F.gelu(self.up(self.norm2(x_BPC))))
        return x_BPC + y_BPC


def _group_norm(channels: int) -> nn.GroupNorm:
    """Up to 8 groups of at least 4 channels: one channel at one pixel would become constant."""
    groups = max(g for g in (1, 2, 4, 8) if channels % g == 0 and channels >= 4 * g)
    return nn.GroupNorm(groups, channels)


def _random_affine(image_BCHW: Tensor, strength: float, random: SampleRandom) -> Tensor:
    """Images rotated, scaled and shifted at random, as floating point, with black borders.

    The sampling grid, -1 to 1 over the image, is computed without `affine_grid`: its matrix product
    may be rounded to bf16 or TF32, and differently for other batch sizes.
    """
    if not image_BCHW.is_floating_point():
        image_BCHW = image_BCHW.float()
    draw_B4 = strength * (2 * random.uniform(4).to(image_BCHW.dtype) - 1)
    turn_B11, grow_B11, right_B11, down_B11 = draw_B4[:, :, None, None].unbind(1)
    angle_B11, scale_B11 = math.radians(12) * turn_B11, torch.exp(0.1 * grow_B11)
    height, width = image_BCHW.shape[-2:]
    x_W = (2 * torch.arange(width, device=draw_B4.device) + 1) / width - 1
    y_H1 = (2 * torch.arange(height, device=draw_B4.device)[:, None] + 1) / height - 1
    cos_B11, sin_B11 = scale_B11 * torch.cos(angle_B11), scale_B11 * torch.sin(angle_B11)
    from_x_BHW = cos_B11 * x_W - sin_B11 * y_H1 + 2 * 0.12 * right_B11
    from_y_BHW = sin_B11 * x_W + cos_B11 * y_H1 + 2 * 0.12 * down_B11
    grid_BHW2 = torch.stack([from_x_BHW, from_y_BHW], dim=-1)
    return F.grid_sample(image_BCHW, grid_BHW2, align_corners=False)
