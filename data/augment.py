"""Augmentation of whole batches (n, C, H, W) in [-1, 1] on their device, by torch's CPU random stream.
RandAugment's operations take whole numbers 0..255 and their strengths s (n, 1, 1, 1) in [-1, 1]."""
import torch
import torch.nn.functional as F

from diffusion_blocks import to_device


def crop(x):
    """Pad with black by an eighth of the size, then cut the old size out, at each image's own place."""
    n, _, size, _ = x.shape
    pad = max(1, size // 8)
    x = F.pad(x, (pad,) * 4, value=-1.0).unfold(2, size, 1).unfold(3, size, 1)  # (n, C, 2P+1, 2P+1, H, W)
    top, left = to_device(torch.randint(2 * pad + 1, (2, n)), x.device)
    return x[torch.arange(n, device=x.device), :, top, left]                    # (n, C, H, W)


def flip(x):
    """Mirror each image, left to right, with probability 1/2."""
    is_flipped = to_device(torch.rand(len(x), 1, 1, 1) < 0.5, x.device)
    return torch.where(is_flipped, x.flip(-1), x)


# ---- RandAugment's operations: x (n, C, H, W), strengths s (n, 1, 1, 1) -> (n, C, H, W) ---------------------

def warp(x, entries):
    """Affine maps about the centre, the identity but for {(row, column): value}; grey outside."""
    theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)  # (n, 2, 3), in halves of the image
    for (i, j), value in entries.items():
        theta[:, i, j] = value.flatten()
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x - 128, grid, mode="nearest", align_corners=False) + 128


def identity(x, s):
    return x


def shear_x(x, s):
    return warp(x, {(0, 1): 0.3 * s})


def shear_y(x, s):
    return warp(x, {(1, 0): 0.3 * s})


SHIFT = 2 * 150 / 331  # by 150 pixels of 331; the image is 2 units wide


def translate_x(x, s):
    return warp(x, {(0, 2): SHIFT * s})


def translate_y(x, s):
    return warp(x, {(1, 2): SHIFT * s})


def rotate(x, s):
    angle = torch.pi / 6 * s  # 30 degrees
    cos, sin = angle.cos(), angle.sin()
    return warp(x, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos})


def blend(x, other, s):
    """Up to 0.9 of the way away from `other` for s > 0, towards it for s < 0."""
    return (x + 0.9 * s * (x - other)).round().clamp(0, 255)


def grey(x):
    """(n, 1, H, W) luminance, ITU-R 601."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:]
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


def smooth(x):
    """PIL's SMOOTH filter: a neighbour weighs 1/13, the pixel itself 5/13; the rim stays."""
    out = x.clone()
    nine = 9 * F.avg_pool2d(x, 3, 1)  # the sum over 3 x 3 pixels
    out[..., 1:-1, 1:-1] = ((nine + 4 * x[..., 1:-1, 1:-1]) / 13).round()
    return out


def brightness(x, s):
    return blend(x, 0, s)


def colour(x, s):
    return blend(x, grey(x), s)


def contrast(x, s):
    return blend(x, grey(x).mean((1, 2, 3), keepdim=True).round(), s)


def sharpness(x, s):
    return blend(x, smooth(x), s)


def posterize(x, s):
    return x - x % 2 ** (4 * s.abs()).round()  # without the lowest 4 bits


def solarize(x, s):
    return torch.where(x < 255 * (1 - s.abs()), x, 255 - x)


def autocontrast(x, s):
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * 255 / (high - low).clamp(min=1)).floor()
    return torch.where(high > low, stretched, x)


def equalize(x, s):
    """Flatten each channel's histogram as PIL.ImageOps.equalize does; under 256 pixels change nothing."""
    flat = x.long().flatten(2)                                                  # (n, C, H * W)
    counts = x.new_zeros(*flat.shape[:2], 256)                                  # (n, C, 256)
    counts = counts.scatter_add_(2, flat, torch.ones_like(x).flatten(2))
    brightest = counts.gather(2, flat.amax(2, keepdim=True))                    # (n, C, 1)
    step = ((flat.shape[2] - brightest) / 255).floor()                          # (n, C, 1)
    below = counts.cumsum(2) - counts                                           # (n, C, 256)
    table = ((step / 2).floor() + below) / step.clamp(min=1)                    # (n, C, 256)
    new = table.floor().clamp(max=255).gather(2, flat).view_as(x)               # (n, C, H, W)
    return torch.where(step.unsqueeze(3) > 0, new, x)


OPERATIONS = {
    "identity": identity, "shear x": shear_x, "shear y": shear_y, "translate x": translate_x,
    "translate y": translate_y, "rotate": rotate, "brightness": brightness, "colour": colour,
    "contrast": contrast, "sharpness": sharpness, "posterize": posterize, "solarize": solarize,
    "autocontrast": autocontrast, "equalize": equalize}


def rand(x, strength=9 / 30):
    """RandAugment (Cubuk et al. 2019): two of the 14 operations for each image, at magnitude 9 of 30."""
    x = ((x + 1) * 127.5).round()
    for _ in range(2):
        # each operation gets a random 14th of the batch: a boolean mask would have to wait for the device
        order = torch.randperm(len(x))
        there, back = to_device(torch.stack([order, order.argsort()]), x.device)
        signs = to_device(2.0 * torch.randint(2, (len(x), 1, 1, 1)) - 1, x.device)
        names = [list(OPERATIONS)[i] for i in torch.randperm(len(OPERATIONS)).tolist()]
        changed = []
        groups = zip(names, x[there].tensor_split(len(names)), signs.tensor_split(len(names)))
        for name, group, sign in groups:
            if len(group) > 0:
                group = OPERATIONS[name](group, strength * sign)
            changed.append(group)
        x = torch.cat(changed)[back]
    return x / 127.5 - 1


AUGMENTATIONS = {"rand": rand, "crop": crop, "flip": flip}  # in the order in which they are applied
