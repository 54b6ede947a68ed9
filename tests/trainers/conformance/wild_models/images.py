"""Convolutions: the 16 numbers of a point are an image of 4 by 4."""

import torch
from torch import nn

from wild_models.base import CLASSES, WIDTH, Wild


class Image(Wild):
    def forward(self, model, batch):
        return model(batch["x"].view(-1, 1, 4, 4))


class Convolution(Image):
    """convolutions with BatchNorm"""

    def build(self):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )


class ConvolutionNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(h.mean((2, 3)))


class Grouped(Image):
    """grouped and depthwise convolutions"""

    def build(self):
        return ConvolutionNet(
            [nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)]
        )


class Transposed(Image):
    """transposed convolutions"""

    def build(self):
        return ConvolutionNet(
            [
                nn.Sequential(nn.Conv2d(4, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)),
                nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
            ]
        )


class Circular(Image):
    """circular padding, dilation, bilinear resizing"""

    def build(self):
        return ConvolutionNet(
            [
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                nn.Sequential(
                    nn.Upsample(scale_factor=2, mode="bilinear"),
                    nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2),
                ),
            ]
        )


class SpectralLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(9, dtype=torch.cfloat))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=WIDTH)


class Spectral(Wild):
    """complex weights (a spectral layer)"""

    def build(self):
        return nn.Sequential(SpectralLayer(), nn.Linear(WIDTH, CLASSES))


class SpectralBlocks(Wild):
    """complex weights in blocks"""

    def build(self):
        return SpectralNet()


class SpectralNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([SpectralLayer(), SpectralLayer()])
        self.mix = nn.Parameter(0.3 * torch.randn(9, 9, dtype=torch.cfloat))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(torch.fft.irfft(torch.fft.rfft(x) @ self.mix, n=WIDTH))


class ComplexBuffer(Wild):
    """a complex buffer"""

    def build(self):
        return FilterNet()


class FilterNet(nn.Module):
    def __init__(self):
        super().__init__()
        phases = torch.linspace(0, 3, 9)
        self.register_buffer("filter", torch.polar(torch.ones(9), phases))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))


class ConjugateBuffer(Wild):
    """a buffer that is the conjugate of another one"""

    def build(self):
        network = FilterNet()
        network.register_buffer("back", network.filter.conj())
        network.forward = None
        return network

    def forward(self, model, batch):
        turned = torch.fft.rfft(batch["x"]) * model.filter + 0.5 * model.back
        return model.last(torch.fft.irfft(turned, n=WIDTH))
