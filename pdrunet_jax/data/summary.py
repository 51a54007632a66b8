"""What `data check` says of a dataset without a problem."""

from collections import Counter, defaultdict

from pdrunet_jax.data.dataset import Inspection
from pdrunet_jax.data.partition import split_counts
from pdrunet_jax.data.scan import class_shares


def report_lines(inspection: Inspection) -> list[str]:
    """Counts, sizes, modes, classes with their shares, patients, splits, duplicates, notes: one line each."""
    dataset, scanned = inspection.dataset, inspection.scanned
    heights, widths = zip(*(item.size for item in scanned), strict=True)
    shares = [class_shares(item.codes, dataset.coding) for item in scanned]
    means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    ignored = sum(bool(item.codes.keys() & set(dataset.coding.ignore)) for item in scanned)
    modes = Counter(item.mode for item in scanned)
    splits = split_counts(dataset.samples)
    return [
        f"{dataset.name} at {dataset.root} ({inspection.layout})",
        f"images    {len(scanned)}, {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high",
        f"modes     {', '.join(f'{count} {mode}' for mode, count in modes.most_common())}",
        *(
            f"class {index}   {name}: {share:.1%} of the pixels, in {sum(row[index] > 0 for row in shares)} masks"
            for index, (name, share) in enumerate(zip(("background", *dataset.class_names), means, strict=True))
        ),
        f"patients  {len({sample.patient for sample in dataset.samples})}",
        f"splits    {splits}",
        f"twins     {_twins(inspection)}",
        *([f"ignored   {ignored} masks have pixels that are left out"] if ignored else []),
        *(f"note      {note}" for note in dataset.notes if note != splits),
    ]


def _twins(inspection: Inspection) -> str:
    """How many images have the very pixels of another; in two splits there are none, for that is an error."""
    same: dict[str, int] = defaultdict(int)
    for item in inspection.scanned:
        same[item.pixels] += 1
    count = sum(number for number in same.values() if number > 1)
    return f"{count or 'no'} images have the same pixels as another{', in the same split' if count else ''}"
