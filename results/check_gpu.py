"""On a GPU: is a recorded update the same as an unrecorded one, and what does it save?

    python results/check_gpu.py --model vit --updates 40       # train.py's flags for model, data and training

A part is trained three times from the same seed: recorded, and twice unrecorded. A GPU adds up in no fixed
order, so two unrecorded runs differ, too: what recording changes should be no more than that. Then updates are
timed, and their kernels counted. On a CPU nothing is recorded, and all differences are 0: a rehearsal."""
import statistics
from unittest.mock import patch

import torch

from bench import kernels_of, milliseconds
from common import Parser, UserError, about, begin, learner, run, train, write


def trained_weights(setup, part, n_updates, recorded):
    """(all weights in one vector, mean loss) after n updates of a part."""
    with unrecorded(not recorded):
        trained = learner(setup, part)
    for _ in range(n_updates):
        train.update(trained)
    weights = torch.cat([p.detach().double().cpu().flatten() for p in trained.net.parameters()])
    return weights, float(trained.loss_sum) / n_updates


def unrecorded(holds=True):
    """Within this block no learner that is made records its updates, if so asked."""
    if holds:
        return patch.object(train, "can_be_recorded", lambda job: False)
    return patch.object(train, "can_be_recorded", train.can_be_recorded)


def compare(setup, part, n_updates):
    """{column: number}: how far a recorded run is from an unrecorded one, and two unrecorded ones."""
    recorded, loss = trained_weights(setup, part, n_updates, True)
    plain, plain_loss = trained_weights(setup, part, n_updates, False)
    again, again_loss = trained_weights(setup, part, n_updates, False)
    return {"weights, recorded": ((recorded - plain).norm() / plain.norm()).item(),
            "weights, unrecorded twice": ((again - plain).norm() / plain.norm()).item(),
            "loss, recorded": abs(loss - plain_loss), "loss, unrecorded twice": abs(again_loss - plain_loss)}


def time_updates(setup, part, recorded):
    """{column: number}: milliseconds of an update, its kernels, and the peak of memory."""
    with unrecorded(not recorded):
        trained = learner(setup, part)

    def update():
        train.update(trained)
    milliseconds(update, setup.device, 2)
    row = {"ms": statistics.median(milliseconds(update, setup.device, 5))}
    update()  # this one may draw a chunk of batches
    row |= kernels_of(update, setup.device)
    row["is recorded"] = float(trained.recorded is not None and trained.recorded.graph is not None)
    if setup.device.type == "cuda":
        row["peak, MB"] = torch.cuda.max_memory_allocated(setup.device) / 1e6
        torch.cuda.reset_peak_memory_stats(setup.device)
    return row


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--updates", type=int, default=40, help="of each run that is compared (default: 40)")
    own, rest = parser.parse_known_args(argv)
    if own.updates < 5:
        raise UserError(f"--updates must be at least 5, since the fourth is recorded; got {own.updates}")
    setup = begin([*rest, "--end-to-end", "--overwrite"])  # nothing is overwritten
    same, times = {}, {}
    for part in ("end_to_end", "block_0", "control"):
        print(f"{part}: {own.updates} updates, three times; then it is timed", flush=True)
        same[part] = compare(setup, part, own.updates)
        for recorded in (True, False):
            name = f"{part}, {'recorded' if recorded else 'not recorded'}"
            times[name] = time_updates(setup, part, recorded)
    write(setup.folder / "check_gpu.json", about("check_gpu", argv) | {
        "config": train.flat(setup.config), "training": train.flat(setup.training),
        "tables": {f"distances after {own.updates} updates": same, "an update": times}})


if __name__ == "__main__":
    run(main)
