import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.config import ModelConfig, from_dict
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.freeze import describe_frozen, is_frozen
from pdrunet_jax.train.step import build_model, create_state, make_train_step

SETTINGS = {
    "model": {"filters": 2, "dropout": 0.0},
    "train": {
        "steps": 10,
        "weights": "w",
        "freeze": ["std_block", "e?", "bottleneck", "d[1-4]", "d5.bnorm1", "*.bias"],
    },
    "optim": {"name": "adamw", "weight_decay": 0.3, "learning_rate": 0.01, "ema": 0.9, "clip_norm": 1e-3},
}
TRAINED = {"d5.first.weight", "d5.second.weight", "d5.bnorm2.weight", "final_conv.weight"}


def batch(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    image, mask = (random.integers(0, top, (2, 16, 16), np.uint8) for top in (256, 2))
    return {
        "image": image[..., None],
        "mask": mask,
        "index": np.arange(2, dtype=np.int32),
        "epoch": np.zeros(2, np.int32),
    }


def test_a_pattern_stands_for_arrays_layers_and_blocks() -> None:
    assert is_frozen("bottleneck.0.first.weight", ["bottleneck"])
    assert is_frozen("bottleneck.0.first.weight", ["*.first"])
    assert is_frozen("e1.bnorm2.bias", ["e1.bnorm?.bias"])
    assert not is_frozen("e1.first.weight", ["e1.f", "first", "E1"])


def test_what_is_frozen_is_described_and_unknown_names_are_refused() -> None:
    config = ModelConfig(name="unet", filters=2, depth=1)
    line = describe_frozen(config, 1, ["encoder_*", "bottom"])
    assert line.startswith("frozen: encoder_*, bottom; ")
    with pytest.raises(UserError) as refused:
        describe_frozen(config, 1, ["encoder_0", "e1", "conv"])
    for words in ("'e1' matches none", "'conv' matches none", "encoder_0, bottom, up_0, decoder_0, final_conv"):
        assert words in str(refused.value)
    assert "'encoder_0'" not in str(refused.value)
    with pytest.raises(UserError, match="leaves nothing to train"):
        describe_frozen(config, 1, ["*"])
    with pytest.raises(UserError, match=r"without train\.weights they would be random"):
        from_dict({"train": {"freeze": ["e1"]}}, "test")


def test_frozen_layers_stay_bit_for_bit_and_have_no_part_in_the_update(tmp_path) -> None:
    config = from_dict(SETTINGS, "test")
    graph, state = create_state(config, build_model(config, 1))
    start = jax.tree.map(lambda leaf: np.array(leaf) * 1.1, (state.params, state.stats))  # off their first values
    start = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), start, (state.params, state.stats))
    state = dataclasses.replace(state, params=start[0], stats=start[1], ema=jax.tree.map(np.copy, start[0]))
    before = to_public(*start, dead_block=False)
    step = make_train_step(config, graph, 1)
    for number in range(3):
        state, values = step(state, batch(number))
    after, average = (to_public(each, state.stats, dead_block=False) for each in (state.params, state.ema))
    changed = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    statistics = {f"d5.bnorm2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == TRAINED | statistics
    assert {name for name in TRAINED if np.array_equal(before[name], average[name])} == set()
    assert [name for name, array in before.items() if name not in changed and (array != average[name]).any()] == []

    # The optimizer's memory is that of the trained arrays alone.
    assert float(values["grad_norm"]) > 0
    assert len(jax.tree.leaves(state.opt_state)) == 2 * len(TRAINED) + 2

    # A checkpoint holds no more, and comes back.
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, 1)
    checkpoints.save(3, state, {})
    restored = checkpoints.restore(jax.eval_shape(lambda: create_state(config, build_model(config, 1))[1]))
    assert restored is not None
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.state, state))


@pytest.mark.parametrize("name", ["pdrunet", "unet", "fusionnet"])
def test_the_normalisations_of_frozen_layers_are_in_evaluation_mode(name: str) -> None:
    freeze = ["e1", "encoder_0", "*.bnorm"]
    config = from_dict({"model": {"name": name, "filters": 2}, "train": {"weights": "w", "freeze": freeze}}, "test")
    model = nnx.eval_shape(lambda: build_model(config, 1))
    frozen = {".".join(map(str, path)) for path, part in nnx.iter_modules(model) if getattr(part, "frozen", False)}
    wanted = {
        "pdrunet": {"e1.bnorm1", "e1.bnorm2"},
        "unet": {"encoder_0.bnorm1", "encoder_0.bnorm2"},
        "fusionnet": {f"encoder_0.bnorm{number}" for number in range(1, 6)}
        | {f"up_{level}.bnorm" for level in range(4)},
    }
    assert frozen == wanted[name]
