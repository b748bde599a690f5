"""Every sample once an epoch, the same steps for any number of workers, and nothing read twice after a resume."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from mmray.data.columns import Columns
from mmray.data.samples import Sample
from mmray.data.source import DataFile
from mmray.data.training_order import TrainingOrder, cut_for_training

FILES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@dataclass
class Numbered:
    """A source whose samples are named by file and row; it keeps which were read."""

    data: str = "numbered"
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        self.seen: list[str] = []

    def read(self, path, start, stop):
        for row in range(start, stop):
            self.seen.append(f"{path}:{row}")
            yield Sample(f"{path}:{row}", path, None, "")


def lanes(rows: list[int], count: int, size: int, seed: int = 0) -> TrainingOrder:
    files = [DataFile(str(number), length, 1, "x") for number, length in enumerate(rows)]
    return TrainingOrder(cut_for_training(files, count, size), count, seed)


def steps(made: TrainingOrder, own, epoch: int = 0, start: int = 0) -> list[list[str]]:
    return [[row.sample_id for row in rows] for rows in made.read(Numbered(), epoch, own, start)]


@given(FILES, st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_has_every_sample_once(rows, count, size, epoch):
    made = lanes(rows, count, size)
    found = Counter(name for step in steps(made, range(count), epoch) for name in step)
    assert len(found) == sum(rows) == found.total()
    assert len(steps(made, range(count), epoch)) == made.steps(epoch)


@given(FILES, st.integers(1, 6), st.integers(1, 12), st.integers(1, 4))
def test_workers_share_the_steps_of_one(rows, count, size, workers):
    made = lanes(rows, count, size)
    alone = steps(made, range(count))
    parts = [steps(made, range(rank, count, workers)) for rank in range(workers)]
    assert [sorted(step) for step in alone] == [sorted(chain.from_iterable(step)) for step in zip(*parts, strict=True)]


@given(FILES, st.integers(1, 6), st.integers(1, 12), st.data())
def test_a_resumed_epoch_goes_on_and_reads_nothing_before_it(rows, count, size, data):
    made = lanes(rows, count, size)
    whole = steps(made, range(count))
    start = data.draw(st.integers(0, len(whole)))
    source = Numbered()
    rest = [[row.sample_id for row in step] for step in made.read(source, 0, range(count), start)]
    assert rest == whole[start:]
    assert not set(source.seen) & {name for step in whole[:start] for name in step}


def test_seeds_and_epochs_have_other_orders():
    made = lanes([64], 2, 4)
    assert steps(made, [0, 1], 0) != steps(made, [0, 1], 1)
    assert steps(made, [0, 1]) != steps(lanes([64], 2, 4, seed=1), [0, 1])
