"""TFDS's split syntax: `train`, `train[:45000]`, `train[-10%:]`, `train+test`.

The rules are those of TFDS (https://www.tensorflow.org/datasets/splits), without
shards, and hold for every source, so that `digits` needs no TFDS.
"""

import re

from resnet_jax import UserError, did_you_mean

_BOUND = r"-?\d+(?:_\d+)*%?"
_PART = re.compile(rf"([\w-]+)(?:\[({_BOUND})?:({_BOUND})?\])?")


def parse(spec: str, field: str) -> list[tuple[str, str, str]]:
    """Reads a split, for example 'train[:45000]' or 'train+test'.

    Args:
      spec: the split as the user wrote it.
      field: the config field it comes from, for the error.

    Returns:
      A (name, start, stop) for each term, the bounds as written, '' where left out.

    Raises:
      UserError: the syntax is wrong.
    """
    parts = []
    for term in spec.split("+"):
        match = _PART.fullmatch(term.strip())
        name, start, stop = match.groups("") if match else ("", "", "")
        # TFDS reads a plain bound beside a percentage as one too, which no one expects.
        mixed = start and stop and start.endswith("%") != stop.endswith("%")
        if not match or mixed:
            raise UserError(
                f"{field}={spec!r} is not a split: write for example train, "
                "train[:45000], train[80%:90%] or train+test"
            )
        parts.append((name, start, stop))
    return parts


def select(spec: str, field: str, sizes: dict[str, int]) -> list[tuple[str, range]]:
    """Resolves a split to the examples of the source that it selects.

    Args:
      spec: the split as the user wrote it.
      field: the config field it comes from, for the errors.
      sizes: the number of examples in each split of the source.

    Returns:
      (split, indices) for each term.

    Raises:
      UserError: the syntax is wrong, there is no such split, a bound lies beyond its
        end, or nothing is left.
    """
    selections = []
    for name, start, stop in parse(spec, field):
        if name not in sizes:
            raise UserError(
                f"{field}={spec!r}: there is no split {name!r}: "
                f"{did_you_mean(name, sizes)}choose one of {', '.join(sizes)}"
            )
        size = sizes[name]
        try:
            indices = range(_index(start or "0", size), _index(stop or "100%", size))
        except IndexError as error:
            raise UserError(
                f"{field}={spec!r}: {error} is beyond the {size} examples of {name!r}: "
                "give bounds within them"
            ) from None
        if not indices:
            raise UserError(
                f"{field}={spec!r}: {name}[{start}:{stop}] is empty: give a first "
                "bound below the last"
            )
        selections.append((name, indices))
    return selections


def _index(bound: str, size: int) -> int:
    """The index that a bound means; percentages round to nearest, as in TFDS."""
    number = int(bound.rstrip("%"))
    limit = 100 if bound.endswith("%") else size
    if abs(number) > limit:
        raise IndexError(bound)
    index = round(number * size / 100) if bound.endswith("%") else number
    return index + size if number < 0 else index


def overlap(one: list[tuple[str, range]], other: list[tuple[str, range]]) -> int:
    """The number of examples that are in both of two results of `select`."""
    return sum(
        max(0, min(a.stop, b.stop) - max(a.start, b.start))
        for name, a in one
        for second, b in other
        if name == second
    )


def check_disjoint(
    train: list[tuple[str, range]],
    validation: list[tuple[str, range]],
    sizes: dict[str, int],
) -> None:
    """Checks that no example is used for both training and model selection.

    Args:
      train: the result of `select` for `train_split`.
      validation: the same for `validation_split`.
      sizes: the number of examples in each split of the source.

    Raises:
      UserError: some are; the sentence says what to give instead.
    """
    for name, held_out in validation:
        for other, indices in train:
            count = overlap([(name, held_out)], [(other, indices)])
            if not count:
                continue
            rest = [f"{name}[:{held_out.start}]"] if held_out.start else []
            if held_out.stop < sizes[name]:
                rest.append(f"{name}[{held_out.stop}:]")
            fix = (
                f"config.dataset.train_split={'+'.join(rest)}"
                if rest
                else f"config.dataset.train_split={name}[:90%] and "
                f"config.dataset.validation_split={name}[90%:]"
            )
            raise UserError(
                "config.dataset.train_split and config.dataset.validation_split share "
                f"{count} examples of {name!r}: give for example {fix}"
            )
