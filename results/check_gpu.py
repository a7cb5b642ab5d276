"""On a GPU: is a recorded update the same as an unrecorded one, and what does it save?

    python results/check_gpu.py --model vit --same      # distances of weights and losses: OUT/vit/same.json
    python results/check_gpu.py --model vit --time      # an update, recorded or not: OUT/vit/time.json

Model, data and training are train.py's flags. The parts are baseline, block 0 and control.
--same: a part is trained three times from the same seed: recorded, and twice unrecorded. A GPU adds up in no
fixed order, so two unrecorded runs differ, too: what recording changes should be no more than that.
--time: updates are timed, and their kernels counted, alone on the GPU.
On a CPU nothing is recorded, and all differences are 0: a rehearsal."""
import gc
import statistics
from unittest.mock import patch

import torch

from bench import kernels_of, milliseconds
from common import Parser, UserError, about, begin, learner, run, train, write

PARTS = ("end_to_end", "block_0", "control")


def trained_weights(setup, part, n_updates, recorded):
    """(all weights in one vector, mean loss) after n updates of a part."""
    with unrecorded(not recorded):
        trained = learner(setup, part)
    for _ in range(n_updates):
        train.update(trained)
    weights = torch.cat([p.detach().double().cpu().flatten() for p in trained.net.parameters()])
    loss = float(trained.loss_sum) / n_updates
    del trained
    gc.collect()  # a recorded function refers to itself
    return weights, loss


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
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--updates", type=int, default=40, help="of each run of --same (default: 40)")
    own, rest = parser.parse_known_args(argv)
    if not (own.same or own.time) or own.updates < 5:
        raise UserError("say --same, --time or both; --updates has to be at least 5, since the fourth is recorded")
    setup = begin([*rest, "--end-to-end", "--overwrite"])  # nothing is overwritten
    report = about("check_gpu", argv) | {"config": train.flat(setup.config),
                                         "training": train.flat(setup.training), "data": setup.data.about}
    if own.same:
        rows = {}
        for part in PARTS:
            print(f"{part}: {own.updates} updates, three times", flush=True)
            rows[part] = compare(setup, part, own.updates)
        write(setup.folder / "same.json",
              report | {"tables": {f"distances after {own.updates} updates": rows}})
    if own.time:
        rows = {}
        for part in PARTS:
            for name, recorded in ((f"{part}, recorded", True), (f"{part}, not recorded", False)):
                rows[name] = time_updates(setup, part, recorded)
                print(f"{name}: {rows[name]['ms']:.2f} ms", flush=True)
                gc.collect()  # a recorded function refers to itself
        write(setup.folder / "time.json", report | {"tables": {"an update": rows}})


if __name__ == "__main__":
    run(main)
