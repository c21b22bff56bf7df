"""Wine, MLP, float32, SGD with a schedule, a loop of its own."""
import torch
from sklearn.datasets import load_wine

import common

NAME = "run08_mlp_schedule_jump"
STEPS, WARM = 60, 30


def data():
    table = load_wine()
    return common.split(common.standardised(table.data), torch.from_numpy(table.target).long(), 32, STEPS)


def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def factor(step):
    if step < WARM:
        return (step + 1) / WARM
    # meant: cosine from 1 to 0; but the units of the two phases differ: per mille here
    return 1000.0 * (1 - (step - WARM) / (STEPS - WARM))


def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    if common.PLAIN:
        probe = common.Probe(model)
        for batch in data():
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            probe.see(loss)
            optimizer.step()
            schedule.step()
        return probe.print(NAME)
    import initlab

    done = 0
    where = common.folder(NAME)
    with initlab.guard(model, optimizer, loss_fn=loss_fn, folder=str(where), limit=1) as guard:
        for batch in map(guard.batch, data()):
            optimizer.zero_grad()
            loss = guard.loss(loss_fn(model, batch))
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    common.emit(NAME, guard.report(), where, done, STEPS, common.finite(model))


if __name__ == "__main__":
    main()
