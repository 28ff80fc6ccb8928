"""Weights under the names of PyTorch's residual networks.

The names are those of akamaster/pytorch_resnet_cifar10 (whose networks have shortcuts A
or B) and of chenyaofo/pytorch-cifar-models and torchvision (B). Bottlenecks follow
torchvision; pre-activation networks, which none of them has, end in `bn`.
"""

import io
import re
from pathlib import Path

import numpy as np

from resnet_jax import UserError, one_line, weights
from resnet_jax.weights import Weights

SUFFIXES = (".pt", ".pth", ".th")
# Names of the projection on a shortcut, and of the classifier.
NAMINGS = {"akamaster": ("shortcut", "linear"), "chenyaofo": ("downsample", "fc")}

_MODULES = {"stem_conv": "conv1", "stem_bn": "bn1", "final_bn": "bn"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Torch's kernels are [out, in, height, width] and [out, in].
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
_TORCH_NAME = re.compile(
    r"(?:module\.)?"  # of DataParallel
    r"(?:(?P<top>conv1|bn1|bn|linear|fc)"
    r"|layer(?P<stage>[1-4])\.(?P<block>\d+)"
    r"\.(?:(?P<inner>(?:conv|bn)\d)|(?:shortcut|downsample)\.(?P<shortcut>[01])))"
    r"\.(?P<leaf>weight|bias|running_mean|running_var)"
)


def to_state(found: Weights, naming: str) -> dict[str, np.ndarray]:
    """The state dict of the same network in PyTorch.

    Raises:
      UserError: it has no counterpart under that naming.
    """
    net = found.network()
    if net.keras or not net.shortcut:
        kind = "the Keras variant" if net.keras else "a network without shortcuts"
        raise UserError(f"{kind} has no counterpart in PyTorch: keep it as safetensors")
    if naming == "chenyaofo" and net.shortcut == "A":
        raise UserError(
            "--naming=chenyaofo supports only shortcuts B, and this network has A: "
            "give --naming=akamaster"
        )
    shortcut, classifier = NAMINGS[naming]
    state = {}
    for path, array in weights.flatten(found.variables).items():
        _, *modules, leaf = path.split("/")
        *block, module = modules
        parts = []
        if block:
            stage, _, number = block[0].removeprefix("stage").partition("_block")
            parts = [f"layer{stage}", str(int(number) - 1)]
        names = {
            **_MODULES,
            "classifier": classifier,
            "shortcut_conv": f"{shortcut}.0",
            "shortcut_bn": f"{shortcut}.1",
        }
        name = ".".join([*parts, names.get(module, module)])
        array = array.transpose(_TO_TORCH.get(array.ndim, (0,)))
        state[f"{name}.{_LEAVES[leaf]}"] = np.ascontiguousarray(array)
        if leaf == "mean":
            state[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
    return state


def from_state(state: dict[str, np.ndarray], where: str) -> Weights:
    """The weights of a state dict, and the network that they belong to.

    Without a projection anywhere, the shortcuts are A, which have no weights.

    Raises:
      UserError: they fit no such network; the sentence names the first wrong one.
    """
    flat = {}
    for name, array in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        match = _TORCH_NAME.fullmatch(name)
        if not match:
            raise UserError(
                f"{where}: {name} is not a layer of these networks: give weights in "
                f"the naming of {' or '.join(NAMINGS)}"
            )
        if array.ndim not in (1, *_FROM_TORCH):
            raise UserError(
                f"{where}: {name} has shape {array.shape}, which no layer of these "
                "networks has: give weights of another network"
            )
        array = array.astype(np.float32).transpose(_FROM_TORCH.get(array.ndim, (0,)))
        flat["/".join(_our_path(match, array))] = np.ascontiguousarray(array)
    kernels = [path for path in flat if path.endswith("/kernel")]
    branches = [path for path in kernels if re.search(r"_block\d+/conv\d", path)]
    stem = flat.get("params/stem_conv/kernel")
    if stem is None or not branches:
        raise UserError(f"{where} lacks conv1 or layer1: give a network's weights")
    imagenet = len(stem) == 7
    bottleneck = any(path.endswith("/conv3/kernel") for path in branches)
    pre = "params/final_bn/scale" in flat
    version = 2 if pre and (bottleneck or imagenet) else 1
    projects = any("/shortcut_conv/" in path for path in kernels)
    model = {
        "version": version,
        "depth": len(branches) + 2,
        "stem": "imagenet" if imagenet else "cifar",
        "block": "bottleneck" if bottleneck else "basic",
        "activation": "pre" if pre else "post",
        "shortcut": "B" if projects else "A",
        "width": stem.shape[-1],
    }
    return weights.from_arrays(model, flat, where)


def _our_path(match: re.Match, array: np.ndarray) -> tuple[str, ...]:
    if match["top"]:
        classifier = {"linear": "classifier", "fc": "classifier"}
        top = {theirs: ours for ours, theirs in _MODULES.items()} | classifier
        modules = (top[match["top"]],)
    else:
        shortcut = {"0": "shortcut_conv", "1": "shortcut_bn"}
        block = f"stage{match['stage']}_block{int(match['block']) + 1}"
        modules = (block, match["inner"] or shortcut[match["shortcut"]])
    leaf = match["leaf"]
    if leaf.startswith("running_"):
        return ("batch_stats", *modules, leaf.removeprefix("running_"))
    if leaf == "weight":
        leaf = "scale" if array.ndim == 1 else "kernel"
    return ("params", *modules, leaf)


def read(path: Path) -> dict[str, np.ndarray]:
    """The state dict in a PyTorch file, or in a checkpoint that holds one.

    Raises:
      UserError: it cannot be read, or PyTorch is not installed.
    """
    torch = _torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, as pickle's errors are
        cause = one_line(error)
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({cause}): give a file written "
            "by torch.save(model.state_dict(), FILE)"
        ) from None
    for name in ("state_dict", "model"):  # as training scripts save it, among others
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value)
        for name, value in content.items()
    ):
        raise UserError(
            f"{path} does not hold a state dict: give a file written by "
            "torch.save(model.state_dict(), FILE)"
        )
    return {name: tensor.detach().float().numpy() for name, tensor in content.items()}


def to_bytes(state: dict[str, np.ndarray], path: Path) -> bytes:
    """The bytes that `torch.save` writes; `path` is for the error message."""
    torch = _torch(path)
    file = io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in state.items()}, file)
    return file.getvalue()


def logits(state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Logits that PyTorch computes from a state dict, in evaluation.

    Args:
      state: as `read` and `to_state` return it.
      images: float32 [batch, height, width, channels].
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    t = {
        name.removeprefix("module."): torch.tensor(array)
        for name, array in state.items()
    }

    def conv(x, name, stride=1):
        weight = t[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(t[f"{name}.{part}"] for part in names))

    def shortcut(x, activated, block, channels, stride):
        for name in (f"{block}.{kind}" for kind, _ in NAMINGS.values()):
            if f"{name}.1.weight" in t:
                return norm(conv(x, f"{name}.0", stride), f"{name}.1")
            if f"{name}.0.weight" in t:
                return conv(activated, f"{name}.0", stride)
        new = channels - x.shape[1]
        x = x[:, :, ::stride, ::stride]
        return F.pad(x, (0, 0, 0, 0, new // 2, new - new // 2))

    pre = "bn1.weight" not in t
    imagenet = t["conv1.weight"].shape[-1] == 7
    x = conv(torch.tensor(images).permute(0, 3, 1, 2), "conv1", 2 if imagenet else 1)
    x = x if pre else norm(x, "bn1").relu()
    x = F.max_pool2d(x, 3, 2, padding=1) if imagenet else x
    blocks = {name.rpartition(".conv1")[0] for name in t if ".conv1." in name}
    for block in sorted(
        blocks, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]
    ):
        stride = 2 if block.endswith(".0") and block != "layer1.0" else 1
        y = activated = norm(x, f"{block}.bn1").relu() if pre else x
        x = activated if block == "layer1.0" else x  # He 2016, section 4.1
        convs = sum(name.startswith(f"{block}.conv") for name in t)
        strided = 2 if imagenet and convs == 3 else 1
        for i in range(1, convs + 1):
            if pre and i > 1:
                y = norm(y, f"{block}.bn{i}").relu()
            y = conv(y, f"{block}.conv{i}", stride if i == strided else 1)
            if not pre:
                y = norm(y, f"{block}.bn{i}")
                y = y.relu() if i < convs else y
        y = y + shortcut(x, activated, block, y.shape[1], stride)
        x = y if pre else y.relu()
    x = norm(x, "bn").relu() if pre else x
    head = next(name for _, name in NAMINGS.values() if f"{name}.weight" in t)
    return F.linear(x.mean((2, 3)), t[f"{head}.weight"], t[f"{head}.bias"]).numpy()


def _torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch, which is not installed: pip install torch, or use "
            "a .safetensors file"
        ) from None
    return torch
