"""Classes told apart by their side."""

import pytest

from pdrunet_jax.model.sides import Mirror, find_pairs, mirror_of
from pdrunet_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    "names",
    [
        ("femur_left", "femur_right"),
        ("Left Femur", "Right Femur"),
        ("L femur", "R femur"),
        ("femurL", "femurR"),
        ("lfemur", "rfemur"),
        ("femur (l)", "femur (r)"),
        ("Femur links", "Femur rechts"),
        ("sin.femur", "dex.femur"),
        ("f\u00e9mur gauche", "f\u00e9mur droit"),
        ("\u5de6\u80a1\u9aa8", "\u53f3\u80a1\u9aa8"),
        ("left1", "right1"),
        ("Femur li.", "Femur re."),
        ("ko\u015b\u0107 lewa", "ko\u015b\u0107 prawa"),
        ("h\u00f8fte venstre", "h\u00f8fte h\u00f8yre"),
        ("sol femur", "sa\u011f femur"),
        ("\uc67c\ucabd \ub300\ud1f4\uace8", "\uc624\ub978\ucabd \ub300\ud1f4\uace8"),
    ],
)
def test_names_that_differ_in_their_side_alone_are_a_pair(names: tuple[str, str]) -> None:
    assert find_pairs(["patella", *names[::-1], "L4", "L5"]) == ((names,), ())


def test_names_with_a_side_and_no_counterpart_are_told() -> None:
    assert find_pairs(["left hip", "right knee"]) == ((), ("left hip", "right knee"))
    assert find_pairs(["lung", "rib", "cleft", "upright", "L/R", "left and right", "sol", "re", "leg"]) == ((), ())


def test_weights_say_what_mirror_images_do_to_their_classes() -> None:
    names = ["a_left", "b", "a_right"]
    found = mirror_of({"class_names": names}, 4)
    assert (found.channels, found.horizontal) == ((0, 3, 2, 1), "")
    assert "top-bottom" in found.vertical
    assert mirror_of({"class_names": names, "swap_on_flip": [["b", "a_left"]], "vertical_flips": True}, 4) == Mirror(
        (0, 2, 1, 3)
    )
    assert mirror_of({"class_names": names, "swap_on_flip": []}, 4) == Mirror()
    assert mirror_of({"class_names": ["femur"]}, 1) == Mirror()
    assert "other side of left femur" in mirror_of({"class_names": ["left femur"]}, 1).horizontal
    assert mirror_of({"swap_on_flip": [["class_1", "class_2"]]}, 3).channels == (0, 2, 1)
    for wrong in ([["b", "c"]], 3, ["b"]):
        with pytest.raises(UserError, match="swap_on_flip"):
            mirror_of({"class_names": names, "swap_on_flip": wrong}, 4)
