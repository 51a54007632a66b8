from pdrunet_jax.runtime.errors import DataError


def test_problems_that_differ_in_names_and_numbers_alone_are_listed_ten_times():
    many = [f"masks/left leg ({number}).png: undeclared mask value 255" for number in range(40)]
    many[0] += "\n    declare it"
    sizes = [
        f"images/x{number}.png: {number}x64 pixels, but its mask masks/x{number}.png has 32x32" for number in range(3)
    ]
    error = DataError("folder: 44 problems", [*many, *sizes, "manifest.csv: no column image"])
    lines = str(error).splitlines()
    assert len(error.problems) == 44
    assert lines[1:3] == ["  - masks/left leg (0).png: undeclared mask value 255", "    declare it"]
    assert lines[12:] == [
        "  - and 30 more of this kind",
        *(f"  - {problem}" for problem in sizes),
        "  - manifest.csv: no column image",
    ]
