"""Training that starts from trained weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from pdrunet_jax.model.load import load_model
from pdrunet_jax.model.start import start_from
from pdrunet_jax.runtime.errors import UserError
from tests.support import tiny
from tests.support.tiny import brightness_model, save_model


def network(seed=1, multilabel=False, **options):
    model = tiny.network(seed, filters=2, dropout=0.1, **options)
    model.multilabel = multilabel
    return model


def save(model, path, classes=None, **options):
    names = {} if classes is None else {"class_names": classes}
    more = {"multilabel": True} if model.multilabel else {}
    return save_model(model, path, filters=2, outputs=model.outputs, threshold=0.8, **names, **more, **options)


def arrays(model):
    return jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def logits(model):
    """(4, outputs) of the last layer for some activations."""
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    return x @ np.asarray(model.final_conv.kernel[0, 0]) + np.asarray(model.final_conv.bias[...])


def softmax(values):
    return np.asarray(jax.nn.softmax(values, axis=-1))


def sigmoid(values):
    return np.asarray(jax.nn.sigmoid(values))


@pytest.mark.parametrize("classes", [["bone"], None])
def test_every_array_is_that_of_the_weights(tmp_path, classes):
    trained, model = network(), network()
    for leaf in nnx.iter_graph(trained):
        if isinstance(leaf[1], nnx.Param | nnx.BatchStat):
            leaf[1].set_value(leaf[1][...] + 1)
    notes = start_from(model, save(trained, tmp_path / "w.safetensors", classes), ["bone"])
    assert [note.split("; ")[1] for note in notes] == ([] if classes else ["taken for bone, in this order"])
    for found, expected in zip(arrays(model), arrays(trained), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_classes_are_copied_by_name_whatever_their_place(tmp_path):
    trained, model, fresh = network(outputs=3), network(2, outputs=4), network(2, outputs=4)
    path = save(trained, tmp_path / "w.safetensors", ["femur", "tibia"])
    (note,) = start_from(model, path, ["screw", "tibia", "femur"])
    assert note == (
        f"{path} has the classes femur, tibia; the last layer is copied for the background, tibia, femur and new, "
        "with random weights, for screw"
    )
    np.testing.assert_array_equal(logits(model)[:, [0, 3, 2]], logits(trained))
    np.testing.assert_array_equal(logits(model)[:, 1], logits(fresh)[:, 1])
    np.testing.assert_array_equal(model.e1.first.kernel[...], trained.e1.first.kernel[...])


def test_a_class_of_another_name_is_new_and_the_same_ones_in_another_order_change_places(tmp_path):
    path = save(network(outputs=3), tmp_path / "w.safetensors", ["femur", "tibia"])
    swapped, other = network(2, outputs=3), network(2, outputs=3)
    (note,) = start_from(swapped, path, ["tibia", "femur"])
    assert note.endswith("the last layer is copied for the background, tibia, femur")
    np.testing.assert_array_equal(logits(swapped)[:, [0, 2, 1]], logits(network(outputs=3)))
    (note,) = start_from(other, save(network(), tmp_path / "one.safetensors", ["bone"]), ["femur", "tibia"])
    assert note.endswith("the last layer is new, with random weights, for the background, femur, tibia")
    np.testing.assert_array_equal(logits(other), logits(network(2, outputs=3)))


def test_a_sigmoid_and_a_softmax_give_the_same_probability(tmp_path):
    one, three, overlapping = network(), network(outputs=3), network(outputs=2, multilabel=True)
    both = network(2, outputs=2)
    start_from(both, save(one, tmp_path / "one.safetensors", ["bone"]), ["bone"])
    np.testing.assert_allclose(softmax(logits(both))[:, 1], sigmoid(logits(one))[:, 0], rtol=1e-5)

    (note,) = start_from(
        overlapping, save(three, tmp_path / "three.safetensors", ["femur", "tibia"]), ["tibia", "femur"]
    )
    assert note.endswith("the last layer is copied for tibia, femur")
    against = [softmax(logits(three)[:, [0, place]])[:, 1] for place in (2, 1)]
    np.testing.assert_allclose(sigmoid(logits(overlapping)), np.stack(against, 1), rtol=1e-5)


def test_a_class_that_was_never_named_is_the_only_one_of_the_other_dataset(tmp_path):
    for before, after in (("foreground", "bone"), ("bone", "foreground")):
        trained, model = network(), network(2)
        (note,) = start_from(model, save(trained, tmp_path / "w.safetensors", [before]), [after])
        assert note.startswith(f"the class {before} of ")
        assert note.endswith(f"is taken for {after}")
        np.testing.assert_array_equal(logits(model), logits(trained))


def test_weights_without_names_and_other_outputs_give_a_new_last_layer(tmp_path):
    model = network(2, outputs=3)
    (note,) = start_from(model, save(network(), tmp_path / "w.safetensors"), ["femur", "tibia"])
    assert "does not name its classes; the last layer is new, with random weights, for the background" in note
    np.testing.assert_array_equal(logits(model), logits(network(2, outputs=3)))


def test_another_network_is_refused_with_each_option_that_differs(tmp_path):
    weights = save_model(brightness_model(3), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as refused:
        start_from(network(shortcut="conv1", in_channels=3), weights, ["a"])
    for words in ("--model.filters is 2, there it is 1", "--model.shortcut", "--model.in-channels is 3, there it is 1"):
        assert words in str(refused.value)
    assert "outputs" not in str(refused.value)
    assert load_model(weights).outputs == 3
