"""What the Flax models are compared with, in PyTorch."""

import numpy as np

from medmerge_jax.models import get_spec, list_models

IMAGENET_MODELS = [
    name for name in list_models() if get_spec(name).torch_head in ("fc", "classifier")
]
CIFAR_MODELS = [name for name in list_models() if get_spec(name).torch_head == "linear"]


def cifar_resnet(torch, layers, num_classes):
    """He et al.'s CIFAR network with option A shortcuts, written for these tests."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.stride, self.width = stride, width

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x[:, : self.width // 4])
                x = torch.cat([zeros, x, zeros], 1)
            return torch.relu(x + y)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            depth = (layers - 2) // 6
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            for i, (inputs, width) in enumerate([(16, 16), (16, 32), (32, 64)]):
                first = Block(inputs, width, 1 if i == 0 else 2)
                rest = [Block(width, width, 1) for _ in range(depth - 1)]
                setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            self.linear = nn.Linear(64, num_classes)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean((2, 3)))

    return Network()


def reference(torch, torchvision, name, num_classes):
    """The PyTorch network with random weights and running statistics far from 0 and 1."""
    torch.manual_seed(0)
    if name in CIFAR_MODELS:
        network = cifar_resnet(torch, int(name.removeprefix("resnet")), num_classes)
    else:
        network = getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.5)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
        # As in trained networks, a residual branch adds little. Otherwise 50 blocks of random
        # weights multiply float32's rounding errors beyond any use.
        for module in network.modules():
            last = "bn3" if hasattr(module, "bn3") else "bn2"
            if hasattr(module, "bn2"):
                getattr(module, last).weight.mul_(0.2)
    return network


def state(network):
    """The state dict as NumPy arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}


def relative_error(found, wanted):
    """The norm of the difference over the norm of what is wanted."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
