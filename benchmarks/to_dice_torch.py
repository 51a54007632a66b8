"""PyTorch's side of `benchmarks.to_dice`: the twin, trained on the batches that our command sees."""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
import torch

from pdrunet_jax.config import Config
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.pipeline import eval_batches, open_training_data, train_batches
from pdrunet_jax.model.pixels import unit_range
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.train import step as steps
from pdrunet_jax.train.optim import make_schedule
from pdrunet_jax.train.options import parse
from pdrunet_torch_ref import PDRUNet, training

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def augmented(config: Config, dataset: Any) -> Batches:
    """All batches of a training, augmented as `train_step` does."""
    source = train_batches(
        dataset, config.data, batch_size=config.train.batch_size, channels=1, seed=config.seed, process_shard=(0, 1)
    )

    @jax.jit
    def draw(batch: Any) -> Any:
        keys = sample_keys(steps.random_stream(config.seed, steps._AUGMENT), batch["epoch"], batch["index"])
        return augment(unit_range(batch["image"]), batch["mask"], keys, config.augment)

    found = []
    for _, batch in zip(range(config.train.steps), source, strict=False):
        images, mask = (np.array(each) for each in draw({key: batch[key] for key in batch if key != "valid"}))
        found.append(
            (torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy((mask == 1).astype("f4")))
        )
    return found


def validation(config: Config, dataset: Any) -> Batches:
    """The validation images with their masks, without padding."""
    found = []
    for batch in eval_batches(dataset, "val", config.data, batch_size=config.train.batch_size, channels=1):
        valid = batch["valid"]
        images = (batch["image"][valid].transpose(0, 3, 1, 2) / np.float32(255)).astype("f4")
        found.append((torch.from_numpy(images), torch.from_numpy(batch["mask"][valid] == 1)))
    return found


def score(model: torch.nn.Module, batches: Batches) -> float:
    """Mean Dice of the images."""
    model.eval()
    dice = []
    with torch.inference_mode():
        for images, truth in batches:
            found = model(images.contiguous(memory_format=torch.channels_last))[:, 0] > 0
            overlap, sizes = (found & truth).sum((1, 2)), found.sum((1, 2)) + truth.sum((1, 2))
            dice += [
                1.0 if not size else 2 * both / size
                for both, size in zip(overlap.tolist(), sizes.tolist(), strict=True)
            ]
    return float(np.mean(dice))


def main() -> None:
    """Arguments: kind of PyTorch, Dice, steps between validations, options of the training command."""
    kind, wanted, every = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    config = parse(sys.argv[4:]).settings
    dataset = open_training_data(config.data)
    batches, held = augmented(config, dataset), validation(config, dataset)
    _, state = steps.create_state(config, steps.build_model(config, 1))
    arrays = to_public(state.params, state.stats, dead_block=False)
    rates = [float(make_schedule(config.optim, config.train.steps)(number)) for number in range(config.train.steps)]

    started = time.perf_counter()
    model = PDRUNet(filters=config.model.filters, dropout=config.model.dropout, dead_block=False)
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    training.channels_last(model)
    run: Any = torch.compile(model) if "compiled" in kind else model
    optimizer = torch.optim.Adam(model.parameters(), lr=rates[0])
    loss = training.make_loss("bce_dice", 1, dice_weight=config.loss.dice_weight)
    for number, (images, target) in enumerate(batches):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rates[number]
        optimizer.zero_grad(set_to_none=True)
        logits = run(images.contiguous(memory_format=torch.channels_last))
        loss(logits, target, torch.ones_like(target, dtype=torch.bool)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        if (number + 1) % every == 0 and (dice := score(run, held)) >= wanted:
            found = {"seconds": time.perf_counter() - started, "step": number + 1, "dice": dice}
            print(json.dumps(found))
            return
    sys.exit(f"PyTorch did not reach a Dice of {wanted}")


if __name__ == "__main__":
    main()
