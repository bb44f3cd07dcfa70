"""Next sample: unlabelled only, deterministic, nothing proposed twice while others wait."""

from samadapt.server.strategies import First, Random


class Store:
    def __init__(self, infos):
        self.infos = infos

    def get_unlabeled_images(self):
        return list(self.infos)

    def get_image_info(self, image):
        return self.infos[image]


def test_first_is_the_smallest_id():
    assert First()({"strategy": "first"}, Store({"b": {}, "a": {}})) == {"id": "a"}


def test_random_is_repeatable_and_goes_through_all_images():
    store = Store({name: {} for name in "abcdef"})
    strategy, seen = Random(), []
    for turn in range(6):
        image = strategy({"strategy": "random"}, store)["id"]
        assert strategy({"strategy": "random"}, store)["id"] == image
        store.infos[image] = {"strategy": {"random": {"ts": turn + 1}}}
        seen.append(image)
    assert sorted(seen) == list("abcdef")
    assert seen != list("abcdef")
    assert strategy({"strategy": "random"}, store)["id"] == seen[0]


def test_nothing_left():
    assert First()({}, Store({})) is None
    assert Random()({"strategy": "random"}, Store({})) is None
